"""A task: labelled splits of a dataset, and how an encoder is shown them.

The samples are the same at every step, on every rank and in every run with the same `seed`, and they are shown whole
and unaugmented, so that a curve over steps moves only when the encoder does.

C bands of the tile, c bands shown, H W tile pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from ssl_eo.components import check_names, suggest, told_of
from ssl_eo.data.opening import SourceConfig, open_source
from ssl_eo.data.plans import whole
from ssl_eo.data.stacking import check_sample
from ssl_eo.data.statistics import BandStatistics
from ssl_eo.data.types import Source, TileSchema, ViewPlan
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.metrics import HEADLINE, METRICS
from ssl_eo.eval.probes import check_probe, kinds_of
from ssl_eo.eval.splits import UNREADABLE, Shown, Split
from ssl_eo.eval.value_checks import is_line

__all__ = ["Task", "TaskConfig", "open_sources"]

_USUAL_PROBES = ("knn", "ridge")
_FEWEST_CLASSES: dict[Kind, int] = {"classification": 2, "multilabel": 1, "segmentation": 2}


@dataclass
class TaskConfig:
    """A benchmark; the shipped ones are in `datasets_meta/benchmarks` and are given by name."""

    resource_folder: ClassVar[str] = "datasets_meta/benchmarks"

    name: str  # of the task in logs; the name of its file
    train: SourceConfig  # what probes are fitted on
    test: SourceConfig  # what they are scored on in the end
    # What options are chosen on, and what is scored while training. None: a tenth of train, and test.
    val: SourceConfig | None = None
    kind: Kind = "classification"  # of the labels: a class, several classes, a class a pixel, or a number a sample
    metric: str | None = None  # what the task is ranked by; None: what is usual for its kind
    # What it counts as in means over tasks, where several tasks show one dataset (other tiles, bands or labels of it);
    # None: a dataset of its own.
    dataset: str | None = None
    max_train: int | None = 2000  # samples, of classes in equal parts as far as the source allows; None: all
    max_val: int | None = 1000  # samples, a plain draw, so that classes are as frequent as in the source; None: all
    max_test: int | None = 1000  # likewise
    size_px: int | None = None  # side of the square view in pixels; None: the tile's own
    tile: str | None = None  # which tile is shown, where the source has several
    bands: list[str] | None = None  # bands of the tile that are shown; None for all
    ignore: int | None = None  # segmentation: pixels of this value have no label
    no_data: list[int] = field(default_factory=list)  # segmentation: classes that stand for "no data"
    # Where each band's mean and deviation are from: train's source states them, or they are measured on all of it. To
    # be measured where a source states the same for many bands.
    statistics: Literal["stated", "measured"] = "stated"
    # While training, and where an evaluation names none; of ssl_eo.eval.probes. None: knn and ridge, and ridge alone of
    # segmentation and regression, which knn does not take.
    probes: list[str] | None = None
    # Known defects that a reader of the scores must know. What begins with "leak", "shared keys" or "shared places"
    # admits them: see ssl_eo.eval.leaks.
    flags: list[str] = field(default_factory=list)
    seed: int = 0  # of the choice of samples

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise ValueError(f"name must be text that can be printed, got {self.name!a}; it is that of the task's file")
        if self.dataset is not None and not (self.dataset and self.dataset.isprintable()):
            raise ValueError(f"task {self.name}: dataset must be text that can be printed, got {self.dataset!a}")
        with told_of(f"task {self.name}"):
            self._check_view()
            self._check_probes()
            self._check_labels()

    def _check_view(self) -> None:
        for key in ("max_train", "max_val", "max_test"):
            if (value := getattr(self, key)) is not None and value < 2:
                raise ValueError(f"{key} must be at least 2, or null for all, got {value}")
        if self.size_px is not None and self.size_px < 1:
            raise ValueError(f"size_px must be positive or absent, got {self.size_px}")
        if self.bands is not None:
            check_names("bands", self.bands)

    def _check_probes(self) -> None:
        if self.metric is not None and self.metric not in METRICS[self.kind]:
            known = list(METRICS[self.kind])
            raise ValueError(
                f"metric: {self.kind} has no {self.metric!r}{suggest(self.metric, known)} ({', '.join(known)})"
            )
        if self.probes is None:
            return
        if not self.probes:
            usual = ", ".join(_usual_probes(self.kind))
            raise ValueError(f"probes is empty: name at least one, or leave the key out for the usual ({usual})")
        check_names("probes", self.probes)
        for probe in self.probes:
            check_probe(probe, self.kind)

    def _check_labels(self) -> None:
        if self.kind != "segmentation" and (self.ignore is not None or self.no_data):
            raise ValueError(f"ignore and no_data are of segmentation, got kind {self.kind}")
        if self.ignore is not None and not -(2**15) <= self.ignore < 2**15:
            raise ValueError(f"ignore must fit 16 bits with a sign, as labels of pixels do, got {self.ignore}")
        if len(set(self.no_data)) < len(self.no_data):
            raise ValueError(f"no_data must name each class once, got {self.no_data}")

    @property
    def counts_as(self) -> str:
        """The dataset that it is of; tasks of one dataset share the draws of their bootstrap."""
        return self.dataset or self.name

    @property
    def usual_probes(self) -> list[str]:
        """`probes`, or those that are usual for the kind."""
        return _usual_probes(self.kind) if self.probes is None else self.probes

    @property
    def headline(self) -> str:
        """The metric that the task is ranked by."""
        return self.metric or HEADLINE[self.kind]


class Task:
    """The splits of a task, rendered alike and normalised with the statistics of the training source."""

    def __init__(self, cfg: TaskConfig, patch_px: int = 1, sources: Mapping[str, Source] | None = None) -> None:
        """Open the sources, unless they are given as `open_sources` has them; nothing is read yet, unless statistics
        are to be measured. Raises `ValueError` where the sources do not fit the task or each other.

        A tile that is shown at its own size is enlarged to the next multiple of `patch_px`, the side of a patch.
        """
        self.cfg = cfg
        sources = open_sources(cfg) if sources is None else sources
        train = sources["train"]
        self.class_names = _class_names(cfg, train)
        tile = _choose_tile(cfg, train)
        self.schema = train.schema[tile] if cfg.statistics == "stated" else _measured(cfg.name, train, tile)
        self.shown = Shown(
            cfg.name,
            tile,
            self.schema,
            _plan(cfg, tile, self.schema, patch_px),
            cfg.kind,
            self.n_classes,
            cfg.ignore,
            cfg.seed,
        )
        self.train = Split("train", train, self.shown, cfg.max_train, is_balanced=True)
        self.val = None if cfg.val is None else self._other("val", sources["val"], cfg.max_val)
        self.test = self._other("test", sources["test"], cfg.max_test)

    @property
    def name(self) -> str:
        return self.cfg.name

    @property
    def n_classes(self) -> int:
        return max(len(self.class_names), 1)

    @property
    def watched(self) -> Split:
        """What is scored while training: the validation split where there is one, so that the test stays unseen."""
        return self.test if self.val is None else self.val

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the bands that are shown."""
        chosen = self.shown.plan.bands
        return self.schema.bands if chosen is None else tuple(self.schema.bands[i] for i in chosen)

    def _other(self, name: str, source: Source, n_max: int | None) -> Split:
        tile = self.shown.tile
        if _class_names(self.cfg, source) != self.class_names:
            raise ValueError(
                f"task {self.name}: all sources must name the same classes, found {list(self.class_names)} in train and"
                f" {list(source.label_names)} in {name}"
            )
        other = source.schema.get(tile)
        if other is None or _layout(other) != _layout(self.schema):
            raise ValueError(f"task {self.name}: train and {name} differ in bands, dtype or shape of tile {tile!r}")
        return Split(name, source, self.shown, n_max)


