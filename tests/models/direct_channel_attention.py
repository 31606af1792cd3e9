"""Channel attention as the paper writes it: what the factorised form is held to, and measured against.

B samples, C channels, H W pixels, h w grid, N = h*w patches, D token width, A heads, F attention width, d = F / A.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssl_eo.models.patch_embed import ChannelAttentionPatchEmbed, WeightProducts
from ssl_eo.sensors import ChannelMeta

__all__ = ["DirectChannelAttention", "direct_tokens"]


class DirectChannelAttention(ChannelAttentionPatchEmbed):
    """The same function of the same parameters, not factorised (Panopticon, arXiv 2503.10845, section 3.1)."""

    def products(self) -> None:
        return None

    def forward(
        self,
        pixels: Tensor,
        channels: ChannelMeta,
        ids_keep: Tensor | None = None,
        products: WeightProducts | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        tokens = direct_tokens(self, pixels, self.chnfus.chnemb(channels), channels.valid)  # [B, N, D]
        if ids_keep is not None:
            tokens = tokens.take_along_dim(ids_keep[..., None], 1)  # [B, K, D]
        return tokens, (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)


def direct_tokens(embed: ChannelAttentionPatchEmbed, pixels: Tensor, code: Tensor, valid: Tensor | None) -> Tensor:
    """Every channel of every patch projected, then keys and values, then attention of the query over channels.

    `[B, N, D]` of `pixels [B, C, H, W]`, with the weights of `embed`. `code` is `[C, F]` or `[B, C, F]`, `valid` is
    `[B, C]`.
    """
    conv, fusion, heads = embed.conv3d.conv3d, embed.chnfus, (embed.n_heads, -1)
    t = F.conv3d(pixels[:, None], conv.weight, conv.bias, conv.kernel_size)  # [B, F, C, h, w]
    t = t.flatten(3).permute(0, 3, 2, 1)  # [B, N, C, F]
    t = (t + code.to(t.dtype).expand(len(t), -1, -1)[:, None]).flatten(0, 1)  # [B*N, C, F]
    k, v = (
        projection(t).unflatten(-1, heads).transpose(1, 2)  # [B*N, A, C, d]
        for projection in (fusion.xattn.inproj_k, fusion.xattn.inproj_v)
    )
    q = fusion.query.view(embed.n_heads, 1, -1).to(k.dtype).expand(len(k), -1, -1, -1)  # [B*N, A, 1, d]
    if valid is not None:
        valid = valid.repeat_interleave(len(k) // len(valid), 0)[:, None, None]  # [B*N, 1, 1, C]
    mixed = F.scaled_dot_product_attention(q, k, v, valid)  # [B*N, A, 1, d]
    return embed.proj(mixed.flatten(1)).unflatten(0, (len(pixels), -1))  # [B, N, D]
