"""Tiles of the Web-Mercator grid: the world is 2^zoom columns (from the west) by 2^zoom rows (from the north)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["pixel_size_m", "places_of_tiles"]

_EQUATOR_M = 2 * math.pi * 6_378_137.0  # length on the sphere of the projection


def places_of_tiles(tiles: NDArray[Any], zoom: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latitudes and longitudes (degrees) of the centres of tiles `[N, 2]` (column, row)."""
    column, row = (tiles.astype(np.float64).T + 0.5) / (1 << zoom)  # 0 to 1
    return np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * row)))), 360 * column - 180


def pixel_size_m(latitude: float, n_pixels: int, zoom: int) -> float:
    """Ground size of a pixel of a tile of `n_pixels` x `n_pixels`: lengths of the projection shrink to the poles."""
    return _EQUATOR_M / (1 << zoom) / n_pixels * math.cos(math.radians(latitude))
