"""Files that a kill, a full disk or a second process cannot spoil. Needs the standard library alone."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

__all__ = ["atomic_write", "lock_folder"]


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace the file `path` in one go: whatever happens, the old or the new content is there.

    Raises `OSError` that names `path` when it cannot be written; nothing of the attempt stays.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error


def lock_folder(path: Path, hint: str) -> int:
    """Make the folder `path` and hold it for this process: the handle to close in the end.

    Raises `ValueError` when it cannot be used or another process holds it; `hint` says what to set instead.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"{path} cannot be used: {error.strerror}; {hint}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ValueError(f"{path} is in use by another process; wait for it, stop it, or {hint}") from None
    return handle
