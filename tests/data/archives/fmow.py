"""A small fMoW: TIFFs of fmow-full and fmow-sentinel, bands of a pixel side by side, and the Parquet of footprints.

Band b of image i of footprint f holds `100 * f + 10 * i + b + 1` everywhere, plus the column of the pixel modulo 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from archives.tiffs import write_raster

LIST = "fmow/metadata_v2/fmow_iwm_onid_{split}.parquet"
KINDS = {"wv23": (8, "uint16"), "rgb": (3, "uint8"), "s2": (13, "uint16")}


class Image(NamedTuple):
    sensor: str
    time: datetime | None
    size: tuple[int, int]
    gsd_m: float | None = 1.5


def image(sensor: str, year: int, size: tuple[int, int] = (40, 50), gsd_m: float | None = 1.5) -> Image:
    return Image(sensor, datetime(year, 3, 4, 10, 11, 12), size, gsd_m)


FOOTPRINTS = (
    # Not in the order of time, and WorldView twice.
    (image("wv23", 2016), image("s2", 2019, (45, 47), 10.0), image("rgb", 2015), image("wv23", 2014, (64, 30), 1.9)),
    (image("s2", 2018, (20, 20), None),),
    tuple(image("rgb", 2010 + i, gsd_m=0.5 + 0.1 * i) for i in range(7)),
    (Image("wv23", None, (32, 32), 1.3), image("wv23", 2017, (8, 9)), image("qb", 2012)),
)


def path_of(footprint: int, i: int, sensor: str) -> str:
    if sensor == "s2":
        return f"fmow/fmow-sentinel/train/airport/airport_{footprint}/airport_{footprint}_{i}.tif"
    ending = "msrgb" if sensor == "rgb" else "ms"
    return f"fmow/fmow-full/train/airport/airport_{footprint}/airport_{footprint}_{i}_{ending}.tif"


def pixels_of(footprint: int, i: int, image: Image) -> Any:
    n_bands, dtype = KINDS[image.sensor]
    value = 100 * footprint + 10 * i + 1 + np.arange(n_bands)[:, None, None]
    return (value % 251 + np.arange(image.size[1]) % 7 + np.zeros((image.size[0], 1), int)).astype(dtype)


def columns_of(footprints: Sequence[Sequence[Image]]) -> dict[str, Any]:
    """List columns of the table."""
    return {
        "img_id": [[i for i, _ in enumerate(f)] for f in footprints],
        "path": [[path_of(n, i, image.sensor) for i, image in enumerate(f)] for n, f in enumerate(footprints)],
        "sensor": [[image.sensor for image in f] for f in footprints],
        "gsd": [[image.gsd_m for image in f] for f in footprints],
        "timestamp": [[image.time for image in f] for f in footprints],
        "img_height": [[image.size[0] for image in f] for f in footprints],
        "img_width": [[image.size[1] for image in f] for f in footprints],
    }


def write_list(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)


def write_archive(
    root: Path, split: str = "train", footprints: Sequence[Sequence[Image]] = FOOTPRINTS, **more: Any
) -> Path:
    """Files and list; `more` are further columns. Returns the path of the list."""
    for n, footprint in enumerate(footprints):
        for i, image in enumerate(footprint):
            if image.sensor in KINDS:
                write_raster(root / path_of(n, i, image.sensor), pixels_of(n, i, image), crs=None)
    path = root / LIST.format(split=split)
    write_list(path, {**columns_of(footprints), **more})
    return path
