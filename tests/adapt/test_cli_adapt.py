"""The commands `ssl-eo study`, `predict` and `export-ensemble`, from a config to a map, from runs to an ensemble."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toy_study import SENSOR, bundle, encoder, opened_task, source, task

from ssl_eo.adapt.backbone import EncoderBackbone
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.saved import SavedModel, load_model, save_model
from ssl_eo.adapt.specialists import load_ensemble
from ssl_eo.cli import main
from ssl_eo.cli_adapt import _shares
from ssl_eo.config import build
from ssl_eo.data.opening import SourceConfig, open_source
from ssl_eo.eval.decoders import build_decoder
from ssl_eo.train.export import load_encoder

pytest.importorskip("rasterio")


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study by the command, of one cell, with its model."""
    root = tmp_path_factory.mktemp("cli")
    config = {
        "tasks": [task()],
        "encoders": {"tiny": {"model": str(bundle(root / "tiny")), "taps": [0.34, 1.0]}},
        "decoders": {"linear": {}},
        "trainings": {"default": {"n_steps": 9, "batch_size": 4, "lrs": [1e-2], "n_evaluations": 1}},
        "unet": False,
        "save_models": True,
        "n_resamples": 0,
        "device": "cpu",
    }
    (root / "my_study.yaml").write_text(yaml.safe_dump(config))
    command = ["study", str(root / "my_study.yaml"), "--out", str(root / "out"), "trainings.default.n_steps=4"]
    assert main(command) == 0
    return root


def scene(path: Path, n: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    """One scene of the world as a GeoTIFF with named bands, in another order than the model takes them."""
    import rasterio

    opened = open_source(build(SourceConfig, source("landcover", "test", 4, extent_m=410.0), ""))
    (tile,) = opened.read(n).tiles.values()
    stored = tile.array.astype(np.float32)
    stored[:, :3, :5] = np.nan
    profile = {"count": 4, "height": stored.shape[1], "width": stored.shape[2], "dtype": "float32"}
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(6e5, 5e6, 10, 10)}
    with rasterio.open(path, "w", driver="GTiff", **profile, **place) as file:
        file.write(stored[::-1])
        for i, band in enumerate(reversed(tile.bands), 1):
            file.set_band_description(i, band)
    return stored


def test_the_command_writes_records_and_pages(studied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = studied / "out"
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "study.jsonl", "study.html", "study.md", "study.tex", "models",
    }  # fmt: skip
    (record,) = [json.loads(line) for line in (out / "study.jsonl").read_text().splitlines()]
    assert record["asked"]["training"]["n_steps"] == 4
    again = ["study", str(studied / "my_study.yaml"), "--out", str(out), "trainings.default.n_steps=4"]
    assert main(again) == 0
    said = capsys.readouterr().out
    assert "tiny, frozen" in said
    assert "study.html" in said
    assert len((out / "study.jsonl").read_text().splitlines()) == 1


