"""Probes beside the same models of scikit-learn, on one thread: how long they take, and how often they are right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _table import Row
from _timing import best_processor_seconds
from torch import Tensor

from ssl_eo.eval.probes import Labelled, Prediction, knn, linear, logistic, ridge
from ssl_eo.seeding import torch_generator

__all__ = ["SECTIONS", "Size"]

MOST_POINTS = 0.3  # between the accuracy of ours and theirs
MOST_SECONDS_RATIO = 0.1  # ours to theirs


@dataclass(frozen=True)
class Size:
    """N training samples of D features in K classes."""

    n_samples: int
    n_features: int
    n_classes: int

    def __str__(self) -> str:
        return f"{self.n_samples} x {self.n_features}, {self.n_classes} classes"


@dataclass(frozen=True)
class Problem:
    """Training and validation set, and a test set with its labels."""

    train: Labelled
    val: Labelled
    test: Tensor  # [M, D]
    labels: Tensor  # [M]

    @classmethod
    def of(cls, size: Size, n_val: int = 1000, n_test: int = 2000) -> Problem:
        """Features as encoders give them: correlated, with a spectrum that falls by a power law; classes overlap."""
        n, d, n_classes = size.n_samples + n_val + n_test, size.n_features, size.n_classes
        g = torch_generator("probing", str(size))
        rank = torch.arange(1, d + 1).float()
        labels = torch.randint(0, n_classes, (n,), generator=g)
        # The more classes, the farther they are apart, or none of them would be told from the others.
        centres = 0.35 * n_classes**0.25 * torch.randn(n_classes, d, generator=g) * rank**-0.9
        x = centres[labels] + 0.55 * torch.randn(n, d, generator=g) * rank**-0.5  # [n, D]
        x = x @ torch.linalg.qr(torch.randn(d, d, generator=g))[0]
        parts = [size.n_samples, n_val, n_test]
        (train, val, test), (y, y_val, y_test) = x.split(parts), labels.split(parts)
        sets = (Labelled(f, t, "classification", n_classes) for f, t in ((train, y), (val, y_val)))
        return cls(*sets, test, y_test)

    def standardised(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features of the three sets as scikit-learn gets them, in float64."""
        x = self.train.features.double()
        mean, std = x.mean(0), x.std(0, correction=0)
        train, val, test = (((f - mean) / std).numpy() for f in (x, self.val.features, self.test))
        return train, val, test

    def accuracy(self, predicted: Tensor | np.ndarray) -> float:
        """Percent."""
        return 100 * float((torch.as_tensor(predicted) == self.labels).double().mean())


def measure_logistic(size: Size, n_turns: int) -> list[Row]:
    """The same penalties, of which the same validation set chooses; ours ends the path early, and not.

    At its own tolerance scikit-learn leaves weak penalties far from their optimum, after a dozen steps and with another
    accuracy. What ours is held to is the optimum: at 1e-8 its probabilities are as near to it as those of ours.
    """
    problem = Problem.of(size)
    whole = logistic.Config(patience=0)
    return _rows(
        "logistic",
        size,
        problem,
        {
            "scikit-learn": lambda: _scikit_logistic(problem, tolerance=1e-8),
            "scikit-learn, tolerance 1e-4": lambda: _scikit_logistic(problem, tolerance=1e-4),
            "ours, the whole path": lambda: _classes(logistic.predict(problem.train, problem.val, problem.test, whole)),
            "ours": lambda: _classes(logistic.predict(problem.train, problem.val, problem.test)),
            "ours, linear heads by descent": lambda: _classes(linear.predict(problem.train, problem.val, problem.test)),
        },
        n_turns,
        MOST_SECONDS_RATIO,
    )


