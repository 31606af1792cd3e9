"""BYOL (Grill et al. 2020, arXiv 2006.07733): predict what a moving average says of the other view; no negatives.

Two views are two crops of one image, or of two images of a place: two dates, two sensors (`crops.pairing`).

B samples of a rank, D encoder width, O output width of projector and predictor. Views are outermost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ssl_eo.data.multicrop import MultiCropViews
from ssl_eo.data.types import Batch
from ssl_eo.losses.contrastive import pair_metrics, regression_loss
from ssl_eo.models.heads import MLPHead
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.objectives import base
from ssl_eo.objectives._pairs import (
    PairCropConfig,
    Pool,
    check_momentum,
    check_positive,
    embed,
    encoder_of_pairs,
    views_of_pairs,
)
from ssl_eo.objectives.base import Losses, Schemas, ema_update_, teacher_of
from ssl_eo.schedules import Schedule, WarmupCosine

__all__ = ["Config", "Objective"]


@dataclass
class Config:
    """Defaults are those of the paper, for its longest training."""

    crops: PairCropConfig = field(default_factory=PairCropConfig)
    pool: Pool = "cls"  # what the projector is given: the CLS token, or the mean of the patches
    projector_layers: int = 2  # linear layers
    predictor_layers: int = 2  # linear layers
    hidden_dim: int = 4096  # width of the hidden layers of both
    out_dim: int = 256  # width of what is compared
    # batch: hidden layers are normalised over one view of the global batch. none: nothing keeps it from collapse but
    # the predictor and a slow teacher.
    head_norm: Literal["batch", "none"] = "batch"
    momentum: float = 0.996  # of the teacher, at the start; a cosine to end_momentum
    end_momentum: float = 1.0  # of the teacher, at the end

    def __post_init__(self) -> None:
        check_positive(self, "projector_layers", "predictor_layers", "hidden_dim", "out_dim")
        check_momentum(self)


class Objective(base.Objective):
    """Student: encoder, projector, predictor. Teacher: encoder and projector."""

    batch_coupled: ClassVar[bool] = True  # through the normalisation of the heads

    def __init__(self, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> None:
        super().__init__()
        self.cfg = cfg
        norm = cfg.head_norm == "batch"
        encoder = encoder_of_pairs(cfg.crops, cfg.pool, encoder_cfg, schemas)
        projector = MLPHead(encoder_cfg.width, cfg.hidden_dim, cfg.out_dim, cfg.projector_layers, norm)
        predictor = MLPHead(cfg.out_dim, cfg.hidden_dim, cfg.out_dim, cfg.predictor_layers, norm)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": projector, "predictor": predictor})
        self.teacher = teacher_of(self.student, ["encoder", "projector"])

    @classmethod
    def views(cls, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> MultiCropViews:
        return views_of_pairs(cfg.crops, encoder_cfg, schemas)

    def schedules(self, total_steps: int) -> dict[str, Schedule]:
        return {"momentum": WarmupCosine(self.cfg.momentum, self.cfg.end_momentum, total_steps)}

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        assert self.teacher is not None
        with torch.no_grad():
            targets = self._project(self.teacher, batch)  # [2, B, O]
        predictions = self.student["predictor"](self._project(self.student, batch))  # [2, B, O]
        with torch.autocast(targets.device.type, enabled=False):
            first, second = predictions.float()
            target_of_first, target_of_second = targets.float().flip(0)  # each view is to say what the other is
            loss = regression_loss(first, target_of_first) + regression_loss(second, target_of_second)
        return Losses(total=loss, parts={"regression": loss.detach()}, metrics=pair_metrics(*targets))

    def after_step(self, now: Mapping[str, float], finite: Tensor, state: Mapping[str, Tensor]) -> None:
        assert self.teacher is not None
        ema_update_(self.teacher, self.student, now["momentum"], finite)

    def _project(self, network: nn.ModuleDict, batch: Batch) -> Tensor:
        """Projections `[2, B, O]` of both views, each normalised by itself."""
        x = embed(network["encoder"], batch.pixels["global"], self.cfg.pool)  # [2B, D]
        projections: Tensor = network["projector"](torch.unflatten(x, 0, (2, -1)))
        return projections
