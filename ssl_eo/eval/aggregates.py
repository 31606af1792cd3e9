"""What entrants come to over all tasks: interquartile mean, mean, mean rank.

Only tasks that nobody could have looked up count, and only scores of the same test samples. Tasks of one dataset, which
show it in other tiles or bands or ask for other labels of it, count as one: their scores are averaged first.

S seeds, R resamples of the test samples, D datasets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.eval.bootstrap import (
    Interval,
    equal_shares,
    interquartile_mean,
    interquartile_means,
    interval_of,
    interval_over_seeds,
    normalised,
)
from ssl_eo.eval.comparison import Comparison
from ssl_eo.eval.entrants import Entrant
from ssl_eo.eval.experiments import Score, known
from ssl_eo.eval.metrics import HIGHER_IS_BETTER, is_ratio

__all__ = [
    "Aggregate",
    "Ranges",
    "Ranking",
    "aggregates",
    "by_dataset",
    "has_mean",
    "mean_ranks",
    "read_ranges",
    "tasks_of_mean",
    "tasks_of_rank",
]

# Of the scores of tasks: the first is 0 on the common scale, the second 1.
Ranges = Mapping[str, tuple[float, float]]

_FEWEST_DATASETS = 2  # of which a mean says more than the scores of the tasks


@dataclass(frozen=True)
class Aggregate:
    """An entrant on all tasks by one probe; means are None where it lacks a score that can be compared."""

    entrant: Entrant
    probe: str
    n_tasks: int  # with such a score
    interquartile_mean: float | None
    mean: float | None
    over_seeds: Interval | None  # of the first mean; None where seeds are too few, not the same, or change nothing
    over_samples: Interval | None  # likewise; None where one of the tasks has no interval


@dataclass(frozen=True)
class Ranking:
    """The mean rank of an entrant over datasets, 1 is best, among the `n_ranked` that have scores of all tasks."""

    entrant: Entrant
    n_tasks: int  # with a score that can be compared
    mean_rank: float | None
    n_ranked: int


def aggregates(comparison: Comparison, probe: str, ranges: Ranges | None) -> list[Aggregate]:
    """Every entrant over the tasks that `probe` was run on, on the scale of `ranges` or else plain."""
    tasks = tasks_of_mean(comparison, probe, ranges)
    return [_aggregate(comparison, entrant, probe, tasks, ranges) for entrant in comparison.entrants] if tasks else []


def mean_ranks(comparison: Comparison, probe: str) -> list[Ranking]:
    """Every entrant over the tasks that `probe` was run on, whatever their metrics; equal scores share their ranks.

    Ranked are the mean scores of tasks of one dataset and metric; ranks by several metrics of a dataset are averaged.
    """
    tasks = tasks_of_rank(comparison, probe)
    scores = {e: _scores(comparison, e, probe, tasks) for e in comparison.entrants}
    whole = [e for e, of in scores.items() if len(of) == len(tasks)]
    of_datasets: dict[Entrant, list[float]] = {e: [] for e in whole}
    for of in by_dataset(comparison, tasks).values():
        ranks: dict[Entrant, list[float]] = {e: [] for e in whole}
        for metric in dict.fromkeys(comparison.metrics[task] for task in of):
            sign = 1 if HIGHER_IS_BETTER[metric] else -1
            alike = [task for task in of if comparison.metrics[task] == metric]
            values = {e: sign * float(np.mean([scores[e][task].value for task in alike])) for e in whole}
            for e, own in values.items():
                n_better = sum(value > own for value in values.values())
                n_equal = sum(value == own for value in values.values())
                ranks[e].append(n_better + (n_equal + 1) / 2)
        for e in whole:
            of_datasets[e].append(float(np.mean(ranks[e])))
    means = {e: float(np.mean(found)) for e, found in of_datasets.items()} if tasks else {}
    return [Ranking(e, len(of), means.get(e), len(whole)) for e, of in scores.items()] if tasks else []


def by_dataset(comparison: Comparison, tasks: Sequence[str]) -> dict[str, list[str]]:
    """The `tasks` of each dataset."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(comparison.datasets[task], []).append(task)
    return found


def has_mean(comparison: Comparison, tasks: Sequence[str]) -> bool:
    """Whether a mean over `tasks` is one: of a single dataset it says no more than its scores."""
    return len(by_dataset(comparison, tasks)) >= _FEWEST_DATASETS


def tasks_of_rank(comparison: Comparison, probe: str) -> list[str]:
    """Tasks that `probe` was run on, but for those that leak."""
    measured = {str(r["task"]) for r in comparison.results if r["probe"] == probe}
    return [task for task in comparison.tasks if task in measured and task not in comparison.left_out]


def tasks_of_mean(comparison: Comparison, probe: str, ranges: Ranges | None) -> list[str]:
    """Those whose scores are on one scale: those with `ranges`, without any those whose metric is a ratio."""
    tasks = tasks_of_rank(comparison, probe)
    return [task for task in tasks if (is_ratio(comparison.metrics[task]) if ranges is None else task in ranges)]


