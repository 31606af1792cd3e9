"""Evaluating a finished encoder: every task, set of bands and size is one forward pass, and feeds any number of probes.

Beside the encoder stand, always, one of the same shape with random weights and the controls that see pixels alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ssl_eo
from ssl_eo.components import check_names
from ssl_eo.eval.bands import BAND_SUBSETS, BandSubset, bands_of
from ssl_eo.eval.bootstrap import interval_of, resampled_scores
from ssl_eo.eval.claims import Claim, work_through
from ssl_eo.eval.controls import CONTROLS, control_taps
from ssl_eo.eval.cost import forward_gflop
from ssl_eo.eval.features import (
    ALL_TAPS,
    FeatureSet,
    Featurise,
    Pool,
    check_taps,
    extract,
    patch_taps,
    pooled_taps,
    tap_layers,
    tap_name,
)
from ssl_eo.eval.leaks import count_leaked
from ssl_eo.eval.metrics import Classified, Segmented
from ssl_eo.eval.partitions import WHOLE, parse_partition, partition_rows
from ssl_eo.eval.probes import kinds_of, takes_seed
from ssl_eo.eval.probing import Probed, Probing
from ssl_eo.eval.records import append, key_of, key_of_job, packed, read_results
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.models.vit import Encoder, EncoderInput, Tokens
from ssl_eo.seeding import derive_seed

__all__ = ["Evaluation", "Model", "evaluate"]

logger = logging.getLogger(__name__)

ENCODER, RANDOM = "encoder", "random_encoder"
_MAX_DEATHS = 2  # of processes at one job, after which it counts as failed
_MAX_CLASSES_OF_TABLE = 64  # of which the confusion matrix is kept


@dataclass(frozen=True)
class Model:
    """The encoder that is evaluated, and how it is called in results."""

    name: str
    encoder: Encoder
    step: int

    @property
    def weights(self) -> str:
        """The hash of all weights."""
        digest = blake2b(digest_size=12)
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass
class Evaluation:
    """What is done with an encoder. Every combination of tasks, subsets, sizes, partitions, probes and seeds."""

    tasks: list[TaskConfig]
    probes: list[str] = field(default_factory=list)  # none: those of each task
    partitions: list[str] = field(default_factory=lambda: [WHOLE])
    subsets: list[BandSubset] = field(default_factory=lambda: ["all"])
    sizes: list[str] = field(default_factory=lambda: ["task"])  # "task": as the task says; "native"; or pixels
    seeds: list[int] = field(default_factory=lambda: [0])
    pool: Pool = "mean"
    taps: list[float] = field(default_factory=lambda: [1.0])
    controls: bool = True
    batch_size: int = 128
    n_workers: int = 0
    n_resamples: int = 1000  # of the bootstrap
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_taps(self.taps)
        for key, least in (("batch_size", 1), ("n_workers", 0), ("n_resamples", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}")
        check_names("tasks", [task.name for task in self.tasks])
        for key in ("partitions", "subsets", "sizes", "seeds"):
            check_names(key, getattr(self, key))
        for size in self.sizes:
            if size not in ("task", "native") and not (size.isdecimal() and 0 < int(size) <= 4096):
                raise ValueError(f"--size: {size!r} must be native, or a number of pixels up to 4096")
        for subset in self.subsets:
            if subset not in BAND_SUBSETS:
                raise ValueError(f"--bands: there is no {subset!r} ({', '.join(BAND_SUBSETS)})")
        for name in self.partitions:
            parse_partition(name)
        for task in self.tasks:
            if self.probes and not any(task.kind in kinds_of(probe) for probe in self.probes):
                names = ", ".join(self.probes)
                raise ValueError(f"--protocol: none of {names} takes {task.kind}, which {task.name} is")

    def jobs(self) -> list[_Job]:
        """Each a forward pass."""
        features = [ENCODER, RANDOM, *CONTROLS] if self.controls else [ENCODER]
        return [_Job(*parts) for parts in product(self.tasks, self.subsets, self.sizes, features)]


@dataclass(frozen=True)
class _Job:
    task: TaskConfig
    subset: BandSubset
    size: str
    features: str

    @property
    def name(self) -> str:
        return f"{self.task.name.replace('/', '_')}-{self.subset}-{self.size}-{self.features}"

    def open(self, seed: int, patch_px: int) -> Task | None:
        """The task with this job's bands and size; None where its tile has no such bands."""
        sizes = {"task": self.task.size_px, "native": None}
        task = Task(replace(self.task, size_px=int(self.size) if self.size.isdecimal() else sizes[self.size]), patch_px)
        if self.subset == "all":
            return task
        bands = bands_of(self.subset, task.bands, task.schema.sensor.true_color, task.name, seed)
        return None if bands is None else Task(replace(task.cfg, bands=bands), patch_px)


