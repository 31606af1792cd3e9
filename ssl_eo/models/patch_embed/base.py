"""What patch embeddings share: the interface, the way to cut patches, and the plain convolution that others bake into.

Hidden patches are dropped when patches are cut, before anything is computed on them.

B samples, C channels, H W pixels, p patch size, E = p*p, h w grid, N = h*w patches, K visible patches (N when nothing
is hidden), D token width, A heads, F attention width, G code width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.sensors import KINDS, POLARIZATIONS, ChannelMeta

__all__ = ["SAR", "ConvConfig", "ConvPatchEmbed", "PatchEmbed", "WeightProducts", "cut_patches", "select_code"]

SAR, _ELEVATION, _CATEGORICAL = KINDS.index("sar"), KINDS.index("elevation"), KINDS.index("categorical")


class WeightProducts(NamedTuple):
    """Products of weights that do not depend on pixels: formed once per step, shared by views of all sizes."""

    pixel_logits: Tensor  # [A, E]: logit of a patch
    code_logits: Tensor  # [A, F]: logit of a channel code
    pixel_values: Tensor  # [D, A, E]: output of the mixed pixels of a head


class PatchEmbed(nn.Module, ABC):
    """Pixels `[B, C, H, W]` to tokens `[B, N, D]` and grid (h, w); `[B, K, D]` of the patches in `ids_keep [B, K]`."""

    has_elevation = False

    def __init__(self, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_size = patch_size

    @abstractmethod
    def forward(
        self,
        pixels: Tensor,
        channels: ChannelMeta,
        ids_keep: Tensor | None = None,
        products: WeightProducts | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Raises `ValueError` for sizes that the patch size does not divide and for channels it cannot embed.

        `channels` are checked here only when they are on the CPU, since looking at them would stall a device: call
        `check` once before they move. On a device an unsupported channel gives NaN tokens, never plausible ones.
        Pixels are cast to the dtype of the weights.
        """

    def products(self) -> WeightProducts | None:
        """What calls within one step can share; pass it to `forward`."""
        return None

    def check(self, channels: ChannelMeta) -> None:
        """Raise `ValueError` if a channel cannot be embedded. It reads the tensors: not for every step on a device."""
        real = torch.ones_like(channels.kind, dtype=torch.bool) if channels.valid is None else channels.valid
        kind = channels.kind.expand(real.shape)[real]
        kinds = set(kind.tolist())
        if _CATEGORICAL in kinds or any(k < 0 for k in kinds):
            raise ValueError(
                "only optical, thermal, sar and elevation channels can be embedded: leave categorical ones out of the"
                " encoder's bands (class maps are targets, not pixels)"
            )
        if _ELEVATION in kinds and not self.has_elevation:
            raise ValueError(
                f"this {type(self).__name__} has no code for elevation channels: leave them out, or train with"
                " elevation: true in its config (model.channel_attention or model.dynamic)"
            )
        if bool((channels.polarization.expand(real.shape)[real][kind == SAR] < 0).any()):
            raise ValueError(f"a sar channel has no polarization, one of {', '.join(POLARIZATIONS)}")

    @abstractmethod
    def bake(self, channels: ChannelMeta) -> ConvPatchEmbed:
        """The equal convolution for `channels [C]`; `ValueError` where there is none."""

    @abstractmethod
    def init_weights(self) -> None:
        """Fill every parameter and buffer."""


