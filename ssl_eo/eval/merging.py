"""Records of several folders as those of one: whatever their order, and if one is named twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ssl_eo.eval.records import Record, question_of

__all__ = ["dated", "merged", "unanswered"]

_PROBLEMS = ("error", "skipped")


def dated(records: Iterable[Record]) -> list[Record]:
    """`records` of one folder, each with a date: what has none is as old as the newest that stands before it."""
    found: list[Record] = []
    newest = ""
    for r in records:
        newest = max(newest, str(r.get("date", "")))
        found.append(r if "date" in r else {**r, "date": newest})
    return found


def merged(records: Iterable[Record]) -> list[Record]:
    """Of each `key` the newest record, in the order in which keys were first found."""
    found: dict[Any, Record] = {}
    for r in records:
        known = found.get(r["key"])
        found[r["key"]] = r if known is None else max(known, r, key=_age)
    return list(found.values())


def unanswered(records: Sequence[Record]) -> list[Record]:
    """Of `merged` records: what could not be measured, unless a newer result is what was asked for, or of that job."""
    answers: dict[tuple[str, ...], str] = {}  # date of the newest result, by question and by job
    for r in records:
        if r["kind"] == "result":
            for asked in (question_of(r), _job(r)):
                answers[asked] = max(answers.get(asked, ""), str(r["date"]))
    problems: dict[tuple[str, ...], Record] = {}
    for r in sorted((r for r in records if r["kind"] in _PROBLEMS), key=_age):
        problems[question_of(r) if "probe" in r else _job(r)] = r
    left = {r["key"] for asked, r in problems.items() if answers.get(asked, "") <= str(r["date"])}
    return [r for r in records if r["key"] in left]


def _job(record: Record) -> tuple[str, ...]:
    return (str(record["job"]),)


def _age(record: Record) -> tuple[str, str]:
    """What is newest is greatest; of one second by what it says, so that there is always one answer."""
    return str(record["date"]), json.dumps(record, sort_keys=True)
