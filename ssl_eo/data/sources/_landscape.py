"""One procedural place at one moment: what the ground is made of, how the sun lights it, how warm and how rough it is.

A scene is a map of surfaces on a base grid and, for each surface, its mixture of materials. Place and date decide the
season, the season the greenness of plants, snow on the ground and the sun; what is drawn per scene (soil, moisture,
haze) makes the same land cover look different from place to place.

n pixels of the base grid, S surfaces, K materials.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.sources._painters import (
    LAND_COVER,
    N_SURFACES,
    PAINTERS,
    PARCELS,
    ROOFS,
    SURFACE_LAND_COVER,
    Canvas,
    Surface,
)
from ssl_eo.data.sources._spectra import Material

__all__ = ["SCENES", "Scene", "build_scene", "build_series"]

Array = NDArray[np.float32]

SCENES = tuple(PAINTERS)

_BASE_M = 5.0  # the base grid is this fine ...
_MAX_BASE_PIXELS = 256  # ... unless the place is so large that this many pixels a side would not reach

# Per land cover, in the order of LAND_COVER.
_WARMTH_K = np.array([-6, -3, 1, 2, 7, 9, 9, 10, -12, -2, 8, 5], np.float32)  # against the air, sun overhead
_CANOPY_ROUGHNESS = np.array([0, 22, 5, 5, 5, 2, 9, 4, 3, 12, 8, 14], np.float32) / 100  # brightness, std at 5 m


@dataclass
class Climate:
    """Season and sun of a place and date, at half past ten solar time."""

    latitude: float
    longitude: float
    date: datetime.date
    air_k: float
    greenness: float
    sun_elevation: float  # radians
    sun_azimuth: float  # radians clockwise from north


@dataclass
class Scene:
    """A place as physics: maps are `[n, n]`, row 0 in the north; elevation in metres, temperature in kelvin.

    `light` is illumination by slope times texture. `drought` is the share of green leaves dried up from place to place.
    `haze` and `gain` act on every optical band; `wind_db` is what waves add to the backscatter of water.
    """

    label: int
    extent_m: float
    surface: NDArray[np.uint8]
    mixture: Array
    light: Array
    drought: Array
    elevation_m: Array
    slope: tuple[Array, Array]
    climate: Climate
    haze: float
    gain: float
    wind_db: float
    backscatter_db: Array  # [S], departure of each surface from its land cover's usual backscatter

    @cached_property
    def materials(self) -> Array:
        """Amount of each material in each pixel, times light: `[K, n, n]`."""
        amount = np.take(np.ascontiguousarray(self.mixture.T), self.surface, axis=1)  # [K, n, n]
        withered = amount[Material.LEAF] * self.drought
        amount[Material.LEAF] -= withered
        amount[Material.DRY_PLANT] += withered
        amount *= self.light
        return amount

    @cached_property
    def land_cover(self) -> NDArray[np.uint8]:
        """Index into `LAND_COVER`, `[n, n]`."""
        return np.take(SURFACE_LAND_COVER, self.surface)

    @cached_property
    def temperature_k(self) -> Array:
        """Temperature of the surface: air, sun on it, and 6.5 K less per kilometre of height."""
        sun = np.sin(self.climate.sun_elevation)
        warmth = np.take(_WARMTH_K * np.float32(sun), self.land_cover)
        return np.float32(self.climate.air_k) + warmth * self.light - np.float32(0.0065) * self.elevation_m


def build_scene(rng: np.random.Generator, extent_m: float) -> Scene:
    """Draw a place of `extent_m` a side. Everything random comes from `rng`, so equal generators give equal scenes."""
    label, canvas = _build_place(rng, extent_m)
    return _at_date(rng, label, canvas, extent_m)


def build_series(rng: np.random.Generator, extent_m: float, later: Sequence[np.random.Generator]) -> list[Scene]:
    """The place of `build_scene` at its own date, and at as many later ones as there are generators `later`, in a year.

    Each of these draws how far its date is off an even spread, and haze, light and wind of that day.
    """
    label, canvas = _build_place(rng, extent_m)
    first = _at_date(copy.deepcopy(rng), label, canvas, extent_m)
    scenes = [first]
    for i, weather in enumerate(later, start=1):
        days = round((i + weather.uniform(-0.3, 0.3)) * 365 / (1 + len(later)))
        scene = _at_date(copy.deepcopy(rng), label, canvas, extent_m, days)
        haze, gain, wind_db = _weather(weather)
        # Snow draws numbers of its own, so what is drawn after it would be another place's.
        scene = replace(scene, drought=first.drought, backscatter_db=first.backscatter_db)
        scenes.append(replace(scene, haze=haze, gain=gain, wind_db=wind_db))
    return scenes


def _build_place(rng: np.random.Generator, extent_m: float) -> tuple[int, Canvas]:
    """What does not change from date to date: the kind of place, and where each surface is."""
    label = int(rng.integers(len(SCENES)))
    n = max(2, min(int(np.ceil(extent_m / _BASE_M)), _MAX_BASE_PIXELS))
    canvas = Canvas.blank(rng, n, extent_m)
    PAINTERS[SCENES[label]](canvas)
    return label, canvas


def _at_date(rng: np.random.Generator, label: int, canvas: Canvas, extent_m: float, days: int = 0) -> Scene:
    """The place so many days after its own date. Equal generators give equal soil, crops and relief."""
    n = len(canvas.surface)
    climate = _climate(rng, SCENES[label], days)
    elevation = canvas.height * np.float32(canvas.relief_m)
    elevation += np.float32(rng.uniform(0, 300) if canvas.relief_m < 50 else rng.uniform(600, 2200))
    slope = _slope(elevation, extent_m / n)
    roughness = np.take(_CANOPY_ROUGHNESS[SURFACE_LAND_COVER], canvas.surface)
    texture = 1 + roughness * rng.standard_normal((n, n), np.float32)
    if canvas.rows is not None:
        texture += canvas.rows * (canvas.surface >= PARCELS.start)
    mixture = _mixture(rng, climate)
    drought = np.clip(np.float32(0.12) + np.float32(rng.uniform(0.02, 0.15)) * canvas.wetness, 0, 0.6)
    haze, gain, wind_db = _weather(rng)
    return Scene(
        label=label,
        extent_m=extent_m,
        surface=canvas.surface,
        mixture=mixture,
        light=_illumination(slope, climate) * np.maximum(texture, np.float32(0.3)),
        drought=drought,
        elevation_m=elevation,
        slope=slope,
        climate=climate,
        haze=haze,
        gain=gain,
        wind_db=wind_db,
        backscatter_db=rng.normal(0, 1.0, N_SURFACES).astype(np.float32),
    )


def _weather(rng: np.random.Generator) -> tuple[float, float, float]:
    """Haze, gain of the light and backscatter of waves (dB) of one day."""
    return float(rng.gamma(1.5, 0.02)), float(np.exp(rng.normal(0, 0.10))), float(rng.normal(0, 3))


def _climate(rng: np.random.Generator, scene_name: str, days: int = 0) -> Climate:
    low, high = {"dunes": (14.0, 34.0), "alpine": (30.0, 58.0)}.get(scene_name, (2.0, 60.0))
    north = 1 if rng.random() < 0.7 else -1
    latitude = float(rng.uniform(low, high)) * north
    first = int(rng.integers(365))
    day = (first + days) % 365
    summer = -np.cos(2 * np.pi * (day + 10) / 365) * north  # 1 at midsummer, -1 at midwinter
    polewards = abs(latitude)
    air_k = 273.15 + 29 - 0.42 * polewards + 0.24 * polewards * summer + rng.normal(0, 2.5)
    aridity = rng.beta(1.5, 4)
    greenness = (1 - aridity) / (1 + np.exp(-(air_k - 281) / 3.0))
    elevation, azimuth = _sun(np.radians(latitude), day)
    return Climate(
        latitude=latitude,
        longitude=float(rng.uniform(-180, 180)),
        date=datetime.date(2020, 1, 1) + datetime.timedelta(days=int(rng.integers(4)) * 365 + first + days),
        air_k=float(air_k),
        greenness=float(greenness),
        sun_elevation=max(elevation, np.radians(12.0)),
        sun_azimuth=azimuth,
    )


def _sun(latitude: float, day: int) -> tuple[float, float]:
    """Elevation and azimuth (clockwise from north) in radians at 10:30 solar time."""
    declination = -np.radians(23.44) * np.cos(2 * np.pi * (day + 10) / 365)
    hour = np.radians(-22.5)
    up = np.sin(latitude) * np.sin(declination) + np.cos(latitude) * np.cos(declination) * np.cos(hour)
    east = -np.cos(declination) * np.sin(hour)
    north = np.cos(latitude) * np.sin(declination) - np.sin(latitude) * np.cos(declination) * np.cos(hour)
    return float(np.arcsin(up)), float(np.arctan2(east, north))


def _slope(elevation_m: Array, step_m: float) -> tuple[Array, Array]:
    """Metres of rise per metre towards the north and towards the east."""
    south, east = (np.asarray(slope, np.float32) for slope in np.gradient(elevation_m, np.float32(step_m)))
    return -south, east


def _illumination(slope: tuple[Array, Array], climate: Climate) -> Array:
    """Light on a slope relative to level ground: a direct part by the angle of the sun, and a quarter from the sky."""
    north, east = slope
    level = np.tan(climate.sun_elevation)
    towards_sun = np.float32(np.cos(climate.sun_azimuth)) * north + np.float32(np.sin(climate.sun_azimuth)) * east
    direct = (1 - towards_sun / np.float32(level)) / np.sqrt(1 + north**2 + east**2)
    light: Array = np.clip(np.float32(0.25) + np.float32(0.75) * direct, 0.15, 1.8)
    return light


def _mixture(rng: np.random.Generator, climate: Climate) -> Array:
    """Materials of every surface of this place and date: `[S, K]`. Rows sum to about one or less; the rest is shade."""
    bright, moist = rng.random(), rng.uniform(0.6, 1.1)
    soil = np.zeros(len(Material))
    soil[[Material.BRIGHT_SOIL, Material.DARK_SOIL]] = moist * bright, moist * (1 - bright)
    green = climate.greenness
    turbid = rng.beta(1, 2)
    conifers = rng.random()
    rows = np.zeros((N_SURFACES, len(Material)))
    rows[Surface.WATER, [Material.CLEAR_WATER, Material.TURBID_WATER]] = 1 - turbid, turbid
    rows[Surface.FOREST] = _plants(0.95, max(green, 0.9 * conifers), rng.uniform(0.3, 0.6), soil)
    rows[Surface.GRASS] = _plants(rng.uniform(0.75, 1.0), green, 0.08, soil)
    rows[Surface.SCRUB] = _plants(rng.uniform(0.35, 0.7), 0.6 * green, 0.2, soil)
    rows[Surface.ORCHARD] = _plants(0.85, max(green, 0.3), rng.uniform(0.2, 0.4), soil)
    rows[Surface.REED] = 0.75 * _plants(0.9, 0.7 * green, 0.25, soil) + 0.25 * rows[Surface.WATER]
    rows[Surface.SOIL] = _plants(0.05, green, 0.0, soil)
    rows[Surface.SAND, Material.SAND] = rng.uniform(0.7, 1.1)
    rows[Surface.PAVEMENT, [Material.ASPHALT, Material.CONCRETE]] = rng.uniform(0.6, 0.9), rng.uniform(0.1, 0.3)
    rows[Surface.SNOW, Material.SNOW] = rng.uniform(0.75, 0.98)
    rows[Surface.CHAR, [Material.CHAR, Material.DARK_SOIL]] = rng.uniform(0.6, 0.95), rng.uniform(0.05, 0.3)
    rows[Surface.ROCK, Material.ROCK] = rng.uniform(0.6, 1.1)
    roof_of_town = rng.dirichlet([0.7, 0.7, 0.7])
    for roof in ROOFS:
        share = 0.5 * roof_of_town + 0.5 * rng.dirichlet([0.5, 0.5, 0.5])
        rows[roof, [Material.ROOF_TILE, Material.CONCRETE, Material.ASPHALT]] = share * rng.uniform(0.7, 1.2)
    rows[PARCELS.start :] = _crops(rng, green, soil)
    snow_cover = rng.uniform(0.3, 0.95) if climate.air_k < 273 and rng.random() < 0.6 else 0.0
    if snow_cover:
        open_land = np.setdiff1d(np.arange(N_SURFACES), [Surface.WATER, Surface.FOREST, Surface.SNOW, Surface.PAVEMENT])
        rows[open_land] *= 1 - snow_cover
        rows[open_land, Material.SNOW] += 0.9 * snow_cover
    return rows.astype(np.float32)


def _plants(cover: float, green: float, shade: float, soil: NDArray[np.float64]) -> NDArray[np.float64]:
    """Plants over soil: `cover` of the ground, `green` of the leaves alive, `shade` lost between the crowns."""
    row = (1 - cover) * soil
    row[Material.LEAF] += cover * green
    row[Material.DRY_PLANT] += 0.8 * cover * (1 - green)
    return row * (1 - shade)


def _crops(rng: np.random.Generator, green: float, soil: NDArray[np.float64]) -> NDArray[np.float64]:
    """One row a parcel: a few crops grow in a place, each at its own stage from bare soil over green to ripe."""
    n_crops = int(rng.integers(2, 6))
    cover, alive = np.linspace(rng.uniform(0, 0.3), 1, n_crops), rng.beta(1.2, 0.8, n_crops)
    crop = rng.integers(n_crops, size=len(PARCELS))
    cover = np.clip(cover[crop] + rng.normal(0, 0.08, len(PARCELS)), 0, 1)[:, None]
    alive = np.clip((alive[crop] + rng.normal(0, 0.08, len(PARCELS))) * min(1.0, 1.3 * green), 0, 1)[:, None]
    rows = (1 - cover) * soil * rng.uniform(0.75, 1.2, (len(PARCELS), 1))
    rows[:, Material.LEAF] += (cover * alive)[:, 0]
    rows[:, Material.DRY_PLANT] += (0.8 * cover * (1 - alive))[:, 0]
    return rows


assert len(_WARMTH_K) == len(_CANOPY_ROUGHNESS) == len(LAND_COVER)
