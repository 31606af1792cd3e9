"""A scene: a GeoTIFF of any size that is read box by box, and where its cells lie on the ground.

C bands that are read, H W pixels of the scene, h w pixels of a box.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_eo.adapt.tiling import Box, grid_of
from ssl_eo.components import import_extra, one_line, suggest
from ssl_eo.data.sources._rasters import ground_of, open_raster, read_box
from ssl_eo.sensors import Sensor

__all__ = ["Grid", "NoBandError", "Scene"]

_MAX_VALUES = 1 << 26  # read at once, in the stored dtype; more are read some bands after the others
_CHUNK_BYTES = 1 << 20
_CACHE_BYTES = 64 << 20  # of GDAL's blocks of a mask
_ALIKE = 1.5  # up to this factor pixels are of one size
_NOWHERE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # the transform of pixels that lie nowhere


class NoBandError(ValueError):
    """A scene lacks a band; `held` are the names of those it has, none where it does not say them."""

    def __init__(self, message: str, held: tuple[str, ...]) -> None:
        super().__init__(message)
        self.held = held


@dataclass(frozen=True)
class Grid:
    """Cells of a raster: how many (h, w), and where they lie.

    `crs` is rasterio's, None without one; `transform` has the six coefficients a to f of the affine map from
    (column, row) to coordinates.
    """

    shape: tuple[int, int]
    crs: Any
    transform: tuple[float, float, float, float, float, float]

    def coarser(self, cell_px: int) -> Grid:
        """The grid whose cells are `cell_px` of these wide, from the same corner on, and reach to the edges."""
        a, b, c, d, e, f = self.transform
        wide = (a * cell_px, b * cell_px, c, d * cell_px, e * cell_px, f)
        return Grid(grid_of(self.shape, cell_px), self.crs, wide)

    def centres(self, rows: NDArray[Any], columns: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Coordinates x and y of the centres of cells."""
        a, b, c, d, e, f = self.transform
        right, down = columns + 0.5, rows + 0.5
        return a * right + b * down + c, d * right + e * down + f


