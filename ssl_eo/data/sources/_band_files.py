"""Tiles that lie on disk as one GeoTIFF a band, read when they are looked at.

C bands, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import import_extra

__all__ = ["BandFiles", "place_of", "places_of"]


@dataclass(frozen=True)
class BandFiles:
    """`LazyPixels` of C single-band files of the same height, width and dtype, which are opened anew for each read.

    Slicing raises `ValueError` or `OSError`, with the name of the file, for one that is missing, damaged or different.
    """

    paths: tuple[Path, ...]
    size: tuple[int, int]  # H, W
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.paths), *self.size)

    def __getitem__(self, part: tuple[slice, slice, slice]) -> NDArray[Any]:
        paths, rows, columns = self.paths[part[0]], part[1].indices(self.size[0]), part[2].indices(self.size[1])
        window = ((rows[0], rows[1]), (columns[0], columns[1]))
        pixels = np.stack([self._read(path, window) for path in paths])  # [C, H, W]
        return pixels[:, :: rows[2], :: columns[2]]

    def _read(self, path: Path, window: tuple[tuple[int, int], tuple[int, int]]) -> NDArray[Any]:
        with _rasterio().open(path) as file:
            found = (file.count, file.height, file.width, file.dtypes[0])
            expected = (1, *self.size, self.dtype.name)
            if found != expected:  # before decoding: a damaged header may say anything
                raise ValueError(f"{path} has bands, height, width, dtype {found}; expected {expected}")
            try:
                pixels: NDArray[Any] = file.read(1, window=window)  # [H, W]
            except OSError as error:
                raise OSError(f"{path} is truncated or damaged: {error.__cause__ or error}") from None
            return pixels


def place_of(path: Path) -> tuple[float, float]:
    """Latitude and longitude (degrees) of the centre of a raster, from its header."""
    with _rasterio().open(path) as file:
        if file.crs is None:
            raise ValueError(f"{path} has no coordinate reference system")
        longitude, latitude = file.lnglat()
    return latitude, longitude


def places_of(epsg: int, eastings: Sequence[float], northings: Sequence[float]) -> tuple[Any, Any]:
    """Latitudes and longitudes (degrees) of points in the coordinate reference system `epsg`."""
    from rasterio.warp import transform

    longitudes, latitudes = transform(f"EPSG:{epsg}", "EPSG:4326", eastings, northings)
    return latitudes, longitudes


def _rasterio() -> Any:
    return import_extra("geo", "rasterio", "reading GeoTIFFs")
