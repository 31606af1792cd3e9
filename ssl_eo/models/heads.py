"""Heads that self-supervised losses put on tokens and that are thrown away afterwards.

N rows, D encoder width, H bottleneck width, K prototypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HeadConfig", "PrototypeHead"]


@dataclass
class HeadConfig:
    """Defaults are those of DINOv2 with a ViT-B."""

    n_prototypes: int = 65536  # outputs
    hidden_dim: int = 2048  # width of the hidden layers
    bottleneck_dim: int = 256  # width of what is compared with the prototypes
    n_layers: int = 3  # linear layers before the prototypes
    # Each prototype has a length that is learned (DINOv2), or 1 for ever (DINO, whose training it makes more stable).
    learned_norm: bool = True

    def __post_init__(self) -> None:
        for key in ("n_prototypes", "hidden_dim", "bottleneck_dim", "n_layers"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")


class PrototypeHead(nn.Module):
    """MLP, unit length, scaled cosine to each of K prototypes (DINO, arXiv 2104.14294, section 3.1 and appendix C).

    State dict names are those of DINO and DINOv2: `mlp.0`, `mlp.2`, ..., `last_layer.weight_g`, `last_layer.weight_v`.
    """

    def __init__(self, in_dim: int, cfg: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[cfg.hidden_dim] * (cfg.n_layers - 1), cfg.bottleneck_dim]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = _Prototypes(cfg.bottleneck_dim, cfg.n_prototypes, cfg.learned_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, K]` of `x [N, D]`, before any temperature."""
        x = self.mlp(x)  # [N, H]
        # In half precision the squares of small values would vanish.
        unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)  # [N, H]
        logits: Tensor = self.last_layer(unit)  # [N, K]
        return logits

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter and buffer."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer.init_weights()


class _Prototypes(nn.Module):
    """A linear layer without bias whose rows have a direction `weight_v [K, H]` and a length `weight_g [K, 1]`."""

    weight_g: Tensor

    def __init__(self, in_dim: int, n_prototypes: int, learned_norm: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(n_prototypes, in_dim))
        length = torch.empty(n_prototypes, 1)
        if learned_norm:
            self.weight_g = nn.Parameter(length)
        else:
            self.register_buffer("weight_g", length)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_g * F.normalize(self.weight_v, dim=1)  # [K, H]
        return F.linear(x, weight.to(x.dtype))  # [N, K]

    def init_weights(self) -> None:
        bound = 1.0 / math.sqrt(self.weight_v.shape[1])
        nn.init.uniform_(self.weight_v, -bound, bound)
        nn.init.ones_(self.weight_g)
