"""What launchers say and are told: variables of torchrun and Slurm, ports, exit statuses, requests to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT, command, finish, start

from ssl_eo import cluster
from ssl_eo.cluster import Launch, read_launch, requeue

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
BATCH_SHELL = {  # what the shell of a job of four nodes sees
    "SLURM_JOB_ID": "1234",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[03-06]",
}
STEP = {
    **BATCH_SHELL,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-06]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def _first(nodes: str) -> str:
    assert nodes == "gpu[03-06]"
    return "gpu03"


# --- reading ----------------------------------------------------------------------------------------------------------


def test_no_launcher() -> None:
    assert read_launch({}) == Launch()
    assert read_launch({"MASTER_ADDR": "node0", "MASTER_PORT": "1"}) == Launch()


def test_torchrun() -> None:
    assert read_launch(TORCHRUN) == Launch("torchrun", 5, 8, 1, "node0", 29400)
    agent = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2"}
    assert read_launch(agent) == Launch("torchrun", 5, 8, 1, "node0", 29400, store_is_served=True)


def test_torchrun_inside_a_step_comes_first() -> None:
    assert read_launch({**STEP, **TORCHRUN}) == Launch("torchrun", 5, 8, 1, "node0", 29400, job="1234")


def test_the_shell_of_a_batch_job_is_one_process() -> None:
    assert read_launch(BATCH_SHELL) == Launch(job="1234")


def test_step() -> None:
    assert read_launch(STEP, _first) == Launch("slurm", 3, 8, 1, "gpu03", 11234, job="1234")


def test_step_that_starts_again_meets_elsewhere() -> None:
    again = read_launch({**STEP, "SLURM_RESTART_COUNT": "1"}, _first)
    assert again.port != read_launch(STEP, _first).port


def test_where_ranks_of_a_step_meet_can_be_set() -> None:
    launch = read_launch({**STEP, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert (launch.address, launch.port) == ("10.0.0.7", 4000)


def test_one_task_meets_nobody() -> None:
    launch = read_launch({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert launch == Launch("slurm", job="1234")


def test_one_node_needs_no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert read_launch({**STEP, "SLURM_STEP_NODELIST": "gpu-a03"}).address == "gpu-a03"
    with pytest.raises(RuntimeError, match=r"'scontrol show hostnames gpu\[03-06\]' cannot be run"):
        read_launch(STEP)


def test_a_job_of_an_array_goes_by_its_index() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "1200", "SLURM_ARRAY_TASK_ID": "7"}
    assert read_launch({**STEP, **array}, _first).job == "1200_7"
    assert read_launch({**BATCH_SHELL, **array}).job == "1200_7"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, r"has RANK and no WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, r"has WORLD_SIZE and no RANK"),
        ({"LOCAL_RANK": "0"}, r"has LOCAL_RANK and no WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, r"has RANK, WORLD_SIZE and no LOCAL_RANK"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, r"and no MASTER_ADDR"),
        ({**TORCHRUN, "RANK": "8"}, r"RANK='8', which must be a whole number from 0 to 7"),
        ({**TORCHRUN, "LOCAL_RANK": "-1"}, r"LOCAL_RANK='-1', which must be"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, r"WORLD_SIZE='0', which must be a whole number from 1 on"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, r"MASTER_PORT='70000', which must be a whole number from 1 to 65535"),
        ({**STEP, "SLURM_PROCID": "8"}, r"SLURM_PROCID='8', which must be a whole number from 0 to 7"),
        ({**STEP, "SLURM_LOCALID": "x"}, r"SLURM_LOCALID='x'"),
        ({**STEP, "MASTER_PORT": "http"}, r"MASTER_PORT='http'"),
        ({**STEP, "SLURM_RESTART_COUNT": "-1"}, r"SLURM_RESTART_COUNT='-1'"),
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, r"and no SLURM_STEP_NODELIST"),
        ({k: v for k, v in STEP.items() if k != "SLURM_JOB_ID"}, r"and no SLURM_JOB_ID"),
    ],
)
def test_half_set_and_wrong_variables_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_launch(environ, _first)


@given(name=st.sampled_from(["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"]), text=st.text(min_size=1))
def test_what_is_no_number_is_refused(name: str, text: str) -> None:
    if text.isascii() and text.isdecimal():
        text += "."
    with pytest.raises(ValueError, match=name):
        read_launch({**TORCHRUN, name: text})


@given(
    size=st.integers(2, 4096),
    job=st.integers(1, 10**8),
    step=st.integers(0, 100),
    n_restarts=st.integers(0, 100),
    data=st.data(),
)
def test_ranks_of_a_step_agree_on_where_they_meet(
    size: int, job: int, step: int, n_restarts: int, data: st.DataObject
) -> None:
    described = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": str(step),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NODELIST": "gpu[03-06]",
        "SLURM_RESTART_COUNT": str(n_restarts),
    }
    rank = data.draw(st.integers(0, size - 1))
    mine = read_launch({**described, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}, _first)
    first = read_launch({**described, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, _first)
    assert (mine.rank, mine.size, mine.address) == (rank, size, "gpu03")
    assert mine.port == first.port
    assert mine.port is not None
    assert 1024 <= mine.port < 32768
    described["SLURM_JOB_ID"] = str(job + 1)
    assert read_launch({**described, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, _first).port != mine.port


# --- the end ----------------------------------------------------------------------------------------------------------


_SCONTROL = """\
#!/bin/sh
for job; do :; done
case "$*" in
*99) printf 'slurm: Invalid\\n job\\n' >&2; exit 1 ;;
*show*88) reason=TimeLimit ;;
requeue*) echo "$*" >> CALLS ;;
esac
restarts=$(grep -c " $job$" CALLS)
[ "$job" != 77 ] || restarts=0
echo "JobId=$job JobState=RUNNING Reason=${reason:-None} Restarts=$restarts"
"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the requests to a `scontrol` that is a script here. Job 77 was cancelled, 88 had no time left."""
    script, calls = tmp_path / "bin" / "scontrol", tmp_path / "calls"
    script.parent.mkdir()
    script.write_text(_SCONTROL.replace("CALLS", str(calls)))
    script.chmod(0o755)
    calls.touch()
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    return calls


