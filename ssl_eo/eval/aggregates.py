"""What entrants come to over all tasks: interquartile mean, mean, mean rank.

Only tasks that nobody could have looked up count, and only scores of the same test samples.

S seeds, R resamples of the test samples, T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_eo.eval.bootstrap import Interval, aggregate, equal_shares, interquartile_means, interval_of, normalised
from ssl_eo.eval.comparison import Comparison
from ssl_eo.eval.entrants import Entrant
from ssl_eo.eval.experiments import Score, known
from ssl_eo.eval.metrics import HIGHER_IS_BETTER
from ssl_eo.eval.summary import is_ratio

__all__ = [
    "Aggregate",
    "Ranges",
    "Ranking",
    "aggregates",
    "mean_ranks",
    "read_ranges",
    "tasks_of_mean",
    "tasks_of_rank",
]

# Of the scores of tasks: the first is 0 on the common scale, the second 1.
Ranges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Aggregate:
    """An entrant on all tasks by one probe; means are None where it lacks a score that can be compared."""

    entrant: Entrant
    probe: str
    n_tasks: int  # with such a score
    interquartile_mean: float | None
    mean: float | None
    over_seeds: Interval | None  # of the first mean: stratified bootstrap; None where no seed changes anything
    over_samples: Interval | None  # likewise; None where one of the tasks has no interval


@dataclass(frozen=True)
class Ranking:
    """The mean rank of an entrant over tasks, 1 is best, among the `n_ranked` that have scores of all of them."""

    entrant: Entrant
    n_tasks: int  # with a score that can be compared
    mean_rank: float | None
    n_ranked: int


def aggregates(comparison: Comparison, probe: str, ranges: Ranges | None) -> list[Aggregate]:
    """Every entrant over the tasks that `probe` was run on, on the scale of `ranges` or else plain."""
    tasks = tasks_of_mean(comparison, probe, ranges)
    return [_aggregate(comparison, entrant, probe, tasks, ranges) for entrant in comparison.entrants] if tasks else []


def mean_ranks(comparison: Comparison, probe: str) -> list[Ranking]:
    """Every entrant over the tasks that `probe` was run on, whatever their metrics; equal scores share their ranks."""
    tasks = tasks_of_rank(comparison, probe)
    scores = {e: _scores(comparison, e, probe, tasks) for e in comparison.entrants}
    whole = [e for e, of in scores.items() if len(of) == len(tasks)]
    ranks: dict[Entrant, list[float]] = {e: [] for e in whole}
    for task in tasks:
        sign = 1 if HIGHER_IS_BETTER[comparison.metrics[task]] else -1
        values = {e: sign * scores[e][task].value for e in whole}
        for e, own in values.items():
            n_better = sum(value > own for value in values.values())
            n_equal = sum(value == own for value in values.values())
            ranks[e].append(n_better + (n_equal + 1) / 2)
    means = {e: float(np.mean(of)) for e, of in ranks.items()} if tasks else {}
    return [Ranking(e, len(of), means.get(e), len(whole)) for e, of in scores.items()] if tasks else []


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
            raise ValueError(f"--normalizer: {read}: the range of {task} must be [low, high], got {pair}")
        if not pair[0] < pair[1]:
            raise ValueError(f"--normalizer: {read}: the range of {task} must rise, got {pair}")
        found[task] = (pair[0], pair[1]) if HIGHER_IS_BETTER[metric] else (pair[1], pair[0])
    if not found:
        names = ", ".join(in_files) or "nothing"
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
    values = {task: [_scaled(v, task, s.metric, ranges) for v in s.values] for task, s in scores.items()}
    middle, over_seeds = aggregate(values)
    varies = any(s.spread is not None for s in scores.values())
    return Aggregate(
        entrant,
        probe,
        len(tasks),
        middle,
        float(np.mean([np.mean(of) for of in values.values()])),
        known(over_seeds) if varies else None,
        _over_samples(scores, ranges),
    )


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
    n_resamples = min(map(len, columns))  # a part of the resamples of a task is as good a sample of them
    pooled = np.array([column[:n_resamples] for column in columns]).T  # [R, sum of S over T]
    is_defined = np.isfinite(pooled).all(1)  # [R]
    means = np.full(n_resamples, np.nan)
    means[is_defined] = interquartile_means(pooled[is_defined], equal_shares([len(s.records) for s in scores.values()]))
    return known(interval_of(means))
