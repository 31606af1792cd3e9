"""A small SatlasPretrain: 8-bit PNGs of tiles by sensor, scene and band, and the lists of its metadata.

The file of band b of scene s (in the order of the sensor's below) holds `20 * s + b + 1`, and one more in column 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

BANDS = {
    "sentinel2": {"tci": 512, "b05": 512, "b06": 512, "b07": 512, "b08": 512, "b11": 512, "b12": 512},
    "sentinel1": {"vh": 512, "vv": 512},
    "landsat": {**{f"b{i}": 256 for i in (1, 2, 3, 4, 5, 6, 7, 9)}, "b8": 512, "b10": 64, "b11": 64},
}
SCENES = {
    "sentinel2": (
        "S2A_MSIL1C_20160808T181452_N0204_R041_T12SVC_20160808T181447",  # the time is in image_times.json
        "S2B_MSIL1C_20221230T180749_N0509_R041_T13UCR_20221230T195817",
        "S2A_MSIL1C_20140101T000000_N0204_R041_T12SVC_20160808T181447",
    ),
    "sentinel1": ("2022-03", "2022-01"),
    "landsat": ("2022-06-15",),
}
TIMES = {SCENES["sentinel2"][0]: "2016-08-08T20:14:52+02:00", SCENES["sentinel2"][1]: "2022-12-30T18:07:49Z"}
TILES = ((1867, 3287), (1867, 3288), (4095, 4095))  # 33.5 N 98.0 W, the one south of it, the equator


def write_png(path: Path, value: int, side: int, n_bands: int = 1) -> None:
    from PIL import Image

    pixels = np.full((side, side, n_bands), value + np.arange(n_bands), np.uint8)
    pixels[:, 0] += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if n_bands == 3 else pixels[:, :, 0]).save(path, compress_level=1)


def value_of(sensor: str, scene: int, band: str) -> int:
    return 20 * scene + list(BANDS[sensor]).index(band) + 1


def write_images(
    root: Path, tile: tuple[int, int], sensor: str, scenes: Iterable[int], side: int | None = None
) -> None:
    for scene in scenes:
        for band, size in BANDS[sensor].items():
            path = root / sensor / SCENES[sensor][scene] / band / f"{tile[0]}_{tile[1]}.png"
            write_png(path, value_of(sensor, scene, band), side or size, 3 if band == "tci" else 1)


def write_metadata(root: Path, good: Any, train: Any, test: Any) -> None:
    folder = root / "metadata"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in [
        ("good_images_lowres_all", good),
        ("image_times", TIMES),
        ("train_lowres", train),
        ("test_lowres", test),
    ]:
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_archive(root: Path) -> None:
    """Tile 0 has three scenes of Sentinel-2, two of Sentinel-1, one of Landsat; tile 1 Sentinel-2; tile 2 Landsat."""
    write_images(root, TILES[0], "sentinel2", range(3))
    write_images(root, TILES[0], "sentinel1", range(2))
    write_images(root, TILES[0], "landsat", [0])
    write_images(root, TILES[1], "sentinel2", [1])
    write_images(root, TILES[2], "landsat", [0])
    good = [[*TILES[0], scene] for scene in SCENES["sentinel2"]] + [[*TILES[1], SCENES["sentinel2"][1]]]
    good += [[*TILES[1], "S2A_MSIL1C_20180808T181452_N0204_R041_T12SVC_20160808T181447"]]  # in the part not unpacked
    write_metadata(root, good, [list(TILES[0]), list(TILES[1]), [5, 5]], [list(TILES[2])])
