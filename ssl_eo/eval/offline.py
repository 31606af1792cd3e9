"""Evaluating a finished encoder: every task, set of bands and size is one forward pass, and feeds any number of probes.

Beside the encoder stand, always, one of the same shape with random weights and the controls that see pixels alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ssl_eo
from ssl_eo.eval.bootstrap import FEWEST_GROUPS, interval_of, resampled_scores
from ssl_eo.eval.claims import Claim, work_through
from ssl_eo.eval.controls import control_of, control_taps
from ssl_eo.eval.cost import forward_gflop
from ssl_eo.eval.failures import failure
from ssl_eo.eval.features import (
    FeatureSet,
    Featurise,
    extract,
    in_precision,
    patch_taps,
    pooled_taps,
    tap_layers,
    tap_name,
)
from ssl_eo.eval.jobs import ENCODER, RANDOM, Evaluation, Job, OpenedTask
from ssl_eo.eval.leaks import count_alike, count_leaked, count_shared_groups
from ssl_eo.eval.metrics import Classified, Segmented
from ssl_eo.eval.partitions import parse_partition, partition_rows
from ssl_eo.eval.probes import takes_seed
from ssl_eo.eval.probing import Part, Probed, Probing, draw_of
from ssl_eo.eval.provenance import code_digest, content_of, digest_of_tensors, task_facts
from ssl_eo.eval.records import append, key_of, key_of_job, packed, read_results
from ssl_eo.eval.splits import INTERPOLATION, Split
from ssl_eo.eval.tasks import Task
from ssl_eo.models.vit import Encoder, EncoderInput, Tokens
from ssl_eo.seeding import derive_seed

__all__ = ["Evaluation", "Model", "evaluate"]

logger = logging.getLogger(__name__)

_MAX_DEATHS = 2  # of processes at one job, after which it counts as failed
_MAX_CLASSES_OF_TABLE = 64  # of which the confusion matrix is kept
_LEAST_READABLE = 0.9  # of a part of the training set: fewer are refused


@dataclass(frozen=True)
class Model:
    """The encoder that is evaluated, and how it is called in results."""

    name: str
    encoder: Encoder
    step: int

    @property
    def weights(self) -> str:
        """The hash of all weights."""
        return digest_of_tensors(self.encoder.state_dict())


def evaluate(model: Model, plan: Evaluation, out: Path) -> list[dict[str, Any]]:
    """Do what `plan` says and is not in `out` yet, together with other processes that do the same; returns its results.

    Results of other models and plans in `out` are left as they are, and not returned. What fails is a record and the
    rest goes on; so is a job at which processes have died. The next call tries again.
    """
    out.mkdir(parents=True, exist_ok=True)
    runner = _Runner(model, plan, out)
    jobs = {runner.claim_of(job): job for job in plan.jobs()}
    work_through(out / ".claims", list(jobs), lambda name, claim: runner.work(jobs[name], claim))
    return runner.results()


class _Runner:
    """Works on jobs, one after another."""

    def __init__(self, model: Model, plan: Evaluation, out: Path) -> None:
        self.model, self.plan, self.out = model, plan, out
        self.weights = model.weights
        self.device = torch.device(plan.device)
        self._opened = OpenedTask(model.encoder.cfg.patch_size)
        self._wanted: dict[str, dict[str, dict[str, Any]]] = {}  # by the name of a job: what is asked, by key

    def claim_of(self, job: Job) -> str:
        """The name of a job to all processes that are asked the same."""
        facts = {"job": self._id(job), "asked": list(self.plan.asked(job)), "task": task_facts(job.task)}
        return f"{job.name}-{key_of({**facts, 'n_resamples': self.plan.n_resamples, 'code': code_digest()})}"

    def work(self, job: Job, claim: Claim) -> None:
        if claim.n_before >= _MAX_DEATHS:
            self._fail(job, f"{claim.n_before} processes have ended while they were at it (out of memory?)")
            return
        try:
            self._measure(job)
        except Exception as error:
            self._wanted.setdefault(job.name, {})
            self._fail(job, failure(logger, error, "%s could not be evaluated", job.name)["error"])

    def results(self) -> list[dict[str, Any]]:
        """What there is of all that the plan asks for."""
        found = {record["key"]: record for record in read_results(self.out)}
        own = []
        for job in self.plan.jobs():
            wanted = self._keys(job)
            measured = [found[key] for key in wanted if key in found]
            problem = found.get(key_of_job(self._id(job)))
            # Of the whole job. It may be that of another plan, and all that is asked here has been measured.
            is_open = not wanted or any(found.get(key, {}).get("kind") != "result" for key in wanted)
            own += [problem, *measured] if problem is not None and is_open else measured
        return own

    def _keys(self, job: Job) -> Mapping[str, dict[str, Any]]:
        """What is asked of a job by its key, whoever has worked on it; nothing where that cannot be known."""
        if job.name not in self._wanted:
            self._wanted[job.name] = {}
            try:
                task = self._opened.of(job)
            except Exception as error:
                failure(logger, error, "%s: the task cannot be opened", job.name)
            else:
                self._ask(job, task)
        return self._wanted[job.name]

    def _ask(self, job: Job, task: Task | None) -> dict[str, Any]:
        """Note what is asked of a job; returns the facts that it depends on."""
        facts = {} if task is None else self._facts(job, task)
        asked = [] if task is None else self.plan.asked(job)
        self._wanted[job.name] = {key_of({**facts, **one}): one for one in asked}
        return facts

    def _id(self, job: Job) -> str:
        """Of the question, whatever code and data it is put to."""
        of_weights = {ENCODER: self.weights, RANDOM: asdict(self.model.encoder.cfg)}.get(job.features)
        how = [job.name, of_weights, self._pool(job), self._cell_px(job), self._precision(job)]
        return key_of({"job": how})

    def _precision(self, job: Job) -> str:
        """Of matrix products; controls have none that it would be worth to shorten."""
        return self.plan.precision if job.is_of_encoder else "float32"

    def _pool(self, job: Job) -> str | None:
        return self.plan.pool if job.is_of_encoder and not job.is_of_patches else None

    def _cell_px(self, job: Job) -> int | None:
        """Side of what stands for a patch in the features of a control: the same grid as that of the encoder."""
        return None if job.is_of_encoder or not job.is_of_patches else self.model.encoder.cfg.patch_size

    def _fail(self, job: Job, error: str, kind: str = "error") -> None:
        head = self._head(job)
        append(self.out, [{"key": key_of_job(head["job"]), "kind": kind, **head, "error": error}])

    def _head(self, job: Job) -> dict[str, Any]:
        return {
            "job": self._id(job),
            "task": job.task.name,
            "features": job.features,
            "model": self.model.name if job.is_of_encoder else None,
            "step": self.model.step if job.features == ENCODER else None,
            "subset": job.subset,
            "size": job.size,
            **({} if job.seed is None else {"seed": job.seed}),
        }

    def _measure(self, job: Job) -> None:
        task = self._opened.of(job)
        facts = self._ask(job, task)
        if task is None:
            self._fail(job, f"the tile has no bands {job.subset}", kind="skipped")
            return
        done = {record["key"] for record in read_results(self.out) if record["kind"] == "result"}
        missing = {key: asked for key, asked in self._wanted[job.name].items() if key not in done}
        if not missing:
            return
        start = time.perf_counter()
        featurise = self._featurise(job)
        splits = [split for split in (task.train, task.val, task.test) if split is not None]
        sets = {split.name: self._extract(featurise, split) for split in splits}
        head = {
            **self._head(job),
            **facts,
            "content": {name: content_of(features) for name, features in sets.items()},
            "seconds_features": round(time.perf_counter() - start, 3),
            "flags": task.cfg.flags,
            "n_leaked": count_leaked(task.name, sets, task.cfg.flags),
            "n_leaked_val": count_alike(sets["test"], sets["val"]) if "val" in sets else 0,
            "n_shared_groups": count_shared_groups(task.name, sets, task.cfg.flags),
            "gflop": forward_gflop(featurise, task.train, self.device) if job.is_of_encoder else None,
        }
        self._probe(task, sets, head, missing)

    def _extract(self, featurise: Featurise, split: Split) -> FeatureSet:
        """Of patches all that are scored, and as many of others as any part of the training set needs."""
        ratios = [parse_partition(name).ratio for name in self.plan.partitions] if split.name == "train" else [1.0]
        n_images = int(_LEAST_READABLE * min(ratios) * len(split))
        draw = None if split.name == "test" else draw_of(split.shown, split.name, n_images)
        return extract(featurise, split, self.device, self.plan.batch_size, self.plan.n_workers, draw)

    def _probe(
        self, task: Task, sets: dict[str, FeatureSet], head: Mapping[str, Any], missing: Mapping[str, dict[str, Any]]
    ) -> None:
        probing = Probing(task.shown, sets["train"], sets.get("val"), sets["test"], tuple(task.cfg.no_data))
        parts = _Parts(task, sets["train"])
        known: dict[tuple[Any, ...], dict[str, Any]] = {}  # what was found, by all that it depends on
        # Features are copied for one tap and one part at a time.
        for key, asked in sorted(missing.items(), key=lambda item: _place_of(item[1])):
            try:
                part, of_part = parts.of(asked["partition"], asked["seed"])
                seed = {"seed": asked["seed"]} if takes_seed(asked["probe"]) else {}
                is_drawn = bool(seed) or of_part["partition_of"] == "nested"
                address = (asked["tap"], asked["probe"], asked["partition"], asked["seed"] if is_drawn else None)
                if address not in known:  # what draws nothing is the same for all seeds
                    probed = probing.run(asked["probe"], asked["tap"], {**asked["options"], **seed}, part)
                    known[address] = {"kind": "result", **of_part, **self._result(task, probed, sets)}
                found = known[address]
            except Exception as error:
                what = f"{asked['probe']} of {head['features']}"
                found = failure(logger, error, "%s: %s could not be measured", task.name, what)
            append(self.out, [{"key": key, **head, **asked, **found}])

    def _facts(self, job: Job, task: Task) -> dict[str, Any]:
        """What results depend on, beside what is asked of the features."""
        splits = [split for split in (task.train, task.val, task.test) if split is not None]
        shown = task.shown
        return {
            "task": task.name,
            "dataset": task.cfg.counts_as,
            "kind_of_task": task.cfg.kind,
            "metric": task.cfg.headline,
            "ignore": task.cfg.ignore,
            "no_data": task.cfg.no_data,
            "classes": list(task.class_names),
            "features": job.features,
            "weights": self.weights if job.features == ENCODER else None,
            "encoder": asdict(self.model.encoder.cfg) if job.is_of_encoder else None,
            "pool": self._pool(job),
            "cell_px": self._cell_px(job),
            "data": {split.name: split.fingerprint() for split in splits},
            "sources": task_facts(task.cfg)["sources"],
            "tile": shown.tile,
            "sensor": key_of(asdict(shown.schema.sensor)),  # wavelengths, and what else an encoder is told of bands
            "bands": list(task.bands),
            "size_px": shown.plan.size[0],
            "precision": self._precision(job),
            "interpolation": INTERPOLATION,
            "normalization": task.cfg.statistics,  # of the task's training source, for mean and standard deviation
            "n_resamples": self.plan.n_resamples,
            "version": ssl_eo.__version__,
            "code": code_digest(),
            "torch": torch.__version__,
        }

    def _featurise(self, job: Job) -> Featurise:
        if not job.is_of_encoder:
            return control_taps(control_of(job.features, job.seed or 0), job.is_of_patches, self._cell_px(job))
        encoder = self.model.encoder if job.features == ENCODER else _fresh(self.model.encoder, job.seed or 0)
        encoder = encoder.to(self.device).eval()
        layers = tap_layers(self.plan.taps, len(encoder.blocks))
        names = [tap_name(ratio) for ratio in self.plan.taps]
        encode = in_precision(partial(_encode, encoder, layers), self.plan.precision, self.device)
        return patch_taps(encode, names) if job.is_of_patches else pooled_taps(encode, names, self.plan.pool)

    def _result(self, task: Task, probed: Probed, sets: dict[str, FeatureSet]) -> dict[str, Any]:
        """Scores with their intervals, by classes, and what the probe chose."""
        outcome, groups = probed.outcome, sets["test"].groups
        scores = outcome.scores()
        headline = task.cfg.headline
        if not math.isfinite(scores.get(headline, math.nan)):
            raise ValueError(f"{headline} is undefined for the samples of {task.name}")
        # The same draws for all features of a dataset, so that differences are of pairs; other datasets have others.
        seed = derive_seed(0, "bootstrap", task.cfg.counts_as)
        n_groups = len(set(groups))
        n_resamples = self.plan.n_resamples if n_groups >= FEWEST_GROUPS else 0
        resampled = resampled_scores(outcome, groups, n_resamples, seed) if n_resamples else {}
        bounds = {name: interval_of(values) for name, values in resampled.items()}
        record: dict[str, Any] = {
            "scores": {name: value for name, value in scores.items() if math.isfinite(value)},
            "intervals": {k: [b.low, b.high] for k, b in bounds.items() if math.isfinite(b.low + b.high)},
            "resampled": packed(resampled[headline]) if resampled else None,  # of the headline
            "n_undefined": bounds[headline].n_undefined if resampled else 0,  # of these resamples
            "chosen": probed.chosen,
            "n_features": probed.n_features,
            "n_fitted": probed.n_fitted,
            "n_val": len(sets["val"]) if "val" in sets else 0,
            "n_test": len(sets["test"]),
            "n_groups": n_groups,
            "seconds_probe": round(probed.seconds, 3),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "per_class": {name: _plain(column) for name, column in outcome.per_class().items()},
        }
        if isinstance(outcome, (Classified, Segmented)) and task.n_classes <= _MAX_CLASSES_OF_TABLE:
            record["confusion"] = outcome.confusion.tolist()
        return record


class _Parts:
    """Parts of the training set, each made once."""

    def __init__(self, task: Task, train: FeatureSet) -> None:
        self._cfg, self._train = task.cfg, train
        self._known: dict[tuple[str, int | None], tuple[Part, dict[str, Any]]] = {}

    def of(self, partition: str, seed: int) -> tuple[Part, dict[str, Any]]:
        """The samples of a partition, and what is said of them."""
        for address in ((partition, None), (partition, seed)):
            if address in self._known:
                return self._known[address]
        cfg, train = self._cfg, self._train
        parsed = parse_partition(partition)
        rows, origin = partition_rows(parsed, cfg.train, cfg.kind, train.keys, train.labels, seed)
        found = Part(rows), {"partition_of": origin, "n_train": len(rows)}
        self._known[partition, seed if origin == "nested" else None] = found
        return found


def _place_of(asked: Mapping[str, Any]) -> tuple[str, str, int]:
    """What results have in common that are read off the same rows."""
    return asked["tap"], asked["partition"], asked["seed"]


def _fresh(encoder: Encoder, seed: int) -> Encoder:
    """One of the same shape with random weights, the same in every evaluation."""
    fresh = Encoder(encoder.cfg, encoder.n_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        fresh.init_weights()
    return fresh


def _encode(encoder: Encoder, layers: Sequence[int], inputs: EncoderInput) -> Sequence[Tokens]:
    return encoder.intermediates(inputs, layers)


def _plain(column: Tensor) -> list[float | None]:
    """Numbers as JSON knows them: null where undefined."""
    return [value if math.isfinite(value) else None for value in column.tolist()]
