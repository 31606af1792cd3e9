"""A run on the toy source, as far as the health of its encoder is concerned."""

from __future__ import annotations

import numpy as np
from toy import scenes, tasks

from ssl_eo.data.stacking import stack
from ssl_eo.data.types import Batch, Sample, ViewPlan
from ssl_eo.eval.watching import Training


class Corner:
    """A view of the upper left quarter of a tile, turned and in false colours, in the size of the tile."""

    def plan(self, sample: Sample, rng: np.random.Generator) -> ViewPlan:
        return ViewPlan("rgb", (0.0, 0.0, 4.0, 4.0), (8, 8), rot90=1, bands=(2, 1, 0), gain=3.0)

    def collate(
        self, planned: list[tuple[Sample, ViewPlan]], step: int, source: int, rng: np.random.Generator
    ) -> Batch:
        samples = [sample for sample, _ in planned]
        schema = scenes.Source(scenes.Config()).schema
        tiles, views = stack(samples, {"image": [[plan for _, plan in planned]]}, schema)
        return Batch(step, source, [sample.key for sample in samples], tiles, views)


def training_on(*configs: scenes.Config, seed: int = 0) -> Training:
    """A source for each of `configs`, for the encoder of `tasks`."""
    sources = [scenes.Source(config) for config in configs]
    return Training(["toy.scenes"] * len(sources), sources, Corner(), tasks.encoder().check, seed)
