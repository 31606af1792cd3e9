"""The penalised negative log-likelihood of a linear classifier, in the coordinates where its curvature is simplest.

Features are standardised and turned into the basis of their right singular vectors. There the Hessian of the likelihood
is close to a diagonal, which is known before anything is fitted. Classes come first: the products of tall and narrow
matrices are several times faster so.

N samples, D features, R their rank, P = R + 1 coordinates (the last is the constant 1 of the intercept), K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ssl_eo.eval.kinds import Kind

__all__ = ["Curvatures", "Point", "Problem"]

_N_STEPS_REMEMBERED = 10  # of L-BFGS
_SLOPE_LEFT = 0.3  # of the slope at the start of a line, where a search along it ends
_N_TRIALS = 12  # along a line; two or three are usual


@dataclass(frozen=True, eq=False)
class Point:
    """Weights, and what the model says there."""

    weights: Tensor  # [K, P]
    scores: Tensor  # [K, N]
    loss: Tensor  # [N], of each sample, without the penalty
    probabilities: Tensor  # [K, N]


class Curvatures:
    """How the gradient changed along the last steps: the memory of L-BFGS (Nocedal and Wright 2006, algorithm 7.4)."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []  # step [K, P], change of the gradient [K, P]

    def remember(self, step: Tensor, change: Tensor) -> None:
        self._pairs = [*self._pairs, (step, change)][-_N_STEPS_REMEMBERED:]

    def penalised_by(self, more: Tensor) -> Curvatures:
        """The same steps where the penalty of the coordinates is larger by `more [P]`, which may be negative."""
        moved = Curvatures()
        pairs = [(step, change + more * step) for step, change in self._pairs]
        moved._pairs = [(step, change) for step, change in pairs if float((step * change).sum()) > 0]
        return moved

    def solve(self, gradient: Tensor, diagonal: Tensor) -> Tensor:
        """The inverse of the remembered Hessian, on top of a `diagonal [K, P]` one, times `gradient [K, P]`."""
        x, shares = gradient, []
        for step, change in reversed(self._pairs):
            share = (step * x).sum() / (step * change).sum()
            x = x - share * change
            shares.append(share)
        if self._pairs:
            step, change = self._pairs[-1]
            x = x * ((step * change).sum() / (change.square() / diagonal).sum())
        x = x / diagonal
        for (step, change), share in zip(self._pairs, reversed(shares), strict=True):
            x = x + (share - (change * x).sum() / (step * change).sum()) * step
        return x


