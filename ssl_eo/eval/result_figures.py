"""Charts of an evaluation: bars with their intervals, confusion matrices, score against cost.

K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_eo.eval.figures import FONT_SIZE, GRID, INK, MUTED, PAPER, SERIES, sheet

__all__ = ["Bar", "Point", "draw_bars", "draw_confusion", "draw_points"]

_MAX_NAMED_CLASSES = 24  # of a confusion matrix; the names of more would be too small to read
_MAX_NUMBERED_CLASSES = 10  # likewise the numbers in its cells
_LEAST_SHARE = 0.005  # of a class; smaller cells would not be seen


@dataclass(frozen=True)
class Bar:
    """A score; `series` is its colour, None is muted."""

    label: str
    value: float
    interval: tuple[float, float] | None
    series: int | None


@dataclass(frozen=True)
class Point:
    """What costs `x` and reaches `y`; without a colour of a series it is hollow."""

    label: str
    x: float
    y: float
    series: int | None


def draw_bars(title: str, bars: Sequence[Bar], name: str) -> str:
    """One bar below the other, from 0, with its interval as a line."""
    with sheet(title, name, (5.0, 0.7 + 0.24 * len(bars))) as page:
        axes = page.axes
        for place, bar in enumerate(bars):
            color = MUTED if bar.series is None else SERIES[bar.series]
            axes.barh(place, bar.value, 0.62, color=color, alpha=0.35 if bar.series is None else 0.85, linewidth=0)
            if bar.interval is not None:
                axes.plot(bar.interval, (place, place), color=INK, linewidth=1.1, solid_capstyle="butt")
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.invert_yaxis()
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines["bottom"].set_visible(False)
        axes.xaxis.set_major_formatter("{x:g}")
    return page.svg


def draw_confusion(title: str, confusion: ArrayLike, classes: Sequence[str], name: str) -> str:
    """A matrix `[K, K]` of counts, rows are true classes: each row as shares of its class, the darker the more."""
    counts = np.asarray(confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)  # [K, K]
    k = len(counts)
    side = min(5.2, max(3.0, 0.26 * k + 1.4))
    with sheet(title, name, (side, side)) as page:
        axes = page.axes
        _fill_cells(axes, shares)
        axes.set_xlim(0, k)
        axes.set_ylim(k, 0)
        axes.set_aspect("equal")
        for spine in axes.spines.values():
            spine.set_visible(True)
            spine.set_color(GRID)
        axes.set_xlabel("predicted", color=MUTED, fontsize=FONT_SIZE - 1)
        axes.set_ylabel("true", color=MUTED, fontsize=FONT_SIZE - 1)
        if k <= _MAX_NAMED_CLASSES:
            small = {"fontsize": FONT_SIZE - (1 if k <= _MAX_NUMBERED_CLASSES else 2.5)}
            axes.set_xticks(np.arange(k) + 0.5, classes, rotation=90, **small)
            axes.set_yticks(np.arange(k) + 0.5, classes, **small)
    return page.svg


def draw_points(title: str, points: Sequence[Point], levels: Sequence[tuple[str, float]], x: str, name: str) -> str:
    """Points over a logarithmic axis with the title `x`, and dashed lines across for what has no place on it."""
    from matplotlib.ticker import LogLocator, NullLocator

    with sheet(title, name, (5.6, 3.0)) as page:
        axes = page.axes
        for point in points:
            color = MUTED if point.series is None else SERIES[point.series]
            face = PAPER if point.series is None else color
            axes.plot(point.x, point.y, "o", markersize=7, markeredgecolor=color, markerfacecolor=face)
            axes.annotate(
                point.label,
                (point.x, point.y),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize=FONT_SIZE - 1,
            )
        for label, y in levels:
            axes.axhline(y, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
            axes.annotate(
                label,
                (1, y),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                fontsize=FONT_SIZE - 1,
            )
        axes.set_xscale("log")
        xs = [point.x for point in points]
        axes.set_xlim(min(xs) / 2, max(xs) * 4)  # room for labels
        axes.margins(y=0.12)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(x, color=MUTED, fontsize=FONT_SIZE - 1, loc="left")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return page.svg


def _fill_cells(axes: object, shares: NDArray[np.float64]) -> None:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

    assert isinstance(axes, Axes)
    is_numbered = len(shares) <= _MAX_NUMBERED_CLASSES
    for row, column in zip(*np.nonzero(shares >= _LEAST_SHARE), strict=True):
        share = float(shares[row, column])
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=SERIES[0], alpha=share, linewidth=0))
        if is_numbered:
            color = PAPER if share > 0.55 else INK
            middle = (column + 0.5, row + 0.5)
            axes.annotate(f"{100 * share:.0f}", middle, ha="center", va="center", color=color, fontsize=FONT_SIZE - 2)
