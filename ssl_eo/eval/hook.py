"""Probes while training: every so often, on fixed small tasks, without touching the training itself.

One line a result goes to `eval.jsonl`. All have `step`, `task`, `split` (which was scored), `features` (`encoder`, or
the name of a control, which is measured once a run), `seconds` (of all that was done with these features at this step)
and a `kind`:

- `probe`: `tap`, `probe`, every metric of the kind of task by its name, `metric` (the one that ranks), `chosen`, and
  `n_leaked` (scored samples whose pixels are among those that probes were fitted on);
- `health`: `tap`, `n_features`, `effective_rank`, `mean_norm`, `mean_cosine` of the scored features;
- `error`: `error`, and nothing was measured.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_eo.distributed import broadcast_object, gather_objects, is_main, on_all_ranks, rank, world_size
from ssl_eo.eval.controls import CONTROLS, control_taps
from ssl_eo.eval.features import (
    Encode,
    FeatureSet,
    Featurise,
    Pool,
    check_taps,
    extract_over_ranks,
    patch_taps,
    pooled_taps,
    tap_name,
)
from ssl_eo.eval.health import health
from ssl_eo.eval.leaks import count_leaked
from ssl_eo.eval.probing import Probing
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.jsonl import JsonLines, read_jsonl

__all__ = ["EvalConfig", "EvalHook", "undisturbed"]

logger = logging.getLogger(__name__)


@dataclass
class EvalConfig:
    """When and how a run probes its own representation."""

    every_n_steps: int = 0  # 0: never
    tasks: list[TaskConfig] = field(default_factory=list)  # names of shipped benchmarks, or tasks written out
    at_start: bool = True  # also before the first step: the random encoder that training has to beat
    controls: bool = True  # also probe statistics of the pixels and random filters, once a run
    pool: Pool = "mean"  # of the tokens of a tap: CLS token, mean over patches, both, or mean and spread over patches
    taps: list[float] = field(default_factory=lambda: [1.0])  # where features are read, as ratios of the depth
    batch_size: int = 128  # samples per forward pass on each rank

    def __post_init__(self) -> None:
        if self.every_n_steps < 0:
            raise ValueError(f"every_n_steps must be 0 (never) or positive, got {self.every_n_steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        check_taps(self.taps)
        if self.every_n_steps and not self.tasks:
            raise ValueError("tasks is empty but every_n_steps is set: name a benchmark, such as synthetic_scenes")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks must have different names, got {', '.join(names)}")


class EvalHook:
    """Probes an encoder on `tasks` and writes what it finds to `run_dir/eval.jsonl`.

    Every rank calls `run` at the same step. A failing task becomes a record and never stops training.
    """

    def __init__(self, cfg: EvalConfig, run_dir: Path, device: torch.device) -> None:
        """Open the sources of all tasks, so that a path that is wrong on any rank is an error now, not hours later."""
        self.cfg = cfg
        self.path = run_dir / "eval.jsonl"
        self.device = device
        self.tasks = on_all_ranks(lambda: [Task(_held(task)) for task in cfg.tasks] if cfg.every_n_steps else [])
        known = read_jsonl(self.path) if is_main() else []
        done = {(r["task"], r["features"]) for r in known if r.get("kind") == "probe" and r["features"] != "encoder"}
        self._controls_done: set[tuple[str, str]] = broadcast_object(done)
        self._n_leaked: dict[str, int] = {}

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to run after `step` optimiser steps."""
        if self.cfg.every_n_steps == 0:
            return False
        if step == 0:
            return self.cfg.at_start
        return step % self.cfg.every_n_steps == 0 or step == total_steps

    def run(self, encode: Encode, step: int, module: nn.Module) -> dict[str, float]:
        """Probe `encode`, which returns the tokens of each of `cfg.taps` and runs on `module`.

        Returns `eval/<task>/<tap>/<probe or health measure>`, the same on every rank.
        """
        names = [tap_name(ratio) for ratio in self.cfg.taps]
        encoder = pooled_taps(encode, names, self.cfg.pool)
        found: dict[str, float] = {}
        patches = patch_taps(encode, names)
        with undisturbed(module, self.device):
            for task in self.tasks:
                of_patches = task.cfg.kind == "segmentation"
                found |= _scalars(task.name, self._measure(task, "encoder", patches if of_patches else encoder, step))
                for name, control in CONTROLS.items() if self.cfg.controls else ():
                    if (task.name, name) not in self._controls_done:
                        self._measure(task, name, control_taps(control, of_patches), step)
                        self._controls_done.add((task.name, name))
        return found

    def _measure(self, task: Task, features: str, featurise: Featurise, step: int) -> list[dict[str, Any]]:
        """Records of one task and one kind of features: extracted and probed by all ranks, written by rank 0."""
        start = time.perf_counter()
        try:
            train, scored = (
                extract_over_ranks(featurise, split, self.device, self.cfg.batch_size)
                for split in (task.train, task.watched)
            )
            n_leaked = self._count_leaked(task, train, scored)
            records = _probe(task, Probing(task.shown, train, None, scored, tuple(task.cfg.no_data)), scored)
            records = [{**r, "n_leaked": n_leaked} if r["kind"] == "probe" else r for r in records]
        except Exception as error:  # raised on all ranks or on none
            logger.warning("step %d: %s of task %s could not be evaluated: %s", step, features, task.name, error)
            records = [{"kind": "error", "error": f"{type(error).__name__}: {error}"}]
        if is_main():
            head = {"step": step, "task": task.name, "split": task.watched.name, "features": features}
            seconds = round(time.perf_counter() - start, 3)
            with JsonLines(self.path) as file:
                for record in records:
                    file.write({**head, **record, "seconds": seconds})
        return records

    def _count_leaked(self, task: Task, train: FeatureSet, scored: FeatureSet) -> int:
        """See `count_leaked`; the samples of a task are the same every time, so that it warns once."""
        if task.name not in self._n_leaked:
            splits = {task.train.name: train, task.watched.name: scored}
            self._n_leaked[task.name] = count_leaked(task.name, splits, task.cfg.flags)
        return self._n_leaked[task.name]


