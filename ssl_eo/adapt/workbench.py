"""What the cells of a study share while they are worked on: tasks, encoders, features of frozen ones.

One of each is kept, but of sources, which are opened once.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from ssl_eo.adapt.backbone import (
    DEFAULT_TAPS,
    Backbone,
    EncoderBackbone,
    FixedBands,
    PixelBackbone,
    clip_of,
    fixed_bands,
)
from ssl_eo.adapt.band_matching import AmbiguousBandError
from ssl_eo.adapt.ensemble_bench import Chosen, EnsembleBench
from ssl_eo.adapt.examples import Examples
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.opened_task import OpenedTask
from ssl_eo.adapt.protocols import apply_protocol, check_for_ensemble, draws_encoder, trains_encoder
from ssl_eo.adapt.samples import choose_rows
from ssl_eo.adapt.specialists import Specialist, is_ensemble, load_ensemble
from ssl_eo.adapt.study import UNET, Cell, EncoderChoice, EnsembleChoice, StudyConfig
from ssl_eo.adapt.training import Labels, Samples, TrainingConfig
from ssl_eo.bundles import SensorInput
from ssl_eo.components import told_of
from ssl_eo.data.types import Source
from ssl_eo.eval.decoders import build_decoder
from ssl_eo.eval.provenance import digest_of_tensors
from ssl_eo.eval.tasks import Task, open_sources
from ssl_eo.opening import OpenedEncoder, open_model

__all__ = ["Workbench"]

_NO_WEIGHTS = "none"  # in keys of models, where else there is a digest
Opened = OpenedEncoder | list[Specialist]  # an encoder, or those of an ensemble


class _Sources(NamedTuple):
    """Those of a task by split, and what each holds."""

    opened: dict[str, Source]
    content: dict[str, str]


class _Trouble(NamedTuple):
    """What opening the sources of a task raised, and where: each cell that raises it again would add to that."""

    error: Exception
    trace: TracebackType | None


class Workbench:
    """Opens what cells need, and keeps what the next one may need too: cells are to come in the order of the study."""

    def __init__(self, cfg: StudyConfig) -> None:
        self._cfg = cfg
        self.device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tasks = {task.name: task for task in cfg.tasks}
        self._task: tuple[str, OpenedTask] | None = None
        self._model: tuple[str, Opened] | None = None
        self._samples: tuple[tuple[Any, ...], dict[str, Samples]] | None = None
        self._ensembles = EnsembleBench(cfg, self.device)
        self._facts: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, _Sources | _Trouble] = {}

    def facts_of(self, encoder: str) -> dict[str, Any]:
        """What is asked of an encoder: its weights, none where only its architecture is known, and how it is read.

        Of statistics there are none: pixels are normalised with those of the task.
        """
        if encoder not in self._facts:
            asked, model = self._cfg.encoders[encoder], self.model(encoder)
            if isinstance(model, OpenedEncoder):
                weights = digest_of_tensors(model.encoder.state_dict()) if model.is_trained else _NO_WEIGHTS
                found = {
                    "weights": weights,
                    "encoder": asdict(model.encoder.cfg),
                    "bands": _bands_by_sensor(model.inputs),
                    "clip_std": clip_of(model.inputs),
                    "taps": asked.taps,
                    "ensemble": None,
                }
            else:
                tensors = {f"{s.name}.{key}": value for s in model for key, value in s.backbone.state_dict().items()}
                found = {
                    "weights": digest_of_tensors(tensors),
                    "encoder": {s.name: asdict(s.encoder.cfg) for s in model},
                    "bands": {s.name: _bands_by_sensor(s.inputs) for s in model},
                    "clip_std": {s.name: clip_of(s.inputs) for s in model},
                    "taps": None,
                    "ensemble": asdict(asked.ensemble),
                }
            self._facts[encoder] = found
        return self._facts[encoder]

    def is_ensemble(self, encoder: str) -> bool:
        """Whether the encoder that the study calls so is an ensemble of several."""
        return is_ensemble(Path(self._cfg.encoders[encoder].model))

    def content_of(self, task: str) -> dict[str, str] | None:
        """What the sources of a task hold, by split, wherever they lie; None where `task` raises why it cannot say."""
        found = self._sources_of(task)
        return None if isinstance(found, _Trouble) else found.content

    def model(self, encoder: str) -> Opened:
        """The encoder that the study calls so, or the ensemble. Raises `ValueError` where there is none."""
        asked = self._cfg.encoders[encoder]
        with told_of(f"encoders.{encoder}"):
            if self._model is None or self._model[0] != asked.model:
                self._model = None
                self._model = asked.model, _open(asked.model)
            _check_asked(asked, self._model[1])
        return self._model[1]

    def trouble_of(self, task: str) -> Exception | None:
        """Why the sources of a task cannot be opened; None where they can."""
        found = self._sources_of(task)
        return found.error if isinstance(found, _Trouble) else None

    def check_protocol(self, encoder: str, protocol: str) -> None:
        """Raise `ValueError` where the encoder that the study calls so is an ensemble or has no weights, and the
        protocol is not for such.
        """
        with told_of(f"encoders.{encoder}"):
            if self.is_ensemble(encoder):
                check_for_ensemble(protocol)
            elif self.facts_of(encoder)["weights"] == _NO_WEIGHTS and not draws_encoder(protocol):
                name = self._cfg.encoders[encoder].model
                raise ValueError(
                    f"{name} has no weights for protocol {protocol}; write {name}=FILE, or take random_frozen or"
                    " random_trained"
                )

    def task(self, name: str) -> OpenedTask:
        """The task with the samples that the study chooses of it. Raises what opening its sources raised."""
        if self._task is None or self._task[0] != name:
            self._task = self._samples = None
            self._ensembles.forget()
            self._task = name, self._open(name)
        return self._task[1]

    def maker_of(self, cell: Cell) -> Callable[[], TaskModel]:
        """A function that makes the model of a cell: its decoder is drawn anew each time.

        Of a frozen backbone one copy serves all models. Raises `ValueError` for an encoder without weights where the
        protocol needs some.
        """
        opened, options = self.task(cell.task), self._cfg.decoders.get(cell.decoder, {})
        backbone = self._backbone(cell, opened)

        def make() -> TaskModel:
            own = copy.deepcopy(backbone) if trains_encoder(cell.protocol) else backbone
            decoder = build_decoder(cell.decoder, options, own.shape, opened.labels.n_outputs)
            return TaskModel(own, decoder).to(self.device)

        return make

    def samples_of(self, cell: Cell, make_model: Callable[[], TaskModel], cfg: TrainingConfig) -> dict[str, Samples]:
        """The splits of a cell's task, with features of its backbone where these stay the same while it is trained."""
        opened = self.task(cell.task)
        if trains_encoder(cell.protocol) or cfg.symmetries:
            return opened.samples()
        if (chosen := self.chosen(cell)) is not None:
            return chosen.samples
        seed = cell.seed if draws_encoder(cell.protocol) else 0
        key = (cell.task, cell.encoder, cell.protocol, seed, cfg.precision, cfg.features_gb)
        if self._samples is None or self._samples[0] != key:
            self._samples = None
            self._samples = key, opened.kept_samples(make_model(), cfg, self.device, cell.name)
        return self._samples[1]

    def chosen(self, cell: Cell) -> Chosen | None:
        """What is run of the ensemble of a cell; None where it is of one encoder."""
        model = None if cell.encoder == UNET else self.model(cell.encoder)
        if not isinstance(model, list):
            self._ensembles.forget()
            return None
        self._samples = None
        return self._ensembles.chosen(cell, model, self.task(cell.task))

    def _sources_of(self, task: str) -> _Sources | _Trouble:
        """The sources of a task, opened once, or why they cannot be: a result is of the content that its key names."""
        if task not in self._sources:
            try:
                opened = open_sources(self._tasks[task])
                content = {name: source.fingerprint() for name, source in opened.items()}
                self._sources[task] = _Sources(opened, content)
            except Exception as error:  # of any kind: each cell of this task records it, and those of others go on
                self._sources[task] = _Trouble(error, error.__traceback__)
        return self._sources[task]

    def _open(self, name: str) -> OpenedTask:
        cfg, found = self._tasks[name], self._sources_of(name)
        if isinstance(found, _Trouble):
            raise found.error.with_traceback(found.trace)
        # All are held in memory, as every epoch takes them in another order.
        limits = [sys.maxsize if n is None else n for n in (cfg.max_train, cfg.max_val, cfg.max_test)]
        task = Task(replace(cfg, max_train=limits[0], max_val=limits[1], max_test=limits[2]), sources=found.opened)
        rows = choose_rows(task, self._cfg.samples)
        sources = {"train": task.train, "val": task.val, "test": task.test}
        splits = {}
        for split, (of, own) in rows.items():
            source = sources[of]
            assert source is not None
            splits[split] = Examples(source, own, self.device)
        return OpenedTask(task, Labels(task.shown, task.cfg.headline, tuple(task.cfg.no_data)), splits)

    def _backbone(self, cell: Cell, opened: OpenedTask) -> Backbone:
        if cell.encoder == UNET:
            return PixelBackbone(len(opened.task.bands))
        self.check_protocol(cell.encoder, cell.protocol)  # before anything is computed to choose of an ensemble
        if (chosen := self.chosen(cell)) is not None:
            ensemble = copy.deepcopy(chosen.ensemble) if trains_encoder(cell.protocol) else chosen.ensemble
            apply_protocol(ensemble, cell.protocol, self._cfg.lora, cell.seed)
            return ensemble
        model = self.model(cell.encoder)
        assert isinstance(model, OpenedEncoder)
        backbone = EncoderBackbone(
            copy.deepcopy(model.encoder),
            self._cfg.encoders[cell.encoder].taps or DEFAULT_TAPS,
            _bands_of(model, opened),
            clip_of(model.inputs),
        )
        apply_protocol(backbone, cell.protocol, self._cfg.lora, cell.seed)
        return backbone.to(self.device)


