"""What a study compares: encoders x decoders x protocols x trainings on tasks, each cell of which is a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from ssl_eo.adapt.backbone import check_rising_taps
from ssl_eo.adapt.ensemble import Adaptation, Norm
from ssl_eo.adapt.lora import LoraConfig
from ssl_eo.adapt.protocols import check_protocol
from ssl_eo.adapt.samples import SamplesConfig, check_samples
from ssl_eo.adapt.training import TrainingConfig
from ssl_eo.components import check_names, suggest, told_of
from ssl_eo.eval.decoders import decoder_config, kinds_of
from ssl_eo.eval.tasks import TaskConfig

__all__ = ["UNET", "Cell", "EncoderChoice", "EnsembleChoice", "StudyConfig", "leave_out"]

UNET = "unet"  # the control that no pretraining and no decoder is part of
_MAX_RESAMPLES = 100_000  # intervals move no more; every cell keeps as many numbers
_MAX_RANK = 4096
_NAMED = ("encoders", "decoders", "trainings")  # keys whose entries have names of their own


@dataclass
class EnsembleChoice:
    """Which specialists of an ensemble are run. By default all that can be shown the bands of a task."""

    keep: list[str] | None = None  # these alone, by name; None: all
    # So many of them are selected on train and val of the task, by frozen encoders; None: no choice.
    k: int | None = None
    # ridge: one after the other, by ridge regression on pooled features. gate: learned beside a decoder of the cell.
    by: Literal["ridge", "gate"] = "ridge"
    # How bands are found: by what they measure, or by the rules of EoS-FM, which know how many there are.
    adaptation: Adaptation = "wavelength"
    norm: Norm = "none"  # of each specialist's maps: by statistics of train (batch), or of an image (layer)

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_names("keep", self.keep)
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, or null for all, got {self.k}")


@dataclass
class EncoderChoice:
    """An encoder of a study."""

    # As --model of ssl-eo eval; also the NAME of a released encoder or a recipe alone, for random weights. Or
    # the folder of an ensemble.
    model: str
    taps: list[float] | None = None  # ratios of the depth that decoders are given; None: 1/3, 1/2, 2/3 and 1
    ensemble: EnsembleChoice = field(default_factory=EnsembleChoice)  # of an ensemble

    def __post_init__(self) -> None:
        if self.taps is not None:
            check_rising_taps(self.taps)


@dataclass
class StudyConfig:
    """What is compared with what."""

    tasks: list[TaskConfig]  # names of shipped ones, or their keys
    encoders: dict[str, EncoderChoice]  # by a name of yours
    decoders: dict[str, dict[str, Any]]  # by name, with options; those of images and of maps, as tasks need them
    # frozen, finetune, lora, retrain_input, random_frozen, random_trained
    protocols: list[str] = field(default_factory=lambda: ["frozen"])
    # Ways to train that are compared, by a name of yours; more than one is an axis of the study.
    trainings: dict[str, TrainingConfig] = field(default_factory=lambda: {"default": TrainingConfig()})
    seeds: list[int] = field(default_factory=lambda: [0])  # of decoders, batches, and random encoders
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    unet: bool = True  # beside encoders of maps, a UNet that is trained from scratch
    n_resamples: int = 1000  # of the test samples, for intervals; 0: none
    # Those of one encoder, as folders that ssl-eo predict takes: models/<cell> in that of the study.
    # A result that is there without its model is trained again.
    save_models: bool = False
    country: str | None = None  # three letters (ISO 3166): codecarbon measures energy, and CO2 by its carbon intensity
    device: str | None = None  # None: a GPU where there is one

    def __post_init__(self) -> None:
        check_names("tasks", [task.name for task in self.tasks])
        for key in ("encoders", "decoders", "trainings"):
            check_names(key, list(getattr(self, key)))
        check_names("protocols", self.protocols)
        check_names("seeds", [str(seed) for seed in self.seeds])
        for protocol in self.protocols:
            check_protocol(protocol)
        for decoder, options in self.decoders.items():
            with told_of(f"decoders.{decoder}"):
                decoder_config(decoder, options)
        self._check_kinds()
        if UNET in self.encoders:
            raise ValueError(f"encoders: {UNET!r} is the name of the control; give another")
        if not 0 <= self.n_resamples <= _MAX_RESAMPLES:
            raise ValueError(f"n_resamples must be from 0 to {_MAX_RESAMPLES:,}, got {self.n_resamples}")
        if self.lora.rank > _MAX_RANK:
            raise ValueError(f"lora.rank must be at most {_MAX_RANK:,}: no encoder is wider, got {self.lora.rank}")
        if self.country is not None and (len(self.country) != 3 or not self.country.isalpha()):
            raise ValueError(f"country takes three letters, such as FRA, got {self.country!r}")
        self.country = self.country and self.country.upper()

    def _check_kinds(self) -> None:
        """Raise `ValueError` for decoders, losses and choices of samples that are not for labels as tasks have them."""
        for task in self.tasks:
            if not any(task.kind in kinds_of(decoder) for decoder in self.decoders):
                raise ValueError(f"decoders: none of {', '.join(self.decoders)} is for {task.kind}, as {task.name} is")
            check_samples(self.samples, task.name, task.kind)
            for name, training in self.trainings.items():
                with told_of(f"trainings.{name}, task {task.name}"):
                    training.check_kind(task.kind)
        kinds = {task.kind for task in self.tasks}
        for decoder in self.decoders:
            if not kinds & set(kinds_of(decoder)):
                raise ValueError(f"decoders: {decoder} is for {', '.join(kinds_of(decoder))}, and no task is of these")

    def cells(self) -> Iterator[Cell]:
        """All cells, in an order in which neighbours share most."""
        for task in self.tasks:
            decoders = [name for name in self.decoders if task.kind in kinds_of(name)]
            for encoder, protocol, seed in product(self.encoders, self.protocols, self.seeds):
                for decoder, training in product(decoders, self.trainings):
                    yield Cell(task.name, encoder, protocol, decoder, training, seed)
            if self.unet and task.kind == "segmentation":
                for training, seed in product(self.trainings, self.seeds):
                    yield Cell(task.name, UNET, "random_trained", UNET, training, seed)


@dataclass(frozen=True)
class Cell:
    """One model that is trained."""

    task: str
    encoder: str
    protocol: str
    decoder: str
    training: str
    seed: int

    @property
    def name(self) -> str:
        """For messages and claims."""
        parts = (self.task, self.encoder, self.protocol, self.decoder, self.training, str(self.seed))
        return "-".join(parts).replace("/", "_")


def leave_out(raw: Mapping[str, Any], overrides: Mapping[str, Any], shipped: Mapping[str, Any]) -> dict[str, Any]:
    """The study `raw`, which overrides have changed, without what these set to null: `decoders.fcn=null`.

    An override adds to the mappings of a study, so there is no other way to have less. `shipped` is the study before
    it was changed. Raises `ValueError` where that has nothing of the name.
    """
    left = dict(raw)
    for key in _NAMED:
        asked, known = overrides.get(key), shipped.get(key)
        if not isinstance(asked, Mapping) or not isinstance(known, Mapping):
            continue
        out = [str(name) for name, value in asked.items() if value is None]
        for name in out:
            if name not in known:
                found = ", ".join(map(str, known))
                raise ValueError(f"{key}.{name}=null: the study has no {name!r}{suggest(name, list(known))} ({found})")
        left[key] = {name: value for name, value in left[key].items() if name not in out}
    return left
