"""On a real Slurm of two nodes: signals, preemption and requeues end in the bits of a run that nobody disturbed."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from launching import ROOT, assert_same_bits, read_checkpoint, records, train
from local_slurm import LocalSlurm, missing, running

from ssl_eo.cluster import Launch

pytestmark = pytest.mark.slurm

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
N_STEPS, WAITS_AT = 10, 3
SHORT = (  # as where two ranks are compared with one process on one machine, in `test_ddp.py`
    f"train.total_steps={N_STEPS}",
    "train.global_batch_size=16",
    "objective.ema_momentum=0.9",
    "optim.clip_grad_norm=0.5",
    "optim.warmup_steps=2",
    "checkpoint.every_n_steps=100",
    "log.every_n_steps=1",
    "log.report=false",
)
SCRIPT = str(ROOT / "launch" / "slurm.sbatch")
SMALL = ("--nodes=2", "--cpus-per-task=1", "--time=10")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("slurm")) as own:
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        own.environ |= {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(paths)}
        yield own


class Job:
    """A job of `launch/slurm.sbatch`, a task on each of two nodes, which waits for a signal once if it is told to."""

    def __init__(self, slurm: LocalSlurm, folder: Path, *options: str, waits: bool = True) -> None:
        self.slurm, self.folder, self.log = slurm, folder, folder / "log"
        waiting = ("objective.name=toys.waiting", f"objective.waits_at={WAITS_AT}", f"objective.mark={folder}/mark")
        command = ("--config", DEBUG, f"run.out_dir={folder}", *SHORT, *(waiting if waits else ()))
        self.id = slurm.submit(*SMALL, f"--output={self.log}", *options, SCRIPT, *command)

    def wait_for_marks(self) -> None:
        """Until both ranks wait for their signals."""
        _wait_for(lambda: len(list(self.folder.glob("mark.*"))) == 2, [self.log])

    def wait(self, *states: str) -> dict[str, str]:
        """Its facts once it has come to one of `states`."""
        try:
            return self.slurm.wait(self.id, *states)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.read()}") from None

    def read(self) -> str:
        return self.log.read_text() if self.log.exists() else "no log yet"


def _wait_for(condition: Callable[[], bool], logs: Sequence[Path]) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit, [log.read_text() for log in logs if log.exists()]
        time.sleep(0.05)


def _final(folder: Path, name: str = "debug_mae") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / name / "checkpoints" / f"step_{N_STEPS:08d}")


def _stopped_after(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"stopped on request after step (\d+)", log)]


@pytest.fixture(scope="module")
def undisturbed(slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two tasks on two nodes come to."""
    job = Job(slurm, tmp_path_factory.mktemp("undisturbed"), waits=False)
    facts = job.wait("COMPLETED")
    assert facts["NumNodes"] == "2"
    assert "2 x " in job.read()
    return job.folder


