"""A training under torchrun that is killed, all of its processes at once, at moments aimed at; and what it leaves.

SIGKILL is what a node that fails looks like, but for what the operating system still holds in memory: that is written.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssl_eo.train.sealing import verify

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from launching import ROOT, command, records

__all__ = ["Aim", "Run", "draw_aim"]

_LOOK_EVERY_S = 0.0005
_WITHIN_S = 300.0  # for anything that is waited for
# What is in a checkpoint's partial folder as a save goes on: the folder, what DCP writes last, the seal.
_STAGES = ("", ".metadata", "complete.json")


class Run:
    """The training of `config` and `overrides` in `folder/name`, to be started as often as one likes.

    A context: whatever happens inside, no process of it lives on.
    """

    def __init__(self, folder: Path, name: str, n_ranks: int, config: str, *overrides: str) -> None:
        self.folder = folder / name
        self.checkpoints = self.folder / "checkpoints"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
        self._command = [*launcher, *command(config, folder, f"run.name={name}", *overrides)]
        self._log = folder / f"{name}.log"
        self._n_said: int | None = None  # bytes before the kill
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def start(self) -> None:
        """The next start. What it prints goes into a file: nobody reads a pipe while it is aimed at."""
        self._n_said = None
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> int:
        """Wait for the end; returns the exit status."""
        assert self._process is not None
        return self._process.wait(timeout=3 * _WITHIN_S)

    def wait_for(self, moment: Callable[[], bool]) -> bool:
        """Until `moment()`; False when the run ends by itself before."""
        assert self._process is not None
        limit = time.monotonic() + _WITHIN_S
        while not moment():
            if self._process.poll() is not None:
                return False
            if time.monotonic() > limit:
                raise TimeoutError(f"nothing happens in {self.folder}: {self.output()}")
            time.sleep(_LOOK_EVERY_S)
        return True

    def kill(self) -> None:
        """SIGKILL for every rank and for torchrun, which must neither start them again nor add any; wait until gone."""
        assert self._process is not None
        launcher = self._process.pid
        os.kill(launcher, signal.SIGSTOP)
        while _state(launcher) not in ("T", "Z"):
            time.sleep(_LOOK_EVERY_S)
        children = [path.read_text(encoding="ascii") for path in Path(f"/proc/{launcher}/task").glob("*/children")]
        ranks = [int(pid) for text in children for pid in text.split()]
        self._n_said = self._log.stat().st_size
        for pid in (*ranks, launcher):
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        while any(_state(pid) not in ("Z", None) for pid in ranks):
            time.sleep(_LOOK_EVERY_S)

    def output(self) -> str:
        """What this start has printed, up to its kill: workers of a killed rank may complain that it is gone."""
        return self._log.read_bytes()[: self._n_said].decode(errors="replace")

    def begun_after(self) -> int | None:
        """The step after which this start goes on, 0 for a new run; None as long as it has not said so."""
        found = re.search(r": (?:new run|going on after step ([\d,]+)) on ", self.output())
        return None if found is None else int((found[1] or "0").replace(",", ""))

    def step(self) -> int:
        """How many finished steps are in the log."""
        return max((record["step"] for record in records(self.folder / "metrics.jsonl")), default=0)

    def newest(self, n: int) -> dict[int, str | None]:
        """The newest `n` checkpoints by their steps, the newest first, and what is wrong with each."""
        found = sorted(self.checkpoints.glob("step_????????"), reverse=True)[:n]
        return {int(path.name.removeprefix("step_")): verify(path) for path in found}

    def partial(self) -> str | None:
        """What is there of a checkpoint that was being written."""
        found = sorted(self.checkpoints.glob("*.partial"))
        if not found:
            return None
        files = sorted(path.name for path in found[-1].iterdir())
        what = "sealed" if "complete.json" in files else "written" if ".metadata" in files else "being written"
        return f"{found[-1].name} {what}, {len(files)} files"  # of the newest, should there be several


@dataclass(frozen=True)
class Aim:
    """Kill `then_s` after `moment()` has become true."""

    name: str
    moment: Callable[[], bool]
    then_s: float


def draw_aim(run: Run, rng: random.Random, every_n_steps: int, start_s: float) -> Aim:
    """A moment of the start at hand: while it loads, in a step, or in a save, at most two saves from where it begins.

    `start_s` is how long the start takes.
    """
    kind = rng.choices(["start", "step", "save"], [1, 3, 6])[0]
    if kind == "start":
        return Aim(kind, lambda: True, rng.uniform(0.5, 1.1) * start_s)
    n = rng.randint(1, 2 * every_n_steps) if kind == "step" else every_n_steps * rng.randint(1, 2)
    stage, then_s = rng.choice(_STAGES), rng.uniform(0, 0.03)

    def moment() -> bool:
        if (begun := run.begun_after()) is None:
            return False
        if kind == "step":
            return run.step() >= begun + n
        due = run.checkpoints / f"step_{begun // every_n_steps * every_n_steps + n:08d}"
        return (due.with_name(f"{due.name}.partial") / stage).exists() or due.exists()

    return Aim(kind, moment, then_s if kind == "step" or not stage else 0.0)


def _state(pid: int) -> str | None:
    """The letter of a process's state in /proc; None for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
