"""One entry of the `tiles` of the source `geotiff`: which bands its rasters hold, and that every raster holds them.

C bands, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ssl_eo.data.sources._patterns import parse_date
from ssl_eo.data.sources._rasters import Box, Ground, Part, Rasters, ground_of
from ssl_eo.data.sources._side_files import read_statistics
from ssl_eo.data.statistics import BandStatistics
from ssl_eo.data.types import Tile, TileSchema
from ssl_eo.sensors import load_sensor

__all__ = ["RasterTile", "TileConfig"]

_STATISTICS_VALUES = 1 << 22  # of all bands of a window, at most, for statistics


@dataclass
class TileConfig:
    """Rasters of one sensor. `{key}` in the pattern names the place, `{date}` and `{label}` what they say."""

    sensor: str  # a sensor's name, or the path of its YAML file
    pattern: str = "**/{key}.tif"  # paths below root; `*` and `?` within a folder, `**/` any folders
    what: str | None = None  # the tile is named sensor@what; needed where several tiles have one sensor
    bands: list[str] | None = None  # names of the C bands in file order; None: as the file says, else the sensor's
    drop_bands: list[str] = field(default_factory=list)  # bands left out, for instance those without any data
    optional: bool = False  # whether places may lack it; not the first tile
    gsd_m: float | None = None  # ground size of a pixel in metres; None: as georeferenced, else of the finest band
    no_data: list[float] | None = None  # stored values that mean nothing; None: those of the file and of the sensor
    date_tag: str | None = None  # TIFF tag with the time of acquisition (ACQUISITIONDATETIME), unless {date} says it
    statistics: str | None = None  # JSON file with lists `bands`, `mean`, `std`; None: measured when opening

    def __post_init__(self) -> None:
        if self.gsd_m is not None and not 0 < self.gsd_m < math.inf:
            raise ValueError(f"gsd_m must be positive metres, got {self.gsd_m}")
        if self.what == "":
            raise ValueError("what is empty; leave it out where a sensor has one tile")


class RasterTile:
    """What all rasters of one tile have in common; learnt from the first that can be read."""

    def __init__(self, cfg: TileConfig) -> None:
        self.cfg = cfg
        self.sensor = load_sensor(cfg.sensor)
        self.name = self.sensor.name if cfg.what is None else f"{self.sensor.name}@{cfg.what}"

    def learn(self, file: Any) -> None:
        """Bands, dtype, no-data and ground sampling from one raster. Raises `ValueError` for one that does not fit."""
        cfg = self.cfg
        self._file_bands = self._bands_of(file)
        if unknown := [b for b in cfg.drop_bands if b not in self._file_bands]:
            raise ValueError(f"drop_bands: {file.name} has no band {', '.join(unknown)}")
        self._channels = tuple(i for i, b in enumerate(self._file_bands) if b not in cfg.drop_bands)
        bands = tuple(self._file_bands[i] for i in self._channels)
        if not bands:
            raise ValueError(f"drop_bands: nothing is left of the bands of {file.name}")
        no_data = cfg.no_data if cfg.no_data is not None else (*self.sensor.no_data, *_no_data_of(file))
        sensor = replace(self.sensor, no_data=tuple(dict.fromkeys(float(v) for v in no_data)))
        self._default_gsd_m = cfg.gsd_m or min(sensor.bands[i].gsd_m for i in sensor.index(bands))
        ground = None if cfg.gsd_m is not None else ground_of(file, (0, 0, file.height, file.width))
        gsd_m = self._default_gsd_m if ground is None else ground.gsd_m
        plain = (0.0,) * len(bands), (1.0,) * len(bands)  # until measured: only what can be used is measured
        try:
            self.schema = TileSchema(sensor, bands, file.dtypes[0], None, gsd_m, *plain, optional=cfg.optional)
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from None
        self.sensor = sensor

    def read(self, rasters: Rasters, name: str, box: Box, ground: Ground | None, date: str) -> Tile:
        """The tile in a box of a raster, whose pixels are read later, when they are asked for.

        Raises `ValueError` for a raster that is not as the first.
        """
        file = rasters.open(name)
        self._check(file)
        gsd_m = self._default_gsd_m if ground is None or self.cfg.gsd_m is not None else ground.gsd_m
        pixels = Part(rasters, name, self._channels, box, np.dtype(self.schema.dtype))
        return Tile(pixels, self.schema.bands, gsd_m, self._date_of(file, date))

    def measure(self, tiles: Iterable[Tile], rng: np.random.Generator) -> None:
        """Puts statistics into the schema: those on file, else of a part, drawn by `rng`, of each of `tiles`."""
        bands = self.schema.bands
        if self.cfg.statistics is not None:
            mean, std = read_statistics(self.cfg.statistics, bands)
            self.schema = replace(self.schema, mean=mean, std=std)
        elif not self.sensor.is_categorical:  # classes are not normalised
            total, n = BandStatistics.empty(len(bands)), 0
            for tile in tiles:
                rows, columns = (_drawn(size, len(bands), rng) for size in tile.pixels.shape[1:])
                with suppress(OSError):  # a damaged block: the loader quarantines it when its turn comes
                    total, n = total.merge(BandStatistics.of(tile.pixels[:, rows, columns], self.sensor.no_data)), n + 1
            if not n:
                raise ValueError(f"statistics: no window that was looked at has tile {self.name}; name a file of them")
            total.check_values(bands, f"tile {self.name}")
            if constant := [b for b, s in zip(bands, total.std, strict=True) if s == 0]:
                raise ValueError(
                    f"drop_bands: these bands of tile {self.name} have no data, or one value only, in the {n} windows"
                    f" looked at: {', '.join(constant)}; list them in drop_bands, or give statistics"
                )
            self.schema = replace(self.schema, mean=tuple(total.mean.tolist()), std=tuple(total.std.tolist()))

    def _bands_of(self, file: Any) -> tuple[str, ...]:
        """Names of the bands of a file, in its order. They are never guessed."""
        known, described = self.sensor.band_names, tuple(file.descriptions)
        if self.cfg.bands is not None:
            bands, origin = tuple(self.cfg.bands), "of the config's bands"
        elif all(described):
            bands, origin = described, "that it describes"
            if unknown := [b for b in bands if b not in known]:
                raise ValueError(
                    f"bands: {file.name} calls its bands {_shown(described)}, and sensor {self.sensor.name} has no"
                    f" {_shown(unknown)} (it has {_shown(known)}); name the file's bands, in file order, in bands"
                )
        else:
            bands, origin = known, f"of sensor {self.sensor.name}"
        self.sensor.index(bands)
        if len(set(bands)) != len(bands):
            raise ValueError(f"bands: {_shown(bands)} names a band twice")
        if len(bands) != file.count:
            raise ValueError(
                f"bands: {file.name} holds {file.count} bands, expected the {len(bands)} {origin}; name the file's"
                " bands, in file order, in bands"
            )
        return bands

    def _check(self, file: Any) -> None:
        if self._bands_of(file) != self._file_bands:
            raise ValueError(f"{file.name} holds other bands than its neighbours, expected {self._file_bands}")
        if set(file.dtypes) != {self.schema.dtype}:
            raise ValueError(f"{file.name} has dtype {sorted(set(file.dtypes))}, expected {self.schema.dtype}")
        if self.cfg.no_data is None and (other := set(_no_data_of(file)) - set(self.sensor.no_data)):
            raise ValueError(
                f"{file.name} has the no-data value {other}, expected one of {self.sensor.no_data}; list those of all"
                " files in no_data"
            )

    def _date_of(self, file: Any, date: str) -> str | None:
        if not date and self.cfg.date_tag is not None:
            date = file.tags().get(self.cfg.date_tag) or file.tags(ns="IMAGERY").get(self.cfg.date_tag, "")
        try:
            return parse_date(date) if date else None
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from None


def _no_data_of(file: Any) -> list[float]:
    """The no-data values that a file names and its dtype can hold (NaN goes without saying)."""
    named = {float(v) for v in file.nodatavals if v is not None and not math.isnan(v)}
    dtype = np.dtype(file.dtypes[0])
    if dtype.kind in "iu":
        named = {v for v in named if v.is_integer() and np.iinfo(dtype).min <= v <= np.iinfo(dtype).max}
    return sorted(named)


def _drawn(size: int, n_bands: int, rng: np.random.Generator) -> slice:
    """A part of an axis of `size` pixels, such that a square of it holds at most `_STATISTICS_VALUES`."""
    n = max(1, min(size, math.isqrt(_STATISTICS_VALUES // n_bands)))
    start = int(rng.integers(size - n + 1))
    return slice(start, start + n)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:16]) + (f", ... {len(names)} in all" if len(names) > 16 else "")
