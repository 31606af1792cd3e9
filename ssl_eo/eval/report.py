"""One self-contained page about a run, from the files that the run leaves: curves, probes against controls, pictures.

It reads whatever there is: a run that was killed, that never probed or that is still going gets its page too.
"""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, reduce
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_eo.eval.figures import Chart, Line, draw
from ssl_eo.eval.page import render
from ssl_eo.eval.summary import (
    Record,
    Summary,
    better,
    newest,
    read_results,
    score_of,
    score_text,
    summarise,
    title_of,
)
from ssl_eo.files import atomic_write
from ssl_eo.jsonl import read_jsonl

__all__ = ["is_run", "save_panel", "write_report"]

_MAX_PICTURES = 6
_HEADLINE_PROBE = "ridge"
_HEALTH = {  # measures that are drawn, as they are called in the charts
    "effective_rank": "Effective rank",
    "spread_ratio": "Spread around the mean",
    "alpha_req": "Decay of the spectrum (alpha-ReQ)",
    "uniformity": "Uniformity",
    "mean_cosine": "Mean cosine",
    "first_ratio": "Share of the first direction",
    "mean_norm": "Mean norm",
    "norm_spread_ratio": "Spread of norms",
    "cls_patch_cosine": "Cosine of CLS token and patches",
    "dead_ratio": "Share of dead features",
}
_SHAPE = {"embed_dim": "wide", "depth": "blocks", "n_heads": "heads"}  # what a config may change of a size


