"""Tiles that lie on disk as one GeoTIFF a band, read when they are looked at.

C bands, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.sources._rasters import Box, ground_of, open_raster, read_box

__all__ = ["BandFiles", "place_of"]


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
        box = rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0]
        pixels = np.concatenate([self._read(path, box) for path in paths])  # [C, H, W]
        return pixels[:, :: rows[2], :: columns[2]]

    def _read(self, path: Path, box: Box) -> NDArray[Any]:
        with open_raster(path) as file:
            found = (file.count, file.height, file.width, file.dtypes[0])
            expected = (1, *self.size, self.dtype.name)
            if found != expected:  # before decoding: a damaged header may say anything
                raise ValueError(f"{path} has bands, height, width, dtype {found}; expected {expected}")
            return read_box(file, [0], box)  # [1, H, W]


def place_of(path: Path) -> tuple[float, float]:
    """Latitude and longitude (degrees) of the centre of a raster, from its header. Raises as reading it does."""
    with open_raster(path) as file:
        ground = ground_of(file, (0, 0, file.height, file.width))
        if ground is None:
            raise ValueError(f"{path} has no coordinate reference system")
        return ground.latitude, ground.longitude
