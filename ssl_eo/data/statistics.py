"""Statistics per band in one pass over the data, in float64: count, mean, M2, minimum, maximum.

Parts are merged with the pairwise update of Chan, Golub and LeVeque (1983, "Algorithms for computing the sample
variance"). Any order of merging gives the same numbers up to rounding (relative 1e-12 or so); packing merges in shard
order, so that its numbers are the same bits every time.

C bands, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.types import Sample, TileSchema

__all__ = ["LARGEST_VALUE", "BandStatistics", "Statistics", "merge_statistics", "tile_statistics"]

LARGEST_VALUE = 1e15  # in any unit: nothing that is measured of the ground reaches it, and marks for no data do

Doubles = NDArray[np.float64]


@dataclass
class BandStatistics:
    """Statistics of the valid pixels of C bands, every field `[C]`. `m2` is the sum of squared deviations."""

    count: NDArray[np.int64]
    mean: Doubles
    m2: Doubles
    minimum: Doubles  # +inf where count is 0
    maximum: Doubles  # -inf where count is 0

    @classmethod
    def empty(cls, n_bands: int) -> BandStatistics:
        zeros = np.zeros(n_bands)
        return cls(np.zeros(n_bands, np.int64), zeros, zeros, np.full(n_bands, np.inf), np.full(n_bands, -np.inf))

    @classmethod
    def of(cls, pixels: NDArray[Any], no_data: Sequence[float] = ()) -> BandStatistics:
        """Statistics of one tile `pixels [C, H, W]`, without non-finite values and those listed in `no_data`."""
        flat = pixels.reshape(len(pixels), -1)  # [C, H*W]
        values = flat.astype(np.float64)
        valid = np.isfinite(values)
        for value in no_data:
            valid &= flat != value
        if valid.all():
            mean = values.mean(axis=1)  # [C]
            deviation = values - mean[:, None]
            count = np.full(len(flat), flat.shape[1])
            low, high = values.min(axis=1), values.max(axis=1)
        else:
            count = valid.sum(axis=1)
            mean = np.where(valid, values, 0.0).sum(axis=1) / np.maximum(count, 1)
            deviation = np.where(valid, values - mean[:, None], 0.0)
            low = np.where(valid, values, np.inf).min(axis=1)
            high = np.where(valid, values, -np.inf).max(axis=1)
        return cls(count, mean, np.square(deviation).sum(axis=1), low, high)

    def merge(self, other: BandStatistics) -> BandStatistics:
        """Statistics of the pixels of both."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        return BandStatistics(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + np.square(delta) * self.count * share,
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
        )

    @property
    def std(self) -> Doubles:
        """Population standard deviation `[C]`, 0 where there is no valid pixel."""
        return np.sqrt(self.m2 / np.maximum(self.count, 1))

    def check_values(self, bands: Sequence[str], where: str) -> None:
        """Raise `ValueError`, with `where` it is, for a value of one of the C `bands` that nothing can measure.

        One pixel of -3.4e38, which GDAL writes for no data, makes the mean and the deviation those of that mark, and
        all other pixels the same.
        """
        for band, low, high in zip(bands, self.minimum.tolist(), self.maximum.tolist(), strict=True):
            for value in (low, high):
                if LARGEST_VALUE < abs(value) < math.inf:  # infinite where there is no pixel
                    raise ValueError(
                        f"sensor: band {band} of {where} holds {value!r}, more than can be measured; where it stands"
                        " for missing data, declare it in no_data of the sensor (or of the source, if that has the key)"
                    )

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain JSON types with bits preserved; a band without a valid pixel has null mean, std, min and max."""
        seen = self.count > 0

        def listed(values: Doubles) -> list[float | None]:
            return [float(v) if s else None for v, s in zip(values, seen, strict=True)]

        return {
            "count": self.count.tolist(),
            "mean": listed(self.mean),
            "std": listed(self.std),
            "m2": listed(self.m2),
            "min": listed(self.minimum),
            "max": listed(self.maximum),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Sequence[Any]]) -> BandStatistics:
        """Reverse of `to_dict` (`std` follows from the rest)."""

        def filled(key: str, absent: float) -> Doubles:
            return np.array([absent if v is None else v for v in raw[key]], np.float64)

        count = np.array(raw["count"], np.int64)
        return cls(count, filled("mean", 0.0), filled("m2", 0.0), filled("min", np.inf), filled("max", -np.inf))


Statistics = dict[str, BandStatistics]  # by tile name


def tile_statistics(sample: Sample, schema: Mapping[str, TileSchema]) -> Statistics:
    """Statistics of the tiles that one sample has."""
    return {name: BandStatistics.of(t.array, schema[name].sensor.no_data) for name, t in sample.tiles.items()}


def merge_statistics(schema: Mapping[str, TileSchema], parts: Iterable[Statistics]) -> Statistics:
    """Statistics of all `parts`, merged in their order."""
    merged = {name: BandStatistics.empty(len(s.bands)) for name, s in schema.items()}
    for part in parts:
        merged |= {name: merged[name].merge(found) for name, found in part.items()}
    return merged
