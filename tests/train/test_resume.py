"""Resumed equals uninterrupted, to the bit: after kill -9, after SIGTERM, on another number of workers."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT, assert_same_bits, command, finish, read_checkpoint, records, start, train, wait_for

from ssl_eo.cli import main

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
SHORT = (
    "train.total_steps=20",
    "optim.warmup_steps=4",
    "checkpoint.every_n_steps=10",
    "log.every_n_steps=1",
    "log.keys=true",
    "train.global_batch_size=16",
)

# Of every debug config but that of `mae`: what of its state is beside the student's weights.
STATE_OF = {
    "mae_temporal": (),
    "dinov2": (r"^objective\.center$", r"^objective\.ibot_center$", r"^objective\.teacher\."),
    "simclr": (),
    "moco": (r"^objective\.queue$", r"^objective\.teacher\."),
    "moco_v3": (r"^objective\.teacher\.",),
    "byol": (r"^objective\.teacher\.",),
    "multimae": (r"balance\.",),
    "croma": (r"logit_scale$",),
    "dofa": (r"^objective\.teacher\.",),
}

# Settings under which more of it is to be kept than in the debug config.
ALSO = {"multimae": ("objective.balancing=uncertainty",)}


def test_no_objective_is_left_out() -> None:
    variants = {"mae", "dino", "panopticon"}  # dino and panopticon are settings of dinov2
    assert {path.stem for path in (ROOT / "configs" / "debug").glob("*.yaml")} == STATE_OF.keys() | variants


def _final(out_dir: Path, name: str = "debug_mae") -> dict[str, torch.Tensor]:
    return read_checkpoint(out_dir / name / "checkpoints" / "step_00000020")


def _keys(out_dir: Path, name: str = "debug_mae") -> list[tuple[int, list[str]]]:
    return [(r["step"], r["keys"]) for r in records(out_dir / name / "keys.jsonl")]


def _losses(out_dir: Path, name: str = "debug_mae") -> list[float]:
    return [r["loss"] for r in records(out_dir / name / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("uninterrupted")
    assert _train(DEBUG, out_dir) == 0
    return out_dir


def _train(config: str, out_dir: Path, *overrides: str) -> int:
    """In this process, which is quicker than in one of its own."""
    return main(command(config, out_dir, *SHORT, *overrides)[2:])


def _kill_9_after_step(step: int, config: str, out_dir: Path, name: str, *overrides: str) -> None:
    """A training in a fork of this process, which is quicker than a new one."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(config, out_dir, *overrides))
    process.start()
    limit = time.monotonic() + 120
    while not any(r["step"] >= step for r in records(out_dir / name / "metrics.jsonl")):
        assert process.is_alive(), "ended early"
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _train_killed_after_step(step: int, out_dir: Path, *overrides: str, how: int = signal.SIGKILL) -> tuple[int, str]:
    process = start(command(DEBUG, out_dir, *SHORT, *overrides))
    metrics = out_dir / "debug_mae" / "metrics.jsonl"
    wait_for(lambda: any(r["step"] >= step for r in records(metrics)), process)
    os.kill(process.pid, how)
    return finish(process)


def test_kill_9_then_the_same_command_gives_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    status, _ = _train_killed_after_step(12, tmp_path)
    assert status == -signal.SIGKILL
    status, output = train(DEBUG, tmp_path, *SHORT)
    assert status == 0, output
    assert_same_bits(_final(uninterrupted), _final(tmp_path))
    assert _keys(tmp_path) == _keys(uninterrupted)
    assert _losses(tmp_path) == _losses(uninterrupted)


