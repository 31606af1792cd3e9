"""How a procedural place is laid out: one painter a scene class, on a canvas of surfaces in metres.

A painter writes the index of a surface into every pixel. It starts from a background that many classes share (a mosaic
of woods, meadows and fields), so that what tells two classes apart is mostly structure: parcels, rows, blocks, roads,
meanders, clearings. n pixels of the base grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.sources._terrain import fractal_fields

__all__ = ["LAND_COVER", "N_SURFACES", "PAINTERS", "PARCELS", "ROOFS", "SURFACE_LAND_COVER", "Canvas", "Surface"]

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)

LAND_COVER = (
    "water", "forest", "crops", "grass", "bare soil", "sand",
    "buildings", "pavement", "snow", "wetland", "burnt", "rock",
)  # fmt: skip


class Surface:
    """Indices of the surfaces that a painter may use; roofs and parcels are families of surfaces that differ."""

    WATER, FOREST, GRASS, SOIL, SAND, PAVEMENT, SNOW, REED, CHAR, ROCK, ORCHARD, SCRUB = range(12)


ROOFS = range(12, 16)
PARCELS = range(16, 64)
N_SURFACES = 64

SURFACE_LAND_COVER = np.array(
    [0, 1, 3, 4, 5, 7, 8, 9, 10, 11, 2, 3] + [6] * len(ROOFS) + [2] * len(PARCELS), np.uint8
)  # [N_SURFACES] -> LAND_COVER


@dataclass
class Canvas:
    """A place while it is painted: coordinates in metres, three fractal fields, and the surfaces so far.

    `height` is the terrain in units of `relief_m`, `patches` and `wetness` are independent fields; all `[n, n]`.
    `rows` is the brightness modulation of planted rows.
    """

    rng: np.random.Generator
    extent_m: float
    x_m: Array
    y_m: Array
    height: Array
    patches: Array
    wetness: Array
    surface: NDArray[np.uint8]
    rows: Array | None = None
    relief_m: float = 12.0

    @classmethod
    def blank(cls, rng: np.random.Generator, n: int, extent_m: float) -> Canvas:
        at = ((np.arange(n) + 0.5) * (extent_m / n)).astype(np.float32) - np.float32(extent_m / 2)
        height, patches, wetness = fractal_fields(rng, 3, n, extent_m, hurst=0.9)
        surface = np.full((n, n), Surface.GRASS, np.uint8)
        return cls(rng, extent_m, at[None, :], at[:, None], height, patches, wetness, surface)

    def between(self, low: float, high: float) -> float:
        return float(low + (high - low) * self.rng.random())

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def axes(self) -> tuple[Array, Array]:
        """Coordinates (u along, v across) in metres, turned and shifted at random."""
        angle, shift = self.between(0, np.pi), self.rng.uniform(-0.25, 0.25, 2) * self.extent_m
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return c * self.x_m + s * self.y_m + np.float32(shift[0]), c * self.y_m - s * self.x_m + np.float32(shift[1])

    def paint(self, what: int | NDArray[np.uint8], where: Mask) -> None:
        np.copyto(self.surface, np.asarray(what, np.uint8), where=where)

    def dry(self) -> Mask:
        return np.not_equal(self.surface, Surface.WATER)


def _highest(field: Array, ratio: float) -> Mask:
    """Where `field` is in about its highest `ratio`; a unit normal field, so places differ around it."""
    high: Mask = field > np.float32(NormalDist().inv_cdf(1 - min(max(ratio, 0.001), 0.999)))
    return high


@dataclass
class _Parcels:
    """Rectangles of land: `row`, `column` of each pixel's parcel, and its distance to the parcel's first edges."""

    row: NDArray[np.int32]
    column: NDArray[np.int32]
    edge_m: Array
    across_m: Array

    def pick(self, values: NDArray[Scalar]) -> NDArray[Scalar]:
        """Value of each pixel's parcel from a table `[64, 64]`."""
        return np.take(values, ((self.row & 63) << 6) | (self.column & 63))


