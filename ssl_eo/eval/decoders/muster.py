"""MUSTER (arXiv 2211.13928): a windowed transformer from the coarsest level to the finest, led by the skips.

At each level the skip asks what comes from the coarser one ("multi-head skip attention"), then both are fused and
enlarged by a pixel shuffle.

B images, h w cells of a level, C its width, H W pixels, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.eval.decoders._layers import Norm, PixelHead, conv_norm, resized
from ssl_eo.eval.decoders._neck import Neck
from ssl_eo.eval.decoders._options import check_options
from ssl_eo.eval.decoders._windows import WindowAttention
from ssl_eo.eval.decoders.base import TapMaps, TapShape
from ssl_eo.eval.kinds import Kind
from ssl_eo.models.layers import Mlp, init_layers

__all__ = ["KINDS", "Config", "Decoder"]

KINDS: tuple[Kind, ...] = ("segmentation",)


@dataclass
class Config:
    """Defaults are those of PANGAEA's decoder study: 4, 8, 16 and 32 heads of 48 channels for a ViT-B."""

    depth: int = 2  # blocks of each level; every second one has shifted windows
    n_heads: int = 4  # of the finest level, whose width they divide; twice as many at each coarser one
    window: int = 12  # cells a side of a window
    mlp_ratio: float = 4.0  # hidden width / width
    channels: int = 256  # before the logits
    dropout_prob: float = 0.1  # of whole channels of an image
    drop_path_prob: float = 0.1  # that a branch of a block is left out for an image
    norm: Norm = "batch"  # of convolutions; transformer blocks have LayerNorm

    def __post_init__(self) -> None:
        check_options(self)


class Decoder(nn.Module):
    """`[B, K, *size]` of all levels, whose widths double from the finest on; those of a pyramid are made to."""

    def __init__(self, cfg: Config, shape: TapShape, n_outputs: int) -> None:
        super().__init__()
        self.neck = Neck(shape, "proportional", cfg.norm)
        finest = self.neck.widths[0]
        if finest % cfg.n_heads:
            raise ValueError(
                f"n_heads {cfg.n_heads} must divide the width of the finest level, {finest} (a quarter of a tap's where"
                " taps are no pyramid)"
            )
        widths = [finest * 2**level for level in range(len(self.neck.widths))]
        self.fit = nn.ModuleList(
            nn.Identity() if width == given else nn.Conv2d(given, width, 1)
            for width, given in zip(widths, self.neck.widths, strict=True)
        )
        self.before = nn.ModuleList(_FeedForward(width, cfg) for width in widths)
        self.stages = nn.ModuleList(
            _Stage(width, cfg.n_heads * 2**level, cfg, is_finest=level == 0) for level, width in enumerate(widths)
        )
        self.after = _FeedForward(2 * finest, cfg)
        self.project = conv_norm(2 * finest, cfg.channels, 1, cfg.norm, nn.GELU)
        self.head = PixelHead(cfg.channels, n_outputs, cfg.dropout_prob)
        init_layers(self)

    def forward(self, taps: TapMaps, size: tuple[int, int]) -> Tensor:
        """Logits `[B, K, *size]`."""
        fitted = [fit(level) for fit, level in zip(self.fit, self.neck(taps.maps), strict=True)]
        skips = [before(level.movedim(1, -1)) for before, level in zip(self.before, fitted, strict=True)]
        x = skips[-1]  # [B, h, w, C]: the coarsest level asks itself
        for stage, skip in zip(reversed(self.stages), reversed(skips), strict=True):
            if x.shape[1:3] != skip.shape[1:3]:  # twice an odd number halved, or a pyramid whose strides do not double
                x = resized(x.movedim(-1, 1), (skip.shape[1], skip.shape[2])).movedim(1, -1)
            x = stage(x, skip)
        out: Tensor = self.head(self.project(self.after(x).movedim(-1, 1)), size)
        return out


class _Stage(nn.Module):
    """Blocks of one level, then fused with its skip: `[B, 2h, 2w, C/2]`, or of the finest level `[B, h, w, 2C]`."""

    def __init__(self, width: int, n_heads: int, cfg: Config, is_finest: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, n_heads, cfg, is_shifted=i % 2 == 1) for i in range(cfg.depth))
        self.is_finest = is_finest
        wide = 2 * width
        self.fuse = nn.Conv2d(wide, wide, 1) if is_finest else conv_norm(wide, wide, 1, cfg.norm, nn.GELU)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, skip)
        fused = self.fuse(torch.cat((x, skip), dim=-1).movedim(-1, 1))  # [B, 2C, h, w]
        return (fused if self.is_finest else F.pixel_shuffle(fused, 2)).movedim(1, -1)


class _Block(nn.Module):
    """Attention from the skip to `x`, then an MLP, both added to `x`; normalised before each and in the end."""

    def __init__(self, width: int, n_heads: int, cfg: Config, is_shifted: bool) -> None:
        super().__init__()
        self.drop_path_prob = cfg.drop_path_prob
        self.norm_x, self.norm_skip, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.attention = WindowAttention(width, n_heads, cfg.window, is_shifted)
        self.feed_forward = _FeedForward(width, cfg)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Both `[B, h, w, C]` -> `[B, h, w, C]`."""
        branch = self.attention(self.norm_skip(skip), self.norm_x(x))
        x = x + _left_out(branch, self.drop_path_prob if self.training else 0.0)
        out: Tensor = self.norm_out(self.feed_forward(x))
        return out


class _FeedForward(nn.Module):
    def __init__(self, width: int, cfg: Config) -> None:
        super().__init__()
        self.drop_path_prob = cfg.drop_path_prob
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * cfg.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, h, w, C]` -> `[B, h, w, C]`."""
        return x + _left_out(self.mlp(self.norm(x)), self.drop_path_prob if self.training else 0.0)


def _left_out(branch: Tensor, prob: float) -> Tensor:
    """Zero for a random `prob` of the images `[B, h, w, C]`, and scaled for the others, so that the mean stays."""
    if prob == 0.0:
        return branch
    is_kept = torch.rand(branch.shape[0], 1, 1, 1, device=branch.device) >= prob
    return branch * (is_kept / (1.0 - prob)).to(branch.dtype)
