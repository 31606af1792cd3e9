"""The process group: set-up from the environment, rank helpers, gather with gradient, agreed flags.

Every function works without a process group too, as world size 1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "AgreedFlag",
    "World",
    "all_agree",
    "barrier",
    "broadcast_object",
    "gather",
    "init_world",
    "is_main",
    "mean_over_ranks",
    "raise_on_all_ranks",
    "rank",
    "shutdown",
    "world_size",
]


# A rank may spend minutes on something that others wait for, such as reading an archive's index for the first time.
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of ranks, its index on the node and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def init_world() -> World:
    """Join the process group that torchrun's variables describe; world size 1 needs none and creates none.

    gloo on CPU; on GPUs nccl, with gloo beside it for host-side agreement.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    return World(rank=rank(), size=world_size(), local_rank=local_rank, device=device)


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


def raise_on_all_ranks(error: BaseException | None) -> None:
    """Raise on every rank what rank 0 gives as `error`, so that none waits for one that has stopped; None passes."""
    if (agreed := broadcast_object(error)) is not None:
        raise agreed


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
