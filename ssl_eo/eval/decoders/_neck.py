"""The pyramid that decoders stand on: maps of cells from a quarter to twice as large as a patch.

A plain vision transformer has cells of one size. Its taps become four levels by transposed convolutions and pooling
(ViTDet, arXiv 2203.16527, section 3, and BEiT's segmenter before it). An encoder whose taps are a pyramid needs none.

B images, D width, h w cells, p stride of a tap in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from ssl_eo.eval.decoders._layers import Norm, halved, make_norm
from ssl_eo.eval.decoders.base import TapShape

__all__ = ["N_LEVELS", "Neck", "NeckWidths", "tap_of_level"]

N_LEVELS = 4

# Widths of the levels, finest first, in terms of D. kept: D, D, D, D; 12 D^2 weights. halved: D/4, D/2, D, D;
# 4.5 D^2 weights. proportional to the stride: D/4, D/2, D, 2D.
NeckWidths = Literal["kept", "halved", "proportional"]

_QUARTERS = {"kept": (4, 4, 4, 4), "halved": (1, 2, 4, 4), "proportional": (1, 2, 4, 8)}
_QUARTERS_BETWEEN = {"kept": 4, "halved": 2, "proportional": 4}  # the two steps to the finest level


def tap_of_level(n_taps: int) -> list[int]:
    """Which tap each of the four levels is made of: the last one of the coarsest, equally spread over the levels.

    One tap serves all levels, two serve two each, three serve 1, 1 and 2.

    Raises `ValueError` for more than four taps: some would not be seen.
    """
    if n_taps > N_LEVELS:
        raise ValueError(f"taps: the pyramid has {N_LEVELS} levels and is made of as many taps at most, got {n_taps}")
    return [-(-(level + 1) * n_taps // N_LEVELS) - 1 for level in range(N_LEVELS)]


class Neck(nn.Module):
    """Levels at strides p/4, p/2, p and 2p from taps at stride p; taps that are a pyramid already pass as they are.

    `widths` are those of the levels that come out, finest first. Odd maps are halved to half their size, rounded up.
    """

    def __init__(self, shape: TapShape, widths: NeckWidths, norm: Norm) -> None:
        super().__init__()
        self._taps = range(len(shape.widths)) if shape.is_pyramid else tap_of_level(len(shape.widths))
        if shape.is_pyramid:
            self.widths = shape.widths
            self.levels = nn.ModuleList(nn.Identity() for _ in shape.widths)
            return
        dims = [shape.widths[tap] for tap in self._taps]
        self.widths = tuple(max(1, dim * n // 4) for dim, n in zip(dims, _QUARTERS[widths], strict=True))
        between = max(1, dims[0] * _QUARTERS_BETWEEN[widths] // 4)
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    # The norm takes a bias out again, where it is over the batch.
                    nn.ConvTranspose2d(dims[0], between, 2, 2, bias=norm != "batch"),
                    make_norm(norm, between),
                    nn.GELU(),
                    nn.ConvTranspose2d(between, self.widths[0], 2, 2),
                ),
                nn.ConvTranspose2d(dims[1], self.widths[1], 2, 2),
                nn.Identity(),
                _Halve(dims[3], self.widths[3]),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels `[B, D, h, w]`, finest first, of the `maps` of all taps."""
        return [level(maps[tap]) for level, tap in zip(self.levels, self._taps, strict=True)]


class _Halve(nn.Module):
    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.fit = nn.Identity() if in_width == width else nn.Conv2d(in_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fit(halved(x))
        return out
