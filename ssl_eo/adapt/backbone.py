"""Encoders as decoders see them: features of patches at several depths.

B images, C channels, T taps, D width, h w grid, P side of a patch in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl_eo.adapt.band_matching import AmbiguousBandError, BandMismatchError, match_bands
from ssl_eo.bundles import SensorInput
from ssl_eo.eval.decoders import TapMaps, TapShape
from ssl_eo.eval.features import check_taps, tap_layers
from ssl_eo.models.vit import Encoder, EncoderInput
from ssl_eo.sensors import ChannelMeta, Sensor

__all__ = [
    "DEFAULT_TAPS",
    "Backbone",
    "EncoderBackbone",
    "FixedBands",
    "PixelBackbone",
    "check_rising_taps",
    "clip_of",
    "fixed_bands",
    "padded_to",
]

DEFAULT_TAPS = (1 / 3, 1 / 2, 2 / 3, 1.0)  # of the depth, so that deep encoders are read as deep as shallow ones


class Backbone(nn.Module):
    """What a decoder stands on: `forward(inputs) -> TapMaps` of `shape`."""

    shape: TapShape
    missing_bands: tuple[str, ...] = ()  # that it was trained with, and images lack
    depth: int  # number of blocks, `encoder.blocks.0` to the last, whose learning rates may differ
    is_finetuned: bool = False  # whether its pretrained weights train, at lower rates than the decoder

    def forward(self, inputs: EncoderInput) -> TapMaps:
        """Features of patches at each tap."""
        raise NotImplementedError


@dataclass(frozen=True)
class FixedBands:
    """What stands for the bands of an encoder that was built for these and no others.

    `picks` are the channels of an image, None for a band that it lacks: such a band is the mean everywhere.
    """

    sensor: Sensor
    names: tuple[str, ...]
    picks: tuple[int | None, ...]

    @cached_property
    def channels(self) -> ChannelMeta:
        """Of the encoder's bands."""
        return self.sensor.channel_meta(self.names)

    @property
    def missing(self) -> tuple[str, ...]:
        """Bands of the encoder that the image lacks."""
        return tuple(name for name, pick in zip(self.names, self.picks, strict=True) if pick is None)

    def __call__(self, inputs: EncoderInput) -> EncoderInput:
        """`inputs` with the encoder's channels."""
        pixels = inputs.pixels
        nothing = torch.zeros_like(pixels[:, :1])
        found = [nothing if i is None else pixels[:, i : i + 1] for i in self.picks]
        return replace(inputs, pixels=torch.cat(found, 1), channels=self.channels.to(pixels.device))


def fixed_bands(known: SensorInput, channels: ChannelMeta) -> FixedBands:
    """The channels of an image that stand for the bands of `known`, by what they measure; one may stand for two.

    Raises `AmbiguousBandError` where two fit a band equally: it would pass for one that the image lacks.
    """
    bands = [known.sensor.bands[i] for i in known.sensor.index(known.bands)]
    picks: list[int | None] = []
    for band in bands:
        try:
            picks.append(match_bands([band], channels)[0])
        except AmbiguousBandError as error:
            raise AmbiguousBandError(f"{error}; name one of them in the task (bands)") from None
        except BandMismatchError:
            picks.append(None)
    return FixedBands(known.sensor, known.bands, tuple(picks))


def clip_of(inputs: Mapping[str, SensorInput]) -> float | None:
    """How the authors of an encoder bring pixels to [0, 1], where they do and say one thing of all its sensors."""
    clips = {known.clip_std for known in inputs.values()}
    return clips.pop() if len(clips) == 1 else None


def check_rising_taps(taps: Sequence[float]) -> None:
    """Raise `ValueError` unless `taps` are ratios of the depth that rise: decoders take them for a pyramid's order."""
    check_taps(taps)
    if sorted(taps) != list(taps):
        raise ValueError(f"taps must rise with the depth, got {list(taps)}")


class EncoderBackbone(Backbone):
    """A vision transformer, read after blocks at `taps` of its depth (1 is the last block).

    The final norm is applied to each tap, as probes do. Images that the patch size does not divide are padded by
    reflection, so cells at the right and lower edges span what is not there: decoders enlarge to the padded size and
    cut, see `TaskModel`.

    `bands` are those of an encoder that takes no others. With `clip_std`, standardised values are brought to [0, 1] as
    its authors did (`SensorInput`).
    """

    def __init__(
        self,
        encoder: Encoder,
        taps: Sequence[float] = DEFAULT_TAPS,
        bands: FixedBands | None = None,
        clip_std: float | None = None,
    ) -> None:
        super().__init__()
        self.bands, self.clip_std = bands, clip_std
        self.missing_bands = () if bands is None else bands.missing
        check_rising_taps(taps)
        self.depth = encoder.cfg.n_blocks
        self.encoder = encoder
        self._tapped = tap_layers(taps, self.depth)
        if len(set(self._tapped)) < len(self._tapped):
            raise ValueError(f"taps {list(taps)} name a block of this encoder of {self.depth} twice; give fewer")
        n_taps = len(self._tapped)
        self.shape = TapShape(
            (encoder.embed_dim,) * n_taps, (encoder.patch_size,) * n_taps, has_cls=encoder.cfg.cls_token
        )

    def forward(self, inputs: EncoderInput) -> TapMaps:
        """Maps `[B, D, h, w]` at each tap."""
        if self.bands is not None:
            inputs = self.bands(inputs)
        if (most := self.clip_std) is not None:
            inputs = replace(inputs, pixels=inputs.pixels.clamp(-most, most) / (2 * most) + 0.5)
        found = self.encoder.intermediates(inputs, self._tapped)
        maps = []
        for tokens in found:
            patches = tokens.patches  # [B, N, D]
            maps.append(patches.transpose(1, 2).reshape(len(patches), -1, *tokens.grid))  # [B, D, h, w]
        return TapMaps(maps, found[-1].cls if self.shape.has_cls else None)


class PixelBackbone(Backbone):
    """No features at all: the pixels, for a decoder that learns everything."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.shape, self.depth = TapShape((n_channels,), (1,)), 0

    def forward(self, inputs: EncoderInput) -> TapMaps:
        """The normalised pixels `[B, C, H, W]`."""
        return TapMaps([inputs.pixels])


def padded_to(pixels: Tensor, multiple: int) -> Tensor:
    """`pixels [B, C, H, W]`, enlarged at the right and lower edges to a multiple of `multiple` pixels.

    By reflection, as far as an image has pixels to reflect, and by repeating its edge beyond.
    """
    height, width = pixels.shape[-2:]
    right, below = -width % multiple, -height % multiple
    if right >= width or below >= height:
        return functional.pad(pixels, (0, right, 0, below), mode="replicate")
    return functional.pad(pixels, (0, right, 0, below), mode="reflect") if right or below else pixels
