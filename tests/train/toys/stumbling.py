"""The masked autoencoder with a loss that is not finite at some steps; an objective of a user's own."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ssl_eo.data.types import Batch
from ssl_eo.distributed import rank
from ssl_eo.objectives import mae
from ssl_eo.objectives.base import Losses


@dataclass
class Config(mae.Config):
    """`bad_steps` are the steps whose loss is NaN, on all ranks or `bad_rank` alone.

    At `falls_at` rank 1 alone raises an error, at `stalls_at` it goes no further.
    """

    bad_steps: list[int] = field(default_factory=list)
    bad_rank: int | None = None
    falls_at: int | None = None
    stalls_at: int | None = None


class Objective(mae.Objective):
    cfg: Config

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        if batch.step == self.cfg.falls_at and rank() == 1:
            raise RuntimeError("out of luck")
        if batch.step == self.cfg.stalls_at and rank() == 1:
            time.sleep(3600)
        losses = super().forward(batch, now)
        is_bad = batch.step in self.cfg.bad_steps and self.cfg.bad_rank in (None, rank())
        factor = math.nan if is_bad else 1.0
        return Losses(losses.total * factor, losses.parts)
