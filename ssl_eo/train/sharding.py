"""Weights, gradients and optimiser spread over ranks by FSDP2 (`fully_shard`), or over groups of ranks (HSDP).

Each transformer block gathers its weights when it is called and lets them go afterwards; the rest of the objective is
gathered for the whole step, so that an objective may use it in any way. Student and teacher are spread alike, so what a
rank holds of the one lies beside what it holds of the other.
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from ssl_eo.distributed import World, backend_of, gather_objects
from ssl_eo.objectives.base import Objective

__all__ = ["Sharding", "shard"]

_METHODS = ("encode", "preview")  # of an objective, by which others use it


@dataclass(frozen=True)
class Sharding:
    """How to spread: see `ParallelConfig`. `size` ranks hold all weights between them; None means those of a node."""

    size: int | None
    gather_dtype: torch.dtype
    n_prefetched: int
    cpu_offload: bool


def shard(objective: Objective, how: Sharding, world: World) -> None:
    """Spread `objective`, in place.

    Raises `ValueError` for a `size` that does not divide the number of ranks, and for 0-d weights.
    """
    for name, parameter in objective.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(
                f"parallel.strategy: {name} is 0-d, and FSDP spreads along the first dimension; make it [1]"
            )
    mesh = _mesh(how.size, world)
    on_gpu = world.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if how.cpu_offload else OffloadPolicy()
    # Inputs hold wavelengths and boxes, which must not be rounded.
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    halved = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units = objective.shard_units()
    for unit in units:
        policy = halved if how.gather_dtype == torch.bfloat16 else exact
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload)
    # Whole until backward has used it: what is beside the blocks is small, and no hook has to know who uses it.
    fully_shard(objective, mesh=mesh, mp_policy=exact, offload_policy=offload, reshard_after_forward=False)
    for method in _METHODS:
        register_fsdp_forward_method(objective, method)
    for stack in _stacks(objective, units):
        _prefetch(stack, how.n_prefetched)


def _mesh(size: int | None, world: World) -> DeviceMesh:
    """`[ranks]`, or `[copies of the weights, ranks of a copy]`."""
    if not dist.is_initialized():  # one process, which torchrun has not started
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group(backend_of(world.device), store=store, rank=0, world_size=1)
    size = size or _ranks_of_a_node()
    if world.size % size:
        raise ValueError(f"parallel.shard_size {size} does not divide the {world.size} processes")
    if size == world.size:
        return init_device_mesh(world.device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("copy", "shard"))


def _ranks_of_a_node() -> int:
    hosts = gather_objects(socket.gethostname())
    counts = set(Counter(hosts).values())
    if len(counts) > 1:
        raise ValueError(f"parallel.shard_size: nodes hold {sorted(counts)} processes; set it to what fits all of them")
    size = counts.pop()
    if any(host != hosts[rank // size * size] for rank, host in enumerate(hosts)):
        raise ValueError(
            "parallel.shard_size: ranks of a node do not follow each other, so a copy of the weights would lie on"
            " several nodes; start them by node (srun --distribution=block)"
        )
    return size


def _stacks(objective: nn.Module, units: Collection[nn.Module]) -> list[list[FSDPModule]]:
    """The units by the module that holds them: those of one encoder are called in order, those of two need not be."""
    stacks: defaultdict[str, list[FSDPModule]] = defaultdict(list)
    for name, module in objective.named_modules():
        if module in units and isinstance(module, FSDPModule):
            stacks[name.rpartition(".")[0]].append(module)
    return list(stacks.values())


def _prefetch(stack: Sequence[FSDPModule], n: int) -> None:
    """Let each unit of `stack` start to gather the `n` after it; in backward those before it."""
    for i, unit in enumerate(stack):
        unit.set_modules_to_forward_prefetch(list(stack[i + 1 : i + 1 + n]))
        unit.set_modules_to_backward_prefetch(list(stack[max(0, i - n) : i][::-1]))
