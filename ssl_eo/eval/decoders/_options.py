"""Checks that the options of decoders share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssl_eo.components import suggest

__all__ = ["check_choice", "check_counts", "check_probs"]


def check_choice(key: str, value: object, allowed: Sequence[str]) -> None:
    """Raise `ValueError` unless the option `key` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(
            f"{key} must be one of {', '.join(allowed)}, got {value!r}{suggest(str(value), list(allowed))}"
        )


def check_counts(cfg: Any, *keys: str) -> None:
    """Raise `ValueError` unless these options of `cfg` are whole and at least 1."""
    for key in keys:
        value = getattr(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} must be a whole number and at least 1, got {value!r}")


def check_probs(cfg: Any, *keys: str) -> None:
    """Raise `ValueError` unless these options of `cfg` are probabilities, and below 1."""
    for key in keys:
        value = getattr(cfg, key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value < 1.0:
            raise ValueError(f"{key} must be in [0, 1), got {value!r}")
