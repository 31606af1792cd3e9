"""What comes out of a bundle: encoders that know their sensors, and are called with stored values.

B samples, C channels, T dates, H W pixels, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssl_eo.models.cross_encoder import OpticalRadar, PoolHead
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput, Tokens
from ssl_eo.sensors import ChannelMeta, Sensor

__all__ = ["BundleEncoder", "BundlePair", "SensorInput"]


@dataclass(frozen=True)
class SensorInput:
    """What an encoder was trained on: a sensor, which of its bands in which order, and their statistics as stored.

    With `clip_std` standardised values are cut at plus and minus so many standard deviations and mapped to [0, 1], with
    the mean at 0.5.
    """

    sensor: Sensor
    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gsd_m: float
    clip_std: float | None = None

    def __post_init__(self) -> None:
        self.sensor.index(self.bands)
        n = len(self.bands)
        if len(set(self.bands)) != n:
            raise ValueError(f"bands of {self.sensor.name} are named twice: {', '.join(self.bands)}")
        if len(self.mean) != n or len(self.std) != n:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations for {n} bands")
        if not all(map(math.isfinite, self.mean)) or not all(0 < v < math.inf for v in (*self.std, self.gsd_m)):
            raise ValueError("mean must be finite, std and gsd_m positive and finite")
        if self.clip_std is not None and not 0 < self.clip_std < math.inf:
            raise ValueError(f"clip_std must be positive and finite or null, got {self.clip_std}")


class BundleEncoder(nn.Module):
    """An encoder with the sensors it knows. Call it with stored values and a sensor's name.

    `forward(images, sensor="sentinel2_l2a")` takes `[B, C, H, W]` in stored units, normalises, and returns features
    `[B, D]`: what `head` makes of the tokens, else the CLS token, else the mean over patches. As in training, pixels
    that were not measured (NaN, infinite, or a value that the sensor lists as no-data) become the mean of the band,
    which is 0 after normalising. `forward_features` and `get_intermediate_layers` return tokens. With `channels=` (a
    `ChannelMeta`) instead of `sensor=`, images are taken as normalised already.

    An encoder of series takes several dates as `[B, C, T, H, W]`. One that was told when and where takes `dates
    [B, T, 2]` (year, day of the year from 1) and `location [B, 2]` (latitude, longitude in degrees), float32, NaN for
    those not known; either may be left out.
    """

    def __init__(
        self,
        encoder: Encoder,
        inputs: Mapping[str, SensorInput],
        facts: Mapping[str, Any],
        head: PoolHead | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.inputs = dict(inputs)
        self.facts = dict(facts)

    def forward(
        self,
        images: Tensor,
        sensor: str | None = None,
        channels: ChannelMeta | None = None,
        dates: Tensor | None = None,
        location: Tensor | None = None,
    ) -> Tensor:
        """Features `[B, D]` of whole views."""
        tokens = self.forward_features(images, sensor, channels, dates, location)
        if self.head is None:
            return tokens.pooled
        features: Tensor = self.head(tokens)
        return features

    def forward_features(
        self,
        images: Tensor,
        sensor: str | None = None,
        channels: ChannelMeta | None = None,
        dates: Tensor | None = None,
        location: Tensor | None = None,
    ) -> Tokens:
        """Tokens of the last block after the final norm."""
        tokens: Tokens = self.encoder([self.prepare(images, sensor, channels, dates, location)])[0]
        return tokens

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        sensor: str | None = None,
        channels: ChannelMeta | None = None,
        norm: bool = True,
        dates: Tensor | None = None,
        location: Tensor | None = None,
    ) -> list[Tokens]:
        """Tokens of the last `n` blocks, or of the blocks `n`."""
        return self.encoder.intermediates(self.prepare(images, sensor, channels, dates, location), n, norm=norm)

    def prepare(
        self,
        images: Tensor,
        sensor: str | None = None,
        channels: ChannelMeta | None = None,
        dates: Tensor | None = None,
        location: Tensor | None = None,
    ) -> EncoderInput:
        """The encoder's input: normalised pixels and what each channel is. Raises `ValueError` for what is no input."""
        takes_series = self.encoder.cfg.takes_series
        if not isinstance(images, Tensor) or images.ndim not in ((4, 5) if takes_series else (4,)):
            found = f"shape {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            series = ", or [B, C, T, H, W] of several dates" if takes_series else ""
            raise ValueError(f"images must be a tensor [B, C, H, W]{series}, got {found}")
        _check_when_and_where(self.encoder.cfg, images, dates, location)
        if channels is not None:
            if images.shape[1] != channels.n_channels:
                raise ValueError(f"images have {images.shape[1]} channels, channels= describes {channels.n_channels}")
            return EncoderInput(images.float(), channels, gsd_m=None, dates=dates, location=location)
        known = self._input(sensor)
        if images.shape[1] != len(known.bands):
            raise ValueError(
                f"{known.sensor.name}: got {images.shape[1]} channels, expected {len(known.bands)} in this order:"
                f" {', '.join(known.bands)}"
            )
        per_band = (-1, *[1] * (images.ndim - 2))
        mean = torch.tensor(known.mean, device=images.device).view(per_band)
        std = torch.tensor(known.std, device=images.device).view(per_band)
        meta = known.sensor.channel_meta(known.bands).to(images.device)
        values = images.float()
        pixels = torch.where(known.sensor.is_measured(values), (values - mean) / std, 0.0)  # [B, C, (T,) H, W]
        if (most := known.clip_std) is not None:
            pixels = pixels.clamp(-most, most) / (2 * most) + 0.5
        return EncoderInput(pixels, meta, gsd_m=known.gsd_m, dates=dates, location=location)

    def _input(self, sensor: str | None) -> SensorInput:
        if sensor is None and len(self.inputs) == 1:
            return next(iter(self.inputs.values()))
        if not self.inputs:
            raise ValueError("this encoder has statistics for no sensor: give normalised images with channels=")
        if sensor is None:
            raise ValueError(f"this encoder knows several sensors; say which by sensor=: {', '.join(self.inputs)}")
        if sensor not in self.inputs:
            raise ValueError(
                f"sensor {sensor!r}: this encoder has statistics for {', '.join(self.inputs)}; name one of them, or"
                " give normalised images with channels="
            )
        return self.inputs[sensor]


