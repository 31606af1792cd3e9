"""Files of one JSON object a line: what a run writes down while it may be killed at any moment."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ssl_eo.files import writing

__all__ = ["JsonLines", "read_jsonl"]

logger = logging.getLogger(__name__)

_NO_JSON = object()


class JsonLines:
    """Appends objects to the file `path`, on the disk at once, so that a killed run keeps all it wrote.

    A last line that a killed run left unfinished is ended first, so that it spoils no other. Processes that share a
    file open it before any of them writes: a line that is being written looks unfinished.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab+", buffering=0)
        if self._file.tell() > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._append(b"\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` in one write, so that the lines of several ranks do not mix.

        Raises `OSError` that names the file where the disk does not take it.
        """
        self._append((json.dumps(record) + "\n").encode())

    def _append(self, data: bytes) -> None:
        with writing(self._path):
            while data:  # a disk that is nearly full takes a part, and refuses the rest with an error
                data = data[self._file.write(data) :]

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path, fits: Callable[[dict[str, Any]], bool] | None = None) -> list[dict[str, Any]]:
    """The objects of the file `path`; none without a file.

    A last line that has no end is what a kill leaves, or what is being written: it is no object yet, and nothing is
    said of it. Any other line that is no object is left out with one warning, and so are objects of which `fits` says
    that they are no records of such a file: they are damaged, or others have written into it.
    """
    if not path.is_file():
        return []
    *lines, unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records: list[dict[str, Any]] = []
    odd: list[tuple[int, str]] = []
    for n, line in enumerate([*lines, unfinished], start=1):
        record = _loaded(line)
        if isinstance(record, dict) and (fits is None or fits(record)):
            records.append(record)
        elif line.strip() and not (n > len(lines) and record is _NO_JSON):
            odd.append((n, line))
    if odd:
        n, first = odd[0]
        more = f" and {len(odd) - 1} more" if odd[1:] else ""
        _warn_once(f"{path}, line {n}{more}: no record of this file; left out", first[:200])
    return records


def _loaded(line: str) -> Any:
    """The value of a line, `_NO_JSON` where it has none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # no JSON; a number of thousands of digits; nested without end
        return _NO_JSON


@cache
def _warn_once(message: str, line: str) -> None:
    """Files are read again and again while others write to them; `line` is what is odd."""
    logger.warning("%s", message)
