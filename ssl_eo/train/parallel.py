"""How an objective is spread over processes, applied from outside in one fixed order.

Build on the meta device -> materialise -> fill with NaN -> `init_weights` -> assert finite -> begin from given weights
-> activation checkpointing -> compile -> wrap. A tensor that `init_weights` forgets cannot hide, and whatever the
strategy, every rank begins with the whole of the same weights: drawn in parts they would depend on the number of parts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ssl_eo.distributed import World
from ssl_eo.models.packed_attention import AttentionKernel, use_attention
from ssl_eo.objectives.base import Objective
from ssl_eo.seeding import derive_seed
from ssl_eo.train.activation_checkpointing import ActivationCheckpointing, checkpoint_activations
from ssl_eo.train.sharding import Sharding, shard

__all__ = [
    "ParallelConfig",
    "Strategy",
    "build_objective",
    "check_accumulation",
    "compile_units",
    "is_sharded",
    "resolve_strategy",
    "settle",
    "without_reduction",
    "wrap",
]

_MOST_S, _MOST_MB = 30 * 86_400.0, 2**20

Strategy = Literal["single", "ddp", "fsdp", "hsdp"]


@dataclass
class ParallelConfig:
    """`single` is one process; `ddp` copies all weights to every rank; `fsdp` spreads them over all; `hsdp` over some.

    The numbers are the same but for the order of sums, and a run may go on with another strategy.
    """

    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp"] = "auto"  # auto: single, or ddp for several processes
    bucket_cap_mb: int = 25  # ddp: gradients are reduced in buckets of this size while backward goes on
    shard_size: int | None = None  # hsdp: ranks that hold the weights once between them; null: those of a node
    # fsdp, hsdp: what blocks gather their weights in, and compute with; they are kept and reduced in float32.
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    n_prefetched: int = 1  # fsdp, hsdp: blocks whose weights are gathered while the one before them computes
    cpu_offload: bool = False  # fsdp, hsdp: weights, gradients and optimiser wait in the memory of the host
    # Transformer blocks keep all that backward needs; or results of matmuls and attention; or nothing but their input.
    activation_checkpointing: ActivationCheckpointing = "none"
    # Inside crops of each size by a call of its own, or of all by one kernel of torch or xformers (GPU, bfloat16).
    attention: AttentionKernel = "sdpa"
    timeout_s: float = 1800.0  # a rank that all others have waited for so long ends the run
    compile: bool = False  # transformer blocks are compiled, each by itself, at the first step

    def __post_init__(self) -> None:
        if not 1 <= self.bucket_cap_mb <= _MOST_MB:
            raise ValueError(f"bucket_cap_mb must be from 1 to {_MOST_MB}, got {self.bucket_cap_mb}")
        if not 0 < self.timeout_s <= _MOST_S:
            raise ValueError(f"timeout_s must be above 0 and up to {_MOST_S:g} (30 days), got {self.timeout_s}")
        if self.n_prefetched < 1:  # in backward torch gathers one ahead whatever it is told
            raise ValueError(f"n_prefetched must be at least 1, got {self.n_prefetched}")
        if self.shard_size is not None and self.strategy != "hsdp":
            raise ValueError(f"shard_size is for strategy hsdp, got strategy {self.strategy}")
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {self.shard_size}")
        for key in ("cpu_offload", "gather_dtype"):
            if getattr(self, key) not in (False, "float32") and self.strategy not in ("fsdp", "hsdp"):
                raise ValueError(
                    f"{key} {getattr(self, key)} is for strategies fsdp and hsdp, got strategy {self.strategy}"
                )


def resolve_strategy(cfg: ParallelConfig, world: World) -> Strategy:
    """The strategy to use; raises `ValueError` when the one asked for does not fit the number of processes."""
    if cfg.strategy == "auto":
        return "single" if world.size == 1 else "ddp"
    if cfg.strategy == "single" and world.size > 1:
        raise ValueError(f"parallel.strategy: single cannot run on {world.size} processes; use auto, ddp or fsdp")
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


def check_accumulation(objective: Objective, n_micro_batches: int) -> None:
    """Raise `ValueError` where a step of several micro-batches would have another loss than one of the whole batch."""
    if n_micro_batches > 1 and objective.batch_coupled:
        name = type(objective).__module__.rpartition(".")[2]
        raise ValueError(
            f"train.accumulate {n_micro_batches}: the loss of objective {name} mixes the samples of a batch, so"
            " micro-batches would change it; use 1 and more ranks or a smaller batch"
        )


def compile_units(objective: Objective) -> None:
    """Compile the forward of every unit, by itself: blocks are alike, so the first one's code serves all.

    Drop path draws the samples that it would draw uncompiled. Kernels round otherwise, so numbers agree to a tolerance.
    """
    from torch._inductor import config

    config.fallback_random = True
    for unit in objective.shard_units():
        unit.forward = torch.compile(unit.forward)  # the forward alone: hooks of FSDP stay outside


def wrap(objective: Objective, cfg: ParallelConfig, world: World) -> nn.Module:
    """The module to call in the loop: the objective itself, spread over ranks or not, or DDP around it."""
    strategy = resolve_strategy(cfg, world)
    use_attention(objective, cfg.attention, world.device)
    checkpoint_activations(objective, cfg.activation_checkpointing)
    if cfg.compile:
        compile_units(objective)
    if strategy == "single":
        return objective
    if strategy == "ddp":
        return _replicate(objective, cfg, world)
    how = Sharding(
        size=cfg.shard_size if strategy == "hsdp" else world.size,
        gather_dtype=torch.bfloat16 if cfg.gather_dtype == "bfloat16" else torch.float32,
        n_prefetched=cfg.n_prefetched,
        cpu_offload=cfg.cpu_offload,
    )
    shard(objective, how, world)
    return objective


def is_sharded(model: nn.Module) -> bool:
    """Whether all ranks have to take part whenever `model` is used."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def without_reduction(model: nn.Module) -> Iterator[None]:
    """Gradients of what runs inside stay on their ranks, and are added to those of the next step outside."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def settle(model: nn.Module) -> None:
    """After `model` was used without a backward pass: give back what it has gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _replicate(objective: Objective, cfg: ParallelConfig, world: World) -> DistributedDataParallel:
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
