"""Two gloo ranks equal one process, and a run started on two ranks goes on on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, command, finish, read_checkpoint, records, start, train

from ssl_eo.cli import main
from ssl_eo.cluster import EXIT_RESUMABLE

OnRanks = Callable[..., list[Any]]

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
STEPS = (
    "optim.warmup_steps=2",
    "optim.clip_grad_norm=0.5",
    "checkpoint.every_n_steps=5",
    "log.every_n_steps=1",
    "log.keys=true",
    "train.total_steps=10",
)
SHORT = (*STEPS, "train.global_batch_size=16", "objective.ema_momentum=0.9")
# Eight ratios over the eight samples of a batch: the second rank hides more patches than the first.
DISTILLATION = (*STEPS, "train.global_batch_size=8", "objective.koleo_over_ranks=true")

# Gradients are summed in another order, and AdamW divides by their size: float32 rounding (6e-8) grows over ten steps.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-5}


def _train(config: str, out_dir: Path, *overrides: str) -> int:
    return main(command(config, out_dir, *overrides)[2:])


def _final(out_dir: Path, name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(out_dir / name / "checkpoints" / "step_00000010")


def _keys_by_step(out_dir: Path, name: str = "debug_mae") -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for r in records(out_dir / name / "keys.jsonl"):
        found.setdefault(r["step"], set()).update(r["keys"])
    return found


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("single")
    status, output = train(DEBUG, out_dir, *SHORT)
    assert status == 0, output
    return out_dir


def _assert_close(single: Path, other: Path, name: str = "debug_mae") -> None:
    expected, found = _final(single, name), _final(other, name)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if key.startswith("objective."):
            torch.testing.assert_close(found[key], value, **TOLERANCE, msg=lambda m, n=key: f"{n}: {m}")
    losses = [[r["loss"] for r in records(d / name / "metrics.jsonl")] for d in (single, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_ranks_equal_one_process(single: Path, tmp_path: Path) -> None:
    status, output = train(DEBUG, tmp_path, *SHORT, n_ranks=2)
    assert status == 0, output
    _assert_close(single, tmp_path)
    assert _keys_by_step(tmp_path) == _keys_by_step(single)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_two_ranks_equal_one_process_in_self_distillation(tmp_path: Path, on_ranks: OnRanks, centering: str) -> None:
    """Targets, centers and neighbours are those of the samples of all ranks, which hide other numbers of patches."""
    config, name = str(ROOT / "configs" / "debug" / "dinov2.yaml"), "debug_dinov2"
    for n_ranks in (1, 2):
        overrides = (*DISTILLATION, f"objective.centering={centering}")
        assert on_ranks(n_ranks, _train, config, tmp_path / str(n_ranks), *overrides) == [0] * n_ranks
    _assert_close(tmp_path / "1", tmp_path / "2", name)
    assert _keys_by_step(tmp_path / "1", name) == _keys_by_step(tmp_path / "2", name)


def test_from_two_ranks_to_one(single: Path, tmp_path: Path, on_ranks: OnRanks) -> None:
    assert on_ranks(2, _train, DEBUG, tmp_path, *SHORT, "train.time_limit_s=0.0") == [EXIT_RESUMABLE] * 2
    stopped = records(tmp_path / "debug_mae" / "metrics.jsonl")[-1]["step"]
    assert 0 < stopped < 10
    assert on_ranks(1, _train, DEBUG, tmp_path, *SHORT) == [0]
    _assert_close(single, tmp_path)


def test_an_error_on_one_rank_ends_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    fall = ("objective.name=toys.stumbling", "objective.falls_at=4", "checkpoint.every_n_steps=3")
    process = start(command(DEBUG, tmp_path, *SHORT, *fall), n_ranks=2)
    status, output = finish(process, timeout_s=120)
    assert status == 1, output
    assert "ssl-eo: out of luck (rank 1 on" in output
    assert [p.name for p in (tmp_path / "debug_mae" / "checkpoints").iterdir()] == ["step_00000003"]


def test_accumulated_micro_batches_equal_one_batch(single: Path, tmp_path: Path, on_ranks: OnRanks) -> None:
    assert on_ranks(1, _train, DEBUG, tmp_path, *SHORT, "train.accumulate=2") == [0]
    _assert_close(single, tmp_path)
