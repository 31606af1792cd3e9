"""How fast one core reads the archives of many small files: as they were downloaded, and from packed shards.

Files have the layout, sizes and dtypes of the archive; their pixels are a smooth field with noise. All tiles of a
sample are read whole, in random order. Shards this small fit into the processor's cache: their rates are upper bounds.

C bands, H W pixels.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from _table import Row
from numpy.typing import NDArray

from ssl_eo.components import resolve
from ssl_eo.config import build
from ssl_eo.data.pack import pack
from ssl_eo.data.sources import shards
from ssl_eo.data.stacking import loaded
from ssl_eo.data.types import Source

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))
from archives import bigearthnet, fmow, satlas, spectral_earth, ssl4eo_s12

__all__ = ["measure_archives"]


def measure_archives(folder: Path, quick: bool) -> list[Row]:
    """Two rows an archive. Writes some 200 MB into `folder`."""
    seconds = 0.3 if quick else 3.0
    archives: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
        "fmow": (_write_fmow, {"sensors": ["worldview2_3", "sentinel2_l1c"], "max_images_per_sensor": 1}),
        "satlas": (satlas.write_archive, {"split": "all", "sensors": ["sentinel2"], "max_images_per_sensor": 1}),
        "spectral_earth": (_write_spectral_earth, {"n_statistics_samples": 2}),
        "ssl4eo_s12": (lambda root: ssl4eo_s12.make(root, 2), {"split": "all", "seasons": "samples"}),
        "bigearthnet": (lambda root: bigearthnet.make_v2(root, 8), {"split": "all", "version": "v2"}),
    }
    rows = []
    for name, (write, options) in archives.items():
        root = folder / name
        write(root)
        _roughen(root)
        module = resolve("ssl_eo.data.sources", name)
        source = module.Source(build(module.Config, {"root": str(root), **options}, name))
        pack(source, folder / f"{name} packed")
        packed = shards.Source(shards.Config(str(folder / f"{name} packed")))
        rates = [_rate(source, seconds), _rate(packed, seconds)]
        kilobytes = sum(tile.array.nbytes for tile in source.read(0).tiles.values()) / 1e3
        titles = f"{name}, {kilobytes:,.0f} KB of pixels a sample", f"{name}, packed raw"
        rows += [Row("archives", t, rate, "samples/s", rate / rates[0]) for t, rate in zip(titles, rates, strict=True)]
    return rows


def _rate(source: Source, seconds: float) -> float:
    """Samples per second of processor time, all pixels copied."""
    order = random.Random(0)
    n, elapsed, start = 0, 0.0, time.process_time()
    while elapsed < seconds:
        for tile in loaded(source.read(order.randrange(len(source)))).tiles.values():
            tile.array.copy()
        n, elapsed = n + 1, time.process_time() - start
    return n / elapsed


def _roughen(root: Path) -> None:
    """Gives every image of the archive pixels that compress as imagery does."""
    for n, path in enumerate(sorted([*root.rglob("*.tif"), *root.rglob("*.png")])):
        _rewrite_tiff(path, n) if path.suffix == ".tif" else _rewrite_png(path, n)


def _rewrite_tiff(path: Path, seed: int) -> None:
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "r+") as file:
            if file.name.endswith("reference_map.tif"):
                return  # class codes
            field = _field((file.count, file.height, file.width), seed)
            file.write((field if file.dtypes[0].startswith("float") else 1000 + 500 * field).astype(file.dtypes[0]))


def _rewrite_png(path: Path, seed: int) -> None:
    from PIL import Image

    with Image.open(path) as image:
        n_bands, size = len(image.getbands()), image.size
    pixels = (100 + 40 * _field((n_bands, size[1], size[0]), seed)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(path)


def _field(shape: tuple[int, int, int], seed: int) -> NDArray[np.float64]:
    """Smooth, with noise of a twentieth of its spread, `[C, H, W]`."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(shape[0], shape[1] // 8 + 2, shape[2] // 8 + 2))
    smooth = coarse.repeat(8, 1).repeat(8, 2)[:, : shape[1], : shape[2]]
    return smooth + 0.05 * rng.normal(size=shape)


def _write_fmow(root: Path) -> None:
    """Footprints of 512 px of WorldView (8 bands) and 64 px of Sentinel-2."""
    images = [
        (fmow.Image("wv23", datetime(2015, 1 + n, 3), (512, 512)), fmow.Image("s2", datetime(2016, 1 + n, 3), (64, 64)))
        for n in range(4)
    ]
    fmow.write_archive(root, footprints=images)


def _write_spectral_earth(root: Path) -> None:
    for n in range(4):
        spectral_earth.write_patch(root, n)
    spectral_earth.write_split(root, "train", range(4))
