"""A split of a task: samples of a source with their labels, as batches that an encoder takes.

A split of limited size is chosen once and held in memory, so that it can be shown again and again while training. One
that takes all samples of its source is read each time, by workers, and may be of any size.

N samples of a split, B batch, C bands of the tile, c bands shown, H W tile pixels, h w view pixels, K classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_eo.data.loader import set_up_worker, worker_context
from ssl_eo.data.render import Interpolation, Renderer
from ssl_eo.data.stacking import check_sample, cut_to_views, stack_tiles, stack_views
from ssl_eo.data.types import Batch, Sample, Source, TileBatch, TileSchema, ViewPlan, move_to
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.leaks import digest_of_pixels
from ssl_eo.models.vit import EncoderInput
from ssl_eo.seeding import numpy_generator
from ssl_eo.sensors import ChannelMeta

__all__ = ["INTERPOLATION", "UNREADABLE", "LabelledBatch", "Shown", "Split"]

logger = logging.getLogger(__name__)

INTERPOLATION: Interpolation = "bicubic"  # of tiles that are not shown at their own size

# How many samples are looked at for each one wanted, in search of equal classes in a source that has others.
_N_READ_PER_SAMPLE = 4
_MAX_BAD_RATIO = 0.01  # of the samples that are looked at, and at least one, may be bad: else it is another split
_LARGEST_NUMBER = float(np.finfo(np.float32).max)  # labels that are numbers are kept in single precision
UNREADABLE = (ValueError, OSError, EOFError)  # what reading a bad sample raises


@dataclass(frozen=True)
class Shown:
    """What of each sample is shown, and what its labels must be. `task` is a name for messages and seeds."""

    task: str
    tile: str
    schema: TileSchema
    plan: ViewPlan
    kind: Kind
    n_classes: int
    ignore: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class LabelledBatch:
    """B samples: what an encoder sees, and what probes are told.

    `labels` are `[B]` int64, `[B, K]` uint8, `[B, H, W]` int16 or `[B]` float32, by kind. Samples of one group share a
    place. Those of one digest have the same pixels (as they are stored, in all bands of the tile).
    """

    inputs: EncoderInput
    keys: list[str]
    labels: Tensor
    groups: list[str]
    digests: list[str]


@dataclass
class _Part:
    """Samples as they are read, and what is wrong with those that cannot be."""

    keys: list[str]
    groups: list[str]
    digests: list[str]
    labels: Tensor
    tiles: TileBatch | None  # None where no sample could be read
    problems: list[str]


class Split:
    """Labelled samples of `source`, at most `n_max` of them, or all as they come where that is None.

    Those that are chosen are a plain draw, in which classes are as frequent as in the source; `is_balanced` takes
    classes in equal parts instead, as far as the source has them. What is scored must be a plain draw.
    """

    def __init__(self, name: str, source: Source, shown: Shown, n_max: int | None, is_balanced: bool = False) -> None:
        self.name = name
        self.is_held = n_max is not None
        self._is_balanced = is_balanced and shown.kind == "classification"
        self._source, self.shown = source, shown
        self._n_max = len(source) if n_max is None else n_max
        self._renderer = Renderer([{shown.tile: shown.schema}], INTERPOLATION)

    def __len__(self) -> int:
        """The number of samples; of a split that is not held, before any turns out unreadable."""
        return len(self.keys) if self.is_held else self.n_source

    @property
    def n_source(self) -> int:
        """The number of samples in its source, shown or not."""
        return len(self._source)

    @property
    def keys(self) -> list[str]:
        """Of a held split."""
        return self._held.keys

    @property
    def labels(self) -> Tensor:
        """Of a held split."""
        return self._held.labels

    @property
    def groups(self) -> list[str]:
        """Of a held split."""
        return self._held.groups

    @property
    def digests(self) -> list[str]:
        """Of a held split."""
        return self._held.digests

    def fingerprint(self) -> str:
        """Of the samples of the split, chosen or not."""
        chosen = f"{self._n_max} {'balanced' if self._is_balanced else 'drawn'}" if self.is_held else "all"
        return f"{self._source.fingerprint()} {chosen} {self.shown.seed}"

    def batches(self, rows: Tensor, batch_size: int, device: torch.device) -> Iterator[LabelledBatch]:
        """The samples `rows` (positions in this split, in any order), as inputs `[B, c, h, w]` on `device`."""
        held = self._held
        assert held.tiles is not None
        for part in torch.split(rows, batch_size):
            chosen = part.tolist()
            keys, groups, digests = _at(held.keys, chosen), _at(held.groups, chosen), _at(held.digests, chosen)
            yield self._labelled(_Part(keys, groups, digests, held.labels[part], _rows(held.tiles, part), []), device)

    def stream(self, batch_size: int, device: torch.device, n_workers: int = 0) -> Iterator[LabelledBatch]:
        """All samples, in order, each once; of a split that is not held read by `n_workers`, or none, beside.

        Raises `ValueError` when more than one sample, and more than one in a hundred, cannot be read, for the rest
        would be another split; and where fewer than two can.
        """
        if self.is_held:
            yield from self.batches(torch.arange(len(self)), batch_size, device)
            return
        parts = _Parts(self._source, self.shown, batch_size)
        n_read = n_bad = 0
        on_cuda = device.type == "cuda" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        for part in _read_by(parts, n_workers, on_cuda):
            for problem in part.problems:
                n_bad += 1
                self._leave_out(problem, n_bad, self.n_source)
            n_read += len(part.keys)
            if part.tiles is not None:
                yield self._labelled(part, device)
        self._check_number(n_read)

    def _labelled(self, part: _Part, device: torch.device) -> LabelledBatch:
        shown = self.shown
        assert part.tiles is not None
        batch = Batch(
            step=0,
            source=0,
            keys=part.keys,
            tiles={shown.tile: part.tiles},
            views={"image": stack_views([[shown.plan] * len(part.keys)])},
        )
        pixels = self._renderer.to(device).render(move_to(batch, device))["image"]
        inputs = EncoderInput(pixels.pixels, _of_all(pixels.channels), pixels.gsd_m)
        return LabelledBatch(inputs, part.keys, part.labels, part.groups, part.digests)

    @cached_property
    def _held(self) -> _Part:
        """All chosen samples."""
        if not self.is_held:
            raise RuntimeError(f"the split {self.name} is read as it is used: take stream()")
        return _stacked(self._choose(), self.shown, [])

    def _choose(self) -> list[Sample]:
        """Up to `n_max` samples, met in a fixed random order; classes in equal parts where that is asked for."""
        n_classes = self.shown.n_classes
        quota = -(-self._n_max // n_classes) if self._is_balanced else self._n_max
        n_chosen = np.zeros(max(n_classes, 1), dtype=np.int64)
        chosen: list[Sample] = []
        spare: list[Sample] = []
        for sample in self._met():
            of_class = int(sample.label) if self._is_balanced else 0
            if n_chosen[of_class] < quota:
                n_chosen[of_class] += 1
                chosen.append(sample)
            elif len(spare) < self._n_max:
                spare.append(sample)
            if len(chosen) == self._n_max:
                break
        chosen += spare[: self._n_max - len(chosen)]
        self._check_number(len(chosen))
        return chosen

    def _met(self) -> Iterator[Sample]:
        """Samples in a fixed random order, without those that cannot be read.

        Raises `ValueError` when these are more than one, and more than one in a hundred of those looked at.
        """
        shown = self.shown
        order = numpy_generator(shown.seed, "task", shown.task, self.name).permutation(self.n_source)
        order = order[: _N_READ_PER_SAMPLE * self._n_max]
        n_bad = 0
        for n_seen, index in enumerate(order.tolist(), start=1):
            try:
                sample = _read(self._source, index, shown)
            except UNREADABLE as error:
                n_bad += 1
                self._leave_out(f"sample {index}: {error}", n_bad, max(n_seen, min(len(order), self._n_max)))
            else:
                yield sample

    def _check_number(self, n_read: int) -> None:
        if n_read < 2:
            raise ValueError(
                f"task {self.shown.task}: {self.name} has {n_read} readable samples of {self.n_source}, too few for"
                " a probe"
            )

    def _leave_out(self, problem: str, n_bad: int, n_seen: int) -> None:
        """Warn of the `n_bad`-th sample that cannot be read; raise `ValueError` where that is too many of `n_seen`."""
        task = self.shown.task
        logger.warning("task %s: a sample of %s is left out: %s", task, self.name, problem)
        if n_bad > math.ceil(_MAX_BAD_RATIO * n_seen):
            raise ValueError(
                f"task {task}: {n_bad} samples of {self.name} could not be read, the last one is {problem}; at most one"
                " in a hundred may be left out, since the rest would be another split"
            )


def _read_by(parts: _Parts, n_workers: int, on_cuda: bool) -> DataLoader[_Part]:
    return DataLoader(
        parts,
        batch_size=None,
        num_workers=n_workers,
        multiprocessing_context=worker_context("auto", on_cuda) if n_workers else None,
        worker_init_fn=set_up_worker,
        generator=torch.Generator(),  # DataLoader draws a seed that nothing here uses: not from the global stream
    )


class _Parts(Dataset[_Part]):
    """The batches of a source in order, each read by whoever asks for it."""

    def __init__(self, source: Source, shown: Shown, batch_size: int) -> None:
        self._source, self.shown, self._batch_size = source, shown, batch_size

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size)

    def __getitem__(self, i: int) -> _Part:
        samples, problems = [], []
        for index in range(i * self._batch_size, min((i + 1) * self._batch_size, len(self._source))):
            try:
                samples.append(_read(self._source, index, self.shown))
            except UNREADABLE as error:
                problems.append(f"sample {index}: {error}")
        return _stacked(samples, self.shown, problems)


def _read(source: Source, index: int, shown: Shown) -> Sample:
    """The sample at `index`, with the shown tile alone; raises `ValueError` where its label is not of the kind."""
    sample = source.read(index)
    schema = {shown.tile: shown.schema}
    check_sample(sample, schema)
    sample = cut_to_views(sample, [shown.plan], schema)
    problem = _LABEL_PROBLEMS[shown.kind](sample.label, shown)
    if problem is not None:
        raise ValueError(f"{sample.key}: {shown.kind} needs {problem}")
    return sample


def _stacked(samples: Sequence[Sample], shown: Shown, problems: list[str]) -> _Part:
    tiles = stack_tiles(samples, [shown.tile], {shown.tile: shown.schema})[shown.tile] if samples else None
    keys = [sample.key for sample in samples]
    groups = [str(sample.meta.get("group", sample.key)) for sample in samples]
    digests = [digest_of_pixels(sample.tiles[shown.tile].array) for sample in samples]
    return _Part(keys, groups, digests, _stacked_labels(samples, shown), tiles, problems)


def _stacked_labels(samples: Sequence[Sample], shown: Shown) -> Tensor:
    dtype = {"classification": np.int64, "multilabel": np.uint8, "segmentation": np.int16, "regression": np.float32}
    labels = [np.asarray(sample.label) for sample in samples]
    if len(shapes := {label.shape for label in labels}) > 1:
        raise ValueError(f"task {shown.task}: labels differ in size: {', '.join(map(str, sorted(shapes)))}")
    return torch.from_numpy(np.stack(labels).astype(dtype[shown.kind])) if labels else torch.empty(0)


def _class_problem(label: Any, shown: Shown) -> str | None:
    if isinstance(label, (int, np.integer)) and 0 <= label < shown.n_classes:
        return None
    return f"a label from 0 to {shown.n_classes - 1}, got {_single(label)}"


def _classes_problem(label: Any, shown: Shown) -> str | None:
    values = np.asarray(label)
    if values.shape == (shown.n_classes,) and np.isin(values, (0, 1)).all():
        return None
    return f"{shown.n_classes} labels of 0 or 1, got {_short(values)}{_kind_hint(values) if values.ndim == 2 else ''}"


def _map_problem(label: Any, shown: Shown) -> str | None:
    values: NDArray[Any] = np.asarray(label)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        return f"a label for each pixel, got {_short(values)}"
    known = (values >= 0) & (values < shown.n_classes)
    if shown.ignore is not None:
        known |= values == shown.ignore
    if known.all():
        return None
    without = "" if shown.ignore is None else f" or {shown.ignore}"
    return f"labels from 0 to {shown.n_classes - 1}{without}, got {values[~known].flat[0]}"


def _number_problem(label: Any, shown: Shown) -> str | None:
    value = label.item() if isinstance(label, np.generic) else label
    if isinstance(value, (int, float)) and abs(value) <= _LARGEST_NUMBER:
        return None
    return f"a finite number, got {_single(label)} (single precision holds up to {_LARGEST_NUMBER:.4g})"


_LABEL_PROBLEMS = {
    "classification": _class_problem,
    "multilabel": _classes_problem,
    "segmentation": _map_problem,
    "regression": _number_problem,
}


def _short(values: NDArray[Any]) -> str:
    return f"{values.dtype} of shape {list(values.shape)}"


def _single(label: Any) -> str:
    """What stands where one value is needed."""
    values = np.asarray(label)
    return f"{_short(values)}{_kind_hint(values)}" if values.ndim else f"{label!r:.80}"


def _kind_hint(values: NDArray[Any]) -> str:
    """Which kind has labels of such a form."""
    kind = {1: "multilabel", 2: "segmentation"}.get(values.ndim) if np.issubdtype(values.dtype, np.integer) else None
    return "" if kind is None else f": labels of this form need kind: {kind} in the task"


def _at(column: Sequence[str], rows: Sequence[int]) -> list[str]:
    return [column[i] for i in rows]


def _rows(tiles: TileBatch, rows: Tensor) -> TileBatch:
    present = None if tiles.present is None else tiles.present[rows]
    return TileBatch(tiles.pixels[rows], tiles.gsd_m[rows], tiles.has_no_data, present)


def _of_all(channels: ChannelMeta) -> ChannelMeta:
    """Channels `[B, C]` of samples that are all shown the same bands as `[C]`, which the dynamic embedding asks for."""
    if channels.kind.ndim == 1 or channels.valid is not None:
        return channels
    return replace(channels, **{f.name: getattr(channels, f.name)[0] for f in fields(channels) if f.name != "valid"})
