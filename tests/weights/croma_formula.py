"""CROMA with weights and pixels by the formula of `released_formula.py`: the cases that are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from released_formula import uniform
from torch import Tensor


class Images(NamedTuple):
    """Pixels `[B, C, H, W]` of both groups."""

    optical: Tensor
    radar: Tensor


@dataclass(frozen=True)
class CromaCase:
    """One input of one model, which is cut to `depth` optical blocks (half as many in the others), or whole."""

    size: str
    depth: int | None
    side_px: int

    @property
    def name(self) -> str:
        return f"{self.size}, {self.depth or 'all'} blocks, {self.side_px} px"

    def images(self) -> Images:
        sides = (self.side_px, self.side_px)
        return Images(*(uniform(f"{self.name} {n} bands", (2, n, *sides)) * 0.25 + 0.5 for n in (12, 2)))


CROMA = (CromaCase("base", 2, 120), CromaCase("base", 4, 48), CromaCase("large", 2, 48))
