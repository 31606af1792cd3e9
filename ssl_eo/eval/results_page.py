"""One self-contained page about evaluations: models beside random encoders and controls, on all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_eo.eval.aggregates import Ranges, aggregates, by_dataset, read_ranges, tasks_of_mean, tasks_of_rank
from ssl_eo.eval.bootstrap import FEWEST_SEEDS
from ssl_eo.eval.comparison import WORDS_OF_CONDITIONS, Comparison, probe_shown
from ssl_eo.eval.entrants import Entrant, identity_of
from ssl_eo.eval.experiments import Score
from ssl_eo.eval.figures import SERIES, Chart, Line, draw
from ssl_eo.eval.metrics import in_unit, metric_text
from ssl_eo.eval.page import check_written, render
from ssl_eo.eval.partitions import parse_partition
from ssl_eo.eval.records import RESULTS, Record, write_csv
from ssl_eo.eval.result_figures import Bar, Point, draw_bars, draw_confusion, draw_points, short
from ssl_eo.eval.result_tables import (
    Table,
    as_latex,
    as_markdown,
    axis_table,
    class_table,
    interquartile_table,
    margin_table,
    mean_table,
    rank_table,
    score_table,
)
from ssl_eo.eval.summary import read_task_records, score_of
from ssl_eo.files import atomic_write

__all__ = ["has_results", "write_results_page"]

_TITLES = {
    "partition": "Parts of the training set",
    "subset": "Bands",
    "size": "Sizes",
    "tap": "Where features are read",
    "pool": "How tokens are pooled",
}
_MAX_CONFUSIONS = 4  # models whose confusion is drawn
_SIZE_OF_CURVES_INCHES = (5.0, 2.6)


def has_results(folder: Path) -> bool:
    """Whether `ssl-eo eval` wrote to it."""
    return (folder / RESULTS).is_file()


def write_results_page(
    folders: Sequence[Path],
    out: Path,
    runs: Sequence[Path] = (),
    normalizer: Sequence[Path] = (),
    markdown: Path | None = None,
    latex: Path | None = None,
) -> Path:
    """Write the page `out` about the results in `folders`, and beside it their scores, `<out>-scores.csv`.

    `runs` add curves of their probes while training. `markdown` and `latex` are files for the tables. Raises
    `ValueError` where a folder has no results, or the files `normalizer` no range of a task, and where a file that is
    to be written is no page, is asked for twice, or holds what was measured.
    """
    scores_csv = out.with_name(f"{out.stem}-scores.csv")
    check_written([out, scores_csv, *filter(None, (markdown, latex))])
    comparison = Comparison.read(folders)
    if not comparison.results and not comparison.problems:
        raise ValueError(f"{', '.join(map(str, folders))}: nothing was measured, there is nothing to report")
    ranges = read_ranges(normalizer, comparison.metrics) if normalizer and comparison.results else None
    means = [interquartile_table(comparison, ranges), mean_table(comparison, ranges), rank_table(comparison)]
    notes = _notes(comparison, ranges, normalizer)
    scores = [score_table(comparison, probe) for probe in comparison.probes]
    tried = [*comparison.results, *comparison.problems]
    models = [e.title for e in comparison.models] or list(dict.fromkeys(str(r["model"]) for r in tried if r["model"]))
    page = render(
        "results_page.html.j2",
        title="Evaluation of " + (_listed(models, 4) or "controls"),
        subtitle=f"Frozen features on {_listed(list(dict.fromkeys(str(r['task']) for r in tried)), 6)}",
        facts=_facts(comparison),
        colors={e.title: _variable(comparison, e) for e in comparison.models},
        means=[table for table in means if table.columns],
        notes=notes,
        costs=_costs(comparison, ranges),
        scores=scores,
        tasks=[_task(comparison, task, f"task{i}") for i, task in enumerate(comparison.tasks)],
        training=_training(runs),
        problems=[_problem(r) for r in comparison.problems],
        setup=_setup(comparison),
    )
    atomic_write(out, page)
    write_csv(scores_csv, comparison.results)
    margins = [margin_table(comparison, task) for task in comparison.tasks]
    margins = [Table(f"Margins on {t}", *_rest(m)) for t, m in zip(comparison.tasks, margins, strict=True) if m.rows]
    tables = [*means, *scores, *margins]
    said = [*notes, *(f"{task}: {flag}" for task in comparison.tasks for flag in comparison.flags(task))]
    said += [f"{what}: {why}" for kind, what, why in map(_problem, comparison.problems) if kind == "error"]
    for path, layout in ((markdown, as_markdown), (latex, as_latex)):
        if path is not None:
            atomic_write(path, layout([t for t in tables if t.columns], said))
    return out


def _rest(table: Table) -> tuple[Any, ...]:
    return table.corner, table.columns, table.rows


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    failed = sum(r["kind"] == "error" for r in comparison.problems)
    skipped = len(comparison.problems) - failed
    counts = (
        ("models", len(comparison.models)),
        ("tasks", len(comparison.tasks)),
        ("probes", len(comparison.probes)),
        ("results", len(comparison.results)),
        ("failed", failed),
        ("skipped", skipped),
    )
    return [(what, f"{n:,}") for what, n in counts if n or what == "failed"]


def _notes(comparison: Comparison, ranges: Ranges | None, normalizer: Sequence[Path]) -> list[str]:
    """What a reader of the tables must know."""
    if not comparison.results:
        return []
    together = {task for probe in comparison.probes for task in tasks_of_mean(comparison, probe, ranges)}
    ranked = {task for probe in comparison.probes for task in tasks_of_rank(comparison, probe)}
    apart = ", ".join(task for task in comparison.tasks if task in ranked - together)
    notes = [f"In no mean and no rank: {task} ({why})." for task, why in comparison.left_out.items()]
    why = "their scores are no ratios" if ranges is None else "they have no range in what --normalizer names"
    notes += [f"Not in the means, since {why}: {apart}."] if apart else []
    datasets = by_dataset(comparison, [task for task in comparison.tasks if task in ranked])
    notes += [f"Tasks of {name} count as one: {', '.join(of)}." for name, of in datasets.items() if len(of) > 1]
    has_means = len(by_dataset(comparison, list(together))) > 1
    if has_means and ranges is None:
        notes.append("Scores are plain, in percent: a task whose scores spread more weighs more in the means.")
    elif has_means:
        names = ", ".join(dict.fromkeys(path.name for path in normalizer))
        notes.append(f"Scores of each task are scaled from its range in {names}: 0 is its low end, 100 its high.")
    if has_means:
        notes.append(
            "The interquartile mean leaves out the lowest and the highest quarter of the scores; datasets weigh the"
            " same whatever their numbers of tasks and seeds."
        )
    notes.append(
        "[Intervals] hold 95 % of a bootstrap over test samples, of whole places where samples share one, task by task;"
        " of margins over the same resamples for both sides. After ± stands one standard deviation over seeds of the"
        f" draw; intervals with the word seeds are Student's t over these, of at least {FEWEST_SEEDS}. Bold is the best"
        " of a column, whether or not intervals overlap."
    )
    codes = {" ".join(str(r[k]) for k in ("version", "code") if r.get(k)) for r in comparison.results}
    if len(codes) > 1:
        notes.append(f"Results are of {len(codes)} versions of the code ({', '.join(sorted(codes))}).")
    return [*notes, _said_of_settings(comparison)]


def _said_of_settings(comparison: Comparison) -> str:
    """Under which conditions entrants are compared, and how the encoders among them are read."""
    said = []
    for axis, word in WORDS_OF_CONDITIONS.items():
        values = dict.fromkeys(comparison.condition(task, axis) for task in comparison.tasks)
        said.append(f"{word} {' or '.join(values)}")
    scores = [s for task in comparison.tasks for e, _, s in comparison.shown(task) if e.kind != "control"]
    if comparison.readings_differ(comparison.tasks, comparison.probes):
        return f"Where not said otherwise: {', '.join(said)}. Where an encoder is read stands below its name."
    for axis, word in (("tap", "read at"), ("pool", "pooled by")):
        read = dict.fromkeys(getattr(score.setting, axis).replace("_", " ") for score in scores)
        named = [value for value in read if value != "None"]
        said += [f"{word} {' or '.join(named)}"] if named else []
    return f"Where not said otherwise: {', '.join(said)}."


def _costs(comparison: Comparison, ranges: Ranges | None) -> list[str]:
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
            title = f"{probe}: {'interquartile mean' if len(by_dataset(comparison, tasks)) > 1 else 'score'} over cost"
            x = "GFLOP of a sample, mean over tasks; circles are random encoders"
            charts.append(draw_points(title, points, levels, x, f"cost{i}"))
    return charts


def _mean_gflop(comparison: Comparison, entrant: Entrant, tasks: Sequence[str], probe: str) -> float | None:
    scores = [comparison.score(entrant, task, probe) for task in tasks]
    costs = [s.records[0].get("gflop") for s in scores if s is not None]
    known = [float(cost) for cost in costs if cost]
    return float(np.mean(known)) if known and len(known) == len(costs) else None


def _task(comparison: Comparison, task: str, name: str) -> dict[str, Any]:
    """All that the page shows of one task; `name` is for identifiers."""
    scored = {p: _scores(comparison, task, p) for p in comparison.probes}
    scored = {p: of for p, of in scored.items() if of}
    axes = [axis for axis in _TITLES if _is_varied(comparison, task, axis)]
    shown = [(m, s) for m in comparison.models if (s := _score_shown(comparison, task, m)) is not None]
    titled = [(f"{model.title}, {score.records[0]['probe']}", score) for model, score in shown]
    matrices = [(title, score) for title, score in titled if "confusion" in score.records[0]]
    return {
        "name": task,
        "about": _about(comparison, task),
        "flags": comparison.flags(task),
        "absent": _absent(comparison, task, list(scored)),
        "bars": [_bars(comparison, task, p, of, f"{name}-bars{i}") for i, (p, of) in enumerate(scored.items())],
        "margins": margin_table(comparison, task),
        "curves": _curves(comparison, task, list(scored), name) if "partition" in axes else [],
        "axes": [(_TITLES[a], [axis_table(comparison, task, p, a) for p in scored], a == "partition") for a in axes],
        "confusions": [
            draw_confusion(short(title), _confusion(s), s.records[0]["classes"], f"{name}-confusion{i}")
            for i, (title, s) in enumerate(matrices[:_MAX_CONFUSIONS])
        ],
        "n_more_confusions": len(matrices[_MAX_CONFUSIONS:]),
        "classes": [class_table(s, title) for title, s in titled if s.records[0]["per_class"]],
    }


def _scores(comparison: Comparison, task: str, probe: str) -> list[tuple[Entrant, Score]]:
    return [(e, s) for e in comparison.entrants if (s := comparison.score(e, task, probe)) is not None]


def _is_varied(comparison: Comparison, task: str, axis: str) -> bool:
    """Whether there are several steps of an axis, and of how models are read that one of them was read in several."""
    steps = comparison.steps(task, axis)
    if axis in WORDS_OF_CONDITIONS:
        return len(steps) > 1
    places = [(e, probe) for e in comparison.entrants if e.kind != "control" for probe in comparison.probes]
    return any(sum(comparison.score(e, task, p, **{axis: s}) is not None for s in steps) > 1 for e, p in places)


def _absent(comparison: Comparison, task: str, probes: Sequence[str]) -> list[str]:
    """Models without a score here, why, and by which probes."""
    found: dict[tuple[str, str], list[str]] = {}
    for model in comparison.models:
        for probe in probes:
            if comparison.score(model, task, probe) is None:
                found.setdefault((model.title, comparison.absence(model, task, probe)), []).append(probe)
    return [f"Not shown: {title} by {', '.join(of)} ({why})." for (title, why), of in found.items()]


def _about(comparison: Comparison, task: str) -> str:
    r = comparison.example(task).records[0]
    n_classes = len(r["classes"])
    of_classes = f" of {n_classes} classes" if n_classes else ""
    places = f" at {r['n_groups']:,} places" if r["n_groups"] < r["n_test"] else ""
    metric = metric_text(comparison.metrics[task])
    return f"{r['kind_of_task']}{of_classes}, {metric}, {r['n_test']:,} test samples{places}"


def _bars(comparison: Comparison, task: str, probe: str, scores: Sequence[tuple[Entrant, Score]], name: str) -> str:
    metric = comparison.metrics[task]
    bars = []
    for entrant, score in scores:
        bounds = score.interval
        shown = None if bounds is None else (in_unit(metric, bounds.low), in_unit(metric, bounds.high))
        title = short(entrant.title) + ("" if comparison.is_compared(task, score) else " (other samples)")
        bars.append(Bar(title, in_unit(metric, score.value), shown, _series(comparison, entrant)))
    return draw_bars(f"{probe}, {metric_text(metric)}", bars, name)


def _curves(comparison: Comparison, task: str, probes: Sequence[str], name: str) -> list[str]:
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


def _score_shown(comparison: Comparison, task: str, model: Entrant) -> Score | None:
    """The score of a model of which the classes are shown."""
    found = {p: s for p in comparison.probes if (s := comparison.score(model, task, p)) is not None}
    return found[probe_shown(list(found))] if found else None


def _confusion(score: Score) -> np.ndarray[Any, Any]:
    """Of all seeds together, `[K, K]`."""
    return np.sum([r["confusion"] for r in score.records], axis=0)  # type: ignore[no-any-return]


def _series(comparison: Comparison, entrant: Entrant) -> int | None:
    """The colour of a model; what is not trained has none."""
    return comparison.models.index(entrant) % len(SERIES) if entrant.kind == "model" else None


def _variable(comparison: Comparison, entrant: Entrant) -> str:
    """The CSS variable of a model's colour, as it is in charts."""
    number = _series(comparison, entrant)
    return f"var(--series-{number + 1})" if number else "var(--accent)"


