"""A hidden layer on the pooled features of all taps.

Beside `identity` it differs in two things, the taps that it sees and the hidden layer: `taps` of either tells which of
them matters.

B images, D pooled width, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ssl_eo.eval.decoders._options import check_options
from ssl_eo.eval.decoders._pooling import Pool, Pooling, Taps
from ssl_eo.eval.decoders.base import TapMaps, TapShape
from ssl_eo.eval.kinds import Kind

__all__ = ["KINDS", "Config", "Decoder"]

KINDS: tuple[Kind, ...] = ("classification", "multilabel", "regression")


@dataclass
class Config:
    """Linear, GELU, linear."""

    hidden_dim: int | None = None  # that of the last tap where None
    pool: Pool = "mean"  # of patches, the CLS token, or both
    taps: Taps = "all"  # side by side, or last alone
    dropout_prob: float = 0.0  # of the hidden layer

    def __post_init__(self) -> None:
        check_options(self)


class Decoder(nn.Module):
    """`[B, K]`."""

    def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None:
        super().__init__()
        self.pooling = Pooling(shape, cfg.pool, cfg.taps)
        hidden_dim = shape.widths[-1] if cfg.hidden_dim is None else cfg.hidden_dim
        self.mlp = nn.Sequential(
            nn.Linear(self.pooling.width, hidden_dim),
            nn.GELU(),
            nn.Dropout(cfg.dropout_prob),
            nn.Linear(hidden_dim, n_outputs),
        )

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K]`; `size` is of no account."""
        logits: Tensor = self.mlp(self.pooling(taps))
        return logits
