"""The process group: set-up from the environment, rank helpers, gather with gradient, agreed flags.

Every function works without a process group too, as world size 1.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from secrets import token_hex
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

from ssl_eo.cluster import Launch, read_launch
from ssl_eo.components import MissingExtraError

__all__ = [
    "AgreedFlag",
    "World",
    "all_agree",
    "backend_of",
    "background_group",
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

_LOOK_EVERY_S, _TURN_S = 0.02, 5.0
# Errors that mean something to whoever started the ranks; of subclasses and others only the text is sent on.
_KINDS = (MissingExtraError, ValueError, OSError)

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of ranks, its index on the node and its device.

    `address` is that of the first rank, for the others; `timeout_s` is how long collectives wait.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    address: str = "localhost"
    timeout_s: float = 1800.0


def init_world(timeout_s: float = 3600.0) -> World:
    """Join the process group that the launcher describes (`ssl_eo.cluster`); world size 1 needs none and creates none.

    A collective fails after `timeout_s`.
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
        timeout = timedelta(seconds=timeout_s)
        kept = _open_store(launch, timeout_s)
        store = PrefixStore(_meet(kept, launch.rank, launch.size, timeout_s), kept)
        dist.init_process_group(
            backend_of(device), store=store, timeout=timeout, world_size=launch.size, rank=launch.rank
        )
    # Where torchrun holds the store, the address is that of the store, on whichever machine.
    address = _first_host() if launch.store_is_served or launch.address is None else launch.address
    return World(rank(), world_size(), launch.local_rank, device, address, timeout_s)


def _first_host() -> str:
    hosts = gather_objects(socket.gethostname())
    return "localhost" if len(set(hosts)) == 1 else hosts[0]


def _open_store(launch: Launch, timeout_s: float) -> Any:
    """The store by which ranks meet. Waits in short turns: a signal is heard between them."""
    assert launch.address is not None
    assert launch.port is not None
    serves = launch.rank == 0 and not launch.store_is_served
    limit = time.monotonic() + timeout_s
    while True:
        turn = timedelta(seconds=min(_TURN_S, timeout_s))
        try:
            store = TCPStore(launch.address, launch.port, launch.size, serves, turn, wait_for_workers=False)
        except RuntimeError as error:  # also torch's own, which derive from it
            if serves or time.monotonic() > limit:
                where = f"{launch.address}:{launch.port}"
                raise RuntimeError(f"rank {launch.rank} cannot reach the first one at {where}: {error}") from None
        else:
            store.set_timeout(timedelta(seconds=timeout_s))
            return store


def _meet(store: Any, rank: int, size: int, timeout_s: float) -> str:
    """A name for this start of the ranks, the same on all of them and never given before.

    torchrun keeps its store over restarts, and no count of them is the same on all machines: ranks would find there the
    addresses of dead ones, and call them. So each rank says hello by a word of its own, and the first one answers it
    until all have heard. Raises `RuntimeError` where others have not come after `timeout_s`.
    """
    if rank > 0:
        word = token_hex(8)
        store.set(f"hello{rank}", word)
        limit = time.monotonic() + timeout_s
        while not store.check([f"answer{word}"]):
            if time.monotonic() > limit:
                raise RuntimeError(f"rank {rank}: the first rank has not come within {timeout_s:g} s")
            time.sleep(_LOOK_EVERY_S)
        name: str = store.get(f"answer{word}").decode()
        store.set(f"{name}/heard{rank}", "")
        return name
    name = f"start{token_hex(8)}"
    answered: dict[int, bytes] = {}
    absent = set(range(1, size))
    limit = time.monotonic() + timeout_s
    while absent:
        for other in [other for other in absent if store.check([f"hello{other}"])]:
            if (word := store.get(f"hello{other}")) != answered.get(other):
                answered[other] = word
                store.set(f"answer{word.decode()}", name)
            if store.check([f"{name}/heard{other}"]):
                absent.remove(other)
        if absent and time.monotonic() > limit:
            shown = ", ".join(str(other) for other in sorted(absent)[:8])
            raise RuntimeError(f"{len(absent)} of {size} ranks have not come within {timeout_s:g} s: rank {shown}")
        time.sleep(_LOOK_EVERY_S)
    return name


def background_group(timeout_s: float) -> dist.ProcessGroup | None:
    """A group of all ranks, for what goes on beside training on the host; None in a single process. Collective."""
    if world_size() == 1:
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return group


def backend_of(device: torch.device) -> str:
    """gloo on CPU; on GPUs nccl, with gloo beside it for host-side agreement."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


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

    There it is a `MissingExtraError`, `ValueError`, `OSError` or, for all other kinds, a `RuntimeError`.

    For what may go well on one rank and fail on another, such as opening files of several machines.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # of any kind: the other ranks wait to hear of it
        error = caught
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    told = gather_objects(None if error is None else (kind, str(error), socket.gethostname()))
    failed = [(i, *found) for i, found in enumerate(told) if found is not None]
    if failed and world_size() > 1:
        first, kind, message, host = failed[0]
        where = f"rank {first} on {host}" + (f" and {len(failed) - 1} others" if len(failed) > 1 else "")
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
