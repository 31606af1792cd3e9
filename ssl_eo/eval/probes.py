"""Probes without an optimiser: how much of the labels can a nearest neighbour or a linear map read off the features?

Both are deterministic and have nothing to tune by hand, so their numbers compare across objectives and along a run.
They disagree in a telling way: kNN needs classes to form clusters as they lie, ridge regression only needs them to be
linearly separable.

N training samples, M test samples, D features, K classes, R rank of the features, L values of lambda.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PROBES", "Probe", "ProbeResult", "RidgePath", "knn", "ridge", "score"]

LAMBDAS = tuple(10.0 ** (0.5 * exponent) for exponent in range(-12, 7))  # per training sample: 1e-6 to 1e3


@dataclass(frozen=True)
class ProbeResult:
    """`accuracy` over test samples, `macro_accuracy` over classes present in the test set, and what was chosen."""

    accuracy: float
    macro_accuracy: float
    n_neighbors: int | None = None
    penalty: float | None = None  # lambda of the ridge, as in sum of squares + lambda * |w|^2


# (train features [N, D], train labels [N], test features [M, D], test labels [M], K) -> result
Probe = Callable[[Tensor, Tensor, Tensor, Tensor, int], ProbeResult]


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    n_classes: int,
    n_neighbors: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 4096,
) -> ProbeResult:
    """Weighted nearest neighbours by cosine similarity s, each voting exp(s / temperature) (Wu et al. 2018, eq. 14).

    Features `[N, D]` and `[M, D]`, integer labels `[N]` and `[M]`. Uses all N neighbours where N < `n_neighbors`.
    """
    bank = _unit_rows(train)
    n_neighbors = min(n_neighbors, len(bank))
    predicted = []
    for queries in torch.split(_unit_rows(test), chunk_size):
        similarity, index = (queries @ bank.T).topk(n_neighbors)  # [m, k]
        # Relative to the nearest neighbour, so that no weight overflows; a common factor moves no vote.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # [m, k]
        votes = torch.zeros(len(queries), n_classes, dtype=weight.dtype, device=weight.device)
        votes.scatter_add_(1, train_labels.to(index.device)[index], weight)  # [m, K]
        predicted.append(votes.argmax(1))
    accuracy, macro_accuracy = score(torch.cat(predicted), test_labels)
    return ProbeResult(accuracy, macro_accuracy, n_neighbors=n_neighbors)


def ridge(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    n_classes: int,
    lambdas: Sequence[float] = LAMBDAS,
) -> ProbeResult:
    """One-against-all ridge regression to targets of +-1; lambda by generalised cross-validation on the training set.

    Features `[N, D]` and `[M, D]`, integer labels `[N]` and `[M]`. `lambdas` are per training sample: the penalty is
    `lambda * N`, so that one grid serves every N. The test set takes no part in any choice.
    """
    path = RidgePath(train, _one_against_all(train_labels.to(train.device), n_classes))
    penalties = torch.tensor(lambdas, dtype=torch.float64, device=train.device) * len(train)
    penalty = float(penalties[path.gcv(penalties).argmin()])
    accuracy, macro_accuracy = score(path.predict(test, penalty).argmax(1), test_labels)
    return ProbeResult(accuracy, macro_accuracy, penalty=penalty)


PROBES: dict[str, Probe] = {"knn": knn, "ridge": ridge}


class RidgePath:
    """Ridge regression with intercept for every penalty at the price of one eigendecomposition.

    Minimises |Y - 1 b - Z W|^2 + penalty * |W|^2 over W and b, where Z is X standardised by its own mean and standard
    deviation (constant features become zero). The eigendecomposition is that of the smaller of Z'Z and ZZ', in float64.
    """

    mean: Tensor  # [D]
    inverse_std: Tensor  # [D], 0 for constant features
    intercept: Tensor  # [K]
    singular: Tensor  # [R], singular values of the standardised features
    right: Tensor  # [D, R], their right singular vectors
    loading: Tensor  # [R, K], the targets along their left singular vectors

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        """`features [N, D]` and `targets [N, K]` of any float type."""
        x, y = features.double(), targets.double()
        n, d = x.shape
        self.mean, std = x.mean(0), x.std(0, correction=0)
        # A feature whose spread is rounding noise carries nothing: dividing by it would turn the noise into a signal.
        constant = std <= 1e-7 * x.square().mean(0).sqrt()
        self.inverse_std = torch.where(constant, 0.0, 1.0 / std.clamp_min(torch.finfo(x.dtype).tiny))
        self.intercept = y.mean(0)
        z, y = (x - self.mean) * self.inverse_std, y - self.intercept
        squares, basis = torch.linalg.eigh(z.T @ z if d <= n else z @ z.T)
        keep = squares > squares[-1].clamp_min(0.0) * max(n, d) * torch.finfo(x.dtype).eps
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
        return (features.double() - self.mean) * self.inverse_std @ self.weights(penalty) + self.intercept

    def gcv(self, penalties: Tensor) -> Tensor:
        """Generalised cross-validation `[L]`: N * |residual|^2 / trace(I - hat matrix)^2 (Golub et al. 1979, eq. 1.4).

        The hat matrix includes the intercept. Both terms are sums of what each singular direction leaves unfitted,
        which stays exact where the fit is nearly perfect and a difference of large numbers would not.
        """
        left = penalties[:, None] / (self.singular.square() + penalties[:, None])  # [L, R]
        residual: Tensor = self.unexplained + left.square() @ self.loading.square().sum(1)  # [L]
        free = self.n_beyond + left.sum(1)  # [L]
        return residual / free.square() * self.n


def score(predicted: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy over samples, and the mean over the classes present in `labels` of each class's accuracy."""
    labels = labels.to(predicted.device)
    correct = (predicted == labels).double()  # [M]
    n_samples = torch.bincount(labels)  # [K]
    n_correct = torch.bincount(labels, weights=correct)  # [K]
    present = n_samples > 0
    return float(correct.mean()), float((n_correct[present] / n_samples[present]).mean())


def _one_against_all(labels: Tensor, n_classes: int) -> Tensor:
    one_hot: Tensor = torch.nn.functional.one_hot(labels, n_classes).double()  # [N, K]
    return one_hot * 2.0 - 1.0


def _unit_rows(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=1)
