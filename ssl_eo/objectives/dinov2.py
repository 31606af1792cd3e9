"""Self-distillation without labels on any sensor: DINO, iBOT, DINOv2 and the recipe of Panopticon.

A teacher, the moving average of the student, sees large crops of a place; the student sees these with patches hidden,
and small crops, and predicts what the teacher says of the other crops (DINO, arXiv 2104.14294) and of the hidden
patches (iBOT, arXiv 2111.07832), as DINOv2 does (arXiv 2304.07193). Where a place was seen by several sensors or at
several times, crops show it through different ones, and through some of their bands (Panopticon, arXiv 2503.10845).

B samples of a rank, V global and L local views (views outermost in every tensor of a role), N patches of a global view,
M masked patches of all V*B of them, D encoder width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ssl_eo.data.multicrop import Crops, MultiCrop, MultiCropConfig, MultiCropViews
from ssl_eo.data.spread_masking import SpreadMaskConfig, spread_masks
from ssl_eo.data.types import Batch, PixelBatch, RaggedMaskBatch, Sample
from ssl_eo.distributed import mean_over_ranks
from ssl_eo.losses.self_distillation import (
    centered_targets,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_targets,
)
from ssl_eo.models.heads import HeadConfig, PrototypeHead
from ssl_eo.models.vit import EncoderConfig, EncoderInput, Tokens
from ssl_eo.objectives import base
from ssl_eo.objectives.base import Losses, Schemas, ema_update_, encoder_for, teacher_of
from ssl_eo.schedules import Linear, Schedule, WarmupCosine

__all__ = ["Config", "DistillationViews", "Objective"]

_ROLES = ("global", "local")


@dataclass
class Config:
    """Defaults are those of DINOv2's short ViT-L schedule, but without its warm-up of the teacher's temperature.

    DINO: no `ibot_weight`, no `koleo_weight`.
    """

    crops: MultiCropConfig = field(default_factory=MultiCropConfig)
    mask: SpreadMaskConfig = field(default_factory=SpreadMaskConfig)
    dino_weight: float = 1.0  # of the loss between CLS tokens
    ibot_weight: float = 1.0  # of the loss between masked patches; 0: none are masked
    koleo_weight: float = 0.1  # of the entropy of the student's CLS tokens; 0: not computed
    koleo_over_ranks: bool = False  # look for neighbours among the samples of all ranks
    head: HeadConfig = field(default_factory=HeadConfig)
    ibot_head: HeadConfig | None = None  # of patches; null: they share the head of the CLS token
    student_temp: float = 0.1  # of the student's softmax
    teacher_temp: float = 0.07  # of the targets, once warmed up
    start_teacher_temp: float | None = None  # of the targets at step 0; null: no warm-up
    teacher_temp_warmup_steps: int = 0  # from one to the other, linear
    centering: Literal["mean", "sinkhorn"] = "mean"  # of the teacher's logits: less a running mean, or Sinkhorn-Knopp
    center_momentum: float = 0.9  # of that running mean
    momentum: float = 0.992  # of the teacher, at the start; a cosine to end_momentum
    end_momentum: float = 1.0  # at the last step

    def __post_init__(self) -> None:
        for key in ("dino_weight", "ibot_weight", "koleo_weight", "teacher_temp_warmup_steps"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if not self.dino_weight and not self.ibot_weight:
            raise ValueError("dino_weight and ibot_weight are both 0: nothing would be learned")
        if (self.start_teacher_temp is None) != (self.teacher_temp_warmup_steps == 0):
            raise ValueError(
                "start_teacher_temp and teacher_temp_warmup_steps make a warm-up together, got"
                f" {self.start_teacher_temp} and {self.teacher_temp_warmup_steps}"
            )
        for key in ("student_temp", "start_teacher_temp", "teacher_temp"):
            if (value := getattr(self, key)) is not None and not value > 0:
                raise ValueError(f"{key} must be positive, got {value}")
        for key in ("center_momentum", "momentum", "end_momentum"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must be in [0, 1], got {getattr(self, key)}")
        if self.ibot_head is not None and not (self.ibot_weight and self.dino_weight):
            raise ValueError("ibot_head is set but ibot_weight or dino_weight is 0: one head is enough then")
        if self.ibot_weight and self.mask.n_views > self.crops.n_global:
            raise ValueError(f"mask.n_views {self.mask.n_views} is more than crops.n_global {self.crops.n_global}")


@dataclass(frozen=True)
class DistillationViews(MultiCropViews):
    """Global and local crops, through different images of a place, and block masks on some of the global ones."""

    mask: SpreadMaskConfig | None
    grid: tuple[int, int]

    def collate(self, planned: list[tuple[Sample, Crops]], step: int, source: int, rng: np.random.Generator) -> Batch:
        batch = super().collate(planned, step, source, rng)
        if self.mask is not None:
            slots, n_views, seed = [s.slot for s, _ in planned], self.crops.cfg.n_global, int(rng.integers(2**62))
            batch.ragged_masks["global"] = spread_masks(self.mask, self.grid, n_views, slots, seed)
        return batch


class Targets(NamedTuple):
    """What the student is to predict, and the teacher's mean logits, by which the centers move."""

    cls: Tensor  # [V, B, K]
    patches: Tensor | None  # [M, K]
    state: dict[str, Tensor]


