"""One HDF5 file with an array of tiles `[N, C, H, W]` of one sensor, and optionally splits, labels and other columns.

Band names come from the config, else from the array's attribute `bands`, else they are the sensor's.

N samples in the file, C bands, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, one_line
from ssl_eo.data.sources._hdf5_rows import HDF5Rows
from ssl_eo.data.sources._side_files import read_statistics
from ssl_eo.data.statistics import BandStatistics
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import Sensor, load_sensor

__all__ = ["Config", "Source"]

_RUN = 16  # samples read in a row, at least
_CACHE_BYTES = 64 << 20  # of HDF5's chunk cache, for files whose chunks hold several samples


@dataclass
class Config:
    """Where the arrays are. Names of datasets may hold slashes, for groups."""

    root: str = field(metadata=FREE)  # path of the HDF5 file
    sensor: str  # a sensor's name, or the path of its YAML file
    dataset: str = "sentinel2"  # tiles, [N, C, H, W]
    bands: list[str] | None = None  # names of the C bands in file order; None: as the file says, else the sensor's
    drop_bands: list[str] = field(default_factory=list)  # bands left out, for instance those without any data
    split: str | None = None  # only samples whose entry in split_dataset is this; None: all
    split_dataset: str = "split"  # names of splits, [N]
    label_dataset: str | None = None  # classes [N], class maps [N, H, W] or multi-hot [N, K]
    meta_datasets: list[str] = field(default_factory=list)  # columns [N, ...] that go into each sample's meta
    gsd_m: float | None = None  # ground size of a pixel in metres; None: that of the sensor's finest band
    statistics: str | None = None  # JSON file with lists `bands`, `mean`, `std`; None: measured when opening
    n_statistics_samples: int = 256  # evenly spaced samples to measure on

    def __post_init__(self) -> None:
        if self.gsd_m is not None and not 0 < self.gsd_m < math.inf:
            raise ValueError(f"gsd_m must be positive metres, got {self.gsd_m}")
        if self.n_statistics_samples < 1:
            raise ValueError(f"n_statistics_samples must be at least 1, got {self.n_statistics_samples}")


class Source:
    """A `Source` (see `ssl_eo.data.types`) of one HDF5 file. The file is opened once in every process that reads."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._path = Path(cfg.root)
        if not self._path.is_file():
            raise ValueError(f"root: no such file: {cfg.root}")
        self._file = HDF5Rows(self._path, cache_bytes=_CACHE_BYTES)
        try:
            self._file.open()
        except OSError as error:
            raise ValueError(f"root: {cfg.root} is not a readable HDF5 file: {error}") from None
        sensor = load_sensor(cfg.sensor)
        try:
            self._describe(sensor)
        except (TypeError, KeyError, RuntimeError, UnicodeDecodeError, MemoryError) as error:  # of odd or damaged files
            raise ValueError(f"root: {self._path} is damaged or has odd columns ({one_line(error)})") from None
        finally:
            self._file.close()  # workers inherit no open handle

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return {self._schema.sensor.name: self._schema}

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._label_names

    @property
    def chunk_size(self) -> int:
        return self._chunk_size

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        file, cfg, row = self._file.open(), self._cfg, int(self._rows[index])
        label = None
        try:
            if cfg.label_dataset is not None:
                label = file[cfg.label_dataset][row]  # [], [H, W] or [K]
                label = int(label) if label.ndim == 0 else label
            meta = {name: _plain(file[name][row]) for name in cfg.meta_datasets}
        except (KeyError, RuntimeError, UnicodeDecodeError) as error:
            raise OSError(f"{self._path}: row {row} of a column cannot be read: {one_line(error)}") from None
        tile = Tile(self._read_row(row), self._schema.bands, self._schema.gsd_m)
        return Sample(self.locate(index)[0], {self._schema.sensor.name: tile}, meta, label)

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample."""
        return f"{self._path.stem}_{self._rows[index]}", self._path.name

    def fingerprint(self) -> str:
        # The schema holds the statistics, and so depends on the pixels.
        content = f"{self._schema!r} {self._path.stat().st_size} {self._rows.tolist()}"
        return blake2b(content.encode(), digest_size=16).hexdigest()

    def _describe(self, sensor: Sensor) -> None:
        """Everything that is known before the first sample is asked for."""
        cfg = self._cfg
        array = self._dataset("dataset", cfg.dataset)
        if array.ndim != 4:
            raise ValueError(f"dataset: {self._where(cfg.dataset)} must be [N, C, H, W], its shape is {array.shape}")
        file_bands = self._file_bands(array, sensor)
        sensor.index(file_bands)
        if unknown := [b for b in cfg.drop_bands if b not in file_bands]:
            raise ValueError(f"drop_bands: {self._where(cfg.dataset)} has no band {', '.join(unknown)}")
        self._channels = [i for i, b in enumerate(file_bands) if b not in cfg.drop_bands]
        bands = tuple(file_bands[i] for i in self._channels)
        if not bands:
            raise ValueError(f"drop_bands: nothing is left of the bands of {self._where(cfg.dataset)}")
        self._rows = self._rows_of_split(len(array))
        self._chunk_size = _run_length(array.chunks[0] if array.chunks else 1)
        for name in cfg.meta_datasets:
            self._dataset("meta_datasets", name, n_rows=len(array))
        self._label_names: tuple[str, ...] = ()
        if cfg.label_dataset is not None:
            labels = self._dataset("label_dataset", cfg.label_dataset, n_rows=len(array))
            if labels.dtype.kind not in "biu":
                raise ValueError(
                    f"label_dataset: {self._where(cfg.label_dataset)} must hold integers or booleans (classes, class"
                    f" maps, multi-hot vectors), its dtype is {labels.dtype}"
                )
            self._label_names = tuple(_plain(name) for name in labels.attrs.get("classes", ()))
        finest = min(sensor.bands[i].gsd_m for i in sensor.index(bands))
        gsd_m = finest if cfg.gsd_m is None else cfg.gsd_m
        plain = (0.0,) * len(bands), (1.0,) * len(bands)  # until measured: only what can be used is measured
        try:
            schema = TileSchema(sensor, bands, str(array.dtype), array.shape[2:], gsd_m, *plain)
        except ValueError as error:
            raise ValueError(f"dataset: {self._where(cfg.dataset)}: {error}") from None
        mean, std = self._measure(sensor, bands) if cfg.statistics is None else read_statistics(cfg.statistics, bands)
        self._schema = replace(schema, mean=mean, std=std)

    def _dataset(self, key: str, name: str, n_rows: int | None = None) -> Any:
        """The dataset `name`, which the config's `key` asks for."""
        try:
            found = self._file.dataset(name)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if n_rows is not None and len(found) != n_rows:
            raise ValueError(f"{key}: {self._where(name)} has {len(found)} rows, the tiles have {n_rows}")
        return found

    def _file_bands(self, array: Any, sensor: Sensor) -> tuple[str, ...]:
        if self._cfg.bands is not None:
            bands, origin = tuple(self._cfg.bands), "the config's bands"
        elif "bands" in array.attrs:
            bands, origin = tuple(_plain(b) for b in array.attrs["bands"]), "its attribute bands"
        else:
            bands, origin = sensor.band_names, f"sensor {sensor.name}"
        if len(bands) != array.shape[1]:
            raise ValueError(
                f"bands: {self._where(self._cfg.dataset)} holds {array.shape[1]} bands, expected the {len(bands)} of"
                f" {origin}; name the file's bands, in file order, in `bands`"
            )
        return bands

    def _rows_of_split(self, n_rows: int) -> NDArray[np.int64]:
        cfg = self._cfg
        if cfg.split is None:
            rows = np.arange(n_rows)
        else:
            names = np.array([_plain(s) for s in self._dataset("split_dataset", cfg.split_dataset, n_rows)[:]])
            rows = np.flatnonzero(names == cfg.split)
            if not len(rows):
                raise ValueError(
                    f"split: no sample is in {cfg.split!r}, {self._path} has {sorted(set(names.tolist()))}"
                )
        if not len(rows):
            raise ValueError(f"dataset: {self._where(cfg.dataset)} is empty")
        return rows

    def _measure(self, sensor: Sensor, bands: tuple[str, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation over evenly spaced samples of the split."""
        total = BandStatistics.empty(len(bands))
        n = min(self._cfg.n_statistics_samples, len(self._rows))
        for i in range(n):
            with suppress(OSError):  # a damaged chunk: the loader quarantines it when its turn comes
                pixels = self._read_row(int(self._rows[i * len(self._rows) // n]))
                total = total.merge(BandStatistics.of(pixels, sensor.no_data))
        if constant := [b for b, s in zip(bands, total.std, strict=True) if s == 0]:
            raise ValueError(
                f"drop_bands: in {self._where(self._cfg.dataset)} these bands have no data, or one value only, in the"
                f" {n} samples looked at: {', '.join(constant)}; list them in drop_bands"
            )
        return tuple(total.mean.tolist()), tuple(total.std.tolist())

    def _read_row(self, row: int) -> NDArray[Any]:
        pixels = self._file.read(self._cfg.dataset, row)  # [C, H, W] of the file
        return pixels if len(self._channels) == len(pixels) else pixels[self._channels]

    def _where(self, dataset: str) -> str:
        return f"{dataset} in {self._path}"


def _run_length(chunk_rows: int) -> int:
    """Samples to read in a row: whole chunks of the file, at least `_RUN`."""
    return chunk_rows * -(-_RUN // chunk_rows)


def _plain(value: Any) -> Any:
    """A NumPy scalar or small array as plain Python values, bytes as text."""
    value = value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
    return value.decode() if isinstance(value, bytes) else value
