"""Charts of an evaluation: bars with their intervals, confusion matrices, score against cost.

K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_eo.eval.figures import FONT_SIZE, GRID, INK, MUTED, PAPER, SERIES, Line, label_ends, sheet
from ssl_eo.eval.rounding import fixed

__all__ = ["Bar", "Point", "draw_bars", "draw_confusion", "draw_points", "short"]

_MAX_NAMED_CLASSES = 24  # of a confusion matrix; the names of more would be too small to read
_MAX_NUMBERED_CLASSES = 10  # likewise the numbers in its cells
_MAX_LETTERS = 26  # of a name beside axes; longer ones would leave no room for what is drawn
_WIDTH_INCHES = 5.2
_SIZE_OF_POINTS_INCHES = (5.6, 3.0)
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


def short(name: str) -> str:
    """`name` as it fits into a chart: of a long one the beginning and the end."""
    half = _MAX_LETTERS // 2
    return name if len(name) <= _MAX_LETTERS else f"{name[: half - 1].rstrip()}…{name[-half:].lstrip()}"


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
    n_letters = max(len(short(name)) for name in classes) if k <= _MAX_NAMED_CLASSES else 0
    side = min(_WIDTH_INCHES, max(2.6, 0.26 * k + 1.0) + 0.06 * n_letters)
    with sheet(title, name, (_WIDTH_INCHES, side)) as page:  # as wide as other charts, so that letters are as large
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
            names = [short(name) for name in classes]
            axes.set_xticks(np.arange(k) + 0.5, names, rotation=90, **small)
            axes.set_yticks(np.arange(k) + 0.5, names, **small)
    return page.svg


def draw_points(title: str, points: Sequence[Point], levels: Sequence[tuple[str, float]], x: str, name: str) -> str:
    """Points over a logarithmic axis with the title `x`, and dashed lines across for what has no place on it."""
    from matplotlib.ticker import LogLocator, NullLocator

    xs = [point.x for point in points]
    low, high = min(xs) / 2, max(xs) * 2
    with sheet(title, name, _SIZE_OF_POINTS_INCHES) as page:
        axes = page.axes
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.margins(y=0.12)
        for point in points:
            color = MUTED if point.series is None else SERIES[point.series]
            face = PAPER if point.series is None else color
            axes.plot(point.x, point.y, "o", markersize=7, markeredgecolor=color, markerfacecolor=face)
            is_right = point.x > (low * high) ** 0.5  # of the middle: its name is to the left, where there is room
            axes.annotate(
                short(point.label),
                (point.x, point.y),
                xytext=(-7 if is_right else 7, 0),
                textcoords="offset points",
                ha="right" if is_right else "left",
                va="center",
                color=color,
                fontsize=FONT_SIZE - 1,
            )
        lines = [Line((low, high), (y, y), "reference", short(label)) for label, y in levels]
        for line in lines:
            axes.plot(line.x, line.y, **line.look)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(x, color=MUTED, fontsize=FONT_SIZE - 1, loc="left")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        label_ends(axes, lines, _SIZE_OF_POINTS_INCHES[1])
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
            axes.annotate(fixed(100 * share, 0), middle, ha="center", va="center", color=color, fontsize=FONT_SIZE - 2)
