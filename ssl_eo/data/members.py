"""What one sample looks like inside a shard: the names and the bytes of its members.

A sample is `<key>.<tile name>.npy` for each tile (`.npy.blosc` when compressed), `<key>.label.npy` when its label is
an array, and `<key>.json` with everything else. WebDataset splits a member's name at the first dot and lowers the case
of what follows; the rules for keys and tile names exist so that it finds the same samples as we do.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import import_extra, suggest
from ssl_eo.data.schema import is_gsd_m

__all__ = [
    "CODECS",
    "LABEL_MEMBER",
    "META_MEMBER",
    "Constants",
    "NpyHeader",
    "check_tile_names",
    "decode_meta",
    "decompress",
    "drop_constant_bands",
    "encode_array",
    "encode_meta",
    "escape_key",
    "read_npy_header",
    "restore_constant_bands",
    "tile_member",
    "unescape_key",
    "view_npy",
]

CODECS = {"raw": ".npy", "blosc": ".npy.blosc"}  # codec -> what follows the tile name
LABEL_MEMBER = "label.npy"
META_MEMBER = "json"

_KEY_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=+@")
_MAX_VALUES = 1 << 28  # of a tile that is mostly constant
_TILE_NAME = re.compile(r"[A-Za-z0-9_@+-]+")
_MAX_NPY_HEADER = 10_240  # bytes; NumPy itself refuses longer ones
_BLOSC_HEADER = struct.Struct("<4B3I")  # version, codec version, flags, itemsize, raw, block and compressed bytes


def escape_key(key: str) -> str:
    """`key` with every UTF-8 byte outside `A-Z a-z 0-9 - _ = + @` written as `%XX`; `unescape_key` reverses it."""
    if not key:
        raise ValueError("a sample's key is empty")
    return "".join(chr(b) if b in _KEY_BYTES else f"%{b:02X}" for b in key.encode())


def unescape_key(escaped: str) -> str:
    """The key that `escape_key` was given."""
    return unquote(escaped)


def check_tile_names(names: Iterable[str]) -> None:
    """Raise `ValueError` for a tile name that readers of tar shards could not find again."""
    seen: dict[str, str] = {"label": "label"}
    for name in names:
        if not _TILE_NAME.fullmatch(name):
            raise ValueError(
                f"tile name {name!r}: allowed in shards are letters, digits and _ @ + - (no dot, no slash)"
            )
        if (other := seen.setdefault(name.lower(), name)) != name or name == "label":
            why = "'label' is reserved" if other == "label" else f"differs from {other!r} in case alone"
            raise ValueError(f"tile name {name!r} cannot be stored in shards: {why}; rename the tile")


def tile_member(tile: str, codec: str) -> str:
    """The part of a tile's member name after the key, e.g. `"optical.npy"`."""
    if codec not in CODECS:
        allowed = list(CODECS)
        raise ValueError(f"codec of tile {tile}: no codec {codec!r}{suggest(codec, allowed)} (allowed: {allowed})")
    return tile + CODECS[codec]


# --- arrays -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpyHeader:
    """A parsed NPY header and its bytes. Members with these very bytes need no parsing again."""

    raw: bytes
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    file_size: int  # header and data


def encode_array(array: NDArray[Any], codec: str = "raw") -> bytes:
    """The bytes of `array` as an NPY file in C order, compressed as `codec` says.

    `blosc` compresses the whole NPY file (Blosc 1 container, bitshuffle of the array's item size, LZ4, level 5), so
    any Blosc decompressor gives back a `.npy` file.
    """
    if array.dtype.hasobject:
        raise ValueError(f"arrays of Python objects cannot be stored (dtype {array.dtype})")
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    npy = stream.getvalue()
    if codec == "raw":
        return npy
    blosc = _blosc()
    itemsize = array.itemsize if array.itemsize in (1, 2, 4, 8) else 1
    return bytes(blosc.compress(npy, b"lz4", 5, shuffle=blosc.BITSHUFFLE, typesize=itemsize))


