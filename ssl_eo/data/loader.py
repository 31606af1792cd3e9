"""From a step to a batch: workers read, check, plan and collate; the main process counts what could not be read.

The unit of work is a rank's part of one step, or a micro-batch of it, so a batch depends on (seed, config, step, rank)
alone: not on how many workers there are, which of them made it, or what ran before. Views are drawn from the generator
at (seed, "view", step, slot), slot being the sample's position in the global batch: a sample that comes twice in a
batch gets two different views.

No array is looked into here: shapes and their letters are those of `ssl_eo.data.types`.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_eo.components import one_line
from ssl_eo.data.mixture import MixedSource, scaled_weights
from ssl_eo.data.opening import DataConfig
from ssl_eo.data.order import MixedOrder, Mixture, Order, check_lanes
from ssl_eo.data.plans import SourceCrop
from ssl_eo.data.stacking import check_sample, cut_to_views, shown_plans
from ssl_eo.data.types import Batch, Locates, Prefetches, Sample, Source, Views, map_tensors
from ssl_eo.seeding import numpy_generator

__all__ = ["BadSample", "Loader", "StepDataset", "set_up_worker", "worker_context"]

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 100  # unreadable samples in a row, in one place of a batch, before loading fails
MIN_BAD_SAMPLES = 10  # a run never stops for fewer, whatever their share


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used and was replaced; one line of `quarantine.jsonl`."""

    step: int
    source: str
    index: int
    key: str | None
    shard: str | None
    reason: str


@dataclass
class Outcome:
    """What a worker sends back for a step: a batch, or the `error` that prevented it and its traceback."""

    bad: list[BadSample]
    batch: Batch | None = None
    error: str = ""
    trace: str = ""

    def pin_memory(self) -> Outcome:
        """Called by torch's pinning thread."""
        return Outcome(self.bad, map_tensors(Tensor.pin_memory, self.batch), self.error, self.trace)


