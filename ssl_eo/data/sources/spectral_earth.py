"""SpectralEarth (Braham et al. 2024): EnMAP patches of 128 px at 30 m, 202 of the sensor's 224 bands.

- `enmap/**/*.tif`: GeoTIFFs of the 202 bands, int16 or float32, reflectance times 10,000. Files of all 224 bands, as
  other archives of the sensor have them, are read without the 22.
- `splits/enmap/<split>.txt`: names of files, one a line, with or without `enmap/` and `.tif`

Values are returned as stored: published models hold them between 0 and 10,000, this source does not.

N patches, C bands, H W pixels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE
from ssl_eo.data.sources._columns import Columns, cached_columns, rows_in_cells
from ssl_eo.data.sources._patterns import list_files
from ssl_eo.data.sources._rasters import Rasters, ground_of
from ssl_eo.data.sources._side_files import dataset_card, evenly_spaced, name_inside, printable, read_lines
from ssl_eo.data.sources._splits import check_cell
from ssl_eo.data.statistics import BandStatistics
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import load_sensor

__all__ = ["Config", "Source"]

_N_HANDLES = 4  # open files: an image is read in one go
_N_PROBES = 16  # files that are looked at for what differs between copies
_MAX_LIST = 256 << 20  # bytes of a list of names
_MAX_KEY = 80  # characters of a sample's key in a tar, whose names of members have at most 100


@dataclass
class Config:
    """Which patches."""

    root: str = field(metadata=FREE)  # folder of enmap and splits
    split: Literal["train", "val", "test", "all"] = "train"  # of those of split_by; all: every file in enmap
    split_by: Literal["file", "geography"] = "file"  # file: splits/enmap/<split>.txt; geography: cells of all files
    cell_deg: float = 0.5  # side of a cell of the geographic split, degrees of latitude and of longitude
    split_seed: int = 0  # of the geographic split
    n_statistics_samples: int = 64  # evenly spaced patches that mean and deviation are measured on

    def __post_init__(self) -> None:
        check_cell(self.cell_deg)
        if self.n_statistics_samples < 1:
            raise ValueError(f"n_statistics_samples must be at least 1, got {self.n_statistics_samples}")


class Source:
    """A `Source` (see `ssl_eo.data.types`) of SpectralEarth."""

    label_names = ()
    chunk_size = 16

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._root = Path(cfg.root)
        if not (self._root / "enmap").is_dir():
            raise ValueError(f"root: no folder enmap in {cfg.root}; root is the folder of enmap and splits")
        self._rasters = Rasters(self._root, _N_HANDLES)
        self._files, self._rows = self._find_files()
        self._schema = self._describe()
        self._rasters.close()  # workers inherit no open file

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return {"enmap": self._schema}

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        name = name_inside(self._root, self._name(index))
        pixels = self._read_pixels(name)
        file = self._rasters.open(name)
        meta = {}
        if (ground := ground_of(file, (0, 0, file.height, file.width))) is not None:
            meta = {"latitude": ground.latitude, "longitude": ground.longitude}
        tile = Tile(pixels, self._schema.bands, self._schema.gsd_m, _date_of(name))
        return Sample(self.locate(index)[0], {"enmap": tile}, meta)

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample."""
        name = printable(self._name(index))
        return _key_of(name), name

    def fingerprint(self) -> str:
        digest = blake2b(repr(self._schema).encode(), digest_size=16)  # the schema's statistics depend on the pixels
        digest.update(np.ascontiguousarray(self._files.rows["name"][self._rows]).data)
        return digest.hexdigest()

    def _name(self, index: int) -> bytes:
        return bytes(self._files.rows["name"][self._rows[index]])

    def _find_files(self) -> tuple[Columns, NDArray[np.int64]]:
        """All files that are listed, and which of them are in the split."""
        cfg = self._cfg
        if cfg.split_by == "file" and cfg.split != "all":
            names = self._listed_names()
            title = f"spectral_earth-{cfg.split}"
        else:
            names = [f"enmap/{n}" for n in list_files(self._root / "enmap") if n.lower().endswith((".tif", ".tiff"))]
            title = "spectral_earth"
        if not names:
            raise ValueError(f"root: no .tif in {self._root / 'enmap'}")
        if cfg.split_by == "file" or cfg.split == "all":
            encoded = np.array([os.fsencode(name) for name in names])
            files = cached_columns(self._root, title, names, lambda: encoded.astype([("name", encoded.dtype)]))
            return files, np.arange(len(names))
        files = cached_columns(self._root, f"{title}-places", names, lambda: self._places(names))
        latitude, longitude = (np.asarray(files.rows[key]) for key in ("latitude", "longitude"))
        rows = rows_in_cells(latitude, longitude, cfg.split, cfg.cell_deg, cfg.split_seed)
        if cfg.split == "train":  # a file that cannot be opened: training finds out and says so
            rows = np.union1d(rows, np.flatnonzero(np.isnan(latitude)))
        if not len(rows):
            raise ValueError(f"split: no file in {self._root / 'enmap'} lies in a cell of {cfg.split!r}")
        return files, rows

    def _listed_names(self) -> list[str]:
        """Names in the list of the split, as they are below `root`."""
        path = self._root / "splits" / "enmap" / f"{self._cfg.split}.txt"
        lines = read_lines(path, _MAX_LIST, "names of GeoTIFFs, one a line (or take split_by: geography)")
        some = [lines[i] for i in evenly_spaced(len(lines), _N_PROBES)]
        for prefix in ("enmap/", ""):
            for ending in ("", ".tif"):
                if any((self._root / f"{prefix}{name}{ending}").is_file() for name in some if ".." not in name):
                    return [f"{prefix}{name}{ending}" for name in lines]
        raise ValueError(f"root: none of {len(some)} names in {path} is a file in {self._root / 'enmap'}: {some[0]!r}")

    def _places(self, names: list[str]) -> NDArray[Any]:
        """Names, and the latitude and longitude (degrees) of their centres, NaN for a file that cannot be opened."""
        encoded = np.array([os.fsencode(name) for name in names])
        files = np.zeros(len(names), [("name", encoded.dtype), ("latitude", "f8"), ("longitude", "f8")])
        files["name"] = encoded
        files["latitude"] = files["longitude"] = np.nan
        for i, name in enumerate(names):
            with suppress(ValueError, OSError):
                file = self._rasters.open(name)
                if (ground := ground_of(file, (0, 0, file.height, file.width))) is not None:
                    files["latitude"][i], files["longitude"][i] = ground.latitude, ground.longitude
        if np.isnan(files["latitude"]).all():
            raise ValueError(f"split_by: no file in {self._root / 'enmap'} says where it lies; take split_by: file")
        return files

    def _describe(self) -> TileSchema:
        array = dataset_card("spectral_earth")["arrays"]["enmap"]
        sensor = load_sensor(array["sensor"])
        bands = sensor.resolve_bands(array["subset"])
        self._channels = list(sensor.index(bands))  # of a file of all bands
        dtype = self._find_dtype(array["dtypes"])
        plain = (0.0,) * len(bands), (1.0,) * len(bands)  # until measured
        self._schema = TileSchema(sensor, bands, dtype, tuple(array["shape"]), array["gsd_m"], *plain)
        facts = [dtype, str(self._cfg.n_statistics_samples), *self._statistics_facts()]
        measured = cached_columns(self._root, "spectral_earth-statistics", facts, self._measure).rows
        mean, std = (tuple(map(float, row)) for row in np.asarray(measured))
        return TileSchema(sensor, bands, dtype, tuple(array["shape"]), array["gsd_m"], mean, std)

    def _find_dtype(self, allowed: list[str]) -> str:
        problem = None
        for i in evenly_spaced(len(self), _N_PROBES):
            try:
                dtype = str(self._rasters.open(name_inside(self._root, self._name(i))).dtypes[0])
            except (ValueError, OSError) as error:
                problem = problem or error
                continue
            if dtype not in allowed:
                raise ValueError(f"root: {self.locate(i)[1]} holds {dtype}, expected {' or '.join(allowed)}")
            return dtype
        raise ValueError(f"root: no file of {self._root / 'enmap'} of those looked at can be read: {problem}")

    def _statistics_facts(self) -> list[str]:
        facts = []
        for i in evenly_spaced(len(self), self._cfg.n_statistics_samples):
            name = printable(self._name(i))
            with suppress(OSError):
                stat = (self._root / name).stat()
                facts.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
        return facts

    def _measure(self) -> NDArray[np.float64]:
        """Mean and standard deviation over evenly spaced patches of the split, `[2, C]`."""
        total = BandStatistics.empty(len(self._schema.bands))
        for i in evenly_spaced(len(self), self._cfg.n_statistics_samples):
            with suppress(ValueError, OSError):  # the loader quarantines it when its turn comes
                pixels = self._read_pixels(name_inside(self._root, self._name(i)))
                total = total.merge(BandStatistics.of(pixels, self._schema.sensor.no_data))
        if constant := [b for b, s in zip(self._schema.bands, total.std, strict=True) if not s > 0]:
            raise ValueError(
                f"root: in the patches of {self._root} that were measured {len(constant)} bands have no data, or one"
                f" value only: {', '.join(constant[:8])}; raise n_statistics_samples, or get a clean copy"
            )
        return np.stack([total.mean, total.std])

    def _read_pixels(self, name: str) -> NDArray[Any]:
        """`[C, H, W]`. Raises `ValueError` for a file that is not as expected, before it is decoded."""
        file = self._rasters.open(name)
        found = (file.count, file.height, file.width, file.dtypes[0])
        expected = (len(self._channels), *(self._schema.shape or ()), self._schema.dtype)
        n_all = len(self._schema.sensor.bands)
        if found not in (expected, (n_all, *expected[1:])):
            raise ValueError(
                f"{name} has bands, height, width, dtype {found}; expected {expected}, or {n_all} bands instead"
            )
        channels = self._channels if file.count == n_all else list(range(file.count))
        return self._rasters.read(name, channels, (0, 0, file.height, file.width))


def _key_of(name: str) -> str:
    """The name of a file without `enmap/` and ending; of a long one a part and a hash, since it names tar members."""
    key = re.sub(r"\.tiff?$", "", name.removeprefix("enmap/"), flags=re.IGNORECASE)
    if len(re.sub(rb"[^\w=+@-]", b"%XX", key.encode())) <= _MAX_KEY:
        return key
    digest = blake2b(name.encode(), digest_size=8).hexdigest()
    return f"{re.sub('[^A-Za-z0-9_-]', '_', Path(key).name)[: _MAX_KEY - 17]}-{digest}"


def _date_of(name: str) -> str | None:
    """The instant in a name such as `ENMAP01-____L2A-DT0000004950_20221103T162438Z_...`, ISO 8601."""
    match = re.search(r"(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z", name)
    return "{}-{}-{}T{}:{}:{}Z".format(*match.groups()) if match else None
