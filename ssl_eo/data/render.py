"""Render view plans into pixels: crop, antialiased resize, flip, quarter turns, normalisation and jitter, batched.

Resizing one channel is `Ky . X . Kx^T`: row i of `Ky [h, H]` holds the kernel weights of output row i, zero outside its
box. A flip reverses the rows of a matrix, a quarter turn transposes the product, and normalisation and jitter are one
affine afterwards. So every row of a batch, whatever its box, costs two batched matrix products on whatever device the
batch is on. Nothing here reads a tensor back from a device: shapes and `has_no_data` alone decide what is computed
there. On the CPU, large views are made row by row, without the zeros that make up most of large matrices.

Kernel weights are those of `F.interpolate(crop, antialias=True, align_corners=False)`. A box with fractional edges is
their natural extension: a pixel cut by an edge counts with the share of it that lies inside.

No-data (a stored value listed by the sensor, NaN or infinite) never takes part. Where all pixels under the kernel are
valid the result is the plain one. Elsewhere the value is the mean of the valid pixels weighted by the kernel's
magnitude `|Ky| x |Kx|` (not its signed weights: with the negative lobes of bicubic a few valid pixels could be
extrapolated to anything), and the output counts as valid when these hold at least half of the total weight. The rule
looks at one row at a time, so how a view looks does not depend on what else is in the batch.

A virtual band is a weighted mean of standardised bands. That is linear in the stored values, so bands are mixed before
they are resized, each weight divided by the band's standard deviation, and the mean is taken off with the affine. A
pixel of it is valid where those of all bands that take part are.

B samples, R rows (views x samples) of a role, r of them show one tile, C bands of a tile, c bands of a view, H W tile
pixels, h w view pixels, m = max(h, w). What is said of R holds for any part r of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_eo.data._resampling import KERNELS, Axis, Kernel, is_row_by_row, resample
from ssl_eo.data.types import Batch, PixelBatch, TileBatch, TileSchema, ViewBatch
from ssl_eo.sensors import KINDS, ChannelMeta

__all__ = ["Interpolation", "Renderer"]

Interpolation = Literal["bilinear", "bicubic"]
IsMeasured = Callable[[Tensor], Tensor]  # values of any shape -> True where they are no no-data

# Rows are rendered in groups of about this many tile values: on the CPU a group stays in cache, on a device the
# float32 copy of a group stays below a gigabyte.
_GROUP_VALUES_CPU = 2**18
_GROUP_VALUES_DEVICE = 2**27


class Renderer(nn.Module):
    """Plans and raw tiles in, normalised pixels out. Holds the statistics of every tile of every source as buffers.

    `schemas` has one mapping of tile names per source, in the order of `Batch.source`.
    """

    def __init__(self, schemas: Sequence[Mapping[str, TileSchema]], interpolation: Interpolation = "bicubic") -> None:
        super().__init__()
        if interpolation not in KERNELS:
            raise ValueError(f"interpolation must be one of {', '.join(KERNELS)}, got {interpolation!r}")
        self.interpolation = interpolation
        names = [(source, name) for source, tiles in enumerate(schemas) for name in tiles]
        self._position = {name: i for i, name in enumerate(names)}
        self._constants = nn.ModuleList(_TileConstants(schemas[source][name]) for source, name in names)

    @torch.no_grad()
    def render(self, batch: Batch) -> dict[str, PixelBatch]:
        """The pixels of every role in `batch.views`, on the device that holds the batch and this module.

        Boxes must lie inside their tiles. `pixels` are float32 `[R, c, h, w]`; class maps keep their class numbers.
        """
        rendered = {}
        for role, views in batch.views.items():
            with _full_precision(views[0].box.device):
                parts = [self._render_view(self._of(batch.source, v.tile), batch.tiles[v.tile], v) for v in views]
                rendered[role] = parts[0] if views[0].place is None else _merged(views, parts)
        return rendered

    def _of(self, source: int, tile: str) -> _TileConstants:
        constants = self._constants[self._position[source, tile]]
        assert isinstance(constants, _TileConstants)
        return constants

    def _render_view(self, constants: _TileConstants, tiles: TileBatch, view: ViewBatch) -> PixelBatch:
        (h, w), device = view.size, view.box.device
        n_rows, n_read = view.row.shape[0], tiles.pixels.shape[1] if view.bands is None else view.bands.shape[1]
        n_bands = n_read if view.weights is None else view.weights.shape[1]
        real, view = _real_bands(tiles, view)  # [r, c] or None
        pixels = torch.empty(n_rows, n_bands, h, w, device=device)  # [r, c, h, w]
        valid = torch.empty_like(pixels, dtype=torch.bool) if tiles.has_no_data else None
        budget = _GROUP_VALUES_CPU if device.type == "cpu" else _GROUP_VALUES_DEVICE
        height, width = tiles.pixels.shape[2:]
        is_resampled = view.resample and not constants.sensor.is_categorical
        matrices = _Geometry.of(view).matrices(KERNELS[self.interpolation], height, width) if is_resampled else ()
        step = 1 if is_row_by_row(device, max(h, w)) else max(1, budget // (n_read * height * width))
        for rows in (slice(start, start + step) for start in range(0, n_rows, step)):
            valid_rows = None if valid is None else valid[rows]
            matrices_rows = [matrix[rows] for matrix in matrices]
            _render_rows(constants, tiles, _rows_of(view, rows), matrices_rows, pixels[rows], valid_rows)
        area = view.box[:, 2] * view.box[:, 3]  # [r] in tile pixels
        gsd_m = tiles.gsd_m[view.row]  # [r]
        channels = constants.channels_of(view, gsd_m)
        if real is not None:
            channels = replace(channels.expand(n_rows), valid=real)
            valid = real[:, :, None, None] if valid is None else valid & real[:, :, None, None]
            valid = valid.expand_as(pixels)
            pixels.masked_fill_(~valid, 0.0)
        return PixelBatch(
            pixels=pixels,
            channels=channels,
            gsd_m=gsd_m * (area / (h * w)).sqrt(),  # [r] geometric mean of the two axes
            valid=valid,
        )


class _TileConstants(nn.Module):
    """What a schema says about a tile, as buffers that follow the module to its device."""

    mean: Tensor
    std: Tensor

    def __init__(self, schema: TileSchema) -> None:
        super().__init__()
        self.sensor = schema.sensor
        self._buffer("mean", torch.tensor(schema.mean, dtype=torch.float32))
        self._buffer("std", torch.tensor(schema.std, dtype=torch.float32))
        channels = schema.sensor.channel_meta(schema.bands)
        for f in fields(ChannelMeta):
            self._buffer(f"channel_{f.name}", getattr(channels, f.name))

    def _buffer(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    def channels_of(self, view: ViewBatch, gsd_m: Tensor) -> ChannelMeta:
        """What the channels of the view measure; virtual ones at the ground sampling `gsd_m [R]` of their tiles."""
        if view.weights is None:
            every = ChannelMeta(**{f.name: getattr(self, f"channel_{f.name}") for f in fields(ChannelMeta)})
            return every if view.bands is None else every.select(view.bands)
        assert view.wavelength_um is not None
        assert view.fwhm_um is not None
        optical = torch.full_like(view.wavelength_um, KINDS.index("optical"), dtype=torch.int64)  # [R, c]
        none = torch.full_like(optical, -1)
        gsd_m = gsd_m[:, None].expand_as(optical)
        return ChannelMeta(view.wavelength_um, view.fwhm_um, optical, none, none, gsd_m)

    def mixed(self, raw: Tensor, weights: Tensor, is_measured: IsMeasured | None) -> Tensor:
        """Virtual bands `[R, c, H, W]`, whose mean is yet to be taken off, of stored values `raw [R, C, H, W]`.

        `weights` are `[R, c, C]`. NaN where a band that takes part holds no data.
        """
        values, scaled = raw.float().flatten(2), weights / self.std  # [R, C, H*W] [R, c, C]
        if is_measured is None:
            mixed = torch.bmm(scaled, values)  # [R, c, H*W]
        else:
            ok = is_measured(values)
            n_missing = torch.bmm((weights != 0).float(), (~ok).float())  # [R, c, H*W]
            mixed = torch.bmm(scaled, torch.where(ok, values, 0.0)).masked_fill_(n_missing > 0, torch.nan)
        return mixed.view(*weights.shape[:2], *raw.shape[2:])  # [R, c, H, W]

    def affine(self, view: ViewBatch) -> tuple[Tensor, Tensor]:
        """`(scale, shift)`, each `[R, c, 1, 1]`: stored or mixed value -> standardised -> jittered."""
        if view.weights is not None:
            mean = view.weights @ (self.mean / self.std)  # [R, c]
            scale = view.gain[:, None].expand_as(mean)
            return scale[:, :, None, None], (view.bias[:, None] - mean * scale)[:, :, None, None]
        mean, std = self.mean[None], self.std[None]  # [1, C]
        if view.bands is not None:
            mean, std = self.mean[view.bands], self.std[view.bands]  # [R, c]
        scale = view.gain[:, None] / std
        shift = view.bias[:, None] - mean * scale
        return scale[:, :, None, None], shift[:, :, None, None]


@dataclass
class _Geometry:
    """Both axes of a group of rows, before any transposition.

    A row with an odd number of quarter turns is resized to (w, h) and then transposed. To keep one static shape all
    rows are resized to m outputs on both axes, of which the first h or w are used.
    """

    size: tuple[int, int]
    is_odd: Tensor  # [R] bool: an odd number of quarter turns
    y: Axis
    x: Axis

    @classmethod
    def of(cls, view: ViewBatch) -> _Geometry:
        h, w = view.size
        top, left, height, width = view.box.unbind(1)
        turns = view.rot90 % 4
        is_odd = turns % 2 == 1
        n_y = torch.where(is_odd, float(w), float(h))  # [R]
        n_x = torch.where(is_odd, float(h), float(w))  # [R]
        # A quarter turn counter-clockwise is "reverse x, then transpose"; two turns reverse both axes.
        y = Axis.of(top, height, n_y, max(h, w), turns >= 2)
        x = Axis.of(left, width, n_x, max(h, w), ((turns == 1) | (turns == 2)) ^ view.flip)
        return cls(view.size, is_odd, y, x)

    def matrices(self, kernel: Kernel, height: int, width: int) -> tuple[Tensor, Tensor]:
        """`(Ky [R, m, H], Kx [R, m, W])` for boxes inside tiles of `height` and `width` pixels."""
        n_least = min(self.size)
        return self.y.matrix(kernel, height, height / n_least), self.x.matrix(kernel, width, width / n_least)

    def nearest(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """`(y, x)`, each `[R, h, w]`: the tile pixel that holds the centre of each view pixel."""
        h, w = self.size
        y, x = self.y.nearest(height), self.x.nearest(width)  # [R, m]
        is_odd = self.is_odd[:, None, None]
        return (
            torch.where(is_odd, y[:, None, :w], y[:, :h, None]),
            torch.where(is_odd, x[:, :h, None], x[:, None, :w]),
        )


def _render_rows(
    constants: _TileConstants,
    tiles: TileBatch,
    view: ViewBatch,
    matrices: Sequence[Tensor],
    pixels: Tensor,
    valid: Tensor | None,
) -> None:
    """Fills `pixels [R, c, h, w]` and `valid [R, c, h, w]` of a group of rows; `matrices` are (Ky, Kx) if resized."""
    raw = _gather(tiles.pixels, view)  # [R, c, H, W]
    is_measured: IsMeasured | None = None if valid is None else constants.sensor.is_measured
    if view.weights is not None:
        raw = constants.mixed(raw, view.weights, is_measured)  # [R, c, H, W]
        is_measured = None if valid is None else torch.isfinite
    if constants.sensor.is_categorical:
        values, ok = _nearest(raw, view, is_measured)
        pixels.copy_(values)
    else:
        values, ok = _resample(raw, view, matrices, is_measured) if matrices else _cut(raw, view, is_measured)
        scale, shift = constants.affine(view)  # [R, c, 1, 1]
        torch.mul(values, scale, out=pixels).add_(shift)  # twice as fast on the CPU as addcmul, which is not vectorised
    if valid is not None and ok is not None:
        valid.copy_(ok)
        pixels.masked_fill_(~ok, 0.0)


def _resample(
    raw: Tensor, view: ViewBatch, matrices: Sequence[Tensor], is_measured: IsMeasured | None
) -> tuple[Tensor, Tensor | None]:
    """Values `[R, c, h, w]` by `Ky [R, m, H]` and `Kx [R, m, W]`, and their validity."""
    ky, kx = matrices
    if is_row_by_row(raw.device, max(view.size)) and view.rot90.item() % 2:
        raw, ky, kx = raw.transpose(2, 3), kx, ky  # turned while it is converted, which costs least
    # Rows before channels, so that the product over y and the one over x are one bmm each; the conversion to
    # float32 writes in this order and the last pointwise operation reads in it, so neither costs a copy.
    x = raw.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # [R, H, c, W]
    if is_measured is None:
        return _turn(resample(ky, x, kx), view), None
    ok = is_measured(x)
    x = torch.where(ok, x, 0.0)
    ky_abs, kx_abs = ky.abs(), kx.abs()
    weight = resample(ky_abs, ok.float(), kx_abs)  # [R, m, c, m]
    mean = resample(ky_abs, x, kx_abs) / weight
    total = ky_abs.sum(2)[:, :, None, None] * kx_abs.sum(2)[:, None, None, :]  # [R, m, 1, m]
    values = torch.where(weight > (1 - 1e-5) * total, resample(ky, x, kx), mean)
    return _turn(values, view), _turn(weight >= 0.5 * total, view)


def _turn(x: Tensor, view: ViewBatch) -> Tensor:
    """Transposes the rows with an odd number of turns and cuts to size: `[R, m, c, m]` -> `[R, c, h, w]`."""
    h, w = view.size
    upright, turned = x.permute(0, 2, 1, 3), x.permute(0, 2, 3, 1)
    if is_row_by_row(x.device, max(h, w)):
        return upright[..., :h, :w]
    is_odd = view.rot90 % 2 == 1  # [R]
    return torch.where(is_odd[:, None, None, None], turned[..., :h, :w], upright[..., :h, :w])


def _cut(raw: Tensor, view: ViewBatch, is_measured: IsMeasured | None) -> tuple[Tensor, Tensor | None]:
    """The top left pixels `[R, c, h, w]` as they are, float32, and their validity."""
    h, w = view.size
    values = raw[..., :h, :w].float()  # [R, c, h, w]
    return values, None if is_measured is None else is_measured(values)


def _nearest(raw: Tensor, view: ViewBatch, is_measured: IsMeasured | None) -> tuple[Tensor, Tensor | None]:
    """Class numbers `[R, c, h, w]` float32 and their validity: class maps are picked from, never mixed."""
    y, x = _Geometry.of(view).nearest(raw.shape[2], raw.shape[3])  # [R, h, w]
    row = torch.arange(raw.shape[0], device=raw.device)[:, None, None, None]
    band = torch.arange(raw.shape[1], device=raw.device)[:, None, None]
    values = raw.float()[row, band, y[:, None], x[:, None]]  # [R, c, h, w]
    return values, None if is_measured is None else is_measured(values)


def _gather(pixels: Tensor, view: ViewBatch) -> Tensor:
    """The tile and bands of each row in the stored dtype: `[B, C, H, W]` -> `[R, c, H, W]`."""
    if view.bands is None and is_row_by_row(pixels.device, max(view.size)):
        return pixels.narrow(0, int(view.row), 1)  # no copy
    # uint16 has few kernels on devices; moving its bits as int16 needs none of them.
    bits = pixels.view(torch.int16) if pixels.dtype == torch.uint16 else pixels
    picked = bits.index_select(0, view.row) if view.bands is None else bits[view.row[:, None], view.bands]
    return picked.view(pixels.dtype)


def _real_bands(tiles: TileBatch, view: ViewBatch) -> tuple[Tensor | None, ViewBatch]:
    """Which channels `[r, c]` of each row hold data (None: all), and the view with bands that can be looked up."""
    real = None if tiles.present is None else tiles.present[view.row]  # [r, C]
    if view.weights is not None:
        takes_part = view.weights != 0  # [r, c, C]
        if real is not None:
            real = (real[:, None] | ~takes_part).all(2)  # [r, c]
        if view.has_padding:
            real = takes_part.any(2) if real is None else real & takes_part.any(2)
        return real, view
    if view.bands is None:
        return real, view
    named = view.bands.clamp(min=0) if view.has_padding else view.bands  # [r, c]
    if real is not None:
        real = real.gather(1, named)
    if view.has_padding:
        is_named = view.bands >= 0
        real = is_named if real is None else real & is_named
    return real, replace(view, bands=named)


def _merged(views: Sequence[ViewBatch], parts: Sequence[PixelBatch]) -> PixelBatch:
    """The role as one table: each channel of the parts at its place, and channels that are not valid elsewhere."""
    role_shape, places = views[0].role_shape, [view.place.flatten() for view in views if view.place is not None]
    assert role_shape is not None
    n_places = role_shape[0] * role_shape[1]
    is_full = sum(map(len, places)) == n_places and not any(view.has_padding for view in views)

    def table(columns: Sequence[Tensor]) -> Tensor:
        """`[r, c, ...]` of each part -> `[R, n_channels, ...]`; 0 or False where no part has a channel."""
        out = columns[0].new_zeros(n_places + 1, *columns[0].shape[2:])  # the last takes what has no place
        for place, column in zip(places, columns, strict=True):
            out.index_copy_(0, place, column.flatten(0, 1))
        return out[:-1].view(*role_shape, *out.shape[1:])

    def valid_table(valid: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
        if is_full and all(part is None for part in valid):
            return None
        true = torch.ones((), dtype=torch.bool, device=like[0].device)
        return table([true.expand_as(x) if part is None else part for part, x in zip(valid, like, strict=True)])

    channels = [part.channels.expand(len(part.pixels)) for part in parts]  # [r, c]
    kinds = [part.kind for part in channels]
    columns = {f.name: table([getattr(c, f.name) for c in channels]) for f in fields(ChannelMeta) if f.name != "valid"}
    is_named = valid_table([None] * len(parts), kinds)  # [R, n_channels]
    if is_named is not None:  # what only fills up is said to be like the first channel of its row
        columns = {name: torch.where(is_named, column, column[:, :1]) for name, column in columns.items()}
    pixels = [part.pixels for part in parts]
    return PixelBatch(
        pixels=table(pixels),  # [R, n_channels, h, w]
        channels=ChannelMeta(**columns, valid=valid_table([part.valid for part in channels], kinds)),
        gsd_m=table([p.gsd_m[:, None].expand(p.pixels.shape[:2]) for p in parts])[:, 0],  # [R] of a row's first part
        valid=valid_table([part.valid for part in parts], pixels),
    )


def _rows_of(view: ViewBatch, rows: slice) -> ViewBatch:
    """`view` with only some of its rows."""
    part: dict[str, Any] = {f.name: getattr(view, f.name) for f in fields(ViewBatch)}
    part.update({name: column[rows] for name, column in part.items() if isinstance(column, Tensor)})
    return ViewBatch(**part)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in float32, whatever autocast and TF32 settings the models train with.

    Kernel weights and uint16 values do not survive an 8 or 11 bit mantissa.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    saved = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "ieee"
    has_autocast = device.type != "meta"  # where shapes alone are made
    try:
        with torch.autocast(device.type, enabled=False) if has_autocast else nullcontext():
            yield
    finally:
        backend.matmul.fp32_precision = saved
