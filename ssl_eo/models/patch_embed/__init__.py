"""Pixels to tokens: a fixed convolution, channel attention for any sensor, or kernels generated from wavelengths."""

from ssl_eo.models.patch_embed.base import ConvConfig, ConvPatchEmbed, PatchEmbed, WeightProducts, cut_patches
from ssl_eo.models.patch_embed.channel_attention import ChannelAttentionConfig, ChannelAttentionPatchEmbed
from ssl_eo.models.patch_embed.dynamic import DynamicConfig, DynamicPatchEmbed

__all__ = [
    "ChannelAttentionConfig",
    "ChannelAttentionPatchEmbed",
    "ConvConfig",
    "ConvPatchEmbed",
    "DynamicConfig",
    "DynamicPatchEmbed",
    "PatchEmbed",
    "WeightProducts",
    "cut_patches",
]
