"""Block masks of a batch of self-distillation: loops over cells, as research code has them, or ours.

R rows (views x samples), N = h * w patches of a grid, M masked patches of all rows.
"""

from __future__ import annotations

import math
import random
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from _table import Row
from _timing import best_processor_seconds
from numpy.typing import NDArray

from ssl_eo.data.spread_masking import SpreadMaskConfig, spread_masks
from ssl_eo.data.types import RaggedMaskBatch

__all__ = ["measure_masks"]

N_SAMPLES, N_VIEWS = 64, 2
GRIDS = (16, 16), (37, 37)  # of views of 224 and 518 pixels, in patches of 14


def measure_masks(n_turns: int) -> list[Row]:
    """Masks of 64 samples, of two views each, one of which is masked; on one core."""
    rows = []
    for grid in GRIDS:
        calls = {"loop over cells": partial(by_cells, grid), "spread_masks": partial(by_rectangles, grid)}
        seconds = best_processor_seconds(calls, n_turns)
        slow, fast = seconds["loop over cells"], seconds["spread_masks"]
        of_grid = f"{grid[0]} x {grid[1]} patches"
        rows += [
            Row("masks", f"loop over cells, {of_grid}", N_SAMPLES / slow, "samples/s", 1.0),
            Row("masks", f"spread_masks, {of_grid}", N_SAMPLES / fast, "samples/s", slow / fast, least_ratio=20),
        ]
    return rows


def by_rectangles(grid: tuple[int, int], seed: int = 0) -> RaggedMaskBatch:
    """What objective `dinov2` does: the masks of all samples at once, views outermost."""
    return spread_masks(SpreadMaskConfig(), grid, N_VIEWS, range(N_SAMPLES), seed)


def by_cells(grid: tuple[int, int], seed: int = 0) -> RaggedMaskBatch:
    """DINOv2's rule: half of all views are masked, each by a share from its own part of the range 0.1 to 0.5."""
    rng = random.Random(seed)
    n_views = N_SAMPLES * N_VIEWS
    edges = np.linspace(0.1, 0.5, n_views // 2 + 1).tolist()
    counts = [int(grid[0] * grid[1] * rng.uniform(low, high)) for low, high in pairwise(edges)]
    masks = [_blocks(rng, grid, count) for count in [*counts, *[0] * (n_views - len(counts))]]
    rng.shuffle(masks)
    mask = torch.stack([torch.from_numpy(m) for m in masks]).flatten(1)  # [R, N]
    weight = (1 / mask.sum(-1).clamp_min(1)).unsqueeze(-1).expand_as(mask)[mask]  # [M]
    return RaggedMaskBatch(mask, mask.flatten().nonzero().flatten(), weight)


def _blocks(rng: random.Random, grid: tuple[int, int], count: int) -> NDArray[np.bool_]:
    """`[h, w]` with about `count` True: rectangles are added until ten draws in a row add none (BEiT, algorithm 1)."""
    mask = np.zeros(grid, dtype=bool)
    n_left = count
    while n_left > 0 and (n_new := _add_block(rng, mask, min(n_left, mask.size // 2))):
        n_left -= n_new
    return mask


def _add_block(rng: random.Random, mask: NDArray[np.bool_], most: int) -> int:
    """Hides a random rectangle with at most `most` cells that were visible; how many there were."""
    h, w = mask.shape
    for _ in range(10):
        area, aspect = rng.uniform(4, most), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= h or width >= w:
            continue
        top, left = rng.randint(0, h - height), rng.randint(0, w - width)
        if 0 < height * width - mask[top : top + height, left : left + width].sum() <= most:
            return _hide(mask, range(top, top + height), range(left, left + width))
    return 0


def _hide(mask: NDArray[np.bool_], rows: range, columns: range) -> int:
    """Hides a rectangle cell by cell; how many of them were visible."""
    n_new = 0
    for row in rows:
        for column in columns:
            if mask[row, column] == 0:
                mask[row, column] = 1
                n_new += 1
    return n_new
