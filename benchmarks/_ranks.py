"""Groups of processes that take turns: those of one group train together, or each by itself beside the others.

A process holds a trainer and takes its steps, on one batch that stays in memory: what is measured is the step, with
moving and rendering of the batch, and with all that ranks say to each other. Who is not asked waits, and computes
nothing.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from _memory import environment_with
from _stepping import STATUS, resident_mb
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

from ssl_eo.components import resolve
from ssl_eo.config import Config, build
from ssl_eo.data.loader import StepDataset
from ssl_eo.data.types import Batch
from ssl_eo.distributed import AgreedFlag, World, init_world, local_part, shutdown
from ssl_eo.train import run_dir
from ssl_eo.train.prefetch import DeviceBatches
from ssl_eo.train.trainer import Trainer
from ssl_eo.train.watch import Watch

__all__ = ["Group", "Part"]

_END_WITHIN_S = 60.0


@dataclass(frozen=True)
class Part:
    """Which of `size` parts of a batch a process has, and the port where it meets the others; None: never."""

    rank: int
    size: int
    port: int | None

    def environment(self, device: str) -> dict[str, str]:
        """What a launcher would say. A process by itself sees one GPU, as a rank of several uses one."""
        if device == "cpu":
            shown = {"CUDA_VISIBLE_DEVICES": ""}
        else:
            shown = {"CUDA_VISIBLE_DEVICES": str(self.rank)} if self.port is None else {}
        if self.port is None:
            return shown
        own = {"RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "WORLD_SIZE": str(self.size)}
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self.port)}
        held_elsewhere = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        return {**shown, **own, **meeting, **held_elsewhere}


class Group:
    """`size` processes that train `recipe`, together or, with `apart`, each by itself; all that is asked, all do.

    A context: its processes end with it. `environment` is added to theirs.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        size: int,
        device: str,
        *,
        apart: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA, and figures of memory, need fresh processes
        # Held here, as torchrun does: a port that is only looked for may be gone when it is needed.
        self._store = None if apart else TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._processes, self._pipes = [], []
        with environment_with(environment or {}):
            for rank in range(size):
                part = Part(rank, size, None if self._store is None else self._store.port)
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(recipe, part, device, theirs), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it has ended already, by an error
                pipe.send(None)
        for process in self._processes:
            process.join(_END_WITHIN_S)
            process.kill()

    def wait_until_ready(self) -> None:
        """Until its processes have taken their first steps: those of other groups are not to be timed meanwhile."""
        self.ask("steps", 0)

    def ask(self, what: str, *arguments: Any) -> list[Any]:
        """What each process's `Member` answers to its method `what`, all of them at once."""
        for pipe in self._pipes:
            pipe.send((what, arguments))
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise RuntimeError("a process of the benchmark has failed; what it says is above") from None

    def seconds(self, what: str, *arguments: Any) -> float:
        """The same where the answer is a time: until the last process has done it."""
        longest: float = max(self.ask(what, *arguments))
        return longest


class Member:
    """A trainer in a process of a group, after its first steps: the moments of the optimiser are there."""

    def __init__(self, config: Config, part: Part, world: World, watch: Watch) -> None:
        self.packages_mb = resident_mb("VmRSS") if STATUS.exists() else 0.0
        self.world = world
        self.trainer = Trainer(config, world, AgreedFlag(), watch)
        self.trainer.model.train()
        batch = _batch_of(self.trainer, part)
        self.batches = DeviceBatches(itertools.repeat(batch), world.device)
        self.steps(2)  # DDP arranges its buckets anew after the first one

    def steps(self, n: int) -> float:
        """Take `n` steps; returns the seconds they took."""
        start = self._now()
        for _ in range(n):
            self._step()
        return self._now() - start

    def step_and_save(self) -> float:
        """Take a step that is followed by a checkpoint; returns the seconds until the next step may begin."""
        start = self._now()
        self._step()
        self.trainer.checkpointer.save(self.trainer.step, self.trainer.facts)
        return self._now() - start

    def wait(self) -> float:
        """Wait for the checkpoint that is being written; returns the seconds."""
        start = self._now()
        self.trainer.checkpointer.wait()
        return self._now() - start

    def memory_mb(self) -> tuple[float | None, float]:
        """The most that this process took, and what its part of the training's state takes, with gradients.

        The former is without Python and its packages, and None on a CPU without the /proc of Linux.
        """
        peak = None
        if self.world.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 1e6
        elif STATUS.exists():
            peak = resident_mb("VmHWM") - self.packages_mb
        return peak, _state_bytes(self.trainer) / 1e6

    def close(self) -> None:
        self.trainer.stop.settle()
        self.trainer.close()

    def _step(self) -> None:
        """One turn of the trainer's loop, but for logs, probes and checkpoints."""
        self.trainer._train_step(self.batches)
        self.trainer.step += 1
        self.trainer.stop.poll()

    def _now(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _serve(recipe: dict[str, Any], part: Part, device: str, pipe: Connection) -> None:
    """A process of a group: does what comes through `pipe` until that is None."""
    os.environ.update(part.environment(device))
    config = build(Config, recipe, "")
    if part.port is None:
        config.run.name = f"{config.run.name}_{part.rank}"  # a run of its own
    torch.set_num_threads(config.train.n_threads or 1)
    world = init_world()
    with Watch(world, config.parallel.timeout_s) as watch, run_dir.claim(config.run_dir, config):
        member = Member(config, part, world, watch)
        with contextlib.closing(member):
            while (asked := pipe.recv()) is not None:
                what, arguments = asked
                pipe.send(getattr(member, what)(*arguments))
        watch.end()
    del member
    gc.collect()  # as after any training: DDP must not be the last to hold the process group
    shutdown()


def _batch_of(trainer: Trainer, part: Part) -> Batch:
    """The part of the first batch, for one that trains by itself as well."""
    config = trainer.config
    schemas = [source.schema for source in trainer.sources]
    method = resolve("ssl_eo.objectives", config.objective.name).Objective
    dataset = StepDataset(
        config.data,
        trainer.sources,
        method.views(config.objective.options, config.model, schemas),
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        rank=part.rank,
        world_size=part.size,
    )
    outcome = dataset[0]
    assert outcome.batch is not None, outcome.error
    return outcome.batch


def _state_bytes(trainer: Trainer) -> int:
    """Of weights, teacher, buffers, gradients and moments, as far as this process holds them."""
    objective = trainer.objective
    tensors: list[Tensor] = [*objective.parameters(), *objective.buffers()]
    tensors += [p for p in objective.parameters() if p.requires_grad]  # their gradients are as large
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(local_part(tensor).nbytes for tensor in tensors)
