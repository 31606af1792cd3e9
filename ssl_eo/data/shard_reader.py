"""Members of a shard by row and suffix, in any order, from wherever the bytes of the shard are.

N samples of a shard, S member suffixes, as in `ssl_eo.data.shards`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from numpy.typing import NDArray

from ssl_eo.components import suggest
from ssl_eo.data.members import NpyHeader, decompress, view_npy
from ssl_eo.data.regular import check_regular
from ssl_eo.data.shards import ShardIndex, index_path
from ssl_eo.data.tar import ShardError

__all__ = ["LocalShard", "ShardReader", "Storage"]


class Storage(Protocol):
    """The bytes of one shard. It may be pickled, and forked while open: neither way shares a file position."""

    @property
    def name(self) -> str:
        """What messages call the shard: path or URL."""
        ...

    def open(self) -> ShardIndex:
        """Make it readable; the index of its members."""
        ...

    def read(self, row: int, offset: int, size: int) -> tuple[bytes | mmap, int]:
        """A buffer that holds the bytes [offset, offset + size), which belong to sample `row`, and where they start.

        The buffer may be shorter when the shard is.
        """
        ...

    def renew(self, row: int) -> bool:
        """Whether reading sample `row` again may give other bytes than those read before, which were damaged."""
        ...

    def close(self) -> None: ...


class LocalShard:
    """A shard on disk, mapped (`mmap`) or read (`pread`). A mapped file must not be truncated while it is in use."""

    def __init__(
        self, path: str | Path, index: ShardIndex | None = None, access: Literal["mmap", "pread"] = "mmap"
    ) -> None:
        self.path = Path(path)
        self._given_index = index
        self._access = access
        self._map: mmap | None = None
        self._file: IO[bytes] | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    def open(self) -> ShardIndex:
        index = ShardIndex.load(index_path(self.path)) if self._given_index is None else self._given_index
        check_regular(self.path)
        file = self.path.open("rb")
        found = os.fstat(file.fileno()).st_size
        if found != index.tar_size:
            file.close()
            raise ValueError(
                f"{self.path}: {found} bytes, its index is of a tar of {index.tar_size}:"
                " the tar was truncated or replaced; restore it, or make its index with 'ssl-eo data index'"
            )
        if self._access == "mmap":
            with file:
                self._map = mmap(file.fileno(), 0, access=ACCESS_READ)
        else:
            self._file = file
        return index

    def read(self, row: int, offset: int, size: int) -> tuple[bytes | mmap, int]:
        if self._map is not None:
            return self._map, offset
        assert self._file is not None
        return os.pread(self._file.fileno(), size, offset), 0

    def renew(self, row: int) -> bool:
        return False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._map = self._file = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None, "_file": None}


class ShardReader:
    """Members of one shard by row and suffix, in any order.

    Opened on first use. What it returns are read-only views of a mapped file (or of the bytes read): copy before
    writing. They stay valid after the reader is gone. It may be pickled, and forked while open.

    `verify` checks each member's CRC-32 as it is read. Errors are `ShardError`s.
    """

    def __init__(self, storage: Storage | str | Path, *, verify: bool = False) -> None:
        self.storage = storage if not isinstance(storage, (str, Path)) else LocalShard(storage)
        self._verify = verify
        self._index: ShardIndex | None = None
        self._columns: dict[str, int] = {}
        self._headers: dict[str, NpyHeader] = {}

    def close(self) -> None:
        """Close what is open; reading opens it again. Views of a mapped file keep the mapping to themselves."""
        self._index = None
        self.storage.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None, "_columns": {}, "_headers": {}}

    @property
    def index(self) -> ShardIndex:
        """The shard's index; opens the shard and checks that it has the size the index was made for."""
        if self._index is None:
            self._index = self.storage.open()
            self._columns = {suffix.decode(): i for i, suffix in enumerate(self._index.suffixes)}
        return self._index

    def __len__(self) -> int:
        return len(self.index)

    def key(self, row: int) -> str:
        """Key of a sample as the tar has it."""
        return str(self.index.keys[row].decode())

    def has(self, row: int, suffix: str) -> bool:
        """Whether sample `row` has the member `suffix`."""
        index = self.index
        column = self._columns.get(suffix)
        return column is not None and bool(index.offset[row, column] >= 0)

    def read(self, row: int, suffix: str) -> bytes:
        """The bytes of one member."""
        buffer, offset, size = self._locate(row, suffix)
        return buffer[offset : offset + size]

    def array(self, row: int, suffix: str) -> NDArray[Any]:
        """The array of one `.npy` or `.npy.blosc` member, read-only."""
        return self.arrays(row, (suffix,))[0]

    def arrays(self, row: int, suffixes: Sequence[str]) -> list[NDArray[Any]]:
        """The arrays of several `.npy` or `.npy.blosc` members of one sample, read-only."""
        arrays = []
        for suffix in suffixes:
            buffer, offset, size = self._locate(row, suffix)
            try:
                if suffix.endswith(".blosc"):
                    buffer = decompress(buffer[offset : offset + size])
                    offset, size = 0, len(buffer)
                array, self._headers[suffix] = view_npy(buffer, offset, size, self._headers.get(suffix))
            except ValueError as error:
                raise self._error(row, suffix, str(error)) from None
            arrays.append(array)
        return arrays

    def _locate(self, row: int, suffix: str) -> tuple[bytes | mmap, int, int]:
        """A buffer that holds the member, the offset in it, and the size."""
        index = self.index
        column = self._columns.get(suffix)
        if column is None:
            name, known = self.storage.name, list(self._columns)
            raise ValueError(f"{name}: no member ends in {suffix!r}{suggest(suffix, known)} (there are {known})")
        while True:
            offset, size = index.offset.item(row, column), index.size.item(row, column)
            if offset < 0:
                raise ValueError(f"{self.storage.name}: sample {self.key(row)!r} has no member {suffix!r}")
            buffer, start = self.storage.read(row, offset, size)
            if len(buffer) - start < size:
                raise self._error(row, suffix, f"the file ends after {len(buffer) - start} of {size} bytes")
            if not self._verify or zlib.crc32(memoryview(buffer)[start : start + size]) == index.crc32[row, column]:
                return buffer, start, size
            if not self.storage.renew(row):
                raise self._error(row, suffix, f"the CRC-32 of its {size} bytes is not the one in the index")
            self._index = None  # which may be what was damaged
            index = self.index

    def _error(self, row: int, suffix: str, reason: str) -> ShardError:
        offset = self.index.offset.item(row, self._columns[suffix])
        return ShardError(self.storage.name, f"{self.key(row)}.{suffix}", offset, reason)
