"""DINOv2 (arXiv 2304.07193), without and with four registers (arXiv 2309.16588): ViT-S, B, L and g for RGB.

Pixels are red, green and blue with the mean and standard deviation of ImageNet. The giant has a gated MLP. Models with
registers stretch their positions in another way, which no tensor tells: what they are called decides it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ssl_eo.hub import SensorInput
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.sensors import load_sensor
from ssl_eo.weights.base import Released

__all__ = ["MODELS"]

_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, where 1 is the brightest
_STD = (0.229, 0.224, 0.225)
_BRIGHTEST = 255  # of 8-bit images


def _inputs() -> Mapping[str, SensorInput]:
    """Colour images of 8 bits; the size of a pixel on the ground is unknown and makes no difference."""
    mean, std = (tuple(_BRIGHTEST * value for value in values) for values in (_MEAN, _STD))
    return {"rgb": SensorInput(load_sensor("rgb"), ("R", "G", "B"), mean, std, gsd_m=1.0)}


def _released(letter: str, n_registers: int) -> Released:
    return Released(
        name=f"dinov2_vit{letter}14{'_reg' if n_registers else ''}",
        config=EncoderConfig(
            size=_SIZES[letter],
            patch_size=14,
            mlp="swiglu" if letter == "g" else "gelu",
            n_registers=n_registers,
            layer_scale_init=1e-5,
            position="learned",
            image_size=518,
            position_resize="antialias" if n_registers else "offset",
            mask_token=True,
            patch_embed="conv",
        ),
        licence="Apache-2.0",
        source="https://github.com/facebookresearch/dinov2",
        n_channels=3,
        inputs=_inputs,
    )


MODELS = tuple(_released(letter, n_registers) for n_registers in (0, 4) for letter in _SIZES)
