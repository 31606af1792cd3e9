"""The recipe of MultiMAE on MMEarth trains on an archive as it was downloaded, odd samples and all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("h5py")

from archives.mmearth import write_mmearth
from launching import ROOT, records

from ssl_eo.cli import main

RECIPE = ROOT / "configs" / "pretrain" / "multimae_vitb8_mmearth64.yaml"
SMALL = (
    *("model.embed_dim=32", "model.depth=1", "model.n_heads=2", "objective.decoder.embed_dim=16", "data.n_workers=0"),
    *("data.n_lanes=2", "train.global_batch_size=4", "train.total_steps=3", "optim.warmup_steps=1", "log.report=false"),
    *("checkpoint.every_n_steps=3", "log.every_n_steps=1", "train.precision=float32"),
)
ERA5 = (
    "objective.image_targets.biome={key: biome, kind: class, size: 14}",
    f"objective.image_targets.era5={{key: era5, size: 12, mean: {[280.0] * 12}, std: {[20.0] * 12}}}",
    "objective.image_targets.longitude={key: longitude, kind: angle}",
)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("extra", [(), ERA5], ids=["as published", "with targets of whole samples"])
def test_the_recipe_trains_on_the_archive(
    extra: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of both levels, some without elevation, land cover or weather."""
    write_mmearth(tmp_path / "data_1M_v001_64", size_px=64)
    monkeypatch.setenv("SSL_EO_DATA", str(tmp_path / "data_1M_v001_64"))
    assert main(["train", "--config", str(RECIPE), f"run.out_dir={tmp_path}", *SMALL, *extra]) == 0
    before, *steps = records(tmp_path / "multimae_vitb8_mmearth64" / "metrics.jsonl")
    assert before["health/mmearth/last/effective_rank"] > 1
    assert len(steps) == 3
    losses = {"rgb", "norm_rgb", "ired", "ebands", "sired", "depth", "semseg"}
    losses |= {"biome", "era5", "longitude"} if extra else set()
    for step in steps:
        assert {key.removeprefix("loss/") for key in step if key.startswith("loss/")} == losses
        assert math.isfinite(step["loss"])
        assert (step["n_skipped_steps"], step["n_bad_samples"]) == (0, 0)