@contextlib.contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """`module` in evaluation mode; afterwards every submodule's mode and torch's random state are what they were."""
    modes = [(m, m.training) for m in module.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        module.eval()
        try:
            yield
        finally:
            for m, training in modes:
                m.training = training


def _held(task: TaskConfig) -> TaskConfig:
    """`task` with as many samples as is usual where it takes all: each rank holds them in memory."""
    names = ("max_train", "max_val", "max_test")
    return replace(task, **{name: getattr(TaskConfig, name) for name in names if getattr(task, name) is None})


def _probe(task: Task, probing: Probing, scored: FeatureSet) -> list[dict[str, Any]]:
    """Records of all probes and taps, on every rank; each is worked out by one rank, in turn."""
    work: list[Callable[[], dict[str, Any]]] = []
    for tap in probing.taps:
        work += [partial(_record, task, probing, tap, name) for name in task.cfg.probes]
        work.append(partial(_health, scored, tap))
    own = on_all_ranks(lambda: {i: work[i]() for i in range(rank(), len(work), world_size())})
    done: dict[int, dict[str, Any]] = {}
    for of_rank in gather_objects(own):
        done |= of_rank
    return [done[i] for i in range(len(work))]


def _record(task: Task, probing: Probing, tap: str, name: str) -> dict[str, Any]:
    probed = probing.run(name, tap)
    scores = {key: value for key, value in probed.outcome.scores().items() if math.isfinite(value)}
    headline = task.cfg.headline
    if headline not in scores:
        raise ValueError(f"{headline} is undefined for the samples of {task.name}")
    return {"kind": "probe", "tap": tap, "probe": name, "metric": headline, **scores, "chosen": probed.chosen}


def _health(features: FeatureSet, tap: str) -> dict[str, Any]:
    x = features.at(tap).flatten(0, -2)
    return {"kind": "health", "tap": tap, "n_features": x.shape[1], **health(x)}


def _scalars(task: str, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for record in records:
        prefix = f"eval/{task}/{record.get('tap')}"
        if record["kind"] == "probe":
            found[f"{prefix}/{record['probe']}"] = record[record["metric"]]
        elif record["kind"] == "health":
            found[f"{prefix}/effective_rank"] = record["effective_rank"]
    return found
