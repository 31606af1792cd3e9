"""Global and local views of one place, through one sensor or several (DINO's multi-crop, Panopticon's views).

An *image* of a sample is what one sensor saw at one time: one tile, or several tiles of different resolution, which are
then cropped together. Each view shows one image, a random box of it, and some of its bands.

V global views and L local views of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from ssl_eo.components import suggest
from ssl_eo.data.plans import CropConfig, band_subset, carried_box, resized_crop
from ssl_eo.data.spectral import covered_bands, synthesise
from ssl_eo.data.stacking import stack
from ssl_eo.data.types import Batch, Sample, Tile, TileSchema, View, ViewPlan
from ssl_eo.seeding import numpy_generator

__all__ = [
    "Crops",
    "MultiCrop",
    "MultiCropConfig",
    "MultiCropViews",
    "SpectralCropConfig",
    "crop_image",
    "images_of",
]

Image = tuple[str, ...]  # names of tiles
Crops = dict[str, list[View]]  # the views of a sample by role

_PIXEL_KINDS = ("optical", "thermal", "sar")


@dataclass
class SpectralCropConfig:
    """Which bands of its image a view shows."""

    n_bands: tuple[int, int] | None = None  # range of their number, drawn uniformly; null: all
    synthesis_prob: float = 0.0  # of virtual bands, mixed from those of a hyperspectral image, in their stead
    synthesis_fwhm_um: tuple[float, float] = (0.0118, 0.0942)  # range of the width of virtual bands

    def __post_init__(self) -> None:
        if self.n_bands is not None and not 1 <= self.n_bands[0] <= self.n_bands[1]:
            raise ValueError(f"n_bands must be [low, high] with 1 <= low <= high, got {list(self.n_bands)}")
        if not 0 <= self.synthesis_prob <= 1:
            raise ValueError(f"synthesis_prob must be in [0, 1], got {self.synthesis_prob}")
        if self.synthesis_prob and self.n_bands is None:
            raise ValueError("synthesis_prob needs n_bands: how many bands are mixed")
        if not 0 < self.synthesis_fwhm_um[0] <= self.synthesis_fwhm_um[1]:
            raise ValueError(f"synthesis_fwhm_um must be [low, high] in um, above 0, got {self.synthesis_fwhm_um}")


@dataclass
class MultiCropConfig:
    """Defaults are those of DINOv2 for the crops; all bands are shown."""

    # Tiles that may be shown; null: all with optical, thermal and radar bands (not elevation, not class maps).
    tiles: list[str] | None = None
    global_crop: CropConfig = field(default_factory=lambda: CropConfig(size_px=224, scale=(0.32, 1.0)))
    local_crop: CropConfig = field(default_factory=lambda: CropConfig(size_px=98, scale=(0.05, 0.32)))
    n_global: int = 2  # views of a sample
    n_local: int = 8  # views of a sample
    # across: global views show different images of a sample if it has them, local views any; within: all views one.
    pairing: Literal["across", "within"] = "across"
    global_bands: SpectralCropConfig = field(default_factory=SpectralCropConfig)
    local_bands: SpectralCropConfig = field(default_factory=SpectralCropConfig)
    # sample: each view draws bands of its own; step: all views of a role have the same number of them, as far as their
    # images go, and views of one number and image the same bands, so that views of one sensor are never padded.
    bands_per: Literal["sample", "step"] = "sample"
    hyperspectral_min_bands: int = 100  # an image with so many optical bands in one tile can be mixed into virtual ones

    def __post_init__(self) -> None:
        if self.n_global < 2 or self.n_local < 0:
            raise ValueError(
                f"n_global must be at least 2 and n_local at least 0, got {self.n_global} and {self.n_local}"
            )
        if self.hyperspectral_min_bands < 2:
            raise ValueError(f"hyperspectral_min_bands must be at least 2, got {self.hyperspectral_min_bands}")

    def of(self, role: str) -> Role:
        """What is said of the role "global" or "local"."""
        if role == "global":
            return Role(self.global_crop, self.global_bands, self.n_global)
        return Role(self.local_crop, self.local_bands, self.n_local)


@dataclass(frozen=True)
class Role:
    """What the views of one role have in common."""

    crop: CropConfig
    bands: SpectralCropConfig
    n_views: int


@dataclass(frozen=True)
class MultiCrop:
    """Draws the views of samples from sources with `schemas`, one mapping of tile names for each source. Picklable."""

    cfg: MultiCropConfig
    schemas: Sequence[Mapping[str, TileSchema]]

    def __post_init__(self) -> None:
        self.tiles  # noqa: B018  # what is wrong with them is said here, before the workers start

    @cached_property
    def tiles(self) -> list[dict[str, TileSchema]]:
        """What views may show of each source; `ValueError` where that is nothing, or no pixels, or no source has it."""
        known = list(dict.fromkeys(name for schema in self.schemas for name in schema))
        for name in self.cfg.tiles or ():
            if name not in known:
                hint = suggest(name, known)
                raise ValueError(f"objective.crops.tiles: no source has {name}{hint} (there are {', '.join(known)})")
        return [self._usable(schema) for schema in self.schemas]

    def draw(self, sample: Sample, rng: np.random.Generator) -> Crops:
        """Plans of the views of a sample by role, "global" and "local"; of all bands if `bands_per` is step."""
        images = self.images(sample)
        order = rng.permutation(len(images)).tolist()
        if self.cfg.pairing == "within":
            order = order[:1]
        return {role: self._draw_role(role, sample, [images[i] for i in order], rng) for role in ("global", "local")}

    def images(self, sample: Sample) -> list[Image]:
        """The sample's tiles by image: those of one sensor and date that have no band in common.

        Raises `ValueError` for a sample that has none of the tiles that views may show.
        """
        images = images_of(sample, filter(self._names.__contains__, sample.tiles))
        if not images:
            raise ValueError(f"it has none of the tiles of objective.crops.tiles, but {', '.join(sample.tiles)}")
        return images

    def share_bands(
        self, views: Mapping[str, Sequence[Sequence[View]]], source: int, rng: np.random.Generator
    ) -> dict[str, list[list[View]]]:
        """The views of a batch (role -> number -> samples) with bands for the step, if `bands_per` is step.

        All views of a role get as many bands as their images have of them, and views of one number that show the same
        image get the same. `rng` is that of the step; choices are addressed by what they are for, since the ranks meet
        images in different orders.
        """
        if self.cfg.bands_per == "sample":
            return {role: [list(row) for row in rows] for role, rows in views.items()}
        base, shown = int(rng.integers(2**62)), {n: t.bands for n, t in self.tiles[source].items()}
        of_step = {role: _of_one_number(self.cfg.of(role).bands, numpy_generator(base, role)) for role in views}

        def share(role: str, number: int, view: View) -> View:
            parts = view if isinstance(view, tuple) else (view,)
            rng = numpy_generator(base, role, number, *(part.tile for part in parts))
            return self._with_bands(of_step[role], parts, shown, rng)

        return {
            role: [[share(role, number, view) for view in row] for number, row in enumerate(rows)]
            for role, rows in views.items()
        }

    def _usable(self, schema: Mapping[str, TileSchema]) -> dict[str, TileSchema]:
        cfg = self.cfg
        kinds = {name: {band.kind for band in tile.sensor.bands} for name, tile in schema.items()}
        names = [n for n in schema if (kinds[n] <= set(_PIXEL_KINDS) if cfg.tiles is None else n in cfg.tiles)]
        if maps := [name for name in names if "categorical" in kinds[name]]:
            raise ValueError(f"objective.crops.tiles: {', '.join(maps)} is a class map; leave it out")
        if not names:
            wanted = "one with optical, thermal or radar bands" if cfg.tiles is None else " or ".join(cfg.tiles)
            raise ValueError(f"objective.crops.tiles: {wanted} is not among the tiles of a source: {', '.join(schema)}")
        return {name: schema[name] for name in names}

    def _draw_role(self, role: str, sample: Sample, images: Sequence[Image], rng: np.random.Generator) -> list[View]:
        of_role = self.cfg.of(role)
        views: list[View] = []
        for i in range(of_role.n_views):
            # Different images as far as they go for global views; any for local ones.
            image = images[i if role == "global" and i < len(images) else int(rng.integers(len(images)))]
            parts = crop_image(sample, image, of_role.crop, rng)
            if self.cfg.bands_per == "sample":
                shown = {name: sample.tiles[name].bands for name in image}
                views.append(self._with_bands(of_role.bands, parts, shown, rng))
            else:
                views.append(parts if len(parts) > 1 else parts[0])
        return views

    def _with_bands(
        self,
        cfg: SpectralCropConfig,
        parts: tuple[ViewPlan, ...],
        shown: Mapping[str, tuple[str, ...]],
        rng: np.random.Generator,
    ) -> View:
        """The plans of one image with a random subset of all its bands, or with virtual ones; tiles without any go."""
        if cfg.n_bands is not None:
            if len(parts) == 1 and cfg.synthesis_prob:
                schema = self._hyperspectral.get((parts[0].tile, shown[parts[0].tile]))
                if schema is not None and rng.random() < cfg.synthesis_prob:
                    n_bands = int(rng.integers(cfg.n_bands[0], cfg.n_bands[1] + 1))
                    return replace(parts[0], synthesis=synthesise(rng, schema, n_bands, cfg.synthesis_fwhm_um))
            parts = _with_subset(parts, [len(shown[part.tile]) for part in parts], cfg.n_bands, rng)
        return parts if len(parts) > 1 else parts[0]

    @cached_property
    def _names(self) -> set[str]:
        """Of the tiles that views may show of any source."""
        return {name for tiles in self.tiles for name in tiles}

    @cached_property
    def _hyperspectral(self) -> dict[tuple[str, tuple[str, ...]], TileSchema]:
        """Tiles that can be mixed, by name and bands: sources may hold tiles of one name with other bands."""
        return {
            (name, tile.bands): tile
            for tiles in self.tiles
            for name, tile in tiles.items()
            if len(covered_bands(tile)) >= self.cfg.hyperspectral_min_bands
        }


@dataclass(frozen=True)
class MultiCropViews:
    """The `Views` of an objective that looks at global and local crops and at nothing else."""

    crops: MultiCrop

    def plan(self, sample: Sample, rng: np.random.Generator) -> Crops:
        return self.crops.draw(sample, rng)

    def collate(self, planned: list[tuple[Sample, Crops]], step: int, source: int, rng: np.random.Generator) -> Batch:
        samples, plans = [sample for sample, _ in planned], [plan for _, plan in planned]
        by_number = {role: list(zip(*(plan[role] for plan in plans), strict=True)) for role in plans[0]}
        shared = self.crops.share_bands({role: rows for role, rows in by_number.items() if rows}, source, rng)
        roles = {
            role: [[_with_data(view, sample) for view, sample in zip(row, samples, strict=True)] for row in rows]
            for role, rows in shared.items()
        }
        tiles, views = stack(samples, roles, self.crops.schemas[source])
        return Batch(step=step, source=source, keys=[s.key for s in samples], tiles=tiles, views=views)


def _with_data(view: View, sample: Sample) -> View:
    """The view, with other bands where those that were drawn hold no data in the sample: as many of those that do."""
    parts = view if isinstance(view, tuple) else (view,)
    if any(part.synthesis is not None or _holds_data(sample.tiles[part.tile], part.bands) for part in parts):
        return view
    tiles = [sample.tiles[part.tile] for part in parts]
    held = [[i for i in range(len(tile.bands)) if _holds_data(tile, (i,))] for tile in tiles]
    n_drawn = sum(0 if part.bands is None else len(part.bands) for part in parts)
    part, bands = max(zip(parts, held, strict=True), key=lambda pair: len(pair[1]))
    return replace(part, bands=tuple(bands[:n_drawn]))


def _holds_data(tile: Tile, bands: tuple[int, ...] | None) -> bool:
    """Whether any pixel of the bands of a tile, which was cut to its views, was measured."""
    measured = tile.measured
    return measured is None or any(measured[i].any() for i in (range(len(tile.bands)) if bands is None else bands))


def images_of(sample: Sample, names: Iterable[str]) -> list[Image]:
    """The tiles `names` of a sample by image: those of one sensor and date that have no band in common."""
    images: list[list[str]] = []
    for name in names:
        for image in images:
            if _belongs(name, image, sample):
                image.append(name)
                break
        else:
            images.append([name])
    return [tuple(image) for image in images]


def _of_one_number(cfg: SpectralCropConfig, rng: np.random.Generator) -> SpectralCropConfig:
    """The same with the number of bands drawn."""
    if cfg.n_bands is None:
        return cfg
    n_bands = int(rng.integers(cfg.n_bands[0], cfg.n_bands[1] + 1))
    return replace(cfg, n_bands=(n_bands, n_bands))


def _belongs(name: str, image: Sequence[str], sample: Sample) -> bool:
    """Whether the tile shows what the image does, in other bands: a tile name begins with that of its sensor."""
    tile, first = sample.tiles[name], sample.tiles[image[0]]
    shown = {band for other in image for band in sample.tiles[other].bands}
    same_sensor = name.partition("@")[0] == image[0].partition("@")[0]
    return same_sensor and tile.date == first.date and shown.isdisjoint(tile.bands)


def crop_image(sample: Sample, image: Image, crop: CropConfig, rng: np.random.Generator) -> tuple[ViewPlan, ...]:
    """One box on the ground, drawn on the finest of the tiles `image` and carried over to the others: a plan of each.

    All are equally flipped, turned and jittered. Raises `ValueError` for a tile that does not cover the box.
    """
    tiles = sample.tiles
    finest = min(image, key=lambda name: tiles[name].gsd_m)
    plan = resized_crop(sample, finest, crop, rng)
    plans = []
    for name in image:
        shape = tiles[name].pixels.shape[-2:]
        box = plan.box if name == finest else carried_box(plan.box, tiles[finest].gsd_m, tiles[name].gsd_m, shape)
        if box is None:
            raise ValueError(f"tile {name!r} of {shape} pixels does not cover the view of {finest!r}")
        plans.append(replace(plan, tile=name, box=box))
    return tuple(plans)


def _with_subset(
    parts: tuple[ViewPlan, ...], counts: Sequence[int], n_bands: tuple[int, int], rng: np.random.Generator
) -> tuple[ViewPlan, ...]:
    """A random subset of all bands of all parts, of which each has one of `counts`; at least one part is left."""
    chosen = np.array(band_subset(rng, sum(counts), *n_bands))
    starts = np.cumsum([0, *counts])
    kept = []
    for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True):
        mine = chosen[(chosen >= start) & (chosen < stop)] - start
        if len(mine):
            kept.append(replace(part, bands=tuple(mine.tolist())))
    return tuple(kept)
