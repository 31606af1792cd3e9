"""What an evaluation asks for, cut into jobs, each of which is one forward pass over the samples of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, get_args

from ssl_eo.components import check_names, suggest, told_of
from ssl_eo.data.opening import open_source
from ssl_eo.data.types import Locates
from ssl_eo.eval.bands import BAND_SUBSETS, BandSubset, bands_of
from ssl_eo.eval.controls import CONTROLS, DRAWN_CONTROLS
from ssl_eo.eval.features import ALL_TAPS, Pool, Precision, check_taps, tap_name
from ssl_eo.eval.leaks import SHARED_KEYS, count_leaked
from ssl_eo.eval.partitions import WHOLE, parse_partition
from ssl_eo.eval.probes import build_config, kinds_of
from ssl_eo.eval.splits import Split
from ssl_eo.eval.tasks import Task, TaskConfig

__all__ = ["ENCODER", "RANDOM", "Evaluation", "Job", "OpenedTask", "check_keys"]

ENCODER, RANDOM = "encoder", "random_encoder"


@dataclass(frozen=True)
class Job:
    """One forward pass. `seed` is that of what is drawn before it; None where nothing is."""

    task: TaskConfig
    subset: BandSubset
    size: str  # "native", the tile's own, or pixels
    features: str
    seed: int | None

    @property
    def name(self) -> str:
        drawn = [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join([self.task.name, self.subset, self.size, self.features, *drawn])

    @property
    def is_of_encoder(self) -> bool:
        """Whether an encoder is asked, trained or not."""
        return self.features in (ENCODER, RANDOM)

    @property
    def is_of_patches(self) -> bool:
        return self.task.kind == "segmentation"

    @property
    def shown(self) -> tuple[Any, ...]:
        """What jobs have in common that show the same samples in the same bands."""
        return self.task.name, self.subset, self.size, self.seed if self.subset == "random" else None

    def open(self, patch_px: int) -> Task | None:
        """The task with this job's bands and size; None where its tile has no such bands."""
        task = Task(replace(self.task, size_px=None if self.size == "native" else int(self.size)), patch_px)
        if self.subset == "all":
            return task
        bands = bands_of(self.subset, task.bands, task.schema.sensor.true_color, task.name, self.seed or 0)
        return None if bands is None else Task(replace(task.cfg, bands=bands), patch_px)


