"""Procedural scenes: a small physical world that any described sensor can look at. Needs no file.

Sample `index` of a split is a pure function of (seed, split, index, extent): terrain, land cover, season, sun and
atmosphere are drawn from one addressed generator, and each sensor adds its own noise from another. So all sensors see
the same ground, in metres, and a tile does not depend on which other sensors are asked for.

C bands, N pixels of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from hashlib import sha256
from math import gcd, lcm
from typing import Any, Literal

import numpy as np

from ssl_eo.data.sources._instruments import Instrument, cover_fractions
from ssl_eo.data.sources._landscape import SCENES, Scene, build_scene, build_series
from ssl_eo.data.sources._painters import LAND_COVER
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.seeding import numpy_generator
from ssl_eo.sensors import load_sensor

__all__ = ["Config", "Source"]

_VERSION = 1  # raised when the same config gives other pixels
_CHUNK_SIZE = 64
_N_STATISTICS_SCENES = 64
_N_STATISTICS_VALUES = 1 << 25  # a large tile is averaged over fewer scenes, so that this many values suffice
_PRESENT = 0.05  # share of the scene from which a land cover counts as present


@dataclass
class Config:
    """Which scenes, seen by which sensors."""

    n_samples: int = 20_000  # different scenes
    seed: int = 0  # of the world; another seed has other scenes
    sensors: list[str] = field(default_factory=lambda: ["sentinel2_l2a"])  # names, or `name:subset` ("enmap:rgb")
    extent_m: float = 640.0  # side of a scene; whole pixels for every sensor
    n_dates: int = 1  # of a place, over a year; more than one are tiles of their own: sentinel2_l2a@0, ...
    split: Literal["train", "val", "test"] = "train"  # disjoint scenes
    labels: Literal["scene", "landcover", "presence"] = (
        "scene"  # a class | a class map on the first sensor's grid | multi-hot
    )

    def __post_init__(self) -> None:
        if self.n_samples < 1 or self.n_dates < 1:
            raise ValueError(f"n_samples and n_dates must be at least 1, got {self.n_samples} and {self.n_dates}")
        if not self.sensors:
            raise ValueError("sensors is empty; name at least one, such as sentinel2_l2a")
        if not self.extent_m > 0:
            raise ValueError(f"extent_m must be positive metres, got {self.extent_m}")
        for key, allowed in (("split", ("train", "val", "test")), ("labels", ("scene", "landcover", "presence"))):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")


class Source:
    """The procedural world as a source of samples; see `ssl_eo.data.types.Source`.

    Raises `ValueError` for an unknown sensor or subset, and for an extent that is not a whole number of pixels of
    every sensor (the message names the extents that are).
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._instruments: dict[str, Instrument] = {}
        for entry in cfg.sensors:
            name, _, subset = entry.partition(":")
            sensor = load_sensor(name)
            if sensor.name in self._instruments:
                raise ValueError(f"sensors: {sensor.name} is named twice")
            self._instruments[sensor.name] = Instrument(sensor, sensor.resolve_bands(subset or None), cfg.extent_m)
        _check_extent(cfg.extent_m, {name: i.gsd_m for name, i in self._instruments.items()})

    @cached_property
    def schema(self) -> Mapping[str, TileSchema]:
        """Statistics are measured on first use, on scenes of their own that do not depend on seed or split."""
        schemas = {name: self._schema_of(name, instrument) for name, instrument in self._instruments.items()}
        if self.cfg.n_dates == 1:
            return schemas
        return {f"{name}@{i}": schema for name, schema in schemas.items() for i in range(self.cfg.n_dates)}

    @property
    def label_names(self) -> tuple[str, ...]:
        return SCENES if self.cfg.labels == "scene" else LAND_COVER

    @property
    def chunk_size(self) -> int:
        return _CHUNK_SIZE

    def __len__(self) -> int:
        return self.cfg.n_samples

    def read(self, index: int) -> Sample:
        """Sample `index`; raises `IndexError` outside the source."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        address = (self.cfg.seed, self.cfg.split, index)
        if self.cfg.n_dates > 1:
            return self._read_series(index, address)
        scene = build_scene(numpy_generator("synthetic", *address), self.cfg.extent_m)
        tiles = {
            name: self._tile(instrument, scene, numpy_generator("synthetic", *address, name))
            for name, instrument in self._instruments.items()
        }
        return Sample(f"{self.cfg.split}-{index:06d}", tiles, _meta(scene), self._label(scene))

    def fingerprint(self) -> str:
        return sha256(repr((_VERSION, sorted(asdict(self.cfg).items()))).encode()).hexdigest()[:16]

    def _read_series(self, index: int, address: tuple[int | str, ...]) -> Sample:
        """The place of a sample at several dates; label and `meta` are those of the first."""
        later = [numpy_generator("synthetic", *address, "date", i) for i in range(1, self.cfg.n_dates)]
        scenes = build_series(numpy_generator("synthetic", *address), self.cfg.extent_m, later)
        tiles = {}
        for name, instrument in self._instruments.items():
            for i, scene in enumerate(scenes):
                tile = self._tile(instrument, scene, numpy_generator("synthetic", *address, name, *([i] if i else [])))
                tiles[f"{name}@{i}"] = replace(tile, date=scene.climate.date.isoformat())
        return Sample(f"{self.cfg.split}-{index:06d}", tiles, _meta(scenes[0]), self._label(scenes[0]))

    def _tile(self, instrument: Instrument, scene: Scene, rng: np.random.Generator) -> Tile:
        names = tuple(band.name for band in instrument.bands)
        return Tile(instrument.observe(scene, rng), names, instrument.gsd_m)

    def _label(self, scene: Scene) -> Any:
        if self.cfg.labels == "scene":
            return scene.label
        if self.cfg.labels == "landcover":
            first = next(iter(self._instruments.values()))
            return cover_fractions(scene, first.n_pixels).argmax(0)  # [N, N]
        share = np.bincount(scene.land_cover.reshape(-1), minlength=len(LAND_COVER)) / scene.land_cover.size
        return (share >= _PRESENT).astype(np.float32)

    def _schema_of(self, name: str, instrument: Instrument) -> TileSchema:
        n_bands, n_pixels = len(instrument.bands), instrument.n_pixels
        n_scenes = min(_N_STATISTICS_SCENES, max(4, _N_STATISTICS_VALUES // (n_bands * n_pixels**2)))
        total, squares = np.zeros(n_bands), np.zeros(n_bands)
        for i in range(n_scenes):
            scene = build_scene(numpy_generator("synthetic statistics", i), self.cfg.extent_m)
            pixels = instrument.observe(scene, numpy_generator("synthetic statistics", i, name)).reshape(n_bands, -1)
            total += pixels.mean(1, dtype=np.float64)
            squares += np.square(pixels, dtype=np.float64).mean(1)
        mean = total / n_scenes
        # A band that the air makes black, or a place without relief, still needs a width.
        std = np.sqrt(np.maximum(squares / n_scenes - mean**2, 1e-6))
        return TileSchema(
            sensor=instrument.sensor,
            bands=tuple(band.name for band in instrument.bands),
            dtype=instrument.sensor.dtype,
            shape=(n_pixels, n_pixels),
            gsd_m=instrument.gsd_m,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
        )


def _meta(scene: Scene) -> dict[str, Any]:
    climate = scene.climate
    return {
        "latitude": climate.latitude,
        "longitude": climate.longitude,
        "date": climate.date.isoformat(),
        "sun_elevation_deg": float(np.degrees(climate.sun_elevation)),
    }


def _check_extent(extent_m: float, gsd_m: Mapping[str, float]) -> None:
    """Every sensor needs a whole number of pixels, so the extent is a multiple of all ground samplings."""
    exact = {name: Fraction(gsd).limit_denominator(10_000) for name, gsd in gsd_m.items()}
    extent = Fraction(extent_m).limit_denominator(10_000)
    wrong = [name for name, gsd in exact.items() if extent % gsd]
    if wrong:
        step = Fraction(lcm(*(g.numerator for g in exact.values())), gcd(*(g.denominator for g in exact.values())))
        below = max(int(extent / step), 1)
        raise ValueError(
            f"extent_m: {extent_m:g} m is not a whole number of pixels of {', '.join(wrong)}"
            f" ({', '.join(f'{gsd_m[name]:g} m' for name in wrong)}); multiples of {float(step):g} m are,"
            f" such as {float(below * step):g} or {float((below + 1) * step):g}"
        )
