"""Errors of each predicted value, of pixels and of classes, and their mean over samples that may lack values.

Values that are not valid take part neither in a value nor in a gradient: they are replaced before anything is computed
from them, since 0 * NaN is NaN and the gradient of a mean that leaves NaN out is NaN all the same.

B samples, N patches, E values of a patch, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["class_errors", "mean_of_samples", "pixel_errors"]


def pixel_errors(pred: Tensor, target: Tensor, valid: Tensor | None, kind: Literal["mse", "l1"]) -> Tensor:
    """Squared or absolute error of each value `[...]`; 0 where `valid [...]` is False."""
    if valid is None:
        error = pred - target
    else:
        error = torch.where(valid, pred - torch.where(valid, target, 0.0), 0.0)
    return error.square() if kind == "mse" else error.abs()


def class_errors(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of `logits [..., C]` with the class numbers `labels [...]`; 0 where `valid [...]` is False."""
    known = torch.where(valid, labels, 0)
    log_p = F.log_softmax(torch.where(valid[..., None], logits, 0.0), dim=-1)
    return torch.where(valid, -log_p.gather(-1, known[..., None])[..., 0], 0.0)


def mean_of_samples(errors: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over samples of the mean over a sample's values that count, and the share of samples that have any.

    `errors`, `counts` (bool): `[B, ...]`. A sample in which nothing counts adds 0, and the denominator is B all the
    same. So it does not depend on the data, and the mean over ranks or micro-batches is exactly the global loss; a
    modality that few samples have weighs as much less.
    """
    counts = counts.expand_as(errors).reshape(len(errors), -1)
    n = counts.sum(1)  # [B]
    sums = torch.where(counts, errors.reshape(len(errors), -1), 0.0).sum(1)
    return (sums / n.clamp(min=1)).mean(), (n > 0).to(errors.dtype).mean()
