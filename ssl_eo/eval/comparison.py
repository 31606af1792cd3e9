"""Results of several models on several tasks side by side: what is compared with what, and how sure that is.

Two things vary and are kept apart: which samples the test set happens to hold (intervals of scores and of margins), and
the seed of what is drawn (the spread of scores). A score is the mean over seeds.

S seeds, R resamples of the test samples, T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.eval.bootstrap import Interval, aggregate, interquartile_mean, interval_of, normalised
from ssl_eo.eval.features import ALL_TAPS
from ssl_eo.eval.metrics import HIGHER_IS_BETTER
from ssl_eo.eval.partitions import parse_partition
from ssl_eo.eval.records import RESULTS, Record, key_of, read_results, unpacked
from ssl_eo.eval.summary import Margin, is_ratio

__all__ = ["AXES", "Aggregate", "Comparison", "Entrant", "PairedMargin", "Ranges", "Score", "read_ranges"]

AXES = ("partition", "subset", "size", "tap", "pool")  # by which results of one entrant on one task may differ
Ranges = Mapping[str, tuple[float, float]]  # of the scores of a task; the first is 0 on the common scale, the second 1


@dataclass(frozen=True)
class Entrant:
    """What a row of a table is about."""

    title: str
    kind: Literal["model", "random", "control"]
    identity: str


@dataclass(frozen=True, eq=False)
class Score:
    """An entrant on one task by one probe in one setting; `records` are those of its seeds."""

    metric: str
    records: Sequence[Record]

    @property
    def values(self) -> list[float]:
        """`[S]`."""
        return [float(r["scores"][self.metric]) for r in self.records]

    @property
    def value(self) -> float:
        return float(np.mean(self.values))

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None where no two of them differ."""
        return float(np.std(self.values, ddof=1)) if len(set(self.values)) > 1 else None

    @cached_property
    def resampled(self) -> NDArray[np.float64] | None:
        """Scores on resamples of the test samples, `[S, R]`; None where a record has none."""
        texts = [r.get("resampled") for r in self.records]
        found = [unpacked(text) for text in texts if text]
        if len(found) < len(texts) or len({len(values) for values in found}) != 1:
            return None
        return np.stack(found)

    @property
    def interval(self) -> Interval | None:
        """Over the test samples."""
        return None if self.resampled is None else _known(interval_of(self.resampled.mean(0)))

    @property
    def test_samples(self) -> tuple[Any, ...]:
        """What must be equal for two scores to be of the same samples."""
        return tuple(sorted({(r["data"]["test"], r["n_test"], r["n_groups"]) for r in self.records}))


@dataclass(frozen=True)
class PairedMargin:
    """How much better a model is than a rival that needs no training, in the metric's own unit; above 0 is better."""

    model: Entrant
    rival: Entrant
    margin: Margin
    interval: Interval | None  # of the gain over the test samples, the same resamples for both


@dataclass(frozen=True)
class Aggregate:
    """An entrant on all tasks by one probe: the interquartile mean, None where it lacks results of a task."""

    entrant: Entrant
    probe: str
    n_tasks: int  # with a result
    mean: float | None
    over_seeds: Interval | None  # stratified bootstrap; None where no seed changes anything
    over_samples: Interval | None


