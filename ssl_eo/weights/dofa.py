"""DOFA (arXiv 2403.15356): ViT-B and L for any sensor, by kernels generated from wavelengths.

Of version 1, patches of 16 pixels, two things that no tensor tells decide what they compute, and what they are called
decides these:

- `dofa_vitb16`, `dofa_vitl16`: generated numbers are read channel by channel. Torchgeo has these since September 2024.
- `dofa_vitb16_legacy`, `dofa_vitl16_legacy`: weights of before, whose code read the numbers as if width came first.

Both know every SAR channel by the placeholder 3.75 um, so that the generator cannot tell VV from VH, and both look at
images with a border of one pixel. All of that is in `model.dynamic` of the bundle. Wavelengths are those of the
training, which are rounded: a nanometre more is another code.

A file may be the authors' (with `norm`, `mask_token` and `projector`), torchgeo's (without any norm), or of a
classifier that began from it (with `fc_norm` and `head`). `norm` is taken if it is there, else `fc_norm`, else one of
gain 1 and bias 0. Published code pools before `fc_norm`: its features are `encoder.norm(tokens.patches.mean(1))` of
`intermediates(..., norm=False)`; ours are the mean of normalised tokens.

Version 2 (`dofa_v2_vitb14`, `dofa_v2_vitl14`) has patches of 14 pixels, LayerScale, and 5.405 um for SAR; the rest is
that of `dofa_vitb16`. In its files the transformer is called `model`, and stands beside `patch_embed` and a `norm` that
published code never uses. Nobody says how its pixels were standardised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ssl_eo.hub import SensorInput
from ssl_eo.models.patch_embed import DynamicConfig
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.sensors import POLARIZATIONS, Band, Sensor
from ssl_eo.weights.base import Released

__all__ = ["MODELS"]

_SIZES = {"b": "base", "l": "large"}
# Torchgeo's files, which carry these digits in their names: current and legacy.
_SHA256 = {("b", ""): "a0275954", ("l", ""): "0ff904d3", ("b", "_legacy"): "7cc0f413", ("l", "_legacy"): "fbd47fa9"}
# What pretraining had beside the encoder, and the head of a classifier.
_NOT_OF_THE_ENCODER = re.compile(r"^(mask_token$|(head|projector|decoder_\w+|teacher)\.|decoder_pos_embed$)")
_SOURCE = "https://github.com/zhu-xlab/DOFA"


# Of each sensor: what it is, metres a pixel, and of each band the wavelength (um), mean and standard deviation. Values
# are as the authors' code has them; it is at odds with itself about the bands of its hyperspectral images.
_SENSORS: dict[str, tuple[str, float, dict[str, tuple[float, float, float]]]] = {
    "sentinel2": (
        "Sentinel-2 of SatlasPretrain in 8 bits: true colour; other bands are Level-1C values / 32, saturated at 255",
        10.0,
        {
            "B04": (0.665, 114.1099739, 77.84352553),
            "B03": (0.56, 114.81779093, 69.96844919),
            "B02": (0.49, 126.63977424, 67.42465279),
            "B05": (0.705, 84.33539309, 64.57022983),
            "B06": (0.74, 97.84789168, 61.72545487),
            "B07": (0.783, 103.94461911, 61.34187099),
            "B08": (0.842, 101.435633, 60.29744676),
            "B11": (1.61, 72.32804172, 47.88519516),
            "B12": (2.19, 56.66528851, 42.55886798),
        },
    ),
    "sentinel1": (
        "Sentinel-1 of SatlasPretrain in 8 bits",
        10.0,
        {"VH": (55_466.0, 166.36275909, 64.83126309), "VV": (55_466.0, 88.45542715, 43.07350145)},
    ),
    "rgb": (
        "Aerial images (NAIP) in 8 bits, with the statistics of ImageNet",
        1.0,
        {"R": (0.665, 123.675, 58.395), "G": (0.56, 116.28, 57.12), "B": (0.49, 103.53, 57.375)},
    ),
    "gaofen2": (
        "Gaofen-2 of Five-Billion-Pixels in 8 bits",
        4.0,
        {
            "B1": (0.49, 123.94924583, 67.34487297),
            "B2": (0.56, 92.58088583, 62.8271046),
            "B3": (0.665, 97.28130189, 60.5856767),
            "B4": (0.83, 90.31526596, 60.3946299),
        },
    ),
}


def _inputs() -> Mapping[str, SensorInput]:
    """What it was pretrained on: stored values, and the statistics that standardise them."""
    return {name: _input(name, *known) for name, known in _SENSORS.items()}


def _input(name: str, title: str, gsd_m: float, known: Mapping[str, tuple[float, float, float]]) -> SensorInput:
    bands = []
    for band, (um, _, _) in known.items():
        is_sar = band in POLARIZATIONS
        kind, polarization = ("sar", band) if is_sar else ("optical", None)
        bands.append(Band(band, kind, gsd_m, wavelength_um=um, polarization=polarization))
    sensor = Sensor(name, title, tuple(bands), "uint8", "digital number", _SOURCE)
    _, mean, std = zip(*known.values(), strict=True)
    return SensorInput(sensor, sensor.band_names, mean, std, gsd_m)


def _encoder_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors, with the one norm that there is."""
    kept = {name: tensor for name, tensor in tensors.items() if not _NOT_OF_THE_ENCODER.match(name)}
    fc_norm = {key: kept.pop(f"fc_norm.{key}", None) for key in ("weight", "bias")}
    is_whole = all(value is not None for value in fc_norm.values()) or all(value is None for value in fc_norm.values())
    if kept.keys().isdisjoint(("norm.weight", "norm.bias")) and is_whole and "cls_token" in kept:
        width = kept["cls_token"].shape[-1]
        initial = {"weight": torch.ones(width), "bias": torch.zeros(width)}
        kept |= {f"norm.{key}": initial[key] if value is None else value for key, value in fc_norm.items()}
    return kept