class WorkerTraceback(Exception):
    """The traceback of an error in a worker, as the cause of the error raised in the training process."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


class StepDataset(Dataset[Outcome]):
    """This rank's parts of the global batches, a pure function of its arguments; sources are told what they will need.

    With n micro-batches to a step, `dataset[i]` is part `i % n` of step `i // n`.
    """

    def __init__(
        self,
        cfg: DataConfig,
        sources: Sequence[Source],
        views: Views,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        n_micro_batches: int = 1,
    ) -> None:
        check_lanes(global_batch_size, cfg.n_lanes, world_size)
        if (global_batch_size // world_size) % n_micro_batches:
            raise ValueError(
                f"train.accumulate = {n_micro_batches} does not divide the {global_batch_size // world_size} samples of"
                f" a rank (train.global_batch_size = {global_batch_size}, world size {world_size})"
            )
        parts = [part for source in sources for part in (source.parts if isinstance(source, MixedSource) else [source])]
        assert len(parts) == len(cfg.sources)
        self.sources = list(sources)
        self.views = views
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.n_micro_batches = n_micro_batches
        weights = scaled_weights([s.weight for s in cfg.sources], [len(part) for part in parts], cfg.temperature)
        orders = [
            Order(len(p), p.chunk_size, cfg.n_lanes, global_batch_size, seed, cfg.window_chunks, source=i)
            for i, p in enumerate(parts)
        ]
        is_mixed = cfg.mixing == "sample"
        self.names = ["+".join(s.name for s in cfg.sources)] if is_mixed else [s.name for s in cfg.sources]
        self.orders: list[Order] | list[MixedOrder] = [MixedOrder(tuple(orders), weights)] if is_mixed else orders
        self.mixture = Mixture((1.0,) if is_mixed else weights, seed)
        self._crops = [None if s.crop == SourceCrop() else s.crop for s in cfg.sources]
        self._read_ahead_steps = cfg.read_ahead_steps
        self._announced = 0  # the step up to which sources know what is needed

    def example(self, n: int) -> Batch:
        """The first `n` samples of this rank's part of step 0."""
        source = self.mixture.source(0)
        slots = self.orders[source].slots(self.rank, self.world_size)[:n]
        ids = self.orders[source].batch(0, self.rank, self.world_size)[:n]
        planned = [self._sample(0, source, slot, index, []) for slot, index in zip(slots, ids.tolist(), strict=True)]
        return self.views.collate(planned, 0, source, numpy_generator(self.seed, "batch", 0))

    def __getitem__(self, i: int) -> Outcome:
        step, part = divmod(i, self.n_micro_batches)
        source = self.mixture.source(step)
        bad: list[BadSample] = []
        try:
            self._announce(step)
            return Outcome(bad, self._batch(step, part, source, bad))
        except Exception as error:
            where = f"step {step}, data.sources[{source}] ({self.names[source]})"
            return Outcome(bad, None, f"{where}: {_describe(error)}", traceback.format_exc())

    def _announce(self, step: int) -> None:
        """Tell sources that fetch what the steps from this one on will need."""
        stop = step + self._read_ahead_steps + 1
        for ahead in range(max(step, self._announced), stop):
            source = self.mixture.source(ahead)
            reader = self.sources[source]
            if isinstance(reader, Prefetches) and reader.is_remote:
                ids = self.orders[source].batch(self.mixture.source_step(ahead), self.rank, self.world_size)
                reader.prefetch(ids.tolist())
        self._announced = max(self._announced, stop)

    def _batch(self, step: int, part: int, source: int, bad: list[BadSample]) -> Batch:
        order = self.orders[source]
        slots = order.slots(self.rank, self.world_size)
        ids = order.batch(self.mixture.source_step(step), self.rank, self.world_size)
        n = len(slots) // self.n_micro_batches
        mine = slice(part * n, (part + 1) * n)
        pairs = zip(slots[mine], ids[mine].tolist(), strict=True)
        planned = [self._sample(step, source, slot, index, bad) for slot, index in pairs]
        return self.views.collate(planned, step, source, numpy_generator(self.seed, "batch", step))

    def _sample(self, step: int, source: int, slot: int, index: int, bad: list[BadSample]) -> tuple[Sample, Any]:
        """The sample `index` and its plan, or those of the first usable sample that takes its place."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            if (item := self._try(step, source, slot, index, bad)) is not None:
                return item
            index = self.orders[source].replacement(self.mixture.source_step(step), slot, attempt)
        raise RuntimeError(f"{MAX_ATTEMPTS} samples in a row could not be used; the last: {bad[-1].reason}")

    def _try(self, step: int, source: int, slot: int, index: int, bad: list[BadSample]) -> tuple[Sample, Any] | None:
        """The sample `index` and its plan, or None and a new record in `bad`."""
        reader = self.sources[source]
        try:
            sample = reader.read(index)
            check_sample(sample, reader.schema)
            limits = sample.limits
            if (crop := self._crop(source, index)) is not None:
                limits = crop.draw(sample, numpy_generator(self.seed, "crop", step, slot))
            sample = replace(sample, limits=limits, slot=slot)
            planned = self.views.plan(sample, numpy_generator(self.seed, "view", step, slot))
            return cut_to_views(sample, shown_plans(planned), reader.schema), planned
        except (ValueError, OSError, EOFError) as error:
            key, shard = reader.locate(index) if isinstance(reader, Locates) else (None, None)
            bad.append(BadSample(step, self.names[source], index, key, shard, _describe(error)))
            return None

    def _crop(self, source: int, index: int) -> SourceCrop | None:
        reader = self.sources[source]
        return self._crops[reader.place(index)[0] if isinstance(reader, MixedSource) else source]


class Loader:
    """Iterates over this rank's batches of steps `start_step`, ..., `total_steps - 1`; close it in the end.

    With `n_micro_batches` above 1 each step gives as many batches, which together hold the same samples and views.

    Workers start at once. They are forked, which is quick, unless CUDA is in use: then a server process that has never
    touched the device forks them. They leave SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 to the training process, which may
    want more batches before it stops, and they end when it ends, however it ends.

    `n_seen` and `n_bad` count samples delivered and samples replaced since `start_step`. Each replaced sample is a line
    of `quarantine_path`; a step repeated after a resume repeats its lines.
    """

    def __init__(
        self,
        cfg: DataConfig,
        sources: Sequence[Source],
        views: Views,
        *,
        seed: int,
        global_batch_size: int,
        total_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        n_micro_batches: int = 1,
        quarantine_path: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.n_seen = 0
        self.n_bad = 0
        self._max_bad_ratio = cfg.max_bad_ratio
        self._quarantine_path = quarantine_path
        self._dataset = StepDataset(
            cfg,
            sources,
            views,
            seed=seed,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            n_micro_batches=n_micro_batches,
        )
        parts = range(start_step * n_micro_batches, total_steps * n_micro_batches)
        loader = _data_loader(cfg, self._dataset, parts, on_cuda=torch.device(device).type == "cuda")
        others = set(multiprocessing.active_children())
        self._running: list[Iterator[Outcome]] = [iter(loader)]
        workers = [c for c in multiprocessing.active_children() if c not in others]
        self._stop = weakref.finalize(self, _stop_workers, self._running, workers)

    def example(self, n: int) -> Batch:
        """A batch of `n` samples, always the same, read in this process: for pictures of how training goes on."""
        return self._dataset.example(n)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if not self._running:
            raise StopIteration
        try:
            outcome = next(self._running[0])
        except StopIteration:
            self.close()
            raise
        self._quarantine(outcome.bad)
        if outcome.batch is None:
            raise RuntimeError(f"loading failed at {outcome.error}") from WorkerTraceback(outcome.trace)
        self.n_seen += len(outcome.batch.keys)
        self._check_bad_ratio()
        return outcome.batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers. The loader is then at its end."""
        self._stop()

    def _quarantine(self, bad: list[BadSample]) -> None:
        if not bad:
            return
        self.n_bad += len(bad)
        logger.warning("step %d: replaced %d samples, the first: %s", bad[0].step, len(bad), bad[0].reason)
        if self._quarantine_path is not None:
            # One write in append mode, so that the lines of several ranks do not mix. Not `JsonLines`: it looks at the
            # end of the file when it is opened, where another rank may be in the middle of a line.
            lines = "".join(json.dumps(asdict(b)) + "\n" for b in bad)
            with self._quarantine_path.open("ab", buffering=0) as file:
                file.write(lines.encode())

    def _check_bad_ratio(self) -> None:
        if self.n_bad > max(MIN_BAD_SAMPLES, self._max_bad_ratio * self.n_seen):
            where = f"; see {self._quarantine_path}" if self._quarantine_path is not None else ""
            raise RuntimeError(
                f"{self.n_bad} samples could not be used for {self.n_seen} that could, more than data.max_bad_ratio ="
                f" {self._max_bad_ratio:g} allows{where}; repair the data or raise the limit"
            )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _data_loader(cfg: DataConfig, dataset: StepDataset, parts: range, on_cuda: bool) -> DataLoader[Outcome]:
    """The outcomes of `parts` in order, from workers as `cfg` wants them."""
    if cfg.n_workers:
        _raise_open_file_limit()
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=parts,
        num_workers=cfg.n_workers,
        prefetch_factor=cfg.prefetch_batches if cfg.n_workers else None,
        multiprocessing_context=worker_context(cfg.start_method, on_cuda) if cfg.n_workers else None,
        worker_init_fn=set_up_worker,
        pin_memory=cfg.pin_memory and on_cuda,
        generator=torch.Generator(),  # DataLoader draws a seed that nothing here uses: not from the global stream
    )


