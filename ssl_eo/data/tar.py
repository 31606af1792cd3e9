"""Tar as shards use it: headers written the same way every time, and read with every byte accounted for.

The standard library's reader takes a damaged header for the end of the archive and reads on past a truncated member;
for a file that we read by offset for weeks, both must be errors.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["BLOCK", "ShardError", "scan", "tar_end", "tar_header"]

BLOCK = 512  # bytes; headers and data of a tar start at multiples of it

_RECORD = 20 * BLOCK  # a tar ends at a multiple of this, as tar itself pads
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_EXTENDED = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_MAX_EXTENDED_HEADER = 1 << 20  # bytes; real ones are a few hundred


class ShardError(ValueError):
    """Something is wrong inside a shard, at byte `offset`, in (or after) the member named."""

    def __init__(self, shard: str | Path, member: str, offset: int, reason: str) -> None:
        super().__init__(str(shard), member, offset, reason)  # kept in `args`, so that it can be pickled
        self.shard, self.member, self.offset, self.reason = str(shard), member, offset, reason

    def __str__(self) -> str:
        return f"{self.shard}, member {self.member!r}, byte {self.offset}: {self.reason}"


def tar_header(name: str, size: int) -> bytes:
    """The ustar header of a regular file of `size` bytes: owner 0, time 0, mode 0644. `ValueError` for a bad name."""
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except ValueError as error:  # also UnicodeEncodeError
        raise ValueError(f"member name {name!r} ({len(name)} characters): {error}; allowed are 100 of ASCII") from None


def tar_end(position: int) -> bytes:
    """What ends a tar whose members end at byte `position`: two blocks of zeros, then zeros up to a whole record."""
    return bytes(2 * BLOCK + -(position + 2 * BLOCK) % _RECORD)


def scan(shard: str | Path, view: memoryview) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, size) of each regular member of the tar in `view`; directories are passed over.

    Raises `ShardError` for whatever is not as it should be.
    """
    position, last, extended = 0, "", dict[str, str]()
    while True:
        block = bytes(view[position : position + BLOCK])
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if _ends_at(view, position):
                return
            reason = "the tar is truncated after it" if len(block) < BLOCK else f"no tar header follows it ({error})"
            raise ShardError(shard, last, position, reason) from None
        name, size = extended.pop("path", header.name), int(extended.pop("size", header.size))
        offset = position + BLOCK
        position = offset + -(-size // BLOCK) * BLOCK
        if size < 0 or position > len(view):
            raise ShardError(shard, name, offset, f"truncated: {size} bytes of data, {len(view) - offset} in the file")
        if header.type in _EXTENDED and size <= _MAX_EXTENDED_HEADER:
            extended |= _extended_header(shard, name, offset, header.type, bytes(view[offset : offset + size]))
        elif header.type in _REGULAR:
            _check_name(shard, name, offset)
            yield name, offset, size
        elif header.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
            reason = f"entry of type {header.type!r}: shards hold regular files, no links and no devices"
            raise ShardError(shard, name, offset, reason)
        last = name


def _ends_at(view: memoryview, position: int) -> bool:
    """Two blocks of zeros at least, and nothing but zeros after them."""
    rest = view[position:]
    return len(rest) >= 2 * BLOCK and not np.frombuffer(rest, np.uint8).any()


def _check_name(shard: str | Path, name: str, offset: int) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        raise ShardError(shard, name, offset, "absolute names and names with '..' are refused")
    if not name.isprintable():  # also what is not UTF-8, which decodes to lone surrogates
        raise ShardError(shard, name, offset, "the name is not printable UTF-8")


def _extended_header(shard: str | Path, name: str, offset: int, kind: bytes, data: bytes) -> dict[str, str]:
    """What a pax or GNU long-name header says of the member after it: its `path`, and `size` perhaps."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found = {}
    try:
        while data:  # records of the form b"<length of the record> <keyword>=<value>\n"
            length = int(data[: data.index(b" ")])
            record, data = data[:length], data[length:]
            keyword, value = record[record.index(b" ") + 1 : -1].decode().split("=", 1)
            if len(record) != length or not record.endswith(b"\n") or keyword.startswith("GNU.sparse"):
                raise ValueError
            if keyword == "path" or (keyword == "size" and int(value) >= 0):
                found[keyword] = value
    except ValueError:
        raise ShardError(shard, name, offset, "its extended header cannot be read") from None
    return found
