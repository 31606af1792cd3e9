"""A small SpectralEarth: EnMAP patches as GeoTIFFs of 202 bands, and text files with the names of each split.

Band b (from 0) of patch n holds `100 * n + 10 * b` in its first row and 7 more in each row that follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from archives.tiffs import write_raster


def name_of(n: int) -> str:
    return f"ENMAP01-____L2A-DT00000{n:05d}_2022110{1 + n % 9}T162438Z-Y0146_X0311"


def pixels_of(n: int, dtype: str = "int16", n_bands: int = 202, side: int = 128) -> Any:
    rows = 7 * np.arange(side)[:, None] + np.zeros(side, int)
    return (100 * n + 10 * np.arange(n_bands)[:, None, None] + rows).astype(dtype)


def write_patch(root: Path, n: int, **options: Any) -> Path:
    """Patch n, half a degree of latitude north of patch n - 1."""
    path = root / "enmap" / f"scene_{n // 2}" / f"{name_of(n)}.tif"
    corner = (399_960.0, 5_000_000.0 + 55_600.0 * n)
    return write_raster(path, pixels_of(n, **options), corner=corner, pixel=30.0, compress="deflate", zlevel=1)


def write_split(root: Path, split: str, patches: Iterable[int], pattern: str = "scene_{}/{}.tif") -> Path:
    path = root / "splits" / "enmap" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(pattern.format(n // 2, name_of(n)) + "\n" for n in patches))
    return path