def evaluate(model: Model, plan: Evaluation, out: Path) -> list[dict[str, Any]]:
    """Do what `plan` says and is not in `out` yet, together with other processes that do the same; returns all results.

    What fails is a record and the rest goes on; so is a job at which processes have died. The next call tries again.
    """
    out.mkdir(parents=True, exist_ok=True)
    runner = _Runner(model, plan, out)
    depends_on = {"weights": runner.weights, "plan": _essence(plan)}
    names = {f"{job.name}-{key_of({**depends_on, 'task': repr(job.task)})}": job for job in plan.jobs()}
    work_through(out / ".claims", list(names), lambda name, claim: runner.work(names[name], claim))
    return read_results(out)


class _Runner:
    """Works on jobs, one after another."""

    def __init__(self, model: Model, plan: Evaluation, out: Path) -> None:
        self.model, self.plan, self.out = model, plan, out
        self.weights = model.weights
        self.device = torch.device(plan.device)
        self._opened: tuple[str, Task | None] = ("", None)

    def work(self, job: _Job, claim: Claim) -> None:
        head = self._head(job)
        if claim.n_before >= _MAX_DEATHS:
            self._fail(head, f"{claim.n_before} processes have ended while they were at it (out of memory?)")
            return
        try:
            self._measure(job, head)
        except Exception as error:
            logger.warning("%s could not be evaluated: %s", job.name, error)
            self._fail(head, f"{type(error).__name__}: {error}")

    def _fail(self, head: dict[str, Any], error: str, kind: str = "error") -> None:
        append(self.out, [{"key": key_of_job(head["job"]), "kind": kind, **head, "error": error}])

    def _head(self, job: _Job) -> dict[str, Any]:
        own = self.model if job.features == ENCODER else None
        of_encoder = job.features in (ENCODER, RANDOM)
        return {
            "job": key_of({"weights": self.weights, "job": job.name}),
            "task": job.task.name,
            "features": job.features,
            "model": self.model.name if of_encoder else None,
            "step": own.step if own is not None else None,
            "subset": job.subset,
            "size": job.size,
        }

    def _measure(self, job: _Job, head: dict[str, Any]) -> None:
        task = self._open(job)
        if task is None:
            self._fail(head, f"the tile has no bands {job.subset}", kind="skipped")
            return
        facts = self._facts(job, task)
        wanted = {key_of({**facts, **asked}): asked for asked in self._asked(job)}
        done = {record["key"] for record in read_results(self.out) if record["kind"] == "result"}
        missing = {key: asked for key, asked in wanted.items() if key not in done}
        if not missing:
            return
        start = time.perf_counter()
        featurise = self._featurise(job)
        splits = [split for split in (task.train, task.val, task.test) if split is not None]
        sets = {s.name: extract(featurise, s, self.device, self.plan.batch_size, self.plan.n_workers) for s in splits}
        head = {**head, **facts, "seconds_features": round(time.perf_counter() - start, 3), "flags": task.cfg.flags}
        head["n_leaked"] = count_leaked(task.name, sets, task.cfg.flags)
        head["gflop"] = forward_gflop(featurise, task.train, self.device) if head["encoder"] else None
        probing_of = cache(partial(_probing, task, sets))
        for key, asked in missing.items():
            try:
                probing, of_partition = probing_of(asked["partition"], asked["seed"])
                options = {"seed": asked["seed"]} if takes_seed(asked["probe"]) else {}
                probed = probing.run(asked["probe"], asked["tap"], options)
                found = {"kind": "result", **of_partition, **self._result(task, probed, sets)}
            except Exception as error:
                logger.warning("%s: %s could not be measured: %s", job.name, asked["probe"], error)
                found = {"kind": "error", "error": f"{type(error).__name__}: {error}"}
            append(self.out, [{"key": key, **head, **asked, **found}])

    def _open(self, job: _Job) -> Task | None:
        """The task of a job; jobs of one task follow each other, and share what it holds in memory."""
        identity = repr(replace(job, features=""))
        if self._opened[0] != identity:
            self._opened = (identity, job.open(self.plan.seeds[0], self.model.encoder.cfg.patch_size))
        return self._opened[1]

    def _asked(self, job: _Job) -> Iterable[dict[str, Any]]:
        """What is run on the features of a job."""
        taps = [tap_name(ratio) for ratio in self.plan.taps] if job.features in (ENCODER, RANDOM) else ["pixels"]
        probes = self.plan.probes or job.task.probes
        places: list[dict[str, Any]] = [{"tap": tap} for tap in taps]
        places += [{"tap": ALL_TAPS, "taps": taps}] if len(taps) > 1 else []
        for place, probe, part, seed in product(places, probes, self.plan.partitions, self.plan.seeds):
            if job.task.kind in kinds_of(probe):
                yield {**place, "probe": probe, "partition": part, "seed": seed}

    def _facts(self, job: _Job, task: Task) -> dict[str, Any]:
        """What results depend on, beside what is asked of the features."""
        of_encoder = job.features in (ENCODER, RANDOM)
        splits = [split for split in (task.train, task.val, task.test) if split is not None]
        shown = task.shown
        return {
            "task": task.name,
            "kind_of_task": task.cfg.kind,
            "metric": task.cfg.headline,
            "ignore": task.cfg.ignore,
            "no_data": task.cfg.no_data,
            "classes": list(task.class_names),
            "features": job.features,
            "weights": self.weights if job.features == ENCODER else None,
            "encoder": asdict(self.model.encoder.cfg) if of_encoder else None,
            "pool": self.plan.pool if of_encoder and task.cfg.kind != "segmentation" else None,
            "data": {split.name: split.fingerprint() for split in splits},
            "tile": shown.tile,
            "bands": list(task.bands),
            "size_px": shown.plan.size[0],
            "interpolation": "bicubic",
            "normalization": "task",  # by mean and standard deviation of the task's training source
            "n_resamples": self.plan.n_resamples,
            "version": ssl_eo.__version__,
            "torch": torch.__version__,
        }

    def _featurise(self, job: _Job) -> Featurise:
        of_patches = job.task.kind == "segmentation"
        if job.features in CONTROLS:
            return control_taps(CONTROLS[job.features], of_patches)
        encoder = self.model.encoder if job.features == ENCODER else _fresh(self.model.encoder)
        encoder = encoder.to(self.device).eval()
        layers = tap_layers(self.plan.taps, len(encoder.blocks))
        names = [tap_name(ratio) for ratio in self.plan.taps]
        encode = partial(_encode, encoder, layers)
        return patch_taps(encode, names) if of_patches else pooled_taps(encode, names, self.plan.pool)

    def _result(self, task: Task, probed: Probed, sets: dict[str, FeatureSet]) -> dict[str, Any]:
        """Scores with their intervals, by classes, and what the probe chose."""
        outcome, groups = probed.outcome, sets["test"].groups
        scores = outcome.scores()
        headline = task.cfg.headline
        if not math.isfinite(scores.get(headline, math.nan)):
            raise ValueError(f"{headline} is undefined for the samples of {task.name}")
        resampled = resampled_scores(outcome, groups, self.plan.n_resamples) if self.plan.n_resamples else {}
        bounds = {name: interval_of(values) for name, values in resampled.items()}
        record: dict[str, Any] = {
            "scores": {name: value for name, value in scores.items() if math.isfinite(value)},
            "intervals": {k: [b.low, b.high] for k, b in bounds.items() if math.isfinite(b.low + b.high)},
            # The headline on the same resamples for all features of a task, so that differences are of pairs.
            "resampled": packed(resampled[headline]) if resampled else None,
            "chosen": probed.chosen,
            "n_features": probed.n_features,
            "n_fitted": probed.n_train,
            "n_val": len(sets["val"]) if "val" in sets else 0,
            "n_test": len(sets["test"]),
            "n_groups": len(set(groups)),
            "seconds_probe": round(probed.seconds, 3),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "per_class": {name: _plain(column) for name, column in outcome.per_class().items()},
        }
        if isinstance(outcome, (Classified, Segmented)) and task.n_classes <= _MAX_CLASSES_OF_TABLE:
            record["confusion"] = outcome.confusion.tolist()
        return record


