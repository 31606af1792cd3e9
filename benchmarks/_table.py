"""One figure of a benchmark, the table of all of them, and what they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Row", "aligned", "machine", "number", "text"]

_HEADER = ("section", "row", "value", "unit", "ratio", "KB stored", "target", "met")
_IS_NUMBER = (False, False, True, False, True, True, False, False)


@dataclass(frozen=True)
class Row:
    """`value` in `unit`, and how many times that of the section's yardstick it is; None for what was not measured.

    A target is a least or a greatest ratio or value. `stored_kb`: 1000 bytes that a sample takes on disk.
    """

    section: str
    name: str
    value: float | None
    unit: str
    ratio: float | None = None
    stored_kb: float | None = None
    least_ratio: float | None = None
    most_ratio: float | None = None
    least: float | None = None
    most: float | None = None

    @property
    def target(self) -> str:
        if self.least_ratio is not None:
            return f">= {self.least_ratio:g} x"
        if self.most_ratio is not None:
            return f"<= {self.most_ratio:g} x"
        if self.least is not None:
            return f">= {self.least:g} {self.unit}"
        return "" if self.most is None else f"<= {self.most:g} {self.unit}"

    @property
    def met(self) -> bool | None:
        """None where there is no target, or nothing was measured."""
        if self.least_ratio is not None and self.ratio is not None:
            return self.ratio >= self.least_ratio
        if self.most_ratio is not None and self.ratio is not None:
            return self.ratio <= self.most_ratio
        if self.least is not None and self.value is not None:
            return self.value >= self.least
        if self.most is not None and self.value is not None:
            return self.value <= self.most
        return None

    def cells(self) -> tuple[str, ...]:
        met = {True: "yes", False: "NO", None: "-" if self.target else ""}[self.met]
        numbers = number(self.ratio), number(self.stored_kb)
        return (self.section, self.name, number(self.value), self.unit, *numbers, self.target, met)


def text(rows: Sequence[Row]) -> str:
    """The table, columns aligned by spaces; without that of the bytes on disk where no row says any."""
    lines = [_HEADER, *(row.cells() for row in rows)]
    stored = _HEADER.index("KB stored")
    shown = [i for i in range(len(_HEADER)) if i != stored or any(row.stored_kb is not None for row in rows)]
    return aligned([[line[i] for i in shown] for line in lines], [_IS_NUMBER[i] for i in shown])


def aligned(lines: Sequence[Sequence[str]], is_number: Sequence[bool]) -> str:
    """Lines of cells, the header first, whose columns are aligned by spaces: numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    )


def machine() -> str:
    """Processor and versions, for the line below the table."""
    import torch

    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    return f"{cores}, Python {platform.python_version()}, torch {torch.__version__}"


def number(value: float | None) -> str:
    """Three digits that count, and no exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