def _parcels(canvas: Canvas, width_m: tuple[float, float], length_m: tuple[float, float]) -> _Parcels:
    """Strips of random width, cut at random lengths: the plan of most farmland."""
    u, v = canvas.axes()
    reach = np.float32(1.3 * canvas.extent_m)
    n_strips = int(2 * reach / width_m[0]) + 1
    widths = canvas.rng.integers(int(width_m[0]), int(width_m[1]) + 1, n_strips)
    strip_at_metre = np.repeat(np.arange(n_strips, dtype=np.int32), widths)
    start = (np.cumsum(widths) - widths).astype(np.float32)
    length = canvas.rng.uniform(*length_m, n_strips).astype(np.float32)
    offset = (canvas.rng.random(n_strips, np.float32)) * length
    row = strip_at_metre[(v + reach).astype(np.int32)]
    along = (u + reach + offset[row]) / length[row]
    column = along.astype(np.int32)
    across_m = v + reach - start[row]
    return _Parcels(row, column, np.minimum(across_m, (along - column) * length[row]), across_m)


def _fields(canvas: Canvas, where: Mask | None = None) -> None:
    """Cropland: parcels of different crops and stages, tramlines, hedges or tracks between them."""
    scale = canvas.between(0.7, 1.6)
    plan = _parcels(canvas, (50 * scale, 130 * scale), (90 * scale, 260 * scale))
    crop = plan.pick(canvas.rng.integers(PARCELS.start, PARCELS.stop, (64, 64), np.uint8))
    strength = plan.pick(canvas.rng.uniform(0, 0.16, (64, 64)).astype(np.float32))
    rows = strength * np.sin(plan.across_m * np.float32(2 * np.pi / canvas.between(16, 30)))
    edge = Surface.FOREST if canvas.chance(0.3) else Surface.GRASS
    crop[plan.edge_m < np.float32(canvas.between(2, 9))] = edge
    if where is None:
        canvas.surface, canvas.rows = crop, rows.astype(np.float32)
    else:
        canvas.paint(crop, where)
        canvas.rows = np.where(where, rows, np.float32(0)).astype(np.float32)


def _background(canvas: Canvas, open_land: str = "", forest_ratio: float = -1.0) -> None:
    """A mosaic: woods where the patch field is high, else `open_land` (meadow, fields, scrub; drawn when empty)."""
    kind = open_land or ("meadow", "fields", "fields", "scrub")[canvas.rng.integers(4)]
    if kind == "fields":
        _fields(canvas)
    elif kind == "scrub":
        canvas.surface[:] = Surface.SCRUB
        canvas.paint(Surface.SOIL, _highest(canvas.wetness, canvas.between(0.05, 0.4)))
    ratio = canvas.between(0.02, 0.5) if forest_ratio < 0 else forest_ratio
    canvas.paint(Surface.FOREST, _highest(canvas.patches, ratio))
    if canvas.chance(0.4):
        _road(canvas, half_width_m=canvas.between(2.5, 4.5))


def _road(canvas: Canvas, half_width_m: float, shoulder_m: float = 0.0) -> tuple[Array, Array]:
    """A gently curved road; returns the coordinates along and across it."""
    u, v = canvas.axes()
    bend = canvas.between(10, 60) * np.sin(u * np.float32(2 * np.pi / canvas.between(500, 1400)))
    across = (v - bend.astype(np.float32)).astype(np.float32)
    if shoulder_m:
        canvas.paint(Surface.GRASS, np.abs(across) < half_width_m + shoulder_m)
    canvas.paint(Surface.PAVEMENT, (np.abs(across) < half_width_m) & canvas.dry())
    return u, across


def _buildings(
    canvas: Canvas, axes: tuple[Array, Array], where: Mask | None, block_m: float, street_m: float, lot_m: float,
    gap_m: float, density: float, yards: tuple[int, int],
) -> None:  # fmt: skip
    """Streets around blocks, blocks cut into lots, a roof on most lots and a yard around each roof."""
    u, v = axes[0] + np.float32(4 * canvas.extent_m), axes[1] + np.float32(4 * canvas.extent_m)
    long, short = np.float32(block_m), np.float32(block_m * canvas.between(0.6, 1.0))
    in_u, in_v = u % long, v % short
    lot_u, lot_v = (u / np.float32(lot_m)).astype(np.int32), (v / np.float32(lot_m)).astype(np.int32)
    at = ((lot_u & 63) << 6) | (lot_v & 63)
    draw = canvas.rng.random((64, 64), np.float32)
    roof = canvas.rng.integers(ROOFS.start, ROOFS.stop, (64, 64), np.uint8)
    yard = np.where(canvas.rng.random((64, 64)) < 0.6, *yards).astype(np.uint8)
    inset_u, inset_v = u - lot_u * np.float32(lot_m), v - lot_v * np.float32(lot_m)
    inside = (np.minimum(inset_u, inset_v) > gap_m / 2) & (np.maximum(inset_u, inset_v) < lot_m - gap_m / 2)
    town = np.where(inside & (np.take(draw, at) < density), np.take(roof, at), np.take(yard, at))
    town[(in_u < street_m) | (in_v < street_m)] = Surface.PAVEMENT
    canvas.paint(town.astype(np.uint8), canvas.dry() if where is None else where & canvas.dry())


