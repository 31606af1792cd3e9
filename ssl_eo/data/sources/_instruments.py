"""How a sensor sees a procedural scene: any sensor that its file describes, band by band, on its own grid.

Optical bands integrate the spectra of the materials over their response; thermal bands give brightness temperature;
radar bands backscatter with speckle; elevation and class bands the ground itself. A band is measured in cells of its
own ground sampling and delivered on the grid of the sensor's finest band, so coarse bands are truly blurred.

n pixels of the scene's base grid, N pixels of the tile, m cells of one band, C bands, K materials.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.sources._landscape import Scene
from ssl_eo.data.sources._painters import LAND_COVER, SURFACE_LAND_COVER, Surface
from ssl_eo.data.sources._spectra import band_optics
from ssl_eo.data.sources._terrain import area_average, interpolate, overlap_matrix
from ssl_eo.sensors import POLARIZATIONS, Sensor

__all__ = ["Instrument", "cover_fractions"]

Array = NDArray[np.float32]

_N_LOOKS = 4.4  # equivalent number of looks of Sentinel-1 IW GRD products
_NOISE = 0.0025  # std of an optical band, in reflectance
_THERMAL_NOISE_K = 0.15
_DETAIL = 0.10  # std of brightness below the base grid
_SURFACE_HAZE = 0.3  # what atmospheric correction leaves of the haze
_COUNTS_8_BIT, _COUNTS = 400.0, 3000.0  # per reflectance, of cameras whose digital numbers are not calibrated

# Backscatter in dB (VV, VH, HH, HV) per land cover, in the order of LAND_COVER.
_BACKSCATTER_DB = np.array(
    [
        (-20, -28, -23, -28), (-8.5, -14, -8, -14), (-11, -18, -11, -18), (-12, -20, -12, -20), (-13, -23, -14, -23),
        (-18, -28, -19, -28), (-3, -12, -1.5, -12), (-15, -24, -15, -24), (-14, -22, -14, -22), (-9, -17, -8, -17),
        (-12, -20, -12, -20), (-9, -17, -9, -17),
    ],
    np.float32,
)  # fmt: skip

# Class index of each land cover, in the order of LAND_COVER, in the legends that we can speak.
_LEGENDS = {
    "synthetic_landcover": tuple(range(len(LAND_COVER))),
    "worldcover": (7, 0, 3, 2, 5, 5, 4, 4, 6, 8, 5, 5),
    "dynamic_world": (0, 1, 4, 2, 7, 7, 6, 6, 8, 3, 7, 7),
}

_NOT_MODELLED = ("canopy_height",)  # elevation here is that of the ground


class Instrument:
    """Bands of one sensor over places of `extent_m`: `observe(scene, rng)` gives a tile `[C, N, N]` as it is stored.

    Raises `ValueError` when the sensor is a class map whose legend is not known here.
    """

    def __init__(self, sensor: Sensor, bands: tuple[str, ...], extent_m: float) -> None:
        if sensor.name in _NOT_MODELLED:
            raise ValueError(f"the procedural world has nothing that {sensor.name!r} measures")
        if sensor.is_categorical and sensor.name not in _LEGENDS:
            raise ValueError(f"no legend for the class map {sensor.name!r} (known: {', '.join(_LEGENDS)})")
        self.sensor = sensor
        self.bands = tuple(sensor.bands[i] for i in sensor.index(bands))
        self.extent_m = extent_m
        self.gsd_m = min(band.gsd_m for band in self.bands)
        self.n_pixels = round(extent_m / self.gsd_m)
        self._groups = self._group_bands()
        self._optics = {
            rows: band_optics([self.bands[i] for i in rows], sensor.unit)
            for (kind, _), rows in self._groups.items()
            if kind == "optical"
        }
        counts = _COUNTS_8_BIT if sensor.dtype == "uint8" else _COUNTS
        self._stored_per_unit = (counts if sensor.unit == "digital number" else 1.0) / sensor.scale
        self._haze_ratio = 1.0 if "top-of-atmosphere" in sensor.unit else _SURFACE_HAZE

    def observe(self, scene: Scene, rng: np.random.Generator) -> NDArray[np.generic]:
        """The scene as stored values `[C, N, N]`; `rng` gives the noise of this sensor alone."""
        if self.sensor.is_categorical:
            return self._classes(scene)
        materials = self._materials(scene, rng) if self._optics else None
        tile = np.empty((len(self.bands), self.n_pixels, self.n_pixels), np.float32)
        for (kind, gsd_m), rows in self._groups.items():
            if materials is not None and kind == "optical":
                cells = self._reflectance(materials, scene, rng, rows, gsd_m)  # [c, m, m]
            elif kind == "thermal":
                cells = self._brightness_temperature(scene, rng, rows, gsd_m)
            elif kind == "sar":
                cells = self._backscatter(scene, rng, rows, gsd_m)
            else:
                cells = self._elevation(scene, rows, gsd_m)
            if gsd_m > self.gsd_m:
                cells = interpolate(cells, self.n_pixels, self.extent_m, gsd_m)  # [c, N, N]
            tile[list(rows)] = cells
        return self._store(tile)

    def _group_bands(self) -> dict[tuple[str, float], tuple[int, ...]]:
        """Positions of the bands that are measured together: same kind, same ground sampling."""
        groups: dict[tuple[str, float], list[int]] = {}
        for i, band in enumerate(self.bands):
            groups.setdefault((band.kind, band.gsd_m), []).append(i)
        return {key: tuple(rows) for key, rows in groups.items()}

    def _cells(self, field: Array, gsd_m: float) -> Array:
        """`field [..., n, n]` averaged over cells of `gsd_m`, the last ones cut off by the edge: `[..., m, m]`."""
        n_cells = int(np.ceil(self.extent_m / gsd_m - 1e-6))
        return area_average(field, n_cells, self.extent_m, gsd_m)

    def _materials(self, scene: Scene, rng: np.random.Generator) -> Array:
        """Lit materials on the sensor's finest grid `[K, N, N]`, with detail where the base grid is coarser."""
        materials = self._cells(scene.materials, self.gsd_m)
        n, n_fine = scene.surface.shape[0], self.n_pixels
        if n_fine > n:
            detail = np.float32(_DETAIL) * rng.standard_normal((n_fine, n_fine), np.float32)
            down, up = overlap_matrix(n_fine, n, self.extent_m), overlap_matrix(n, n_fine, self.extent_m)
            materials *= 1 + detail - up @ (down @ detail @ down.T) @ up.T  # mean over every base pixel stays
        return materials

    def _reflectance(
        self, materials: Array, scene: Scene, rng: np.random.Generator, rows: tuple[int, ...], gsd_m: float
    ) -> Array:
        optics, haze = self._optics[rows], self._haze_ratio * scene.haze
        cells = materials if gsd_m == self.gsd_m else self._cells(materials, gsd_m)  # [K, m, m]
        n_materials, m, _ = cells.shape
        gain = np.float32(scene.gain * (1 - haze))
        ground: Array = np.matmul(gain * optics.reflectance, cells.reshape(n_materials, m * m))  # [c, m*m]
        ground += (optics.air + haze * optics.haze).astype(np.float32)[:, None]
        ground += np.float32(_NOISE) * rng.standard_normal(ground.shape, np.float32)
        return ground.reshape(len(rows), m, m)

    def _brightness_temperature(
        self, scene: Scene, rng: np.random.Generator, rows: tuple[int, ...], gsd_m: float
    ) -> Array:
        kelvin = self._cells(scene.temperature_k, gsd_m)  # [m, m]
        # Water vapour takes more of the longer wavelengths, and more of it when the air is warm.
        humidity = max(scene.climate.air_k - 263.0, 0.0) / 30.0
        loss = [humidity * (0.8 + 0.6 * (self.bands[i].wavelength_um - 10.8)) for i in rows]
        cells = np.float32(_THERMAL_NOISE_K) * rng.standard_normal((len(rows), *kelvin.shape), np.float32)
        cells += kelvin - np.array(loss, np.float32)[:, None, None]  # [c, m, m]
        return cells

    def _backscatter(self, scene: Scene, rng: np.random.Generator, rows: tuple[int, ...], gsd_m: float) -> Array:
        usual_db = _BACKSCATTER_DB[SURFACE_LAND_COVER].T + scene.backscatter_db  # [4, S]
        usual_db[:, Surface.WATER] += np.float32(scene.wind_db)
        unknown_is_ascending = rng.random() < 0.5
        cells = []
        for i in rows:
            band = self.bands[i]
            power = 10 ** (usual_db[POLARIZATIONS.index(band.polarization or "VV")] / 10)  # [S]
            ascending = unknown_is_ascending if band.orbit is None else band.orbit == "ascending"
            away = scene.slope[1] if ascending else -scene.slope[1]  # the radar looks right: east when it flies north
            facing = np.clip(1 + np.float32(1.5) * away, 0.2, 4)
            cells.append(self._cells(np.take(power, scene.surface) * facing, gsd_m))
        mean = np.stack(cells)  # [c, m, m]
        speckle = rng.standard_gamma(_N_LOOKS, mean.shape, np.float32) / np.float32(_N_LOOKS)
        decibels: Array = np.float32(10) * np.log10(mean * speckle + np.float32(1e-6))
        return decibels

    def _elevation(self, scene: Scene, rows: tuple[int, ...], gsd_m: float) -> Array:
        height = self._cells(scene.elevation_m, gsd_m)
        steepness = np.hypot(*(self._cells(slope, gsd_m) for slope in scene.slope))
        maps = {"slope": np.degrees(np.arctan(steepness))}
        return np.stack([maps.get(self.bands[i].name, height) for i in rows])  # [c, m, m]

    def _classes(self, scene: Scene) -> NDArray[np.generic]:
        legend = np.array(_LEGENDS[self.sensor.name], self.sensor.dtype)
        majority = cover_fractions(scene, self.n_pixels).argmax(0)
        return np.repeat(legend[majority][None], len(self.bands), axis=0)

    def _store(self, tile: Array) -> NDArray[np.generic]:
        """Physical values to stored ones: offset, scale, rounding and the range of the dtype, clear of no-data."""
        tile -= np.float32(self.sensor.offset)
        tile *= np.float32(self._stored_per_unit)
        dtype = np.dtype(self.sensor.dtype)
        if dtype.kind == "f":
            return tile.astype(dtype, copy=False)
        limits = np.iinfo(dtype)
        low = limits.min + 1 if float(limits.min) in self.sensor.no_data else limits.min
        np.rint(tile, out=tile)
        np.clip(tile, low, limits.max, out=tile)
        return tile.astype(dtype)


def cover_fractions(scene: Scene, n_pixels: int) -> Array:
    """Share of each land cover in each pixel of a grid over the scene: `[len(LAND_COVER), N, N]`."""
    one_hot = (scene.land_cover == np.arange(len(LAND_COVER), dtype=np.uint8)[:, None, None]).astype(np.float32)
    return area_average(one_hot, n_pixels, scene.extent_m, scene.extent_m / n_pixels)
