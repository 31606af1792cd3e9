"""Probes while training: every so often, on fixed small tasks, without touching the training itself.

One line a result goes to `eval.jsonl`. All have `step`, `task`, `features` (`encoder`, or the name of a control, which
is measured once a run), `seconds` (of all that was done with these features at this step) and a `kind`:

- `probe`: `tap`, `probe`, `accuracy`, `macro_accuracy` and what the probe chose;
- `health`: `tap`, `n_features`, `effective_rank`, `mean_norm`, `mean_cosine` of the test features;
- `error`: `error`, and nothing was measured.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_eo.distributed import broadcast_object, is_main, on_all_ranks
from ssl_eo.eval.controls import CONTROLS
from ssl_eo.eval.features import Encode, FeatureSet, Featurise, Pool, extract, pooled_taps, tap_name
from ssl_eo.eval.health import health
from ssl_eo.eval.probes import PROBES
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.jsonl import JsonLines, read_jsonl
from ssl_eo.models.vit import EncoderInput

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
        if not self.taps or not all(0 < ratio <= 1 for ratio in self.taps):
            raise ValueError(f"taps are ratios of the depth, above 0 and up to 1, got {self.taps}")
        if len({tap_name(ratio) for ratio in self.taps}) < len(self.taps):
            raise ValueError(f"taps must differ in their first two decimals, got {self.taps}")
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
        self.tasks = on_all_ranks(lambda: [Task(task) for task in cfg.tasks] if cfg.every_n_steps else [])
        known = read_jsonl(self.path) if is_main() else []
        done = {(r["task"], r["features"]) for r in known if r.get("kind") == "probe" and r["features"] != "encoder"}
        self._controls_done: set[tuple[str, str]] = broadcast_object(done)

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
        with undisturbed(module, self.device):
            for task in self.tasks:
                found |= _scalars(task.name, self._measure(task, "encoder", encoder, step))
                for name, control in CONTROLS.items() if self.cfg.controls else ():
                    if (task.name, name) not in self._controls_done:
                        self._measure(task, name, partial(_control_taps, control), step)
                        self._controls_done.add((task.name, name))
        return found

    def _measure(self, task: Task, features: str, featurise: Featurise, step: int) -> list[dict[str, Any]]:
        """Records of one task and one kind of features: extracted by all ranks, probed and written by rank 0."""
        start = time.perf_counter()
        try:
            train, test = (
                extract(featurise, split, self.device, self.cfg.batch_size) for split in (task.train, task.test)
            )
            records = _on_main(partial(_probe, task, train, test))
        except Exception as error:  # raised on all ranks or on none
            logger.warning("step %d: %s of task %s could not be evaluated: %s", step, features, task.name, error)
            records = [{"kind": "error", "error": f"{type(error).__name__}: {error}"}]
        if is_main():
            head = {"step": step, "task": task.name, "features": features}
            seconds = round(time.perf_counter() - start, 3)
            with JsonLines(self.path) as file:
                for record in records:
                    file.write({**head, **record, "seconds": seconds})
        return records


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


def _probe(task: Task, train: FeatureSet, test: FeatureSet) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    pairs = {tap: (features, test.taps[tap]) for tap, features in train.taps.items()}
    if len(pairs) > 1:
        pairs["all"] = (train.concatenated(), test.concatenated())
    for tap, (x, x_test) in pairs.items():
        for name in task.cfg.probes:
            result = PROBES[name](x, train.labels, x_test, test.labels, task.n_classes)
            chosen = {k: v for k, v in asdict(result).items() if v is not None}
            records.append({"kind": "probe", "tap": tap, "probe": name, **chosen})
        records.append({"kind": "health", "tap": tap, "n_features": x.shape[1], **health(x_test)})
    return records


def _on_main(work: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `work` returns on rank 0, on every rank; or its error, on every rank."""
    outcome: tuple[list[dict[str, Any]], str | None] = ([], None)
    if is_main():
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = ([], f"{type(error).__name__}: {error}")
    outcome = broadcast_object(outcome)
    if outcome[1] is not None:
        raise RuntimeError(outcome[1])
    return outcome[0]


def _control_taps(control: Callable[[Tensor], Tensor], inputs: EncoderInput) -> dict[str, Tensor]:
    return {"pixels": control(inputs.pixels)}


def _scalars(task: str, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for record in records:
        prefix = f"eval/{task}/{record.get('tap')}"
        if record["kind"] == "probe":
            found[f"{prefix}/{record['probe']}"] = record["accuracy"]
        elif record["kind"] == "health":
            found[f"{prefix}/effective_rank"] = record["effective_rank"]
    return found
