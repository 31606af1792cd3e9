"""An objective whose step looks at a value, which a plan does not have and a device would have to wait for."""

from __future__ import annotations

from collections.abc import Mapping

from ssl_eo.data.types import Batch
from ssl_eo.objectives import mae
from ssl_eo.objectives.base import Losses

__all__ = ["Config", "Objective"]

Config = mae.Config


class Objective(mae.Objective):
    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        losses = super().forward(batch, now)
        return losses if losses.total > 0 else Losses(-losses.total, losses.parts)
