"""`launch/torchrun.sh` with real processes: its exit status, signals, restarts, and the same bits after each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from launching import ROOT, assert_same_bits, finish, read_checkpoint, records

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
N_STEPS, WAITS_AT = 14, 6
SHORT = (
    f"train.total_steps={N_STEPS}",
    "train.global_batch_size=8",
    "optim.warmup_steps=2",
    "checkpoint.every_n_steps=4",
    "log.every_n_steps=1",
    "log.report=false",
)


def _start(arguments: Sequence[str], n_ranks: int) -> subprocess.Popen[str]:
    environ = {
        **os.environ,
        "NPROC": str(n_ranks),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    return subprocess.Popen(
        [str(ROOT / "launch" / "torchrun.sh"), *arguments],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _command(out_dir: Path, *overrides: str) -> list[str]:
    return ["--config", DEBUG, f"run.out_dir={out_dir}", *SHORT, *overrides]


def _run(arguments: Sequence[str], n_ranks: int = 2) -> tuple[int, str]:
    return finish(_start(arguments, n_ranks))


def _final(out_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out_dir / "debug_mae" / "checkpoints" / f"step_{N_STEPS:08d}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("undisturbed")
    status, output = _run(_command(out_dir))
    assert status == 0, output
    return out_dir


def test_a_signal_is_passed_on_and_the_run_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    waiting = ("objective.name=toys.waiting", f"objective.waits_at={WAITS_AT}", f"objective.mark={tmp_path}/mark")
    process = _start(_command(tmp_path, *waiting), 2)
    limit = time.monotonic() + 120
    while len(list(tmp_path.glob("mark.*"))) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 75, output
    assert "stopped on request after step" in output
    assert "Traceback" not in output
    status, output = _run(_command(tmp_path, *waiting))
    assert status == 0, output
    assert "going on after step" in output
    assert_same_bits(_final(undisturbed), _final(tmp_path))


def test_a_killed_rank_starts_again_with_the_others(undisturbed: Path, tmp_path: Path) -> None:
    dying = ("objective.name=toys.waiting", "objective.dies_at=6", f"objective.mark={tmp_path}/mark")
    status, output = _run(["--max-restarts=1", "--", *_command(tmp_path, *dying)])
    assert status == 0, output
    assert "going on after step 4" in output
    assert_same_bits(_final(undisturbed), _final(tmp_path))
    assert [r["step"] for r in records(tmp_path / "debug_mae" / "metrics.jsonl")] == list(range(1, N_STEPS + 1))


def test_restarts_come_to_an_end(tmp_path: Path) -> None:
    """Options before `--` are those of torchrun."""
    dying = ("objective.name=toys.waiting", "objective.dies_at=2", f"objective.mark={tmp_path}/mark")
    status, output = _run(["--max-restarts=0", "--", *_command(tmp_path, *dying)])
    assert status == 1, output
    assert "going on" not in output


def test_a_wrong_config_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    status, output = _run(_command(tmp_path, "optim.lr=-1"), n_ranks=1)
    assert status == 2, output
    assert output.count("ssl-eo: ") == 1


def test_a_signal_before_there_is_anything_to_save(tmp_path: Path) -> None:
    """It waits until a process would notice: one that is still starting would be killed, and started again."""
    process = _start(_command(tmp_path), 1)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    status, output = finish(process)
    assert status == 75, output
    assert "stopped on request before training began" in output
    assert not list(tmp_path.iterdir())
