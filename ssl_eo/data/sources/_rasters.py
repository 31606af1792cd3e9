"""GeoTIFF files: open handles of a process, boxes of pixels that are read when asked for, and where they lie.

C bands, H W pixels of a raster, h w pixels of a box. A box is (top, left, height, width) in whole pixels.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import import_extra, one_line
from ssl_eo.data.regular import check_regular
from ssl_eo.data.sources._side_files import printable

__all__ = [
    "Box",
    "Ground",
    "Part",
    "Rasters",
    "check_utf8",
    "ground_of",
    "matching_box",
    "open_raster",
    "read_box",
    "to_degrees",
]

Box = tuple[int, int, int, int]

_GDAL = {
    "GDAL_CACHEMAX": 64 << 20,  # bytes of decoded blocks in a process; GDAL would take 5 % of the memory in each
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",  # else every opening lists the folder, however many files are in it
}
_MAX_VALUES = 1 << 28  # of a box that is read at once, and of a block, which GDAL decodes as a whole
_EQUATOR_M, _FLATTENING = 6378137.0, 1 / 298.257223563  # WGS 84
_LENGTHS_AGREE = 0.01  # a projection that is off by more is taken at its word no longer


class Rasters:
    """The GeoTIFFs below a folder: up to `n_handles` are open in each thread of each process.

    GDAL's handles must be used by one thread at a time and not on both sides of a fork.
    """

    def __init__(self, root: Path, n_handles: int) -> None:
        _rasterio()  # it may be missing
        check_utf8(root, "root: ")
        self._root, self._n_handles = root, n_handles
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[Rasters], tuple[Path, int]]:
        return Rasters, (self._root, self._n_handles)

    def open(self, name: str) -> Any:
        """The dataset of a file, open until others push it out. Raises `ValueError` or `OSError` with the path."""
        files = self._files()
        if name in files:
            files.move_to_end(name)
            return files[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", _rasterio().errors.NotGeoreferencedWarning)
            files[name] = open_raster(self._root / name)
        if len(files) > self._n_handles:
            files.popitem(last=False)[1].close()
        return files[name]

    def read(self, name: str, channels: Sequence[int], box: Box) -> NDArray[Any]:
        """Pixels `[C, h, w]` of the bands `channels` (from 0) in a box. Raises as `open` and `read_box` do."""
        return read_box(self.open(name), channels, box)

    def size_bytes(self, name: str) -> int:
        return (self._root / name).stat().st_size

    def close(self) -> None:
        files = self._files()
        while files:
            files.popitem()[1].close()

    def _files(self) -> OrderedDict[str, Any]:
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.pid, self._local.files = os.getpid(), OrderedDict()
        files: OrderedDict[str, Any] = self._local.files
        return files


def check_utf8(path: Path, where: str = "") -> None:
    """Raise `ValueError`, which begins with `where`, for a path that GDAL cannot open."""
    if (shown := printable(os.fsencode(path))) != str(path):
        raise ValueError(f"{where}{shown}: the path is not UTF-8, which GDAL needs; rename it")


def open_raster(path: Path) -> Any:
    """The GeoTIFF `path`, open. Raises `ValueError` or `OSError` with the path for one that cannot be used."""
    rasterio = _rasterio()
    check_utf8(path)
    check_regular(path)
    try:
        with rasterio.Env(**_GDAL):
            file = rasterio.open(path, driver="GTiff")  # no other: a VRT may name any file or address
    except (rasterio.errors.RasterioError, UnicodeDecodeError) as error:  # GDAL quotes damaged bytes
        raise OSError(f"{path} is not a readable GeoTIFF: {one_line(_reason(error))}") from None
    try:
        _check_header(path, file)
    except ValueError:
        file.close()
        raise
    return file


def read_box(file: Any, channels: Sequence[int], box: Box) -> NDArray[Any]:
    """Pixels `[C, h, w]` of the bands `channels` (from 0) of an open raster.

    Raises `ValueError` for more than can be held, and `OSError` for what cannot be decoded, with the file's path.
    """
    import rasterio

    top, left, height, width = box
    if len(channels) * height * width > _MAX_VALUES:
        raise ValueError(
            f"{file.name}: {len(channels)} bands of {height} x {width} pixels are too many to read at once: set"
            " crop.extent_m of the source, or of a folder of GeoTIFFs set window_px"
        )
    window = rasterio.windows.Window(left, top, width, height)
    try:
        with rasterio.Env(**_GDAL):
            pixels: NDArray[Any] = file.read([c + 1 for c in channels], window=window)  # [C, h, w]
    except (rasterio.errors.RasterioError, UnicodeDecodeError) as error:
        raise OSError(f"{file.name} is truncated or damaged: {one_line(_reason(error))}") from None
    return pixels


def _check_header(path: Path, file: Any) -> None:
    from rasterio.enums import Interleaving

    if complex_dtypes := [dtype for dtype in file.dtypes if dtype.startswith("complex")]:
        raise ValueError(f"{path} has dtype {complex_dtypes[0]}, expected real numbers")
    height, width = file.block_shapes[0]
    n_bands = file.count if file.interleaving == Interleaving.pixel else 1
    if n_bands * height * width > _MAX_VALUES:
        raise ValueError(
            f"{path} has blocks of {n_bands} bands of {height} x {width} pixels, each of which must be decoded as a"
            " whole; store it anew in small ones (gdal_translate -co TILED=YES)"
        )


@dataclass
class Part:
    """`LazyPixels` of some bands of a raster in a box: slicing reads just that part of the file."""

    rasters: Rasters
    name: str
    channels: tuple[int, ...]
    box: Box
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.channels), self.box[2], self.box[3]

    def __getitem__(self, part: tuple[slice, slice, slice]) -> NDArray[Any]:
        n_bands, height, width = self.shape
        bands, rows, columns = (range(n)[s] for n, s in zip((n_bands, height, width), part, strict=True))
        if rows.step != 1 or columns.step != 1:
            raise ValueError(f"pixels of a file are read without a step, got {part}")
        shape = len(bands), len(rows), len(columns)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        box = self.box[0] + rows[0], self.box[1] + columns[0], len(rows), len(columns)
        return self.rasters.read(self.name, [self.channels[i] for i in bands], box)


@dataclass(frozen=True)
class Ground:
    """Where the centre of a box lies (degrees, WGS 84), and the ground size of a pixel there."""

    latitude: float
    longitude: float
    gsd_m: float


def ground_of(file: Any, box: Box) -> Ground | None:
    """None for a file without georeference. Raises `ValueError` for one that lies nowhere on Earth.

    The size of a pixel is the root of its area. It is that of the projection where that keeps lengths, else (degrees,
    Mercator away from the equator) it is measured on the WGS 84 ellipsoid.
    """
    if not _is_georeferenced(file):
        return None
    row, column = box[0] + box[2] / 2, box[1] + box[3] / 2
    corners = [_moved(file.transform, column + i, row + j) for i, j in ((0, 0), (1, 0), (0, 1))]
    try:
        latitude, longitude = to_degrees(file.crs, *zip(*corners, strict=True))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None
    if not all(map(math.isfinite, (*latitude, *longitude))) or abs(latitude[0]) > 90:
        raise ValueError(f"{file.name}: its centre {corners[0]} in {file.crs} is no place on Earth")
    per_row, per_column = _metres_per_degree(latitude[0])
    east = [((x - longitude[0] + 180) % 360 - 180) * per_column for x in longitude]
    north = [(y - latitude[0]) * per_row for y in latitude]
    gsd_m = math.sqrt(abs(east[1] * north[2] - east[2] * north[1]))
    if file.crs.is_projected:
        nominal = math.sqrt(abs(file.transform.determinant)) * file.crs.linear_units_factor[1]
        if abs(gsd_m - nominal) <= _LENGTHS_AGREE * nominal:
            gsd_m = nominal
    return Ground(latitude[0], (longitude[0] + 180) % 360 - 180, gsd_m)


def to_degrees(crs: Any, xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Latitudes and longitudes (WGS 84) of points. Raises `ValueError` where the reference system gives none."""
    import_extra("geo", "rasterio", "placing coordinates on the globe")
    from rasterio.warp import transform

    try:
        longitudes, latitudes = transform(crs, "EPSG:4326", xs, ys)
    except Exception as error:  # what GDAL raises here is neither a RasterioError nor public
        raise ValueError(f"its coordinates cannot be brought to degrees: {one_line(error)[:200]}") from None
    return latitudes, longitudes


