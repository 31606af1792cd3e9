"""Transformer layers on packed rows: groups of different shapes share every matmul, attention runs inside each group.

A packed tensor is `[T, D]`: the rows of all groups one after the other, T = sum of B * L. LayerNorm, linear layers and
MLPs see one tall matrix whatever the number of groups, and a group costs one attention call. So crops of all sizes go
through a block together, with the numbers of a call per crop size.

T packed rows, B samples of a group, L its tokens per sample, S its kept samples, D width, A heads, d = D / A,
Q queries, K context tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Attention",
    "Block",
    "CrossAttention",
    "CrossBlock",
    "Group",
    "JointBlock",
    "LayerScale",
    "Mlp",
    "SwiGlu",
    "add_branch",
    "attend",
    "attention_of_a_gpu",
    "init_layers",
]

# On a CPU the fused bfloat16 kernel takes 2 to 5 times as long as plain products, forward and backward, until the
# logits outgrow the caches.
_CPU_PLAIN_MAX_TOKENS = 512
_is_for_gpu = False


@dataclass(frozen=True)
class Group:
    """Shape of one group of a packed tensor, with the rotary tables (sin, cos) of its tokens if it has any.

    Each table is `[1, 1, L, d]`, or `[B, 1, L, d]` where samples show different patches. `bias`, `[1, A, L, L]` or
    `[B, A, L, L]`, is added to the logits of attention.
    """

    n_samples: int
    n_tokens: int
    rope: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return self.n_samples * self.n_tokens

    def select(self, samples: Tensor) -> Group:
        """The group left when only `samples [S]` are kept."""
        rope = self.rope
        if rope is not None and rope[0].shape[0] > 1:
            rope = (rope[0][samples], rope[1][samples])
        bias = self.bias
        if bias is not None and bias.shape[0] > 1:
            bias = bias[samples]
        return Group(samples.shape[0], self.n_tokens, rope, bias)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of `q [B, A, Q, d]` over `k, v [B, A, K, d]`. The one place that chooses a kernel.

    `bias`, `[1, A, Q, K]` or `[B, A, Q, K]`, is added to the scaled logits. Fused kernels take it in the dtype of `q`.
    """
    is_small = k.shape[-2] <= _CPU_PLAIN_MAX_TOKENS
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and is_small and not _is_for_gpu:
        logits = q * q.shape[-1] ** -0.5 @ k.mT  # [B, A, Q, K]
        weight: Tensor = (logits if bias is None else logits + bias).softmax(-1)
        return weight.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))