class OpenedTask:
    """The task of the job that is worked on. Jobs that follow each other share what it holds in memory.

    Tiles at their own size are enlarged to whole patches of `patch_px` where patches are asked for. Controls of whole
    images are of the pixels as they are: they are the same beside every encoder.
    """

    def __init__(self, patch_px: int) -> None:
        self._patch_px = patch_px
        self._shown: tuple[Any, ...] = ()
        self._task: Task | None = None
        self._enlarged_to = 1

    def whole(self, job: Job) -> Task:
        """The task of a job that shows all bands."""
        task = self.of(job)
        assert task is not None, "there are no bands"
        return task

    def of(self, job: Job) -> Task | None:
        """See `Job.open`."""
        if self._shown != job.shown:
            self._hold(job, 1)
        patch_px = self._patch_px if job.is_of_encoder or job.is_of_patches else 1
        if self._task is not None and not self._fits(self._task, patch_px):
            self._hold(job, patch_px)
        return self._task

    def _hold(self, job: Job, patch_px: int) -> None:
        self._shown, self._task = (), None  # of two tasks only one is in memory
        self._task = job.open(patch_px)
        self._shown, self._enlarged_to = job.shown, patch_px

    def _fits(self, task: Task, patch_px: int) -> bool:
        is_whole = task.cfg.size_px is not None or task.shown.plan.size[0] % patch_px == 0
        return self._enlarged_to == patch_px or (self._enlarged_to == 1 and is_whole)


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
    precision: Precision = "float32"  # of the encoder's matrix products
    controls: bool = True
    batch_size: int = 128
    n_workers: int = 0
    n_resamples: int = 1000  # of the bootstrap
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Errors begin with the name of what is wrong."""
        for key, least in (("batch_size", 1), ("n_workers", 0), ("n_resamples", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: must be at least {least}, got {getattr(self, key)}")
        check_names("tasks", [task.name for task in self.tasks])
        for key in ("partitions", "subsets", "sizes", "seeds"):
            check_names(key, getattr(self, key))
        with told_of("partitions"):  # one that is written in two ways is measured once
            self.partitions = list(dict.fromkeys(parse_partition(name).name for name in self.partitions))
        with told_of("taps"):
            check_taps(self.taps)
        for size in self.sizes:
            if size not in ("task", "native") and not (size.isdecimal() and 0 < int(size) <= 4096):
                raise ValueError(f"sizes: {size!r} must be task, native, or a number of pixels up to 4096")
        for subset in self.subsets:
            _check_one_of("subsets", subset, BAND_SUBSETS)
        _check_one_of("pool", self.pool, get_args(Pool))
        _check_one_of("precision", self.precision, get_args(Precision))
        with told_of("probes"):
            self._check_probes()

    def _check_probes(self) -> None:
        kinds = {kind for probe in self.probes for kind in kinds_of(probe)}
        for task in self.tasks:
            if self.probes and task.kind not in kinds:
                raise ValueError(f"none of {', '.join(self.probes)} takes {task.kind}, which {task.name} is")

    def jobs_of(self, task: TaskConfig, opened: Task | None = None) -> list[Job]:
        """Of one task: what depends on a draw has a job for each seed, all else one for all seeds.

        Bands and sizes are called by what they show, so that what is the same has one name and is measured once; what
        only the files tell of that takes the task `opened`, in any size and with all its bands.
        """
        features = [ENCODER, RANDOM, *CONTROLS] if self.controls else [ENCODER]
        drawn = {RANDOM, *DRAWN_CONTROLS}
        jobs = []
        for subset, size in dict.fromkeys(_shown(task, opened, *asked) for asked in product(self.subsets, self.sizes)):
            for of_bands in self.seeds if subset == "random" else [None]:
                for name in features:
                    seeds = self.seeds if of_bands is None and name in drawn else [of_bands]
                    jobs += [Job(task, subset, size, name, seed) for seed in seeds]
        return jobs

    def axes(self, job: Job) -> dict[str, list[Any]]:
        """Of what every combination is run on the features of `job`: `places` in them, `probes`, and so on."""
        taps = [tap_name(ratio) for ratio in self.taps] if job.is_of_encoder else ["pixels"]
        places: list[dict[str, Any]] = [{"tap": tap} for tap in taps]
        places += [{"tap": ALL_TAPS, "taps": taps}] if len(taps) > 1 else []
        probes = [probe for probe in self.probes or job.task.usual_probes if job.task.kind in kinds_of(probe)]
        seeds = self.seeds if job.seed is None else [job.seed]
        return {"places": places, "probes": probes, "partitions": self.partitions, "seeds": seeds}

    def questions(self, job: Job) -> Iterator[dict[str, Any]]:
        """What is run on the features of `job`: where they are read, and the probe with its options but the seed."""
        for place, probe, part, seed in product(*self.axes(job).values()):
            options = {key: value for key, value in asdict(build_config(probe, {})).items() if key != "seed"}
            yield {**place, "probe": probe, "options": options, "partition": part, "seed": seed}


def _check_one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}: got {value!r}, must be one of {', '.join(allowed)}{suggest(value, list(allowed))}")


def _shown(cfg: TaskConfig, opened: Task | None, subset: BandSubset, size: str) -> tuple[BandSubset, str]:
    """What is shown where `subset` and `size` are asked for, as far as that is known before the task is opened."""
    if size == "task":
        size = "native" if cfg.size_px is None else str(cfg.size_px)
    size = str(int(size)) if size.isdecimal() else size
    if opened is None:
        return subset, size
    if size.isdecimal() and opened.schema.shape == (int(size), int(size)):
        size = "native"
    if subset == "rgb":
        kept = bands_of(subset, opened.bands, opened.schema.sensor.true_color, cfg.name, 0)
        subset = "all" if kept == list(opened.bands) else subset
    return subset, size


def check_keys(task: Task) -> None:
    """Raise `ValueError` where two splits of `task` share a sample, as far as keys are known without a forward pass.

    Those of a split that is read each time are where its source knows them without reading.
    """
    if any(flag.startswith(SHARED_KEYS) for flag in task.cfg.flags):
        return
    splits = {split.name: _keys_of(task, split) for split in (task.train, task.val, task.test) if split is not None}
    known = {name: _Keys(keys, keys) for name, keys in splits.items() if keys is not None}
    if len(known) > 1:
        count_leaked(task.name, known)


@dataclass(frozen=True)
class _Keys:
    """Samples of which no pixels are known: each is like itself."""

    keys: list[str]
    digests: list[str]


def _keys_of(task: Task, split: Split) -> list[str] | None:
    if split.is_held:
        return split.keys
    source = open_source(getattr(task.cfg, split.name))
    if not isinstance(source, Locates):
        return None
    keys = [source.locate(i)[0] for i in range(len(source))]
    return [key for key in keys if key is not None] if None not in keys else None
