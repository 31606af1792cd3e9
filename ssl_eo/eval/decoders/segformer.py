"""The all-MLP decoder of SegFormer (arXiv 2105.15203, section 3.2): every level to one width and size, fused.

B images, D width of a level, C channels, h w cells, H W pixels, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_eo.eval.decoders._layers import Norm, PixelHead, conv_norm, resized
from ssl_eo.eval.decoders._neck import Neck, NeckWidths
from ssl_eo.eval.decoders._options import check_options
from ssl_eo.eval.decoders.base import TapMaps, TapShape
from ssl_eo.eval.kinds import Kind

__all__ = ["KINDS", "Config", "Decoder"]

KINDS: tuple[Kind, ...] = ("segmentation",)

_Taps = Literal["all", "last"]


@dataclass
class Config:
    """Defaults are those of PANGAEA's decoder study; SegFormer itself has 256 or 768 channels."""

    channels: int = 512  # width of its convolutions
    taps: _Taps = "all"  # last: all levels are made of the last tap
    neck: NeckWidths = "kept"  # of encoders whose taps are no pyramid
    dropout_prob: float = 0.1  # of whole channels of an image
    norm: Norm = "batch"  # batch, group or layer, of its convolutions

    def __post_init__(self) -> None:
        check_options(self)


class Decoder(nn.Module):
    """`[B, K, *size]` of all levels, or of those made of the last tap."""

    def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None:
        super().__init__()
        self._first = 0 if cfg.taps == "all" else len(shape.widths) - 1
        self.neck = Neck(TapShape(shape.widths[self._first :], shape.strides_px[self._first :]), cfg.neck, cfg.norm)
        self.project = nn.ModuleList(conv_norm(width, cfg.channels, 1, cfg.norm) for width in self.neck.widths)
        self.fuse = conv_norm(len(self.neck.widths) * cfg.channels, cfg.channels, 1, cfg.norm)
        self.head = PixelHead(cfg.channels, n_outputs, cfg.dropout_prob)

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K, *size]`."""
        levels = self.neck(taps.maps[self._first :])
        height, width = levels[0].shape[-2:]
        projected = [
            resized(project(level), (height, width)) for project, level in zip(self.project, levels, strict=True)
        ]
        out: Tensor = self.head(self.fuse(torch.cat(projected, dim=1)), size)
        return out
