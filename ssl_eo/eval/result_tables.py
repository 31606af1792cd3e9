"""Tables of an evaluation, and how they look in Markdown and LaTeX.

K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

from ssl_eo.eval.bootstrap import Interval
from ssl_eo.eval.comparison import Comparison, Entrant, PairedMargin, Ranges, Score
from ssl_eo.eval.metrics import HIGHER_IS_BETTER
from ssl_eo.eval.summary import better, is_ratio

__all__ = [
    "Cell",
    "Row",
    "Table",
    "as_latex",
    "as_markdown",
    "axis_table",
    "class_table",
    "headline_table",
    "in_unit",
    "margin_table",
    "metric_text",
    "score_table",
]

_WRITTEN = {"f1": "F1", "map": "mAP", "miou": "mIoU", "r2": "R2", "rmse": "RMSE", "mae": "MAE", "ece": "ECE"}
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
    """`kind` is that of the entrant, or empty."""

    title: str
    kind: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """Rows of cells under `columns`; `corner` is the title of their first column."""

    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]


def in_unit(metric: str, value: float) -> float:
    """A score as it is shown: ratios in percent."""
    return 100 * value if is_ratio(metric) else value


def metric_text(metric: str) -> str:
    """What is shown, with its unit, and an arrow where less is better."""
    name = " ".join(_WRITTEN.get(word, word) for word in metric.split("_"))
    return f"{name}{' %' if is_ratio(metric) else ''}{'' if HIGHER_IS_BETTER[metric] else ', less is better'}"


def headline_table(comparison: Comparison, ranges: Ranges | None) -> Table:
    """The interquartile mean of each entrant by each probe, all of the same tasks."""
    columns = [probe for probe in comparison.probes if comparison.tasks_of_mean(probe, ranges)]
    found = {probe: comparison.aggregates(probe, ranges) for probe in columns}
    bests = {p: max((a.mean for a in of if a.mean is not None), default=None) for p, of in found.items()}
    rows = []
    for i, entrant in enumerate(comparison.entrants):
        cells = []
        for probe in columns:
            a = found[probe][i]
            if a.mean is None:
                n_all = len(comparison.tasks_of_mean(probe, ranges))
                cells.append(Cell(note=f"{a.n_tasks} of {n_all} tasks"))
                continue
            notes = [_bounds("accuracy", a.over_samples)]
            notes += [f"seeds {text}" for text in [_bounds("accuracy", a.over_seeds)] if text]
            cells.append(Cell(f"{100 * a.mean:.1f}", "\n".join(filter(None, notes)), a.mean == bests[probe]))
        rows.append(Row(entrant.title, entrant.kind, cells))
    titles = [f"{p}, {_plural(len(comparison.tasks_of_mean(p, ranges)), 'task')}" for p in columns]
    return Table("Interquartile mean over tasks", "features", titles, rows)


def score_table(comparison: Comparison, probe: str) -> Table:
    """Every entrant on every task by one probe, with intervals over test samples."""
    tasks = [t for t in comparison.tasks if any(comparison.score(e, t, probe) for e in comparison.entrants)]
    columns = [_column([comparison.score(e, task, probe) for e in comparison.entrants]) for task in tasks]
    titles = [f"{task}, {metric_text(comparison.metrics[task])}" for task in tasks]
    return Table(probe, "features", titles, _rows(comparison.entrants, columns))


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
        cells = [_margin_cell(of[p]) if p in of else Cell() for p in probes]
        rows.append(Row(f"{title} over {rival}", "", cells))
    return Table("Margins", "", probes, rows)


def axis_table(comparison: Comparison, task: str, probe: str, axis: str) -> Table:
    """Every entrant on one task by one probe, along one axis of what was varied."""
    steps = comparison.steps(task, axis)
    columns = []
    for step in steps:
        usual = {axis: step}
        scores = [
            None if e.kind == "control" and axis in ("tap", "pool") else comparison.score(e, task, probe, **usual)
            for e in comparison.entrants
        ]
        columns.append(_column(scores))
    title = f"{probe}, {metric_text(comparison.metrics[task])}"
    return Table(title, "features", steps, _rows(comparison.entrants, columns))


def class_table(score: Score, title: str) -> Table:
    """Columns of measures, a row for each of the K classes; of several seeds the first."""
    record = score.records[0]
    columns = record["per_class"]
    rows = []
    for i, name in enumerate(record["classes"]):
        cells = [
            Cell("" if column[i] is None else f"{column[i]:,}" if key == "support" else f"{100 * column[i]:.1f}")
            for key, column in columns.items()
        ]
        rows.append(Row(str(name), "", cells))
    titles = [key if key == "support" else f"{key.replace('_', ' ')} %" for key in columns]
    return Table(title, "class", titles, rows)


def as_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Pipe tables under headings, then what must be said of them."""
    parts = []
    for table in tables:
        lines = [f"## {_of_markdown(table.title)}", "", _pipes(map(_of_markdown, [table.corner, *table.columns]))]
        lines.append("|" + "|".join([" --- ", *(" ---: " for _ in table.columns)]) + "|")
        for row in table.rows:
            lines.append(_pipes([_of_markdown(row.title), *map(_markdown_cell, row.cells)]))
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
            title = "{}" * row.title.startswith(("[", "*")) + _of_latex(row.title)  # else an argument of \\
            lines.append(" & ".join([title, *map(_latex_cell, row.cells)]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _column(scores: Sequence[Score | None]) -> list[Cell]:
    """One cell an entrant; the best of them is marked."""
    present = [s for s in scores if s is not None]
    if not present:
        return [Cell() for _ in scores]
    metric = present[0].metric
    best = reduce(partial(better, metric), [s.value for s in present])
    return [Cell() if s is None else _score_cell(s, s.value == best) for s in scores]


def _rows(entrants: Sequence[Entrant], columns: Sequence[Sequence[Cell]]) -> list[Row]:
    """Of columns; an entrant without any score has no row."""
    rows = [Row(e.title, e.kind, [column[i] for column in columns]) for i, e in enumerate(entrants)]
    return [row for row in rows if any(cell.text for cell in row.cells)]


def _score_cell(score: Score, is_best: bool) -> Cell:
    notes = [_bounds(score.metric, score.interval)]
    if score.spread is not None:
        notes.append(f"± {_number(score.metric, score.spread)}")
    return Cell(_number(score.metric, score.value), " ".join(filter(None, notes)), is_best)


def _margin_cell(found: PairedMargin) -> Cell:
    m = found.margin
    notes = [_bounds(m.metric, found.interval, sign="+")]
    notes += [m.rival] if found.rival.kind == "control" else []
    return Cell(_number(m.metric, m.gain, sign="+"), "\n".join(filter(None, notes)))


def _number(metric: str, value: float, sign: str = "") -> str:
    return f"{in_unit(metric, value):{sign}{'.1f' if is_ratio(metric) else '.3g'}}"


def _bounds(metric: str, interval: Interval | None, sign: str = "") -> str:
    if interval is None or math.isnan(interval.low):
        return ""
    return f"[{_number(metric, interval.low, sign)}, {_number(metric, interval.high, sign)}]"


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
