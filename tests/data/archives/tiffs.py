"""Small TIFFs as archives and tools write them: strips or blocks, any CRS, descriptions, no-data, tags."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


def write_raster(
    path: Path,
    pixels: NDArray[Any],
    *,
    crs: str | None = "EPSG:32632",
    corner: tuple[float, float] = (600_000.0, 5_000_000.0),
    pixel: float | tuple[float, float] = 10.0,
    no_data: float | None = None,
    descriptions: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
    **profile: Any,
) -> Path:
    """`pixels [C, H, W]`; `corner` is the (x, y) of the top left one, `pixel` its side or (width, height), in the CRS.

    Without a CRS the file does not say where it lies.
    """
    import rasterio

    path.parent.mkdir(parents=True, exist_ok=True)
    place: dict[str, Any] = {}
    if crs is not None:
        width, height = pixel if isinstance(pixel, tuple) else (pixel, pixel)
        place = {"crs": crs, "transform": rasterio.transform.from_origin(*corner, width, height)}
    n_bands, n_rows, n_columns = pixels.shape
    size = {"count": n_bands, "height": n_rows, "width": n_columns, "dtype": pixels.dtype, "nodata": no_data}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", **size, **place, **profile) as file:
            if tags:
                file.update_tags(**tags)
            for band, description in enumerate(descriptions, 1):
                file.set_band_description(band, description)
            file.write(pixels)
    return path
