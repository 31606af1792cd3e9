"""Writes `ssl_eo/recipes.json`, what each of `configs/pretrain` makes: `python tests/make_recipes.py`.

It is read where there is no PyYAML. Run it after a change of a recipe's model or data; a test says when. Objectives
decide, given sources that are opened as the recipes say, in small archives of the real layout.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "ssl_eo" / "recipes.json"
sys.path.append(str(ROOT / "tests" / "data"))

from archives import fmow, mmearth, satlas, small, spectral_earth, ssl4eo_s12  # noqa: E402
from archives.geotiff import tile_pixels, write_raster  # noqa: E402

from ssl_eo.components import resolve  # noqa: E402
from ssl_eo.config import Config, load  # noqa: E402
from ssl_eo.data.opening import open_sources  # noqa: E402
from ssl_eo.objectives.base import Objective  # noqa: E402
from ssl_eo.train.export import PairedObjective  # noqa: E402
from ssl_eo.weights._recipes import described  # noqa: E402


def recipes() -> str:
    """One line a recipe."""
    with TemporaryDirectory(prefix="ssl_eo-") as folder:
        root = str(_write_archives(Path(folder, "archives")))
        names = {"SSL_EO_DATA": root, "SSL_EO_SAMPLES": root, "SSL_EO_WEIGHTS": root, "XDG_CACHE_HOME": folder}
        with mock.patch.dict(os.environ, names):
            found = {path.stem: _made_by(path) for path in sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))}
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(made)}" for name, made in found.items()) + "\n}\n"


def _made_by(path: Path) -> dict[str, Any]:
    config = load(path)
    objective = _objective(config)
    model = objective.whole() if isinstance(objective, PairedObjective) else objective.published_encoder()
    published = {"published": objective.published} if isinstance(objective, PairedObjective) else {}
    features = {"pool": config.eval.pool, "taps": config.eval.taps}
    return {"objective": config.objective.name, "features": features, **published, **described(model)}


def _objective(config: Config) -> Objective:
    schemas = [source.schema for source in open_sources(config.data)]
    method = resolve("ssl_eo.objectives", config.objective.name).Objective
    with torch.device("meta"):
        objective: Objective = method(config.objective.options, config.model, schemas)
    return objective


def _write_archives(root: Path) -> Path:
    """All that recipes read, in folders of the names that they say."""
    mmearth.write_mmearth(root)
    mmearth.write_mmearth(root / "mmearth")
    ssl4eo_s12.make(root / "ssl4eo_s12", n_places=1)
    footprints = [[fmow.image(kind, 2010 + n, (256, 256)) for n in range(2)] for kind in fmow.KINDS]
    fmow.write_archive(root, footprints=footprints)
    for sensor in satlas.SCENES:
        satlas.write_images(root / "satlas", satlas.TILES[0], sensor, [0], side=32)
    place = list(satlas.TILES[0])
    satlas.write_metadata(root / "satlas", [[*place, satlas.SCENES["sentinel2"][0]]], [place], [])
    spectral_earth.write_patch(root / "spectral_earth", 0)
    spectral_earth.write_split(root / "spectral_earth", "train", [0])
    write_raster(root / "naip" / "scene.tif", tile_pixels(0, (3, 512, 512)).astype(np.uint8))
    small.ARCHIVES["eurosat webdataset"].write(root / "eurosat_rgb")
    (root / "s2_l2a_12band").mkdir()
    with h5py.File(root / "s2_l2a_12band" / "s2_l2a_64px.h5", "w") as file:
        file["sentinel2"] = np.stack([tile_pixels(n, (12, 64, 64)) for n in range(4)])  # [N, C, H, W]
        file["split"] = ["train"] * 4
    return root


if __name__ == "__main__":
    RECIPES.write_text(recipes(), encoding="utf-8")
