"""Attention inside windows of a map, which may be shifted, from one map to another of the same size.

B images, h w cells, C width, A heads, n windows, L cells of a window, s side of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.models.layers import CrossAttention

__all__ = ["WindowAttention", "Windows"]


@dataclass(frozen=True)
class Windows:
    """How windows lie on one axis after the other of a map of `size`, and what of them lies outside of it.

    Shifted windows begin half a window, rounded up, before the map. So those at its edges are cut, as by Swin's cyclic
    shift and its mask (arXiv 2103.14030, section 3.2), without a window that wraps around. An axis of no more than
    `side` cells is one window, never shifted.
    """

    size: tuple[int, int]
    side: int
    is_shifted: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Cells of a window along each axis."""
        return min(self.size[0], self.side), min(self.size[1], self.side)

    def split(self, x: Tensor) -> Tensor:
        """`[B, h, w, C]` -> `[B*n, L, C]`, with zeros outside of the map."""
        (top, bottom), (left, right) = self._padding(0), self._padding(1)
        x = F.pad(x, (0, 0, left, right, top, bottom))
        rows, columns = self.shape
        strips = torch.unflatten(torch.unflatten(x, 2, (-1, columns)), 1, (-1, rows))  # [B, ny, rows, nx, columns, C]
        return strips.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def join(self, x: Tensor, n_images: int) -> Tensor:
        """`[B*n, L, C]` -> `[B, h, w, C]`: what `split` did, undone."""
        (top, bottom), (left, _) = self._padding(0), self._padding(1)
        rows, columns = self.shape
        n_rows = (top + self.size[0] + bottom) // rows
        tiles = torch.unflatten(torch.unflatten(x, 1, (rows, columns)), 0, (n_images, n_rows, -1))
        padded = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, ny*rows, nx*columns, C]
        return padded[:, top : top + self.size[0], left : left + self.size[1]]

    def outside(self, device: torch.device) -> Tensor | None:
        """`[n, L]`, True for cells outside of the map; None where there are none."""
        if not any((*self._padding(0), *self._padding(1))):
            return None
        return self.split(torch.ones(1, *self.size, 1, device=device))[..., 0] == 0

    def _padding(self, axis: int) -> tuple[int, int]:
        """Cells before and after the map."""
        if self.size[axis] <= self.side:
            return 0, 0
        before = -(self.side // 2) % self.side if self.is_shifted else 0
        return before, -(before + self.size[axis]) % self.side


class WindowAttention(nn.Module):
    """Each cell of one map asks the cells of its window in another, with a learned bias for how far apart they are."""

    def __init__(self, width: int, n_heads: int, side: int, is_shifted: bool) -> None:
        super().__init__()
        self.side, self.is_shifted = side, is_shifted
        self.attention = CrossAttention(width, n_heads)
        # For offsets of rows and of columns from 1 - side to side - 1.
        self.offset_bias = nn.Parameter(torch.empty(n_heads, 2 * side - 1, 2 * side - 1))
        nn.init.trunc_normal_(self.offset_bias, std=0.02)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Both `[B, h, w, C]` -> `[B, h, w, C]`."""
        n_images, height, width = queries.shape[:3]
        windows = Windows((height, width), self.side, self.is_shifted)
        bias = self._bias(windows.shape)[None]  # [1, A, L, L]
        outside = windows.outside(queries.device)
        if outside is not None:
            hidden = torch.zeros(outside.shape, dtype=bias.dtype, device=bias.device)
            hidden = hidden.masked_fill(outside, -torch.inf)  # [n, L]; each window has a cell that is not
            bias = (bias + hidden[:, None, None]).repeat(n_images, 1, 1, 1)  # [B*n, A, L, L]
        found = self.attention(windows.split(queries), windows.split(context), bias)
        return windows.join(found, n_images)

    def _bias(self, shape: tuple[int, int]) -> Tensor:
        """`[A, L, L]` between the cells of a window of `shape`, query first."""
        device = self.offset_bias.device
        cells = torch.cartesian_prod(*(torch.arange(n, device=device) for n in shape))  # [L, 2]
        rows, columns = (cells[:, None] - cells[None] + self.side - 1).unbind(-1)  # [L, L]
        return self.offset_bias[:, rows, columns]
