"""The run directory: one config, logs without steps that come again, facts of the machine, pictures of any sensor."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT
from PIL import Image
from torch import nn

from ssl_eo.config import Config, load, to_dict
from ssl_eo.data.types import TileSchema
from ssl_eo.distributed import World
from ssl_eo.sensors import load_sensor
from ssl_eo.train import run_dir
from ssl_eo.train.checkpoint import CheckpointConfig, Checkpointer

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def _config(out_dir: Path, *overrides: str) -> Config:
    return load(ROOT / "configs" / "debug" / "mae.yaml", [f"run.out_dir={out_dir}", *overrides])


def _schema(sensor_name: str, n_bands: int | None = None) -> TileSchema:
    sensor = load_sensor(sensor_name)
    bands = sensor.band_names[:n_bands]
    return TileSchema(sensor, bands, sensor.dtype, (32, 32), 10.0, (0.0,) * len(bands), (1.0,) * len(bands))


SCHEMAS = [{"sentinel2_l2a": _schema("sentinel2_l2a")}, {"rgb": _schema("rgb"), "dem": _schema("dem")}]


def _start(out_dir: Path, *overrides: str) -> Config:
    """A run directory as a run leaves it, with a checkpoint."""
    config = _config(out_dir, *overrides)
    with run_dir.claim(config.run_dir, config):
        run_dir.describe(config, SCHEMAS, WORLD, step=0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        Checkpointer(CheckpointConfig(), config.run_dir, model, optimizer).save(3, {})
    return config


# --- logs after a resume ----------------------------------------------------------------------------------------------

# Whether a record of step 20 says that 20 steps were finished; else it is of the next step, counted from 0.
LOGS = [("metrics", True), ("eval", True), ("keys", True), ("quarantine", False), ("skipped", False)]


@pytest.mark.parametrize(("name", "finished"), LOGS)
def test_records_of_steps_that_come_again_are_dropped(tmp_path: Path, name: str, finished: bool) -> None:
    config = _config(tmp_path)
    config.run_dir.mkdir()
    lines = [json.dumps({"step": step, "value": value}) + "\n" for step, value in [(10, 1), (20, 2), (30, 3), (20, 4)]]
    path = config.run_dir / f"{name}.jsonl"
    path.write_text("".join(lines))
    run_dir.describe(config, SCHEMAS, WORLD, step=20)
    assert path.read_text() == "".join([lines[0], lines[1], lines[3]] if finished else lines[:1])
    run_dir.describe(config, SCHEMAS, WORLD, step=0)
    assert path.read_text() == ""


@pytest.mark.parametrize("broken", ['{"step": 20, "lo', '{"step": 20}{', "\x00\x00\x00", '"step"', "[1]", "7", "é\\"])
def test_a_broken_last_line_is_dropped(tmp_path: Path, broken: str) -> None:
    config = _config(tmp_path)
    config.run_dir.mkdir()
    path = config.run_dir / "metrics.jsonl"
    path.write_text('{"step": 10}\n' + broken)
    run_dir.describe(config, SCHEMAS, WORLD, step=20)
    assert path.read_text() == '{"step": 10}\n'


def test_a_whole_last_line_without_its_end_is_completed(tmp_path: Path) -> None:
    config = _config(tmp_path)
    config.run_dir.mkdir()
    path = config.run_dir / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}')
    run_dir.describe(config, SCHEMAS, WORLD, step=20)
    assert path.read_text() == '{"step": 10}\n{"step": 20}\n'


def test_skipped_steps_are_appended(tmp_path: Path) -> None:
    run_dir.record_skipped(tmp_path, 7, 0, ["a", "b"])
    run_dir.record_skipped(tmp_path, 7, 1, ["c"])
    assert [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [
        {"step": 7, "rank": 0, "keys": ["a", "b"]},
        {"step": 7, "rank": 1, "keys": ["c"]},
    ]


# --- config -----------------------------------------------------------------------------------------------------------


def test_keys_that_may_change_do(tmp_path: Path) -> None:
    config = _start(tmp_path)
    moved = tmp_path / "moved"
    moved.mkdir()
    config.run_dir.rename(moved / config.run.name)
    changed = _config(moved, "log.every_n_steps=7", "data.n_workers=3", "checkpoint.keep=5")
    with run_dir.claim(changed.run_dir, changed):
        run_dir.describe(changed, SCHEMAS, WORLD, step=3)
    assert load(changed.run_dir / "config.yaml") == changed


def test_keys_that_training_depends_on_are_listed(tmp_path: Path) -> None:
    _start(tmp_path)
    changed = _config(
        tmp_path, "optim.betas=[0.8,0.9]", "train.total_steps=300", "data.n_workers=3", "data.sources.0.seed=4"
    )
    with pytest.raises(ValueError, match="holds a run of another config") as caught, _claim(changed):
        pass
    assert str(caught.value).endswith(
        " (saved -> now): data.sources[0].seed: 0 -> 4; optim.betas: [0.9, 0.95] -> [0.8, 0.9];"
        " train.total_steps: 200 -> 300. Put the keys back to go on with it, or set another run.name"
    )


def _claim(config: Config) -> Any:
    return run_dir.claim(config.run_dir, config)


def test_run_without_a_checkpoint_may_start_with_another_config(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with _claim(config):
        run_dir.describe(config, SCHEMAS, WORLD, step=0)
    with _claim(_config(tmp_path, "optim.lr=0.5")):
        pass


def test_directory_is_free_again_after_a_refusal(tmp_path: Path) -> None:
    config = _start(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"optim\.lr"), _claim(_config(tmp_path, "optim.lr=0.5")):
            pass
    with _claim(config), pytest.raises(ValueError, match="is in use by another process"), _claim(config):
        pass


# --- facts ------------------------------------------------------------------------------------------------------------


def test_config_and_schemas_read_back_the_same(tmp_path: Path) -> None:
    config = _config(tmp_path)
    config.run_dir.mkdir()
    run_dir.describe(config, SCHEMAS, WORLD, step=0)
    assert to_dict(load(config.run_dir / "config.yaml")) == to_dict(config)
    assert run_dir.read_schemas(config.run_dir) == SCHEMAS


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path)
    config.run_dir.mkdir()
    monkeypatch.setattr("sys.argv", ["ssl-eo", "train", "optim.lr=0.5"])
    monkeypatch.chdir(tmp_path)  # the commit is that of the package, wherever it is run
    run_dir.describe(config, SCHEMAS, replace(WORLD, size=4), step=0)
    facts = run_dir.read_environment(config.run_dir)
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["world_size"] == 4
    assert facts["n_threads"] == torch.get_num_threads()
    assert facts["command"] == ["ssl-eo", "train", "optim.lr=0.5"]
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0:
        assert facts["commit"].rstrip("+") == git.stdout.strip()
    else:
        assert facts["commit"] is None


# --- pictures ---------------------------------------------------------------------------------------------------------


def _picture(path: Path, schema: TileSchema, band_values: Callable[[str], float]) -> np.ndarray[Any, Any]:
    """The panel of two 32 x 32 pictures: each band a ramp of its own height from left to right, over a second row."""
    ramp = torch.linspace(0, 1, 32).expand(2, 1, 32, 32)
    pixels = torch.cat([ramp * band_values(name) for name in schema.bands], 1)
    hidden = pixels.clone()
    hidden[..., :16] = torch.nan
    run_dir.save_pictures(path, 40, {"input": pixels, "visible": hidden}, schema)
    (file,) = (path / "pictures").iterdir()
    assert file.name == "step_00000040.png"
    return np.asarray(Image.open(file))


@pytest.mark.parametrize(
    ("schema", "red_green_blue"),
    [
        (_schema("dem"), [0, 0, 0]),
        (_schema("sentinel1_grd", 2), [0, 0, 0]),
        (_schema("rgb"), [0, 1, 2]),
        (_schema("sentinel2_l2a"), [3, 2, 1]),
        (_schema("sentinel2_l2a", 3), [0, 1, 2]),  # no red among them: the bands as they come
    ],
    ids=["1 band", "2 bands", "3 bands", "12 bands", "3 of 12 bands"],
)
def test_pictures_of_any_number_of_bands(tmp_path: Path, schema: TileSchema, red_green_blue: list[int]) -> None:
    n = len(schema.bands)
    schema = replace(schema, mean=tuple(0.1 * i for i in range(n)), std=tuple(1 + 0.2 * i for i in range(n)))
    panel = _picture(tmp_path, schema, lambda name: 1 + schema.bands.index(name))
    zoom, header, gap = 4, 24, 4
    side = 32 * zoom
    assert panel.shape == (2 * (side + header), 2 * side + gap, 4)
    first, second = panel[header : header + side, :side], panel[2 * header + side :, :side]
    brightest = first[0, -1, :3].astype(float)  # where each ramp ends
    ramps = np.outer([1.0 + band for band in red_green_blue], np.linspace(0, 1, 32))  # [3, W]
    if schema.sensor.true_color is not None and set(schema.sensor.true_color) <= set(schema.bands):
        mean, std = (np.array([values[i] for i in red_green_blue])[:, None] for values in (schema.mean, schema.std))
        ramps = ramps * std + mean  # true colour is that of stored values
    black, white = np.percentile(np.repeat(ramps, 32), [2, 98])
    np.testing.assert_allclose(brightest / 255, np.clip((ramps[:, -1] - black) / (white - black), 0, 1), atol=0.002)
    assert (second[:, : side // 2, :3] == 128).all()  # hidden is grey
    np.testing.assert_array_equal(second[:, side // 2 :], first[:, side // 2 :])
