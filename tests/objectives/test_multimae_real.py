"""MultiMAE learns from real pairs of Sentinel-1 and Sentinel-2, with three resolutions, or a map of land cover."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import fit

from ssl_eo.config import build, load, to_dict
from ssl_eo.data.loader import Loader
from ssl_eo.data.render import Renderer
from ssl_eo.data.types import Batch, Source
from ssl_eo.objectives.multimae import Config, Objective
from ssl_eo.train.parallel import build_objective

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug" / "multimae.yaml"
N_STEPS = 60
LAND_COVER = """
title: Land cover of BigEarthNet
source: The 19 classes of BigEarthNet v2.
dtype: uint8
unit: class
no_data: [255]
bands:
  - {name: class, kind: categorical, gsd_m: 10.0, n_classes: 19}
"""


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


def test_a_real_map_of_land_cover(real_samples: Callable[[str], Path], tmp_path: Path) -> None:
    """The 96 patches of BigEarthNet v2 in one HDF5 file: radar in dB, four bands, 19 classes."""
    pytest.importorskip("h5py")
    from ssl_eo.data.sources import hdf5

    (tmp_path / "cover.yaml").write_text(LAND_COVER)
    radar = {"dataset": "sentinel1", "sensor": "sentinel1_grd"}
    cover = {"dataset": "landcover19", "sensor": str(tmp_path / "cover.yaml")}
    path = str(real_samples("bigearthnet_v2_s1s2/ben_v2_s1s2_120px.h5"))
    raw = {"root": path, "sensor": "sentinel2_l2a", "others": [radar, cover]}
    source = hdf5.Source(build(hdf5.Config, raw, ""))
    modalities = {
        "optical": {"tile": "sentinel2_l2a", "targets": ["values", "norm_pix"]},
        "radar": {"tile": "sentinel1_grd"},
        "cover": {"tile": "cover", "kind": "classes", "stride": 2},
    }
    ratios = _learn(source, modalities, "model.patch_embed=conv")
    assert max(ratios.values()) < 0.9, ratios
    assert ratios["cover"] < 0.4
