"""How `ssl-eo eval`, `study`, `predict` and `embed` end when they are told to: what they hold is free for others."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from ssl_eo.cluster import EXIT_RESUMABLE, STOP_SIGNALS, StoppedEarlyError, signals_handled

__all__ = ["until_stopped"]

_ONE_REQUEST_S = 2.0  # launchers ask more than once, and giving back is not to be interrupted


def until_stopped(work: Callable[[], int]) -> int:
    """The status of `work`, or that of a stop on request, which is one line.

    Signals that ask this process to end raise `StoppedEarlyError` in it, so that it gives its claim back. A process
    that dies instead counts as one that its work has killed.
    """
    try:
        with _requests_stop():
            return work()
    except StoppedEarlyError:
        print("ssl-eo: stopped on request; the same command goes on", file=sys.stderr, flush=True)
        return EXIT_RESUMABLE


@contextlib.contextmanager
def _requests_stop() -> Iterator[None]:
    owner, told_s = os.getpid(), -math.inf

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal told_s
        if os.getpid() != owner:
            os._exit(128 + signum)  # a process that reads samples: it has no claim
        before_s, told_s = told_s, time.monotonic()
        if told_s - before_s > _ONE_REQUEST_S:
            raise StoppedEarlyError

    heard = [name for name in (*STOP_SIGNALS, signal.SIGHUP) if signal.getsignal(name) is not signal.SIG_IGN]  # nohup
    with signals_handled(heard, stop):
        yield
