"""One self-contained page about a run, from the files that the run leaves: curves, probes against controls, pictures.

It reads whatever there is: a run that was killed, that never probed or that is still going gets its page too.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ssl_eo.eval.comparison import probe_shown
from ssl_eo.eval.metrics import best_of, metric_text, number_text, score_text
from ssl_eo.eval.page import render
from ssl_eo.eval.result_tables import Cell, Row, Table, with_numbers
from ssl_eo.eval.rounding import fixed
from ssl_eo.eval.run_charts import draw_all, health_charts, probe_charts, speed_charts, training_charts
from ssl_eo.eval.run_records import Run, is_run
from ssl_eo.eval.summary import Summary, summarise
from ssl_eo.eval.wording import value_text
from ssl_eo.files import atomic_write

__all__ = ["is_run", "write_report"]

_MAX_PICTURES = 6


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path. Raises `ValueError` where `run_dir` is not a run."""
    if not is_run(run_dir):
        raise ValueError(f"{run_dir} has neither metrics.jsonl nor config.yaml: it is not a run directory")
    run = Run.read(run_dir)
    summaries = summarise(run.probed)
    probed = [of for i, s in enumerate(summaries) if (of := _probed(run, s, f"task{i}"))["table"] is not None]
    html = render(
        "report.html.j2",
        title=run.name,
        subtitle=run.subtitle,
        facts=_facts(run),
        colors={row.title: "var(--accent)" for of in probed for row in of["table"].rows if row.kind == "model"},
        verdicts=[v for summary in summaries if (v := _verdict(summary)) is not None],
        has_probes=bool(summaries),
        probed=probed,
        errors=[r for r in run.probed if r["kind"] == "error"],
        health=[_health(run, i, name) for i, name in enumerate(dict.fromkeys(str(r["source"]) for r in run.health))],
        put_off=[f"Step {r['step']:,}: {r['what']} put off: {r['reason']}" for r in run.put_off],
        training=draw_all("training", training_charts(run)),
        speed=draw_all("speed", speed_charts(run)),
        pictures=_pictures(run_dir),
        config=run.config_text,
        env={k: " ".join(v) if isinstance(v, list) else v for k, v in run.env.items()},
    )
    path = run_dir / "report.html"
    atomic_write(path, html)
    return path


def _facts(run: Run) -> list[tuple[str, str]]:
    """What stands at the top: (what, value) pairs for what is known."""
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


def _training_seconds(run: Run, batch: int) -> float:
    steps, rates = run.column("samples_per_s")
    spans = np.diff([0, *steps]) * batch
    return float(sum(span / rate for span, rate in zip(spans, rates, strict=True) if rate > 0))


def _verdict(summary: Summary) -> dict[str, str] | None:
    """The final encoder beside the random one and the closest rival, in one line; the probe is fixed beforehand.

    It says what was measured, and not who is better: the records of a run have no intervals.
    """
    final = summary.final
    if final is None or not final.scores:
        return None
    probe = probe_shown(list(final.scores))
    score = score_text(summary.metric, final.scores[probe])
    margins = sorted((m for m in summary.margins if m.probe == probe), key=lambda m: m.gain)
    shown = [*(m for m in margins if m.rival_kind == "random"), *margins[:1]]
    gains = [f"{m.text} over {m.rival} ({score_text(m.metric, m.rival_score)})" for m in dict.fromkeys(shown)]
    out = {"task": summary.task, "probe": probe, "metric": summary.metric, "score": score, "step": f"{final.step:,}"}
    return {**out, "gains": ", ".join(gains)}


def _probed(run: Run, summary: Summary, name: str) -> dict[str, Any]:
    """The table of a task and its charts, which are called `name` in the page."""
    return {"table": _table(summary), "charts": draw_all(f"{name}-", probe_charts(run, summary.task))}


def _table(summary: Summary) -> Table | None:
    """One row for each row of `summary` and one column a measure, without the measures that no row has.

    None where there is none.
    """
    probes = sorted(summary.probes)
    columns = [
        *((p, _cells(summary.metric, [row.scores.get(p) for row in summary.rows])) for p in probes),
        *(
            (
                f"{p}, {metric_text('macro_accuracy')}",
                _cells("macro_accuracy", [row.macro_accuracy.get(p) for row in summary.rows]),
            )
            for p in probes
        ),
        (
            "effective rank",
            [Cell("" if row.effective_rank is None else fixed(row.effective_rank, 1)) for row in summary.rows],
        ),
    ]
    taps = {row.tap for row in summary.rows} - {"pixels"}
    rows = [
        Row(
            f"{row.title}, {value_text('tap', row.tap)}" if len(taps) > 1 and row.tap != "pixels" else row.title,
            row.kind,
            [cells[i] for _, cells in columns],
        )
        for i, row in enumerate(summary.rows)
    ]
    about = f": {metric_text(summary.metric)}" if summary.metric else ""
    tables = with_numbers([Table(f"{summary.task}{about}", "features", [title for title, _ in columns], rows)])
    return tables[0] if tables else None


def _cells(metric: str, values: Sequence[float | None]) -> list[Cell]:
    known = [v for v in values if v is not None]
    best = best_of(metric, known, float) if known else None
    return [Cell() if v is None else Cell(number_text(metric, v), is_best=v == best) for v in values]


def _health(run: Run, position: int, source: str) -> dict[str, Any]:
    """Curves of one training source, and in words what went wrong there."""
    records = [r for r in run.health if r["source"] == source]
    remarks = [f"Step {r['step']:,}: could not be measured: {r['error']}" for r in records if r["kind"] == "error"]
    steps: dict[tuple[str, str], list[int]] = {}
    for r in records:
        for cause in r.get("collapsed", []):
            steps.setdefault((str(r["tap"]), cause), []).append(r["step"])
    for (tap, cause), found in steps.items():
        when = (
            f"Step {found[0]:,}" if len(found) == 1 else f"{len(found)} times from step {found[0]:,} to {found[-1]:,}"
        )
        remarks.append(f"{when}: features at {value_text('tap', tap)} {cause}")
    return {"source": source, "charts": draw_all(f"health{position}-", health_charts(records)), "remarks": remarks}


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


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g} {unit}"
    return f"{value:,.0f}"
