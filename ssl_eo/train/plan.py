"""What a config would cost before it costs anything: parameters, FLOPs, and memory of a rank at its worst moments.

One step runs on tensors without values (`ssl_eo.train.tracing`), with shapes of a real batch, in one process. What
strategies hold of weights and gradients follows from the parameters, so any number of ranks can be planned anywhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_eo.components import resolve
from ssl_eo.config import Config
from ssl_eo.data.loader import Loader
from ssl_eo.data.opening import open_sources
from ssl_eo.data.render import Renderer
from ssl_eo.data.types import Batch, Source, Views, map_tensors, move_to
from ssl_eo.distributed import World
from ssl_eo.models.layers import attention_of_a_gpu
from ssl_eo.models.patch_embed import PatchEmbed
from ssl_eo.objectives.base import Objective, Schemas
from ssl_eo.train.activation_checkpointing import checkpoint_activations
from ssl_eo.train.optim import lr_schedule, param_groups
from ssl_eo.train.parallel import Strategy, check_accumulation, resolve_strategy
from ssl_eo.train.tracing import Alive, Ledger, blank, without_values

__all__ = ["Device", "Memory", "Plan", "plan"]

Device = Literal["cpu", "cuda"]

_MOST_SAMPLES = 16_384  # their views are drawn, as a run draws them
_N_BATCHES = 4  # of the first steps; they may differ in bands, the largest one counts


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at one moment of a step; `host`, of what waits beside the device, is no part of `total`."""

    weights: int
    teacher: int
    moments: int  # AdamW's
    gradients: int
    activations: int  # what is kept for backward, and what is being computed
    batch: int
    gathered: int  # fsdp, hsdp: whole weights, and buffers of collectives
    host: int = 0

    @property
    def total(self) -> int:
        parts = (self.weights, self.teacher, self.moments, self.gradients)
        return sum(parts) + self.activations + self.batch + self.gathered


@dataclass(frozen=True)
class Plan:
    """A step of `n_ranks`, each with `n_micro_batches` of `n_samples`. FLOPs are of one sample, two a multiply-add.

    `parameters` are by part of student and teacher; `memory` is by moment, in the order of a step.
    """

    strategy: Strategy
    device: Device
    n_ranks: int
    n_micro_batches: int
    n_samples: int
    parameters: dict[str, int]
    n_trained: int
    n_published: int
    forward_flop: float
    step_flop: float
    checkpoint: int  # bytes on disk
    memory: dict[str, Memory]

    @property
    def worst(self) -> str:
        """The moment that takes most."""
        return max(self.memory, key=lambda moment: self.memory[moment].total)

    @property
    def global_batch_size(self) -> int:
        return self.n_ranks * self.n_micro_batches * self.n_samples


