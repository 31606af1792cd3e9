"""A convolution generated from wavelengths (DOFA, arXiv 2403.15356).

B samples, C channels, H W pixels, p patch size, E = p*p, N patches, K visible patches (N when nothing is hidden),
D token width, G generator width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.models.layers import init_layers
from ssl_eo.models.patch_embed.base import (
    SAR,
    ConvConfig,
    ConvPatchEmbed,
    PatchEmbed,
    WeightProducts,
    cut_patches,
    select_code,
)
from ssl_eo.models.position import sincos
from ssl_eo.sensors import ORBITS, POLARIZATIONS, ChannelMeta

__all__ = ["GAIN", "DynamicConfig", "DynamicPatchEmbed", "KernelGenerator", "init_generator"]

GAIN = 0.01  # of all that is generated, fixed in the paper's code


@dataclass
class DynamicConfig:
    """DOFA's embedding: a small transformer writes the convolution from the wavelengths."""

    generator_dim: int = 128  # width of the transformer that generates kernels
    n_weight_tokens: int = 128  # its learned tokens, beside one per band
    n_heads: int = 4  # its heads
    ffn_dim: int = 2048  # its hidden width
    # How the generated numbers are read as a kernel. The first public DOFA weights need "legacy".
    layout: Literal["channel_major", "legacy"] = "channel_major"
    padding: int = 0  # pixels of zero border, 0 or 1; released weights need 1, which shifts the grid by one pixel
    # "polarization": a learned code per polarisation and orbit. "dofa_v1", "dofa_v2": one placeholder wavelength for
    # all SAR channels, as released weights were trained; they cannot tell VV from VH.
    sar: Literal["polarization", "dofa_v1", "dofa_v2"] = "polarization"
    elevation: bool = False  # a learned code for elevation channels

    def __post_init__(self) -> None:
        if min(self.n_heads, self.generator_dim) < 1 or self.generator_dim % self.n_heads or self.generator_dim % 2:
            raise ValueError(
                f"generator_dim must be even and a multiple of n_heads, got {self.generator_dim} and {self.n_heads}"
            )
        if self.n_weight_tokens < 1 or self.ffn_dim < 1:
            raise ValueError(
                f"n_weight_tokens and ffn_dim must be at least 1, got {self.n_weight_tokens} and {self.ffn_dim}"
            )
        if self.padding not in (0, 1):
            raise ValueError(f"padding must be 0 or 1, got {self.padding}")