def _training(runs: Sequence[Path]) -> list[str]:
    """Scores over steps, by task and probe, a line for each run."""
    of_runs = {run.resolve().name: _of_last_block(run) for run in runs}
    kinds = dict.fromkeys((r["task"], r["probe"], r["metric"]) for records in of_runs.values() for r in records)
    charts = []
    for i, (task, probe, metric) in enumerate(kinds):
        lines = []
        for number, (name, records) in enumerate(of_runs.items()):
            curve = [r for r in records if (r["task"], r["probe"], r["metric"]) == (task, probe, metric)]
            points = [(r["step"], in_unit(metric, score_of(r))) for r in curve]
            lines.append(
                Line([x for x, _ in points], [y for _, y in points], "main", short(name), number % len(SERIES))
            )
        title = f"{task}: {probe}, {metric_text(metric)}"
        charts.append(draw(Chart(title, [line for line in lines if len(line.x)]), f"training{i}"))
    return charts


def _of_last_block(run: Path) -> list[Record]:
    """Records of the probes of a run on its encoder's last block."""
    records = read_task_records(run / "eval.jsonl")
    return [r for r in records if r["kind"] == "probe" and r["features"] == "encoder" and r["tap"] == "last"]


def _problem(record: Record) -> tuple[str, str, str]:
    said = [record.get("model"), str(record["features"]).replace("_", " "), f"on {record['task']}"]
    said += [f"{key} {record[key]}" for key in ("subset", "size", "tap", "probe", "partition", "seed") if key in record]
    how = "failed" if record["kind"] == "error" else "skipped"
    return record["kind"], f"{', '.join(str(s) for s in said if s)} ({how})", str(record["error"])


