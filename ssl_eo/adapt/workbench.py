"""What the cells of a study share while they are worked on: tasks, encoders, features of frozen ones. One of each."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ssl_eo.adapt.backbone import (
    DEFAULT_TAPS,
    Backbone,
    EncoderBackbone,
    FixedBands,
    PixelBackbone,
    fixed_bands,
)
from ssl_eo.adapt.examples import Examples, Features, gigabytes_of_features
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.opening import OpenedEncoder, open_model
from ssl_eo.adapt.protocols import apply_protocol, draws_encoder, trains_encoder
from ssl_eo.adapt.samples import choose_rows
from ssl_eo.adapt.study import UNET, Cell, StudyConfig
from ssl_eo.adapt.training import Labels, Samples, TrainingConfig, autocast
from ssl_eo.eval.decoders import build_decoder
from ssl_eo.eval.provenance import digest_of_tensors
from ssl_eo.eval.tasks import Task

__all__ = ["OpenedTask", "Workbench"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedTask:
    """A task, and the samples that models are trained, chosen and scored on: `train`, `val` and `test`."""

    task: Task
    labels: Labels
    splits: dict[str, Examples]


class Workbench:
    """Opens what cells need, and keeps what the next one may need too: cells are to come in the order of the study."""

    def __init__(self, cfg: StudyConfig) -> None:
        self._cfg = cfg
        self.device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tasks = {task.name: task for task in cfg.tasks}
        self._task: tuple[str, OpenedTask] | None = None
        self._model: tuple[str, OpenedEncoder] | None = None
        self._features: tuple[tuple[Any, ...], dict[str, Features]] | None = None
        self._weights: dict[str, str] = {}

    def weights_of(self, encoder: str) -> str:
        """The hash of all weights of an encoder, and of none where only its architecture is known."""
        if encoder not in self._weights:
            model = self.model(encoder)
            self._weights[encoder] = digest_of_tensors(model.encoder.state_dict()) if model.is_trained else "none"
        return self._weights[encoder]

    def model(self, encoder: str) -> OpenedEncoder:
        """The encoder that the study calls so. Raises `ValueError` where there is none."""
        if self._model is None or self._model[0] != encoder:
            self._model = None
            try:
                self._model = encoder, open_model(self._cfg.encoders[encoder].model)
            except ValueError as error:
                raise ValueError(f"encoders.{encoder}: {error}") from None
        return self._model[1]

    def task(self, name: str) -> OpenedTask:
        """The task with the samples that the study chooses of it."""
        if self._task is None or self._task[0] != name:
            self._task = self._features = None
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

    def samples_of(self, cell: Cell, model: TaskModel, cfg: TrainingConfig) -> dict[str, Samples]:
        """The splits of a cell's task, with features of its backbone where these stay the same while it is trained."""
        splits = self.task(cell.task).splits
        if trains_encoder(cell.protocol) or cfg.symmetries or cell.encoder == UNET:
            return {name: Samples(split) for name, split in splits.items()}
        seed = cell.seed if draws_encoder(cell.protocol) else 0
        key = (cell.task, cell.encoder, cell.protocol, seed, cfg.precision)
        if self._features is None or self._features[0] != key:
            self._features = None
            need_gb = sum(gigabytes_of_features(model, split) for split in splits.values())
            if need_gb > cfg.features_gb:
                text = "%s: features take %.1f GB, more than features_gb %.1f allows: they are computed in every step"
                logger.info(text, cell.name, need_gb, cfg.features_gb)
                return {name: Samples(split) for name, split in splits.items()}
            made = {n: Features(model, s, cfg.batch_size, autocast(self.device, cfg)) for n, s in splits.items()}
            self._features = key, made
        features = self._features[1]
        return {name: Samples(split, features[name]) for name, split in splits.items()}

    def _open(self, name: str) -> OpenedTask:
        cfg = self._tasks[name]
        # All are held in memory, as every epoch takes them in another order.
        limits = [sys.maxsize if n is None else n for n in (cfg.max_train, cfg.max_val, cfg.max_test)]
        task = Task(replace(cfg, max_train=limits[0], max_val=limits[1], max_test=limits[2]))
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
        model = self.model(cell.encoder)
        if not model.is_trained and not draws_encoder(cell.protocol):
            raise ValueError(
                f"encoders.{cell.encoder}: {model.name} has no weights for protocol {cell.protocol}; write"
                f" {model.name}=FILE, or take random_frozen or random_trained"
            )
        backbone = EncoderBackbone(
            copy.deepcopy(model.encoder),
            self._cfg.encoders[cell.encoder].taps or DEFAULT_TAPS,
            _bands_of(model, opened),
            _clip_of(model),
        )
        apply_protocol(backbone, cell.protocol, self._cfg.lora, cell.seed)
        return backbone.to(self.device)


def _bands_of(model: OpenedEncoder, opened: OpenedTask) -> FixedBands | None:
    """What stands for the bands of an encoder that takes no others, of the sensor it knows that fits best."""
    encoder = model.encoder
    if encoder.n_channels is None or not model.inputs:
        return None
    channels = opened.task.schema.sensor.channel_meta(opened.task.bands)
    found = [fixed_bands(known, channels) for known in model.inputs.values() if len(known.bands) == encoder.n_channels]
    best = min(found, key=lambda bands: len(bands.missing), default=None)
    if best is not None and len(best.missing) == encoder.n_channels:
        raise ValueError(f"{model.name}: no band of task {opened.task.name} is like one of {', '.join(best.names)}")
    return best


def _clip_of(model: OpenedEncoder) -> float | None:
    """How its authors bring pixels to [0, 1], where they do and say one thing."""
    clips = {known.clip_std for known in model.inputs.values()}
    return clips.pop() if len(clips) == 1 else None
