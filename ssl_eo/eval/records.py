"""What an evaluation leaves: `results.jsonl`, one object a result, which says all that is needed to get it again.

A result has a `key`, the hash of everything that it depends on: weights, data, what was shown, probe, partition, seed,
code. So an evaluation that was stopped goes on, and results of several machines are put together by
concatenation. `results.csv` holds the scores in the columns of torchgeo-bench.

`plan.jsonl` says what was asked for, so that what is missing can be told from what nobody wanted: one object a forward
pass, with what is run on its features.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_eo.eval.record_checks import is_of_evaluation
from ssl_eo.files import atomic_write
from ssl_eo.jsonl import JsonLines, read_jsonl

__all__ = [
    "PLAN",
    "QUESTION",
    "RESULTS",
    "TABLE",
    "Record",
    "add_to_plan",
    "append",
    "count_lines",
    "has_results",
    "key_of",
    "key_of_job",
    "merged",
    "packed",
    "question_of",
    "read_plan",
    "read_results",
    "unmeasured",
    "unpacked",
    "write_csv",
]

Record = Mapping[str, Any]  # an object of results.jsonl, or of the eval.jsonl of a run
R = TypeVar("R", bound=Record)

RESULTS, PLAN, TABLE = "results.jsonl", "plan.jsonl", "results.csv"
QUESTION = ("job", "tap", "taps", "probe", "partition", "seed")  # what a result answers, whatever data and code
_COLUMNS = (
    *("dataset", "method", "metric_name", "metric_value", "ci_lower", "ci_upper", "feature_dim", "best_c", "best_lr"),
    *("best_batch_size", "n_train", "n_val", "n_test", "seed", "model", "name", "normalization", "image_size"),
    *("interpolation", "partition", "bands", "bootstrap", "c_range", "merge_val"),
    *("tap", "pool", "step", "weights"),  # ours, behind those of torchgeo-bench
)


def key_of(facts: Mapping[str, Any]) -> str:
    """The hash of plain values."""
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()


def key_of_job(job: str) -> str:
    """The key of what is said of a whole job: that it failed, or that there is nothing to do."""
    return f"job {job}"


def packed(values: ArrayLike) -> str:
    """Many numbers `[n]` in one short string: float32, little-endian, in base64."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def unpacked(text: str) -> NDArray[np.float64]:
    """The numbers `[n]` of `packed`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)


def append(folder: Path, records: Sequence[Record]) -> None:
    """Add `records` to the results of `folder`, all or, after a kill, the first of them. Processes may share it."""
    with _locked(folder), JsonLines(folder / RESULTS) as file:
        for record in records:
            file.write(record)


def has_results(folder: Path) -> bool:
    """Whether `ssl-eo eval` wrote results to it."""
    return (folder / RESULTS).is_file()


def count_lines(folder: Path) -> int:
    """The lines of the results of `folder` that hold anything, whatever that is."""
    return sum(not line.isspace() for line in (folder / RESULTS).read_bytes().splitlines(keepends=True))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """What counts of the results of `folder`: see `_counting`."""
    return _counting(read_jsonl(folder / RESULTS, is_of_evaluation))


def merged(records: Iterable[Record]) -> list[Record]:
    """What counts of the results of several folders, by their dates: whatever their order, and if one is named twice.

    They are in the order in which their keys were first found.
    """
    newest: dict[str, Record] = {}
    for r in records:
        known = newest.get(r["key"])
        newest[r["key"]] = r if known is None else max(known, r, key=_age)
    # Of one second a problem counts as the later one: it may not be hidden.
    by_date = sorted(newest.values(), key=lambda r: (str(r["date"]), r["kind"] != "result", r["key"]))
    keys = {r["key"] for r in _counting(by_date)}
    return [r for key, r in newest.items() if key in keys]


def _age(record: Record) -> tuple[str, str]:
    """What is newest is greatest; of one second by what it says, so that there is always one answer."""
    return str(record["date"]), json.dumps(record, sort_keys=True)


def _counting(records: Iterable[R]) -> list[R]:
    """Of `records`, made one after another, the newest of each `key`, in the order in which keys were first found.

    A problem (an error, what was skipped) counts until something newer takes its place, see `_answered`; a record
    `cleared` takes away whatever has its key.
    """
    found: dict[str, R] = {}
    problems: dict[tuple[str, ...], str] = {}  # keys, by what they are of
    for record in records:
        key = record["key"]
        if record["kind"] == "cleared":
            found.pop(key, None)
            continue
        answered = _answered(record)
        for before in {problems.pop(of, key) for of in answered} - {key}:
            found.pop(before, None)
        found[key] = record
        if record["kind"] != "result":
            problems[answered[0]] = key
    return list(found.values())


def _answered(record: Record) -> list[tuple[str, ...]]:
    """What older problems are of that count no more once there is `record`.

    Of a result that is its question, under whatever key (data were mended, the version has changed), and its whole job;
    of a problem what it is of itself, one or the other.
    """
    question, job = question_of(record), (str(record["job"]),)
    if record["kind"] == "result":
        return [question, job]
    return [question if "probe" in record else job]


def question_of(record: Record) -> tuple[str, ...]:
    """What a result answers, or an asked one of `read_plan` would: the values of `QUESTION`."""
    return tuple(str(record.get(name)) for name in QUESTION)


def add_to_plan(folder: Path, jobs: Sequence[Record]) -> None:
    """Note what is asked for in `folder`, unless it has been before. Processes may share it.

    Each of `jobs` has `job`, what names it (`task`, `features`, `model`, `subset`, `size`), and lists of what is run on
    its features, every combination of them: `places` (objects with `tap`, and `taps` where that is all of them),
    `probes`, `partitions` and `seeds`.
    """
    with _locked(folder):
        known = {key_of(line) for line in read_jsonl(folder / PLAN, _is_planned)}
        with JsonLines(folder / PLAN) as file:
            for job in jobs:
                if key_of(job) not in known:
                    file.write(job)


def read_plan(folder: Path) -> list[dict[str, Any]]:
    """All results that any call has asked for in `folder`, each once; none where nobody has written that down.

    Each has the keys of `QUESTION`, and `task`, `features`, `model`, `subset` and `size`. See `unmeasured`.
    """
    found = {}
    for line in read_jsonl(folder / PLAN, _is_planned):
        head = {key: line.get(key) for key in ("job", "task", "features", "model", "subset", "size")}
        for place, probe, part, seed in product(line["places"], line["probes"], line["partitions"], line["seeds"]):
            asked = {**head, **place, "probe": probe, "partition": part, "seed": seed}
            found[question_of(asked)] = asked
    return list(found.values())


def unmeasured(plan: Iterable[Record], records: Iterable[Record]) -> list[Record]:
    """Those of `plan` (`read_plan`) for which `records` (`read_results`) hold no result.

    What was skipped, since a tile has no such bands, is not among them.
    """
    records = list(records)
    answered = {question_of(r) for r in records if r["kind"] == "result"}
    skipped = {r["job"] for r in records if r["kind"] == "skipped"}
    return [asked for asked in plan if question_of(asked) not in answered and asked["job"] not in skipped]


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """The ranking score of each result, in the columns of torchgeo-bench (github.com/torchgeo/torchgeo-bench).

    What has no meaning here stays empty: nobody chooses a batch size or a range of penalties.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records:
        if record["kind"] == "result":
            writer.writerow(_row(record))
    atomic_write(path, text.getvalue())


