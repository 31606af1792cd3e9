"""What share of its time a run spends on measuring its encoder: health and probes of a recipe. One table, with targets.

    python benchmarks/eval_cost.py [--config pretrain/mae_vitmicro4_eurosat] [--steps 120] [key=value ...]

cost    a step, and what health and probes take: the first time, when samples are read (and controls probed), and again
share   of the whole recipe, at its own cadence, and how often it could be at 2 % (probes) and 0.5 % (health)

Trains for so many steps in a process of its own, with two turns of each after the first. Of the recipe the steps alone
are shorter. `--size small` is a toy that shows in a minute that everything works; its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _table
from _table import Row

from ssl_eo.config import Config, load

ROOT = Path(__file__).parents[1]
MOST = {"health": 0.5, "probes": 2.0}  # percent of the time of a recipe
LOG_EVERY_N_STEPS = 10
TOY = """\
include: debug/mae
data: {n_workers: 0}
eval:
  every_n_steps: 20
  health_every_n_steps: 10
  health_samples: 16
  tasks:
    - name: toy
      train: {name: synthetic, sensors: [sentinel2_l2a], labels: scene, split: train, n_samples: 40, extent_m: 320.0}
      test: {name: synthetic, sensors: [sentinel2_l2a], labels: scene, split: test, n_samples: 20, extent_m: 320.0}
"""


@dataclass(frozen=True)
class Cost:
    """Seconds: the first time, and every other."""

    first_s: float
    again_s: float

    def ratio(self, every: int, n_steps: int, step_s: float) -> float:
        """Share of the time of so many steps, measured before the first one, `every` so many, and at the end."""
        spent = self.first_s + math.ceil(n_steps / every) * self.again_s
        return spent / (spent + n_steps * step_s)

    def every(self, most: float, n_steps: int, step_s: float) -> int | None:
        """The least number of steps from one time to the next at which the share is `most`; None: not even once."""
        left_s = most / (1 - most) * n_steps * step_s - self.first_s
        n_times = math.floor(left_s / self.again_s)
        return math.ceil(n_steps / n_times) if n_times > 0 else None


def measure(name: str, overrides: Sequence[str], n_steps: int) -> list[Row]:
    """The rows of a recipe, from a run of `n_steps`."""
    recipe = load(name, overrides)
    with tempfile.TemporaryDirectory() as folder:
        _train(name, overrides, n_steps, Path(folder))
        run = Path(folder) / recipe.run.name
        metrics, found = (_records(run / f"{kind}.jsonl") for kind in ("metrics", "eval"))
    if errors := [r["error"] for r in found if r["kind"] == "error"]:
        raise RuntimeError(f"{name}: {errors[0]}")
    rates = [r["samples_per_s"] for r in metrics if "samples_per_s" in r][1:]  # the first one has the start in it
    step_s = recipe.train.global_batch_size / statistics.median(rates)
    rows = [Row("cost", "a step", 1e3 * step_s, "ms")]
    costs = {}
    for what, key in (("health", "source"), ("probes", "task")):
        costs[what] = _cost([r for r in found if key in r])
        rows.append(Row("cost", f"{what}, the first time", costs[what].first_s, "s"))
        rows.append(Row("cost", f"{what}, again", costs[what].again_s, "s", ratio=costs[what].again_s / step_s))
    return rows + [row for what, cost in costs.items() for row in _shares(what, cost, recipe, step_s)]


def _shares(what: str, cost: Cost, recipe: Config, step_s: float) -> list[Row]:
    cfg, n_steps = recipe.eval, recipe.train.total_steps
    every = cfg.health_every_n_steps if what == "health" else cfg.every_n_steps
    share = cost.ratio(every, n_steps, step_s)
    title = f"{what} every {every:,} of {n_steps:,} steps"
    fits = cost.every(MOST[what] / 100, n_steps, step_s)
    return [
        Row("share", title, 100 * share, "%", most=MOST[what]),
        Row("share", f"{what} at {MOST[what]:g} %: every", None if fits is None else float(fits), "steps"),
    ]


def _cost(records: Sequence[dict[str, Any]]) -> Cost:
    """`seconds` are of all records of a step that are of one task or source and of one kind of features."""
    seconds: dict[int, dict[tuple[Any, ...], float]] = {}
    for r in records:
        seconds.setdefault(r["step"], {})[r.get("source"), r.get("task"), r["features"]] = r["seconds"]
    first, *others = [sum(parts.values()) for _, parts in sorted(seconds.items())]
    return Cost(first, statistics.median(others))


def _train(name: str, overrides: Sequence[str], n_steps: int, folder: Path) -> None:
    half, quarter = n_steps // 2, n_steps // 4
    given = [
        *overrides,
        *(f"run.out_dir={folder}", f"train.total_steps={n_steps}", f"checkpoint.every_n_steps={n_steps}"),
        *(f"optim.warmup_steps={quarter}", "log.report=false", f"log.every_n_steps={LOG_EVERY_N_STEPS}"),
        *("log.pictures_every_n_steps=0", f"eval.every_n_steps={half}", f"eval.health_every_n_steps={quarter}"),
        "eval.max_time_ratio=null",
    ]
    command = [sys.executable, "-m", "ssl_eo", "train", "--config", name, *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"training failed:\n{done.stderr}")


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pretrain/mae_vitmicro4_eurosat", help="a recipe that sets both cadences")
    parser.add_argument("--steps", type=int, default=120, help="that are trained")
    parser.add_argument("--size", choices=("base", "small"), default="base", help="small: a toy")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_args()
    toy = arguments.size == "small"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "toy.yaml")
        path.write_text(TOY, encoding="utf-8")
        rows = measure(str(path) if toy else arguments.config, arguments.overrides, 40 if toy else arguments.steps)
    print(_table.text(rows))
    what = "--size small: a toy" if toy else f"{arguments.config}, {arguments.steps} steps"
    print(f"\n{_table.machine()}, {what}")


if __name__ == "__main__":
    main()
