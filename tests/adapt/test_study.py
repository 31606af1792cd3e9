"""A study: its cells, records that make the same command go on, failures that stop nothing, pages, saved models."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_study import bundle, encoder, opened_task, study, task

from ssl_eo.adapt.backbone import EncoderBackbone, FixedBands
from ssl_eo.adapt.examples import Examples
from ssl_eo.adapt.losses import LossConfig
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.opened_task import OpenedTask
from ssl_eo.adapt.saved import load_model, save_model
from ssl_eo.adapt.study_page import _point_labels, _score_charts, check_pages, print_study, write_study_page
from ssl_eo.adapt.study_records import is_of_study
from ssl_eo.adapt.study_run import RECORDS, _Results, read_study, run_study
from ssl_eo.adapt.study_tables import models_of, study_tables
from ssl_eo.adapt.workbench import Workbench
from ssl_eo.bundles import BundleEncoder
from ssl_eo.components import MissingExtraError
from ssl_eo.data.opening import open_source
from ssl_eo.eval.decoders import build_decoder
from ssl_eo.hub import load_bundle
from ssl_eo.jsonl import read_jsonl
from ssl_eo.sensors import load_sensor

VV = load_sensor("sentinel1_grd").to_dict()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[dict[str, Any]]]:
    """A study of all protocols, two decoders and two seeds, beside a UNet."""
    out = tmp_path_factory.mktemp("study")
    cfg = study(
        tiny,
        decoders={"linear": {}, "fcn": {"channels": 8, "n_convs": 1}},
        protocols=["frozen", "finetune", "lora", "random_frozen"],
        seeds=[0, 1],
        unet=True,
        save_models=True,
    )
    return cfg, out, run_study(cfg, out)


def test_every_cell_is_trained_once(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    cfg, out, records = done
    assert [r["kind"] for r in records] == ["result"] * (4 * 2 * 2 + 2), [r.get("error") for r in records]
    assert [tuple(r["cell"].values()) for r in records] == [tuple(vars(cell).values()) for cell in cfg.cells()]
    assert len(read_jsonl(out / RECORDS)) == len(records)
    for record in records:
        assert record["n_samples"] == {"train": 12, "val": 12, "test": 12}
        assert sum(map(sum, record["confusion"])) == 12 * 16 * 16
        assert 0 < record["forward_gflop"] < record["step_gflop"]
        assert record["memory_gb"] > 0
        assert record["has_kept_features"] == (record["cell"]["protocol"] in ("frozen", "random_frozen"))


def test_the_same_command_finds_nothing_to_do_and_another_does_what_is_new(
    done: tuple[Any, Path, list[dict[str, Any]]], tiny: Path
) -> None:
    cfg, out, records = done
    before = (out / RECORDS).read_bytes()
    assert run_study(cfg, out) == records
    assert (out / RECORDS).read_bytes() == before
    more = study(tiny, decoders={"linear": {}}, protocols=["frozen", "retrain_input"])
    assert [r["kind"] for r in run_study(more, out)] == ["result"] * 2
    assert (out / RECORDS).read_bytes().startswith(before)
    assert len(read_jsonl(out / RECORDS)) == len(records) + 1


def test_costs_are_those_of_what_trains(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    by_protocol = {r["cell"]["protocol"]: r for r in done[2] if r["cell"]["decoder"] == "linear"}
    frozen, tuned = by_protocol["frozen"], by_protocol["finetune"]
    assert frozen["n_trained"] < by_protocol["lora"]["n_trained"] < tuned["n_trained"] == tuned["n_parameters"]
    assert frozen["forward_gflop"] == pytest.approx(tuned["forward_gflop"])
    assert frozen["step_gflop"] < 2 * frozen["forward_gflop"] < tuned["step_gflop"]
    assert frozen["memory_gb"] < tuned["memory_gb"]


def test_a_saved_model_predicts_what_was_scored(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    """Of stored values, through its own statistics; adapters are merged."""
    _, out, records = done
    opened = opened_task(n=12)
    examples = Examples(opened.test, torch.arange(12), torch.device("cpu"))
    source = opened.test._source
    stored = torch.stack([torch.from_numpy(source.read(i).tiles["sentinel1_grd"].array.copy()) for i in range(12)])
    of_key = {source.read(i).key: i for i in range(12)}
    identities = []
    for protocol in ("frozen", "lora", "finetune"):
        record = next(r for r in records if r["cell"]["protocol"] == protocol and r["cell"]["decoder"] == "fcn")
        name = f"scenes-tiny-{protocol}-fcn-default-0"
        saved = load_model(out / "models" / name)
        identities.append(saved.identity)
        logits = saved.logits(stored[[of_key[key] for key in examples.keys]].float())
        accuracy = float((logits.argmax(1) == examples.labels).double().mean())
        assert accuracy == pytest.approx(record["scores"]["accuracy"], abs=2e-3), protocol
        with torch.no_grad():
            next(saved.model.backbone.parameters()).add_(1.0)
        identities.append(replace(saved).identity)  # of another encoder under the same decoder
    assert len({json.dumps(identity) for identity in identities}) == len(identities)


def test_a_model_that_is_damaged_is_refused(done: tuple[Any, Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    import shutil

    def copy_of(name: str) -> Path:
        shutil.copytree(done[1] / "models" / "scenes-tiny-frozen-linear-default-0", tmp_path / name)
        return tmp_path / name

    cut = copy_of("cut") / "decoder.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"decoder\.safetensors"):
        load_model(cut.parent)
    page = json.loads(((other := copy_of("other")) / "task.json").read_text())
    for change, message in (
        ({"format": 9}, "format 9, this version reads 2"),
        ({"decoder": "linaer"}, "did you mean 'linear'"),
        ({"n_outputs": 3}, "n_outputs must be 12 for its kind and classes, got 3"),
        ({"n_outputs": 13, "classes": [*page["classes"], "c"]}, "2 tensors do not fit the decoder linear, the first"),
        ({"classes": "abcdefghijkl"}, "classes must be a list of names, got 'abcdefghijkl'"),
        ({"decoder": ["linear"]}, r"decoder must be a name, got \['linear'\]"),
        ({"taps": ["1"]}, r"taps must be at most 100 numbers, got \['1'\]"),
        ({"taps": [0.1] * 101}, "taps must be at most 100 numbers, got"),
        ({"clip_std": True}, "clip_std must be a number or null, got True"),
        ({"clip_std": -1.0}, "clip_std must be positive, at most"),
        ({"bands": page["bands"][:1]}, "bands must be those of encoder.json"),
        ({"sha256": {**page["sha256"], "decoder.safetensors": None}}, "sha256 must be an object with those of"),
        ({"fixed_bands": {}}, "key 'names' is missing"),
        ({"kind": "segmentations"}, "kind must be one of .*, got 'segmentations'"),
        ({"decoder": "fcn", "options": {"channels": 1 << 16}}, "tensors do not fit the decoder fcn"),
        ({"decoder": "fcn", "options": {"n_convs": 1 << 40}}, "n_convs must be a whole number from 1 to 65,536, got"),
        ({"taps": [2.0]}, "taps are ratios of the depth"),
        ({"options": {"width": 3}}, "no option 'width'"),
        ({"size_px": "16"}, "size_px must be a whole number and at least 1, got '16'"),
        ({"fixed_bands": {"sensor": VV, "names": ["VV"], "picks": [4]}}, "picks, from 0 to 3 or null, got"),
        ({"fixed_bands": {"sensor": VV, "names": ["VV"], "picks": [-1]}}, "picks, from 0 to 3 or null, got"),
    ):
        (other / "task.json").write_text(json.dumps({**page, **change}))
        with pytest.raises(ValueError, match=message):
            load_model(other)
    (other / "task.json").write_text(json.dumps({key: value for key, value in page.items() if key != "task"}))
    with pytest.raises(ValueError, match="key 'task' is missing"):
        load_model(other)


def test_pages_and_tables_hold_every_model(
    done: tuple[Any, Path, list[dict[str, Any]]], tmp_path: Path, capsys: Any
) -> None:
    import sys

    records = done[2]
    models = models_of(records)
    assert Counter(len(m.records) for m in models) == {2: 9}
    scores, side, *classes, training, costs = study_tables(models, "scenes")
    assert [row.title for row in scores.rows][-1] == "UNet from scratch"
    assert scores.columns[-1] == "unet"
    assert [bool(row.cells[-1].text) for row in scores.rows] == [*[False] * (len(scores.rows) - 1), True]
    assert not any(cell.text for cell in scores.rows[-1].cells[:-1])
    assert sum(cell.is_best for row in scores.rows for cell in row.cells) == 1
    assert len(side.rows) == len(training.rows) == len(costs.rows) == 9
    assert [title for table in classes for title in table.columns] == [model.title for model in models]
    for row in training.rows:
        assert [cell.text for cell in row.cells[:2]] == ["12 / 12 / 12", "0.01"]
        assert row.cells[-1].text == "none"
        is_random = "random" in row.title or "UNet" in row.title
        assert row.cells[-2].text == ("random" if is_random else records[0]["asked"]["weights"][:12])
    html, markdown, latex = write_study_page(records, tmp_path, "a study", "ssl-eo study 'my own'")
    text = html.read_text()
    assert "ssl-eo study &#39;my own&#39;" in text
    assert markdown.read_text().endswith("- made by ssl-eo study 'my own'\n")
    assert text.count("<svg") >= 3
    assert "src=" not in text
    assert "tiny, finetune, fcn" in text
    assert text.count("UNet from scratch  ") == 1  # in the bars; points have its number alone
    assert markdown.read_text().count("\n## ") == 5
    assert r"\toprule" in latex.read_text()
    print_study(records, sys.stdout)
    assert "UNet from scratch" in capsys.readouterr().out


def test_what_fails_is_a_record_and_is_tried_again(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    gone = task(
        name="gone", train={"name": "raster_masks", "root": "gone", "sensor": "sentinel1_grd", "classes": ["a", "b"]}
    )
    cfg = study(tiny, tasks=[gone, task()])
    records = run_study(cfg, tmp_path)
    assert [r["kind"] for r in records] == ["error", "result"]
    assert "gone" in records[0]["error"]
    first, second, *told = capsys.readouterr().err.splitlines()
    assert first == "2 models to train"
    assert second.startswith("some will fail: task gone: ")
    told = [line for line in told if re.match(r"\d/", line)]
    assert [line.split("-")[0] for line in told] == ["1/2 gone", "1/2 gone", "2/2 scenes", "2/2 scenes"]
    ends = [re.sub(r"\d+ s$", "N s", line.split("-0")[1]) for line in told]
    assert ends == [" ...", ": failed, N s", " ...", ": trained, N s"]
    assert len(run_study(cfg, tmp_path)) == 2
    assert [r["kind"] for r in read_jsonl(tmp_path / RECORDS)] == ["error", "result", "error"]
    assert [r["kind"] for r in read_study(tmp_path).values()].count("error") == 1
    write_study_page(records, tmp_path, "a study", "ssl-eo study x")
    assert "gone" in (tmp_path / "study.html").read_text()


def test_a_result_is_of_the_content_that_its_key_names(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that cannot be opened at first fails its cells, whatever it does later; sources are opened once."""
    opened: list[str] = []

    def flaky(cfg: Any) -> Any:
        opened.append(cfg.name)
        if len(opened) == 1:
            raise OSError("stale file handle")
        return open_source(cfg)

    monkeypatch.setattr("ssl_eo.eval.tasks.open_source", flaky)
    (failed,) = run_study(study(tiny), tmp_path)
    assert (failed["kind"], failed["error"]) == ("error", "OSError: stale file handle")
    assert len(opened) == 1
    (result,) = run_study(study(tiny), tmp_path)
    assert result["kind"] == "result"
    assert set(result["asked"]["content"]) == {"train", "val", "test"}
    assert len(opened) == 1 + 3


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_without_labels_is_found_before_anything_is_trained(
    split: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_by = Workbench._open

    def opened(bench: Workbench, name: str) -> OpenedTask:
        found = opened_by(bench, name)
        found.splits[split].labels = torch.full_like(found.splits[split].labels, 7)
        return found

    def trained(*_: Any) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setattr(Workbench, "_open", opened)
    monkeypatch.setattr("ssl_eo.adapt.study_run.fit", trained)
    (record,) = run_study(study(tiny, tasks=[task(ignore=7)]), tmp_path)
    assert f"task scenes: no pixel of {split} has a label: all are 7, which stand for unknown" in record["error"]


def test_a_study_says_what_there_is_to_do(
    done: tuple[Any, Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, out, records = done
    run_study(cfg, out)
    first, *_, last = capsys.readouterr().err.splitlines()
    n_unets = sum(record["cell"]["encoder"] == "unet" for record in records)
    of_unet = f"{n_unets} of them are a UNet from scratch (unet=false leaves it out)"
    assert first == f"{len(records)} models to train, of which {len(records)} are trained already; {of_unet}"
    assert last == "save_models: models of the UNet are not saved; those of single encoders are"


def test_an_architecture_without_weights_is_for_random_protocols(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = study(
        tmp_path,
        encoders={"bare": {"model": "dinov2_vits14"}},
        protocols=["frozen"],
        trainings={"default": {"n_steps": 1, "n_evaluations": 1, "lrs": [1e-3]}},
    )
    (record,) = run_study(cfg, tmp_path / "out")
    assert record["kind"] == "error"
    message = "encoders.bare: dinov2_vits14 has no weights for protocol frozen; write dinov2_vits14=FILE"
    assert message in record["error"]
    assert f"some will fail: {message}" in capsys.readouterr().err.splitlines()[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoders": {"identity": {}}}, "none of identity is for segmentation"),
        ({"decoders": {"linear": {}, "mlp": {}}}, "mlp is for classification.* and no task is of these"),
        ({"decoders": {"lineer": {}}}, r"^decoders\.lineer: .*did you mean 'linear'"),
        ({"decoders": {"linear": {"dropout_prob": 9}}}, r"^decoders\.linear: dropout_prob must be in \[0, 1\), got 9"),
        (
            {"trainings": {"a": {"loss": {"name": "bce"}}}},
            "^trainings.a, task scenes: loss bce is not for segmentation",
        ),
        ({"samples": {"long_tail_ratio": 5}}, "task scenes: samples.stratified and .* are for classification"),
        ({"decoders": {"linear": {"dropout": 0.5}}}, "no option 'dropout'; did you mean 'dropout_prob'"),
        ({"protocols": ["frozn"]}, "no protocol 'frozn'; did you mean 'frozen'"),
        ({"encoders": {"unet": {"model": "x"}}}, "is the name of the control"),
        ({"seeds": [1, 1]}, "each once"),
        ({"country": "France"}, "three letters"),
        ({"n_resamples": 10**29}, "n_resamples must be from 0 to 100,000"),
        ({"lora": {"rank": 10**29}}, "lora.rank must be at most 4,096"),
        ({"encoders": {"m": {"model": "x", "taps": [1, 2]}}}, r"encoders\.m.*above 0 and up to 1"),
        ({"encoders": {"m": {"model": "x", "taps": []}}}, r"encoders\.m.*above 0 and up to 1, got \[\]"),
        ({"encoders": {"m": {"model": "x", "taps": [0.5, 0.5]}}}, r"encoders\.m.*differ in their first two decimals"),
        ({"encoders": {"m": {"model": "x", "taps": [1.0, 0.5]}}}, r"encoders\.m.*must rise with the depth"),
        ({"trainings": {"a": {"weight_decay": -1}}}, r"trainings\.a.*weight_decay must be finite and at least 0"),
        ({"trainings": {"a": {"features_gb": -1}}}, r"trainings\.a.*features_gb must be finite and at least 0"),
        ({"trainings": {"a": {"n_step": 3}}}, r"trainings\.a\.n_step: unknown key; did you mean 'n_steps'"),
    ],
)
def test_wrong_studies_are_refused(changes: dict[str, Any], message: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=message):
        study(tiny, **changes)


def test_an_encoder_that_is_not_there_is_named_before_anything_is_trained(tiny: Path, tmp_path: Path) -> None:
    for model, message in (
        ("runs/gone", "encoders.lost: runs/gone: no such path"),
        ("panoptikon_vitb14", "panoptikon_vitb14: no such path; did you mean .panopticon_vitb14."),
    ):
        with pytest.raises(ValueError, match=message):
            run_study(study(tiny, encoders={"lost": {"model": model}}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_or_used_is_refused_before_anything_is_trained(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: Any) -> None:
        raise AssertionError("a cell was begun")

    monkeypatch.setattr("ssl_eo.adapt.study_run._Runner.work", trained)
    (tmp_path / "file").touch()
    (tmp_path / "folder" / RECORDS).mkdir(parents=True)
    for out, changes, message in (
        ("file", {}, r"file: no folder can be made here \(File exists\); give another"),
        ("folder", {}, r"study\.jsonl: cannot be written \(Is a directory\)"),
        ("new", {"device": "x"}, "^device: 'x' cannot be used"),
        ("new", {"device": "meta"}, "^device: 'meta' cannot be used"),
        ("new", {"country": "GER"}, "^country: codecarbon knows none that is called 'GER'; .* such as DEU"),
    ):
        with pytest.raises(ValueError, match=message):
            run_study(study(tiny, **changes), tmp_path / out)


def test_a_missing_extra_is_found_before_anything_is_trained(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"protocol lora needs the package peft: pip install 'ssl_eo\[lora\]'"):
        run_study(study(tiny, protocols=["frozen", "lora"]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_wrong_number_of_weights_is_found_before_features_are_computed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: Any) -> None:
        raise AssertionError("features were computed")

    monkeypatch.setattr(Workbench, "samples_of", computed)
    plain = study(tiny).trainings["default"]
    weighted = replace(plain, loss=LossConfig(class_weights=[1.0, 2.0]))
    (record,) = run_study(study(tiny, trainings={"a": asdict(weighted)}), tmp_path)
    assert "class_weights" in record["error"]


def test_results_of_other_options_are_told(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_study(study(tiny, seeds=[0, 1]), tmp_path)
    capsys.readouterr()
    run_study(study(tiny, seeds=[1]), tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert f"1 other result in {tmp_path} is of other options or code, and not shown" in told


def test_each_line_of_the_records_is_read_once(
    done: tuple[Any, Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where others add to them, and where a killed process has left half a line."""
    first, second, third = done[2][:3]
    read: list[str] = []

    def noted(record: dict[str, Any]) -> bool:
        read.append(record["key"])
        return is_of_study(record)

    monkeypatch.setattr("ssl_eo.adapt.study_run.is_of_study", noted)
    path, results = tmp_path / RECORDS, _Results(tmp_path / RECORDS)
    assert not results.has(first["key"])
    with path.open("w") as file:
        file.write(json.dumps(first) + "\n[]\n" + json.dumps({**second, "kind": "error", "error": "x"}) + "\n")
        file.flush()
        assert results.has(first["key"])
        assert not results.has(second["key"])
        line = json.dumps(second)
        file.write(line[:50])
        file.flush()
        assert not results.has(second["key"])
        file.write(line[50:] + "\n" + json.dumps({**third, "scores": {}}) + "\n")
        file.flush()
    assert results.has(second["key"])
    assert not results.has(third["key"])
    assert read == [first["key"], second["key"], third["key"]]


def test_an_interrupted_study_says_what_is_done(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssl_eo.adapt.study_run._Runner.work", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(study(tiny, seeds=[0, 1]), tmp_path)
    assert "0 of 2 cells are done; the same command goes on" in capsys.readouterr().err


def test_lines_that_are_no_records_are_left_out(
    done: tuple[Any, Path, list[dict[str, Any]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A page of what is read can always be drawn."""
    good = done[2][0]
    assert is_of_study(good)
    metric = good["metric"]
    odd: list[dict[str, Any]] = [
        {"key": [], "kind": "result", "cell": {}},
        {"key": {}, "kind": "error", "cell": {}},
        {"key": good["key"], "kind": "result", "cell": good["cell"]},
        {"key": good["key"], "kind": "error", "cell": good["cell"]},
        *({**good, "kind": kind} for kind in ([], "note", None)),
        *({**good, "cell": cell} for cell in ("x", {}, {**good["cell"], "seed": "0"}, {**good["cell"], "task": 3})),
        *({**good, "scores": scores} for scores in ("x", {}, {metric: math.nan}, {metric: None}, {metric: True})),
        *({**good, "metric": metric} for metric in ("__class__", [], "r2")),
        *({**good, "resampled": text} for text in ("zzz", 3, good["resampled"][:-8])),
        *({**good, "confusion": confusion} for confusion in ([[1]], [1], "x", good["confusion"][:-1])),
        *({**good, "per_class": columns} for columns in ([], {"support": [1]}, {**good["per_class"], "iou": [1]})),
        *({**good, "asked": asked} for asked in (None, {}, {**good["asked"], "task": {"kind": "segmentation"}})),
        *({**good, "curves": curves} for curves in ([], [{}], [{"lr": 1, "scores": [None]}], 3)),
        *({**good, "specialists": of} for of in ("x", {}, {"run": "x", "of": [], "by": None, "seconds": 1})),
        *({**good, "n_leaked": n} for n in (None, -1, "x")),
        *({**good, "n_samples": n} for n in (None, {}, {"train": -1, "val": 1, "test": 1})),
        *({**good, name: "x"} for name in ("n_trained", "forward_gflop", "energy_kwh", "missing_bands", "n_groups")),
        {**good, "forward_gflop": 0.0},
    ]
    for record in odd:
        assert not is_of_study(record), record
    (tmp_path / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in [*odd, good, *odd]))
    assert read_study(tmp_path) == {good["key"]: good}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"line 1 and {2 * len(odd) - 1} more: no record of this file; left out" in caplog.text


def test_records_are_shown_by_the_names_that_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    """The same encoder by another name is not trained again."""
    cfg = study(tiny)
    (trained,) = run_study(cfg, tmp_path)
    other = {**trained, "cell": {**trained["cell"], "encoder": "somebody else's"}}
    (tmp_path / RECORDS).write_text(json.dumps(other) + "\n")
    assert run_study(cfg, tmp_path) == [trained]


def test_what_a_reader_must_know_is_on_the_page(done: tuple[Any, Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    first = done[2][0]
    asked = {**first["asked"], "task": {**first["asked"]["task"], "flags": ["leak: 3 % were drawn twice"]}}
    changes = {"asked": asked, "n_groups": 2, "n_leaked": 5, "n_leaked_val": 0, "n_shared_groups": 3}
    html, markdown, _ = write_study_page([{**first, **changes}], tmp_path, "a study", "x")
    for text in (
        "leak: 3 % were drawn twice",
        "5 of 12 test samples have the content of a training sample",
        "3 places of test samples are places of training or validation samples too",
        "test samples are of 2 places",
    ):
        assert html.read_text().count(text) == 1
        assert markdown.read_text().count(text) == 1


def test_samples_of_several_splits_are_counted_or_refused(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in evaluations: those of one key are refused, unless the task says that it means nothing."""
    same = task(n=4)
    same["test"] = same["train"]
    (record,) = run_study(study(tiny, tasks=[same]), tmp_path)
    assert "4 of 4 samples of test are in train too" in record["error"]
    same["flags"] = ["shared keys: they are counted from 1 in each"]
    (record,) = run_study(study(tiny, tasks=[same]), tmp_path)
    assert [record[key] for key in ("n_leaked", "n_leaked_val", "n_shared_groups")] == [4, 0, 0]
    assert "have the pixels of a sample of train" in caplog.text
    write_study_page([record], tmp_path, "a study", "x")
    assert "4 of 4 test samples have the content of a training sample" in (tmp_path / "study.html").read_text()


def test_a_page_that_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    check_pages(tmp_path / "new")
    (tmp_path / "study.html").touch()
    check_pages(tmp_path)
    (tmp_path / "study.md").mkdir()
    with pytest.raises(ValueError, match=r"study\.md is a folder, and a page is to be written there"):
        check_pages(tmp_path)


def test_the_best_is_first_whichever_way_is_better(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    """A metric of errors is as good as it is small."""
    of_regression = {**done[2][0], "metric": "rmse", "confusion": None, "resampled": None}
    records = [
        {**of_regression, "scores": {"rmse": rmse}, "cell": {**of_regression["cell"], "encoder": name}}
        for name, rmse in (("good", 1.0), ("bad", 3.0), ("fair", 2.0))
    ]
    bars, _ = _score_charts(models_of(records), "x")
    for i, name in enumerate(("good", "fair", "bad"), start=1):
        assert f"{name}, frozen, linear  {i}" in bars


def test_a_cost_that_some_models_have_is_shown_of_these(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    first, other = done[2][0], {**done[2][0], "energy_kwh": 0.002}
    other["cell"] = {**other["cell"], "encoder": "measured"}
    costs = study_tables(models_of([first, other]), "scenes")[-1]
    assert costs.columns[-1] == "Wh"
    assert [row.cells[-1].text for row in costs.rows] == ["", "2"]


def test_bands_that_an_encoder_lacks_are_on_the_page(done: tuple[Any, Path, list[dict[str, Any]]]) -> None:
    first, second = done[2][0], done[2][1]
    records = [{**first, "missing_bands": ["B05", "B06"], "step": 1200}, {**second, "missing_bands": []}]
    tables = {table.title: table for table in study_tables(models_of(records), "scenes")}
    training = tables["scenes: training"]
    assert [row.cells[-1].text for row in training.rows] == ["B05, B06", "none"]
    assert training.rows[0].cells[-3].text == "1,200"


def test_points_that_lie_close_share_one_label() -> None:
    places = [(1.0, 30.0), (100.0, 29.0), (1.02, 29.8), (1.0, 20.0), (102.0, 29.1), (1.0, 20.0)]
    assert _point_labels(places) == ["1, 3", "2, 5", "", "4, 6", "", ""]
    assert _point_labels([(2.0, 5.0)]) == ["1"]


@pytest.mark.parametrize("has_bands", [False, True])
def test_pixels_of_a_saved_model_are_brought_to_0_and_1_once(has_bands: bool, tmp_path: Path) -> None:
    """Its folder is a bundle that says so too, unless its bands are to be found first."""
    task, sensor = opened_task(n=4), load_sensor("sentinel1_grd")
    bands = FixedBands(sensor, task.bands, (0, None, 2, 3)) if has_bands else None
    taps = [0.34, 1.0]
    backbone = EncoderBackbone(encoder(), taps, bands, clip_std=2.0)
    model = TaskModel(backbone, build_decoder("linear", {}, backbone.shape, task.n_classes)).eval()
    save_model(tmp_path, model, task, {"decoder": "linear", "options": {}, "taps": taps})
    saved, (known,) = load_model(tmp_path), load_bundle(tmp_path).inputs.values()
    assert known.clip_std == (None if has_bands else 2.0)
    stored = torch.randn(2, 4, 16, 16) * 20
    with torch.no_grad():
        expected = model(BundleEncoder(backbone.encoder, {"s": replace(known, clip_std=None)}, {}).prepare(stored))
    torch.testing.assert_close(saved.logits(stored), expected)
