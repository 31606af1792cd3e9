"""How far a score could have come out otherwise: intervals by resampling, over samples, over places and over data sets.

Two things vary and are not to be mixed: which samples the test set happens to hold (`intervals`, `paired_difference`),
and which seed a run happened to have (`aggregate`). All intervals are those of the percentile method (Efron and
Tibshirani 1993, chapter 13), and the same seed gives the same resamples.

M samples, G groups, R resamples, D data sets, V values of all data sets together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ssl_eo.eval.metrics import Outcome
from ssl_eo.seeding import numpy_generator

__all__ = [
    "Interval",
    "aggregate",
    "interquartile_mean",
    "interval_of",
    "intervals",
    "normalised",
    "paired_difference",
    "resampled_scores",
]


@dataclass(frozen=True)
class Interval:
    """Bounds of a score; both nan where resampling can tell nothing about it."""

    low: float
    high: float
    n_undefined: int  # resamples in which the score was nan; they are left out


def intervals(
    outcome: Outcome,
    groups: Sequence[str | int] | None = None,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """An interval for each metric of `outcome.scores()`.

    Resamples M of the M samples with replacement. Where samples share a place (`groups [M]` names it), whole groups
    are drawn instead, G of the G: samples that look alike are no independent evidence. With a single group or sample
    every interval is nan. With few groups (below 20 or so) intervals of this method are too narrow.
    """
    resampled = resampled_scores(outcome, groups, n_resamples, seed)
    return {metric: interval_of(values, level) for metric, values in resampled.items()}


def resampled_scores(
    outcome: Outcome, groups: Sequence[str | int] | None = None, n_resamples: int = 1000, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Each metric of `outcome.scores()` on resamples of its samples, `[R]`; all nan where there is a single group.

    The same samples, groups and seed give the same resamples. So values of two outcomes at one place are of the same
    samples, and the differences are those of `paired_difference`.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    found = {metric: np.full(n_resamples, math.nan) for metric in outcome.scores()}
    for r, weights in enumerate(_resamples(len(outcome), groups, n_resamples, seed)):
        for metric, score in outcome.scores(weights).items():
            found[metric][r] = score
    return found


def interval_of(values: ArrayLike, level: float = 0.95) -> Interval:
    """The interval of resampled scores `[R]`, of which some may be nan."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    found = np.asarray(values, dtype=np.float64)
    defined = found[~np.isnan(found)]
    if not len(defined):
        return Interval(math.nan, math.nan, len(found))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), len(found) - len(defined))


def paired_difference(
    a: Outcome,
    b: Outcome,
    groups: Sequence[str | int] | None,
    metric: str,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, Interval]:
    """`metric` of `a` minus that of `b`, both of the same samples in the same order, and its interval.

    Both are scored on the same resamples (see `intervals`), so what is hard or easy for both cancels.
    """
    if a.truth.shape != b.truth.shape or not bool((a.truth.cpu() == b.truth.cpu()).all()):
        raise ValueError(
            f"a paired difference needs outcomes of the same samples in the same order; the targets of these"
            f" {len(a)} and {len(b)} samples differ"
        )
    first, second = a.scores(), b.scores()
    if metric not in first or metric not in second:
        raise ValueError(
            f"metric: there is no {metric!r} in both outcomes ({', '.join(m for m in first if m in second)})"
        )
    resampled = [resampled_scores(outcome, groups, n_resamples, seed)[metric] for outcome in (a, b)]
    return first[metric] - second[metric], interval_of(resampled[0] - resampled[1], level)


def aggregate(
    scores: Mapping[str, Sequence[float]], n_resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, Interval]:
    """Interquartile mean of the scores of all data sets together, and its interval (Agarwal et al. 2021, section 4).

    `scores` holds one value a seed for each data set, on one scale for all (see `normalised`). The bootstrap is
    stratified: the values of each data set are resampled among themselves, then pooled. Where no data set has two
    values there is nothing to resample and the interval is nan; data sets of one value do not widen it.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    if empty := [name for name, values in scores.items() if not len(values)]:
        raise ValueError(f"scores: no value of {', '.join(empty)}")
    if undefined := [name for name, values in scores.items() if not np.isfinite(values).all()]:
        raise ValueError(f"scores: values of {', '.join(undefined)} are not finite; leave these data sets out by name")
    mean = interquartile_mean([value for values in scores.values() for value in values])
    if max(map(len, scores.values())) < 2:
        return mean, interval_of(np.full(n_resamples, math.nan), level)
    drawn = []
    for name, values in scores.items():
        # By name, so that neither the order of the data sets nor which others there are moves the draw of one.
        rng = numpy_generator(seed, "aggregate", name)
        drawn.append(np.asarray(values, dtype=np.float64)[rng.integers(len(values), size=(n_resamples, len(values)))])
    means = _interquartile_means(np.concatenate(drawn, axis=1))  # [R]
    return mean, interval_of(means, level)


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of the middle half of `values` (25 % trimmed mean).

    A quarter of V, which need not be a whole number, is cut at either end: of a value at the edge the remaining
    fraction counts. Where 4 divides V this is the trimmed mean of Agarwal et al. (2021), who round V / 4 down.
    """
    pooled = np.asarray(values, dtype=np.float64)
    if not len(pooled) or not np.isfinite(pooled).all():
        raise ValueError(f"an interquartile mean needs at least one value, all of them finite, got {list(values)}")
    return float(_interquartile_means(pooled[None])[0])


def normalised(score: float, low: float, high: float) -> float:
    """`score` on a scale on which `low` is 0 and `high` is 1; not clipped. For errors `low` is the greater number."""
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        raise ValueError(f"low and high must be finite and differ, got {low} and {high}")
    return (score - low) / (high - low)


def _interquartile_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row of `[R, V]`."""
    v = values.shape[1]
    place = np.arange(v)
    # The value at place i fills i to i + 1; it counts by how much of that lies between the quartiles.
    share = np.clip(np.minimum(place + 1, 0.75 * v) - np.maximum(place, 0.25 * v), 0.0, 1.0)  # [V]
    means: NDArray[np.float64] = np.sort(values, axis=1) @ share / share.sum()
    return means


def _resamples(n: int, groups: Sequence[str | int] | None, n_resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each sample counts, `[M]` float64, `n_resamples` times; nothing where there is only one group."""
    group_of, n_groups = _number_groups(n, groups)
    if n_groups < 2:
        return
    rng = numpy_generator(seed, "bootstrap")
    for _ in range(n_resamples):
        counts = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)  # [G]
        yield torch.from_numpy(counts[group_of].astype(np.float64))


def _number_groups(n: int, groups: Sequence[str | int] | None) -> tuple[NDArray[np.int64], int]:
    """The number of each sample's group `[M]`, in order of first appearance, and how many there are."""
    if groups is None:
        return np.arange(n), n
    if len(groups) != n:
        raise ValueError(f"groups must name the place of each of the {n} samples, got {len(groups)} names")
    numbers: dict[str | int, int] = {}
    group_of = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    return group_of, len(numbers)
