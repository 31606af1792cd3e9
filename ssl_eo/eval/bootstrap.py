"""How far a score could have come out otherwise: intervals by resampling, over samples, over places and over data sets.

Two things vary and are not to be mixed: which samples the test set happens to hold (`intervals`, `paired_difference`),
and which seed a run happened to have (`aggregate`). All intervals are those of the percentile method (Efron and
Tibshirani 1993, chapter 13), and the same seed gives the same resamples.

M samples, G groups, R resamples, D data sets, V values of all data sets together.

`FEWEST_GROUPS` are needed for an interval to be shown at all, below `FEW_GROUPS` it is too narrow to be taken as it is.
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
    "FEWEST_GROUPS",
    "FEW_GROUPS",
    "Interval",
    "aggregate",
    "equal_shares",
    "interquartile_mean",
    "interquartile_means",
    "interval_of",
    "intervals",
    "normalised",
    "paired_difference",
    "resampled_scores",
]

FEWEST_GROUPS, FEW_GROUPS = 5, 20


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

    `scores` holds one value a seed for each data set, on one scale for all (see `normalised`). All data sets weigh the
    same, however many values they have. The bootstrap is stratified: the values of each data set are resampled among
    themselves, then pooled. Where no data set has two values there is nothing to resample and the interval is nan;
    data sets of one value do not widen it.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    if empty := [name for name, values in scores.items() if not len(values)]:
        raise ValueError(f"scores: no value of {', '.join(empty)}")
    if undefined := [name for name, values in scores.items() if not np.isfinite(values).all()]:
        raise ValueError(f"scores: values of {', '.join(undefined)} are not finite; leave these data sets out by name")
    shares = equal_shares([len(values) for values in scores.values()])
    mean = interquartile_mean([value for values in scores.values() for value in values], shares)
    if max(map(len, scores.values())) < 2:
        return mean, interval_of(np.full(n_resamples, math.nan), level)
    drawn = []
    for name, values in scores.items():
        # By name, so that neither the order of the data sets nor which others there are moves the draw of one.
        rng = numpy_generator(seed, "aggregate", name)
        drawn.append(np.asarray(values, dtype=np.float64)[rng.integers(len(values), size=(n_resamples, len(values)))])
    means = interquartile_means(np.concatenate(drawn, axis=1), shares)  # [R]
    return mean, interval_of(means, level)


def equal_shares(counts: Sequence[int]) -> list[int]:
    """Weights `[V]` of values of which each data set has so many, one set after the other: all sets weigh the same.

    They are whole numbers, so that sets of equal counts come out exactly as if their values were simply pooled.
    """
    whole = math.lcm(*counts)
    return [whole // n for n in counts for _ in range(n)]


def interquartile_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Mean of the middle half of `values` (25 % trimmed mean); `weights` say how often each of them counts, else once.

    A quarter of the weight, which need not be that of whole values, is cut at either end: of a value at the edge the
    remaining fraction counts. Without weights, and where 4 divides V, this is the trimmed mean of Agarwal et al.
    (2021), who round V / 4 down.
    """
    pooled = np.asarray(values, dtype=np.float64)
    if not len(pooled) or not np.isfinite(pooled).all():
        raise ValueError(f"an interquartile mean needs at least one value, all of them finite, got {list(values)}")
    return float(interquartile_means(pooled[None], [1.0] * len(pooled) if weights is None else weights)[0])


def interquartile_means(values: NDArray[np.float64], weights: Sequence[float]) -> NDArray[np.float64]:
    """`interquartile_mean` of each row of `[R, V]`; `weights [V]` are those of the columns."""
    order = np.argsort(values, axis=1, kind="stable")
    weight = np.asarray(weights, dtype=np.float64)[order]  # [R, V]
    end = weight.cumsum(1)
    whole = float(np.sum(weights))
    # A value fills the weight from the end of the one before it to its own, and counts as far as that is between the
    # quartiles.
    share = np.clip(np.minimum(end, 0.75 * whole) - np.maximum(end - weight, 0.25 * whole), 0.0, None)
    means: NDArray[np.float64] = (np.take_along_axis(values, order, 1) * share).sum(1) / share.sum(1)
    return means


def normalised(score: float, low: float, high: float) -> float:
    """`score` on a scale on which `low` is 0 and `high` is 1; not clipped. For errors `low` is the greater number."""
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        raise ValueError(f"low and high must be finite and differ, got {low} and {high}")
    return (score - low) / (high - low)


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
