"""What the decoders of pixels are made of: convolutions with a norm, changes of resolution, the last layer.

B images, D channels, h w cells, H W pixels, K outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.distributed import gather, world_size

__all__ = ["BatchNorm", "CellNorm", "Norm", "PixelHead", "conv_norm", "halved", "make_norm", "resized"]

# batch: by the statistics of the batch of all ranks, and at inference by those that training has gathered; published
#        decoders have it, and the other two are for batches of very few images;
# group: by those of the image, in groups of channels (arXiv 1803.08494);
# layer: by those of the cell.
Norm = Literal["batch", "group", "layer"]

_MAX_GROUPS, _LEAST_OF_A_GROUP = 32, 8


def make_norm(norm: Norm, width: int) -> nn.Module:
    """A norm of maps `[B, D, h, w]` of D = `width`; at inference none of them depends on the other images."""
    if norm == "batch":
        return BatchNorm(width)
    return CellNorm(width) if norm == "layer" else nn.GroupNorm(_n_groups(width), width)


def _n_groups(width: int) -> int:
    """At most 32, of 8 channels at least: the variance of a single cell and channel would be 0."""
    allowed = range(2, min(_MAX_GROUPS, width // _LEAST_OF_A_GROUP) + 1)
    return max((n for n in allowed if width % n == 0), default=1)


class BatchNorm(nn.Module):
    """Batch normalisation (arXiv 1502.03167) by the statistics of the batch of all ranks, on any device.

    Ranks may hold different numbers of cells, and what they compute is what one process would, gradients too once they
    are averaged over ranks (DDP): in training its forward pass is one that all ranks of a process group take together.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, D, ...]`. In training, raises `ValueError` where a channel has a single value."""
        if self.training and x.numel() // x.shape[1] * world_size() < 2:
            raise ValueError(
                f"norm: batch needs more than one value a channel in training, got {tuple(x.shape)}: take norm: layer,"
                " more images a batch, or larger ones"
            )
        if self.training and world_size() > 1:
            return self._over_ranks(x)
        running = (self.running_mean, self.running_var)
        return F.batch_norm(x, *running, self.weight, self.bias, self.training, self.momentum, self.eps)

    def _over_ranks(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(wide, dims, correction=0)  # [D]
        count = torch.full_like(mean, x.numel() // x.shape[1])
        means, variances, counts = gather(torch.stack((mean, var, count))[None]).unbind(1)  # [R, D]
        total = counts.sum(0)
        share = counts / total
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)  # within ranks, and between them
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shape = (-1, *[1] * (x.ndim - 2))
        return ((wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


class CellNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell of maps `[B, D, h, w]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def conv_norm(
    in_width: int, width: int, kernel: int, norm: Norm, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """A convolution that keeps the size, its norm and an activation; no bias where the norm takes it out again."""
    conv = nn.Conv2d(in_width, width, kernel, padding=kernel // 2, bias=norm != "batch")
    return nn.Sequential(conv, make_norm(norm, width), activation())


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps `[B, D, h, w]` in another `size`, bilinear; the corners of both are those of the outermost cells' areas."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def halved(x: Tensor) -> Tensor:
    """Maximum of 2 x 2 cells; of an odd number, half rounded up, of equal extents, which `resized` presumes."""
    return F.adaptive_max_pool2d(x, ((x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2))


class PixelHead(nn.Module):
    """From features to logits: whole channels dropped in training, a linear layer at each cell, enlarged."""

    def __init__(self, width: int, n_outputs: int, dropout_prob: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout_prob)
        self.classifier = nn.Conv2d(width, n_outputs, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`x [B, D, h, w]` -> `[B, K, *size]`."""
        return resized(self.classifier(self.dropout(x)), size)
