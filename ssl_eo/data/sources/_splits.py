"""Splits into train, validation and test, 70 : 10 : 20 on average: by place, or by name.

Geographic: whole cells of a grid of latitude and longitude go into one of the three. Neighbouring scenes look alike, so
a random split flatters every method. A cell is in the same split whatever the archive: what one source trains on,
another does not test on.
"""

from __future__ import annotations

import math

from ssl_eo.seeding import derive_seed

__all__ = ["cell_name", "cell_split", "check_cell", "name_split"]

_SPLIT_ENDS = {"train": 0.7, "val": 0.8, "test": 1.0}


def check_cell(cell_deg: float) -> None:
    """Raise `ValueError` unless a cell of that side, in degrees, makes a grid."""
    if not 0 < cell_deg <= 90:
        raise ValueError(f"cell_deg must be above 0 and at most 90 degrees, got {cell_deg}")


def cell_split(latitude: float, longitude: float, cell_deg: float, seed: int) -> str:
    """The split of the grid cell that holds a place (degrees): "train", "val" or "test", by a hash of the cell.

    Raises `ValueError` for a place that is no finite number.
    """
    if not (math.isfinite(latitude) and math.isfinite(longitude)):
        raise ValueError(f"a geographic split needs finite latitude and longitude, got {latitude}, {longitude}")
    cell = _cell(latitude, longitude, cell_deg)
    return _split_of(derive_seed(seed, "eurosat cell", *cell))  # the name of the first user stays: it decides


def cell_name(latitude: float, longitude: float, cell_deg: float) -> str:
    """What samples of one grid cell have for their group, `meta["group"]`: its corner in the south-west, and its side.

    The cell is the unit that a geographic split draws, so intervals of scores must draw it as a whole too.
    """
    row, column = _cell(latitude, longitude, cell_deg)
    return f"{row * cell_deg:.6g} {column * cell_deg:.6g} +{cell_deg:g}"


def name_split(name: str, seed: int) -> str:
    """The split of a sample that says nothing of its place: "train", "val" or "test", by a hash of its name."""
    return _split_of(derive_seed(seed, "name", name))


def _cell(latitude: float, longitude: float, cell_deg: float) -> tuple[int, int]:
    return math.floor(latitude / cell_deg), math.floor(longitude / cell_deg)


def _split_of(seed: int) -> str:
    return next(split for split, end in _SPLIT_ENDS.items() if seed / 2**63 < end)
