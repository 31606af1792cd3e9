"""Rasters of which the source `geotiff` is made to read parts: their pixels, and one that is large and nearly empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from archives.tiffs import write_raster
from numpy.typing import NDArray

__all__ = ["tile_pixels", "write_raster", "write_sparse"]


def write_sparse(path: Path, size: int, block: tuple[int, int], pixels: NDArray[Any]) -> Path:
    """A tiled raster of `size` squared of which one block, at (row, column) of pixels, was written."""
    import rasterio

    window = rasterio.windows.Window(block[1], block[0], pixels.shape[2], pixels.shape[1])
    profile = {"count": len(pixels), "height": size, "width": size, "dtype": pixels.dtype, "nodata": 0}
    layout = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "SPARSE_OK": True}
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(600_000.0, 5_000_000.0, 1.0, 1.0)}
    with rasterio.open(path, "w", driver="GTiff", **profile, **layout, **place) as file:
        file.write(pixels, window=window)
    return path


def tile_pixels(seed: int, shape: tuple[int, int, int], dtype: str = "uint16") -> NDArray[Any]:
    """Values from 1 on, different in every place; band c is 1000 (c + 1) higher than noise."""
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 900, shape) + 1000 * (np.arange(shape[0])[:, None, None] + 1)).astype(dtype)
