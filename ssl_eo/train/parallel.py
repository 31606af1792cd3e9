"""How an objective is spread over processes, applied from outside in one fixed order.

Build on the meta device -> materialise -> fill with NaN -> `init_weights` -> assert finite -> wrap: a tensor that
`init_weights` forgets cannot hide.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_eo.distributed import World
from ssl_eo.objectives.base import Objective
from ssl_eo.seeding import derive_seed
from ssl_eo.train.activation_checkpointing import ActivationCheckpointing

__all__ = ["ParallelConfig", "build_objective", "resolve_strategy", "wrap"]


@dataclass
class ParallelConfig:
    """`auto` is `single` for one process and `ddp` for several."""

    strategy: Literal["auto", "single", "ddp"] = "auto"  # auto: ddp under torchrun with several processes
    bucket_cap_mb: int = 25  # DDP: gradients are reduced in buckets of this size while backward goes on
    # Transformer blocks keep all that backward needs; or results of matmuls and attention; or nothing but their input.
    activation_checkpointing: ActivationCheckpointing = "none"


def resolve_strategy(cfg: ParallelConfig, world: World) -> str:
    """The strategy to use; raises `ValueError` when the one asked for does not fit the number of processes."""
    if cfg.strategy == "auto":
        return "single" if world.size == 1 else "ddp"
    if cfg.strategy == "single" and world.size > 1:
        raise ValueError(f"parallel.strategy: single cannot run on {world.size} processes; use auto or ddp")
    if cfg.strategy == "ddp" and world.size == 1:
        raise ValueError("parallel.strategy: ddp needs several processes; start with torchrun, or use auto")
    return cfg.strategy


def build_objective(make: Callable[[], Objective], seed: int, device: torch.device) -> Objective:
    """`make()` on the meta device, then every tensor of it on `device`, initialised from `seed` alone."""
    with torch.device("meta"):
        objective = make()
    objective.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*objective.parameters(), *objective.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        torch.manual_seed(derive_seed(seed, "init"))
        objective.init_weights()
    for name, tensor in (*objective.named_parameters(), *objective.named_buffers()):
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"init_weights leaves {name} unset"
    return objective


def wrap(objective: Objective, strategy: str, cfg: ParallelConfig, world: World) -> nn.Module:
    """The module to call in the loop: the objective itself, or DDP around it."""
    if strategy == "single":
        return objective
    # Buffers are equal on all ranks by construction; torch 2.13 renamed the switch.
    is_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    no_sync: dict[str, Any] = {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}
    return DistributedDataParallel(
        objective,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=cfg.bucket_cap_mb,
        **no_sync,
    )
