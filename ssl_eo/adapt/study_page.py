"""What a study found, as tables and as a page: scores, metrics side by side, classes, and what models cost.

S seeds, R resamples of the test samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ssl_eo.adapt.protocols import draws_encoder
from ssl_eo.adapt.study import UNET
from ssl_eo.adapt.study_records import class_measure
from ssl_eo.eval.bootstrap import FEWEST_GROUPS, Interval, interval_of
from ssl_eo.eval.metrics import HIGHER_IS_BETTER, best_of, has_intervals, in_unit, metric_text, number_text
from ssl_eo.eval.page import render
from ssl_eo.eval.records import unpacked
from ssl_eo.eval.result_figures import Bar, Point, draw_bars, draw_confusion, draw_points
from ssl_eo.eval.result_tables import Cell, Row, Table, as_latex, as_markdown, with_numbers
from ssl_eo.files import atomic_write

__all__ = ["Model", "check_pages", "models_of", "print_study", "study_tables", "write_study_page"]

Record = Mapping[str, Any]

_SIDE_BY_SIDE = {
    "classification": ("accuracy", "macro_accuracy", "macro_f1", "worst_class_recall", "ece"),
    "multilabel": ("f1_micro", "f1_macro", "map_micro", "map_macro", "subset_accuracy"),
    "segmentation": ("miou_present", "miou_all", "accuracy", "macro_accuracy", "macro_f1", "fwiou"),
    "regression": ("rmse", "mae", "r2"),
}
_COSTS: dict[str, Callable[[Record], float | None]] = {
    "trained, M": lambda r: r["n_trained"] / 1e6,
    "of M": lambda r: r["n_parameters"] / 1e6,
    "GFLOP a sample": lambda r: r["forward_gflop"],
    "memory, GB": lambda r: r["memory_gb"],
    "training, s": lambda r: r["seconds_train"],
    "samples/s": lambda r: r["samples_per_s"],
    "Wh": lambda r: None if r["energy_kwh"] is None else 1000 * r["energy_kwh"],
    "g CO2": lambda r: None if r["co2_kg"] is None else 1000 * r["co2_kg"],
}
_PAGES = ("study.html", "study.md", "study.tex")
_MAX_CONFUSIONS = 4
_CLOSE_ACROSS, _CLOSE_UP = 0.08, 0.07  # shares of the width and height of a chart, within which labels would overlap


@dataclass(frozen=True)
class Model:
    """One way to make a model, on one task; `records` are those of its seeds."""

    task: str
    encoder: str
    protocol: str
    decoder: str
    training: str
    records: Sequence[Record]

    @property
    def metric(self) -> str:
        return str(self.records[0]["metric"])

    @property
    def is_unet(self) -> bool:
        return self.encoder == UNET

    @property
    def row(self) -> str:
        """All but the decoder."""
        return "UNet from scratch" if self.is_unet else f"{self.encoder}, {self.protocol}"

    def mean(self, metric: str) -> float | None:
        """Over seeds; None where a seed does not define it."""
        found = [r["scores"].get(metric) for r in self.records]
        return None if None in found else float(np.mean(found))

    @cached_property
    def interval(self) -> Interval | None:
        """Of the mean over seeds, over the test samples; None where it was not asked for, or their places are few."""
        texts = [r["resampled"] for r in self.records]
        if not all(texts) or self.records[0]["n_groups"] < FEWEST_GROUPS or not has_intervals(self.metric):
            return None
        return interval_of(np.mean([unpacked(text) for text in texts], axis=0))

    @property
    def on_validation(self) -> float:
        """The headline by which its weights were chosen, mean over seeds."""
        best = []
        for r in self.records:
            scores = [s for curve in r["curves"] for s in curve["scores"] if s is not None]
            best.append(best_of(self.metric, scores, float))
        return float(np.mean(best))


def models_of(records: Iterable[Record]) -> list[Model]:
    """The models of `records` of results, seeds together, in order of appearance."""
    found: dict[tuple[str, str, str, str, str], list[Record]] = {}
    for record in records:
        if record["kind"] == "result":
            cell = record["cell"]
            key = (cell["task"], cell["encoder"], cell["protocol"], cell["decoder"], cell["training"])
            found.setdefault(key, []).append(record)
    return [Model(*key, of_seeds) for key, of_seeds in found.items()]


def study_tables(models: Sequence[Model], task: str) -> list[Table]:
    """Scores by decoder, metrics side by side, classes, specialists of ensembles, how the models of a task were
    trained, and their costs.
    """
    own = [m for m in models if m.task == task]
    trainings = list(dict.fromkeys(m.training for m in own))
    tables = [_scores(task, [m for m in own if m.training == t], t if len(trainings) > 1 else "") for t in trainings]
    of_ensembles = [m for m in own if m.records[0]["specialists"] is not None]
    found = [_specialists(task, of_ensembles)] if of_ensembles else []
    return [*tables, _side_by_side(task, own), _classes(task, own), *found, _trainings(task, own), _costs(task, own)]


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
    for key, split in {"n_leaked": "training", "n_leaked_val": "validation"}.items():
        n, n_test = max((r.get(key, 0), r["n_samples"]["test"]) for r in records)
        if n:
            found.append(f"{n} of {n_test:,} test samples have the content of a {split} sample")
    if n := max(r.get("n_shared_groups", 0) for r in records):
        found.append(f"{n} places of test samples are places of training or validation samples too")
    if (n_groups := min(r["n_groups"] for r in records)) < FEWEST_GROUPS and any(r["resampled"] for r in records):
        found.append(f"no intervals: test samples are of {n_groups} places, fewer than {FEWEST_GROUPS}")
    return list(dict.fromkeys(found))


def _scores(task: str, models: Sequence[Model], training: str) -> Table:
    """Rows are encoders and protocols, columns decoders; the UNet has one of both for itself."""
    metric = models[0].metric
    decoders = list(dict.fromkeys(m.decoder for m in sorted(models, key=lambda m: m.is_unet)))
    best = best_of(metric, models, lambda m: _known(m.mean(metric)))
    by_row: dict[str, dict[str, Model]] = {}
    for m in models:
        by_row.setdefault(m.row, {})[m.decoder] = m
    rows = [
        Row(title, "", [_score_cell(of[d], of[d] is best) if d in of else Cell() for d in decoders])
        for title, of in by_row.items()
    ]
    about = f", trained with {training}" if training else ""
    return Table(f"{task}: {metric_text(metric)}{about}", "encoder", decoders, rows)


def _score_cell(model: Model, is_best: bool) -> Cell:
    value, bounds = _known(model.mean(model.metric)), model.interval
    ends = [] if bounds is None else [number_text(model.metric, end) for end in (bounds.low, bounds.high)]
    note = f"[{', '.join(ends)}]" if ends else ""
    return Cell(number_text(model.metric, value), note, is_best)


def _side_by_side(task: str, models: Sequence[Model]) -> Table:
    found = {metric for m in models for metric in m.records[0]["scores"]}
    kind = str(models[0].records[0]["asked"]["task"]["kind"])
    metrics = [metric for metric in _SIDE_BY_SIDE[kind] if metric in found]
    rows = []
    for m in models:
        values = [m.mean(metric) for metric in metrics]
        cells = [Cell() if v is None else Cell(number_text(k, v)) for k, v in zip(metrics, values, strict=True)]
        rows.append(Row(_title(m), "", cells))
    return Table(f"{task}: metrics side by side", "model", [metric_text(metric) for metric in metrics], rows)


def _classes(task: str, models: Sequence[Model]) -> Table:
    record = models[0].records[0]
    measure = class_measure(record["asked"]["task"]["kind"])
    columns = [
        f"{name} ({n:,})" for name, n in zip(record["classes"], record["per_class"].get("support", []), strict=False)
    ]
    rows = []
    for m in models if columns else ():
        of_seeds = [r["per_class"][measure] for r in m.records]
        cells = []
        for of_class in zip(*of_seeds, strict=True):
            known = [v for v in of_class if v is not None]
            cells.append(Cell(f"{100 * float(np.mean(known)):.1f}" if known else ""))
        rows.append(Row(_title(m), "", cells))
    return Table(
        f"{task}: {measure} of classes, % (test {'pixels' if measure == 'iou' else 'samples'})", "model", columns, rows
    )


def _specialists(task: str, models: Sequence[Model]) -> Table:
    """Which are run of how many, and how they were chosen; where seeds differ, each choice once."""
    rows = []
    for m in models:
        found = [r["specialists"] for r in m.records]
        choices = dict.fromkeys(", ".join(f["run"]) for f in found)
        seconds = float(np.mean([f["seconds"] for f in found]))
        texts = [str(len(found[0]["run"])), str(len(found[0]["of"])), "; ".join(choices), found[0]["by"] or "given"]
        rows.append(Row(_title(m), "", [Cell(text) for text in (*texts, f"{seconds:.3g}")]))
    columns = ["run", "of", "which", "chosen by", "choosing, s"]
    return Table(f"{task}: specialists", "model", columns, rows)


def _trainings(task: str, models: Sequence[Model]) -> Table:
    """Of how many samples, what was chosen on validation, which weights it began with, which bands were not there.

    Where seeds differ, each once.
    """
    rows = []
    for m in models:
        sizes = [_each(f"{r['n_samples'][split]:,}" for r in m.records) for split in ("train", "val", "test")]
        chosen = [_each(f"{r['lr']:g}" for r in m.records), _each(f"{r['step']:,}" for r in m.records)]
        missing = _each(", ".join(r["missing_bands"]) or "none" for r in m.records)
        is_random = m.is_unet or draws_encoder(m.protocol)
        weights = "random" if is_random else _each(r["asked"].get("weights", "")[:12] for r in m.records)
        rows.append(Row(_title(m), "", [Cell(text) for text in (*sizes, *chosen, weights, missing)]))
    columns = ["train", "val", "test samples", "learning rate", "step", "weights", "bands it knows that are missing"]
    return Table(f"{task}: training", "model", columns, rows)


def _each(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _costs(task: str, models: Sequence[Model]) -> Table:
    """Means over seeds; columns that nobody measured are left out."""
    rows = []
    for m in models:
        measured = ([value for r in m.records if (value := of(r)) is not None] for of in _COSTS.values())
        rows.append(Row(_title(m), "", [Cell(f"{float(np.mean(v)):.3g}" if v else "") for v in measured]))
    (table,) = with_numbers([Table(f"{task}: cost", "model", list(_COSTS), rows)])
    return table


def _charts(models: Sequence[Model], name: str) -> list[str]:
    metric = models[0].metric
    encoders = list(dict.fromkeys(m.encoder for m in models))
    series = {encoder: None if encoder == UNET else i % 6 for i, encoder in enumerate(encoders)}
    higher_is_better = HIGHER_IS_BETTER[metric]
    ranked = sorted(models, key=lambda m: _known(m.mean(metric)), reverse=higher_is_better)
    scores = [in_unit(metric, _known(m.mean(metric))) for m in ranked]
    bars = [
        Bar(f"{_title(m)}  {i}", score, _bounds(m), series[m.encoder])
        for i, (m, score) in enumerate(zip(ranked, scores, strict=True), start=1)
    ]
    places = [(float(m.records[0]["forward_gflop"]), score) for m, score in zip(ranked, scores, strict=True)]
    points = [
        Point(label, *place, series[m.encoder])
        for m, place, label in zip(ranked, places, _point_labels(places), strict=True)
    ]
    drawn = [
        draw_bars(metric_text(metric), bars, f"{name}-bars"),
        draw_points(
            f"{metric_text(metric)} over cost, by number", points, [], "GFLOP a sample, forward", f"{name}-cost"
        ),
    ]
    # Those that were best on validation: what is shown is not picked by its score on the test.
    chosen = [m for m in models if m.records[0]["confusion"] is not None]
    chosen.sort(key=lambda m: m.on_validation, reverse=higher_is_better)
    for i, m in enumerate(chosen[:_MAX_CONFUSIONS]):
        confusion = np.sum([r["confusion"] for r in m.records], axis=0)
        drawn.append(draw_confusion(_title(m), confusion, m.records[0]["classes"], f"{name}-confusion{i}"))
    return drawn


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


def _title(model: Model) -> str:
    parts = [model.row] if model.is_unet else [model.encoder, model.protocol, model.decoder]
    return ", ".join(parts if model.training == "default" else [*parts, model.training])


def _problems(records: Sequence[Record]) -> list[str]:
    failed = [record for record in records if record["kind"] == "error"]
    return [f"{', '.join(str(value) for value in r['cell'].values())}: {r['error']}" for r in failed]


def _known(value: float | None) -> float:
    assert value is not None, "the headline of a result is defined"
    return value
