"""Draw view plans from a sample's own generator: host work on a few numbers per view, no pixel is touched.

Boxes are (top, left, height, width) in pixels of their tile and lie inside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ssl_eo.data.types import Sample, Tile, TileSchema, ViewLimits, ViewPlan

__all__ = [
    "CropConfig",
    "SourceCrop",
    "aligned",
    "band_subset",
    "carried_box",
    "multi_crop",
    "resized_crop",
    "same_ground",
    "whole",
]

_N_TRIES = 10
_LEAST_SIDE = 0.01  # of a box, pixels


@dataclass
class CropConfig:
    """A random resized crop with flips, quarter turns and jitter.

    Jitter is one affine per view on standardised values, not clamped: with probability `jitter_prob` a value v becomes
    `v * (1 + c) + b`, with c uniform in [-contrast, contrast] and b uniform in [-brightness, brightness]. Both are thus
    in standard deviations of the band, and 0 is the band's mean over the dataset.
    """

    size_px: int  # height and width of the view, in pixels
    scale: tuple[float, float] = (0.2, 1.0)  # range of the box's share of the tile's area; from 1, always all of it
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # range of the box's width / height
    flip: bool = True  # left-right, with probability 1/2
    rot90: bool = True  # 0 to 3 quarter turns, equally likely; imagery from above has no up
    brightness: float = 0.0  # largest added value, in standard deviations
    contrast: float = 0.0  # largest relative change of the values
    jitter_prob: float = 0.0  # probability that a view is jittered

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise ValueError(f"size_px must be at least 1, got {self.size_px}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high <= 1, got {tuple(self.scale)}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect must be (low, high) with 0 < low <= high, got {tuple(self.aspect)}")
        if self.brightness < 0:
            raise ValueError(f"brightness must not be negative, got {self.brightness}")
        if not 0 <= self.contrast < 1:
            raise ValueError(f"contrast must be in [0, 1), got {self.contrast}")
        if not 0 <= self.jitter_prob <= 1:
            raise ValueError(f"jitter_prob must be in [0, 1], got {self.jitter_prob}")


@dataclass
class SourceCrop:
    """What one of several sources adds to the crops of the objective, so that their views suit each other.

    A window, one for all views of a sample, takes the place of the tile; and boxes are such that the pixels of views
    have a ground size in a range, as far as tile or window are large enough.
    """

    # range of the side of the window, metres, drawn log-uniformly; null: the tile
    extent_m: tuple[float, float] | None = None
    gsd_m: tuple[float, float] | None = None  # range of the ground size of a view's pixel, metres; null: any

    def __post_init__(self) -> None:
        for name in ("extent_m", "gsd_m"):
            found = getattr(self, name)
            if found is not None and not 0 < found[0] <= found[1] < math.inf:
                raise ValueError(f"{name} must be [low, high] in metres with 0 < low <= high, got {list(found)}")

    def draw(self, sample: Sample, rng: np.random.Generator) -> ViewLimits:
        """The limits of one sample's views: one window on the ground that all of its tiles cover."""
        if self.extent_m is None:
            return ViewLimits(gsd_m=self.gsd_m)
        u_side, u_top, u_left = rng.random(3).tolist()
        low, high = map(math.log, self.extent_m)
        side = math.exp(low + u_side * (high - low))
        height, width = (min(t.pixels.shape[axis] * t.gsd_m for t in sample.tiles.values()) for axis in (-2, -1))
        h, w = min(side, height), min(side, width)
        return ViewLimits((u_top * (height - h), u_left * (width - w), h, w), self.gsd_m)


def whole(tile: str, shape: tuple[int, int], size_px: int) -> ViewPlan:
    """The whole tile of `shape` (H, W), resized to `size_px` squared: the view of an evaluation."""
    return ViewPlan(tile, (0.0, 0.0, float(shape[0]), float(shape[1])), (size_px, size_px))