def cut_patches(
    pixels: Tensor, patch_size: int, ids_keep: Tensor | None = None, padding: int = 0
) -> tuple[Tensor, tuple[int, int]]:
    """Patches `[B, K, C, E]` of `pixels [B, C, H, W]`, and the grid: what a convolution of stride p would see."""
    height, width = pixels.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"pixels of {height} x {width} cannot be cut into patches of {patch_size} x {patch_size}:"
            f" choose sizes that are multiples of {patch_size}"
        )
    grid = (height // patch_size, width // patch_size)
    if padding:
        assert 2 * padding < patch_size, "a wider border would add patches"
        pixels = F.pad(pixels, (padding,) * 4)[..., :height, :width]
    tiles = pixels.reshape(*pixels.shape[:2], grid[0], patch_size, grid[1], patch_size)  # [B, C, h, p, w, p]
    if ids_keep is None:
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2), grid  # [B, N, C, E]
    sample = torch.arange(pixels.shape[0], device=pixels.device)[:, None]
    return tiles[sample, :, ids_keep // grid[1], :, ids_keep % grid[1]].flatten(3), grid  # [B, K, C, E]


@dataclass
class ConvConfig:
    """A convolution for one sensor with a fixed number of channels."""

    padding: int = 0  # pixels of zero border, 0 or 1; 1 is for what is baked from released DOFA weights

    def __post_init__(self) -> None:
        if self.padding not in (0, 1):
            raise ValueError(f"conv.padding must be 0 or 1, got {self.padding}")


class ConvPatchEmbed(PatchEmbed):
    """A convolution with stride p for a fixed set of channels, evaluated as one matrix product over patches.

    With a `tubelet` of s dates it is one in three dimensions, for pixels `[B, C*s, H, W]`: the dates of each channel.
    """

    def __init__(
        self, embed_dim: int, patch_size: int, n_channels: int, cfg: ConvConfig | None = None, tubelet: int = 1
    ) -> None:
        super().__init__(embed_dim, patch_size)
        self.n_channels = n_channels
        self.tubelet = tubelet
        self.padding = (cfg or ConvConfig()).padding
        self.proj = nn.Conv2d(n_channels * tubelet, embed_dim, patch_size, patch_size, self.padding)

    def forward(
        self,
        pixels: Tensor,
        channels: ChannelMeta,
        ids_keep: Tensor | None = None,
        products: WeightProducts | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        if pixels.shape[1] != self.n_channels * self.tubelet:
            raise ValueError(
                f"this patch embedding was built for {self.n_channels} channels and got"
                f" {pixels.shape[1] // self.tubelet}: choose the"
                " same bands, or a patch embedding for any sensor (model.patch_embed: channel_attention or dynamic)"
            )
        patches, grid = cut_patches(pixels, self.patch_size, ids_keep, self.padding)  # [B, K, C, E]
        kernel = self.proj.weight.flatten(1)  # [D, C*E]
        return F.linear(patches.flatten(2).to(kernel.dtype), kernel, self.proj.bias), grid  # [B, K, D]

    def check(self, channels: ChannelMeta) -> None:
        if channels.n_channels != self.n_channels:
            raise ValueError(
                f"this patch embedding was built for {self.n_channels} channels and got {channels.n_channels}"
            )

    def bake(self, channels: ChannelMeta) -> ConvPatchEmbed:
        self.check(channels)
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        # Xavier of the flattened kernel (MAE), written out because a view of a sharded parameter cannot be filled.
        fan_out, fan_in = self.proj.weight.shape[0], self.proj.weight[0].numel()
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        nn.init.uniform_(self.proj.weight, -bound, bound)
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)


def select_code(channels: ChannelMeta, spectral: Tensor, sar: Tensor, elevation: Tensor | None) -> Tensor:
    """Each channel's code `[..., C, G]` by its kind; NaN where there is none for a channel that is not padding."""
    kind = channels.kind
    code = torch.where((kind == SAR)[..., None], sar, spectral)
    unknown = (kind < 0) | (kind == _CATEGORICAL) | ((kind == SAR) & (channels.polarization < 0))
    if elevation is None:
        unknown = unknown | (kind == _ELEVATION)
    else:
        code = torch.where((kind == _ELEVATION)[..., None], elevation, code)
    if channels.valid is not None:
        unknown = unknown & channels.valid
    return code.masked_fill(unknown[..., None], torch.nan)
