"""Ensembles as encoders of a study: single specialists, all, and k of n, of which no others are run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_specialists import known, pyramid, vit
from toy_study import bundle, study, task

from ssl_eo.adapt.ensemble import Ensemble
from ssl_eo.adapt.specialists import write_ensemble
from ssl_eo.adapt.study_run import read_study, run_study
from ssl_eo.adapt.study_tables import models_of, study_tables
from ssl_eo.adapt.workbench import Workbench
from ssl_eo.cli import main

RGB, RADAR = ("B04", "B03", "B02"), ("VV", "VH")
BANDS = ("B02", "B03", "B04", "B08")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four specialists of Sentinel-2 bands, and one of radar, for which there is no band."""
    made = tmp_path_factory.mktemp("ensemble")
    of = {"rgb": RGB, "blue": ("B02",), "green": ("B03",), "infrared": ("B08",)}
    specialists = [pyramid(name, len(b), known("sentinel2_l2a", b), i) for i, (name, b) in enumerate(of.items())]
    write_ensemble(made, [*specialists, pyramid("radar", 2, known("sentinel1_grd", RADAR))], overwrite=True)
    return made


def scenes(kind: str = "classification", n: int = 16) -> dict[str, Any]:
    """A task of four bands of Sentinel-2, of 32 pixels."""
    raw = task(kind, n, bands=list(BANDS))
    for split in ("train", "val", "test"):
        raw[split] = {**raw[split], "sensors": ["sentinel2_l2a"], "extent_m": 320.0}
    return raw


def ensembles(folder: Path, **choices: dict[str, Any]) -> dict[str, Any]:
    return {name: {"model": str(folder), "ensemble": choice} for name, choice in choices.items()}


CHOICES: dict[str, dict[str, Any]] = {
    "rgb": {"keep": ["rgb"]},
    "all": {},
    "ridge": {"k": 2},
    "gate": {"k": 2, "by": "gate"},
    "one": {"k": 1, "keep": ["blue", "infrared"]},
}


def of_scenes(folder: Path, kind: str = "classification", decoder: str = "identity", **changes: Any) -> Any:
    training = {"n_steps": 4, "batch_size": 8, "lrs": [1e-2], "n_evaluations": 1}
    raw = {
        "tasks": [scenes(kind)],
        "encoders": ensembles(folder, **CHOICES),
        "decoders": {decoder: {}},
        "trainings": {"default": training},
        **changes,
    }
    return study(folder, **raw)


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[dict[str, Any]]]:
    cfg, out = of_scenes(folder), tmp_path_factory.mktemp("study")
    return cfg, out, run_study(cfg, out)


