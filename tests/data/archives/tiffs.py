"""TIFF files as archives have them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any


def write_tiff(
    path: Path, pixels: Any, corner: tuple[float, float] | None = None, epsg: int = 32632, **options: Any
) -> None:
    """`pixels [C, H, W]`, in the file the bands of a pixel side by side; with `corner` (x, y), 30 m in `epsg`."""
    import rasterio

    path.parent.mkdir(parents=True, exist_ok=True)
    place = {}
    if corner is not None:
        place = {"crs": f"EPSG:{epsg}", "transform": rasterio.transform.from_origin(*corner, 30.0, 30.0)}
    n_bands, height, width = pixels.shape
    options = {"interleave": "pixel", "dtype": pixels.dtype.name, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", height=height, width=width, count=n_bands, **place, **options
        ) as file:
            file.write(pixels)
