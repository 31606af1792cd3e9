"""Whether a path is a plain file of a bearable size, before it is opened."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

__all__ = ["check_regular"]


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Raise `OSError` for what is there and is no file, or has more than `max_bytes`; what is missing passes.

    Who opens a pipe waits for someone to write into it, and a device may have no end.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return  # whoever opens it says so
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if max_bytes is not None and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, expected at most {max_bytes:,}", str(path))
