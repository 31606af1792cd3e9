"""What a line of study.jsonl must hold to be a record of a study.

The page takes what is named here for granted. Anything else in such a file was written by somebody else, or is damaged.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from ssl_eo.adapt.study import Cell
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.records import key_of
from ssl_eo.eval.value_checks import Check, dict_of, is_count, is_metric, is_number, is_text, list_of, or_none

__all__ = ["class_measure", "is_of_study"]

_SPLITS = ("train", "val", "test")
_LEAKS = ("n_leaked", "n_leaked_val", "n_shared_groups")


def is_of_study(record: Mapping[str, Any]) -> bool:
    """Whether it is a record of study.jsonl: a model that was trained, or what could not be."""
    checks = _CHECKS.get(str(record.get("kind")))
    if checks is None or not all(key in record and check(record[key]) for key, check in checks.items()):
        return False
    return record["kind"] == "error" or _is_whole(record)


def class_measure(kind: str) -> str:
    """The column of `per_class` by which the classes of a task of `kind` are shown."""
    return "iou" if kind == "segmentation" else "recall"


def _is_whole(result: Mapping[str, Any]) -> bool:
    """Whether it is of what its key stands for, and nothing is told of some classes alone, or of some resamples."""
    asked, columns, confusion = result["asked"], result["per_class"], result["confusion"]
    if key_of(asked) != result["key"]:
        return False
    packed = result["resampled"]
    if packed is not None and _n_packed(packed) != asked.get("n_resamples"):
        return False
    if not all(is_count(result.get(key, 0)) for key in _LEAKS):
        return False
    if "n_of_class" in result and not _are_counts(result["n_of_class"], len(result["classes"])):
        return False  # older records have none
    measure = class_measure(asked["task"]["kind"])
    if columns and not (measure in columns and list_of(is_count)(columns.get("support"))):
        return False
    of_classes = [*columns.values(), *([] if confusion is None else [confusion, *confusion])]
    return result["metric"] in result["scores"] and all(len(of) == len(result["classes"]) for of in of_classes)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_asked(value: Any) -> bool:
    return isinstance(value, dict) and _is_task(value.get("task")) and is_text(value.get("weights", ""))


def _is_task(value: Any) -> bool:
    if not isinstance(value, dict) or not list_of(is_text)(value.get("flags", [])):
        return False
    return value.get("kind") in get_args(Kind)


def _is_cell(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(Cell)}:
        return False
    seed = value["seed"]
    return type(seed) is int and all(is_text(part) for name, part in value.items() if name != "seed")


def _is_curves(value: Any) -> bool:
    """Scores on validation, one at least of which is defined: by it the weights were chosen."""
    if not list_of(lambda curve: isinstance(curve, dict))(value):
        return False
    scores = [curve.get("scores") for curve in value]
    return all(list_of(or_none(is_number))(of) for of in scores) and any(s is not None for of in scores for s in of)


def _is_specialists(value: Any) -> bool:
    if not isinstance(value, dict) or not {"run", "of", "by", "seconds"} <= value.keys():
        return False
    are_named = list_of(is_text)(value["run"]) and list_of(is_text)(value["of"])
    return are_named and or_none(is_text)(value["by"]) and is_number(value["seconds"])


def _is_samples(value: Any) -> bool:
    return isinstance(value, dict) and all(is_count(value.get(split)) for split in _SPLITS)


def _are_counts(value: Any, n_classes: int) -> bool:
    """How often each class occurs in train and in val."""
    if not isinstance(value, dict) or value.keys() != {"train", "val"}:
        return False
    return all(list_of(is_count)(of) and len(of) == n_classes for of in value.values())


def _n_packed(text: str) -> float:
    """How many numbers are in it; nan where it is not what `ssl_eo.eval.records.packed` returns."""
    try:
        return len(base64.b64decode(text, validate=True)) / 4
    except (ValueError, binascii.Error):
        return math.nan


_HEAD: dict[str, Check] = {"key": is_text, "cell": _is_cell}
_RESULT: dict[str, Check] = {
    "asked": _is_asked,
    "metric": is_metric,
    "classes": list_of(is_text),
    "missing_bands": list_of(is_text),
    "n_samples": _is_samples,
    "scores": dict_of(is_number),
    "resampled": or_none(is_text),
    "per_class": dict_of(list_of(or_none(is_number))),
    "confusion": or_none(list_of(list_of(is_count))),
    "curves": _is_curves,
    "specialists": or_none(_is_specialists),
    **dict.fromkeys(("n_groups", "n_trained", "n_parameters", "step"), is_count),
    **dict.fromkeys(("lr", "forward_gflop"), _is_positive),
    **dict.fromkeys(("memory_gb", "seconds_train", "samples_per_s"), is_number),
    **dict.fromkeys(("energy_kwh", "co2_kg"), or_none(is_number)),
}
_CHECKS: dict[str, dict[str, Check]] = {
    "result": {**_HEAD, **_RESULT},
    "error": {**_HEAD, "error": is_text},
}
