"""What MultiMAE has around its encoder beside decoders: class maps as tokens, heads of image-level targets.

B samples, C channels, H W pixels, h w grid, N = h*w patches, n visible patches of a modality in a batch, p side of a
patch, L tokens of a sample, D width, G width of a class's code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssl_eo.models.layers import init_layers

__all__ = ["ClassPatchEmbed", "ImageHeads", "Parts", "take_visible", "truncated_standardise"]


def take_visible(image: Tensor, rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patches `[n, C, p, p]` at `rows [n]`, positions in the B*N patches of `image [B, C, H, W]`."""
    (b, c, height, width), (h, w) = image.shape, grid
    tiles = image.reshape(b, c, h, height // h, w, width // w)  # [B, C, h, p, w, p]
    patch = rows % (h * w)
    return tiles[rows // (h * w), :, patch // w, :, patch % w]


def truncated_standardise(
    pixels: Tensor, valid: Tensor | None = None, low: float = 0.1, high: float = 0.9, eps: float = 1e-6
) -> Tensor:
    """Each channel of each view with the mean and variance of its middle ranks; invalid pixels become 0.

    `pixels`, `valid`: `[B, C, H, W]`. Of a channel's n valid values those of ranks `int(low * n)` to `int(high * n)`
    count, so that outliers do not; where these are fewer than two, all become 0. MultiMAE (arXiv 2204.01678) does this
    to depth.
    """
    flat = pixels.flatten(2)  # [B, C, H*W]
    known = torch.ones_like(flat, dtype=torch.bool) if valid is None else valid.expand_as(pixels).flatten(2)
    ranked = torch.where(known, flat, torch.inf).sort(-1).values
    n = known.sum(-1, keepdim=True)  # [B, C, 1]
    rank = torch.arange(flat.shape[-1], device=flat.device)
    counts = (rank >= (low * n).long()) & (rank < (high * n).long())
    n_counted = counts.sum(-1, keepdim=True)
    mean = torch.where(counts, ranked, 0.0).sum(-1, keepdim=True) / n_counted.clamp(min=1)
    var = torch.where(counts, ranked - mean, 0.0).square().sum(-1, keepdim=True) / (n_counted - 1).clamp(min=1)
    is_enough = known & (n_counted >= 2)  # one value has no spread
    return torch.where(is_enough, (flat - mean) / (var + eps).sqrt(), 0.0).view_as(pixels)


class ClassPatchEmbed(nn.Module):
    """Patches of a class map: a code for each class, and a linear map of the codes of a patch's pixels.

    The last code is that of pixels without a class.
    """

    def __init__(self, embed_dim: int, patch_px: int, n_classes: int, code_dim: int) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.codes = nn.Parameter(torch.empty(n_classes + 1, code_dim))
        self.proj = nn.Linear(patch_px * patch_px * code_dim, embed_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Class numbers `[n, p, p]`, `n_classes` where there is none -> `[n, D]`."""
        codes = nn.functional.embedding(labels, self.codes)  # [n, p, p, G]
        tokens: Tensor = self.proj(codes.flatten(1))
        return tokens

    @torch.no_grad()
    def init_weights(self) -> None:
        init_layers(self)
        nn.init.trunc_normal_(self.codes, std=0.02)


class ImageHeads(nn.Module):
    """Values of a whole sample by a linear head for each target, from the mean over the encoder's tokens."""

    def __init__(self, dim: int, n_values: Mapping[str, int], norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.outputs = nn.ModuleDict({name: nn.Linear(dim, n) for name, n in n_values.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """`[B, L, D]` -> `[B, n_values]` of each target."""
        mean = self.norm(x.mean(1))  # [B, D]
        return {name: output(mean) for name, output in self.outputs.items()}

    @torch.no_grad()
    def init_weights(self) -> None:
        init_layers(self)


class Parts(nn.ModuleDict):
    """Modules by name that are filled together."""

    def init_weights(self) -> None:
        for module in self.values():
            module.init_weights()  # type: ignore[operator]
