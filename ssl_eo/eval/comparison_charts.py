"""Charts of a comparison: scores with their intervals, over labels, over cost, and of the runs while they trained.

K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_eo.eval.aggregates import Ranges, aggregates, has_mean, tasks_of_mean
from ssl_eo.eval.comparison import Comparison
from ssl_eo.eval.entrants import Entrant
from ssl_eo.eval.experiments import Score
from ssl_eo.eval.figures import SERIES, Chart, Line, draw
from ssl_eo.eval.metrics import in_unit, metric_text
from ssl_eo.eval.partitions import parse_partition
from ssl_eo.eval.records import Record
from ssl_eo.eval.result_figures import Bar, Point, draw_bars, draw_points, short
from ssl_eo.eval.summary import read_task_records, score_of

__all__ = ["bar_chart", "charts_of_runs", "color_of", "confusion_of", "cost_charts", "curve_charts"]

_SIZE_OF_CURVES_INCHES = (5.0, 2.6)


def cost_charts(comparison: Comparison, ranges: Ranges | None) -> list[str]:
    """The interquartile mean of each model over the GFLOP of a sample, by probes."""
    charts = []
    for i, probe in enumerate(comparison.probes):
        tasks = tasks_of_mean(comparison, probe, ranges)
        points, levels = [], []
        for a in aggregates(comparison, probe, ranges):
            if a.interquartile_mean is None:
                continue
            cost, mean = _mean_gflop(comparison, a.entrant, tasks, probe), 100 * a.interquartile_mean
            if a.entrant.kind == "control":
                levels.append((a.entrant.title, mean))
            elif cost is not None:
                label = a.entrant.title if a.entrant.kind == "model" else ""
                points.append(Point(label, cost, mean, _series(comparison, a.entrant)))
        if points:
            title = f"{probe}: {'interquartile mean' if has_mean(comparison, tasks) else 'score'} over cost"
            x = "GFLOP of a sample, mean over tasks; circles are random encoders"
            charts.append(draw_points(title, points, levels, x, f"cost{i}"))
    return charts


def _mean_gflop(comparison: Comparison, entrant: Entrant, tasks: Sequence[str], probe: str) -> float | None:
    scores = [comparison.score(entrant, task, probe) for task in tasks]
    costs = [s.records[0].get("gflop") for s in scores if s is not None]
    known = [float(cost) for cost in costs if cost]
    return float(np.mean(known)) if known and len(known) == len(costs) else None


def bar_chart(comparison: Comparison, task: str, probe: str, scores: Sequence[tuple[Entrant, Score]], name: str) -> str:
    metric = comparison.metrics[task]
    bars = []
    for entrant, score in scores:
        bounds = score.interval
        shown = None if bounds is None else (in_unit(metric, bounds.low), in_unit(metric, bounds.high))
        title = short(entrant.title) + ("" if comparison.is_compared(task, score) else " (other samples)")
        bars.append(Bar(title, in_unit(metric, score.value), shown, _series(comparison, entrant)))
    return draw_bars(f"{probe}, {metric_text(metric)}", bars, name)


def curve_charts(comparison: Comparison, task: str, probes: Sequence[str], name: str) -> list[str]:
    """Scores over the number of labelled samples, by probes; parts that were published and ours are drawn apart."""
    parts = comparison.parts(task)
    of_origins = {o: _one_of_each_ratio([*parts[o], *parts["all"]]) for o in ("published", "nested") if parts[o]}
    charts: list[str] = []
    for origin, steps in of_origins.items():
        for probe in probes:
            lines = [_curve(comparison, entrant, task, probe, steps) for entrant in comparison.entrants]
            lines = [line for line in lines if len(line.x) > 1]
            if lines:
                drawn = f", {origin} parts" if len(of_origins) > 1 else ""
                title = f"{probe}, {metric_text(comparison.metrics[task])}{drawn}"
                chart = Chart(title, lines, over_counts=True, x="labelled samples")
                charts.append(draw(chart, f"{name}-curve{len(charts)}", _SIZE_OF_CURVES_INCHES))
    return charts


def _one_of_each_ratio(parts: Sequence[str]) -> list[str]:
    """By size; of parts that are as large, such as all samples and our part of all, the last."""
    return list(dict(sorted((parse_partition(part).ratio, part) for part in parts)).values())


def _curve(comparison: Comparison, entrant: Entrant, task: str, probe: str, steps: Sequence[str]) -> Line:
    found = [s for step in steps if (s := comparison.score(entrant, task, probe, partition=step)) is not None]
    metric, series = comparison.metrics[task], _series(comparison, entrant)
    x = [float(np.mean([r["n_train"] for r in s.records])) for s in found]
    y = [in_unit(metric, s.value) for s in found]
    bounds = [s.interval for s in found]
    known = [(in_unit(metric, b.low), in_unit(metric, b.high)) for b in bounds if b is not None]
    band = ([low for low, _ in known], [high for _, high in known]) if len(known) == len(x) else None
    style = {"model": "main", "random": "other", "control": "reference"}[entrant.kind]
    return Line(x, y, style, short(entrant.title), series or 0, band if entrant.kind == "model" else None)


def confusion_of(score: Score) -> np.ndarray[Any, Any]:
    """Of all seeds together, `[K, K]`."""
    return np.sum([r["confusion"] for r in score.records], axis=0)  # type: ignore[no-any-return]


def _series(comparison: Comparison, entrant: Entrant) -> int | None:
    """The colour of a model; what is not trained has none."""
    return comparison.models.index(entrant) % len(SERIES) if entrant.kind == "model" else None


def color_of(comparison: Comparison, entrant: Entrant) -> str:
    """The CSS variable of a model's colour, as it is in charts."""
    number = _series(comparison, entrant)
    return f"var(--series-{number + 1})" if number else "var(--accent)"


def charts_of_runs(runs: Sequence[Path]) -> list[str]:
    """Scores over steps, by task and probe, a line for each run."""
    of_runs = [(name, _of_last_block(run)) for run, name in _names_of_runs(runs).items()]
    kinds = dict.fromkeys((r["task"], r["probe"], r["metric"]) for _, records in of_runs for r in records)
    charts = []
    for i, (task, probe, metric) in enumerate(kinds):
        lines = []
        for number, (name, records) in enumerate(of_runs):
            curve = [r for r in records if (r["task"], r["probe"], r["metric"]) == (task, probe, metric)]
            points = [(r["step"], in_unit(metric, score_of(r))) for r in curve]
            lines.append(
                Line([x for x, _ in points], [y for _, y in points], "main", short(name), number % len(SERIES))
            )
        title = f"{task}: {probe}, {metric_text(metric)}"
        charts.append(draw(Chart(title, [line for line in lines if len(line.x)]), f"training{i}"))
    return charts


def _names_of_runs(runs: Sequence[Path]) -> dict[Path, str]:
    """Each run once; those whose folders have one name are called by that of the folder above too."""
    folders = list(dict.fromkeys(run.resolve() for run in runs))
    names = [folder.name for folder in folders]
    return {f: f.name if names.count(f.name) == 1 else f"{f.parent.name}/{f.name}" for f in folders}


def _of_last_block(run: Path) -> list[Record]:
    """Records of the probes of a run on its encoder's last block."""
    records = read_task_records(run / "eval.jsonl")
    return [r for r in records if r["kind"] == "probe" and r["features"] == "encoder" and r["tap"] == "last"]