def decompress(data: bytes | memoryview) -> bytes:
    """The NPY file inside a `blosc` member. Raises `ValueError` when it is damaged."""
    if len(data) < _BLOSC_HEADER.size:
        raise ValueError(f"{len(data)} bytes are too few for a Blosc buffer")
    *_, n_raw, _, n_compressed = _BLOSC_HEADER.unpack_from(data)
    if n_compressed != len(data):
        raise ValueError(f"its Blosc header promises {n_compressed} bytes, the member has {len(data)}")
    if n_raw > 256 * n_compressed:  # LZ4 cannot expand that far: a damaged count must not allocate gigabytes
        raise ValueError(f"its Blosc header promises {n_raw} bytes out of {n_compressed}")
    try:
        return bytes(_blosc().decompress(data))
    except RuntimeError as error:
        raise ValueError(f"Blosc cannot decompress it: {error}") from None


def read_npy_header(head: bytes, member_size: int) -> NpyHeader:
    """Parse the first bytes of an NPY member of `member_size` bytes; `ValueError` if they do not describe it."""
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"NPY version {version}, allowed are 1.0 and 2.0")
    except Exception as error:  # the text of a damaged header goes through Python's parser: many types of error
        raise ValueError(f"not a valid NPY header: {error}") from None
    if dtype.hasobject:
        raise ValueError(f"NPY of Python objects (dtype {dtype}) is never loaded")
    file_size = stream.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or file_size != member_size:
        raise ValueError(f"NPY header promises {dtype} {shape}, {file_size} bytes; the member has {member_size}")
    return NpyHeader(head[: stream.tell()], dtype, shape, "F" if is_fortran else "C", file_size)


def view_npy(
    buffer: bytes | mmap, offset: int, size: int, expected: NpyHeader | None = None
) -> tuple[NDArray[Any], NpyHeader]:
    """The array of the NPY file at `buffer[offset:offset + size]`, a read-only view, and its header.

    `expected`, a header met before, spares the parsing when the bytes are the same.
    """
    header = expected
    if header is None or size != header.file_size or buffer[offset : offset + len(header.raw)] != header.raw:
        header = read_npy_header(bytes(buffer[offset : offset + min(size, _MAX_NPY_HEADER)]), size)
    start = offset + len(header.raw)
    return np.ndarray(header.shape, header.dtype, buffer, start, order=header.order), header


# --- constant bands ---------------------------------------------------------------------------------------------------

# By position of the band, the bytes of its one value (hexadecimal, as in the NPY file): exact for every dtype.
Constants = dict[int, str]


def drop_constant_bands(pixels: NDArray[Any]) -> tuple[NDArray[Any], Constants]:
    """`pixels [C, H, W]` without the bands of which all pixels hold the same bits, and those bands' values."""
    little = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
    bits = little.view(f"V{little.itemsize}") if little.itemsize > 8 else little.view(f"u{little.itemsize}")
    flat = bits.reshape(len(pixels), -1)  # [C, H*W]
    constant = [i for i, band in enumerate(flat) if band[0] == band[-1] and (band == band[0]).all()]
    if not constant:
        return pixels, {}
    return np.delete(pixels, constant, axis=0), {i: flat[i, 0].tobytes().hex() for i in constant}


