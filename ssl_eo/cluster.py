"""What the launcher says of this process, and what it is told in the end: torchrun and Slurm.

The one place that reads their variables. Needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ssl_eo.files import is_seen

__all__ = [
    "EXIT_DONE",
    "EXIT_FAILURE",
    "EXIT_RESUMABLE",
    "STOPPED_EARLY",
    "STOP_SIGNALS",
    "Launch",
    "StoppedEarlyError",
    "finish",
    "first_host",
    "is_abandoned",
    "read_launch",
    "requeue",
    "signals_handled",
    "signals_raise",
    "signals_stop_early",
]

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_RESUMABLE = 75  # stopped on request; the same command goes on
STOPPED_EARLY = -75  # `finish` makes that of it: this process alone, before it met the others

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # by which schedulers ask a run to save and end

logger = logging.getLogger(__name__)

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_STEP = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")  # srun alone sets the first two
_FIRST_PORT, _N_PORTS = 10_000, 20_000  # below those that Linux gives away by itself, from 32768 on
_ANSWER_WITHIN_S = 120
_OTHERS_STOP_WITHIN_S = 10.0
_PARENT = os.getppid()


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this is, who started them, and where they meet."""

    launcher: Literal["none", "torchrun", "slurm"] = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this node
    address: str | None = None  # of the first rank; None where there is no other
    port: int | None = None
    store_is_served: bool = False  # there already, by torchrun; else the first rank does it
    job: str | None = None  # the Slurm job, by the name that scontrol takes


class StoppedEarlyError(BaseException):
    """A scheduler asked this process to stop before it could save anything. Nothing that awaits errors catches it."""


@contextlib.contextmanager
def signals_stop_early() -> Iterator[None]:
    """Let the signals that ask a run to stop raise `StoppedEarlyError` while it is loaded: they would kill it."""

    def stop(signum: int, frame: Any) -> None:
        raise StoppedEarlyError

    with signals_handled(STOP_SIGNALS, stop):
        yield