def open_sources(cfg: TaskConfig) -> dict[str, Source]:
    """The sources of a task by split: `train`, `val` where it has one, and `test`."""
    splits = {"train": cfg.train, "val": cfg.val, "test": cfg.test}
    return {name: open_source(of) for name, of in splits.items() if of is not None}


def _usual_probes(kind: Kind) -> list[str]:
    return [probe for probe in _USUAL_PROBES if kind in kinds_of(probe)]


# By source and tile: a task is opened again and again.
_MEASURED: dict[tuple[str, str], BandStatistics] = {}


def _measured(task: str, source: Source, tile: str) -> TileSchema:
    """The schema of `tile` with mean and deviation of each band over all samples of `source` that can be read.

    A band that is constant gets a deviation of 1. Raises `ValueError` where none can be read.
    """
    schema, address = source.schema[tile], (source.fingerprint(), tile)
    if address not in _MEASURED:
        found = BandStatistics.empty(len(schema.bands))
        for index in range(len(source)):
            with contextlib.suppress(*UNREADABLE):  # the split warns of such samples, and refuses too many
                sample = source.read(index)
                check_sample(sample, {tile: schema})
                found = found.merge(BandStatistics.of(sample.tiles[tile].array, schema.sensor.no_data))
        if not found.count.any():
            raise ValueError(f"task {task}: statistics are measured on train, which has no readable sample of {tile}")
        found.check_values(schema.bands, f"tile {tile} of task {task}")
        _MEASURED[address] = found
    found = _MEASURED[address]
    std = tuple(float(s) if s > 0 else 1.0 for s in found.std)
    return replace(schema, mean=tuple(found.mean.tolist()), std=std)


