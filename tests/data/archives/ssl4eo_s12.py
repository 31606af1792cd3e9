"""A small archive in the layout of SSL4EO-S12 v1, with its names, sizes, dtypes and side files.

Every pixel of band b of season k of place n holds `1000 * n + 100 * k + position of b + 1`, radar the negative of a
hundredth of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from archives.tiffs import write_raster

L1C = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
BANDS = {"s1": ("VV", "VH"), "s2c": L1C, "s2a": tuple(b for b in L1C if b != "B10")}
SIZES = {**dict.fromkeys(["B1", "B9", "B10"], 44), **dict.fromkeys(["B5", "B6", "B7", "B8A", "B11", "B12"], 132)}
DAYS = {  # of the scenes of each season: those of one season are days or weeks apart
    "s1": ("20200607", "20200903", "20201202", "20210305"),
    "s2c": ("20200604", "20200823", "20201216", "20210321"),
    "s2a": ("20200604", "20200813", "20201216", "20210321"),
}


def scene_name(product: str, season: int) -> str:
    day = DAYS[product][season]
    if product == "s1":
        return f"S1A_IW_GRDH_1SDV_{day}T010800_{day}T010825_032904_03CFBA_D457"
    return f"{day}T054639_{day}T054831_T43RCP"


def write_band(path: Path, pixels: np.ndarray, longitude: float = 73.3) -> None:
    """One band `[H, W]` as a GeoTIFF in degrees, uncompressed as the archive's."""
    height, width = pixels.shape
    pixel = (0.0267 / width, 0.0232 / height)
    write_raster(path, pixels[None], crs="EPSG:4326", corner=(longitude, 30.47), pixel=pixel)


def write_scene(root: Path, product: str, place: int, season: int, bands: tuple[str, ...] | None = None) -> Path:
    """One scene with its `metadata.json`; of `bands` only, where a test needs no others."""
    folder = root / product / f"{place:07d}" / scene_name(product, season)
    for c, band in enumerate(BANDS[product]):
        if bands is not None and band not in bands:
            continue
        value, size = 1000 * place + 100 * season + c + 1, SIZES.get(band, 264)
        pixels = np.full((size, size), -value / 100, np.float32) if product == "s1" else np.full((size, size), value)
        write_band(folder / f"{band}.tif", pixels.astype(np.float32 if product == "s1" else np.uint16), 73.3 + place)
    facts = {"orbitProperties_pass": "DESCENDING"} if product == "s1" else {"CLOUDY_PIXEL_PERCENTAGE": 0.5 * season}
    (folder / "metadata.json").write_text(json.dumps({**facts, "system:footprint": {"coordinates": [[73.3, 30.4]]}}))
    return folder


def make(root: Path, n_places: int = 2, bands: tuple[str, ...] | None = None) -> Path:
    """Places one degree of longitude apart, each with four seasons of all three products."""
    for place in range(n_places):
        for product in BANDS:
            for season in range(4):
                write_scene(root, product, place, season, bands)
    return root
