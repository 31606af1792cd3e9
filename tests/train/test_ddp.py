"""Two gloo ranks equal one process, and a run started on two ranks goes on on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import ROOT, command, finish, read_checkpoint, records, start, train

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
SHORT = (
    "optim.warmup_steps=2",
    "optim.clip_grad_norm=0.5",
    "checkpoint.every_n_steps=5",
    "log.every_n_steps=1",
    "log.keys=true",
    "train.global_batch_size=16",
    "train.total_steps=10",
    "objective.ema_momentum=0.9",
)

# Gradients are summed in another order, and AdamW divides by their size: float32 rounding (6e-8) grows over ten steps.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-5}


def _final(out_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out_dir / "debug_mae" / "checkpoints" / "step_00000010")


def _keys_by_step(out_dir: Path) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for r in records(out_dir / "debug_mae" / "keys.jsonl"):
        found.setdefault(r["step"], set()).update(r["keys"])
    return found


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("single")
    status, output = train(DEBUG, out_dir, *SHORT)
    assert status == 0, output
    return out_dir


def _assert_close(single: Path, other: Path) -> None:
    expected, found = _final(single), _final(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if name.startswith("objective."):
            torch.testing.assert_close(found[name], value, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    losses = [[r["loss"] for r in records(d / "debug_mae" / "metrics.jsonl")] for d in (single, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_ranks_equal_one_process(single: Path, tmp_path: Path) -> None:
    status, output = train(DEBUG, tmp_path, *SHORT, n_ranks=2)
    assert status == 0, output
    _assert_close(single, tmp_path)
    assert _keys_by_step(tmp_path) == _keys_by_step(single)


def test_from_two_ranks_to_one(single: Path, tmp_path: Path) -> None:
    status, output = train(DEBUG, tmp_path, *SHORT, "train.time_limit_s=0.0", n_ranks=2)
    assert status != 0, output
    stopped = records(tmp_path / "debug_mae" / "metrics.jsonl")[-1]["step"]
    assert 0 < stopped < 10
    status, output = train(DEBUG, tmp_path, *SHORT)
    assert status == 0, output
    _assert_close(single, tmp_path)


def test_an_error_on_one_rank_ends_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    fall = ("objective.name=toys.stumbling", "objective.falls_at=4", "checkpoint.every_n_steps=3")
    process = start(command(DEBUG, tmp_path, *SHORT, *fall), n_ranks=2)
    status, output = finish(process, timeout_s=120)
    assert status == 1, output
    assert "ssl-eo: rank 1 fell" in output
    assert [p.name for p in (tmp_path / "debug_mae" / "checkpoints").iterdir()] == ["step_00000003"]


def test_accumulated_micro_batches_equal_one_batch(single: Path, tmp_path: Path) -> None:
    status, output = train(DEBUG, tmp_path, *SHORT, "train.accumulate=2")
    assert status == 0, output
    _assert_close(single, tmp_path)
