"""Block masks on some views of every sample of a batch, all at once, in counts that are spread evenly and exact.

A row of a grid is held as bits of a few integers, so that a rectangle of patches costs a handful of operations for the
whole batch; masked views are the last axis while rectangles are joined, for NumPy is fastest along that. All choices
are a function of a seed and of a sample's slot in the global batch.

B samples, V views of a sample, S of them masked, U = B*S masked views, T rectangles of each, h w grid, N = h*w patches,
W words in a row of the grid, M hidden patches of all views.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_eo.data.types import RaggedMaskBatch
from ssl_eo.seeding import uniforms

__all__ = ["SpreadMaskConfig", "spread_masks"]

_N_RECTANGLES = 8  # drawn for a view; if they cover too little, as they hardly ever do, the whole grid follows them
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
    n_samples, n_patches = len(slots), grid[0] * grid[1]
    slot = np.asarray(slots)
    u = uniforms(seed, slot, n_views + cfg.n_views * (1 + 4 * _N_RECTANGLES))
    view = u[:, :n_views].argsort(axis=1)[:, : cfg.n_views]  # [B, S], the masked ones of a sample
    row = (view * n_samples + np.arange(n_samples)[:, None]).ravel()  # [U]
    turn = (slot[:, None] * cfg.n_views + np.arange(cfg.n_views)).ravel() + seed % cfg.n_ratios  # [U]
    count = cfg.counts(n_patches)[turn % cfg.n_ratios]  # [U]
    u = u[:, n_views:].reshape(len(row), -1)  # [U, 1 + 4T]
    is_turned = u[:, 0] < 0.5  # what is cut off is at the bottom or the top
    first, last = _draw(cfg, grid, count, np.ascontiguousarray(u[:, 1:].T).reshape(4, -1, len(row)))
    mask = np.zeros((n_views * n_samples, n_patches), bool)
    mask[row] = _joined(_unions(first, last, grid), grid, count, is_turned)
    n_hidden = np.zeros(len(mask), np.int64)
    n_hidden[row] = count
    weight = (1 / np.maximum(n_hidden, 1)).astype(np.float32).repeat(n_hidden)  # [M]
    ids = mask.ravel().nonzero()[0]  # [M]
    return RaggedMaskBatch(torch.from_numpy(mask), torch.from_numpy(ids), torch.from_numpy(weight))


def _draw(
    cfg: SpreadMaskConfig, grid: tuple[int, int], count: NDArray[np.int64], u: NDArray[np.float32]
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Rectangles from `u [4, T, U]`, uniform in [0, 1): first row and column `[2, T, U]`, and those after the last."""
    least = cfg.min_block_patches
    most = np.minimum(count, cfg.max_block_ratio * grid[0] * grid[1]).astype(np.float32)  # [U]
    side = np.sqrt(least + u[0] * np.maximum(most - least, 0.0))  # [T, U]
    root = np.exp((u[1] - 0.5) * math.log(cfg.min_block_aspect))  # [T, U], of height / width
    size = np.rint(np.stack((side * root, side / root)))  # [2, T, U]
    room = np.array(grid, np.float32)[:, None, None]
    size = np.minimum(np.maximum(size, 1.0), room)
    first = (u[2:] * (room - size + 1.0)).astype(np.int16)
    return first, first + size.astype(np.int16)


def _unions(first: NDArray[np.int16], last: NDArray[np.int16], grid: tuple[int, int]) -> NDArray[Any]:
    """No rectangle, the first, the first two, ..., all, and the whole grid as bits: `[T+2, h, W, U]` unsigned."""
    h, w = grid
    bits = next(n for n in (8, 16, 32, _WORD_BITS) if n >= min(w, _WORD_BITS))
    start = np.arange(0, w, bits, dtype=np.int16)[:, None]  # [W, 1], first column of a word
    left, right = (np.minimum(np.maximum(edge[1][:, None] - start, 0), bits) for edge in (first, last))  # [T, W, U]
    of_bits = _ONES.astype(f"u{bits // 8}")
    word = of_bits[left] ^ of_bits[right]  # [T, W, U]
    y = np.arange(h, dtype=np.int16)[:, None]
    top, bottom = first[0][:, None], last[0][:, None]  # [T, 1, U]
    has_row = (y >= top) & (y < bottom)  # [T, h, U]
    n_rectangles, n_views = first.shape[1:]
    union = np.zeros((n_rectangles + 2, h, len(start), n_views), word.dtype)
    np.multiply(has_row[:, :, None], word[:, None], out=union[1:-1])
    for before, after in itertools.pairwise(union[1:-1]):
        after |= before
    union[-1] = of_bits[np.minimum(w - start, bits)]
    return union


def _joined(
    union: NDArray[Any], grid: tuple[int, int], count: NDArray[np.int64], is_turned: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """`[U, N]` with `count [U]` True: the first rectangles that reach it, the last of them cut off in reading order.

    Where a view `is_turned [U]`, the result is turned by 180 degrees; else cutting would spare the last rows of all.
    """
    view = np.arange(len(count))
    n_covered = np.bitwise_count(union).sum((1, 2), dtype=np.int16)  # [T+2, U]
    n_short = (n_covered < count).sum(0)  # [U], the union that is enough, at least the first rectangle
    enough = np.maximum(n_short, 1)
    before, reached = union[enough - 1, :, :, view], union[enough, :, :, view]  # [U, h, W]
    new = reached & ~before
    n_new = np.bitwise_count(new).sum(2, dtype=np.int64)  # [U, h]
    n_wanted = count - n_covered[enough - 1, view]  # [U], of the new ones
    n_until = n_new.cumsum(1)  # [U, h]
    is_whole = n_until <= n_wanted[:, None]
    words = before | new * is_whole[:, :, None]  # [U, h, W]
    cut = np.minimum(is_whole.sum(1), grid[0] - 1)  # [U], the row in which the last ones are
    part = _unpacked(new[view, cut], grid[1])  # [U, w]
    part &= part.cumsum(1) <= (n_wanted - n_until[view, cut] + n_new[view, cut])[:, None]
    mask = _unpacked(words, grid[1])  # [U, h, w]
    mask[view, cut] |= part
    flat = mask.reshape(len(mask), -1)
    flat[is_turned] = flat[is_turned, ::-1]
    return flat


def _unpacked(words: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Bits of `words [..., W]` as `[..., width]`."""
    in_order = words.astype(words.dtype.newbyteorder("<"), order="C", copy=False)  # the first bit is the first column
    bits = np.unpackbits(in_order.reshape(-1).view(np.uint8), bitorder="little")  # along an axis it would be slower
    return np.ascontiguousarray(bits.reshape(*words.shape[:-1], -1)[..., :width]).view(bool)
