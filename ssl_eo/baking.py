"""Encoders of any sensor, made for one: kernels that are written from what the channels are become a convolution.

What they compute from images of that sensor stays the same. Statistics are not folded into the kernels: pixels that
were not measured become the mean of their band before the convolution, and DOFA's border is one of normalised zeros, so
there would be a pass over the pixels all the same; and whatever reads an encoder gives it normalised pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ssl_eo.bundle_inputs import SensorInput, with_bands
from ssl_eo.models.patch_embed import ConvConfig
from ssl_eo.models.vit import Encoder

__all__ = ["bake"]


def bake(encoder: Encoder, inputs: Mapping[str, SensorInput], sensor: str) -> tuple[Encoder, dict[str, SensorInput]]:
    """The equal of `encoder` for `sensor` alone, with a plain convolution, in eval mode; and what is left of `inputs`.

    `sensor` is one of `inputs`, by its name, or some bands of it: `name:subset` or `name:B04,B03,B02`. All weights but
    those of the patch embedding are shared. Raises `ValueError` for a sensor without statistics, and where there is no
    such convolution, as with channel attention.
    """
    known = _chosen(inputs, sensor, is_fixed=encoder.cfg.patch_embed == "conv")
    try:
        conv = encoder.patch_embed.bake(known.sensor.channel_meta(known.bands))
    except ValueError as error:
        raise ValueError(f"bake {sensor}: {error}") from None
    with torch.device("meta"):
        cfg = replace(encoder.cfg, patch_embed="conv", conv=ConvConfig(conv.padding))
        baked = Encoder(cfg, len(known.bands))
    tensors = {name: value for name, value in encoder.state_dict().items() if not name.startswith("patch_embed.")}
    tensors |= {f"patch_embed.{name}": value for name, value in conv.state_dict().items()}
    baked.load_state_dict(tensors, assign=True)
    return baked.eval(), {known.sensor.name: known}


def _chosen(inputs: Mapping[str, SensorInput], sensor: str, is_fixed: bool) -> SensorInput:
    name, _, bands = sensor.partition(":")
    if name not in inputs:
        known = ", ".join(inputs) or "none"
        raise ValueError(f"bake {sensor}: this encoder has statistics for no such sensor (known: {known})")
    if not bands:
        return inputs[name]
    is_subset = bands in inputs[name].sensor.subsets
    return with_bands(inputs[name], bands if is_subset else bands.split(","), is_fixed)
