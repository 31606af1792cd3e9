"""Tensors in a file of the safetensors format, written and read with torch alone; nothing is unpickled."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ssl_eo.files import atomic_file, check_regular

__all__ = ["check_fit", "read_tensors", "write_tensors"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 64  # as in torch
_MAX_NUMBER = 1 << 48  # no offset and no product of sizes reaches it: longer numbers take time to multiply


class _Place(NamedTuple):
    """Where a tensor lies in the body of a safetensors file, in bytes, and what it is."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors` in the safetensors format: length, JSON header, raw little-endian values.

    Returns the SHA-256 of the file.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_file(path) as file:  # tensor by tensor: the whole may be as large as half the memory
        for part in chain((struct.pack("<Q", len(text)), text), map(_raw_bytes, tensors.values())):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; every offset, shape and dtype is checked before a tensor is made.

    Raises `ValueError` for a file that is not whole, or not the one of `sha256`.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            head, places = _read_header(path, file)
            body = file.read()  # of the size that the header states, which is that of the file
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    digest = hashlib.sha256(head)
    digest.update(body)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise ValueError(
            f"{path}: its SHA-256 is not that of the JSON file beside it, one of the two was changed; write both again"
        )
    return {name: _tensor(place, memoryview(body)) for name, place in places.items()}


def _read_header(path: Path, file: IO[bytes]) -> tuple[bytes, dict[str, _Place]]:
    """The bytes before the body of an open file, and where its tensors are. They fill the rest of the file."""
    n_bytes = os.fstat(file.fileno()).st_size
    if n_bytes < 8:
        raise ValueError(f"{path}: {n_bytes} bytes are too few for a safetensors file")
    length = file.read(8)
    (n_header,) = struct.unpack("<Q", length)
    if n_header > min(_MAX_HEADER_BYTES, n_bytes - 8):
        raise ValueError(f"{path}: header length {n_header} exceeds the file; truncated, or not a safetensors file")
    text = file.read(n_header)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a JSON object; not a safetensors file")
    header.pop("__metadata__", None)
    places = {name: _place(path, name, entry) for name, entry in header.items()}
    _check_places(path, places, n_bytes - 8 - n_header)
    return length + text, places


def check_fit(where: str | Path, of: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless `found` has the names and shapes of `expected` in floating point, however precise.

    The message begins with `where`, and `of` says what they do not fit.
    """
    shapes = {name: list(value.shape) for name, value in expected.items()}
    there = {name: list(value.shape) if value.is_floating_point() else value.dtype for name, value in found.items()}
    wrong = [name for name in shapes | there if shapes.get(name) != there.get(name)]
    if wrong:
        raise ValueError(
            f"{where}: {len(wrong)} tensors do not fit {of}, the first is {wrong[0]}: expected"
            f" {shapes.get(wrong[0], 'none')}, found {there.get(wrong[0], 'none')}"
        )


def _raw_bytes(tensor: Tensor) -> bytes:
    """The values of `tensor` in memory order, without NumPy, which may be absent and knows no bfloat16."""
    values = tensor.detach().cpu().contiguous().clone()  # a clone owns exactly its values
    return ctypes.string_at(values.data_ptr(), values.numel() * values.element_size())


def _place(path: Path, name: str, entry: Any) -> _Place:
    """What the header says of one tensor; the number of its bytes follows from its shape."""
    try:
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, end)
    except (KeyError, TypeError, ValueError):
        numbers = (None,)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{path}: entry {name!r:.80} of the header lacks a known dtype, a shape or data_offsets")
    if len(shape) > _MAX_DIMENSIONS or max(numbers) >= _MAX_NUMBER:
        raise ValueError(
            f"{path}: tensor {name!r:.80} has more than {_MAX_DIMENSIONS} dimensions, or a size or an offset of"
            f" {_MAX_NUMBER:,} or more"
        )
    strides_fit = math.prod(size or 1 for size in shape) < _MAX_NUMBER
    if not strides_fit or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: tensor {name!r:.80} of shape {shape!s:.80} and {dtype} has {end - start} bytes")
    return _Place(start, end, dtype, tuple(shape))


def _check_places(path: Path, places: Mapping[str, _Place], n_bytes: int) -> None:
    """The tensors fill the body of the file without a gap and without an overlap."""
    expected = 0
    for name, place in sorted(places.items(), key=lambda item: item[1][:2]):
        if place.start != expected:
            raise ValueError(
                f"{path}: tensor {name!r:.80} starts at byte {place.start} of the body, expected {expected}"
            )
        expected = place.end
    if expected != n_bytes:
        raise ValueError(f"{path}: the tensors have {expected} bytes, the body of the file {n_bytes} (truncated?)")


def _tensor(place: _Place, body: memoryview) -> Tensor:
    start, end, dtype, shape = place
    if start == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(body[start:end]), dtype=dtype).reshape(shape)