class Objective(base.Objective):
    """Student and teacher are encoder, head of the CLS token, and head of patches where that is another."""

    batch_coupled: ClassVar[bool] = True  # through KoLeo, Sinkhorn and the centers
    center: Tensor
    ibot_center: Tensor

    def __init__(self, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> None:
        super().__init__()
        self.cfg = cfg
        if bool(cfg.ibot_weight) != encoder_cfg.mask_token:
            raise ValueError(
                f"model.mask_token must be {'true' if cfg.ibot_weight else 'false'} with objective.ibot_weight"
                f" {cfg.ibot_weight}: masked patches are replaced by it, and nothing else trains it"
            )
        if not encoder_cfg.cls_token:
            raise ValueError("model.cls_token must be true: the loss is of CLS tokens")
        for role in _ROLES:
            if encoder_cfg.patch_embed == "conv" and cfg.crops.of(role).bands.n_bands is not None:
                raise ValueError(
                    f"objective.crops.{role}_bands.n_bands must be null with model.patch_embed conv, which takes the"
                    " same bands in every view"
                )
        tiles = [tile for usable in MultiCrop(cfg.crops, schemas).tiles for tile in usable.values()]
        encoder = encoder_for(encoder_cfg, tiles)
        self.student = nn.ModuleDict({"encoder": encoder, "dino_head": PrototypeHead(encoder_cfg.width, cfg.head)})
        if cfg.ibot_head is not None:
            self.student["ibot_head"] = PrototypeHead(encoder_cfg.width, cfg.ibot_head)
        self.teacher = teacher_of(self.student, list(self.student))
        self.register_buffer("center", torch.empty(cfg.head.n_prototypes))
        self.register_buffer("ibot_center", torch.empty((cfg.ibot_head or cfg.head).n_prototypes))

    @classmethod
    def views(cls, cfg: Config, encoder_cfg: EncoderConfig, schemas: Schemas) -> DistillationViews:
        patch = encoder_cfg.patch_size
        for role in _ROLES:
            if (size := cfg.crops.of(role).crop.size_px) % patch:
                raise ValueError(
                    f"objective.crops.{role}_crop.size_px {size} is not a multiple of model.patch_size {patch}"
                )
        side = cfg.crops.global_crop.size_px // patch
        if cfg.ibot_weight and not cfg.mask.counts(side**2).min():
            raise ValueError(
                f"objective.mask.mask_ratio {list(cfg.mask.mask_ratio)} hides none of the {side**2} patches of a view"
            )
        mask = cfg.mask if cfg.ibot_weight else None
        return DistillationViews(MultiCrop(cfg.crops, schemas), mask, (side, side))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.center)
        nn.init.zeros_(self.ibot_center)

    def schedules(self, total_steps: int) -> dict[str, Schedule]:
        cfg = self.cfg
        start = cfg.teacher_temp if cfg.start_teacher_temp is None else cfg.start_teacher_temp
        return {
            "momentum": WarmupCosine(cfg.momentum, cfg.end_momentum, total_steps),
            "teacher_temp": Linear(start, cfg.teacher_temp, cfg.teacher_temp_warmup_steps),
        }

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        cfg, mask = self.cfg, batch.ragged_masks.get("global")
        targets = self._targets(batch.pixels["global"], mask, now["teacher_temp"])
        inputs = [_input(view, mask if role == "global" else None) for role, view in batch.pixels.items()]
        tokens = self.student["encoder"](inputs)
        cls = torch.cat([t.cls for t in tokens])  # [(V+L)*B, D]
        cls_logits, patch_logits = _logits(self.student, cls, _masked(tokens[0], mask))

        with torch.autocast(cls.device.type, enabled=False):
            n_samples = len(batch.keys)
            logits = torch.unflatten(cls_logits.float(), 0, (-1, n_samples))  # [V+L, B, K]
            parts = {"dino": (cfg.dino_weight, dino_loss(logits, targets.cls, cfg.student_temp))}
            if patch_logits is not None:
                assert mask is not None
                assert targets.patches is not None
                n_views = cfg.crops.n_global * n_samples
                loss = ibot_loss(patch_logits.float(), targets.patches, mask.weight, n_views, cfg.student_temp)
                parts["ibot"] = (cfg.ibot_weight, loss)
            if cfg.koleo_weight:
                of_views = torch.unflatten(tokens[0].cls.float(), 0, (-1, n_samples))  # [V, B, D]
                loss = torch.stack([koleo_loss(view, cfg.koleo_over_ranks) for view in of_views]).sum()
                parts["koleo"] = (cfg.koleo_weight, loss)
            total = torch.stack([weight * loss for weight, loss in parts.values()]).sum()
        return Losses(
            total=total,
            parts={name: loss.detach() for name, (_, loss) in parts.items()},
            metrics=_entropies(targets.cls),
            state=targets.state,
        )

    def after_step(self, now: Mapping[str, float], finite: Tensor, state: Mapping[str, Tensor]) -> None:
        assert self.teacher is not None
        ema_update_(self.teacher, self.student, now["momentum"], finite)
        for name, mean in state.items():
            center = getattr(self, name)
            center.copy_(torch.where(finite > 0, torch.lerp(mean, center, self.cfg.center_momentum), center))

    @torch.no_grad()
    def _targets(self, view: PixelBatch, mask: RaggedMaskBatch | None, temperature: float) -> Targets:
        cfg = self.cfg
        assert self.teacher is not None
        tokens = self.teacher["encoder"]([_input(view)])[0]
        cls_logits, patch_logits = _logits(self.teacher, tokens.cls, _masked(tokens, mask))
        with torch.autocast(cls_logits.device.type, enabled=False):
            cls_logits = cls_logits.float()  # [V*B, K]
            patch_logits = None if patch_logits is None else patch_logits.float()  # [M, K]
            if cfg.centering == "sinkhorn":
                cls = sinkhorn_targets(cls_logits, temperature)
                patches = None if patch_logits is None else sinkhorn_targets(patch_logits, temperature)
                state = {}
            else:
                cls = centered_targets(cls_logits, self.center, temperature)
                state = {"center": mean_over_ranks(cls_logits.mean(0))}
                patches = None
                if patch_logits is not None:
                    patches = centered_targets(patch_logits, self.ibot_center, temperature)
                    state["ibot_center"] = _mean_of_rows(patch_logits)
        return Targets(torch.unflatten(cls, 0, (cfg.crops.n_global, -1)), patches, state)


