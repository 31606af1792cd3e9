"""Fractal fields and resampling on a square: everything separable, so two small matrix products a field.

n pixels of a grid, g knots of a random grid, F fields.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["area_average", "fractal_fields", "interpolate", "overlap_matrix"]

Array = NDArray[np.float32]

_SPACINGS_M = (400.0, 200.0, 100.0, 50.0, 25.0)


def fractal_fields(rng: np.random.Generator, n_fields: int, n: int, extent_m: float, hurst: float) -> Array:
    """`[F, n, n]` random fields of about zero mean and unit variance whose amplitude grows as scale ** `hurst`.

    Each octave is a white random grid seen through cubic B-splines, so a field is smooth, does not repeat, and its
    features have sizes in metres whatever the extent.
    """
    total = np.zeros((n_fields, n, n), np.float32)
    power = 0.0
    for spacing_m in _SPACINGS_M:
        basis = _spline_matrix(n, extent_m, max(spacing_m, 2 * extent_m / n))  # [n, g]
        knots = rng.standard_normal((n_fields, basis.shape[1], basis.shape[1]), np.float32)
        amplitude = np.float32((spacing_m / _SPACINGS_M[0]) ** hurst)
        total += amplitude * (basis @ knots @ basis.T)  # [F, n, n]
        power += float(amplitude) ** 2 * float((basis**2).sum(1).mean()) ** 2
    total /= np.float32(np.sqrt(power))
    return total


def overlap_matrix(n_in: int, n_out: int, extent_m: float, step_out_m: float | None = None) -> Array:
    """`[n_out, n_in]`: each output cell is the area-weighted mean of the input cells it covers.

    Input cells divide `extent_m` evenly; output cells are `step_out_m` wide (default: they divide it evenly too), the
    last one cut off at the edge.
    """
    return _overlap_matrix(n_in, n_out, extent_m, extent_m / n_out if step_out_m is None else step_out_m)


def area_average(field: Array, n_out: int, extent_m: float, step_out_m: float) -> Array:
    """Mean of `field [..., n, n]` over cells of `step_out_m`: `[..., n_out, n_out]`."""
    n = field.shape[-1]
    factor = n // n_out
    if factor * n_out == n and abs(n_out * step_out_m - extent_m) < 1e-6 * extent_m:  # whole cells: add slices
        rows: Array = field[..., ::factor, :].copy()
        for i in range(1, factor):
            rows += field[..., i::factor, :]
        cells: Array = rows[..., ::factor].copy()
        for i in range(1, factor):
            cells += rows[..., i::factor]
        cells *= np.float32(1 / factor**2)
        return cells
    return _both_axes(overlap_matrix(n, n_out, extent_m, step_out_m), field)


def interpolate(field: Array, n_out: int, extent_m: float, step_in_m: float) -> Array:
    """Linear interpolation of `field [..., m, m]`, cells of `step_in_m`, to `n_out` even pixels a side."""
    return _both_axes(_linear_matrix(field.shape[-1], n_out, extent_m, step_in_m), field)


def _both_axes(weights: Array, field: Array) -> Array:
    resampled: Array = np.matmul(np.matmul(weights, field), weights.T)  # [..., n_out, n_out]
    return resampled


@lru_cache(maxsize=64)
def _spline_matrix(n: int, extent_m: float, spacing_m: float) -> Array:
    position = (np.arange(n) + 0.5) * (extent_m / n / spacing_m)
    knots = np.arange(-1, int(np.ceil(extent_m / spacing_m)) + 2)
    distance = np.abs(position[:, None] - knots)  # [n, g]
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    spline: Array = np.where(distance < 1, near, far).astype(np.float32)
    return spline


@lru_cache(maxsize=64)
def _overlap_matrix(n_in: int, n_out: int, extent_m: float, step_out_m: float) -> Array:
    edges_in = np.arange(n_in + 1) * (extent_m / n_in)
    edges_out = np.minimum(np.arange(n_out + 1) * step_out_m, extent_m)[:, None]
    shared = np.minimum(edges_out[1:], edges_in[1:]) - np.maximum(edges_out[:-1], edges_in[:-1])
    weights = np.clip(shared, 0, None)
    shares: Array = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return shares


@lru_cache(maxsize=64)
def _linear_matrix(n_in: int, n_out: int, extent_m: float, step_in_m: float) -> Array:
    position = (np.arange(n_out) + 0.5) * (extent_m / n_out / step_in_m) - 0.5
    position = position.clip(0, n_in - 1)[:, None]
    weights: Array = np.clip(1 - np.abs(position - np.arange(n_in)), 0, None).astype(np.float32)
    return weights
