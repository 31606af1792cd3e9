"""How far long work is, for a person who waits for it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

__all__ = ["progress", "say"]

PROGRESS_EVERY_S = 30.0  # where there is no terminal


def say(text: str) -> None:
    """One line on stderr, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def progress(title: str, is_kept: bool = True) -> Iterator[Callable[[int, int], None]]:
    """How far it is and the time left: a bar on a terminal, elsewhere a line now and then.

    A bar that `is_kept` is still seen when it has ended.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines(title)
        return
    with Progress(console=console, transient=not is_kept) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _progress_lines(title: str) -> Callable[[int, int], None]:
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY_S:
            last = now
            left = timedelta(seconds=round((now - start) / done * (total - done)))
            say(f"{title}: {done:,} of {total:,}, {left} left")

    return show