def _input(view: PixelBatch, mask: RaggedMaskBatch | None = None) -> EncoderInput:
    return EncoderInput(view.pixels, view.channels, view.gsd_m, mask=None if mask is None else mask.mask)


def _masked(tokens: Tokens, mask: RaggedMaskBatch | None) -> Tensor | None:
    """The tokens `[M, D]` of masked patches."""
    return None if mask is None else tokens.patches.flatten(0, 1)[mask.ids_masked]


def _logits(network: nn.ModuleDict, cls: Tensor, patches: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of CLS tokens `[R, D]` and of patches `[M, D]`, by one head in one call or each by its own."""
    head = network["dino_head"]
    if patches is None:
        return head(cls), None
    if "ibot_head" in network:
        return head(cls), network["ibot_head"](patches)
    logits = head(torch.cat((cls, patches)))  # [R + M, K]
    return logits[: len(cls)], logits[len(cls) :]


def _mean_of_rows(x: Tensor) -> Tensor:
    """The mean `[K]` over the rows of `x [M, K]` of all ranks, which may hold different numbers of them."""
    n_rows = torch.full_like(x[:1, 0], float(len(x)))
    sums = mean_over_ranks(torch.cat((x.sum(0), n_rows)))  # [K + 1]
    return sums[:-1] / sums[-1]


def _entropies(targets: Tensor) -> dict[str, Tensor]:
    """Two ways to collapse: every target is uniform (entropy log K), or all are the same (mean entropy = entropy)."""
    flat = targets.flatten(0, 1)  # [V*B, K]
    mean = flat.mean(0)
    return {
        "teacher_entropy": torch.special.entr(flat).sum(-1).mean(),
        "teacher_entropy_of_mean": torch.special.entr(mean).sum(),
    }