def plan(config: Config, n_ranks: int = 1, device: Device | None = None) -> Plan:
    """Plan a run of `config` on `n_ranks`; `device` is that of this machine if not given. Opens the sources.

    Raises `ValueError` for what the run would refuse, and for a step that looks at the values of tensors.
    """
    if n_ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {n_ranks}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    strategy = resolve_strategy(config.parallel, World(0, n_ranks, 0, torch.device(device)))
    sources = open_sources(config.data)
    schemas = [source.schema for source in sources]
    method = resolve("ssl_eo.objectives", config.objective.name).Objective
    views = method.views(config.objective.options, config.model, schemas)
    with torch.device("meta"):
        objective: Objective = method(config.objective.options, config.model, schemas)
    check_accumulation(objective, config.train.accumulate)
    if (n_samples := config.train.global_batch_size // (n_ranks * config.train.accumulate)) > _MOST_SAMPLES:
        raise ValueError(f"{n_samples:,} samples at once on a rank cannot be planned, {_MOST_SAMPLES:,} can")
    batch = max(_first_batches(config, sources, views, n_ranks), key=_n_values)
    shares = _Shares(objective, config, strategy, n_ranks)
    traced = _trace(config, objective, schemas, batch, shares, device)
    n_samples = len(batch.keys)
    n_traced = n_samples * _n_rounds(config)
    return Plan(
        strategy=strategy,
        device=device,
        n_ranks=n_ranks,
        n_micro_batches=config.train.accumulate,
        n_samples=n_samples,
        parameters=_parameters(objective),
        n_trained=sum(p.numel() for p in objective.student.parameters() if p.requires_grad),
        n_published=sum(p.numel() for p in objective.published_encoder().parameters()),
        forward_flop=traced.ledger.flop["forward"] / n_traced,
        step_flop=traced.ledger.flop.total() / n_traced,
        checkpoint=shares.checkpoint,
        memory=_moments(shares, traced, config.parallel.cpu_offload and device == "cuda"),
    )


def _parameters(objective: Objective) -> dict[str, int]:
    parts = {"student": objective.student, "teacher": objective.teacher or nn.ModuleDict()}
    return {
        f"{role}.{name}": sum(p.numel() for p in module.parameters())
        for role, modules in parts.items()
        for name, module in modules.items()
    }


def _first_batches(config: Config, sources: list[Source], views: Views, n_ranks: int) -> list[Batch]:
    """What the first rank sees in the first steps: the first micro-batch of each."""
    data, batches = replace(config.data, n_workers=0, read_ahead_steps=0), []
    for step in range(min(_N_BATCHES, config.train.total_steps)):
        with Loader(
            data,
            sources,
            views,
            seed=config.run.seed,
            global_batch_size=config.train.global_batch_size,
            n_micro_batches=config.train.accumulate,
            world_size=n_ranks,
            start_step=step,
            total_steps=step + 1,
        ) as loader:
            batches.append(next(loader))
    return batches


# --- what a rank holds of the parameters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parameter:
    """Bytes of a parameter: all of it, and what a rank keeps; `in_block` where it is gathered with a block alone."""

    whole: int
    share: int
    is_trained: bool
    in_block: bool


class _Shares:
    """What a rank holds of weights, moments and gradients under a strategy."""

    def __init__(self, objective: Objective, config: Config, strategy: Strategy, n_ranks: int) -> None:
        cfg = config.parallel
        self.strategy = strategy
        self.is_sharded = strategy in ("fsdp", "hsdp")
        self.accumulates = config.train.accumulate > 1
        self.n_shards = _n_shards(strategy, cfg.shard_size, n_ranks)
        blocks = objective.shard_units()
        in_blocks = {id(p) for block in blocks for p in block.parameters()} if self.is_sharded else set()
        self.parameters = {
            name: _Parameter(p.nbytes, _share(p, self.n_shards), p.requires_grad, id(p) in in_blocks)
            for name, p in objective.named_parameters()
        }
        self.buffers = {name: b.nbytes for name, b in objective.named_buffers()}
        self.gather_dtype = torch.bfloat16 if cfg.gather_dtype == "bfloat16" else torch.float32
        of_block = [sum(p.numel() for p in block.parameters()) * self.gather_dtype.itemsize for block in blocks]
        trained = [sum(p.nbytes for p in block.parameters() if p.requires_grad) for block in blocks]
        # One block is whole, those that are prefetched arrive in a buffer; gradients of the one before are a buffer of
        # which ranks get their shares, while those of the next one are made.
        largest = max(range(len(blocks)), key=of_block.__getitem__)
        n_whole = min(2 + cfg.n_prefetched, len(blocks))
        self.of_blocks = n_whole * of_block[largest] + max(trained) if self.is_sharded else 0

    def sum(self, count: Callable[[_Parameter], int], prefix: str = "") -> int:
        return sum(count(p) for name, p in self.parameters.items() if name.startswith(prefix))

    def weights(self, prefix: str) -> int:
        """Parameters and buffers of what begins with `prefix`, as they stay on a rank; FSDP leaves buffers whole."""
        return self.sum(lambda p: p.share, prefix) + sum(b for n, b in self.buffers.items() if n.startswith(prefix))

    @property
    def checkpoint(self) -> int:
        """All weights and buffers, and AdamW's moments."""
        return self.sum(lambda p: p.whole * (1 + 2 * p.is_trained)) + sum(self.buffers.values())

    @property
    def trained(self) -> int:
        return self.sum(lambda p: p.share * p.is_trained)

    @property
    def whole_rest(self) -> int:
        """What is beside the blocks, gathered for the whole step."""
        return self.sum(lambda p: p.whole * (not p.in_block)) if self.is_sharded else 0

    def gradient(self, name: str) -> int:
        """What a rank keeps of a gradient during backward, apart from the buckets of DDP."""
        p = self.parameters[name]
        if self.strategy == "ddp":
            return p.whole if self.accumulates else 0  # copied into its bucket
        return p.share if p.in_block and not self.accumulates else p.whole

    @property
    def end_of_backward(self) -> tuple[int, int]:
        """Gradients, and what is gathered, when gradients of what is beside the blocks are put in a buffer."""
        gradients = self.sum(lambda p: (p.whole if self.accumulates or not p.in_block else p.share) * p.is_trained)
        return gradients, self.whole_rest + self.sum(lambda p: p.whole * p.is_trained * (not p.in_block))


def _n_shards(strategy: Strategy, shard_size: int | None, n_ranks: int) -> int:
    if strategy == "fsdp":
        return n_ranks
    if strategy != "hsdp":
        return 1
    if shard_size is None:
        raise ValueError(
            "parallel.shard_size: null stands for the ranks of a node, which a plan does not know; for the plan add for"
            " instance parallel.shard_size=8"
        )
    if n_ranks % shard_size:
        raise ValueError(f"parallel.shard_size {shard_size} does not divide the {n_ranks} processes")
    return shard_size


def _share(parameter: nn.Parameter, n_shards: int) -> int:
    """Rows are dealt out in equal numbers, the last ones of a parameter padded."""
    n_rows = parameter.shape[0] if parameter.ndim else 1
    return math.ceil(n_rows / n_shards) * (parameter.nbytes // n_rows)


# --- one step without values ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Traced:
    ledger: Ledger
    batch: int  # bytes


def _n_rounds(config: Config) -> int:
    """Micro-batches that are traced: the second meets the gradients of the first, and others are like it."""
    return min(2, config.train.accumulate)


def _trace(
    config: Config, objective: Objective, schemas: Schemas, batch: Batch, shares: _Shares, device: Device
) -> _Traced:
    """Forward and backward of `batch`, and the moving average; AdamW, which works in place, would show nothing."""
    lr_schedule(config.optim, config.train.total_steps)
    param_groups(objective.student.named_parameters(), len(objective.published_encoder().blocks), config.optim)
    if shares.is_sharded:
        for block in objective.shard_units():
            block.to(shares.gather_dtype)
    shapes = move_to(batch, "meta")  # a CPU would look at the values of plans
    shapes.pixels = Renderer(schemas, config.data.interpolation).to("meta").render(shapes)
    with without_values(), attention_of_a_gpu() if device == "cuda" else contextlib.nullcontext():
        objective.to_empty(device="cpu")
        checkpoint_activations(objective, config.parallel.activation_checkpointing)
        for module in objective.modules():
            if isinstance(module, PatchEmbed):
                module.check = _accept  # type: ignore[method-assign]  # it reads values, which were checked before
        batch = map_tensors(blank, shapes)
        in_batch = list(_tensors(batch))
        with Ledger() as ledger:
            ledger.leave_out([*objective.parameters(), *objective.buffers(), *in_batch])
            named = {f"student.{name}": p for name, p in objective.student.named_parameters()}
            ledger.watch_gradients(named, shares.gradient)
            _step(config, objective.train(), batch, ledger)
    # On a GPU the next batch arrives while this one is computed, not yet rendered.
    ahead = sum(t.nbytes for t in _tensors(replace(batch, pixels={}))) if device == "cuda" else 0
    return _Traced(ledger, ahead + sum(t.nbytes for t in in_batch))


def _step(config: Config, objective: Objective, batch: Batch, ledger: Ledger) -> None:
    """What the trainer does, but for the optimiser."""
    now = {name: schedule(0) for name, schedule in objective.schedules(config.train.total_steps).items()}
    n, is_bfloat16 = config.train.accumulate, config.train.precision == "bfloat16"
    for _ in range(_n_rounds(config)):
        with ledger.phase("forward"), torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            losses = objective(batch, now)
        with ledger.phase("backward"):
            (losses.total / n).backward()
    objective.zero_grad(set_to_none=True)
    with ledger.phase("after the step"):
        objective.after_step(now, torch.ones(()), losses.state)


def _n_values(batch: Batch) -> int:
    """Pixels times bands of all views."""
    n_values = 0
    for view in (view for views in batch.views.values() for view in views):
        shown = view.bands if view.weights is None else view.weights
        n_bands = batch.tiles[view.tile].pixels.shape[1] if shown is None else shown.shape[1]
        n_values += len(view.row) * n_bands * math.prod(view.size)
    return n_values


def _tensors(batch: Batch) -> Iterable[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    return found


def _accept(channels: object) -> None:
    """Instead of `PatchEmbed.check`."""


# --- put together -----------------------------------------------------------------------------------------------------


def _moments(shares: _Shares, traced: _Traced, is_offloaded: bool) -> dict[str, Memory]:
    """Memory in forward and backward, in the optimiser, and in what comes after it."""
    peaks = traced.ledger.peaks
    gathered = shares.whole_rest + shares.of_blocks
    during = [(peak.gradients, peak.activations, gathered) for peak in (peaks["forward"], peaks["backward"])]
    if shares.is_sharded:
        gradients, buffers = shares.end_of_backward
        during.append((gradients, 0, buffers))
    buckets = shares.trained if shares.strategy == "ddp" else 0

    def memory(gradients: int, activations: int, gathered: int) -> Memory:
        return Memory(
            weights=shares.weights("") - shares.weights("teacher."),
            teacher=shares.weights("teacher."),
            moments=2 * shares.trained,
            gradients=gradients,
            activations=activations,
            batch=traced.batch,
            gathered=gathered,
        )

    worst = max(during, key=sum)
    after = peaks.get("after the step", Alive()).activations // shares.n_shards
    found = {
        "forward and backward": memory(worst[0] + buckets, *worst[1:]),
        "optimiser": memory(shares.trained, 0, 0),
    }
    if shares.weights("teacher."):
        found["moving average"] = memory(buckets, after, 0)
    return {name: _offloaded(m, shares.trained) for name, m in found.items()} if is_offloaded else found


def _offloaded(memory: Memory, gradients: int) -> Memory:
    """`memory` with what `parallel.cpu_offload` keeps beside the device, complete `gradients` among it."""
    moved = min(memory.gradients, gradients)
    return replace(
        memory,
        weights=0,
        teacher=0,
        moments=0,
        gradients=memory.gradients - moved,
        host=memory.weights + memory.teacher + memory.moments + moved,
    )
