"""Attention inside every group of a packed tensor by one kernel, on a GPU, instead of a call a group.

Sequences of all lengths lie one after the other, as the packed rows of `layers` do, so nothing is padded or copied. The
numbers are those of `layers.attend` but for rounding. CPUs have no such kernel.

T packed rows, A heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ssl_eo.components import import_extra
from ssl_eo.models.layers import Attention

__all__ = ["AttentionKernel", "Lengths", "use_attention"]

AttentionKernel = Literal["sdpa", "varlen", "xformers"]
Lengths = tuple[tuple[int, int], ...]  # of each group: how many sequences, and tokens in each


def use_attention(root: nn.Module, kernel: AttentionKernel, device: torch.device) -> None:
    """Let every self-attention below `root` use `kernel`; where it has biases (ALiBi) it stays as it is.

    Raises `ValueError` where the device has no such kernel, and `MissingExtraError` without the package.
    """
    if kernel == "sdpa":
        return
    if device.type != "cuda":
        raise ValueError(f"parallel.attention: {kernel} needs a GPU, this is a {device.type}; use sdpa")
    packed: Callable[[Tensor, Tensor, Tensor, Lengths], Tensor] = _varlen
    if kernel == "xformers":
        import_extra("cuda", "xformers.ops", "parallel.attention xformers")
        packed = _xformers
    for module in root.modules():
        if isinstance(module, Attention):
            module.packed_kernel = packed


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """torch's own, of `q, k, v [T, A, d]` in half precision -> `[T, A, d]`."""
    from torch.nn.attention.varlen import varlen_attn

    offsets = _offsets(lengths, q.device)  # [sequences + 1]
    longest = max(n_tokens for _, n_tokens in lengths)
    return cast(Tensor, varlen_attn(q, k, v, offsets, offsets, longest, longest))


def _xformers(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """xformers' `memory_efficient_attention` with a block-diagonal mask: `[T, A, d]` -> `[T, A, d]`."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(q[None], k[None], v[None], _block_diagonal(lengths))[0]
    return out


# Lengths are the same in every step, with drop path too, so what follows from them is made once.


@lru_cache(maxsize=64)
def _offsets(lengths: Lengths, device: torch.device) -> Tensor:
    """Where each sequence begins, and the end of the last, as int32."""
    tokens = [n_tokens for n_sequences, n_tokens in lengths for _ in range(n_sequences)]
    return torch.tensor([0, *accumulate(tokens)], dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _block_diagonal(lengths: Lengths) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([n_tokens for n_sequences, n_tokens in lengths for _ in range(n_sequences)])
