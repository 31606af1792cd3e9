"""Seconds of calls that take turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

__all__ = ["best_processor_seconds", "median_wall_seconds"]


def best_processor_seconds(calls: Mapping[str, Callable[[], object]], n_turns: int) -> dict[str, float]:
    """Processor time of each call on one thread, in turns of which the best counts."""
    best = dict.fromkeys(calls, math.inf)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(n_turns):
            for name, call in calls.items():
                start = time.process_time()
                call()
                best[name] = min(best[name], time.process_time() - start)
    finally:
        torch.set_num_threads(n_threads)
    return best


def median_wall_seconds(calls: Mapping[str, Callable[[], object]], n_turns: int, device: str) -> dict[str, float]:
    """Of each call with what it queued on the device; a turn before the first one warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + n_turns):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(taken[1:]) for name, taken in seconds.items()}
