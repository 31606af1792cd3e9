"""Colour images as encoders that were trained on ImageNet take them."""

from __future__ import annotations

from collections.abc import Mapping

from ssl_eo.hub import SensorInput
from ssl_eo.sensors import load_sensor

__all__ = ["colour_inputs"]

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, where 1 is the brightest
_STD = (0.229, 0.224, 0.225)
_BRIGHTEST = 255  # of 8-bit images


def colour_inputs() -> Mapping[str, SensorInput]:
    """Images of 8 bits; the size of a pixel on the ground is unknown and makes no difference."""
    mean, std = (tuple(_BRIGHTEST * value for value in values) for values in (_MEAN, _STD))
    return {"rgb": SensorInput(load_sensor("rgb"), ("R", "G", "B"), mean, std, gsd_m=1.0)}
