"""Logistic regression with an L2 penalty: what people call linear probing, solved to its optimum for many penalties.

The path of penalties goes from strong to weak, each fit starting from the last one with what that has learned about
curvature, and ends when the validation set says so. Its fits are near enough to their optima to choose by; the chosen
one is then brought to its optimum in float64, which probabilities depend on where the penalty is weak.

N training samples, V validation samples, M test samples, D features, R rank of the features, K classes, F of which are
fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.probes._likelihood import Curvatures, Problem
from ssl_eo.eval.probes.base import (
    Fitted,
    Labelled,
    Prediction,
    check_inputs,
    hold_out,
    indicators,
    is_at_edge,
    mean_response,
    selection_score,
)
from ssl_eo.eval.probes.ridge import RidgePath

__all__ = ["KINDS", "Config", "fit", "predict"]

KINDS: tuple[Kind, ...] = ("classification", "multilabel")

# Below this, rounding may hide what is left to gain, most of all where the penalty is weak and the loss small.
_LEAST_TOLERANCE = {"path_tolerance": 1e-5, "tolerance": 1e-14}  # of float32, of float64


@dataclass
class Config:
    """Which penalties there are to choose from, and how exactly each is solved."""

    # Of the mean loss + lambda |W|^2 / 2, strong to weak; that is C = 1 / (lambda * N) of others.
    lambdas: list[float] = field(default_factory=lambda: [10.0 ** (-0.5 * e) for e in range(-4, 13)])
    patience: int = 2  # penalties worse than the best on val before the path ends; 0 for all of them
    # Part of the loss that a further step could gain, where a fit ends: of the path, and of the penalty it has chosen.
    path_tolerance: float = 1e-5
    tolerance: float = 1e-8
    max_steps: int = 2000  # of a fit
    seed: int = 0  # of the tenth of train that is held out where there is no val

    def __post_init__(self) -> None:
        values = list(self.lambdas)
        if not values or values[-1] <= 0 or any(a <= b for a, b in pairwise(values)):
            raise ValueError(f"lambdas must be positive, one at least, and fall from strong to weak, got {values}")
        if self.patience < 0 or self.max_steps < 1:
            raise ValueError(f"patience must be 0 or more and max_steps 1, got {self.patience} and {self.max_steps}")
        for name, least in _LEAST_TOLERANCE.items():
            if not (value := getattr(self, name)) >= least:
                raise ValueError(f"{name} must be at least {least:g}, which rounding leaves, got {value:g}")


def predict(train: Labelled, val: Labelled | None, test: Tensor, cfg: Config | None = None) -> Prediction:
    """See `fit`."""
    return fit(train, val, cfg).predict(test)


def fit(train: Labelled, val: Labelled | None, cfg: Config | None = None) -> Fitted:
    """Multinomial logistic regression, or a binary one for each of several labels, on standardised features.

    lambda is the one of the best accuracy (one label) or micro average precision (several) on `val`, the strongest of
    equal ones. Without `val` it is chosen on a tenth of `train` that is held out, then fitted on all of `train`.

    Scores are log-odds up to a constant of the sample, and log-odds with the threshold 0 for several labels. A class
    that no sample of the fit has gets minus infinity, one that all of them have (several labels) plus infinity.

    `chosen` has `converged`: 0 where a step beyond the `max_steps` of the final fit, or beyond what rounding hides,
    could lower the loss by more than `tolerance`, else 1.
    """
    cfg = cfg or Config()
    check_inputs("logistic", KINDS, train, val)
    fitted_on, judged_on = hold_out(train, cfg.seed) if val is None else (train, val)
    path = _Path(fitted_on, cfg)
    value = path.choose(judged_on)
    if val is None:
        path = _Path(train, cfg)
        path.solve(value)
    path.settle(value)
    chosen = {"lambda": value, "penalty": value * len(train), "at_edge": is_at_edge(value, cfg.lambdas)}
    chosen["converged"] = float(path.gain <= cfg.tolerance)
    return Fitted(path.scores, partial(mean_response, train.kind), 0.0, chosen, train.features.shape[1])


class _Path:
    """The path of penalties on one training set."""

    def __init__(self, train: Labelled, cfg: Config) -> None:
        self._cfg, self._n = cfg, len(train)
        targets = indicators(train)  # [N, K]
        n_with = targets.sum(0)  # [K]
        self._never = n_with == 0
        self._always = (n_with == len(train)) & (train.kind == "multilabel")
        self._fitted = ~(self._never | self._always)
        targets = targets[:, self._fitted]  # [N, F]
        ridge = RidgePath(train.features, targets)
        self._standardise, self._basis = ridge.standardise, ridge.right  # [D, R]
        self._train, self._targets = train, targets.T.contiguous()  # [F, N]
        self._problem = self._problem_in(torch.float32)
        self._at = self._problem.start()
        self.gain = math.inf  # what a step could still lower the loss by where it has settled, as a part of it
        self._memory = Curvatures()
        self._shrinkage = self._at.weights.new_zeros(self._at.weights.shape[1])  # [R + 1], of the last fit

    def _problem_in(self, dtype: torch.dtype) -> Problem:
        coordinates = self._coordinates(self._train.features, dtype)
        return Problem(coordinates, self._targets.to(dtype), self._train.kind)

    def choose(self, val: Labelled) -> float:
        """Go down the path until `val` has had enough; the best lambda, whose weights are then kept."""
        x = self._coordinates(val.features, torch.float32)  # [V, R + 1]
        best, best_value, best_at, n_worse = -math.inf, self._cfg.lambdas[0], self._at, 0
        for value in self._cfg.lambdas:
            self.solve(value)
            found = selection_score(self._complete(x @ self._at.weights.T), val)
            if found > best:
                best, best_value, best_at, n_worse = found, value, self._at, 0
            elif found < best:
                n_worse += 1
                if n_worse == self._cfg.patience:
                    break
        self._at = best_at
        return best_value

    def solve(self, value: float) -> None:
        """Move near the optimum of lambda `value`."""
        shrinkage = self._shrinkage_by(value)
        self._memory = self._memory.penalised_by(shrinkage - self._shrinkage)
        self._shrinkage = shrinkage
        cfg = self._cfg
        self._at, _ = self._problem.minimise(self._at, shrinkage, self._memory, cfg.path_tolerance, cfg.max_steps)

    def settle(self, value: float) -> None:
        """Move from there to the optimum of lambda `value`, in float64. The path goes no further."""
        problem, cfg = self._problem_in(torch.float64), self._cfg
        near, shrinkage = problem.at(self._at.weights.double()), self._shrinkage_by(value).double()
        self._at, self.gain = problem.minimise(
            near, shrinkage, Curvatures(), cfg.tolerance, cfg.max_steps, is_exact=True
        )

    def _shrinkage_by(self, value: float) -> Tensor:
        shrinkage = torch.full_like(self._shrinkage, value * self._n)
        shrinkage[-1] = 0.0  # the intercept is free
        return shrinkage

    def scores(self, features: Tensor) -> Tensor:
        """`[M, K]` of `features [M, D]`."""
        weights = self._basis @ self._at.weights[:, :-1].T  # [D, F]
        return self._complete(self._standardise(features) @ weights + self._at.weights[:, -1])

    def _coordinates(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """`[N, R + 1]`: along the singular vectors, and a constant 1."""
        x = self._standardise(features).to(dtype) @ self._basis.to(dtype)
        return torch.cat([x, x.new_ones(len(x), 1)], 1)

    def _complete(self, fitted: Tensor) -> Tensor:
        """Scores of all classes `[M, K]`, of those that were fitted `[M, F]`."""
        scores = fitted.new_full((len(fitted), len(self._fitted)), -math.inf)
        scores[:, self._fitted] = fitted
        scores[:, self._always] = math.inf
        return scores
