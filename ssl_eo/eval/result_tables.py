"""Tables of an evaluation, and how they look in Markdown and LaTeX.

K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ssl_eo.eval.aggregates import (
    Aggregate,
    Ranges,
    Ranking,
    aggregates,
    by_dataset,
    mean_ranks,
    tasks_of_mean,
    tasks_of_rank,
)
from ssl_eo.eval.bootstrap import Interval
from ssl_eo.eval.comparison import Comparison, PairedMargin
from ssl_eo.eval.experiments import CONDITIONS, Score
from ssl_eo.eval.metrics import best_of, has_intervals, metric_text, number_text
from ssl_eo.eval.partitions import parse_partition

__all__ = [
    "Cell",
    "Row",
    "Table",
    "as_latex",
    "as_markdown",
    "axis_table",
    "class_table",
    "interquartile_table",
    "margin_table",
    "mean_table",
    "rank_table",
    "score_table",
]

_NOTHING = "–"
_FEWEST_DATASETS = 2  # of which a mean says more than the scores of the tasks
_OF_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_OF_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


@dataclass(frozen=True)
class Cell:
    """A number, and what stands smaller beside it or, line by line, below it."""

    text: str = ""
    note: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """`kind` is that of the entrant, or empty; `note` stands smaller below the title."""

    title: str
    kind: str
    cells: Sequence[Cell]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under `columns`; `corner` is the title of their first column."""

    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]


def interquartile_table(comparison: Comparison, ranges: Ranges | None) -> Table:
    """The interquartile mean of each entrant by each probe, all of the same tasks."""

    def cell(a: Aggregate, best: float | None) -> Cell:
        assert a.interquartile_mean is not None
        notes = [_bounds(_percent, a.over_samples)]
        notes += [f"seeds {text}" for text in [_bounds(_percent, a.over_seeds)] if text]
        return Cell(_percent(a.interquartile_mean), "\n".join(filter(None, notes)), a.interquartile_mean == best)

    return _table_of_means("Interquartile mean over tasks", comparison, ranges, lambda a: a.interquartile_mean, cell)


def mean_table(comparison: Comparison, ranges: Ranges | None) -> Table:
    """Likewise the plain mean over tasks."""

    def cell(a: Aggregate, best: float | None) -> Cell:
        assert a.mean is not None
        return Cell(_percent(a.mean), is_best=a.mean == best)

    title = f"Mean of {'plain' if ranges is None else 'normalised'} scores over tasks"
    return _table_of_means(title, comparison, ranges, lambda a: a.mean, cell)


def rank_table(comparison: Comparison) -> Table:
    """The mean rank of each entrant by each probe, over all tasks that do not leak."""
    titles, columns = [], []
    for probe in comparison.probes:
        tasks = tasks_of_rank(comparison, probe)
        if _has_means(comparison, tasks):
            found = mean_ranks(comparison, probe)
            best = min((r.mean_rank for r in found if r.mean_rank is not None), default=None)
            columns.append([_rank_cell(r, len(tasks), best) for r in found])
            titles.append(f"{probe}, {_counted(comparison, tasks)}")
    return Table("Mean rank over tasks, 1 is best", "features", titles, _rows_of_means(comparison, columns))


def score_table(comparison: Comparison, probe: str) -> Table:
    """Every entrant on every task by one probe, with intervals over test samples."""
    tasks = [t for t in comparison.tasks if any(comparison.score(e, t, probe) for e in comparison.entrants)]
    columns = []
    for task in tasks:
        cells = _column(comparison, task, [comparison.score(e, task, probe) for e in comparison.entrants])
        absent = [comparison.absence(e, task, probe) for e in comparison.entrants]
        columns.append(
            [c if c.text else Cell(note=why.replace(", ", ",\n")) for c, why in zip(cells, absent, strict=True)]
        )
    rows = [
        Row(e.title, e.kind, [column[i] for column in columns], comparison.reading(e, tasks, [probe]))
        for i, e in enumerate(comparison.entrants)
    ]
    titles = [f"{task}, {metric_text(comparison.metrics[task])}" for task in tasks]
    return Table(probe, "features", titles, rows)