@contextlib.contextmanager
def signals_handled(names: Iterable[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, `handler` gets the signals `names`; afterwards whoever got them before."""
    old = {name: signal.signal(name, handler) for name in names}
    try:
        yield
    finally:
        for name, previous in old.items():
            signal.signal(name, previous)


class Flag(Protocol):
    """What a signal raises."""

    raised: bool


@contextlib.contextmanager
def signals_raise(flag: Flag) -> Iterator[None]:
    """SIGTERM, SIGUSR1, SIGUSR2 and a first SIGINT raise `flag`, which a run looks at between steps."""

    def handler(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and flag.raised:
            raise KeyboardInterrupt
        flag.raised = True

    with signals_handled((*STOP_SIGNALS, signal.SIGINT), handler):
        yield


def is_abandoned() -> bool:
    """Whether torchrun, which started this process, has ended without it: nobody would stop it any more."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list such as `gpu[03-05,11]`; asks `scontrol` where there is more than one."""
    return _scontrol("show", "hostnames", nodes).split()[0] if re.search(r"[\[,]", nodes) else nodes


def read_launch(environ: Mapping[str, str], first_host: Callable[[str], str] = first_host) -> Launch:
    """The launch that the variables of `environ` describe.

    torchrun's come first, since it may run inside a step of Slurm. Of Slurm only a step counts, which is what `srun`
    starts: the shell of a batch job is told of all tasks of the job too, and is none of them. `MASTER_ADDR` and
    `MASTER_PORT` override where the ranks of a step meet.

    Raises `ValueError` that names the variable when one is missing beside others, is no number or out of range.
    """
    if any(name in environ for name in _TORCHRUN):
        return _read_torchrun(environ)
    if all(name in environ for name in _STEP[:2]):
        return _read_step(environ, first_host)
    return Launch(job=_job(environ))


def requeue(job: str) -> None:
    """Put the Slurm job `job` back into the queue: one that runs, or whose time is up.

    Raises `RuntimeError` where that cannot be, and so for a job that its user has cancelled.
    """
    before = _facts(job)
    # Slurm takes finished jobs back too, and with this option only those that run. It is silent about the others.
    only = () if before["Reason"] == "TimeLimit" else ("Incomplete",)
    _scontrol("requeue", *only, job)
    if int(_facts(job)["Restarts"]) <= int(before["Restarts"]):
        raise RuntimeError("it was cancelled, or has ended")


def finish(status: int, environ: Mapping[str, str]) -> int:
    """Tell the launcher that the run ended with `status`; returns what this process is to end with.

    `SSL_EO_REQUEUE=1`: the first rank of a run that stopped on request puts the Slurm job back into the queue. The
    others end with 0, since srun kills all tasks of a step, the first one too, when one of them fails. A process that
    stopped early has not agreed on it with the others, who may wait for it: it puts the job back whatever its rank.

    `SSL_EO_EXIT_FILE=path`: the first rank writes the status there, and all end with 0 unless the run failed. torchrun
    takes any other status for a failure and starts again, which helps neither a wrong config nor a run that is to stop.
    """
    is_early, status = status == STOPPED_EARLY, abs(status)
    if status == EXIT_RESUMABLE and environ.get("SSL_EO_REQUEUE") == "1":
        launch = read_launch(environ)
        if launch.rank != 0 and not is_early:
            return EXIT_DONE
        _requeue_own(launch.job)
    if (path := environ.get("SSL_EO_EXIT_FILE")) and status != EXIT_FAILURE:
        return _leave_word(Path(path), status, read_launch(environ).rank, is_early)
    return status


def _leave_word(path: Path, status: int, rank: int, is_early: bool) -> int:
    """Write `status` to the file `path` on the first rank; returns what this process is to end with."""
    try:
        if rank == 0:
            path.write_text(f"{status}\n", encoding="utf-8")
        elif is_early and not is_seen(lambda: path.stat().st_size > 0, _OTHERS_STOP_WITHIN_S):
            return status  # the others were not asked to stop, and would wait for this one: let them start again
    except OSError as error:
        logger.warning("SSL_EO_EXIT_FILE: %s", error)
        return status
    return EXIT_DONE


def _requeue_own(job: str | None) -> None:
    """Put this process's own job back, or say why not: the run is saved either way."""
    if job is None:
        logger.warning("SSL_EO_REQUEUE is set outside a Slurm job: start the same command again to go on")
        return
    try:
        requeue(job)
    except RuntimeError as error:
        logger.warning("job %s does not go back into the queue: %s", job, error)
    else:
        logger.warning("job %s goes back into the queue", job)


def _read_torchrun(environ: Mapping[str, str]) -> Launch:
    size = _number(environ, "WORLD_SIZE", _TORCHRUN, least=1)
    rank = _number(environ, "RANK", _TORCHRUN, below=size)
    local_rank = _number(environ, "LOCAL_RANK", _TORCHRUN, below=size)
    address, port = None, None
    if size > 1:
        group = (*_TORCHRUN, "MASTER_ADDR", "MASTER_PORT")
        address, port = _text(environ, "MASTER_ADDR", group), _number(environ, "MASTER_PORT", group, 1, 65536)
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch("torchrun", rank, size, local_rank, address, port, served, _job(environ))


def _read_step(environ: Mapping[str, str], first_host: Callable[[str], str]) -> Launch:
    size = _number(environ, "SLURM_STEP_NUM_TASKS", _STEP, least=1)
    rank = _number(environ, "SLURM_PROCID", _STEP, below=size)
    local_rank = _number(environ, "SLURM_LOCALID", _STEP, below=size)
    n_restarts = _number({"SLURM_RESTART_COUNT": "0", **environ}, "SLURM_RESTART_COUNT", _STEP)
    address, port = None, None
    if size > 1:
        address = environ.get("MASTER_ADDR") or first_host(_text(environ, "SLURM_STEP_NODELIST", _STEP))
        port = _number({"MASTER_PORT": str(_port(environ, n_restarts)), **environ}, "MASTER_PORT", _STEP, 1, 65536)
    return Launch("slurm", rank, size, local_rank, address, port, False, _job(environ))


def _port(environ: Mapping[str, str], n_restarts: int) -> int:
    """The same for all ranks of a step; another for the next job, its next step and its next start.

    Jobs that share a node mostly follow each other by number, and a port stays taken for a while after its process.
    """
    group = ("SLURM_JOB_ID", *_STEP)
    job, step = _number(environ, "SLURM_JOB_ID", group), _number(environ, "SLURM_STEP_ID", group)
    return _FIRST_PORT + (job + 997 * step + 4999 * n_restarts) % _N_PORTS


def _job(environ: Mapping[str, str]) -> str | None:
    """The Slurm job this is part of. One of an array goes by its index: the last one's own id is that of the array."""
    array, index = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else environ.get("SLURM_JOB_ID")


def _text(environ: Mapping[str, str], name: str, group: tuple[str, ...]) -> str:
    if value := environ.get(name):
        return value
    found = ", ".join(other for other in group if environ.get(other))
    raise ValueError(
        f"the environment has {found} and no {name}: a launcher sets all of {', '.join(group)}. Start it by torchrun or"
        f" srun, or unset {found} for a single process"
    )


def _number(
    environ: Mapping[str, str], name: str, group: tuple[str, ...], least: int = 0, below: int | None = None
) -> int:
    """The variable `name`, which belongs to `group`, as a number in `[least, below)`."""
    text = _text(environ, name, group)
    value = int(text) if re.fullmatch("[0-9]{1,18}", text) else -1
    if value < least or (below is not None and value >= below):
        allowed = f"a whole number from {least} on" if below is None else f"a whole number from {least} to {below - 1}"
        raise ValueError(f"the environment has {name}={text!r}, which must be {allowed}")
    return value


def _facts(job: str) -> dict[str, str]:
    """What Slurm says of a job: `JobState`, `Reason`, `Restarts`, ..."""
    text = _scontrol("--oneliner", "show", "job", job)
    found = dict(re.findall(r"(\w+)=(\S*)", text))
    if "Reason" not in found or not found.get("Restarts", "").isdecimal():
        raise RuntimeError(f"'scontrol show job {job}' says neither Reason nor Restarts: {text[:80]!r}")
    return found


def _scontrol(*arguments: str) -> str:
    """What `scontrol` answers; raises `RuntimeError` with its own words where it refuses."""
    command = ["scontrol", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_WITHIN_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"'{' '.join(command)}' cannot be run: {error}") from None
    if done.returncode:
        raise RuntimeError(f"'{' '.join(command)}' failed: {' '.join(done.stderr.split())}")
    return done.stdout
