"""A task that is opened, and the features of its samples that are kept while decoders are trained on them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import torch

from ssl_eo.adapt.examples import Examples, Features, gigabytes_of_features
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.training import Labels, Samples, TrainingConfig, autocast, check_labelled
from ssl_eo.eval.leaks import count_alike, count_leaked, count_shared_groups
from ssl_eo.eval.tasks import Task

__all__ = ["OpenedTask"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedTask:
    """A task, and the samples that models are trained, chosen and scored on: `train`, `val` and `test`."""

    task: Task
    labels: Labels
    splits: dict[str, Examples]  # in this order

    @cached_property
    def leaks(self) -> dict[str, int]:
        """How many test samples have the pixels of one of train, and of val, and how many of their places are in these.

        Warns of them, unless the task's flags admit it. Raises `ValueError` where splits share a key.
        """
        name, flags = self.task.name, self.task.cfg.flags
        return {
            "n_leaked": count_leaked(name, self.splits, flags),
            "n_leaked_val": count_alike(self.splits["test"], self.splits["val"]),
            "n_shared_groups": count_shared_groups(name, self.splits, flags),
        }

    def check_labelled(self) -> None:
        """Raise `ValueError` where a split has no label at all, before hours are spent on training."""
        for name, split in self.splits.items():
            check_labelled(self.labels, name, split)

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
