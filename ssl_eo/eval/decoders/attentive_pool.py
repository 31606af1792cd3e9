"""Learned queries that look for what matters among the patches of the last tap (arXiv 2202.03026, section 3.3).

For features that are not trained to be averaged, such as those of masked autoencoders.

B images, D width, Q queries, N patches, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_eo.eval.decoders._options import check_options
from ssl_eo.eval.decoders.base import TapMaps, TapShape
from ssl_eo.eval.kinds import Kind
from ssl_eo.models.layers import CrossAttention, init_layers

__all__ = ["KINDS", "Config", "Decoder"]

KINDS: tuple[Kind, ...] = ("classification", "multilabel", "regression")


@dataclass
class Config:
    """Attention, then a linear layer on what all queries found."""

    n_queries: int = 1  # learned, each of which attends to all patches
    n_heads: int = 8  # of attention; divides the width of the last tap
    dropout_prob: float = 0.0  # of what queries found

    def __post_init__(self) -> None:
        check_options(self)


class Decoder(nn.Module):
    """`[B, K]`."""

    def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None:
        super().__init__()
        width = shape.widths[-1]
        if width % cfg.n_heads:
            raise ValueError(f"n_heads {cfg.n_heads} must divide the width of the last tap, {width}")
        self.queries = nn.Parameter(torch.empty(1, cfg.n_queries, width))
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, cfg.n_heads)
        self.dropout = nn.Dropout(cfg.dropout_prob)
        self.out = nn.Linear(cfg.n_queries * width, n_outputs)
        init_layers(self)
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K]`; `size` is of no account."""
        patches = self.norm(taps.maps[-1].flatten(2).mT)  # [B, N, D]
        found = self.attention(self.queries.expand(len(patches), -1, -1), patches)  # [B, Q, D]
        logits: Tensor = self.out(self.dropout(found.flatten(1)))
        return logits
