"""One figure of a benchmark, the table of all of them, and what they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Row", "machine", "text"]

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
        numbers = _number(self.ratio), _number(self.stored_kb)
        return (self.section, self.name, _number(self.value), self.unit, *numbers, self.target, met)


def text(rows: Sequence[Row]) -> str:
    """The table, columns aligned by spaces; without that of the bytes on disk where no row says any."""
    lines = [_HEADER, *(row.cells() for row in rows)]
    stored = _HEADER.index("KB stored")
    shown = [i for i in range(len(_HEADER)) if i != stored or any(row.stored_kb is not None for row in rows)]
    widths = {i: max(len(line[i]) for line in lines) for i in shown}
    return "\n".join(_aligned(line, widths) for line in lines)


def machine() -> str:
    """Processor and versions, for the line below the table."""
    import torch

    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    return f"{cores}, Python {platform.python_version()}, torch {torch.__version__}"


def _aligned(line: Sequence[str], widths: Mapping[int, int]) -> str:
    cells = ((line[i].rjust if _IS_NUMBER[i] else line[i].ljust)(width) for i, width in widths.items())
    return "  ".join(cells).rstrip()


def _number(value: float | None) -> str:
    """Three digits that count, and no exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
