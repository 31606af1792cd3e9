"""The command `ssl-eo eval`. Everything heavy is imported inside it."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ssl_eo.cluster import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_RESUMABLE,
    STOP_SIGNALS,
    StoppedEarlyError,
    read_launch,
    signals_handled,
)

if TYPE_CHECKING:
    from ssl_eo.eval.offline import Model

__all__ = ["add_arguments"]

_ONE_REQUEST_S = 2.0  # launchers ask more than once, and giving back is not to be interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `ssl-eo eval` takes to its parser; lists are given with commas or spaces between."""
    lists: dict[str, str] = {
        "tasks": "names in datasets_meta/benchmarks, patterns of them such as 'geobench/*', or YAML files",
        "protocol": "probes: knn, ridge, logistic, linear; default: those of the task",
        "partitions": "parts of the training set, such as 0.01x 0.10x 1.00x, or nested_0.10x; default 1.00x",
        "bands": "all, rgb, no-rgb, random; default all",
        "size": "native, or pixels; default: as the task says",
        "seeds": "of what is drawn; default 0",
        "taps": "depths that are read; 1 is the last; default: as in training",
    }
    parser.add_argument("--model", required=True, help="a run, a bundle folder, or NAME=FILE: released weights")
    for name, text in lists.items():
        parser.add_argument(f"--{name}", nargs="+", required=name == "tasks", default=None, help=text)
    parser.add_argument("--pool", default=None, help="cls, mean, cls_mean or mean_std; default: as in training")
    parser.add_argument("--precision", default=None, help="of the encoder: float32 or bfloat16; default float32")
    parser.add_argument("--out", required=True, help="folder for results.jsonl; several processes may share it")
    parser.add_argument("--no-controls", action="store_true", help="leave out random weights and pixel statistics")
    parser.add_argument("--batch-size", type=int, default=128, help="samples of a forward pass")
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0 reads in this one")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap; 0: no intervals")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        with _requests_stop():
            return _evaluate(arguments)
    except StoppedEarlyError:
        print("ssl-eo: stopped on request; the same command goes on", file=sys.stderr, flush=True)
        return EXIT_RESUMABLE


@contextlib.contextmanager
def _requests_stop() -> Iterator[None]:
    """Let signals that ask this process to end raise `StoppedEarlyError`, so that it gives its claim back.

    A process that dies instead counts as one that its work has killed.
    """
    owner, asked_s = os.getpid(), -math.inf

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        if os.getpid() != owner:
            os._exit(128 + signum)  # a process that reads samples: it has no claim
        before_s, asked_s = asked_s, time.monotonic()
        if asked_s - before_s > _ONE_REQUEST_S:
            raise StoppedEarlyError

    asked = [name for name in (*STOP_SIGNALS, signal.SIGHUP) if signal.getsignal(name) is not signal.SIG_IGN]  # nohup
    with signals_handled(asked, stop):
        yield


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from ssl_eo.config import build
    from ssl_eo.eval.offline import Evaluation, evaluate
    from ssl_eo.eval.records import read_results, write_csv
    from ssl_eo.eval.table import print_summary, rows_of_results

    launch = read_launch(os.environ)
    device = f"cuda:{launch.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    model, defaults = _open_model(arguments.model)
    given = {
        "probes": _listed(arguments.protocol),
        "partitions": _listed(arguments.partitions),
        "subsets": _listed(arguments.bands),
        "sizes": _listed(arguments.size),
        "seeds": [_number("--seeds", text, int) for text in _listed(arguments.seeds)],
        "taps": [_number("--taps", text, float) for text in _listed(arguments.taps)],
        "pool": arguments.pool,
        "precision": arguments.precision,
        "controls": not arguments.no_controls,
        "batch_size": arguments.batch_size,
        "n_workers": arguments.workers,
        "n_resamples": arguments.resamples,
        "device": device,
    }
    tasks = _known_tasks(_listed(arguments.tasks))
    chosen = {key: value for key, value in given.items() if value not in (None, [])}
    plan = build(Evaluation, {**defaults, **chosen, "tasks": tasks}, "")
    out = Path(arguments.out)
    results = evaluate(model, plan, out)
    if launch.rank != 0:
        return EXIT_DONE
    write_csv(out / "results.csv", read_results(out))
    return EXIT_DONE if print_summary(rows_of_results(results), sys.stdout) else EXIT_FAILURE


def _listed(values: Sequence[str] | None) -> list[str]:
    return [part for value in values or () for part in value.split(",") if part]


def _number(option: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is no number") from None


def _known_tasks(names: Sequence[str]) -> list[str]:
    """`names` with patterns replaced by what they match, each once."""
    from ssl_eo.resources import resource_dir

    root = resource_dir("datasets_meta") / "benchmarks"
    known = sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
    found: list[str] = []
    for name in names:
        if name.endswith((".yaml", ".yml")) or not set(name) & set("*?["):
            found.append(name)
            continue
        matched = [task for task in known if fnmatchcase(task, name)]
        if not matched:
            raise ValueError(f"--tasks: {name!r} matches none of {', '.join(known)}")
        found += matched
    return list(dict.fromkeys(found))


def _open_model(text: str) -> tuple[Model, dict[str, Any]]:
    """The encoder that `--model` names, and how its run reads features."""
    from ssl_eo.eval.offline import Model
    from ssl_eo.train.export import open_encoder

    name, _, file = text.partition("=")
    if file and not Path(text).exists():
        from ssl_eo.weights.base import load_released

        return Model(name, load_released(file, name), step=0), {}
    encoder, step, defaults = open_encoder(Path(text))
    return Model(Path(text).resolve().name, encoder, step), defaults
