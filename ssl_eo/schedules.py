"""Schedules: frozen callables from step to value, so that a scheduled scalar is a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Constant", "Linear", "Schedule", "Trapezoid", "WarmupCosine"]

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """`value` at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """From `start` at step 0 to `end` at `n_steps`, `end` afterwards."""

    start: float
    end: float
    n_steps: int

    def __call__(self, step: int) -> float:
        if step >= self.n_steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.n_steps


@dataclass(frozen=True)
class WarmupCosine:
    """Linear from `start` to `peak` over `warmup_steps`, then half a cosine down (or up) to `end` at `total_steps`."""

    peak: float
    end: float
    total_steps: int
    warmup_steps: int = 0
    start: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.end + 0.5 * (self.peak - self.end) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Trapezoid:
    """Linear from 0 to `peak` over `warmup_steps`, `peak`, then linear to `end` over the last `cooldown_steps`."""

    peak: float
    end: float
    total_steps: int
    warmup_steps: int = 0
    cooldown_steps: int = 0

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        left = self.total_steps - step
        if left < self.cooldown_steps:
            return self.end + (self.peak - self.end) * max(0, left) / self.cooldown_steps
        return self.peak
