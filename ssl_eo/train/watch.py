"""Ranks that watch each other: when one is gone, has failed or goes no further, all end, and one says which and where.

A collective that waits for such a rank cannot be interrupted, and its error has an address at best. So each rank says
where it stands in a store beside the process group, and a thread of it listens, and ends the process where it must.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

from ssl_eo.distributed import World, broadcast_object, tell_by, told_by

__all__ = ["OtherRankError", "Watch"]

_BEAT_S = 0.5  # between two words of a rank
_SILENT_S = 4.0  # a rank that says nothing for so long is gone, where a collective has failed already
_GONE_S = 60.0  # and where nothing else speaks for it
_GRACE_S = 5.0  # for the main thread to come to its end by itself, by the error of a collective
_CLOSE_S = 60.0  # and then to close what it has open
_STORE_WITHIN = timedelta(seconds=20)
_STORE_ERRORS = (RuntimeError, dist.DistError)


class _Store(Protocol):
    """What is used of torch's stores, which have no types."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class OtherRankError(RuntimeError):
    """This rank cannot go on because of another one; the message says which and where it stood."""


class Word(NamedTuple):
    """What a rank last said. `mark` counts the places it has come by, in the same order on every rank."""

    beat: int
    host: str
    mark: int
    step: int
    doing: str

    @property
    def place(self) -> str:
        return f"step {self.step} ({self.doing})"


