"""`launch/torchrun.sh` with real processes: its exit status, signals, restarts, and the same bits after each."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from launching import ROOT, assert_same_bits, finish, read_checkpoint, records, wait_for

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
    return _start_process([str(ROOT / "launch" / "torchrun.sh"), *arguments], NPROC=str(n_ranks), PYTHON=sys.executable)


def _start_process(arguments: Sequence[str], **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **environ},
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


def test_two_machines_start_again(undisturbed: Path, tmp_path: Path) -> None:
    """As many agents of torchrun, which keep one store over the restart: ranks must not call those that are dead."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    dying = ("objective.name=toys.waiting", "objective.dies_at=6", f"objective.mark={tmp_path}/mark")
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--max-restarts=1"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting]
    agents = [_start_process([*agent, "-m", "ssl_eo", "train", *_command(tmp_path, *dying)]) for _ in range(2)]
    ended = [finish(process) for process in agents]
    output = "".join(text for _, text in ended)
    assert [status for status, _ in ended] == [0, 0], output
    assert "going on after step 4" in output
    assert_same_bits(_final(undisturbed), _final(tmp_path))


def test_restarts_come_to_an_end(tmp_path: Path) -> None:
    """Options before `--` are those of torchrun."""
    dying = ("objective.name=toys.waiting", "objective.dies_at=2", f"objective.mark={tmp_path}/mark")
    status, output = _run(["--max-restarts=0", "--", *_command(tmp_path, *dying)])
    assert status == 1, output
    assert "going on" not in output


def test_a_wrong_config_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    status, output = _run(_command(tmp_path, "optim.lr=-1"), n_ranks=2)
    assert status == 2, output
    assert output.count("ssl-eo: ") == 1


@pytest.mark.parametrize("arguments", [["demo"], ["--confg", "demo"], ["--", "--nothing"]])
def test_wrong_usage_is_said_once_and_not_tried_again(arguments: list[str]) -> None:
    status, output = _run(arguments, n_ranks=1)
    assert status == 2, output
    assert output.count("ssl-eo: ") == 1
    assert "Traceback" not in output


def test_help_and_nothing_at_all() -> None:
    for arguments, expected in (["--help"], 0), ([], 2):
        status, output = _run(arguments)
        assert status == expected
        assert "MAX_RESTARTS" in output


def test_two_dashes_inside_an_argument_are_no_end_of_options(tmp_path: Path) -> None:
    status, output = _run(_command(tmp_path, "optim.lr=-1", "run.name=a -- b"), n_ranks=1)
    assert status == 2, output
    assert "lr must be positive" in output


@pytest.mark.parametrize("name", ["SIGHUP", "SIGKILL"])
def test_the_run_is_saved_where_its_launcher_goes(name: str, undisturbed: Path, tmp_path: Path) -> None:
    """The terminal has gone, or torchrun itself was killed: nobody could stop the run any more."""
    steps = ("train.total_steps=100000", "log.every_n_steps=1")
    process = _start(_command(tmp_path, *steps), 2)
    metrics = tmp_path / "debug_mae" / "metrics.jsonl"
    wait_for(lambda: bool(records(metrics)), process)
    (torchrun,) = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()][:1]
    os.kill(process.pid if name == "SIGHUP" else torchrun, getattr(signal, name))
    status, output = finish(process)
    assert status == (75 if name == "SIGHUP" else 137), output
    limit = time.monotonic() + 60
    while _is_held(tmp_path / "debug_mae") and time.monotonic() < limit:
        time.sleep(0.1)
    assert not _is_held(tmp_path / "debug_mae")
    last = max(r["step"] for r in records(metrics))
    assert (tmp_path / "debug_mae" / "checkpoints" / f"step_{last:08d}" / "complete.json").is_file()


def _is_held(run: Path) -> bool:
    """Whether a process trains in the folder."""
    with (run / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_signal_is_heard_while_the_others_are_awaited(tmp_path: Path) -> None:
    processes = []
    for rank in ("0", "1"):  # of two groups, whose other rank never comes
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        arguments = [sys.executable, "-m", "ssl_eo", "train", *_command(tmp_path / rank)]
        processes.append(_start_process(arguments, RANK=rank, LOCAL_RANK=rank, **meeting))
    time.sleep(10)  # both have come to where they wait
    begun = time.monotonic()
    for process in processes:
        process.terminate()
    for process in processes:
        status, output = finish(process)
        assert time.monotonic() - begun < 10
        assert status == 75, output


def test_a_signal_before_there_is_anything_to_save(tmp_path: Path) -> None:
    """It waits until a process would notice: one that is still starting would be killed, and started again."""
    process = _start(_command(tmp_path), 1)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    status, output = finish(process)
    assert status == 75, output
    assert "stopped on request before training began" in output
    assert not list(tmp_path.iterdir())