class Comparison:
    """All results of some evaluations."""

    def __init__(self, records: Iterable[Record]) -> None:
        """Raises `ValueError` where a task is ranked by several metrics."""
        every = list(records)
        self.results = [r for r in every if r["kind"] == "result"]
        self.problems = _distinct([r for r in every if r["kind"] != "result"])
        self._of: dict[str, list[Record]] = {}
        for r in self.results:
            self._of.setdefault(str(r["task"]), []).append(r)
        self.tasks = list(self._of)
        self.probes = list(dict.fromkeys(str(r["probe"]) for r in self.results))
        self.metrics = {task: _metric_of(task, of) for task, of in self._of.items()}
        self.entrants = _entrants(self.results)
        self._steps = {(task, axis): _steps(of, axis) for task, of in self._of.items() for axis in AXES}
        self._scores = _scores(self.results)
        self._shapes = {_identity(r): _shape(r) for r in self.results if r["features"] == "encoder"}

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Comparison:
        """Of the results in all `folders`. Raises `ValueError` where one has none."""
        for folder in folders:
            if not (folder / RESULTS).is_file():
                raise ValueError(f"{folder} has no {RESULTS}: it is not a folder that ssl-eo eval wrote to")
        return cls([r for folder in folders for r in read_results(folder)])

    @property
    def models(self) -> list[Entrant]:
        return [e for e in self.entrants if e.kind == "model"]

    def flags(self, task: str) -> list[str]:
        """Known defects of a task, and those that were found in its results."""
        found = [flag for r in self._of[task] for flag in r["flags"]]
        leaked = max(r.get("n_leaked") or 0 for r in self._of[task])
        if leaked:
            found.append(f"{leaked} test samples have the content of a training sample")
        tests = {(r["data"]["test"], r["n_test"]) for r in self._of[task]}
        if len(tests) > 1:
            found.append(f"scores are of {len(tests)} different sets of test samples and do not compare")
        return list(dict.fromkeys(found))

    def steps(self, task: str, axis: str) -> list[str]:
        """Values that an axis has in the results of a task; parts of the training set by size."""
        return self._steps[task, axis]

    def reference(self, task: str, axis: str) -> str:
        """The value of an axis at which entrants are compared: most labels, all bands, the task's size, all taps."""
        steps = self.steps(task, axis) or ["None"]
        if axis == "partition":
            return max(steps, key=lambda name: (parse_partition(name).ratio, not parse_partition(name).is_nested))
        preferred = {"subset": ["all"], "size": ["task"], "tap": [ALL_TAPS, "last"], "pool": []}[axis]
        return next((step for step in preferred if step in steps), steps[0])

    def score(self, entrant: Entrant, task: str, probe: str, **fixed: str) -> Score | None:
        """At the reference, but for the axes that are `fixed`; None where that was not measured."""
        setting = (fixed.get(axis) or self._usual(entrant, task, axis) for axis in AXES)
        return self._scores.get((entrant.identity, task, probe, *setting))

    def margins(self, task: str, probe: str) -> list[PairedMargin]:
        """Each model against the random encoder of its shape and against the best control.

        The best is chosen by the score that is compared, so the choice never flatters the model.
        """
        found = []
        for model in self.models:
            own = self.score(model, task, probe)
            if own is not None:
                for rival, score in self._rivals(model, task, probe):
                    margin = Margin(probe, self.metrics[task], own.value, rival.title, score.value)
                    found.append(PairedMargin(model, rival, margin, _paired(own, score)))
        return found

    def aggregates(self, probe: str, ranges: Ranges | None) -> list[Aggregate]:
        """Every entrant over the tasks that `probe` was run on, on the scale of `ranges` or else plain."""
        tasks = self.tasks_of_mean(probe, ranges)
        return [self._aggregate(entrant, probe, tasks, ranges) for entrant in self.entrants] if tasks else []

    def tasks_of_mean(self, probe: str, ranges: Ranges | None) -> list[str]:
        """Tasks whose scores are on one scale: those with `ranges`, without any those whose metric is a ratio."""
        measured = [task for task in self.tasks if any(r["probe"] == probe for r in self._of[task])]
        return [task for task in measured if (is_ratio(self.metrics[task]) if ranges is None else task in ranges)]

    def _usual(self, entrant: Entrant, task: str, axis: str) -> str:
        """Controls see pixels alone: they have no taps and no pool of tokens."""
        if entrant.kind == "control" and axis in ("tap", "pool"):
            return "pixels" if axis == "tap" else "None"
        return self.reference(task, axis)

    def _rivals(self, model: Entrant, task: str, probe: str) -> list[tuple[Entrant, Score]]:
        scored = [(e, s) for e in self.entrants if (s := self.score(e, task, probe)) is not None]
        random = [(e, s) for e, s in scored if e.identity == self._shapes[model.identity]]
        sign = 1 if HIGHER_IS_BETTER[self.metrics[task]] else -1
        controls = sorted(((e, s) for e, s in scored if e.kind == "control"), key=lambda pair: sign * pair[1].value)
        return [*random, *controls[-1:]]

    def _aggregate(self, entrant: Entrant, probe: str, tasks: Sequence[str], ranges: Ranges | None) -> Aggregate:
        scores = {task: s for task in tasks if (s := self.score(entrant, task, probe)) is not None}
        if len(scores) < len(tasks):
            return Aggregate(entrant, probe, len(scores), None, None, None)
        values = {task: [_scaled(v, task, s.metric, ranges) for v in s.values] for task, s in scores.items()}
        mean, over_seeds = aggregate(values)
        varies = any(s.spread is not None for s in scores.values())
        return Aggregate(
            entrant, probe, len(tasks), mean, _known(over_seeds) if varies else None, _over_samples(scores, ranges)
        )


def read_ranges(paths: Sequence[Path], tasks: Mapping[str, str]) -> Ranges:
    """Scales of `tasks` (with their metrics) from files `{dataset: [low, high]}` as GEO-Bench has them.

    A dataset is named as the task, or as its last part; tasks that are in no file have no scale. Of errors the greater
    number is the low end. Raises `ValueError` where no task has a scale.
    """
    known: dict[str, Any] = {}
    for path in paths:
        known |= _read_table(path)
    read = ", ".join(map(str, paths))
    found = {}
    for task, metric in tasks.items():
        pair = known.get(task, known.get(task.rpartition("/")[2]))
        if pair is None:
            continue
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(v, (int, float)) for v in pair)):
            raise ValueError(f"--normalizer: {read}: the range of {task} must be [low, high], got {pair}")
        if not pair[0] < pair[1]:
            raise ValueError(f"--normalizer: {read}: the range of {task} must rise, got {pair}")
        found[task] = (pair[0], pair[1]) if HIGHER_IS_BETTER[metric] else (pair[1], pair[0])
    if not found:
        names = ", ".join(known) or "nothing"
        raise ValueError(f"--normalizer: {read} has {names}, but none of {', '.join(tasks)}; add their [low, high]")
    return found


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--normalizer: {path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"--normalizer: {path} must hold {{dataset: [low, high]}}, got a {type(table).__name__}")
    return table


