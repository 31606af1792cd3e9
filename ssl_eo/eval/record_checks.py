"""What a line of results.jsonl, or of the eval.jsonl of a run, must hold to be one of its records.

Reports take what is named here for granted. Anything else in such a file was written by somebody else, or is damaged.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ssl_eo.eval.partitions import parse_partition
from ssl_eo.eval.value_checks import (
    Check,
    are_intervals,
    are_scores,
    dict_of,
    is_count,
    is_line,
    is_metric,
    is_number,
    is_text,
    list_of,
    or_none,
)

__all__ = ["is_of_evaluation", "is_of_training"]


@dataclass(frozen=True)
class _Checks:
    """Of the values of a record: of keys that it must have, and of those that it may have."""

    needed: Mapping[str, Check]
    optional: Mapping[str, Check] = field(default_factory=dict)

    def hold_of(self, record: Mapping[str, Any]) -> bool:
        is_whole = all(key in record and check(record[key]) for key, check in self.needed.items())
        return is_whole and all(check(record[key]) for key, check in self.optional.items() if key in record)


def is_of_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether it is a record of results.jsonl: a result, what could not be measured, or the end of such an error."""
    checks = _OF_EVALUATION.get(_kind(record))
    return checks is not None and checks.hold_of(record) and (record["kind"] != "result" or _is_whole(record))


def is_of_training(record: Mapping[str, Any]) -> bool:
    """Whether it is a record of eval.jsonl: of a probe, of health, of an error, of what was put off."""
    kind = _kind(record)
    checks = _OF_TRAINING.get(kind)
    if checks is None or not checks.hold_of(record):
        return False
    if kind == "probe":
        return are_scores({record["metric"]: record.get(record["metric"])})
    if "probe" in record and "tap" not in record:
        return False
    return kind == "skipped" or "task" in record or "source" in record


def _is_figure(value: Any) -> bool:
    """A number, or what stands for none."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _is_partition(value: Any) -> bool:
    try:
        return isinstance(value, str) and parse_partition(value).name == value
    except ValueError:
        return False


def _is_positive(value: Any) -> bool:
    return is_count(value) and value > 0


def _is_source(value: Any) -> bool:
    return isinstance(value, dict) and is_line(value.get("name")) and isinstance(value.get("options"), dict)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_packed(value: Any) -> bool:
    """Whether it is what `ssl_eo.eval.records.packed` returns."""
    try:
        return len(base64.b64decode(value, validate=True)) % 4 == 0
    except (TypeError, ValueError, binascii.Error):
        return False


def _is_anything(value: Any) -> bool:
    return True


def _kind(record: Mapping[str, Any]) -> str:
    return str(record.get("kind"))


def _is_whole(result: Mapping[str, Any]) -> bool:
    """Whether what ranks the task was measured, of weights that are known, and nothing is told of some classes alone,
    or of some resamples.
    """
    if result["features"] == "encoder" and None in (result["model"], result["weights"], result["step"]):
        return False
    packed = result.get("resampled")
    if packed is not None and len(base64.b64decode(packed)) != 4 * result["n_resamples"]:
        return False
    rows = result.get("confusion", result["classes"])
    of_classes = [rows, *result.get("per_class", {}).values(), *result.get("confusion", [])]
    return result["metric"] in result["scores"] and all(len(of) == len(result["classes"]) for of in of_classes)


_HEAD: dict[str, Check] = {
    **dict.fromkeys(("key", "job", "task", "features", "date"), is_line),
    "model": or_none(is_line),
}
_OPTIONAL_HEAD: dict[str, Check] = {
    **dict.fromkeys(("metric", "kind_of_task", "dataset", "subset", "size", "tap", "probe", "partition"), is_line),
    "seed": _is_seed,
    "step": or_none(is_count),
    "commit": or_none(is_line),
}
_RESULT: dict[str, Check] = {
    **dict.fromkeys(("subset", "size", "tap", "probe"), is_line),
    "metric": is_metric,
    "partition": _is_partition,
    "partition_of": lambda value: value in ("all", "published", "nested"),
    **dict.fromkeys(("n_train", "n_val", "n_groups", "n_resamples", "n_features", "size_px"), is_count),
    "n_test": _is_positive,
    **dict.fromkeys(("weights", "pool"), or_none(is_line)),
    "step": or_none(is_count),
    "seed": _is_seed,
    "encoder": or_none(dict_of(_is_anything)),
    "classes": list_of(is_line),
    "flags": list_of(is_text),
    **dict.fromkeys(("data", "content"), dict_of(is_line)),
    "scores": are_scores,
    "intervals": are_intervals,
    "chosen": dict_of(_is_figure),
    "normalization": is_line,
    "interpolation": is_line,
}
_OPTIONAL_OF_RESULT: dict[str, Check] = {
    **dict.fromkeys(("version", "torch", "code"), is_line),
    **dict.fromkeys(("bands", "taps"), list_of(is_line)),
    **dict.fromkeys(("n_leaked", "n_leaked_val", "n_shared_groups", "n_undefined", "n_fitted"), is_count),
    "sources": dict_of(_is_source),
    "resampled": or_none(_is_packed),
    "gflop": or_none(is_number),
    "cell_px": or_none(is_count),
    "per_class": dict_of(list_of(or_none(is_number))),
    "confusion": list_of(list_of(is_number)),
}
_PROBLEM = _Checks({**_HEAD, "error": is_text}, _OPTIONAL_HEAD)
_OF_EVALUATION = {
    "result": _Checks({**_HEAD, **_RESULT}, {**_OPTIONAL_HEAD, **_OPTIONAL_OF_RESULT}),
    "error": _PROBLEM,
    "skipped": _PROBLEM,
    "cleared": _Checks(dict.fromkeys(("key", "job"), is_line)),
}

_OPTIONAL_OF_TRAINING: dict[str, Check] = {
    **dict.fromkeys(("task", "source", "features", "split", "precision", "tap", "probe", "metric"), is_line),
    "error": is_text,
    **dict.fromkeys(("spread_ratio", "first_ratio", "effective_rank", "macro_accuracy", "seconds"), is_number),
    "collapsed": list_of(is_text),
    "chosen": dict_of(_is_figure),
    "is_trained": lambda value: isinstance(value, bool),
}
_NEEDED_OF_TRAINING: dict[str, dict[str, Check]] = {
    "probe": {**dict.fromkeys(("task", "features", "tap", "probe"), is_line), "metric": is_metric},
    "health": dict.fromkeys(("features", "tap"), is_line),
    "error": {"features": is_line, "error": is_text},
    "skipped": dict.fromkeys(("what", "reason"), is_text),
}
_OF_TRAINING = {
    kind: _Checks({"step": is_count, **needed}, _OPTIONAL_OF_TRAINING) for kind, needed in _NEEDED_OF_TRAINING.items()
}
