"""A task: a fixed, small, labelled subset for training a probe and another for testing it, held in memory.

The samples are the same at every step, on every rank and in every run with the same `seed`, and they are shown whole
and unaugmented, so that a curve over steps moves only when the encoder does.

N samples of a split, B batch, C bands of the tile, c bands shown, H W tile pixels, h w view pixels, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_eo.components import suggest
from ssl_eo.data.opening import SourceConfig, open_source
from ssl_eo.data.plans import whole
from ssl_eo.data.render import Renderer
from ssl_eo.data.stacking import check_sample, cut_to_views, stack_tiles, stack_views
from ssl_eo.data.types import Batch, Sample, Source, TileBatch, TileSchema, ViewPlan, move_to
from ssl_eo.eval.probes import PROBES
from ssl_eo.models.vit import EncoderInput
from ssl_eo.seeding import numpy_generator

__all__ = ["Split", "Task", "TaskConfig"]

logger = logging.getLogger(__name__)

# How many samples are looked at for each one wanted, in search of a balanced subset of a source that is not balanced.
_N_READ_PER_SAMPLE = 4


@dataclass
class TaskConfig:
    """A benchmark; the shipped ones are in `datasets_meta/benchmarks` and are given by name."""

    resource_folder: ClassVar[str] = "datasets_meta/benchmarks"

    name: str  # of the task in logs; the name of its file
    train: SourceConfig  # what probes are fitted on
    test: SourceConfig  # what they are scored on
    kind: Literal["classification"] = "classification"  # of the labels: one class a sample
    max_train: int = 2000  # samples; balanced over classes as far as the source allows
    max_test: int = 1000  # samples, likewise
    size_px: int | None = None  # side of the square view in pixels; None shows the tile at its own size
    tile: str | None = None  # which tile is shown, where the source has several
    bands: list[str] | None = None  # bands of the tile that are shown; None for all
    probes: list[str] = field(default_factory=lambda: ["knn", "ridge"])  # of ssl_eo.eval.probes.PROBES
    seed: int = 0  # of the choice of samples

    def __post_init__(self) -> None:
        for key in ("max_train", "max_test"):
            if getattr(self, key) < 2:
                raise ValueError(f"{key} must be at least 2, got {getattr(self, key)}")
        if self.size_px is not None and self.size_px < 1:
            raise ValueError(f"size_px must be positive or absent, got {self.size_px}")
        for probe in self.probes:
            if probe not in PROBES:
                raise ValueError(f"probes: there is no {probe!r}{suggest(probe, list(PROBES))} ({', '.join(PROBES)})")


class Task:
    """The two splits of a task, rendered alike and normalised with the statistics of the training source."""

    def __init__(self, cfg: TaskConfig) -> None:
        """Open both sources; nothing is read yet. Raises `ValueError` where they do not fit the task or each other."""
        self.cfg = cfg
        train, test = (open_source(source) for source in (cfg.train, cfg.test))
        if not train.label_names or train.label_names != test.label_names:
            raise ValueError(
                f"task {cfg.name}: both sources must name the same classes, found {list(train.label_names)} in train"
                f" and {list(test.label_names)} in test"
            )
        self.class_names = train.label_names
        self.tile = _choose_tile(cfg, train)
        self.schema = train.schema[self.tile]
        other = test.schema.get(self.tile)
        if other is None or _layout(other) != _layout(self.schema):
            raise ValueError(f"task {cfg.name}: train and test differ in bands, dtype or shape of tile {self.tile!r}")
        self.plan = _plan(cfg, self.tile, self.schema)
        self.train = Split("train", train, self, cfg.max_train)
        self.test = Split("test", test, self, cfg.max_test)

    @property
    def name(self) -> str:
        return self.cfg.name

    @property
    def n_classes(self) -> int:
        return len(self.class_names)


class Split:
    """A fixed subset of a source: `len()`, `labels [N]`, and rendered batches of any of its rows.

    Samples are read at first use and kept as one array in the stored dtype.
    """

    def __init__(self, name: str, source: Source, task: Task, n_max: int) -> None:
        self.name = name
        self._source = source
        self._task = task
        self._n_max = n_max
        self._renderer = Renderer([{task.tile: task.schema}])

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def keys(self) -> list[str]:
        return self._cache[0]

    @property
    def labels(self) -> Tensor:
        return self._cache[1]

    def batches(self, rows: Tensor, batch_size: int, device: torch.device) -> Iterator[EncoderInput]:
        """The samples `rows` (positions in this split, in any order) as inputs `[B, c, h, w]` on `device`."""
        keys, _, tiles = self._cache
        self._renderer.to(device)
        for part in torch.split(rows, batch_size):
            batch = Batch(
                step=0,
                source=0,
                keys=[keys[i] for i in part.tolist()],
                tiles={self._task.tile: _rows(tiles, part)},
                views={"image": stack_views([[self._task.plan] * len(part)])},
            )
            pixels = self._renderer.render(move_to(batch, device))["image"]
            yield EncoderInput(pixels.pixels, pixels.channels, pixels.gsd_m)

    @cached_property
    def _cache(self) -> tuple[list[str], Tensor, TileBatch]:
        """Keys, labels `[N]` and raw tiles `[N, C, H, W]` of the chosen samples."""
        samples = self._choose()
        tile = self._task.tile
        tiles = stack_tiles(samples, [tile], {tile: self._task.schema})
        labels = torch.tensor([int(s.label) for s in samples])
        return [s.key for s in samples], labels, tiles[tile]

    def _choose(self) -> list[Sample]:
        """Up to `n_max` samples, met in a fixed random order, classes in equal parts while the source has them."""
        name, n_classes = self._task.name, self._task.n_classes
        order = numpy_generator(self._task.cfg.seed, "task", name, self.name).permutation(len(self._source))
        quota = -(-self._n_max // n_classes)
        n_chosen = np.zeros(n_classes, dtype=np.int64)
        chosen: list[Sample] = []
        spare: list[Sample] = []
        n_bad = 0
        for index in order[: _N_READ_PER_SAMPLE * self._n_max].tolist():
            try:
                sample = self._read(index)
            except (ValueError, OSError, EOFError) as error:
                n_bad += 1
                logger.warning("task %s: sample %d of %s is left out: %s", name, index, self.name, error)
                continue
            if n_chosen[sample.label] < quota:
                n_chosen[sample.label] += 1
                chosen.append(sample)
            elif len(spare) < self._n_max:
                spare.append(sample)
            if len(chosen) == self._n_max:
                break
        chosen += spare[: self._n_max - len(chosen)]
        if len(chosen) < 2:
            raise ValueError(
                f"task {name}: {self.name} has {len(chosen)} readable samples of {len(self._source)} ({n_bad} could"
                " not be read), too few for a probe"
            )
        return chosen

    def _read(self, index: int) -> Sample:
        """The sample at `index`, with the task's tile alone; raises `ValueError` where its label is not a class."""
        sample = self._source.read(index)
        tile = self._task.tile
        schema = {tile: self._task.schema}
        check_sample(sample, schema)
        sample = cut_to_views(sample, [self._task.plan], schema)
        n_classes = self._task.n_classes
        if not isinstance(sample.label, (int, np.integer)) or not 0 <= sample.label < n_classes:
            kind = self._task.cfg.kind
            raise ValueError(f"{sample.key}: {kind} needs a label from 0 to {n_classes - 1}, got {sample.label!r}")
        return sample


