"""The command `ssl-eo eval`. Everything heavy is imported inside it."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from ssl_eo.cli_eval_tasks import known_tasks, print_tasks, read_task
from ssl_eo.cluster import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_RESUMABLE,
    STOP_SIGNALS,
    StoppedEarlyError,
    read_launch,
    signals_handled,
)
from ssl_eo.components import suggest

if TYPE_CHECKING:
    from ssl_eo.eval.jobs import Evaluation
    from ssl_eo.eval.offline import Model

__all__ = ["add_arguments"]

T = TypeVar("T")

_LISTS = {  # options that take several values
    "tasks": "names in datasets_meta/benchmarks, patterns of them such as 'geobench/*', or YAML files",
    "protocol": "probes: knn, ridge, logistic, linear; default: those of the task",
    "partitions": "parts of the training set, such as 0.01x 0.10x 1.00x, or nested_0.10x; default 1.00x",
    "bands": "all, rgb, no-rgb, random; default all",
    "size": "native, or pixels, a multiple of the encoder's patch; default: as the task says",
    "seeds": "of what is drawn; default 0",
    "taps": "depths that are read; 1 is the last; default: as in training",
}
# Keys of configs and of plans that options have other names for.
_NAMES = {
    "controls": "no_controls",
    "n_resamples": "resamples",
    "n_workers": "workers",
    "probes": "protocol",
    "seed": "seeds",
    "size_px": "size",
    "sizes": "size",
    "subsets": "bands",
}
_NO_OPTIONS = ("overrides", "run")  # what the parser holds beside options
_ONE_REQUEST_S = 2.0  # launchers ask more than once, and giving back is not to be interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `ssl-eo eval` takes to its parser; lists are given with commas or spaces between."""
    model = "a run, a checkpoint or a bundle; NAME=PATH calls it NAME; RELEASED=FILE: released weights"
    parser.add_argument("--model", required=True, help=model)
    for name, text in _LISTS.items():
        parser.add_argument(f"--{name}", nargs="+", required=name == "tasks", default=None, help=text)
    pools = "cls, mean, cls_mean or mean_std; default: as in training, or as the authors of released weights do"
    parser.add_argument("--pool", default=None, help=pools)
    parser.add_argument("--precision", default=None, help="of the encoder: float32 or bfloat16; default float32")
    parser.add_argument("--out", required=True, help="folder for results.jsonl; several processes may share it")
    parser.add_argument("--no-controls", action="store_true", help="leave out random weights and pixel statistics")
    numbers = {
        "batch-size": (1, 65_536, 128, "samples of a forward pass; default 128"),
        "workers": (0, 256, 0, "processes that read; default 0: this one reads"),
        "resamples": (0, 10_000, 1000, "of the bootstrap; default 1000; 0: no intervals"),
    }
    for name, (least, most, usual, text) in numbers.items():
        parser.add_argument(f"--{name}", type=_whole(least, most), default=usual, help=text)
    parser.add_argument("--list-tasks", action=_ListTasks, help="print the shipped tasks, and which data are here")
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)  # to say what to write instead
    parser.set_defaults(run=_run)


class _ListTasks(argparse.Action):
    """Print the tasks and end, whatever else is given, as `--help` does."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print_tasks(sys.stdout)
        parser.exit()


def _whole(least: int, most: int) -> Callable[[str], int]:
    """A type for the parser: whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text[:20]) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most:,}, got {text!r:.40}")
        return int(text)

    return read


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
    _refuse_overrides(arguments)
    import torch

    from ssl_eo.cli_eval_models import open_model
    from ssl_eo.eval.offline import evaluate
    from ssl_eo.eval.records import read_results, write_csv
    from ssl_eo.eval.table import print_summary, rows_of_results

    launch = read_launch(os.environ)
    device = f"cuda:{launch.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    model, features = open_model(arguments.model)
    plan = _plan(arguments, features, device)
    _check_sizes(model, plan)
    out = Path(arguments.out)
    results = evaluate(model, plan, out)
    if launch.rank != 0:
        return EXIT_DONE
    results = _named(model, results, out)
    write_csv(out / "results.csv", read_results(out))
    is_whole = print_summary(rows_of_results(results), sys.stdout)
    for remark in dict.fromkeys([*_remarks(results), *_hints(model, plan, results)]):
        print(remark)
    return EXIT_DONE if is_whole else EXIT_FAILURE


def _plan(arguments: argparse.Namespace, features: Mapping[str, Any], device: str) -> Evaluation:
    """What is asked for; `features` is how they are read unless the command says so. Errors name the option."""
    from ssl_eo.eval.bands import BAND_SUBSETS
    from ssl_eo.eval.features import Pool, Precision, check_taps
    from ssl_eo.eval.jobs import Evaluation
    from ssl_eo.eval.probes import find_probe

    given: dict[str, Any] = {
        "probes": _listed(arguments.protocol),
        "partitions": _listed(arguments.partitions),
        "subsets": [_one_of("--bands", text, BAND_SUBSETS) for text in _listed(arguments.bands)],
        "sizes": _listed(arguments.size),
        "seeds": _numbers("--seeds", arguments.seeds, int),
        "taps": _numbers("--taps", arguments.taps, float),
    }
    for name, allowed in (("pool", get_args(Pool)), ("precision", get_args(Precision))):
        if (value := getattr(arguments, name)) is not None:
            given[name] = _one_of(f"--{name}", value, allowed)
    for name in _LISTS:
        if (values := getattr(arguments, name)) is not None and not _listed(values):
            raise ValueError(f"--{name}: nothing is named; leave the option out for its default")
    for probe in given["probes"]:
        with _told_of("--protocol"):
            find_probe(probe)
    if given["taps"]:
        with _told_of("--taps"):
            check_taps(given["taps"])
    return Evaluation(
        tasks=[read_task(name) for name in known_tasks(_listed(arguments.tasks))],
        controls=not arguments.no_controls,
        batch_size=arguments.batch_size,
        n_workers=arguments.workers,
        n_resamples=arguments.resamples,
        device=device,
        **{**features, **{key: value for key, value in given.items() if value}},
    )


