"""Charts as SVG to stand inside a page: they take the page's font and colours, light or dark.

Matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = [
    "FONT_SIZE",
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "SERIES",
    "Chart",
    "Line",
    "Sheet",
    "draw",
    "label_ends",
    "sheet",
]

# Stand-in -> CSS variable of the page. Near black, so that a page without the variables still shows something.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#0a0a0a"
SERIES = ("#040404", "#050505", "#060606", "#070707", "#080808", "#090909")  # the first is the page's accent
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--paper", SERIES[0]: "--accent"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES[1:], 2)
}
_STYLES: dict[str, dict[str, Any]] = {
    "main": {"linewidth": 1.8, "zorder": 4},
    "raw": {"linewidth": 0.8, "alpha": 0.3, "zorder": 3},
    "other": {"color": MUTED, "linewidth": 1.1, "zorder": 2},
    "reference": {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 1},
}
_SIZE_INCHES = (3.8, 2.3)
FONT_SIZE = 9.5
_MANY_TIMES = 30  # as many as the fewest: over a longer axis the numbers 1, 2, 5, 10, ... run into each other
_MAX_MARKERS = 40  # points of a curve that are still shown one by one


@dataclass(frozen=True)
class Line:
    """A curve labelled at its right end; styles are `main`, `raw` (behind `main`), `other` and `reference` (dashed).

    `series` is the colour of the first two, a number below 6; `band` is a shade from its first to its second values.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: str = "main"
    label: str = ""
    series: int = 0
    band: tuple[Sequence[float], Sequence[float]] | None = None

    @property
    def look(self) -> dict[str, Any]:
        """How matplotlib draws it."""
        return {"color": SERIES[self.series], **_STYLES[self.style]}


@dataclass(frozen=True)
class Chart:
    """Lines over the training step. `log`: logarithmic y, where all values are positive. `zero`: y starts at 0.

    `over_counts`: x is not a step but a number of things, from few to many, on a logarithmic axis with the title `x`.
    """

    title: str
    lines: Sequence[Line]
    log: bool = False
    zero: bool = False
    over_counts: bool = False
    x: str = ""


@dataclass
class Sheet:
    """Axes to draw on, and what becomes of them."""

    axes: Any
    svg: str = ""


@contextmanager
def sheet(title: str, name: str, size_inches: tuple[float, float] = _SIZE_INCHES) -> Iterator[Sheet]:
    """Empty axes in the style of the page; on leaving, `svg` is what was drawn, as an `<svg>` element.

    `name` keeps its identifiers apart from those of other charts of the page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": FONT_SIZE,
        "text.parse_math": False,  # names of tasks may hold a $
        "axes.formatter.useoffset": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=size_inches, layout="constrained")
        page = Sheet(figure.subplots())
        page.axes.set_title(title, loc="left", color=INK, fontsize=FONT_SIZE + 1)
        page.axes.spines[["top", "right", "left"]].set_visible(False)
        page.axes.spines["bottom"].set_color(GRID)
        page.axes.tick_params(colors=MUTED, length=0, which="both")
        yield page
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        page.svg = _embed(buffer.getvalue(), name, title)


def draw(chart: Chart, name: str, size_inches: tuple[float, float] = _SIZE_INCHES) -> str:
    """The chart as an `<svg>` element. `name` keeps its identifiers apart from those of other charts of the page."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    with sheet(chart.title, name, size_inches) as page:
        axes = page.axes
        for line in chart.lines:
            marker = "o" if line.style == "main" and len(line.x) <= _MAX_MARKERS else None
            axes.plot(line.x, line.y, marker=marker, markersize=3.5, **line.look)
            if line.band is not None:
                axes.fill_between(line.x, *line.band, color=line.look["color"], alpha=0.15, linewidth=0)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_xlabel(chart.x, color=MUTED, fontsize=FONT_SIZE - 1, loc="left")
        if chart.over_counts:
            axes.set_xscale("log")
            counts = [x for line in chart.lines for x in line.x]
            is_narrow = max(counts) < _MANY_TIMES * min(counts)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_narrow else (1.0, 3.0)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:,g}")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if chart.log and all(v > 0 for line in chart.lines for v in line.y):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter("{x:g}")
        if chart.zero:
            axes.set_ylim(bottom=0)
        label_ends(axes, chart.lines, size_inches[1])
    return page.svg


def label_ends(axes: Any, lines: Sequence[Line], height_inches: float) -> None:
    """Write each label right of the end of its line, moved up where it would cover the one below.

    Where that leads over the top, they move down again.
    """
    low, high = axes.get_ybound()
    to_axes = axes.transScale + axes.transLimits
    text_height = 1.25 * FONT_SIZE / 72 / (height_inches * 0.72)  # of one line, as a part of the axes
    labelled = sorted((line for line in lines if line.label and len(line.y)), key=lambda line: line.y[-1])
    places: list[float] = []
    for line in labelled:
        at = float(to_axes.transform((line.x[-1], min(max(line.y[-1], low), high)))[1])
        places.append(max(at, places[-1] + text_height) if places else at)
    ceiling = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - text_height
    for line, at in zip(labelled, places, strict=True):
        look = {"color": line.look["color"], "weight": "bold" if line.style == "main" else "normal"}
        axes.text(1.02, at, line.label, transform=axes.transAxes, va="center", fontsize=FONT_SIZE - 1, **look)


def _embed(svg: str, name: str, title: str) -> str:
    assert re.fullmatch(r"[\w-]+", name), "names go into the page as they are: none may come from data"
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    label = html.escape(title)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        lambda match: f'<svg viewBox="{match[1]}" role="img" aria-label="{label}">',
        svg,
        count=1,
    )
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{name}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font-size: \2", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
