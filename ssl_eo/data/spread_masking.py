"""Block masks on some views of every sample of a batch, all at once, in counts that are spread evenly and exact.

A row of a grid is held as bits of a few integers, so that a rectangle of patches costs a handful of operations for the
whole batch. All choices are a function of a seed and of a sample's slot in the global batch.

B samples, V views of a sample, S of them masked, U = B*S masked views, T rectangles of each, h w grid, N = h*w patches,
W words in a row of the grid, M hidden patches of all views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_eo.data.types import RaggedMaskBatch
from ssl_eo.seeding import uniforms

__all__ = ["SpreadMaskConfig", "spread_masks"]

_N_RECTANGLES = 8  # drawn for a view; with default values they cover too little in one of 20,000 draws
_WORD_BITS = 64
_ONES = np.array([(1 << n) - 1 for n in range(_WORD_BITS + 1)], np.uint64)  # the n lowest bits


@dataclass
class SpreadMaskConfig:
    """Blocks of hidden patches on some views of a sample, in ratios that are spread evenly (iBOT, arXiv 2111.07832).

    Which of the views is random; how much is hidden is not: the masked views of a batch take turns through `n_ratios`
    ratios, from a random one on. Where they are a multiple of it, every batch hides equally much.
    """

    n_views: int = 1  # of the global views of a sample, how many are masked; DINOv2 masks every second one
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # range of the share of patches that is hidden in a masked view
    n_ratios: int = 8  # how many ratios take turns; batches of a multiple of it hide equally much on all ranks
    min_block_patches: int = 4  # smallest rectangle, in patches
    max_block_ratio: float = 0.5  # largest rectangle, as a share of the grid
    min_block_aspect: float = 0.3  # smallest height / width; the largest is its inverse

    def __post_init__(self) -> None:
        if self.n_views < 1 or self.n_ratios < 1 or self.min_block_patches < 1:
            raise ValueError(
                "n_views, n_ratios and min_block_patches must be at least 1, got"
                f" {self.n_views}, {self.n_ratios} and {self.min_block_patches}"
            )
        if not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] < 1 or self.mask_ratio[1] == 0:
            raise ValueError(f"mask_ratio must be [low, high] with 0 <= low <= high < 1, got {list(self.mask_ratio)}")
        if not 0 < self.max_block_ratio <= 1 or not 0 < self.min_block_aspect <= 1:
            raise ValueError(
                "max_block_ratio and min_block_aspect must be in (0, 1], got"
                f" {self.max_block_ratio} and {self.min_block_aspect}"
            )

    def counts(self, n_patches: int) -> NDArray[np.int64]:
        """How many patches masked views hide, in turn: `[n_ratios]`."""
        low, high = self.mask_ratio
        ratio = low + (high - low) * (np.arange(self.n_ratios) + 0.5) / self.n_ratios
        return (n_patches * ratio).astype(np.int64)


def spread_masks(
    cfg: SpreadMaskConfig, grid: tuple[int, int], n_views: int, slots: Sequence[int], seed: int
) -> RaggedMaskBatch:
    """Masks of the `n_views` views of the samples at `slots`, rows in the order of a role (views outermost).

    Rectangles have areas uniform between `min_block_patches` and what the view hides (at most `max_block_ratio` of the
    grid) and log-uniform aspects. They are joined until they cover enough, and the last is cut off, to the exact count.
    In BEiT (Bao et al. 2022, algorithm 1) later ones may only be as large as what is left; corners and centre are
    hidden about as often here. A mask is a function of `seed`, which is that of the step, and of the slot.
    """
    h, w = grid
    n_samples, n_patches = len(slots), h * w
    u = uniforms(seed, np.asarray(slots), n_views + cfg.n_views * (1 + 4 * _N_RECTANGLES))
    view = np.argsort(u[:, :n_views], axis=1)[:, : cfg.n_views].ravel()  # [U], the masked ones of a sample
    is_turned, of_rectangles = np.split(u[:, n_views:].reshape(len(view), -1), [1], axis=1)  # [U, 1] [U, 4T]
    turn = np.add.outer(np.asarray(slots) * cfg.n_views, np.arange(cfg.n_views)).ravel() + seed % cfg.n_ratios  # [U]
    count = cfg.counts(n_patches)[turn % cfg.n_ratios]  # [U]
    rectangles = _draw(cfg, grid, count, of_rectangles.reshape(-1, _N_RECTANGLES, 4))
    hidden = _joined(rectangles, grid, count)  # [U, N]
    hidden = np.where(is_turned < 0.5, hidden[:, ::-1], hidden)  # else the cut would spare the last rows
    sample = np.repeat(np.arange(n_samples), cfg.n_views)  # [U]
    mask = np.zeros((n_views, n_samples, n_patches), bool)
    mask[view, sample] = hidden
    n_hidden = np.zeros((n_views, n_samples), np.int64)
    n_hidden[view, sample] = count
    weight = np.repeat(1.0 / np.maximum(n_hidden, 1), n_hidden.ravel()).astype(np.float32)  # [M]
    rows = mask.reshape(-1, n_patches)  # [V*B, N]
    ids = np.flatnonzero(rows)  # [M]
    return RaggedMaskBatch(torch.from_numpy(rows), torch.from_numpy(ids), torch.from_numpy(weight))


class _Rectangles(NamedTuple):
    """In patches, each `[U, T]`."""

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    bottom: NDArray[np.int32]
    right: NDArray[np.int32]


def _draw(
    cfg: SpreadMaskConfig, grid: tuple[int, int], count: NDArray[np.int64], u: NDArray[np.float32]
) -> _Rectangles:
    """Rectangles from `u [U, T, 4]`, uniform in [0, 1)."""
    h, w = grid
    most = np.minimum(count, cfg.max_block_ratio * h * w).astype(np.float32)[:, None]  # [U, 1]
    side = np.sqrt(cfg.min_block_patches + u[..., 0] * np.maximum(most - cfg.min_block_patches, 0.0))  # [U, T]
    root = np.exp((u[..., 1] - 0.5) * math.log(cfg.min_block_aspect))  # [U, T], of height / width
    height = np.clip(np.rint(side * root), 1, h).astype(np.int32)
    width = np.clip(np.rint(side / root), 1, w).astype(np.int32)
    top = (u[..., 2] * (h - height + 1)).astype(np.int32)
    left = (u[..., 3] * (w - width + 1)).astype(np.int32)
    return _Rectangles(top, left, top + height, left + width)


def _joined(rectangles: _Rectangles, grid: tuple[int, int], count: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`[U, N]` with `count [U]` True: the first rectangles that reach it, the last of them cut off in reading order."""
    union = _unions(rectangles, grid)  # [U, T+1, h, W]
    n_covered = np.bitwise_count(union).sum((2, 3), dtype=np.int64)  # [U, T+1]
    row = np.arange(len(union))  # [U]
    reached = (n_covered < count[:, None]).sum(1)  # [U], the first that is enough
    before = np.maximum(reached - 1, 0)
    is_first = reached == 0
    kept = np.where(is_first[:, None, None], np.zeros_like(union[:, 0]), union[row, before])  # [U, h, W]
    n_wanted = count - np.where(is_first, 0, n_covered[row, before])  # [U], of the last rectangle
    mask = _unpacked(union[row, reached], grid[1])  # [U, N]
    new = np.flatnonzero(_unpacked(union[row, reached] & ~kept, grid[1]))
    owner = new // mask.shape[1]
    n_new = np.bincount(owner, minlength=len(mask))  # [U]
    place = np.arange(len(new)) - (np.cumsum(n_new) - n_new)[owner]  # among the new ones of a view
    mask.ravel()[new[place >= n_wanted[owner]]] = False
    return mask


