"""Channel attention for any sensor (Panopticon, arXiv 2503.10845), at the cost of a convolution.

B samples, C channels, H W pixels, p patch size, E = p*p, N patches, K visible patches (N when nothing is hidden),
D token width, A heads, F attention width, d = F / A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.models.layers import init_layers
from ssl_eo.models.patch_embed.base import ConvPatchEmbed, PatchEmbed, WeightProducts, cut_patches, select_code
from ssl_eo.models.position import sincos
from ssl_eo.sensors import ChannelMeta

__all__ = ["ChannelAttentionConfig", "ChannelAttentionPatchEmbed"]


@dataclass
class ChannelAttentionConfig:
    """Panopticon's embedding: channels attend to one learned query. Defaults are those of the released model."""

    attn_dim: int = 2304  # width of keys and values, split over the heads
    n_heads: int = 16  # of the attention over channels; divides attn_dim
    elevation: bool = False  # a learned row for elevation channels, which the released model does not have

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.attn_dim < 1 or self.attn_dim % (2 * self.n_heads):
            raise ValueError(f"attn_dim must be a multiple of 2 * n_heads, got {self.attn_dim} and {self.n_heads}")


class ChannelCode(nn.Module):
    """The vector that says what a channel is: sin-cos of whole nanometres, or learned rows for SAR (Panopticon).

    SAR is [transmit | receive | orbit], a third each; an unknown orbit is the mean of both.
    """

    def __init__(self, dim: int, elevation: bool) -> None:
        super().__init__()
        self.dim = dim
        third = dim // 3
        self.embed_transmit = nn.Parameter(torch.empty(2, third))
        self.embed_receive = nn.Parameter(torch.empty(2, third))
        self.embed_orbit = nn.Parameter(torch.empty(2, dim - 2 * third))
        self.embed_elevation = nn.Parameter(torch.empty(1, dim)) if elevation else None

    def forward(self, channels: ChannelMeta) -> Tensor:
        """`[C, F]`, or `[B, C, F]` where the channels of samples differ."""
        # The small term undoes the rounding of float32 micrometres: 0.443 um is 443 nm, not 442.
        nanometres = (channels.wavelength_um.double() * 1000.0 + 1e-3).floor().float()
        optical = sincos(nanometres, self.dim).to(self.embed_orbit.dtype)
        both_orbits = torch.cat((self.embed_orbit, self.embed_orbit.mean(0, keepdim=True)))  # row -1: unknown
        # POLARIZATIONS is transmit then receive: VV, VH, HH, HV.
        transmit = channels.polarization.clamp_min(0) // 2
        receive = transmit ^ (channels.polarization.clamp_min(0) % 2)
        sar = torch.cat((self.embed_transmit[transmit], self.embed_receive[receive], both_orbits[channels.orbit]), -1)
        return select_code(channels, optical, sar, self.embed_elevation)


class _ChannelTokenizer(nn.Module):
    """Holds the projection of one channel's patch under the released name `conv3d.conv3d`."""

    def __init__(self, attn_dim: int, patch_size: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1, attn_dim, (1, patch_size, patch_size))


class _KeysValues(nn.Module):
    """Holds the key and value projections under the released names."""

    def __init__(self, attn_dim: int) -> None:
        super().__init__()
        self.inproj_k = nn.Linear(attn_dim, attn_dim, bias=False)
        self.inproj_v = nn.Linear(attn_dim, attn_dim, bias=False)


class _ChannelFusion(nn.Module):
    """Holds the query, the channel codes and the projections under the released names."""

    def __init__(self, cfg: ChannelAttentionConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, cfg.attn_dim))
        self.chnemb = ChannelCode(cfg.attn_dim, cfg.elevation)
        self.xattn = _KeysValues(cfg.attn_dim)