def _probing(task: Task, sets: dict[str, FeatureSet], partition: str, seed: int) -> tuple[Probing, dict[str, Any]]:
    """Features of a partition of the training set, and what is said of it."""
    train = sets["train"]
    part, cfg = parse_partition(partition), task.cfg
    rows, origin = partition_rows(part, cfg.train, cfg.kind, train.keys, train.labels, seed)
    chosen = train if origin == "all" else train.rows(rows)
    probing = Probing(task.shown, chosen, sets.get("val"), sets["test"], tuple(task.cfg.no_data))
    return probing, {"partition_of": origin, "n_train": len(chosen)}


def _fresh(encoder: Encoder) -> Encoder:
    """One of the same shape with random weights, the same in every evaluation."""
    fresh = Encoder(encoder.cfg, encoder.n_channels)
    torch.manual_seed(derive_seed(0, "init"))
    fresh.init_weights()
    return fresh


def _encode(encoder: Encoder, layers: Sequence[int], inputs: EncoderInput) -> Sequence[Tokens]:
    return encoder.intermediates(inputs, layers)


def _essence(plan: Evaluation) -> dict[str, Any]:
    """What of a plan all its jobs depend on."""
    names = ("probes", "partitions", "seeds", "pool", "taps", "n_resamples")
    return {name: getattr(plan, name) for name in names}


def _plain(column: Tensor) -> list[float | None]:
    """Numbers as JSON knows them: null where undefined."""
    return [value if math.isfinite(value) else None for value in column.tolist()]
