"""The process group: set-up from the environment, rank helpers, gather with gradient, agreed flags.

Every function works without a process group too, as world size 1.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

from ssl_eo.cluster import read_launch

__all__ = [
    "AgreedFlag",
    "World",
    "all_agree",
    "barrier",
    "broadcast_object",
    "gather",
    "gather_objects",
    "init_world",
    "is_main",
    "local_part",
    "mean_over_ranks",
    "on_all_ranks",
    "raise_on_all_ranks",
    "rank",
    "shutdown",
    "tell_by",
    "told_by",
    "world_size",
]

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of ranks, its index on the node and its device.

    `address` is that of the first rank, for the others.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    address: str = "localhost"


def init_world(timeout_s: float = 3600.0) -> World:
    """Join the process group that the launcher describes (`ssl_eo.cluster`); world size 1 needs none and creates none.

    gloo on CPU; on GPUs nccl, with gloo beside it for host-side agreement. A collective fails after `timeout_s`.
    """
    launch = read_launch(os.environ)
    if torch.cuda.is_available():
        # Slurm may bind each task to a GPU, which is then the only one that it sees.
        is_bound = launch.launcher == "slurm" and torch.cuda.device_count() == 1
        device = torch.device("cuda", 0 if is_bound else launch.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if launch.size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        assert launch.address is not None
        assert launch.port is not None
        serves = launch.rank == 0 and not launch.store_is_served
        kept = TCPStore(launch.address, launch.port, launch.size, serves, timeout)
        # torchrun keeps its store over restarts: ranks would find the addresses of dead ones there, and call them.
        store = PrefixStore(f"start{launch.n_restarts}", kept)
        dist.init_process_group(backend, store=store, timeout=timeout, world_size=launch.size, rank=launch.rank)
    address = launch.address or World.address
    return World(rank=rank(), size=world_size(), local_rank=launch.local_rank, device=device, address=address)


def shutdown() -> None:
    """Leave the process group if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank (pickled; for small host-side things)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank (pickled; for small host-side things)."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def raise_on_all_ranks(error: BaseException | None) -> None:
    """Raise on every rank what rank 0 gives as `error`, so that none waits for one that has stopped; None passes."""
    if (common := broadcast_object(error)) is not None:
        raise tell_by(0, common)


def on_all_ranks(work: Callable[[], T]) -> T:
    """What `work` returns on this rank, or the error of the first rank on which it fails, on all of them.

    For what may go well on one rank and fail on another, such as opening files of several machines.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # of any kind: the other ranks wait to hear of it
        error = caught
    told = gather_objects(None if error is None else (type(error), str(error), socket.gethostname()))
    failed = [(i, *found) for i, found in enumerate(told) if found is not None]
    if failed and world_size() > 1:
        first, kind, message, host = failed[0]
        where = f"rank {first} on {host}" + (f" and {len(failed) - 1} others" if len(failed) > 1 else "")
        kind = kind if kind in (ValueError, OSError) else RuntimeError
        raise tell_by(0, kind(f"{message} ({where})")) from error
    if error is not None:
        raise error
    return cast(T, result)


def tell_by(rank: int, error: E) -> E:
    """`error`, which every rank has, marked as one that `rank` prints: one word of it is enough."""
    error._told_by = rank  # type: ignore[attr-defined]
    return error


def told_by(error: BaseException) -> int | None:
    """The rank that prints `error`, where every rank has it; None for one of this rank alone."""
    found: int | None = getattr(error, "_told_by", None)
    return found


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over ranks, without gradient."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def all_agree(flag: Tensor) -> Tensor:
    """Logical and of the 0-d bool `flag` over ranks, on its device, without a host sync."""
    if world_size() == 1:
        return flag
    agreed = flag.to(torch.int32)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return agreed > 0


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP has spread over ranks, without a copy; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.n_rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.n_rows : (rank() + 1) * ctx.n_rows]


def gather(x: Tensor) -> Tensor:
    """`x [B, ...]` of all ranks in rank order, `[world*B, ...]`; every rank holds the same B.

    The gradient of a row is the sum of its gradients on all ranks. With gradients averaged over ranks afterwards (DDP,
    FSDP), a loss that scores this rank's rows against all columns gets the exact gradient of the global mean.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return gathered


class AgreedFlag:
    """A flag that any rank may raise and that all ranks see at the same step, without waiting for each other.

    Each `poll` starts an asynchronous all-reduce of this rank's flag on the host and returns the result of the one
    started by the previous `poll`, so the answer lags by one call and costs no wait.
    """

    def __init__(self) -> None:
        self.raised = False
        self._pending: tuple[Tensor, Any] | None = None

    def poll(self) -> bool:
        if world_size() == 1:
            return self.raised
        agreed = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            agreed = bool(flag.item())
        flag = torch.tensor([int(self.raised)])
        self._pending = (flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True))
        return agreed

    def settle(self) -> None:
        """Wait for what the last `poll` started, before the process group ends."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None
