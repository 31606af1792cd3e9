"""The inputs from which `golden/prithvi.json` is computed, by the published code and by ours.

B samples, C bands, T dates, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from released_formula import uniform
from torch import Tensor

N_BANDS = 6


@dataclass(frozen=True)
class PrithviCase:
    """One input of one model, cut to `depth` blocks; `n_dates` is what it was built for and is shown."""

    name: str
    model: str
    n_dates: int
    size: tuple[int, int] = (224, 224)  # pixels
    told: bool = False  # dates and location are given
    depth: int = 2
    layers: tuple[int, ...] = (0,)  # blocks whose tokens are compared, before the norm; those of the last are after it

    def pixels(self) -> Tensor:
        """`[B, C, T, H, W]`."""
        return uniform(f"pixels {self.name}", (2, N_BANDS, self.n_dates, *self.size))

    def dates(self) -> Tensor | None:
        """`[B, T, 2]`: years that half precision would confound, and days of the year."""
        if not self.told:
            return None
        year = torch.tensor([[2017.0], [2023.0]]).expand(2, self.n_dates)
        day = torch.tensor([[12.0], [200.0]]) + 37.0 * torch.arange(self.n_dates)
        return torch.stack((year, day), dim=-1)

    def location(self) -> Tensor | None:
        """`[B, 2]`: latitude and longitude."""
        return torch.tensor([[52.4, 13.1], [-3.1, -60.0]]) if self.told else None


CASES = (
    PrithviCase("version 1", "prithvi_eo_v1_100", 3, depth=12, layers=(0, 5)),
    PrithviCase("tiny, told", "prithvi_eo_v2_tiny_tl", 1, told=True, depth=12, layers=(0, 5)),
    PrithviCase("tiny, not told", "prithvi_eo_v2_tiny_tl", 1),
    PrithviCase("base, told", "prithvi_eo_v2_100_tl", 4, told=True),
    PrithviCase("base, two dates, told", "prithvi_eo_v2_100_tl", 2, told=True, size=(96, 96)),
    PrithviCase("base, not square", "prithvi_eo_v2_100_tl", 3, size=(64, 112)),
    PrithviCase("base, larger", "prithvi_eo_v2_100_tl", 1, size=(288, 256)),
    PrithviCase("large", "prithvi_eo_v2_300", 4, depth=1, layers=(), size=(96, 96)),
    PrithviCase("large, told", "prithvi_eo_v2_300_tl", 4, depth=1, layers=(), size=(96, 96), told=True),
    PrithviCase("huge", "prithvi_eo_v2_600", 2, depth=1, layers=(), size=(112, 112)),
)


@dataclass(frozen=True)
class PrithviMaeCase:
    """Pretraining of a small model of this design: loss and predictions of hidden patches."""

    name: str
    n_dates: int
    told: bool
    norm_pix: bool
    embed_dim: int = 64
    decoder_dim: int = 32
    depth: int = 2
    n_heads: int = 4
    size: int = 64
    mask_ratio: float = 0.75

    def pixels(self) -> Tensor:
        """`[B, C, T, H, W]`."""
        return uniform(f"pixels {self.name}", (2, N_BANDS, self.n_dates, self.size, self.size))

    def noise(self) -> Tensor:
        """`[B, N]`: patches of the least noise are seen."""
        return uniform(f"noise {self.name}", (2, self.n_dates * (self.size // 16) ** 2))

    dates = PrithviCase.dates
    location = PrithviCase.location


MAE_CASES = (
    PrithviMaeCase("version 1", 3, told=False, norm_pix=False),
    PrithviMaeCase("told", 4, told=True, norm_pix=True),
)