def matching_box(reference: Any, box: Box, other: Any) -> Box:
    """The box of `other` that shows the ground of `box` of `reference`.

    Raises `ValueError` unless its corner falls on pixels of `other`, up to half a pixel of `reference`, and it lies
    within `other`. Files without georeference show the same ground.
    """
    top, left, height, width = box
    if _is_georeferenced(reference) and _is_georeferenced(other):
        if reference.crs != other.crs:
            raise ValueError(f"{other.name} is in {other.crs}, {reference.name} in {reference.crs}: warp one of them")
        (first_column, first_row), (last_column, last_row) = (
            _moved(~other.transform, *_moved(reference.transform, x, y))
            for x, y in ((left, top), (left + width, top + height))
        )
    else:
        scale_y, scale_x = other.height / reference.height, other.width / reference.width
        if abs(scale_y / scale_x - 1) > 0.01:
            raise ValueError(
                f"{other.name} has {other.height} x {other.width} pixels, {reference.name} has {reference.height} x"
                f" {reference.width}: without georeference they cannot show the same ground"
            )
        first_row, last_row, first_column, last_column = (
            top * scale_y,
            (top + height) * scale_y,
            left * scale_x,
            (left + width) * scale_x,
        )
    rows = _whole_pixels(first_row, last_row, height, other.height)
    columns = _whole_pixels(first_column, last_column, width, other.width)
    if rows is None or columns is None:
        raise ValueError(
            f"{other.name} has no box for the pixels {top}:{top + height}, {left}:{left + width} of {reference.name}:"
            f" they are rows {first_row:.2f}:{last_row:.2f} and columns {first_column:.2f}:{last_column:.2f} of"
            f" {other.height} x {other.width}; rasters of a place must cover the same ground, and windows must begin at"
            " whole pixels of all of them"
        )
    return rows[0], columns[0], rows[1], columns[1]


