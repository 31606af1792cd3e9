"""How much of the time of a run may go into measuring it, and what is put off because of that."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from ssl_eo.distributed import broadcast_object

__all__ = ["TimeBudget"]


class TimeBudget:
    """At most `max_ratio` of the time since the first step of this process for what it measures; None: any.

    What something will cost is taken to be what it cost the last time, and nothing before its first time. All ranks ask
    at the same steps; the first one's clock decides for all.
    """

    def __init__(self, max_ratio: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_ratio, self._clock = max_ratio, clock
        self._start = clock()
        self._first_step: int | None = None
        self._spent_s = 0.0
        self._last_s: dict[str, float] = {}

    def start(self, step: int) -> None:
        """Training begins now, after `step` steps."""
        self._start, self._first_step = self._clock(), step

    @property
    def ratio(self) -> float:
        """The share of the time since the start that was spent."""
        elapsed = self._clock() - self._start
        return self._spent_s / elapsed if elapsed > 0 else 0.0

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """What is done inside counts as time spent on `what`."""
        before = self._clock()
        try:
            yield
        finally:
            self._last_s[what] = self._clock() - before
            self._spent_s += self._last_s[what]

    def wait(self, what: str, step: int) -> int:
        """For how many steps `what` has to be put off, 0 if it fits now. Collective where there is a limit."""
        if self._max_ratio is None:
            return 0
        n_steps: int = broadcast_object(self._wait(self._max_ratio, what, step))
        return n_steps

    def _wait(self, max_ratio: float, what: str, step: int) -> int:
        elapsed, cost = self._clock() - self._start, self._last_s.get(what, 0.0)
        missing_s = (self._spent_s + cost) / max_ratio - (elapsed + cost)
        if missing_s <= 0:
            return 0
        assert self._first_step is not None, "start was not called"
        n_done = step - self._first_step
        training_s = max(elapsed - self._spent_s, 0.0)
        if n_done < 1 or training_s == 0:
            return 1
        return max(1, math.ceil(missing_s * n_done / training_s))
