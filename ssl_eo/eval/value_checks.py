"""What single values of a record that was read from a line of JSON must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ssl_eo.eval.metrics import HIGHER_IS_BETTER

__all__ = ["Check", "dict_of", "is_count", "is_metric", "is_number", "is_text", "list_of", "or_none"]

Check = Callable[[Any], bool]

_LARGEST = 1e300  # of a number that is still one after a sum


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def is_count(value: Any) -> bool:
    """A whole number from 0."""
    return isinstance(value, int) and is_number(value) and value >= 0


def is_metric(value: Any) -> bool:
    """The name of a metric."""
    return isinstance(value, str) and value in HIGHER_IS_BETTER


def or_none(check: Check) -> Check:
    """Null, or what `check` passes."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """A list of nothing but what `check` passes."""
    return lambda value: isinstance(value, list) and all(check(inner) for inner in value)


def dict_of(check: Check) -> Check:
    """A mapping to nothing but what `check` passes."""
    return lambda value: isinstance(value, dict) and all(check(inner) for inner in value.values())
