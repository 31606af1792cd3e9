"""Small line charts as SVG to stand inside a page: they take the page's font and colours, light or dark.

Matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Chart", "Line", "draw"]

# Stand-in -> CSS variable of the page. Near black, so that a page without the variables still shows something.
_INK, _MUTED, _GRID, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line", _ACCENT: "--accent"}
_STYLES: dict[str, dict[str, Any]] = {
    "main": {"color": _ACCENT, "linewidth": 1.8, "zorder": 4},
    "raw": {"color": _ACCENT, "linewidth": 0.8, "alpha": 0.3, "zorder": 3},
    "other": {"color": _MUTED, "linewidth": 1.1, "zorder": 2},
    "reference": {"color": _MUTED, "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 1},
}
_SIZE_INCHES = (3.8, 2.3)
_FONT_SIZE = 9.5
_MAX_MARKERS = 40  # points of a curve that are still shown one by one


@dataclass(frozen=True)
class Line:
    """A curve labelled at its right end; styles are `main`, `raw` (behind `main`), `other` and `reference` (dashed)."""

    x: Sequence[float]
    y: Sequence[float]
    style: str = "main"
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines over the training step. `log`: logarithmic y, where all values are positive. `zero`: y starts at 0."""

    title: str
    lines: Sequence[Line]
    log: bool = False
    zero: bool = False


def draw(chart: Chart, name: str) -> str:
    """The chart as an `<svg>` element. `name` keeps its identifiers apart from those of other charts of the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": _FONT_SIZE,
        "axes.formatter.useoffset": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.subplots()
        for line in chart.lines:
            marker = "o" if line.style == "main" and len(line.x) <= _MAX_MARKERS else None
            axes.plot(line.x, line.y, marker=marker, markersize=3.5, **_STYLES[line.style])
        axes.set_title(chart.title, loc="left", color=_INK, fontsize=_FONT_SIZE + 1)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.tick_params(colors=_MUTED, length=0, which="both")
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
        _label_ends(axes, chart.lines)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embed(buffer.getvalue(), name, chart.title)


def _label_ends(axes: Any, lines: Sequence[Line]) -> None:
    """Write each label right of the end of its line, moved up where it would cover the one below."""
    low, high = axes.get_ybound()
    to_axes = axes.transScale + axes.transLimits
    text_height = 1.25 * _FONT_SIZE / 72 / (_SIZE_INCHES[1] * 0.72)  # of one line, as a part of the axes
    free = -1.0
    for line in sorted((line for line in lines if line.label and len(line.y)), key=lambda line: line.y[-1]):
        at = max(free, float(to_axes.transform((line.x[-1], min(max(line.y[-1], low), high)))[1]))
        free = at + text_height
        style = {"color": _ACCENT, "weight": "bold"} if line.style == "main" else {"color": _MUTED}
        axes.text(1.02, at, line.label, transform=axes.transAxes, va="center", fontsize=_FONT_SIZE - 1, **style)


def _embed(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', svg, count=1
    )
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font-size: \2", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
