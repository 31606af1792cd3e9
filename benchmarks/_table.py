"""One figure of a benchmark, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Row", "text"]

_HEADER = ("section", "row", "value", "unit", "ratio", "KB stored", "target", "met")
_IS_NUMBER = (False, False, True, False, True, True, False, False)


@dataclass(frozen=True)
class Row:
    """`value` in `unit`, and how many times that of the section's yardstick it is; None for what was not measured.

    A target is a least ratio, a least or a greatest value. `stored_kb`: 1000 bytes that a sample takes on disk.
    """

    section: str
    name: str
    value: float | None
    unit: str
    ratio: float | None = None
    stored_kb: float | None = None
    least_ratio: float | None = None
    least: float | None = None
    most: float | None = None

    @property
    def target(self) -> str:
        if self.least_ratio is not None:
            return f">= {self.least_ratio:g} x"
        if self.least is not None:
            return f">= {self.least:g} {self.unit}"
        return "" if self.most is None else f"<= {self.most:g} {self.unit}"

    @property
    def met(self) -> bool | None:
        """None where there is no target, or nothing was measured."""
        if self.least_ratio is not None and self.ratio is not None:
            return self.ratio >= self.least_ratio
        if self.least is not None and self.value is not None:
            return self.value >= self.least
        if self.most is not None and self.value is not None:
            return self.value <= self.most
        return None

    def cells(self) -> tuple[str, ...]:
        met = {True: "yes", False: "NO", None: "-" if self.target else ""}[self.met]
        numbers = _number(self.ratio), _number(self.stored_kb)
        return (self.section, self.name, _number(self.value), self.unit, *numbers, self.target, met)


def text(rows: Sequence[Row]) -> str:
    """The table, columns aligned by spaces."""
    lines = [_HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = zip(line, widths, _IS_NUMBER, strict=True)
    return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()


def _number(value: float | None) -> str:
    """Three digits that count, and no exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