def measure_ridge(size: Size, n_turns: int) -> list[Row]:
    """The same penalties; theirs is chosen by the error on samples left out, ours by generalised cross-validation."""
    problem = Problem.of(size)
    calls = {
        "scikit-learn": lambda: _scikit_ridge(problem),
        "ours": lambda: _classes(ridge.predict(problem.train, None, problem.test)),
    }
    return _rows("ridge", size, problem, calls, n_turns)


def measure_knn(size: Size, n_turns: int) -> list[Row]:
    """The same neighbours with the same weights."""
    problem = Problem.of(size)
    calls = {
        "scikit-learn": lambda: _scikit_knn(problem),
        "ours": lambda: _classes(knn.predict(problem.train, None, problem.test)),
    }
    return _rows("knn", size, problem, calls, n_turns)


SECTIONS: dict[str, Callable[[Size, int], list[Row]]] = {
    "logistic": measure_logistic,
    "ridge": measure_ridge,
    "knn": measure_knn,
}


def _rows(
    section: str,
    size: Size,
    problem: Problem,
    calls: dict[str, Callable[[], Tensor | np.ndarray]],
    n_turns: int,
    most_ratio: float | None = None,
) -> list[Row]:
    """Seconds and accuracy of each call; the first of them is the yardstick, targets are for the one named "ours"."""
    from threadpoolctl import threadpool_limits

    accuracy: dict[str, float] = {}

    def measured(name: str) -> Callable[[], None]:
        def call() -> None:
            accuracy[name] = problem.accuracy(calls[name]())

        return call

    with threadpool_limits(1):
        seconds = best_processor_seconds({name: measured(name) for name in calls}, n_turns)
    yardstick = next(iter(calls))
    rows = []
    for name in calls:
        ratio, is_ours = seconds[name] / seconds[yardstick], name == "ours"
        rows.append(
            Row(section, f"{size}: {name}", seconds[name], "s", ratio, most_ratio=most_ratio if is_ours else None)
        )
    rows += [Row(section, f"{size}: accuracy, {name}", accuracy[name], "%") for name in calls]
    apart = abs(accuracy["ours"] - accuracy[yardstick])
    return [*rows, Row(section, f"{size}: accuracy apart", apart, "points", most=MOST_POINTS)]


def _classes(prediction: Prediction) -> Tensor:
    return prediction.classes()


def _scikit_logistic(problem: Problem, tolerance: float) -> np.ndarray:
    """Fitted from scratch for each penalty, until no part of the gradient of the mean loss is above `tolerance`."""
    from sklearn.linear_model import LogisticRegression

    train, val, test = problem.standardised()
    labels, val_labels = problem.train.targets.numpy(), problem.val.targets.numpy()
    best, predicted = -1.0, np.empty(0)
    for value in logistic.Config().lambdas:
        with warnings.catch_warnings(action="ignore"):  # that it is not converged after so many steps
            fit = LogisticRegression(C=1 / (value * len(train)), tol=tolerance, max_iter=5000).fit(train, labels)
        found = float((fit.predict(val) == val_labels).mean())
        if found > best:
            best, predicted = found, fit.predict(test)
    return predicted


def _scikit_ridge(problem: Problem) -> np.ndarray:
    from sklearn.linear_model import RidgeCV

    train, _, test = problem.standardised()
    targets = 2.0 * np.eye(problem.train.n_classes)[problem.train.targets.numpy()] - 1.0  # [N, K]
    penalties = np.array(ridge.Config().lambdas) * len(train)
    scores: np.ndarray = RidgeCV(alphas=penalties).fit(train, targets).predict(test)
    return scores.argmax(1)


def _scikit_knn(problem: Problem) -> np.ndarray:
    from sklearn.neighbors import KNeighborsClassifier

    cfg = knn.Config()
    fit = KNeighborsClassifier(
        cfg.n_neighbors, weights=lambda distance: np.exp(-distance / cfg.temperature), metric="cosine"
    ).fit(problem.train.features.double().numpy(), problem.train.targets.numpy())
    predicted: np.ndarray = fit.predict(problem.test.double().numpy())
    return predicted
