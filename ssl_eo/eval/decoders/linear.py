"""A linear layer on each token of the last tap: what the features themselves hold of every pixel.

The segmentation probe of DINOv3 (arXiv 2508.10104, appendix D): dropout, normalisation, a 1 x 1 convolution that starts
near zero, bilinear.

B images, D width, h w patches, H W pixels, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ssl_eo.eval.decoders._layers import Norm, make_norm, resized
from ssl_eo.eval.decoders._options import check_options
from ssl_eo.eval.decoders.base import TapMaps, TapShape
from ssl_eo.eval.kinds import Kind

__all__ = ["KINDS", "Config", "Decoder"]

KINDS: tuple[Kind, ...] = ("segmentation",)


@dataclass
class Config:
    """Defaults are those of DINOv3. With norm `batch` or `layer` a token is judged by itself."""

    dropout_prob: float = 0.1  # of whole channels of an image
    norm: Norm = "batch"  # batch, group or layer, of tokens

    def __post_init__(self) -> None:
        check_options(self)


class Decoder(nn.Module):
    """`[B, K, *size]` of the last tap."""

    def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(cfg.dropout_prob)
        self.norm = make_norm(cfg.norm, shape.widths[-1])
        self.classifier = nn.Conv2d(shape.widths[-1], n_outputs, 1)
        assert self.classifier.bias is not None
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K, *size]`."""
        return resized(self.classifier(self.norm(self.dropout(taps.maps[-1]))), size)
