"""An output head whose weights are generated from wavelengths (DOFA, arXiv 2403.15356).

B samples, M answered patches, C channels, d decoder width, G generator width, E values of a channel of a patch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.models.patch_embed.dynamic import GAIN, DynamicConfig, KernelGenerator, init_generator

__all__ = ["GeneratedOutput"]


class GeneratedOutput(nn.Module):
    """Values of any sensor, by a linear layer that a generator of its own writes from the codes of the channels.

    `n_values` (E) is the number of values of each channel of a patch: p*p for its pixels. There is no bias.
    """

    def __init__(self, dim: int, n_values: int, cfg: DynamicConfig) -> None:
        super().__init__()
        self.dim = dim
        self.weight_generator = KernelGenerator(n_values * dim, 0, cfg)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """`[B, M, d]` -> `[B, M, E*C]`, channel last, for channels of `codes [C, G]` (`DynamicPatchEmbed.codes`)."""
        numbers, _ = self.weight_generator(codes)  # [C, E*d]
        weight = numbers.view(len(codes), -1, self.dim).transpose(0, 1)  # [E, C, d]
        return F.linear(x, weight.flatten(0, 1) * GAIN)

    def init_weights(self) -> None:
        init_generator(self)
