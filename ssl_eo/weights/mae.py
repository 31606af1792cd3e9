"""MAE (arXiv 2111.06377): ViT-B/16, L/16 and H/14 for RGB, as released before fine-tuning.

The files hold the encoder beside, in the full ones, the decoder of pre-training, which is left out. Positions are kept
as the table that is stored. Pixels are red, green and blue of 8 bits with the mean and standard deviation of ImageNet.
What the authors evaluate is the mean over patches, through a norm of its own that fine-tuning learns.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ssl_eo.hub import SensorInput
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.sensors import load_sensor
from ssl_eo.weights.base import Released

__all__ = ["MODELS"]

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, where 1 is the brightest
_STD = (0.229, 0.224, 0.225)
_BRIGHTEST = 255  # of 8-bit images


def _inputs() -> Mapping[str, SensorInput]:
    """Colour images of 8 bits; the size of a pixel on the ground is unknown and makes no difference."""
    mean, std = (tuple(_BRIGHTEST * value for value in values) for values in (_MEAN, _STD))
    return {"rgb": SensorInput(load_sensor("rgb"), ("R", "G", "B"), mean, std, gsd_m=1.0)}


def _encoder_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the decoder, whose mask token is not one of ours."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("decoder_") and not (name == "mask_token" and tensor.ndim == 3)
    }


def _released(letter: str, width: int, depth: int, n_heads: int, patch_size: int) -> Released:
    return Released(
        name=f"mae_vit{letter}{patch_size}",
        config=EncoderConfig(
            embed_dim=width,
            depth=depth,
            n_heads=n_heads,
            patch_size=patch_size,
            position="learned",
            image_size=224,
            patch_embed="conv",
        ),
        licence="CC-BY-NC-4.0",
        source="https://github.com/facebookresearch/mae",
        n_channels=3,
        inputs=_inputs,
        adapt=_encoder_alone,
        pool="mean",
    )


MODELS = (_released("b", 768, 12, 12, 16), _released("l", 1024, 24, 16, 16), _released("h", 1280, 32, 16, 14))
