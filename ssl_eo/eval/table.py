"""The tables that a person reads in a terminal: the encoder beside what needs no training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ssl_eo.eval.experiments import CONDITIONS, over_seeds
from ssl_eo.eval.metrics import number_text, score_text
from ssl_eo.eval.records import Record
from ssl_eo.eval.summary import Row, Summary, summarise, title_of
from ssl_eo.eval.wording import condition_text, value_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_summary", "rows_of_results"]


def print_summary(records: Sequence[Record], stream: TextIO) -> bool:
    """Print one table for each task of `records`: the last step against step 0 and the controls.

    Returns whether all that the tables compare could be measured; what could not is named below its table.
    """
    from rich.console import Console

    console = Console(file=stream, soft_wrap=True, highlight=False, markup=False, emoji=False)
    summaries = summarise(records)
    for summary in summaries:
        counts = {r.get("n_seeds", 1) for r in records if r["task"] == summary.task and r["kind"] == "probe"}
        up_to = "up to " if len(counts) > 1 else ""
        most = max(counts, default=1)
        of_seeds = f", mean of {up_to}{most} seeds ± their standard deviation" if most > 1 else ""
        about = f"{summary.metric} of frozen features{of_seeds}" if summary.rows else "failed"
        _print_rows(summary, f"{summary.task}: {about}", console)
        for rival in dict.fromkeys(margin.rival for margin in summary.margins):
            gains = [f"{m.probe} {m.text}" for m in summary.margins if m.rival == rival]
            console.print(f"  margin over {rival}: {', '.join(gains)}")
        for remark in [*_at_edges(summary, records), *summary.failures]:
            console.print(f"  {remark}")
    return not any(summary.failures for summary in summaries)


def rows_of_results(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results of an evaluation (`ssl_eo.eval.records`) in the form of those of a training, a task for each condition.

    Conditions by which results differ (part of the training set, bands, size) stand with the task. Scores are means
    over seeds, with `spread` where these differ; what failed stands behind what was measured of its task.
    """
    every = [r for r in results if r["kind"] != "skipped"]
    varied = [axis for axis in CONDITIONS if len({r[axis] for r in every if axis in r}) > 1]
    seeds = {r["seed"] for r in every if "seed" in r}
    measured: dict[str, dict[tuple[str, ...], list[Mapping[str, Any]]]] = {}
    failed: dict[str, list[dict[str, Any]]] = {}
    for r in every:
        title = ", ".join([str(r["task"]), *(condition_text(axis, str(r[axis])) for axis in varied if axis in r)])
        of_task = measured.setdefault(title, {})
        if r["kind"] == "error":
            of_seed = f" (seed {r['seed']})" if len(seeds) > 1 and "seed" in r else ""
            said = {key: r[key] for key in ("tap", "probe", "metric") if key in r}
            row = {**_head(r, title), "kind": "error", **said, "error": f"{r['error']}{of_seed}"}
            failed.setdefault(title, []).append(row)
        else:
            of_task.setdefault((r["features"], str(r["model"]), r["tap"], r["probe"]), []).append(r)
    return [
        row
        for title, of_task in measured.items()
        for row in (*(_mean(title, of_seeds) for of_seeds in of_task.values()), *failed.get(title, ()))
    ]


def _print_rows(summary: Summary, title: str, console: Console) -> None:
    from rich.table import Table

    if not summary.rows:
        console.print(title)
        return
    table = Table(title=title, title_justify="left")
    for column in ("features", "read at", *summary.probes):
        table.add_column(column, justify="right" if column in summary.probes else "left")
    for row in summary.rows:
        table.add_row(row.title, value_text("tap", row.tap), *(_cell(summary, row, p) for p in summary.probes))
    console.print(table)


def _cell(summary: Summary, row: Row, probe: str) -> str:
    if probe not in row.scores:
        return ""
    spread = f" ± {number_text(summary.metric, row.spreads[probe])}" if probe in row.spreads else ""
    return f"{score_text(summary.metric, row.scores[probe])}{spread}"


def _head(record: Mapping[str, Any], title: str) -> dict[str, Any]:
    return {
        "task": title,
        "features": "encoder" if record["features"] == "random_encoder" else record["features"],
        "is_trained": record["features"] == "encoder",
        "step": record["step"] or 0,
        **({"model": record["model"]} if record["features"] == "encoder" else {}),
    }


def _mean(title: str, of_seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of results that differ by their seed alone."""
    first = of_seeds[0]
    shared = [key for key in first["scores"] if all(key in r["scores"] for r in of_seeds)]
    scores = {key: over_seeds([r["scores"][key] for r in of_seeds]) for key in shared}
    said: dict[str, Any] = {key: first[key] for key in ("tap", "probe", "metric")}
    said |= {key: mean for key, (mean, _) in scores.items()}
    if (spread := scores[first["metric"]][1]) is not None:
        said["spread"] = spread
    edges = [r["chosen"]["at_edge"] for r in of_seeds if "at_edge" in r["chosen"]]
    chosen = {**first["chosen"], "at_edge": max(edges)} if edges else first["chosen"]
    return {**_head(first, title), "kind": "probe", **said, "chosen": chosen, "n_seeds": len(of_seeds)}


def _at_edges(summary: Summary, records: Iterable[Record]) -> list[str]:
    """Probes that chose the first or the last of what they may choose from: beyond it may be a better score."""
    found = {
        (title_of(r), r["tap"], r["probe"])
        for r in records
        if r["task"] == summary.task and r["kind"] == "probe" and r.get("chosen", {}).get("at_edge")
    }
    remarks = []
    for probe in summary.probes:
        rows = [row for row in summary.rows if (row.title, row.tap, probe) in found]
        places = [f"{row.title} at {value_text('tap', row.tap)}" for row in rows]
        told = f"{probe} took the first or the last option of its grid (beyond it may be a slightly better score) for"
        remarks += [f"{told} {', '.join(places)}"] if places else []
    return remarks