def _unions(rectangles: _Rectangles, grid: tuple[int, int]) -> NDArray[Any]:
    """The first rectangle, the first two, ..., all, and the whole grid as bits: `[U, T+1, h, W]` unsigned."""
    h, w = grid
    bits = next(n for n in (8, 16, 32, _WORD_BITS) if n >= min(w, _WORD_BITS))
    start = bits * np.arange(math.ceil(w / bits))  # [W], first column of a word
    n_left, n_right = (np.clip(edge[..., None] - start, 0, bits) for edge in (rectangles.left, rectangles.right))
    word = (_ONES[n_right] ^ _ONES[n_left]).astype(f"u{bits // 8}")  # [U, T, W]
    y = np.arange(h, dtype=np.int32)
    has_row = (y >= rectangles.top[..., None]) & (y < rectangles.bottom[..., None])  # [U, T, h]
    n_views, n_rectangles = rectangles.top.shape
    union = np.empty((n_views, n_rectangles + 1, h, len(start)), word.dtype)
    np.multiply(has_row[..., None], word[:, :, None, :], out=union[:, :-1])
    for i in range(1, n_rectangles):
        union[:, i] |= union[:, i - 1]
    union[:, -1] = _ONES[np.clip(w - start, 0, bits)]
    return union


def _unpacked(words: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Bits of `words [U, h, W]` as `[U, h * width]`."""
    flat = words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8)  # the first bit is the first column
    columns = np.unpackbits(flat, axis=-1, bitorder="little")[..., :width]  # [U, h, w]
    return np.ascontiguousarray(columns).reshape(len(words), -1).view(bool)
