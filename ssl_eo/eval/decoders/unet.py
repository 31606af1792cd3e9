"""A UNet that sees nothing but the labels: what a pretrained encoder has to beat. It is a decoder of pixels.

B images, C channels, H W pixels, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from ssl_eo.eval.decoders._layers import Norm, conv_norm, halved, resized
from ssl_eo.eval.decoders._options import check_options
from ssl_eo.eval.decoders.base import TapMaps, TapShape
from ssl_eo.eval.kinds import Kind

__all__ = ["KINDS", "Config", "Decoder", "UNet"]

KINDS: tuple[Kind, ...] = ("segmentation",)


@dataclass
class Config:
    """The default is PANGAEA's."""

    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])  # of its levels, from the image down
    norm: Norm = "batch"  # batch, group or layer, of its convolutions

    def __post_init__(self) -> None:
        check_options(self)


class Decoder(nn.Module):
    """`[B, K, *size]` of pixels, or of the finest tap."""

    def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None:
        super().__init__()
        self.unet = UNet(shape.widths[0], n_outputs, cfg.widths, cfg.norm)

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K, *size]`."""
        return resized(self.unet(taps.maps[0]), size)


class UNet(nn.Module):
    """A UNet (arXiv 1505.04597) from scratch, with norms, padded convolutions and bilinear steps up.

    `widths` are those of its levels, from the image down; the default is PANGAEA's. Images may have any size: one that
    halving does not divide is rounded up, and each step up has the size of its skip.
    """

    def __init__(
        self, n_channels: int, n_outputs: int, widths: Sequence[int] = (64, 128, 256, 512), norm: Norm = "batch"
    ) -> None:
        super().__init__()
        if not widths or min(n_channels, n_outputs, *widths) < 1:
            raise ValueError(
                "a UNet needs a channel, an output and a level of positive width at least, got"
                f" {n_channels}, {n_outputs} and {tuple(widths)}"
            )
        self.down = nn.ModuleList(_twice(a, b, norm) for a, b in pairwise((n_channels, *widths)))
        self.up = nn.ModuleList(_twice(fine + coarse, fine, norm) for fine, coarse in pairwise(widths))
        self.classifier = nn.Conv2d(widths[0], n_outputs, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `[B, K, H, W]` of normalised `pixels [B, C, H, W]`."""
        skips: list[Tensor] = []
        for level in self.down:
            skips.append(level(halved(skips[-1]) if skips else pixels))
        x = skips.pop()
        for level in reversed(self.up):
            skip = skips.pop()
            x = level(torch.cat((skip, resized(x, (skip.shape[-2], skip.shape[-1]))), dim=1))
        logits: Tensor = self.classifier(x)
        return logits


def _twice(in_width: int, width: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(conv_norm(in_width, width, 3, norm), conv_norm(width, width, 3, norm))