def _open(text: str) -> Opened:
    return load_ensemble(text) if is_ensemble(Path(text)) else open_model(text, or_random=True)


def _bands_by_sensor(inputs: Mapping[str, SensorInput]) -> dict[str, list[str]]:
    return {name: list(known.bands) for name, known in inputs.items()}


def _check_asked(asked: EncoderChoice, model: Opened) -> None:
    """Raise `ValueError` for options that are of the other kind of model."""
    if isinstance(model, OpenedEncoder) and asked.ensemble != EnsembleChoice():
        raise ValueError(f"ensemble: {asked.model} is none (a folder with ensemble.json); leave the key out")
    if isinstance(model, list) and asked.taps is not None:
        raise ValueError("taps: those of an ensemble are at 1/3, 1/2, 2/3 and 1 of each depth; leave the key out")


def _bands_of(model: OpenedEncoder, opened: OpenedTask) -> FixedBands | None:
    """What stands for the bands of an encoder that takes no others, of the sensor it knows that fits best."""
    encoder = model.encoder
    if encoder.n_channels is None or not model.inputs:
        return None
    channels = opened.task.schema.sensor.channel_meta(opened.task.bands)
    found, doubts = [], []
    for known in model.inputs.values():
        if len(known.bands) == encoder.n_channels:
            try:
                found.append(fixed_bands(known, channels))
            except AmbiguousBandError as error:
                doubts.append(error)
    best = min(found, key=lambda bands: len(bands.missing), default=None)
    if doubts and (best is None or best.missing):
        raise doubts[0]
    if best is not None and len(best.missing) == encoder.n_channels:
        raise ValueError(f"{model.name}: no band of task {opened.task.name} is like one of {', '.join(best.names)}")
    return best
