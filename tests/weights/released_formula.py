"""The cases of Panopticon and DINOv2 that are computed from weights and inputs by formula (`ssl_eo.weights._formula`).

B samples, C channels, H W pixels, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_eo.weights._formula import summary, uniform, weights

__all__ = ["DINOV2", "PANOPTICON", "Case", "summary", "uniform", "weights"]

SENTINEL2_NM = (442, 492, 559, 664, 704, 740, 782, 832, 864, 945, 1373, 1613, 2202)


@dataclass(frozen=True)
class Case:
    """One input of one model. `ids` are Panopticon's: nanometres, or -1 to -12 for SAR; one row for each sample."""

    name: str
    model: str
    size: tuple[int, int]  # pixels
    ids: tuple[tuple[int, ...], ...] = ((664, 559, 493),)
    n_valid: tuple[int, ...] | None = None  # channels of each sample that are no padding
    masked: bool = False  # hide some patches behind the mask token
    layers: tuple[int, ...] = (3, 5, 7, 11)  # blocks whose tokens are compared
    depth: int | None = None  # a model of fewer blocks, for the large ones
    to_the_end: bool = True  # False: only `layers` are computed

    def pixels(self) -> Tensor:
        """`[B, C, H, W]`."""
        return uniform(f"pixels {self.name}", (len(self.ids), len(self.ids[0]), *self.size))

    def mask(self) -> Tensor | None:
        """`[B, N]`, True = hidden."""
        n_patches = (self.size[0] // 14) * (self.size[1] // 14)
        return uniform(f"mask {self.name}", (len(self.ids), n_patches)) < -0.5 if self.masked else None

    def valid(self) -> Tensor | None:
        """`[B, C]`, True = real."""
        return None if self.n_valid is None else torch.arange(len(self.ids[0])) < torch.tensor(self.n_valid)[:, None]


PANOPTICON = tuple(
    Case(model="panopticon_vitb14", **case)  # type: ignore[arg-type]
    for case in (
        {"name": "rgb", "size": (224, 224)},
        {"name": "sentinel2", "size": (98, 98), "ids": (SENTINEL2_NM,)},
        {"name": "sar with optical", "size": (98, 98), "ids": ((-5, -6, 664, -12),)},
        {"name": "each sar id", "size": (28, 28), "ids": tuple((-i,) for i in range(1, 13))},
        {"name": "thermal", "size": (98, 98), "ids": ((10895, 12005, 864),)},
        {"name": "padded", "size": (98, 98), "ids": ((442, 559, 864, 2202), (-1, -2, -2, -2)), "n_valid": (4, 2)},
        {"name": "masked", "size": (98, 98), "masked": True},
        {"name": "not square", "size": (70, 126)},
        {"name": "native size", "size": (518, 518), "layers": (0,), "to_the_end": False},
    )
)
DINOV2 = (
    Case("small", "dinov2_vits14", (98, 98)),
    Case("small, not square", "dinov2_vits14", (70, 126)),
    Case("small, masked", "dinov2_vits14", (224, 224), masked=True),
    Case("small, native size", "dinov2_vits14", (518, 518), layers=(0,), to_the_end=False),
    Case("small, larger than native", "dinov2_vits14", (560, 532), layers=(0,), to_the_end=False),
    Case("small with registers", "dinov2_vits14_reg", (98, 98)),
    Case("small with registers, not square", "dinov2_vits14_reg", (70, 126), masked=True),
    Case("small with registers, native size", "dinov2_vits14_reg", (518, 518), layers=(0,), to_the_end=False),
    Case("base, 1 block", "dinov2_vitb14", (98, 98), layers=(0,), depth=1),
    Case("large, 1 block", "dinov2_vitl14_reg", (98, 98), layers=(0,), depth=1),
    Case("giant, 1 block", "dinov2_vitg14", (98, 98), layers=(0,), depth=1),
)