def by_encoder(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert [r["kind"] for r in records] == ["result"] * len(records), [r.get("error") for r in records]
    return {r["cell"]["encoder"]: r for r in records}


def test_singles_all_and_k_of_n_are_rows_of_one_study(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    found = {name: r["specialists"] for name, r in by_encoder(done[2]).items()}
    assert found["rgb"]["run"] == ["rgb"]
    assert found["all"]["run"] == found["all"]["of"] == ["rgb", "blue", "green", "infrared"]
    assert "no channel of sar VV" in found["all"]["dropped"]["radar"]
    assert len(found["ridge"]["run"]) == len(found["gate"]["run"]) == 2
    assert len(found["ridge"]["scores"]) == 2
    assert set(found["ridge"]["alone"]) == set(found["all"]["run"])
    assert found["one"]["of"] == ["blue", "infrared"]
    assert len(found["one"]["run"]) == 1
    assert [found[name]["by"] for name in CHOICES] == [None, None, "ridge", "gate", "ridge"]
    assert all(r["has_kept_features"] for r in done[2])


def test_cost_falls_with_the_number_that_is_run(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    found = by_encoder(done[2])
    gflop = {name: found[name]["forward_gflop"] for name in ("one", "ridge", "gate", "all")}
    assert gflop["one"] < 0.6 * gflop["ridge"]
    assert gflop["ridge"] == pytest.approx(gflop["gate"], rel=0.1)
    assert gflop["ridge"] < 0.6 * gflop["all"]
    sizes = {name: found[name]["n_parameters"] for name in ("one", "ridge", "all")}
    assert sizes["one"] < 0.6 * sizes["ridge"] < 0.4 * sizes["all"]
    assert all(r["samples_per_s"] > 0 for r in done[2])


def test_the_page_says_who_was_chosen(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    tables = {table.title: table for table in study_tables(models_of(done[2]), "scenes")}
    rows = {row.title: row for row in tables["scenes: specialists"].rows}
    texts = {title: [cell.text for cell in row.cells[:3]] for title, row in rows.items()}
    assert texts["all, frozen, identity"] == ["4", "4", "given"]
    assert rows["all, frozen, identity"].note == "rgb, blue, green, infrared"
    assert texts["gate, frozen, identity"] == ["2", "4", "gate"]
    training = tables["scenes: training"]
    weights = [row.cells[training.columns.index("weights")] for row in training.rows]
    assert len({cell.text for cell in weights}) == 1
    assert [cell.note for cell in weights] == [",\n".join(record["specialists"]["run"]) for record in done[2]]
    assert "one hash of all its specialists" in training.note


def test_the_same_command_finds_nothing_to_do(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    cfg, out, records = done
    assert run_study(cfg, out) == records
    keys = {record["key"] for record in records}
    cfg.encoders["gate"] = replace(cfg.encoders["gate"], ensemble=replace(cfg.encoders["gate"].ensemble, k=1))
    try:
        assert len(set(read_study(out)) & keys) == len(CHOICES)
        bench = Workbench(cfg)
        assert bench.facts_of("gate")["ensemble"]["k"] == 1
    finally:
        cfg.encoders["gate"] = replace(cfg.encoders["gate"], ensemble=replace(cfg.encoders["gate"].ensemble, k=2))


@pytest.mark.parametrize("name", list(CHOICES))
def test_no_others_are_run_and_kept_features_are_those_of_the_model(folder: Path, name: str) -> None:
    """Of what is kept for all specialists a model is given its own, bit for bit what its encoders give."""
    cfg = of_scenes(folder)
    bench = Workbench(cfg)
    (cell,) = [c for c in cfg.cells() if c.encoder == name]
    chosen = bench.chosen(cell)
    assert chosen is not None
    whole = bench._ensembles._whole
    assert whole is not None
    calls: Counter[str] = Counter()
    for specialist in whole.ensemble.specialists:
        specialist.backbone.register_forward_hook(lambda *_, who=specialist.name: calls.update([who]))
    make = bench.maker_of(cell)
    model, samples = make(), bench.samples_of(cell, make, cfg.trainings["default"])
    assert not calls  # kept
    rows = torch.arange(3)
    taps = model.taps(samples["test"].examples.batch(rows)[0])
    assert dict(calls) == dict.fromkeys(chosen.facts["run"], 1)
    assert samples["test"].features is not None
    for ours, kept in zip(taps.maps, samples["test"].features.at(rows).maps, strict=True):
        torch.testing.assert_close(ours, kept, rtol=1e-4, atol=1e-5)
    assert isinstance(model.backbone, Ensemble)
    assert model.decoder.pooling.width == model.backbone.shape.widths[-1] == 32 * len(chosen.facts["run"])


@pytest.mark.parametrize("change", [{"features_gb": 1e-9}, {"symmetries": True}])
def test_features_that_are_not_kept_lead_to_the_same_choice(
    done: tuple[Any, Path, list[dict[str, Any]]], folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Turned samples, or features that would take too much: encoders run in every step, and the gate learns."""
    cfg = of_scenes(folder, encoders=ensembles(folder, **{n: CHOICES[n] for n in ("ridge", "gate")}))
    training = replace(cfg.trainings["default"], **change)
    found = by_encoder(run_study(replace(cfg, trainings={"default": training}), tmp_path))
    assert not any(r["has_kept_features"] for r in found.values())
    assert found["ridge"]["specialists"]["run"] == by_encoder(done[2])["ridge"]["specialists"]["run"]
    assert len(found["gate"]["specialists"]["run"]) == 2


@pytest.mark.parametrize("kind", ["segmentation", "multilabel"])
def test_other_kinds_of_labels(folder: Path, tmp_path: Path, kind: str) -> None:
    decoder = {"segmentation": "linear", "multilabel": "mlp"}[kind]
    cfg = of_scenes(folder, kind, decoder, encoders=ensembles(folder, ridge={"k": 2}, gate={"k": 1, "by": "gate"}))
    found = by_encoder(run_study(cfg, tmp_path))
    assert [len(r["specialists"]["run"]) for r in found.values()] == [2, 1]


def test_finetuning_trains_what_was_chosen_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    choices = ensembles(folder, one={"k": 1, "norm": "batch"})
    cfg = of_scenes(folder, encoders=choices, protocols=["finetune", "frozen"])
    tuned, frozen = run_study(cfg, tmp_path)
    assert tuned["kind"] == frozen["kind"] == "result", (tuned.get("error"), frozen.get("error"))
    assert tuned["specialists"]["run"] == frozen["specialists"]["run"]
    assert tuned["n_trained"] == tuned["n_parameters"] == frozen["n_parameters"] > frozen["n_trained"]
    assert not tuned["has_kept_features"]


def test_transformers_and_pyramids_beside_a_single_encoder(tmp_path: Path) -> None:
    """Rows of one study; what is kept of one is given up for the next."""
    write_ensemble(
        tmp_path / "mixed", [vit("any", "channel_attention"), pyramid("blue", 1, known("sentinel2_l2a", ("B02",)))]
    )
    single = {"tiny": {"model": str(bundle(tmp_path / "tiny", patch_embed="channel_attention")), "taps": [0.34, 1.0]}}
    cfg = of_scenes(
        tmp_path / "mixed",
        "segmentation",
        "linear",
        encoders={
            **ensembles(tmp_path / "mixed", both={}),
            **single,
            **ensembles(tmp_path / "mixed", blue={"keep": ["blue"]}),
        },
        save_models=True,
    )
    found = by_encoder(run_study(cfg, tmp_path / "out"))
    assert list(found) == ["both", "tiny", "blue"]
    assert [r["specialists"] is None for r in found.values()] == [False, True, False]
    assert {path.name for path in (tmp_path / "out" / "models").iterdir()} == {"scenes-tiny-frozen-linear-default-0"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"k": 9}, "k must be from 1 to 4, the number of specialists, got 9"),
        ({"k": 9, "by": "gate"}, "k must be from 1 to 4"),
        ({"keep": ["rbg"]}, r"this ensemble has no specialist 'rbg' \(rgb, blue, green, infrared\)"),
        ({"keep": ["radar"]}, "no specialist 'radar': it was dropped, sentinel1_grd: band VV"),
    ],
)
def test_a_choice_that_cannot_be_made_is_a_record(
    folder: Path, tmp_path: Path, choice: dict[str, Any], message: str
) -> None:
    import re

    (record,) = run_study(of_scenes(folder, encoders=ensembles(folder, it=choice)), tmp_path)
    assert record["kind"] == "error"
    assert re.search(message, record["error"]), record["error"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"k": 0}, "k must be at least 1, or null for all, got 0"),
        ({"keep": []}, "keep"),
        ({"keep": ["a", "a"]}, "each once"),
        ({"by": "lasso"}, "by: got 'lasso'"),
        ({"norm": "instance"}, "norm: got 'instance'"),
    ],
)
def test_wrong_choices_are_refused(folder: Path, choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_scenes(folder, encoders=ensembles(folder, it=choice))


def test_options_of_an_ensemble_are_of_ensembles(folder: Path, tmp_path: Path) -> None:
    tiny = bundle(tmp_path / "tiny")
    for encoder, message in (
        ({"model": str(tiny), "ensemble": {"k": 1}}, r"encoders\.it: ensemble: .* is none \(a folder with ensemble"),
        ({"model": str(folder), "taps": [0.5, 1.0]}, r"encoders\.it: taps: those of an ensemble are at 1/3"),
    ):
        with pytest.raises(ValueError, match=message):
            run_study(of_scenes(folder, encoders={"it": encoder}), tmp_path / "out")


@pytest.mark.parametrize("protocol", ["lora", "retrain_input", "random_frozen", "random_trained"])
def test_protocols_of_single_encoders_are_refused_before_anything_is_computed(
    folder: Path, tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: Any) -> None:
        raise AssertionError("an ensemble was built")

    monkeypatch.setattr("ssl_eo.adapt.ensemble_bench.EnsembleBench.chosen", computed)
    (record,) = run_study(of_scenes(folder, encoders=ensembles(folder, k={"k": 2}), protocols=[protocol]), tmp_path)
    assert f"protocol {protocol} is for a single encoder; for an ensemble there are frozen, finetune" in record["error"]


def test_models_that_cannot_be_saved_are_named_before_anything_is_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ssl_eo.adapt.study_run._Runner.work", lambda *_: None)
    several = ensembles(folder, all={}, two={"k": 2})
    with pytest.raises(ValueError, match="save_models: models of ensembles cannot be saved, and there are no others"):
        run_study(of_scenes(folder, encoders=several, save_models=True), tmp_path / "none")
    one = {"single": {"model": str(bundle(tmp_path / "tiny")), "taps": [1.0]}}
    run_study(of_scenes(folder, encoders={**several, **one}, save_models=True), tmp_path / "some")
    assert "models of all, two are not saved; those of single encoders are" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "specialists/new", "../{name}"])
def test_an_ensemble_is_not_written_among_what_it_is_made_of(
    inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle(tmp_path / "radar", depth=6)
    out = tmp_path / inside.format(name=tmp_path.name)
    before = sorted(tmp_path.rglob("*"))
    assert main(["export-ensemble", str(tmp_path), "--out", str(out)]) == 2
    assert "where runs and bundles lie; give a folder outside of it" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