@pytest.mark.parametrize("kind", STATE_OF)
def test_kill_9_in_every_objective(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Teachers, queues, centers, learned weights and the ratios of masks go on as well."""
    config, name = str(ROOT / "configs" / "debug" / f"{kind}.yaml"), f"debug_{kind}"
    whole, killed, also = tmp_path / "whole", tmp_path / "killed", ("train.global_batch_size=8", *ALSO.get(kind, ()))
    assert _train(config, whole, *also) == 0
    _kill_9_after_step(12, config, killed, name, *also)
    capfd.readouterr()
    assert _train(config, killed, *also) == 0
    assert "going on after step 10" in capfd.readouterr().err
    final = _final(whole, name)
    assert all(any(re.search(pattern, key) for key in final) for pattern in STATE_OF[kind])
    assert_same_bits(final, _final(killed, name))
    assert _keys(killed, name) == _keys(whole, name)
    assert _losses(killed, name) == _losses(whole, name)


def test_kill_9_on_real_data_with_two_workers(real_samples: Callable[[str], Path], tmp_path: Path) -> None:
    """EuroSAT JPEGs from WebDataset tars: 20 steps equal 10, a kill, and 10, in weights, optimiser and keys seen."""
    recipe, root = "pretrain/mae_vitmicro4_eurosat", f"data.sources[0].root={real_samples('eurosat_rgb')}"
    also = ("data.n_workers=2", "eval.every_n_steps=0", "train.precision=float32", "run.name=debug_mae", root)
    assert _train(recipe, tmp_path / "whole", *also) == 0
    _kill_9_after_step(12, recipe, tmp_path / "killed", "debug_mae", *also)
    assert _train(recipe, tmp_path / "killed", *also) == 0
    assert_same_bits(_final(tmp_path / "whole"), _final(tmp_path / "killed"))
    assert _keys(tmp_path / "killed") == _keys(tmp_path / "whole")
    assert len({key for _, keys in _keys(tmp_path / "whole") for key in keys}) == 20 * 16


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_checkpoints_and_exits_75(
    uninterrupted: Path, tmp_path: Path, how: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    status, output = _train_killed_after_step(4, tmp_path, how=how)
    assert status == 75, output
    assert "stopped on request after step" in output
    assert not (tmp_path / "debug_mae" / "checkpoints" / "step_00000010").exists()
    assert _train(DEBUG, tmp_path) == 0
    assert "going on after step" in capfd.readouterr().err
    assert_same_bits(_final(uninterrupted), _final(tmp_path))


def test_killed_before_the_first_checkpoint_leaves_no_trace(tmp_path: Path) -> None:
    """What was measured before training is measured again, and stands in the log once."""
    split = "{name: synthetic, sensors: [sentinel2_l2a], extent_m: 320.0, n_samples: 40, split: %s}"
    task = f"{{name: tiny, train: {split % 'train'}, test: {split % 'test'}, max_train: 40, max_test: 20}}"
    evaluation = ("eval.every_n_steps=100", f"eval.tasks=[{task}]")
    status, _ = _train_killed_after_step(2, tmp_path, *evaluation)
    assert status == -signal.SIGKILL
    assert _train(DEBUG, tmp_path, *evaluation) == 0
    lines = [
        (r["step"], r["features"], r["kind"], r.get("probe")) for r in records(tmp_path / "debug_mae" / "eval.jsonl")
    ]
    assert len(lines) == len(set(lines))
    steps = [r["step"] for r in records(tmp_path / "debug_mae" / "metrics.jsonl")]
    assert steps == list(range(21))


def test_workers_evaluation_and_asynchronous_saves_leave_the_bits_alone(uninterrupted: Path, tmp_path: Path) -> None:
    split = "{name: synthetic, sensors: [sentinel2_l2a], extent_m: 320.0, n_samples: 60, split: %s}"
    task = f"{{name: tiny, train: {split % 'train'}, test: {split % 'test'}, max_train: 60, max_test: 30}}"
    evaluation = ("eval.every_n_steps=5", f"eval.tasks=[{task}]")
    assert _train(DEBUG, tmp_path, "data.n_workers=3", "checkpoint.asynchronous=true", *evaluation) == 0
    results = records(tmp_path / "debug_mae" / "eval.jsonl")
    assert {r["step"] for r in results if r["kind"] == "probe"} == {0, 5, 10, 15, 20}
    assert_same_bits(_final(uninterrupted), _final(tmp_path))


def test_finished_run_has_nothing_to_do(uninterrupted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _train(DEBUG, uninterrupted) == 0
    assert "has finished its 20 steps" in "".join(capfd.readouterr())
