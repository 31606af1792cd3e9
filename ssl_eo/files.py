"""Files that a kill, a full disk or a second process cannot spoil, or let wait. Needs the standard library alone."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import IO

__all__ = ["atomic_file", "atomic_write", "check_regular", "is_seen", "locked_folder", "own_file", "sync", "writing"]

_held: set[int] = set()  # handles of `own_file`


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An `OSError` inside is raised as one that says that the file `path` could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces `path` at the end, in one go: whatever happens, the old or the new is there.

    Raises `OSError` that names `path` when it cannot be written. Nothing of an attempt stays, but of a killed one
    `<path>.<random>.partial`. Files are synced to disk: whoever writes one in one go wants it to outlive a power cut.
    """
    partial = path.with_name(f"{path.name}.{token_hex(4)}.partial")  # random: several processes may write at once
    try:
        with writing(path):
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace the file `path` by one that holds `content`, as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


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


def sync(path: Path) -> None:
    """Wait until what a file holds, or which files a folder holds, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_seen(is_there: Callable[[], bool], within_s: float) -> bool:
    """Whether `is_there()` now or in a while: a network file system shows late what another machine has written."""
    limit = time.monotonic() + within_s
    while not is_there():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def own_file(path: Path) -> Iterator[int]:
    """A handle to read and write the file `path`, which is made if need be, and which no forked child shares.

    So a lock on it falls free with this process, whoever it has forked.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(handle)
    try:
        yield handle
    finally:
        if handle in _held:  # of a child that has let go no more
            _held.discard(handle)
            os.close(handle)


@contextmanager
def locked_folder(path: Path, hint: str) -> Iterator[None]:
    """Make the folder `path` and hold it for this process alone: its death frees it, whoever it has forked.

    Raises `ValueError` when it cannot be used or another process holds it; `hint` says what to set instead.
    """
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(own_file(path / ".lock"))
        except OSError as error:
            raise ValueError(f"{path} cannot be used: {error.strerror}; {hint}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is in use by another process; wait for it, stop it, or {hint}") from None
        yield


def _let_go() -> None:
    """A forked child shares its parent's locks: workers that outlive it by seconds would keep the folder."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