def resized_crop(
    sample: Sample, tile: str, cfg: CropConfig, rng: np.random.Generator, bands: tuple[int, ...] | None = None
) -> ViewPlan:
    """A box of random area, aspect and place in a tile, resized, flipped, turned and jittered; see `Sample.limits`."""
    flip = cfg.flip and bool(rng.random() < 0.5)
    rot90 = int(rng.integers(4)) if cfg.rot90 else 0
    gain, bias = 1.0, 0.0
    if cfg.jitter_prob > 0 and rng.random() < cfg.jitter_prob:
        gain += float(rng.uniform(-cfg.contrast, cfg.contrast))
        bias = float(rng.uniform(-cfg.brightness, cfg.brightness))
    room = _room(sample.tiles[tile], sample.limits)
    areas = _areas(sample.tiles[tile], sample.limits, room, cfg)
    top, left, height, width = _crop_box(room[2:], areas, cfg.aspect, rng)
    box = _not_vanishing((room[0] + top, room[1] + left, height, width), sample.tiles[tile])
    return ViewPlan(tile, box, (cfg.size_px, cfg.size_px), flip, rot90, bands, gain, bias)


def _room(tile: Tile, limits: ViewLimits) -> tuple[float, float, float, float]:
    """The part of the tile in which views may lie: (top, left, height, width)."""
    height, width = map(float, tile.pixels.shape[-2:])
    if limits.window_m is None:
        return 0.0, 0.0, height, width
    top, left, h, w = (edge / tile.gsd_m for edge in limits.window_m)
    return top, left, min(h, height - top), min(w, width - left)


def _not_vanishing(box: tuple[float, float, float, float], tile: Tile) -> tuple[float, float, float, float]:
    """The box, enlarged where limits made it so small a part of a pixel that float32 would find no pixel under it."""
    height, width = max(box[2], _LEAST_SIDE), max(box[3], _LEAST_SIDE)
    return min(box[0], tile.pixels.shape[-2] - height), min(box[1], tile.pixels.shape[-1] - width), height, width


def _areas(
    tile: Tile, limits: ViewLimits, room: tuple[float, float, float, float], cfg: CropConfig
) -> tuple[float, float]:
    """Range of a box's area in square pixels of the tile: as `cfg.scale` says, as far as the limits allow it."""
    whole_area = room[2] * room[3]
    low, high = cfg.scale[0] * whole_area, cfg.scale[1] * whole_area
    if limits.gsd_m is None:
        return low, high
    finest, coarsest = ((gsd_m * cfg.size_px / tile.gsd_m) ** 2 for gsd_m in limits.gsd_m)
    if low > coarsest or high < finest:  # no area suits both: the nearest that the limits allow and the tile has
        low = high = coarsest if low > coarsest else finest
    low, high = max(low, finest), min(high, coarsest)
    return min(low, whole_area), min(high, whole_area)


