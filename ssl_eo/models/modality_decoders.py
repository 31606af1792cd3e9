"""The decoders of MultiMAE: a small one for each target, all of them run as one.

Decoders have the same shapes and weights of their own. These are stacked, so that a layer of all decoders is one
batched product, and attention of all is one call with as many samples. The numbers are those of a loop over decoders.

O targets, each with a decoder, T visible modalities, B samples, N patches of a view, K visible tokens of a sample, P
prefix tokens, D encoder width, d decoder width, A heads, h = d / A, R rows, F I features out and in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.models.layers import attend
from ssl_eo.models.vit import Tokens

__all__ = ["DecoderTarget", "ModalityDecoderConfig", "ModalityDecoders"]


@dataclass
class ModalityDecoderConfig:
    """The decoder of each target. Deeper ones leave more of the work of prediction out of the encoder."""

    embed_dim: int = 256  # width of a token
    depth: int = 2  # blocks of self-attention after the cross-attention; 0: none
    n_heads: int = 8  # of attention; divides embed_dim
    mlp_ratio: float = 4.0  # hidden width / width
    norm_eps: float = 1e-6  # of LayerNorm

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.embed_dim < 1 or self.embed_dim % self.n_heads or self.embed_dim % 4:
            raise ValueError(
                f"embed_dim must be a multiple of 4 and of n_heads, got {self.embed_dim} and {self.n_heads}"
            )
        if self.depth < 0 or not self.mlp_ratio > 0 or not self.norm_eps > 0:
            raise ValueError(
                "depth must not be negative, mlp_ratio and norm_eps must be positive, got"
                f" {self.depth}, {self.mlp_ratio} and {self.norm_eps}"
            )


@dataclass(frozen=True)
class DecoderTarget:
    """What one decoder answers for: `n_values` of each patch of a modality, which is the `input`-th of those that are
    seen, or None where it never is.
    """

    n_values: int
    input: int | None


class ModalityDecoders(nn.Module):
    """Values of every patch of every target, from the visible tokens of all modalities (arXiv 2204.01678, section 3.3).

    Queries are the patches of the target's own modality: visible ones with what the encoder says of them, the others a
    mask token. They attend once to the visible tokens of all modalities, without a residual, and then to each other.
    """

    def __init__(
        self, cfg: ModalityDecoderConfig, encoder_dim: int, targets: Mapping[str, DecoderTarget], n_inputs: int
    ) -> None:
        super().__init__()
        self.embed_dim = cfg.embed_dim
        self.targets = dict(targets)
        self.n_inputs = n_inputs
        n, d = len(targets), cfg.embed_dim
        unseen = [target.input is None for target in targets.values()]
        self.embed = StackedLinear(n, encoder_dim, d)
        self.mask_token = nn.Parameter(torch.empty(n, 1, d))
        self.modality_codes = nn.Parameter(torch.empty(n, n_inputs, d))
        self.target_codes = nn.Parameter(torch.empty(sum(unseen), d)) if any(unseen) else None
        self.query_norm = StackedNorm(n, d, cfg.norm_eps)
        self.context_norm = StackedNorm(n, d, cfg.norm_eps)
        self.cross = _StackedCrossAttention(n, d, cfg.n_heads)
        self.out_norm = StackedNorm(n, d, cfg.norm_eps)
        self.mlp = _StackedMlp(n, d, int(d * cfg.mlp_ratio))
        self.blocks = nn.ModuleList(_StackedBlock(n, cfg) for _ in range(cfg.depth))
        self.outputs = nn.ModuleDict({name: nn.Linear(d, target.n_values) for name, target in targets.items()})

    def forward(self, tokens: Tokens, ids_keep: Tensor, table: Tensor) -> dict[str, Tensor]:
        """`[B, N, n_values]` of each target.

        `ids_keep [B, K]` are the tokens' modality * N + patch, `table [N, d]` is added for the position of a patch.
        """
        n_patches, n_prefix = len(table), tokens.n_prefix_tokens
        x = self.embed(tokens.x)  # [O, B, P + K, d]
        # A product instead of a look-up: the gradient of one would add up rows in any order.
        modality = torch.arange(self.n_inputs, device=x.device) == (ids_keep // n_patches)[..., None]  # [B, K, T]
        codes = torch.einsum("bkt,otd->obkd", modality.to(x.dtype), self.modality_codes)
        placed = x[:, :, n_prefix:] + codes + table[ids_keep % n_patches]  # [O, B, K, d]
        queries = self._queries(placed, ids_keep, table, n_patches)  # [O, B, N, d]
        context = torch.cat((x[:, :, :n_prefix], placed), dim=2)  # [O, B, P + K, d]
        x = self.cross(self.query_norm(queries), self.context_norm(context))  # [O, B, N, d]
        x = x + self.mlp(self.out_norm(x))
        for block in self.blocks:
            x = block(x)
        return {name: self.outputs[name](part) for name, part in zip(self.targets, x.unbind(0), strict=True)}

    def _queries(self, placed: Tensor, ids_keep: Tensor, table: Tensor, n_patches: int) -> Tensor:
        """`[O, B, N, d]`: of the visible tokens `placed [O, B, K, d]` those of the target's modality, else masks."""
        n_samples, n_visible = ids_keep.shape
        place = torch.arange(n_visible, device=ids_keep.device).expand(n_samples, -1)
        # Which of the K tokens shows a patch; none, which is K, where it is hidden, and for a modality never seen.
        none = ids_keep.new_full((n_samples, (self.n_inputs + 1) * n_patches), n_visible)
        which = none.scatter(1, ids_keep, place).view(n_samples, -1, n_patches)  # [B, T + 1, N]
        inputs = [self.n_inputs if t.input is None else t.input for t in self.targets.values()]
        own = torch.stack([which[:, i] for i in inputs])  # [O, B, N]
        code = self._own_codes(inputs)  # [O, 1, d]
        masks = (self.mask_token + code + table)[:, None]  # [O, 1, N, d]
        seen = placed.gather(2, own.clamp(max=n_visible - 1)[..., None].expand(*own.shape, placed.shape[-1]))
        return torch.where((own < n_visible)[..., None], seen, masks.to(seen.dtype))

    def _own_codes(self, inputs: Sequence[int]) -> Tensor:
        """What tells a target's modality from others, as its decoder says: `[O, 1, d]`."""
        rows, unseen = [], iter(self.target_codes.unbind(0) if self.target_codes is not None else ())
        for decoder, modality in enumerate(inputs):
            rows.append(next(unseen) if modality == self.n_inputs else self.modality_codes[decoder, modality])
        return torch.stack(rows)[:, None]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter, each decoder as it would be by itself."""
        for module in self.modules():
            if isinstance(module, StackedLinear | StackedNorm):
                module.init_weights()
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for token in (self.mask_token, self.modality_codes, self.target_codes):
            if token is not None:
                nn.init.normal_(token, std=0.02)


class StackedLinear(nn.Module):
    """A linear layer for each of O decoders: `[O, B, R, I]` -> `[O, B, R, F]`; `[B, R, I]` is an input of all."""

    def __init__(self, n: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n, n_out))

    def forward(self, x: Tensor) -> Tensor:
        n, n_out, _ = self.weight.shape
        if x.ndim == 3:  # one product, which reads the input once
            out = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())  # [..., O*F]
            return out.view(*x.shape[:-1], n, n_out).permute(2, 0, 1, 3)
        rows = torch.baddbmm(self.bias[:, None], x.flatten(1, -2), self.weight.mT)  # [O, R, F]
        return rows.view(*x.shape[:-1], n_out)

    @torch.no_grad()
    def init_weights(self) -> None:
        bound = math.sqrt(6.0 / sum(self.weight.shape[1:]))  # Xavier, of each layer
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)


class StackedNorm(nn.Module):
    """A LayerNorm for each of O decoders: `[O, B, R, d]` -> `[O, B, R, d]`."""

    def __init__(self, n: int, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.empty(n, 1, 1, dim))
        self.bias = nn.Parameter(torch.empty(n, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=self.eps), self.gain)

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.ones_(self.gain)
        nn.init.zeros_(self.bias)


class _StackedMlp(nn.Module):
    def __init__(self, n: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = StackedLinear(n, dim, hidden)
        self.fc2 = StackedLinear(n, hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _StackedCrossAttention(nn.Module):
    def __init__(self, n: int, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q = StackedLinear(n, dim, dim)
        self.kv = StackedLinear(n, dim, 2 * dim)
        self.proj = StackedLinear(n, dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`x [O, B, N, d]`, `context [O, B, P + K, d]` -> `[O, B, N, d]`."""
        out: Tensor = self.proj(_attend(self.q(x), self.kv(context), self.n_heads))
        return out


