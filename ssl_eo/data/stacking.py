"""Samples and their plans become tensors of static shape; whether a sample is what its schema says, and holds data.

This runs where samples are read, on the host. Pixels are copied once, in their stored dtype.

B samples, b of them are stacked for one tile, V views of one role per sample, R = V*B rows of a role (views outermost),
r rows that show one tile, C bands of a tile, c bands of a view, H W tile pixels, h w view pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_eo.data.schema import TileSchema, is_gsd_m
from ssl_eo.data.spectral import Synthesis
from ssl_eo.data.types import Sample, Tile, TileBatch, View, ViewBatch, ViewPlan
from ssl_eo.sensors import Sensor

__all__ = [
    "check_sample",
    "cut_to_views",
    "loaded",
    "shown_plans",
    "stack",
    "stack_meta",
    "stack_tiles",
    "stack_views",
]


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
    the sample lacks, whose pixels are not what `schema` says, now that they are read, or that is nothing but no-data
    where a view looks.
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
        if tile.measured is not None and not all(_shows_data(tile, box) for box in shown):
            raise ValueError(f"tile {name!r} of sample {sample.key!r} is all no-data where a view looks")
        tiles[name] = tile
    return replace(sample, tiles=tiles)


def stack(
    samples: Sequence[Sample], roles: Mapping[str, Sequence[Sequence[View]]], schema: Mapping[str, TileSchema]
) -> tuple[dict[str, TileBatch], dict[str, list[ViewBatch]]]:
    """The tiles that the plans of `roles` show, and the plans, as tensors of static shape.

    A role has a row for each view of a sample (views outermost), in it the views of all samples: a plan, or several for
    a joint view, or none, an empty tuple, for a sample that has nothing to show: its row is not valid. A role without
    any plan is left out. Plans of one role may show different tiles, also with different numbers of bands, but share a
    size; those of a joint view share flip and quarter turns, too. Raises `ValueError` where they do not. A tile is
    stacked over the samples whose views show it; where tiles differ in size, the smaller ones are filled up with zeros.
    `samples` are those that `cut_to_views` has checked.
    """
    placed = {
        role: [[_plans_of(view, sample) for view, sample in zip(row, samples, strict=True)] for row in rows]
        for role, rows in roles.items()
    }
    shown: dict[str, set[int]] = {}  # tile name -> the samples whose views show it
    for sample, plans in (pair for rows in placed.values() for row in rows for pair in enumerate(row)):
        for plan in plans:
            shown.setdefault(plan.tile, set()).add(sample)
    held = {name: sorted(found) for name, found in shown.items()}
    tiles = {
        name: _stack_tile([samples[i].tiles[name] for i in found], schema[name].sensor) for name, found in held.items()
    }
    shows = {role: any(plans for row in rows for plans in row) for role, rows in placed.items()}
    return tiles, {role: _stack_role(rows, held, schema) for role, rows in placed.items() if shows[role]}


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


def stack_meta(samples: Sequence[Sample], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """What `Sample.meta` says under the keys of `sizes`: `[B]` for size 1, else `[B, size]`; float32, NaN where absent.

    The `month` (1 to 12) of samples that only have a date is taken from it. Raises `ValueError` for another size.
    """
    found = {}
    for key, size in sizes.items():
        values = np.full((len(samples), size), np.nan, np.float32)
        for row, sample in zip(values, samples, strict=True):
            value = _known(sample.meta, key)
            if value is not None:
                flat = np.asarray(value, np.float32).reshape(-1)
                if len(flat) != size:
                    raise ValueError(f"{key} of sample {sample.key!r} has {len(flat)} values, expected {size}")
                row[:] = flat
        found[key] = torch.from_numpy(values[:, 0].copy() if size == 1 else values)
    return found


def _known(meta: Mapping[str, Any], key: str) -> Any:
    if key == "month" and key not in meta and isinstance(date := meta.get("date"), str):
        return int(date[5:7])
    return meta.get(key)


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


def _shows_data(tile: Tile, box: tuple[float, float, float, float]) -> bool:
    """Whether any band of the tile, what is left of it, was measured at a pixel that the box touches."""
    assert tile.measured is not None
    top, left = (math.floor(box[axis]) - tile.origin[axis] for axis in (0, 1))
    bottom, right = (math.ceil(box[axis] + box[axis + 2]) - tile.origin[axis] for axis in (0, 1))
    return bool(tile.measured[:, top:bottom, left:right].any())


def _plans_of(view: View, sample: Sample) -> tuple[ViewPlan, ...]:
    return tuple(_from_origin(plan, sample) for plan in (view if isinstance(view, tuple) else (view,)))


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
    kinds = {(p.tile, p.size, p.synthesis is None, _n_named(p)) for p in plans}
    if len(kinds) > 1:
        raise ValueError(
            f"plans must share tile, size and number of bands, got {sorted(kinds, key=str)}; else use stack"
        )
    every = list(range(len(plans_by_view[0])))
    return _stack_role([[(plan,) for plan in view] for view in plans_by_view], {plans[0].tile: every}, {})


class _Part(NamedTuple):
    """A plan, and where it belongs: the sample it is of, its row of the role, and its channels of this row."""

    plan: ViewPlan
    sample: int
    row: int
    first: int
    n_channels: int


def _stack_role(
    views: Sequence[Sequence[tuple[ViewPlan, ...]]], held: Mapping[str, Sequence[int]], schema: Mapping[str, TileSchema]
) -> list[ViewBatch]:
    """The `ViewBatch`es of the tiles that the plans show; `held` says which samples are stacked for a tile."""
    if len({len(view) for view in views}) > 1:
        raise ValueError(f"views of one role need as many plans each, got {[len(view) for view in views]}")
    rows = [pair for view in views for pair in enumerate(view)]  # R of (sample, plans)
    parts = [part for row, (sample, plans) in enumerate(rows) for part in _parts(plans, sample, row, schema)]
    if len(sizes := {part.plan.size for part in parts}) > 1:
        raise ValueError(f"plans of one role must share a size, got {sorted(sizes)}")
    alike: dict[tuple[str, bool], list[_Part]] = {}  # what is rendered together
    for part in parts:
        alike.setdefault((part.plan.tile, part.plan.synthesis is None), []).append(part)
    shape = (len(rows), max(part.first + part.n_channels for part in parts))
    is_whole = len(alike) == 1 and len(parts) == len(rows)
    batches = []
    for (name, _), group in alike.items():
        position = {sample: row for row, sample in enumerate(held[name])}
        batch = _view_batch([p.plan for p in group], [position[p.sample] for p in group], schema.get(name))
        if not is_whole:
            batch.place, batch.role_shape = _places(group, shape), shape
        batches.append(batch)
    return batches


def _parts(plans: tuple[ViewPlan, ...], sample: int, row: int, schema: Mapping[str, TileSchema]) -> Iterator[_Part]:
    """The `plans` of one view, which is a `row` of its role, with their places in it."""
    if len(kinds := {(p.size, p.flip, p.rot90 % 4) for p in plans}) > 1:
        raise ValueError(f"plans of a joint view must share size, flip and rot90, got {sorted(kinds)}")
    first = 0
    for plan in plans:
        if plan.synthesis is not None and plan.bands is not None:
            raise ValueError(f"a plan of tile {plan.tile!r} has both bands and a synthesis; bands must be None")
        named = _n_named(plan)
        # Without a schema there is one tile, and one plan a view, so its channels need no places.
        n_channels = named if named is not None else len(schema[plan.tile].bands) if schema else 0
        yield _Part(plan, sample, row, first, n_channels)
        first += n_channels


def _n_named(plan: ViewPlan) -> int | None:
    """How many channels the plan asks for; None for all bands of the tile."""
    if plan.synthesis is not None:
        return len(plan.synthesis.weights)
    return None if plan.bands is None else len(plan.bands)


def _places(parts: Sequence[_Part], shape: tuple[int, int]) -> Tensor:
    """Where each channel of the parts goes in a role of `shape` (R, channels), see `ViewBatch`: `[r, c]`."""
    n_rows, n_channels = shape
    row, first, count = np.array([(p.row, p.first, p.n_channels) for p in parts]).T[:, :, None]  # [r, 1] each
    channel = np.arange(count.max())  # [c]
    return torch.from_numpy(np.where(channel < count, row * n_channels + first + channel, n_rows * n_channels))


def _view_batch(plans: Sequence[ViewPlan], rows: Sequence[int], schema: TileSchema | None) -> ViewBatch:
    """`plans` of one tile, which show its stacked `rows`; rows of fewer bands than others are filled up."""
    (h, w) = size = plans[0].size
    as_stored = (0.0, 0.0, float(h), float(w))
    batch = ViewBatch(
        tile=plans[0].tile,
        size=size,
        row=torch.tensor(rows),  # [r]
        box=torch.tensor([p.box for p in plans], dtype=torch.float32),  # [r, 4]
        flip=torch.tensor([p.flip for p in plans]),
        rot90=torch.tensor([p.rot90 for p in plans]),
        gain=torch.tensor([p.gain for p in plans], dtype=torch.float32),
        bias=torch.tensor([p.bias for p in plans], dtype=torch.float32),
        resample=any(p.box != as_stored or p.flip or p.rot90 % 4 != 0 for p in plans),
    )
    if mixes := [p.synthesis for p in plans if p.synthesis is not None]:
        return _with_mixes(batch, mixes)
    if all(p.bands is None for p in plans):
        return batch
    every = () if schema is None else tuple(range(len(schema.bands)))
    named = [every if p.bands is None else p.bands for p in plans]
    n_bands = max(map(len, named))
    bands = torch.tensor([b + (-1,) * (n_bands - len(b)) for b in named])  # [r, c]
    return replace(batch, bands=bands, has_padding=any(len(b) < n_bands for b in named))


def _with_mixes(batch: ViewBatch, mixes: Sequence[Synthesis]) -> ViewBatch:
    """The batch with virtual bands; where a row has fewer, others of no weight follow, said to be like its first."""
    n_bands = max(len(mix.weights) for mix in mixes)
    missing = [n_bands - len(mix.weights) for mix in mixes]

    def filled(rows: Iterable[tuple[float, ...]]) -> Tensor:
        return torch.tensor([row + row[:1] * n for row, n in zip(rows, missing, strict=True)], dtype=torch.float32)

    weights = [np.pad(mix.weights, ((0, n), (0, 0))) for mix, n in zip(mixes, missing, strict=True)]
    return replace(
        batch,
        weights=torch.from_numpy(np.stack(weights)),  # [r, c, C]
        wavelength_um=filled(mix.wavelength_um for mix in mixes),  # [r, c]
        fwhm_um=filled(mix.fwhm_um for mix in mixes),  # [r, c]
        has_padding=any(missing),
    )
