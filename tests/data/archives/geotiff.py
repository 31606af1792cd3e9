"""Small GeoTIFFs as tools write them: strips or blocks, any CRS, descriptions, no-data, tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write_raster(
    path: Path,
    pixels: NDArray[Any],
    *,
    crs: str | None = "EPSG:32632",
    corner: tuple[float, float] = (600_000.0, 5_000_000.0),
    pixel: float = 10.0,
    no_data: float | None = None,
    descriptions: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
    **profile: Any,
) -> Path:
    """`pixels [C, H, W]`; `corner` is the (x, y) of the top left one, `pixel` its side, both in units of the CRS."""
    import rasterio

    path.parent.mkdir(parents=True, exist_ok=True)
    georeference = (
        {} if crs is None else {"crs": crs, "transform": rasterio.transform.from_origin(*corner, pixel, pixel)}
    )
    n_bands, height, width = pixels.shape
    size = {"count": n_bands, "height": height, "width": width, "dtype": pixels.dtype, "nodata": no_data}
    with rasterio.open(path, "w", driver="GTiff", **size, **georeference, **profile) as file:
        file.write(pixels)
        file.update_tags(**(tags or {}))
        for band, description in enumerate(descriptions, 1):
            file.set_band_description(band, description)
    return path


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