def is_run(folder: Path) -> bool:
    """Whether a training wrote to it."""
    return (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path. Raises `ValueError` where `run_dir` is not a run."""
    if not is_run(run_dir):
        raise ValueError(f"{run_dir} has neither metrics.jsonl nor config.yaml: it is not a run directory")
    run = _Run.read(run_dir)
    summaries = summarise(run.evals)
    html = render(
        "report.html.j2",
        title=run.name,
        subtitle=run.subtitle,
        facts=_facts(run),
        verdicts=[v for summary in summaries if (v := _verdict(summary)) is not None],
        tables=[_table(run, summary) for summary in summaries],
        errors=[r for r in run.evals if r["kind"] == "error"],
        health=[_health(run, i, name) for i, name in enumerate(dict.fromkeys(str(r["source"]) for r in run.watched))],
        put_off=[f"Step {r['step']:,}: {r['what']} put off: {r['reason']}" for r in run.put_off],
        training=_draw_all("training", _training_charts(run)),
        speed=_draw_all("speed", _speed_charts(run)),
        pictures=_pictures(run_dir),
        config=run.config_text,
        env={k: " ".join(v) if isinstance(v, list) else v for k, v in run.env.items()},
    )
    path = run_dir / "report.html"
    atomic_write(path, html)
    return path


def save_panel(path: Path, rows: Sequence[tuple[str, ArrayLike]]) -> None:
    """Save pictures as a PNG: each row a title and its pictures, `[n, H, W, 3]` or one `[H, W, 3]`, in any unit.

    A column shows the 2nd and 98th percentile of its picture in the first row as black and white, so that rows compare.
    Values that are not finite are grey: hidden patches, for instance.
    """
    from PIL import Image, ImageDraw, ImageFont

    strips = [(title, _as_strip(pictures)) for title, pictures in rows]
    low, width = _display_ranges(strips[0][1])  # [n, 1, 1, 1]
    gap, header = 4, 24
    zoom = max(1, round(128 / strips[0][1].shape[1]))
    images = []
    for title, strip in strips:
        visible = np.isfinite(strip).all(-1, keepdims=True)
        scaled = np.where(visible, np.clip((np.nan_to_num(strip) - low) / width, 0.0, 1.0), 0.5)
        images.append((title, (scaled * 255).round().astype(np.uint8).repeat(zoom, 1).repeat(zoom, 2)))  # [n, H, W, 3]
    total_width = max(len(p) * (p.shape[2] + gap) - gap for _, p in images)
    canvas = Image.new("RGBA", (total_width, sum(p.shape[1] + header for _, p in images)), (0, 0, 0, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    top = 0
    for title, pictures in images:
        pen.text((0, top + 5), title, fill=(128, 128, 128, 255), font=font)  # grey reads on light and on dark
        for i, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (i * (picture.shape[1] + gap), top + header))
        top += header + pictures.shape[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _as_strip(pictures: ArrayLike) -> NDArray[np.float64]:
    strip = np.asarray(pictures, dtype=np.float64)
    strip = strip[None] if strip.ndim == 3 else strip
    if strip.ndim != 4 or strip.shape[-1] != 3:
        raise ValueError(f"a row of a panel holds pictures [n, H, W, 3], got shape {strip.shape}")
    return strip


def _display_ranges(strip: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What is shown as black in each picture, and how far above it white is, `[n, 1, 1, 1]` each.

    A picture of next to nothing (water) is stretched only so far, else its noise would look like a landscape.
    """
    finite = np.isfinite(strip)
    lows, highs = np.zeros(len(strip)), np.ones(len(strip))
    for i, picture in enumerate(strip):
        if finite[i].any():
            lows[i], highs[i] = np.percentile(picture[finite[i]], [2, 98])
    least = 0.2 * np.median(highs - lows)
    widths = np.maximum(highs - lows, max(least, 1e-12))
    return lows[:, None, None, None], widths[:, None, None, None]


@dataclass(frozen=True)
class _Run:
    """What a run directory says, with one record a step: where a resumed run repeated a step, the later counts."""

    name: str
    config: Mapping[str, Any]
    config_text: str
    metrics: list[Record]
    evals: list[Record]  # of tasks
    watched: list[Record]  # of training sources
    put_off: list[Record]
    env: Mapping[str, Any]

    @classmethod
    def read(cls, run_dir: Path) -> _Run:
        import yaml

        text = _text(run_dir / "config.yaml")
        try:
            config = yaml.safe_load(text)
            env = json.loads(_text(run_dir / "env.json") or "{}")
        except (yaml.YAMLError, json.JSONDecodeError) as error:
            raise ValueError(f"{run_dir}: config.yaml or env.json cannot be read: {error}") from None
        metrics = [r for r in read_jsonl(run_dir / "metrics.jsonl") if "step" in r]
        told = [r for r in read_jsonl(run_dir / "eval.jsonl") if {"step", "kind"} <= r.keys()]
        return cls(
            name=run_dir.resolve().name,
            config=config if isinstance(config, dict) else {},
            config_text=text,
            metrics=newest(metrics, ("step",)),
            evals=read_results(run_dir / "eval.jsonl"),
            watched=newest([r for r in told if "source" in r], ("step", "kind", "source", "tap")),
            put_off=newest([r for r in told if r["kind"] == "skipped" and "what" in r], ("step", "what")),
            env=env,
        )

    def setting(self, key: str) -> Any:
        """The config's value at a dotted key, None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def subtitle(self) -> str:
        size, patch = self.setting("model.size"), self.setting("model.patch_size")
        sources = [s.get("name") for s in self.setting("data.sources") or [] if isinstance(s, Mapping)]
        model = f"ViT-{size}/{patch}" if size and patch else None
        changed = [f"{v} {what}" for key, what in _SHAPE.items() if (v := self.setting(f"model.{key}")) is not None]
        model = f"{model} with {', '.join(changed)}" if model and changed else model
        return " · ".join(str(p) for p in (self.setting("objective.name"), model, *sources) if p)

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged and is a number."""
        rows = [(r["step"], r[key]) for r in self.metrics if _is_number(r.get(key))]
        return [s for s, _ in rows], [v for _, v in rows]

    def results(self, task: str, kind: str, **wanted: str) -> list[Record]:
        """Records of one task and kind whose fields have the `wanted` values, by step."""
        rows = [r for r in self.evals if r["task"] == task and r["kind"] == kind]
        return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def _facts(run: _Run) -> list[tuple[str, str]]:
    """The headline: (what, value) pairs for what is known."""
    steps, losses = run.column("loss")
    _, rates = run.column("samples_per_s")
    _, waits = run.column("data_wait_ratio")
    _, memory = run.column("max_memory_gb")
    total, batch = run.setting("train.total_steps"), run.setting("train.global_batch_size")
    facts = []
    if run.metrics:
        last = run.metrics[-1]["step"]
        facts.append(("steps", f"{last:,}" if not total or last >= total else f"{last:,} of {total:,}"))
        if batch:
            facts.append(("samples", _short(last * batch)))
        if batch and rates:
            facts.append(("training, without probes", str(timedelta(seconds=round(_training_seconds(run, batch))))))
    if rates:
        facts.append(("samples/s", _short(statistics.median(rates))))
    if waits:
        facts.append(("waiting for data", f"{100 * statistics.fmean(waits):.1f} %"))
    if memory:
        facts.append(("peak memory", f"{max(memory):.1f} GB"))
    if losses:
        facts.append((f"loss at step {steps[-1]:,}", f"{losses[-1]:.4g}"))
    return facts


def _training_seconds(run: _Run, batch: int) -> float:
    steps, rates = run.column("samples_per_s")
    spans = np.diff([0, *steps]) * batch
    return float(sum(span / rate for span, rate in zip(spans, rates, strict=True) if rate > 0))


def _verdict(summary: Summary) -> dict[str, Any] | None:
    """The final encoder against the random one and the best control, in one line; the probe is fixed beforehand."""
    final = summary.final
    if final is None or not final.scores:
        return None
    probe = _HEADLINE_PROBE if _HEADLINE_PROBE in final.scores else next(iter(final.scores))
    score = score_text(summary.metric, final.scores[probe])
    out = {"task": summary.task, "probe": probe, "metric": summary.metric, "score": score, "step": f"{final.step:,}"}
    margins = sorted((m for m in summary.margins if m.probe == probe), key=lambda m: m.gain)
    shown = [*(m for m in margins if m.rival == "random encoder"), *(m for m in margins[:1])]
    gains = [f"{m.text} over {m.rival} ({score_text(m.metric, m.rival_score)})" for m in dict.fromkeys(shown)]
    return {**out, "gains": ", ".join(gains), "leads": bool(margins) and margins[0].gain > 0}


def _table(run: _Run, summary: Summary) -> dict[str, Any]:
    """One row for each row of `summary` and one column a measure, without the measures that no row has."""
    probes = sorted(summary.probes)
    columns = [
        *((probe, summary.metric, [row.scores.get(probe) for row in summary.rows]) for probe in probes),
        *((f"{p} (macro)", "macro_accuracy", [row.macro_accuracy.get(p) for row in summary.rows]) for p in probes),
    ]
    measured = [(title, _cells(of, values)) for title, of, values in columns if any(v is not None for v in values)]
    if any(row.effective_rank is not None for row in summary.rows):
        ranks = ["" if row.effective_rank is None else f"{row.effective_rank:.1f}" for row in summary.rows]
        measured.append(("effective rank", [{"text": text, "is_best": False} for text in ranks]))
    taps = {row.tap for row in summary.rows} - {"pixels"}
    rows = [
        {
            "title": f"{row.title}, {row.tap}" if len(taps) > 1 and row.tap != "pixels" else row.title,
            "is_final": row.is_final,
            "cells": [cells[i] for _, cells in measured],
        }
        for i, row in enumerate(summary.rows)
    ]
    charts = _draw_all(f"{summary.task}-", _probe_charts(run, summary.task))
    shown = {"columns": [title for title, _ in measured], "rows": rows, "charts": charts}
    return {"task": summary.task, "metric": summary.metric, **shown}


def _cells(metric: str, values: Sequence[float | None]) -> list[dict[str, Any]]:
    best = reduce(partial(better, metric), [v for v in values if v is not None])
    return [{"text": "" if v is None else score_text(metric, v), "is_best": v == best} for v in values]


def _draw_all(name: str, charts: Sequence[Chart]) -> list[str]:
    """The charts that have something to show, as SVG."""
    full = [c for c in charts if any(len(line.y) for line in c.lines)]
    return [draw(c, f"{name}{i}") for i, c in enumerate(full)]


def _training_charts(run: _Run) -> list[Chart]:
    parts = sorted({k for r in run.metrics for k in r if k.startswith("loss/")})
    charts = [_trend(run, "loss", "Loss")]
    if len(parts) > 1:
        charts += [_trend(run, part, f"Loss: {part.removeprefix('loss/')}") for part in parts]
    return [*charts, _trend(run, "lr", "Learning rate"), _trend(run, "grad_norm", "Gradient norm", log=True)]


def _speed_charts(run: _Run) -> list[Chart]:
    return [
        _trend(run, "samples_per_s", "Samples per second", zero=True),
        _trend(run, "data_wait_ratio", "Share of time waiting for data", zero=True),
    ]


def _trend(run: _Run, key: str, title: str, log: bool = False, zero: bool = False) -> Chart:
    steps, values = run.column(key)
    if len(values) < 60 or key == "lr":
        return Chart(title, [Line(steps, values)], log, zero)
    return Chart(title, [Line(steps, values, "raw"), Line(steps, _smooth(values))], log, zero)


def _probe_charts(run: _Run, task: str) -> list[Chart]:
    charts = []
    for probe in dict.fromkeys(r["probe"] for r in run.results(task, "probe")):
        curves = _tap_lines(run.results(task, "probe", probe=probe, features="encoder"))
        controls = [r for r in run.results(task, "probe", probe=probe) if r["features"] != "encoder"]
        end = max((x for line in curves for x in line.x), default=1)
        flat = [Line([0, end], [score_of(r)] * 2, "reference", title_of(r)) for r in controls]
        metric = next(r["metric"] for r in run.results(task, "probe", probe=probe))
        charts.append(Chart(f"{probe} {metric}", [*curves, *flat]))
    ranks = _tap_lines(run.results(task, "health", features="encoder"), lambda r: float(r["effective_rank"]))
    return [*charts, Chart("Effective rank of the features", ranks, zero=True)]


def _health(run: _Run, position: int, source: str) -> dict[str, Any]:
    """Curves of one training source, and in words what went wrong there."""
    records = [r for r in run.watched if r["source"] == source]
    charts = []
    for name, title in _HEALTH.items():
        lines = _tap_lines([r for r in records if _is_number(r.get(name))], itemgetter(name))
        charts.append(Chart(title, lines))
    remarks = [f"Step {r['step']:,}: could not be measured: {r['error']}" for r in records if r["kind"] == "error"]
    steps: dict[tuple[str, str], list[int]] = {}
    for r in records:
        for cause in r.get("collapsed", []):
            steps.setdefault((str(r["tap"]), cause), []).append(r["step"])
    for (tap, cause), found in steps.items():
        when = (
            f"Step {found[0]:,}" if len(found) == 1 else f"{len(found)} times from step {found[0]:,} to {found[-1]:,}"
        )
        remarks.append(f"{when}: features at {tap.replace('_', ' ')} {cause}")
    return {"source": source, "charts": _draw_all(f"health{position}-", charts), "remarks": remarks}


def _tap_lines(records: Sequence[Record], value_of: Callable[[Record], float] = score_of) -> list[Line]:
    lines = []
    for tap in dict.fromkeys(r["tap"] for r in records):
        rows = sorted((r for r in records if r["tap"] == tap), key=lambda r: int(r["step"]))
        label = {"last": "last block", "all": "all taps"}.get(tap, str(tap).replace("_", " "))
        style = "main" if tap == "last" else "other"
        lines.append(Line([r["step"] for r in rows], [value_of(r) for r in rows], style, label))
    return lines


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a fortieth of the curve, started without a bias to the first value."""
    keep = 1.0 - 1.0 / max(2.0, len(values) / 40)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        out.append(total / weight)
    return out


def _pictures(run_dir: Path) -> list[tuple[str, str]]:
    """(caption, data URI) of the run's pictures, evenly over the run, the last one always."""
    paths = sorted((run_dir / "pictures").glob("step_*.png"), key=lambda p: (len(p.stem), p.stem))
    if len(paths) > _MAX_PICTURES:
        paths = [paths[round(i)] for i in np.linspace(0, len(paths) - 1, _MAX_PICTURES)]
    return [
        (f"step {p.stem.removeprefix('step_').lstrip('0') or '0'}", "data:image/png;base64," + _base64(p))
        for p in paths
    ]


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g} {unit}"
    return f"{value:,.0f}"