def _rows(tiles: TileBatch, rows: Tensor) -> TileBatch:
    present = None if tiles.present is None else tiles.present[rows]
    return TileBatch(tiles.pixels[rows], tiles.gsd_m[rows], tiles.has_no_data, present)


def _layout(schema: TileSchema) -> tuple[tuple[str, ...], str, tuple[int, int] | None]:
    return schema.bands, schema.dtype, schema.shape


def _choose_tile(cfg: TaskConfig, source: Source) -> str:
    names = list(source.schema)
    if cfg.tile is None and len(names) == 1:
        return names[0]
    if cfg.tile is None:
        raise ValueError(f"task {cfg.name}: the source has several tiles, set tile to one of {', '.join(names)}")
    if cfg.tile not in names:
        raise ValueError(
            f"task {cfg.name}: there is no tile {cfg.tile!r}{suggest(cfg.tile, names)} ({', '.join(names)})"
        )
    return cfg.tile


def _plan(cfg: TaskConfig, tile: str, schema: TileSchema) -> ViewPlan:
    """All of the tile, in the task's size and bands."""
    if schema.shape is None:
        raise ValueError(f"task {cfg.name}: tiles of {tile!r} differ in size; a task needs tiles of one size")
    height, width = schema.shape
    if cfg.size_px is None and height != width:
        raise ValueError(f"task {cfg.name}: tiles of {height} x {width} pixels are not square, set size_px")
    plan = whole(tile, schema.shape, cfg.size_px or height)
    if cfg.bands is None:
        return plan
    known = list(schema.bands)
    for band in cfg.bands:
        if band not in known:
            raise ValueError(
                f"task {cfg.name}: the tile has no band {band!r}{suggest(band, known)} (bands: {', '.join(known)})"
            )
    return replace(plan, bands=tuple(known.index(band) for band in cfg.bands))
