"""The command `ssl-eo eval`. Everything heavy is imported inside it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_eo.cli_eval_tasks import known_tasks, print_tasks, read_task
from ssl_eo.cli_stopping import until_stopped
from ssl_eo.cluster import EXIT_DONE, EXIT_FAILURE, read_launch
from ssl_eo.components import told_of

if TYPE_CHECKING:
    from ssl_eo.eval.jobs import Evaluation
    from ssl_eo.eval.offline import Model

__all__ = ["add_arguments"]

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
    return until_stopped(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> int:
    _refuse_overrides(arguments)
    out = _folder(arguments.out)
    import torch

    from ssl_eo.eval.offline import Model, evaluate
    from ssl_eo.eval.records import TABLE, read_results, write_csv
    from ssl_eo.eval.table import print_summary, rows_of_results
    from ssl_eo.opening import open_model

    launch = read_launch(os.environ)
    device = f"cuda:{launch.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    with told_of("--model"):
        opened = open_model(arguments.model)
    model = Model(opened.name, opened.encoder, opened.step)
    plan = _plan(arguments, opened.features, device)
    _check_sizes(model, plan)
    results = evaluate(model, plan, out)
    if launch.rank != 0:
        return EXIT_DONE
    results = _named(model, results, out)
    write_csv(out / TABLE, read_results(out))
    is_whole = print_summary(rows_of_results(results), sys.stdout)
    for remark in dict.fromkeys(_remarks(results)):
        print(remark)
    return EXIT_DONE if is_whole else EXIT_FAILURE


def _folder(text: str) -> Path:
    """The folder of `--out`, which need not be there. Raises `ValueError` where it cannot be one."""
    if not text.strip():
        raise ValueError(f"--out: {text!r} names no folder (a variable that is not set?)")
    out = Path(text)
    there = next(path for path in (out, *out.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise ValueError(f"--out {text}: {there} is no folder; give another")
    return out


def _plan(arguments: argparse.Namespace, features: Mapping[str, Any], device: str) -> Evaluation:
    """What is asked for; `features` is how they are read unless the command says so. Errors name the option."""
    from ssl_eo.eval.jobs import Evaluation

    for name in _LISTS:
        if (values := getattr(arguments, name)) is not None and not _listed(values):
            raise ValueError(f"--{name}: nothing is named; leave the option out for its default")
    given: dict[str, Any] = {
        "probes": _listed(arguments.protocol),
        "partitions": _listed(arguments.partitions),
        "subsets": _listed(arguments.bands),
        "sizes": _listed(arguments.size),
        "seeds": _numbers("--seeds", arguments.seeds, int),
        "taps": _numbers("--taps", arguments.taps, float),
        "pool": arguments.pool,
        "precision": arguments.precision,
    }
    tasks = [read_task(name) for name in known_tasks(_listed(arguments.tasks))]
    try:
        return Evaluation(
            tasks=tasks,
            controls=not arguments.no_controls,
            batch_size=arguments.batch_size,
            n_workers=arguments.workers,
            n_resamples=arguments.resamples,
            device=device,
            **{**features, **{key: value for key, value in given.items() if value not in (None, [])}},
        )
    except ValueError as error:
        raise ValueError(_with_option(str(error))) from None


def _with_option(message: str) -> str:
    """`message`, which begins with a key of the plan, with the option in its place."""
    key = re.split(r"\W", message, maxsplit=1)[0]
    return f"--{_option_of(key)}{message.removeprefix(key)}"


def _option_of(key: str) -> str:
    """The name of the option for a key of a config, or of a plan."""
    return _NAMES.get(key, key).replace("_", "-")


def _refuse_overrides(arguments: argparse.Namespace) -> None:
    """Say which option it is where a `key=value` was given, behind options or as one of their values."""
    for text in [*arguments.overrides, *(text for name in _LISTS for text in getattr(arguments, name) or ())]:
        key, sign, value = text.partition("=")
        if sign and re.fullmatch(r"[\w.\[\]]+", key) and not Path(text).exists():
            last = key.rpartition(".")[2]
            name = _option_of(last)
            is_flag, is_default = name == "no-controls", (last, value.lower()) == ("controls", "true")
            option = f"--{name}" + ("" if is_flag else f" {value.strip('[]')}")
            is_known = name.replace("-", "_") in vars(arguments) and name not in _NO_OPTIONS
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
    """What a table of scores does not show: flags of tasks, what was skipped, fits that are not at their optimum."""
    from ssl_eo.eval.experiments import CONDITIONS
    from ssl_eo.eval.probes import is_at_optimum
    from ssl_eo.eval.task_flags import flags_of_records
    from ssl_eo.eval.wording import NOT_AT_OPTIMUM, condition_text, features_text, value_text

    measured: dict[str, list[Mapping[str, Any]]] = {}
    for r in results:
        if r["kind"] == "result":
            measured.setdefault(r["task"], []).append(r)
    for task, records in measured.items():
        yield from (f"{task}: {flag}" for flag in flags_of_records(records))
    for r in results:
        if r["kind"] == "skipped":
            yield f"skipped: {r['task']}: {r['error']}"
        elif r["kind"] == "result" and not is_at_optimum(r["chosen"]):
            conditions = ", ".join(condition_text(axis, r[axis]) for axis in CONDITIONS)
            of = f"{features_text(r)} at {value_text('tap', r['tap'])}"
            yield f"{r['task']}: {r['probe']} on {of} ({conditions}, seed {r['seed']}) {NOT_AT_OPTIMUM}"
