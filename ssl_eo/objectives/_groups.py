"""Two groups of sensors that look at one place: which tiles of a source, and of a sample, belong to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ssl_eo.components import suggest
from ssl_eo.data.multicrop import images_of
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.objectives.base import Schemas
from ssl_eo.sensors import KINDS

__all__ = ["GROUPS", "SensorGroups"]

GROUPS = ("optical", "radar")

_PIXEL_KINDS = tuple(kind for kind in KINDS if kind != "categorical")

Tiles = dict[str, TileSchema]


@dataclass(frozen=True)
class SensorGroups:
    """`tiles`: for each group its tiles in each source, in the order of the source. Picklable."""

    tiles: Mapping[str, Sequence[Tiles]]

    @classmethod
    def of(cls, optical: str | list[str], radar: str | list[str], schemas: Schemas) -> SensorGroups:
        """The groups that the keys `objective.optical` and `objective.radar` describe, of sources with `schemas`.

        Raises `ValueError` for what is neither tile, sensor nor kind, for a group without a tile in a source, and for a
        tile that is in both.
        """
        asked = dict(zip(GROUPS, (optical, radar), strict=True))
        tiles = {
            group: _tiles_of(group, [wanted] if isinstance(wanted, str) else wanted, schemas)
            for group, wanted in asked.items()
        }
        for first, second in zip(*tiles.values(), strict=True):
            if both := [name for name in first if name in second]:
                raise ValueError(f"objective.optical and objective.radar: {both[0]} is in both; name the tiles of each")
        return cls(tiles)

    def names(self, sample: Sample, group: str) -> list[str]:
        """The tiles of a sample that are of the group, in the order of the sources; `ValueError` where it has none."""
        known = dict.fromkeys(name for source in self.tiles[group] for name in source)
        names = [name for name in known if name in sample.tiles]
        if not names:
            raise ValueError(f"it has none of the tiles of objective.{group}, but {', '.join(sample.tiles)}")
        return names

    def shown(self, group: str) -> list[TileSchema]:
        """What views of the group may show: tiles; those that are shown together (resolutions of a sensor) as one."""
        return [image for source in self.tiles[group] for image in _images(source)]


def _tiles_of(group: str, wanted: Sequence[str], schemas: Schemas) -> list[Tiles]:
    """The tiles of each source that `wanted` names, or that have bands of such kinds alone."""
    tiles = list(dict.fromkeys(name for schema in schemas for name in schema))
    known = [*tiles, *dict.fromkeys(map(_sensor, tiles)), *_PIXEL_KINDS]
    for entry in wanted:
        if entry not in known:
            raise ValueError(
                f"objective.{group}: no source has a tile {entry!r}{suggest(entry, known)} (there are"
                f" {', '.join(tiles)}; or name a kind of band: {', '.join(_PIXEL_KINDS)})"
            )
    found = [{n: tile for n, tile in schema.items() if _is_wanted(n, tile, wanted)} for schema in schemas]
    for schema, chosen in zip(schemas, found, strict=True):
        if not chosen:
            raise ValueError(
                f"objective.{group}: {' or '.join(wanted) or 'nothing'} is not among the tiles of a source, which has"
                f" {', '.join(schema)}"
            )
    return found


def _is_wanted(name: str, tile: TileSchema, wanted: Sequence[str]) -> bool:
    kinds = {band.kind for band in tile.sensor.bands if band.name in tile.bands}
    return name in wanted or _sensor(name) in wanted or kinds <= set(wanted)


def _sensor(tile: str) -> str:
    return tile.partition("@")[0]


def _images(source: Tiles) -> list[TileSchema]:
    """The tiles of a source, those that are shown together as one with all their bands."""
    like = Sample("", {n: Tile(np.empty((len(t.bands), 1, 1)), t.bands, t.gsd_m) for n, t in source.items()})
    images = []
    for names in images_of(like, source):
        parts = [source[name] for name in names]
        bands, mean, std = (tuple(v for p in parts for v in getattr(p, key)) for key in ("bands", "mean", "std"))
        images.append(replace(parts[0], bands=bands, mean=mean, std=std))
    return images