def _scaled(value: float, task: str, metric: str, ranges: Ranges | None) -> float:
    if ranges is None:
        return value if HIGHER_IS_BETTER[metric] else 1.0 - value
    return normalised(value, *ranges[task])


def _over_samples(scores: Mapping[str, Score], ranges: Ranges | None) -> Interval | None:
    """Of the interquartile mean, the test samples of each task resampled among themselves."""
    columns = []
    for task, score in scores.items():
        if score.resampled is None:
            return None
        columns += [[_scaled(v, task, score.metric, ranges) for v in values] for values in score.resampled]  # [R]
    if len({len(column) for column in columns}) != 1:
        return None
    pooled = np.array(columns).T  # [R, sum of S over T]
    defined = pooled[np.isfinite(pooled).all(1)]
    return _known(interval_of([interquartile_mean(row.tolist()) for row in defined]))


def _paired(own: Score, rival: Score) -> Interval | None:
    """Of the gain, on the same resamples; None where the scores are not of the same samples."""
    if own.resampled is None or rival.resampled is None or own.test_samples != rival.test_samples:
        return None
    if own.resampled.shape[1] != rival.resampled.shape[1]:
        return None
    gains = own.resampled.mean(0) - rival.resampled.mean(0)  # [R]
    return _known(interval_of(gains if HIGHER_IS_BETTER[own.metric] else -gains))


def _known(interval: Interval) -> Interval | None:
    return interval if np.isfinite([interval.low, interval.high]).all() else None


def _metric_of(task: str, records: Sequence[Record]) -> str:
    found = list(dict.fromkeys(str(r["metric"]) for r in records))
    if len(found) > 1:
        raise ValueError(f"task {task} is ranked by {' and '.join(found)} in these results: report them apart")
    return found[0]


def _steps(records: Sequence[Record], axis: str) -> list[str]:
    found = dict.fromkeys(str(r[axis]) for r in records if _has(r, axis))
    if axis == "partition":
        return sorted(found, key=lambda name: (parse_partition(name).ratio, name))
    return list(found)


def _scores(results: Sequence[Record]) -> dict[tuple[str, ...], Score]:
    """By entrant, task, probe and setting. What was measured again counts once, the newest."""
    places: dict[tuple[str, ...], dict[int, Record]] = {}
    for r in sorted(results, key=lambda r: str(r["date"])):
        place = (_identity(r), str(r["task"]), str(r["probe"]), *(str(r[axis]) for axis in AXES))
        places.setdefault(place, {})[r["seed"]] = r
    return {place: Score(of[min(of)]["metric"], [of[s] for s in sorted(of)]) for place, of in places.items()}


def _has(record: Record, axis: str) -> bool:
    """Whether an axis means something for a record: taps and pools are of encoders, pools not of their patches."""
    return axis not in ("tap", "pool") or (record["features"] in ("encoder", "random_encoder") and record[axis])


def _identity(record: Record) -> str:
    if record["features"] == "encoder":
        return f"{record['model']} {record['weights']}"
    return _shape(record) if record["features"] == "random_encoder" else str(record["features"])


def _shape(record: Record) -> str:
    """The random encoder of the shape of the record's; models of one shape share it."""
    return f"random {key_of(record['encoder'] or {})}"


def _entrants(results: Sequence[Record]) -> list[Entrant]:
    """Models, random encoders, controls. What needs no more than a name has no more."""
    models: dict[str, Record] = {}
    shapes: dict[str, list[str]] = {}
    controls: dict[str, str] = {}
    for r in results:
        if r["features"] == "encoder":
            models[_identity(r)] = r
        elif r["features"] == "random_encoder":
            named = shapes.setdefault(_shape(r), [])
            named += [r["model"]] if r["model"] not in named else []
        else:
            controls[str(r["features"])] = str(r["features"]).replace("_", " ")
    names = [str(r["model"]) for r in models.values()]
    stepped = [f"{r['model']}, step {r['step']:,}" for r in models.values()]
    titles = []
    for name, step, r in zip(names, stepped, models.values(), strict=True):
        alone = name if names.count(name) == 1 else step
        titles.append(alone if stepped.count(step) == 1 else f"{step} ({r['weights'][:6]})")
    random = {k: "random encoder" + (f" as {', '.join(v)}" if len(shapes) > 1 else "") for k, v in shapes.items()}
    return [
        *(Entrant(title, "model", key) for title, key in zip(titles, models, strict=True)),
        *(Entrant(title, "random", key) for key, title in random.items()),
        *(Entrant(title, "control", key) for key, title in controls.items()),
    ]


def _distinct(problems: Sequence[Record]) -> list[Record]:
    """Controls are measured anew for each model, and fail alike."""
    keys = ("kind", "task", "features", "model", "subset", "size", "tap", "probe", "partition", "seed", "error")
    return list({tuple(str(r.get(k)) for k in keys): r for r in problems}.values())
