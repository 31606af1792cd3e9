"""Which samples a model is trained, chosen and scored on: as a task has them, split anew, or thinned to a long tail.

N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_eo.components import told_of
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.probes.base import held_out
from ssl_eo.eval.tasks import Task
from ssl_eo.seeding import derive_seed, torch_generator

__all__ = ["SampleRows", "SamplesConfig", "check_samples", "choose_rows", "long_tail_rows", "stratified_rows"]


@dataclass
class SamplesConfig:
    """Changes to the splits of a task of one class a sample."""

    # Parts of train, val and test of what the task calls train, which are drawn of every class apart, so that each
    # part has its rare classes. None: the splits of the task. Samples of one place may then be in two parts.
    stratified: list[float] | None = None
    # The largest class over the smallest: class sizes fall geometrically, in the order of the classes' sizes, in every
    # split alike. None: as they are.
    long_tail_ratio: float | None = None
    fewest: int = 2  # samples of a class that every split keeps, as far as it has them
    seed: int = 0  # of what is drawn

    def __post_init__(self) -> None:
        if self.stratified is not None:
            parts = self.stratified
            if len(parts) != 3 or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-6:
                raise ValueError(f"stratified takes three positive parts that sum to 1, got {parts}")
        if self.long_tail_ratio is not None and self.long_tail_ratio < 1:
            raise ValueError(f"long_tail_ratio must be at least 1, got {self.long_tail_ratio}")
        if self.fewest < 1:
            raise ValueError(f"fewest must be at least 1, got {self.fewest}")


# For `train`, `val` and `test`: which split of the task they are taken from, and positions in it.
SampleRows = dict[str, tuple[str, Tensor]]


def check_samples(cfg: SamplesConfig, task: str, kind: Kind) -> None:
    """Raise `ValueError` where `cfg` asks for classes of samples, and `task` of `kind` has none."""
    if (cfg.stratified is not None or cfg.long_tail_ratio is not None) and kind != "classification":
        raise ValueError(
            f"task {task}: samples.stratified and samples.long_tail_ratio are for classification, and it is {kind}"
        )


def choose_rows(task: Task, cfg: SamplesConfig) -> SampleRows:
    """The samples of `task` as `cfg` has them. Raises `ValueError` where it asks for classes, and there are none."""
    check_samples(cfg, task.name, task.cfg.kind)
    if cfg.stratified is not None:
        with told_of(f"task {task.name}"):
            train, val, test = stratified_rows(task.train.labels, cfg.stratified, cfg.seed, task.class_names)
        rows = {"train": ("train", train), "val": ("train", val), "test": ("train", test)}
    elif task.val is None:
        train, val = _held_out(task, cfg.seed)
        rows = {"train": ("train", train), "val": ("train", val), "test": ("test", torch.arange(len(task.test)))}
    else:
        splits = {"train": task.train, "val": task.val, "test": task.test}
        rows = {name: (name, torch.arange(len(split))) for name, split in splits.items()}
    return rows if cfg.long_tail_ratio is None else _thinned(task, rows, cfg)


def stratified_rows(
    labels: Tensor, parts: Sequence[float], seed: int = 0, names: Sequence[str] | None = None
) -> list[Tensor]:
    """Rows of `labels [N]` in `parts`, of every class in these parts, and of every class at least one in each.

    Raises `ValueError` for a class with fewer samples than there are parts, by its name in `names [K]`.
    """
    found: list[list[Tensor]] = [[] for _ in parts]
    for c in sorted(set(labels.tolist())):
        rows = (labels == c).nonzero()[:, 0]
        if len(rows) < len(parts):
            who = f"class {c}" if names is None else f"class {names[c]} ({c})"
            raise ValueError(
                f"samples.stratified: {who} has {len(rows)} {'sample' if len(rows) == 1 else 'samples'} in train, too"
                f" few for {len(parts)} parts; what helps is a task whose train is all samples (a YAML of your own,"
                " with split: all where its source has that), or data without this class"
            )
        rows = rows[torch.randperm(len(rows), generator=torch_generator(seed, "stratified", c))]
        for of_part, some in zip(found, torch.split(rows, _counts(len(rows), parts)), strict=True):
            of_part.append(some)
    return [torch.cat(of_part).sort().values for of_part in found]


def long_tail_rows(labels: Tensor, order: Sequence[int], ratio: float, fewest: int, seed: int = 0) -> Tensor:
    """Rows of `labels [N]` of which the first class of `order` keeps all, the last so many that it is `ratio` rarer.

    Between them sizes fall geometrically. A class keeps `fewest` of its samples, and never more than it has.
    """
    most = int((labels == order[0]).sum())
    kept = []
    for position, c in enumerate(order):
        wanted = round(most * ratio ** (-position / max(1, len(order) - 1)))
        rows = (labels == c).nonzero()[:, 0]
        drawn = rows[torch.randperm(len(rows), generator=torch_generator(seed, "long tail", c))]
        kept.append(drawn[: max(wanted, fewest)])
    return torch.cat(kept).sort().values


def _thinned(task: Task, rows: SampleRows, cfg: SamplesConfig) -> SampleRows:
    assert cfg.long_tail_ratio is not None
    splits = {"train": task.train, "val": task.val, "test": task.test}
    sizes = torch.bincount(task.train.labels[rows["train"][1]], minlength=task.n_classes)
    order = sizes.argsort(descending=True, stable=True).tolist()
    thinned = {}
    for name, (of, some) in rows.items():
        split = splits[of]
        assert split is not None
        seed = derive_seed(cfg.seed, name)
        kept = long_tail_rows(split.labels[some], order, cfg.long_tail_ratio, cfg.fewest, seed)
        thinned[name] = of, some[kept]
    return thinned


def _held_out(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """Rows for training, and a tenth for validation, as probes hold it out: of places of its own, of each class."""
    split = task.train
    held = held_out(split.groups, split.labels if task.cfg.kind == "classification" else None, seed)
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def _counts(n: int, parts: Sequence[float]) -> list[int]:
    """`n` in `parts`, each at least 1; what rounding leaves goes to the first."""
    counts = [max(1, round(n * part)) for part in parts[1:]]
    while sum(counts) >= n:
        counts[counts.index(max(counts))] -= 1
    return [n - sum(counts), *counts]
