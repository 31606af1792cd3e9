"""Probes on features: fitted on one split, chosen on another, scored on a third.

N training samples, M test samples, F features, K classes, H W pixels, h w patches, P patches that are kept of each
sample, R rows (samples, or patches).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ssl_eo.eval.dense import PatchDraw, class_fractions, patches_of_each, pixel_confusions
from ssl_eo.eval.features import ALL_TAPS, FeatureSet
from ssl_eo.eval.metrics import Classified, MultiLabelled, Outcome, Regressed, Segmented
from ssl_eo.eval.probes import Fitted, Labelled, Prediction, build_config, find_probe
from ssl_eo.eval.splits import Shown
from ssl_eo.seeding import derive_seed

__all__ = ["Part", "Probed", "Probing", "draw_of"]

T = TypeVar("T")

_ROWS_AT_ONCE = 4096  # that are predicted; of patches, those of whole images, of one at least


@dataclass(frozen=True, eq=False)
class Part:
    """The training samples that probes are fitted on, by their positions. Equal only to itself."""

    rows: Sequence[int]


@dataclass(frozen=True)
class Probed:
    """What a probe came to on the test samples, what it chose, and how long it took."""

    outcome: Outcome
    chosen: dict[str, float]
    n_features: int
    n_fitted: int  # samples, or labelled patches, that it was fitted on in the end
    seconds: float


def draw_of(shown: Shown, split: str, n_images: int) -> PatchDraw | None:
    """What of the patches of `split` is enough for probes that are fitted on `n_images` of it, or more; None where none
    are asked for.
    """
    if shown.kind != "segmentation":
        return None
    return PatchDraw(patches_of_each(n_images), shown.ignore, derive_seed(shown.seed, shown.task, split))


class _Rows(NamedTuple):
    """Rows of a feature set with what is to be read off them."""

    at: Tensor  # [R]
    targets: Tensor  # [R] or [R, K]
    groups: Tensor  # [R] int64


class _Latest(Generic[T]):
    """What was asked for last, and nothing before it."""

    def __init__(self) -> None:
        self._key: Any = None
        self._found: list[T] = []

    def of(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` says of `key`."""
        if self._key != key or not self._found:
            self._found.clear()  # first: both need not be in memory
            self._found.append(make())
            self._key = key
        return self._found[0]


