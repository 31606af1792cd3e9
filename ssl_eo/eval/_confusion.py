"""Confusion matrices: rows are true classes, columns predicted ones.

M images, H W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_alike", "check_classes", "image_confusions", "rates", "shared_scores"]


def image_confusions(predicted: Tensor, targets: Tensor, n_classes: int, ignore: int | None = None) -> Tensor:
    """Pixels by true and predicted class of each image, `[M, K, K]` int64, from integer maps `[M, H, W]`.

    Pixels whose target is `ignore` do not count. Raises `ValueError` for a class that is not one of the K.
    """
    check_alike(3, "[M, H, W]", predicted=predicted, targets=targets)
    counts = torch.ones_like(targets, dtype=torch.bool) if ignore is None else targets != ignore
    true, found = targets[counts].long(), predicted[counts].long()  # [n pixels]
    check_classes("targets", true, n_classes)
    check_classes("predicted", found, n_classes)
    m, n_cells = len(targets), n_classes * n_classes
    image = torch.arange(m, device=targets.device)[:, None, None].expand_as(targets)[counts]
    cells = image * n_cells + true * n_classes + found
    return torch.bincount(cells, minlength=m * n_cells).view(m, n_classes, n_classes)


def rates(confusion: Tensor) -> dict[str, Tensor]:
    """A table of classes, columns `[K]` float64, of a matrix `[K, K]` float64; 0 / 0 is nan."""
    hits, support, n_predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    either = support + n_predicted
    return {
        "support": support,
        "recall": hits / support,
        "precision": hits / n_predicted,
        "f1": 2 * hits / either,
        "iou": hits / (either - hits),
    }


def shared_scores(confusion: Tensor, table: dict[str, Tensor]) -> dict[str, float]:
    """What classes of samples and classes of pixels are both scored by; `table` is `rates(confusion)`."""
    return {
        "accuracy": float(confusion.trace() / confusion.sum()),
        "macro_accuracy": float(table["recall"].nanmean()),
        "macro_f1": float(table["f1"].nanmean()),
    }


def check_alike(n_dims: int, shape: str, **tensors: Tensor) -> None:
    shapes = {name: [*tensor.shape] for name, tensor in tensors.items()}
    if any(len(found) != n_dims or found != next(iter(shapes.values())) for found in shapes.values()):
        raise ValueError(f"{' and '.join(tensors)} must be {shape} alike, got {shapes}")


def check_classes(name: str, classes: Tensor, n_classes: int) -> None:
    if classes.is_floating_point() or classes.is_complex():
        raise ValueError(f"{name} must be integers, got {classes.dtype}")
    if classes.numel() and (int(classes.min()) < 0 or int(classes.max()) >= n_classes):
        raise ValueError(
            f"{name} must be classes from 0 to {n_classes - 1}, found {int(classes.min())} to {int(classes.max())}"
        )
