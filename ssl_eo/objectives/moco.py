"""MoCo v2 and v3: find the other view of a place among keys of a moving average (arXiv 2003.04297, arXiv 2104.02057).

Version 2: the first view asks, and is compared with its key, the second view, and with the keys of former batches,
which wait in a queue. Version 3: both views ask, through a predictor, and are compared with keys of the global batch.

Two views are two crops of one image, or of two images of a place: two dates, two sensors (`crops.pairing`).

The published version 2 shuffles samples over GPUs: else a query could tell its key by the few samples over which both
were normalised. Here nothing is normalised over a batch in version 2 (the encoder is a transformer, and heads must have
`head_norm: none`), and in version 3 heads are normalised over the whole global batch, in which no key stands out.

B samples of a rank, N = ranks * B of all, K keys in the queue, D encoder width, O width of keys. Views are outermost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.data.multicrop import MultiCropViews
from ssl_eo.data.types import Batch, PixelBatch
from ssl_eo.distributed import gather
from ssl_eo.losses.contrastive import in_batch_contrast, pair_metrics, queue_contrast
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
    one_view,
    views_of_pairs,
)
from ssl_eo.objectives.base import Losses, Schemas, ema_update_, teacher_of
from ssl_eo.schedules import Schedule, WarmupCosine

__all__ = ["Config", "Objective"]


@dataclass
class Config:
    """Defaults are those of version 3 with a ViT.

    Version 2 is projector_layers 2, hidden_dim 2048, out_dim 128, head_norm none, momentum and end_momentum 0.999.
    """

    version: Literal[2, 3] = 3  # 2: keys of former batches wait in a queue; 3: keys of the global batch alone
    crops: PairCropConfig = field(default_factory=PairCropConfig)
    temperature: float = 0.2  # of the softmax over keys
    queue_size: int = 65536  # version 2: keys of former batches that each query is compared with
    pool: Pool = "cls"  # what the projector is given: the CLS token, or the mean of the patches
    projector_layers: int = 3  # linear layers
    predictor_layers: int = 2  # version 3: linear layers
    hidden_dim: int = 4096  # width of the hidden layers of both
    out_dim: int = 256  # width of a key
    head_norm: Literal["batch", "none"] = "batch"  # batch: over one view of the global batch, at outputs too
    momentum: float = 0.99  # of the teacher, at the start; a cosine to end_momentum
    end_momentum: float = 1.0  # of the teacher, at the end

    def __post_init__(self) -> None:
        keys = ("queue_size", "projector_layers", "predictor_layers", "hidden_dim", "out_dim")
        check_positive(self, "temperature", *keys)
        check_momentum(self)
        if self.version == 2 and self.head_norm != "none":
            raise ValueError(
                f"head_norm must be none with version 2, got {self.head_norm}: keys in the queue would be normalised"
                " over other batches than the queries"
            )


class Objective(base.Objective):
    """Student: encoder, projector, and in version 3 a predictor. Teacher: encoder and projector."""

    batch_coupled: ClassVar[bool] = True  # version 2: one batch enters the queue at a step, whole
    queue: Tensor

    def __init__(self, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> None:
        super().__init__()
        self.cfg = cfg
        norm = cfg.head_norm == "batch"
        encoder = encoder_of_pairs(cfg.crops, cfg.pool, encoder_cfg, schemas)
        projector = MLPHead(encoder_cfg.width, cfg.hidden_dim, cfg.out_dim, cfg.projector_layers, norm, norm)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": projector})
        self.teacher = teacher_of(self.student, ["encoder", "projector"])
        if cfg.version == 2:
            self.register_buffer("queue", torch.empty(cfg.queue_size, cfg.out_dim))
        else:
            predictor = MLPHead(cfg.out_dim, cfg.hidden_dim, cfg.out_dim, cfg.predictor_layers, norm, norm)
            self.student["predictor"] = predictor

    @classmethod
    def views(cls, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> MultiCropViews:
        return views_of_pairs(cfg.crops, encoder_cfg, schemas)

    def init_weights(self) -> None:
        super().init_weights()
        if self.cfg.version == 2:
            self.queue.copy_(F.normalize(torch.randn_like(self.queue), dim=-1))

    def schedules(self, total_steps: int) -> dict[str, Schedule]:
        return {"momentum": WarmupCosine(self.cfg.momentum, self.cfg.end_momentum, total_steps)}

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        both = batch.pixels["global"]
        return self._of_queue(both) if self.cfg.version == 2 else self._of_batch(both)

    def after_step(self, now: Mapping[str, float], finite: Tensor, state: Mapping[str, Tensor]) -> None:
        assert self.teacher is not None
        ema_update_(self.teacher, self.student, now["momentum"], finite)
        if self.cfg.version == 2:
            # The newest come first, the oldest fall off the end: any number of keys fits a queue of any length.
            moved = torch.cat((state["keys"], self.queue))[: len(self.queue)]
            self.queue.copy_(torch.where(finite > 0, moved, self.queue))

    def _of_queue(self, both: PixelBatch) -> Losses:
        assert self.teacher is not None
        with torch.no_grad():
            keys = self._project(self.teacher, one_view(both, 1), n_views=1)[0]  # [B, O]
        queries = self._project(self.student, one_view(both, 0), n_views=1)[0]  # [B, O]
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = queries.float(), keys.float()
            contrast = queue_contrast(queries, keys, self.queue, self.cfg.temperature)
            loss = contrast.loss()
            state = {"keys": gather(F.normalize(keys, dim=-1))}  # [N, O]
        metrics = {"contrast_accuracy": contrast.accuracy(), **pair_metrics(queries.detach(), keys)}
        return Losses(total=loss, parts={"contrast": loss.detach()}, metrics=metrics, state=state)

    def _of_batch(self, both: PixelBatch) -> Losses:
        assert self.teacher is not None
        temperature = self.cfg.temperature
        with torch.no_grad():
            keys = self._project(self.teacher, both, n_views=2)  # [2, B, O]
        queries = self.student["predictor"](self._project(self.student, both, n_views=2))  # [2, B, O]
        with torch.autocast(queries.device.type, enabled=False):
            # Each view asks for the other.
            pairs = zip(queries.float(), keys.float().flip(0), strict=True)
            contrasts = [in_batch_contrast(q, k, temperature) for q, k in pairs]
            contrast = torch.stack([c.loss() for c in contrasts]).sum()
            accuracy = torch.stack([c.accuracy() for c in contrasts]).mean()
            total = 2.0 * temperature * contrast  # gradients of one size at any temperature
        metrics = {"contrast_accuracy": accuracy, **pair_metrics(*keys)}
        return Losses(total=total, parts={"contrast": contrast.detach() / 2}, metrics=metrics)

    def _project(self, network: nn.ModuleDict, view: PixelBatch, n_views: int) -> Tensor:
        """Projections `[V, B, O]` of the rows of `view`, each view normalised by itself."""
        x = embed(network["encoder"], view, self.cfg.pool)  # [V*B, D]
        projections: Tensor = network["projector"](torch.unflatten(x, 0, (n_views, -1)))
        return projections
