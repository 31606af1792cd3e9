"""Attention that falls with distance: linear biases in two dimensions, computed from where the patches are.

Between patches at p and q (row, column), head a of A adds -m_a * |p - q| to its logits (ALiBi, arXiv 2108.12409, in the
two-dimensional form of CROMA, arXiv 2311.00566, section 3). Nothing of the whole grid is looked up where patches are
hidden: the distances of those that are left are all there is to compute.

B samples, A heads, N patches of a grid, K visible patches, P prefix tokens, Q queries, L keys.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["alibi_bias", "alibi_slopes"]


def alibi_slopes(n_heads: int) -> list[float]:
    """The slope m of each head: r, r^2, r^3, ... down to 2^-8.

    For a number of heads that is no power of two: those of the power below it, then every other one of the power above.
    """
    power = 1 << n_heads.bit_length() - 1
    ratio = 2.0 ** (-8.0 / power)
    slopes = [ratio * ratio**i for i in range(power)]  # rounded as released models have them
    return slopes if power == n_heads else slopes + alibi_slopes(2 * power)[::2][: n_heads - power]


def alibi_bias(
    grid: tuple[int, int],
    n_heads: int,
    device: torch.device,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    n_prefix: int = 0,
) -> Tensor:
    """What is added to logits, float32 also under autocast: `[B, A, Q, L]`, or `[1, A, N, N]` where nothing is hidden.

    `query_ids [B, Q]` and `key_ids [B, L]` are flat indices of patches of the grid (h, w), in any order; without
    `key_ids` the keys are the queries. `n_prefix` tokens come before the queries and the keys, at distance 0 from all.
    """
    if query_ids is None and key_ids is None:
        return _whole_bias(grid, n_heads, device, n_prefix)
    every = torch.arange(grid[0] * grid[1], device=device)[None]  # [1, N]
    queries = every if query_ids is None else query_ids
    return _bias(queries, queries if key_ids is None else key_ids, grid[1], n_heads, n_prefix)


@lru_cache(maxsize=16)
def _whole_bias(grid: tuple[int, int], n_heads: int, device: torch.device, n_prefix: int) -> Tensor:
    with torch.inference_mode(False):
        every = torch.arange(grid[0] * grid[1], device=device)[None]  # [1, N]
        return _bias(every, every, grid[1], n_heads, n_prefix)


def _bias(query_ids: Tensor, key_ids: Tensor, width: int, n_heads: int, n_prefix: int) -> Tensor:
    rows = query_ids[:, :, None] // width - key_ids[:, None] // width  # [B, Q, L]
    columns = query_ids[:, :, None] % width - key_ids[:, None] % width
    # Some kernels of float32 round a root to the second nearest number, others to the nearest.
    distance = (rows.square() + columns.square()).double().sqrt().float()  # [B, Q, L]
    slopes = _slopes(n_heads, query_ids.device)[:, None, None]  # [A, 1, 1]
    bias = distance[:, None] * slopes  # [B, A, Q, L]
    return F.pad(bias, (n_prefix, 0, n_prefix, 0)) if n_prefix else bias


@lru_cache(maxsize=16)
def _slopes(n_heads: int, device: torch.device) -> Tensor:
    """-m of each head, `[A]`."""
    with torch.inference_mode(False):
        return -torch.tensor(alibi_slopes(n_heads), device=device)
