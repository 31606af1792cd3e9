"""The training loop: builds everything in a readable order, then repeats one step.

It knows objectives only through `objectives.base`. Steps only, no epochs: batch `s`, learning rate `s` and all
randomness of step `s` are functions of `s`, so resuming is loading tensors and starting at the next step.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_eo.cluster import EXIT_DONE, EXIT_RESUMABLE, is_abandoned, signals_raise
from ssl_eo.components import resolve
from ssl_eo.config import Config, to_dict
from ssl_eo.data.loader import Loader
from ssl_eo.data.opening import open_sources
from ssl_eo.data.render import Renderer
from ssl_eo.data.types import Batch, Source, move_to
from ssl_eo.distributed import (
    AgreedFlag,
    World,
    all_agree,
    barrier,
    gather_objects,
    init_world,
    is_main,
    on_all_ranks,
    shutdown,
)
from ssl_eo.eval.features import tap_layers
from ssl_eo.eval.hook import EvalHook, undisturbed
from ssl_eo.eval.report import write_report
from ssl_eo.eval.summary import read_task_records
from ssl_eo.eval.table import print_summary
from ssl_eo.eval.watching import Training
from ssl_eo.jsonl import JsonLines
from ssl_eo.models.patch_embed import ChannelAttentionPatchEmbed
from ssl_eo.models.vit import EncoderInput, Tokens
from ssl_eo.objectives.base import Objective
from ssl_eo.seeding import derive_seed
from ssl_eo.train import run_dir
from ssl_eo.train.checkpoint import Checkpointer
from ssl_eo.train.initial import begin_from
from ssl_eo.train.metrics import Meters, ProgressLine, Sink, Stopwatch, open_sinks
from ssl_eo.train.optim import (
    build_optimizer,
    clip_gradients,
    lr_schedule,
    set_hyper_parameters,
    step_if_finite,
    weight_decay_schedule,
)
from ssl_eo.train.parallel import build_objective, check_accumulation, is_sharded, settle, without_reduction, wrap
from ssl_eo.train.prefetch import DeviceBatches
from ssl_eo.train.sealing import find_checkpoint
from ssl_eo.train.watch import Watch

__all__ = ["TrainingError", "train"]

_N_PICTURES = 6  # samples in a picture of how training goes on


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def train(config: Config) -> int:
    """Run (or go on with) the run that `config` describes; returns the exit status."""
    if config.train.n_threads is not None:
        torch.set_num_threads(config.train.n_threads)
    # The watch speaks first: it knows which rank is late. Reading the index of a large archive may take minutes.
    world = init_world(timeout_s=2 * config.parallel.timeout_s + 60)
    stop = AgreedFlag()
    with signals_raise(stop):  # and while the ranks part
        return _train(config, world, stop)


def _train(config: Config, world: World, stop: AgreedFlag) -> int:
    with Watch(world, config.parallel.timeout_s) as watch, run_dir.claim(config.run_dir, config):
        with watch.over():
            trainer = Trainer(config, world, stop, watch)
        with contextlib.closing(trainer):
            with watch.over():
                status = trainer.run()
                barrier()
            watch.end()
    # Not after an error: other ranks may never come to meet this one.
    stop.settle()
    # DDP holds on to the process group. If it is the last to do so, the group ends while Python's lock is held, and may
    # wait for a thread of gloo that needs it.
    del trainer
    gc.collect()
    shutdown()
    return status


class Trainer:
    """One run. `step` counts finished steps; `stop` asks for a checkpoint and the end at the next one."""

    def __init__(self, config: Config, world: World, stop: AgreedFlag, watch: Watch) -> None:
        self.config, self.world, self.stop, self.watch = config, world, stop, watch
        seed = config.run.seed

        self.sources = on_all_ranks(lambda: open_sources(config.data))
        self.facts: dict[str, Any] = {"data": _fingerprints(self.sources)}
        schemas = [source.schema for source in self.sources]

        method = resolve("ssl_eo.objectives", config.objective.name).Objective
        views = method.views(config.objective.options, config.model, schemas)
        self.objective: Objective = build_objective(
            lambda: method(config.objective.options, config.model, schemas), seed, world.device
        )
        check_accumulation(self.objective, config.train.accumulate)
        found = find_checkpoint(config.run_dir)
        self.facts["run"] = run_dir.identify(config.run_dir, is_new=found is None)
        self.begun_from = [] if found else begin_from(config.init, self.objective, config.run_dir)
        self.model = wrap(self.objective, config.parallel, world)
        self.optimizer = build_optimizer(config.optim, self.objective)
        self.lr = lr_schedule(config.optim, config.train.total_steps)
        self.weight_decay = weight_decay_schedule(config.optim, config.train.total_steps)
        self.schedules = self.objective.schedules(config.train.total_steps)

        self.checkpointer = Checkpointer(
            config.checkpoint, config.run_dir, self.objective, self.optimizer, world.timeout_s
        )
        self.step = self._resume(found) if found else 0

        self.renderer = Renderer(schemas, config.data.interpolation).to(world.device)
        self.loader = Loader(
            config.data,
            self.sources,
            views,
            seed=seed,
            global_batch_size=config.train.global_batch_size,
            n_micro_batches=config.train.accumulate,
            rank=world.rank,
            world_size=world.size,
            start_step=self.step,
            total_steps=config.train.total_steps,
            quarantine_path=config.run_dir / "quarantine.jsonl",
            device=world.device,
        )
        self.meters, self.stopwatch = Meters(), Stopwatch()
        self.recent_keys: list[tuple[int, list[str]]] = []  # of the steps whose finite flags are still unread
        self.n_skipped, self.n_skipped_in_a_row = 0, 0
        if is_main():
            run_dir.describe(config, schemas, world, self.step)
        barrier()  # the log files are trimmed before any rank reads them or appends to them
        names = [source.name for source in config.data.sources]
        encoder = self.objective.published_encoder()
        leaves_out = isinstance(encoder.patch_embed, ChannelAttentionPatchEmbed)  # bands without data
        watched = Training(names, self.sources, views, encoder.check, seed, leaves_out)
        self.evaluation = EvalHook(config.eval, config.run_dir, world.device, watched, begins_random=not config.init)
        self._open_logs()

    def _open_logs(self) -> None:
        config = self.config
        self.sinks: list[Sink] = []
        self.progress: ProgressLine | None = None
        if is_main():
            self.sinks = open_sinks(config.log, config.run_dir, to_dict(config), self.step)
            self.progress = ProgressLine(config.train.total_steps)
            self.sinks.append(self.progress)
        self.keys_log: Sink | None = JsonLines(config.run_dir / "keys.jsonl") if config.log.keys else None

    def run(self) -> int:
        """Train to the end, to a request to stop, or to an error."""
        config = self.config
        if self.step >= config.train.total_steps:
            self._note(f"{config.run_dir} has finished its {self.step} steps; nothing to do")
            return EXIT_DONE
        for line in (self._headline(), *self.begun_from):
            self._note(line)
        started = time.monotonic()
        self.evaluation.budget.start(self.step)
        if self.step == 0 and (probes := self._evaluate()):
            self._write({"step": 0, **probes})
        self.model.train()
        self.stopwatch.lap()
        batches = DeviceBatches(iter(self.loader), self.world.device)
        while self.step < config.train.total_steps:
            self._train_step(batches)
            self.step += 1
            probes = self._evaluate()
            if config.train.time_limit_s is not None and time.monotonic() - started > config.train.time_limit_s:
                self.stop.raised = True
            if not self.stop.raised and is_abandoned():
                self._note("torchrun is gone; the run is saved and ends")
                self.stop.raised = True
            last = self.step == config.train.total_steps
            stop = self.stop.poll() and not last
            save = stop or last or self.checkpointer.due(self.step)
            if save or probes or self.step % config.log.every_n_steps == 0:
                self._log(probes, batches)  # before a save, so that what is logged of finished steps outlives a kill
            if last or self._picture_due():
                self._draw()
            if save:
                self.watch.at(self.step, "saving")
                run_dir.check_own(config.run_dir, self.facts["run"])
                self.checkpointer.save(self.step, self.facts)
            if stop:
                self.checkpointer.wait()
                self._note(f"stopped on request after step {self.step}; the same command goes on from there")
                return EXIT_RESUMABLE
        self.checkpointer.wait()
        return EXIT_DONE

    def _train_step(self, batches: DeviceBatches) -> None:
        now = {name: schedule(self.step) for name, schedule in self.schedules.items()}
        set_hyper_parameters(self.optimizer, self.lr(self.step), self.weight_decay(self.step), self.step)
        torch.manual_seed(derive_seed(self.config.run.seed, "device", self.step, self.world.rank))  # drop path

        n = self.config.train.accumulate
        values: dict[str, Tensor] = {"loss": torch.zeros((), device=self.world.device)}
        keys: list[str] = []
        for i in range(n):
            self.watch.at(self.step, "waiting for a batch")
            batch = batches.take()
            with contextlib.nullcontext() if i == n - 1 else without_reduction(self.model):
                self.watch.at(self.step, "forward")
                losses = self._forward(batch, now)
                self.watch.at(self.step, "backward")
                (losses.total / n).backward()
            batches.prefetch()
            parts = {f"loss/{name}": part for name, part in losses.parts.items()}
            for name, value in {"loss": losses.total, **parts, **losses.metrics}.items():
                values[name] = values.get(name, 0.0) + value.detach() / n
            keys += batch.keys

        self.watch.at(self.step, "optimizer")
        grad_norm = clip_gradients(list(self.objective.student.parameters()), self.config.optim.clip_grad_norm)
        finite = all_agree(values["loss"].isfinite() & grad_norm.isfinite()).float()
        step_if_finite(self.optimizer, finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(now, finite, losses.state)

        self.meters.add({**values, "grad_norm": grad_norm}, finite)
        self.recent_keys.append((self.step, keys))
        if self.keys_log is not None:
            self.keys_log.write({"step": self.step + 1, "rank": self.world.rank, "keys": keys})

    def _forward(self, batch: Batch, now: dict[str, float]) -> Any:
        batch.pixels = self.renderer.render(batch)
        with self._autocast():
            return self.model(batch, now)

    def _autocast(self) -> torch.autocast:
        enabled = self.config.train.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def _resume(self, found: Path) -> int:
        step, facts = self.checkpointer.restore(found)
        if facts["data"] != self.facts["data"]:
            raise ValueError(
                f"{self.config.run_dir}: the data is not what this run was trained on (fingerprints {facts['data']},"
                f" now {self.facts['data']}); bring the data back, or start a new run with another run.name"
            )
        if facts.get("run") != self.facts["run"]:
            raise ValueError(
                f"{found} is of another run than {self.config.run_dir}: move it away to go on with the one before, or"
                " bring the whole run directory back"
            )
        return step

    def _log(self, probes: dict[str, float], batches: DeviceBatches) -> None:
        values, flags = self.meters.read()
        seconds = self.stopwatch.lap()
        waited, batches.waited_s = batches.waited_s, 0.0
        self._account_for_skipped(flags)
        n_samples = self.config.train.global_batch_size * len(flags)
        record: dict[str, Any] = {
            "step": self.step,
            **values,
            "lr": self.lr(self.step - 1),
            "weight_decay": self.weight_decay(self.step - 1),
            **{name: schedule(self.step - 1) for name, schedule in self.schedules.items()},
            "samples_per_s": n_samples / seconds,
            "data_wait_ratio": waited / seconds,
            "n_skipped_steps": self.n_skipped,
            "n_bad_samples": self.loader.n_bad,
            "eta_s": seconds / len(flags) * (self.config.train.total_steps - self.step),
            **probes,
        }
        if self.world.device.type == "cuda":
            record["max_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def _account_for_skipped(self, flags: list[bool]) -> None:
        limit = self.config.train.max_skipped_steps
        for (step, keys), taken in zip(self.recent_keys, flags, strict=True):
            self.n_skipped_in_a_row = 0 if taken else self.n_skipped_in_a_row + 1
            if not taken:
                self.n_skipped += 1
                self._note(f"step {step} was skipped: loss or gradient not finite (samples {', '.join(keys[:4])}, ...)")
                run_dir.record_skipped(self.config.run_dir, step, self.world.rank, keys)
            if self.n_skipped_in_a_row >= limit:
                raise TrainingError(
                    f"{limit} steps in a row had a non-finite loss or gradient (train.max_skipped_steps); weights are"
                    f" those of step {step + 1 - limit}. Look at {self.config.run_dir}/skipped.jsonl, lower optim.lr or"
                    " set optim.clip_grad_norm"
                )
        self.recent_keys = []

    def _evaluate(self) -> dict[str, float]:
        """What probes and health found where they are due now; leaves no trace in the training."""
        start = time.perf_counter()
        works = self.evaluation.take(self.step, self.config.train.total_steps)
        if not works:
            return {}
        self.watch.at(self.step, "probing")
        if self.progress is not None:
            self.progress.say(f"step {self.step}: probing")
        found = self.evaluation.run(self._encode_taps, self.step, self.objective, works)
        settle(self.model)
        self.stopwatch.exclude(time.perf_counter() - start)
        return {**found, "eval_time_ratio": self.evaluation.budget.ratio}

    def _encode_taps(self, inputs: EncoderInput) -> Sequence[Tokens]:
        depth = len(self.objective.published_encoder().blocks)
        return self.objective.encode(inputs, tap_layers(self.config.eval.taps, depth))

    def _picture_due(self) -> bool:
        every = self.config.log.pictures_every_n_steps
        return every > 0 and self.step % every == 0

    def _draw(self) -> None:
        if not is_main() and not is_sharded(self.model):
            return
        batch = move_to(self.loader.example(_N_PICTURES), self.world.device)
        batch.pixels = self.renderer.render(batch)
        with undisturbed(self.objective, self.world.device), self._autocast():
            pictures = self.objective.preview(batch)
        settle(self.model)
        if pictures and is_main():
            first = next(iter(batch.views.values()))[0]  # of the tiles, where there are several
            shown = {title: first.of_role(values) for title, values in pictures.items()}
            schema = self.sources[batch.source].schema[first.tile]
            run_dir.save_pictures(self.config.run_dir, self.step, shown, schema)

    def _headline(self) -> str:
        """What runs, on what, and from where on."""
        config, device = self.config, self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        n_parameters = sum(p.numel() for p in self.objective.published_encoder().parameters())
        begins = f"going on after step {self.step:,}" if self.step else "new run"
        begins += f" on {socket.gethostname()} at {datetime.now().astimezone().isoformat(' ', 'seconds')}"
        return (
            f"{config.run_dir}: {begins}; {config.objective.name}, encoder of {n_parameters / 1e6:.1f} M parameters,"
            f" {sum(map(len, self.sources)):,} samples, {self.world.size} x {name}, {config.train.precision}"
        )

    def _note(self, text: str) -> None:
        if self.progress is not None:
            self.progress.note(text)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # the last first, and all of them whatever one raises
            stack.callback(self._report)
            for sink in (*self.sinks, *filter(None, [self.keys_log])):
                stack.callback(sink.close)
            stack.callback(self.loader.close)
            stack.callback(self.checkpointer.close)

    def _report(self) -> None:
        if is_main() and self.config.log.report:
            if self.config.eval.every_n_steps:
                print_summary(read_task_records(self.config.run_dir / "eval.jsonl"), sys.stderr)
            report = write_report(self.config.run_dir)
            if sys.exc_info()[0] is None:  # what went wrong is told after this, and is what counts
                self._note(f"report: {report}")


def _fingerprints(sources: Sequence[Source]) -> list[str]:
    """Of every source; raises `ValueError` on every rank when they do not read the same everywhere."""
    own = [source.fingerprint() for source in sources]
    told = gather_objects((socket.gethostname(), own))
    for rank, (host, found) in enumerate(told):
        for i, (fingerprint, first) in enumerate(zip(found, told[0][1], strict=True)):
            if fingerprint != first:
                raise ValueError(
                    f"data.sources[{i}]: rank {rank} on {host} reads other data than rank 0 on {told[0][0]}"
                    f" (fingerprints {fingerprint} and {first}): is a file missing or older on one of them?"
                )
    return own
