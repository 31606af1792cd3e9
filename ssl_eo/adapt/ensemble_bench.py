"""Ensembles as encoders of a study: built for a task, and cut to the specialists that a model of it is to run.

Whatever is chosen of an ensemble is chosen with frozen encoders, whose features are computed once for all of them, and
serve each choice: that of a model is a part of their channels.

N samples, E specialists, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssl_eo.adapt.backbone import padded_to
from ssl_eo.adapt.ensemble import Ensemble, prune
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.opened_task import OpenedTask
from ssl_eo.adapt.protocols import trains_encoder
from ssl_eo.adapt.selection import GatedDecoder, TopKGate, select_greedily
from ssl_eo.adapt.specialists import Specialist
from ssl_eo.adapt.study import Cell, EnsembleChoice, StudyConfig
from ssl_eo.adapt.training import Labels, Samples, TrainingConfig, autocast, fit
from ssl_eo.eval.decoders import build_decoder
from ssl_eo.eval.dense import class_fractions
from ssl_eo.eval.probes.base import Labelled
from ssl_eo.models.vit import EncoderInput

__all__ = ["Chosen", "EnsembleBench"]


@dataclass(frozen=True)
class Chosen:
    """The specialists that a model runs, with the samples of its task, and for its record how they were chosen."""

    ensemble: Ensemble
    samples: dict[str, Samples]
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Whole:
    """All specialists of an ensemble that a task's bands can be shown to."""

    key: tuple[Any, ...]
    ensemble: Ensemble
    samples: dict[str, Samples]

    def part(self, names: Sequence[str]) -> tuple[Ensemble, dict[str, Samples]]:
        """The specialists `names` alone."""
        if set(names) == set(self.ensemble.names):
            return self.ensemble, self.samples
        index = self.ensemble.channels_of(names)
        return prune(self.ensemble, names), {name: some.channels(index) for name, some in self.samples.items()}


class EnsembleBench:
    """Builds ensembles and chooses of them; the last one is kept, with its features, and the last choice."""

    def __init__(self, cfg: StudyConfig, device: torch.device) -> None:
        self._cfg, self._device = cfg, device
        self._whole: _Whole | None = None
        self._chosen: tuple[Cell, Chosen] | None = None

    def forget(self) -> None:
        """Keep nothing: another encoder needs the memory."""
        self._whole = self._chosen = None

    def chosen(self, cell: Cell, specialists: Sequence[Specialist], opened: OpenedTask) -> Chosen:
        """What the model of `cell` runs of `specialists`. Raises `ValueError` where what is asked for is not there."""
        if self._chosen is None or self._chosen[0] != cell:
            self._chosen = None
            self._chosen = cell, self._choose(cell, self._whole_of(cell, specialists, opened), opened)
        return self._chosen[1]

    def _whole_of(self, cell: Cell, specialists: Sequence[Specialist], opened: OpenedTask) -> _Whole:
        asked, training = self._cfg.encoders[cell.encoder], self._cfg.trainings[cell.training]
        choice = asked.ensemble
        is_asked_again = choice.k is not None or not trains_encoder(cell.protocol)
        kept = (training.precision, training.features_gb) if is_asked_again and not training.symmetries else None
        key = (cell.task, asked.model, choice.adaptation, choice.norm, kept)
        if self._whole is None or self._whole.key != key:
            self._whole = None
            channels = opened.task.schema.sensor.channel_meta(opened.task.bands)
            ensemble = Ensemble(specialists, channels, choice.adaptation, choice.norm).to(self._device)
            ensemble.requires_grad_(False)
            if choice.norm == "batch":
                ensemble.calibrate(_images(opened, training.batch_size, max(ensemble.shape.strides_px)))
            model = TaskModel(ensemble, nn.Identity())
            if kept is None:
                samples = opened.samples()
            else:
                samples = opened.kept_samples(model, training, self._device, cell.encoder)
            self._whole = _Whole(key, ensemble, samples)
        return self._whole

    def _choose(self, cell: Cell, whole: _Whole, opened: OpenedTask) -> Chosen:
        choice = self._cfg.encoders[cell.encoder].ensemble
        start = time.perf_counter()
        candidates = whole.ensemble.names if choice.keep is None else choice.keep
        names, found = self._selected(cell, choice, *whole.part(candidates), opened)
        facts = {"of": list(candidates), "dropped": whole.ensemble.dropped, "by": None, **found}
        ensemble, samples = whole.part(names)
        seconds = round(time.perf_counter() - start, 3)
        return Chosen(ensemble, samples, {"run": list(ensemble.names), **facts, "seconds": seconds})

    def _selected(
        self, cell: Cell, choice: EnsembleChoice, ensemble: Ensemble, samples: Mapping[str, Samples], opened: OpenedTask
    ) -> tuple[Sequence[str], dict[str, Any]]:
        """The names of those that are run, and what the search says of them."""
        if choice.k is None:
            return ensemble.names, {}
        training = self._cfg.trainings[cell.training]
        if choice.by == "ridge":
            parts = [_pooled(ensemble, samples[name], opened.labels, training) for name in ("train", "val")]
            found = select_greedily(parts[0], parts[1], choice.k)
            return found.names, {"by": "ridge", "scores": list(found.scores), "alone": dict(found.alone)}
        options = self._cfg.decoders.get(cell.decoder, {})

        def make() -> TaskModel:
            assert choice.k is not None
            gate = TopKGate(len(ensemble.names), choice.k, cell.seed)
            decoder = build_decoder(cell.decoder, options, ensemble.shape, opened.labels.n_outputs)
            return TaskModel(ensemble, GatedDecoder(gate, decoder, ensemble.owners)).to(self._device)

        fitted = fit(make, opened.labels, samples["train"], samples["val"], training, cell.seed)
        decoder = fitted.model.decoder
        assert isinstance(decoder, GatedDecoder)
        return [ensemble.names[i] for i in decoder.gate.selected()], {"by": "gate", "lr": fitted.lr}


def _images(opened: OpenedTask, batch_size: int, multiple_px: int) -> Iterator[EncoderInput]:
    """All training images, in sizes that an ensemble takes."""
    train = opened.splits["train"]
    for rows in torch.split(torch.arange(len(train)), batch_size):
        inputs, _ = train.batch(rows)
        yield replace(inputs, pixels=padded_to(inputs.pixels, multiple_px))


@torch.no_grad()
def _pooled(ensemble: Ensemble, samples: Samples, labels: Labels, cfg: TrainingConfig) -> dict[str, Labelled]:
    """What ridge regression is given of each specialist: of maps of classes their part in the image is its target."""
    model = TaskModel(ensemble, nn.Identity()).eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in ensemble.names}
    for rows in torch.split(torch.arange(len(samples.examples)), cfg.batch_size):
        with autocast(samples.examples.device, cfg):  # as features are that are kept
            taps = samples.taps(model, rows)
        for name, values in ensemble.pooled(taps).items():
            parts[name].append(values.float())
    shown, targets = labels.shown, samples.examples.labels
    labelled = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    if shown.kind == "segmentation":
        targets = class_fractions(targets, (1, 1), shown.n_classes, shown.ignore)  # [N, K]
        labelled = targets.sum(1) > 0
    n_classes = labels.n_outputs
    return {
        name: Labelled(torch.cat(values)[labelled], targets[labelled], shown.kind, n_classes)
        for name, values in parts.items()
    }
