"""Small archives in the two layouts of BigEarthNet, with their names, dtypes, side files and oddities.

Every pixel of band b of patch n holds `100 * n + position of b + 1`, radar the negative of a tenth of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from archives.tiffs import write_raster

SIZES = {
    **dict.fromkeys(["B02", "B03", "B04", "B08"], 120),
    **dict.fromkeys(["B05", "B06", "B07", "B8A", "B11", "B12"], 60),
    **dict.fromkeys(["B01", "B09"], 20),
}
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
LABELS_V1 = (
    ["Continuous urban fabric", "Discontinuous urban fabric"],  # two of 43, one of 19
    ["Transitional woodland/shrub", "Airports"],  # spelt differently among the 19; in none of them
    ["Bare rock"],  # of 43, none of 19
    ["Sea and ocean", "Pastures"],
)
LABELS_V2 = (
    ["Urban fabric"],
    ["Transitional woodland, shrub"],
    ["Arable land", "Pastures"],
    ["Marine waters", "Inland waters"],
)
MAP_CODES = (112, 324, 124, 999)  # quadrants of every reference map: airports and unlabelled are in no class of 19
_WKT_TAIL = 'UNIT["metre",1,AUTHORITY["EPSG","9001"]],AUTHORITY["EPSG","{epsg}"]]'


def write_band(path: Path, pixels: Any, corner: tuple[float, float] = (404400.0, 5342400.0)) -> None:
    """One band `[H, W]` of a patch of 1.2 km as a GeoTIFF, uncompressed as the archive's."""
    write_raster(path, pixels[None], crs="EPSG:32633", corner=corner, pixel=1200 / len(pixels))


def _write_patch(folder: Path, n: int, bands: Sequence[str], corner: tuple[float, float]) -> None:
    for c, band in enumerate(bands):
        value = 100 * n + c + 1
        if band in SIZES:
            pixels = np.full((SIZES[band], SIZES[band]), value, np.uint16)
        else:
            pixels = np.full((120, 120), -value / 10, np.float32)
        write_band(folder / f"{folder.name}_{band}.tif", pixels, corner=corner)


def names_v1(n: int) -> tuple[str, str]:
    """(Sentinel-2, Sentinel-1) names of patch n. Morning times lack their leading zero, as in the archive."""
    return f"S2B_MSIL2A_20170924T93020_{n}_24", f"S1A_IW_GRDH_1SDV_20170925T043256_33UUP_{n}_24"


def make_v1(root: Path, n_patches: int = 4, step_m: float = 60_000.0) -> Path:
    """A v1 archive whose patches lie `step_m` apart, so that they fall into different cells of a grid."""
    for n in range(n_patches):
        s2, s1 = names_v1(n)
        corner = (300_000.0 + step_m * (n % 8), 5_000_020.0 + step_m * (n // 8))
        common = {
            "labels": LABELS_V1[n % 4],
            "projection": 'PROJCS["WGS 84 / UTM zone 33N",' + _WKT_TAIL.format(epsg=32633),
        }
        edges = {"ulx": corner[0], "uly": corner[1], "lrx": corner[0] + 1200}
        for folder, bands, more in (
            (root / "BigEarthNet-v1.0" / s2, BANDS, {"coordinates": {**edges, "lry": corner[1] - 1200}}),
            # The radar files spell one corner "lly".
            (
                root / "BigEarthNet-S1-v1.0" / s1,
                ("VV", "VH"),
                {"coordinates": {**edges, "lly": corner[1] - 1200}, "corresponding_s2_patch": s2},
            ),
        ):
            _write_patch(folder, n, bands, corner)
            (folder / f"{folder.name}_labels_metadata.json").write_text(json.dumps({**common, **more}))
    return root


def names_v2(n: int) -> tuple[str, str]:
    return f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_{n}_48", f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_{n}_48"


def make_v2(root: Path, n_patches: int = 4) -> Path:
    """A v2 archive: splits train, validation, test, train, ...; one more patch is listed as under clouds."""
    rows: list[dict[str, Any]] = []
    codes = np.kron(np.array(MAP_CODES, np.uint16).reshape(2, 2), np.ones((60, 60), np.uint16))
    for n in range(n_patches + 1):
        s2, s1 = names_v2(n)
        corner = (404_400.0 + 1200 * n, 5_342_400.0)
        scene = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP"
        _write_patch(root / "BigEarthNet-S2" / scene / s2, n, BANDS, corner)
        _write_patch(root / "BigEarthNet-S1" / "S1A_IW_GRDH_1SDV_20170613T165043" / s1, n, ("VV", "VH"), corner)
        write_band(root / "Reference_Maps" / scene / s2 / f"{s2}_reference_map.tif", codes, corner)
        rows.append(
            {
                "patch_id": s2,
                "labels": LABELS_V2[n % 4],
                "split": ("train", "validation", "test")[n % 3],
                "country": "Austria",
                "s1_name": s1,
                "s2v1_name": names_v1(n)[0],
                "contains_seasonal_snow": False,
                "contains_cloud_or_shadow": n == n_patches,
            }
        )
    write_table(root / "metadata.parquet", rows[::-1][1:])  # not in the order of their names
    write_table(root / "metadata_for_patches_with_snow_cloud_or_shadow.parquet", rows[-1:])
    return root


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