class Probing:
    """Features of the splits of a task, on which any number of probes are run.

    They are copied for one tap and one part of the training set at a time: whoever asks for several asks for what they
    have in common one after the other. `no_data` are the classes of a segmentation that stand for "no data".
    """

    def __init__(
        self, shown: Shown, train: FeatureSet, val: FeatureSet | None, test: FeatureSet, no_data: tuple[int, ...] = ()
    ) -> None:
        self._shown, self._train, self._val, self._test = shown, train, val, test
        self._no_data = no_data
        self._whole = Part(range(len(train)))
        self._rows_of_train: _Latest[_Rows] = _Latest()
        self._rows_of_val: _Latest[_Rows] = _Latest()
        self._fitted_on: _Latest[Labelled] = _Latest()
        self._chosen_on: _Latest[Labelled] = _Latest()

    @property
    def taps(self) -> list[str]:
        """Where features were read; several also side by side."""
        names = list(self._train.taps)
        return [*names, ALL_TAPS] if len(names) > 1 else names

    def run(self, name: str, tap: str, options: Mapping[str, Any] | None = None, part: Part | None = None) -> Probed:
        """The probe `name` of `ssl_eo.eval.probes`, with `options` of its `Config`, on the features read at `tap`.

        It is fitted on `part` of the training samples, unless given on all.
        """
        start = time.perf_counter()
        train = self._of_train(tap, part or self._whole)
        fitted = find_probe(name).fit(train, self._of_val(tap), build_config(name, options or {}))
        outcome = self._outcome(fitted, tap)
        seconds = time.perf_counter() - start
        return Probed(outcome, fitted.chosen, fitted.n_features, len(train), seconds)

    def _of_train(self, tap: str, part: Part) -> Labelled:
        rows = self._rows_of_train.of(part, lambda: self._rows("train", self._train, part.rows))
        return self._fitted_on.of((tap, part), lambda: self._labelled(self._train, tap, rows))

    def _of_val(self, tap: str) -> Labelled | None:
        if (val := self._val) is None:
            return None
        rows = self._rows_of_val.of(None, lambda: self._rows("val", val, range(len(val))))
        return self._chosen_on.of(tap, lambda: self._labelled(val, tap, rows))

    def _labelled(self, features: FeatureSet, tap: str, rows: _Rows) -> Labelled:
        n_classes = 1 if self._shown.kind == "regression" else self._shown.n_classes
        return Labelled(features.at(tap, rows.at), rows.targets, self._shown.kind, n_classes, rows.groups)

    def _rows(self, split: str, features: FeatureSet, samples: Sequence[int]) -> _Rows:
        """Those of `samples`: of maps, labelled patches, of each image at most the same number."""
        of_each = torch.tensor(samples, dtype=torch.long)
        targets, device = features.labels[of_each.to(features.labels.device)], features.labels.device
        groups = _numbered([features.groups[i] for i in samples])
        if self._shown.kind != "segmentation":
            return _Rows(of_each, targets, groups.to(device))
        assert features.grid is not None
        assert features.places is not None, "patches are drawn before they are kept"
        places, order = features.places[of_each, : patches_of_each(len(samples))].sort(1)  # [n, P]
        image, which = (places >= 0).nonzero(as_tuple=True)  # [R], [R]
        if not len(image):
            raise ValueError(f"task {self._shown.task}: none of the {len(samples)} images of {split} has a label")
        shares = class_fractions(targets, features.grid, self._shown.n_classes, self._shown.ignore)  # [n*h*w, K]
        of_patches = shares.view(len(samples), -1, shares.shape[1])[image.to(device), places[image, which].to(device)]
        rows = of_each[image] * features.places.shape[1] + order[image, which]
        return _Rows(rows, of_patches, groups[image].to(device))

    def _outcome(self, fitted: Fitted, tap: str) -> Outcome:
        if self._shown.kind == "segmentation":
            return self._segmented(fitted, tap)
        test, shown = self._test, self._shown
        parts = [fitted.predict(test.at(tap, rows)) for rows in torch.split(torch.arange(len(test)), _ROWS_AT_ONCE)]
        prediction, labels = _joined(parts), test.labels.cpu()
        if shown.kind == "classification":
            return Classified(prediction.classes(), labels, shown.n_classes, prediction.probabilities)
        if shown.kind == "multilabel":
            return MultiLabelled(prediction.scores, prediction.positive(), labels)
        return Regressed(prediction.scores[:, 0], labels)

    def _segmented(self, fitted: Fitted, tap: str) -> Segmented:
        test, shown, grid = self._test, self._shown, self._test.grid
        assert grid is not None
        assert test.places is None, "all pixels are scored"
        n_patches = grid[0] * grid[1]
        found = []
        for images in torch.split(torch.arange(len(test)), max(1, _ROWS_AT_ONCE // n_patches)):
            rows = (images[:, None] * n_patches + torch.arange(n_patches)).flatten()  # [m*h*w]
            scores = fitted.predict(test.at(tap, rows)).scores
            labels = test.labels[images.to(test.labels.device)]
            found.append(pixel_confusions(scores, labels, grid, shown.n_classes, shown.ignore).cpu())
        return Segmented(torch.cat(found), self._no_data)


def _joined(parts: Sequence[Prediction]) -> Prediction:
    """Predictions of samples that were asked for one after the other, on the CPU."""
    probabilities = [part.probabilities for part in parts if part.probabilities is not None]
    scores = torch.cat([part.scores for part in parts]).cpu()
    every = torch.cat(probabilities).cpu() if probabilities else None
    return Prediction(scores, every, parts[0].threshold, parts[0].chosen)


def _numbered(groups: Sequence[str]) -> Tensor:
    """A number for each name, `[N]` int64."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups], dtype=torch.long)
