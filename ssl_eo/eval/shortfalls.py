"""What results lack, in as few lines as say it: a task that fails fails for all features alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssl_eo.eval.comparison import Comparison
from ssl_eo.eval.records import Record, question_of, unmeasured
from ssl_eo.eval.wording import condition_text, features_text, value_text

__all__ = ["Shortfall", "coverage_text", "failed_tasks", "failure_alerts", "shortfalls_of"]

_MAX_ALERTS = 3  # tasks that are named one by one at the top of a page
_PLAIN = {"subset": ("all",), "size": ("native",), "partition": ("1.00x",)}  # what is not worth a word


@dataclass(frozen=True)
class Shortfall:
    """What of a task has one reason not to be there; `kind` is `error` or `skipped`."""

    kind: str
    task: str
    what: str  # features, and under which conditions
    why: str

    @property
    def title(self) -> str:
        said = ", ".join(filter(None, (self.task, self.what)))
        return f"{said} ({'failed' if self.kind == 'error' else 'skipped'})"


def shortfalls_of(problems: Sequence[Record]) -> list[Shortfall]:
    """`problems` of one task and one reason together, in their order."""
    alike: dict[tuple[str, str, str], list[Record]] = {}
    for r in problems:
        alike.setdefault((r["kind"], str(r["task"]), str(r["error"])), []).append(r)
    return [Shortfall(kind, task, _what(of), why) for (kind, task, why), of in alike.items()]


def coverage_text(comparison: Comparison, plan: Sequence[Record]) -> str:
    """How much of what was asked for (`plan`) is there; empty where all is, or nobody wrote down what was asked."""
    asked = {question_of(r): r for r in plan}
    problems = comparison.every_problem
    skipped = {r["job"] for r in problems if r["kind"] == "skipped"}
    n_asked = sum(r["job"] not in skipped for r in asked.values())
    missing = unmeasured(asked.values(), [*comparison.results, *problems])
    if not missing:
        return ""
    errors = [r for r in problems if r["kind"] == "error"]
    failed = {r["job"] for r in errors} | {r["task"] for r in errors if r.get("of_task")}
    left = [str(r["task"]) for r in missing if not {r["job"], r["task"]} & failed]
    counts = ", ".join(f"{task} ({left.count(task):,})" for task in dict.fromkeys(left))
    why = f": not yet measured are results of {counts}. The same command goes on" if left else ", the others failed"
    return f"{n_asked - len(missing):,} of {n_asked:,} asked results are there{why}."


def failure_alerts(comparison: Comparison, found: Sequence[Shortfall]) -> list[str]:
    """What the top of a page says of failures: tasks that are in no mean for them, and that others have gaps."""
    failures = [f for f in found if f.kind == "error"]
    whole: dict[str, str] = {}  # the first reason of each task
    for f in failures:
        if f.task not in comparison.tasks:
            whole.setdefault(f.task, f.why)
    gaps = dict.fromkeys(f.task for f in failures if f.task in comparison.tasks)
    named = list(whole)
    said = [f"{task} is in no mean: could not be measured ({whole[task]})." for task in named[:_MAX_ALERTS]]
    if more := named[_MAX_ALERTS:]:
        said.append(f"Neither are {', '.join(more)}; the reasons are below.")
    if gaps:
        said.append(f"Of {', '.join(gaps)} some could not be measured; what and why stands below.")
    return said


def failed_tasks(comparison: Comparison, found: Sequence[Shortfall]) -> list[str]:
    """One line for each task that failed, or of which something did."""
    reasons: dict[str, list[str]] = {}
    for f in found:
        if f.kind == "error":
            reasons.setdefault(f.task, []).append(f.why)
    more = {task: f" (and {len(of) - 1} more reasons)" if len(of) > 1 else "" for task, of in reasons.items()}
    what = {task: f"{task}: some of it" if task in comparison.tasks else f"{task}:" for task in reasons}
    return [f"{what[task]} could not be measured: {of[0]}{more[task]}" for task, of in reasons.items()]


def _what(records: Sequence[Record]) -> str:
    """Whose features, at which depths, by which probes and under which conditions."""
    said = list(dict.fromkeys(_features(r) for r in records))
    for key in ("subset", "size", "tap", "partition"):
        values = dict.fromkeys(str(r[key]) for r in records if r.get(key) is not None)
        if any(value not in _PLAIN.get(key, ()) for value in values):
            text = value_text if key == "tap" else condition_text
            said.append(" or ".join(text(key, value) for value in values))
    probes = dict.fromkeys(str(r["probe"]) for r in records if r.get("probe") is not None)
    return ", ".join([*said, f"by {' or '.join(probes)}"] if probes else said)


def _features(record: Record) -> str:
    return "all features" if record.get("of_task") else features_text(record)
