"""UPerNet (arXiv 1807.10221, section 3.2): a feature pyramid whose top has seen the whole image, all levels fused.

B images, D width of a level, C channels, h w cells, H W pixels, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.eval.decoders._layers import Norm, PixelHead, conv_norm, resized
from ssl_eo.eval.decoders._neck import Neck, NeckWidths
from ssl_eo.eval.decoders._options import check_options
from ssl_eo.eval.decoders.base import TapMaps, TapShape
from ssl_eo.eval.kinds import Kind

__all__ = ["KINDS", "Config", "Decoder", "PyramidPooling"]

KINDS: tuple[Kind, ...] = ("segmentation",)


@dataclass
class Config:
    """Defaults are those of PANGAEA."""

    channels: int = 512  # width of its convolutions
    pools: list[int] = field(default_factory=lambda: [1, 2, 3, 6])  # cells a side of what the top is averaged to
    neck: NeckWidths = "kept"  # of encoders whose taps are no pyramid
    dropout_prob: float = 0.1  # of whole channels of an image
    norm: Norm = "batch"  # batch, group or layer, of its convolutions

    def __post_init__(self) -> None:
        check_options(self)


class PyramidPooling(nn.Module):
    """Means over the image in several resolutions, beside the map itself (PSPNet, arXiv 1612.01105, section 3.2).

    What is pooled to a few cells is normalised in groups of channels whatever `norm` is: one cell of each of a few
    images has no batch statistics to speak of, and one of a single image none at all.
    """

    def __init__(self, in_width: int, channels: int, pools: Sequence[int], norm: Norm) -> None:
        super().__init__()
        self.pools = tuple(pools)
        self.branches = nn.ModuleList(conv_norm(in_width, channels, 1, "group") for _ in self.pools)
        self.join = conv_norm(in_width + len(self.pools) * channels, channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, h, w]` -> `[B, C, h, w]`."""
        height, width = x.shape[-2:]
        pooled = [
            resized(branch(F.adaptive_avg_pool2d(x, side)), (height, width))
            for side, branch in zip(self.pools, self.branches, strict=True)
        ]
        out: Tensor = self.join(torch.cat((x, *pooled), dim=1))
        return out


class Decoder(nn.Module):
    """`[B, K, *size]` of all levels."""

    def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None:
        super().__init__()
        self.neck = Neck(shape, cfg.neck, cfg.norm)
        *finer, coarsest = self.neck.widths
        channels = cfg.channels
        self.pooling = PyramidPooling(coarsest, channels, cfg.pools, cfg.norm)
        self.laterals = nn.ModuleList(conv_norm(width, channels, 1, cfg.norm) for width in finer)
        self.smooth = nn.ModuleList(conv_norm(channels, channels, 3, cfg.norm) for _ in finer)
        self.fuse = conv_norm(len(self.neck.widths) * channels, channels, 3, cfg.norm)
        self.head = PixelHead(channels, n_outputs, cfg.dropout_prob)

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K, *size]`."""
        *finer, coarsest = self.neck(taps.maps)
        x = self.pooling(coarsest)  # [B, C, h, w]
        levels = [x]
        for level, lateral, smooth in reversed(list(zip(finer, self.laterals, self.smooth, strict=True))):
            height, width = level.shape[-2:]
            x = lateral(level) + resized(x, (height, width))
            levels.insert(0, smooth(x))
        height, width = levels[0].shape[-2:]
        fused = self.fuse(torch.cat([resized(level, (height, width)) for level in levels], dim=1))
        out: Tensor = self.head(fused, size)
        return out
