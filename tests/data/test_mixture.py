"""Several sources as one: names, samples, proportions, and a run whose batches mix them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from launching import ROOT, assert_same_bits, read_checkpoint, records

from ssl_eo.cli import main
from ssl_eo.data.loader import StepDataset
from ssl_eo.data.masked_views import MaskedViews
from ssl_eo.data.masking import MaskConfig
from ssl_eo.data.mixture import MixedSource, scaled_weights
from ssl_eo.data.opening import DataConfig, WeightedSourceConfig
from ssl_eo.data.plans import CropConfig, SourceCrop
from ssl_eo.data.sources.synthetic import Config, Source
from ssl_eo.data.types import ViewLimits

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")


def parts() -> list[Source]:
    return [
        Source(Config(n_samples=3, sensors=["sentinel2_l2a:rgb"], extent_m=160.0)),
        Source(Config(n_samples=5, sensors=["sentinel2_l2a", "dem"], extent_m=240.0)),
        Source(Config(n_samples=2, sensors=["sentinel2_l2a:rgb"], extent_m=160.0, seed=1)),
    ]


def test_samples_are_those_of_the_parts_under_names_of_their_own() -> None:
    mixed, alone = MixedSource(parts()), parts()
    assert len(mixed) == 10
    assert list(mixed.schema) == ["sentinel2_l2a", "sentinel2_l2a@1", "dem"]
    assert all(schema.optional for schema in mixed.schema.values())
    again = pickle.loads(pickle.dumps(mixed))
    for index, (part, own) in enumerate([(0, i) for i in range(3)] + [(1, i) for i in range(5)] + [(2, 0), (2, 1)]):
        found, expected = again.read(index), alone[part].read(own)
        names = {"sentinel2_l2a": "sentinel2_l2a@1", "dem": "dem"} if part == 1 else {"sentinel2_l2a": "sentinel2_l2a"}
        assert found.tiles.keys() == set(names.values())
        for name, tile in expected.tiles.items():
            assert np.array_equal(found.tiles[names[name]].array, tile.array)
            mixed.schema[names[name]].check(found.tiles[names[name]].pixels, tile.bands)
        assert found.label == expected.label
    for index in (-1, 10):
        with pytest.raises(IndexError):
            mixed.read(index)
    assert mixed.fingerprint() != MixedSource(parts()[::-1]).fingerprint()


def test_weights_by_size() -> None:
    assert scaled_weights([1.0, 2.0], [100, 400], None) == (1.0, 2.0)
    assert scaled_weights([1.0, 2.0], [100, 400], 1.0) == pytest.approx((0.25, 2.0))
    assert scaled_weights([1.0, 2.0], [100, 400], 2.0) == pytest.approx((0.5, 2.0))


def _train(out_dir: Path, *overrides: str) -> dict[str, object]:
    sources = (
        "data.sources=["
        "{name: synthetic, sensors: ['sentinel2_l2a:rgb'], n_samples: 40, weight: 3.0},"
        "{name: synthetic, sensors: ['naip:rgb'], n_samples: 40, extent_m: 64.0}]"
    )
    short = ("train.total_steps=6", "train.global_batch_size=16", "optim.warmup_steps=2", "checkpoint.every_n_steps=3")
    mixing = ("data.mixing=sample", "objective.tile=[sentinel2_l2a,naip]", "log.keys=true", "log.report=false")
    status = main(["train", "--config", DEBUG, f"run.out_dir={out_dir}", sources, *short, *mixing, *overrides])
    assert status in (0, 75)
    return dict(read_checkpoint(out_dir / "debug_mae" / "checkpoints" / "step_00000006")) if status == 0 else {}


def test_a_run_of_mixed_batches_resumes_exactly(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole", "data.n_workers=0")
    _train(tmp_path / "parts", "data.n_workers=2", "train.time_limit_s=0.0")
    resumed = _train(tmp_path / "parts", "data.n_workers=1")
    assert_same_bits(whole, resumed)
    keys = [r["keys"] for r in records(tmp_path / "whole" / "debug_mae" / "keys.jsonl")]
    assert keys == [r["keys"] for r in records(tmp_path / "parts" / "debug_mae" / "keys.jsonl")]


@pytest.mark.parametrize("mixing", ["step", "sample"])
def test_views_keep_to_the_crop_of_their_own_source(mixing: Literal["step", "sample"]) -> None:
    crops = [SourceCrop(gsd_m=(10.0, 15.0)), SourceCrop(extent_m=(80.0, 120.0)), SourceCrop()]
    sources = [WeightedSourceConfig("synthetic", None, crop=crop) for crop in crops]
    cfg = DataConfig(sources, mixing=mixing, n_lanes=2, n_workers=0)
    opened = [MixedSource(parts())] if mixing == "sample" else list(parts())
    names = ["sentinel2_l2a", "sentinel2_l2a@1"] if mixing == "sample" else "sentinel2_l2a"
    crop = CropConfig(size_px=8, scale=(0.05, 1.0))
    views = MaskedViews(crop, MaskConfig(), 4, 1, [source.schema for source in opened], names)
    options = {"seed": 3, "global_batch_size": 4}
    dataset, again = (StepDataset(cfg, opened, views, **options) for _ in range(2))
    seen = set()
    for step in range(12):
        for slot, index in enumerate(dataset.orders[dataset.mixture.source(step)].batch(step).tolist()):
            source = dataset.mixture.source(step)
            part = opened[0].place(index)[0] if isinstance(opened[0], MixedSource) else source
            sample, plan = dataset._sample(step, source, slot, index, [])
            _, same = again._sample(step, source, slot, index, [])
            assert plan.views[0] == same.views[0]
            top, left, height, width = plan.views[0].box
            gsd_m = np.sqrt(height * width) * 10.0 / 8
            seen.add(part)
            if part == 0:
                assert 10 - 1e-6 <= gsd_m <= 15 + 1e-6
            if part == 1:
                low, size = np.array(sample.limits.window_m).reshape(2, 2) / 10
                assert 8 <= size[0] == size[1] <= 12
                assert (np.array([top, left]) >= low - 1e-6).all()
                assert (np.array([top + height, left + width]) <= low + size + 1e-6).all()
            if part == 2:
                assert sample.limits == ViewLimits()
    assert seen == {0, 1, 2}
