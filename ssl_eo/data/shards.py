"""Tar shards with an index: written atomically, still plain WebDataset tars for everyone else.

`ShardWriter` writes `x.tar` and then its sidecar `x.index.npz`. `ShardIndex` is that sidecar; it can also be built by
scanning any WebDataset tar. The format is described in `docs/data.md`; `ssl_eo.data.shard_reader` reads it.

N samples of a shard, S member suffixes (what follows the first dot of a member's name).
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO
from zipfile import ZIP_STORED, ZipFile

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.regular import check_regular
from ssl_eo.data.tar import BLOCK, ShardError, scan, tar_end, tar_header
from ssl_eo.files import atomic_file

__all__ = ["INDEX_FORMAT", "ShardError", "ShardIndex", "ShardWriter", "index_path"]

INDEX_FORMAT = 1

_MEMBER_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)")  # key, suffix: as WebDataset splits

_Rows = dict[str, dict[str, tuple[int, int, int]]]  # key -> suffix -> offset, size, crc32


def index_path(shard: str | Path) -> Path:
    """Where the index of a shard is: `x.tar` -> `x.index.npz`."""
    return Path(shard).with_suffix(".index.npz")


# --- index ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardIndex:
    """Where each member of a shard is. The name of member (n, s) is `keys[n] + "." + suffixes[s]`."""

    tar_size: int  # bytes
    keys: NDArray[np.bytes_]  # [N], UTF-8
    suffixes: NDArray[np.bytes_]  # [S], UTF-8
    offset: NDArray[np.int64]  # [N, S], first byte of the data; -1: this sample has no such member
    size: NDArray[np.int64]  # [N, S], bytes
    crc32: NDArray[np.uint32]  # [N, S], of the data

    def __len__(self) -> int:
        return len(self.keys)

    def member_name(self, row: int, column: int) -> str:
        """Full name of a member."""
        return f"{self.keys[row].decode()}.{self.suffixes[column].decode()}"

    def save(self, path: Path) -> None:
        """Write atomically as an `.npz` of plain arrays."""
        with atomic_file(path) as file:
            np.savez(
                file,
                allow_pickle=False,
                format=np.int64(INDEX_FORMAT),
                tar_size=np.int64(self.tar_size),
                keys=self.keys,
                suffixes=self.suffixes,
                offset=self.offset,
                size=self.size,
                crc32=self.crc32,
            )

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Read a saved index. Raises `ValueError` when there is none or it is not one."""
        try:
            check_regular(path)
            with path.open("rb") as file:
                with ZipFile(file) as members:
                    if any(member.compress_type != ZIP_STORED for member in members.infolist()):
                        raise ValueError("its arrays are compressed")  # a few bytes could become any number
                file.seek(0)
                with np.load(file, allow_pickle=False) as arrays:
                    found = int(arrays["format"])
                    content = {f.name: arrays[f.name] for f in fields(cls)}
        except FileNotFoundError:
            raise ValueError(f"{path}: no such index; make it with 'ssl-eo data index'") from None
        except Exception as error:  # a damaged zip or npz fails in many ways
            raise ValueError(f"{path}: not a shard index ({error}); make it with 'ssl-eo data index'") from None
        if found != INDEX_FORMAT:
            raise ValueError(f"{path}: index format {found}, this version reads {INDEX_FORMAT}; index the shard again")
        index = cls(**{**content, "tar_size": int(content["tar_size"])})
        index._check(path)
        return index

    def _check(self, path: Path) -> None:
        """Nothing that is read through this index may lie outside the tar."""
        shape = (len(self.keys), len(self.suffixes))
        kinds = "".join(a.dtype.kind for a in (self.keys, self.suffixes, self.offset, self.size, self.crc32))
        if kinds != "SSiiu" or not (self.offset.shape == self.size.shape == self.crc32.shape == shape):
            raise ValueError(f"{path}: its arrays do not fit together; make it again with 'ssl-eo data index'")
        absent = (self.offset == -1) & (self.size == 0)
        inside = (self.offset >= BLOCK) & (self.offset % BLOCK == 0) & (self.offset <= self.tar_size)
        inside &= (self.size >= 0) & (self.size <= self.tar_size - self.offset)
        if not (absent | inside).all():
            row, column = np.argwhere(~(absent | inside))[0]
            reason = f"the index gives {self.size[row, column]} bytes there, in a tar of {self.tar_size}"
            raise ShardError(path, self.member_name(row, column), int(self.offset[row, column]), reason)

    @classmethod
    def build(cls, shard: str | Path) -> ShardIndex:
        """Index any WebDataset tar by reading it once.

        As WebDataset does, consecutive members with one key make one sample, and directories, names without a suffix
        and names of the form `__x__` are passed over. Raises `ShardError` for a truncated or damaged tar, a link or
        device, a name that is absolute or climbs with `..`, and a key or member that comes twice.
        """
        rows: _Rows = {}
        last_key = None
        check_regular(Path(shard))
        with Path(shard).open("rb") as file:
            tar_size = os.fstat(file.fileno()).st_size
            if tar_size == 0:
                raise ShardError(shard, "", 0, "the file is empty")
            with mmap(file.fileno(), 0, access=ACCESS_READ) as data, memoryview(data) as view:
                for name, offset, size in scan(shard, view):
                    match = _MEMBER_NAME.fullmatch(name)
                    if match is None or (name.startswith("__") and name.endswith("__")):
                        continue
                    key, suffix = match.groups()
                    if key != last_key and key in rows:
                        raise ShardError(shard, name, offset, "members of one sample must follow each other")
                    last_key = key
                    members = rows.setdefault(key, {})
                    if suffix in members:
                        raise ShardError(shard, name, offset, "this member comes twice")
                    members[suffix] = offset, size, zlib.crc32(view[offset : offset + size])
        return cls._from_rows(tar_size, rows)

    @classmethod
    def _from_rows(cls, tar_size: int, rows: _Rows) -> ShardIndex:
        suffixes = list(dict.fromkeys(suffix for members in rows.values() for suffix in members))
        absent = (-1, 0, 0)
        table = np.array([[members.get(s, absent) for s in suffixes] for members in rows.values()], np.int64)
        table = table.reshape(len(rows), len(suffixes), 3)
        return cls(
            tar_size=tar_size,
            keys=np.array([key.encode() for key in rows], np.bytes_),
            suffixes=np.array([suffix.encode() for suffix in suffixes], np.bytes_),
            offset=np.ascontiguousarray(table[..., 0]),
            size=np.ascontiguousarray(table[..., 1]),
            crc32=table[..., 2].astype(np.uint32),
        )