def read_ranges(paths: Sequence[Path], tasks: Mapping[str, str]) -> Ranges:
    """Scales of `tasks` (with their metrics) from files `{dataset: [low, high]}` as GEO-Bench has them.

    A dataset is named as the task, or as its last part; tasks that are in no file have no scale. Of errors the greater
    number is the low end. Raises `ValueError` where no task has a scale.
    """
    in_files: dict[str, Any] = {}
    for path in paths:
        in_files |= _read_table(path)
    read = ", ".join(map(str, paths))
    found = {}
    for task, metric in tasks.items():
        pair = in_files.get(task, in_files.get(task.rpartition("/")[2]))
        if pair is None:
            continue
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(v, (int, float)) for v in pair)):
            raise ValueError(f"{read}: the range of {task} must be [low, high], got {pair}")
        if not pair[0] < pair[1]:
            raise ValueError(f"{read}: the range of {task} must rise, got {pair}")
        found[task] = (pair[0], pair[1]) if HIGHER_IS_BETTER[metric] else (pair[1], pair[0])
    if not found:
        names = ", ".join(in_files) or "nothing"
        raise ValueError(f"{read} has {names}, but none of {', '.join(tasks)}; add their [low, high]")
    return found


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold {{dataset: [low, high]}}, got a {type(table).__name__}")
    return table


def _scores(comparison: Comparison, entrant: Entrant, probe: str, tasks: Sequence[str]) -> dict[str, Score]:
    """By task, those that can be compared."""
    found = {task: comparison.score(entrant, task, probe) for task in tasks}
    return {task: s for task, s in found.items() if s is not None and comparison.is_compared(task, s)}


def _aggregate(
    comparison: Comparison, entrant: Entrant, probe: str, tasks: Sequence[str], ranges: Ranges | None
) -> Aggregate:
    scores = _scores(comparison, entrant, probe, tasks)
    if len(scores) < len(tasks):
        return Aggregate(entrant, probe, len(scores), None, None, None, None)
    datasets = list(by_dataset(comparison, tasks).values())
    values = _of_datasets({task: np.array([s.values]).T for task, s in scores.items()}, scores, datasets, ranges)
    middle = interquartile_mean(np.concatenate(values)[:, 0].tolist(), equal_shares([len(of) for of in values]))
    return Aggregate(
        entrant,
        probe,
        len(tasks),
        middle,
        float(np.mean([of.mean() for of in values])),
        _over_seeds(middle, values) if _have_same_seeds(scores.values()) else None,
        _over_samples(scores, datasets, ranges),
    )


def _of_datasets(
    values: Mapping[str, NDArray[np.float64]],
    scores: Mapping[str, Score],
    datasets: Sequence[Sequence[str]],
    ranges: Ranges | None,
) -> list[NDArray[np.float64]]:
    """Of each dataset the mean over its tasks, seed by seed, from `values [S, R]` of each task; on the common scale.

    Where tasks of a dataset have not the same seeds, it is one mean over all of them, `[1, R]`.
    """
    found = []
    for of in datasets:
        scaled = [_scaled(values[task], task, scores[task].metric, ranges) for task in of]
        same = _have_same_seeds([scores[task] for task in of])
        found.append(np.mean(scaled if same else [v.mean(0, keepdims=True) for v in scaled], axis=0))
    return found


def _have_same_seeds(scores: Iterable[Score]) -> bool:
    return len({tuple(r["seed"] for r in score.records) for score in scores}) == 1


def _scaled(values: NDArray[np.float64], task: str, metric: str, ranges: Ranges | None) -> NDArray[np.float64]:
    if ranges is None:
        return values if HIGHER_IS_BETTER[metric] else 1.0 - values
    return normalised(values, *ranges[task])


def _over_seeds(middle: float, values: Sequence[NDArray[np.float64]]) -> Interval | None:
    """Of the interquartile mean `middle`, from that of each seed over the datasets, whose `values` are `[S, 1]`."""
    means = interquartile_means(np.concatenate(values, axis=1), [1.0] * len(values))  # [S]
    return known(interval_over_seeds(middle, means.tolist())) if len(set(means.tolist())) > 1 else None


def _over_samples(
    scores: Mapping[str, Score], datasets: Sequence[Sequence[str]], ranges: Ranges | None
) -> Interval | None:
    """Of the interquartile mean, the test samples of each dataset resampled among themselves."""
    resampled = {task: values for task, score in scores.items() if (values := score.resampled) is not None}
    if len(resampled) < len(scores):
        return None
    n_resamples = min(values.shape[1] for values in resampled.values())  # some of them are as good a sample
    rows = _of_datasets({t: values[:, :n_resamples] for t, values in resampled.items()}, scores, datasets, ranges)
    pooled = np.concatenate(rows).T  # [R, sum of S over D]
    is_defined = np.isfinite(pooled).all(1)  # [R]
    means = np.full(n_resamples, np.nan)
    means[is_defined] = interquartile_means(pooled[is_defined], equal_shares([len(of) for of in rows]))
    return known(interval_of(means))
