"""Specialists small enough for tests: four levels of 4 to 32 channels, or six blocks of width 16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ssl_eo.adapt.specialists import Specialist, specialist_of
from ssl_eo.bundles import SensorInput
from ssl_eo.models.convnext import ConvNeXt, ConvNeXtConfig
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.sensors import Band, ChannelMeta, Sensor, load_sensor

PYRAMID = ConvNeXtConfig(width=4, depth=1, third_depth=1)
VIT = EncoderConfig(embed_dim=16, depth=6, n_heads=2, patch_size=16, mlp_ratio=2.0, patch_embed="conv")


def sensor_input(sensor: str | Sensor, bands: Sequence[str]) -> SensorInput:
    found = load_sensor(sensor) if isinstance(sensor, str) else sensor
    n = len(bands)
    return SensorInput(found, tuple(bands), (0.5,) * n, (2.0,) * n, 10.0)


def known(sensor: str, bands: Sequence[str]) -> dict[str, SensorInput]:
    return {sensor: sensor_input(sensor, bands)}


def pyramid(name: str, n_channels: int, inputs: Mapping[str, SensorInput] | None = None, seed: int = 0) -> Specialist:
    torch.manual_seed(seed)
    encoder = ConvNeXt(PYRAMID, n_channels)
    encoder.init_weights()
    with torch.no_grad():
        for key, value in encoder.named_parameters():
            if ".grn." in key or value.ndim > 1:  # else maps of several levels would hardly differ
                value.normal_(std=0.5 if ".grn." in key else value[0].numel() ** -0.5)
    return specialist_of(name, encoder, inputs or {}, {"from": "a test"})


def vit(
    name: str,
    patch_embed: str = "conv",
    n_channels: int | None = None,
    inputs: Mapping[str, SensorInput] | None = None,
    patch_size: int = 16,
) -> Specialist:
    torch.manual_seed(1)
    cfg = EncoderConfig(**{**vars(VIT), "patch_embed": patch_embed, "patch_size": patch_size})
    encoder = Encoder(cfg, n_channels)
    encoder.init_weights()
    return specialist_of(name, encoder, inputs or {}, {"step": 1})


def channels_of(*bands: Band) -> ChannelMeta:
    return Sensor("any", "any", bands, "float32", "any", "any").channel_meta()


def images(channels: ChannelMeta, n: int = 2, size: tuple[int, int] = (32, 64), seed: int = 0) -> EncoderInput:
    generator = torch.Generator().manual_seed(seed)
    return EncoderInput(torch.randn(n, channels.n_channels, *size, generator=generator), channels, gsd_m=10.0)
