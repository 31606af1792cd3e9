"""What is measured keeps to its share of the time: simulated with a clock that the test turns, on one rank and two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ssl_eo.distributed import rank
from ssl_eo.eval.budget import TimeBudget


class _Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _taken(max_ratio: float | None, cost_s: float, step_s: float, every: int, total: int, first: int = 0) -> list[int]:
    """The steps after which something that takes `cost_s` was done, due every so many steps."""
    clock = _Clock()
    budget = TimeBudget(max_ratio, clock)
    budget.start(first)
    taken, due = [], first + every
    for step in range(first + 1, total + 1):
        clock.now_s += step_s * (1 + rank())  # another rank's clock does not count
        if step >= due:
            if (n_steps := budget.wait("it", step)) == 0:
                with budget.spending("it"):
                    clock.now_s += cost_s
                taken.append(step)
                due = (step // every + 1) * every
                if max_ratio is not None and len(taken) > 1 and rank() == 0:
                    assert budget.ratio <= max_ratio + 1e-9
            else:
                due = step + n_steps
    return taken


def test_without_a_limit_nothing_waits() -> None:
    assert _taken(None, 100.0, 1.0, 10, 50) == [10, 20, 30, 40, 50]


def test_what_fits_is_never_put_off() -> None:
    assert _taken(0.1, 1.0, 1.0, 10, 50) == [10, 20, 30, 40, 50]


def test_what_does_not_fit_waits_until_it_does() -> None:
    # Each takes as long as ten steps. The cost of the first one is not known; after it the share has to fall until the
    # next fits: (10 + 10) / (n + 20) <= 0.1 from step 180 on.
    assert _taken(0.1, 10.0, 1.0, 10, 400) == [10, 180, 270, 360]


def test_a_process_that_goes_on_counts_its_own_time() -> None:
    assert _taken(0.1, 10.0, 1.0, 10, 1400, first=1000) == [1010, 1180, 1270, 1360]


def test_the_time_without_a_step_is_none() -> None:
    clock = _Clock()
    budget = TimeBudget(0.5, clock)
    budget.start(0)
    assert budget.ratio == 0.0
    with budget.spending("it"):
        clock.now_s += 4.0
    assert budget.ratio == 1.0
    assert budget.wait("it", 0) == 1


def test_what_is_cheap_does_not_pay_for_the_estimate_of_what_is_not() -> None:
    clock = _Clock()
    budget = TimeBudget(0.2, clock)
    budget.start(0)
    for what, cost_s in (("cheap", 0.1), ("costly", 6.0)):
        clock.now_s += 20.0
        with budget.spending(what):
            clock.now_s += cost_s
    assert budget.wait("cheap", 40) == 0
    # (6.1 + 6) / 0.2 = 60.5 s are needed, there are 46.1 + 6; steps take a second.
    assert budget.wait("costly", 40) == 9


def _taken_on_ranks() -> list[int]:
    return _taken(0.1, 10.0, 1.0, 10, 400)


def test_all_ranks_go_by_the_clock_of_the_first(on_ranks: Callable[..., list[Any]]) -> None:
    assert on_ranks(2, _taken_on_ranks) == [[10, 180, 270, 360]] * 2