@contextlib.contextmanager
def attention_of_a_gpu() -> Iterator[None]:
    """Inside, `attend` is fused wherever it is on a GPU: for plans, made on a CPU, of a run on one."""
    global _is_for_gpu
    _is_for_gpu = True
    try:
        yield
    finally:
        _is_for_gpu = False


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position: turn the pairs (j, j + d/2) of `x [B, A, L, d]` by the angles in `rope`; same dtype out."""
    sin, cos = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _rotate_packed(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """`rotate` for packed `x [T, A, d]`, each group by its own tables."""
    parts = []
    for part, group in zip(torch.split(x, [g.n_rows for g in groups]), groups, strict=True):
        if group.rope is not None:
            rows = part.view(group.n_samples, group.n_tokens, *part.shape[1:]).transpose(1, 2)  # [B, A, L, d]
            part = rotate(rows, group.rope).transpose(1, 2).flatten(0, 1)  # [B*L, A, d]
        parts.append(part)
    return torch.cat(parts)


class Attention(nn.Module):
    """Self-attention inside each group, with `qkv` packed as (3, heads, d) along its output.

    `packed_kernel`, if set, attends inside all groups at once: see `packed_attention`.
    """

    packed_kernel: Callable[[Tensor, Tensor, Tensor, tuple[tuple[int, int], ...]], Tensor] | None = None

    def __init__(self, dim: int, n_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        """`x [T, D]` -> `[T, D]`."""
        if self.packed_kernel is not None and all(group.bias is None for group in groups):
            return self._attend_packed(self.qkv(x), groups, self.packed_kernel)
        parts = self.qkv(x).split([g.n_rows for g in groups])  # each [B*L, 3*D]
        mixed = [self._attend_group(qkv, group) for qkv, group in zip(parts, groups, strict=True)]
        out: Tensor = self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed))  # [T, D]
        return out

    def _attend_packed(self, qkv: Tensor, groups: Sequence[Group], kernel: Callable[..., Tensor]) -> Tensor:
        q, k, v = torch.unflatten(qkv, 1, (3, self.n_heads, -1)).unbind(1)  # 3 x [T, A, d]
        if any(group.rope is not None for group in groups):
            q, k = _rotate_packed(q, groups), _rotate_packed(k, groups)
        mixed = kernel(q, k, v, tuple((group.n_samples, group.n_tokens) for group in groups))  # [T, A, d]
        out: Tensor = self.proj(mixed.flatten(1))  # [T, D]
        return out

    def _attend_group(self, qkv: Tensor, group: Group) -> Tensor:
        qkv = qkv.view(group.n_samples, group.n_tokens, 3, self.n_heads, -1)  # [B, L, 3, A, d]
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # 3 x [B, A, L, d]
        if group.rope is not None:
            q, k = rotate(q, group.rope), rotate(k, group.rope)
        return attend(q, k, v, group.bias).transpose(1, 2).reshape(group.n_rows, -1)  # [B*L, D]


class CrossAttention(nn.Module):
    """Queries attend to a context of another length; no attention among the queries."""

    def __init__(self, dim: int, n_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x [B, Q, D]`, `context [B, K, D]`, `bias` as in `attend` -> `[B, Q, D]`."""
        q = torch.unflatten(self.q(x), -1, (self.n_heads, -1)).transpose(1, 2)  # [B, A, Q, d]
        kv = torch.unflatten(self.kv(context), -1, (2, self.n_heads, -1))  # [B, K, 2, A, d]
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))  # 2 x [B, A, K, d]
        out: Tensor = self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))  # [B, Q, D]
        return out


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    """SiLU-gated linear unit (Shazeer, arXiv 2002.05202): `w3(silu(a) * b)` with `a, b = w12(x)`.

    `hidden` is the width that a plain MLP would have; two thirds of it, rounded up to a multiple of 8, keep the
    number of parameters.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        gated = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * gated)
        self.w3 = nn.Linear(gated, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned gain per feature, small at the start (CaiT, arXiv 2103.17239, eq. 3)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def add_branch(
    x: Tensor, groups: Sequence[Group], branch: Callable[[Tensor, Sequence[Group]], Tensor], drop_prob: float
) -> Tensor:
    """`x + branch(x)` on packed rows `x [T, D]`, with stochastic depth per sample when `drop_prob` > 0.

    In each group the branch runs on B * (1 - drop_prob) random samples only, rounded and at least one, and its result
    is scaled by B over that number, so dropped samples cost nothing (DINOv2, arXiv 2304.07193, section 5).
    """
    if drop_prob == 0.0:
        return x + branch(x, groups)
    rows, kept, gains = [], [], []
    offset = 0
    for group in groups:
        n_kept = max(1, round(group.n_samples * (1.0 - drop_prob)))
        samples = torch.randperm(group.n_samples, device=x.device)[:n_kept]  # [S]
        token = torch.arange(group.n_tokens, device=x.device)
        rows.append((offset + samples[:, None] * group.n_tokens + token).flatten())  # [S*L]
        kept.append(group.select(samples))
        gains.append(x.new_full((n_kept * group.n_tokens, 1), group.n_samples / n_kept))
        offset += group.n_rows
    index = torch.cat(rows)  # [sum of S*L]
    update = branch(x.index_select(0, index), kept) * torch.cat(gains)
    return x.index_add(0, index, update.to(x.dtype))  # [T, D]


class BlockNorm(nn.LayerNorm):
    """LayerNorm whose gain and bias may be of a lower precision than its input: FSDP can gather them in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        precision = torch.promote_types(self.weight.dtype, x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(precision), self.bias.to(precision), self.eps)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP branches, each with optional LayerScale and stochastic depth."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        mlp_ratio: float = 4.0,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        layer_scale_init: float | None = None,
        drop_path_prob: float = 0.0,
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.drop_path_prob = drop_path_prob
        self.norm1 = BlockNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, n_heads, qkv_bias)
        self.ls1 = nn.Identity() if layer_scale_init is None else LayerScale(dim, layer_scale_init)
        self.norm2 = BlockNorm(dim, eps=norm_eps)
        self.mlp = (SwiGlu if mlp == "swiglu" else Mlp)(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale_init is None else LayerScale(dim, layer_scale_init)

    def forward(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        """`x [T, D]` -> `[T, D]`."""
        drop_prob = self.drop_path_prob if self.training else 0.0
        x = add_branch(x, groups, self._attention_branch, drop_prob)
        return add_branch(x, groups, self._mlp_branch, drop_prob)

    def _attention_branch(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x), groups))
        return out

    def _mlp_branch(self, x: Tensor, _: Sequence[Group]) -> Tensor:
        out: Tensor = self.ls2(self.mlp(self.norm2(x)))
        return out


class CrossBlock(nn.Module):
    """Pre-norm block whose queries see a context and not each other (CrossMAE, arXiv 2401.14391, section 3.2)."""

    def __init__(self, dim: int, n_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = BlockNorm(dim, eps=norm_eps)
        self.attn = CrossAttention(dim, n_heads)
        self.norm2 = BlockNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`x [B, Q, D]`, `context [B, K, D]` -> `[B, Q, D]`."""
        x = x + self.attn(self.norm1(x), context)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class JointBlock(nn.Module):
    """Pre-norm block: self-attention, cross-attention to a context, MLP (CROMA, arXiv 2311.00566, section 3).

    Queries and context of the cross-attention go through the same norm.
    """

    def __init__(
        self, dim: int, n_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = BlockNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, n_heads, qkv_bias)
        self.norm2 = BlockNorm(dim, eps=norm_eps)
        self.cross_attn = CrossAttention(dim, n_heads, qkv_bias)
        self.norm3 = BlockNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, context: Tensor, bias: Tensor | None = None, cross_bias: Tensor | None = None
    ) -> Tensor:
        """`x [B, Q, D]`, `context [B, K, D]` -> `[B, Q, D]`; `bias` is between queries, `cross_bias` to the context."""
        group = Group(x.shape[0], x.shape[1], bias=bias)
        x = x + self.attn(self.norm1(x).flatten(0, 1), [group]).view_as(x)
        x = x + self.cross_attn(self.norm2(x), self.norm2(context), cross_bias)
        out: Tensor = x + self.mlp(self.norm3(x))
        return out


@torch.no_grad()
def init_layers(root: nn.Module) -> None:
    """Fill every Linear (Xavier uniform, zero bias), LayerNorm and LayerScale below `root`, as MAE does.

    Parameters that a module holds itself (tokens, tables, queries) are its own to fill.
    """
    for module in root.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.initial)