def _lake(canvas: Canvas) -> None:
    _background(canvas)
    depth = canvas.height - np.float32(NormalDist().inv_cdf(canvas.between(0.2, 0.6)))
    shore = (Surface.REED, Surface.SAND, Surface.GRASS)[canvas.rng.integers(3)]
    canvas.paint(shore, depth < np.float32(canvas.between(0.03, 0.2)))
    canvas.paint(Surface.WATER, depth < 0)
    canvas.height = np.maximum(depth, np.float32(0))


def _river(canvas: Canvas) -> None:
    _background(canvas)
    u, v = canvas.axes()
    centre = canvas.between(20, 70) * np.sin(u / np.float32(canvas.between(45, 110)))
    centre = centre + canvas.between(5, 30) * np.sin(u / np.float32(canvas.between(20, 45)) + 1)
    distance = np.abs(v - centre.astype(np.float32)) + 6 * canvas.wetness
    half_width = canvas.between(8, 32)
    bank = (Surface.FOREST, Surface.SAND, Surface.GRASS)[canvas.rng.integers(3)]
    canvas.paint(bank, distance < half_width + canvas.between(5, 30))
    canvas.paint(Surface.WATER, distance < half_width)
    canvas.height = canvas.height * (1 - np.exp(-distance / 80)) - 2 * np.exp(-distance / 60)


def _forest(canvas: Canvas) -> None:
    _background(canvas, forest_ratio=canvas.between(0.75, 0.97))
    canvas.relief_m = canvas.between(10, 60)


def _clearcut(canvas: Canvas) -> None:
    _background(canvas, forest_ratio=canvas.between(0.85, 0.98))
    plan = _parcels(canvas, (60, 140), (80, 220))
    cut = plan.pick(canvas.rng.random((64, 64), np.float32)) < canvas.between(0.15, 0.4)
    young = canvas.rng.choice([Surface.SOIL, Surface.SCRUB, Surface.GRASS], (64, 64)).astype(np.uint8)
    canvas.paint(plan.pick(young), cut & (plan.edge_m > 4))
    canvas.relief_m = canvas.between(10, 60)


def _crops(canvas: Canvas) -> None:
    _background(canvas, "fields", forest_ratio=canvas.between(0.0, 0.15))


def _pasture(canvas: Canvas) -> None:
    _background(canvas, "meadow", forest_ratio=canvas.between(0.0, 0.15))
    lone_trees = canvas.rng.random(canvas.surface.shape, np.float32) < canvas.between(0.0, 0.04)
    canvas.paint(Surface.FOREST, lone_trees & _highest(canvas.wetness, 0.5))
    canvas.paint(Surface.SCRUB, _highest(-canvas.patches, canvas.between(0.0, 0.3)))
    canvas.relief_m = canvas.between(8, 50)


def _orchard(canvas: Canvas) -> None:
    _background(canvas, forest_ratio=canvas.between(0.0, 0.2))
    plan = _parcels(canvas, (90, 200), (120, 300))
    planted = (plan.pick(canvas.rng.random((64, 64), np.float32)) < canvas.between(0.55, 0.9)) & (plan.edge_m > 8)
    between_rows = Surface.SOIL if canvas.chance(0.6) else Surface.GRASS
    row_m = canvas.between(18, 34)
    canvas.paint(between_rows, planted)
    canvas.paint(Surface.ORCHARD, planted & (plan.across_m % np.float32(row_m) < np.float32(0.5 * row_m)))


def _town(canvas: Canvas) -> None:
    _background(canvas)
    built = _highest(-canvas.patches, canvas.between(0.6, 0.97)) & canvas.dry()
    yards = (Surface.PAVEMENT, Surface.GRASS) if canvas.chance(0.6) else (Surface.GRASS, Surface.FOREST)
    _buildings(
        canvas, canvas.axes(), built, block_m=canvas.between(70, 120), street_m=canvas.between(10, 16),
        lot_m=canvas.between(20, 32), gap_m=canvas.between(4, 9), density=canvas.between(0.7, 0.95), yards=yards,
    )  # fmt: skip


