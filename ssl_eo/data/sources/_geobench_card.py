"""What `datasets_meta/datasets/geobench.yaml` says of the twelve datasets of GeoBench version 1.

C bands, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ssl_eo.components import suggest
from ssl_eo.data.sources._side_files import dataset_card
from ssl_eo.sensors import Sensor, load_sensor

__all__ = ["Bands", "DatasetCard", "Kind", "Slip", "TileCard", "card_of", "folded"]

Bands = Literal["corrected", "as_published"]
Kind = Literal["classification", "multilabel", "segmentation"]  # of labels, as tasks name them


@dataclass(frozen=True)
class TileCard:
    """One tile: arrays `keys` of a file, in order, hold `bands` of the sensor; together `[C, *shape]`.

    Where there are fewer keys than bands, each array has a last dimension of bands.
    """

    sensor: Sensor
    keys: tuple[str, ...]
    bands: tuple[str, ...]
    units: tuple[str, ...]  # what stored values may be, see `_geobench_units`
    dtypes: tuple[str, ...]
    shape: tuple[int, int]
    gsd_m: float
    nominal_bands: bool  # nobody knows which bands the array holds

    @property
    def bands_per_key(self) -> int:
        return len(self.bands) // len(self.keys)


@dataclass(frozen=True)
class Slip:
    """How statistics tell that bands are stored under names of others: the one of array `key` is `at_most` so much."""

    key: str
    statistic: str
    at_most: float
    holds: str  # what the array holds then


@dataclass(frozen=True)
class DatasetCard:
    """One dataset. `tiles` are by how bands are named, then by name of the tile."""

    name: str
    aliases: tuple[str, ...]
    folder: str
    kind: Kind
    metric: str  # that GeoBench compares models by
    split_sizes: Mapping[str, int]  # as published
    classes: tuple[str, ...]  # in the order of labels
    no_data_classes: tuple[str, ...]
    tiles: Mapping[Bands, Mapping[str, TileCard]]
    slip: Slip | None
    leak: str | None  # why its scores are too good
    label_noise_ratio: float | None  # estimated share of wrong labels in the test split
    licence: str | None
    group_pattern: str | None  # fits names of samples; its group is what those of one place share
    samples_per_group: int  # above 1: what the pattern finds is a number, and so many in a row share a place

    def group_of(self, key: str) -> str | None:
        """The place of a sample, as far as its name tells; None where names of this dataset tell nothing."""
        if self.group_pattern is None:
            return None
        found = re.fullmatch(self.group_pattern, key)
        if found is None:
            return key
        return found[1] if self.samples_per_group == 1 else str(int(found[1]) // self.samples_per_group)

    def folder_names(self) -> frozenset[str]:
        """Names that its folder may have, folded."""
        return frozenset(folded(name) for name in (self.name, *self.aliases))


def card_of(name: str) -> DatasetCard:
    """The dataset `name`, or of which it is an alias, in upper or lower case. Raises `ValueError` for others."""
    cards = _cards()
    for card in cards:
        if folded(name) in card.folder_names():
            return card
    known = [card.name for card in cards]
    raise ValueError(f"dataset: GeoBench has no {name!r}{suggest(name, known)} (it has {', '.join(known)})")


def folded(name: str) -> str:
    """A name without what copies of the archive spell differently."""
    return name.lower().replace("_", "-")


@cache
def _cards() -> tuple[DatasetCard, ...]:
    return tuple(_dataset(name, raw) for name, raw in dataset_card("geobench")["datasets"].items())


def _dataset(name: str, raw: Mapping[str, Any]) -> DatasetCard:
    group = raw.get("group", {})
    corrected = _tiles(raw["tiles"])
    published = _tiles(raw["tiles_as_published"]) if "tiles_as_published" in raw else corrected
    return DatasetCard(
        name=name,
        aliases=tuple(raw["aliases"]),
        folder=raw["folder"],
        kind=raw["kind"],
        metric=raw["metric"],
        split_sizes=raw["split_sizes"],
        classes=tuple(raw["classes"]),
        no_data_classes=tuple(raw.get("no_data_classes", ())),
        tiles={"corrected": corrected, "as_published": published},
        slip=Slip(**raw["slip"]) if "slip" in raw else None,
        leak=raw.get("leak"),
        label_noise_ratio=raw.get("label_noise_ratio"),
        licence=raw.get("licence"),
        group_pattern=group.get("pattern"),
        samples_per_group=group.get("samples_per_group", 1),
    )


def _tiles(raw: Mapping[str, Any]) -> dict[str, TileCard]:
    return {name: _tile(name, entry) for name, entry in raw.items()}


def _tile(name: str, raw: Mapping[str, Any]) -> TileCard:
    sensor, height_width = load_sensor(name), raw["shape"]
    bands = sensor.resolve_bands(raw["bands"])[: raw.get("n_bands")]
    return TileCard(
        sensor=sensor,
        keys=tuple(raw["keys"]),
        bands=bands,
        units=tuple(raw["units"]),
        dtypes=tuple(raw["dtypes"]),
        shape=(height_width[0], height_width[1]),
        gsd_m=raw["gsd_m"],
        nominal_bands=raw.get("nominal_bands", False),
    )