def _setup(comparison: Comparison) -> list[tuple[str, str]]:
    """What results depend on beside what the tables say."""
    if not comparison.results:
        return []
    rows = []
    for model in comparison.models:
        r = next(r for r in comparison.results if identity_of(r) == model.identity)
        encoder = r["encoder"]
        parts = [f"ViT-{encoder.get('size')}/{encoder.get('patch_size')}", f"weights {r['weights']}"]
        parts += [f"step {r['step']:,}"] if r["step"] else []
        rows.append((model.title, ", ".join(parts)))
    said = {"version": "ssl_eo", "code": "code", "torch": "torch", "interpolation": "resized by", "pool": "pooling"}
    for key, what in said.items():
        found = dict.fromkeys(str(r[key]) for r in comparison.results if r.get(key) is not None)
        rows += [(what, ", ".join(found))] if found else []
    counts = sorted({int(r["n_resamples"]) for r in comparison.results})
    rows.append(("resamples", ", ".join(f"{n:,}" for n in counts)))
    rows.append(("seeds", ", ".join(str(s) for s in sorted({r["seed"] for r in comparison.results}))))
    return rows


def _listed(names: Sequence[str], n_most: int) -> str:
    rest = len(names) - n_most
    return ", ".join(names[:n_most]) + (f" and {rest} more" if rest > 0 else "")
