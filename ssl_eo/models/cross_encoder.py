"""What joins the encoders of two groups of sensors: CROMA's cross encoder, pooling heads and learned temperature.

Fuller et al. 2023 (arXiv 2311.00566), section 3. The groups are called optical and radar, as there.

B samples, Q visible radar patches, K visible optical patches, D width of the encoders.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.models.alibi import alibi_bias
from ssl_eo.models.layers import JointBlock, init_layers
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput, Tokens

__all__ = ["CrossEncoder", "OpticalRadar", "PairHead", "PoolHead"]


class CrossEncoder(nn.Module):
    """Radar tokens that see each other and the optical tokens; attention of both kinds falls with distance.

    Width, heads and norms are those of the encoders, `cfg`; `depth` is its number of blocks. They have plain MLPs, and
    neither LayerScale nor stochastic depth.
    """

    def __init__(self, cfg: EncoderConfig, depth: int) -> None:
        super().__init__()
        self.n_heads = cfg.heads
        self.blocks = nn.ModuleList(
            JointBlock(cfg.width, cfg.heads, cfg.mlp_ratio, cfg.norm_eps, cfg.qkv_bias) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)

    def forward(
        self, radar: Tokens, optical: Tokens, radar_ids: Tensor | None = None, optical_ids: Tensor | None = None
    ) -> Tokens:
        """A token for each radar patch, after the final norm.

        `radar_ids [B, Q]` and `optical_ids [B, K]` say which patches of the grid the tokens are of; None: all of them.
        Raises `ValueError` where the two have different grids.
        """
        grid, x, context = radar.grid, radar.patches, optical.patches  # [B, Q, D], [B, K, D]
        if optical.grid != grid:
            raise ValueError(f"radar patches form a grid of {grid}, optical ones of {optical.grid}: show one size")
        bias = alibi_bias(grid, self.n_heads, x.device, radar_ids)
        is_whole = radar_ids is None and optical_ids is None
        keys = torch.arange(grid[0] * grid[1], device=x.device)[None] if optical_ids is None else optical_ids
        cross_bias = bias if is_whole else alibi_bias(grid, self.n_heads, x.device, radar_ids, keys)
        for block in self.blocks:
            x = block(x, context, bias, cross_bias)  # [B, Q, D]
        return Tokens(self.norm(x), 0, grid)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter."""
        init_layers(self)


class PoolHead(nn.Module):
    """Mean over patches, LayerNorm and an MLP of four times the width: what stands for a whole view (GAP-FFN)."""

    def __init__(self, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tokens) -> Tensor:
        """`[B, D]`."""
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(tokens.patches.mean(1)))))
        return out

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter."""
        init_layers(self)


class PairHead(nn.Module):
    """A projection of each group into the space where pairs are compared, and the learned scale of their cosines.

    `logit_scale` is the logarithm of one over the temperature, as in CLIP (arXiv 2103.00020).
    """

    def __init__(self, dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.optical = nn.Linear(dim, dim)
        self.radar = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.empty(1))  # not 0-d: FSDP cannot spread that

    def forward(self, optical: Tensor, radar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of pooled `[B, D]` each: both projected, `[B, D]`, and the logarithm of their scale, 0-d."""
        return self.optical(optical), self.radar(radar), self.logit_scale[0]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter; the temperature is what was given."""
        init_layers(self)
        nn.init.constant_(self.logit_scale, -math.log(self.temperature))


class OpticalRadar(nn.Module):
    """The parts of a CROMA that outlive pretraining, as one model. It holds the modules that it is given."""

    def __init__(
        self, optical: Encoder, radar: Encoder, cross: CrossEncoder, optical_head: PoolHead, radar_head: PoolHead
    ) -> None:
        super().__init__()
        self.optical = optical
        self.radar = radar
        self.cross = cross
        self.optical_head = optical_head
        self.radar_head = radar_head

    @classmethod
    def of_sizes(
        cls, optical: EncoderConfig, radar: EncoderConfig, n_channels: tuple[int | None, int | None], cross_depth: int
    ) -> OpticalRadar:
        """Parts of these sizes; `n_channels` are those of a `conv` embedding of each encoder."""
        return cls(
            Encoder(optical, n_channels[0]),
            Encoder(radar, n_channels[1]),
            CrossEncoder(optical, cross_depth),
            PoolHead(optical.width, optical.norm_eps),
            PoolHead(optical.width, optical.norm_eps),
        )

    def forward(self, optical: EncoderInput, radar: EncoderInput) -> tuple[Tokens, Tokens, Tokens]:
        """Tokens of the optical, the radar and the cross encoder."""
        optical_tokens, radar_tokens = self.optical([optical])[0], self.radar([radar])[0]
        return optical_tokens, radar_tokens, self.cross(radar_tokens, optical_tokens, radar.ids_keep, optical.ids_keep)