class _StackedBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, n: int, cfg: ModalityDecoderConfig) -> None:
        super().__init__()
        d = cfg.embed_dim
        self.n_heads = cfg.n_heads
        self.norm1 = StackedNorm(n, d, cfg.norm_eps)
        self.qkv = StackedLinear(n, d, 3 * d)
        self.proj = StackedLinear(n, d, d)
        self.norm2 = StackedNorm(n, d, cfg.norm_eps)
        self.mlp = _StackedMlp(n, d, int(d * cfg.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """`[O, B, N, d]` -> `[O, B, N, d]`."""
        d = x.shape[-1]
        q, kv = self.qkv(self.norm1(x)).split((d, 2 * d), dim=-1)
        x = x + self.proj(_attend(q, kv, self.n_heads))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def _attend(q: Tensor, kv: Tensor, n_heads: int) -> Tensor:
    """Attention of queries `[O, B, N, d]` over keys and values `[O, B, K, 2 * d]`: `[O, B, N, d]`."""
    n_decoders, n_samples, _, d = q.shape
    q = q.reshape(n_decoders * n_samples, q.shape[2], n_heads, -1).transpose(1, 2)  # [O*B, A, N, h]
    k, v = kv.reshape(len(q), kv.shape[2], 2, n_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # 2 x [O*B, A, K, h]
    return attend(q, k, v).transpose(1, 2).reshape(n_decoders, n_samples, -1, d)
