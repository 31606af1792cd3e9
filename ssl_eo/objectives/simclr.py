"""SimCLR (Chen et al. 2020, arXiv 2002.05709): find the other view of a place among all views of the global batch.

Two views are two crops of one image, or of two images of a place: two dates, two sensors (`crops.pairing`).

B samples of a rank, D encoder width, O output width of the projector. Views are outermost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from ssl_eo.data.multicrop import MultiCropViews
from ssl_eo.data.types import Batch
from ssl_eo.losses.contrastive import nt_xent_contrast, pair_metrics
from ssl_eo.models.heads import MLPHead
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.objectives import base
from ssl_eo.objectives._pairs import PairCropConfig, Pool, check_positive, embed, encoder_of_pairs, views_of_pairs
from ssl_eo.objectives.base import Losses, Schemas

__all__ = ["Config", "Objective"]


@dataclass
class Config:
    """Defaults are those of the paper."""

    crops: PairCropConfig = field(default_factory=PairCropConfig)
    temperature: float = 0.1  # of the softmax over all other views
    pool: Pool = "cls"  # what the projector is given: the CLS token, or the mean of the patches
    projector_layers: int = 2  # linear layers
    hidden_dim: int = 2048  # width of the projector's hidden layers
    out_dim: int = 128  # width of what is compared
    head_norm: Literal["batch", "none"] = "batch"  # batch: over both views of the global batch, at the output too

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "projector_layers", "hidden_dim", "out_dim")


class Objective(base.Objective):
    """Student: encoder and projector. There is no teacher."""

    batch_coupled: ClassVar[bool] = True

    def __init__(self, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> None:
        super().__init__()
        self.cfg = cfg
        norm = cfg.head_norm == "batch"
        projector = MLPHead(encoder_cfg.width, cfg.hidden_dim, cfg.out_dim, cfg.projector_layers, norm, norm)
        encoder = encoder_of_pairs(cfg.crops, cfg.pool, encoder_cfg, schemas)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": projector})
        self.teacher = None

    @classmethod
    def views(cls, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> MultiCropViews:
        return views_of_pairs(cfg.crops, encoder_cfg, schemas)

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        # Both views are normalised together, as in the paper.
        z = self.student["projector"](embed(self.student["encoder"], batch.pixels["global"], self.cfg.pool))  # [2B, O]
        with torch.autocast(z.device.type, enabled=False):
            z = torch.unflatten(z.float(), 0, (2, -1))  # [2, B, O]
            contrast = nt_xent_contrast(z, self.cfg.temperature)
            loss = contrast.loss()
            metrics = {"contrast_accuracy": contrast.accuracy(), **pair_metrics(*z.detach())}
        return Losses(total=loss, parts={"contrast": loss.detach()}, metrics=metrics)
