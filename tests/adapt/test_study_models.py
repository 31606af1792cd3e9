"""The models that a study saves are those of its table: of the record, whatever was in the folder before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_study import bundle, study

from ssl_eo.adapt import study_models
from ssl_eo.adapt.saved import load_model
from ssl_eo.adapt.study import Cell
from ssl_eo.adapt.study_models import StudyModels
from ssl_eo.adapt.study_run import run_study
from ssl_eo.eval.provenance import digest_of_tensors

SHORT = {"n_steps": 1, "batch_size": 4, "lrs": [1e-2], "n_evaluations": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("tiny"))


def saving(model: Path, **changes: Any) -> Any:
    return study(model, **{"save_models": True, "n_resamples": 0, "trainings": {"default": SHORT}, **changes})


def weights_of(folder: Path) -> str:
    """Of the encoder, as records have it."""
    encoder = load_model(folder).bundle.encoder
    return digest_of_tensors(encoder.state_dict())


def test_each_cell_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Whatever encoders and tasks are called."""
    names = ["a/b", "a_b", "A_b", "x" * 230, "x" * 230 + "y", "ü", "..", "a b", "plain"]
    cells = [Cell("t", name, "frozen", "linear", "default", 0) for name in names]
    cells += [Cell("t-u", "v", "frozen", "linear", "default", 0), Cell("t", "u-v", "frozen", "linear", "default", 0)]
    models = StudyModels(tmp_path, cells)
    paths = [models.path(cell) for cell in cells]
    assert len({str(path).lower() for path in paths}) == len(cells)
    for path in paths:
        assert path.parent == tmp_path
        assert len(path.name) < 140
        path.mkdir()
    assert models.path(cells[names.index("plain")]).name == "t-plain-frozen-linear-default-0"


def test_encoders_of_like_names_keep_their_models(tiny: Path, tmp_path: Path) -> None:
    other = bundle(tmp_path / "other", mlp_ratio=2.0)
    taps = [0.34, 1.0]
    encoders = {"a/b": {"model": str(tiny), "taps": taps}, "a_b": {"model": str(other), "taps": taps}}
    records = run_study(saving(tiny, encoders=encoders), tmp_path / "out")
    folders = sorted((tmp_path / "out" / "models").iterdir())
    assert {weights_of(folder) for folder in folders} == {record["asked"]["weights"] for record in records}
    for record in records:
        (own,) = (f for f in folders if json.loads((f / "task.json").read_text())["key"] == record["key"])
        assert weights_of(own) == record["asked"]["weights"]


def test_the_model_is_of_the_record_when_a_study_is_changed_and_changed_back(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out", tmp_path / "out" / "models" / "scenes-tiny-frozen-linear-default-0"
    short, long = saving(tiny), saving(tiny, trainings={"default": {**SHORT, "n_steps": 3}})
    found = []
    for cfg in (short, long, short):
        (record,) = run_study(cfg, out)
        assert "unsaved" not in record
        assert json.loads((folder / "task.json").read_text())["key"] == record["key"]
        found.append(load_model(folder).weights)
    assert found[0] == found[2] != found[1]
    assert "1 of those that are trained already were not saved, and are trained again" in capsys.readouterr().err
    before = (folder / "task.json").stat().st_mtime_ns
    assert run_study(short, out) == [record]  # nothing to do
    assert (folder / "task.json").stat().st_mtime_ns == before


def test_models_that_are_asked_for_later_are_made(tiny: Path, tmp_path: Path) -> None:
    """And those that somebody has removed."""
    (before,) = run_study(saving(tiny, save_models=False), tmp_path)
    assert not (tmp_path / "models").exists()
    (after,) = run_study(saving(tiny), tmp_path)
    assert after["scores"] == before["scores"]
    folder = tmp_path / "models" / "scenes-tiny-frozen-linear-default-0"
    first = load_model(folder)
    (folder / "task.json").unlink()
    run_study(saving(tiny), tmp_path)
    assert load_model(folder).weights == first.weights


def test_a_model_that_cannot_be_saved_costs_no_result(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(study_models, "save_model", full)
        (record,) = run_study(saving(tiny), tmp_path)
    folder = tmp_path / "models" / "scenes-tiny-frozen-linear-default-0"
    assert (record["kind"], record["unsaved"]) == ("result", str(folder))
    assert "is trained, and could not be saved: [Errno 28] No space left on device" in caplog.text
    (again,) = run_study(saving(tiny), tmp_path)
    assert "unsaved" not in again
    assert again["scores"] == record["scores"]
    assert torch.isfinite(next(load_model(folder).model.parameters())).all()
