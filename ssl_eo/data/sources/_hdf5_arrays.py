"""One array of an HDF5 file as the tiles of a sensor: what the config says of it, and that the file agrees.

N rows, C bands, H W pixels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.members import check_tile_names
from ssl_eo.data.sources._hdf5_rows import HDF5Rows
from ssl_eo.data.sources._side_files import read_statistics
from ssl_eo.data.statistics import BandStatistics
from ssl_eo.data.types import TileSchema
from ssl_eo.sensors import Sensor

__all__ = ["ArrayConfig", "HDF5Array", "check_gsd_m", "dataset_of", "plain"]


@dataclass
class ArrayConfig:
    """One more array of the file. Its row n is of the same place as row n of the first."""

    dataset: str  # tiles, [N, C, H, W]; class maps may be [N, H, W]
    sensor: str  # a sensor's name, or the path of its YAML file
    tile: str | None = None  # name of the tile; None: the sensor's. Arrays of one sensor need different names.
    bands: list[str] | None = None  # names of the C bands in file order; None: as the file says, else the sensor's
    drop_bands: list[str] = field(default_factory=list)  # bands left out, for instance those without any data
    gsd_m: float | None = None  # ground size of a pixel in metres; None: that of the sensor's finest band
    # JSON file with lists `bands`, `mean`, `std`; None: measured when opening, class maps 0 and 1.
    statistics: str | None = None

    def __post_init__(self) -> None:
        check_gsd_m(self.gsd_m)
        if self.tile is not None:
            check_tile_names([self.tile])


class HDF5Array:
    """An array that is tiles `name`. Messages about the config begin with the key of `ArrayConfig` that is wrong."""

    def __init__(self, file: HDF5Rows, cfg: ArrayConfig, sensor: Sensor) -> None:
        self._file, self._cfg, self._sensor = file, cfg, sensor
        self.name = sensor.name if cfg.tile is None else cfg.tile
        self.dataset = cfg.dataset
        array = dataset_of(file, "dataset", cfg.dataset)
        self.n_rows, self.rows_per_chunk = len(array), file.rows_per_chunk(cfg.dataset)
        self.checksum: int | None = None  # of class maps, for which no statistics stand
        self._check_shape(array)
        file_bands = self._file_bands(array)
        if unknown := [b for b in cfg.drop_bands if b not in file_bands]:
            raise ValueError(f"drop_bands: {self.where} has no band {', '.join(unknown)}")
        self._channels = [i for i, b in enumerate(file_bands) if b not in cfg.drop_bands]
        bands = tuple(file_bands[i] for i in self._channels)
        if not bands:
            raise ValueError(f"drop_bands: nothing is left of the bands of {self.where}")
        of_sensor = [sensor.bands[i] for i in sensor.index(bands)]
        self._n_classes = np.array([b.n_classes or math.inf for b in of_sensor])[:, None, None]  # [C, 1, 1]
        gsd_m = min(b.gsd_m for b in of_sensor) if cfg.gsd_m is None else cfg.gsd_m
        unmeasured = (0.0,) * len(bands), (1.0,) * len(bands)  # until then: only what can be used is measured
        try:
            self.schema = TileSchema(sensor, bands, str(array.dtype), array.shape[-2:], gsd_m, *unmeasured)
        except ValueError as error:
            raise ValueError(f"dataset: {self.where}: {error}") from None

    @property
    def where(self) -> str:
        return f"{self._cfg.dataset} in {self._file.path}"

    def read(self, row: int) -> NDArray[Any]:
        """`[C, H, W]` in the stored dtype. Raises `OSError` where it cannot be read, `ValueError` for odd classes."""
        pixels = self._file.read(self._cfg.dataset, row)  # [C, H, W] of the file, or [H, W]
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        pixels = pixels if len(self._channels) == len(pixels) else pixels[self._channels]
        if self._sensor.is_categorical:
            self._check_classes(pixels, row)
        return pixels

    def measure(self, rows: Sequence[int]) -> None:
        """Puts statistics into the schema: those on file, else of `rows`. Class maps keep 0 and 1, and are summed."""
        if self._cfg.statistics is not None:
            self._normalise_by(*read_statistics(self._cfg.statistics, self.schema.bands))
        elif not self._sensor.is_categorical:
            self._normalise_by(*self._measured(rows))
        if self._sensor.is_categorical:
            self.checksum = 0
            for pixels in self._readable(rows):
                self.checksum = zlib.crc32(pixels.tobytes(), self.checksum)

    def _normalise_by(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.schema = replace(self.schema, mean=mean, std=std)

    def _measured(self, rows: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        total = BandStatistics.empty(len(self.schema.bands))
        for pixels in self._readable(rows):
            total = total.merge(BandStatistics.of(pixels, self._sensor.no_data))
        total.check_values(self.schema.bands, self.where)
        if constant := [b for b, s in zip(self.schema.bands, total.std, strict=True) if s == 0]:
            raise ValueError(
                f"drop_bands: in {self.where} these bands have no data, or one value only, in the"
                f" {len(rows)} samples looked at: {', '.join(constant)}; list them in drop_bands"
            )
        return tuple(total.mean.tolist()), tuple(total.std.tolist())

    def _readable(self, rows: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Tiles of `rows` without those that cannot be used, which the loader quarantines when their turn comes."""
        n, reason = 0, ""
        for row in rows:
            try:
                pixels = self.read(row)
            except (OSError, ValueError) as error:
                reason = str(error)
            else:
                n += 1
                yield pixels
        if not n:
            raise ValueError(f"dataset: {self.where}: no sample of the {len(rows)} looked at can be used ({reason})")

    def _check_shape(self, array: Any) -> None:
        is_map = self._sensor.is_categorical
        if array.ndim != 4 and not (is_map and array.ndim == 3):
            expected = "[N, H, W] or [N, C, H, W]" if is_map else "[N, C, H, W]"
            raise ValueError(f"dataset: {self.where} must be {expected}, its shape is {array.shape}")
        if is_map and array.dtype.kind not in "biu":
            raise ValueError(
                f"dataset: {self.where} must hold integers, the classes of {self._sensor.name}, its dtype is"
                f" {array.dtype}"
            )

    def _file_bands(self, array: Any) -> tuple[str, ...]:
        if self._cfg.bands is not None:
            bands, origin = tuple(self._cfg.bands), "the config's bands"
        elif "bands" in array.attrs:
            bands, origin = tuple(plain(b) for b in array.attrs["bands"]), "its attribute bands"
        else:
            bands, origin = self._sensor.band_names, f"sensor {self._sensor.name}"
        n_bands = array.shape[1] if array.ndim == 4 else 1
        if len(bands) != n_bands:
            raise ValueError(
                f"bands: {self.where} holds {n_bands} bands, expected the {len(bands)} of {origin}; name the file's"
                " bands, in file order, in `bands`"
            )
        try:
            self._sensor.index(bands)
        except ValueError as error:
            raise ValueError(f"bands: {error}") from None
        return bands

    def _check_classes(self, pixels: NDArray[Any], row: int) -> None:
        unknown = (pixels < 0) | (pixels >= self._n_classes)
        if unknown.any() and (found := sorted(set(pixels[unknown].tolist()) - set(self._sensor.no_data))):
            raise ValueError(
                f"{self._file.path}: row {row} of {self._cfg.dataset} holds {found[:5]}, expected classes of sensor"
                f" {self._sensor.name}, from 0 and below its n_classes, or its no_data"
            )


def dataset_of(file: HDF5Rows, key: str, name: str) -> Any:
    """The dataset `name`, which the config's `key` asks for."""
    try:
        return file.dataset(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def check_gsd_m(gsd_m: float | None) -> None:
    """Raise `ValueError` unless `gsd_m` of a config is None or can be the size of a pixel."""
    if gsd_m is not None and not 0 < gsd_m < math.inf:
        raise ValueError(f"gsd_m must be positive metres, got {gsd_m}")


def plain(value: Any) -> Any:
    """A NumPy scalar or small array as plain Python values, bytes as text."""
    value = value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
    return value.decode() if isinstance(value, bytes) else value
