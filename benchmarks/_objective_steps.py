"""Steps of an objective without a loader and logs, on procedural scenes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssl_eo.data.render import Renderer
from ssl_eo.data.types import Batch, Source, Views, move_to
from ssl_eo.objectives.base import Objective
from ssl_eo.seeding import numpy_generator
from ssl_eo.train.optim import OptimConfig, build_optimizer, step_if_finite

__all__ = ["MOST_PPM", "Setting", "Training"]

MOST_PPM = 50  # rounding to float32; a term that is wrong or missing makes thousands


@dataclass(frozen=True)
class Setting:
    """What is run, and on what. A `toy` shows in seconds that everything works; its figures say nothing."""

    device: str = "cpu"
    batch_size: int = 8
    bfloat16: bool = False
    toy: bool = False


class Training:
    """An objective and its optimiser before the first step."""

    def __init__(self, setting: Setting, objective: Objective, views: Views, source: Source) -> None:
        self.setting, self.objective, self.views, self.source = setting, objective, views, source
        self.optimizer = build_optimizer(OptimConfig(), objective)

    def batch(self) -> Batch:
        """Rendered views of the first samples."""
        samples = [replace(self.source.read(slot), slot=slot) for slot in range(self.setting.batch_size)]
        planned = [(sample, self.views.plan(sample, numpy_generator("benchmark", sample.slot))) for sample in samples]
        batch = move_to(self.views.collate(planned, 0, 0, numpy_generator("benchmark")), self.setting.device)
        batch.pixels = Renderer([self.source.schema]).to(self.setting.device).render(batch)
        return batch

    def loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.bfloat16):
            losses = self.objective(batch, {})
        total: Tensor = losses.total
        return total

    def step(self, batch: Batch) -> None:
        """Forward, backward, optimiser."""
        loss = self.loss(batch)
        loss.backward()
        step_if_finite(self.optimizer, loss.isfinite().float())
        self.optimizer.zero_grad(set_to_none=True)