class Problem:
    """Samples at `coordinates [N, P]` with `targets [K, N]` of 0 and 1, one class each or any number of them."""

    def __init__(self, coordinates: Tensor, targets: Tensor, kind: Kind) -> None:
        self._x, self._targets, self._kind = coordinates, targets, kind
        self._squares = coordinates.square().sum(0)  # [P]

    def start(self) -> Point:
        """Weights zero, and the intercepts that fit the frequencies of the classes (none of which is 0 or 1)."""
        frequency = self._targets.mean(1)  # [K]
        weights = self._x.new_zeros(len(frequency), self._x.shape[1])
        weights[:, -1] = frequency.logit() if self._kind == "multilabel" else frequency.log()
        return self.at(weights)

    def at(self, weights: Tensor) -> Point:
        """What the model says with `weights [K, P]`."""
        return self._point(weights, weights @ self._x.T)

    def minimise(
        self,
        at: Point,
        shrinkage: Tensor,
        memory: Curvatures,
        tolerance: float,
        max_steps: int,
        is_exact: bool = False,
    ) -> tuple[Point, float]:
        """The minimum of the sum of losses + (shrinkage * weights^2) / 2 from `at` on, and what is left to gain there.

        `shrinkage [P]` is the penalty of each coordinate. Preconditioned L-BFGS. What a Newton step with the diagonal
        of the Hessian would gain is a part of the loss; it ends where that is at most `tolerance`, after `max_steps`,
        or where rounding hides any gain. That diagonal is an estimate unless it `is_exact`: the more samples are sure
        of their class, the less they bend the likelihood, and the more is left to gain than it seems.
        """
        diagonal, is_of_here = self._usual_bend(at) + shrinkage, not is_exact  # [K, P]
        gradient = self._gradient(at, shrinkage)
        gain = self._gain(at, gradient, diagonal, shrinkage)
        for _ in range(max_steps):
            if gain <= tolerance and not is_of_here:
                diagonal, is_of_here = self._bend_at(at) + shrinkage, True
                gain = self._gain(at, gradient, diagonal, shrinkage)
            if gain <= tolerance:
                break
            reached = self._search(at, -memory.solve(gradient, diagonal), gradient, shrinkage)
            if reached is at:
                break
            new_gradient = self._gradient(reached, shrinkage)
            step, change = reached.weights - at.weights, new_gradient - gradient
            if float((step * change).sum()) > 0:
                memory.remember(step, change)
            at, gradient, is_of_here = reached, new_gradient, not is_exact
            gain = self._gain(at, gradient, diagonal, shrinkage)
        if not is_of_here:
            gain = self._gain(at, gradient, self._bend_at(at) + shrinkage, shrinkage)
        return at, gain

    def _usual_bend(self, at: Point) -> Tensor:
        """About the diagonal `[K, P]` of the likelihood's Hessian: as if all samples were as sure of a class.

        A class that is rare or sure bends the likelihood less (Boehning 1992 bounds it by the worst case instead).
        """
        spread = (at.probabilities * (1 - at.probabilities)).mean(1, keepdim=True).clamp_min(1 / len(self._x))
        return spread * self._squares

    def _bend_at(self, at: Point) -> Tensor:
        """The diagonal `[K, P]` of the likelihood's Hessian."""
        bend = (at.probabilities * (1 - at.probabilities)) @ self._x.square()
        return bend.clamp_min(torch.finfo(bend.dtype).tiny)  # all sure: the intercept has no penalty to divide by

    @staticmethod
    def _gain(at: Point, gradient: Tensor, diagonal: Tensor, shrinkage: Tensor) -> float:
        loss = float(at.loss.sum() + (shrinkage * at.weights.square()).sum() / 2)
        gain = float((gradient.square() / diagonal).sum()) / 2
        return gain / loss if gain > 0 else 0.0

    def _point(self, weights: Tensor, scores: Tensor) -> Point:
        agreement = (scores * self._targets).sum(0)  # [N]
        if self._kind == "multilabel":
            return Point(weights, scores, functional.softplus(scores).sum(0) - agreement, scores.sigmoid())
        normaliser = scores.logsumexp(0)  # [N]
        return Point(weights, scores, normaliser - agreement, (scores - normaliser).exp())

    def _gradient(self, at: Point, shrinkage: Tensor) -> Tensor:
        return (at.probabilities - self._targets) @ self._x + shrinkage * at.weights  # [K, P]

    def _search(self, at: Point, direction: Tensor, gradient: Tensor, shrinkage: Tensor) -> Point:
        """A point along `direction` where the loss is lower and its slope a part of what it was; `at` if none is found.

        Newton's method in one variable, kept inside what is known to hold the minimum. Scores are linear in the step,
        so that a trial costs no product with the features.
        """
        along = direction @ self._x.T  # [K, N]
        slope_at_0 = float((gradient * direction).sum())
        stiffness = float((shrinkage * direction.square()).sum())
        pull = float((shrinkage * at.weights * direction).sum())
        low, high, length = 0.0, float("inf"), 1.0
        for _ in range(_N_TRIALS):
            trial = self._point(at.weights + length * direction, at.scores + length * along)
            slope = float(((trial.probabilities - self._targets) * along).sum()) + pull + length * stiffness
            rise = float((trial.loss - at.loss).sum(dtype=torch.float64)) + length * (pull + length * stiffness / 2)
            if abs(slope) <= _SLOPE_LEFT * abs(slope_at_0) and rise <= 0:
                return trial
            low, high = (low, length) if slope > 0 or rise > 0 else (length, high)
            bend = self._bend(trial, along) + stiffness
            newton = length - slope / bend if bend > 0 else high
            middle = (low + high) / 2 if high < float("inf") else 4 * length
            length = newton if low < newton < min(high, 10 * length) else middle
        return at

    def _bend(self, at: Point, along: Tensor) -> float:
        """Second derivative of the sum of losses along a line whose scores change by `along [K, N]`."""
        weighted = at.probabilities * along
        if self._kind == "multilabel":
            return float((weighted * (1 - at.probabilities) * along).sum())
        return float((weighted * along).sum() - weighted.sum(0).square().sum())
