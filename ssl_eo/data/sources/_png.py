"""Tiles that lie on disk as one 8-bit PNG for each band, or for three of them, decoded when they are looked at.

C bands, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.sources._pictures import open_picture

__all__ = ["PngBands"]

_FORMATS = ("PNG",)
_MODES = {1: "L", 3: "RGB"}
_MAX_SIDE = 512  # pixels
_MAX_BYTES = 4 << 20  # of a file: uncompressed, the largest has 0.8 MB; what lies beside pixels is read too


@dataclass(frozen=True)
class PngBands:
    """`LazyPixels` of PNGs of one size, by path with their number of bands. The bands of a missing file are zero.

    Raises `ValueError` or `OSError` that names the file when opened or sliced, for one that is damaged or different.
    """

    files: Mapping[Path, int]
    shape: tuple[int, int, int]

    @classmethod
    def open(cls, files: Mapping[Path, int]) -> PngBands | None:
        """The size is that of the first file that is there; None if there is none."""
        for path in files:
            try:
                with open_picture(path, _FORMATS, _MAX_BYTES) as image:
                    width, height = image.size
            except FileNotFoundError:
                continue
            if height != width or width > _MAX_SIDE:
                raise ValueError(f"{path} has {height} x {width} pixels, expected a square of at most {_MAX_SIDE}")
            return cls(files, (sum(files.values()), height, width))
        return None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def __getitem__(self, part: tuple[slice, slice, slice]) -> NDArray[Any]:
        height, width = (len(range(n)[s]) for n, s in zip(self.shape[1:], part[1:], strict=True))
        pixels = np.zeros((self.shape[0], height, width), np.uint8)
        first = 0
        for path, n_bands in self.files.items():
            if (decoded := self._decode(path, n_bands)) is not None:
                pixels[first : first + n_bands] = decoded[:, part[1], part[2]]
            first += n_bands
        return pixels[part[0]]

    def _decode(self, path: Path, n_bands: int) -> NDArray[np.uint8] | None:
        """`[n_bands, H, W]`, None for a file that is missing."""
        expected = _MODES[n_bands], *self.shape[1:]
        try:
            with open_picture(path, _FORMATS, _MAX_BYTES) as image:
                found = image.mode, image.height, image.width
                pixels = np.asarray(image) if found == expected else None  # decodes
        except FileNotFoundError:
            return None
        if pixels is None:
            raise ValueError(f"{path} has mode, height, width {found}, expected {expected}")
        return np.atleast_3d(pixels).transpose(2, 0, 1)  # [n_bands, H, W]
