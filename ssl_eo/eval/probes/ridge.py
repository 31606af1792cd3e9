"""Ridge regression: how much of the targets is a linear map of the features? Solved in closed form, nothing to tune.

N training samples, M test samples, D features, K classes, R rank of the features, L values of lambda.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.probes.base import Fitted, Labelled, Prediction, Standardiser, check_inputs, indicators, is_at_edge

__all__ = ["KINDS", "Config", "RidgePath", "fit", "predict"]

KINDS: tuple[Kind, ...] = ("classification", "multilabel", "segmentation", "regression")


@dataclass
class Config:
    """Which penalties there are to choose from."""

    # Per training sample, so that one grid serves every N: the penalty is lambda * N.
    lambdas: list[float] = field(default_factory=lambda: [10.0 ** (0.5 * e) for e in range(-12, 7)])

    def __post_init__(self) -> None:
        if not self.lambdas or not all(value > 0 for value in self.lambdas):
            raise ValueError(f"lambdas must be positive, and one at least, got {list(self.lambdas)}")


def predict(train: Labelled, val: Labelled | None, test: Tensor, cfg: Config | None = None) -> Prediction:
    """See `fit`."""
    return fit(train, val, cfg).predict(test)


def fit(train: Labelled, val: Labelled | None, cfg: Config | None = None) -> Fitted:
    """Ridge regression on standardised features; lambda by generalised cross-validation on the training set.

    Targets are -1 and 1 for each class (one or several labels), fractions of a patch (segmentation) or the values
    themselves. `val` is not used: what cross-validation chooses needs no other samples. It leaves out one sample at a
    time, in closed form, and so cannot leave out whole places.
    """
    cfg = cfg or Config()
    check_inputs("ridge", KINDS, train, val)
    targets = indicators(train)  # [N, K]
    if train.kind in ("classification", "multilabel"):
        targets = targets * 2.0 - 1.0
    path = RidgePath(train.features, targets)
    penalties = torch.tensor(cfg.lambdas, dtype=torch.float64, device=targets.device) * len(train)
    best = int(path.gcv(penalties).argmin())
    penalty = float(penalties[best])
    chosen = {"lambda": penalty / len(train), "penalty": penalty, "at_edge": is_at_edge(cfg.lambdas[best], cfg.lambdas)}
    return Fitted(partial(path.predict, penalty=penalty), None, 0.0, chosen, train.features.shape[1])


class RidgePath:
    """Ridge regression with intercept for every penalty at the price of one eigendecomposition.

    Minimises |Y - 1 b - Z W|^2 + penalty * |W|^2 over W and b, where Z is X standardised by its own mean and standard
    deviation (constant features become zero). The eigendecomposition is that of the smaller of Z'Z and ZZ', in float64.
    """

    standardise: Standardiser
    intercept: Tensor  # [K]
    singular: Tensor  # [R], singular values of the standardised features
    right: Tensor  # [D, R], their right singular vectors
    loading: Tensor  # [R, K], the targets along their left singular vectors

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        """`features [N, D]` and `targets [N, K]` of any float type."""
        y = targets.double()
        n, d = features.shape
        self.standardise = Standardiser(features)
        self.intercept = y.mean(0)
        z, y = self.standardise(features), y - self.intercept
        squares, basis = torch.linalg.eigh(z.T @ z if d <= n else z @ z.T)
        keep = squares > squares[-1].clamp_min(0.0) * max(n, d) * torch.finfo(z.dtype).eps
        self.singular = squares[keep].sqrt()
        basis = basis[:, keep]
        if d <= n:
            self.right = basis
            self.loading = (basis.T @ (z.T @ y)) / self.singular[:, None]
        else:
            self.right = (z.T @ basis) / self.singular
            self.loading = basis.T @ y
        # Samples beyond the rank and the intercept are fitted by no penalty at all; their residual never changes.
        self.n_beyond = n - 1 - len(self.singular)
        unexplained = y.square().sum() - self.loading.square().sum()
        self.unexplained = unexplained.clamp_min(0.0) if self.n_beyond > 0 else torch.zeros_like(unexplained)
        self.n = n

    def weights(self, penalty: float) -> Tensor:
        """`[D, K]`, for standardised features."""
        return self.right @ ((self.singular / (self.singular.square() + penalty))[:, None] * self.loading)

    def predict(self, features: Tensor, penalty: float) -> Tensor:
        """Targets `[M, K]` for `features [M, D]`."""
        return self.standardise(features) @ self.weights(penalty) + self.intercept

    def gcv(self, penalties: Tensor) -> Tensor:
        """Generalised cross-validation `[L]`: N * |residual|^2 / trace(I - hat matrix)^2 (Golub et al. 1979, eq. 1.4).

        The hat matrix includes the intercept. Both terms are sums of what each singular direction leaves unfitted,
        which stays exact where the fit is nearly perfect and a difference of large numbers would not.
        """
        left = penalties[:, None] / (self.singular.square() + penalties[:, None])  # [L, R]
        residual: Tensor = self.unexplained + left.square() @ self.loading.square().sum(1)  # [L]
        free = self.n_beyond + left.sum(1)  # [L]
        return residual / free.square() * self.n
