"""What the axes of an evaluation and their values are called where a person reads them."""

from __future__ import annotations

from ssl_eo.eval.features import ALL_TAPS

__all__ = ["WORDS_OF_CONDITIONS", "condition_text", "reading_text", "value_text"]

WORDS_OF_CONDITIONS = {"partition": "labels", "subset": "bands", "size": "size"}
_OF_SIZES = {"task": "the task's size", "native": "own size"}
_OF_TAPS = {ALL_TAPS: "all depths together", "last": "the last block"}


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


def reading_text(tap: str, pool: str) -> str:
    """How features are read; the pool of patches is "None"."""
    return f"read at {value_text('tap', tap)}{'' if pool == 'None' else f', {pool}'}"