def _row(record: Record) -> dict[str, Any]:
    metric, chosen = record["metric"], record["chosen"]
    low, high = record["intervals"].get(metric, (None, None))
    penalty = chosen.get("penalty")
    return {
        "dataset": record["task"],
        "method": record["probe"],
        "metric_name": metric,
        "metric_value": record["scores"][metric],
        "ci_lower": low,
        "ci_upper": high,
        "feature_dim": record["n_features"],
        "best_c": 1 / penalty if penalty and record["probe"] == "logistic" else None,
        "best_lr": chosen.get("lr"),
        "n_train": record["n_train"],
        "n_val": record["n_val"],
        "n_test": record["n_test"],
        "seed": record["seed"],
        "model": record["features"] if record["features"] != "encoder" else record["model"],
        "name": "/".join(str(record[key]) for key in ("model", "features", "tap") if record[key] is not None),
        "normalization": record["normalization"],
        "image_size": record["size_px"],
        "interpolation": record["interpolation"],
        "partition": record["partition"],
        "bands": record["subset"],
        "bootstrap": record["n_resamples"],
        "merge_val": False,
        **{key: record[key] for key in ("tap", "pool", "step", "weights")},
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Whoever adds to the files of an evaluation is alone."""
    with (folder / f".{RESULTS}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_planned(line: Mapping[str, Any]) -> bool:
    """Whether it is a line of the plan."""
    texts = [line.get(key) for key in ("job", "task", "features", "subset", "size")]
    lists = [line.get(key) for key in ("places", "probes", "partitions", "seeds")]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(values, list) for values in lists):
        return False
    return all(isinstance(place, dict) and isinstance(place.get("tap"), str) for place in line["places"])
