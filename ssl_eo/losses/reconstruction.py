"""Reconstruction losses on patches, exact under data parallelism and blind to no-data.

B batch, C channels, H W pixels, h w grid, N = h*w patches, M masked patches, P patch size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_eo.losses.modalities import pixel_errors

__all__ = ["masked_mse", "normalise_patches", "patch_moments", "patchify", "pictures_of", "unpatchify"]


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """`[B, C, H, W]` -> `[B, N, P*P*C]`, patches row by row, inside a patch row, column, then channel."""
    b, c, height, width = pixels.shape
    p = patch_size
    x = pixels.reshape(b, c, height // p, p, width // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # [B, h, w, P, P, C]
    return x.reshape(b, (height // p) * (width // p), p * p * c)  # [B, N, P*P*C]


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: `[B, N, P*P*C]` -> `[B, C, H, W]`."""
    b, _, width = patches.shape
    (h, w), p = grid, patch_size
    c = width // (p * p)
    x = patches.reshape(b, h, w, p, p, c).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, P, w, P]
    return x.reshape(b, c, h * p, w * p)  # [B, C, H, W]


def pictures_of(
    patches: Tensor, hidden: Tensor, predicted: Tensor, patch_size: int, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """For a person to look at, `[n, C, H, W]`: the input, with holes where patches are hidden, with predictions there.

    `patches`, `predicted` `[n, N, P*P*C]`, `hidden [n, N]`.
    """
    holes = hidden[..., None]
    shown = {
        "input": patches,
        "masked": patches.masked_fill(holes, torch.nan),
        "reconstruction": torch.where(holes, predicted, patches),
    }
    return {title: unpatchify(picture, patch_size, grid) for title, picture in shown.items()}


def patch_moments(patches: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the valid values of each patch `[B, M, P*P*C]`: `[B, M, 1]` each."""
    if valid is None:
        var, mean = torch.var_mean(patches, -1, keepdim=True)
        return mean, var
    n = valid.sum(-1, keepdim=True)
    mean = torch.where(valid, patches, 0.0).sum(-1, keepdim=True) / n.clamp(min=1)
    centred = torch.where(valid, patches - mean, 0.0)
    return mean, centred.square().sum(-1, keepdim=True) / (n - 1).clamp(min=1)


def normalise_patches(patches: Tensor, valid: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Each patch to mean 0 and variance 1 (unbiased) over its valid values; invalid values become 0.

    `patches`, `valid`: `[B, M, P*P*C]`. He et al. 2022 (arXiv 2111.06377), section 3.
    """
    mean, var = patch_moments(patches, valid)
    centred = patches - mean if valid is None else torch.where(valid, patches - mean, 0.0)
    return centred / (var + eps).sqrt()


def masked_mse(pred: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error over the values of masked patches; invalid ones add nothing to value or gradient.

    All arguments `[B, M, P*P*C]`, already gathered at the masked patches. The denominator is the number of values,
    valid or not: it does not depend on the data, so the mean over ranks or micro-batches is exactly the global loss.
    Without no-data this is equation-for-equation the loss of MAE (arXiv 2111.06377).
    """
    return pixel_errors(pred, target, valid, "mse").mean()
