"""What the results of a task come to: which rows are compared, what they are called, who is ahead and by how much.

The printed table and the page of a run both show what is decided here. A row is one kind of features at one tap: the
encoder at the last step that was measured, the encoder before its first step, and the controls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ssl_eo.eval.features import ALL_TAPS
from ssl_eo.eval.metrics import HIGHER_IS_BETTER
from ssl_eo.jsonl import read_jsonl

__all__ = [
    "Margin",
    "Record",
    "Row",
    "Summary",
    "best_of",
    "better",
    "is_ratio",
    "newest",
    "read_results",
    "score_of",
    "score_text",
    "summarise",
    "tap_rank",
    "title_of",
]

Record = Mapping[str, Any]
T = TypeVar("T")

_PLAIN = ("rmse", "mae", "r2")  # are shown as they are, the others are ratios
_IDENTITY = ("step", "kind", "task", "features", "tap", "probe")


@dataclass(frozen=True)
class Row:
    """Results of one kind of features at one tap, by probe; `scores` are of the metric that ranks the task."""

    title: str  # "encoder, step 1,500", "random encoder", "band statistics"
    tap: str  # "last", "depth 0.50", "all", "pixels"
    step: int
    is_final: bool  # the encoder at its last step
    scores: dict[str, float]
    macro_accuracy: dict[str, float]
    effective_rank: float | None


@dataclass(frozen=True)
class Margin:
    """The encoder against the best row of one rival that needs no training, by one probe."""

    probe: str
    metric: str
    score: float
    rival: str  # title
    rival_score: float

    @property
    def gain(self) -> float:
        """How much better the encoder is: above 0 where it is, whether much or little of the metric is good."""
        gain = self.score - self.rival_score
        return gain if HIGHER_IS_BETTER[self.metric] else -gain

    @property
    def text(self) -> str:
        """`+12.3 points`, or of what is no ratio `+0.123`."""
        return f"{100 * self.gain:+.1f} points" if is_ratio(self.metric) else f"{self.gain:+.3g}"


@dataclass(frozen=True)
class Summary:
    """One task: its rows with the final encoder first, and what of them could not be measured."""

    task: str
    metric: str  # that ranks it
    rows: list[Row]
    failures: list[str]

    @property
    def probes(self) -> list[str]:
        return list(dict.fromkeys(probe for row in self.rows for probe in row.scores))

    @cached_property
    def final(self) -> Row | None:
        """The row that stands for the trained encoder."""
        return max((row for row in self.rows if row.is_final), key=lambda row: tap_rank(row.tap), default=None)

    @cached_property
    def margins(self) -> list[Margin]:
        """`final` against every rival, probe by probe.

        Our tap is fixed beforehand and the rival's is its best, so that no choice flatters the encoder.
        """
        if self.final is None:
            return []
        rivals: dict[tuple[str, str], list[float]] = {}
        for row in self.rows:
            for probe, score in row.scores.items():
                if not row.is_final and probe in self.final.scores:
                    rivals.setdefault((row.title, probe), []).append(score)
        return [
            Margin(probe, self.metric, self.final.scores[probe], title, best_of(self.metric, scores, float))
            for (title, probe), scores in rivals.items()
        ]


def best_of(metric: str, items: Iterable[T], score: Callable[[T], float]) -> T:
    """The one of `items` with the best `score`; of equal ones the first."""
    return max(items, key=score) if HIGHER_IS_BETTER[metric] else min(items, key=score)


def better(metric: str, a: float, b: float) -> float:
    """The better of two scores."""
    return best_of(metric, (a, b), float)


def tap_rank(tap: str) -> tuple[bool, bool, str]:
    """The greatest is where an encoder is read for comparisons: all taps together, else the last, else the deepest."""
    return (tap == ALL_TAPS, tap == "last", tap)


def is_ratio(metric: str) -> bool:
    """Whether a score of it is from 0 to 1 (kappa: at most 1) and is shown in percent."""
    return metric not in _PLAIN


def score_text(metric: str, score: float) -> str:
    """`71.8 %`, or of what is no ratio `0.718`."""
    return f"{100 * score:.1f} %" if is_ratio(metric) else f"{score:.3g}"


def score_of(record: Record) -> float:
    """The score by which the task of the record of a probe is ranked."""
    return float(record[record["metric"]])


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
    if not _is_trained(record):
        return "random encoder"
    return f"encoder, step {record['step']:,}" if record["step"] else "encoder"


def _summary(task: str, records: Sequence[Record]) -> Summary:
    last = max((r["step"] for r in records if _is_trained(r) and r["kind"] != "error"), default=0)
    groups: dict[tuple[str, str], list[Record]] = {}
    failures: dict[tuple[str, ...], str] = {}  # of all with a title, or of one probe at one tap
    for r in sorted(records, key=_place):
        if _is_trained(r) and r["step"] < last:
            continue
        title = title_of(r)
        one = (title, str(r.get("tap")), str(r.get("probe")))
        if r["kind"] == "error" and "probe" in r:
            failures[one] = f"{title}: {r['probe']} at {r['tap']} could not be measured: {r['error']}"
        elif r["kind"] == "error":
            failures[title,] = f"{title} could not be measured: {r['error']}"
        else:
            failures.pop((title,), None)
            failures.pop(one, None)
            groups.setdefault((title, str(r["tap"]).replace("_", " ")), []).append(r)
    rows = [_row(title, tap, group) for (title, tap), group in groups.items()]
    metric = next((str(r["metric"]) for r in records if r["kind"] == "probe"), "accuracy")
    return Summary(task, metric, rows, list(failures.values()))


def _row(title: str, tap: str, records: Sequence[Record]) -> Row:
    probes = [r for r in records if r["kind"] == "probe"]
    ranks = [r["effective_rank"] for r in records if r["kind"] == "health"]
    return Row(
        title=title,
        tap=tap,
        step=records[-1]["step"],
        is_final=_is_trained(records[-1]),
        scores={r["probe"]: score_of(r) for r in probes},
        macro_accuracy={r["probe"]: r["macro_accuracy"] for r in probes if "macro_accuracy" in r},
        effective_rank=ranks[-1] if ranks else None,
    )


def _is_trained(record: Record) -> bool:
    """Of released weights no step is known, and the record says that they are trained."""
    return bool(record["features"] == "encoder" and record.get("is_trained", record["step"] > 0))


def _place(record: Record) -> int:
    """The trained encoder, the random one, the controls."""
    return 0 if _is_trained(record) else 1 if record["features"] == "encoder" else 2
