"""How right predictions are, and for which classes: one outcome for each kind of targets.

Harnesses give different numbers one name ("mIoU", "mAcc"), so each convention has a key of its own here. What a metric
leaves undefined (no sample, no class, no spread) is nan and never 0.

Every score takes weights, how often each sample counts, because a bootstrap asks for a thousand of them: what does not
depend on the weights (cells of the confusion matrix, rankings) is computed once, in float64 on the CPU.

M samples or images, H W pixels, K classes, C cells of a confusion matrix (K * K).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ssl_eo.eval._confusion import check_alike, check_classes, image_confusions, rates, shared_scores
from ssl_eo.eval._metric_facts import (
    HEADLINE,
    HIGHER_IS_BETTER,
    METRICS,
    best_of,
    has_intervals,
    in_unit,
    is_possible,
    is_ratio,
    metric_text,
    number_text,
    score_text,
)
from ssl_eo.eval._rankings import Rankings

__all__ = [
    "HEADLINE",
    "HIGHER_IS_BETTER",
    "METRICS",
    "Classified",
    "MultiLabelled",
    "Outcome",
    "Regressed",
    "Segmented",
    "best_of",
    "has_intervals",
    "image_confusions",
    "in_unit",
    "is_possible",
    "is_ratio",
    "metric_text",
    "number_text",
    "score_text",
]

_N_BINS = 15  # of the top probability, for the calibration error


class Outcome(Protocol):
    """What was predicted for M samples, beside the truth."""

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def scores(self, weights: Tensor | None = None) -> dict[str, float]:
        """Each metric by its key. `weights [M]` >= 0: how often each sample counts; absent: once."""
        ...

    def per_class(self) -> dict[str, Tensor]:
        """Columns `[K]` of a table of classes: `support` int64, the others float64; none where there are no classes."""
        ...


@dataclass(frozen=True, eq=False)
class Classified:
    """One class a sample.

    - `accuracy`: of samples (micro)
    - `macro_accuracy`: mean of the recall of classes present in the labels (balanced accuracy)
    - `macro_f1`, `weighted_f1`: mean over classes in labels or predictions, and weighted by support
    - `kappa`: agreement beyond chance (Cohen 1960); nan where labels and predictions are all of one class
    - `worst_class_recall`: the least recall of a class present in the labels
    - `ece`: expected calibration error of the top probability in 15 equal bins, each open below and closed above (Guo
      et al. 2017, section 2); only with probabilities
    """

    predicted: Tensor  # [M], class index
    labels: Tensor  # [M], class index
    n_classes: int
    probabilities: Tensor | None = None  # [M, K], rows sum to 1 and are greatest at `predicted`

    def __post_init__(self) -> None:
        check_alike(1, "[M]", predicted=self.predicted, labels=self.labels)
        check_classes("predicted", self.predicted, self.n_classes)
        check_classes("labels", self.labels, self.n_classes)
        if self.probabilities is not None:
            self._check_probabilities(self.probabilities)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def confusion(self) -> Tensor:
        """`[K, K]` int64: rows are true classes, columns predicted ones."""
        return self._confusion(torch.ones(len(self), dtype=torch.float64)).long()

    def scores(self, weights: Tensor | None = None) -> dict[str, float]:
        w = _weights(weights, len(self))
        confusion = self._confusion(w)
        table = rates(confusion)
        support = table["support"]
        n, chance = support.sum(), support @ confusion.sum(0)
        recall = table["recall"][support > 0]
        scores = {
            **shared_scores(confusion, table),
            "weighted_f1": float((support * table["f1"]).nansum() / n),
            "kappa": float((n * confusion.trace() - chance) / (n * n - chance)),
            "worst_class_recall": float(recall.min()) if len(recall) else float("nan"),
        }
        if self.probabilities is not None:
            bins, gaps = self._calibration
            scores["ece"] = float(torch.bincount(bins, weights=w * gaps).abs().sum() / n)
        return scores

    def per_class(self) -> dict[str, Tensor]:
        """`support`, `recall`, `precision`, `f1`, `iou`; nan where no sample of the class is in the denominator."""
        return _columns(self.confusion)

    @cached_property
    def _cells(self) -> Tensor:
        return (self.labels.long() * self.n_classes + self.predicted.long()).cpu()  # [M]

    @cached_property
    def _calibration(self) -> tuple[Tensor, Tensor]:
        """Bin of each sample `[M]`, and by how much being right exceeds the probability of it `[M]`."""
        assert self.probabilities is not None
        confidence = self.probabilities.cpu().double().amax(1)  # [M]
        edges = torch.linspace(0, 1, _N_BINS + 1, dtype=torch.float64)
        # Bins hold (edge, next edge]; rounding may put a probability beyond the first or the last of them.
        bins = (torch.bucketize(confidence, edges) - 1).clamp(0, _N_BINS - 1)
        return bins, (self.predicted == self.labels).cpu().double() - confidence

    def _confusion(self, weights: Tensor) -> Tensor:
        k = self.n_classes
        return torch.bincount(self._cells, weights=weights, minlength=k * k).view(k, k)  # [K, K]

    def _check_probabilities(self, probabilities: Tensor) -> None:
        if probabilities.shape != (len(self), self.n_classes):
            raise ValueError(
                f"probabilities must be [M, K], [{len(self)}, {self.n_classes}], got {[*probabilities.shape]}"
            )
        totals = probabilities.sum(1)
        if not bool(((probabilities >= 0).all(1) & ((totals - 1).abs() < 1e-3)).all()):
            raise ValueError("probabilities must be at least 0 and sum to 1 in every row; pass none for other scores")
        at_predicted = probabilities.gather(1, self.predicted.long()[:, None])[:, 0]  # [M]
        if bool((at_predicted < probabilities.amax(1) - 1e-6).any()):
            raise ValueError(
                "predicted is not the class of greatest probability in every row: both must be of one probe"
            )


@dataclass(frozen=True, eq=False)
class MultiLabelled:
    """Any number of classes a sample.

    - `f1_micro`: over all pairs of sample and class
    - `f1_macro`: mean over classes in targets or predictions
    - `map_micro`: average precision over all pairs, ranked together; equal scores are one step of the ranking, so that
      their order does not matter
    - `map_macro`: mean of the average precision of each class with a target
    - `f1_macro_all`, `map_macro_all`: means over all K, the other classes count 0 (torchmetrics and scikit-learn)
    - `subset_accuracy`: samples with every class right
    """

    class_scores: Tensor  # [M, K], the larger the likelier, on one scale for all classes
    positive: Tensor  # [M, K] bool, classes that are predicted
    targets: Tensor  # [M, K], 0 or 1

    def __post_init__(self) -> None:
        check_alike(2, "[M, K]", class_scores=self.class_scores, positive=self.positive, targets=self.targets)
        if self.positive.dtype != torch.bool:
            raise ValueError(f"positive must be bool, got {self.positive.dtype}; compare scores with a threshold")
        if not bool(((self.targets == 0) | (self.targets == 1)).all()):
            raise ValueError("targets of several labels must be 0 or 1; found other values")
        if bool(self.class_scores.isnan().any()):
            raise ValueError("class_scores hold nan, which has no place in a ranking")

    def __len__(self) -> int:
        return len(self.targets)

    def scores(self, weights: Tensor | None = None) -> dict[str, float]:
        w = _weights(weights, len(self))
        hits, support, n_predicted, n_exact = self._sums(w)
        f1 = 2 * hits / (support + n_predicted)  # [K]
        precision = self._each_class.average_precision(w)  # [K]
        return {
            "f1_micro": float(2 * hits.sum() / (support + n_predicted).sum()),
            "f1_macro": float(f1.nanmean()),
            "f1_macro_all": _mean_of_all(f1, w),
            "map_micro": float(self._all_pairs.average_precision(w)),
            "map_macro": float(precision.nanmean()),
            "map_macro_all": _mean_of_all(precision, w),
            "subset_accuracy": float(n_exact / w.sum()),
        }

    def per_class(self) -> dict[str, Tensor]:
        """`support`, `recall`, `precision`, `f1`, `average_precision`; nan where the denominator is 0."""
        once = torch.ones(len(self), dtype=torch.float64)
        hits, support, n_predicted, _ = self._sums(once)
        return {
            "support": support.long(),
            "recall": hits / support,
            "precision": hits / n_predicted,
            "f1": 2 * hits / (support + n_predicted),
            "average_precision": self._each_class.average_precision(once),
        }

    def _sums(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """True positives, targets and predictions, each `[K]`, and samples that are right in every class `[]`."""
        k = self.targets.shape[1]
        sums = weights @ self._counted
        return sums[:k], sums[k : 2 * k], sums[2 * k : 3 * k], sums[-1]

    @cached_property
    def _counted(self) -> Tensor:
        targets, positive = self.targets.bool().cpu(), self.positive.cpu()
        exact = (targets == positive).all(1, keepdim=True)
        return torch.cat([targets & positive, targets, positive, exact], 1).double()  # [M, 3 K + 1]

    @cached_property
    def _each_class(self) -> Rankings:
        samples = torch.arange(len(self)).expand(self.targets.shape[1], -1)  # [K, M]
        return Rankings.of(self.class_scores.T.cpu(), self.targets.T.cpu(), samples)

    @cached_property
    def _all_pairs(self) -> Rankings:
        samples = torch.arange(len(self))[:, None].expand(self.targets.shape)  # [M, K]
        pairs = (self.class_scores.cpu(), self.targets.cpu(), samples)
        return Rankings.of(*(t.reshape(1, -1) for t in pairs))  # [1, M * K]


@dataclass(frozen=True, eq=False)
class Segmented:
    """A class a pixel, counted image by image; the image is the sample.

    - `accuracy`: of pixels; `macro_accuracy`: mean of the recall of classes present in the targets
    - `macro_f1`: mean over classes in targets or predictions
    - `miou_present`: intersection over union of a class in all images together, mean over classes in targets or
      predictions (the macro Jaccard index of torchmetrics and scikit-learn)
    - `miou_all`: mean over all K, a class in neither counts 0 (as PANGAEA does)
    - `miou_valid`: as `miou_present`, without the pixels whose target is of a class `no_data` and without these classes
      in the mean; a pixel of another target that is predicted as one of them is an error of its target's class
    - `fwiou`: mean over classes weighted by pixels of the targets

    All but `miou_valid` take the classes `no_data` for classes like others, as published results do.
    """

    confusions: Tensor  # [M, K, K] int64, pixels of each image: rows are true classes, columns predicted ones
    no_data: tuple[int, ...] = ()  # classes that mean "unknown"

    def __post_init__(self) -> None:
        shape = [*self.confusions.shape]
        if self.confusions.ndim != 3 or shape[1] != shape[2] or self.confusions.dtype != torch.int64:
            raise ValueError(f"confusions must be [M, K, K] int64, got {shape} {self.confusions.dtype}")
        if bad := [c for c in self.no_data if not 0 <= c < shape[1]]:
            raise ValueError(f"no_data: classes must be from 0 to {shape[1] - 1}, found {bad}")

    def __len__(self) -> int:
        return len(self.confusions)

    @property
    def confusion(self) -> Tensor:
        """`[K, K]` int64, of all images."""
        return self.confusions.sum(0)

    def scores(self, weights: Tensor | None = None) -> dict[str, float]:
        k = self.confusions.shape[1]
        confusion = (_weights(weights, len(self)) @ self._pixels).view(k, k)  # [K, K]
        table = rates(confusion)
        iou, support = table["iou"], table["support"]
        valid = confusion.clone()
        valid[list(self.no_data)] = 0
        is_valid = torch.ones(k, dtype=torch.bool)
        is_valid[list(self.no_data)] = False
        return {
            **shared_scores(confusion, table),
            "miou_present": float(iou.nanmean()),
            "miou_all": _mean_of_all(iou, support),
            "miou_valid": float(rates(valid)["iou"][is_valid].nanmean()),
            "fwiou": float((support * iou).nansum() / support.sum()),
        }

    def per_class(self) -> dict[str, Tensor]:
        """`support` in pixels, `recall`, `precision`, `f1`, `iou`; nan where no pixel is in the denominator."""
        return _columns(self.confusion)

    @cached_property
    def _pixels(self) -> Tensor:
        return self.confusions.flatten(1).cpu().double()  # [M, C]


@dataclass(frozen=True, eq=False)
class Regressed:
    """A number a sample: `rmse` and `mae` in its unit, and `r2`, which is nan where all targets are equal."""

    predicted: Tensor  # [M]
    targets: Tensor  # [M]

    def __post_init__(self) -> None:
        check_alike(1, "[M]", predicted=self.predicted, targets=self.targets)
        for name, values in (("predicted", self.predicted), ("targets", self.targets)):
            if n_bad := int((~values.isfinite()).sum()):
                raise ValueError(f"{name}: {n_bad} of {len(values)} values are not finite")

    def __len__(self) -> int:
        return len(self.targets)

    def scores(self, weights: Tensor | None = None) -> dict[str, float]:
        w = _weights(weights, len(self))
        errors, targets = self._errors_and_targets
        n, squares = w.sum(), w @ errors.square()
        counted = targets[w > 0]
        varies = bool((counted != counted[:1]).any())  # a sum of squares about a rounded mean is not quite 0
        spread = w @ (targets - w @ targets / n).square()
        return {
            "rmse": float((squares / n).sqrt()),
            "mae": float(w @ errors.abs() / n),
            "r2": float(1 - squares / spread) if varies else float("nan"),
        }

    def per_class(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _errors_and_targets(self) -> tuple[Tensor, Tensor]:
        targets = self.targets.cpu().double()
        return self.predicted.cpu().double() - targets, targets


def _weights(weights: Tensor | None, n: int) -> Tensor:
    """`[M]` float64 on the CPU."""
    if weights is None:
        return torch.ones(n, dtype=torch.float64)
    if weights.shape != (n,) or not bool((weights >= 0).all()):
        raise ValueError(f"weights must be [{n}] and at least 0, got {[*weights.shape]}, least {weights.min()}")
    return weights.cpu().double()


def _mean_of_all(values: Tensor, counts: Tensor) -> float:
    """Of classes `[K]`, where an undefined one is 0; nan where nothing counts at all."""
    return float(values.nan_to_num(0.0).mean()) if bool(counts.any()) else float("nan")


def _columns(confusion: Tensor) -> dict[str, Tensor]:
    """The table of classes of a matrix `[K, K]` int64."""
    table = rates(confusion.cpu().double())
    return {**table, "support": table["support"].long()}
