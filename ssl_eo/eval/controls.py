"""Features that nobody trained: the rows that a table of probes needs to mean anything.

A pretrained encoder that does not beat the colour of the image has learned nothing worth having. Each control maps
normalised pixels `[B, C, H, W]` to float32 features, deterministically, for any number of channels.

B samples, C channels, H W pixels, h w pixels after a stride, P statistics, F filters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ssl_eo.eval.dense import control_of_cells
from ssl_eo.eval.features import Featurise
from ssl_eo.models.vit import EncoderInput
from ssl_eo.seeding import torch_generator

__all__ = [
    "CONTROLS",
    "DRAWN_CONTROLS",
    "band_statistics",
    "control_of",
    "control_taps",
    "random_convolution",
    "texture_statistics",
]

_CELL_PX = 8  # side of what stands for a patch, unless told

# Products grow with the square of the statistics. All 6,000 of twelve bands make a slower and weaker control than 300.
_MAX_STATISTICS_FOR_PRODUCTS = 32


def band_statistics(pixels: Tensor) -> Tensor:
    """Mean and standard deviation of each band: `[B, 2C]`."""
    flat = pixels.float().flatten(2)  # [B, C, H*W]
    return torch.cat([_mean(flat), _spread(flat)], 1)


def texture_statistics(pixels: Tensor) -> Tensor:
    """Per band mean, spread, three quantiles, mean and spread of both gradients, then products of two of these.

    `[B, 9C + P(P+1)/2]`, where P counts the statistics that are multiplied: as many of the nine, in this order, as make
    at most 32 (all nine of three bands, mean and spread of twelve, none of a hyperspectral sensor). The products let a
    linear probe see how colours and textures go together, which on EuroSAT makes this the strongest control.
    """
    x = pixels.float()
    flat = x.flatten(2)  # [B, C, H*W]
    across = (x[..., :, 1:] - x[..., :, :-1]).abs().flatten(2)
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(2)
    parts = [_mean(flat), _spread(flat), *_quantiles(flat)]
    parts += [f(g) for g in (across, down) for f in (_mean, _spread)]
    statistics = torch.cat(parts, 1)  # [B, 9C]
    n_channels = x.shape[1]
    n = n_channels * min(len(parts), _MAX_STATISTICS_FOR_PRODUCTS // n_channels)
    first, second = torch.triu_indices(n, n, device=x.device)
    return torch.cat([statistics, statistics[:, first] * statistics[:, second]], 1)


def random_convolution(pixels: Tensor, n_filters: int = 64, seed: int = 0) -> Tensor:
    """Two layers of random 5x5 filters with stride 2, mean and spread of each over the image: `[B, 4F]`.

    What local filters, a nonlinearity and pooling know before any training. The filters of one `seed` are the same in
    every run.
    """
    x = pixels.float()
    generator = torch_generator(seed, "random_convolution", x.shape[1], n_filters)
    pooled = []
    for _ in range(2):
        fan_in = x.shape[1] * 25
        filters = torch.randn(n_filters, x.shape[1], 5, 5, generator=generator) * (2.0 / fan_in) ** 0.5
        x = functional.conv2d(x, filters.to(x.device), stride=2, padding=2).relu()  # [B, F, h, w]
        pooled += [_mean(x.flatten(2)), _spread(x.flatten(2))]
    return torch.cat(pooled, 1)


def control_taps(control: Callable[[Tensor], Tensor], of_patches: bool, cell_px: int | None = None) -> Featurise:
    """`control` as a function from inputs to features: of whole images, or of cells that stand for patches.

    Cells have a side of `cell_px`, which is that of the patches of the encoder beside; None: 8 pixels.
    """
    function = control_of_cells(control, cell_px or _CELL_PX) if of_patches else control

    def featurise(inputs: EncoderInput) -> dict[str, Tensor]:
        return {"pixels": function(inputs.pixels)}

    return featurise


CONTROLS: dict[str, Callable[[Tensor], Tensor]] = {
    "band_statistics": band_statistics,
    "texture_statistics": texture_statistics,
    "random_convolution": random_convolution,
}
DRAWN_CONTROLS = ("random_convolution",)  # those of which a seed draws anything


def control_of(name: str, seed: int) -> Callable[[Tensor], Tensor]:
    """The control `name`, with what it draws drawn by `seed`."""
    return partial(random_convolution, seed=seed) if name in DRAWN_CONTROLS else CONTROLS[name]


def _mean(flat: Tensor) -> Tensor:
    return flat.mean(2)


def _spread(flat: Tensor) -> Tensor:
    return flat.std(2, correction=0)


def _quantiles(flat: Tensor) -> Tensor:
    """The 10, 50 and 90 % quantiles of each band, `[3, B, C]`."""
    # A fifth of the pixels is enough and sorts in a fifth of the time; 5 divides no usual width, so all columns count.
    ordered = flat[..., ::5].sort(2).values
    ranks = [round(q * (ordered.shape[2] - 1)) for q in (0.1, 0.5, 0.9)]
    return ordered[..., ranks].movedim(2, 0)
