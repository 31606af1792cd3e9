"""Decoders of masked image modelling, and the heads that turn their tokens into pixels.

A decoder sees the tokens of visible patches and answers for hidden ones. Tokens stay in the order (prefix, visible,
hidden) with their positions looked up: attention does not mind, and nothing is shuffled back.

B samples, N patches, K visible, M answered for, P prefix tokens, D encoder width, d decoder width, C channels, p patch
size, E = p*p, R basis patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.models.layers import Block, CrossBlock, Group, init_layers
from ssl_eo.models.position import sincos_grid, take_patches
from ssl_eo.models.vit import Tokens
from ssl_eo.sensors import KINDS, ORBITS, POLARIZATIONS, ChannelMeta

__all__ = ["DecoderConfig", "LinearOutput", "MaskedDecoder", "SpectralConfig", "SpectralOutput"]


@dataclass
class DecoderConfig:
    """The transformer between the encoder and the output head. MAE's own is full, 512 wide, 8 deep, 16 heads."""

    # "full": self-attention over visible and hidden tokens (MAE). "cross": hidden ones look at visible ones (CrossMAE).
    kind: Literal["full", "cross"] = "full"
    embed_dim: int = 128  # width of a token
    depth: int = 4  # number of blocks
    n_heads: int = 4  # of attention; divides embed_dim
    mlp_ratio: float = 4.0  # hidden width / width
    norm_eps: float = 1e-6  # of LayerNorm

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.embed_dim < 1 or self.embed_dim % self.n_heads or self.embed_dim % 4:
            raise ValueError(
                f"embed_dim must be a multiple of 4 and of n_heads, got {self.embed_dim} and {self.n_heads}"
            )
        if self.depth < 1 or not self.mlp_ratio > 0 or not self.norm_eps > 0:
            raise ValueError(
                "depth, mlp_ratio and norm_eps must be positive, got"
                f" {self.depth}, {self.mlp_ratio} and {self.norm_eps}"
            )


