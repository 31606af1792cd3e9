"""Patch masks with exact counts, drawn on the host from a sample's own generator. True = hidden.

Counts are exact so that every tensor of a batch has a static shape: `ids_keep [R, K]` and `ids_masked [R, M]`.

R rows (views x samples), N = h * w patches of a grid, K visible patches, M masked patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_eo.data.types import MaskBatch

__all__ = ["MaskConfig", "block_mask", "draw", "n_masked", "predicted", "random_mask", "stack_masks"]

Mask = NDArray[np.bool_]

_N_TRIES = 10


@dataclass
class MaskConfig:
    """How the patches of a view are hidden."""

    # Independent patches, or rectangles of patches, which in a series hide the same ground at all dates.
    kind: Literal["random", "block"] = "random"
    mask_ratio: float = 0.75  # share of the patches that is hidden
    predict_ratio: float = 1.0  # share of the hidden patches that an objective predicts, drawn at random
    min_block_patches: int = 4  # kind block: smallest rectangle, in patches
    max_block_ratio: float = 0.5  # kind block: largest rectangle, as a share of the grid
    min_block_aspect: float = 0.3  # kind block: smallest height / width; the largest is its inverse

    def __post_init__(self) -> None:
        if self.kind not in ("random", "block"):
            raise ValueError(f"kind must be 'random' or 'block', got {self.kind!r}")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {self.mask_ratio}")
        if not 0 < self.predict_ratio <= 1:
            raise ValueError(f"predict_ratio must be in (0, 1], got {self.predict_ratio}")
        if self.min_block_patches < 1:
            raise ValueError(f"min_block_patches must be at least 1, got {self.min_block_patches}")
        if not 0 < self.max_block_ratio <= 1:
            raise ValueError(f"max_block_ratio must be in (0, 1], got {self.max_block_ratio}")
        if not 0 < self.min_block_aspect <= 1:
            raise ValueError(f"min_block_aspect must be in (0, 1], got {self.min_block_aspect}")


def draw(cfg: MaskConfig, rng: np.random.Generator, grid: tuple[int, int], n_steps: int = 1) -> Mask:
    """A mask `[N]` of a grid (h, w), as `cfg` says; `n_masked(N, cfg.mask_ratio)` patches are hidden.

    Of `n_steps` grids in time, N = n_steps * h * w: random patches are independent, blocks hide the same ground in all.
    """
    n_patches = grid[0] * grid[1]
    if cfg.kind == "random":
        return random_mask(rng, n_steps * n_patches, n_masked(n_steps * n_patches, cfg.mask_ratio))
    count = n_masked(n_patches, cfg.mask_ratio)
    mask = block_mask(rng, grid, count, cfg.min_block_patches, cfg.max_block_ratio, cfg.min_block_aspect)
    return mask if n_steps == 1 else np.tile(mask, n_steps)


def predicted(cfg: MaskConfig, rng: np.random.Generator, mask: Mask) -> Mask:
    """The hidden patches `[N]` that an objective predicts: `round(M * cfg.predict_ratio)` of them, at least one."""
    if cfg.predict_ratio == 1:
        return mask
    hidden = np.flatnonzero(mask)
    count = max(min(1, len(hidden)), round(len(hidden) * cfg.predict_ratio))
    subset = np.zeros_like(mask)
    subset[rng.permutation(hidden)[:count]] = True
    return subset


def n_masked(n_patches: int, mask_ratio: float) -> int:
    """How many patches a ratio hides. The visible count is what is rounded down, as in MAE (He et al. 2022)."""
    return n_patches - int(n_patches * (1 - mask_ratio))


def random_mask(rng: np.random.Generator, n_patches: int, n_masked: int) -> Mask:
    """`[n_patches]` with exactly `n_masked` True, all choices equally likely."""
    _check_count(n_masked, n_patches)
    mask = np.zeros(n_patches, dtype=bool)
    mask[rng.permutation(n_patches)[:n_masked]] = True
    return mask


def block_mask(
    rng: np.random.Generator,
    grid: tuple[int, int],
    n_masked: int,
    min_block_patches: int = 4,
    max_block_ratio: float = 0.5,
    min_block_aspect: float = 0.3,
) -> Mask:
    """`[h * w]` with exactly `n_masked` True, as a union of random rectangles (BEiT, Bao et al. 2022, algorithm 1).

    Each rectangle has an area uniform between `min_block_patches` and what is left to hide (at most `max_block_ratio`
    of the grid) and a log-uniform aspect. One that hides nothing new is redrawn; one that would hide too much is cut
    off in reading order. After ten vain draws in a row (the grid is nearly full) visible patches are taken at random.
    """
    h, w = grid
    _check_count(n_masked, h * w)
    log_aspect = math.log(min_block_aspect)
    max_patches = max_block_ratio * h * w
    # The grid is one integer, bit `row * w + column`: a rectangle then costs a few operations on whole numbers.
    mask, n_left, n_vain = 0, n_masked, 0
    while n_left > 0 and n_vain < _N_TRIES:
        for u_area, u_aspect, u_top, u_left in rng.random((_N_TRIES, 4)).tolist():
            area = min_block_patches + u_area * max(0.0, min(n_left, max_patches) - min_block_patches)
            aspect = math.exp((2 * u_aspect - 1) * log_aspect)
            height = min(h, max(1, round(math.sqrt(area * aspect))))
            width = min(w, max(1, round(math.sqrt(area / aspect))))
            corner = int(u_top * (h - height + 1)) * w + int(u_left * (w - width + 1))
            new = (_rectangle(height, width, w) << corner) & ~mask
            n_vain = 0 if new else n_vain + 1
            new = _first_bits(new, n_left)
            mask |= new
            n_left -= new.bit_count()
            if n_left == 0 or n_vain == _N_TRIES:
                break
    return _fill(rng, _from_bits(mask, h * w), n_left)


def _rectangle(height: int, width: int, grid_width: int) -> int:
    """Bits of a rectangle in the top left corner: one row of ones, repeated every `grid_width` bits."""
    one_a_row = ((1 << grid_width * height) - 1) // ((1 << grid_width) - 1)
    return ((1 << width) - 1) * one_a_row


def _first_bits(bits: int, count: int) -> int:
    """`bits` with only its `count` lowest ones."""
    for _ in range(bits.bit_count() - count):
        bits ^= 1 << (bits.bit_length() - 1)
    return bits


def _from_bits(bits: int, n: int) -> Mask:
    packed = np.frombuffer(bits.to_bytes((n + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=n, bitorder="little").view(np.bool_)


def _fill(rng: np.random.Generator, mask: Mask, count: int) -> Mask:
    """Hides `count` more patches, chosen at random among the visible."""
    if count > 0:
        mask[rng.permutation(np.flatnonzero(~mask))[:count]] = True
    return mask


def stack_masks(masks: Sequence[Mask], predicted: Sequence[Mask] | None = None) -> MaskBatch:
    """One role's masks `[N]` as tensors, rows in the order given (views outermost).

    `ids_masked` lists the hidden patches, or those in `predicted` where an objective predicts only some of them.
    Raises `ValueError` when counts differ between rows, since then nothing has a static shape.
    """
    mask = np.stack(masks)  # [R, N]
    wanted = mask if predicted is None else np.stack(predicted)  # [R, N]
    assert not (wanted & ~mask).any(), "only hidden patches can be predicted"
    return MaskBatch(torch.from_numpy(mask), _ids(~mask, "visible"), _ids(wanted, "predicted"))


def _ids(chosen: Mask, what: str) -> torch.Tensor:
    """Column indices `[R, n]` of the True cells of `[R, N]`, ascending."""
    counts = chosen.sum(axis=1)
    if (counts != counts[0]).any():
        raise ValueError(f"rows of a batch need equal counts of {what} patches, got {np.unique(counts).tolist()}")
    return torch.from_numpy(np.nonzero(chosen)[1].astype(np.int64).reshape(len(chosen), counts[0]))


def _check_count(n_masked: int, n_patches: int) -> None:
    if not 0 <= n_masked <= n_patches:
        raise ValueError(f"n_masked must be between 0 and the {n_patches} patches of the grid, got {n_masked}")
