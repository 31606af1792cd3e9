"""Submit training to Slurm from Python: a run, or a job array of runs that differ in some keys.

    python launch/submitit_launch.py --nodes 4 --gpus-per-node 8 --time-min 1440 --config F [key=value ...]
    python launch/submitit_launch.py --sweep optim.lr=1e-3,5e-4 --sweep run.seed=0,1 --dry-run --config F

submitit writes the batch script and no more: when a run saves, when it ends and when its job goes back into the queue
is its own affair, as under `launch/slurm.sbatch`. The `checkpoint()` of submitit is not used: it runs on the first rank
alone, while a checkpoint takes all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ssl_eo.components import MissingExtraError, import_extra


@dataclass(frozen=True)
class Run:
    """One run: its name and what `ssl-eo train` is given."""

    name: str
    arguments: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Submit what `argv` says; errors are one line and status 2 (wrong usage or config) or 1."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        n_ranks = arguments.nodes * (arguments.tasks_per_node or arguments.gpus_per_node or 1)
        runs = plan_runs(arguments.config, arguments.overrides, arguments.sweep, n_ranks)
        submitit = import_extra("launch", "submitit", "launch/submitit_launch.py")
        if arguments.dry_run:
            print(_script(submitit, arguments, len(runs)), end="")
            for run in runs:
                print(f"would train {run.name}: {shlex.join(run.arguments)}", file=sys.stderr)
            return 0
        executor = submitit.SlurmExecutor(arguments.folder)
        executor.update_parameters(**_parameters(arguments))
        jobs = executor.map_array(_train, [run.arguments for run in runs])
    except (ValueError, MissingExtraError) as error:
        return _fail(error, 2)
    except (RuntimeError, OSError) as error:
        return _fail(error, 1)
    for job, run in zip(jobs, runs, strict=True):
        print(f"job {job.job_id}: {run.name}, log {job.paths.stdout}")
    return 0


def plan_runs(config: str, overrides: Sequence[str], sweeps: Sequence[str], n_ranks: int = 1) -> list[Run]:
    """A run of `n_ranks` for each combination of the values in `sweeps` (`key=v1,v2`), named after them.

    Raises `ValueError` for a wrong config, or one that does not fit the number of ranks, now and not when its turn in
    the queue has come, and where two runs would
    have the same name.
    """
    from ssl_eo.config import load
    from ssl_eo.data.order import check_lanes

    axes: list[list[tuple[str, str]]] = []
    for sweep in sweeps:
        key, sign, text = sweep.partition("=")
        if not sign or not key or "" in (values := list(split_values(text))):
            raise ValueError(f"--sweep {sweep!r}: write key=v1,v2, for instance optim.lr=1e-3,5e-4")
        if any(key == axis[0][0] for axis in axes):
            raise ValueError(f"--sweep: {key} comes twice; give all its values in one")
        axes.append([(key, value) for value in values])
    runs = []
    for combination in itertools.product(*axes):
        chosen = [*overrides, *(f"{key}={value}" for key, value in combination)]
        built = load(config, chosen)
        check_lanes(built.train.global_batch_size, built.data.n_lanes, n_ranks)
        name = built.run.name
        for key, value in combination:
            if key != "run.name":
                name += f"-{key.rpartition('.')[2]}" + re.sub(r"[^\w.+-]+", "_", value)
        named = [f"run.name={json.dumps(name)}"] if combination else []
        runs.append(Run(name, ["--config", config, *chosen, *named]))
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--sweep: several runs would be named {twice[0]}; give each value once")
    return runs


def split_values(text: str) -> Iterator[str]:
    """`text` cut at its commas, but for those inside brackets, braces and quotes."""
    opened, quote, start = 0, "", 0
    for position, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            opened += 1
        elif sign in ")}]":
            opened -= 1
        elif sign == "," and opened == 0:
            yield text[start:position].strip()
            start = position + 1
    yield text[start:].strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Submit training to Slurm: a run, or an array of runs.")
    parser.add_argument("--config", required=True, help="a YAML file, or a name below configs/ such as 'demo'")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance optim.lr=0.001")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="key=v1,v2",
        help="a run for each value; several make a run for each combination, all as one job array",
    )
    parser.add_argument("--nodes", type=_positive, default=1)
    parser.add_argument("--gpus-per-node", type=_positive, default=None, help="default: none, train on CPUs")
    parser.add_argument("--tasks-per-node", type=_positive, default=None, help="processes; default: one for each GPU")
    parser.add_argument("--cpus-per-task", type=_positive, default=None, help="default: as the cluster has it")
    parser.add_argument("--time-min", type=_positive, default=24 * 60, help="minutes until the job starts again")
    parser.add_argument("--partition", default=None)
    parser.add_argument("--account", default=None)
    parser.add_argument("--qos", default=None)
    parser.add_argument("--signal-delay-s", type=_positive, default=180, help="seconds that a run has for saving")
    parser.add_argument("--array-parallelism", type=_positive, default=256, help="runs of a sweep at the same time")
    parser.add_argument("--folder", default="runs/slurm", help="for logs and scripts; all nodes must see it")
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="key=value", help="any other option of sbatch, such as mem=0"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """What submitit is told; see `launch/slurm.sbatch` for the reasons."""
    tasks = arguments.tasks_per_node or arguments.gpus_per_node or 1
    if arguments.gpus_per_node is not None and tasks != arguments.gpus_per_node:
        raise ValueError(
            f"--tasks-per-node {tasks} with --gpus-per-node {arguments.gpus_per_node}: there is one task for each GPU"
        )
    for text in (*arguments.slurm, arguments.partition, arguments.account, arguments.qos, arguments.folder):
        if text is not None and not text.isprintable():
            raise ValueError(f"{text!r} would be several lines of the batch script; give it without control characters")
    others = dict(option.split("=", 1) if "=" in option else (option, True) for option in arguments.slurm)
    threads = arguments.cpus_per_task or 1
    setup = [
        "export SSL_EO_REQUEUE=1",
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}",
        "trap : TERM USR1 USR2",
    ]
    if arguments.cpus_per_task is not None:
        setup.append(f"export SRUN_CPUS_PER_TASK={arguments.cpus_per_task}")
    return {
        "job_name": "ssl_eo",
        "nodes": arguments.nodes,
        "ntasks_per_node": tasks,
        "gpus_per_node": arguments.gpus_per_node,
        "cpus_per_task": arguments.cpus_per_task,
        "time": arguments.time_min,
        "partition": arguments.partition,
        "account": arguments.account,
        "qos": arguments.qos,
        "signal_delay_s": arguments.signal_delay_s,
        "array_parallelism": arguments.array_parallelism,
        "stderr_to_stdout": True,
        "setup": setup,
        "srun_args": ["--kill-on-bad-exit=1"],
        "additional_parameters": {"requeue": True, **others},
    }


def _script(submitit: Any, arguments: argparse.Namespace, n_runs: int) -> str:
    """The batch script that submitit would hand to sbatch, whether or not there is one here."""

    class DryExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
        @classmethod
        def affinity(cls) -> int:  # by which an executor says whether it works here
            return 2

        def script(self) -> str:
            text: str = self._make_submission_file_text(self._submitit_command_str, "dry-run")
            return text

    executor = DryExecutor(arguments.folder)
    executor.update_parameters(**_parameters(arguments))
    if n_runs > 1:
        executor.parameters["map_count"] = n_runs
    return executor.script()


def _train(arguments: Sequence[str]) -> None:
    """What every task of a job does. It returns when the run is done, for submitit to note, and else ends the task."""
    from ssl_eo.cli import leave
    from ssl_eo.cli import main as ssl_eo

    if status := ssl_eo(["train", *arguments]):
        leave(status)


def _fail(error: Exception, status: int) -> int:
    print(f"{sys.argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