def margin_table(comparison: Comparison, task: str) -> Table:
    """Each model against its rivals on one task, by probes."""
    found: dict[tuple[str, str], dict[str, PairedMargin]] = {}
    for probe in comparison.probes:
        for m in comparison.margins(task, probe):
            rival = "the random encoder" if m.rival.kind == "random" else "the best control"
            found.setdefault((m.model.title, rival), {})[probe] = m
    probes = [p for p in comparison.probes if any(p in of for of in found.values())]
    rows = []
    for (title, rival), of in found.items():
        cells = [_margin_cell(of[p]) if p in of else Cell(note=_NOTHING) for p in probes]
        rows.append(Row(f"{title} over {rival}", "", cells))
    return Table("Margins", "", probes, rows)


def axis_table(comparison: Comparison, task: str, probe: str, axis: str) -> Table:
    """Every entrant that the axis means something for, on one task by one probe, along one axis of what was varied."""
    steps = comparison.steps(task, axis)
    entrants = [e for e in comparison.entrants if axis in CONDITIONS or e.kind != "control"]
    columns = []
    for step in steps:
        fixed = {axis: step}
        columns.append(_column(comparison, task, [comparison.score(e, task, probe, **fixed) for e in entrants]))
    reading = [comparison.reading(e, [task], [probe]) if axis in CONDITIONS else "" for e in entrants]
    rows = [Row(e.title, e.kind, [column[i] for column in columns], reading[i]) for i, e in enumerate(entrants)]
    titles = _parts_with_origin(comparison, task) if axis == "partition" else steps
    return Table(f"{probe}, {metric_text(comparison.metrics[task])}", "features", titles, rows)


def class_table(score: Score, title: str) -> Table:
    """Columns of measures, a row for each of the K classes; of several seeds the mean over those that define it."""
    first, keys = score.records[0], score.records[0]["per_class"]
    rows = []
    for i, name in enumerate(first["classes"]):
        of_keys = {key: [v for r in score.records if (v := r["per_class"][key][i]) is not None] for key in keys}
        rows.append(Row(str(name), "", [Cell(_class_text(key, values)) for key, values in of_keys.items()]))
    titles = [key if key == "support" else f"{key.replace('_', ' ')} %" for key in keys]
    of_seeds = f", mean of {len(score.records)} seeds" if len(score.records) > 1 else ""
    return Table(title + of_seeds, "class", titles, rows)


