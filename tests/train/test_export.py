"""A bundle says what each source of a run gave its encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT

from ssl_eo.cli import main
from ssl_eo.config import build
from ssl_eo.data.opening import WeightedSourceConfig, open_source
from ssl_eo.hub import load_bundle, write_bundle
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.train.export import _inputs, open_encoder

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
SHORT = (
    *("data.n_workers=0", "train.global_batch_size=8", "train.total_steps=2", "optim.warmup_steps=1"),
    *("log.report=false", "eval.pool=mean_std", "eval.taps=[0.5,1.0]"),
)
SOURCES = (
    "data.sources=["
    "{name: synthetic, sensors: [sentinel2_l2a]},"
    "{name: synthetic, sensors: ['sentinel2_l2a:rgb']},"
    "{name: synthetic, sensors: [sentinel2_l2a], seed: 3}]"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("runs")
    assert main(["train", "--config", DEBUG, f"run.out_dir={out_dir}", *SHORT, SOURCES]) == 0
    assert main(["export", "--checkpoint", str(out_dir / "debug_mae"), "--out", str(out_dir / "bundle")]) == 0
    return out_dir / "bundle"


def test_sources_with_other_bands_of_one_sensor_are_all_known(bundle: Path) -> None:
    encoder = load_bundle(bundle)
    assert {name: len(known.bands) for name, known in encoder.inputs.items()} == {
        "sentinel2_l2a": 12,
        "sentinel2_l2a@1": 3,  # the third source is what the first is, and adds nothing
    }
    images = torch.randint(0, 3000, (1, 12, 32, 32), generator=torch.Generator().manual_seed(0))
    rgb = [encoder.inputs["sentinel2_l2a"].bands.index(band) for band in encoder.inputs["sentinel2_l2a@1"].bands]
    whole, part = encoder(images, "sentinel2_l2a"), encoder(images[:, rgb], "sentinel2_l2a@1")
    assert not torch.allclose(whole, part)


def test_a_bundle_is_read_as_its_run_was(bundle: Path) -> None:
    run = bundle.parent / "debug_mae"
    assert open_encoder(bundle)[1:] == open_encoder(run)[1:] == (2, {"pool": "mean_std", "taps": [0.5, 1.0]})


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"step": True}, "step must be a whole number from 0, got True"),
        ({"step": -1}, "step must be a whole number from 0, got -1"),
        ({"step": 1.0}, "step must be a whole number from 0, got 1.0"),
        ({}, "step must be a whole number from 0, got None"),
        *(
            ({"step": 1, "features": features}, "features must be a pool and a list of numbers, taps, got ")
            for features in (7, None, "mean", [["pool", "cls"]], {"taps": 1}, {"taps": [True]}, {"pool": ["cls"]})
        ),
    ],
)
def test_facts_of_a_bundle_that_are_none_are_refused(facts: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_bundle(tmp_path, _tiny(), {}, facts)
    with pytest.raises(ValueError, match=rf"encoder\.json: {problem}"):
        open_encoder(tmp_path)


def test_a_bundle_says_how_features_are_read_and_not_what_is_asked(tmp_path: Path) -> None:
    asked = {"controls": False, "seeds": [1, 2], "partitions": ["0.10x"], "n_resamples": 0}
    write_bundle(tmp_path, _tiny(), {}, {"step": 0, "features": {"pool": "mean", "taps": [0.5, 1], **asked}})
    assert open_encoder(tmp_path)[1:] == (0, {"pool": "mean", "taps": [0.5, 1]})


def _tiny() -> Encoder:
    encoder = Encoder(EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=8), None)
    encoder.init_weights()
    return encoder


def test_dates_of_a_sensor_are_one_input_and_class_maps_are_none() -> None:
    sources = {"name": "synthetic", "n_samples": 64, "sensors": ["sentinel2_l2a", "synthetic_landcover"], "n_dates": 2}
    source = open_source(build(WeightedSourceConfig, {**sources, "extent_m": 320.0}, ""))
    assert list(_inputs([source.schema])) == ["sentinel2_l2a"]