def test_a_scene_becomes_a_map(studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bands are found by name; a window of the whole scene gives what the model gives; CRS and no-data are kept."""
    import rasterio

    stored = scene(tmp_path / "scene.tif")
    model = studied / "out" / "models" / "scenes-tiny-frozen-linear-default-0"
    names = ["--bands", *load_model(model).input.bands]
    out, likely = tmp_path / "classes.tif", tmp_path / "likely.tif"
    command = ["predict", str(tmp_path / "scene.tif"), "--model", str(model), "--out", str(out), *names]
    assert main([*command, "--probabilities", str(likely), "--window", "44", "--overlap", "0"]) == 0
    wrote, shares = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {out}, {likely}: 41 x 41 pixels (windows of 44 pixels)"
    with rasterio.open(out) as file, rasterio.open(likely) as other:
        assert (file.tags()["model"], file.tags()["sensor"]) == (model.name, SENSOR)
        assert file.tags()["bands"].split() == names[1:]
        (record,) = [json.loads(line) for line in (studied / "out" / "study.jsonl").read_text().splitlines()]
        assert file.tags()["record"] == record["key"]
        assert file.tags()["weights"] == other.tags()["weights"] == load_model(model).weights
        assert len({file.colormap(1)[i] for i in range(len(load_model(model).classes))}) > 1
        classes, probabilities = file.read(1), other.read()
        assert file.crs.to_epsg() == 32632
        assert file.transform == rasterio.transform.from_origin(6e5, 5e6, 10, 10)
        assert (classes[:3, :5] == file.nodata).all()
        (most, n_most) = Counter(classes[classes != file.nodata].tolist()).most_common(1)[0]
        share = f"{100 * n_most / 41**2:.1f} %"
    assert shares.startswith(f"{load_model(model).classes[most]} {share}")
    assert shares.endswith(f"; no data {100 * 15 / 41**2:.1f} %")
    assert classes.shape == stored.shape[1:] == (41, 41)
    np.testing.assert_allclose(probabilities[:, 3:].sum(0), 1.0, atol=1e-5)
    saved = load_model(model)
    expected = saved.logits(torch.from_numpy(stored)[None])[0].argmax(0).numpy()
    measured = np.isfinite(stored[0])
    assert (classes == expected)[measured].mean() > 0.9  # the window is padded by other pixels
    assert main([*command]) == 2  # it is there
    assert main([*command, "--overwrite", "--window", "8", "--blend", "gaussian"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bands", "1", "2"], "--bands: the model takes 4, "),
        (["--bands", "1", "2", "3", "9"], "9"),
        (["--window", "7"], "--window must be a multiple of the patch"),
        (["--window", "0"], "--window must be at least 1, got 0"),
        (["--overlap", "1"], "--overlap must be"),
        (["--out", "map.png"], "map.png: maps are written to a .tif file"),
        (["--bands", "1", "2", "3", "1"], "band 1 of"),
        (["--model", "gone"], "gone: not a trained model"),
        (["--decoder", "my.own"], "its decoder is 'linear', and 'my.own' was given"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], message: str, studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene(tmp_path / "scene.tif")
    model = ["--model", str(studied / "out" / "models" / "scenes-tiny-frozen-linear-default-0")]
    if "--model" in options:
        model = []
    bands = [] if "--bands" in options else ["--bands", "4", "3", "2", "1"]
    out = [] if "--out" in options else ["--out", str(tmp_path / "out.tif")]
    command = ["predict", str(tmp_path / "scene.tif"), *model, *out, *bands, *options]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out.tif").exists()


def test_a_folder_is_no_scene(studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(studied / "out" / "models" / "scenes-tiny-frozen-linear-default-0")
    assert main(["predict", str(tmp_path), "--model", model, "--out", str(tmp_path / "out.tif")]) == 2
    assert capsys.readouterr().err == f"ssl-eo: {tmp_path} is a folder, and a scene is one GeoTIFF: give its file\n"


def test_a_shipped_study_is_cut_by_overrides(studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an override sets to null is left out; others are added to what is there."""
    raw = yaml.safe_load((studied / "my_study.yaml").read_text())
    raw["decoders"] = {"linear": {}, "fcn": {"channels": 8}, "segformer": {"channels": 8}}
    config = tmp_path / "large.yaml"
    config.write_text(yaml.safe_dump({**raw, "save_models": False}))
    short = ["trainings.default.n_steps=1", "unet=false", "--out", str(tmp_path / "out")]
    command = ["study", str(config), "decoders.fcn=null", "decoders={segformer: null}", *short]
    assert main(command) == 0
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "study.jsonl").read_text().splitlines()]
    assert record["cell"]["decoder"] == "linear"
    capsys.readouterr()
    for override, message in (
        (
            "decoders.fnc=null",
            "decoders.fnc=null: the study has no 'fnc'; did you mean 'fcn'? (fcn, linear, segformer)",
        ),
        ("encoders.tiny=null", "encoders must name at least one"),
        ("samples=null", "samples: expected a mapping of keys, got None"),
    ):
        assert main(["study", str(config), override, *short]) == 2
        assert message in capsys.readouterr().err
    config.write_text(yaml.safe_dump({**raw, "decoders": {"linear": None}}))  # in a file it is a mistake
    assert main(["study", str(config), *short]) == 2
    assert "decoders.linear: expected a mapping, got None" in capsys.readouterr().err


