"""What a probe is given, what it gives back, and what several of them share.

A probe is a module of this package with `KINDS`, the kinds of targets that it takes, `Config`, its options with
defaults that suit all encoders, and

    fit(train: Labelled, val: Labelled | None, cfg: Config | None = None) -> Fitted
    predict(train: Labelled, val: Labelled | None, test: Tensor, cfg: Config | None = None) -> Prediction

of which the second is the first and what it predicts for `test` `[M, D]`. No test sample takes part in any choice, and
none has a say in the prediction of another, so any number of them may be predicted at once.

N training samples, V validation samples, M test samples, D features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ssl_eo.eval._rankings import Rankings
from ssl_eo.eval.kinds import Kind
from ssl_eo.seeding import torch_generator

__all__ = [
    "Fitted",
    "Labelled",
    "Prediction",
    "Standardiser",
    "check_inputs",
    "held_out",
    "hold_out",
    "indicators",
    "is_at_edge",
    "is_at_optimum",
    "mean_response",
    "selection_score",
]

_SUM_TOLERANCE = 1e-2  # of the fractions of a row, which may have been stored in 16 bits
_HELD_OUT_EVERY = 10  # a tenth is held out where there is no validation set


@dataclass(frozen=True, eq=False)
class Labelled:
    """Features with their targets, checked.

    Raises `ValueError` where shapes, or values of targets, do not fit `kind`, and where a feature is nan or infinite.
    """

    features: Tensor  # [N, D], any float type
    targets: Tensor  # see ssl_eo.eval.kinds; [N] or [N, K]
    kind: Kind
    n_classes: int  # K; 1 for regression
    groups: Tensor | None = None  # [N] int64, the place of each sample; None: each has its own

    def __post_init__(self) -> None:
        check_features("features", self.features)
        if len(self.targets) != len(self.features) or len(self.features) == 0:
            raise ValueError(f"features and targets have {len(self.features)} and {len(self.targets)} rows: give pairs")
        if self.groups is not None and self.groups.shape != (len(self.features),):
            raise ValueError(f"groups must be one number for each of {len(self.features)} rows: give pairs")
        per_class = self.kind in ("multilabel", "segmentation")
        expected = [len(self.features), self.n_classes] if per_class else [len(self.features)]
        if list(self.targets.shape) != expected:
            raise ValueError(f"targets of {self.kind} must have the shape {expected}, got {list(self.targets.shape)}")
        wrong = _wrong_targets(self)
        if wrong is not None:
            raise ValueError(f"targets of {self.kind} {wrong}")

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, index: Tensor) -> Labelled:
        """The samples at `index`, positions or a mask."""
        groups = None if self.groups is None else self.groups[index]
        return replace(self, features=self.features[index], targets=self.targets[index], groups=groups)


@dataclass(frozen=True, eq=False)
class Prediction:
    """`scores` of test samples, the larger the likelier; minus infinity where the probe rules a class out."""

    scores: Tensor  # [M, K]; [M, 1] for regression, in the unit of the targets
    probabilities: Tensor | None  # [M, K], where the probe has an idea of them
    threshold: float  # several labels a sample: a class whose score is above it is predicted
    chosen: dict[str, float]  # what was selected, by name

    def classes(self) -> Tensor:
        """The class of the highest score, `[M]`; the first of equal ones."""
        return self.scores.argmax(1)

    def positive(self) -> Tensor:
        """The classes whose score is above the threshold, `[M, K]` bool."""
        return self.scores > self.threshold


@dataclass(frozen=True, eq=False)
class Fitted:
    """A probe that has been fitted: from features `[M, D]` to predictions; for the rest see `Prediction`."""

    scores: Callable[[Tensor], Tensor]  # features [M, D] -> [M, K]
    probabilities: Callable[[Tensor], Tensor] | None  # scores [M, K] -> [M, K], where the probe has an idea of them
    threshold: float
    chosen: dict[str, float]
    n_features: int  # D

    def predict(self, features: Tensor) -> Prediction:
        """Raises `ValueError` where `features [M, D]` are not those of samples like the ones it was fitted on."""
        check_features("test", features)
        _check_width("test", features, self.n_features)
        scores = self.scores(features)
        probabilities = None if self.probabilities is None else self.probabilities(scores)
        return Prediction(scores, probabilities, self.threshold, self.chosen)


class Standardiser:
    """Subtracts the means of the features that it is made of and divides by their standard deviations."""

    mean: Tensor  # [D] float64
    inverse_std: Tensor  # [D] float64, 0 for constant features, which so become 0

    def __init__(self, features: Tensor) -> None:
        x = features.double()  # [N, D]
        self.mean, std = x.mean(0), x.std(0, correction=0)
        # A feature whose spread is rounding noise carries nothing: dividing by it would turn the noise into a signal.
        constant = std <= 1e-7 * x.square().mean(0).sqrt()
        self.inverse_std = torch.where(constant, 0.0, 1.0 / std.clamp_min(torch.finfo(x.dtype).tiny))

    def __call__(self, features: Tensor) -> Tensor:
        """`[M, D]` float64 of `features [M, D]`."""
        return (features.double() - self.mean) * self.inverse_std


def check_features(name: str, features: Tensor) -> None:
    """Raise `ValueError` unless `features` are a matrix of finite floats."""
    if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise ValueError(
            f"{name} must be [N, D] of a float type, with D > 0; got {list(features.shape)} of {features.dtype}"
        )
    n_bad = int((~features.isfinite()).any(1).sum())
    if n_bad:
        raise ValueError(
            f"{name}: {n_bad} of {len(features)} rows hold nan or infinity; look at the encoder's output, a probe of"
            " what is left would flatter it"
        )


def check_inputs(probe: str, kinds: Sequence[Kind], train: Labelled, val: Labelled | None) -> None:
    """Raise `ValueError` where `probe` does not take this kind, or where the sets do not fit each other."""
    if train.kind not in kinds:
        raise ValueError(f"the probe {probe} does not take {train.kind}; it takes {', '.join(kinds)}")
    if val is not None and (val.kind, val.n_classes) != (train.kind, train.n_classes):
        raise ValueError(
            f"val has {val.n_classes} classes of {val.kind}, train has {train.n_classes} of {train.kind}: give the same"
        )
    if val is not None:
        _check_width("val", val.features, train.features.shape[1])


def _check_width(name: str, features: Tensor, n_features: int) -> None:
    if features.shape[1] != n_features:
        raise ValueError(f"{name} has {features.shape[1]} features a sample, train has {n_features}: give the same")


def indicators(train: Labelled) -> Tensor:
    """Targets as numbers, `[N, K]` float64: 1 for a class that a sample has, fractions, or the value to predict."""
    if train.kind == "classification":
        one_hot: Tensor = functional.one_hot(train.targets.long(), train.n_classes)
        return one_hot.double()
    return train.targets.double().reshape(len(train), -1)


def mean_response(kind: Kind, scores: Tensor) -> Tensor:
    """What a generalised linear model expects at `scores [..., K]`: probabilities, or for regression the scores."""
    if kind == "regression":
        return scores
    return scores.sigmoid() if kind == "multilabel" else scores.softmax(-1)


def hold_out(train: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    """(nine tenths, the tenth that is `held_out`), of the address `seed`."""
    groups = range(len(train)) if train.groups is None else train.groups.tolist()
    classes = train.targets.cpu() if train.kind == "classification" else None
    held = held_out(groups, classes, seed).to(train.features.device)
    return train.rows(~held), train.rows(held)


def held_out(groups: Sequence[Hashable], classes: Tensor | None, seed: int) -> Tensor:
    """Which samples are held out, `[N]` bool: a random tenth of the address `seed`; of each of `classes [N]` its share.

    A tenth of the places, `groups` of N samples, where samples share them: what chooses is not to know the neighbour.
    The class of a place is then that of one of its samples. Raises `ValueError` where there is one place alone.
    """
    n = len(groups)
    if n < 2:
        raise ValueError("train has one sample, of which nothing can be held out: give val")
    places: dict[Hashable, int] = {}
    place_of = torch.tensor([places.setdefault(group, len(places)) for group in groups])  # [N]
    n_places = len(places)
    if n_places < 2:
        raise ValueError(f"the {n} samples of train share one place, of which nothing can be held out: give val")
    order = torch.randperm(n, generator=torch_generator(seed, "held out"))
    turns = torch.full((n_places,), n).scatter_reduce(0, place_of[order], torch.arange(n), "amin")
    first = order[turns.sort().values]  # the sample of each place that comes first
    if classes is not None:
        first = first[classes[first].argsort(stable=True)]
    chosen = first[min(_HELD_OUT_EVERY, n_places) // 2 :: _HELD_OUT_EVERY]
    return torch.isin(place_of, place_of[chosen])


def is_at_edge(value: float, grid: Sequence[float]) -> float:
    """1 where `value` is the least or the greatest of several in `grid`: a wider one may hold a better. Else 0."""
    return float(len(grid) > 1 and value in (min(grid), max(grid)))


def is_at_optimum(chosen: Mapping[str, float]) -> bool:
    """Whether the fit that `chosen` is of came to its end; probes that have no other say nothing."""
    return chosen.get("converged", 1.0) == 1.0


def selection_score(scores: Tensor, val: Labelled) -> float:
    """How good `scores [V, K]` are, the higher the better: what options are chosen by. Minus infinity for nan.

    Accuracy; micro average precision of several labels; the part of all pixels whose class is that predicted for their
    patch; minus the mean squared error.
    """
    if bool(scores.isnan().any()):
        return -math.inf
    if val.kind == "classification":
        return float((scores.argmax(1) == val.targets.to(scores.device)).double().mean())
    targets = val.targets.to(scores.device)
    if val.kind == "multilabel":
        all_scores, all_targets = scores.flatten()[None].cpu(), targets.flatten()[None].cpu()  # [1, V*K]
        ranking = Rankings.of(all_scores, all_targets, torch.zeros_like(all_targets, dtype=torch.long))
        found = float(ranking.average_precision(torch.ones(1, dtype=torch.float64)))
        if math.isnan(found):
            raise ValueError("none of the samples that options are chosen on has a label: give a larger val, or train")
        return found
    if val.kind == "segmentation":
        hit = targets.double().gather(1, scores.argmax(1, keepdim=True)).sum()
        return float(hit / targets.double().sum())
    return -float((scores[:, 0].double() - targets.double()).square().mean())


def _wrong_targets(labelled: Labelled) -> str | None:
    """What is wrong with the values of the targets, or None."""
    targets, n_classes = labelled.targets, labelled.n_classes
    if labelled.kind == "regression":
        if n_classes != 1:
            return f"are one number a sample: n_classes must be 1, got {n_classes}"
        return None if bool(targets.isfinite().all()) else "hold nan or infinity: leave such samples out"
    if labelled.kind == "classification":
        if targets.is_floating_point() or int(targets.min()) < 0 or int(targets.max()) >= n_classes:
            found = f"{targets.dtype} from {targets.min()} to {targets.max()}"
            return f"must be integers from 0 to {n_classes - 1}, got {found}"
        return None
    if labelled.kind == "multilabel":
        return None if bool(((targets == 0) | (targets == 1)).all()) else "must be 0 or 1; found other values"
    fits = (targets.double().sum(1) - 1).abs() <= _SUM_TOLERANCE  # [N]
    if bool((targets >= 0).all()) and bool(fits.all()):
        return None
    return f"must be fractions with the sum 1: leave out what is not labelled; got {targets[~fits][:1].tolist()}"