def _encoder_of_version_2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("norm.weight", "norm.bias")}
    return {name.removeprefix("model."): tensor for name, tensor in kept.items()}


def _file_of_version_2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the norm that is never used as it begins."""
    named = {n if n.startswith("patch_embed.") else f"model.{n}": tensor for n, tensor in tensors.items()}
    gain = tensors["norm.weight"]
    return {**named, "norm.weight": torch.ones_like(gain), "norm.bias": torch.zeros_like(gain)}


def _released(letter: str, suffix: str) -> Released:
    return Released(
        name=f"dofa_vit{letter}16{suffix}",
        config=EncoderConfig(
            size=_SIZES[letter],
            patch_size=16,
            position="learned",
            image_size=224,
            patch_embed="dynamic",
            dynamic=DynamicConfig(layout="legacy" if suffix else "channel_major", padding=1, sar="dofa_v1"),
        ),
        licence="CC-BY-4.0",
        source=_SOURCE,
        inputs=_inputs,
        adapt=_encoder_of,
        pool="mean",
        sha256=(_SHA256[letter, suffix],),
        file_name=f"dofa_{_SIZES[letter]}_patch16_224-{_SHA256[letter, suffix]}",  # torchgeo's
    )


def _released_2(letter: str) -> Released:
    return Released(
        name=f"dofa_v2_vit{letter}14",
        config=EncoderConfig(
            size=_SIZES[letter],
            patch_size=14,
            layer_scale_init=1e-5,
            position="learned",
            image_size=224,
            patch_embed="dynamic",
            dynamic=DynamicConfig(layout="channel_major", padding=1, sar="dofa_v2"),
        ),
        licence="CC-BY-4.0",
        source=_SOURCE,
        token="model.cls_token",
        adapt=_encoder_of_version_2,
        restore=_file_of_version_2,
        pool="mean",
        file_name=f"dofav2_vit_{_SIZES[letter]}_e150",
    )


MODELS = (
    *(_released(letter, suffix) for suffix in ("", "_legacy") for letter in _SIZES),
    *map(_released_2, _SIZES),
)