class Scene:
    """The GeoTIFF `path`, and those of its bands that a model takes. Close it, or use it in a `with`.

    `bands` are what is read, in this order: names, or numbers of bands in the file as GDAL counts them, from 1; None
    for all. The file's bands are called as `file_bands` says, in file order; else as the file describes them; else as
    the bands of `sensor`, where it has as many. They are never guessed. `no_data` are stored values that mean nothing;
    None: those of the file and of the sensor. NaN, infinity and pixels that a mask in the file, or beside it (`.msk`),
    hides always mean nothing, in all bands or in the mask's own; an alpha band hides none, as many a near infrared band
    is written as alpha. A scene lies on a disk: nothing is fetched.

    Raises `ValueError` or `OSError` with the path for a file or bands that cannot be used, and warns of a scene without
    a reference system, or whose pixels have no place in it: its outputs have none either.
    """

    def __init__(
        self,
        path: Path,
        bands: Sequence[str | int] | None = None,
        sensor: Sensor | None = None,
        file_bands: Sequence[str] | None = None,
        no_data: Sequence[float] | None = None,
    ) -> None:
        self.path = path
        if not path.exists():  # GDAL would take the path for an address
            raise ValueError(f"{path}: there is no such file (a scene is read from a disk; fetch it before)")
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and a scene is one GeoTIFF: give its file")
        rasterio = import_extra("geo", "rasterio", "reading a scene")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # ours says more
            self._file = open_raster(path)
        try:
            names = _names_of(self._file, file_bands, sensor)
            wanted = bands if bands is not None else range(1, self._file.count + 1)
            self.channels = tuple(_channel(path, band, names, self._file.count, sensor) for band in wanted)
            if not self.channels:
                raise ValueError(f"bands: none of {path} is named")
            if twice := [i + 1 for i in self.channels if self.channels.count(i) > 1]:
                raise ValueError(f"bands (--bands): band {twice[0]} of {path} is named more than once")
            self._masks = _masks_of(self._file, path, self.channels)
        except (ValueError, OSError):
            self.close()
            raise
        self.bands = tuple(names[i] if names else str(i + 1) for i in self.channels)
        self.grid = _grid_of(self._file)
        own = [float(v) for v in self._file.nodatavals if v is not None]
        of_sensor = () if sensor is None else sensor.no_data
        given = (*own, *of_sensor) if no_data is None else no_data
        self.no_data = tuple(dict.fromkeys(float(v) for v in given if not math.isnan(v)))
        if self.grid.crs is None:
            lack = "has no coordinate reference system"
            if self._file.crs is not None:
                lack = "does not say where in its coordinate reference system its pixels lie (no geotransform)"
            warnings.warn(f"{path} {lack}: what is made of it has none", stacklevel=2)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.grid.shape

    @property
    def n_bands(self) -> int:
        """C, the number of bands that are read."""
        return len(self.channels)

    def read(self, box: Box) -> Tensor:
        """Stored values `[C, h, w]` of a box of pixels as float32, NaN where nothing was measured.

        Raises `OSError` with the path for pixels that cannot be decoded.
        """
        values = np.empty((self.n_bands, *box[2:]), np.float32)
        n_at_once = max(1, _MAX_VALUES // (box[2] * box[3]))
        for first in range(0, self.n_bands, n_at_once):
            some = slice(first, first + n_at_once)
            stored = read_box(self._file, self.channels[some], box)  # [n, h, w]
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and so not measured
                values[some] = stored
                for value in self.no_data:
                    values[some][stored == value] = np.nan
        values[np.isinf(values)] = np.nan
        for band, rows in self._masks:
            values[rows, self._hidden(band, box)] = np.nan
        return torch.from_numpy(values)

    def _hidden(self, band: int, box: Box) -> NDArray[np.bool_]:
        """`[h, w]`: which pixels the mask of `band`, from 1, hides. Raises `OSError` for one that cannot be decoded."""
        import rasterio

        window = rasterio.windows.Window(box[1], box[0], box[3], box[2])
        try:
            with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES):
                hidden: NDArray[np.bool_] = self._file.read_masks(band, window=window) == 0
        except rasterio.errors.RasterioError as error:
            raise OSError(f"{self.path} is truncated or damaged: its mask: {one_line(error)}") from None
        return hidden

    def doubts(self, sensor: Sensor, gsd_m: float) -> list[str]:
        """What speaks against its values being those of `sensor`, with pixels of `gsd_m` metres, a line each.

        Floats, such as reflectances, where the sensor has integers; integers of fewer bytes, or of more, as of a sensor
        of 16 bits for a model of 8-bit pictures; a scale or an offset that is not the sensor's; pixels of another size
        on the ground.
        """
        unless = "what is made of it means little unless the values are in the same unit"
        found = []
        expected = np.dtype(sensor.dtype)
        for dtype in dict.fromkeys(np.dtype(self._file.dtypes[i]) for i in self.channels):
            is_float = dtype.kind == "f"
            if is_float != (expected.kind == "f") or (not is_float and dtype.itemsize != expected.itemsize):
                found.append(
                    f"{self.path} holds {dtype}, and {sensor.name} is stored as {expected} (unit {sensor.unit}, scale"
                    f" {sensor.scale:g}): {unless}"
                )
        for pair in dict.fromkeys((self._file.scales[i], self._file.offsets[i]) for i in self.channels):
            if pair not in ((1.0, 0.0), (sensor.scale, sensor.offset)):
                found.append(
                    f"{self.path} says that its values are to be scaled by {pair[0]:g}, with an offset of {pair[1]:g};"
                    f" {sensor.name} has {sensor.scale:g} and {sensor.offset:g}, and values are taken as they are"
                    f" stored: {unless}"
                )
        return [*found, *self._doubts_of_size(gsd_m)]

    def _doubts_of_size(self, gsd_m: float) -> list[str]:
        if self.grid.crs is None:
            return []
        try:
            ground = ground_of(self._file, (0, 0, *self.shape))
        except ValueError as error:  # it is nowhere on Earth
            return [str(error)]
        if ground is None or 1 / _ALIKE <= ground.gsd_m / gsd_m <= _ALIKE:
            return []
        return [
            f"{self.path} has pixels of {ground.gsd_m:.3g} m, and the model was trained on ones of {gsd_m:.3g} m: what"
            " it shows is not of the size that the model knows, unless it is resampled"
        ]

    def digest(self) -> str:
        """A digest of all bytes of the file, and of the mask beside it."""
        found = blake2b(digest_size=16)
        for path in (self.path, _mask_file(self.path)):
            if path.is_file():
                found.update(b"%d\n" % path.stat().st_size)
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK_BYTES):
                        found.update(chunk)
        return found.hexdigest()

    def stamp(self) -> tuple[tuple[int, ...], ...]:
        """What changes when somebody writes to the file, or the mask beside it, or puts another in its place."""
        stats = [path.stat() for path in (self.path, _mask_file(self.path)) if path.is_file()]
        return tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _names_of(file: Any, file_bands: Sequence[str] | None, sensor: Sensor | None) -> tuple[str, ...]:
    """Names of the bands of an open file in its order; none where nothing says them."""
    if file_bands is not None:
        names = tuple(file_bands)
        if len(names) != file.count:
            raise ValueError(
                f"{file.name} holds {file.count} bands, file_bands names {len(names)}: name all, in file order"
            )
    elif all(file.descriptions):
        names = tuple(file.descriptions)
    elif sensor is not None and len(sensor.bands) == file.count:
        names = sensor.band_names
    else:
        names = ()
    return names