class Watch:
    """Say `at` wherever a run may come to wait, and put `over` around what is collective. One process needs neither.

    A context itself: its thread listens until the end, or until `end`.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        self._rank, self._size, self._timeout_s = world.rank, world.size, timeout_s
        self._host = socket.gethostname()
        self._place, self._since = (0, 0, "starting"), time.monotonic()
        self._beat = 0
        # Kept here: what the first rank holds goes with it.
        self._word_of_first: Word | None = None
        self._heard: tuple[int, str] | None = None
        self._ended, self._has_failed = threading.Event(), False
        self._store = _open_store(world) if world.size > 1 else None

    def __enter__(self) -> Watch:
        if self._store is not None:
            threading.Thread(target=self._listen, args=(self._store,), name="watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Listen no more: from here on ranks may end when they like."""
        self._ended.set()

    def at(self, step: int, doing: str) -> None:
        """Say that the run has come to `doing` something in `step`, counted from 0."""
        self._place, self._since = (self._place[0] + 1, step, doing), time.monotonic()

    @contextlib.contextmanager
    def over(self) -> Iterator[None]:
        """An error inside is told to the other ranks; one that comes from another rank is explained."""
        try:
            yield
        except Exception as error:
            self._has_failed = True
            if self._store is not None and told_by(error) is None:
                self._explain_or_tell(self._store, error)
            raise

    def _explain_or_tell(self, store: _Store, error: Exception) -> None:
        """Raise `OtherRankError` where another rank is the cause of `error`; else tell the others of it."""
        # What collectives raise when another process has ended; a kind of its own is an error of this rank.
        if type(error) is RuntimeError or isinstance(error, dist.DistError):
            try:
                found = self._other_cause(store)
            except _STORE_ERRORS:
                found = self._without_first_rank()
            if found is not None:
                raise found from error
        where = f"rank {self._rank} on {self._host}, {self._own.place}"
        with contextlib.suppress(*_STORE_ERRORS):  # nobody is there to be told
            self._heard = self._publish(store, f"{where}: {error}")
            if self._rank == 0:  # the store ends with this process
                self._wait_until_heard(store)
        first, first_text = self._heard or (self._rank, "")
        if first != self._rank and first_text.endswith(str(error)):  # all have it, as with a wrong config
            tell_by(first, error)
        if not isinstance(error, ValueError):  # of what the user gave, which is the same on every rank
            error.add_note(where)

    def _wait_until_heard(self, store: _Store) -> None:
        limit = time.monotonic() + _GRACE_S
        while not store.check([_heard_key(i) for i in range(self._size)]) and time.monotonic() < limit:
            time.sleep(_BEAT_S / 5)

    def _other_cause(self, store: _Store) -> OtherRankError | None:
        before, limit = self._words(store), time.monotonic() + _SILENT_S
        while time.monotonic() < limit:
            if (failure := self._published(store)) is not None:
                return tell_by(failure[0], OtherRankError(failure[1]))
            time.sleep(_BEAT_S / 5)
        if (gone := self._gone(before, self._words(store))) is None:
            return None
        first, text = self._publish(store, f"{gone}; rank {self._rank} stopped at {self._own.place}")
        return tell_by(first, OtherRankError(text))

    def _without_first_rank(self) -> OtherRankError:
        """The first rank holds the store, so without that nothing is known of the others."""
        word = self._word_of_first
        last = "rank 0 is gone" if word is None else f"{_named([0], [word])} gone: the last word was of {word.place}"
        found = OtherRankError(f"{last}; rank {self._rank} stopped at {self._own.place}")
        return found if self._rank == 1 else tell_by(1, found)

    def _listen(self, store: _Store) -> None:
        """The thread: beats, looks after the next rank, hears what is published, and notices when nothing goes on."""
        next_rank = (self._rank + 1) % self._size
        heard, heard_at = -1, time.monotonic()
        stuck: tuple[float, list[Word]] | None = None  # since when, and what all had said then
        try:
            while not self._ended.wait(_BEAT_S):
                self._beat += 1
                store.set(_key(self._rank), json.dumps(self._own))
                if (failure := self._published(store)) is not None:
                    self._end_process(failure[1], is_told=failure[0] != self._rank)
                    return
                now = time.monotonic()
                word_of_next, self._word_of_first = self._words(store, [next_rank, 0])
                if (beat := word_of_next.beat) != heard:
                    heard, heard_at = beat, now
                elif now - heard_at > _GONE_S:
                    self._publish(store, f"rank {next_rank} has said nothing for {_GONE_S:g} s: it is gone, or stopped")
                if now - self._since < self._timeout_s:
                    stuck = None
                elif stuck is None:
                    stuck = (now, self._words(store))
                elif now - stuck[0] > _SILENT_S:
                    words = self._words(store)
                    self._publish(store, self._gone(stuck[1], words) or self._behind(words))
        except _STORE_ERRORS:
            problem = self._without_first_rank()
            self._end_process(str(problem), is_told=told_by(problem) is not None)

    @property
    def _own(self) -> Word:
        return Word(self._beat, self._host, *self._place)

    def _end_process(self, problem: str, is_told: bool) -> None:
        """End the process, whose main thread may wait for ever, unless it comes to its end by itself."""
        if self._ended.wait(_GRACE_S) or (self._has_failed and self._ended.wait(_CLOSE_S)):
            return
        if not is_told and not self._has_failed:
            print(f"ssl-eo: {problem}", file=sys.stderr, flush=True)  # noqa: T201  # nobody else can
        os._exit(1)

    def _gone(self, before: Sequence[Word], after: Sequence[Word]) -> str | None:
        """What to say of ranks that have said nothing between two moments, if there are any."""
        silent = [r for r in range(self._size) if r != self._rank and after[r].beat == before[r].beat]
        if not silent:
            return None
        last = after[silent[0]]
        return f"{_named(silent, after)} gone: the last word was of {last.place}"

    def _behind(self, words: Sequence[Word]) -> str:
        """What to say of ranks that all others wait for."""
        least = min(word.mark for word in words)
        behind = [r for r, word in enumerate(words) if word.mark == least]
        return (
            f"{_named(behind, words)} at {words[behind[0]].place} for more than {self._timeout_s:g} s"
            " (parallel.timeout_s), and no other rank gets past it"
        )

    def _words(self, store: _Store, ranks: Sequence[int] | None = None) -> list[Word]:
        keys = [_key(rank) for rank in (range(self._size) if ranks is None else ranks)]
        return [Word(*json.loads(text)) for text in store.multi_get(keys)]

    def _published(self, store: _Store) -> tuple[int, str] | None:
        """Who said why the run ends, and what, if someone did."""
        if not store.check(["failure"]):
            return None
        rank, text = json.loads(store.get("failure"))
        self._heard = (rank, text)
        store.set(_heard_key(self._rank), "")
        return rank, text

    def _publish(self, store: _Store, text: str) -> tuple[int, str]:
        """Say why the run ends, unless another rank has; returns the rank whose word counts, and that."""
        rank, first_text = json.loads(store.compare_set("failure", "", json.dumps([self._rank, text])))
        store.set(_heard_key(self._rank), "")
        return rank, first_text


def _open_store(world: World) -> _Store:
    """A store that the first rank holds, with a word of every rank in it."""
    store: _Store
    if world.rank == 0:
        own = TCPStore(world.address, 0, is_master=True, wait_for_workers=False, timeout=_STORE_WITHIN)
        store = own
        for rank in range(world.size):
            store.set(_key(rank), json.dumps(Word(0, "", 0, 0, "starting")))
        broadcast_object(own.port)
    else:
        port = broadcast_object(None)
        store = TCPStore(world.address, port, is_master=False, wait_for_workers=False, timeout=_STORE_WITHIN)
    return store


def _key(rank: int) -> str:
    return f"rank{rank}"


def _heard_key(rank: int) -> str:
    return f"heard{rank}"


def _named(ranks: Sequence[int], words: Sequence[Word]) -> str:
    """`rank 1 on node3 is`, or `ranks 1 and 2 are`, or `ranks 1, 2, 3 and 5 more are`."""
    if len(ranks) == 1:
        host = words[ranks[0]].host
        return f"rank {ranks[0]}{f' on {host}' if host else ''} is"
    shown, rest = [str(rank) for rank in ranks[:4]], len(ranks) - 4
    return f"ranks {', '.join(shown)}{f' and {rest} more' if rest > 0 else ''} are"
