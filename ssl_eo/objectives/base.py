"""What an objective is: one module whose `forward` is a pure function of weights, batch and scheduled scalars.

It owns a student, perhaps a teacher, and its loss. It owns no optimiser, wrapper, device, logger, probe or checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssl_eo.data.types import Batch, TileSchema, Views
from ssl_eo.distributed import local_part
from ssl_eo.models.layers import Block, CrossBlock, JointBlock
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput, Tokens
from ssl_eo.schedules import Schedule

__all__ = [
    "Losses",
    "Objective",
    "ObjectiveConfig",
    "Schemas",
    "common_n_channels",
    "ema_update_",
    "encoder_for",
    "teacher_of",
]

# One mapping of tile names to schemas for each entry of `data.sources`.
Schemas = Sequence[Mapping[str, TileSchema]]


@dataclass
class ObjectiveConfig:
    """`name` is a module of `ssl_eo.objectives` (or a dotted name of yours); the other keys fill its `Config`."""

    name: str
    options: Any = field(metadata={"package": "ssl_eo.objectives"})


@dataclass
class Losses:
    """`total` is minimised; `parts` are logged as `loss/<name>`, `metrics` as `<name>`. Float32 scalars on the device.

    `state` is what `after_step` needs of this batch, equal on all ranks: a running mean moves by it, a queue takes it.
    """

    total: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """Base of all objectives. A subclass sets `student` (with "encoder") and perhaps `teacher`, and overrides the rest.

    `__init__` must be buildable on the meta device: no I/O, no collectives, no device names. Every parameter of the
    student gets a gradient at every step. Buffers are equal on all ranks by construction.
    """

    batch_coupled: ClassVar[bool] = False  # True: the loss mixes samples, so accumulating micro-batches changes it
    frozen_teacher: ClassVar[bool] = False  # True: the teacher is no moving average but another encoder, which stays
    student: nn.ModuleDict
    teacher: nn.ModuleDict | None

    @classmethod
    def views(cls, cfg: Any, encoder_cfg: EncoderConfig, schemas: Schemas) -> Views:
        """How this objective looks at samples; travels to the loader's workers."""
        raise NotImplementedError

    def forward(self, batch: Batch, now: Mapping[str, float]) -> Losses:
        """The loss of this rank's `batch`; `now` holds the scheduled scalars of this step."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Objective:
        """Set the student's mode; the teacher stays in evaluation mode, without dropped paths."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def init_weights(self) -> None:
        """Fill every parameter and buffer of the student, then copy the student to the teacher, or fill that too."""
        parts = [self.student, self.teacher] if self.frozen_teacher and self.teacher is not None else [self.student]
        for module in (module for part in parts for module in part.values()):
            module.init_weights()  # type: ignore[operator]
        self.copy_to_teacher()

    def copy_to_teacher(self) -> None:
        """Make the teacher equal to the student, as it is before the first step, unless it is frozen."""
        if self.teacher is not None and not self.frozen_teacher:
            for name, module in self.teacher.items():
                module.load_state_dict(self.student[name].state_dict())

    def given(self) -> dict[str, str]:
        """What `init` must bring because it is not trained: how the names begin -> what to tell who forgot it."""
        return {}

    def schedules(self, total_steps: int) -> dict[str, Schedule]:
        """Scheduled scalars by name; the trainer evaluates them and passes them as `now`."""
        return {}

    def after_step(self, now: Mapping[str, float], finite: Tensor, state: Mapping[str, Tensor]) -> None:
        """Called after the optimiser, with the `Losses.state` of the step.

        `finite` is a 0-d float, 1 when the step was taken and 0 when it was skipped: then nothing may change.
        """

    def encode(self, inputs: EncoderInput, layers: Sequence[int] | None = None) -> list[Tokens]:
        """What evaluation sees: the published encoder's tokens, of the last layer or of each of `layers`."""
        encoder = self.published_encoder()
        return encoder([inputs]) if layers is None else encoder.intermediates(inputs, layers)

    def published_encoder(self) -> Encoder:
        """The encoder that is probed and exported: the teacher's where that is a moving average."""
        teacher = None if self.frozen_teacher else self.teacher
        part = self.student if teacher is None or "encoder" not in teacher else teacher
        encoder = part["encoder"]
        assert isinstance(encoder, Encoder)
        return encoder

    def shard_units(self) -> list[nn.Module]:
        """What FSDP gathers one after the other, in about the order of the forward pass: every transformer block.

        The rest is gathered as a whole at the start of a step. A unit is used by calling it, never by another method.
        """
        return [m for m in self.modules() if isinstance(m, Block | CrossBlock | JointBlock)]

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of `batch`, a few samples, for a person to look at: title -> `[n, C, H, W]`, normalised values."""
        return {}


def encoder_for(cfg: EncoderConfig, tiles: Sequence[TileSchema], takes_series: bool = False) -> Encoder:
    """An encoder of `tiles`, built for their number of channels where they agree on one (else any-sensor parts alone).

    Raises `ValueError` for a channel that it cannot embed, and for what only an objective that `takes_series` gives it.
    """
    asked = {"tubelet": cfg.tubelet > 1, "time_encoding": cfg.time_encoding, "location_encoding": cfg.location_encoding}
    for key in (key for key, is_set in asked.items() if is_set and not takes_series):
        raise ValueError(f"model.{key}: this objective shows single dates, without when and where; mae has series")
    n_channels = common_n_channels(tiles)
    if cfg.patch_embed == "conv" and n_channels is None:
        held = ", ".join(dict.fromkeys(f"{tile.sensor.name} with {len(tile.bands)}" for tile in tiles))
        raise ValueError(
            f"model.patch_embed: conv is built for one number of bands, but there are {held}; use channel_attention or"
            " dynamic, or show one of them"
        )
    encoder = Encoder(cfg, n_channels)
    # On the CPU whatever the default device is: a check must not wait for an accelerator, nor run on meta.
    with torch.device("cpu"):
        for tile in tiles:
            encoder.check(tile.sensor.channel_meta(tile.bands))
    return encoder


def common_n_channels(tiles: Sequence[TileSchema]) -> int | None:
    """The number of bands of `tiles`; None where they do not agree on one."""
    counts = {len(tile.bands) for tile in tiles}
    return counts.pop() if len(counts) == 1 else None


def teacher_of(student: nn.ModuleDict, names: Sequence[str]) -> nn.ModuleDict:
    """A frozen copy of the parts `names` of `student`."""
    teacher = nn.ModuleDict({name: copy.deepcopy(student[name]) for name in names})
    return teacher.requires_grad_(False).eval()


@torch.no_grad()
def ema_update_(teacher: nn.ModuleDict, student: nn.ModuleDict, momentum: float, finite: Tensor) -> None:
    """teacher <- m * teacher + (1 - m) * student, left as it is where the 0-d `finite` is 0; no host sync.

    Where FSDP has spread both, alike, over ranks, each rank moves its own part. One fused kernel per operation: with a
    tensor as weight, `_foreach_lerp_` would launch one per parameter.
    """
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name, module in teacher.items():
        targets += [local_part(p) for p in module.parameters()]
        sources += [local_part(p) for p in student[name].parameters()]
    steps = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(steps, ((1.0 - momentum) * finite).to(steps[0].device))  # another with parallel.cpu_offload
    torch._foreach_add_(targets, steps)
