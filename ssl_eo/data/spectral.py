"""Virtual optical bands, mixed from the many narrow bands of one sensor: what other sensors would have seen.

C bands of a tile, n virtual bands, P bands that can be mixed, S runs of bands without a gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.schema import TileSchema
from ssl_eo.sensors import Band

__all__ = ["Synthesis", "covered_bands", "synthesise"]

Floats = NDArray[np.float64]

_FWHM_PER_SIGMA = 2.3548  # of a Gaussian
_REACH = 3.0  # standard deviations of a virtual band that lie inside a run
_GAP = 3.0  # mean widths between the centres of neighbours, beyond which nothing was measured in between
_LEAST_SHARE = 1e-4  # of the largest weight: what weighs less takes no part, so its no-data does no harm


@dataclass(frozen=True, eq=False)
class Synthesis:
    """n virtual bands: each a weighted mean of standardised bands of a tile, with a wavelength and a width of its own.

    `weights [n, C]` float32 are 0 for bands that take no part and sum to 1 in each row.
    """

    weights: NDArray[np.float32]
    wavelength_um: tuple[float, ...]
    fwhm_um: tuple[float, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Synthesis) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @property
    def _content(self) -> tuple[object, ...]:
        return self.wavelength_um, self.fwhm_um, self.weights.shape, self.weights.tobytes()


def covered_bands(schema: TileSchema) -> tuple[int, ...]:
    """Positions in the tile of the bands that can be mixed: optical ones whose width is known."""
    return tuple(i for i, band in enumerate(_bands(schema)) if band.kind == "optical" and band.fwhm_um > 0)


def synthesise(
    rng: np.random.Generator, schema: TileSchema, n: int, fwhm_range_um: tuple[float, float] = (0.0118, 0.0942)
) -> Synthesis:
    """`n` random virtual bands of Gaussian response (Panopticon, arXiv 2503.10845, appendix on spectral convolution).

    The full width at half maximum is uniform in `fwhm_range_um`. The centre is uniform over the wavelengths that the
    tile's bands cover without a gap, such that three standard deviations to either side are covered as well; where no
    run of bands is as long as that, over all that is covered. A source band of the same run weighs as much as two
    Gaussians overlap, `exp(-(mu - mu_c)^2 / (2 (s^2 + s_c^2)))` with centres mu and standard deviations s.

    Raises `ValueError` for `n` below 1, a range that is no range of widths, or a tile without bands that can be mixed.
    """
    if n < 1 or not 0 < fwhm_range_um[0] <= fwhm_range_um[1]:
        raise ValueError(
            f"virtual bands need n >= 1 and a range of widths in um, 0 < low <= high, got n {n} and {fwhm_range_um}"
        )
    covered = covered_bands(schema)
    if not covered:
        raise ValueError(f"a tile of {schema.sensor.name} has no optical band of known width to mix virtual bands from")
    bands = _bands(schema)
    centre, width = np.array([(bands[i].wavelength_um, bands[i].fwhm_um) for i in covered]).T  # [P] each
    run = _runs(centre, width)  # [P]
    fwhm = rng.uniform(*fwhm_range_um, n)  # [n]
    chosen, wavelength = _places(rng, _ends(centre, width, run), _REACH * fwhm / _FWHM_PER_SIGMA)  # [n] each
    spread = np.hypot(width, fwhm[:, None]) / _FWHM_PER_SIGMA  # [n, P]
    weights = np.zeros((n, len(bands)), np.float32)
    weights[:, covered] = _shares(centre - wavelength[:, None], spread, run == chosen[:, None])
    return Synthesis(weights, tuple(wavelength.tolist()), tuple(fwhm.tolist()))


def _bands(schema: TileSchema) -> list[Band]:
    by_name = {band.name: band for band in schema.sensor.bands}
    return [by_name[name] for name in schema.bands]


def _runs(centre: Floats, width: Floats) -> NDArray[np.int64]:
    """Number of the run `[P]` of each band; a run ends where neighbours are too far apart for their widths."""
    order = np.argsort(centre, kind="stable")
    mean_width = (width[order][1:] + width[order][:-1]) / 2
    run = np.zeros(len(centre), np.int64)
    run[order[1:]] = np.cumsum(np.diff(centre[order]) > _GAP * mean_width)
    return run


def _ends(centre: Floats, width: Floats, run: NDArray[np.int64]) -> Floats:
    """The wavelengths `[S, 2]` at which each run begins and ends, where its outermost bands see half of their most."""
    each = (run == number for number in range(run.max() + 1))
    return np.array([((centre - width / 2)[mine].min(), (centre + width / 2)[mine].max()) for mine in each])


def _places(rng: np.random.Generator, ends: Floats, margin: Floats) -> tuple[NDArray[np.int64], Floats]:
    """For each `margin [n]` a run and a wavelength in it: uniform over those so far from the `ends [S, 2]`, if any."""
    low, high = ends[:, 0] + margin[:, None], ends[:, 1] - margin[:, None]  # [n, S]
    fits = (low < high).any(axis=1, keepdims=True)  # [n, 1]
    low, high = np.where(fits, low, ends[:, 0]), np.where(fits, high, ends[:, 1])
    reached = np.cumsum((high - low).clip(min=0), axis=1)  # [n, S] lengths, one after the other
    place = reached[:, -1] * (1.0 - rng.random(len(margin)))  # [n] never 0, so that a run too short is never found
    run = (reached < place[:, None]).sum(axis=1)  # [n]
    each = np.arange(len(margin))
    return run, high[each, run] - (reached[each, run] - place)


def _shares(distance: Floats, spread: Floats, is_source: NDArray[np.bool_]) -> Floats:
    """Weights `[n, P]` of bands at a `distance` from a virtual one, `spread` being the root of both variances' sum.

    They sum to 1. In the original they do not, so that virtual bands differ in scale with the widths and the number of
    their sources. What is mixed is standardised, and alike where the wavelengths are: a mean of it keeps a spread of
    about 1, which models expect of every channel.
    """
    exponent = np.where(is_source, -0.5 * (distance / spread) ** 2, -np.inf)
    share: Floats = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    share[share < _LEAST_SHARE] = 0.0
    share /= share.sum(axis=1, keepdims=True)
    return share
