"""Features of a patch that masked prediction can aim at beside its pixels: colour statistics, oriented gradients.

Pixels normalised patch by patch (MAE) say nothing of a patch's colour and contrast, and raw pixels drown structure in
them; predicting both parts apart keeps both. Gradient histograms as a target: Wei et al. 2022 (arXiv 2112.09133).

B batch, C channels, H W pixels, h w grid, N = h*w patches, M some of them, P patch size, Q cells of a patch, O bins.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gradient_histograms", "moments_of", "patch_statistics"]

# In standardised pixels. Logarithms are of (x + floor) / typical: the floor stops flat patches from becoming extreme,
# and with what is typical of patches of Sentinel-2 they start around 0, where an untrained head is.
_STD_FLOOR, _STD_TYPICAL = 0.03, 0.15
_GRADIENT_FLOOR, _GRADIENT_TYPICAL = 0.01, 0.025


def patch_statistics(patches: Tensor, n_channels: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Mean and log spread of each channel of each patch, `[B, M, 2*C]`, channel last, and their validity.

    `patches`, `valid`: `[B, M, P*P*C]`, channel last. A channel of a patch is valid where it has two valid values.
    """
    values = torch.unflatten(patches, -1, (-1, n_channels))  # [B, M, P*P, C]
    if valid is None:
        std, mean = torch.std_mean(values, dim=2, correction=0)  # [B, M, C]
        return torch.cat((mean, _log_std(std)), -1), None
    known = torch.unflatten(valid, -1, (-1, n_channels))
    n = known.sum(2)  # [B, M, C]
    mean = torch.where(known, values, 0.0).sum(2) / n.clamp(min=1)
    var = torch.where(known, values - mean[:, :, None], 0.0).square().sum(2) / n.clamp(min=1)
    return torch.cat((mean, _log_std(var.sqrt())), -1), (n >= 2).repeat(1, 1, 2)


def moments_of(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all values of a patch, `[B, M, 1]` each, from its `patch_statistics [B, M, 2*C]`."""
    mean, log_std = statistics.chunk(2, -1)  # [B, M, C]
    std = (log_std.exp() * _STD_TYPICAL - _STD_FLOOR).clamp(min=0)
    total = mean.mean(-1, keepdim=True)
    return total, (std.square() + (mean - total).square()).mean(-1, keepdim=True)


def _log_std(std: Tensor) -> Tensor:
    return ((std + _STD_FLOOR) / _STD_TYPICAL).log()


@torch.no_grad()
def gradient_histograms(
    pixels: Tensor, patch_size: int, n_bins: int, cell: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log histograms of oriented gradients of the mean over channels, `[B, N, Q*O]`, and their validity.

    `pixels`, `valid`: `[B, C, H, W]`. Orientation is taken modulo half a turn and shared linearly between the two
    nearest of `n_bins` bins, weighted by the gradient's length, and averaged over cells of `cell` pixels. A cell is
    valid where every gradient in it is. It does not depend on the number of channels.
    """
    grey = pixels.mean(1, keepdim=True) if valid is None else torch.where(valid, pixels, 0.0).mean(1, keepdim=True)
    dx = F.pad(grey[..., 2:] - grey[..., :-2], (1, 1))  # [B, 1, H, W]
    dy = F.pad(grey[..., 2:, :] - grey[..., :-2, :], (0, 0, 1, 1))
    length = (dx.square() + dy.square()).sqrt()
    angle = (torch.atan2(dy, dx) * (n_bins / math.pi)).remainder(n_bins)  # in bins, [0, O]
    bins = torch.arange(n_bins, device=pixels.device, dtype=pixels.dtype).view(1, -1, 1, 1)
    distance = (angle - bins).abs_()  # [B, O, H, W]; in place from here on: O times the pixels is the cost
    share = torch.minimum(distance, n_bins - distance).neg_().add_(1).clamp_(min=0)
    histogram = F.avg_pool2d(share.mul_(length), cell)  # [B, O, H/cell, W/cell]
    histogram = histogram.add_(_GRADIENT_FLOOR).div_(_GRADIENT_TYPICAL).log_()
    target = _cells_of_patches(histogram, patch_size // cell)
    if valid is None:
        return target, None
    hole = (~valid).any(1, keepdim=True).float()  # [B, 1, H, W]
    touched = F.max_pool2d(F.max_pool2d(hole, 3, stride=1, padding=1), cell)  # a gradient reads its four neighbours
    return target, _cells_of_patches((touched == 0).expand_as(histogram), patch_size // cell)


def _cells_of_patches(x: Tensor, n: int) -> Tensor:
    """`[B, O, h*n, w*n]` -> `[B, N, n*n*O]`."""
    b, o, height, width = x.shape
    x = x.reshape(b, o, height // n, n, width // n, n).permute(0, 2, 4, 3, 5, 1)  # [B, h, w, n, n, O]
    return x.reshape(b, (height // n) * (width // n), n * n * o)  # [B, N, Q*O]
