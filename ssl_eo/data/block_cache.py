"""A folder of downloaded blocks that the processes of a node share: each is fetched once, and their size is bounded.

Files are named by content, so that what is there is never stale. The blocks that were not used for longest go first.
What a process has open stays readable, and keeps its place on the disk, when its file goes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["BlockCache", "CacheError"]

_N_LOCKS = 256  # files that stand for the locks of all blocks
_KEPT_RATIO = 0.9  # of the limit, when room is made: looking at every block takes long, and must not be done for each
_ABANDONED_S = 3600.0  # a partial file of that age belongs to a process that was killed
_PARTIAL = ".partial"


class CacheError(RuntimeError):
    """The cache cannot be used. No sample is at fault, so this is none of the errors that replace one."""


class BlockCache:
    """Blocks of about `limit` bytes together, in a folder of their own in `folder`. It may be pickled and forked.

    Every process may exceed the limit by the block that it is writing. All users of a folder must give one limit.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder / "ssl_eo_blocks"  # the user's own files may lie beside it, never in it
        self.limit = limit
        self._locks = folder / "ssl_eo_locks"
        try:
            for path in (self.folder, self._locks):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot hold a cache ({error.strerror}); choose another cache_dir") from None

    def get(self, name: str, size: int | None, fetch: Callable[[], bytes]) -> Path:
        """The file of the block `name` of `size` bytes (None: of any size), which `fetch` gives when it is not there.

        A process that asks for a block that another one is fetching waits for it. Raises `CacheError` when it cannot
        be stored.
        """
        if (path := self._found(name, size)) is not None:
            return path
        with self._lock(name, wait=True):
            return self._found(name, size) or self._store(name, fetch())

    def prefetch(self, name: str, size: int | None, fetch: Callable[[], bytes]) -> None:
        """As `get`, but a block that some other process is fetching, or one that shares its lock, is left to it."""
        if self._found(name, size) is None:
            with self._lock(name, wait=False) as held:
                if held and self._found(name, size) is None:
                    self._store(name, fetch())

    def holds(self, name: str) -> bool:
        """Whether a block is here now."""
        return (self.folder / name).is_file()

    def drop(self, name: str) -> None:
        """Forget a block, so that it is fetched anew."""
        (self.folder / name).unlink(missing_ok=True)

    def _found(self, name: str, size: int | None) -> Path | None:
        path = self.folder / name
        try:
            found = path.stat().st_size
            if size is not None and found != size:  # a power cut came before its bytes reached the disk
                path.unlink(missing_ok=True)
                return None
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(path, error) from error
        return path

    def _store(self, name: str, content: bytes) -> Path:
        if len(content) > self.limit:
            raise CacheError(
                f"a block of {len(content) / 1e6:.1f} MB does not fit into a cache of {self.limit / 1e6:.1f} MB: raise"
                " cache_gb (of the source's 'remote'), or lower chunk_size"
            )
        path = self.folder / name
        partial = path.with_name(path.name + _PARTIAL)
        try:
            self._make_room(len(content))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _unusable(path, error) from error
        return path

    def _make_room(self, needed: int) -> None:
        """Count `needed` bytes more; where that exceeds the limit, remove what was not used for longest."""
        with self._lock("", wait=True):
            counter = self._locks / "total_bytes"
            total = _read_number(counter) + needed
            if total > self.limit:
                total = self._evict(max(0, int(_KEPT_RATIO * self.limit) - needed)) + needed
            counter.write_text(str(total))

    def _evict(self, limit: int) -> int:
        """Remove blocks until no more than `limit` bytes are left; how many these are."""
        blocks, total = [], 0
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            total += status.st_size
            if not path.name.endswith(_PARTIAL) or status.st_mtime < time.time() - _ABANDONED_S:
                blocks.append((status.st_mtime_ns, status.st_size, path))
        for _, size, path in sorted(blocks):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold the lock of `name`; gives whether it is held, which it always is with `wait`. Released by any death."""
        path = self._locks / (str(zlib.crc32(name.encode()) % _N_LOCKS) if name else "room")
        try:
            self._locks.mkdir(parents=True, exist_ok=True)  # again: something that cleans up may have taken it
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile holds the handle too
            os.close(handle)


def _read_number(path: Path) -> int:
    """What the file `path` says; 0 when there is none. Too small a number only delays the next look at every block."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _unusable(path: Path, error: OSError) -> CacheError:
    hint = "free some, or lower cache_gb" if error.errno == errno.ENOSPC else "choose another cache_dir"
    return CacheError(f"{path}: {error.strerror}; {hint} (of the source's 'remote')")
