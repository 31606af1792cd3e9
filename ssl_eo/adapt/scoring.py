"""From logits, batch after batch, to what metrics take.

B images, K outputs, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_eo.eval.metrics import Classified, MultiLabelled, Outcome, Regressed, Segmented, image_confusions
from ssl_eo.eval.splits import Shown

__all__ = ["Scorer"]


class Scorer:
    """Collects predictions. Of maps only the confusion matrix of each image is kept.

    A class of several is predicted where its probability is above a half.
    """

    def __init__(self, shown: Shown, no_data: tuple[int, ...] = ()) -> None:
        self._shown, self._no_data = shown, no_data
        self._predicted: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """`logits [B, K]` or `[B, K, H, W]`, of regression `[B, 1]` in the unit of labels; and the labels of a kind."""
        shown = self._shown
        if shown.kind == "segmentation":
            found = image_confusions(logits.argmax(1), labels, shown.n_classes, shown.ignore)  # [B, K, K]
            self._predicted.append(found.cpu())
            return
        self._predicted.append(logits.float().cpu())
        self._labels.append(labels.cpu())

    def outcome(self) -> Outcome:
        """Of all that was added."""
        predicted, kind = torch.cat(self._predicted), self._shown.kind
        if kind == "segmentation":
            return Segmented(predicted, self._no_data)
        labels = torch.cat(self._labels)
        if kind == "classification":
            return Classified(predicted.argmax(1), labels, self._shown.n_classes, predicted.softmax(1))
        if kind == "multilabel":
            return MultiLabelled(predicted, predicted > 0, labels)
        return Regressed(predicted[:, 0], labels)