def test_two_nodes_equal_one_process(undisturbed: Path, tmp_path: Path) -> None:
    status, output = train(DEBUG, tmp_path, *SHORT)
    assert status == 0, output
    one, two = _final(tmp_path), _final(undisturbed)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.startswith("objective."):
            torch.testing.assert_close(two[name], value, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    losses = [[r["loss"] for r in records(d / "debug_mae" / "metrics.jsonl")] for d in (tmp_path, undisturbed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def _assert_went_on(job: Job, undisturbed: Path) -> None:
    """It stopped once, went back into the queue, and came to the same bits and records."""
    facts = job.wait("COMPLETED")
    assert facts["Restarts"] == "1"
    log = job.read()
    (stopped,) = _stopped_after(log)
    assert WAITS_AT < stopped < N_STEPS
    assert log.count(f"job {job.id} goes back into the queue") == 1
    assert f"going on after step {stopped}" in log
    assert_same_bits(_final(undisturbed), _final(job.folder))
    assert [r["step"] for r in records(job.folder / "debug_mae" / "metrics.jsonl")] == list(range(1, N_STEPS + 1))


def test_a_signal_puts_the_job_back(slurm: LocalSlurm, undisturbed: Path, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path)
    job.wait_for_marks()
    slurm.ask("scancel", "--signal=USR2", job.id)
    _assert_went_on(job, undisturbed)


def test_preemption_puts_the_job_back(slurm: LocalSlurm, undisturbed: Path, tmp_path: Path) -> None:
    """By the signal that the job asked for; clusters that are set up otherwise send SIGTERM, as `scancel` does."""
    job = Job(slurm, tmp_path)
    job.wait_for_marks()
    urgent = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    slurm.wait(urgent, "COMPLETED")
    _assert_went_on(job, undisturbed)


def test_a_cancelled_job_is_saved_and_stays_cancelled(slurm: LocalSlurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path)
    job.wait_for_marks()
    slurm.ask("scancel", job.id)
    facts = job.wait("CANCELLED")
    log = job.read()
    (stopped,) = _stopped_after(log)
    assert (tmp_path / "debug_mae" / "checkpoints" / f"step_{stopped:08d}" / "complete.json").exists()
    assert f"job {job.id} does not go back into the queue" in log
    assert facts["Restarts"] == "0"
    assert job.wait("CANCELLED")["EndTime"] == facts["EndTime"]


def test_the_shell_of_a_job_trains_alone(slurm: LocalSlurm, tmp_path: Path) -> None:
    """It is told how many tasks the job has, and is none of them."""
    code = "import os; from ssl_eo.cluster import read_launch; print(read_launch(os.environ))"
    command = f"echo $SLURM_NTASKS; {sys.executable} -c '{code}'"
    job = slurm.submit("--nodes=2", "--ntasks=2", f"--output={tmp_path}/log", "--wrap", command)
    slurm.wait(job, "COMPLETED")
    assert (tmp_path / "log").read_text().splitlines() == ["2", str(Launch(job=job))]


def test_a_job_array_by_submitit(slurm: LocalSlurm, undisturbed: Path, tmp_path: Path) -> None:
    """Each job of the array stops, goes back by its own index, and goes on; the last one's own id is that of all."""
    options = ("--tasks-per-node=2", "--cpus-per-task=1", "--time-min=10", f"--folder={tmp_path}/submitit")
    waiting = ("objective.name=toys.waiting", f"objective.waits_at={WAITS_AT}")
    mark = "objective.mark=${run.out_dir}/mark${run.seed}"
    script = str(ROOT / "launch" / "submitit_launch.py")
    command = [sys.executable, script, *options, "--sweep=run.seed=0,1", "--config", DEBUG, f"run.out_dir={tmp_path}"]
    printed = slurm.ask(*command, *SHORT, *waiting, mark)
    submitted = re.findall(r"^job (\d+)_(\d): (\S+), log (\S+)$", printed, re.MULTILINE)
    assert [(index, name) for _, index, name, _ in submitted] == [("0", "debug_mae-seed0"), ("1", "debug_mae-seed1")]
    array, logs = submitted[0][0], [Path(log) for *_, log in submitted]
    _wait_for(lambda: len(list(tmp_path.glob("mark*.*"))) == 4, logs)
    slurm.ask("scancel", "--signal=USR2", array)
    for index, log in enumerate(logs):
        assert slurm.wait(f"{array}_{index}", "COMPLETED")["Restarts"] == "1", log.read_text()
        assert log.read_text().count(f"job {array}_{index} goes back into the queue") == 1
        assert f"going on after step {_stopped_after(log.read_text())[0]}" in log.read_text()
    assert_same_bits(_final(undisturbed), _final(tmp_path, "debug_mae-seed0"))
    key = "objective.student.encoder.cls_token"
    assert not torch.equal(_final(tmp_path, "debug_mae-seed1")[key], _final(undisturbed)[key])
