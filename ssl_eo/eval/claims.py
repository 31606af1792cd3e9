"""Work shared by any number of processes that see one folder: each takes what no other is at.

No process group is needed: ranks of torchrun, tasks of a Slurm array and commands typed in two terminals work together.
A claim is a locked file, so that of a process which ends in any way falls free, and is counted. What came first is told
by numbers that are drawn from a file too: clocks of machines differ.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from ssl_eo.files import own_file, writing

__all__ = ["Claim", "claimed", "next_turn", "work_through"]

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_SILENT_S = 5.0  # for which nobody needs to be told that somebody else is waited for
_PLAIN = re.compile(r"[\w-][\w.-]{0,119}", re.ASCII)  # names that are those of their files
_TURNS = ".turns"  # the file of the last number that was drawn
_BEGUN, _ENDED = b"x", b"ended "  # a claim's file holds one letter a process that is or was at it; or when it ended


class Claim:
    """A piece of work that is this process's alone.

    `n_before` processes have died at it. `ended` is the turn (see `next_turn`) at which it last ended in a result; None
    where it did not, or somebody has been at it since, or its file cannot be read.
    """

    def __init__(self, handle: int, path: Path) -> None:
        self._handle, self._path = handle, path
        found = os.pread(handle, 64, 0)
        self.n_before = found.count(_BEGUN) if not found.strip(_BEGUN) else 0
        self.ended = _ended(found)

    def begin(self) -> None:
        """From now on, a process that dies is counted."""
        self._write(_BEGUN * (self.n_before + 1))

    def leave(self) -> None:
        """It was given up, but nobody died."""
        self._write(_BEGUN * self.n_before)

    def finish(self) -> None:
        """It ended in a result, whether good or bad."""
        self._write(b"%b%d" % (_ENDED, next_turn(self._path.parent)))

    def _write(self, content: bytes) -> None:
        _replace(self._handle, self._path, content)


def next_turn(folder: Path, after: int = 0) -> int:
    """A number above `after`, and above all that were drawn in `folder` before, by any process on any machine."""
    folder.mkdir(parents=True, exist_ok=True)
    with own_file(folder / _TURNS) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        turn = max(_number(os.pread(handle, 64, 0)) or 0, after) + 1
        _replace(handle, folder / _TURNS, b"%d" % turn)
    return turn


@contextlib.contextmanager
def claimed(folder: Path, name: str) -> Iterator[Claim | None]:
    """The claim of the work `name`, or None where another process is at it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _file_name(name)
    with own_file(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield Claim(handle, path)


def work_through(folder: Path, names: Sequence[str], work: Callable[[str, Claim], None]) -> None:
    """`work(name, claim)` for all `names`, together with other processes that were given the same ones.

    Each is done once by processes that work at the same time; one that begins later does it again, and may find that
    there is nothing to do. Returns when all are done, by whomever: what a process leaves behind that dies is taken up
    by another.
    """
    began, left = next_turn(folder, _last_ending(folder)), list(names)
    idle_from_s, has_told = time.monotonic(), False
    while left:
        busy = []
        for name in left:
            with claimed(folder, name) as claim:
                if claim is None:
                    busy.append(name)
                elif claim.ended is None or claim.ended < began:
                    _work_on(claim, name, work)
                    idle_from_s = time.monotonic()
        left = busy
        if left and not has_told and time.monotonic() - idle_from_s > _SILENT_S:
            more = f" and {len(left) - 1} more" if left[1:] else ""
            logger.warning("waiting for another process, which is at %s%s", left[0], more)
            has_told = True
        if left:
            time.sleep(_LOOK_EVERY_S)


def _replace(handle: int, path: Path, content: bytes) -> None:
    """Make `content` that of the file `path`, which is open; raises `OSError` that names it."""
    with writing(path):
        os.pwrite(handle, content, 0)
        os.ftruncate(handle, len(content))


def _last_ending(folder: Path) -> int:
    """The greatest turn at which a claim ended, should the file of turns be lost or damaged; 0 without any."""
    if not folder.is_dir():
        return 0
    return max((_ended(path.read_bytes()[:64]) or 0 for path in folder.iterdir() if path.is_file()), default=0)


def _file_name(name: str) -> str:
    """That of the claim of `name`: of names that no file system takes, what can be read of them and a hash."""
    if _PLAIN.fullmatch(name):
        return name
    digest = blake2b(name.encode(errors="surrogatepass"), digest_size=12).hexdigest()
    return re.sub(r"[^\w-]", "_", name[:80], flags=re.ASCII) + f"-{digest}"


def _ended(content: bytes) -> int | None:
    """The turn at which a claim ended, by the content of its file; None where it did not, or that cannot be read."""
    return _number(content.removeprefix(_ENDED)) if content.startswith(_ENDED) else None


def _number(text: bytes) -> int | None:
    return int(text) if re.fullmatch(rb"[0-9]+", text) else None


def _work_on(claim: Claim, name: str, work: Callable[[str, Claim], None]) -> None:
    claim.begin()
    try:
        work(name, claim)
    except BaseException:
        claim.leave()
        raise
    claim.finish()
