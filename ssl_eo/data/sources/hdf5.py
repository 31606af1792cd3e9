"""One HDF5 file with arrays of tiles `[N, C, H, W]`, one a sensor, and optionally splits, labels and other columns.

Row n of all arrays is one place. Band names come from the config, else from an array's attribute `bands`, else they are
the sensor's.

N samples in the file, C bands, H W pixels.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, one_line
from ssl_eo.data.sources._content import N_READ
from ssl_eo.data.sources._hdf5_arrays import ArrayConfig, HDF5Array, check_gsd_m, dataset_of, plain
from ssl_eo.data.sources._hdf5_rows import HDF5Rows
from ssl_eo.data.sources._side_files import evenly_spaced, writable
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import Sensor, load_sensor

__all__ = ["ArrayConfig", "Config", "Source"]

_RUN = 16  # samples read in a row, at least
_BLOCK_BYTES = 16 << 20  # of a column that is read for its digest
_BLOCK_ROWS = 1 << 16
_CACHE_BYTES = 64 << 20  # of HDF5's chunk cache, for files whose chunks hold several samples


@dataclass
class Config:
    """Where the arrays are. Names of datasets may hold slashes, for groups.

    `sensor`, `dataset`, `bands`, `drop_bands`, `gsd_m` and `statistics` are of the first array.
    """

    root: str = field(metadata=FREE)  # path of the HDF5 file
    sensor: str  # a sensor's name, or the path of its YAML file
    dataset: str = "sentinel2"  # tiles, [N, C, H, W]; class maps may be [N, H, W]
    bands: list[str] | None = None  # names of the C bands in file order; None: as the file says, else the sensor's
    drop_bands: list[str] = field(default_factory=list)  # bands left out, for instance those without any data
    split: str | list[str] | None = None  # only samples whose entry in split_dataset is (one of) these; None: all
    split_dataset: str = "split"  # names of splits, or of any other groups, [N]
    label_dataset: str | None = None  # classes [N], class maps [N, H, W], multi-hot [N, K]; numbers: floats [N]
    label_names: list[str] | None = None  # of the classes; None: those of label_dataset's attribute `classes`
    meta_datasets: list[str] = field(default_factory=list)  # columns [N, ...] that go into each sample's meta
    group_dataset: str | None = None  # names of the places that samples share [N], for the sample's meta["group"]
    group_pattern: str | None = None  # fits all these names; its one (...) finds the place; None: the whole name
    gsd_m: float | None = None  # ground size of a pixel in metres; None: that of the sensor's finest band
    statistics: str | None = None  # JSON file with lists `bands`, `mean`, `std`; None: measured when opening
    n_statistics_samples: int = 256  # evenly spaced samples to measure on
    others: list[ArrayConfig] = field(default_factory=list)  # more arrays of the same places, each a tile of its own

    def __post_init__(self) -> None:
        check_gsd_m(self.gsd_m)
        if self.n_statistics_samples < 1:
            raise ValueError(f"n_statistics_samples must be at least 1, got {self.n_statistics_samples}")
        if self.split == []:
            raise ValueError("split is an empty list; name at least one, or leave it out for all")
        if self.label_names is not None and self.label_dataset is None:
            raise ValueError("label_names needs label_dataset, the labels that they are of")
        if self.group_pattern is not None:
            _check_pattern(self.group_pattern, self.group_dataset)

    @property
    def arrays(self) -> dict[str, ArrayConfig]:
        """All arrays, by what their keys begin with: nothing, `others[0].`, ..."""
        first = ArrayConfig(
            self.dataset,
            self.sensor,
            bands=self.bands,
            drop_bands=self.drop_bands,
            gsd_m=self.gsd_m,
            statistics=self.statistics,
        )
        return {"": first, **{f"others[{i}].": other for i, other in enumerate(self.others)}}


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
        sensors = {key: _sensor(key, entry) for key, entry in cfg.arrays.items()}
        try:
            self._describe(sensors)
        except (TypeError, KeyError, RuntimeError, UnicodeDecodeError, MemoryError) as error:  # of odd or damaged files
            raise ValueError(f"root: {self._path} is damaged or has odd columns ({one_line(error)})") from None
        finally:
            self._file.close()  # workers inherit no open handle

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return {array.name: array.schema for array in self._arrays.values()}

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
                label = _plain_label(label) if label.ndim == 0 else label
            meta = {name: plain(file[name][row]) for name in cfg.meta_datasets}
        except (KeyError, RuntimeError, UnicodeDecodeError) as error:
            raise OSError(f"{self._path}: row {row} of a column cannot be read: {one_line(error)}") from None
        if isinstance(label, float) and not math.isfinite(label):
            raise ValueError(f"{self._path}: row {row} of {cfg.label_dataset} holds {label}, expected a finite number")
        if len(self._groups):
            meta["group"] = str(self._groups[index])
        tiles = {a.name: Tile(a.read(row), a.schema.bands, a.schema.gsd_m) for a in self._arrays.values()}
        return Sample(self.locate(index)[0], tiles, meta, label)

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample."""
        return f"{self._path.stem}_{self._rows[index]}", self._path.name

    def fingerprint(self) -> str:
        # Schemas hold the statistics, and so depend on the pixels; class maps have checksums instead. Neither covers
        # labels, nor pixels whose statistics were given.
        first, *others = self._arrays.values()
        digest = blake2b(f"{first.schema!r} {self._path.stat().st_size} [".encode(), digest_size=16)
        for start in range(0, len(self), _BLOCK_ROWS):
            rows = ", ".join(map(str, self._rows[start : start + _BLOCK_ROWS].tolist()))
            digest.update(f"{', ' if start else ''}{rows}".encode())
        content = "]"
        content += "".join(f" {array.name} {array.dataset} {array.schema!r}" for array in others)
        content += "".join(f" {array.checksum}" for array in (first, *others) if array.checksum is not None)
        if self._cfg.label_dataset is not None:
            content += f" {self._digest(self._cfg.label_dataset)} {self._label_names}"
        given = [entry for entry in self._cfg.arrays.values() if entry.statistics is not None]
        content += "".join(f" {self._digest(entry.dataset)}" for entry in given)
        digest.update(content.encode())
        return digest.hexdigest()

    def _digest(self, name: str) -> str:
        """Of the dataset `name`: of all rows of the split where a row is a number or a vector, else of some."""
        digest = blake2b(digest_size=16)
        try:
            column = self._file.open()[name]
            if column.ndim <= 2:
                row_bytes = column.dtype.itemsize * math.prod(column.shape[1:])
                n_rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
                for start in range(0, len(column), n_rows):
                    rows = self._rows[slice(*np.searchsorted(self._rows, (start, start + n_rows)))]
                    digest.update(np.ascontiguousarray(column[start : start + n_rows][rows - start]).tobytes())
            else:
                for i in evenly_spaced(len(self), N_READ):
                    with suppress(OSError):  # its sample is bad
                        digest.update(column[int(self._rows[i])].tobytes())
        finally:
            self._file.close()  # workers inherit no open handle
        return digest.hexdigest()

    def _describe(self, sensors: Mapping[str, Sensor]) -> None:
        """Everything that is known before the first sample is asked for."""
        cfg = self._cfg
        self._arrays: dict[str, HDF5Array] = {}
        for key, entry in cfg.arrays.items():
            with _errors_at(key):
                self._add(key, HDF5Array(self._file, entry, sensors[key]))
        n_rows = self._arrays[""].n_rows
        self._rows = self._rows_of_split(n_rows)
        self._chunk_size = _run_length(max(array.rows_per_chunk for array in self._arrays.values()))
        for name in cfg.meta_datasets:
            self._column("meta_datasets", name, n_rows)
        self._groups = self._groups_of_rows(n_rows)
        self._label_names = tuple(cfg.label_names or ())
        if cfg.label_dataset is not None:
            self._describe_labels(cfg.label_dataset, n_rows)
        n = min(cfg.n_statistics_samples, len(self._rows))
        seen = [int(self._rows[i * len(self._rows) // n]) for i in range(n)]  # evenly spaced samples of the split
        for key, array in self._arrays.items():
            with _errors_at(key):
                array.measure(seen)

    def _describe_labels(self, dataset: str, n_rows: int) -> None:
        labels = self._column("label_dataset", dataset, n_rows)
        are_numbers = labels.dtype.kind == "f" and labels.ndim == 1
        if labels.dtype.kind not in "biu" and not are_numbers:
            raise ValueError(
                f"label_dataset: {self._where(dataset)} must hold integers or booleans (classes, class maps, multi-hot"
                f" vectors) or be [N] of floats (numbers to predict), its dtype is {labels.dtype}, its shape"
                f" {labels.shape}"
            )
        if self._cfg.label_names is None:
            self._label_names = tuple(plain(name) for name in labels.attrs.get("classes", ()))
        if are_numbers and self._label_names:
            raise ValueError(
                f"label_names: {self._where(dataset)} holds numbers ({labels.dtype}), which have no names; store"
                " classes as integers"
            )
        self._check_label_names(dataset)

    def _check_label_names(self, dataset: str) -> None:
        for name, n in Counter(self._label_names).items():
            if not isinstance(name, str) or writable(name) != name:
                raise ValueError(f"label_names: {self._where(dataset)}: {name!a} is no name of a class, expected text")
            if n > 1:
                raise ValueError(
                    f"label_names: {self._where(dataset)} has {n} classes {name!r}; name each class once, in"
                    " label_names, in the order of labels"
                )

    def _add(self, key: str, array: HDF5Array) -> None:
        if any(array.name == other.name for other in self._arrays.values()):
            raise ValueError(f"tile: another array is {array.name!r} already; give each a name of its own")
        first = self._arrays.get("", array)
        if array.n_rows != first.n_rows:
            raise ValueError(
                f"dataset: {array.where} has {array.n_rows} rows, {first.dataset} has {first.n_rows}; row n of all"
                " arrays must be one place"
            )
        self._arrays[key] = array

    def _column(self, key: str, name: str, n_rows: int) -> Any:
        """The dataset `name`, which the config's `key` asks for: a row for each of the tiles."""
        found = dataset_of(self._file, key, name)
        if len(found) != n_rows:
            raise ValueError(f"{key}: {self._where(name)} has {len(found)} rows, the tiles have {n_rows}")
        return found

    def _rows_of_split(self, n_rows: int) -> NDArray[np.int64]:
        cfg = self._cfg
        if cfg.split is None:
            rows = np.arange(n_rows)
        else:
            names = np.array([plain(s) for s in self._column("split_dataset", cfg.split_dataset, n_rows)[:]])
            wanted, known = [cfg.split] if isinstance(cfg.split, str) else cfg.split, set(names.tolist())
            if empty := [name for name in wanted if name not in known]:
                raise ValueError(f"split: no sample is in {empty[0]!r}, {self._path} has {sorted(known)}")
            rows = np.flatnonzero(np.isin(names, wanted))
        if not len(rows):
            raise ValueError(f"dataset: {self._where(cfg.dataset)} is empty")
        return rows

    def _groups_of_rows(self, n_rows: int) -> NDArray[np.str_]:
        """The place of each sample; empty where no column says it."""
        cfg = self._cfg
        if cfg.group_dataset is None:
            return np.empty(0, np.str_)
        column = self._column("group_dataset", cfg.group_dataset, n_rows)
        if column.ndim != 1:
            raise ValueError(f"group_dataset: {self._where(cfg.group_dataset)} has shape {column.shape}, expected [N]")
        names = [str(plain(name)) for name in column[:][self._rows]]
        if cfg.group_pattern is None:
            return np.array(names)
        found = [re.fullmatch(cfg.group_pattern, name) for name in names]
        if None in found:
            raise ValueError(
                f"group_pattern: {names[found.index(None)]!r} of {self._where(cfg.group_dataset)} does not fit"
                f" {cfg.group_pattern!r}; write it so that it fits every name"
            )
        return np.array([match[1] for match in found if match is not None])

    def _where(self, dataset: str) -> str:
        return f"{dataset} in {self._path}"


def _plain_label(label: Any) -> int | float:
    return float(label) if label.dtype.kind == "f" else int(label)


def _check_pattern(pattern: str, dataset: str | None) -> None:
    if dataset is None:
        raise ValueError("group_pattern needs group_dataset, the names that it is a pattern of")
    try:
        n_groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"group_pattern: {pattern!r} is no regular expression: {error}") from None
    if n_groups != 1:
        raise ValueError(f"group_pattern: {pattern!r} has {n_groups} groups, expected one (...), around the place")


def _run_length(chunk_rows: int) -> int:
    """Samples to read in a row: whole chunks of the file, at least `_RUN`."""
    return chunk_rows * -(-_RUN // chunk_rows)


def _sensor(key: str, entry: ArrayConfig) -> Sensor:
    with _errors_at(f"{key}sensor: "):
        return load_sensor(entry.sensor)


@contextmanager
def _errors_at(key: str) -> Iterator[None]:
    """What is wrong with an array of the config is told with the `key` of its entry in front."""
    try:
        yield
    except UnicodeDecodeError:  # of a damaged file
        raise
    except ValueError as error:
        raise ValueError(f"{key}{error}") from None
