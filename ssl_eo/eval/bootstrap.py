"""How far a score could have come out otherwise: intervals over test samples, over places and over seeds.

Two things vary and are not to be mixed: which samples the test set happens to hold, and which seed a run happened to
have. For the first, samples are drawn anew and scored again (`resampled_scores`), and the interval is that of the
percentile method (Efron and Tibshirani 1993, chapter 13); the same seed gives the same resamples. For the second there
are a handful of values, of which percentiles would say too little: there it is Student's t (`interval_over_seeds`).

A resample need not hold all classes of the test set. Scores that are means over the classes that are there
(`macro_accuracy`, `macro_f1`, `map_macro`, `miou_present`, `miou_valid`) are on each resample the mean over its own
classes: where classes have a handful of samples, the interval is also that of which of them counted. Of some metrics
percentiles are no interval at all (`has_intervals` of `ssl_eo.eval.metrics`): these have none.

M samples, G groups, R resamples, S seeds, V values of all data sets together.

`FEWEST_GROUPS` are needed for an interval to be shown at all, below `FEW_GROUPS` it is too narrow to be taken as it is.
`FEWEST_SEEDS` are needed for one over seeds: two values have one difference between them, and their t is 12.7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ssl_eo.eval.metrics import Outcome, has_intervals
from ssl_eo.seeding import numpy_generator

__all__ = [
    "FEWEST_GROUPS",
    "FEWEST_SEEDS",
    "FEW_GROUPS",
    "Interval",
    "equal_shares",
    "interquartile_mean",
    "interquartile_means",
    "interval_of",
    "interval_over_seeds",
    "normalised",
    "resampled_scores",
]

FEWEST_GROUPS, FEW_GROUPS = 5, 20
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Interval:
    """Bounds of a score; both nan where resampling can tell nothing about it."""

    low: float
    high: float
    n_undefined: int  # resamples in which the score was nan; they are left out


def resampled_scores(
    outcome: Outcome, groups: Sequence[str | int] | None = None, n_resamples: int = 1000, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Each metric of `outcome.scores()` on resamples of its samples, `[R]`.

    Resamples M of the M samples with replacement. Where samples share a place (`groups [M]` names it), whole groups
    are drawn instead, G of the G: samples that look alike are no independent evidence. With a single group all values
    are nan, and of metrics without intervals (see above) they always are.

    The same samples, groups and seed give the same resamples. So values of two outcomes at one place are of the same
    samples: what is hard or easy for both cancels in their differences.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    found = {metric: np.full(n_resamples, math.nan) for metric in outcome.scores()}
    for r, weights in enumerate(_resamples(len(outcome), groups, n_resamples, seed)):
        for metric, score in outcome.scores(weights).items():
            if has_intervals(metric):
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


def interval_over_seeds(value: float, values: Sequence[float], level: float = 0.95) -> Interval:
    """Of the mean `value` of independent `values [S]`, one a seed: Student's t times the standard error of the mean.

    Both bounds are nan below `FEWEST_SEEDS`. It takes the values for those of a normal distribution.
    """
    n = len(values)
    if n < FEWEST_SEEDS:
        return Interval(math.nan, math.nan, 0)
    half = _student_t(level, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(value - half, value + half, 0)


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


def normalised(scores: ArrayLike, low: float, high: float) -> NDArray[np.float64]:
    """`scores` on a scale on which `low` is 0 and `high` is 1; not clipped. For errors `low` is the greater number."""
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        raise ValueError(f"low and high must be finite and differ, got {low} and {high}")
    return (np.asarray(scores, dtype=np.float64) - low) / (high - low)


def _student_t(level: float, n_free: int) -> float:
    """The t for which Student's distribution has the share `level` between -t and t; `n_free` degrees of freedom."""
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(n_free)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, n_free) < level else (low, middle)
    return math.tan(low) * math.sqrt(n_free)


def _share_within(angle: float, n_free: int) -> float:
    """The share between -t and t (Abramowitz and Stegun 1964, equations 26.7.3 and 26.7.4)."""
    cosine, is_odd = math.cos(angle), n_free % 2 == 1
    term, total = cosine if is_odd else 1.0, 0.0
    for k in range(1, n_free // 2 + 1):
        total += term
        term *= cosine * cosine * (2 * k / (2 * k + 1) if is_odd else (2 * k - 1) / (2 * k))
    within = math.sin(angle) * total
    return 2 / math.pi * (angle + within) if is_odd else within


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
