"""What a study found, as tables: scores, metrics side by side, classes, specialists, trainings, and what models cost.

S seeds, R resamples of the test samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ssl_eo.adapt.protocols import draws_encoder
from ssl_eo.adapt.study import UNET
from ssl_eo.adapt.study_records import class_measure
from ssl_eo.eval.bootstrap import FEWEST_GROUPS, Interval, interval_of
from ssl_eo.eval.metrics import best_of, has_intervals, metric_text, number_text
from ssl_eo.eval.records import unpacked
from ssl_eo.eval.result_tables import Cell, Row, Table, with_numbers
from ssl_eo.eval.rounding import fixed

__all__ = ["INTERVAL", "Model", "counted", "counts_of_classes", "few", "models_of", "study_tables"]

Record = Mapping[str, Any]

INTERVAL = "95 % interval of a bootstrap over test samples, of whole places where samples share one"
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
_SPLITS = ("train", "val", "test")
_MOST_COLUMNS = 6  # of models or classes side by side; more would not fit the page
_MOST_NAMES = 4  # in a cell
_CLASSES_THAT_ARE_EMPTY = {
    "iou": "Empty: test has no pixel of the class, and none is predicted; 0.0: there are some, and next to none is"
    " right.",
    "recall": "Empty: test has no sample of the class; 0.0: it has some, and next to none is found.",
}


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

    @property
    def title(self) -> str:
        """All of it; the training only where it has a name of its own."""
        parts = [self.row] if self.is_unet else [self.encoder, self.protocol, self.decoder]
        return ", ".join(parts if self.training == "default" else [*parts, self.training])

    @property
    def score(self) -> float:
        """The headline on the test samples, mean over seeds."""
        value = self.mean(self.metric)
        assert value is not None, "the headline of a result is defined"
        return value

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
    return [*tables, _side_by_side(task, own), *_classes(task, own), *found, _trainings(task, own), _costs(task, own)]


def counts_of_classes(models: Sequence[Model]) -> dict[str, list[int]]:
    """How often each of the K classes occurs in `train`, `val` and `test`, as far as records of one task say it.

    Of samples, or of pixels where each has a class.
    """
    records = [r for m in models for r in m.records]
    of_training: dict[str, list[int]] = next((r["n_of_class"] for r in records if "n_of_class" in r), {})
    return {**of_training, "test": records[0]["per_class"].get("support", [])}


def counted(kind: str) -> str:
    """What has a class in a task of `kind`."""
    return "pixel" if kind == "segmentation" else "sample"


def few(names: Sequence[str], separator: str = ", ") -> str:
    """The first of `names`, and how many more there are."""
    rest = len(names) - _MOST_NAMES
    return separator.join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _scores(task: str, models: Sequence[Model], training: str) -> Table:
    """Rows are encoders and protocols, columns decoders; the UNet has one of both for itself."""
    metric = models[0].metric
    decoders = list(dict.fromkeys(m.decoder for m in sorted(models, key=lambda m: m.is_unet)))
    best = best_of(metric, (m.score for m in models), float)
    by_row: dict[str, dict[str, Model]] = {}
    for m in models:
        by_row.setdefault(m.row, {})[m.decoder] = m
    rows = [
        Row(title, "", [_score_cell(of[d], best) if d in of else Cell() for d in decoders])
        for title, of in by_row.items()
    ]
    said = ["Bold: the best of this table, before rounding."]
    if any(m.interval for m in models):
        said.append(f"In brackets: the {INTERVAL}.")
    about = f", trained with {training}" if training else ""
    return Table(
        f"{task}: {metric_text(metric)}{about}",
        "encoder",
        decoders,
        rows,
        note=" ".join([*said, *_of_seeds(models)]),
    )


def _score_cell(model: Model, best: float) -> Cell:
    bounds = model.interval
    ends = [] if bounds is None else [number_text(model.metric, end) for end in (bounds.low, bounds.high)]
    note = f"[{', '.join(ends)}]" if ends else ""
    is_best = math.isclose(model.score, best, rel_tol=1e-12)  # a mean of the same in another order may differ in a bit
    return Cell(number_text(model.metric, model.score), note, is_best)


def _of_seeds(models: Sequence[Model]) -> list[str]:
    """A sentence, where scores are means."""
    counts = {len(m.records) for m in models}
    up_to = "up to " if len(counts) > 1 else ""
    return [f"Means over {up_to}{max(counts)} seeds."] if max(counts) > 1 else []


def _side_by_side(task: str, models: Sequence[Model]) -> Table:
    found = {metric for m in models for metric in m.records[0]["scores"]}
    kind = str(models[0].records[0]["asked"]["task"]["kind"])
    metrics = [metric for metric in _SIDE_BY_SIDE[kind] if metric in found]
    rows = []
    for m in models:
        values = [m.mean(metric) for metric in metrics]
        cells = [Cell() if v is None else Cell(number_text(k, v)) for k, v in zip(metrics, values, strict=True)]
        rows.append(Row(m.title, "", cells))
    return Table(f"{task}: metrics side by side", "model", [metric_text(metric) for metric in metrics], rows)


def _classes(task: str, models: Sequence[Model]) -> list[Table]:
    """Classes are columns where they are few, else rows, beside some of the models at a time. None of regression."""
    record = models[0].records[0]
    kind, classes = str(record["asked"]["task"]["kind"]), record["classes"]
    if not record["per_class"] or not classes:
        return []
    measure, counts = class_measure(kind), counts_of_classes(models)
    cells = [[_class_cell(m, measure, i) for m in models] for i in range(len(classes))]  # [K] of all models
    numbers = [", ".join(f"{split} {of[i]:,}" for split, of in counts.items()) for i in range(len(classes))]
    said = [_CLASSES_THAT_ARE_EMPTY[measure], f"With each class stands how many {counted(kind)}s have it."]
    note, title = " ".join([*said, *_of_seeds(models)]), f"{task}: {_text_of(measure)} of classes, %"
    if len(classes) <= _MOST_COLUMNS:
        columns = [f"{name} ({text})" for name, text in zip(classes, numbers, strict=True)]
        rows = [Row(m.title, "", of_model) for m, of_model in zip(models, zip(*cells, strict=True), strict=True)]
        return [Table(title, "model", columns, rows, note=note)]
    parts = np.array_split(np.arange(len(models)), math.ceil(len(models) / _MOST_COLUMNS))
    return [
        Table(
            title if len(parts) == 1 else f"{title}, part {part} of {len(parts)}",
            "class",
            [models[j].title for j in some],
            [Row(name, "", [cells[i][j] for j in some], numbers[i]) for i, name in enumerate(classes)],
            note=note,
        )
        for part, some in enumerate(parts, start=1)
    ]


def _class_cell(model: Model, measure: str, i: int) -> Cell:
    """Of class `i`, mean over the seeds that define it."""
    known = [v for r in model.records if (v := r["per_class"][measure][i]) is not None]
    return Cell(fixed(100 * float(np.mean(known)), 1) if known else "")


def _text_of(measure: str) -> str:
    return {"iou": "IoU"}.get(measure, measure)


def _specialists(task: str, models: Sequence[Model]) -> Table:
    """Which are run of how many, and how they were chosen; where seeds differ, each choice once."""
    rows = []
    for m in models:
        found = [r["specialists"] for r in m.records]
        choices = dict.fromkeys(", ".join(f["run"]) for f in found)
        seconds = float(np.mean([f["seconds"] for f in found]))
        texts = [str(len(found[0]["run"])), str(len(found[0]["of"])), found[0]["by"] or "given", _three_digits(seconds)]
        rows.append(Row(m.title, "", [Cell(text) for text in texts], "; ".join(choices)))
    note = "Below the name of a model: the specialists that it runs. The others cost nothing."
    return Table(f"{task}: specialists", "model", ["run", "of", "chosen by", "choosing, s"], rows, note=note)


def _trainings(task: str, models: Sequence[Model]) -> Table:
    """Of how many samples, what was chosen on validation, which weights it began with, which bands were not there.

    Where seeds differ, each once.
    """
    rows = []
    for m in models:
        sizes = _each(" / ".join(f"{r['n_samples'][split]:,}" for split in _SPLITS) for r in m.records)
        chosen = [_each(f"{r['lr']:g}" for r in m.records), _each(f"{r['step']:,}" for r in m.records)]
        missing = _each(", ".join(r["missing_bands"]) or "none" for r in m.records)
        rows.append(Row(m.title, "", [*map(Cell, [sizes, *chosen]), _weights_cell(m), Cell(missing)]))
    columns = [
        f"samples of {' / '.join(_SPLITS)}",
        "learning rate",
        "step",
        "weights",
        "bands it knows that are missing",
    ]
    is_of_ensembles = any(r["specialists"] is not None for m in models for r in m.records)
    about = "Weights of an ensemble are one hash of all its specialists; beside it stand those that are run."
    return Table(f"{task}: training", "model", columns, rows, note=about if is_of_ensembles else "")


def _weights_cell(model: Model) -> Cell:
    """A hash; of an ensemble that of all specialists, with the names of those that are run."""
    if model.is_unet or draws_encoder(model.protocol):
        return Cell("random")
    weights = _each(r["asked"].get("weights", "")[:12] for r in model.records)
    run = dict.fromkeys(few(r["specialists"]["run"], ",\n") for r in model.records if r["specialists"] is not None)
    return Cell(weights, ";\n".join(run))


def _each(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _costs(task: str, models: Sequence[Model]) -> Table:
    """Means over seeds; columns that nobody measured are left out."""
    rows = []
    for m in models:
        measured = ([value for r in m.records if (value := of(r)) is not None] for of in _COSTS.values())
        rows.append(Row(m.title, "", [Cell(_three_digits(float(np.mean(v))) if v else "") for v in measured]))
    (table,) = with_numbers([Table(f"{task}: cost", "model", list(_COSTS), rows)])
    return table


def _three_digits(value: float) -> str:
    """At least: `0.0301`, `35.6`, `3,331`."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
