"""What comes out of a bundle, and of torch.hub: encoders that know their sensors, and are called with stored values.

B samples, C channels, T dates, H W pixels, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from ssl_eo.bundle_inputs import (
    SensorInput,
    StoredValuesWarning,
    check_when_and_where,
    doubt_of,
    normalised,
    of_wavelengths,
    with_bands,
)
from ssl_eo.models.cross_encoder import OpticalRadar, PoolHead
from ssl_eo.models.panopticon_dict import open_dictionary, published_features, published_layers
from ssl_eo.models.vit import Encoder, EncoderInput, Tokens
from ssl_eo.sensors import ChannelMeta, load_sensor

__all__ = ["BundleEncoder", "BundlePair", "SensorInput"]


class _Said(TypedDict, total=False):
    """What may be said of images beside the name of their sensor; `BundleEncoder.prepare` says what it means."""

    channels: ChannelMeta | None
    dates: Tensor | None
    location: Tensor | None
    bands: str | Sequence[str] | None
    wavelengths_um: Sequence[float] | None


class BundleEncoder(nn.Module):
    """An encoder with the sensors it knows. Call it with stored values and a sensor's name.

    `forward(images, sensor="sentinel2_l2a")` takes `[B, C, H, W]` in stored units, normalises, and returns features
    `[B, D]`: what `head` makes of the tokens, else the CLS token, else the mean over patches. As in training, pixels
    that were not measured (NaN, infinite, or a value that the sensor lists as no-data) become the mean of the band,
    which is 0 after normalising. `bands` are those of the images, in their order, where these are not all that the
    encoder knows. `forward_features` and `get_intermediate_layers` return tokens.

    Images are taken as normalised already where `channels=` (a `ChannelMeta`) or `wavelengths_um=` says what they are,
    and by an encoder that has statistics for no sensor, such as Panopticon's, whatever says it.

    An encoder with `patch_embed: channel_attention` also takes the dictionary of Panopticon's code, and then gives what
    that code gives, by its names and shapes: see `ssl_eo.models.panopticon_dict`.

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
        self._looked_at: set[str] = set()  # names of sensors

    def forward(self, images: Tensor | Mapping[str, Any], sensor: str | None = None, **said: Unpack[_Said]) -> Tensor:
        """Features `[B, D]` of whole views."""
        tokens: Tokens = self.encoder([self.prepare(images, sensor, **said)])[0]
        if self.head is None:
            return tokens.pooled
        features: Tensor = self.head(tokens)
        return features

    @overload
    def forward_features(self, images: Tensor, sensor: str | None = None, **said: Unpack[_Said]) -> Tokens: ...

    @overload
    def forward_features(self, images: Mapping[str, Any]) -> dict[str, Tensor | None]: ...

    def forward_features(
        self, images: Tensor | Mapping[str, Any], sensor: str | None = None, **said: Unpack[_Said]
    ) -> Tokens | dict[str, Tensor | None]:
        """Tokens of the last block after the final norm; of a dictionary, the dictionary of published code."""
        item = self.prepare(images, sensor, **said)
        if isinstance(images, Mapping):
            (raw,) = self.encoder.intermediates(item, 1, norm=False)
            return published_features(raw, self.encoder.norm(raw.x))
        tokens: Tokens = self.encoder([item])[0]
        return tokens

    @overload
    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        *,
        norm: bool = True,
        sensor: str | None = None,
        **said: Unpack[_Said],
    ) -> list[Tokens]: ...

    @overload
    def get_intermediate_layers(
        self,
        images: Mapping[str, Any],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]: ...

    def get_intermediate_layers(
        self,
        images: Tensor | Mapping[str, Any],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
        sensor: str | None = None,
        **said: Unpack[_Said],
    ) -> list[Tokens] | tuple[Any, ...]:
        """Tokens of the last `n` blocks, or of the blocks `n`.

        Of a dictionary their patches `[B, N, D]`; with `reshape` maps `[B, D, h, w]`, with `return_class_token` pairs
        of them and the CLS token. Raises `ValueError` for these two with a tensor: `Tokens` have both.
        """
        layers = self.encoder.intermediates(self.prepare(images, sensor, **said), n, norm=norm)
        if isinstance(images, Mapping):
            return published_layers(layers, reshape, return_class_token)
        if reshape or return_class_token:
            raise ValueError(
                "reshape and return_class_token are for a dictionary of imgs and chn_ids; Tokens of a tensor have"
                " .cls, and .patches with their .grid"
            )
        return layers

    def prepare(
        self,
        images: Tensor | Mapping[str, Any],
        sensor: str | None = None,
        channels: ChannelMeta | None = None,
        dates: Tensor | None = None,
        location: Tensor | None = None,
        bands: str | Sequence[str] | None = None,
        wavelengths_um: Sequence[float] | None = None,
    ) -> EncoderInput:
        """The encoder's input: normalised pixels and what each channel is. Raises `ValueError` for what is no input.

        One of `sensor` (with `bands`: names, or the name of a subset), `channels` and `wavelengths_um` (of optical and
        thermal bands, in micrometres) says what the channels are; a dictionary says it itself.
        """
        said = {"sensor": sensor, "bands": bands, "channels": channels, "wavelengths_um": wavelengths_um}
        given = [name for name, value in said.items() if value is not None]
        if sensor is not None and not isinstance(sensor, str):
            raise ValueError(
                f"sensor must be a name, got a {type(sensor).__name__}; wavelengths in micrometres are given by"
                " wavelengths_um=, and a ChannelMeta by channels="
            )
        if isinstance(images, Mapping):
            return self._of_dictionary(images, given, dates, location)
        takes_series = self.encoder.cfg.takes_series
        if not isinstance(images, Tensor) or images.ndim not in ((4, 5) if takes_series else (4,)):
            found = f"shape {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            series = ", or [B, C, T, H, W] of several dates" if takes_series else ""
            raise ValueError(f"images must be a tensor [B, C, H, W]{series}, got {found}")
        if 0 in images.shape or images.is_complex():
            raise ValueError(
                f"images must be real numbers, at least one of each dimension, got {list(images.shape)} {images.dtype}"
            )
        if len(given) > 1 and given != ["sensor", "bands"]:
            raise ValueError(
                f"got {' and '.join(given)}: give sensor with or without bands, channels or wavelengths_um"
            )
        check_when_and_where(self.encoder.cfg, images, dates, location)
        if channels is None and (wavelengths_um is not None or (sensor is not None and not self.inputs)):
            channels = self._described(sensor, bands, wavelengths_um).to(images.device)
        if channels is not None:
            if images.shape[1] != (n_channels := channels.n_channels):
                what = next(name for name in given if name != "sensor" or len(given) == 1)
                raise ValueError(f"images have {images.shape[1]} channels, {what}= describes {n_channels}")
            return EncoderInput(images.float(), channels, gsd_m=None, dates=dates, location=location)
        known = with_bands(self._input(sensor), bands, is_fixed=self.encoder.cfg.patch_embed == "conv")
        self._look_once(images, known)
        return normalised(images, known, dates, location)

    def _look_once(self, images: Tensor, known: SensorInput) -> None:
        """Warn of what can hardly be stored values, by the first images of each sensor: to look takes time on a GPU."""
        if known.sensor.name in self._looked_at or torch.compiler.is_compiling():
            return
        self._looked_at.add(known.sensor.name)
        if doubt := doubt_of(images, known.sensor):
            warnings.warn(doubt, StoredValuesWarning, stacklevel=3)

    def _described(
        self, sensor: str | None, bands: str | Sequence[str] | None, wavelengths_um: Sequence[float] | None
    ) -> ChannelMeta:
        """The channels of images that are normalised already."""
        if self.encoder.cfg.patch_embed == "conv":
            raise ValueError(
                "this encoder (patch_embed: conv) was built for one set of bands and cannot look at what others are:"
                " give images of those with channels="
            )
        if wavelengths_um is not None:
            return of_wavelengths(wavelengths_um)
        assert sensor is not None
        found = load_sensor(sensor)
        return found.channel_meta(found.resolve_bands(bands))

    def _of_dictionary(
        self, images: Mapping[str, Any], given: list[str], dates: Tensor | None, location: Tensor | None
    ) -> EncoderInput:
        if given or dates is not None or location is not None:
            raise ValueError("a dictionary of imgs and chn_ids says all that there is to say: leave the rest out")
        if (found := self.encoder.cfg.patch_embed) != "channel_attention":
            raise ValueError(
                f"chn_ids are Panopticon's names of channels, which this encoder (patch_embed: {found}) was not trained"
                " with: give a tensor, and sensor= or channels="
            )
        return EncoderInput(*open_dictionary(images))

    def _input(self, sensor: str | None) -> SensorInput:
        if sensor is None and len(self.inputs) == 1:
            return next(iter(self.inputs.values()))
        if not self.inputs:
            raise ValueError(
                "this encoder has statistics for no sensor: give normalised images with channels=, sensor= or"
                " wavelengths_um="
            )
        if sensor is None:
            raise _which_of(self.inputs, "sensor")
        if sensor not in self.inputs:
            raise ValueError(
                f"sensor {sensor!r:.80}: this encoder has statistics for {', '.join(self.inputs)}; name one of them, or"
                " give normalised images with channels="
            )
        return self.inputs[sensor]


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
    def inputs(self) -> dict[str, dict[str, SensorInput]]:
        """What each encoder was trained on, by group and sensor."""
        return {"optical": self.optical.inputs, "radar": self.radar.inputs}

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
            _features(self.radar, radar, radar_sensor, "radar_sensor"),
            _features(self.optical, optical, optical_sensor, "optical_sensor"),
        )
        return tokens


def _features(part: BundleEncoder, images: Tensor, sensor: str | ChannelMeta | None, argument: str) -> Tokens:
    """Tokens of one view, whose sensor was given as `argument`."""
    if sensor is None and len(part.inputs) > 1:
        raise _which_of(part.inputs, argument)
    if isinstance(sensor, ChannelMeta):
        return part.forward_features(images, channels=sensor)
    return part.forward_features(images, sensor)


def _which_of(inputs: Mapping[str, SensorInput], argument: str) -> ValueError:
    return ValueError(f"this encoder knows several sensors; say which by {argument}=: {', '.join(inputs)}")
