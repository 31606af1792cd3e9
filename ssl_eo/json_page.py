"""Pages: files of one JSON object that say what the weights beside them are, and may come from somebody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssl_eo.components import one_line
from ssl_eo.files import check_regular

__all__ = ["read_page"]

_MOST_BYTES = 64 << 20  # a long config and many scores take a hundredth


def read_page(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`.

    Raises `FileNotFoundError` or `NotADirectoryError` where there is no file, and for anything else that is no page a
    `ValueError` of one line that says why, for the caller to put the name before it.
    """
    try:
        check_regular(path, _MOST_BYTES)
        page = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ValueError(error.strerror or one_line(error)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(one_line(error)) from None
    if not isinstance(page, dict):
        raise ValueError(f"it holds no object, but {page!r:.40}")
    return page
