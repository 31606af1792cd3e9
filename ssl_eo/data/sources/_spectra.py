"""A compact spectral library and the optics of a band: materials, atmosphere, Gaussian response.

Every pixel of a procedural scene is a mixture of a few materials, so what a band sees of it is one row of a small
matrix: response x spectra, integrated once on a fixed wavelength grid. The spectra are analytic, smooth, and follow the
textbook features: chlorophyll absorption and the red edge, liquid water at 0.97, 1.20, 1.45 and 1.94 um, cellulose at
2.1 um, clay at 2.2 um, iron at 0.87 um, the fall of snow beyond 1 um.

C bands, K materials, L wavelengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ssl_eo.sensors import Band

__all__ = ["BandOptics", "Material", "band_optics", "spectra", "wavelengths_um"]

Array = NDArray[np.float32]

_FWHM_PER_SIGMA = 2.354820045  # 2 sqrt(2 ln 2)
_STEP_UM = 0.005
_TOP_OF_ATMOSPHERE = "top-of-atmosphere"


class Material(IntEnum):
    """Rows of the spectral library."""

    CLEAR_WATER = 0
    TURBID_WATER = 1
    LEAF = 2
    DRY_PLANT = 3
    DARK_SOIL = 4
    BRIGHT_SOIL = 5
    SAND = 6
    ROOF_TILE = 7
    CONCRETE = 8
    ASPHALT = 9
    SNOW = 10
    CHAR = 11
    ROCK = 12


@dataclass(frozen=True)
class BandOptics:
    """What C optical bands make of a scene: `reflectance [C, K]` per material, `air [C]`, `haze [C]`.

    `air` is the reflectance of clean air (zero for surface products); `haze` that of a unit of haze above the ground.
    """

    reflectance: Array
    air: Array
    haze: Array


def wavelengths_um() -> Array:
    """The grid of the library, 0.35 to 2.60 um."""
    return np.arange(0.35, 2.60 + _STEP_UM / 2, _STEP_UM, dtype=np.float32)


@cache
def spectra() -> Array:
    """Reflectance `[K, L]` of each `Material` on `wavelengths_um`, within 0 and 1."""
    um = wavelengths_um()
    water = _liquid_water(um)
    rows = {
        Material.CLEAR_WATER: 0.055 * np.exp(-(um - 0.35) / 0.13),
        Material.TURBID_WATER: (0.10 * _bump(um, 0.57, 0.075) + 0.045 * _bump(um, 0.70, 0.06) + 0.012) * np.exp(-water),
        Material.LEAF: 0.030 + 0.065 * _bump(um, 0.55, 0.035) + 0.50 * _step(um, 0.717, 0.013) * np.exp(-0.8 * water),
        Material.DRY_PLANT: _rise(um, 0.06, 0.42, 0.40) * (1 - 0.18 * _bump(um, 2.09, 0.06)) * np.exp(-0.12 * water),
        Material.DARK_SOIL: _rise(um, 0.035, 0.24, 0.75) * (1 - 0.10 * _bump(um, 2.2, 0.03)) * np.exp(-0.15 * water),
        Material.BRIGHT_SOIL: _rise(um, 0.06, 0.46, 0.48)
        * (1 - 0.08 * _bump(um, 0.87, 0.07))
        * (1 - 0.12 * _bump(um, 2.2, 0.03))
        * np.exp(-0.06 * water),
        Material.SAND: _rise(um, 0.15, 0.42, 0.33) * np.exp(-0.03 * water),
        Material.ROOF_TILE: 0.06 + 0.24 * _step(um, 0.59, 0.03) + 0.10 * _step(um, 1.1, 0.15),
        Material.CONCRETE: _rise(um, 0.26, 0.16, 0.25) * (1 - 0.1 * _step(um, 2.2, 0.1)),
        Material.ASPHALT: 0.075 + 0.035 * (um - 0.35),
        Material.SNOW: 0.97 * np.exp(-_ice(um)),
        Material.CHAR: 0.025 + 0.050 * (um - 0.35),
        Material.ROCK: _rise(um, 0.10, 0.20, 0.50) * (1 - 0.15 * _bump(um, 2.33, 0.04)),
    }
    return np.stack([rows[material] for material in Material]).clip(0, 1).astype(np.float32)  # [K, L]


def band_optics(bands: list[Band], unit: str) -> BandOptics:
    """Integrate the library over the Gaussian responses of `bands` (kind optical).

    A `unit` that speaks of top-of-atmosphere sees the ground through water vapour, and clean air above it.
    """
    um = wavelengths_um()
    centre = np.array([band.wavelength_um for band in bands])[:, None]
    sigma = np.array([max(band.fwhm_um, _STEP_UM) for band in bands])[:, None] / _FWHM_PER_SIGMA
    response = np.exp(-0.5 * ((um - centre) / sigma) ** 2) + 1e-30  # [C, L]
    response /= response.sum(1, keepdims=True)
    seen_from_space = _TOP_OF_ATMOSPHERE in unit
    transmittance = _transmittance(um) if seen_from_space else np.ones_like(um)
    rayleigh = 0.0045 * um**-4.05 * transmittance if seen_from_space else np.zeros_like(um)
    return BandOptics(
        reflectance=(response @ (spectra() * transmittance).T).astype(np.float32),
        air=(response @ rayleigh).astype(np.float32),
        haze=(response @ (um / 0.45) ** -1.4).astype(np.float32),
    )


def _bump(um: Array, centre: float, width: float) -> Array:
    bump: Array = np.exp(-0.5 * ((um - centre) / width) ** 2)
    return bump


def _step(um: Array, centre: float, width: float) -> Array:
    step: Array = 1 / (1 + np.exp(-(um - centre) / width))
    return step


def _rise(um: Array, low: float, gain: float, scale: float) -> Array:
    """Minerals and dry matter: reflectance grows with wavelength and levels off."""
    rise: Array = low + gain * (1 - np.exp(-(um - 0.35) / scale))
    return rise


def _liquid_water(um: Array) -> Array:
    """Optical depth of leaf water: the bands at 0.97, 1.20, 1.45, 1.94 um on a continuum that grows beyond 1.3 um."""
    bands: Array = 0.10 * _bump(um, 0.97, 0.03) + 0.25 * _bump(um, 1.20, 0.05)
    bands += 1.20 * _bump(um, 1.45, 0.06) + 1.90 * _bump(um, 1.94, 0.08)
    bands += 0.80 * _step(um, 1.40, 0.04) + 0.90 * _step(um, 1.90, 0.05) + 0.90 * _step(um, 2.45, 0.06)
    return bands


def _ice(um: Array) -> Array:
    """Optical depth of a snow pack."""
    bands: Array = 0.22 * _bump(um, 1.03, 0.04) + 0.50 * _bump(um, 1.27, 0.06) + 1.5 * _bump(um, 1.50, 0.06)
    bands += 0.25 * _step(um, 0.95, 0.05) + 2.0 * _step(um, 1.43, 0.03) + 1.6 * _step(um, 1.92, 0.03)
    return bands


def _transmittance(um: Array) -> Array:
    """Two-way transmittance of a moist atmosphere: water vapour, a little oxygen and carbon dioxide."""
    depth = 0.5 * _bump(um, 0.94, 0.015) + 0.5 * _bump(um, 1.13, 0.02) + 9.0 * _bump(um, 1.38, 0.03)
    depth += 9.0 * _bump(um, 1.88, 0.04) + 0.4 * _bump(um, 0.761, 0.003) + 0.3 * _bump(um, 2.01, 0.02)
    transmittance: Array = np.exp(-depth)
    return transmittance
