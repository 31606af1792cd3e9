"""Several encoders, each trained on other bands or for another task, as one: their maps side by side.

B images, C channels, H W pixels, L levels, D width of a level, h w its cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl_eo.adapt.backbone import Backbone
from ssl_eo.adapt.band_matching import TOLERANCE, BandMismatchError, match_bands, picks_by_count
from ssl_eo.adapt.specialists import Specialist
from ssl_eo.components import one_line
from ssl_eo.eval.decoders import TapMaps, TapShape
from ssl_eo.models.vit import Encoder, EncoderInput
from ssl_eo.sensors import ChannelMeta

__all__ = ["Adaptation", "Ensemble", "Norm", "prune"]

Adaptation = Literal["wavelength", "count"]  # of bands, see ssl_eo.adapt.band_matching
# Of the maps of each specialist and level, without weights: batch by mean and spread over all images that `calibrate`
# was given, layer by those of an image.
Norm = Literal["none", "batch", "layer"]

_PYRAMID_PX = (4, 8, 16, 32)
_Picks = tuple[int, ...] | None  # channels that a specialist is shown; None: all, as they are


class Ensemble(Backbone):
    """`specialists` for images of `channels [C]`: `forward(inputs) -> TapMaps` of `shape`, concatenated at each level.

    Which channels a specialist is shown is settled here, once: encoders of any sensor see all of them, others what
    stands for their bands. Those for which nothing does are left out, and `dropped` says why, by name; `ValueError`
    where none is left. Vision transformers of one patch size keep it at all levels. Beside a pyramid, or one another of
    other patch sizes, they become one: maps are resized to cells of 4, 8, 16 and 32 pixels (`strides_px` overrides).

    A new ensemble is in eval mode. Encoders that do not train stay in it, whatever `train` is called with, and so do
    the statistics of their normalisation. `prune` leaves out those that a task does not need: they are not run.
    """

    def __init__(
        self,
        specialists: Sequence[Specialist],
        channels: ChannelMeta,
        adaptation: Adaptation = "wavelength",
        norm: Norm = "none",
        tolerance: float = TOLERANCE,
        strides_px: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        for key, value, allowed in (("adaptation", adaptation, Adaptation), ("norm", norm, Norm)):
            if value not in get_args(allowed):
                raise ValueError(f"{key} must be one of {', '.join(get_args(allowed))}, got {value!r}")
        if channels.wavelength_um.ndim != 1 or channels.valid is not None:
            raise ValueError("an ensemble is for images that all have the same channels [C], without padding")
        self.channels, self.adaptation, self.norm, self.tolerance = channels, adaptation, norm, tolerance
        self.dropped: dict[str, str] = {}
        self.specialists: list[Specialist] = []
        self._picks: list[tuple[_Picks, ...]] = []
        for specialist in specialists:
            try:
                picks = _picks_of(specialist, channels, adaptation, tolerance)
            except BandMismatchError as error:
                self.dropped[specialist.name] = str(error)
                continue
            self.specialists.append(specialist)
            self._picks.append(picks)
        if not self.specialists:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.dropped.items())
            raise ValueError(f"no specialist can be shown these {channels.n_channels} channels ({reasons})")
        self.backbones = nn.ModuleList(specialist.backbone for specialist in self.specialists)
        self.norms = nn.ModuleList(
            nn.ModuleList(_norm_layer(norm, width) for width in specialist.backbone.shape.widths)
            for specialist in self.specialists
        )
        self.depth = 0  # of no account: encoders differ in theirs, so all of their weights learn at one rate
        self.shape = self._joint_shape(strides_px)
        self._is_calibrated = False
        self.eval()

    @property
    def names(self) -> tuple[str, ...]:
        """The specialists that are part of it."""
        return tuple(specialist.name for specialist in self.specialists)

    def train(self, mode: bool = True) -> Ensemble:
        """Training mode of what trains."""
        super().train(mode)
        for backbone, norms in zip(self.backbones, self.norms, strict=True):
            if not any(p.requires_grad for p in backbone.parameters()):
                backbone.eval()
                norms.eval()
        return self

    def forward(self, inputs: EncoderInput) -> TapMaps:
        """Maps `[B, D, h, w]` at each level: of all specialists, one after the other, each as often as it is shown."""
        self._check(inputs)
        levels: list[list[Tensor]] = [[] for _ in self.shape.widths]
        for i in range(len(self.specialists)):
            for pyramid in self._pyramids(i, inputs):
                for level, norm, x in zip(levels, self.norms[i].children(), pyramid, strict=True):
                    level.append(norm(x))
        return TapMaps([torch.cat(level, 1) for level in levels])

    @property
    def owners(self) -> list[Tensor]:
        """Which specialist, by its position, each channel of each level is of: `[D]` int64."""
        counts = torch.tensor([len(picks) for picks in self._picks])
        positions = torch.arange(len(self.specialists))
        return [
            positions.repeat_interleave(torch.tensor(widths) * counts)
            for widths in zip(*(s.backbone.shape.widths for s in self.specialists), strict=True)
        ]

    def pooled(self, taps: TapMaps) -> dict[str, Tensor]:
        """Means over the maps of each specialist, all its levels side by side, `[B, D]` by name, of what it gave."""
        means = [x.mean((2, 3)) for x in taps.maps]  # [B, D] of each level
        owners = [owner.to(x.device) for owner, x in zip(self.owners, means, strict=True)]
        return {
            name: torch.cat([x[:, owner == i] for x, owner in zip(means, owners, strict=True)], 1)
            for i, name in enumerate(self.names)
        }

    @torch.no_grad()
    def calibrate(self, batches: Iterable[EncoderInput]) -> None:
        """Set the statistics of `norm: batch` to those of `batches` of training images, whatever their sizes.

        Raises `ValueError` where there are no batches, or no such norm.
        """
        if self.norm != "batch":
            raise ValueError(f"norm {self.norm} has no statistics to calibrate")
        sums = [[_Moments(width) for width in s.backbone.shape.widths] for s in self.specialists]
        was_training = self.training
        self.eval()
        try:
            for inputs in batches:
                self._check(inputs, needs_norm=False)
                for i, moments in enumerate(sums):
                    for pyramid in self._pyramids(i, inputs):
                        for moment, x in zip(moments, pyramid, strict=True):
                            moment.add(x)
        finally:
            self.train(was_training)
        if not sums[0][0].n:
            raise ValueError("an ensemble is calibrated on one batch of images at least, got none")
        for norms, moments in zip(self.norms, sums, strict=True):
            for norm, moment in zip(norms.children(), moments, strict=True):
                moment.write(norm)

    def channels_of(self, keep: Iterable[str]) -> list[Tensor]:
        """At each level the channels of the specialists `keep`: where `prune` finds its own in what `forward` gives.

        Weights of a decoder that was trained on the whole ensemble are cut to them.
        """
        kept = torch.tensor(self._positions(keep))
        return [torch.isin(owner, kept).nonzero()[:, 0] for owner in self.owners]

    def _positions(self, names: Iterable[str]) -> list[int]:
        wanted = list(names)
        for name in wanted:
            if name not in self.names:
                why = f": it was dropped, {self.dropped[name]}" if name in self.dropped else ""
                raise ValueError(f"this ensemble has no specialist {name!r}{why} ({', '.join(self.names)})")
        if not wanted:
            raise ValueError("keep one specialist at least")
        return [i for i, name in enumerate(self.names) if name in wanted]

    def _seen(self, i: int, inputs: EncoderInput) -> Iterator[Sequence[Tensor]]:
        """The maps of specialist `i`, for each choice of channels that it is shown."""
        for picks in self._picks[i]:
            shown = inputs
            if picks is not None:
                index = list(picks)
                shown = replace(inputs, pixels=inputs.pixels[:, index], channels=inputs.channels.select(index))
            taps: TapMaps = self.backbones[i](shown)
            yield taps.maps

    def _pyramids(self, i: int, inputs: EncoderInput) -> Iterator[list[Tensor]]:
        """The same in the sizes of the ensemble's levels."""
        sizes = self._sizes(inputs)
        for maps in self._seen(i, inputs):
            yield [_resized(x, size) for x, size in zip(maps, sizes, strict=True)]

    def _sizes(self, inputs: EncoderInput) -> list[tuple[int, int]]:
        height, width = inputs.pixels.shape[-2:]
        return [(height // stride, width // stride) for stride in self.shape.strides_px]

    def _joint_shape(self, strides_px: tuple[int, ...] | None) -> TapShape:
        shapes = [specialist.backbone.shape for specialist in self.specialists]
        if strides_px is None:
            is_alike = all(shape.strides_px == shapes[0].strides_px for shape in shapes)
            strides_px = shapes[0].strides_px if is_alike else _PYRAMID_PX
        for specialist, shape in zip(self.specialists, shapes, strict=True):
            if len(shape.strides_px) != len(strides_px) or any(max(strides_px) % px for px in shape.strides_px):
                found = ", ".join(map(str, shape.strides_px))
                raise ValueError(
                    f"specialist {specialist.name} has cells of {found} pixels, which do not divide those of the"
                    f" ensemble, of {max(strides_px)}: leave it out"
                )
        widths = [
            sum(shape.widths[level] * len(picks) for shape, picks in zip(shapes, self._picks, strict=True))
            for level in range(len(strides_px))
        ]
        return TapShape(tuple(widths), strides_px)

    def _check(self, inputs: EncoderInput, needs_norm: bool = True) -> None:
        pixels, channels = inputs.pixels, inputs.channels
        multiple = max(self.shape.strides_px)
        if pixels.ndim != 4 or any(size % multiple for size in pixels.shape[-2:]):
            raise ValueError(f"images must be [B, C, H, W] of multiples of {multiple} pixels, got {list(pixels.shape)}")
        if not pixels.shape[1] == channels.n_channels == self.channels.n_channels or channels.valid is not None:
            n = self.channels.n_channels
            raise ValueError(f"this ensemble was built for {n} channels without padding, got {pixels.shape[1]}")
        if channels.wavelength_um.device.type == "cpu":  # looking at values would stall a device
            for f in fields(ChannelMeta):
                built, given = getattr(self.channels, f.name), getattr(channels, f.name)
                if f.name not in ("valid", "gsd_m") and not bool((given == built.to(given.device)).all()):
                    raise ValueError(f"this ensemble was built for channels of another {f.name}: build one for these")
        if needs_norm and self.norm == "batch" and not self._is_calibrated:
            counts = [n.num_batches_tracked for n in self.norms.modules() if _is_fixed(n)]
            if any(count is not None and int(count) == 0 for count in counts):
                raise ValueError("norm: batch has no statistics yet: call calibrate with batches of training images")
            self._is_calibrated = True


def prune(ensemble: Ensemble, keep: Iterable[str]) -> Ensemble:
    """The ensemble of the specialists `keep` alone.

    It gives what `ensemble` gives in the channels `channels_of(keep)`, with their encoders and no others run. Encoders
    are shared, not copied. Raises `ValueError` for a name that the ensemble has not.
    """
    kept = ensemble._positions(keep)
    pruned = Ensemble(
        [ensemble.specialists[i] for i in kept],
        ensemble.channels,
        ensemble.adaptation,
        ensemble.norm,
        ensemble.tolerance,
        ensemble.shape.strides_px,
    )
    pruned.norms = nn.ModuleList(ensemble.norms[i] for i in kept)
    return pruned.train(ensemble.training)


def _picks_of(
    specialist: Specialist, channels: ChannelMeta, adaptation: Adaptation, tolerance: float
) -> tuple[_Picks, ...]:
    """What `specialist` is shown of images of `channels`. Raises `BandMismatchError`, which says why nothing fits."""
    encoder, n = specialist.encoder, specialist.n_channels
    if n is None:
        assert isinstance(encoder, Encoder)
        try:
            encoder.check(channels)
        except ValueError as error:
            raise BandMismatchError(one_line(error)) from None
        return (None,)
    if adaptation == "count":
        return picks_by_count(n, channels.n_channels)
    known = {name: item for name, item in specialist.inputs.items() if len(item.bands) == n}
    if not known:
        raise BandMismatchError(f"what its {n} channels measure is not known; adaptation: count asks for no more")
    reasons = []
    for name, item in known.items():
        try:
            bands = [item.sensor.bands[i] for i in item.sensor.index(item.bands)]
            return (match_bands(bands, channels, tolerance),)
        except BandMismatchError as error:
            reasons.append(f"{name}: {error}")
    raise BandMismatchError("; ".join(reasons))


def _norm_layer(norm: Norm, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width, affine=False)
    return nn.GroupNorm(1, width, affine=False) if norm == "layer" else nn.Identity()


def _is_fixed(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it is a batch norm that uses statistics, and takes none."""
    return isinstance(module, nn.BatchNorm2d) and not module.training


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The map `x [B, D, h, w]` in cells of another size."""
    if x.shape[-2:] == size:
        return x
    shrinks = size[0] < x.shape[-2]
    return functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=shrinks)


class _Moments:
    """Mean and variance of each channel over all that is added."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.sums = torch.zeros(2, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:  # [B, D, h, w]
        wide = x.double()
        self.n += x.numel() // x.shape[1]
        self.sums += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]).cpu()

    def write(self, norm: nn.Module) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        mean, square = self.sums / self.n
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean.square()).clamp_min(0.0))
        norm.num_batches_tracked.fill_(1)
