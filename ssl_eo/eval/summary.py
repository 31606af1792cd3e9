"""What the probes of one run come to: its rows, what they are called, and the margins over what needs no training.

The printed table and the page of a run both show this. A row is one kind of features at one tap: the encoder at the
last step that was measured, the encoder before its first step, and the controls. What of them is compared with what is
decided in `ssl_eo.eval.comparison`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from ssl_eo.eval.comparison import Margin, reading_rank
from ssl_eo.eval.entrants import EntrantKind
from ssl_eo.eval.metrics import best_of
from ssl_eo.eval.record_checks import is_of_training
from ssl_eo.eval.records import Record
from ssl_eo.eval.wording import features_text, value_text
from ssl_eo.jsonl import read_jsonl

__all__ = [
    "Row",
    "Summary",
    "newest",
    "read_task_records",
    "score_of",
    "summarise",
    "title_of",
]

_IDENTITY = ("step", "kind", "task", "features", "tap", "probe")


@dataclass(frozen=True)
class Row:
    """Results of one kind of features at one tap, by probe; `scores` are of the metric that ranks the task."""

    title: str  # "encoder, step 1,500", in an evaluation its name; "random encoder", "band statistics"
    kind: EntrantKind  # a model is the encoder at its last step
    tap: str  # "last", "depth_0.50", "all", "pixels"
    step: int
    scores: dict[str, float]
    macro_accuracy: dict[str, float]
    effective_rank: float | None
    spreads: dict[str, float]  # by probe: standard deviation over seeds, where scores are means over several


@dataclass(frozen=True)
class Summary:
    """One task: its rows with the final encoder first, and what of them could not be measured."""

    task: str
    metric: str  # that ranks it; empty where nothing was measured that says it
    rows: list[Row]
    failures: list[str]

    @property
    def probes(self) -> list[str]:
        return list(dict.fromkeys(probe for row in self.rows for probe in row.scores))

    @cached_property
    def final(self) -> Row | None:
        """The row that stands for the trained encoder."""
        return max((row for row in self.rows if row.kind == "model"), key=lambda r: reading_rank(r.tap), default=None)

    @cached_property
    def margins(self) -> list[Margin]:
        """`final` against what is best of every rival, probe by probe."""
        if self.final is None:
            return []
        rivals: dict[tuple[str, EntrantKind, str], list[float]] = {}
        for row in self.rows:
            for probe, score in row.scores.items():
                if row.kind != "model" and probe in self.final.scores:
                    rivals.setdefault((row.title, row.kind, probe), []).append(score)
        return [
            Margin(probe, self.metric, self.final.scores[probe], title, kind, best_of(self.metric, scores, float))
            for (title, kind, probe), scores in rivals.items()
        ]


def score_of(record: Record) -> float:
    """The score by which the task of the record of a probe is ranked."""
    return float(record[record["metric"]])


def read_task_records(path: Path) -> list[Record]:
    """The records of tasks of an `eval.jsonl` by step; where one was written several times, the last counts."""
    return newest([r for r in read_jsonl(path, is_of_training) if {"task", "features"} <= r.keys()], _IDENTITY)


def newest(records: Sequence[Record], identity: Sequence[str]) -> list[Record]:
    """Of the records that agree in the keys `identity`, the last one; by step."""
    kept: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = tuple(record.get(k) for k in identity)
        kept.pop(key, None)  # it takes its place anew, behind what was written before
        kept[key] = record
    return sorted(kept.values(), key=lambda r: int(r["step"]))


def summarise(records: Sequence[Record]) -> list[Summary]:
    """One summary for each task of `records` (from `read_task_records`), in the order of the tasks."""
    tasks = dict.fromkeys(str(r["task"]) for r in records)
    return [_summary(task, [r for r in records if r["task"] == task]) for task in tasks]


def title_of(record: Record) -> str:
    """What the features of a record are called; the encoder by its name, where it has one."""
    if record["features"] != "encoder" or "model" in record:
        return features_text(record)
    if _kind_of(record) == "random":
        return "random encoder"
    return f"encoder, step {record['step']:,}" if record["step"] else "encoder"


def _summary(task: str, records: Sequence[Record]) -> Summary:
    last = max((r["step"] for r in records if _kind_of(r) == "model" and r["kind"] != "error"), default=0)
    groups: dict[tuple[EntrantKind, str, str], list[Record]] = {}  # a model may be called as a control is
    failures: dict[tuple[str, ...], str] = {}  # of all with a title, or of one probe at one tap
    for r in sorted(records, key=lambda r: get_args(EntrantKind).index(_kind_of(r))):
        if _kind_of(r) == "model" and r["step"] < last:
            continue
        kind, title = _kind_of(r), title_of(r)
        one = (kind, title, str(r.get("tap")), str(r.get("probe")))
        if r["kind"] == "error" and "probe" in r:
            where = value_text("tap", str(r["tap"]))
            failures[one] = f"{title}: {r['probe']} at {where} could not be measured: {r['error']}"
        elif r["kind"] == "error":
            failures[kind, title] = f"{title} could not be measured: {r['error']}"
        else:
            failures.pop((kind, title), None)
            failures.pop(one, None)
            groups.setdefault((kind, title, str(r["tap"])), []).append(r)
    rows = [_row(*place, group) for place, group in groups.items()]
    metric = next((str(r["metric"]) for r in records if r.get("metric")), "")
    return Summary(task, metric, rows, list(failures.values()))


def _row(kind: EntrantKind, title: str, tap: str, records: Sequence[Record]) -> Row:
    probes = [r for r in records if r["kind"] == "probe"]
    ranks = [r["effective_rank"] for r in records if r["kind"] == "health" and "effective_rank" in r]
    return Row(
        title=title,
        kind=kind,
        tap=tap,
        step=records[-1]["step"],
        scores={r["probe"]: score_of(r) for r in probes},
        macro_accuracy={r["probe"]: r["macro_accuracy"] for r in probes if "macro_accuracy" in r},
        effective_rank=ranks[-1] if ranks else None,
        spreads={r["probe"]: r["spread"] for r in probes if "spread" in r},
    )


def _kind_of(record: Record) -> EntrantKind:
    """Of released weights no step is known, and the record says that they are trained."""
    if record["features"] != "encoder":
        return "control"
    return "model" if record.get("is_trained", record["step"] > 0) else "random"
