"""What the results of a task come to: which rows are compared, what they are called, who is ahead and by how much.

The printed table and the page of a run both show what is decided here. A row is one kind of features at one tap: the
encoder at the last step that was measured, the encoder before its first step, and the controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ssl_eo.jsonl import read_jsonl

__all__ = ["Margin", "Record", "Row", "Summary", "newest", "read_results", "summarise", "title_of"]

Record = Mapping[str, Any]

_IDENTITY = ("step", "kind", "task", "features", "tap", "probe")


@dataclass(frozen=True)
class Row:
    """Results of one kind of features at one tap; accuracies by probe, as ratios."""

    title: str  # "encoder, step 1,500", "random encoder", "band statistics"
    tap: str  # "last", "depth 0.50", "all", "pixels"
    step: int
    is_final: bool  # the encoder at its last step
    accuracy: dict[str, float]
    macro_accuracy: dict[str, float]
    effective_rank: float | None


@dataclass(frozen=True)
class Margin:
    """The encoder against the best row of one rival that needs no training, by one probe."""

    probe: str
    accuracy: float
    rival: str  # title
    rival_accuracy: float

    @property
    def points(self) -> float:
        return 100 * (self.accuracy - self.rival_accuracy)


@dataclass(frozen=True)
class Summary:
    """One task: its rows with the final encoder first, and what of them could not be measured."""

    task: str
    rows: list[Row]
    failures: list[str]

    @property
    def probes(self) -> list[str]:
        return list(dict.fromkeys(probe for row in self.rows for probe in row.accuracy))

    @cached_property
    def final(self) -> Row | None:
        """The row that stands for the trained encoder: all taps together, else the last layer, else the first tap."""
        rows = [row for row in self.rows if row.is_final]
        return max(rows, key=lambda row: (row.tap == "all", row.tap == "last"), default=None)

    @cached_property
    def margins(self) -> list[Margin]:
        """`final` against every rival, probe by probe.

        Our tap is fixed beforehand and the rival's is the best by accuracy, so that no choice flatters the encoder.
        """
        if self.final is None:
            return []
        best: dict[tuple[str, str], float] = {}
        for row in self.rows:
            for probe, accuracy in row.accuracy.items():
                if not row.is_final and probe in self.final.accuracy:
                    best[row.title, probe] = max(accuracy, best.get((row.title, probe), 0.0))
        return [Margin(probe, self.final.accuracy[probe], title, a) for (title, probe), a in best.items()]


def read_results(path: Path) -> list[Record]:
    """The records of an `eval.jsonl` by step; where one result was written several times, the last counts."""
    return newest([r for r in read_jsonl(path) if {"step", "kind", "task", "features"} <= r.keys()], _IDENTITY)


def newest(records: Sequence[Record], identity: Sequence[str]) -> list[Record]:
    """Of the records that agree in the keys `identity`, the last one; by step."""
    kept: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = tuple(record.get(k) for k in identity)
        kept.pop(key, None)  # it takes its place anew, behind what was written before
        kept[key] = record
    return sorted(kept.values(), key=lambda r: int(r["step"]))


def summarise(records: Sequence[Record]) -> list[Summary]:
    """One summary for each task of `records` (from `read_results`), in the order of the tasks."""
    tasks = dict.fromkeys(str(r["task"]) for r in records)
    return [_summary(task, [r for r in records if r["task"] == task]) for task in tasks]


def title_of(record: Record) -> str:
    """What the features of a record are called."""
    if record["features"] != "encoder":
        return str(record["features"]).replace("_", " ")
    return f"encoder, step {record['step']:,}" if record["step"] else "random encoder"


def _summary(task: str, records: Sequence[Record]) -> Summary:
    last = max((r["step"] for r in records if _is_trained(r) and r["kind"] != "error"), default=0)
    groups: dict[tuple[str, str], list[Record]] = {}
    failures: dict[str, str] = {}
    for r in sorted(records, key=_place):
        if _is_trained(r) and r["step"] < last:
            continue
        title = title_of(r)
        if r["kind"] == "error":
            failures[title] = f"{title} could not be measured: {r['error']}"
        else:
            failures.pop(title, None)
            groups.setdefault((title, str(r["tap"]).replace("_", " ")), []).append(r)
    rows = [_row(title, tap, group) for (title, tap), group in groups.items()]
    return Summary(task, rows, list(failures.values()))


def _row(title: str, tap: str, records: Sequence[Record]) -> Row:
    probes = [r for r in records if r["kind"] == "probe"]
    ranks = [r["effective_rank"] for r in records if r["kind"] == "health"]
    return Row(
        title=title,
        tap=tap,
        step=records[-1]["step"],
        is_final=_is_trained(records[-1]),
        accuracy={r["probe"]: r["accuracy"] for r in probes},
        macro_accuracy={r["probe"]: r["macro_accuracy"] for r in probes if "macro_accuracy" in r},
        effective_rank=ranks[-1] if ranks else None,
    )


def _is_trained(record: Record) -> bool:
    return bool(record["features"] == "encoder" and record["step"] > 0)


def _place(record: Record) -> int:
    """The trained encoder, the random one, the controls."""
    return 0 if _is_trained(record) else 1 if record["features"] == "encoder" else 2