def _village(canvas: Canvas) -> None:
    _background(canvas)
    along, across = _road(canvas, half_width_m=5)
    width = canvas.between(50, 130)
    settled = (np.abs(across) + 25 * canvas.wetness < width) & (
        np.abs(along) < canvas.between(0.3, 0.6) * canvas.extent_m
    )
    _buildings(
        canvas, (along, across), settled, block_m=canvas.between(130, 200), street_m=6, lot_m=canvas.between(28, 42),
        gap_m=canvas.between(14, 20), density=canvas.between(0.5, 0.8), yards=(Surface.GRASS, Surface.FOREST),
    )  # fmt: skip


def _industry(canvas: Canvas) -> None:
    _background(canvas)
    built = _highest(canvas.wetness, canvas.between(0.5, 0.95))
    yards = (Surface.PAVEMENT, Surface.GRASS if canvas.chance(0.5) else Surface.SOIL)
    _buildings(
        canvas, canvas.axes(), built, block_m=canvas.between(180, 280), street_m=canvas.between(10, 18),
        lot_m=canvas.between(70, 130), gap_m=canvas.between(16, 30), density=canvas.between(0.6, 0.9), yards=yards,
    )  # fmt: skip


def _highway(canvas: Canvas) -> None:
    _background(canvas)
    half_width = canvas.between(12, 22)
    _, across = _road(canvas, half_width, shoulder_m=canvas.between(4, 14))
    canvas.paint(Surface.GRASS, np.abs(across) < 3)
    if canvas.chance(0.5):
        _road(canvas, half_width_m=5)


def _wetland(canvas: Canvas) -> None:
    _background(canvas, "meadow")
    canvas.relief_m = 2.0
    canvas.paint(Surface.REED, _highest(canvas.wetness, canvas.between(0.5, 0.85)))
    canvas.paint(Surface.WATER, _highest(canvas.wetness, canvas.between(0.05, 0.3)))
    creek = np.abs(canvas.height) < np.float32(canvas.between(0.03, 0.10))  # a level line winds as creeks do
    canvas.paint(Surface.WATER, creek & _highest(canvas.wetness, 0.8))


def _dunes(canvas: Canvas) -> None:
    u, v = canvas.axes()
    wavelength = canvas.between(60, 160)
    phase = (v + 40 * canvas.wetness + 0.1 * u) * np.float32(2 * np.pi / wavelength)
    crest = np.abs(np.sin(phase)) ** np.float32(0.7)
    canvas.surface[:] = Surface.SAND
    canvas.paint(Surface.SCRUB, (crest < canvas.between(0.0, 0.4)) & _highest(canvas.patches, 0.5))
    canvas.relief_m = canvas.between(10, 22)
    canvas.height = 0.5 * canvas.height + crest


def _alpine(canvas: Canvas) -> None:
    canvas.relief_m = canvas.between(60, 130)
    level = canvas.height + 0.25 * canvas.patches
    canvas.paint(Surface.FOREST, level < canvas.between(-1.5, -0.3))
    canvas.paint(Surface.ROCK, level + 0.3 * canvas.wetness > canvas.between(-0.4, 0.6))
    canvas.paint(Surface.SNOW, level > canvas.between(-0.6, 1.2))


def _burnt(canvas: Canvas) -> None:
    _background(canvas, forest_ratio=canvas.between(0.4, 0.9))
    scar = _highest(canvas.wetness + 0.3 * canvas.height, canvas.between(0.25, 0.7))
    canvas.paint(Surface.CHAR, scar & (canvas.surface != Surface.PAVEMENT) & ~_highest(canvas.height, 0.12))
    canvas.relief_m = canvas.between(15, 60)


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "lake": _lake,
    "river": _river,
    "forest": _forest,
    "clearcut": _clearcut,
    "crops": _crops,
    "pasture": _pasture,
    "orchard": _orchard,
    "town": _town,
    "village": _village,
    "industry": _industry,
    "highway": _highway,
    "wetland": _wetland,
    "dunes": _dunes,
    "alpine": _alpine,
    "burnt": _burnt,
}
