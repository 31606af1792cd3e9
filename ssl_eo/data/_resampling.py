"""Separable resampling: kernels, the matrix of their weights along an axis, and the product of tiles with two of them.

R rows, each a view of a tile, c bands, H W tile pixels, m outputs along either axis, T taps of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KERNELS", "Axis", "Kernel", "is_row_by_row", "resample"]

# Outputs of a large view that are made together on the CPU, from the few pixels under their kernels: wide enough for a
# product that is worth its call, narrow enough to leave out most zeros. Views of up to two strips are made as a whole.
_STRIP = 28


@dataclass(frozen=True)
class Kernel:
    """A resampling kernel: zero beyond `radius`; `weight` maps distances (>= 0) to unnormalised weights."""

    radius: int
    weight: Callable[[Tensor], Tensor]


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0.0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2 (IEEE TASSP 29, 1981), its two pieces joined by truncated squares."""
    outer = (2 - distance).clamp_(min=0.0).square_()
    inner = (1 - distance).clamp_(min=0.0).square_()
    return 0.5 * (1 - distance) * outer + (2 * distance - 1) * inner


KERNELS = {"bilinear": Kernel(1, _triangle), "bicubic": Kernel(2, _cubic)}


@dataclass
class Axis:
    """Where the m outputs of each row lie along one axis of its tile, flips and turns included."""

    start: Tensor  # [R] first edge of the box
    extent: Tensor  # [R] length of the box
    scale: Tensor  # [R] tile pixels per output pixel
    center: Tensor  # [R, m] centre of each output, from the box's first edge

    @classmethod
    def of(cls, start: Tensor, extent: Tensor, n_out: Tensor, m: int, is_reversed: Tensor) -> Axis:
        """`n_out [R]` outputs of each row, at most m; the places after them repeat the last."""
        last = n_out[:, None] - 1  # [R, 1]
        step = torch.minimum(torch.arange(m, device=start.device, dtype=torch.float32), last)  # [R, m]
        step = torch.where(is_reversed[:, None], last - step, step)
        scale = extent / n_out
        return cls(start, extent, scale, scale[:, None] * (step + 0.5))

    def matrix(self, kernel: Kernel, n_in: int, max_scale: float) -> Tensor:
        """Resampling weights `[R, m, n_in]`; each row sums to 1. `max_scale` bounds `scale` and is known on the host.

        Only the T pixels under the widest kernel are evaluated, then scattered: for a crop of a 512 pixel tile at
        about its own size that is 50 times less work than evaluating the kernel everywhere.
        """
        start, extent = self.start[:, None, None], self.extent[:, None, None]
        center = self.center[:, :, None]  # [R, m, 1]
        stretch = self.scale.clamp(min=1.0)[:, None, None]  # a kernel is widened to average, never narrowed
        n_taps = int(2 * kernel.radius * max(1.0, max_scale)) + 1
        first = torch.ceil(start + center - kernel.radius * stretch - 0.5)  # [R, m, 1]
        pixel = first + torch.arange(n_taps, device=center.device)  # [R, m, T]
        inside = torch.minimum(pixel + 1, start + extent) - torch.maximum(pixel, start)
        weight = kernel.weight((pixel - start + 0.5 - center).div_(stretch).abs_()) * inside.clamp_(0.0, 1.0)
        weight = weight / weight.sum(2, keepdim=True)
        # Taps outside the tile have no weight; the margin gives each a place of its own, so none overwrites another.
        padded = center.new_zeros(*center.shape[:2], n_in + 2 * n_taps)
        padded.scatter_(2, pixel.long() + n_taps, weight)
        return padded[:, :, n_taps : n_taps + n_in]  # [R, m, n_in]

    def nearest(self, n_in: int) -> Tensor:
        """Index `[R, m]` of the tile pixel that holds the centre of each output."""
        return (self.start[:, None] + self.center).long().clamp_(0, n_in - 1)


def is_row_by_row(device: torch.device, m: int) -> bool:
    """Whether each row is a group of its own: large views on the CPU, where a look at a tensor does not wait for it."""
    return device.type == "cpu" and m > 2 * _STRIP


def resample(ky: Tensor, x: Tensor, kx: Tensor) -> Tensor:
    """`ky . x . kx^T` for every channel: `[R, m, H]`, `[R, H, c, W]`, `[R, m, W]` -> `[R, m, c, m]`."""
    n_rows, _, n_channels, width = x.shape
    m = ky.shape[1]
    if is_row_by_row(x.device, m):
        return _resample_by_strips(ky[0], x[0], kx[0])[None]
    y = torch.bmm(ky, x.flatten(2)).view(n_rows, m * n_channels, width)  # [R, m*c, W]
    return torch.bmm(y, kx.transpose(1, 2)).view(n_rows, m, n_channels, m)  # [R, m, c, m]


def _resample_by_strips(ky: Tensor, x: Tensor, kx: Tensor) -> Tensor:
    """The same for one row, without most zeros of the matrices: `[m, H]`, `[H, c, W]`, `[m, W]` -> `[m, c, m]`."""
    m, n_channels = len(ky), x.shape[1]
    taps = _taps(ky)  # [m, T]
    y = F.embedding_bag(taps, x.flatten(1), per_sample_weights=ky.gather(1, taps), mode="sum")  # [m, c*W]
    y = y.view(m * n_channels, -1)  # [m*c, W]
    z = x.new_empty(m * n_channels, m)  # [m*c, m]
    for outputs, inputs in _strips(kx):
        torch.mm(y[:, inputs], kx[outputs, inputs].T, out=z[:, outputs])
    return z.view(m, n_channels, m)


def _taps(matrix: Tensor) -> Tensor:
    """Columns `[m, T]` outside which each row of a `matrix [m, n]` on the CPU is zero."""
    is_used, n = matrix.numpy() != 0, matrix.shape[1]
    first, last = is_used.argmax(1), n - is_used[:, ::-1].argmax(1)  # [m]
    n_taps = int((last - first).max())
    return torch.from_numpy(np.minimum(first, n - n_taps)[:, None] + np.arange(n_taps))


def _strips(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Runs of rows of a `matrix [m, n]` on the CPU, and the columns outside which these are zero."""
    is_used = matrix.numpy() != 0
    for start in range(0, len(is_used), _STRIP):
        outputs = slice(start, start + _STRIP)
        columns = is_used[outputs].any(0).nonzero()[0]
        yield outputs, slice(int(columns[0]), int(columns[-1]) + 1)
