"""What a study found, in a terminal and as a page: tables, charts of scores and costs, confusions of classes.

K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ssl_eo.adapt.study import UNET
from ssl_eo.adapt.study_tables import INTERVAL, Model, counted, counts_of_classes, few, models_of, study_tables
from ssl_eo.eval.bootstrap import FEWEST_GROUPS
from ssl_eo.eval.metrics import HIGHER_IS_BETTER, in_unit, metric_text
from ssl_eo.eval.page import render
from ssl_eo.eval.result_figures import Bar, Point, draw_bars, draw_confusion, draw_points
from ssl_eo.eval.result_tables import as_latex, as_markdown
from ssl_eo.files import atomic_write

__all__ = ["check_pages", "print_study", "write_study_page"]

Record = Mapping[str, Any]

_PAGES = ("study.html", "study.md", "study.tex")
_MAX_CONFUSIONS = 4
_CLOSE_ACROSS, _CLOSE_UP = 0.08, 0.07  # shares of the width and height of a chart, within which labels would overlap
_LEAKS = {"n_leaked": "training", "n_leaked_val": "validation"}  # keys of records, and what they count copies of
_LACKING = {"train": "no model can learn these", "val": "they have no say in what is chosen"}


@dataclass(frozen=True)
class _Charts:
    """What is drawn of a task, and what a reader must know of it."""

    scores: Sequence[str]
    about_scores: str
    confusions: Sequence[str]
    about_confusions: str


def print_study(records: Sequence[Record], stream: TextIO) -> None:
    """Scores by decoder for each task, then what could not be trained."""
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console(file=stream, soft_wrap=True, highlight=False, markup=False, emoji=False)
    models = models_of(records)
    for task in dict.fromkeys(m.task for m in models):
        for table in study_tables(models, task):
            if table.corner != "encoder":
                continue  # the page has the others
            grid = Grid(title=table.title, title_justify="left")
            for column in (table.corner, *table.columns):
                grid.add_column(column, justify="left" if column == table.corner else "right")
            for row in table.rows:
                grid.add_row(row.title, *(f"{cell.text} {cell.note}".strip() for cell in row.cells))
            console.print(grid)
    for problem in _problems(records):
        console.print(f"  {problem}")


def check_pages(out: Path) -> None:
    """Raise `ValueError` where `write_study_page` could not write in the folder `out`, which need not be there yet."""
    for path in (out / name for name in _PAGES):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and a page is to be written there; move it, or give another --out")


def write_study_page(records: Sequence[Record], out: Path, title: str, command: str) -> list[Path]:
    """Write `study.html`, `study.md` and `study.tex` in the folder `out`; returns their paths.

    `command` is what made the study, as a shell takes it.
    """
    models = models_of(records)
    tasks = list(dict.fromkeys(m.task for m in models))
    tables = {task: study_tables(models, task) for task in tasks}
    problems = _problems(records)
    charts = {task: _charts([m for m in models if m.task == task], f"task{i}") for i, task in enumerate(tasks)}
    every = [table for of_task in tables.values() for table in of_task]
    flags = {task: _flags([m for m in models if m.task == task]) for task in tasks}
    page = render(
        "study.html.j2", title=title, command=command, tables=tables, drawn=charts, problems=problems, flags=flags
    )
    notes = [*problems, *(f"{task}: {flag}" for task in tasks for flag in flags[task]), f"made by {command}"]
    for name, text in zip(_PAGES, (page, as_markdown(every, notes), as_latex(every, notes)), strict=True):
        atomic_write(out / name, text)
    return [out / name for name in _PAGES]


def _flags(models: Sequence[Model]) -> list[str]:
    """What a reader must know of a task before its scores are believed."""
    records = [r for m in models for r in m.records]
    found = [flag for r in records for flag in r["asked"]["task"].get("flags", [])]
    for key, split in _LEAKS.items():
        n, n_test = max((r.get(key, 0), r["n_samples"]["test"]) for r in records)
        if n:
            has = "has" if n == 1 else "have"
            found.append(f"{n} of {n_test:,} test samples {has} the content of a {split} sample")
    if n := max(r.get("n_shared_groups", 0) for r in records):
        are = "place of test samples is a place" if n == 1 else "places of test samples are places"
        found.append(f"{n} {are} of training or validation samples too")
    if (n_groups := min(r["n_groups"] for r in records)) < FEWEST_GROUPS and any(r["resampled"] for r in records):
        places = "one place" if n_groups == 1 else f"{n_groups} places"
        found.append(f"no intervals: test samples are of {places}, fewer than {FEWEST_GROUPS}")
    return list(dict.fromkeys([*found, *_lacking(models)]))


def _lacking(models: Sequence[Model]) -> list[str]:
    """Which classes do not occur in training or validation."""
    record, counts = models[0].records[0], counts_of_classes(models)
    asked, found = record["asked"]["task"], []
    for split, so in _LACKING.items():
        if split not in counts:  # the record is of before they were counted
            continue
        numbered = enumerate(zip(record["classes"], counts[split], strict=True))
        names = [name for i, (name, n) in numbered if n == 0 and i != asked.get("ignore")]  # which is never counted
        if names:
            found.append(f"{split} has no {counted(asked['kind'])} of {few(names, '; ')}: {so}")
    return found


def _charts(models: Sequence[Model], name: str) -> _Charts:
    said = [
        "The number behind a name is that of its point in the chart of costs; points that lie close share a label.",
        *([f"Lines over bars: the {INTERVAL}."] if any(m.interval for m in models) else []),
    ]
    shown, about = _confused(models)
    confusions = [
        draw_confusion(
            m.title,
            np.sum([r["confusion"] for r in m.records], axis=0),
            m.records[0]["classes"],
            f"{name}-confusion{i}",
        )
        for i, m in enumerate(shown)
    ]
    return _Charts(_score_charts(models, name), " ".join(said), confusions, about)


def _score_charts(models: Sequence[Model], name: str) -> list[str]:
    """Scores as bars, from the best on, and over costs."""
    metric = models[0].metric
    encoders = list(dict.fromkeys(m.encoder for m in models))
    series = {encoder: None if encoder == UNET else i % 6 for i, encoder in enumerate(encoders)}
    ranked = sorted(models, key=lambda m: m.score, reverse=HIGHER_IS_BETTER[metric])
    scores = [in_unit(metric, m.score) for m in ranked]
    bars = [
        Bar(f"{m.title}  {i}", score, _bounds(m), series[m.encoder])
        for i, (m, score) in enumerate(zip(ranked, scores, strict=True), start=1)
    ]
    places = [(float(m.records[0]["forward_gflop"]), score) for m, score in zip(ranked, scores, strict=True)]
    points = [
        Point(label, *place, series[m.encoder])
        for m, place, label in zip(ranked, places, _point_labels(places), strict=True)
    ]
    title = f"{metric_text(metric)} over cost, numbered as in the bars"
    return [
        draw_bars(metric_text(metric), bars, f"{name}-bars"),
        draw_points(title, points, [], "GFLOP a sample, forward", f"{name}-cost"),
    ]


def _confused(models: Sequence[Model]) -> tuple[list[Model], str]:
    """Whose confusions are drawn, in the order of the tables, and what must be said of these.

    They are those that were best on validation: what is shown is not picked by its score on the test.
    """
    whole = [m for m in models if m.records[0]["confusion"] is not None]
    if not whole:
        return [], ""
    metric = whole[0].metric
    ranked = sorted(range(len(whole)), key=lambda i: whole[i].on_validation, reverse=HIGHER_IS_BETTER[metric])
    shown = [whole[i] for i in sorted(ranked[:_MAX_CONFUSIONS])]
    is_all = len(shown) == len(whole)
    which = "All models" if is_all else f"The {len(shown)} of {len(whole)} models that were best on validation"
    what = counted(whole[0].records[0]["asked"]["task"]["kind"])
    seeds = ", of all seeds together" if max(len(m.records) for m in shown) > 1 else ""
    about = (
        f"{which}, in the order of the tables. A row has the test {what}s of one class{seeds}, as"
        " shares in percent that sum to 100: the darker, the more are taken for the class of the column. A row is empty"
        " where test has none of the class."
    )
    return shown, about


def _point_labels(places: Sequence[tuple[float, float]]) -> list[str]:
    """Numbers from 1 of the points `places` of a cost and a score; of those that lie close, all stand at the first.

    Names of models would cover each other: protocols of an encoder cost the same.
    """
    costs, scores = np.array(places).T  # [models]
    # Of the width: the axis has a half and twice as well.
    across = np.log(costs) / np.log(4 * costs.max() / costs.min())
    up = scores / max(np.ptp(scores), 1e-12)
    members: dict[int, list[str]] = {}
    for i in range(len(places)):
        near = (j for j in members if abs(across[i] - across[j]) < _CLOSE_ACROSS and abs(up[i] - up[j]) < _CLOSE_UP)
        members.setdefault(next(near, i), []).append(str(i + 1))
    return [", ".join(members.get(i, [])) for i in range(len(places))]


def _bounds(model: Model) -> tuple[float, float] | None:
    bounds = model.interval
    return None if bounds is None else (in_unit(model.metric, bounds.low), in_unit(model.metric, bounds.high))


def _problems(records: Sequence[Record]) -> list[str]:
    failed = [record for record in records if record["kind"] == "error"]
    return [f"{', '.join(str(value) for value in r['cell'].values())}: {r['error']}" for r in failed]
