"""A bundle says what each source of a run gave its encoder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT

from ssl_eo.cli import main
from ssl_eo.config import Config, build, read_yaml
from ssl_eo.data.opening import WeightedSourceConfig, open_source
from ssl_eo.hub import UNSAID, load_bundle, write_bundle, write_pair_bundle
from ssl_eo.jsonl import JsonLines
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.train import export
from ssl_eo.train.checkpoint import load_weights
from ssl_eo.train.export import _inputs, _licence, export_encoder, open_encoder, open_pair

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
    of_bundle, of_run = open_encoder(bundle), open_encoder(run)
    assert of_bundle.facts == of_run.facts
    assert (of_run.facts["step"], of_run.facts["features"]) == (2, {"pool": "mean_std", "taps": [0.5, 1.0]})
    assert of_bundle.inputs == of_run.inputs


def test_a_run_whose_weights_are_not_finite_is_not_opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is damaged: training may have diverged."""

    def load(checkpoint: Path, objective: Any) -> Any:
        seal = load_weights(checkpoint, objective)
        objective.published_encoder().norm.weight.data[1] = torch.nan
        return seal

    monkeypatch.setattr(export, "load_weights", load)
    run = bundle.parent / "debug_mae"
    step = run / "checkpoints" / "step_00000002"
    with pytest.raises(ValueError, match=rf"^{step}: 1 tensors have values that are NaN .* first is norm\.weight:"):
        open_encoder(run)


def test_a_bundle_says_where_it_is_from(bundle: Path) -> None:
    """With the keys of any bundle; procedural scenes have no card, so that of their licence nothing is known."""
    facts, run = load_bundle(bundle).facts, bundle.parent / "debug_mae"
    assert facts.keys() > UNSAID.keys()
    assert (facts["objective"], facts["step"], facts["run"]) == ("mae", 2, "debug_mae")
    assert facts["commit"] == json.loads((run / "env.json").read_text())["commit"]
    assert facts["config"] == read_yaml(run / "config.yaml")
    assert (facts["scores"], facts["licence"]) == ([], "not stated")


def test_scores_of_probes_come_with_the_encoder(bundle: Path, tmp_path: Path) -> None:
    """Of the newest step that is not after the checkpoint, and of the controls, whenever they were measured."""
    run = tmp_path / "run"
    shutil.copytree(bundle.parent / "debug_mae", run)
    kept = {"task": "t", "split": "test", "tap": "last", "probe": "knn", "metric": "accuracy"}
    common = {**kept, "kind": "probe", "chosen": {"k": 5}}
    with JsonLines(run / "eval.jsonl") as file:
        for step, score in ((0, 0.25), (1, 0.5), (3, 0.75)):
            file.write({**common, "step": step, "features": "encoder", "accuracy": score})
        file.write({**common, "step": 0, "features": "band_statistics", "accuracy": 0.375})
        file.write({**common, "step": 1, "features": "encoder", "kind": "health"})
        for odd in ({}, {"accuracy": "high"}, {"metric": ["accuracy"]}, {"metric": None}):  # no scores
            file.write({**common, "step": 2, "features": "encoder", "probe": f"odd {odd}", **odd})
    export_encoder(run, tmp_path / "out", licence="CC-BY-4.0")
    facts = load_bundle(tmp_path / "out").facts
    assert facts["licence"] == "CC-BY-4.0"
    assert facts["scores"] == [
        {**kept, "step": 0, "features": "band_statistics", "score": 0.375},
        {**kept, "step": 1, "features": "encoder", "score": 0.5},
    ]


def test_licences_are_those_of_the_data_and_of_what_training_began_from(tmp_path: Path) -> None:
    """Those of the data come from their cards; a file of weights alone says none."""
    sources = [{"name": name, "root": "."} for name in ("eurosat", "mmearth")]
    raw = {"objective": {"name": "mae"}, "data": {"sources": sources}}
    of_both = _licence(tmp_path, build(Config, raw, ""))
    assert of_both == (
        "not stated; of the data: eurosat: MIT; Copernicus Sentinel data terms; mmearth: CC BY 4.0; Copernicus Sentinel"
        " data terms; terms of the maps"
    )
    raw["data"]["sources"].append({"name": "synthetic"})
    assert _licence(tmp_path, build(Config, raw, "")) == "not stated"
    files = [
        {"path": "weights/mae", "licence": "CC-BY-NC-4.0"},
        {"path": "a.pth", "licence": None},
        {"path": "of before"},
    ]
    (tmp_path / "init.json").write_text(json.dumps({"files": files}))
    begun = "; of the weights that training began from: mae: CC-BY-NC-4.0; a.pth: not stated; of before: not stated"
    assert _licence(tmp_path, build(Config, raw, "")) == f"not stated{begun}"
    raw["data"]["sources"].pop()
    assert _licence(tmp_path, build(Config, raw, "")) == f"{of_both}{begun}"


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"step": True}, "step must be a whole number from 0, got True"),
        ({"step": -1}, "step must be a whole number from 0, got -1"),
        ({"step": 1.0}, "step must be a whole number from 0, got 1.0"),
        ({}, "step must be a whole number from 0, got None"),
        *(
            ({"step": 1, "features": features}, "features must be a pool and a list of numbers, taps, got ")
            for features in (
                *(7, None, "mean", [["pool", "cls"]], {"taps": 1}, {"taps": [True]}, {"pool": ["cls"]}),
                *({"pool": "max"}, {"taps": []}, {"taps": [2.0]}, {"taps": [float("nan")]}),
            )
        ),
    ],
)
def test_facts_of_a_bundle_that_are_none_are_refused(facts: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_bundle(tmp_path, _tiny(), {}, facts)
    with pytest.raises(ValueError, match=rf"encoder\.json: {problem}"):
        open_encoder(tmp_path)


@pytest.mark.parametrize("step", [None, "1", -1, 1.0])
def test_a_pair_of_no_step_is_refused(step: Any, tmp_path: Path) -> None:
    model = OpticalRadar.of_sizes(*[replace(_tiny().cfg, position="alibi", patch_embed="conv")] * 2, (2, 2), 1)
    write_pair_bundle(tmp_path, model, {"optical": {}, "radar": {}}, {} if step is None else {"step": step})
    with pytest.raises(ValueError, match=r"encoder\.json: step must be a whole number from 0, got"):
        open_pair(tmp_path)
    with pytest.raises(ValueError, match="it holds two encoders; add --whole or --as, or give the run"):
        export_encoder(tmp_path, tmp_path / "out")


def test_a_bundle_says_how_features_are_read_and_not_what_is_asked(tmp_path: Path) -> None:
    asked = {"controls": False, "seeds": [1, 2], "partitions": ["0.10x"], "n_resamples": 0}
    write_bundle(tmp_path, _tiny(), {}, {"step": 0, "features": {"pool": "mean", "taps": [0.5, 1], **asked}})
    assert open_encoder(tmp_path).facts == {"step": 0, "features": {"pool": "mean", "taps": [0.5, 1]}}


def _tiny() -> Encoder:
    encoder = Encoder(EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=8), None)
    encoder.init_weights()
    return encoder


def test_dates_of_a_sensor_are_one_input_and_class_maps_are_none() -> None:
    sources = {"name": "synthetic", "n_samples": 64, "sensors": ["sentinel2_l2a", "synthetic_landcover"], "n_dates": 2}
    source = open_source(build(WeightedSourceConfig, {**sources, "extent_m": 320.0}, ""))
    assert list(_inputs([source.schema])) == ["sentinel2_l2a"]
