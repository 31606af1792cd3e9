"""Samples and their plans become tensors of static shape; whether a sample is what its schema says, and holds data.

This runs where samples are read, on the host. Pixels are copied once, in their stored dtype.

B samples, b of them are stacked for one tile, V views of one role per sample, R = V*B rows of a role (views outermost),
r rows that show one tile, C bands of a tile, c bands of a view, H W tile pixels, h w view pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_eo.data.types import Sample, Tile, TileBatch, TileSchema, ViewBatch, ViewPlan, is_gsd_m
from ssl_eo.sensors import Sensor

__all__ = ["check_sample", "cut_to_views", "loaded", "shown_plans", "stack", "stack_tiles", "stack_views"]


def check_sample(sample: Sample, schema: Mapping[str, TileSchema]) -> None:
    """Raises `ValueError` when a tile that is not optional is missing from the sample, or one has another shape, dtype
    or band list than `schema` says, or a ground sampling that is no length, or when there is no tile at all.

    The message names sample, tile, what was found and what is expected.
    """
    for name, expected in schema.items():
        if name in sample.tiles or not expected.optional:
            _check_tile(_tile(sample, name), name, sample.key, expected)
    if not sample.tiles:
        raise ValueError(f"sample {sample.key!r} has no tile (it may have {', '.join(schema)})")


def shown_plans(planned: Any) -> list[ViewPlan]:
    """The view plans in `planned`, which may lie in tuples, lists, dicts, dataclasses."""
    if isinstance(planned, ViewPlan):
        return [planned]
    inner: Iterable[Any] = ()
    if isinstance(planned, (tuple, list)):
        inner = planned
    elif isinstance(planned, Mapping):
        inner = planned.values()
    elif is_dataclass(planned):
        inner = (getattr(planned, f.name) for f in fields(planned))
    return [plan for item in inner for plan in shown_plans(item)]


def loaded(sample: Sample) -> Sample:
    """The sample with all pixels of all its tiles read."""
    return replace(sample, tiles={name: replace(tile, pixels=tile.array) for name, tile in sample.tiles.items()})


def cut_to_views(sample: Sample, plans: Iterable[ViewPlan], schema: Mapping[str, TileSchema]) -> Sample:
    """The sample with the tiles that `plans` show, and of these what is to be read: see `Tile`.

    Tiles of one size stay whole; of others only the pixels in the boxes are kept. Raises `ValueError` for a tile that
    the sample lacks, whose pixels are not what `schema` says, now that they are read, or that is nothing but no-data.
    """
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for plan in plans:
        boxes.setdefault(plan.tile, []).append(plan.box)
    tiles = {}
    for name, shown in boxes.items():
        tile = _tile(sample, name)
        if schema[name].shape is None:
            tile = _cut(tile, shown)
        elif not isinstance(tile.pixels, np.ndarray):
            tile = replace(tile, pixels=tile.array)
        _check_tile(tile, name, sample.key, schema[name])
        tile.measured = _measured(tile, schema[name].sensor)
        if tile.measured is not None and not tile.measured.any():
            raise ValueError(f"tile {name!r} of sample {sample.key!r} is all no-data")
        tiles[name] = tile
    return replace(sample, tiles=tiles)


def stack(
    samples: Sequence[Sample], roles: Mapping[str, Sequence[Sequence[ViewPlan]]], schema: Mapping[str, TileSchema]
) -> tuple[dict[str, TileBatch], dict[str, list[ViewBatch]]]:
    """The tiles that the plans of `roles` show, and the plans, as tensors of static shape.

    A role has one row of plans for each of its views (views outermost), each with one plan a sample. Plans of one role
    may show different tiles, also with different numbers of bands, but share a size. A tile is stacked over the samples
    whose views show it; where tiles differ in size, the smaller ones are filled up with zeros. `samples` are those that
    `cut_to_views` has checked.
    """
    shown: dict[str, set[int]] = {}  # tile name -> the samples whose views show it
    for sample, plan in (pair for views in roles.values() for view in views for pair in enumerate(view)):
        shown.setdefault(plan.tile, set()).add(sample)
    held = {name: sorted(found) for name, found in shown.items()}
    tiles = {
        name: _stack_tile([samples[i].tiles[name] for i in found], schema[name].sensor) for name, found in held.items()
    }
    placed = {
        role: [[_from_origin(plan, sample) for plan, sample in zip(view, samples, strict=True)] for view in views]
        for role, views in roles.items()
    }
    return tiles, {role: _stack_role(views, held, schema) for role, views in placed.items()}


def stack_tiles(
    samples: Sequence[Sample], names: Iterable[str], schema: Mapping[str, TileSchema]
) -> dict[str, TileBatch]:
    """The tiles `names` of all samples, `[B, C, H, W]` in the stored dtype.

    Raises `ValueError` as `check_sample` does for a tile that does not match the schema.
    """
    stacked = {}
    for name in names:
        for sample in samples:
            _check_tile(_tile(sample, name), name, sample.key, schema[name])
        stacked[name] = _stack_tile([sample.tiles[name] for sample in samples], schema[name].sensor)
    return stacked


def _stack_tile(tiles: Sequence[Tile], sensor: Sensor) -> TileBatch:
    masks = [_measured(tile, sensor) for tile in tiles]
    holds = [np.ones(len(t.bands), bool) if m is None else m.any((1, 2)) for t, m in zip(tiles, masks, strict=True)]
    present = np.stack(holds)  # [B, C]
    return TileBatch(
        pixels=torch.from_numpy(_stack_pixels([tile.array for tile in tiles])),  # [B, C, H, W]
        gsd_m=torch.tensor([tile.gsd_m for tile in tiles], dtype=torch.float32),  # [B]
        has_no_data=any(mask is not None and not mask.all() for mask in masks),
        present=None if present.all() else torch.from_numpy(present),  # [B, C]
    )


def _stack_pixels(pixels: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """`[B, C, H, W]`; the smaller ones are zero beyond their own height and width."""
    if len({p.shape for p in pixels}) == 1:
        return np.stack(pixels)
    height, width = (max(p.shape[axis] for p in pixels) for axis in (1, 2))
    out = np.zeros((len(pixels), pixels[0].shape[0], height, width), pixels[0].dtype)
    for row, p in zip(out, pixels, strict=True):
        row[:, : p.shape[1], : p.shape[2]] = p
    return out


def _cut(tile: Tile, boxes: Sequence[tuple[float, float, float, float]]) -> Tile:
    """The part of a tile that holds all `boxes`."""
    top, left = (math.floor(min(box[axis] for box in boxes)) for axis in (0, 1))
    bottom, right = (math.ceil(max(box[axis] + box[axis + 2] for box in boxes)) for axis in (0, 1))
    pixels = tile.pixels[:, top:bottom, left:right]
    return replace(tile, pixels=pixels, origin=(tile.origin[0] + top, tile.origin[1] + left))


def _from_origin(plan: ViewPlan, sample: Sample) -> ViewPlan:
    """The plan with its box in pixels of what is left of the tile."""
    if plan.tile not in sample.tiles or (origin := sample.tiles[plan.tile].origin) == (0, 0):
        return plan
    return replace(plan, box=(plan.box[0] - origin[0], plan.box[1] - origin[1], *plan.box[2:]))


def _tile(sample: Sample, name: str) -> Tile:
    if name not in sample.tiles:
        raise ValueError(f"sample {sample.key!r} has no tile {name!r} (tiles: {', '.join(sample.tiles) or 'none'})")
    return sample.tiles[name]


def _check_tile(tile: Tile, name: str, key: str, expected: TileSchema) -> None:
    try:
        expected.check(tile.pixels, tile.bands)
        if not is_gsd_m(tile.gsd_m):
            raise ValueError(f"gsd_m {tile.gsd_m!r:.80}, expected metres above 0, up to 1e6")
    except ValueError as error:
        raise ValueError(f"tile {name!r} of sample {key!r} has {error}") from None


def _measured(tile: Tile, sensor: Sensor) -> NDArray[np.bool_] | None:
    """True where a pixel was measured; None when the dtype and the sensor leave no way to say that it was not."""
    if tile.measured is not None:
        return tile.measured
    pixels = tile.array
    is_integer = np.issubdtype(pixels.dtype, np.integer)
    if is_integer and not sensor.no_data:
        return None
    valid: NDArray[np.bool_] = np.ones(pixels.shape, dtype=bool) if is_integer else np.isfinite(pixels)
    for value in sensor.no_data:
        # An integer compares without widening the array; a fraction is never stored in one.
        valid &= pixels != (int(value) if is_integer and float(value).is_integer() else value)
    return valid


def stack_views(plans_by_view: Sequence[Sequence[ViewPlan]]) -> list[ViewBatch]:
    """One role's plans of one tile as tensors: views outermost, then samples in the order of `stack_tiles`.

    Raises `ValueError` unless all plans share tile, size and number of bands, and all views have as many samples.
    """
    plans = [plan for view in plans_by_view for plan in view]
    kinds = {(p.tile, p.size, None if p.bands is None else len(p.bands)) for p in plans}
    if len(kinds) > 1:
        raise ValueError(
            f"plans must share tile, size and number of bands, got {sorted(kinds, key=str)}; else use stack"
        )
    every = list(range(len(plans_by_view[0])))
    return _stack_role(plans_by_view, {plans[0].tile: every}, {})


def _stack_role(
    plans_by_view: Sequence[Sequence[ViewPlan]], held: Mapping[str, Sequence[int]], schema: Mapping[str, TileSchema]
) -> list[ViewBatch]:
    """One `ViewBatch` for each tile that the plans show; `held` says which samples are stacked for it."""
    if len({len(view) for view in plans_by_view}) > 1:
        raise ValueError(f"views of one role need as many plans each, got {[len(view) for view in plans_by_view]}")
    plans = [(i, plan) for view in plans_by_view for i, plan in enumerate(view)]  # R of (sample, plan)
    if len(sizes := {plan.size for _, plan in plans}) > 1:
        raise ValueError(f"plans of one role must share a size, got {sorted(sizes)}")
    counts = [len(schema[p.tile].bands if p.bands is None else p.bands) if schema or p.bands else 0 for _, p in plans]
    n_bands = max(counts) if len(set(counts)) > 1 else None  # None: all alike, nothing to fill up
    batches = []
    for name in dict.fromkeys(plan.tile for _, plan in plans):
        place = [r for r, (_, plan) in enumerate(plans) if plan.tile == name]
        position = {sample: row for row, sample in enumerate(held[name])}
        these = [plans[r][1] for r in place]
        batch = _view_batch(these, [position[plans[r][0]] for r in place], schema.get(name), n_bands)
        if len(place) < len(plans):
            batch.place = torch.tensor(place)  # [r]
        batches.append(batch)
    return batches


def _view_batch(
    plans: Sequence[ViewPlan], rows: Sequence[int], schema: TileSchema | None, n_bands: int | None
) -> ViewBatch:
    """`plans` of one tile, which show its stacked `rows`; with `n_bands` every row names as many, -1 filled up."""
    (h, w) = size = plans[0].size
    bands: list[tuple[int, ...]] | None = None
    if n_bands is not None or any(p.bands is not None for p in plans):
        every = () if schema is None else tuple(range(len(schema.bands)))
        named = [every if p.bands is None else p.bands for p in plans]
        bands = [b + (-1,) * ((n_bands or len(b)) - len(b)) for b in named]
    as_stored = (0.0, 0.0, float(h), float(w))
    return ViewBatch(
        tile=plans[0].tile,
        size=size,
        row=torch.tensor(rows),  # [r]
        box=torch.tensor([p.box for p in plans], dtype=torch.float32),  # [r, 4]
        flip=torch.tensor([p.flip for p in plans]),
        rot90=torch.tensor([p.rot90 for p in plans]),
        gain=torch.tensor([p.gain for p in plans], dtype=torch.float32),
        bias=torch.tensor([p.bias for p in plans], dtype=torch.float32),
        bands=None if bands is None else torch.tensor(bands),  # [r, c]
        resample=any(p.box != as_stored or p.flip or p.rot90 % 4 != 0 for p in plans),
        has_padding=bands is not None and any(-1 in b for b in bands),
    )
