"""ConvNeXt V2 (arXiv 2301.00808): a pyramid of convolutions for a fixed set of channels.

Of V2 the global response normalisation is what differs from the first version; there is no layer scale.

B images, C channels, H W pixels, L levels, D width of a level, h w its cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ConvNeXt", "ConvNeXtConfig"]

_STEM_PX = 4
_NORM_EPS = 1e-6


@dataclass
class ConvNeXtConfig:
    """Everything that decides weights and what is computed from them. Defaults are those of the size atto."""

    width: int = 40  # of the first of four levels; each has twice the width of the one before
    depth: int = 2  # blocks of a level,
    third_depth: int = 6  # but for the third

    def __post_init__(self) -> None:
        for key in ("width", "depth", "third_depth"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * 2**level for level in range(4))

    @property
    def depths(self) -> tuple[int, ...]:
        return (self.depth, self.depth, self.third_depth, self.depth)

    @property
    def strides_px(self) -> tuple[int, ...]:
        """How many pixels a cell of each level spans."""
        return tuple(_STEM_PX * 2**level for level in range(4))


class ConvNeXt(nn.Module):
    """Images to four maps, finest first. Build it anywhere, then `init_weights` or load."""

    def __init__(self, cfg: ConvNeXtConfig, n_channels: int) -> None:
        super().__init__()
        if n_channels < 1:
            raise ValueError(f"n_channels must be at least 1, got {n_channels}")
        self.cfg = cfg
        self.n_channels = n_channels
        widths = cfg.widths
        self.stem = nn.Sequential(nn.Conv2d(n_channels, widths[0], _STEM_PX, _STEM_PX), _ChannelNorm(widths[0]))
        before = (None, *widths[:-1])
        self.stages = nn.ModuleList(
            _Stage(narrow, width, depth) for narrow, width, depth in zip(before, widths, cfg.depths, strict=True)
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps `[B, D, h, w]` of `pixels [B, C, H, W]`; `ValueError` for channels or sizes that do not fit."""
        multiple = self.cfg.strides_px[-1]
        if pixels.shape[1] != self.n_channels:
            raise ValueError(f"this encoder was built for {self.n_channels} channels and got {pixels.shape[1]}")
        if any(size % multiple for size in pixels.shape[-2:]):
            height, width = pixels.shape[-2:]
            raise ValueError(f"images must be multiples of {multiple} pixels, got {height} x {width}: pad or cut them")
        x = self.stem(pixels)  # [B, D, H/4, W/4]
        maps = []
        for stage in self.stages:
            x = stage(x)  # [B, D, h, w]
            maps.append(x)
        return maps

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter, wherever the module was built. Blocks begin without response normalisation."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, _ResponseNorm):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map `[B, D, h, w]`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ResponseNorm(nn.Module):
    """Each channel scaled by its norm over the image, in units of the mean over channels (equations 1 to 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:  # [B, h, w, D]
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # [B, 1, 1, D]
        relative = response / (response.mean(-1, keepdim=True) + _NORM_EPS)
        return x + torch.addcmul(self.bias, self.weight, x * relative)


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.grn = _ResponseNorm(4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, h, w, D]
        out: Tensor = self.fc2(self.grn(functional.gelu(self.fc1(x))))
        return out


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, D, h, w]
        branch: Tensor = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))  # [B, h, w, D]
        return x + branch.permute(0, 3, 1, 2)


class _Stage(nn.Module):
    """The blocks of a level, after half the resolution of the level before, whose width is `narrow`."""

    def __init__(self, narrow: int | None, width: int, depth: int) -> None:
        super().__init__()
        self.downsample = (
            nn.Identity() if narrow is None else nn.Sequential(_ChannelNorm(narrow), nn.Conv2d(narrow, width, 2, 2))
        )
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.downsample(x))
        return out
