"""Work spread over processes, results in order."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import TypeVar

__all__ = ["in_order"]

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Sequence[T], n_workers: int) -> Iterator[R]:
    """`map` over a pool of `n_workers` fresh processes, or in this process when 0; results in the order of `items`."""
    if n_workers < 0:
        raise ValueError(f"n_workers must not be negative, got {n_workers}")
    if n_workers == 0:
        yield from map(function, items)
        return
    # Forking a process in which torch has started threads can deadlock; the fork server has imported it, no more.
    context = get_context("forkserver")
    context.set_forkserver_preload(["ssl_eo.data.types"])
    with ProcessPoolExecutor(n_workers, mp_context=context, initializer=_follow_parent) as pool:
        try:
            yield from pool.map(function, items)
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died (killed for lack of memory?); what is finished is kept: run the same command"
                " again, with fewer workers perhaps"
            ) from None


def _follow_parent() -> None:
    """Pool workers wait for work for ever when their parent is killed; end this one instead."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