def _channel(path: Path, band: str | int, names: tuple[str, ...], count: int, sensor: Sensor | None) -> int:
    """Which band of the file, from 0, a name or a number from 1 means."""
    if isinstance(band, int):
        if not 1 <= band <= count:
            raise ValueError(f"{path} has no band {band}: it holds bands 1 to {count}")
        return band - 1
    if not names:
        raise NoBandError(
            f"{path} holds {count} bands and does not name them, so none is {band!r}: give their numbers, from 1, in"
            " bands (--bands; in Python, file_bands may name them all instead)",
            names,
        )
    if band not in names:
        shown = ", ".join(names[:16]) + (f", ... {count} in all" if count > 16 else "")
        is_right = sensor is not None and band in sensor.band_names  # and so no other was meant
        meant = "" if is_right else suggest(band, list(names))
        has_others = sensor is not None and not set(sensor.band_names) & set(names)
        where = "; say in bands (--bands) which of these the model's are, in its order" if has_others else ""
        raise NoBandError(f"{path} has no band {band!r}{meant} (it holds {shown}){where}", names)
    if names.count(band) > 1:
        raise ValueError(f"{path} has several bands {band!r}: give their numbers in bands (--bands)")
    return names.index(band)


def _grid_of(file: Any) -> Grid:
    """That of an open file: without a place where it says none, or one that is no number."""
    transform = file.transform
    coefficients = (transform.a, transform.b, transform.c, transform.d, transform.e, transform.f)
    if not all(map(math.isfinite, coefficients)) or coefficients == _NOWHERE:
        return Grid(file.shape, None, _NOWHERE)
    return Grid(file.shape, file.crs, coefficients)


def _mask_file(path: Path) -> Path:
    """Where GDAL looks for masks beside a file."""
    return path.with_name(f"{path.name}.msk")


def _masks_of(file: Any, path: Path, channels: Sequence[int]) -> list[tuple[int, slice]]:
    """Bands, from 1, whose masks hide pixels, and in which of the `channels`: in all, or each in its own.

    Raises `OSError` where there is a file of masks beside it that cannot be read: GDAL would go on without.
    """
    import rasterio
    from rasterio.enums import MaskFlags

    with rasterio.Env(CPL_DEBUG=False):
        flags = [file.mask_flag_enums[i] for i in channels]
    whole = [c for c, of in enumerate(flags) if MaskFlags.per_dataset in of and MaskFlags.alpha not in of]
    if whole:
        return [(channels[whole[0]] + 1, slice(None))]
    own = [(channels[c] + 1, slice(c, c + 1)) for c, of in enumerate(flags) if not of]
    if not own and _mask_file(path).exists():
        raise OSError(f"{_mask_file(path)} cannot be read as the mask of {path.name}: mend it, or move it away")
    return own
