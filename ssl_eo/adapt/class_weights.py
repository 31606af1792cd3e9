"""Weights of classes for losses, from how often each class occurs: rare classes count more, up to a limit.

N labels, n_c of them of class c, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["RULES", "Rule", "given_positive_weights", "given_weights", "positive_weights", "rule_weights"]

Rule = Literal["inverse", "balanced", "effective", "median"]
RULES: tuple[Rule, ...] = get_args(Rule)


def rule_weights(rule: Rule, counts: Tensor, max_ratio: float, beta: float) -> Tensor:
    """Weights `[K]` float64 with mean 1 from `counts [K]`, the largest at most `max_ratio` times the smallest.

    - `inverse` 1 / n_c; `balanced` N / (K n_c) (King and Zeng, 2001); `median` the median of all n over n_c, after
      Eigen and Fergus (arXiv 1411.4734). They differ by a factor, which the mean takes away: three names of one rule.
    - `effective` (1 - beta) / (1 - beta^n_c), one over the effective number of samples (Cui et al., arXiv 1901.05555):
      equal weights at beta 0, `inverse` as beta goes to 1.

    The limit lowers the largest weights. A class that does not occur, and so weighs nothing, has 1. Raises `ValueError`
    where none occurs.
    """
    occurs = counts > 0
    if not occurs.any():
        raise ValueError(f"class_weights {rule} needs labels: class_counts are all 0")
    n = counts[occurs].double()
    if rule == "effective":
        some = 1.0 / -torch.expm1(n * math.log(beta)) if beta > 0.0 else torch.ones_like(n)
    else:
        some = 1.0 / n
    some = some.clamp_max(max_ratio * float(some.min()))
    weights = torch.ones(len(counts), dtype=torch.float64, device=counts.device)
    weights[occurs] = some / some.mean()
    return weights


def given_weights(values: Sequence[float], n_classes: int) -> Tensor:
    """`values` as weights `[K]` float64, scaled to mean 1. Raises `ValueError` unless they are K usable numbers."""
    _check(values, n_classes)
    weights = torch.tensor(values, dtype=torch.float64)
    return weights / weights.mean()


def given_positive_weights(values: Sequence[float], n_classes: int) -> Tensor:
    """`values` as weights `[K]` float64 beside those of samples without the class, which are 1: not scaled."""
    _check(values, n_classes)
    return torch.tensor(values, dtype=torch.float64)


def positive_weights(counts: Tensor, max_ratio: float) -> Tensor:
    """What a sample with a class weighs, where one without weighs 1: `[K]` float64 from `counts [2, K]`.

    Samples without the class over samples with it, between 1 / `max_ratio` and `max_ratio`.
    """
    without, with_class = counts.double().clamp_min(1.0)
    ratios: Tensor = without / with_class
    return ratios.clamp(1.0 / max_ratio, max_ratio)


def _check(values: Sequence[float], n_classes: int) -> None:
    usable = [type(v) in (int, float) and math.isfinite(v) and v >= 0 for v in values]
    if len(values) != n_classes or not all(usable) or not any(values):
        raise ValueError(
            f"class_weights must be {n_classes} finite numbers, not negative and not all 0, got {list(values)}"
        )
