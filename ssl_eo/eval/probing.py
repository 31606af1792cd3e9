"""Probes on features: fitted on one split, chosen on another, scored on a third.

N training samples, M test samples, F features, K classes, H W pixels, h w patches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ssl_eo.eval.dense import class_fractions, pixel_confusions, sampled_rows
from ssl_eo.eval.features import ALL_TAPS, FeatureSet
from ssl_eo.eval.metrics import Classified, MultiLabelled, Outcome, Regressed, Segmented
from ssl_eo.eval.probes import Labelled, Prediction, build_config, find_probe
from ssl_eo.eval.splits import Shown
from ssl_eo.seeding import torch_generator

__all__ = ["Probed", "Probing"]

_MAX_PATCHES = 100_000  # of a split that a probe of patches is fitted or chosen on


@dataclass(frozen=True)
class Probed:
    """What a probe came to on the test samples, what it chose, and how long it took."""

    outcome: Outcome
    chosen: dict[str, float]
    n_features: int
    n_train: int  # rows that it was fitted on: samples, or patches
    seconds: float


class Probing:
    """Features of the splits of a task, on which any number of probes are run.

    `no_data` are the classes of a segmentation that stand for "no data".
    """

    def __init__(
        self, shown: Shown, train: FeatureSet, val: FeatureSet | None, test: FeatureSet, no_data: tuple[int, ...] = ()
    ) -> None:
        self._shown, self._train, self._val, self._test = shown, train, val, test
        self._no_data = no_data
        self._labelled = cache(self._label)

    @property
    def taps(self) -> list[str]:
        """Where features were read; several also side by side."""
        names = list(self._train.taps)
        return [*names, ALL_TAPS] if len(names) > 1 else names

    def run(self, name: str, tap: str, options: Mapping[str, Any] | None = None) -> Probed:
        """The probe `name` of `ssl_eo.eval.probes`, with `options` of its `Config`, on the features read at `tap`."""
        start = time.perf_counter()
        train = self._labelled(tap, "train")
        val = None if self._val is None else self._labelled(tap, "val")
        test = self._test.at(tap).flatten(0, -2)  # [M, F], or [M*h*w, F]
        prediction = find_probe(name).predict(train, val, test, build_config(name, options or {}))
        outcome = self._outcome(prediction)
        seconds = time.perf_counter() - start
        return Probed(outcome, prediction.chosen, test.shape[1], len(train), seconds)

    def _label(self, tap: str, split: str) -> Labelled:
        shown = self._shown
        features_of = self._train if split == "train" else self._val
        assert features_of is not None
        features, targets = features_of.at(tap), features_of.labels
        groups = _numbered(features_of.groups).to(features.device)
        if shown.kind == "segmentation":
            n_images, h, w = features.shape[:3]
            targets = class_fractions(targets, (h, w), shown.n_classes, shown.ignore)  # [N*h*w, K]
            generator = torch_generator(shown.seed, "patches", shown.task, split)
            rows = sampled_rows(n_images, h * w, _MAX_PATCHES, generator).to(features.device)
            features, targets = features.flatten(0, 2)[rows], targets[rows]
            groups = groups.repeat_interleave(h * w)[rows]
        n_classes = 1 if shown.kind == "regression" else shown.n_classes
        return Labelled(features, targets, shown.kind, n_classes, groups)

    def _outcome(self, prediction: Prediction) -> Outcome:
        shown, labels = self._shown, self._test.labels.cpu()
        if shown.kind == "classification":
            probabilities = prediction.probabilities
            probabilities = None if probabilities is None else probabilities.cpu()
            return Classified(prediction.classes().cpu(), labels, shown.n_classes, probabilities)
        if shown.kind == "multilabel":
            return MultiLabelled(prediction.scores.cpu(), prediction.positive().cpu(), labels)
        if shown.kind == "regression":
            return Regressed(prediction.scores[:, 0].cpu(), labels)
        grid = next(iter(self._test.taps.values())).shape[1:3]
        confusions = pixel_confusions(
            prediction.scores, self._test.labels, (grid[0], grid[1]), shown.n_classes, shown.ignore
        )
        return Segmented(confusions.cpu(), self._no_data)


def _numbered(groups: Sequence[str]) -> Tensor:
    """A number for each name, `[N]` int64."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups], dtype=torch.long)