def restore_constant_bands(
    pixels: NDArray[Any], constants: Constants, n_bands: int, size: tuple[int, int] | None
) -> NDArray[Any]:
    """What `drop_constant_bands` was given, read-only: `[n_bands, H, W]`, of the `size` (H, W), None for any.

    Raises `ValueError` for anything else: a few bytes could fill memory.
    """
    if size is not None and pixels.shape[1:] != size:
        raise ValueError(f"array of shape {pixels.shape}, expected {size} pixels a band")
    if n_bands * math.prod(pixels.shape[1:]) > _MAX_VALUES:
        raise ValueError(f"{n_bands} bands of {pixels.shape[1:]} pixels are more than {_MAX_VALUES} values")
    if pixels.ndim != 3 or len(pixels) + len(constants) != n_bands:
        found = f"{len(constants)} constant bands beside an array of shape {pixels.shape}"
        raise ValueError(f"{found}, expected {n_bands} in all")
    dtype = pixels.dtype.newbyteorder("<")
    if max(constants) >= n_bands or any(len(value) != 2 * dtype.itemsize for value in constants.values()):
        raise ValueError(f"constant bands {constants} do not fit {len(pixels)} stored bands of {pixels.dtype}")
    full = np.empty((n_bands, *pixels.shape[1:]), pixels.dtype)
    full[[i for i in range(n_bands) if i not in constants]] = pixels
    for i, value in constants.items():
        full[i] = np.frombuffer(bytes.fromhex(value), dtype)[0]
    full.flags.writeable = False
    return full


# --- label and meta ---------------------------------------------------------------------------------------------------


def encode_meta(
    label: Any,
    meta: Mapping[str, Any],
    gsd_m: Mapping[str, float],
    date: Mapping[str, str] | None = None,
    constant: Mapping[str, Constants] | None = None,
) -> bytes:
    """The `.json` member. `gsd_m` holds the tiles whose ground sampling differs from the schema's, `date` dated tiles,
    `constant` the bands of tiles that were dropped.

    Tuples and arrays in `meta` become lists, NumPy scalars plain numbers; non-finite numbers are written as `NaN`,
    `Infinity` and `-Infinity`. Raises `ValueError` for what JSON cannot hold.
    """
    content: dict[str, Any] = {"label": label, "meta": dict(meta)}
    if gsd_m:
        content["gsd_m"] = dict(gsd_m)
    if date:
        content["date"] = dict(date)
    if constant:
        content["constant"] = {name: {str(i): v for i, v in found.items()} for name, found in constant.items()}
    try:
        return json.dumps(content, default=_plain, ensure_ascii=False, separators=(",", ":")).encode()
    except TypeError as error:
        raise ValueError(f"label or meta cannot be stored as JSON: {error}") from None


def decode_meta(data: bytes | memoryview) -> dict[str, Any]:
    """What `encode_meta` wrote: `label`, `meta`, and perhaps `gsd_m`, `date` and `constant`.

    Raises `ValueError` when damaged.
    """
    try:
        content = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("meta"), dict) or "label" not in content:
        raise ValueError("a sample's JSON is one object with the keys 'label' and 'meta'")
    gsd_m = content.get("gsd_m", {})
    if not isinstance(gsd_m, dict) or not all(map(is_gsd_m, gsd_m.values())):
        raise ValueError(
            f"gsd_m in a sample's JSON is an object of metres (above 0, up to 1e6) by tile name, found {gsd_m!r:.80}"
        )
    date = content.get("date", {})
    if not isinstance(date, dict) or not all(isinstance(v, str) for v in date.values()):
        raise ValueError(f"date in a sample's JSON is an object of dates by tile name, found {date!r:.80}")
    if "constant" in content:
        content["constant"] = _constants(content["constant"])
    return content


def _constants(raw: Any) -> dict[str, Constants]:
    try:
        found = {
            name: {int(i): bytes.fromhex(value).hex() for i, value in bands.items()} for name, bands in raw.items()
        }
        if not all(bands and min(bands) >= 0 for bands in found.values()):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"constant in a sample's JSON is an object of values in hexadecimal by band by tile name, found {raw!r:.80}"
        ) from None
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is none of number, text, boolean, list, mapping, None")


def _blosc() -> Any:
    blosc = import_extra("codec", "numcodecs.blosc", "the codec of compressed shards")
    # One thread: loader workers are the parallelism, and with several the order of blocks in a buffer may vary.
    blosc.use_threads = False
    return blosc
