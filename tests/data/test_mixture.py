"""Several sources as one: names, samples, proportions, and a run whose batches mix them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, assert_same_bits, read_checkpoint, records

from ssl_eo.cli import main
from ssl_eo.data.mixture import MixedSource, scaled_weights
from ssl_eo.data.sources.synthetic import Config, Source

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