# --- writing ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Appends samples to a tar. The bytes depend on nothing but what is added.

    ```
    with ShardWriter.create(Path("shard-000000.tar")) as shard:
        shard.add("tile_7", {"optical.npy": encode_array(pixels), "json": encode_meta(...)})
    ```
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._rows: _Rows = {}
        self._position = 0
        self._hash = hashlib.sha256()

    @classmethod
    @contextmanager
    def create(cls, path: Path) -> Iterator[ShardWriter]:
        """Write the shard `path`, then its index. Neither appears before it is complete, nor after an exception."""
        with atomic_file(path) as file:
            writer = cls(file)
            yield writer
            writer._write(tar_end(writer._position))
        writer.index.save(index_path(path))

    @property
    def index(self) -> ShardIndex:
        """Index of what was written; complete after the `with` block."""
        return ShardIndex._from_rows(self._position, self._rows)

    @property
    def sha256(self) -> str:
        """Checksum of the tar; complete after the `with` block."""
        return self._hash.hexdigest()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append the members `<key>.<suffix>` of one sample. `key` holds no dot and no slash (see `escape_key`).

        Raises `ValueError`, before anything is written, for a name that cannot be stored or a key that comes twice.
        """
        if not key or "." in key or "/" in key:
            raise ValueError(f"key {key!r} is empty or holds a dot or slash; use escape_key")
        if key in self._rows:
            raise ValueError(f"key {key!r} comes twice in one shard")
        headers = [tar_header(f"{key}.{suffix}", len(data)) for suffix, data in members.items()]
        row = self._rows[key] = {}
        for header, (suffix, data) in zip(headers, members.items(), strict=True):
            self._write(header)
            row[suffix] = self._position, len(data), zlib.crc32(data)
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._position += len(data)