def _check_when_and_where(cfg: EncoderConfig, images: Tensor, dates: Tensor | None, location: Tensor | None) -> None:
    """Raise `ValueError` for what does not fit the images, or would not be looked at."""
    n_samples, n_dates = images.shape[0], images.shape[2] if images.ndim == 5 else 1
    when, where = [[1900.0, 0.0], [2200.0, 366.0]], [[-90.0, -180.0], [90.0, 360.0]]
    given = {
        "dates": (dates, (n_samples, n_dates, 2), cfg.time_encoding, "year and day of the year", when),
        "location": (location, (n_samples, 2), cfg.location_encoding, "latitude and longitude", where),
    }
    for name, (values, shape, is_used, meaning, bounds) in given.items():
        if values is None:
            continue
        if not is_used:
            raise ValueError(f"{name}: this encoder was trained without it; leave it out")
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(f"{name} must be a tensor {list(shape)}, {meaning}, got {found}")
        low, high = torch.tensor(bounds, device=values.device)
        # Looking at values would stall a device.
        if values.device.type == "cpu" and bool(((values < low) | (values > high)).any()):
            raise ValueError(f"{name} are {meaning}, in this order, within {bounds[0]} and {bounds[1]}; NaN if unknown")


class BundlePair(nn.Module):
    """The encoders of two groups of sensors, and the one that joins them: those of CROMA.

    `optical(images)` and `radar(images)` are each a `BundleEncoder` whose features are those of its pooling head.
    `joint(optical_images, radar_images)`, which is also what a call does, gives the mean `[B, D]` of the tokens that
    `joint_features` returns: one for each radar patch, with what the optical view adds. `encoder` is the published one.
    """

    def __init__(
        self, model: OpticalRadar, inputs: Mapping[str, Mapping[str, SensorInput]], facts: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.optical = BundleEncoder(model.optical, inputs["optical"], facts, model.optical_head)
        self.radar = BundleEncoder(model.radar, inputs["radar"], facts, model.radar_head)
        self.cross = model.cross
        self.facts = dict(facts)

    @property
    def encoder(self) -> Encoder:
        """The one that is published: the optical one unless the bundle says otherwise."""
        return self.published.encoder

    @property
    def published(self) -> BundleEncoder:
        """The optical one, with the sensors it knows, unless the bundle says the radar one."""
        return self.radar if self.facts.get("published") == "radar" else self.optical

    @property
    def parts(self) -> dict[str, nn.Module]:
        """All that has weights, by the names that it has in training (`ssl_eo.objectives.croma`)."""
        model = self.model
        is_radar = self.encoder is model.radar
        return {
            "optical_encoder" if is_radar else "encoder": model.optical,
            "encoder" if is_radar else "radar_encoder": model.radar,
            "cross_encoder": model.cross,
            "optical_head": model.optical_head,
            "radar_head": model.radar_head,
        }

    @property
    def model(self) -> OpticalRadar:
        """The parts as one model, as `write_pair_bundle` takes them."""
        assert self.optical.head is not None
        assert self.radar.head is not None
        return OpticalRadar(self.optical.encoder, self.radar.encoder, self.cross, self.optical.head, self.radar.head)

    def forward(
        self,
        optical: Tensor,
        radar: Tensor,
        optical_sensor: str | ChannelMeta | None = None,
        radar_sensor: str | ChannelMeta | None = None,
    ) -> Tensor:
        """Features `[B, D]` of both views together."""
        return self.joint(optical, radar, optical_sensor, radar_sensor)

    def joint(
        self,
        optical: Tensor,
        radar: Tensor,
        optical_sensor: str | ChannelMeta | None = None,
        radar_sensor: str | ChannelMeta | None = None,
    ) -> Tensor:
        """Features `[B, D]` of both views together: the mean over the tokens of `joint_features`."""
        return self.joint_features(optical, radar, optical_sensor, radar_sensor).pooled

    def joint_features(
        self,
        optical: Tensor,
        radar: Tensor,
        optical_sensor: str | ChannelMeta | None = None,
        radar_sensor: str | ChannelMeta | None = None,
    ) -> Tokens:
        """Tokens of the cross encoder, for images `[B, C, H, W]` of one ground and of one size.

        A sensor is a name, or a `ChannelMeta` for images that are normalised already; it may be left out where a group
        has one.
        """
        tokens: Tokens = self.cross(
            _features(self.radar, radar, radar_sensor), _features(self.optical, optical, optical_sensor)
        )
        return tokens


def _features(part: BundleEncoder, images: Tensor, sensor: str | ChannelMeta | None) -> Tokens:
    if isinstance(sensor, ChannelMeta):
        return part.forward_features(images, channels=sensor)
    return part.forward_features(images, sensor)
