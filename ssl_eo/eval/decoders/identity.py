"""A linear layer on the pooled features of an image: what they hold as they are.

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
    """By default the mean of the last tap's patches; with `taps: all` what `mlp` sees, without its hidden layer."""

    pool: Pool = "mean"  # of patches, the CLS token, or both
    taps: Taps = "last"  # or all, side by side
    dropout_prob: float = 0.0  # of pooled features

    def __post_init__(self) -> None:
        check_options(self)


class Decoder(nn.Module):
    """`[B, K]`, linear in what is pooled."""

    def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None:
        super().__init__()
        self.pooling = Pooling(shape, cfg.pool, cfg.taps)
        self.dropout = nn.Dropout(cfg.dropout_prob)
        self.out = nn.Linear(self.pooling.width, n_outputs)

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K]`; `size` is of no account."""
        logits: Tensor = self.out(self.dropout(self.pooling(taps)))
        return logits