def _whole_pixels(first: float, last: float, n_reference: int, size: int) -> tuple[int, int] | None:
    """(first pixel, number of pixels) of an interval along an axis of `size` pixels; None if it has none."""
    if last <= first:
        return None
    tolerance = 0.5 * (last - first) / n_reference + 1e-3  # half a pixel of the reference
    start = math.floor(first + 0.5)
    n = max(1, math.floor(last - first + 0.5 - 1e-3))
    if abs(start - first) > tolerance:
        return None
    n_inside = min(start + n, size) - max(start, 0)
    if n_inside < n - max(1.0, 2 * tolerance) or n_inside < 1 or start < 0:
        return None
    return start, n_inside


def _moved(transform: Any, x: float, y: float) -> tuple[float, float]:
    """A point under an affine map (by hand: the operator for it is not the same in all versions)."""
    return transform.a * x + transform.b * y + transform.c, transform.d * x + transform.e * y + transform.f


def _metres_per_degree(latitude: float) -> tuple[float, float]:
    """Of latitude (along a meridian) and of longitude (along a parallel), on the WGS 84 ellipsoid."""
    squared = _FLATTENING * (2 - _FLATTENING)  # of the eccentricity
    phi = math.radians(latitude)
    w = math.sqrt(1 - squared * math.sin(phi) ** 2)
    meridian, normal = _EQUATOR_M * (1 - squared) / w**3, _EQUATOR_M / w
    return math.radians(meridian), math.radians(normal * math.cos(phi))


def _is_georeferenced(file: Any) -> bool:
    return bool(file.crs is not None and not file.transform.is_identity)


def _reason(error: BaseException) -> Exception:
    """What GDAL said, where rasterio only says that something went wrong."""
    cause = error.__cause__
    return cause if isinstance(cause, Exception) else Exception(str(error))


def _rasterio() -> Any:
    return import_extra("geo", "rasterio", "reading GeoTIFFs")
