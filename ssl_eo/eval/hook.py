"""Measuring an encoder while it trains, every so often, without touching the training itself.

Probes on fixed small tasks; and more often the health of its features on samples of the training sources, without any
label. One line a result goes to `eval.jsonl`. Those of tasks have `step`, `task`, `split` (which was scored),
`features` (`encoder`, or the name of a control, which is measured once a run), `precision` (of the matrix products),
`seconds` (of all that was done with these features at this step) and a `kind`:

- `probe`: `tap`, `probe`, every metric of the kind of task by its name, `metric` (the one that ranks), `chosen`,
  `n_leaked` (scored samples whose pixels are among those that probes were fitted on) and `n_shared_groups` (likewise
  places);
- `health`: `tap`, `n_features`, and the measures of `ssl_eo.eval.health` of the scored features (of patches, of at most
  20,000, evenly);
- `error`: `error`, and nothing was measured.

Those of training sources have `step`, `source`, `features` (`encoder`), `precision`, `seconds` and the kind `health`,
with `n_samples` and `collapsed` (what is wrong, in words) besides, or `error`. The kind `skipped` has `step`, `what`
(`probes` or `health`) and `reason`: it was due and is put off.
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
from ssl_eo.eval.budget import TimeBudget
from ssl_eo.eval.collapse import CollapseWatch
from ssl_eo.eval.controls import CONTROLS, control_taps
from ssl_eo.eval.failures import failure
from ssl_eo.eval.features import (
    Encode,
    FeatureSet,
    Featurise,
    Pool,
    Precision,
    check_taps,
    extract_over_ranks,
    in_precision,
    patch_taps,
    pooled_taps,
    tap_name,
)
from ssl_eo.eval.health import health
from ssl_eo.eval.leaks import count_leaked, count_shared_groups
from ssl_eo.eval.probes import is_at_optimum
from ssl_eo.eval.probing import Probing, draw_of
from ssl_eo.eval.record_checks import is_of_training
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.eval.watching import Training, WatchedSource, watched_sources
from ssl_eo.eval.wording import NOT_AT_OPTIMUM, value_text
from ssl_eo.jsonl import JsonLines, read_jsonl
from ssl_eo.models.layers import Attention

__all__ = ["EvalConfig", "EvalHook", "undisturbed"]

logger = logging.getLogger(__name__)

WORKS = ("health", "probes")  # what is measured, the cheap one first
_LEAST_TIME_RATIO = 1e-6  # less is never; every_n_steps: 0 says so
_MAX_HEALTH_ROWS = 20_000  # patches whose health is measured


@dataclass
class EvalConfig:
    """When and how a run measures its own representation."""

    every_n_steps: int = 0  # probes; 0: never
    tasks: list[TaskConfig] = field(default_factory=list)  # names of shipped benchmarks, or tasks written out
    health_every_n_steps: int = 0  # the health of features, without labels; 0: never
    health_samples: int = 256  # of each training source, for that; each rank holds its part of them in memory
    # Probes and health are put off while they would take more than this share of the time; null: they may take any.
    max_time_ratio: float | None = None
    at_start: bool = True  # also before the first step: the random encoder that training has to beat
    controls: bool = True  # also probe statistics of the pixels and random filters, once a run
    pool: Pool = "mean"  # of the tokens of a tap: CLS token, mean over patches, both, or mean and spread over patches
    taps: list[float] = field(default_factory=lambda: [1.0])  # where features are read, as ratios of the depth
    precision: Precision = "float32"  # of the encoder's matrix products while it is measured, whatever training takes
    batch_size: int = 128  # samples per forward pass on each rank

    def __post_init__(self) -> None:
        for key in ("every_n_steps", "health_every_n_steps"):
            if (value := getattr(self, key)) < 0:
                raise ValueError(f"{key} must be 0 (never) or positive, got {value}")
        if self.health_samples < 2:
            raise ValueError(f"health_samples must be at least 2, got {self.health_samples}")
        if self.max_time_ratio is not None and not _LEAST_TIME_RATIO <= self.max_time_ratio <= 1:
            allowed = f"at least {_LEAST_TIME_RATIO:g} and at most 1, or null"
            raise ValueError(f"max_time_ratio must be {allowed}, got {self.max_time_ratio}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        check_taps(self.taps)
        if self.every_n_steps and not self.tasks:
            raise ValueError("tasks is empty but every_n_steps is set: name a benchmark, such as synthetic_scenes")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks must have different names, got {', '.join(names)}")


class EvalHook:
    """Measures an encoder and writes what it finds to `run_dir/eval.jsonl`: probes on `tasks`, health on `training`.

    Every rank calls `due` and `run` at the same steps. What fails becomes a record and never stops training.
    """

    def __init__(
        self,
        cfg: EvalConfig,
        run_dir: Path,
        device: torch.device,
        training: Training | None = None,
        begins_random: bool = True,
    ) -> None:
        """Open the sources of all tasks, so that a path that is wrong on any rank is an error now, not hours later.

        Of a run that begins from given weights, the encoder before the first step is no random one.
        """
        self._begins_random = begins_random
        self.cfg = cfg
        self.path = run_dir / "eval.jsonl"
        self.device = device
        self.budget = TimeBudget(cfg.max_time_ratio)
        self.tasks = on_all_ranks(lambda: [Task(_held(task)) for task in cfg.tasks] if cfg.every_n_steps else [])
        self.watched: list[WatchedSource] = []
        if cfg.health_every_n_steps:
            assert training is not None, "health is measured on what is trained on"
            self.watched = watched_sources(training, cfg.health_samples, cfg.batch_size, device)
        # On all ranks, so that an error on the one that reads leaves none waiting.
        known = on_all_ranks(lambda: read_jsonl(self.path, is_of_training) if is_main() else [])
        done = {(r["task"], r["features"]) for r in known if r.get("kind") == "probe" and r["features"] != "encoder"}
        self._controls_done: set[tuple[str, str]] = broadcast_object(done)
        self._collapse = CollapseWatch(known)  # of use on the rank that writes
        self._shared: dict[str, dict[str, int]] = {}  # by task
        self._put_off: dict[str, int] = {}  # what was due and did not fit -> the step at which it is asked again

    def due(self, step: int, total_steps: int) -> list[str]:
        """What of `health` and `probes` has its turn after `step` optimiser steps, whether or not there is time."""
        return [what for what in WORKS if self._is_due(what, step, step in (0, total_steps))]

    def take(self, step: int, total_steps: int) -> list[str]:
        """What of that is to be run now. The rest is put off, with a record. Once a step, on all ranks."""
        is_end = step in (0, total_steps)
        return [what for what in self.due(step, total_steps) if self._take(what, step, is_end)]

    def _is_due(self, what: str, step: int, is_end: bool) -> bool:
        every = self.cfg.every_n_steps if what == "probes" else self.cfg.health_every_n_steps
        if every == 0 or (step == 0 and not self.cfg.at_start):
            return False
        if what in self._put_off and not is_end:
            return step >= self._put_off[what]
        return is_end or step % every == 0

    def _take(self, what: str, step: int, is_end: bool) -> bool:
        n_steps = 0 if is_end else self.budget.wait(what, step)
        if n_steps == 0:
            self._put_off.pop(what, None)
            return True
        if what not in self._put_off:
            reason = f"it would take more than max_time_ratio {self.cfg.max_time_ratio:g} of the time so far"
            self._write([{"step": step, "kind": "skipped", "what": what, "reason": reason}])
            if is_main():
                logger.warning("step %d: %s put off for about %d steps: %s", step, what, n_steps, reason)
        self._put_off[what] = step + n_steps
        return False

    def run(self, encode: Encode, step: int, module: nn.Module, works: Sequence[str] = WORKS) -> dict[str, float]:
        """Measure `encode`, which returns the tokens of each of `cfg.taps`, runs on `module` and sets no precision.

        Returns `eval/<task>/<tap>/<probe or health measure>` and `health/<source>/<tap>/<measure>`, the same on every
        rank.
        """
        found: dict[str, float] = {}
        precision = self.cfg.precision
        encode = in_precision(encode, precision, self.device)
        with undisturbed(module, self.device), _kernels_of(precision, module):
            for what in works:
                with self.budget.spending(what):
                    found |= self._health(encode, step) if what == "health" else self._probe(encode, step)
        return found

    def _health(self, encode: Encode, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        names = [tap_name(ratio) for ratio in self.cfg.taps]
        for source in self.watched:
            start = time.perf_counter()
            head = {"step": step, "source": source.name, "features": "encoder", "precision": self.cfg.precision}
            try:
                measured = source.measure(encode, names, self.cfg.pool)
                records = [{**head, "kind": "health", "tap": tap, **values} for tap, values in measured.items()]
            except Exception as error:  # raised on all ranks or on none
                what = "step %d: the health of features of %s could not be measured"
                records = [{**head, **failure(logger, error, what, step, source.name)}]
            seconds = round(time.perf_counter() - start, 3)
            if is_main():
                looked = [{**r, "collapsed": self._collapse.look(r)} if r["kind"] == "health" else r for r in records]
                self._write([{**r, "seconds": seconds} for r in looked])
            found |= _health_scalars(records)
        return found

    def _probe(self, encode: Encode, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        names = [tap_name(ratio) for ratio in self.cfg.taps]
        encoder, patches = pooled_taps(encode, names, self.cfg.pool), patch_taps(encode, names)
        for task in self.tasks:
            of_patches = task.cfg.kind == "segmentation"
            found |= _scalars(task.name, self._measure(task, "encoder", patches if of_patches else encoder, step))
            for name, control in CONTROLS.items() if self.cfg.controls else ():
                if (task.name, name) not in self._controls_done:
                    records = self._measure(task, name, control_taps(control, of_patches), step)
                    if any(r["kind"] == "probe" for r in records):
                        self._controls_done.add((task.name, name))
        return found

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        if is_main():
            with JsonLines(self.path) as file:
                for record in records:
                    file.write(record)

    def _measure(self, task: Task, features: str, featurise: Featurise, step: int) -> list[dict[str, Any]]:
        """Records of one task and one kind of features: extracted and probed by all ranks, written by rank 0."""
        start = time.perf_counter()
        try:
            n_train = on_all_ranks(lambda: len(task.train))  # read now
            draw = draw_of(task.shown, task.train.name, n_train)
            train = extract_over_ranks(featurise, task.train, self.device, self.cfg.batch_size, draw)
            scored = extract_over_ranks(featurise, task.watched, self.device, self.cfg.batch_size)
            shared = self._count_shared(task, train, scored)
            records = _probed(task, Probing(task.shown, train, None, scored, tuple(task.cfg.no_data)), scored)
            records = [{**r, **shared} if r["kind"] == "probe" else r for r in records]
            _warn_of_fits(records, f"step {step}: {features} of task {task.name}")
        except Exception as error:  # raised on all ranks or on none
            what = "step %d: %s of task %s could not be evaluated"
            records = [failure(logger, error, what, step, features, task.name)]
        head = {"step": step, "task": task.name, "split": task.watched.name, "features": features}
        head["precision"] = self.cfg.precision if features == "encoder" else "float32"
        if features == "encoder":
            head["is_trained"] = step > 0 or not self._begins_random
        seconds = round(time.perf_counter() - start, 3)
        self._write([{**head, **record, "seconds": seconds} for record in records])
        return records

    def _count_shared(self, task: Task, train: FeatureSet, scored: FeatureSet) -> dict[str, int]:
        """Samples and places of both splits; these are the same every time, so that each is warned of once."""
        if task.name not in self._shared:
            splits, flags = {task.train.name: train, task.watched.name: scored}, task.cfg.flags
            self._shared[task.name] = {
                "n_leaked": count_leaked(task.name, splits, flags),
                "n_shared_groups": count_shared_groups(task.name, splits, flags),
            }
        return self._shared[task.name]


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


@contextlib.contextmanager
def _kernels_of(precision: Precision, module: nn.Module) -> Iterator[None]:
    """In float32 without the attention kernels that `parallel.attention` names: these take half precision alone."""
    packed = [m for m in module.modules() if isinstance(m, Attention) and m.packed_kernel is not None]
    kernels = [m.packed_kernel for m in packed]
    try:
        for m in packed if precision == "float32" else ():
            m.packed_kernel = None
        yield
    finally:
        for m, kernel in zip(packed, kernels, strict=True):
            m.packed_kernel = kernel


def _held(task: TaskConfig) -> TaskConfig:
    """`task` with as many samples as is usual where it takes all: each rank holds them in memory."""
    names = ("max_train", "max_val", "max_test")
    return replace(task, **{name: getattr(TaskConfig, name) for name in names if getattr(task, name) is None})


def _probed(task: Task, probing: Probing, scored: FeatureSet) -> list[dict[str, Any]]:
    """Records of all probes and taps, on every rank; each is worked out by one rank, in turn."""
    work: list[Callable[[], dict[str, Any]]] = []
    for tap in probing.taps:
        work += [partial(_survived, task, probing, tap, name) for name in task.cfg.usual_probes]
        work.append(partial(_health_of, scored, tap))
    own = on_all_ranks(lambda: {i: work[i]() for i in range(rank(), len(work), world_size())})
    done: dict[int, dict[str, Any]] = {}
    for of_rank in gather_objects(own):
        done |= of_rank
    return [done[i] for i in range(len(work))]


def _survived(task: Task, probing: Probing, tap: str, name: str) -> dict[str, Any]:
    """A probe that fails takes no other with it."""
    try:
        return _record(task, probing, tap, name)
    except Exception as error:
        failed = failure(logger, error, "%s of task %s at %s could not be measured", name, task.name, tap)
        return {**failed, "tap": tap, "probe": name}


def _record(task: Task, probing: Probing, tap: str, name: str) -> dict[str, Any]:
    probed = probing.run(name, tap)
    scores = {key: value for key, value in probed.outcome.scores().items() if math.isfinite(value)}
    headline = task.cfg.headline
    if headline not in scores:
        raise ValueError(f"{headline} is undefined for the samples of {task.name}")
    return {"kind": "probe", "tap": tap, "probe": name, "metric": headline, **scores, "chosen": probed.chosen}


def _warn_of_fits(records: Sequence[Mapping[str, Any]], what: str) -> None:
    """Of what was chosen and did not come to its optimum; on the rank that writes."""
    for r in records if is_main() else ():
        if r["kind"] == "probe" and not is_at_optimum(r["chosen"]):
            where = value_text("tap", r["tap"])
            logger.warning("%s: %s at %s %s", what, r["probe"], where, NOT_AT_OPTIMUM)


def _health_of(features: FeatureSet, tap: str) -> dict[str, Any]:
    x = features.evenly(tap, _MAX_HEALTH_ROWS)
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


def _health_scalars(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        f"health/{record['source']}/{record['tap']}/{name}": value
        for record in records
        for name, value in record.items()
        if isinstance(value, float)
    }
