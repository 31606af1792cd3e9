"""Options of `ssl-eo eval`: errors name them, what cannot be measured is one line, and the docs have them all."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import ROOT

from ssl_eo.cli import main
from ssl_eo.cli_eval import _remarks, add_arguments
from ssl_eo.eval.records import read_results
from ssl_eo.hub import write_bundle
from ssl_eo.models.vit import Encoder, EncoderConfig

SOURCE = {"name": "synthetic", "extent_m": 160.0, "labels": "scene"}
SPLITS = {"train": {"n_samples": 30, "split": "train"}, "test": {"n_samples": 12, "split": "test"}}


def _bundle(folder: Path, n_channels: int) -> Path:
    torch.manual_seed(0)
    cfg = EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=8, patch_embed="conv")
    encoder = Encoder(cfg, n_channels)
    encoder.init_weights()
    write_bundle(folder, encoder, {}, {"step": 7})
    return folder


def _task(path: Path, sensor: str = "sentinel2_l2a") -> Path:
    splits = {name: {**SOURCE, "sensors": [sensor], **part} for name, part in SPLITS.items()}
    path.write_text(yaml.safe_dump({**splits, "max_train": 30, "max_test": 12, "probes": ["ridge"]}))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an encoder of 12 bands, one of 3, and tasks of both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSL_EO_SAMPLES", raising=False)
    monkeypatch.delenv("GEO_BENCH_DIR", raising=False)
    _bundle(tmp_path / "ms", 12)
    _bundle(tmp_path / "rgb", 3)
    _task(tmp_path / "scenes.yaml")
    _task(tmp_path / "colours.yaml", "sentinel2_l2a:rgb")
    (tmp_path / "more").mkdir()
    _task(tmp_path / "more" / "scenes.yaml")
    return tmp_path


def _eval(*arguments: str, model: str = "ms") -> int | str | None:
    try:
        return main(["eval", "--model", model, "--out", "out", *arguments])
    except SystemExit as stop:
        return stop.code


SCENES = ("--tasks", "scenes.yaml")
WRONG: list[tuple[tuple[str, ...], str]] = [
    ((*SCENES, "--bands", "nir"), "--bands: got 'nir', must be one of all, rgb, no-rgb, random"),
    ((*SCENES, "--bands", ","), "--bands: nothing is named; leave the option out for its default"),
    ((*SCENES, "--protocol", "knn, ridgge"), "--protocol: there is no component 'ridgge'"),
    ((*SCENES, "--protocol", ""), "--protocol: nothing is named"),
    ((*SCENES, "--pool", "max"), "--pool: got 'max', must be one of cls, mean, cls_mean, mean_std"),
    ((*SCENES, "--precision", "float16"), "--precision: got 'float16', must be one of float32, bfloat16; did you mean"),
    ((*SCENES, "--taps", "0.5", "2"), "--taps: taps are ratios of the depth"),
    ((*SCENES, "--seeds", "one"), "--seeds: 'one' is no whole number"),
    ((*SCENES, "--seeds", "1.5"), "--seeds: '1.5' is no whole number"),
    ((*SCENES, "--size", "0"), "--size: '0' must be task, native, or a number of pixels up to 4096"),
    ((*SCENES, "--partitions", "10%"), "--partitions: '10%' is no part; give for instance 0.01x"),
    (("--tasks", "scenes.yaml", "more/scenes.yaml"), "--tasks must name at least one, and each once"),
    ((*SCENES, "--size", "60"), "--size: 60 pixels are no whole number of patches, of which those of ms have 8"),
    ((*SCENES, "--size", "4"), "give 8, or native"),
    ((*SCENES, "--workers", "257"), "argument --workers: must be a whole number from 0 to 256, got '257'"),
    ((*SCENES, "--workers", "-1"), "argument --workers: must be a whole number from 0 to 256"),
    ((*SCENES, "--resamples", "1000000000"), "argument --resamples: must be a whole number from 0 to 10,000"),
    ((*SCENES, "--batch-size", "0"), "argument --batch-size: must be a whole number from 1 to 65,536, got '0'"),
    ((*SCENES, "eval.pool=cls"), "eval.pool=cls: use --pool cls; eval takes options, no key=value"),
    ((*SCENES, "--no-controls", "eval.taps=[0.5,1.0]"), "use --taps 0.5,1.0; eval takes options"),
    ((*SCENES, "--protocol", "knn", "n_workers=2"), "n_workers=2: use --workers 2; eval takes options"),
    ((*SCENES, "--no-controls", "eval.controls=false"), "eval.controls=false: use --no-controls; eval takes options"),
    ((*SCENES, "--no-controls", "controls=true"), "controls=true: eval takes options"),
    ((*SCENES, "run=3"), "run=3: eval takes options, no key=value"),
    ((*SCENES, "optim.lr=0.1"), "optim.lr=0.1: eval takes options, no key=value"),
    (("--tasks", "eurosat"), "--tasks eurosat: datasets_meta/benchmarks has no 'eurosat'; did you mean"),
    (("--tasks", "scenes"), "--tasks scenes: no shipped task; did you mean ./scenes.yaml?"),
    (("--tasks", "wrong.yaml"), "--tasks wrong.yaml: train.name: there is no component 'synthetc'"),
    (("--tasks", "geobench/m-eurosat"), "needs the environment variable GEO_BENCH_DIR, which is not set"),
]


@pytest.mark.parametrize("out", ["", " ", "scenes.yaml", "scenes.yaml/below", "/dev/null"])
def test_what_cannot_be_the_folder_is_refused_before_the_model_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    before = sorted(folder.iterdir())
    assert main(["eval", "--model", "there is none", "--out", out, *SCENES]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ssl-eo: --out")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_errors_name_the_option_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (folder / "wrong.yaml").write_text("train: {name: synthetc}\ntest: {name: synthetic}\n")
    assert _eval(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "[0]" not in line
    assert not (folder / "out").exists()


def test_lists_may_have_blanks_and_repeat_themselves(folder: Path) -> None:
    few = ("--no-controls", "--resamples", "0")
    chosen = ("--protocol", "knn, ridge", "ridge", "--bands", "rgb,rgb,", "--seeds", "0, 00")
    assert _eval(*SCENES, *few, *chosen, model="rgb") == 0
    found = [(r["probe"], r["subset"], r["seed"]) for r in read_results(folder / "out")]
    assert sorted(found) == [("knn", "rgb", 0), ("ridge", "rgb", 0)]


def test_bands_that_a_tile_has_not_are_skipped_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _eval("--tasks", "colours.yaml", "--bands", "no-rgb", "--resamples", "0", model="rgb") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "no-rgb" in line] == ["skipped: colours: the tile has no bands no-rgb"]


def test_an_encoder_of_true_colour_is_told_how_it_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--no-controls", "--resamples", "0")
    hint = "ValueError: rgb takes 3 bands and was shown 12; true colour would fit: bands rgb"
    assert _eval(*SCENES, *few, model="rgb") == 1
    assert capsys.readouterr().out.splitlines().count(f"  rgb could not be measured: {hint}") == 1
    assert _eval("--tasks", "colours.yaml", *few) == 1  # 12 bands, of which true colour has 3
    assert "ms takes 12 bands and was shown 3; show as many" in capsys.readouterr().out
    assert _eval(*SCENES, *few, "--bands", "rgb", model="rgb") == 0


def test_what_was_measured_takes_the_name_that_is_given_last(folder: Path) -> None:
    few = ("--no-controls", "--resamples", "0")
    assert _eval(*SCENES, *few) == 0
    n_lines = len((folder / "out" / "results.jsonl").read_text().splitlines())
    for _ in range(2):
        assert _eval(*SCENES, *few, model="ViT=ms") == 0
        (record,) = read_results(folder / "out")
        assert (record["model"], record["step"]) == ("ViT", 7)
        assert len((folder / "out" / "results.jsonl").read_text().splitlines()) == n_lines + 1
    assert "ViT/encoder/last" in (folder / "out" / "results.csv").read_text()


def test_flags_of_tasks_and_fits_that_did_not_come_to_their_optimum_are_named() -> None:
    task = {"task": "t", "flags": ["labels are noisy"], "classes": ["a", "b"], "n_train": 90, "n_test": 60}
    place = {"probe": "logistic", "seed": 0, "tap": "depth_0.50", "partition": "1.00x", "subset": "all"}
    found = [
        {**task, **place, "kind": "result", "size": "native", "features": features, "model": "m", "chosen": chosen}
        for features, chosen in (
            ("encoder", {"lambda": 1.0, "converged": 1.0}),
            ("random_encoder", {"lambda": 1.0, "converged": 0.0}),
            ("band_statistics", {"n_neighbors": 20}),
        )
    ]
    where = "t: logistic on random encoder at depth 0.50 (labels 1.00x, bands all, own size, seed 0)"
    flag, remark = dict.fromkeys(_remarks([*found, {**found[0], "n_leaked": 0}]))
    assert flag == "t: labels are noisy"
    assert remark == f"{where} is not at its optimum: its score may be a little lower than it could be"
    one_sample = [{**r, "n_test": 1} for r in found]
    assert "t: its scores tell nothing: they are of one test sample" in list(_remarks(one_sample))


# --- the tasks that there are -----------------------------------------------------------------------------------------


def _listed(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--list-tasks"])
    assert stop.value.code == 0
    head, *rows = (re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    assert head == ["task", "kind", "classes", "metric", "data"]
    return {name: facts for name, *facts in rows}


@pytest.mark.usefixtures("folder")
def test_shipped_tasks_are_listed_with_what_must_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    listed = _listed(capsys)
    benchmarks = ROOT / "datasets_meta" / "benchmarks"
    assert set(listed) == {p.relative_to(benchmarks).with_suffix("").as_posix() for p in benchmarks.rglob("*.yaml")}
    assert listed["synthetic_scenes"] == ["classification", "15", "accuracy", "needs no file"]
    where = "$SSL_EO_SAMPLES/eurosat_rgb (SSL_EO_SAMPLES is not set)"
    assert listed["eurosat_rgb_geo"] == ["classification", "?", "accuracy", where]
    where = "$GEO_BENCH_DIR (GEO_BENCH_DIR is not set)"
    assert listed["geobench/m-bigearthnet"] == ["multilabel", "?", "f1_micro", where]


def test_and_whether_their_data_are_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSL_EO_SAMPLES", str(folder))
    _write_resisc45(folder, n_of_each=30)
    listed = _listed(capsys)
    assert listed["resisc45"] == ["classification", "2", "accuracy", "$SSL_EO_SAMPLES/resisc45 (found)"]
    assert listed["eurosat_ms"][3].startswith("$SSL_EO_SAMPLES/eurosat_ms (train cannot be read: ")


def test_data_of_which_a_split_is_empty_are_not_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSL_EO_SAMPLES", str(folder))
    _write_resisc45(folder, n_of_each=1)
    _, n_classes, _, where = _listed(capsys)["resisc45"]
    assert n_classes == "2"
    assert where.startswith("$SSL_EO_SAMPLES/resisc45 (val cannot be read: split: no image of ")


def _write_resisc45(folder: Path, n_of_each: int) -> None:
    for name in ("a", "b"):
        (folder / "resisc45" / name).mkdir(parents=True)
        for number in range(n_of_each):
            (folder / "resisc45" / name / f"{number}.jpg").write_bytes(_JPEG)


def _jpeg() -> bytes:
    import io

    from PIL import Image

    Image.effect_noise((256, 256), 50.0).convert("RGB").save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


_JPEG = _jpeg()


def _rows(heading: str) -> list[list[str]]:
    """The table of docs/evaluation.md that begins with `heading`."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_the_docs_have_every_option_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    actions: dict[str, Any] = {names[-1]: action for action in parser._actions if (names := action.option_strings)}
    del actions["--help"]
    rows = _rows("| option | what | unless given |")
    assert [option for first, *_ in rows for option in re.findall(r"--[\w-]+", first)] == list(actions)
    of_option = {first.strip("`"): last for first, _, last in rows}
    for option, action in actions.items():
        if action.required:
            assert of_option[option] == "required", option
        elif isinstance(action.default, int) and not isinstance(action.default, bool):
            assert of_option[option] == f"`{json.dumps(action.default)}`", option


def test_the_docs_have_every_task_and_its_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {name.strip("`"): data for name, *_, data in _rows("| name | what | train, val, test |")}
    for name, (*_, where) in _listed(capsys).items():
        data = rows["geobench/m-eurosat`, ..." if name.startswith("geobench/") else name]
        assert where.partition(" (")[0] in data, name
