"""One sample of GeoBench: an HDF5 file with one plain array a band, and a pickle that describes them.

The arrays are plain: contiguous, without filters, in this very file. A file could also point at others, promise more
than it holds, or ask for a filter to be loaded; such ones are refused. Of the pickle the label alone is used, and only
where no array is the label.

C bands, H W pixels, K classes.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import one_line
from ssl_eo.data.regular import check_regular
from ssl_eo.data.sources._geobench_card import DatasetCard, TileCard
from ssl_eo.data.sources._geobench_folder import Label, multi_hot
from ssl_eo.data.sources._geobench_pickle import Call, array_of, interpret
from ssl_eo.data.sources._side_files import writable

__all__ = ["SampleFile", "open_sample"]

_MAX_FILE_BYTES = 64 << 20  # the largest have four
_MAX_ARRAYS = 256
_MAX_TEXT = 4 << 20  # characters of the attribute
_DATE = re.compile(r"_(\d{4}-\d{2}-\d{2})")
# What `repr` makes of bytes: one literal and nothing else, so that evaluating it can neither nest nor compute.
_BYTES_LITERAL = re.compile(
    r"""b(?:'(?:[ -&(-\[\]-~]|\\(?:[\\'nrt]|x[0-9a-f]{2}))*+'|"(?:[ !#-\[\]-~]|\\(?:[\\"nrt]|x[0-9a-f]{2}))*+")"""
)


@contextmanager
def open_sample(path: Path) -> Iterator[SampleFile]:
    """The sample in the file `path`. What goes wrong inside is a `ValueError` that names the file."""
    import h5py

    try:
        check_regular(path)
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise ValueError(f"it has {size:,} bytes, expected at most {_MAX_FILE_BYTES:,}")
        with h5py.File(path, "r") as file:
            yield SampleFile(file)
    # HDF5 says of a damaged file, as it comes: OSError, RuntimeError, KeyError, TypeError, ...
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        reason = one_line(error) or type(error).__name__
        raise ValueError(f"{path} cannot be used: {writable(reason)}") from None


