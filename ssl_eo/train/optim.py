"""AdamW whose parameters differ in learning rate, decay and first moving step, and the schedules of the former two."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ssl_eo.components import check_patterns
from ssl_eo.objectives.base import Objective
from ssl_eo.schedules import Constant, Schedule, Trapezoid, WarmupCosine

__all__ = [
    "OptimConfig",
    "build_optimizer",
    "clip_gradients",
    "lr_schedule",
    "param_groups",
    "set_hyper_parameters",
    "step_if_finite",
    "weight_decay_schedule",
]

N = TypeVar("N", int, float)


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
    # {regex: factor}, searched in the student's parameter names; all that match multiply, and with layer_decay.
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    # {regex: factor} instead of 1 for weights and 0 for biases, norms, gains and tokens; the last that matches counts.
    weight_decay_multipliers: dict[str, float] = field(default_factory=dict)
    # {regex: n}: lr is 0 in the first n steps, while the moments of AdamW go on; the largest n that matches counts.
    freeze_steps: dict[str, int] = field(default_factory=dict)

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
        for key in ("lr_multipliers", "weight_decay_multipliers", "freeze_steps"):
            rules: dict[str, float] = getattr(self, key)
            check_patterns(key, rules)
            if negative := [value for value in rules.values() if value < 0]:
                raise ValueError(f"{key} must not be negative, got {negative[0]}")


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


def param_groups(named: Iterable[tuple[str, nn.Parameter]], depth: int, cfg: OptimConfig) -> list[dict[str, Any]]:
    """Parameters that train, grouped by what `cfg` says of their names, in order of first appearance.

    `depth` is the encoder's number of blocks. Raises `ValueError` for a regex of `cfg` that matches none of the names.
    """
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    for key in ("lr_multipliers", "weight_decay_multipliers", "freeze_steps"):
        _check_that_all_match(key, getattr(cfg, key), list(trained))
    groups: dict[tuple[float, float, int], dict[str, Any]] = {}
    for name, parameter in trained.items():
        of_layer = cfg.layer_decay ** (depth + 1 - _layer_id(name, depth))
        lr_multiplier = math.prod(_matching(cfg.lr_multipliers, name), start=of_layer)
        weight_decay_multiplier = [_default_decay(name, parameter), *_matching(cfg.weight_decay_multipliers, name)][-1]
        freeze_steps = max(_matching(cfg.freeze_steps, name), default=0)
        group = {
            "params": [],
            "lr_multiplier": lr_multiplier,
            "weight_decay_multiplier": weight_decay_multiplier,
            "freeze_steps": freeze_steps,
        }
        groups.setdefault((lr_multiplier, weight_decay_multiplier, freeze_steps), group)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(cfg: OptimConfig, objective: Objective) -> torch.optim.AdamW:
    """Fused AdamW over the student. Fused also takes `found_inf`, so a step can be skipped without a host sync."""
    depth = len(objective.published_encoder().blocks)
    groups = param_groups(objective.student.named_parameters(), depth, cfg)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    set_hyper_parameters(optimizer, cfg.lr, cfg.weight_decay, step=0)
    return optimizer


def set_hyper_parameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, step: int) -> None:
    """Write the learning rate and weight decay of `step`, counted from 0, into every group."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if step < group["freeze_steps"] else lr * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["weight_decay_multiplier"]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients down to `max_norm`, one norm over all of them, or leave them where it is None.

    Returns the norm before that, 0-d and the same on every rank, whether they are whole or spread by FSDP.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """One optimiser step where the 0-d `finite` is 1, none where it is 0, decided on the device.

    `found_inf` is the channel through which `torch.amp.GradScaler` tells a fused optimiser to skip.
    """
    # Weights may wait on the host (`parallel.cpu_offload`). torch would send the flag there without waiting for it to
    # arrive, and read too early.
    device = optimizer.param_groups[0]["params"][0].device
    optimizer.found_inf = (1.0 - finite).to(device)  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()


def _matching(rules: Mapping[str, N], name: str) -> list[N]:
    """The values of the regexes that are found in `name`, in the order of `rules`."""
    return [value for regex, value in rules.items() if re.search(regex, name)]


def _check_that_all_match(key: str, regexes: Iterable[str], names: Sequence[str]) -> None:
    for regex in regexes:
        if any(re.search(regex, name) for name in names):
            continue
        parts = [name.split(".") for name in names]
        runs = {".".join(p[i:j]) for p in parts for i in range(len(p)) for j in range(i + 1, len(p) + 1)}
        close = difflib.get_close_matches(re.sub(r"[\\^$()]", "", regex), sorted(runs), n=3)
        what = f"close to it are {', '.join(close)}" if close else f"the first are {', '.join(names[:3])}"
        raise ValueError(f"optim.{key}: {regex!r} matches no parameter of the student that trains; {what}")


def _default_decay(name: str, parameter: nn.Parameter) -> float:
    """1 for what multiplies activations: the `weight` of a linear layer or a convolution, or its direction `weight_v`.

    Biases, gains, tokens and tables are added or looked up; decay would only pull them to zero.
    """
    return float(parameter.ndim > 1 and name.endswith(("weight", "weight_v")))


def _layer_id(name: str, depth: int) -> int:
    if not name.startswith("encoder."):
        return depth + 1
    if match := re.match(r"encoder\.blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    return depth + 1 if name.startswith("encoder.norm.") else 0
