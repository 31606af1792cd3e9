"""Single rows of the arrays of one HDF5 file, read past HDF5's filters where the file allows it.

HDF5 inflates one chunk at a time, under a lock of which a process has one. Where a chunk is exactly one row, plain or
deflated, its bytes are fetched as they lie in the file and inflated here, without that lock: by ISA-L where the package
`isal` is installed, else by zlib. Arrays that are contiguous, in other chunks or filtered otherwise are read through
HDF5.

N rows, C bands, H W pixels.
"""

from __future__ import annotations

import importlib
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import one_line, suggest
from ssl_eo.data.regular import check_regular
from ssl_eo.data.sources._side_files import writable

__all__ = ["HDF5Rows"]

_Codec = tuple[Callable[[], Any], type[Exception]]  # a decompressor like zlib's, and the error that it raises
_ZLIB: _Codec = (zlib.decompressobj, zlib.error)
_DEFLATE = 1  # HDF5's number of the filter
_MAX_ROW_BYTES = 256 << 20  # inflated; those of MMEarth have up to half a megabyte
_MAX_INFLATION = 2048  # of an array to what holds it: deflate makes at most 1,032 bytes of one
_SMALL_BYTES = 16 << 20  # of an array that may be of one value, which some filters store as next to nothing
_MAX_NAMED = 400  # characters of a list of names


@dataclass
class _Array:
    """An open dataset `[N, C, H, W]` or `[N, H, W]`, and how its rows are stored."""

    dataset: Any
    shape: tuple[int, ...]  # of a row
    dtype: np.dtype[Any]
    n_bytes: int  # of a row
    is_direct: bool  # a chunk is a row, deflated or plain
    is_deflated: bool

    @classmethod
    def of(cls, dataset: Any) -> _Array:
        pipeline = dataset.id.get_create_plist()
        filters = [pipeline.get_filter(i)[0] for i in range(pipeline.get_nfilters())]
        is_deflated = filters == [_DEFLATE]
        is_direct = dataset.chunks == (1, *dataset.shape[1:]) and (is_deflated or not filters)
        shape, dtype = dataset.shape[1:], dataset.dtype
        return cls(dataset, shape, dtype, dtype.itemsize * math.prod(shape), is_direct, is_deflated)


class HDF5Rows:
    """The file `path`. It is opened on first use in every process, and travels to other processes closed."""

    def __init__(self, path: Path, allow_direct: bool = True, cache_bytes: int = 16 << 20) -> None:
        """With `allow_direct` False every row is read through HDF5, as for a comparison.

        `cache_bytes` are for HDF5's chunks, for each array whose chunks hold several rows.
        """
        self.path = path
        self._allow_direct = allow_direct
        self._cache_bytes = cache_bytes
        self._handle: Any = None
        self._arrays: dict[str, _Array] = {}
        self._pid = 0
        self._codec = _ZLIB  # until the file is opened

    def open(self) -> Any:
        """This process's handle. HDF5 keeps state behind a handle, which must not be used on both sides of a fork."""
        if self._pid != os.getpid():
            self._handle, self._arrays, self._pid = None, {}, os.getpid()
        if self._handle is None:
            import h5py

            check_regular(self.path)
            self._handle = h5py.File(self.path, "r", rdcc_nbytes=self._cache_bytes)
            self._codec = _fastest_codec()
        return self._handle

    def close(self) -> None:
        self._arrays = {}
        if self._handle is not None and self._pid == os.getpid():
            self._handle.close()
        self._handle = None

    def dataset(self, name: str) -> Any:
        """The dataset `name`; raises `ValueError` that lists those there are."""
        import h5py

        found = self.open().get(name)
        if not isinstance(found, h5py.Dataset):
            known: list[str] = []
            self.open().visititems(lambda n, item: known.append(n) if isinstance(item, h5py.Dataset) else None)
            held = writable(", ".join(known)[:_MAX_NAMED])
            raise ValueError(f"{self.path} has no array {name!r}{suggest(name, known)} (it has {held})")
        if not found.shape:
            raise ValueError(f"{self.path}: {name} holds one value, expected an array with a row for each sample")
        if found.file.filename != self.open().filename or found.external or found.is_virtual:
            raise ValueError(f"{self.path} has {name} in another file, which is not followed; copy the array into it")
        n_bytes = found.dtype.itemsize * math.prod(found.shape[1:])
        if n_bytes > _MAX_ROW_BYTES:
            raise ValueError(
                f"{self.path}: rows of {name} have shape {found.shape[1:]}, {n_bytes:,} bytes; expected at most"
                f" {_MAX_ROW_BYTES:,}"
            )
        # Rows that were never written take no place in the file, and whatever is kept of each takes some in memory. To
        # add up the chunks of tiles takes long; columns, which are read as wholes, have few.
        stored = self.path.stat().st_size if found.ndim > 2 else found.id.get_storage_size()
        n_bytes *= len(found)
        if n_bytes > max(_SMALL_BYTES, _MAX_INFLATION * stored):
            raise ValueError(
                f"{self.path}: {name} says that it has {len(found):,} rows, {n_bytes:,} bytes, which {stored:,} bytes"
                " on disk cannot hold: most were never written; store only those that were"
            )
        return found

    def rows_per_chunk(self, name: str) -> int:
        """Rows of the array `name` that are inflated together; 1 where it is not chunked."""
        chunks = self.dataset(name).chunks
        return int(chunks[0]) if chunks else 1

    def is_direct(self, name: str) -> bool:
        """Whether rows of the array `name` are read past HDF5's filters."""
        return self._array(name).is_direct

    def read(self, name: str, row: int) -> NDArray[Any]:
        """Row `row` of the array `name`, `[C, H, W]` or `[H, W]` in the stored dtype, perhaps read-only.

        Raises `OSError` that names file, array and row when it cannot be read or inflated.
        """
        array = self._array(name)
        decompressor, inflate_error = self._codec
        try:
            if not array.is_direct:
                pixels: NDArray[Any] = array.dataset[row]
                return pixels
            skipped, data = array.dataset.id.read_direct_chunk((row, *[0] * len(array.shape)))
            if array.is_deflated and not skipped & 1:
                stream = decompressor()
                data = stream.decompress(data, array.n_bytes + 1)  # no more, whatever the chunk would swell to
                if not stream.eof and len(data) <= array.n_bytes:
                    raise OSError(f"its chunk is truncated after {len(data)} bytes")
            if len(data) != array.n_bytes:
                found = f"more than {array.n_bytes}" if len(data) > array.n_bytes else len(data)
                raise OSError(f"{found} bytes, expected {array.n_bytes}")
        except (OSError, RuntimeError, MemoryError, inflate_error) as error:  # no memory: a chunk that is not there
            reason = one_line(error) or "its chunk is missing"
            raise OSError(f"{self.path}: row {row} of {name} cannot be read: {reason}") from None
        return np.frombuffer(data, array.dtype).reshape(array.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_arrays": {}, "_codec": _ZLIB}

    def _array(self, name: str) -> _Array:
        self.open()  # forgets the arrays of another process
        if name not in self._arrays:
            array = _Array.of(self.dataset(name))
            array.is_direct &= self._allow_direct
            self._arrays[name] = array
        return self._arrays[name]


def _fastest_codec() -> _Codec:
    try:
        module = importlib.import_module("isal.isal_zlib")
    except ImportError:
        return _ZLIB
    return module.decompressobj, module.error