class SampleFile:
    """An open file. All methods raise `ValueError` or what HDF5 raises; `open_sample` turns it into one line."""

    def __init__(self, file: Any) -> None:
        if len(file) > _MAX_ARRAYS:
            raise ValueError(f"it holds {len(file):,} arrays, expected at most {_MAX_ARRAYS}")
        self._file = file
        self._names = list(file)

    def dtype(self, tile: TileCard) -> np.dtype[Any]:
        """Of the pixels of a tile. Raises `ValueError` where it is none of those that the tile may have."""
        found: set[np.dtype[Any]] = {self._array(self._find(key)[0]).dtype for key in tile.keys}
        if len(found) > 1 or not all(str(dtype) in tile.dtypes for dtype in found):
            raise ValueError(
                f"its bands have dtype {', '.join(sorted(map(str, found)))}, expected all {' or '.join(tile.dtypes)}"
            )
        return found.pop()

    def pixels(self, tile: TileCard, dtype: np.dtype[Any]) -> tuple[NDArray[Any], str | None]:
        """`[C, H, W]` of a tile, and the day (ISO 8601) that the names of its arrays say."""
        n = tile.bands_per_key
        pixels = np.empty((len(tile.bands), *tile.shape), dtype)  # [C, H, W]
        dates = set()
        for i, key in enumerate(tile.keys):
            name, date = self._find(key)
            dates.add(date)
            shapes = [(*tile.shape, n)] if n > 1 else [tile.shape, (*tile.shape, 1)]
            band = self._read(name, shapes, dtype).reshape(*tile.shape, n)  # [H, W, n]
            pixels[i * n : (i + 1) * n] = np.moveaxis(band, 2, 0)
        if len(dates) > 1:
            raise ValueError(f"its bands are of different dates: {', '.join(sorted(map(str, dates)))}")
        return pixels, dates.pop()

    def band(self, key: str, shape: tuple[int, int]) -> NDArray[Any]:
        """The array `key`, `[H, W]`, as it is stored."""
        return self._read(self._find(key)[0], [shape, (*shape, 1)]).reshape(shape)

    def label_map(self, card: DatasetCard, shape: tuple[int, int]) -> NDArray[Any]:
        """Class of each pixel, `[H, W]` integers. Nothing but this array is looked at."""
        name, _ = self._find("label")
        classes = self._read(name, [shape])
        if classes.dtype.kind not in "iu":
            raise ValueError(f"array {name!r} has dtype {classes.dtype}, expected integers, the class of each pixel")
        if classes.min() < 0 or classes.max() >= len(card.classes):
            raise ValueError(
                f"array {name!r} holds classes {classes.min()} to {classes.max()}, expected 0 to"
                f" {len(card.classes) - 1}"
            )
        return classes

    def described_label(self, card: DatasetCard) -> Label:
        """The label that the pickle gives: a class, or `[K]` of 0 and 1."""
        description = interpret(self._pickle())
        if not isinstance(description, dict) or "label" not in description:
            raise ValueError("its description has no entry 'label'")
        value = description["label"]
        if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
            value = np.array(value, np.float64)
        elif isinstance(value, Call):
            value = array_of(value)
        if card.kind == "multilabel":
            if not isinstance(value, np.ndarray):
                raise ValueError(f"its label is {type(value).__name__}, expected a vector of {len(card.classes)}")
            return multi_hot(value, len(card.classes))
        if isinstance(value, np.ndarray) and value.shape == () and value.dtype.kind in "iu":
            value = int(value)
        if type(value) is not int or not 0 <= value < len(card.classes):
            found = value if type(value) is int else type(value).__name__
            raise ValueError(f"its label is {found!s:.40}, expected a class from 0 to {len(card.classes) - 1}")
        return value

    def _pickle(self) -> bytes:
        """The bytes whose text is the attribute `pickle`."""
        import h5py

        attributes = self._file.attrs
        if "pickle" not in attributes:
            raise ValueError("it has no attribute 'pickle', which holds its label")
        # Before it is read: many texts may be one in the file, and each takes its place in memory.
        attribute = attributes.get_id("pickle")
        text_type, expected = h5py.check_string_dtype(attribute.dtype), f"text of at most {_MAX_TEXT:,} characters"
        if attribute.shape != () or text_type is None or text_type.length is not None:
            found = f"of dtype {attribute.dtype.kind!r} and shape {attribute.shape}"
            raise ValueError(f"its attribute 'pickle' is {found}, expected {expected} of any length")
        text = attributes["pickle"]
        if len(text) > _MAX_TEXT:
            raise ValueError(f"its attribute 'pickle' has {len(text):,} characters, expected {expected}")
        if text[2:6] != r"\x80" or not _BYTES_LITERAL.fullmatch(text):
            raise ValueError(f"its attribute 'pickle' begins {text[:20]!a}, expected the text of a pickle's bytes")
        data: bytes = ast.literal_eval(text)
        return data

    def _find(self, key: str) -> tuple[str, str | None]:
        """Name and date of the array `key`: that very name, else with a date behind it."""
        if key in self._names:
            return key, None
        dated = [(name, found[1]) for name in self._names if (found := self._date_behind(key, name))]
        if len(dated) != 1:
            problem = f"{len(dated)} arrays" if dated else "no array"
            raise ValueError(
                f"it has {problem} {key!r}, with or without a date (it has {', '.join(self._names)[:400]})"
            )
        return dated[0]

    def _date_behind(self, key: str, name: str) -> re.Match[str] | None:
        return _DATE.fullmatch(name, len(key)) if name.startswith(key) else None

    def _array(self, name: str) -> Any:
        """The array `name`, of numbers that lie in this file as they are."""
        import h5py

        if not isinstance(self._file.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name!r} is a link to somewhere else, which is not followed")
        array = self._file[name]
        if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "biuf":
            raise ValueError(f"{name!r} is no array of numbers")
        if array.external or array.is_virtual or array.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
            raise ValueError(f"array {name!r} is not stored as one piece in this file, as GeoBench stores it")
        return array

    def _read(self, name: str, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
        """The array `name`, of one of `shapes`, and of `dtype` where one is given; its size is checked first."""
        array = self._array(name)
        if array.shape not in shapes or (dtype is not None and array.dtype != dtype):
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"array {name!r} has shape {array.shape} and dtype {array.dtype}, expected {expected}"
                f"{'' if dtype is None else f' and {dtype}'}"
            )
        n_bytes = math.prod(array.shape) * array.dtype.itemsize
        if (stored := array.id.get_storage_size()) != n_bytes:
            raise ValueError(f"array {name!r} has {stored:,} bytes in the file, expected {n_bytes:,}")
        values: NDArray[Any] = array[()]
        return values