def _crop_box(
    shape: tuple[float, float], areas: tuple[float, float], aspects: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Area uniform in `areas`, aspect log-uniform, both redrawn until the box fits; else the largest centred box
    whose aspect is allowed (Szegedy et al. 2015, section 6, in the form used since by the field).
    """
    height, width = shape
    if areas[0] == height * width:
        return 0.0, 0.0, height, width  # the only box with the area of the whole tile
    low, high = math.log(aspects[0]), math.log(aspects[1])
    for u_area, u_aspect, u_top, u_left in rng.random((_N_TRIES, 4)).tolist():
        area = areas[0] + u_area * (areas[1] - areas[0])
        aspect = math.exp(low + u_aspect * (high - low))
        h, w = math.sqrt(area / aspect), math.sqrt(area * aspect)
        if h <= height and w <= width:
            return u_top * (height - h), u_left * (width - w), h, w
    aspect = min(max(width / height, aspects[0]), aspects[1])
    h, w = min(height, width / aspect), min(width, height * aspect)
    smaller = min(1.0, math.sqrt(areas[1] / (h * w)))
    h, w = h * smaller, w * smaller
    return (height - h) / 2, (width - w) / 2, h, w


def multi_crop(
    sample: Sample, tile: str, crops: Mapping[str, tuple[CropConfig, int]], rng: np.random.Generator
) -> dict[str, list[ViewPlan]]:
    """Several crops of one tile: role -> (config, number of views) becomes role -> plans.

    Two views are `{"view": (cfg, 2)}`; multi-crop is `{"global": (cfg_global, 2), "local": (cfg_local, 8)}`.
    """
    return {role: [resized_crop(sample, tile, cfg, rng) for _ in range(n)] for role, (cfg, n) in crops.items()}


def same_ground(sample: Sample, plan: ViewPlan, name: str) -> ViewPlan:
    """The view `plan` as the tile `name` of the sample shows it, equally flipped, turned and jittered.

    Raises `ValueError` where that tile does not cover the ground.
    """
    own, other = sample.tiles[name], sample.tiles[plan.tile]
    box = carried_box(plan.box, other.gsd_m, own.gsd_m, own.pixels.shape[-2:])
    if box is None:
        raise ValueError(f"tile {name!r} does not cover the view of {plan.tile!r}")
    return replace(plan, tile=name, box=box)


def aligned(
    plan: ViewPlan,
    schema: TileSchema,
    other: str,
    other_schema: TileSchema,
    size: tuple[int, int] | None = None,
    size_ratio: float = 1.0,
) -> ViewPlan:
    """The view of the tile `other` that shows the same ground, equally flipped and turned, as `plan` does of its tile.

    Tiles of a sample share the top left corner of their footprint, so a box is carried over in metres, by the ground
    sampling of the schemas: give `replace(schema, gsd_m=tile.gsd_m)` for tiles that have their own. The view has
    `size` (h, w), or by default the plan's size times `size_ratio`. Bands and jitter belong to a sensor and are not
    carried over. Footprints are rarely a whole number of pixels of every sensor: up to one pixel of overhang is cut
    off; a `ValueError` says when the other tile does not cover the box.
    """
    if other_schema.shape is None:
        raise ValueError(
            f"tile {other!r} differs in size between samples: give its own shape with replace(schema, ...)"
        )
    box = carried_box(plan.box, schema.gsd_m, other_schema.gsd_m, other_schema.shape)
    if box is None:
        raise ValueError(
            f"tile {other!r} of {other_schema.shape[0]} x {other_schema.shape[1]} pixels of {other_schema.gsd_m:g} m"
            f" does not cover the box {plan.box} of tile {plan.tile!r} ({schema.gsd_m:g} m a pixel); draw the plan on"
            " the smaller footprint"
        )
    h, w = size or (round(plan.size[0] * size_ratio), round(plan.size[1] * size_ratio))
    return ViewPlan(other, box, (h, w), plan.flip, plan.rot90)


def carried_box(
    box: tuple[float, float, float, float], gsd_m: float, other_gsd_m: float, other_shape: tuple[int, ...]
) -> tuple[float, float, float, float] | None:
    """The box of a tile with pixels of `gsd_m` in pixels of another tile of (H, W), which shares its top left corner.

    Up to one pixel of overhang is cut off; None where the other tile does not cover the box.
    """
    top, left, height, width = (gsd_m / other_gsd_m * edge for edge in box)
    (tile_height, tile_width), slack = other_shape, 1.0 + 1e-6
    if top + height > tile_height + slack or left + width > tile_width + slack:
        return None
    return top, left, min(height, tile_height - top), min(width, tile_width - left)


def band_subset(rng: np.random.Generator, n_bands: int, low: int, high: int) -> tuple[int, ...]:
    """Ascending positions of a random subset of `n_bands` bands; its size is uniform in `low` to `high`.

    All bands when there are no more than `low`. Rows of one batch need equal counts: give them `low == high`.
    """
    if not 1 <= low <= high:
        raise ValueError(f"a band subset needs 1 <= low <= high, got low {low} and high {high}")
    if n_bands <= low:
        return tuple(range(n_bands))
    n_kept = int(rng.integers(low, min(high, n_bands) + 1))
    return tuple(np.sort(rng.permutation(n_bands)[:n_kept]).tolist())
