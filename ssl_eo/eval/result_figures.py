"""Charts of an evaluation: bars with their intervals, confusion matrices, score against cost.

K classes, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

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
_N_SHADES = 20  # of a scale
_DOT = 7.0  # points across
_LETTER = 0.62, 1.1  # width and height, as parts of the size of letters
_GAP = 2.5  # points between a dot and its label
_FARTHER = (0.0, 9.0, 18.0)  # points by which a label stands off its dot; from the second on a line leads to it


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
    """A matrix `[K, K]` of counts, rows are true classes: each row as shares of its class, the darker the more.

    The shares stand in the cells of few classes; of many a scale stands beside them.
    """
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
        if k > _MAX_NUMBERED_CLASSES:
            _draw_scale(axes)
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
            axes.plot(point.x, point.y, "o", markersize=_DOT, markeredgecolor=color, markerfacecolor=face)
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
        _label_points(axes, points)
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


def _draw_scale(axes: object) -> None:
    """What the shades of a confusion mean, right of it."""
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

    assert isinstance(axes, Axes)
    scale = axes.inset_axes((1.04, 0.0, 0.04, 0.5))
    for i in range(_N_SHADES):
        shade = (i + 0.5) / _N_SHADES
        place = (0, i / _N_SHADES)
        scale.add_patch(Rectangle(place, 1, 1 / _N_SHADES, facecolor=SERIES[0], alpha=shade, linewidth=0))
    scale.set_xticks([])
    scale.yaxis.tick_right()
    scale.set_yticks([0, 0.5, 1], ["0", "50", "100 %"], fontsize=FONT_SIZE - 2.5)
    scale.tick_params(colors=MUTED, length=0)
    for spine in scale.spines.values():
        spine.set_color(GRID)


def _label_points(axes: object, points: Sequence[Point]) -> None:
    """Write each label beside its dot; a line leads to one that is not right beside it."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    assert isinstance(axes, Axes)
    assert isinstance(axes.figure, Figure)
    axes.figure.draw_without_rendering()  # else nothing has its place yet
    unit = axes.figure.dpi / 72  # pixels of a point
    places = axes.transData.transform([(point.x, point.y) for point in points]) / unit  # [P, 2]
    inside = np.asarray(axes.get_window_extent().extents) / unit
    labels = [short(point.label) for point in points]
    offsets = _clear_offsets(labels, places, inside)
    for point, label, offset in zip(points, labels, offsets, strict=True):
        if not label:
            continue
        color = MUTED if point.series is None else SERIES[point.series]
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": _DOT / 2}
        note = axes.annotate(
            label,
            (point.x, point.y),
            xytext=(offset.x, offset.y),
            textcoords="offset points",
            ha="center",
            va="center",
            color=color,
            fontsize=FONT_SIZE - 1,
            arrowprops=leader if offset.is_far else None,
        )
        note.set_in_layout(False)  # its place was found in the layout as it is


class _Offset(NamedTuple):
    """From a dot to the middle of its label, in points."""

    x: float
    y: float
    is_far: bool = False

    def box(self, at: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
        """Left, bottom, right and top of a label of `size [2]` whose dot is `at [2]`."""
        middle = at + np.array([self.x, self.y])
        return np.concatenate([middle - size / 2, middle + size / 2])


def _clear_offsets(labels: Sequence[str], places: NDArray[np.float64], inside: NDArray[np.float64]) -> list[_Offset]:
    """Where labels of the dots `places [P, 2]` cover the least of dots, of labels before them, and of the margin.

    `inside` is left, bottom, right and top of the chart; all in points.
    """
    taken = np.concatenate([places - _DOT / 2, places + _DOT / 2], axis=1)  # [P + labels so far, 4]
    found = []
    for label, at in zip(labels, places, strict=True):
        size = np.array(_LETTER) * (FONT_SIZE - 1) * (len(label), 1)
        offsets = _offsets(size, is_right=bool(at[0] > (inside[0] + inside[2]) / 2))
        costs = [_covered(offset.box(at, size), taken, inside) for offset in offsets] if label else [0.0]
        found.append(offsets[int(np.argmin(costs))])
        if label:
            taken = np.vstack([taken, found[-1].box(at, size)])
    return found


def _offsets(size: NDArray[np.float64], is_right: bool) -> list[_Offset]:
    """Of a label of `size [2]`: nearest first, and first to the side with room."""
    side = -1 if is_right else 1
    ways = [(side, 0), (-side, 0), (side, 1), (side, -1), (-side, 1), (-side, -1), (0, 1), (0, -1)]
    steps = [np.array(way) * (size / 2 + _DOT / 2 + _GAP + farther) for farther, way in product(_FARTHER, ways)]
    return [_Offset(float(x), float(y), is_far=i >= len(ways)) for i, (x, y) in enumerate(steps)]


def _covered(box: NDArray[np.float64], taken: NDArray[np.float64], inside: NDArray[np.float64]) -> float:
    """How much of `box [4]` covers any of `taken [N, 4]`, or lies outside, in square points."""
    area = float(np.prod(box[2:] - box[:2]))
    return float(_shared(box, taken).sum() + area - _shared(box, inside))


def _shared(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """The area that a box `[4]` of left, bottom, right, top shares with each of `others [..., 4]`."""
    sides = np.minimum(box[2:], others[..., 2:]) - np.maximum(box[:2], others[..., :2])
    return np.maximum(sides, 0).prod(-1)  # type: ignore[no-any-return]
