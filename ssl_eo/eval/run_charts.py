"""Curves of a run: training, speed, probes against what needs no training, the health of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ssl_eo.eval.figures import Chart, Line, draw
from ssl_eo.eval.metrics import in_unit, metric_text
from ssl_eo.eval.records import Record
from ssl_eo.eval.run_records import Run, is_number
from ssl_eo.eval.summary import score_of, title_of
from ssl_eo.eval.wording import value_text

__all__ = ["draw_all", "health_charts", "probe_charts", "speed_charts", "training_charts"]

_HEALTH = {  # measures that are drawn, as they are called in the charts
    "effective_rank": "Effective rank",
    "spread_ratio": "Spread around the mean",
    "alpha_req": "Decay of the spectrum (alpha-ReQ)",
    "uniformity": "Uniformity",
    "mean_cosine": "Mean cosine",
    "first_ratio": "Share of the first direction, %",
    "mean_norm": "Mean norm",
    "norm_spread_ratio": "Spread of norms",
    "cls_patch_cosine": "Cosine of CLS token and patches",
    "dead_ratio": "Share of dead features, %",
}
_SHARES = ("first_ratio", "dead_ratio")  # are shown in percent, as scores are


def training_charts(run: Run) -> list[Chart]:
    parts = sorted({k for r in run.metrics for k in r if k.startswith("loss/")})
    charts = [_trend(run, "loss", "Loss")]
    if len(parts) > 1:
        charts += [_trend(run, part, f"Loss: {part.removeprefix('loss/')}") for part in parts]
    return [*charts, _trend(run, "lr", "Learning rate"), _trend(run, "grad_norm", "Gradient norm", log=True)]


def speed_charts(run: Run) -> list[Chart]:
    return [
        _trend(run, "samples_per_s", "Samples per second", zero=True),
        _trend(run, "data_wait_ratio", "Time waiting for data, %", zero=True, times=100),
    ]


def _trend(run: Run, key: str, title: str, log: bool = False, zero: bool = False, times: float = 1) -> Chart:
    steps, logged = run.column(key)
    values = [times * value for value in logged]
    if len(values) < 60 or key == "lr":
        return Chart(title, [Line(steps, values)], log, zero)
    return Chart(title, [Line(steps, values, "raw"), Line(steps, _smooth(values))], log, zero)


def probe_charts(run: Run, task: str) -> list[Chart]:
    charts = []
    for probe in dict.fromkeys(r["probe"] for r in run.of_task(task, "probe")):
        curves = _tap_lines(run.of_task(task, "probe", probe=probe, features="encoder"))
        controls = [r for r in run.of_task(task, "probe", probe=probe) if r["features"] != "encoder"]
        end = max((x for line in curves for x in line.x), default=1)
        flat = [Line([0, end], [_shown(r)] * 2, "reference", title_of(r)) for r in controls]
        metric = next(r["metric"] for r in run.of_task(task, "probe", probe=probe))
        charts.append(Chart(f"{probe}, {metric_text(metric)}", [*curves, *flat]))
    known = [r for r in run.of_task(task, "health", features="encoder") if is_number(r.get("effective_rank"))]
    ranks = _tap_lines(known, partial(_times, 1, "effective_rank"))
    return [*charts, Chart("Effective rank of the features", ranks, zero=True)]


def health_charts(records: Sequence[Record]) -> list[Chart]:
    """One chart for each measure of the health of features, of the records of one training source."""
    charts = []
    for name, title in _HEALTH.items():
        times = 100 if name in _SHARES else 1
        known = [r for r in records if is_number(r.get(name))]
        lines = _tap_lines(known, partial(_times, times, name))
        charts.append(Chart(title, lines))
    return charts


def draw_all(name: str, charts: Sequence[Chart]) -> list[str]:
    """The charts that have something to show, as SVG."""
    full = [c for c in charts if any(len(line.y) for line in c.lines)]
    return [draw(c, f"{name}{i}") for i, c in enumerate(full)]


def _tap_lines(records: Sequence[Record], value_of: Callable[[Record], float] | None = None) -> list[Line]:
    value_of = value_of or _shown
    lines = []
    for tap in dict.fromkeys(r["tap"] for r in records):
        rows = sorted((r for r in records if r["tap"] == tap), key=lambda r: int(r["step"]))
        style = "main" if tap == "last" else "other"
        lines.append(Line([r["step"] for r in rows], [value_of(r) for r in rows], style, value_text("tap", tap)))
    return lines


def _times(times: float, key: str, record: Record) -> float:
    return times * float(record[key])


def _shown(record: Record) -> float:
    """The score of a probe in the unit in which tables show it."""
    return in_unit(record["metric"], score_of(record))


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a fortieth of the curve, started without a bias to the first value."""
    keep = 1.0 - 1.0 / max(2.0, len(values) / 40)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        out.append(total / weight)
    return out
