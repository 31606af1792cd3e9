"""What an evaluation leaves: `results.jsonl`, one object a result, which says all that is needed to get it again.

A result has a `key`, the hash of everything that it depends on: weights, data, what was shown, probe, partition, seed,
code. So an evaluation that was stopped goes on, and results of several machines are put together by
concatenation. `results.csv` holds the scores in the columns of torchgeo-bench.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import io
import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_eo.files import atomic_write
from ssl_eo.jsonl import JsonLines, read_jsonl

__all__ = [
    "QUESTION",
    "RESULTS",
    "Record",
    "append",
    "key_of",
    "key_of_job",
    "packed",
    "read_results",
    "unpacked",
    "write_csv",
]

Record = Mapping[str, Any]  # an object of results.jsonl, or of the eval.jsonl of a run

RESULTS = "results.jsonl"
QUESTION = ("job", "tap", "taps", "probe", "partition", "seed")  # what a result answers, whatever data and code
_COLUMNS = (
    *("dataset", "method", "metric_name", "metric_value", "ci_lower", "ci_upper", "feature_dim", "best_c", "best_lr"),
    *("best_batch_size", "n_train", "n_val", "n_test", "seed", "model", "name", "normalization", "image_size"),
    *("interpolation", "partition", "bands", "bootstrap", "c_range", "merge_val"),
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
    with (folder / f".{RESULTS}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with JsonLines(folder / RESULTS) as file:
            for record in records:
                file.write(record)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Results by `key`, the newest of each, in the order in which they were first found.

    What could not be measured counts until it is: a later result takes the place of an error that answers the same
    question, of which the key may be another (data were mended, the version has changed); and any later result of a job
    that of an error of the whole job (`key_of_job`).
    """
    found: dict[str, dict[str, Any]] = {}
    errors: dict[tuple[str, ...], set[str]] = {}  # keys by question
    for record in read_jsonl(folder / RESULTS):
        if {"key", "kind", "job"} <= record.keys():
            found[record["key"]] = record
            question = tuple(str(record.get(name)) for name in QUESTION)
            if record["kind"] == "error":
                errors.setdefault(question, set()).add(record["key"])
            elif record["kind"] == "result":
                for key in {key_of_job(record["job"]), *errors.pop(question, ())} - {record["key"]}:
                    found.pop(key, None)
    return list(found.values())


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
        "name": f"{record['model']}/{record['features']}/{record['tap']}",
        "normalization": record["normalization"],
        "image_size": record["size_px"],
        "interpolation": record["interpolation"],
        "partition": record["partition"],
        "bands": record["subset"],
        "bootstrap": record["n_resamples"],
        "merge_val": False,
    }
