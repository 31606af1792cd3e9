"""Self-distillation without a loader and logs: an objective, its optimiser, batches, and one step.

The recipe is Panopticon's (arXiv 2503.10845): a ViT-B/14, two global views of 224 pixels and four local ones of 98, and
one head of 65,536 prototypes for CLS tokens and for masked patches. Pixels are those of procedural scenes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ssl_eo.data.multicrop import MultiCropConfig, SpectralCropConfig
from ssl_eo.data.plans import CropConfig
from ssl_eo.data.render import Renderer
from ssl_eo.data.sources import synthetic
from ssl_eo.data.spread_masking import SpreadMaskConfig
from ssl_eo.data.types import Batch, move_to
from ssl_eo.models.heads import HeadConfig
from ssl_eo.models.patch_embed import ChannelAttentionConfig
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.objectives.base import Losses
from ssl_eo.objectives.dinov2 import Config, Objective
from ssl_eo.seeding import numpy_generator
from ssl_eo.train.activation_checkpointing import ActivationCheckpointing, checkpoint_activations
from ssl_eo.train.optim import OptimConfig, build_optimizer, step_if_finite
from ssl_eo.train.parallel import build_objective

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))
from direct_channel_attention import DirectChannelAttention

__all__ = ["Setting", "Training"]

EXTENT_M = 960.0  # of a scene


@dataclass(frozen=True)
class Setting:
    """What is run, and on what. A `toy` shows in seconds that everything works; its figures say nothing."""

    device: str = "cpu"
    batch_size: int = 2
    bfloat16: bool = False
    toy: bool = False
    activation_checkpointing: ActivationCheckpointing = "none"

    @property
    def encoder(self) -> EncoderConfig:
        small: dict[str, Any] = {"embed_dim": 48, "depth": 2, "n_heads": 3}
        return EncoderConfig(
            size="base",
            patch_size=14,
            layer_scale_init=1e-5,
            position="learned",
            image_size=518,
            mask_token=True,
            channel_attention=ChannelAttentionConfig(96, 4) if self.toy else ChannelAttentionConfig(),
            **(small if self.toy else {}),
        )

    def objective(self, n_local_channels: int | None = None) -> Config:
        """Global views show all channels; a local one a random `n_local_channels` of them, or all if None."""
        n_bands = None if n_local_channels is None else (n_local_channels, n_local_channels)
        return Config(
            crops=MultiCropConfig(
                global_crop=CropConfig(56 if self.toy else 224, scale=(0.32, 1.0)),
                local_crop=CropConfig(28 if self.toy else 98, scale=(0.05, 0.32)),
                n_local=4,
                local_bands=SpectralCropConfig(n_bands),
            ),
            mask=SpreadMaskConfig(n_ratios=1),  # 30 % on half of the global views: the mean, whatever the batch size
            ibot_weight=0.1,
            koleo_weight=0.0,
            head=HeadConfig(n_prototypes=256 if self.toy else 65_536),
        )


class Training:
    """Student, teacher and optimiser before the first step. Each of `sensors` is a source of its own."""

    def __init__(self, setting: Setting, sensors: Sequence[str]) -> None:
        self.setting = setting
        self.sources = [synthetic.Source(synthetic.Config(sensors=[name], extent_m=EXTENT_M)) for name in sensors]
        self.schemas = [source.schema for source in self.sources]
        self.objective = build_objective(
            lambda: Objective(setting.objective(), setting.encoder, self.schemas), 0, torch.device(setting.device)
        ).train()
        checkpoint_activations(self.objective, setting.activation_checkpointing)
        self.optimizer = build_optimizer(OptimConfig(), self.objective)
        self.now = {name: schedule(0) for name, schedule in self.objective.schedules(1000).items()}

    def batch(self, n_local_channels: int | None, source: int = 0) -> Batch:
        """Rendered views of the first samples of the source number `source`."""
        cfg = self.setting.objective(n_local_channels)
        views = Objective.views(cfg, self.setting.encoder, self.schemas)
        samples = [replace(self.sources[source].read(slot), slot=slot) for slot in range(self.setting.batch_size)]
        planned = [(sample, views.plan(sample, numpy_generator("benchmark", sample.slot))) for sample in samples]
        batch = views.collate(planned, 0, source, numpy_generator("benchmark"))
        batch = move_to(batch, self.setting.device)
        batch.pixels = Renderer(self.schemas).to(self.setting.device).render(batch)
        return batch

    def gradients(self, batch: Batch) -> Losses:
        """Forward of teacher and student, and backward."""
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.bfloat16):
            losses: Losses = self.objective(batch, self.now)
        losses.total.backward()
        return losses

    def step(self, batch: Batch) -> None:
        """One step as the trainer takes it, from the forward pass to the moving averages."""
        losses = self.gradients(batch)
        parameters = list(self.objective.student.parameters())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        clip_grads_with_norm_(parameters, 3.0, norm)
        finite = (losses.total.isfinite() & norm.isfinite()).float()
        step_if_finite(self.optimizer, finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(self.now, finite, losses.state)

    def state_bytes(self) -> int:
        """Of all that stays between steps: weights, buffers, and the moments of the optimiser."""
        tensors: list[Tensor] = [*self.objective.parameters(), *self.objective.buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    @contextlib.contextmanager
    def direct_form(self) -> Iterator[None]:
        """Student and teacher embed patches by the direct form, with the very parameters of their own embeddings."""
        encoders = [network["encoder"] for network in (self.objective.student, self.objective.teacher)]
        factorised = [encoder.patch_embed for encoder in encoders]
        for encoder, embed in zip(encoders, factorised, strict=True):
            cfg = encoder.cfg
            with torch.device("meta"):
                direct = DirectChannelAttention(cfg.width, cfg.patch_size, cfg.channel_attention)
            direct.conv3d, direct.chnfus, direct.proj = embed.conv3d, embed.chnfus, embed.proj
            encoder.patch_embed = direct
        try:
            yield
        finally:
            for encoder, embed in zip(encoders, factorised, strict=True):
                encoder.patch_embed = embed
