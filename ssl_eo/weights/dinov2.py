"""DINOv2 (arXiv 2304.07193), without and with four registers (arXiv 2309.16588): ViT-S, B, L and g for RGB.

Pixels are red, green and blue with the mean and standard deviation of ImageNet. The giant has a gated MLP. Models with
registers stretch their positions in another way, which no tensor tells: what they are called decides it.
"""

from __future__ import annotations

from ssl_eo.models.vit import EncoderConfig
from ssl_eo.weights._imagenet import colour_inputs
from ssl_eo.weights.base import Released

__all__ = ["MODELS"]

_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}


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
        inputs=colour_inputs,
        file_name=f"dinov2_vit{letter}14{'_reg4' if n_registers else ''}_pretrain",
    )


MODELS = tuple(_released(letter, n_registers) for n_registers in (0, 4) for letter in _SIZES)