def _class_names(cfg: TaskConfig, source: Source) -> tuple[str, ...]:
    if cfg.kind == "regression":
        return ()
    if not source.label_names:
        raise ValueError(
            f"task {cfg.name}: the source {cfg.train.name} names no classes, and {cfg.kind} needs some: give its labels"
            " as names, not as numbers"
        )
    if odd := [name for name in source.label_names if not is_line(name)]:
        raise ValueError(f"task {cfg.name}: a class is called {odd[0]!a:.80}, which cannot be printed in a table")
    n, fewest = len(source.label_names), _FEWEST_CLASSES[cfg.kind]
    if n < fewest:
        raise ValueError(
            f"task {cfg.name}: the source {cfg.train.name} names one class, {source.label_names[0]!r}, and {cfg.kind}"
            f" needs {fewest} at least: there is nothing to tell apart"
        )
    if cfg.ignore is not None and 0 <= cfg.ignore < n and n - 1 < fewest:
        raise ValueError(
            f"task {cfg.name}: ignore {cfg.ignore} leaves one of {n} classes, and {cfg.kind} needs {fewest} at least"
        )
    if unknown := [c for c in cfg.no_data if not 0 <= c < n]:
        raise ValueError(f"task {cfg.name}: no_data holds {unknown}, expected classes, from 0 to {n - 1}")
    return source.label_names


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


def _plan(cfg: TaskConfig, tile: str, schema: TileSchema, patch_px: int) -> ViewPlan:
    """All of the tile, in the task's size and bands."""
    if schema.shape is None:
        raise ValueError(
            f"task {cfg.name}: tiles of {tile!r} may differ in size; a task needs tiles of one size: window_px cuts"
            " rasters into such"
        )
    height, width = schema.shape
    if cfg.size_px is None and height != width:
        raise ValueError(f"task {cfg.name}: tiles of {height} x {width} pixels are not square, set size_px")
    plan = whole(tile, schema.shape, cfg.size_px or -(-height // patch_px) * patch_px)
    if cfg.bands is None:
        return plan
    known = list(schema.bands)
    for band in cfg.bands:
        if band not in known:
            raise ValueError(
                f"task {cfg.name}: the tile has no band {band!r}{suggest(band, known)} (bands: {', '.join(known)})"
            )
    return replace(plan, bands=tuple(known.index(band) for band in cfg.bands))
