"""Work shared by any number of processes that see one folder: each takes what no other is at.

No process group is needed: ranks of torchrun, tasks of a Slurm array and commands typed in two terminals work together.
A claim is a locked file, so that of a process which ends in any way falls free, and is counted. What came first is told
by numbers that are drawn from a file too: clocks of machines differ.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ["Claim", "claimed", "next_turn", "work_through"]

_LOOK_EVERY_S = 1.0
_TURNS = ".turns"  # the file of the last number that was drawn
_BEGUN, _ENDED = b"x", b"ended "  # a claim's file holds one letter a process that is or was at it; or when it ended


class Claim:
    """A piece of work that is this process's alone.

    `n_before` processes have died at it. `ended` is the turn (see `next_turn`) at which it last ended in a result; None
    where it did not, or somebody has been at it since.
    """

    def __init__(self, handle: int, folder: Path) -> None:
        self._handle, self._folder = handle, folder
        found = os.pread(handle, 64, 0)
        has_ended = found.startswith(_ENDED)
        self.n_before = 0 if has_ended else found.count(_BEGUN)
        self.ended = int(found.removeprefix(_ENDED) or 0) if has_ended else None

    def begin(self) -> None:
        """From now on, a process that dies is counted."""
        self._write(_BEGUN * (self.n_before + 1))

    def leave(self) -> None:
        """It was given up, but nobody died."""
        self._write(_BEGUN * self.n_before)

    def finish(self) -> None:
        """It ended in a result, whether good or bad."""
        self._write(b"%b%d" % (_ENDED, next_turn(self._folder)))

    def _write(self, content: bytes) -> None:
        os.pwrite(self._handle, content, 0)
        os.ftruncate(self._handle, len(content))


def next_turn(folder: Path) -> int:
    """A number that is greater than all that were drawn in `folder` before, by any process on any machine."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / _TURNS, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        turn = int(os.pread(handle, 64, 0) or 0) + 1
        os.pwrite(handle, b"%d" % turn, 0)  # never shorter than what was there
    finally:
        os.close(handle)
    return turn


@contextlib.contextmanager
def claimed(folder: Path, name: str) -> Iterator[Claim | None]:
    """The claim of the work `name`, or None where another process is at it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield Claim(handle, folder)
    finally:
        os.close(handle)


def work_through(folder: Path, names: Sequence[str], work: Callable[[str, Claim], None]) -> None:
    """`work(name, claim)` for all `names`, together with other processes that were given the same ones.

    Each is done once by processes that work at the same time; one that begins later does it again, and may find that
    there is nothing to do. Returns when all are done, by whomever: what a process leaves behind that dies is taken up
    by another.
    """
    began, left = next_turn(folder), list(names)
    while left:
        busy = []
        for name in left:
            with claimed(folder, name) as claim:
                if claim is None:
                    busy.append(name)
                elif claim.ended is None or claim.ended < began:
                    _work_on(claim, name, work)
        left = busy
        if left:
            time.sleep(_LOOK_EVERY_S)


def _work_on(claim: Claim, name: str, work: Callable[[str, Claim], None]) -> None:
    claim.begin()
    try:
        work(name, claim)
    except BaseException:
        claim.leave()
        raise
    claim.finish()