@pytest.mark.parametrize(("job", "call"), [("12_3", "requeue Incomplete 12_3\n"), ("88", "requeue 88\n")])
def test_requeue(scontrol: Path, job: str, call: str) -> None:
    requeue(job)
    assert scontrol.read_text() == call


@pytest.mark.parametrize(("job", "reason"), [("99", "failed: slurm: Invalid job"), ("77", "it was cancelled")])
def test_what_cannot_go_back(scontrol: Path, job: str, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        requeue(job)


@pytest.mark.parametrize(
    ("status", "rank", "expected", "calls"),
    [
        (0, "0", 0, ""),
        (1, "0", 1, ""),
        (2, "1", 2, ""),
        (75, "0", 75, "requeue Incomplete 1234\n"),
        (75, "3", 0, ""),
        (cluster.STOPPED_EARLY, "0", 75, "requeue Incomplete 1234\n"),
        (cluster.STOPPED_EARLY, "3", 75, "requeue Incomplete 1234\n"),  # the others may wait for it
    ],
)
def test_the_first_rank_puts_the_job_back(scontrol: Path, status: int, rank: str, expected: int, calls: str) -> None:
    environ = {**STEP, "SLURM_PROCID": rank, "MASTER_ADDR": "gpu03", "SSL_EO_REQUEUE": "1"}
    assert cluster.finish(status, environ) == expected
    assert scontrol.read_text() == calls
    del environ["SSL_EO_REQUEUE"]
    assert cluster.finish(status, environ) == abs(status)
    assert scontrol.read_text() == calls


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**BATCH_SHELL, "SLURM_JOB_ID": "99"}, "job 99 does not go back into the queue: 'scontrol"),
        ({}, "outside a Slurm job"),
    ],
)
def test_a_job_that_cannot_go_back_says_why(
    scontrol: Path, caplog: pytest.LogCaptureFixture, environ: dict[str, str], message: str
) -> None:
    assert cluster.finish(75, {**environ, "SSL_EO_REQUEUE": "1"}) == 75
    assert message in caplog.text


@pytest.mark.parametrize(
    ("status", "rank", "expected", "told"),
    [
        (0, "0", 0, "0\n"),
        (2, "0", 0, "2\n"),
        (75, "0", 0, "75\n"),
        (130, "0", 0, "130\n"),
        (75, "5", 0, None),
        (1, "0", 1, None),
        (1, "5", 1, None),
    ],
)
def test_the_first_rank_tells_how_it_ended(
    tmp_path: Path, status: int, rank: str, expected: int, told: str | None
) -> None:
    path = tmp_path / "status"
    assert cluster.finish(status, {**TORCHRUN, "RANK": rank, "SSL_EO_EXIT_FILE": str(path)}) == expected
    assert (path.read_text() if path.exists() else None) == told


def test_a_run_that_stops_puts_its_job_back(scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**BATCH_SHELL, "SSL_EO_REQUEUE": "1"}.items():
        monkeypatch.setenv(name, value)
    short = ("train.total_steps=4", "train.global_batch_size=8", "optim.warmup_steps=1", "data.n_workers=0")
    status, output = finish(start(command(DEBUG, tmp_path, *short, "train.time_limit_s=0")))
    assert status == 75, output
    assert scontrol.read_text() == "requeue Incomplete 1234\n"
    last = output.splitlines()[-1]
    assert last == "WARNING: job 1234 goes back into the queue"
    assert [p.name for p in (tmp_path / "debug_mae" / "checkpoints").iterdir()] == ["step_00000001"]


def test_half_set_variables_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    status, output = finish(start(command(DEBUG, tmp_path)))
    assert status == 2
    assert output.startswith("ssl-eo: the environment has RANK and no WORLD_SIZE")
    assert len(output.splitlines()) == 1


# --- requests to stop before there is anything to save ----------------------------------------------------------------


def _catches(process: subprocess.Popen[str], name: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (name - 1) & 1)


@pytest.mark.parametrize("name", cluster.STOP_SIGNALS, ids=lambda s: s.name)
def test_a_signal_while_the_run_is_loaded_ends_it_as_resumable(tmp_path: Path, name: signal.Signals) -> None:
    process = start(command(DEBUG, tmp_path))
    limit = time.monotonic() + 60
    while not _catches(process, name):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.001)
    process.send_signal(name)
    status, output = finish(process)
    assert status == 75, output
    assert output == "ssl-eo: stopped on request before training began; the same command goes on\n"
    assert not list(tmp_path.iterdir())


def test_handlers_are_given_back() -> None:
    code = (
        "import signal; from ssl_eo.cli import main;"
        "assert main(['train', '--config', 'nonexistent']) == 2;"
        "print(*{signal.getsignal(s).name for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "SIG_DFL\n"
