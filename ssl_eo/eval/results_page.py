"""One self-contained page about evaluations: models beside random encoders and controls, on all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ssl_eo
from ssl_eo.eval.aggregates import Ranges, by_dataset, has_mean, read_ranges, tasks_of_mean, tasks_of_rank
from ssl_eo.eval.bootstrap import FEWEST_SEEDS
from ssl_eo.eval.citing import dates_of, facts_of_models, facts_of_software, facts_of_tasks
from ssl_eo.eval.comparison import Comparison, probe_shown
from ssl_eo.eval.comparison_charts import bar_chart, charts_of_runs, color_of, confusion_of, cost_charts, curve_charts
from ssl_eo.eval.comparison_tables import (
    MOST_DUELLISTS,
    axis_table,
    class_table,
    duel_table,
    interquartile_table,
    margin_table,
    mean_table,
    rank_table,
    score_table,
    settings_text,
)
from ssl_eo.eval.entrants import Entrant
from ssl_eo.eval.experiments import CONDITIONS, Score
from ssl_eo.eval.metrics import metric_text
from ssl_eo.eval.page import check_written, render
from ssl_eo.eval.records import count_lines, read_plan, write_csv
from ssl_eo.eval.result_figures import draw_confusion, short
from ssl_eo.eval.result_tables import Table, as_latex, as_markdown, with_numbers
from ssl_eo.eval.shortfalls import coverage_text, failed_tasks, failure_alerts, shortfalls_of
from ssl_eo.eval.wording import places_text
from ssl_eo.files import atomic_write

__all__ = ["Files", "write_results_page"]

_TITLES = {
    "partition": "Parts of the training set",
    "subset": "Bands",
    "size": "Sizes",
    "tap": "Where features are read",
    "pool": "How tokens are pooled",
}
_MAX_CONFUSIONS = 4  # models whose confusion is drawn


@dataclass(frozen=True)
class Files:
    """What is written: the page, and tables in other forms where they are asked for."""

    out: Path
    csv: Path | None = None
    markdown: Path | None = None
    latex: Path | None = None

    @property
    def all(self) -> list[Path]:
        return [path for path in (self.out, self.csv, self.markdown, self.latex) if path is not None]


def write_results_page(
    folders: Sequence[Path], files: Files, runs: Sequence[Path] = (), normalizer: Sequence[Path] = ()
) -> list[Path]:
    """Write the page `files.out` about the results in `folders`, and the other `files`; returns their paths.

    `runs` add curves of their probes while training. Raises `ValueError` where a folder has no results, or the files
    `normalizer` no range of a task, and where a file that is to be written is no page, is asked for twice, or is what
    an evaluation wrote.
    """
    check_written(files.all, folders)
    comparison = Comparison.read(folders)
    if not comparison.results and not comparison.problems:
        raise ValueError(f"{', '.join(map(str, folders))}: {_why_nothing(folders)}")
    ranges = read_ranges(normalizer, comparison.metrics) if normalizer and comparison.results else None
    means = with_numbers(
        [interquartile_table(comparison, ranges), mean_table(comparison, ranges), rank_table(comparison)]
    )
    scores = with_numbers([score_table(comparison, probe) for probe in comparison.probes])
    margins, duels = (
        {task: with_numbers([table(comparison, task)]) for task in comparison.tasks}
        for table in (margin_table, duel_table)
    )
    lacking = shortfalls_of(comparison.problems)
    coverage = coverage_text(comparison, [asked for folder in folders for asked in read_plan(folder)])
    notes = _notes(comparison, ranges, normalizer)
    page = render(
        "results_page.html.j2",
        **_head(comparison),
        alerts=[*filter(None, [coverage]), *failure_alerts(comparison, lacking)],
        colors={e.title: color_of(comparison, e) for e in comparison.models},
        means=means,
        notes=notes,
        costs=cost_charts(comparison, ranges),
        scores=scores,
        tasks=[
            _task(comparison, task, margins[task], duels[task], f"task{i}") for i, task in enumerate(comparison.tasks)
        ],
        training=charts_of_runs(runs),
        problems=lacking,
        setup=_setup(comparison),
    )
    flags = [f"{task}: {flag}" for task in comparison.tasks for flag in comparison.flags(task)]
    said = [*filter(None, [coverage]), *notes, *flags, *failed_tasks(comparison, lacking)]
    paired = [table for of in (margins, duels) for tables in of.values() for table in tables]
    _write(files, page, comparison, [*means, *scores, *paired], said)
    return files.all


def _why_nothing(folders: Sequence[Path]) -> str:
    n_lines = sum(map(count_lines, folders))
    if n_lines == 0:
        return "nothing was measured, there is nothing to report"
    return (
        f"none of {n_lines:,} lines is a result that ssl_eo {ssl_eo.__version__} knows: they are of another version,"
        " damaged, or of errors that are no more"
    )


def _write(files: Files, page: str, comparison: Comparison, tables: Sequence[Table], said: Sequence[str]) -> None:
    for path in files.all:
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(files.out, page)
    if files.csv is not None:
        write_csv(files.csv, comparison.results)
    for text_file, layout in ((files.markdown, as_markdown), (files.latex, as_latex)):
        if text_file is not None:
            atomic_write(text_file, layout(tables, said))


def _head(comparison: Comparison) -> dict[str, Any]:
    """Title, what it is about, and counts."""
    tried = [*comparison.results, *comparison.problems]
    models = [e.title for e in comparison.models] or list(dict.fromkeys(str(r["model"]) for r in tried if r["model"]))
    about = f"Frozen features on {_listed(list(dict.fromkeys(str(r['task']) for r in tried)), 6)}"
    days = dates_of(comparison.results)
    failed = sum(r["kind"] == "error" for r in comparison.problems)
    counts = (
        ("models", len(comparison.models)),
        ("tasks", len(comparison.tasks)),
        ("probes", len(comparison.probes)),
        ("results", len(comparison.results)),
        ("failed", failed),
        ("skipped", len(comparison.problems) - failed),
    )
    return {
        "title": "Evaluation of " + (_listed(models, 4) or "controls"),
        "subtitle": f"{about}; measured {days}" if days else about,
        "facts": [(what, f"{n:,}") for what, n in counts if n or what == "failed"],
    }


def _notes(comparison: Comparison, ranges: Ranges | None, normalizer: Sequence[Path]) -> list[str]:
    """What a reader of the tables must know."""
    if not comparison.results:
        return []
    averaged = [tasks_of_mean(comparison, probe, ranges) for probe in comparison.probes]
    together = {task for tasks in averaged for task in tasks}
    ranked = {task for probe in comparison.probes for task in tasks_of_rank(comparison, probe)}
    apart = ", ".join(task for task in comparison.tasks if task in ranked - together)
    said = [f"In no mean and no rank: {task} ({why})." for task, why in comparison.left_out.items()]
    named = ", ".join(dict.fromkeys(path.name for path in normalizer))
    why = "their scores are no ratios" if ranges is None else f"they have no range in {named}"
    said += [f"Not in the means, since {why}: {apart}."] if apart else []
    datasets = by_dataset(comparison, [task for task in comparison.tasks if task in ranked])
    said += [f"Tasks of {name} count as one: {', '.join(of)}." for name, of in datasets.items() if len(of) > 1]
    has_means = any(has_mean(comparison, tasks) for tasks in averaged)
    if has_means and ranges is None:
        said.append("Scores are plain, in percent: a task whose scores spread more weighs more in the means.")
    elif has_means:
        said.append(f"Scores of each task are scaled from its range in {named}: 0 is its low end, 100 its high.")
    if has_means:
        said.append(
            "The interquartile mean leaves out the lowest and the highest quarter of the scores; datasets weigh the"
            " same whatever their numbers of tasks and seeds."
        )
    said.append(
        "[Intervals] hold 95 % of a bootstrap over test samples, of whole places where samples share one, task by task;"
        " of margins over the same resamples for both sides. After ± stands one standard deviation over seeds of the"
        f" draw; intervals with the word seeds are Student's t over these, of at least {FEWEST_SEEDS}. Bold is the best"
        " of a column, whether or not intervals overlap; an encoder that is read at other depths on some tasks than on"
        " others is never bold."
    )
    if len(comparison.models) > MOST_DUELLISTS:
        said.append(f"Model against model is shown of up to {MOST_DUELLISTS} models: report fewer folders for it.")
    codes = {" ".join(str(r[k]) for k in ("version", "code") if r.get(k)) for r in comparison.results}
    if len(codes) > 1:
        said.append(f"Results are of {len(codes)} versions of the code ({', '.join(sorted(codes))}).")
    return [*said, f"Where not said otherwise: {settings_text(comparison, comparison.tasks)}."]


def _task(
    comparison: Comparison, task: str, margins: Sequence[Table], duels: Sequence[Table], name: str
) -> dict[str, Any]:
    """All that the page shows of one task, with tables of its `margins` and `duels`; `name` is for identifiers."""
    scored = {p: _scores(comparison, task, p) for p in comparison.probes}
    scored = {p: of for p, of in scored.items() if of}
    axes = [axis for axis in _TITLES if _is_varied(comparison, task, axis)]
    shown = [(m, s) for m in comparison.models if (s := _score_shown(comparison, task, m)) is not None]
    titled = [(f"{model.title}, {score.records[0]['probe']}", score) for model, score in shown]
    matrices = [(title, score) for title, score in titled if "confusion" in score.records[0]]
    tables = {axis: with_numbers([axis_table(comparison, task, p, axis) for p in scored]) for axis in axes}
    return {
        "name": task,
        "about": _about(comparison, task),
        "flags": comparison.flags(task),
        "absent": _absent(comparison, task, list(scored)),
        "bars": [bar_chart(comparison, task, p, of, f"{name}-bars{i}") for i, (p, of) in enumerate(scored.items())],
        "margins": margins,
        "duels": duels,
        "curves": curve_charts(comparison, task, list(scored), name) if "partition" in axes else [],
        "axes": [(_TITLES[axis], of, axis == "partition") for axis, of in tables.items() if of],
        "confusions": [
            draw_confusion(short(title), confusion_of(s), s.records[0]["classes"], f"{name}-confusion{i}")
            for i, (title, s) in enumerate(matrices[:_MAX_CONFUSIONS])
        ],
        "n_more_confusions": len(matrices[_MAX_CONFUSIONS:]),
        "classes": with_numbers([class_table(s, title) for title, s in titled if s.records[0].get("per_class")]),
    }


def _scores(comparison: Comparison, task: str, probe: str) -> list[tuple[Entrant, Score]]:
    return [(e, s) for e in comparison.entrants if (s := comparison.score(e, task, probe)) is not None]


def _is_varied(comparison: Comparison, task: str, axis: str) -> bool:
    """Whether there are several steps of an axis, and of how models are read that one of them was read in several."""
    steps = comparison.steps(task, axis)
    if axis in CONDITIONS:
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
    counts = f"{r['n_train']:,} training, {r['n_val']:,} validation and {r['n_test']:,} test samples{places_text(r)}"
    return f"{r.get('kind_of_task') or 'task'}{of_classes}, {metric_text(comparison.metrics[task])}, {counts}"


def _score_shown(comparison: Comparison, task: str, model: Entrant) -> Score | None:
    """The score of a model of which the classes are shown."""
    found = {p: s for p in comparison.probes if (s := comparison.score(model, task, p)) is not None}
    return found[probe_shown(list(found))] if found else None


def _setup(comparison: Comparison) -> list[Any]:
    """What it takes to cite what the tables say, and to get it again."""
    if not comparison.results:
        return []
    return [
        *facts_of_models(comparison),
        *facts_of_tasks(comparison),
        *facts_of_software(comparison.results),
    ]


def _listed(names: Sequence[str], n_most: int) -> str:
    rest = len(names) - n_most
    return ", ".join(names[:n_most]) + (f" and {rest} more" if rest > 0 else "")
