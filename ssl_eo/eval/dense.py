"""Labels of pixels and features of patches: what a linear map of patch features knows of a segmentation.

A probe is fitted on labelled patches, those with at least one labelled pixel, of which the target is the part of each
class in the labelled pixels: on at most 100,000 of them, of every image at most the same number, drawn at random. It is
scored on all pixels: its scores for all patches are enlarged to the size of the labels (bilinear), and the class of the
highest one is predicted. No decoder is trained.

M images, H W pixels of the labels, h w patches, P patches that are kept of each image, K classes, F features, C bands,
p side of a cell in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ssl_eo.eval.metrics import image_confusions
from ssl_eo.seeding import derive_seed, uniforms

__all__ = ["PatchDraw", "class_fractions", "control_of_cells", "patches_of_each", "pixel_confusions"]

_MAX_FITTED = 100_000  # labelled patches of a split that a probe is fitted or chosen on
_CHUNK = 16  # images whose scores are enlarged at once


def patches_of_each(n_images: int) -> int:
    """How many labelled patches of each of so many images are fitted at most."""
    return max(1, _MAX_FITTED // max(1, n_images))


@dataclass(frozen=True)
class PatchDraw:
    """Which patches of each image are kept: at most `n_each` labelled ones, drawn by `seed` and the key of the image.

    A smaller number keeps the first of those that a larger one keeps.
    """

    n_each: int
    ignore: int | None
    seed: int

    def places(self, labels: Tensor, keys: Sequence[str], grid: tuple[int, int]) -> Tensor:
        """Positions in the grid `[M, P]`, P = min(n_each, h*w), of class maps `labels [M, H, W]`; -1 where an image has
        fewer labelled patches.
        """
        labelled = functional.adaptive_max_pool2d(_known(labels, self.ignore)[:, None].float(), grid)  # [M, 1, h, w]
        labelled = labelled.flatten(1).cpu() > 0  # [M, h*w]
        numbers = np.array([derive_seed(key) for key in keys], dtype=np.int64)
        turns = torch.from_numpy(uniforms(derive_seed(self.seed, "patches"), numbers, labelled.shape[1]))  # [M, h*w]
        order = turns.masked_fill(~labelled, torch.inf).argsort(dim=1, stable=True)[:, : self.n_each]  # [M, P]
        return order.masked_fill(~labelled.gather(1, order), -1)


def class_fractions(labels: Tensor, grid: tuple[int, int], n_classes: int, ignore: int | None) -> Tensor:
    """The part of each class in each patch, `[M*h*w, K]` float32, of class maps `labels [M, H, W]`.

    Pixels without a label do not count; a patch without any labelled pixel has zeros.
    """
    parts = []
    for chunk in torch.split(labels, _CHUNK):
        known = _known(chunk, ignore)
        one_hot = functional.one_hot(torch.where(known, chunk, 0).long(), n_classes)  # [m, H, W, K]
        shares = (one_hot * known[..., None]).movedim(-1, 1).float()  # [m, K, H, W]
        sums = functional.adaptive_avg_pool2d(shares, grid)  # [m, K, h, w]
        total = sums.sum(1, keepdim=True)
        parts.append(torch.where(total > 0, sums / total.clamp_min(1e-12), 0.0).movedim(1, -1).flatten(0, 2))
    return torch.cat(parts)


def pixel_confusions(
    scores: Tensor, labels: Tensor, grid: tuple[int, int], n_classes: int, ignore: int | None
) -> Tensor:
    """Confusion matrices `[M, K, K]` of pixels, from `scores [M*h*w, K]` of patches and maps `labels [M, H, W]`."""
    maps = scores.float().view(len(labels), *grid, n_classes).movedim(-1, 1)  # [M, K, h, w]
    parts = []
    for some, truth in zip(torch.split(maps, _CHUNK), torch.split(labels, _CHUNK), strict=True):
        size = (truth.shape[1], truth.shape[2])
        enlarged = functional.interpolate(some, size, mode="bilinear", align_corners=False)  # [m, K, H, W]
        parts.append(image_confusions(enlarged.argmax(1), truth.to(some.device), n_classes, ignore))
    return torch.cat(parts)


def control_of_cells(control: Callable[[Tensor], Tensor], side_px: int) -> Callable[[Tensor], Tensor]:
    """`control`, made for whole images, as a function of cells of `side_px`: `[B, C, H, W]` to `[B, h, w, F]`.

    What remains at the right and lower edges, less than a cell, is added to the last ones by stretching the grid.
    """

    def of_cells(pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        h, w = max(1, height // side_px), max(1, width // side_px)
        if (height % h, width % w) != (0, 0):
            size = (h * -(-height // h), w * -(-width // w))
            pixels = functional.interpolate(pixels.float(), size, mode="nearest")
        n_channels, p, q = pixels.shape[1], pixels.shape[2] // h, pixels.shape[3] // w
        cells = pixels.reshape(len(pixels), n_channels, h, p, w, q)
        cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # [B*h*w, C, p, q]
        found = control(cells)  # [B*h*w, F]
        return found.view(len(pixels), h, w, found.shape[1])

    return of_cells


def _known(labels: Tensor, ignore: int | None) -> Tensor:
    """Which pixels have a label."""
    return labels >= 0 if ignore is None else labels != ignore