class MaskedDecoder(nn.Module):
    """Features for hidden patches from the tokens of visible ones.

    `full` is the decoder of MAE (arXiv 2111.06377, section 3). `cross` is that of CrossMAE (arXiv 2401.14391): a query
    per hidden patch attends to the visible tokens alone, so its cost falls with the number of answers asked for.
    """

    def __init__(self, cfg: DecoderConfig, encoder_dim: int) -> None:
        super().__init__()
        self.kind = cfg.kind
        self.embed_dim = cfg.embed_dim
        self.embed = nn.Linear(encoder_dim, cfg.embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.embed_dim))
        sizes = (cfg.embed_dim, cfg.n_heads, cfg.mlp_ratio)
        block = Block if cfg.kind == "full" else CrossBlock
        self.blocks = nn.ModuleList(block(*sizes, norm_eps=cfg.norm_eps) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.embed_dim, eps=cfg.norm_eps)

    def forward(
        self,
        tokens: Tokens,
        ids_keep: Tensor,
        ids_masked: Tensor,
        table: Tensor | None = None,
        all_patches: bool = False,
    ) -> Tensor:
        """Features `[B, M, d]` for `ids_masked [B, M]`, from the tokens of the visible patches `ids_keep [B, K]`.

        `ids_masked` may leave hidden patches out. `table`, `[N, d]` or `[B, N, d]`, is added to patches for where (and
        when) they are, by default sin-cos of their place in one grid. With `all_patches` the features of all patches,
        `[B, N, d]` in order; the ids must then cover the grid.
        """
        if table is None:
            table = sincos_grid(tokens.grid, self.embed_dim, tokens.x.device)  # [N, d]
        x = self.embed(tokens.x)  # [B, P + K, d]
        position = F.pad(take_patches(table, ids_keep), (0, 0, tokens.n_prefix_tokens, 0))  # [B, P + K, d]
        context = x + position
        if self.kind == "cross":
            ids = torch.arange(table.shape[-2], device=x.device).expand(x.shape[0], -1) if all_patches else ids_masked
            return self._decode_cross(context, self.mask_token + take_patches(table, ids))
        answers = self._decode_full(context, self.mask_token + take_patches(table, ids_masked))
        if not all_patches:
            return self._norm(answers[:, context.shape[1] :])  # [B, M, d]
        order = torch.cat((ids_keep, ids_masked), dim=1).argsort(dim=1)  # [B, N]
        return self._norm(answers[:, tokens.n_prefix_tokens :].take_along_dim(order[..., None], dim=1))

    @torch.no_grad()
    def init_weights(self) -> None:
        init_layers(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def _decode_full(self, context: Tensor, queries: Tensor) -> Tensor:
        x = torch.cat((context, queries), dim=1)  # [B, P + K + M, d]
        group = Group(x.shape[0], x.shape[1])
        rows = x.flatten(0, 1)
        for block in self.blocks:
            rows = block(rows, [group])
        return rows.view_as(x)

    def _decode_cross(self, context: Tensor, queries: Tensor) -> Tensor:
        for block in self.blocks:
            queries = block(queries, context)  # [B, M, d]
        return self._norm(queries)

    def _norm(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


class LinearOutput(nn.Module):
    """Values of a sensor with a fixed number of channels: `[B, M, d]` -> `[B, M, E*C]`, channel last.

    `n_values` (E) is the number of values of each channel of a patch: p*p for its pixels.
    """

    def __init__(self, dim: int, n_channels: int, n_values: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, n_values * n_channels)

    def forward(self, x: Tensor, channels: ChannelMeta) -> Tensor:
        out: Tensor = self.proj(x)
        return out

    @torch.no_grad()
    def init_weights(self) -> None:
        init_layers(self)


@dataclass
class SpectralConfig:
    """Pixels of any sensor as mixtures of a few basis patches."""

    rank: int = 32  # basis patches per token; a spectrum of more bands than this is a combination of them
    code_dim: int = 64  # sin-cos code of each of wavelength and width
    hidden: int = 128  # of the MLP from a channel's code to its coefficients

    def __post_init__(self) -> None:
        if self.rank < 1 or self.hidden < 1 or self.code_dim < 2 or self.code_dim % 2:
            raise ValueError(
                "rank and hidden must be positive and code_dim even, got"
                f" {self.rank}, {self.hidden} and {self.code_dim}"
            )


class SpectralOutput(nn.Module):
    """Values of any sensor: a token gives R basis patches, and each channel mixes them with coefficients of its own.

    The coefficients come from what the channel measures, so bands never seen in training are interpolated. It is the
    linear mixing model of spectral unmixing (abundances times endmember spectra) with both factors learned; cost grows
    with C by R multiply-adds per value only. `n_values` (E) is the number of values of each channel of a patch.
    """

    def __init__(self, dim: int, n_values: int, cfg: SpectralConfig) -> None:
        super().__init__()
        self.rank = cfg.rank
        self.code_dim = cfg.code_dim
        self.basis = nn.Linear(dim, n_values * cfg.rank)
        # Row 0 of the last two is "unknown or does not apply".
        self.kind_rows = nn.Parameter(torch.empty(len(KINDS), cfg.hidden))
        self.polarization_rows = nn.Parameter(torch.empty(1 + len(POLARIZATIONS), cfg.hidden))
        self.orbit_rows = nn.Parameter(torch.empty(1 + len(ORBITS), cfg.hidden))
        self.fc1 = nn.Linear(2 * cfg.code_dim, cfg.hidden)
        self.fc2 = nn.Linear(cfg.hidden, cfg.rank)

    def forward(self, x: Tensor, channels: ChannelMeta) -> Tensor:
        """`[B, M, d]` -> `[B, M, E*C]`, channel last, for `channels [C]` or `[B, C]`."""
        mixing = self.coefficients(channels).mT  # [R, C] or [B, R, C]
        if mixing.ndim == 3:
            mixing = mixing[:, None]  # [B, 1, R, C]
        basis = torch.unflatten(self.basis(x), -1, (-1, self.rank))  # [B, M, E, R]
        return (basis @ mixing).flatten(2)  # [B, M, E*C]

    def coefficients(self, channels: ChannelMeta) -> Tensor:
        """How each channel mixes the basis patches: `[C, R]` or `[B, C, R]`."""
        code = torch.cat(
            (_log_code(channels.wavelength_um, self.code_dim), _log_code(channels.fwhm_um, self.code_dim)), dim=-1
        )
        hidden = self.fc1(code.to(self.fc1.weight.dtype)) + self.kind_rows[channels.kind]  # [..., C, hidden]
        hidden = hidden + self.polarization_rows[channels.polarization + 1] + self.orbit_rows[channels.orbit + 1]
        out: Tensor = self.fc2(F.gelu(hidden))
        return out

    @torch.no_grad()
    def init_weights(self) -> None:
        init_layers(self)
        for rows in (self.kind_rows, self.polarization_rows, self.orbit_rows):
            nn.init.normal_(rows, std=0.5)


def _log_code(value_um: Tensor, dim: int) -> Tensor:
    """Sin-cos of log(value) at frequencies 1 to 64 per e-fold, `[..., dim]`; zeros where there is no value."""
    frequency = torch.logspace(0.0, 6.0, dim // 2, base=2.0, device=value_um.device)
    phase = value_um.clamp_min(1e-6).log()[..., None] * frequency
    return torch.cat((phase.sin(), phase.cos()), dim=-1) * (value_um > 0)[..., None]
