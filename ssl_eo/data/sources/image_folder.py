"""Any folder of labelled images, one folder a class: JPEGs and PNGs, or GeoTIFFs.

    <root>/<class>/<name>.jpg                     split_by: name, geography
    <root>/<train | val | test>/<class>/<name>.jpg    split_by: folder

Classes are numbered in the order of their names. With `split_by: geography` a sample's `meta["group"]` is its cell.

N images, C bands, H W pixels.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, check_names
from ssl_eo.data.sources._class_folders import ImageFile, class_names, list_images
from ssl_eo.data.sources._columns import Columns, cached_columns, rows_in_cells
from ssl_eo.data.sources._content import content_of_some
from ssl_eo.data.sources._pictures import picture_size, read_picture
from ssl_eo.data.sources._raster_tiles import RasterTile, TileConfig
from ssl_eo.data.sources._rasters import Rasters, ground_of
from ssl_eo.data.sources._side_files import evenly_spaced, printable, read_statistics
from ssl_eo.data.sources._splits import cell_name, check_cell, name_split
from ssl_eo.data.statistics import BandStatistics
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.seeding import numpy_generator
from ssl_eo.sensors import load_sensor

__all__ = ["Config", "Source"]

logger = logging.getLogger(__name__)

_N_HANDLES = 8  # open rasters
_N_PROBES = 100  # images that are tried for one that can be read
_HEADER = np.dtype([("size", "<i4", 2), ("place", "<f8", 2)])  # (H, W), 0 if unreadable; (latitude, longitude) or NaN


@dataclass
class Config:
    """Which images, what they are pictures of, and which part of them."""

    root: str = field(metadata=FREE)  # folder of the class folders, or of train, val and test with these in each
    sensor: str = "rgb"  # a sensor's name, or the path of its YAML file
    bands: list[str] | None = None  # names of the C bands in file order; None: as GeoTIFFs say, else the sensor's
    drop_bands: list[str] = field(default_factory=list)  # bands of GeoTIFFs left out, such as those without any data
    gsd_m: float | None = None  # ground size of a pixel in metres; None: as georeferenced, else of the finest band
    split: Literal["train", "val", "test", "all"] = "train"  # of those of split_by; all: every image
    # name: by a hash of class and name; geography: by cells, GeoTIFFs only; folder: as the folders below root say
    split_by: Literal["name", "geography", "folder"] = "name"
    cell_deg: float = 0.5  # side of a cell of the geographic split, degrees of latitude and of longitude
    split_seed: int = 0  # of the splits by name and by geography
    classes: list[str] | None = None  # names of the class folders in the order of labels; None: all, sorted
    same_size: bool = True  # only images of the commonest size, which a task needs; false: all
    statistics: str | None = None  # JSON file with lists `bands`, `mean`, `std`; None: measured when opening
    n_statistics_samples: int = 256  # evenly spaced images to measure on

    def __post_init__(self) -> None:
        check_cell(self.cell_deg)
        if self.gsd_m is not None and not 0 < self.gsd_m < math.inf:
            raise ValueError(f"gsd_m must be positive metres, got {self.gsd_m}")
        if self.n_statistics_samples < 1:
            raise ValueError(f"n_statistics_samples must be at least 1, got {self.n_statistics_samples}")
        if self.bands is not None:
            check_names("bands", self.bands)
        if self.classes is not None and (not self.classes or len(set(self.classes)) < len(self.classes)):
            raise ValueError(f"classes must name at least one class, and each once, got {self.classes}")


class Source:
    """A `Source` (see `ssl_eo.data.types`) of labelled images. Keys are `<class>/<name>`, with the split's folder."""

    def __init__(self, cfg: Config) -> None:
        self._cfg, self._root = cfg, Path(cfg.root)
        files = list_images(self._root, by_split=cfg.split_by == "folder")
        self._label_names = class_names(self._root, files, cfg.classes)
        number = {name: i for i, name in enumerate(self._label_names)}
        self._names = np.array([os.fsencode(file.name) for file in files], np.bytes_)  # [N]
        self._labels = np.array([number[file.label] for file in files], np.int64)  # [N]
        self._images: _Images = _GeoTiffs(cfg, self._root) if files[0].is_raster else _Pictures(cfg, self._root)
        self._rows = self._rows_of_split(files)
        try:
            self._learn()
            self._measure()
        finally:
            self._images.close()  # workers inherit no open handle

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return {self._images.schema.sensor.name: self._images.schema}

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._label_names

    @property
    def chunk_size(self) -> int:
        return 16

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        row = int(self._rows[index])
        tile, meta = self._images.read(self._name(row))
        schema = self._images.schema
        if schema.shape is not None and tile.pixels.shape[1:] != schema.shape:
            height, width = tile.pixels.shape[1:]
            raise ValueError(
                f"{self._root / self._name(row)} has {height} x {width} pixels, expected {schema.shape[0]} x"
                f" {schema.shape[1]}"
            )
        if len(self._centres):
            latitude, longitude = self._centres[row]
            meta["group"] = cell_name(float(latitude), float(longitude), self._cfg.cell_deg)
        return Sample(self.locate(index)[0], {schema.sensor.name: tile}, meta, int(self._labels[row]))

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample."""
        name = printable(self._names[self._rows[index]])
        return name.rpartition(".")[0], name

    def fingerprint(self) -> str:
        # The schema holds the statistics, and so depends on the pixels, unless statistics were given.
        digest = blake2b(f"{self._images.schema!r} {self._label_names!r}".encode(), digest_size=16)
        for row in self._rows:
            digest.update(self._names[row] + b" %d " % self._labels[row])
            with suppress(OSError):  # it may be gone: its sample is bad then
                digest.update(b"%d " % (self._root / self._name(row)).stat().st_size)
        if self._cfg.statistics is not None:
            digest.update(content_of_some(len(self), lambda i: self._root / self._name(int(self._rows[i]))))
        return digest.hexdigest()

    def _name(self, row: int) -> str:
        return os.fsdecode(self._names[row])

    def _rows_of_split(self, files: Sequence[ImageFile]) -> NDArray[np.int64]:
        """Positions in all files of those that are offered, in the order of their names."""
        cfg = self._cfg
        rows = np.arange(len(files))
        self._centres = np.empty((0, 2))  # degrees, of each image; empty where the split is not one of cells
        headers = self._headers().rows if cfg.same_size or cfg.split_by == "geography" else None
        if cfg.split != "all" and cfg.split_by == "geography":
            assert headers is not None
            self._centres = np.array(headers["place"])
            latitude, longitude = self._centres.T
            if not np.isfinite(latitude).any():
                raise ValueError(f"split_by: no file in {self._root} says where it lies; take split_by: name")
            rows = rows_in_cells(latitude, longitude, cfg.split, cfg.cell_deg, cfg.split_seed)
        elif cfg.split != "all":
            rows = np.array([i for i, file in enumerate(files) if _split_of(file, cfg) == cfg.split], np.int64)
        if not len(rows):
            raise ValueError(f"split: no image of {self._root} is in {cfg.split!r} (split_by: {cfg.split_by})")
        self._shape: tuple[int, int] | None = None
        return rows if headers is None or not cfg.same_size else self._of_one_size(rows, headers["size"])

    def _of_one_size(self, rows: NDArray[np.int64], sizes: NDArray[np.int32]) -> NDArray[np.int64]:
        """Those of `rows` that have the size of most of all images. One that cannot be read is kept: it is bad."""
        known = Counter((int(height), int(width)) for height, width in sizes if height)
        if not known:
            return rows
        self._shape = height, width = max(known, key=lambda size: (known[size], size))
        fitting = (sizes[rows] == self._shape).all(axis=1) | (sizes[rows] == 0).all(axis=1)  # [N]
        if n_other := int((~fitting).sum()):
            logger.warning(
                "%s: %d of %d images are not %d x %d pixels and are left out; same_size: false takes all",
                self._root,
                n_other,
                len(rows),
                height,
                width,
            )
        fitted: NDArray[np.int64] = rows[fitting]
        return fitted

    def _headers(self) -> Columns:
        """Size and place of all images. Opening them takes long, so it is done once."""

        def build() -> NDArray[Any]:
            found = np.zeros(len(self._names), _HEADER)
            found["place"] = np.nan
            for row in range(len(found)):
                with suppress(OSError, ValueError):  # its sample is bad, and found so when it is read
                    size, place = self._images.header(self._name(row))
                    found["size"][row] = size
                    found["place"][row] = place
            return found

        def facts() -> Iterator[str]:
            for name in map(os.fsdecode, self._names):
                yield name
                with suppress(OSError):
                    status = (self._root / name).stat()
                    yield f"{status.st_size} {status.st_mtime_ns}"

        return cached_columns(self._root, "image_folder", facts(), build)

    def _learn(self) -> None:
        """What images hold, from the first that can be used."""
        last: Exception | None = None
        for row in self._rows[:_N_PROBES].tolist():
            try:
                self._images.learn(self._name(row))
            except (OSError, ValueError) as error:
                last = error
            else:
                self._images.schema = replace(self._images.schema, shape=self._shape)
                return
        raise ValueError(f"root: none of {min(len(self._rows), _N_PROBES)} images can be used; the last: {last}")

    def _measure(self) -> None:
        looked_at = evenly_spaced(len(self), self._cfg.n_statistics_samples)
        samples: list[Tile] = []
        last: Exception | None = None
        for index in looked_at:
            try:
                samples += self.read(index).tiles.values()
            except (OSError, ValueError) as error:
                last = error
        if len(samples) <= len(looked_at) // 2:
            raise ValueError(
                f"root: of {len(looked_at)} images of {self._root} only {len(samples)} can be used; the last problem:"
                f" {last}"
            )
        self._images.measure(samples)


class _Images(Protocol):
    """One kind of files; `schema` is known from `learn` on, its statistics from `measure` on."""

    schema: TileSchema

    def header(self, name: str) -> tuple[tuple[int, int], tuple[float, float]]: ...  # (H, W), (latitude, longitude)
    def learn(self, name: str) -> None: ...
    def read(self, name: str) -> tuple[Tile, dict[str, Any]]: ...
    def measure(self, tiles: Sequence[Tile]) -> None: ...
    def close(self) -> None: ...


class _Pictures:
    """JPEGs and PNGs, which do not say where they lie."""

    schema: TileSchema

    def __init__(self, cfg: Config, root: Path) -> None:
        if cfg.split_by == "geography":
            raise ValueError("split_by: JPEGs and PNGs do not say where they lie; take split_by: name")
        if cfg.drop_bands:
            raise ValueError("drop_bands: bands of JPEGs and PNGs cannot be left out; views may show some of them")
        self._cfg, self._root = cfg, root

    def header(self, name: str) -> tuple[tuple[int, int], tuple[float, float]]:
        return picture_size(self._root / name), (math.nan, math.nan)

    def learn(self, name: str) -> None:
        cfg, sensor = self._cfg, load_sensor(self._cfg.sensor)
        bands = sensor.band_names if cfg.bands is None else tuple(cfg.bands)
        gsd_m = cfg.gsd_m or min(sensor.bands[i].gsd_m for i in sensor.index(bands))
        read_picture(self._root / name, len(bands))
        plain = (0.0,) * len(bands), (1.0,) * len(bands)  # until measured
        self.schema = TileSchema(sensor, bands, "uint8", None, gsd_m, *plain)

    def read(self, name: str) -> tuple[Tile, dict[str, Any]]:
        schema = self.schema
        return Tile(read_picture(self._root / name, len(schema.bands)), schema.bands, schema.gsd_m), {}

    def measure(self, tiles: Sequence[Tile]) -> None:
        schema = self.schema
        if self._cfg.statistics is not None:
            mean, std = read_statistics(self._cfg.statistics, schema.bands)
        else:
            total = BandStatistics.empty(len(schema.bands))
            for tile in tiles:
                total = total.merge(BandStatistics.of(tile.array, schema.sensor.no_data))
            mean, std = tuple(total.mean.tolist()), tuple(total.std.tolist())
        self.schema = replace(schema, mean=mean, std=std)

    def close(self) -> None:
        pass


class _GeoTiffs:
    """GeoTIFFs, of which views read the pixels that they show."""

    def __init__(self, cfg: Config, root: Path) -> None:
        tile = TileConfig(
            cfg.sensor, bands=cfg.bands, drop_bands=cfg.drop_bands, gsd_m=cfg.gsd_m, statistics=cfg.statistics
        )
        self._tile = RasterTile(tile)
        self._rasters = Rasters(root, _N_HANDLES)

    @property
    def schema(self) -> TileSchema:
        return self._tile.schema

    @schema.setter
    def schema(self, schema: TileSchema) -> None:
        self._tile.schema = schema

    def header(self, name: str) -> tuple[tuple[int, int], tuple[float, float]]:
        file = self._rasters.open(name)
        ground = ground_of(file, (0, 0, *file.shape))
        return file.shape, (math.nan, math.nan) if ground is None else (ground.latitude, ground.longitude)

    def learn(self, name: str) -> None:
        self._tile.learn(self._rasters.open(name))

    def read(self, name: str) -> tuple[Tile, dict[str, Any]]:
        file = self._rasters.open(name)
        box = 0, 0, *file.shape
        ground = ground_of(file, box)
        meta = {} if ground is None else {"latitude": ground.latitude, "longitude": ground.longitude}
        return self._tile.read(self._rasters, name, box, ground, ""), meta

    def measure(self, tiles: Sequence[Tile]) -> None:
        self._tile.measure(tiles, numpy_generator("image_folder statistics"))

    def close(self) -> None:
        self._rasters.close()


def _split_of(file: ImageFile, cfg: Config) -> str:
    return file.split if cfg.split_by == "folder" else name_split(printable(os.fsencode(file.key)), cfg.split_seed)