class KernelGenerator(nn.Module):
    """Writes `n_values` numbers of a kernel for each channel, and `n_bias` for all of them together, from the codes of
    the channels; names of the released DOFA model.

    The numbers are to be multiplied by `GAIN`.
    """

    def __init__(self, n_values: int, n_bias: int, cfg: DynamicConfig) -> None:
        super().__init__()
        dim = cfg.generator_dim
        self.weight_tokens = nn.Parameter(torch.empty(cfg.n_weight_tokens, dim))
        self.bias_token = nn.Parameter(torch.empty(1, dim))
        layer = nn.TransformerEncoderLayer(dim, cfg.n_heads, cfg.ffn_dim, dropout=0.0, activation="gelu")
        self.transformer_encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.fc_weight = nn.Linear(dim, n_values)
        self.fc_bias = nn.Linear(dim, n_bias) if n_bias else None

    def forward(self, code: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes `[C, G]` -> numbers of the kernel `[C, n_values]`, and `[n_bias]` or None."""
        sequence = torch.cat((self.weight_tokens, code, self.bias_token))
        out = self.transformer_encoder(sequence)[self.weight_tokens.shape[0] :]  # [C + 1, G]
        return self.fc_weight(out[:-1] + code), None if self.fc_bias is None else self.fc_bias(out[-1])


@torch.no_grad()
def init_generator(module: nn.Module) -> None:
    """Fill the generators in `module`, and the layers beside them, as the paper's code does."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            init_layers(part)
        elif isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.constant_(part.bias, 0.01)
        elif isinstance(part, nn.MultiheadAttention):
            nn.init.xavier_uniform_(part.in_proj_weight)
            nn.init.zeros_(part.in_proj_bias)
    for part in module.modules():
        if isinstance(part, KernelGenerator):
            nn.init.normal_(part.weight_tokens, std=0.02)
            nn.init.normal_(part.bias_token, std=0.02)


class _CodeMlp(nn.Module):
    """Residual MLP on the codes, with a ReLU after each layer; names of the released DOFA model."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, dim)
        self.w2 = nn.Linear(dim, dim)

    def forward(self, code: Tensor) -> Tensor:
        return code + F.relu(self.w2(F.relu(self.w1(code))))


class DynamicPatchEmbed(PatchEmbed):
    """A convolution whose kernel a small transformer writes from the wavelengths (DOFA, arXiv 2403.15356, section 3).

    The generator runs once per call, so all samples of a call must have the same channels (`channels [C]`).
    """

    _SAR_PLACEHOLDER_UM: ClassVar[dict[str, float]] = {"dofa_v1": 3.75, "dofa_v2": 5.405}

    def __init__(self, embed_dim: int, patch_size: int, cfg: DynamicConfig | None = None) -> None:
        super().__init__(embed_dim, patch_size)
        cfg = cfg or DynamicConfig()
        self.layout = cfg.layout
        self.padding = cfg.padding
        self.sar = cfg.sar
        self.has_elevation = cfg.elevation
        self.generator_dim = cfg.generator_dim
        self.fclayer = _CodeMlp(cfg.generator_dim)
        self.weight_generator = KernelGenerator(patch_size * patch_size * embed_dim, embed_dim, cfg)
        # Channels without a wavelength, and SAR where VV and VH must differ, have learned codes.
        n_sar = len(POLARIZATIONS) * (len(ORBITS) + 1)
        self.sar_code = nn.Parameter(torch.empty(n_sar, cfg.generator_dim)) if cfg.sar == "polarization" else None
        self.elevation_code = nn.Parameter(torch.empty(1, cfg.generator_dim)) if cfg.elevation else None

    def forward(
        self,
        pixels: Tensor,
        channels: ChannelMeta,
        ids_keep: Tensor | None = None,
        products: WeightProducts | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        if channels.kind.device.type == "cpu":
            self.check(channels)
        kernel, bias = self._generate(channels)  # [C*E, D], [D]
        patches, grid = cut_patches(pixels, self.patch_size, ids_keep, self.padding)  # [B, K, C, E]
        return patches.flatten(2).to(kernel.dtype) @ kernel + bias, grid  # [B, K, D]

    def bake(self, channels: ChannelMeta) -> ConvPatchEmbed:
        self.check(channels)
        conv = ConvPatchEmbed(self.embed_dim, self.patch_size, channels.n_channels, ConvConfig(self.padding))
        conv = conv.to(self.weight_generator.bias_token)
        with torch.no_grad():
            kernel, bias = self._generate(channels)
            conv.proj.weight.copy_(kernel.T.reshape(conv.proj.weight.shape))
            assert conv.proj.bias is not None
            conv.proj.bias.copy_(bias)
        return conv

    def codes(self, channels: ChannelMeta) -> Tensor:
        """What generators are told of `channels [C]`: `[C, G]`."""
        code: Tensor = self.fclayer(self._code(channels))
        return code

    @torch.no_grad()
    def init_weights(self) -> None:
        init_generator(self)
        for code in (self.sar_code, self.elevation_code):
            if code is not None:
                nn.init.normal_(code, std=math.sqrt(0.5))  # the size of a sin-cos code

    def _generate(self, channels: ChannelMeta) -> tuple[Tensor, Tensor]:
        """Kernel `[C*E, D]` and bias `[D]` for `channels [C]`."""
        if channels.kind.ndim != 1:
            raise ValueError(
                "the dynamic patch embedding needs the same channels in all samples of a batch: draw one band subset"
                " per batch, or use model.patch_embed: channel_attention"
            )
        values, bias = self.weight_generator(self.codes(channels))  # [C, E*D], [D]
        if self.layout == "legacy":
            kernel = values.view(self.embed_dim, -1).T  # read as [D, C*E], whatever was meant
        else:
            kernel = values.view(-1, self.embed_dim)  # [C*E, D]
        return kernel * GAIN, bias * GAIN

    def _code(self, channels: ChannelMeta) -> Tensor:
        """What the generator is told of each channel: `[C, G]`."""
        dtype = self.weight_generator.bias_token.dtype
        nanometres = channels.wavelength_um * 1000.0
        if self.sar_code is None:
            placeholder = self._SAR_PLACEHOLDER_UM[self.sar] * 1000.0
            code = sincos(nanometres.masked_fill(channels.kind == SAR, placeholder), self.generator_dim).to(dtype)
            return select_code(channels, code, code, self.elevation_code)
        code = sincos(nanometres, self.generator_dim).to(dtype)
        row = channels.polarization.clamp_min(0) * (len(ORBITS) + 1) + channels.orbit + 1  # orbit -1: unknown
        return select_code(channels, code, self.sar_code[row], self.elevation_code)
