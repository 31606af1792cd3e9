"""Tables of a comparison: means over tasks, scores, margins, one axis of what was varied, classes.

K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ssl_eo.eval.aggregates import (
    Aggregate,
    Ranges,
    Ranking,
    aggregates,
    by_dataset,
    has_mean,
    mean_ranks,
    tasks_of_mean,
    tasks_of_rank,
)
from ssl_eo.eval.bootstrap import Interval
from ssl_eo.eval.comparison import Comparison, PairedMargin
from ssl_eo.eval.entrants import Entrant
from ssl_eo.eval.experiments import CONDITIONS, Score
from ssl_eo.eval.metrics import best_of, has_intervals, metric_text, number_text
from ssl_eo.eval.partitions import parse_partition
from ssl_eo.eval.result_tables import Cell, Row, Table
from ssl_eo.eval.rounding import fixed
from ssl_eo.eval.wording import condition_text, value_text

__all__ = [
    "MOST_DUELLISTS",
    "axis_table",
    "class_table",
    "duel_table",
    "interquartile_table",
    "margin_table",
    "mean_table",
    "rank_table",
    "score_table",
    "settings_text",
]

_NOTHING = "–"
MOST_DUELLISTS = 6  # models: of more, pairs are too many to read
_FEWEST_RIVALS = 2  # among which one can be the best
_BRACKETS = "In brackets: 95 % of a bootstrap over test samples"
_SPREAD = "after ±: one standard deviation over seeds"
_BOLD = "Bold: the best of a column."


def settings_text(comparison: Comparison, tasks: Sequence[str]) -> str:
    """Under which conditions entrants are compared on `tasks`, and how encoders are read where all are read alike."""
    said = []
    for axis in CONDITIONS:
        values = dict.fromkeys(condition_text(axis, comparison.condition(task, axis)) for task in tasks)
        said.append(" or ".join(values))
    if comparison.readings_differ(tasks, comparison.probes):
        return f"{', '.join(said)}; where an encoder is read stands with its name"
    scores = [s for task in tasks for e, _, s in comparison.shown(task) if e.kind != "control"]
    taps = dict.fromkeys(value_text("tap", score.setting.tap) for score in scores)
    pools = dict.fromkeys(score.setting.pool for score in scores if score.setting.pool != "None")
    said += [f"encoders read at {' or '.join(taps)}"] if taps else []
    said += [f"pooled by {' or '.join(pools)}"] if pools else []
    return ", ".join(said)


def interquartile_table(comparison: Comparison, ranges: Ranges | None) -> Table:
    """The interquartile mean of each entrant by each probe, all of the same tasks."""

    def cell(a: Aggregate, is_best: bool) -> Cell:
        assert a.interquartile_mean is not None
        notes = [_bounds(_percent, a.over_samples)]
        notes += [f"seeds {text}" for text in [_bounds(_percent, a.over_seeds)] if text]
        return Cell(_percent(a.interquartile_mean), "\n".join(filter(None, notes)), is_best)

    title, about = "Interquartile mean over tasks", f" {_BRACKETS}, or with the word seeds Student's t over these."
    return _table_of_means(title, comparison, ranges, lambda a: a.interquartile_mean, cell, about)


def mean_table(comparison: Comparison, ranges: Ranges | None) -> Table:
    """Likewise the plain mean over tasks."""

    def cell(a: Aggregate, is_best: bool) -> Cell:
        assert a.mean is not None
        return Cell(_percent(a.mean), is_best=is_best)

    title = f"Mean of {'plain' if ranges is None else 'normalised'} scores over tasks"
    return _table_of_means(title, comparison, ranges, lambda a: a.mean, cell)


def rank_table(comparison: Comparison) -> Table:
    """The mean rank of each entrant by each probe, over all tasks that do not leak."""
    columns = {}
    for probe in comparison.probes:
        tasks = tasks_of_rank(comparison, probe)
        if has_mean(comparison, tasks):
            found = mean_ranks(comparison, probe)
            merits = {r.entrant: -r.mean_rank for r in found if r.mean_rank is not None}
            best = _best(comparison, tasks, probe, merits)
            columns[probe] = tasks, [_rank_cell(r, len(tasks), r.entrant in best) for r in found]
    return _of_means("Mean rank over tasks, 1 is best", comparison, columns)


def score_table(comparison: Comparison, probe: str) -> Table:
    """Every entrant on every task by one probe, with intervals over test samples."""
    tasks = [t for t in comparison.tasks if any(comparison.score(e, t, probe) for e in comparison.entrants)]
    barred = [e for e in comparison.entrants if comparison.is_mixed(e, tasks, probe)]
    columns = []
    for task in tasks:
        cells = _column(comparison, task, {e: comparison.score(e, task, probe) for e in comparison.entrants}, barred)
        absent = [comparison.absence(e, task, probe) for e in comparison.entrants]
        columns.append(
            [c if c.text else Cell(note=why.replace(", ", ",\n")) for c, why in zip(cells, absent, strict=True)]
        )
    rows = [
        Row(e.title, e.kind, [column[i] for column in columns], comparison.reading(e, tasks, [probe]))
        for i, e in enumerate(comparison.entrants)
    ]
    titles = [f"{task}, {metric_text(comparison.metrics[task])}" for task in tasks]
    metrics = ", ".join(dict.fromkeys(metric_text(comparison.metrics[task]) for task in tasks))
    about = f"Frozen features scored by {probe}: {metrics}; {settings_text(comparison, tasks)}."
    return Table(probe, "features", titles, rows, f"{about} {_BRACKETS}; {_SPREAD}. {_BOLD}")


def margin_table(comparison: Comparison, task: str) -> Table:
    """Each model against its rivals that need no training on one task, by probes."""

    def versus(m: PairedMargin) -> str:
        return f"{m.model.title} over {'the random encoder' if m.rival.kind == 'random' else 'the best control'}"

    found = {probe: comparison.margins(task, probe) for probe in comparison.probes}
    return _table_of_margins(comparison, task, "Margins", found, versus)


def duel_table(comparison: Comparison, task: str) -> Table:
    """Each model against each other on one task, by probes; no rows where there are more than `MOST_DUELLISTS`."""
    is_shown = len(comparison.models) <= MOST_DUELLISTS
    found = {probe: comparison.duels(task, probe) if is_shown else [] for probe in comparison.probes}
    return _table_of_margins(
        comparison, task, "Model against model", found, lambda m: f"{m.model.title} over {m.rival.title}"
    )


def _table_of_margins(
    comparison: Comparison,
    task: str,
    what: str,
    found: Mapping[str, Sequence[PairedMargin]],
    versus: Callable[[PairedMargin], str],
) -> Table:
    """A row for each text of `versus`, a column for each probe of `found`."""
    rows_of: dict[str, dict[str, PairedMargin]] = {}
    for probe, margins in found.items():
        for m in margins:
            rows_of.setdefault(versus(m), {})[probe] = m
    probes = [probe for probe, margins in found.items() if margins]
    rows = [
        Row(title, "", [_margin_cell(of[p]) if p in of else Cell(note=_NOTHING) for p in probes])
        for title, of in rows_of.items()
    ]
    about = f"{metric_text(comparison.metrics[task])}, {settings_text(comparison, [task])}"
    caption = f"{what} on {task}, above 0 is better: {about}. {_BRACKETS}, the same resamples for both sides."
    return Table(f"{what} on {task}", "", probes, rows, caption)


def axis_table(comparison: Comparison, task: str, probe: str, axis: str) -> Table:
    """Every entrant that the axis means something for, on one task by one probe, along one axis of what was varied."""
    steps = comparison.steps(task, axis)
    entrants = [e for e in comparison.entrants if axis in CONDITIONS or e.kind != "control"]
    columns = []
    for step in steps:
        scores = {e: comparison.score(e, task, probe, **{axis: step}) for e in entrants}
        columns.append(_column(comparison, task, scores))
    reading = [comparison.reading(e, [task], [probe]) if axis in CONDITIONS else "" for e in entrants]
    rows = [Row(e.title, e.kind, [column[i] for column in columns], reading[i]) for i, e in enumerate(entrants)]
    is_parts = axis == "partition"
    titles = _parts_with_origin(comparison, task) if is_parts else [value_text(axis, step) for step in steps]
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
    return f"{values[0]:,}" if key == "support" else _percent(sum(values) / len(values))


def _table_of_means(
    title: str,
    comparison: Comparison,
    ranges: Ranges | None,
    value: Callable[[Aggregate], float | None],
    cell: Callable[[Aggregate, bool], Cell],
    about: str = "",
) -> Table:
    """A column for each probe of what is `value` of an aggregate; `cell` shows one, told whether it is the best."""
    columns = {}
    for probe in comparison.probes:
        tasks = tasks_of_mean(comparison, probe, ranges)
        if has_mean(comparison, tasks):
            found = aggregates(comparison, probe, ranges)
            best = _best(comparison, tasks, probe, {a.entrant: v for a in found if (v := value(a)) is not None})
            cells = [_lacking(a.n_tasks, len(tasks)) if value(a) is None else cell(a, a.entrant in best) for a in found]
            columns[probe] = tasks, cells
    return _of_means(title, comparison, columns, about)


def _best(comparison: Comparison, tasks: Sequence[str], probe: str, values: dict[Entrant, float]) -> list[Entrant]:
    """Those with the greatest value, unless they have no rival or are read in several ways on these tasks."""
    if len(values) < _FEWEST_RIVALS:
        return []
    greatest = max(values.values())
    return [e for e, v in values.items() if v == greatest and not comparison.is_mixed(e, tasks, probe)]


def _counted(comparison: Comparison, tasks: Sequence[str]) -> str:
    n_datasets = len(by_dataset(comparison, tasks))
    return f"{len(tasks)} tasks" + (f" of {n_datasets} datasets" if n_datasets < len(tasks) else "")


def _of_means(
    title: str, comparison: Comparison, columns: Mapping[str, tuple[Sequence[str], Sequence[Cell]]], about: str = ""
) -> Table:
    """Of `columns`: by probe the tasks that its means are of, and a cell for each entrant."""
    averaged = {task for tasks, _ in columns.values() for task in tasks}
    every = [task for task in comparison.tasks if task in averaged]
    rows = [
        Row(e.title, e.kind, [cells[i] for _, cells in columns.values()], comparison.reading(e, every, list(columns)))
        for i, e in enumerate(comparison.entrants)
    ]
    titles = [f"{probe}, {_counted(comparison, tasks)}" for probe, (tasks, _) in columns.items()]
    caption = f"{title}, by probes on frozen features of {', '.join(every)}; {settings_text(comparison, every)}."
    return Table(title, "features", titles, rows, f"{caption}{about} {_BOLD}")


def _rank_cell(found: Ranking, n_all: int, is_best: bool) -> Cell:
    if found.mean_rank is None:
        return _lacking(found.n_tasks, n_all)
    return Cell(fixed(found.mean_rank, 2), f"of {found.n_ranked}", is_best)


def _lacking(n_tasks: int, n_all: int) -> Cell:
    return Cell(note=f"{n_tasks} of {n_all} tasks")


def _column(
    comparison: Comparison, task: str, scores: Mapping[Entrant, Score | None], barred: Collection[Entrant] = ()
) -> list[Cell]:
    """One cell an entrant; the best of those that can be compared is marked, unless it is one of the `barred`."""
    compared = [s for s in scores.values() if s is not None and comparison.is_compared(task, s)]
    has_rivals = len(compared) >= _FEWEST_RIVALS
    best = best_of(comparison.metrics[task], compared, lambda s: s.value).value if has_rivals else None
    cells = []
    for entrant, score in scores.items():
        if score is None:
            cells.append(Cell(note=_NOTHING))
        elif score in compared:
            cells.append(_score_cell(score, score.value == best and entrant not in barred))
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
    return fixed(100 * value, 1)


def _bounds(number: Callable[[float], str], interval: Interval | None) -> str:
    if interval is None:
        return ""
    n = interval.n_undefined
    undefined = f"\n{n} resample{'' if n == 1 else 's'} undefined" if n else ""
    return f"[{number(interval.low)}, {number(interval.high)}]{undefined}"
