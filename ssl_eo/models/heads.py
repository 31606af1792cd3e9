"""Heads that self-supervised losses put on tokens and that are thrown away afterwards.

N rows, D width of a row (the encoder's, at first), H bottleneck width, K prototypes, O output width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.distributed import gather

__all__ = ["GlobalBatchNorm", "HeadConfig", "MLPHead", "PrototypeHead"]


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


class MLPHead(nn.Module):
    """Projector or predictor of contrastive objectives: linear layers with ReLU between them.

    With `batch_norm` each hidden layer is normalised over the global batch, and with `norm_output` the output too,
    without gain (MoCo v3, arXiv 2104.02057; BYOL's, arXiv 2006.07733, is without). As there, layers have no biases
    then: a normalisation that follows would take them out again. Without `batch_norm` they have (MoCo v2, arXiv
    2003.04297).
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, out_dim: int, n_layers: int, batch_norm: bool, norm_output: bool = False
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (n_layers - 1), out_dim]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers.append(nn.Linear(width, next_width, bias=not batch_norm))
            layers += [GlobalBatchNorm(next_width), nn.ReLU()] if batch_norm else [nn.ReLU()]
        last = [GlobalBatchNorm(out_dim, affine=False)] if norm_output else []
        self.mlp = nn.Sequential(*layers[: -2 if batch_norm else -1], *last)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., O]` of `x [..., N, D]`; what is before N (views) is normalised apart."""
        out: Tensor = self.mlp(x)
        return out

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=1.0 / math.sqrt(layer.in_features))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, GlobalBatchNorm):
                layer.init_weights()


class GlobalBatchNorm(nn.Module):
    """Batch normalisation (arXiv 1502.03167) by the statistics of the batch of all ranks, on any device.

    There are no running statistics: heads are thrown away before anything is evaluated, and a forward pass that moved
    them would not be pure. Ranks hold equally many rows, and what they compute is what one process would, gradient too.
    """

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width)) if affine else None
        self.bias = nn.Parameter(torch.empty(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., N, D]`, normalised over the N of all ranks; statistics are in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, -2, correction=0, keepdim=True)  # [..., 1, D]
        means, variances = gather(torch.stack((mean, var))[None]).unbind(1)  # [ranks, ..., 1, D]
        mean = means.mean(0)  # [..., 1, D]
        var = variances.mean(0) + (means - mean).square().mean(0)  # within ranks, and between them
        normalised = (wide - mean) * torch.rsqrt(var + self.eps)
        if self.weight is not None and self.bias is not None:
            normalised = normalised * self.weight + self.bias
        return normalised.to(x.dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill gain and bias where there are any."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
