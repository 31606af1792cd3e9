"""Which bands of a tile an evaluation shows: all, true colour, all but true colour, a random half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ssl_eo.seeding import numpy_generator

__all__ = ["BAND_SUBSETS", "BandSubset", "bands_of"]

BandSubset = Literal["all", "rgb", "no-rgb", "random"]
BAND_SUBSETS: tuple[BandSubset, ...] = ("all", "rgb", "no-rgb", "random")


def bands_of(
    subset: BandSubset, bands: Sequence[str], true_color: Sequence[str] | None, task: str, seed: int
) -> list[str] | None:
    """Names of those of `bands` that `subset` keeps; None where there is no such subset.

    They are in the order of `bands`, but true colour is red, green, blue. `task` and `seed` choose the random half.
    """
    if subset == "all":
        return list(bands)
    if subset == "random":
        drawn = numpy_generator(seed, "random bands", task).permutation(len(bands))
        kept = sorted(drawn[: len(bands) // 2].tolist())
        return [bands[i] for i in kept] or None
    if true_color is None or not set(true_color) <= set(bands):
        return None
    rest = [band for band in bands if band not in true_color]
    return list(true_color) if subset == "rgb" else rest or None
