"""MAE (arXiv 2111.06377): ViT-B/16, L/16 and H/14 for RGB, as released before fine-tuning.

The files hold the encoder beside, in the full ones, the decoder of pre-training, which is left out. Positions are kept
as the table that is stored. Pixels are red, green and blue of 8 bits with the mean and standard deviation of ImageNet.
What the authors evaluate is the mean over patches, through a norm of its own that fine-tuning learns.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ssl_eo.models.vit import EncoderConfig
from ssl_eo.weights._imagenet import colour_inputs
from ssl_eo.weights.base import Released

__all__ = ["MODELS"]


def _encoder_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the decoder, whose mask token is not one of ours."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("decoder_") and not (name == "mask_token" and tensor.ndim == 3)
    }


def _released(letter: str, size: str, patch_size: int) -> Released:
    return Released(
        name=f"mae_vit{letter}{patch_size}",
        config=EncoderConfig(
            size=size,
            patch_size=patch_size,
            position="learned",
            image_size=224,
            patch_embed="conv",
        ),
        licence="CC-BY-NC-4.0",
        source="https://github.com/facebookresearch/mae",
        n_channels=3,
        inputs=colour_inputs,
        adapt=_encoder_alone,
        pool="mean",
        file_name=f"mae_(pretrain|visualize)_vit_{size}(_full)?",
    )


MODELS = (_released("b", "base", 16), _released("l", "large", 16), _released("h", "huge", 14))