class ChannelAttentionPatchEmbed(PatchEmbed):
    """One learned query attends over the channels of each patch (Panopticon, arXiv 2503.10845, section 3.1).

    In the paper every channel of every patch is projected to F dimensions, then to keys and values. Up to the softmax
    all of that is linear in the pixels and the query is a parameter, so the same function is evaluated here on the
    pixels themselves: a logit per head is one dot product with a patch, and the softmax mixes patches, not values. The
    cost is that of a convolution. Parameters have the names and shapes of the released model.
    """

    def __init__(self, embed_dim: int, patch_size: int, cfg: ChannelAttentionConfig | None = None) -> None:
        super().__init__(embed_dim, patch_size)
        cfg = cfg or ChannelAttentionConfig()
        self.n_heads = cfg.n_heads
        self.has_elevation = cfg.elevation
        self.conv3d = _ChannelTokenizer(cfg.attn_dim, patch_size)
        self.chnfus = _ChannelFusion(cfg)
        self.proj = nn.Linear(cfg.attn_dim, embed_dim)

    def products(self) -> WeightProducts:
        query, to_k, to_v, to_out, to_token = self._weights()
        with torch.autocast(query.device.type, enabled=False):  # logits decide; keep them exact
            code_logits = torch.einsum("ad,adf->af", query, to_k) / math.sqrt(query.shape[1])  # [A, F]
            pixel_logits = code_logits @ to_token  # [A, E]
        values = torch.unflatten(to_v.flatten(0, 1) @ to_token, 0, (self.n_heads, -1))  # [A, d, E]
        pixel_values = torch.einsum("oad,ade->oae", to_out, values).to(self.proj.weight.dtype)  # [D, A, E]
        return WeightProducts(pixel_logits, code_logits, pixel_values)

    def forward(
        self,
        pixels: Tensor,
        channels: ChannelMeta,
        ids_keep: Tensor | None = None,
        products: WeightProducts | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """A padded channel (`channels.valid` False) must hold finite pixels; it has no influence."""
        if channels.kind.device.type == "cpu":
            self.check(channels)
        products = products or self.products()
        patches, grid = cut_patches(pixels, self.patch_size, ids_keep)  # [B, K, C, E]
        bias = self.conv3d.conv3d.bias
        assert bias is not None
        code = self.chnfus.chnemb(channels) + bias  # [C, F] or [B, C, F]
        dtype = self.proj.weight.dtype
        weight = self._attend(patches, code, channels.valid, products).to(dtype)  # [B, K, A, C]
        mixed = (weight @ patches.to(dtype)).flatten(2)  # [B, K, A*E]
        tokens = F.linear(mixed, products.pixel_values.flatten(1), self.proj.bias)  # [B, K, D]
        return tokens + weight.flatten(2) @ self._code_values(code), grid

    def bake(self, channels: ChannelMeta) -> ConvPatchEmbed:
        raise ValueError(
            "channel attention cannot be baked into a convolution: how it weighs the channels depends on the pixels"
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        init_layers(self)
        conv = self.conv3d.conv3d
        assert conv.bias is not None
        bound = 1.0 / self.patch_size  # of a convolution with one input channel: 1 / sqrt(fan_in)
        nn.init.uniform_(conv.weight, -bound, bound)
        nn.init.uniform_(conv.bias, -bound, bound)
        nn.init.normal_(self.chnfus.query)
        for parameter in self.chnfus.chnemb.parameters():
            nn.init.zeros_(parameter)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Query `[A, d]`, W_k and W_v `[A, d, F]`, W_out `[D, A, d]`, W_token `[F, E]`, in float32 at least."""
        split = (self.n_heads, -1)
        weights = (
            self.chnfus.query.view(split),
            torch.unflatten(self.chnfus.xattn.inproj_k.weight, 0, split),
            torch.unflatten(self.chnfus.xattn.inproj_v.weight, 0, split),
            torch.unflatten(self.proj.weight, 1, split),
            self.conv3d.conv3d.weight.flatten(1),
        )
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        query, to_k, to_v, to_out, to_token = (w.to(dtype) for w in weights)
        return query, to_k, to_v, to_out, to_token

    def _attend(self, patches: Tensor, code: Tensor, valid: Tensor | None, products: WeightProducts) -> Tensor:
        """Weights of the channels per head, softmax over valid ones: `[B, K, A, C]`, float32 at least."""
        with torch.autocast(patches.device.type, enabled=False):
            dtype = products.pixel_logits.dtype
            by_code = code.to(dtype) @ products.code_logits.T  # [C, A] or [B, C, A]
            logits = patches.to(dtype) @ products.pixel_logits.T  # [B, K, C, A]
            logits = logits + (by_code if by_code.ndim == 2 else by_code[:, None])
            if valid is not None:
                # Not -inf: where a view shows no band that holds data, a softmax over nothing would be NaN.
                logits = logits.masked_fill(~valid[:, None, :, None], torch.finfo(logits.dtype).min)
            return logits.transpose(2, 3).softmax(-1)

    def _code_values(self, code: Tensor) -> Tensor:
        """What a head adds to a token per unit weight on a channel: `[A*C, D]` or `[B, A*C, D]`."""
        values = torch.unflatten(self.chnfus.xattn.inproj_v(code), -1, (self.n_heads, -1))  # [..., C, A, d]
        to_out = torch.unflatten(self.proj.weight, 1, (self.n_heads, -1))  # [D, A, d]
        return torch.einsum("...cad,oad->...aco", values, to_out).flatten(-3, -2)
