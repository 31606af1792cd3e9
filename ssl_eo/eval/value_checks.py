"""What single values of a record that was read from a line of JSON must be."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ssl_eo.eval.metrics import HIGHER_IS_BETTER, is_possible

__all__ = [
    "Check",
    "are_intervals",
    "are_scores",
    "dict_of",
    "is_count",
    "is_line",
    "is_metric",
    "is_number",
    "is_text",
    "list_of",
    "or_none",
]

Check = Callable[[Any], bool]

_LARGEST = 1e300  # of a number that is still one after a sum
_NO_CHARACTER = re.compile("[\ud800-\udfff]")  # halves of pairs, which no file can hold
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def is_text(value: Any) -> bool:
    """Text that a file can hold."""
    return isinstance(value, str) and not _NO_CHARACTER.search(value)


def is_line(value: Any) -> bool:
    """Text of one line, as all names are: it stands in tables."""
    return is_text(value) and not _CONTROL.search(value)


def is_number(value: Any) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def is_count(value: Any) -> bool:
    """A whole number from 0."""
    return isinstance(value, int) and is_number(value) and value >= 0


def is_metric(value: Any) -> bool:
    """The name of a metric."""
    return isinstance(value, str) and value in HIGHER_IS_BETTER


def are_scores(value: Any) -> bool:
    """Numbers by metric, none of which its metric cannot be."""
    return dict_of(is_number)(value) and all(is_possible(metric, score) for metric, score in value.items())


def are_intervals(value: Any) -> bool:
    """Two such numbers by metric."""
    pairs = list_of(is_number)
    return dict_of(lambda bounds: pairs(bounds) and len(bounds) == 2)(value) and all(
        is_possible(metric, bound) for metric, bounds in value.items() for bound in bounds
    )


def or_none(check: Check) -> Check:
    """Null, or what `check` passes."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """A list of nothing but what `check` passes."""
    return lambda value: isinstance(value, list) and all(check(inner) for inner in value)


def dict_of(check: Check) -> Check:
    """A mapping to nothing but what `check` passes."""
    return lambda value: isinstance(value, dict) and all(check(inner) for inner in value.values())
