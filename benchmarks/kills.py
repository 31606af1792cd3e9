"""Kill a training with SIGKILL again and again, at random moments, and see that nothing is lost.

    python benchmarks/kills.py [--times N] [--ranks N] [--strategy fsdp] [--asynchronous] [--config NAME] [--seed N]

A training runs to its end undisturbed. Then the same training is started by torchrun, and all its processes are killed
at once: while it starts, in a step, or, more often than not, in the middle of a save. It is started again and killed
again until that has happened so many times, and then it may finish. Saves are a few steps apart. It is looked at

- whether each start goes on after the newest checkpoint, and says nothing of damage or errors;
- whether each kill leaves the newest two checkpoints whole, and takes no more than what was being written;
- whether the last checkpoint has in every tensor the bits of the undisturbed run, and the log the same losses.

Each line is a start and the kill that ended it. The exit status is 1 if anything is wrong. Needs the /proc of Linux.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _killing import Run, draw_aim
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from launching import read_checkpoint, records

EVERY_N_STEPS = 5  # from save to save
SHORT = (
    *("train.global_batch_size=8", "optim.warmup_steps=1", f"checkpoint.every_n_steps={EVERY_N_STEPS}"),
    *("log.every_n_steps=1", "eval.every_n_steps=0"),
)
BAD_WORDS = ("Traceback", "is damaged", "ssl-eo:", "ended with")  # a start that goes well prints none of them


@dataclass(frozen=True)
class Left:
    """What a kill has left: finished steps in the log, whole checkpoints by their steps, and one half written."""

    step: int = 0
    whole: tuple[int, ...] = ()
    partial: str | None = None

    @property
    def newest(self) -> int:
        """0 where there is none."""
        return max(self.whole, default=0)

    def __str__(self) -> str:
        moment = f"after step {self.step}"
        return moment if self.partial is None else f"{moment}, in the middle of a save: {self.partial}"


class Trial:
    """Kills `run` and collects what is `wrong`. `start_s` is how long it takes to start."""

    def __init__(self, run: Run, seed: int, start_s: float, is_asynchronous: bool) -> None:
        self.run, self.start_s = run, start_s
        self.is_asynchronous = is_asynchronous
        self.rng = random.Random(seed)
        self.left = Left()
        self.n_mid_save = 0
        self.wrong: list[str] = []

    def start_and_kill(self) -> str:
        """One start and its kill, in a line."""
        aim = draw_aim(self.run, self.rng, EVERY_N_STEPS, self.start_s)
        self.run.start()
        if self.run.wait_for(aim.moment):
            time.sleep(aim.then_s)
            self.run.kill()
        else:
            self._note(f"ended by itself, before it was killed:\n{self.run.output()}")
        begun = self._look_at_start()
        self._look_at_what_is_left()
        return f"{begun}; killed {self.left}"

    def start_and_finish(self) -> str:
        """The last start, in a line."""
        self.run.start()
        if status := self.run.finish():
            self._note(f"ended with status {status}:\n{self.run.output()}")
        return f"{self._look_at_start()}; finishes"

    def compare(self, undisturbed: Run, n_steps: int) -> int:
        """Look at the last checkpoints and the logs of both runs; returns the number of tensors."""
        last = f"step_{n_steps:08d}"
        if not (self.run.checkpoints / last / "complete.json").is_file():
            self._note(f"there is no whole {last} in the end")
            return 0
        expected, found = (read_checkpoint(run.checkpoints / last) for run in (undisturbed, self.run))
        if expected.keys() != found.keys():
            self._note(f"other tensors: {sorted(expected.keys() ^ found.keys())[:3]}")
        elif different := [name for name, tensor in expected.items() if not _same_bits(tensor, found[name])]:
            self._note(f"{len(different)} of {len(found)} tensors differ, for instance {different[:3]}")
        if _losses(self.run) != _losses(undisturbed):
            self._note("the log has other losses")
        return len(expected)

    def _look_at_start(self) -> str:
        begun, newest = self.run.begun_after(), self.left.newest
        if words := [word for word in BAD_WORDS if word in self.run.output()]:
            self._note(f"the start printed {words}:\n{self.run.output()}")
        if begun is None:
            return "has said nothing yet"
        if begun != newest:
            self._note(f"goes on after step {begun}, although the newest checkpoint is of step {newest}")
        return f"goes on after step {begun}" if begun else "begins"

    def _look_at_what_is_left(self) -> None:
        newest = self.run.newest(2)
        for damaged, problem in newest.items():
            if problem is not None:
                self._note(f"the checkpoint of step {damaged} is damaged: {problem}")
        whole = tuple(step for step, problem in newest.items() if problem is None)
        # A start clears up before it says where it begins: until then, what is half written was so before.
        partial = None if self.run.begun_after() is None else self.run.partial()
        self.left = Left(self.run.step(), whole, partial)
        self.n_mid_save += self.left.partial is not None
        if self.left.newest < self._least(self.left.step):
            self._note(f"steps up to {self.left.step} were done, and the newest checkpoint is of {self.left.newest}")

    def _least(self, step: int) -> int:
        """The oldest that the newest checkpoint may be when `step` steps are in the log."""
        # A step is logged before it is saved. In the background a save lasts until the next one begins, at the latest.
        n_unfinished = int(step % EVERY_N_STEPS == 0) + self.is_asynchronous
        return step - step % EVERY_N_STEPS - n_unfinished * EVERY_N_STEPS

    def _note(self, text: str) -> None:
        self.wrong.append(text)
        print(f"    WRONG: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--strategy", choices=("auto", "ddp", "fsdp", "hsdp"), default="auto")
    parser.add_argument("--asynchronous", action="store_true", help="checkpoints are written while training goes on")
    parser.add_argument("--config", default="debug/mae", help="what is trained")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = kill_repeatedly(Path(folder), arguments)
    sys.exit(1 if trial.wrong else 0)


def kill_repeatedly(folder: Path, arguments: argparse.Namespace) -> Trial:
    """Prints the undisturbed run, each start, and a summary."""
    n_steps = EVERY_N_STEPS * (2 * arguments.times + 3)  # a start comes two saves far, or is late and comes further
    how = (f"parallel.strategy={arguments.strategy}", f"checkpoint.asynchronous={str(arguments.asynchronous).lower()}")
    given = (arguments.ranks, arguments.config, *SHORT, *how, f"train.total_steps={n_steps}")
    with Run(folder, "undisturbed", *given) as undisturbed, Run(folder, "killed", *given) as run:
        start_s = finish_undisturbed(undisturbed)
        print(f"undisturbed: {n_steps} steps, a save every {EVERY_N_STEPS}, a start of {start_s:.1f} s", flush=True)
        trial = Trial(run, arguments.seed, start_s, arguments.asynchronous)
        begun_at = time.monotonic()
        for number in range(1, arguments.times + 1):
            print(f"{number:3}  {trial.start_and_kill()}", flush=True)
        kill_s = (time.monotonic() - begun_at) / arguments.times
        print(f"     {trial.start_and_finish()}", flush=True)
        n_tensors = trial.compare(undisturbed, n_steps)
    verdict = f"{len(trial.wrong)} WRONG" if trial.wrong else f"all {n_tensors} tensors have the undisturbed run's bits"
    print(f"{arguments.times} kills, one in {kill_s:.1f} s, {trial.n_mid_save} in the middle of a save: {verdict}")
    return trial


def finish_undisturbed(run: Run) -> float:
    """Train to the end; returns the seconds that a start takes, up to the first step."""
    begun_at = time.monotonic()
    run.start()
    run.wait_for(lambda: run.begun_after() is not None)
    start_s = time.monotonic() - begun_at
    if status := run.finish():
        raise RuntimeError(f"the undisturbed run ended with status {status}:\n{run.output()}")
    return start_s


def _losses(run: Run) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(run.folder / "metrics.jsonl")]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


if __name__ == "__main__":
    main()
