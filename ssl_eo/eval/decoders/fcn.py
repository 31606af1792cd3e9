"""A fully convolutional head on the last tap (arXiv 1411.4038, section 4; as in PANGAEA's decoder study).

B images, D width, h w patches, H W pixels, K outputs, r side of a patch in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.eval.decoders._layers import Norm, conv_norm, resized
from ssl_eo.eval.decoders._options import check_options
from ssl_eo.eval.decoders.base import TapMaps, TapShape
from ssl_eo.eval.kinds import Kind

__all__ = ["KINDS", "Config", "Decoder"]

KINDS: tuple[Kind, ...] = ("segmentation",)

# bilinear: logits of patches, enlarged. shuffle: r x r logits of each patch, side by side (arXiv 1609.05158).
_Upsampling = Literal["bilinear", "shuffle"]


@dataclass
class Config:
    """Convolutions of 3 x 3, what they were given beside what they made, logits."""

    channels: int = 512  # width of its convolutions
    n_convs: int = 4  # of 3 x 3
    upsampling: _Upsampling = "bilinear"  # shuffle: the last layer makes the pixels of a patch
    dropout_prob: float = 0.1  # of whole channels of an image
    norm: Norm = "batch"  # batch, group or layer, of its convolutions

    def __post_init__(self) -> None:
        check_options(self)


class Decoder(nn.Module):
    """`[B, K, *size]` of the last tap."""

    def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None:
        super().__init__()
        width = shape.widths[-1]
        widths = [width, *[cfg.channels] * cfg.n_convs]
        self.convs = nn.Sequential(*(conv_norm(a, b, 3, cfg.norm, nn.GELU) for a, b in pairwise(widths)))
        self.join = conv_norm(width + cfg.channels, cfg.channels, 3, cfg.norm, nn.GELU)
        self.dropout = nn.Dropout2d(cfg.dropout_prob)
        self._side = shape.strides_px[-1] if cfg.upsampling == "shuffle" else 1
        self.classifier = nn.Conv2d(cfg.channels, n_outputs * self._side**2, 1)

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K, *size]`."""
        x = taps.maps[-1]  # [B, D, h, w]
        x = self.join(torch.cat((x, self.convs(x)), dim=1))
        logits = F.pixel_shuffle(self.classifier(self.dropout(x)), self._side)  # [B, K, h*r, w*r]
        return resized(logits, size)
