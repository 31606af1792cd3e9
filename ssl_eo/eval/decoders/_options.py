"""What the options of a decoder may be, by the types and names that its `Config` gives them."""

from __future__ import annotations

import math
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ssl_eo.components import suggest

__all__ = ["check_options"]

_MOST = 1 << 16


def check_options(cfg: Any) -> None:
    """Raise `ValueError` unless the values of a `Config` are what their types say, and more.

    - `Literal[...]`: one of these
    - `int`: whole, from 1 to 65,536 (options may come from a file of somebody else); `list[int]`: one such number at
      least
    - `float`: a probability below 1 where the name ends in `_prob`, else positive and finite
    - `... | None`: any of these, or None
    """
    hints = get_type_hints(type(cfg))
    for field in fields(cfg):
        _check(field.name, getattr(cfg, field.name), hints[field.name])


def _check(key: str, value: object, hint: Any) -> None:
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        if value not in allowed:
            near = suggest(str(value), list(allowed))
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}{near}")
    elif hint is int:
        if not _is_count(value):
            raise ValueError(f"{key} must be a whole number from 1 to {_MOST:,}, got {value!r:.40}")
    elif hint == list[int]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= _MOST or not all(map(_is_count, value)):
            raise ValueError(f"{key} must be a list of whole numbers, each from 1 to {_MOST:,}, got {value!r:.80}")
    elif hint is float:
        _check_float(key, value)
    else:
        (other,) = (part for part in get_args(hint) if part is not NoneType)
        if value is not None:
            _check(key, value, other)


def _check_float(key: str, value: object) -> None:
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if key.endswith("_prob"):
        if not 0.0 <= number < 1.0:
            raise ValueError(f"{key} must be in [0, 1), got {value!r}")
    elif not 0.0 < number < math.inf:
        raise ValueError(f"{key} must be positive and finite, got {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST
