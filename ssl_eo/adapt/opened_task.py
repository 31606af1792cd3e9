"""A task that is opened, and the features of its samples that are kept while decoders are trained on them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ssl_eo.adapt.examples import Examples, Features, gigabytes_of_features
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.training import Labels, Samples, TrainingConfig, autocast
from ssl_eo.eval.tasks import Task

__all__ = ["OpenedTask"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedTask:
    """A task, and the samples that models are trained, chosen and scored on: `train`, `val` and `test`."""

    task: Task
    labels: Labels
    splits: dict[str, Examples]

    def samples(self) -> dict[str, Samples]:
        """All splits, of which nothing is kept."""
        return {name: Samples(split) for name, split in self.splits.items()}

    def kept_samples(
        self, model: TaskModel, cfg: TrainingConfig, device: torch.device, name: str
    ) -> dict[str, Samples]:
        """All splits with features of the frozen backbone of `model`, unless they take more than `cfg.features_gb`.

        `name` is that of the backbone, for messages.
        """
        need_gb = sum(gigabytes_of_features(model, split) for split in self.splits.values())
        if need_gb > cfg.features_gb:
            text = "%s: features take %.1f GB, more than features_gb %.1f allows: they are computed in every step"
            logger.info(text, name, need_gb, cfg.features_gb)
            return self.samples()
        return {
            name: Samples(split, Features.of(model, split, cfg.batch_size, autocast(device, cfg)))
            for name, split in self.splits.items()
        }
