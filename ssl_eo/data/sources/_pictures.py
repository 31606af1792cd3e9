"""JPEGs and PNGs of 8 bits: what their head says, and their pixels.

C bands, H W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import one_line
from ssl_eo.data.regular import check_regular

__all__ = ["PICTURE_SUFFIXES", "open_picture", "picture_size", "read_picture"]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
_FORMATS = ("JPEG", "PNG")  # Pillow knows many others, which nobody expects under these names
_MODES = {1: "L", 3: "RGB"}  # by number of bands
_MAX_PIXELS = 64 << 20  # of a picture, which is decoded as a whole
_MAX_BYTES = 256 << 20  # of a file: what lies beside pixels is read too


def picture_size(path: Path) -> tuple[int, int]:
    """(H, W) as the head of a file says. Raises `OSError` that names one that cannot be read."""
    with open_picture(path, _FORMATS, _MAX_BYTES) as image:
        return image.height, image.width


def read_picture(path: Path, n_bands: int) -> NDArray[np.uint8]:
    """`[C, H, W]`. Raises `ValueError` or `OSError` that names a file which is damaged or of another kind."""
    if (expected := _MODES.get(n_bands)) is None:
        raise ValueError(f"{path} is a JPEG or PNG, of 1 band or 3, expected {n_bands}; name its bands")
    with open_picture(path, _FORMATS, _MAX_BYTES) as image:
        found = f"mode {image.mode}, {image.width} x {image.height} pixels"
        # Only what is expected is decoded: a damaged head may say anything.
        fits = image.mode == expected and image.width * image.height <= _MAX_PIXELS
        pixels = np.asarray(image) if fits else None  # [H, W] or [H, W, C]
    if pixels is None:
        raise ValueError(f"{path} has {found}; expected mode {expected} and at most {_MAX_PIXELS:,} pixels")
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))  # [C, H, W]


@contextmanager
def open_picture(path: Path, formats: tuple[str, ...], max_bytes: int) -> Iterator[Any]:
    """The picture, undecoded, for a block that does nothing but look at it and decode it.

    Raises `FileNotFoundError`, or `OSError` that names what is no file of one of Pillow's `formats`, larger than
    `max_bytes`, or damaged, which may show only inside the block.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        check_regular(path, max_bytes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is looked at before decoding
            with Image.open(path, formats=formats) as image:
                yield image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise OSError(f"{path} is not a readable {' or '.join(formats)}: cannot identify its head") from None
    except (SyntaxError, ValueError, EOFError, OSError, Image.DecompressionBombError) as error:
        raise OSError(f"{path} is not a readable {' or '.join(formats)}: {one_line(error)}") from None