def as_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Pipe tables under headings, then what must be said of them."""
    parts = []
    for table in tables:
        lines = [f"## {_of_markdown(table.title)}", "", _pipes(map(_of_markdown, [table.corner, *table.columns]))]
        lines.append("|" + "|".join([" --- ", *(" ---: " for _ in table.columns)]) + "|")
        for row in table.rows:
            lines.append(_pipes([_of_markdown(_titled(row)), *map(_markdown_cell, row.cells)]))
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {_of_markdown(_one_line(note))}" for note in notes))
    return "\n\n".join(filter(None, parts)) + "\n"


def as_latex(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """One `table` environment each, for the packages booktabs and graphicx; notes are comments at the top."""
    parts = ["\n".join(["% needs \\usepackage{booktabs, graphicx}", *(f"% {_one_line(note)}" for note in notes)])]
    for table in tables:
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_of_latex(table.title)}}}"]
        lines += [r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
        lines.append(" & ".join(map(_of_latex, [table.corner, *table.columns])) + r" \\")
        lines.append(r"\midrule")
        before = table.rows[0].kind if table.rows else ""
        for row in table.rows:
            lines += [r"\midrule"] if row.kind != before else []
            before = row.kind
            title = "{}" * row.title.startswith(("[", "*")) + _of_latex(_titled(row))  # else an argument of \\
            lines.append(" & ".join([title, *map(_latex_cell, row.cells)]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _parts_with_origin(comparison: Comparison, task: str) -> list[str]:
    """Parts of the training set; where some were published and some are ours, each says which it is."""
    parts = comparison.parts(task)
    if not (parts["published"] and parts["nested"]):
        return comparison.steps(task, "partition")
    said = {part: f"{part}, published" for part in parts["published"]}
    said |= {part: f"{part}, nested" for part in parts["nested"] if not parse_partition(part).is_nested}
    return [said.get(part, part) for part in comparison.steps(task, "partition")]


def _class_text(key: str, values: Sequence[float]) -> str:
    """Of seeds; the number of samples or pixels of a class is that of all of them."""
    if not values:
        return ""
    return f"{values[0]:,}" if key == "support" else f"{100 * sum(values) / len(values):.1f}"


def _table_of_means(
    title: str,
    comparison: Comparison,
    ranges: Ranges | None,
    value: Callable[[Aggregate], float | None],
    cell: Callable[[Aggregate, float | None], Cell],
) -> Table:
    """A column for each probe of what is `value` of an aggregate; `cell` shows one, told the best of the column."""
    titles, columns = [], []
    for probe in comparison.probes:
        tasks = tasks_of_mean(comparison, probe, ranges)
        if _has_means(comparison, tasks):
            found = aggregates(comparison, probe, ranges)
            best = max((v for a in found if (v := value(a)) is not None), default=None)
            columns.append([_lacking(a.n_tasks, len(tasks)) if value(a) is None else cell(a, best) for a in found])
            titles.append(f"{probe}, {_counted(comparison, tasks)}")
    return Table(title, "features", titles, _rows_of_means(comparison, columns))


def _has_means(comparison: Comparison, tasks: Sequence[str]) -> bool:
    return len(by_dataset(comparison, tasks)) >= _FEWEST_DATASETS


def _counted(comparison: Comparison, tasks: Sequence[str]) -> str:
    n_datasets = len(by_dataset(comparison, tasks))
    return f"{len(tasks)} tasks" + (f" of {n_datasets} datasets" if n_datasets < len(tasks) else "")


def _rows_of_means(comparison: Comparison, columns: Sequence[Sequence[Cell]]) -> list[Row]:
    notes = [comparison.reading(e, comparison.tasks, comparison.probes) for e in comparison.entrants]
    return [
        Row(e.title, e.kind, [column[i] for column in columns], notes[i]) for i, e in enumerate(comparison.entrants)
    ]


def _rank_cell(found: Ranking, n_all: int, best: float | None) -> Cell:
    if found.mean_rank is None:
        return _lacking(found.n_tasks, n_all)
    return Cell(f"{found.mean_rank:.2f}", f"of {found.n_ranked}", found.mean_rank == best)


def _lacking(n_tasks: int, n_all: int) -> Cell:
    return Cell(note=f"{n_tasks} of {n_all} tasks")


def _column(comparison: Comparison, task: str, scores: Sequence[Score | None]) -> list[Cell]:
    """One cell an entrant; the best of those that can be compared is marked."""
    compared = [s for s in scores if s is not None and comparison.is_compared(task, s)]
    best = best_of(comparison.metrics[task], compared, lambda s: s.value).value if compared else None
    cells = []
    for score in scores:
        if score is None:
            cells.append(Cell(note=_NOTHING))
        elif score in compared:
            cells.append(_score_cell(score, score.value == best))
        else:
            cell = _score_cell(score, is_best=False)
            cells.append(replace(cell, note="\n".join(filter(None, [cell.note, "other test samples"]))))
    return cells


def _score_cell(score: Score, is_best: bool) -> Cell:
    number = partial(number_text, score.metric)
    is_undefined = score.resampled is not None and score.interval is None and has_intervals(score.metric)
    notes = ["all resamples undefined" if is_undefined else _bounds(number, score.interval)]
    if score.spread is not None:
        notes.append(f"± {number(score.spread)}")
    return Cell(number(score.value), " ".join(filter(None, notes)), is_best)


def _margin_cell(found: PairedMargin) -> Cell:
    m = found.margin
    number = partial(number_text, m.metric, sign="+")
    notes = [_bounds(number, found.interval)]
    notes += [m.rival, found.reading] if found.rival.kind == "control" else [found.reading]
    return Cell(number(m.gain), "\n".join(filter(None, notes)))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _bounds(number: Callable[[float], str], interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.low):
        return ""
    undefined = f"\n{_plural(interval.n_undefined, 'resample')} undefined" if interval.n_undefined else ""
    return f"[{number(interval.low)}, {number(interval.high)}]{undefined}"


def _titled(row: Row) -> str:
    return f"{row.title} ({row.note})" if row.note else row.title


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.is_best else cell.text
    return " ".join([text, *map(_of_markdown, cell.note.split("\n"))]).strip()


def _of_markdown(text: str) -> str:
    """A `[` ends as a link only before a `(`, so those of intervals may stand."""
    return re.sub(r"([\\`*_<>|]|\](?=\())", r"\\\1", text)


def _latex_cell(cell: Cell) -> str:
    text = rf"\textbf{{{_of_latex(cell.text)}}}" if cell.is_best else _of_latex(cell.text)
    note = _of_latex(cell.note.replace("\n", " "))
    return rf"{text} {{\scriptsize {note}}}" if note else text


def _of_latex(text: str) -> str:
    return "".join(_OF_LATEX.get(sign, sign) for sign in text).replace("±", r"$\pm$")
