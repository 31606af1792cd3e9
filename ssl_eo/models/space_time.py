"""Images of several dates as one sequence of tokens: tubelets, positions in time and space, when and where.

The dates of a sample lie one below the other, so that a series is one tall image to all that cuts and embeds patches:
its patches, row by row, are those of the first date, then those of the second, ... In this order are positions and ids.

B samples, C channels, T dates, s dates of a tubelet, T' = T / s, H W pixels, h w grid of a date, M side of a native
grid, N = T'*h*w patches, K visible patches, D width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.models.position import sincos

__all__ = ["CoordinateEncoding", "TokenGrid", "as_images", "below_each_other", "one_by_one", "sincos_3d"]

_FIRST_SCALE = 0.1


def below_each_other(series: Tensor, tubelet: int = 1) -> Tensor:
    """`[B, C, T, H, W]` -> `[B, C*s, T'*H, W]`: dates of a tubelet are channels, channel by channel in order of time.

    Raises `ValueError` where the tubelet does not divide the number of dates.
    """
    b, c, n_dates, height, width = series.shape
    if n_dates % tubelet:
        raise ValueError(f"{n_dates} dates cannot be cut into tubelets of {tubelet} (model.tubelet)")
    parts = series.reshape(b, c, n_dates // tubelet, tubelet, height, width).transpose(2, 3)  # [B, C, s, T', H, W]
    return parts.reshape(b, c * tubelet, n_dates // tubelet * height, width)


def as_images(pixels: Tensor, tubelet: int, patch_size: int) -> tuple[Tensor, int]:
    """What patches are cut from, of `[B, C, H, W]` or of a series `[B, C, T, H, W]`, and of how many steps it is.

    Raises `ValueError` for sizes of a date that the patch size does not divide: patches would straddle two dates.
    """
    if pixels.ndim == 4 and tubelet == 1:
        return pixels, 1
    if pixels.ndim != 5:
        raise ValueError(f"tubelets of {tubelet} dates need pixels [B, C, T, H, W] (model.tubelet)")
    n_dates, height, width = pixels.shape[2:]
    if not n_dates or height % patch_size or width % patch_size:
        raise ValueError(
            f"{n_dates} dates of {height} x {width} pixels cannot be cut into patches of {patch_size} x {patch_size}:"
            f" choose sizes that are multiples of {patch_size}"
        )
    return below_each_other(pixels, tubelet), n_dates // tubelet


def one_by_one(tall: Tensor, n_dates: int, tubelet: int = 1) -> Tensor:
    """Inverse of `below_each_other`: `[B, C*s, T'*H, W]` -> `[B, C, T, H, W]`."""
    n_rows = n_dates // tubelet
    parts = torch.unflatten(torch.unflatten(tall, 1, (-1, tubelet)), 3, (n_rows, -1))  # [B, C, s, T', H, W]
    return parts.transpose(2, 3).flatten(2, 3)


@lru_cache(maxsize=64)
def sincos_3d(n_dates: int, grid: tuple[int, int], dim: int, native: int, device: torch.device) -> Tensor:
    """`[N, D]`, float32: sin-cos of column (6/16 of D), of row (6/16) and of the number of the date (4/16).

    It is that of a `native` x `native` grid, stretched to `grid` as the released Prithvi models do (arXiv 2412.02732):
    bicubic, with the corners in place. D is divisible by 16.
    """
    if dim % 16:
        raise ValueError(f"position sincos_3d needs a width divisible by 16, got {dim}")
    with torch.inference_mode(False):
        code = sincos(torch.arange(native, dtype=torch.float64, device=device), dim // 16 * 6)  # [M, 6D/16]
        date = sincos(torch.arange(n_dates, dtype=torch.float64, device=device), dim // 16 * 4)  # [T', 4D/16]
        shape = (n_dates, native, native, -1)
        columns, rows = code[None, None].expand(shape), code[None, :, None].expand(shape)
        table = torch.cat((columns, rows, date[:, None, None].expand(shape)), dim=-1).float()  # [T', M, M, D]
        if grid != (native, native):
            image = F.interpolate(table.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=True)
            table = image.permute(0, 2, 3, 1)  # [T', h, w, D]
        return table.reshape(-1, dim)


class TokenGrid(NamedTuple):
    """Where the patches of an input are: in a grid (h, w), or in as many as it has steps in time."""

    grid: tuple[int, int]
    n_steps: int

    def in_grid(self, ids: Tensor | None, device: torch.device) -> Tensor | None:
        """Their places in the grid, `[B or 1, K]`; None where they are all patches of one grid."""
        if self.n_steps == 1:
            return ids
        n_patches = self.grid[0] * self.grid[1]
        every = torch.arange(self.n_steps * n_patches, device=device)[None]  # [1, N]
        return (every if ids is None else ids) % n_patches

    def of_patches(self, of_steps: Tensor, ids: Tensor | None) -> Tensor:
        """What is known of each step, `[B, T, D]`, for each patch: `[B, K, D]`."""
        n_patches = self.grid[0] * self.grid[1]
        if of_steps.shape[1] != self.n_steps:
            raise ValueError(f"dates of {of_steps.shape[1]} images are given for {self.n_steps} images")
        if ids is None:
            return of_steps.repeat_interleave(n_patches, dim=1)
        return of_steps.take_along_dim((ids // n_patches)[..., None], dim=1)


class CoordinateEncoding(nn.Module):
    """A code of two numbers, year and day of the year or latitude and longitude, times a learned scale.

    Each number, as it is, takes half of the width as sin-cos. Unknown ones (NaN) and what else is not finite make the
    code of both zero: nothing is added, as where metadata are dropped in training. Always computed in float32, since
    half precision cannot tell one year from the next.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, pairs: Tensor) -> Tensor:
        """`[..., 2]` -> `[..., D]`, float32."""
        if pairs.dtype.itemsize < 4:
            raise ValueError(f"dates and locations must be float32 at least, got {pairs.dtype}: they would be rounded")
        known = pairs.isfinite().all(-1, keepdim=True)  # [..., 1]
        code = sincos(torch.where(known, pairs, 0.0).float(), self.dim // 2).flatten(-2)  # [..., D]
        return torch.where(known, self.scale.float() * code, 0.0)

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.constant_(self.scale, _FIRST_SCALE)
