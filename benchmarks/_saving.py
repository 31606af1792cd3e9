"""What a checkpoint costs the training loop, written at once and while training goes on."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from _objective_steps import Setting
from _ranks import Group
from _scaling import recipe
from _table import Row

__all__ = ["measure_saving"]

CASES = {"1 process": (1, "single"), "2 processes, fsdp": (2, "fsdp")}
N_STEPS = 4  # before a save, and after it


def measure_saving(setting: Setting, n_turns: int, folder: Path) -> list[Row]:
    """The stall of the step that saves, and what the steps around it take longer until all is on the disk."""
    rows = []
    for case, (n, strategy) in CASES.items():
        losses: dict[str, list[tuple[float, float]]] = {"at once": [], "asynchronous": []}
        plain: list[float] = []
        with ExitStack() as stack:
            groups = {how: stack.enter_context(_group(setting, n, strategy, how, folder)) for how in losses}
            for group in groups.values():
                group.wait_until_ready()
            for turn in range(1 + n_turns):
                for how, group in groups.items():
                    step_s, stall, cost = _turn(group)
                    print(f"{case}, {how}: {step_s:.3g} s a step, {stall:.3g} and {cost:.3g} steps", file=sys.stderr)
                    if turn > 0:  # the first save of all sets up what the others use
                        plain.append(step_s)
                        losses[how].append((stall, cost))
        rows.append(Row("saving", f"{case}: a step", median(plain), "s"))
        for how, found in losses.items():
            stall, cost = (median(values) for values in zip(*found, strict=True))
            most = 1.0 if how == "asynchronous" else None
            rows.append(Row("saving", f"{case}, {how}: stall of the step that saves", stall, "steps", most=most))
            rows.append(Row("saving", f"{case}, {how}: until all is written", cost, "steps"))
    return rows


def _turn(group: Group) -> tuple[float, float, float]:
    """Seconds of a step, and in such steps what the step that saves takes longer, and what all do together."""
    step_s = group.seconds("steps", N_STEPS) / N_STEPS
    saving_s = group.seconds("step_and_save")
    later_s = group.seconds("steps", N_STEPS) + group.seconds("wait")
    return step_s, saving_s / step_s - 1, (saving_s + later_s) / step_s - (1 + N_STEPS)


def _group(setting: Setting, n: int, strategy: str, how: str, folder: Path) -> Group:
    config = recipe(setting, "mae", n, strategy, folder / how)
    config["checkpoint"] = {"asynchronous": how == "asynchronous", "keep": 1}
    return Group(config, n, setting.device, apart=n == 1)
