"""A Slurm of one's own for tests: two nodes on this machine, and a partition that preempts another.

It needs root and Debian's `slurm-wlm` and `munge`, and no systemd, cgroups, database or network but loopback.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "setpriv")
NODES = ("127.0.0.2", "127.0.0.3")  # names that every machine can resolve
_STARTS_WITHIN_S = 30.0
_FINAL = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")

# Why a line is there, where it is not the least that starts:
# cred_expire: a job may start again on the same node after so long, and not after two minutes
# proctrack/linuxproc, task/none: no cgroups
# KillWait: what a cancelled job has for saving, on a busy machine
# preempt_send_user_signal: a preempted job gets the signal that it asked for, else SIGTERM
# FirstJobId: jobs meet at ports that follow from their ids, and tests may run beside those of another process
# bf_interval, sched_interval, ...: look for work every second
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
ReturnToService=2
FirstJobId={first_job}
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} here: apt-get install --no-install-recommends slurm-wlm munge"
    return None if os.geteuid() == 0 else "a Slurm of one's own needs root"


class LocalSlurm:
    """A running one. `environ` is what its clients and jobs need."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ

    def ask(self, *command: str) -> str:
        """What a client program such as `scontrol` prints."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str) -> str:
        """The id of a new job."""
        return self.ask("sbatch", "--parsable", *arguments).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "--oneliner", "show", "job", job)))

    def wait(self, job: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """The facts of `job` when it has come to one of `states`; fails on another that is final."""
        limit = time.monotonic() + timeout_s
        while (facts := self.facts(job))["JobState"] not in states:
            assert facts["JobState"] not in _FINAL, f"job {job} is {facts['JobState']}, {facts.get('ExitCode')}"
            assert time.monotonic() < limit, f"job {job} is {facts['JobState']} ({facts.get('Reason')})"
            time.sleep(0.1)
        return facts


@contextlib.contextmanager
def running(folder: Path) -> Iterator[LocalSlurm]:
    """A Slurm whose files are in the empty `folder`."""
    config = folder / "slurm.conf"
    config.write_text(_configure(folder))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    slurm = LocalSlurm({**os.environ, "SLURM_CONF": str(config)})
    munged = ("munged", "--foreground", "--force", "--num-threads=2")
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    commands = [
        (*munged, *(f"--{option}={folder / name}" for option, name in files.items())),
        ("slurmctld", "-D", "-c"),
        *(("slurmd", "-D", "-c", "-N", node) for node in NODES),
    ]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            stack.enter_context(_daemon(command, slurm.environ, folder / f"{number}-{command[0]}.log"))
            if number == 0:
                _until(lambda: (folder / "munge.sock").exists(), folder)
        _until(lambda: _n_idle(slurm) == len(NODES), folder)
        try:
            yield slurm
        finally:
            slurm.ask("scancel", "--user=root")
            _until(lambda: not slurm.ask("squeue", "--noheader"), folder)


def _configure(folder: Path) -> str:
    with contextlib.ExitStack() as stack:  # ports that are free, all of them taken before any is given back
        sockets = [stack.enter_context(socket.socket()) for _ in range(1 + len(NODES))]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    host = socket.gethostname().partition(".")[0]
    lines = [_CONFIG.format(host=host, folder=folder, ports=ports, first_job=100 * (os.getpid() % 10_000 + 1))]
    for node, port in zip(NODES, ports[1:], strict=True):
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN\n")
    nodes = ",".join(NODES)
    lines.append(f"PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 GraceTime=30 PreemptMode=REQUEUE\n")
    lines.append(f"PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF\n")
    return "".join(lines)


@contextlib.contextmanager
def _daemon(command: Sequence[str], environ: dict[str, str], log: Path) -> Iterator[None]:
    """A process that ends with the block, and with this process whatever happens to it."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _n_idle(slurm: LocalSlurm) -> int:
    found = subprocess.run(
        # A client asks again and again for minutes while nobody answers.
        ["timeout", "3", "sinfo", "--noheader", "--Node", "--partition=low", "--states=idle"],
        env=slurm.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    return len(found.stdout.splitlines())


def _until(condition: Callable[[], bool], folder: Path) -> None:
    limit = time.monotonic() + _STARTS_WITHIN_S
    while not condition():
        if time.monotonic() > limit:
            logs = (f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
            raise TimeoutError("Slurm does not answer:\n" + "\n".join(logs))
        time.sleep(0.05)
