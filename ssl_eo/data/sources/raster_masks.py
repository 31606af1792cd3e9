"""Any folder of rasters with masks: of each image a raster of one band that gives the class of every pixel.

    <root>/images/<key>.tif   <root>/masks/<key>.tif        or wherever the patterns `images` and `masks` say

It is a folder of GeoTIFFs (`ssl_eo.data.sources.geotiff`) of one sensor, with names for the classes and a look at every
label.

K classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, one_line
from ssl_eo.data.sources import geotiff
from ssl_eo.data.sources._side_files import evenly_spaced
from ssl_eo.data.types import Sample, TileSchema

__all__ = ["Config", "Source"]

_N_LOOKED_AT = 8  # samples, until one can be used


@dataclass
class Config:
    """Where images and masks are, what they show, which part of them."""

    root: str = field(metadata=FREE)  # folder of the rasters
    sensor: str  # of the images: a sensor's name, or the path of its YAML file
    classes: list[str]  # names in the order of the numbers in masks
    images: str = "images/{key}.tif"  # paths below root; {key} is the same text in the path of the mask
    masks: str = "masks/{key}.tif"  # likewise; beside the images for instance "images/{key}.mask.tif"
    ignore: int | None = None  # number in masks that stands for "not labelled"
    bands: list[str] | None = None  # names of the bands in file order; None: as the file says, else the sensor's
    drop_bands: list[str] = field(default_factory=list)  # bands left out, for instance those without any data
    gsd_m: float | None = None  # ground size of a pixel in metres; None: as georeferenced, else of the finest band
    no_data: list[float] | None = None  # stored values that mean nothing; None: those of the files and of the sensor
    window_px: int | None = None  # side of a window that images are cut into; None: whole images
    stride_px: int | None = None  # from one window to the next; None: window_px
    rows_ratio: tuple[float, float] = (0.0, 1.0)  # part of an image's height: only windows that lie wholly in it
    split: Literal["train", "val", "test", "all"] = "train"  # of those of split_by; all: every image
    split_by: Literal["geography", "name"] = "geography"  # cells of latitude and longitude, or a hash of the key
    cell_deg: float = 0.5  # side of a cell of the split, degrees of latitude and of longitude
    split_seed: int = 0  # of either split
    statistics: str | None = None  # JSON file with lists `bands`, `mean`, `std`; None: measured when opening
    n_statistics_windows: int = 256  # to measure statistics on

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must name two classes at least, and each once, got {self.classes}")
        if self.ignore is not None and 0 <= self.ignore < len(self.classes):
            raise ValueError(f"ignore is {self.ignore}, the number of class {self.classes[self.ignore]!r}")
        if self.images == self.masks:
            raise ValueError(f"masks: {self.masks!r} is the pattern of the images too")
        self.rasters()  # which looks at the rest

    def rasters(self) -> geotiff.Config:
        """The same as a folder of GeoTIFFs."""
        tile = geotiff.TileConfig(
            self.sensor,
            self.images,
            bands=self.bands,
            drop_bands=self.drop_bands,
            gsd_m=self.gsd_m,
            no_data=self.no_data,
            statistics=self.statistics,
        )
        return geotiff.Config(
            self.root,
            [tile],
            window_px=self.window_px,
            stride_px=self.stride_px,
            rows_ratio=self.rows_ratio,
            split=self.split,
            split_by=self.split_by,
            cell_deg=self.cell_deg,
            split_seed=self.split_seed,
            label_pattern=self.masks,
            n_statistics_windows=self.n_statistics_windows,
        )


class Source:
    """A `Source` (see `ssl_eo.data.types`) whose labels are maps `[H, W]` of classes, and of `ignore`."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        try:
            self._rasters = geotiff.Source(cfg.rasters())
        except ValueError as error:
            raise ValueError(_in_our_words(str(error))) from None
        self._look_at_samples()

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return self._rasters.schema

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self._cfg.classes)

    @property
    def chunk_size(self) -> int:
        return self._rasters.chunk_size

    def __len__(self) -> int:
        return len(self._rasters)

    def read(self, index: int) -> Sample:
        sample = self._rasters.read(index)
        _check_labels(sample.key, sample.label, self._cfg)
        return sample

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample."""
        return self._rasters.locate(index)

    def fingerprint(self) -> str:
        cfg = self._cfg
        return blake2b(f"{self._rasters.fingerprint()} {cfg.classes} {cfg.ignore}".encode(), digest_size=16).hexdigest()

    def _look_at_samples(self) -> None:
        """Raise `ValueError` where masks hold other classes than are named, before anyone has waited for the pixels."""
        problem = ""
        for index in evenly_spaced(len(self), _N_LOOKED_AT):
            try:
                self.read(index)
            except (OSError, ValueError) as error:  # it is reported again when its turn comes
                problem = problem or one_line(error)
            else:
                return
        raise ValueError(f"root: none of the samples looked at can be used: {problem}")


def _check_labels(key: str, labels: NDArray[Any], cfg: Config) -> None:
    known = (labels >= 0) & (labels < len(cfg.classes))  # [H, W]
    if cfg.ignore is not None:
        known |= labels == cfg.ignore
    if not known.all():
        raise ValueError(
            f"the mask of {key} holds {_shown(np.unique(labels[~known]))}, expected classes 0 to"
            f" {len(cfg.classes) - 1}{'' if cfg.ignore is None else f' or {cfg.ignore}'}; name more classes, or set"
            " ignore"
        )


def _shown(values: Sequence[Any] | NDArray[Any]) -> str:
    return ", ".join(str(value) for value in values[:8])


def _in_our_words(text: str) -> str:
    """A message of the source of GeoTIFFs with the names of our options."""
    text = text.replace("tiles[0].pattern", "images").replace("label_pattern", "masks")
    return text.replace("tiles[0].", "").replace("tiles[0]:", "images:")