def worker_context(start_method: str, on_cuda: bool) -> multiprocessing.context.BaseContext:
    """How to start workers: by a method of multiprocessing, or `auto`. A fork inherits the state of the CUDA driver and
    of its threads, which is unsafe.
    """
    if start_method == "auto":
        start_method = "fork" if sys.platform == "linux" and not on_cuda else "forkserver"
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload([__name__])  # import torch once, not once a worker
    return context


def set_up_worker(worker: int) -> None:
    """Let a worker leave signals to the process that it reads for, and end when that ends."""
    # A scheduler signals every process of a job. A worker that obeyed would take the training process down with it
    # before that could write its checkpoint.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # DataLoader's own watch looks at the parent's process id, which for a worker of a fork server is the server's; and
    # the server in turn lives as long as its workers.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _raise_open_file_limit() -> None:
    # Every tensor that comes from a worker holds a file descriptor; the usual soft limit of 1024 is a few batches.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _stop_workers(running: list[Iterator[Outcome]], workers: list[multiprocessing.process.BaseProcess]) -> None:
    running.clear()  # dropping DataLoader's iterator asks its workers to end and waits a few seconds for each
    for worker in workers:
        if worker.is_alive():  # stuck in a read, and deaf to SIGTERM
            worker.kill()
        worker.join()
