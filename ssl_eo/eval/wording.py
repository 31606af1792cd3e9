"""What the axes of an evaluation and their values are called where a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssl_eo.eval.features import ALL_TAPS

__all__ = [
    "NOT_AT_OPTIMUM",
    "WORDS_OF_CONDITIONS",
    "condition_text",
    "features_text",
    "places_text",
    "reading_text",
    "value_text",
]

NOT_AT_OPTIMUM = "is not at its optimum: its score may be a little lower than it could be"  # of a fit
WORDS_OF_CONDITIONS = {"partition": "labels", "subset": "bands", "size": "size"}
_OF_SIZES = {"native": "own size"}
_OF_TAPS = {ALL_TAPS: "all depths together", "last": "the last block"}


def features_text(record: Mapping[str, Any]) -> str:
    """Whose features a record of an evaluation is of: a model by its name, all else by what it is."""
    return str(record["model"]) if record["features"] == "encoder" else str(record["features"]).replace("_", " ")


def value_text(axis: str, value: str) -> str:
    """A value of an axis by itself, as in the head of a column: `own size`, `224 px`, `all depths together`."""
    if axis == "size":
        return _OF_SIZES.get(value, f"{value} px" if value.isdecimal() else value)
    if axis == "tap":
        return _OF_TAPS.get(value, value.replace("_", " "))
    return value


def condition_text(axis: str, value: str) -> str:
    """A condition in a sentence: `labels 0.10x`, `bands rgb`, `own size`."""
    text = value_text(axis, value)
    return text if value in _OF_SIZES and axis == "size" else f"{WORDS_OF_CONDITIONS[axis]} {text}"


def places_text(result: Mapping[str, Any]) -> str:
    """` at 12 places` behind the number of test samples, where some share one; else empty."""
    return f" at {result['n_groups']:,} places" if result["n_groups"] < result["n_test"] else ""


def reading_text(tap: str, pool: str) -> str:
    """How features are read; the pool of patches is "None"."""
    return f"read at {value_text('tap', tap)}{'' if pool == 'None' else f', {pool}'}"
