"""In which unit a dataset of GeoBench is stored, and under whose names its bands: what its statistics say.

Both go wrong without a sign: a model that was calibrated for reflectance in tens of thousandths sees next to nothing
in reflectance from 0 to 1, and one that is told wavelengths sees them in the wrong bands.

C bands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.sources._geobench_card import Slip, TileCard
from ssl_eo.data.sources._side_files import read_json_object
from ssl_eo.data.statistics import LARGEST_VALUE
from ssl_eo.sensors import Sensor

__all__ = [
    "BandStatistics",
    "Unit",
    "has_slipped",
    "pixel_problem",
    "read_band_statistics",
    "sensor_in",
    "shows_slip",
    "unit_of",
]

_MAX_BYTES = 4 << 20
_STATISTICS = ("mean", "std", "min", "max", "percentile_99")  # those that are used


class Unit(StrEnum):
    """What a stored value of a band is."""

    DIGITAL_NUMBER = "digital_number"  # integers of more than 8 bits; of Sentinel-2 and NEON reflectance times 10,000
    REFLECTANCE = "reflectance"  # above 1 over clouds and glitter
    BYTE = "byte"  # 0 to 255
    UNIT_INTERVAL = "unit_interval"  # bytes divided by 255
    LINEAR_AMPLITUDE = "linear_amplitude"  # of radar, and its intensity; not dB
    METRES = "metres"


# (above, up to) of the level, the largest 99th percentile of the bands of a tile. The first three do not overlap.
_LEVELS = {
    Unit.REFLECTANCE: (0.0, 3.0),
    Unit.BYTE: (3.0, 255.0),
    Unit.DIGITAL_NUMBER: (255.0, 65_535.0),
    Unit.UNIT_INTERVAL: (0.0, 1.0),
    Unit.METRES: (0.0, 150.0),
}
# The same of the brightest pixel of a sample: single pixels may be brighter, a whole sample darker.
_BRIGHTEST = {
    Unit.REFLECTANCE: (0.0, 10.0),
    Unit.BYTE: (1.0, 255.0),
    Unit.DIGITAL_NUMBER: (10.0, 65_535.0),
    Unit.UNIT_INTERVAL: (0.0, 1.0),
    Unit.METRES: (0.0, 150.0),
}
_ROUNDING = 1e-3  # of statistics that were computed in single precision, as a part of the range of values
_MAX_VALUES = 10**12  # that statistics are of
_LEAST_MEAN_DB = -1.0  # backscatter of a whole dataset in dB is below it, a linear mean is not


@dataclass(frozen=True)
class BandStatistics:
    """Of one array of the files, over the training split, in stored units."""

    mean: float
    std: float
    min: float
    max: float
    percentile_99: float


def read_band_statistics(path: Path) -> dict[str, BandStatistics]:
    """`band_stats.json` by name of array.

    Raises `ValueError` where there is no table of finite numbers, or where no values can have those of an array.
    """
    expected = f"numbers {', '.join(_STATISTICS)} for each band"
    raw = read_json_object(path, _MAX_BYTES, expected)
    table = {}
    for key, entry in raw.items():
        found: dict[str, Any] = {n: entry.get(n) for n in _STATISTICS} if isinstance(entry, dict) else {}
        if not found or not all(_is_number(value) for value in found.values()):
            raise ValueError(f"{path}: {key!r} holds {entry!r:.80}, expected {expected}; unpack the archive again")
        table[key] = BandStatistics(**{name: float(value) for name, value in found.items()})
        if not _are_of_values(table[key]):
            raise ValueError(f"{path}: {key!r} holds {found}, which no values have; unpack the archive again")
    return table


def has_slipped(slip: Slip, statistics: Mapping[str, BandStatistics]) -> bool:
    """Whether statistics say that bands lie under names of others. The key is one that the dataset's tiles have."""
    return bool(getattr(statistics[slip.key], slip.statistic) <= slip.at_most)


def shows_slip(slip: Slip, values: NDArray[Any]) -> bool:
    """The same of one sample: whether its array `slip.key`, `values [H, W]`, looks as if it held another band."""
    return bool(getattr(values, slip.statistic)() <= slip.at_most)


def unit_of(name: str, tile: TileCard, statistics: Sequence[BandStatistics], check: bool) -> Unit:
    """The unit of the tile `name`: the first of those that it may have that `statistics` of its arrays agree with.

    Raises `ValueError` where they agree with none. Without `check` it is the only one that the tile may have; of one
    that may have several, statistics must say which all the same.
    """
    units = [Unit(unit) for unit in tile.units]
    if not check and len(units) == 1:
        return units[0]
    for unit in units:
        if _agrees(unit, statistics):
            return unit
    level = max(s.percentile_99 for s in statistics)
    mean = min(s.mean for s in statistics)
    fits = [unit for unit in Unit if _agrees(unit, statistics)]
    raise ValueError(
        f"band_stats.json says that the {name} bands reach {level:.6g} (99th percentile) with means from {mean:.6g},"
        f" which is {' or '.join(fits) or 'no known unit'}; expected {' or '.join(units)}: get the published files, or"
        " set check_units: false if the numbers are known to be right"
    )


def pixel_problem(pixels: NDArray[Any], unit: Unit) -> str | None:
    """What shows that `pixels [C, H, W]` of a sample are not in `unit`; None where nothing does, as of 0 and NaN."""
    known = pixels[np.isfinite(pixels)]
    if not known.any():
        return None
    brightest = float(known.max())
    above, up_to = _BRIGHTEST.get(unit, (-math.inf, math.inf))
    if above < brightest <= up_to:
        return None
    return (
        f"its brightest pixel is {brightest:.6g}, of {unit} expected above {above:g} and up to {up_to:g}, as"
        " band_stats.json says"
    )


def sensor_in(sensor: Sensor, unit: Unit, dtype: str) -> Sensor:
    """The sensor with the scale that turns values that are stored in `unit` into those of its own unit."""
    if unit is Unit.REFLECTANCE:
        return replace(sensor, dtype=dtype, scale=1.0)
    if unit is Unit.UNIT_INTERVAL:
        return replace(sensor, dtype=dtype, scale=255.0 * sensor.scale)
    return sensor


def _agrees(unit: Unit, statistics: Sequence[BandStatistics]) -> bool:
    if unit is Unit.LINEAR_AMPLITUDE:
        return min(s.mean for s in statistics) > _LEAST_MEAN_DB
    above, up_to = _LEVELS[unit]
    return above < max(s.percentile_99 for s in statistics) <= up_to


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_VALUE


def _are_of_values(s: BandStatistics) -> bool:
    """Whether there are values with these statistics, up to rounding.

    Of values between two bounds the deviation is at most half their distance, and of n values that reach both at least
    the distance divided by the root of 2 n.
    """
    distance = s.max - s.min
    slack = _ROUNDING * distance
    is_between = all(s.min - slack <= value <= s.max + slack for value in (s.mean, s.percentile_99))
    return is_between and distance / math.sqrt(2 * _MAX_VALUES) <= s.std <= distance / 2 + slack