def _refuse_overrides(arguments: argparse.Namespace) -> None:
    """Say which option it is where a `key=value` was given, behind options or as one of their values."""
    for text in [*arguments.overrides, *(text for name in _LISTS for text in getattr(arguments, name) or ())]:
        key, sign, value = text.partition("=")
        if sign and re.fullmatch(r"[\w.\[\]]+", key) and not Path(text).exists():
            last = key.rpartition(".")[2]
            name = _NAMES.get(last, last)
            is_flag, is_default = name == "no_controls", (last, value.lower()) == ("controls", "true")
            option = f"--{name.replace('_', '-')}" + ("" if is_flag else f" {value.strip('[]')}")
            is_known = name in vars(arguments) and name not in _NO_OPTIONS
            known = f"use {option}; " if is_known and not is_default else ""
            raise ValueError(f"{text}: {known}eval takes options, no key=value (see ssl-eo eval --help)")
    if arguments.overrides:
        raise ValueError(f"{arguments.overrides[0]}: eval takes options alone (see ssl-eo eval --help)")


def _listed(values: Sequence[str] | None) -> list[str]:
    """The parts of an option's values, each once."""
    parts = [part.strip() for value in values or () for part in value.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def _numbers(option: str, values: Sequence[str] | None, kind: type[int] | type[float]) -> list[float]:
    found: list[float] = []
    for text in _listed(values):
        try:
            found.append(kind(text))
        except ValueError:
            raise ValueError(f"{option}: {text!r:.40} is no {'whole number' if kind is int else 'number'}") from None
    return list(dict.fromkeys(found))


def _one_of(option: str, value: str, allowed: Sequence[T]) -> T:
    for one in allowed:
        if one == value:
            return one
    names = [str(one) for one in allowed]
    raise ValueError(f"{option}: got {value!r}, must be one of {', '.join(names)}{suggest(value, names)}")


@contextlib.contextmanager
def _told_of(option: str) -> Iterator[None]:
    """Errors inside are told of `option`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _check_sizes(model: Model, plan: Evaluation) -> None:
    """Raise `ValueError` where a size that was asked for is no whole number of patches, before anything is measured."""
    patch_px = model.encoder.cfg.patch_size
    for size in plan.sizes:
        if size.isdecimal() and int(size) % patch_px:
            above = -(-int(size) // patch_px) * patch_px
            fitting = " or ".join(str(px) for px in (above - patch_px, above) if px)
            raise ValueError(
                f"--size: {size} pixels are no whole number of patches, of which those of {model.name} have {patch_px};"
                f" give {fitting}, or native"
            )


def _named(model: Model, results: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """`results` under the name that was given: what was measured before under another one is called so from now on."""
    from ssl_eo.eval.records import append

    def is_other(record: Mapping[str, Any]) -> bool:
        return str(record["features"]) == "encoder" and str(record["model"]) != model.name

    renamed = [{**r, "model": model.name} if is_other(r) else r for r in results]
    append(out, [new for new, old in zip(renamed, results, strict=True) if new is not old])
    return renamed


def _remarks(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a table of scores does not show: what was skipped, and fits that did not reach their optimum."""
    from ssl_eo.eval.probes import is_at_optimum

    for r in results:
        if r["kind"] == "skipped":
            yield f"skipped: {r['task']}: {r['error']}"
        elif r["kind"] == "result" and not is_at_optimum(r["chosen"]):
            of = f"{r['features'].replace('_', ' ')} at {r['tap'].replace('_', ' ')}"
            yield (
                f"{r['task']}: {r['probe']} on {of} ({r['partition']}, bands {r['subset']}, seed {r['seed']}) is not at"
                " its optimum: its score may be a little lower than it could be"
            )


def _hints(model: Model, plan: Evaluation, results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where an encoder of fixed bands takes as many as a task that failed has of true colour."""
    n_channels = model.encoder.n_channels
    failed = {(r["task"], r["subset"]) for r in results if r["kind"] == "error" and r["features"] == "encoder"}
    for job in plan.jobs():
        if n_channels is None or (job.task.name, job.subset) not in failed or job.features != "encoder":
            continue
        try:
            shown, rgb = (replace(job, subset=subset).open(1) for subset in (job.subset, "rgb"))
        except Exception:  # whatever it is: that the task cannot be opened has been told of
            continue
        if shown is not None and rgb is not None and len(shown.bands) != n_channels == len(rgb.bands):
            yield (
                f"{job.task.name}: {model.name} takes {n_channels} bands and was shown {len(shown.bands)}; true colour"
                " would fit: --bands rgb"
            )
