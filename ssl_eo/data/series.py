"""Views of several dates: which tiles of a sample are the dates of a view, and when and where they were taken.

B samples, T dates of a view, C bands, h w view pixels.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_eo.data.types import PixelBatch, Sample

__all__ = ["Acquisitions", "SeriesConfig", "acquisitions_at", "choose_dates", "series_of", "stack_acquisitions"]


@dataclass
class SeriesConfig:
    """How many dates a view has, and how often the model is not told when and where they were."""

    n_dates: int = 1  # tiles of one sensor that are a view together, drawn of those of objective.tile, in order of time
    # A model that never missed dates or location cannot do without.
    drop_dates_prob: float = 0.0  # share of samples whose dates are kept from a model with model.time_encoding
    drop_location_prob: float = 0.0  # share of samples whose location is kept from one with model.location_encoding

    def __post_init__(self) -> None:
        if self.n_dates < 1:
            raise ValueError(f"n_dates must be at least 1, got {self.n_dates}")
        for key in ("drop_dates_prob", "drop_location_prob"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise ValueError(f"{key} must be in [0, 1], got {value}")


@dataclass(frozen=True)
class Acquisitions:
    """`dates [T, 2]` (year, day of the year from 1) and `location [2]` (latitude, longitude in degrees), float32.

    NaN for what is not known, or not to be told.
    """

    dates: NDArray[np.float32]
    location: NDArray[np.float32]


def choose_dates(sample: Sample, names: Sequence[str], n_dates: int, rng: np.random.Generator) -> list[str]:
    """`n_dates` of the tiles `names` that the sample has, drawn, in order of time; those without a date come last.

    Raises `ValueError` where it has too few.
    """
    if len(names) < n_dates:
        raise ValueError(
            f"objective.series.n_dates is {n_dates}, but of the tiles of objective.tile it has"
            f" {', '.join(names) or 'none'}"
        )
    drawn = names
    if len(names) > n_dates:
        drawn = [names[i] for i in sorted(rng.choice(len(names), n_dates, replace=False).tolist())]
    # ISO 8601 sorts as time does; where two are of a day, the one that is listed first comes first.
    return sorted(drawn, key=lambda name: (_date_of(sample, name) is None, _date_of(sample, name) or ""))


def acquisitions_at(sample: Sample, names: Sequence[str], cfg: SeriesConfig, rng: np.random.Generator) -> Acquisitions:
    """When the tiles `names` were taken, and where; each is left out as often as `cfg` says."""
    dates = np.array([_year_and_day(_date_of(sample, name)) for name in names], np.float32)  # [T, 2]
    location = np.array([sample.meta.get(key, np.nan) for key in ("latitude", "longitude")], np.float32)
    drop_dates, drop_location = rng.random(2) < (cfg.drop_dates_prob, cfg.drop_location_prob)
    if drop_dates:
        dates[:] = np.nan
    if drop_location:
        location[:] = np.nan
    return Acquisitions(dates, location)


def stack_acquisitions(acquisitions: Sequence[Acquisitions], keys: Sequence[str]) -> dict[str, Tensor]:
    """`dates [B, T, 2]` and `location [B, 2]`, those of `keys`, for `Batch.meta`."""
    return {key: torch.from_numpy(np.stack([getattr(a, key) for a in acquisitions])) for key in keys}


def series_of(view: PixelBatch, n_dates: int) -> PixelBatch:
    """`pixels [B, C, T, h, w]` (and `valid`) of samples from those of rows, `[T*B, C, h, w]`; all of one sensor."""
    view = view.of_one_sensor()
    return replace(
        view,
        pixels=_by_sample(view.pixels, n_dates),
        valid=None if view.valid is None else _by_sample(view.valid, n_dates),
        gsd_m=view.gsd_m.view(n_dates, -1)[0],  # [B]; all dates show the same box
    )


def _by_sample(rows: Tensor, n_dates: int) -> Tensor:
    return torch.unflatten(rows, 0, (n_dates, -1)).permute(1, 2, 0, 3, 4).contiguous()  # [B, C, T, h, w]


def _date_of(sample: Sample, name: str) -> str | None:
    """Of the tile, else of the sample."""
    date = sample.tiles[name].date or sample.meta.get("date")
    return date if isinstance(date, str) else None


def _year_and_day(date: str | None) -> tuple[float, float]:
    if date is None:
        return np.nan, np.nan
    day = datetime.date.fromisoformat(date[:10])
    return float(day.year), float(day.timetuple().tm_yday)
