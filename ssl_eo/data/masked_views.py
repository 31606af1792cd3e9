"""One random crop and one random mask for each sample: of one tile, or of several dates that are a view together.

N patches of a view, C bands, h w grid of a date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import suggest
from ssl_eo.data.masking import MaskConfig, draw, n_masked, predicted, stack_masks
from ssl_eo.data.plans import CropConfig, resized_crop, same_ground
from ssl_eo.data.series import Acquisitions, SeriesConfig, acquisitions_at, choose_dates, stack_acquisitions
from ssl_eo.data.stacking import stack
from ssl_eo.data.types import Batch, Sample, TileSchema, ViewPlan

__all__ = ["ROLE", "MaskedPlan", "MaskedViews"]

ROLE = "image"


class MaskedPlan(NamedTuple):
    """The view of each date, which patches `[N]` of all of them are hidden, and which of those are predicted."""

    views: list[ViewPlan]
    hidden: NDArray[np.bool_]
    predicted: NDArray[np.bool_]
    acquisitions: Acquisitions | None  # when and where, for a model that is told


@dataclass(frozen=True)
class MaskedViews:
    """The `Views` of masked prediction. `tile` names what is learned from, see `ssl_eo.objectives.mae.Config`."""

    crop: CropConfig
    mask: MaskConfig
    patch_size: int
    tubelet: int
    schemas: Sequence[Mapping[str, TileSchema]]
    tile: str | list[str] | None = None
    series: SeriesConfig = field(default_factory=SeriesConfig)
    tells: tuple[str, ...] = ()  # of dates and location, what the model is told

    @property
    def grid(self) -> tuple[int, int]:
        """Of a date."""
        return (self.crop.size_px // self.patch_size,) * 2

    @property
    def n_steps(self) -> int:
        """Grids of a view: its dates, or its tubelets."""
        return self.series.n_dates // self.tubelet

    @property
    def tiles(self) -> list[TileSchema]:
        """What is learned from, of all sources."""
        return [schema[name] for schema in self.schemas for name in self._names_in(schema)]

    def check(self) -> None:
        """Raise `ValueError` for sizes, tiles or a share of hidden patches that do not fit."""
        size, patch = self.crop.size_px, self.patch_size
        if size % patch:
            raise ValueError(f"objective.crop.size_px {size} is not a multiple of model.patch_size {patch}")
        for schema in self.schemas:
            self._names_in(schema)
        known = list(dict.fromkeys(name for schema in self.schemas for name in schema))
        for name in (name for name in self._named or () if name not in known):
            hint = suggest(name, known)
            raise ValueError(f"objective.tile: no source has {name}{hint} (there are {', '.join(known)})")
        n_patches = self.n_steps * self.grid[0] * self.grid[1]
        if not 0 < (n_hidden := n_masked(n_patches, self.mask.mask_ratio)) < n_patches:
            raise ValueError(
                f"objective.mask.mask_ratio {self.mask.mask_ratio} hides {n_hidden} of {n_patches} patches; some must"
                " be hidden and some visible"
            )

    def plan(self, sample: Sample, rng: np.random.Generator) -> MaskedPlan:
        names = [name for name in sample.tiles if self._named is None or name in self._named]
        if not names:
            raise ValueError(f"it has none of the tiles of objective.tile, but {', '.join(sample.tiles)}")
        if self.series.n_dates > 1:
            names = choose_dates(sample, names, self.series.n_dates, rng)
        elif len(names) > 1:
            names = [names[int(rng.integers(len(names)))]]
        first = resized_crop(sample, names[0], self.crop, rng)
        views = [first, *(same_ground(sample, first, name) for name in names[1:])]
        hidden = draw(self.mask, rng, self.grid, self.n_steps)
        shown = predicted(self.mask, rng, hidden)
        told = acquisitions_at(sample, names, self.series, rng) if self.tells else None
        return MaskedPlan(views, hidden, shown, told)

    def collate(
        self, planned: list[tuple[Sample, MaskedPlan]], step: int, source: int, rng: np.random.Generator
    ) -> Batch:
        samples, plans = [sample for sample, _ in planned], [plan for _, plan in planned]
        by_date = [[plan.views[date] for plan in plans] for date in range(self.series.n_dates)]
        tiles, views = stack(samples, {ROLE: by_date}, self.schemas[source])
        told = [plan.acquisitions for plan in plans if plan.acquisitions is not None]
        return Batch(
            step=step,
            source=source,
            keys=[sample.key for sample in samples],
            tiles=tiles,
            views=views,
            masks={ROLE: stack_masks([plan.hidden for plan in plans], [plan.predicted for plan in plans])},
            meta=stack_acquisitions(told, self.tells) if told else {},
        )

    @property
    def _named(self) -> list[str] | None:
        return [self.tile] if isinstance(self.tile, str) else self.tile

    def _names_in(self, schema: Mapping[str, TileSchema]) -> list[str]:
        """The tiles of a source that are learned from, all with as many bands."""
        if self._named is None and len(schema) > 1:
            raise ValueError(f"objective.tile: a source has several tiles, name one or more of {', '.join(schema)}")
        allowed = list(schema) if self._named is None else self._named
        names = [name for name in schema if name in allowed]
        if not names:
            raise ValueError(
                f"objective.tile: no tile {', '.join(map(repr, allowed))} in a source that has {', '.join(schema)}"
            )
        if (n_dates := self.series.n_dates) > 1:
            kinds = {(schema[name].sensor.name, schema[name].bands) for name in names}
            if len(names) < n_dates or len(kinds) > 1:
                raise ValueError(
                    f"objective.series.n_dates is {n_dates}: objective.tile must name at least as many tiles of one"
                    f" sensor, with the same bands, one for each date; of those it names, a source has"
                    f" {', '.join(names)} (all of its tiles: {', '.join(schema)})"
                )
        if len({len(schema[name].bands) for name in names}) > 1:
            counts = ", ".join(f"{name} has {len(schema[name].bands)}" for name in names)
            raise ValueError(f"objective.tile: the tiles of one source need as many bands each, but {counts}")
        return names
