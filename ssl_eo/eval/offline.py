"""Evaluating a finished encoder: every task, set of bands and size is one forward pass, and feeds any number of probes.

Beside the encoder stand, always, one of the same shape with random weights and the controls that see pixels alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import ssl_eo
from ssl_eo.cluster import read_launch
from ssl_eo.eval.claims import Claim, work_through
from ssl_eo.eval.controls import control_of, control_taps
from ssl_eo.eval.cost import forward_gflop
from ssl_eo.eval.failures import failure, failures
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
from ssl_eo.eval.jobs import ENCODER, RANDOM, Evaluation, Job, OpenedTask, check_keys
from ssl_eo.eval.leaks import count_alike, count_leaked, count_shared_groups
from ssl_eo.eval.partitions import parse_partition
from ssl_eo.eval.probing import draw_of
from ssl_eo.eval.provenance import code_digest, content_of, digest_of_tensors, task_facts
from ssl_eo.eval.records import add_to_plan, append, key_of, key_of_job, read_results
from ssl_eo.eval.scoring import scored
from ssl_eo.eval.splits import INTERPOLATION, Split
from ssl_eo.eval.tasks import Task
from ssl_eo.installation import commit
from ssl_eo.models.vit import Encoder, EncoderInput, Tokens
from ssl_eo.progress import progress, say
from ssl_eo.seeding import derive_seed

__all__ = ["Evaluation", "Model", "evaluate"]

logger = logging.getLogger(__name__)

_MAX_DEATHS = 2  # of processes at one job, after which it counts as failed
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


def evaluate(model: Model, plan: Evaluation, out: Path, say: Callable[[str], None] = say) -> list[dict[str, Any]]:
    """Do what `plan` says and is not in `out` yet, together with other processes that do the same; returns its results.

    Results of other models and plans in `out` are left as they are, and not returned. What fails is a record and the
    rest goes on; so is a job at which processes have died, and a task that cannot be opened, whose jobs are not tried.
    The next call tries again. What was asked for and is not there is an error among what is returned. `say` is told of
    each forward pass, and of those that were there.
    """
    is_first = read_launch(os.environ, first_host=str).rank == 0  # nobody needs to know where ranks meet
    out.mkdir(parents=True, exist_ok=True)
    known = {record["key"] for record in read_results(out) if record["kind"] == "result"}
    runner = _Runner(model, plan, out, say)
    runner.prepare()
    claims = {runner.claim_of(job): n for n, job in enumerate(runner.jobs)}
    work_through(out / ".claims", list(claims), lambda name, claim: runner.work(claims[name], claim))
    results = runner.results()
    measured = [record for record in results if record["kind"] == "result"]
    if measured and is_first:
        if len(measured) == len(results) and known.issuperset(record["key"] for record in measured):
            say(f"all {len(measured)} results were there already")
        elif runner.n_there:
            say(f"{runner.n_there} of {len(runner.jobs)} passes were there already")
        folder = shlex.quote(str(out))
        say(f"results in {folder}; for a page of them: ssl-eo report {folder} --out report.html")
    return results


class _Runner:
    """Works on jobs, one after another."""

    def __init__(self, model: Model, plan: Evaluation, out: Path, say: Callable[[str], None]) -> None:
        self.model, self.plan, self.out, self._say = model, plan, out, say
        self.jobs: list[Job] = []  # of the tasks that can be opened
        self.n_there = 0  # of these, that were found measured
        self.weights = model.weights
        self.device = torch.device(plan.device)
        self._opened = OpenedTask(model.encoder.cfg.patch_size)
        self._questions: dict[str, dict[str, dict[str, Any]]] = {}  # of a job, by its id: what is asked, by key
        self._checked: set[str] = set()  # names of tasks whose keys have been compared
        self._given_up: set[str] = set()  # names of tasks of which no job is tried

    def prepare(self) -> None:
        """Open each task, to find its jobs, and note what is asked for."""
        problems: dict[str, Exception] = {}
        for task in self.plan.tasks:
            try:
                self.jobs += self.plan.jobs_of(task, self._open_any(self.plan.jobs_of(task)))
            except Exception as error:
                problems[task.name] = error
        told = failures(logger, problems, len(self.plan.tasks), "tasks cannot be opened")
        for task in self.plan.tasks:
            if task.name in told:
                self._give_up(self.plan.jobs_of(task)[0], told[task.name])
        names = ("job", "task", "features", "model", "subset", "size")
        heads = [(job, self._head(job)) for job in self.jobs]
        add_to_plan(self.out, [{**{key: head[key] for key in names}, **self.plan.axes(job)} for job, head in heads])

    def _open_any(self, jobs: Sequence[Job]) -> Task:
        """The task of `jobs` with all its bands, in the first of their sizes in which it can be shown."""
        *firsts, last = {job.size: replace(job, subset="all", seed=None) for job in jobs}.values()
        for job in firsts:
            with contextlib.suppress(ValueError):
                return self._opened.whole(job)
        return self._opened.whole(last)

    def claim_of(self, job: Job) -> str:
        """The name of a job to all processes that are asked the same."""
        facts = {"job": self._id(job), "questions": list(self.plan.questions(job)), "task": task_facts(job.task)}
        digest = key_of({**facts, "n_resamples": self.plan.n_resamples, "code": code_digest()})
        return f"{job.name.replace(', ', '-')}-{digest}"

    def work(self, n: int, claim: Claim) -> None:
        """On the job `n`, counted from 0."""
        job = self.jobs[n]
        if job.task.name in self._given_up:
            return
        if claim.n_before >= _MAX_DEATHS:
            self._fail(job, f"{claim.n_before} processes have ended while they were at it (out of memory?)")
            return
        start = time.perf_counter()
        try:
            is_done = self._measure(job)
        except Exception as error:
            self._questions.setdefault(self._id(job), {})
            self._fail(job, failure(logger, error, "%s could not be evaluated", job.name)["error"])
        else:
            if is_done:
                self._say(f"{n + 1}/{len(self.jobs)} {job.name}, {time.perf_counter() - start:.0f} s")

    def results(self) -> list[dict[str, Any]]:
        """What there is of all that the plan asks for, and an error for whatever there is not."""
        found = {record["key"]: record for record in read_results(self.out)}
        own: list[dict[str, Any]] = []
        for task in self.plan.tasks:
            jobs = [job for job in self.jobs if job.task is task] or self.plan.jobs_of(task)[:1]
            is_told = False  # why there is nothing of the whole task
            for job in jobs:
                of_job = list(self._results_of(job, found, is_told))
                is_told = is_told or any(record.get("of_task") for record in of_job)
                own += of_job
        return own

    def _results_of(self, job: Job, found: Mapping[str, dict[str, Any]], is_told: bool) -> Iterator[dict[str, Any]]:
        questions = {} if job.task.name in self._given_up else self._questions_of(job)
        of_job = key_of_job(self._id(job))
        # It may be that of another plan, and all that is asked here has been measured.
        is_open = not questions or any(found.get(key, {}).get("kind") != "result" for key in questions)
        if of_job in found and is_open:
            yield found[of_job]
            is_told = True
        for key, question in questions.items() or {of_job: {}}.items():
            if key in questions and key in found:
                yield found[key]
            elif not is_told:
                error = "no process has left a result of it, or said why; run the same command again"
                yield {"key": key, "kind": "error", **self._head(job), **question, "error": error}

    def _questions_of(self, job: Job) -> Mapping[str, dict[str, Any]]:
        """What is asked of a job by its key, whoever has worked on it; nothing where that cannot be known."""
        if self._id(job) not in self._questions:
            self._questions[self._id(job)] = {}
            try:
                task = self._opened.of(job)
            except Exception as error:
                failure(logger, error, "%s: the task cannot be opened", job.name)
            else:
                self._note_questions(job, task)
        return self._questions[self._id(job)]

    def _note_questions(self, job: Job, task: Task | None) -> dict[str, Any]:
        """Note what is asked of a job; returns the facts that it depends on."""
        facts = {} if task is None else self._facts(job, task)
        questions = [] if task is None else self.plan.questions(job)
        self._questions[self._id(job)] = {key_of({**facts, **question}): question for question in questions}
        return facts

    def _id(self, job: Job) -> str:
        """Of the question, whatever code and data it is put to."""
        of_weights = {ENCODER: self.weights, RANDOM: asdict(self.model.encoder.cfg)}.get(job.features)
        how = [job.task.name, job.subset, job.size, job.features, job.seed]
        return key_of({"job": [*how, of_weights, self._pool(job), self._cell_px(job), self._precision(job)]})

    def _precision(self, job: Job) -> str:
        """Of matrix products; controls have none that it would be worth to shorten."""
        return self.plan.precision if job.is_of_encoder else "float32"

    def _pool(self, job: Job) -> str | None:
        return self.plan.pool if job.is_of_encoder and not job.is_of_patches else None

    def _cell_px(self, job: Job) -> int | None:
        """Side of what stands for a patch in the features of a control: the same grid as that of the encoder."""
        return None if job.is_of_encoder or not job.is_of_patches else self.model.encoder.cfg.patch_size

    def _fail(self, job: Job, error: str, kind: str = "error", **more: Any) -> None:
        head = {**self._head(job), **more}
        append(self.out, [{"key": key_of_job(head["job"]), "kind": kind, **head, "error": error, **_stamp()}])

    def _give_up(self, job: Job, error: str) -> None:
        """Try no job of the task of `job`, its first, and say why, once."""
        self._given_up.add(job.task.name)
        known = {(r["key"], r.get("error")) for r in read_results(self.out)}
        if (key_of_job(self._id(job)), error) not in known:
            self._fail(job, error, of_task=True)

    def _head(self, job: Job) -> dict[str, Any]:
        return {
            "job": self._id(job),
            "task": job.task.name,
            "dataset": job.task.counts_as,
            "kind_of_task": job.task.kind,
            "metric": job.task.headline,
            "features": job.features,
            "model": self.model.name if job.is_of_encoder else None,
            "step": self.model.step if job.features == ENCODER else None,
            "subset": job.subset,
            "size": job.size,
            **({} if job.seed is None else {"seed": job.seed}),
        }

    def _measure(self, job: Job) -> bool:
        """Whether there was anything to measure."""
        task = self._opened.of(job)
        facts = self._note_questions(job, task)
        if task is None:
            self._fail(job, f"the tile has no bands {job.subset}", kind="skipped")
            return False
        found = {record["key"]: record["kind"] for record in read_results(self.out)}
        questions = self._questions[self._id(job)]
        missing = {key: question for key, question in questions.items() if found.get(key) != "result"}
        if not missing:
            if (key := key_of_job(self._id(job))) in found:  # it has failed since, and does no more
                append(self.out, [{"key": key, "kind": "cleared", "job": self._id(job), **_stamp()}])
            self.n_there += 1
            return False
        if not self._has_own_samples(job, task):
            return False
        self._check_bands(job, task)
        start = time.perf_counter()
        featurise = self._featurise(job)
        splits = [split for split in (task.train, task.val, task.test) if split is not None]
        with progress(job.name, is_kept=False) as show:
            counted = _counted(featurise, sum(map(len, splits)), show)
            sets = {split.name: self._extract(counted, split) for split in splits}
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
        for key, measured in scored(task, sets, missing, job.features, self.plan.n_resamples):
            append(self.out, [{"key": key, **head, **measured, **_stamp()}])
        return True

    def _has_own_samples(self, job: Job, task: Task) -> bool:
        """Whether the splits of `task` share no sample; otherwise it is given up."""
        if task.name not in self._checked:
            self._checked.add(task.name)
            try:
                check_keys(task)
            except Exception as error:
                first = next(other for other in self.jobs if other.task is job.task)
                self._give_up(first, failure(logger, error, "%s cannot be evaluated", task.name)["error"])
        return task.name not in self._given_up

    def _check_bands(self, job: Job, task: Task) -> None:
        """Raise `ValueError` where the encoder takes another number of bands than `task` shows."""
        n_taken, n_shown = self.model.encoder.n_channels, len(task.bands)
        if not job.is_of_encoder or n_taken in (None, n_shown):
            return
        true_color = task.schema.sensor.true_color or ()
        fits = n_taken == len(true_color) and set(true_color) <= set(task.bands)
        raise ValueError(
            f"{self.model.name} takes {n_taken} bands and was shown {n_shown}"
            + (
                "; true colour would fit: bands rgb"
                if fits
                else "; show as many, or evaluate an encoder for any sensor"
            )
        )

    def _extract(self, featurise: Featurise, split: Split) -> FeatureSet:
        """Of patches all that are scored, and as many of others as any part of the training set needs."""
        ratios = [parse_partition(name).ratio for name in self.plan.partitions] if split.name == "train" else [1.0]
        n_images = int(_LEAST_READABLE * min(ratios) * len(split))
        draw = None if split.name == "test" else draw_of(split.shown, split.name, n_images)
        return extract(featurise, split, self.device, self.plan.batch_size, self.plan.n_workers, draw)

    def _facts(self, job: Job, task: Task) -> dict[str, Any]:
        """What results depend on, beside what is asked of the features."""
        splits = [split for split in (task.train, task.val, task.test) if split is not None]
        shown = task.shown
        return {
            **{key: self._head(job)[key] for key in ("task", "dataset", "kind_of_task", "metric", "subset", "size")},
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


def _counted(featurise: Featurise, n_all: int, show: Callable[[int, int], None]) -> Featurise:
    """`featurise`, which tells `show` of how many samples of `n_all` it has been asked so far."""
    n_done = 0

    def featurise_and_tell(inputs: EncoderInput) -> dict[str, torch.Tensor]:
        nonlocal n_done
        found = featurise(inputs)
        n_done += len(next(iter(found.values())))
        show(n_done, n_all)
        return found

    return featurise_and_tell


def _stamp() -> dict[str, Any]:
    """When, and by which commit of this package, a record was made."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit()}


@cache
def _commit() -> str | None:
    return commit()


def _fresh(encoder: Encoder, seed: int) -> Encoder:
    """One of the same shape with random weights, the same in every evaluation."""
    fresh = Encoder(encoder.cfg, encoder.n_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        fresh.init_weights()
    return fresh


def _encode(encoder: Encoder, layers: Sequence[int], inputs: EncoderInput) -> Sequence[Tokens]:
    return encoder.intermediates(inputs, layers)
