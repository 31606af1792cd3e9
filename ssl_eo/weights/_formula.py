"""Weights and images by a formula in integers, the same on every machine, and what is kept of outputs.

Values are a hash of (name, index), uniform with variance 1 and scaled so that activations stay of order 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["summary", "uniform", "weight", "weights"]

_N_VALUES = 24  # kept of each output, evenly spaced


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values of mean 0 and variance 1, from a multiplicative hash of (name, index): 24 of its 32 bits."""
    bits = torch.arange(torch.Size(shape).numel(), dtype=torch.int32) * -1640531535  # modulo 2^32
    bits ^= zlib.crc32(name.encode()) - 2**31
    for factor in (-2048144777, -1028477379):
        bits = bits.bitwise_xor_(bits >> 15).mul_(factor)
    bits = bits.bitwise_xor_(bits >> 13).bitwise_and_(0xFFFFFF)
    return bits.float().mul_(2**-23).sub_(1.0).mul_(3**0.5).view(shape)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor `name` of a state dict. Gains are around 1 (0.5 in LayerScale), matrices keep the variance."""
    value = uniform(name, shape)
    if name.endswith("gamma"):
        return 0.5 + 0.1 * value
    if "norm" in name and name.endswith("weight"):
        return 1.0 + 0.1 * value
    if name.endswith("weight"):
        fan_in: int = value[0].numel()
        return value / float(fan_in**0.5)
    if name.endswith("bias"):
        return 0.1 * value
    return value  # tokens, query, codes, positions


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these names and shapes."""
    return {name: weight(name, shape) for name, shape in shapes.items()}


def summary(output: Tensor) -> dict[str, float | list[float]]:
    """What is kept of an output: evenly spaced values, mean and standard deviation."""
    flat = output.flatten()
    index = torch.linspace(0, flat.numel() - 1, _N_VALUES).long()
    wide = flat.double()
    return {"values": flat[index].tolist(), "mean": wide.mean().item(), "std": wide.std().item()}
