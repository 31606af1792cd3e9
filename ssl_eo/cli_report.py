"""The command `ssl-eo report`. Everything heavy is imported inside it."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments"]

_FILES = {
    "out": "one page about all RESULTS, NAME.html; else results.html in the first folder of ssl-eo eval",
    "csv": "also write the scores as CSV",
    "markdown": "and the tables as Markdown",
    "latex": "and as LaTeX",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `ssl-eo report` takes to its parser."""
    parser.add_argument("paths", nargs="+", metavar="RESULTS", help="folders of ssl-eo eval, run directories")
    for name, text in _FILES.items():
        parser.add_argument(f"--{name}", metavar="FILE", default=None, help=text)
    ranges = "JSON of {dataset: [low, high]} that brings scores to one scale, as GEO-Bench has it"
    parser.add_argument("--normalizer", metavar="FILE", nargs="+", default=None, help=ranges)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ssl_eo.eval.records import RESULTS, has_results
    from ssl_eo.eval.report import is_run, write_report
    from ssl_eo.eval.results_page import Files, write_results_page

    paths = [Path(path) for path in arguments.paths]
    paths = [path.parent if path.name == RESULTS and path.is_file() else path for path in paths]
    results = [path for path in paths if has_results(path)]
    runs = [path for path in paths if not has_results(path)]
    if strange := [path for path in runs if not is_run(path)]:
        raise ValueError(f"{strange[0]} has no {RESULTS} of ssl-eo eval, and it is not a run directory")
    of_results = [name for name in (*_FILES, "normalizer") if getattr(arguments, name) is not None]
    if of_results and not results:
        raise ValueError(_only_runs(of_results[0], runs))
    if not results or arguments.out is None:
        for path in runs:
            print(write_report(path))
    if results:
        named = {name: Path(path) for name in _FILES if (path := getattr(arguments, name)) is not None}
        files = Files(**{"out": results[0] / "results.html", **named})
        ranges = [Path(path) for path in arguments.normalizer or ()]
        for path in write_results_page(results, files, [path for path in paths if is_run(path)], ranges):
            print(path)
    return 0


def _only_runs(option: str, runs: list[Path]) -> str:
    """What to do instead, where an option of evaluations is given and there are runs alone."""
    names = " ".join(str(path) for path in runs)
    evaluate = f"ssl-eo eval --model {runs[0]} --tasks ... --out scores"
    many = f" for each of {names}" if len(runs) > 1 else ""
    return (
        f"--{option} is for results of ssl-eo eval, and {runs[0]} has none. A page for each run: ssl-eo report {names}."
        f" One page that compares them: {evaluate}{many}, then ssl-eo report scores --{option} ..."
    )
