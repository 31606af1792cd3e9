"""What the tiles of one name look like: sensor, bands, dtype, size, ground sampling and statistics.

C bands of a tile, H W tile pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ssl_eo.sensors import Sensor

__all__ = ["LazyPixels", "TileSchema", "is_gsd_m"]

_UNSIGNED, _SIGNED = ("uint8", "uint16", "uint32", "uint64"), ("int8", "int16", "int32", "int64")
_DTYPES = ("bool", *_UNSIGNED, *_SIGNED, "float16", "float32", "float64")  # of pixels: what NumPy and torch share


class LazyPixels(Protocol):
    """Pixels `[C, H, W]` that are read when they are sliced, and only those: a file that may be larger than memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, part: tuple[slice, slice, slice]) -> NDArray[Any]: ...


@dataclass(frozen=True)
class TileSchema:
    """What every tile of one name looks like in a source, and the statistics that normalise it.

    `mean` and `std` are per band, in stored units, over valid pixels. `shape` is (H, W), None where tiles differ in
    size. `gsd_m` is what a tile has that does not say otherwise. A sample may lack an `optional` tile. A tile name is
    the sensor's name unless a source holds several tiles of one sensor (resolutions, dates, products with statistics
    of their own): then `sensor_name@what`.
    """

    sensor: Sensor
    bands: tuple[str, ...]
    dtype: str
    shape: tuple[int, int] | None
    gsd_m: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    optional: bool = False

    def __post_init__(self) -> None:
        name, n = self.sensor.name, len(self.bands)
        self.sensor.index(self.bands)
        if not n or len(set(self.bands)) != n:
            raise ValueError(f"bands of {name} are none, or named twice: {', '.join(self.bands) or 'none'}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype of {name} must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        shape = (1, 1) if self.shape is None else self.shape
        if len(shape) != 2 or not all(isinstance(s, (int, np.integer)) and s > 0 for s in shape):
            raise ValueError(f"shape of {name} must be (height, width) in pixels or None, got {self.shape}")
        if not isinstance(self.optional, bool):
            raise ValueError(f"optional of {name} must be true or false, got {self.optional!r}")
        if not is_gsd_m(self.gsd_m):
            raise ValueError(f"gsd_m of {name} must be metres, above 0 and up to 1e6, got {self.gsd_m!r:.80}")
        if len(self.mean) != n or len(self.std) != n:
            raise ValueError(
                f"statistics of {name}: {len(self.mean)} means and {len(self.std)} standard deviations for {n} bands"
            )
        if not all(map(_is_number, self.mean)) or not all(_is_number(s) and s > 0 for s in self.std):
            raise ValueError(f"statistics of {name} must be finite and std positive, got std {self.std}")

    def check(self, pixels: NDArray[Any] | LazyPixels, bands: tuple[str, ...] | None = None) -> None:
        """Raise `ValueError` unless `pixels [C, H, W]`, and their `bands` where they are known, are as stated here.

        The message says what was found and what is expected; whoever calls adds whose pixels they are.
        """
        has_any_size = self.shape is None and len(pixels.shape) == 3 and min(pixels.shape) > 0
        size = pixels.shape[1:] if has_any_size else self.shape
        shape, dtype = (len(self.bands), *(size or ("height", "width"))), np.dtype(self.dtype)
        for what, found, expected in (
            ("bands", self.bands if bands is None else bands, self.bands),
            ("shape", pixels.shape, shape),
            ("dtype", pixels.dtype, dtype),
        ):
            if found != expected:
                raise ValueError(f"{what} {found}, expected {expected}")


def is_gsd_m(value: Any) -> bool:
    """Whether `value` can be the ground size of a pixel: metres above 0, up to a thousand kilometres."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_number and bool(0 < value <= 1e6)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)
