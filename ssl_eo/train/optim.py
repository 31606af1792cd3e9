"""AdamW with true no-decay groups and layer-wise decay, and the schedules of learning rate and weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_eo.objectives.base import Objective
from ssl_eo.schedules import Constant, Schedule, Trapezoid, WarmupCosine

__all__ = [
    "OptimConfig",
    "build_optimizer",
    "lr_schedule",
    "param_groups",
    "set_hyper_parameters",
    "weight_decay_schedule",
]


@dataclass
class OptimConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101). `lr` is the peak as used, not scaled by the batch size."""

    lr: float = 6e-4  # MAE writes 1.5e-4 * global batch / 256
    end_lr: float = 0.0  # at the last step
    schedule: Literal["cosine", "constant", "trapezoid"] = "cosine"  # of lr, after the warm-up
    warmup_steps: int = 0  # lr rises linearly from 0
    cooldown_steps: int = 0  # trapezoid only
    weight_decay: float = 0.05  # decoupled; not of biases, norms and tokens
    end_weight_decay: float | None = None  # a cosine from weight_decay to this; None keeps it constant
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-8  # of AdamW
    clip_grad_norm: float | None = None  # one global norm over all parameters
    layer_decay: float = 1.0  # lr of block i is multiplied by layer_decay ** (depth - i)

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.end_lr < 0:
            raise ValueError(f"lr must be positive and end_lr not negative, got {self.lr} and {self.end_lr}")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0:
            raise ValueError(f"betas must be in [0, 1) and eps positive, got {list(self.betas)} and {self.eps}")
        if self.weight_decay < 0 or (self.end_weight_decay or 0) < 0:
            raise ValueError(
                f"weight_decay and end_weight_decay must not be negative, got {self.weight_decay} and"
                f" {self.end_weight_decay}"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.warmup_steps < 0 or self.cooldown_steps < 0:
            raise ValueError("warmup_steps and cooldown_steps must not be negative")
        if self.cooldown_steps and self.schedule != "trapezoid":
            raise ValueError(f"cooldown_steps is for schedule trapezoid, got schedule {self.schedule}")
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise ValueError(f"clip_grad_norm must be positive or null, got {self.clip_grad_norm}")


def lr_schedule(cfg: OptimConfig, total_steps: int) -> Schedule:
    """Learning rate by step, before per-group multipliers."""
    if cfg.warmup_steps + cfg.cooldown_steps > total_steps:
        raise ValueError(
            f"optim.warmup_steps {cfg.warmup_steps} + optim.cooldown_steps {cfg.cooldown_steps} exceed"
            f" train.total_steps {total_steps}: a shorter run needs a shorter warm-up"
        )
    if cfg.schedule == "cosine":
        return WarmupCosine(cfg.lr, cfg.end_lr, total_steps, cfg.warmup_steps)
    return Trapezoid(cfg.lr, cfg.end_lr, total_steps, cfg.warmup_steps, cfg.cooldown_steps)


def weight_decay_schedule(cfg: OptimConfig, total_steps: int) -> Schedule:
    """Weight decay by step, for the groups that decay."""
    if cfg.end_weight_decay is None:
        return Constant(cfg.weight_decay)
    return WarmupCosine(cfg.weight_decay, cfg.end_weight_decay, total_steps)


def param_groups(named: Iterable[tuple[str, nn.Parameter]], depth: int, layer_decay: float) -> list[dict[str, Any]]:
    """Parameters grouped by (lr multiplier, decays or not), in order of first appearance.

    `depth` is the encoder's number of blocks. Biases, norms, LayerScale, tokens and tables do not decay.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        multiplier = layer_decay ** (depth + 1 - _layer_id(name, depth))
        decays = _decays(name, parameter)
        group = groups.setdefault((multiplier, decays), {"params": [], "lr_multiplier": multiplier, "decays": decays})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(cfg: OptimConfig, objective: Objective) -> torch.optim.AdamW:
    """Fused AdamW over the student. Fused also takes `found_inf`, so a step can be skipped without a host sync."""
    depth = len(objective.published_encoder().blocks)
    groups = param_groups(objective.student.named_parameters(), depth, cfg.layer_decay)
    for group in groups:
        group["weight_decay"] = cfg.weight_decay if group["decays"] else 0.0
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def set_hyper_parameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Write this step's learning rate and weight decay into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """One optimiser step where the 0-d `finite` is 1, none where it is 0, decided on the device.

    `found_inf` is the channel through which `torch.amp.GradScaler` tells a fused optimiser to skip.
    """
    optimizer.found_inf = 1.0 - finite  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether it multiplies activations: the `weight` of a linear layer or a convolution.

    Biases, gains, tokens and tables are added or looked up; decay would only pull them to zero.
    """
    return parameter.ndim > 1 and name.endswith("weight")


def _layer_id(name: str, depth: int) -> int:
    if not name.startswith("encoder."):
        return depth + 1
    if match := re.match(r"encoder\.blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    return depth + 1 if name.startswith("encoder.norm.") else 0