def test_whoever_is_told_to_end_has_not_died_at_its_cell(
    studied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However often: the claim is given back, and the same command trains the cell."""
    config = tmp_path / "stopped.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load((studied / "my_study.yaml").read_text()), "n_resamples": 5}))
    command = ["study", str(config), "trainings.default.n_steps=1", "--out", str(tmp_path / "out")]

    def told_by(name: signal.Signals) -> Callable[..., None]:
        def told(*_: object) -> None:
            os.kill(os.getpid(), name)
            raise AssertionError("it goes on")

        return told

    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        with monkeypatch.context() as patch:
            patch.setattr("ssl_eo.adapt.study_run.fit", told_by(name))
            assert main(command) == 75
            assert capsys.readouterr().err.endswith("ssl-eo: stopped on request; the same command goes on\n")
    assert (tmp_path / "out" / "study.jsonl").read_text() == ""
    assert main(command) == 0


def test_a_model_that_was_not_saved_is_told_of(
    studied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    command = ["study", str(studied / "my_study.yaml"), "trainings.default.n_steps=1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("ssl_eo.adapt.study_models.save_model", full)
        assert main(command) == 1
    folder = tmp_path / "models" / "scenes-tiny-frozen-linear-default-0"
    assert f"not saved: {folder}; the same command trains it again" in capsys.readouterr().out
    assert main(command) == 0
    assert load_model(folder).classes


def test_what_is_no_study_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "eval/decoder_studi", "--out", str(tmp_path)]) == 2
    assert "did you mean 'eval/decoder_study'" in capsys.readouterr().err


def test_the_sensor_of_the_toy_has_four_bands() -> None:
    """What the tests above count on."""
    from ssl_eo.sensors import load_sensor

    assert len(load_sensor(SENSOR).bands) == 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two toy runs and a bundle."""
    folder = tmp_path_factory.mktemp("runs")
    short = ("train.total_steps=1", "train.global_batch_size=8", "optim.warmup_steps=0", "data.n_workers=0")
    off = ("eval.every_n_steps=0", "checkpoint.every_n_steps=1", "log.every_n_steps=1", "log.report=false")
    of_run = ("model.depth=4", "model.patch_embed=conv", "objective.output=linear", f"run.out_dir={folder}")
    for name, sensor in (("optical", "sentinel2_l2a"), ("radar", "sentinel1_grd")):
        source = f"data.sources=[{{name: synthetic, sensors: [{sensor}], n_samples: 8}}]"
        command = ["train", "--config", "debug/mae", f"run.name={name}", source, *of_run, *short, *off]
        assert main(command) == 0
    bundle(folder / "any", depth=6)
    return folder


def test_runs_and_bundles_of_a_folder_become_an_ensemble(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each called as its folder, with the sensors and statistics of its run; the runs stay as they are."""
    before = sorted(path for path in runs.rglob("*"))
    out = tmp_path / "ensemble"
    assert main(["export-ensemble", str(runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out}: any, optical, radar"
    found = {specialist.name: specialist for specialist in load_ensemble(out)}
    assert {name: s.n_channels for name, s in found.items()} == {"any": None, "optical": 12, "radar": 4}
    assert list(found["radar"].inputs) == [SENSOR]
    trained = load_encoder(runs / "optical").encoder.state_dict()
    kept = found["optical"].encoder.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in kept.items())
    assert sorted(path for path in runs.rglob("*")) == before
    assert main(["export-ensemble", str(runs), "--out", str(out)]) == 2
    assert "holds an ensemble already" in capsys.readouterr().err
    assert main(["export-ensemble", str(runs), "--out", str(out), "--overwrite"]) == 0


def _no_checkpoint(folder: Path, runs: Path) -> None:
    shutil.copytree(runs / "radar", folder / "cut", ignore=shutil.ignore_patterns("step_*"))


def _wrong_config(folder: Path, runs: Path) -> None:
    shutil.copytree(runs / "radar", folder / "odd")
    (folder / "odd" / "config.yaml").write_text("objective: [")


def _shallow(folder: Path, runs: Path) -> None:
    bundle(folder / "shallow", depth=2)


def _not_json(folder: Path, runs: Path) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / "encoder.json").write_text("{")


def _dotted(folder: Path, runs: Path) -> None:
    bundle(folder / "v1.2", depth=6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "neither runs (folders with config.yaml) nor bundles (with encoder.json) lie in it"),
        (_no_checkpoint, "cut"),
        (_wrong_config, "config.yaml"),
        (_shallow, "shallow: taps [0.33"),
        (_not_json, "broken: not an encoder bundle"),
        (_dotted, "v1.2: a specialist is named by up to 100 letters"),
    ],
)
def test_folders_that_give_no_ensemble_are_one_line(
    make: Callable[[Path, Path], None] | None,
    message: str,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    if make is not None:
        make(folder, runs)
    assert main(["export-ensemble", str(folder), "--out", str(out)]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert str(folder) in line
    assert not (out / "ensemble.json").exists()


def test_numbers_of_another_kind_are_warned_of(
    studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stored integers where the sensor has decibels, as floats where it has integers; the map is made all the same."""
    import rasterio

    values = np.ones((4, 8, 8), np.int16)
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(6e5, 5e6, 10, 10)}
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", count=4, height=8, width=8, dtype="int16", **place
    ) as file:
        file.write(values)
    model = str(studied / "out" / "models" / "scenes-tiny-frozen-linear-default-0")
    command = ["predict", str(tmp_path / "scene.tif"), "--model", model, "--out", str(tmp_path / "classes.tif")]
    assert main([*command, "--bands", "1", "2", "3", "4"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ssl-eo: warning: {tmp_path / 'scene.tif'} holds int16, and {SENSOR} is stored as float32")
    scene(tmp_path / "right.tif")
    command[1] = str(tmp_path / "right.tif")
    assert main([*command, "--overwrite", "--bands", "4", "3", "2", "1"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([612, 201, 13, 70, 60, 17, 7, 0, 20], "a 61.2 %, b 20.1 %, d 7.0 %, e 6.0 %, f 1.7 %, 2 more; no data 2.0 %"),
        ([0, 0, 8, 0, 0, 0, 0, 0, 0], "c 100 %; no data 0 %"),
        ([0, 0, 0, 0, 0, 0, 0, 0, 9], "no class; no data 100 %"),
        ([1, 0, 10**6, 0, 0, 0, 0, 0, 1], "c 99.9 %, a 0.1 %; no data 0.1 %"),  # neither all nor none
    ],
)
def test_what_a_map_holds_is_told(counts: list[int], expected: str) -> None:
    assert _shares("abcdefgh", counts) == expected


def test_a_scene_that_does_not_name_its_bands(
    studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error has the model's bands in order, and what to give."""
    import rasterio

    path = tmp_path / "scene.tif"
    with rasterio.open(path, "w", driver="GTiff", count=5, height=8, width=8, dtype="float32") as file:
        file.write(np.ones((5, 8, 8), np.float32))
    model = studied / "out" / "models" / "scenes-tiny-frozen-linear-default-0"
    bands = load_model(model).input.bands
    command = ["predict", str(path), "--model", str(model), "--out", str(tmp_path / "o.tif")]
    takes = f"; the model takes {' '.join(bands)}: --bands 1 2 3 4 if the file has them in this order"
    for given, first in (([], bands[0]), (["--bands", "red", "green", "blue", "nir"], "red")):
        assert main([*command, *given]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
        assert line.startswith(f"ssl-eo: {path} holds 5 bands and does not name them, so none is '{first}': give")
        assert line.endswith(takes)


def test_a_model_of_images_makes_no_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = EncoderBackbone(encoder(), [0.34, 1.0])
    of_images = opened_task("classification", n=4)
    model = TaskModel(backbone, build_decoder("identity", {}, backbone.shape, of_images.n_classes))
    save_model(tmp_path / "model", model, of_images, {"decoder": "identity", "options": {}, "taps": [0.34, 1.0]})
    scene(tmp_path / "scene.tif")
    command = ["predict", str(tmp_path / "scene.tif"), "--model", f"{tmp_path}/model", "--out", f"{tmp_path}/o.tif"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"ssl-eo: --model: {tmp_path}/model was trained on classification, and a map needs segmentation; in Python it"
        f" takes images: ssl_eo.adapt.saved.load_model('{tmp_path}/model').logits(images)\n"
    )


@pytest.mark.parametrize(
    ("name", "status", "last"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 75, "stopped on request; the same command goes on"),
    ],
)
def test_whoever_stops_a_map_is_told_what_is_kept(
    name: signal.Signals,
    status: int,
    last: str,
    studied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the first panel nothing, in the second one the first, with which the same command goes on."""
    monkeypatch.setattr("ssl_eo.adapt.tiling._PANEL_PX", 32)
    scene(tmp_path / "scene.tif")
    model, out = studied / "out" / "models" / "scenes-tiny-frozen-linear-default-0", tmp_path / "o.tif"
    command = ["predict", str(tmp_path / "scene.tif"), "--model", str(model), "--out", str(out), "--window", "16"]
    command += ["--overlap", "0", "--bands", *load_model(model).input.bands, "--batch-size", "1"]
    looked = SavedModel.logits
    for n_windows, kept in (
        (9, "no panel of 4 is finished, so the same command begins with the first"),
        (10, f"1 of 4 panels are kept in {out}.panels; the same command goes on"),
    ):
        seen: list[int] = []

        def stopped(
            saved: SavedModel, images: torch.Tensor, n: int = n_windows, seen: list[int] = seen
        ) -> torch.Tensor:
            seen.append(len(images))
            if len(seen) == n:
                os.kill(os.getpid(), name)
            return looked(saved, images)

        with monkeypatch.context() as patch:
            patch.setattr(SavedModel, "logits", stopped)
            assert main(command) == status
        assert capsys.readouterr().err.splitlines() == [f"ssl-eo: {kept}", f"ssl-eo: {last}"]
        assert not out.exists()
    assert main(command) == 0
    assert out.exists()
