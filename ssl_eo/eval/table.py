"""The tables that a person reads in a terminal: the encoder beside what needs no training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from ssl_eo.eval.metrics import score_text
from ssl_eo.eval.records import Record
from ssl_eo.eval.summary import Summary, summarise, title_of

__all__ = ["print_summary", "rows_of_results"]

_PARTS = ("partition", "subset", "size", "seed")  # by which results of one task may differ


def print_summary(records: Sequence[Record], stream: TextIO) -> bool:
    """Print one table for each task of `records`: the last step against step 0 and the controls.

    Returns whether all that the tables compare could be measured; what could not is named below its table.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, soft_wrap=True, highlight=False, markup=False, emoji=False)
    summaries = summarise(records)
    for summary in summaries:
        table = Table(title=f"{summary.task}: {summary.metric} of frozen features", title_justify="left")
        for column in ("features", "read at", *summary.probes):
            table.add_column(column, justify="right" if column in summary.probes else "left")
        for row in summary.rows:
            cells = (score_text(summary.metric, row.scores[p]) if p in row.scores else "" for p in summary.probes)
            table.add_row(row.title, row.tap, *cells)
        console.print(table)
        for rival in dict.fromkeys(margin.rival for margin in summary.margins):
            gains = [f"{m.probe} {m.text}" for m in summary.margins if m.rival == rival]
            console.print(f"  margin over {rival}: {', '.join(gains)}")
        for remark in [*_at_edges(summary, records), *summary.failures]:
            console.print(f"  {remark}")
    return not any(summary.failures for summary in summaries)


def rows_of_results(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results of an evaluation (`ssl_eo.eval.records`) in the form of those of a training, a task for each variant.

    A variant is told by what differs between the results of a task: part of the training set, bands, size, seed.
    """
    measured = [r for r in results if r["kind"] != "skipped"]
    varied = [part for part in _PARTS if len({r[part] for r in measured if part in r}) > 1]
    rows = []
    for r in measured:
        said = [str(r[part]) for part in varied if part in r]
        head = {
            "task": " ".join([r["task"], *(f"[{text}]" for text in said)]),
            "features": "encoder" if r["features"] == "random_encoder" else r["features"],
            "is_trained": r["features"] == "encoder",
            "step": r["step"] or 0,
        }
        said_of_probe = {key: r[key] for key in ("tap", "probe", "metric") if key in r}
        if r["kind"] == "error":
            rows.append({**head, "kind": "error", **said_of_probe, "error": r["error"]})
        else:
            rows.append({**head, "kind": "probe", **said_of_probe, **r["scores"], "chosen": r["chosen"]})
    return rows


def _at_edges(summary: Summary, records: Iterable[Record]) -> list[str]:
    """Probes that chose the first or the last of what they may choose from: beyond it may be a better score."""
    found = {
        (title_of(r), str(r["tap"]).replace("_", " "), r["probe"])
        for r in records
        if r["task"] == summary.task and r["kind"] == "probe" and r.get("chosen", {}).get("at_edge")
    }
    remarks = []
    for probe in summary.probes:
        places = [f"{row.title} at {row.tap}" for row in summary.rows if (row.title, row.tap, probe) in found]
        remarks += [f"{probe} chose the end of its grid for {', '.join(places)}"] if places else []
    return remarks
