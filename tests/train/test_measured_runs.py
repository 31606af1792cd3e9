"""Runs that are measured while they train: the same bits, the same figures on any number of ranks, collapses seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, assert_same_bits, command, read_checkpoint, records, train

from ssl_eo.cli import main
from ssl_eo.cluster import EXIT_DONE, EXIT_RESUMABLE

OnRanks = Callable[..., list[Any]]

DEBUG = ROOT / "configs" / "debug"
SHORT = (
    *("optim.warmup_steps=2", "train.total_steps=8", "checkpoint.every_n_steps=4", "train.global_batch_size=16"),
    *("log.every_n_steps=1", "data.n_workers=0"),
)
HEALTH = ("eval.health_every_n_steps=3", "eval.health_samples=21", "eval.taps=[0.5,1.0]", "eval.batch_size=8")


def _health(out_dir: Path, name: str = "debug_mae") -> list[dict[str, Any]]:
    """Without the time it took."""
    found = records(out_dir / name / "eval.jsonl")
    return [{k: v for k, v in r.items() if k != "seconds"} for r in found]


def _train(out_dir: Path, *overrides: str, recipe: str = "mae") -> int:
    return main(command(str(DEBUG / f"{recipe}.yaml"), out_dir, *overrides)[2:])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("measured")
    assert _train(out_dir, *SHORT, *HEALTH) == EXIT_DONE
    return out_dir


def _assert_same_training(a: Path, b: Path) -> None:
    checkpoints = [read_checkpoint(d / "debug_mae" / "checkpoints" / "step_00000008") for d in (a, b)]
    assert_same_bits(*checkpoints)
    losses = [[r["loss"] for r in records(d / "debug_mae" / "metrics.jsonl") if "loss" in r] for d in (a, b)]
    assert losses[0] == losses[1]


def test_health_is_measured_and_changes_no_bit(measured: Path, tmp_path: Path) -> None:
    assert _train(tmp_path, *SHORT) == EXIT_DONE
    _assert_same_training(measured, tmp_path)
    found = _health(measured)
    assert [(r["step"], r["tap"]) for r in found] == [(s, t) for s in (0, 3, 6, 8) for t in ("depth_0.50", "last")]
    assert {r["kind"] for r in found} == {"health"}
    logged = {r["step"]: r for r in records(measured / "debug_mae" / "metrics.jsonl")}
    for r in found:
        assert logged[r["step"]][f"health/synthetic/{r['tap']}/effective_rank"] == r["effective_rank"]
    assert 0 < logged[8]["eval_time_ratio"] < 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks(measured: Path, tmp_path: Path, on_ranks: OnRanks, strategy: str) -> None:
    """21 samples: one rank has one fewer, and makes as many forward passes."""
    on_two = (*SHORT, f"parallel.strategy={strategy}")
    assert on_ranks(2, _train, tmp_path / "with", *on_two, *HEALTH) == [EXIT_DONE] * 2
    assert on_ranks(2, _train, tmp_path / "without", *on_two) == [EXIT_DONE] * 2
    _assert_same_training(tmp_path / "with", tmp_path / "without")
    found, expected = _health(tmp_path / "with"), _health(measured)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        numbers = [{k: v for k, v in r.items() if isinstance(v, float)} for r in (a, b)]
        assert {k: v for k, v in a.items() if k not in numbers[0]} == {
            k: v for k, v in b.items() if k not in numbers[1]
        }
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-2 if a["step"] else 1e-4)


def test_a_run_that_goes_on_measures_the_same(measured: Path, tmp_path: Path) -> None:
    for limit, status in (("0.0", EXIT_RESUMABLE), ("null", EXIT_DONE)):
        assert _train(tmp_path, *SHORT, *HEALTH, f"train.time_limit_s={limit}") == status
    _assert_same_training(measured, tmp_path)
    assert _health(tmp_path) == _health(measured)


def test_two_ranks_put_off_what_takes_too_long(tmp_path: Path) -> None:
    overrides = (*SHORT, *HEALTH, "eval.max_time_ratio=0.001")
    status, output = train(str(DEBUG / "mae.yaml"), tmp_path, *overrides, n_ranks=2)
    assert status == EXIT_DONE, output
    found = _health(tmp_path)
    assert [(r["step"], r["kind"]) for r in found] == [(0, "health")] * 2 + [(3, "skipped")] + [(8, "health")] * 2
    assert found[2]["what"] == "health"
    assert output.count("step 3: health put off") == 1


SIXTY = ("train.total_steps=60", "data.n_workers=0", "eval.health_every_n_steps=20", "eval.health_samples=64")
# Nothing is left that keeps BYOL from giving all images one answer.
UNHELD = (
    *("objective.momentum=0.0", "objective.end_momentum=0.0", "objective.head_norm=none"),
    'optim.lr_multipliers={"^predictor": 0.0}',
)


@pytest.mark.parametrize("recipe", ["byol", "dinov2", "simclr"])
def test_a_healthy_run_is_not_warned_of(tmp_path: Path, recipe: str, caplog: pytest.LogCaptureFixture) -> None:
    assert _train(tmp_path, *SIXTY, recipe=recipe) == EXIT_DONE
    found = _health(tmp_path, f"debug_{recipe}")
    assert [r["step"] for r in found] == [0, 20, 40, 60]
    assert [r["collapsed"] for r in found] == [[]] * 4
    assert "nearly" not in caplog.text


def test_a_run_that_collapses_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _train(tmp_path, *SIXTY, *UNHELD, recipe="byol") == EXIT_DONE
    found = _health(tmp_path, "debug_byol")
    assert [r["collapsed"] for r in found] == [[], [], *[["are nearly one point"]] * 2]
    assert caplog.text.count("features of synthetic at last are nearly one point (spread_ratio 0.0") == 1
