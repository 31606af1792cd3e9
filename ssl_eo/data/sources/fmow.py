"""fMoW (Christie et al. 2018) with fmow-sentinel (Cong et al. 2022), listed by footprint in a Parquet file.

A row of the list is a footprint, with list columns of its images, which are TIFFs: `img_id`, `path` (relative to
`root`), `sensor` (`wv23`, `rgb`, `s2`), `gsd` (metres), `timestamp`, `img_height` and `img_width` (pixels). It may have
columns `latitude` and `longitude` (degrees).

A sample is a footprint. Its tiles are `<sensor>@0`, `<sensor>@1`, ... in the order of time; of more than
`max_images_per_sensor`, those are taken that are evenly spaced in that order. Files are opened when pixels are needed.

C bands, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, check_names, suggest
from ssl_eo.data.sources._columns import Columns, cached_columns, rows_in_cells
from ssl_eo.data.sources._footprints import read_footprints
from ssl_eo.data.sources._rasters import Rasters
from ssl_eo.data.sources._side_files import card_schema, dataset_card, evenly_spaced, iso_date, name_inside, printable
from ssl_eo.data.sources._splits import check_cell
from ssl_eo.data.types import Sample, Tile, TileSchema

__all__ = ["Config", "Source"]

_N_HANDLES = 4  # open files: an image is read in one go
_N_PROBES = 16  # images of a sensor that are looked at for their dtype


@dataclass
class Config:
    """Which footprints and images."""

    root: str = field(metadata=FREE)  # folder that paths in the list start from
    metadata: str | None = None  # list, relative to root; None: fmow/metadata_v2/fmow_iwm_onid_<split>.parquet
    split: Literal["train", "val", "test", "all"] = "train"  # of those of split_by
    split_by: Literal["file", "geography"] = "file"  # file: published train and val; geography: cells of train_val
    cell_deg: float = 0.5  # side of a cell of the geographic split, degrees of latitude and of longitude
    split_seed: int = 0  # of the geographic split
    sensors: list[str] = field(default_factory=lambda: ["worldview2_3", "rgb", "sentinel2_l1c"])  # those that are kept
    max_images_per_sensor: int = 4  # dates of a sensor in one sample
    min_size: int = 1  # pixels; images with a shorter side are left out
    min_images: int = 1  # footprints with fewer images are left out

    def __post_init__(self) -> None:
        check_cell(self.cell_deg)
        for key in ("max_images_per_sensor", "min_size", "min_images"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        check_names("sensors", self.sensors)
        if self.split == "test" and self.split_by == "file":
            raise ValueError("split: the lists have train and val only; take one of them, or split_by: geography")


class Source:
    """A `Source` (see `ssl_eo.data.types`) of fMoW."""

    label_names = ()
    chunk_size = 16

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._root = Path(cfg.root)
        self._list = self._root / (cfg.metadata or f"fmow/metadata_v2/fmow_iwm_onid_{_list_name(cfg)}.parquet")
        if not self._list.is_file():
            raise ValueError(f"{'metadata' if cfg.metadata else 'root'}: no such file: {self._list}")
        arrays = dataset_card("fmow")["arrays"]
        by_sensor = {array["sensor"]: code for code, array in arrays.items()}
        for name in cfg.sensors:
            if name not in by_sensor:
                raise ValueError(
                    f"sensors: fMoW has no {name!r}{suggest(name, list(by_sensor))} (it has {[*by_sensor]})"
                )
        self._rasters = Rasters(self._root, _N_HANDLES)
        stat = self._list.stat()
        facts = [self._list.name, str(stat.st_size), str(stat.st_mtime_ns)]
        self._images: Columns = cached_columns(
            self._list.parent, "fmow", facts, lambda: read_footprints(self._list, list(arrays))
        )
        self._codes = [list(arrays).index(by_sensor[name]) for name in cfg.sensors]
        self._first, self._stop = self._footprints()  # [N] images of each sample
        by_name = zip(cfg.sensors, self._codes, strict=True)
        self._schemas = {name: self._describe(arrays[by_sensor[name]], code) for name, code in by_name}
        self._rasters.close()  # workers inherit no open file

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        dates = range(self._cfg.max_images_per_sensor)
        return {f"{name}@{i}": schema for name, schema in self._schemas.items() for i in dates}

    def __len__(self) -> int:
        return len(self._first)

    def read(self, index: int) -> Sample:
        images = self._images.rows[self._first[index] : self._stop[index]]
        tiles = {}
        for (name, schema), code in zip(self._schemas.items(), self._codes, strict=True):
            kept = images[self._is_kept(images, [code])]
            kept = kept[np.lexsort((kept["path"], kept["time"]))]
            for i, k in enumerate(evenly_spaced(len(kept), self._cfg.max_images_per_sensor)):
                tiles[f"{name}@{i}"] = self._tile(kept[k], schema)
        meta: dict[str, Any] = {"row": int(images["row"][0])}
        if math.isfinite(images["latitude"][0]):
            meta |= {"latitude": float(images["latitude"][0]), "longitude": float(images["longitude"][0])}
        return Sample(self._key(index), tiles, meta)

    def locate(self, index: int) -> tuple[str, str]:
        """(key, folder of the first image) of a sample."""
        return self._key(index), printable(self._images.rows["path"][self._first[index]].rpartition(b"/")[0])

    def fingerprint(self) -> str:
        cfg = self._cfg
        options = (cfg.max_images_per_sensor, cfg.min_size, cfg.min_images)
        digest = blake2b(f"{self._schemas!r} {options}".encode(), digest_size=16)
        for column in (self._first, self._stop, self._images.rows):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def _key(self, index: int) -> str:
        return f"{self._list.stem}_{self._images.rows['row'][self._first[index]]}"

    def _tile(self, image: Any, schema: TileSchema) -> Tile:
        name = name_inside(self._root, bytes(image["path"]))
        shape = len(schema.bands), int(image["height"]), int(image["width"])
        gsd_m = float(image["gsd"])
        gsd_m = gsd_m if 0 < gsd_m < math.inf else schema.gsd_m
        pixels = _Image(self._rasters, name, shape, schema)
        return Tile(pixels, schema.bands, gsd_m, iso_date(int(image["time"])))

    def _footprints(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First image, and the one after the last, of each footprint that is kept."""
        cfg, images = self._cfg, self._images.rows
        row = np.asarray(images["row"])  # [images], ascending
        first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
        stop = np.r_[first[1:], len(row)]
        n_kept = np.add.reduceat(self._is_kept(images, self._codes), first, dtype=np.int64)
        held = n_kept >= cfg.min_images
        if not held.any():
            raise ValueError(
                f"min_images: no footprint of {self._list} has {cfg.min_images} images of {', '.join(cfg.sensors)} with"
                f" sides of {cfg.min_size} pixels or more"
            )
        if cfg.split_by == "geography" and cfg.split != "all":
            places = np.asarray(images["latitude"][first]), np.asarray(images["longitude"][first])
            if not np.isfinite(places[0]).any():
                raise ValueError(f"split_by: {self._list} has no columns latitude and longitude; take split_by: file")
            chosen = rows_in_cells(*places, cfg.split, cfg.cell_deg, cfg.split_seed)
            held &= np.isin(np.arange(len(first)), chosen)
            if not held.any():
                raise ValueError(f"split: no footprint of {self._list} lies in a cell of {cfg.split!r}")
        return first[held], stop[held]

    def _is_kept(self, images: NDArray[Any], codes: list[int]) -> NDArray[np.bool_]:
        size = np.minimum(images["height"], images["width"])
        kept: NDArray[np.bool_] = np.isin(images["sensor"], codes) & (size >= self._cfg.min_size)
        return kept

    def _describe(self, array: Any, code: int) -> TileSchema:
        """The schema of a sensor. Files are looked at for their dtype, and whether there are any."""
        images = np.flatnonzero(self._is_kept(self._images.rows, [code]))
        problem: Exception | None = None
        for k in evenly_spaced(len(images), _N_PROBES):
            try:
                name = name_inside(self._root, bytes(self._images.rows["path"][images[k]]))
                dtype = self._rasters.open(name).dtypes[0]
            except (ValueError, OSError) as error:
                problem = problem or error
            else:
                return card_schema(array, dtype if dtype in array["dtypes"] else array["dtypes"][0])
        if problem is not None:
            raise ValueError(
                f"root: none of {min(len(images), _N_PROBES)} images of {array['sensor']} can be read ({problem}); root"
                " is the folder that paths in the list start from; leave sensors without files out of sensors"
            )
        return card_schema(array, array["dtypes"][0])  # none is listed


@dataclass(frozen=True)
class _Image:
    """`LazyPixels` of an image. Slicing raises `ValueError` for a file that is not what the list says."""

    rasters: Rasters
    name: str
    shape: tuple[int, int, int]
    schema: TileSchema

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.schema.dtype)

    def __getitem__(self, part: tuple[slice, slice, slice]) -> NDArray[Any]:
        file = self.rasters.open(self.name)
        found, dtypes = (file.count, file.height, file.width), set(file.dtypes)
        if found != self.shape or dtypes != {self.schema.dtype}:
            raise ValueError(
                f"{self.name} has bands, height, width {found} of {', '.join(sorted(dtypes))}; expected {self.shape} of"
                f" {self.schema.dtype} (bands of {self.schema.sensor.name}, size as listed)"
            )
        channels, rows, columns = (range(n)[s] for n, s in zip(self.shape, part, strict=True))
        return self.rasters.read(self.name, list(channels), (rows.start, columns.start, len(rows), len(columns)))


def _list_name(cfg: Config) -> str:
    return cfg.split if cfg.split_by == "file" and cfg.split != "all" else "train_val"
