"""MultiMAE learns from real pairs of Sentinel-1 and Sentinel-2, with three resolutions, or a map of land cover."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import fit

from ssl_eo.config import build, load, to_dict
from ssl_eo.data.loader import Loader
from ssl_eo.data.render import Renderer
from ssl_eo.data.types import Batch, Sample, Source, Tile, TileSchema
from ssl_eo.objectives.multimae import Config, Objective
from ssl_eo.sensors import Band, Sensor, load_sensor
from ssl_eo.train.parallel import build_objective

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug" / "multimae.yaml"
N_STEPS = 60


class PairsWithLandCover:
    """The 96 patches of BigEarthNet v2 in one HDF5 file: radar in dB, four bands, 19 classes."""

    label_names: tuple[str, ...] = ()
    chunk_size = 16

    def __init__(self, path: Path) -> None:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path / "ben_v2_s1s2_120px.h5") as file:
            self._arrays = {name: file[name][:] for name in ("sentinel1", "sentinel2", "landcover19")}
        cover = Sensor(
            "cover", "cover", (Band("class", "categorical", 10.0, n_classes=19),), "uint8", "class", "", no_data=(255,)
        )
        layout = {
            "sentinel1": (load_sensor("sentinel1_grd"), ("VV", "VH")),
            "sentinel2": (load_sensor("sentinel2_l2a"), ("B02", "B03", "B04", "B08")),
            "landcover19": (cover, ("class",)),
        }
        self.schema: Mapping[str, TileSchema] = {name: self._schema(name, *what) for name, what in layout.items()}

    def _schema(self, name: str, sensor: Sensor, bands: tuple[str, ...]) -> TileSchema:
        pixels = self._arrays[name].reshape(96, len(bands), -1).astype(np.float64)
        mean, std = (tuple(f(pixels, axis=(0, 2)).tolist()) for f in (np.mean, np.std))
        return TileSchema(sensor, bands, str(self._arrays[name].dtype), (120, 120), 10.0, mean, std)

    def __len__(self) -> int:
        return 96

    def read(self, index: int) -> Sample:
        tiles = {n: Tile(self._arrays[n][index].reshape(-1, 120, 120), s.bands, 10.0) for n, s in self.schema.items()}
        return Sample(str(index), tiles)

    def fingerprint(self) -> str:
        return "pairs"


def _learn(source: Source, modalities: dict[str, Any], *overrides: str) -> dict[str, float]:
    """How far each loss falls on one batch of 6 samples, as a ratio of the first."""
    config = load(DEBUG, ["data.n_workers=0", "data.n_lanes=1", *overrides])
    raw = {**to_dict(config.objective.options), "modalities": modalities, "image_targets": {}}
    cfg = build(Config, raw, "objective")
    views = Objective.views(cfg, config.model, [source.schema])
    objective = build_objective(lambda: Objective(cfg, config.model, [source.schema]), 0, torch.device("cpu"))
    with Loader(config.data, [source], views, seed=0, global_batch_size=6, total_steps=1) as loader:
        batch: Batch = next(iter(loader))
    batch.pixels = Renderer([source.schema]).render(batch)
    with torch.no_grad():
        first = objective(batch, {}).parts
    fit(objective, batch, N_STEPS)
    with torch.no_grad():
        last = objective(batch, {}).parts
    return {name: (last[name] / first[name]).item() for name in first}


@pytest.mark.usefixtures("own_cache")
def test_three_resolutions_and_radar(real_samples: Callable[[str], Path]) -> None:
    """Tiles of 10, 20 and 60 m pixels of one scene are three modalities of one ground."""
    pytest.importorskip("rasterio")
    from ssl_eo.data.sources import bigearthnet

    root = real_samples("s1_s2_pairs/bigearthnet_v1")
    source = bigearthnet.Source(build(bigearthnet.Config, {"root": str(root), "split": "all"}, ""))
    fine, middle, coarse = ({"tile": f"sentinel2_l2a@{gsd}m"} for gsd in (10, 20, 60))
    ratios = _learn(source, {"fine": fine, "middle": middle, "coarse": coarse, "radar": {"tile": "sentinel1_grd"}})
    assert max(ratios.values()) < 0.7, ratios


def test_a_real_map_of_land_cover(real_samples: Callable[[str], Path]) -> None:
    source = PairsWithLandCover(real_samples("bigearthnet_v2_s1s2"))
    modalities = {
        "optical": {"tile": "sentinel2", "targets": ["values", "norm_pix"]},
        "radar": {"tile": "sentinel1"},
        "cover": {"tile": "landcover19", "kind": "classes", "stride": 2},
    }
    ratios = _learn(source, modalities, "model.patch_embed=conv")
    assert max(ratios.values()) < 0.9, ratios
    assert ratios["cover"] < 0.4
