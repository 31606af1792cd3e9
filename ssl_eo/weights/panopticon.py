"""Panopticon (arXiv 2503.10845): a ViT-B/14 for any sensor, continued from DINOv2.

The file `panopticon_vitb14_teacher.pth` holds 183 tensors. Pixels are standardised by band, with the statistics of the
dataset at hand. Panopticon names a channel by one number, which our patch embedding derives from `ChannelMeta`: whole
nanometres, or -1 to -12 for VV, VH, HH, HV of an unknown orbit, then of ascending ones, then of descending ones.
"""

from __future__ import annotations

from ssl_eo.models.patch_embed import ChannelAttentionConfig
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.weights.base import Released

__all__ = ["MODELS"]

MODELS = (
    Released(
        name="panopticon_vitb14",
        config=EncoderConfig(
            size="base",
            patch_size=14,
            layer_scale_init=1e-5,
            position="learned",
            image_size=518,  # of DINOv2, where its training began; it was trained at 224
            mask_token=True,
            patch_embed="channel_attention",
            channel_attention=ChannelAttentionConfig(attn_dim=2304, n_heads=16),
        ),
        licence="CC-BY-4.0",
        source="https://github.com/Panopticon-FM/panopticon",
        file_name="panopticon_vitb14_teacher",
    ),
)
