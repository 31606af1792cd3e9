"""Weights and inputs by a formula in integers, the same on every machine, and the cases that are computed from them.

Values are a hash of (name, index), uniform with variance 1 and scaled so that activations stay of order 1.
B samples, C channels, H W pixels, N patches.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SENTINEL2_NM = (442, 492, 559, 664, 704, 740, 782, 832, 864, 945, 1373, 1613, 2202)
N_VALUES = 24  # kept of each output, evenly spaced


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


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values of mean 0 and variance 1, from a multiplicative hash of (name, index): 24 of its 32 bits."""
    bits = torch.arange(torch.Size(shape).numel(), dtype=torch.int32) * -1640531535  # modulo 2^32
    bits ^= zlib.crc32(name.encode()) - 2**31
    for factor in (-2048144777, -1028477379):
        bits = bits.bitwise_xor_(bits >> 15).mul_(factor)
    bits = bits.bitwise_xor_(bits >> 13).bitwise_and_(0xFFFFFF)
    return bits.float().mul_(2**-23).sub_(1.0).mul_(3**0.5).view(shape)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these names and shapes. Gains are around 1 (0.5 in LayerScale), matrices keep the variance."""
    filled = {}
    for name, shape in shapes.items():
        value = uniform(name, shape)
        if name.endswith("gamma"):
            filled[name] = 0.5 + 0.1 * value
        elif "norm" in name and name.endswith("weight"):
            filled[name] = 1.0 + 0.1 * value
        elif name.endswith("weight"):
            filled[name] = value / value[0].numel() ** 0.5
        elif name.endswith("bias"):
            filled[name] = 0.1 * value
        else:
            filled[name] = value  # tokens, query, codes, positions
    return filled


def summary(output: Tensor) -> dict[str, float | list[float]]:
    """What is kept of an output: evenly spaced values, mean and standard deviation."""
    flat = output.flatten()
    index = torch.linspace(0, flat.numel() - 1, N_VALUES).long()
    wide = flat.double()
    return {"values": flat[index].tolist(), "mean": wide.mean().item(), "std": wide.std().item()}
