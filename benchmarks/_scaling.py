"""What it costs that several processes train one model, by strategies: time, communication and memory.

The share of communication in a step is what it takes longer than a step of as many processes that train by themselves,
each on its own part of the batch, on the same machine and in turns with it. So cores, caches and memory are as
contended in the one as in the other. What overlaps with computing costs nothing here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from _objective_steps import Setting
from _ranks import Group
from _stepping import GIVE_BACK
from _table import aligned, number

__all__ = ["MODELS", "Result", "batch_sizes", "measure_strategies", "recipe", "text"]

MODELS = ("mae", "dinov2")
APART = "apart"  # not a strategy: each by itself
N_STEPS = 2  # in a row
LARGE: dict[str, Any] = {"size": "small", "patch_size": 16, "patch_embed": "conv"}
TOY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "n_heads": 3}

_HEADER = ("model", "processes", "strategy", "s/step", "samples/s", "x one", "communication, %")
_HEADER_OF_MEMORY = ("peak, MB", "x one", "state, MB", "x one")


@dataclass(frozen=True)
class Result:
    """Of one strategy on so many processes. Memory is that of the rank that takes most; None where not measured."""

    model: str
    n_processes: int
    strategy: str
    step_s: float
    samples_per_s: float
    communication_ratio: float | None
    peak_mb: float | None
    state_mb: float | None

    def cells(self, one: Result) -> tuple[str, ...]:
        """Beside those of one process."""
        share = None if self.communication_ratio is None else 100 * self.communication_ratio
        rates = number(self.samples_per_s), number(self.samples_per_s / one.samples_per_s)
        memory = [cell for key in ("peak_mb", "state_mb") for cell in _beside(getattr(self, key), getattr(one, key))]
        return (self.model, str(self.n_processes), self.strategy, number(self.step_s), *rates, number(share), *memory)


def measure_strategies(
    setting: Setting, n_turns: int, models: Sequence[str], counts: Sequence[int], folder: Path
) -> list[Result]:
    """Steps of every strategy of each model on so many processes, of which the first is one."""
    results = []
    for model in models:
        for n in counts:
            results += _measure(setting, n_turns, model, n, folder)
    return results


def text(results: Sequence[Result]) -> str:
    """The table; "x one" is beside one process of the same model."""
    ones = {result.model: result for result in results if result.n_processes == 1}
    lines = [(*_HEADER, *_HEADER_OF_MEMORY), *(result.cells(ones[result.model]) for result in results)]
    return aligned(lines, [column not in (0, 2) for column in range(len(lines[0]))])


def batch_sizes(setting: Setting) -> dict[str, int]:
    """Of a process, by models. A sample of self-distillation is seen six times, and is a few times as much work."""
    return {"mae": setting.batch_size, "dinov2": max(2, setting.batch_size // 4)}


def recipe(setting: Setting, model: str, n: int, strategy: str, folder: Path) -> dict[str, Any]:
    """The config of a training on `n` processes."""
    parallel: dict[str, Any] = {"strategy": "auto" if strategy == APART else strategy}
    if strategy == "hsdp":
        parallel["shard_size"] = n // 2
    extent_m = 640.0 if setting.toy else 2240.0
    return {
        **_model(model, setting.toy),
        "run": {"name": f"{model}_{n}_{strategy}", "out_dir": str(folder)},
        "data": {
            "sources": [{"name": "synthetic", "n_samples": 512, "sensors": ["sentinel2_l2a"], "extent_m": extent_m}],
            "n_workers": 0,
            "n_lanes": n,
        },
        "optim": {"clip_grad_norm": 3.0},
        "train": {
            "total_steps": 100_000,
            "global_batch_size": n * batch_sizes(setting)[model],
            "precision": "bfloat16" if setting.bfloat16 else "float32",
            "n_threads": 1,
        },
        "parallel": {**parallel, "timeout_s": 86_400.0},  # others take their turns
        "log": {"report": False},
    }


def _model(name: str, toy: bool) -> dict[str, Any]:
    size = {**LARGE, **(TOY if toy else {})}
    if name == "mae":
        decoder = {"embed_dim": 64, "depth": 1, "n_heads": 4} if toy else {"embed_dim": 256, "depth": 4, "n_heads": 8}
        objective = {"name": "mae", "crop": {"size_px": 64 if toy else 224}, "decoder": decoder, "output": "linear"}
        return {"objective": objective, "model": size}
    crops = {"global_crop": {"size_px": 224}, "local_crop": {"size_px": 96}, "n_local": 4}
    objective = {"name": "dinov2", "crops": crops, "head": {"n_prototypes": 16_384}}
    return {"objective": objective, "model": {**size, "mask_token": True}}


def _measure(setting: Setting, n_turns: int, model: str, n: int, folder: Path) -> list[Result]:
    strategies = ["single"] if n == 1 else [APART, "ddp", "fsdp", *(["hsdp"] if n % 2 == 0 and n > 2 else [])]
    seconds: dict[str, list[float]] = {strategy: [] for strategy in strategies}
    with ExitStack() as stack:
        groups = {s: stack.enter_context(_group(setting, model, n, s, folder)) for s in strategies}
        for group in groups.values():
            group.wait_until_ready()
        for _ in range(n_turns):
            for strategy, group in groups.items():
                step_s = group.seconds("steps", N_STEPS) / N_STEPS
                print(f"{model} on {n}, {strategy}: {step_s:.3g} s a step", file=sys.stderr)
                seconds[strategy].append(step_s)
    results = []
    for strategy, taken in seconds.items():
        silent = seconds.get(APART) if strategy != APART else None
        share = None if silent is None else median(1 - a / b for a, b in zip(silent, taken, strict=True))
        peak, state = (None, None) if strategy == APART else _memory_mb(setting, model, n, strategy, folder)
        rate = n * batch_sizes(setting)[model] / median(taken)
        results.append(Result(model, n, strategy, median(taken), rate, share, peak, state))
    return results


def _group(setting: Setting, model: str, n: int, strategy: str, folder: Path, **options: Any) -> Group:
    is_apart = n == 1 or strategy == APART
    return Group(recipe(setting, model, n, strategy, folder), n, setting.device, apart=is_apart, **options)


def _memory_mb(setting: Setting, model: str, n: int, strategy: str, folder: Path) -> tuple[float | None, float]:
    """Peak and state, in processes of their own: to give freed memory back at once takes time."""
    with _group(setting, model, n, strategy, folder / "memory", environment=GIVE_BACK) as group:
        group.ask("steps", 1)
        found = group.ask("memory_mb")
    peaks = [peak for peak, _ in found if peak is not None]
    return max(peaks, default=None), max(state for _, state in found)


def _beside(value: float | None, one: float | None) -> tuple[str, str]:
    return number(value), number(None if value is None or one is None else value / one)
