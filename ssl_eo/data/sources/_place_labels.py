"""One label a place, from a table or from the names of files: a class, or a number that is to be predicted.

N places.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import suggest
from ssl_eo.data.sources._side_files import read_lines, writable

__all__ = ["LabelKind", "PlaceLabels", "read_label_table"]

LabelKind = Literal["class", "number"]

_MAX_CSV_BYTES = 256 << 20
_MAX_CLASS = 1 << 31  # of numbers that are classes


@dataclass(frozen=True)
class PlaceLabels:
    """Labels of N places, as an array that worker processes share.

    `values` are `[N]` int64, -1 without a label, or `[N]` float64, NaN without; empty where places have no labels.
    `names` are of the classes, where these are not numbers.
    """

    values: NDArray[Any] = field(default_factory=lambda: np.empty(0, np.int64))
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, texts: Sequence[str], kind: LabelKind, origin: str) -> PlaceLabels:
        """From one text a place, empty without a label. Raises `ValueError` that names `origin`, the config's key."""
        known = sorted({text for text in texts if text})
        if not known:
            raise ValueError(f"{origin}: no place has a label; are its keys those of the first tile's pattern?")
        if kind == "number":
            return cls(_numbers(texts, origin))
        if all(text.isdecimal() for text in known):
            classes = {text: _class(text, origin) for text in known}
            return cls(np.array([classes.get(text, -1) for text in texts], np.int64))
        if all(math.isfinite(_number(text)) for text in known) and not all(_number(t).is_integer() for t in known):
            found = ", ".join(known[:3])
            raise ValueError(f"{origin}: {found} are no classes; set label_kind: number where they are to be predicted")
        for name in known:
            if (shown := writable(name)) != name:
                raise ValueError(f"{origin}: the class {shown} has a name that is not UTF-8; rename it")
        number = {name: i for i, name in enumerate(known)}
        return cls(np.array([number.get(text, -1) for text in texts], np.int64), tuple(known))

    def __len__(self) -> int:
        return len(self.values)

    def of_place(self, place: int) -> int | float | None:
        """The label of a place; None where it has none."""
        value = self.values[place]
        if self.values.dtype.kind == "f":
            return float(value) if np.isfinite(value) else None
        return int(value) if value >= 0 else None


def read_label_table(path: Path, column: str) -> Mapping[str, str]:
    """The texts of `column` of a CSV file by those of its column `key`.

    Raises `ValueError` that names the file, also for a key that has two of them.
    """
    try:
        lines = read_lines(path, _MAX_CSV_BYTES, "a CSV file")
    except ValueError as error:
        raise ValueError(f"label_csv: {error}") from None
    rows = csv.DictReader([lines[0].removeprefix("\ufeff"), *lines[1:]])
    try:
        columns = list(rows.fieldnames or ())
        for name in ("key", column):
            if name not in columns:
                raise ValueError(f"label_csv: {path} has no column {name!r}{suggest(name, columns)} (has {columns})")
        found: dict[str, str] = {}
        for row in rows:
            text = row[column] or ""
            if found.setdefault(row["key"], text) != text:
                both = f"{found[row['key']]!r:.40} and {text!r:.40}"
                raise ValueError(f"label_csv: {path}, line {rows.line_num}: {row['key']!r:.80} has two labels, {both}")
        return found
    except csv.Error as error:
        raise ValueError(f"label_csv: {path}, line {rows.line_num}: {error}") from None


def _numbers(texts: Sequence[str], origin: str) -> NDArray[np.float64]:
    """`[N]`, NaN for what is none."""
    values = np.array([_number(text) for text in texts], np.float64)
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        found = next(text for text in texts if text)
        raise ValueError(f"{origin}: no place has a finite number, found {found[:40]!r}; set label_kind: class")
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _class(text: str, origin: str) -> int:
    if len(text) > len(str(_MAX_CLASS)) or int(text) >= _MAX_CLASS:
        raise ValueError(f"{origin}: {text[:40]} is no number of a class, expected one below {_MAX_CLASS:,}")
    return int(text)
