"""Encoder bundles: a folder with `encoder.safetensors` and `encoder.json`, written and read with torch alone.

Nothing is unpickled on the way in. `encoder.json` says how to build the encoder, which file of weights it belongs to
(by SHA-256), and what the pixels must look like: sensors with their bands, and the mean and standard deviation that
normalise stored values.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ssl_eo.components import one_line
from ssl_eo.files import atomic_write
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput, Tokens
from ssl_eo.sensors import ChannelMeta, Sensor

__all__ = ["FORMAT", "BundleEncoder", "SensorInput", "load_bundle", "read_tensors", "write_bundle", "write_tensors"]

FORMAT = 1
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


@dataclass(frozen=True)
class SensorInput:
    """What an encoder was trained on: a sensor, which of its bands in which order, and their statistics as stored."""

    sensor: Sensor
    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gsd_m: float

    def __post_init__(self) -> None:
        self.sensor.index(self.bands)
        n = len(self.bands)
        if len(set(self.bands)) != n:
            raise ValueError(f"bands of {self.sensor.name} are named twice: {', '.join(self.bands)}")
        if len(self.mean) != n or len(self.std) != n:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations for {n} bands")
        if not all(map(math.isfinite, self.mean)) or not all(0 < v < math.inf for v in (*self.std, self.gsd_m)):
            raise ValueError("mean must be finite, std and gsd_m positive and finite")


class _Place(NamedTuple):
    """Where a tensor lies in the body of a safetensors file, in bytes, and what it is."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class BundleEncoder(nn.Module):
    """An encoder with the sensors it knows. Call it with stored values and a sensor's name.

    `forward(images, sensor="sentinel2_l2a")` takes `[B, C, H, W]` in stored units, normalises, and returns the CLS
    features `[B, D]`. As in training, pixels that were not measured (NaN, infinite, or a value that the sensor lists as
    no-data) become 0 after normalising, the mean of the band. `forward_features` and `get_intermediate_layers` return
    tokens. With `channels=` (a `ChannelMeta`) instead of `sensor=`, images are taken as normalised already.
    """

    def __init__(self, encoder: Encoder, inputs: Mapping[str, SensorInput], facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.inputs = dict(inputs)
        self.facts = dict(facts)

    def forward(self, images: Tensor, sensor: str | None = None, channels: ChannelMeta | None = None) -> Tensor:
        """CLS features `[B, D]`."""
        return self.forward_features(images, sensor, channels).cls

    def forward_features(
        self, images: Tensor, sensor: str | None = None, channels: ChannelMeta | None = None
    ) -> Tokens:
        """Tokens of the last block after the final norm."""
        tokens: Tokens = self.encoder([self.prepare(images, sensor, channels)])[0]
        return tokens

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        sensor: str | None = None,
        channels: ChannelMeta | None = None,
        norm: bool = True,
    ) -> list[Tokens]:
        """Tokens of the last `n` blocks, or of the blocks `n`."""
        return self.encoder.intermediates(self.prepare(images, sensor, channels), n, norm=norm)

    def prepare(self, images: Tensor, sensor: str | None = None, channels: ChannelMeta | None = None) -> EncoderInput:
        """The encoder's input: normalised pixels and what each channel is. Raises `ValueError` for what is no input."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = f"shape {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise ValueError(f"images must be a tensor [B, C, H, W], got {found}")
        if channels is not None:
            if images.shape[1] != channels.n_channels:
                raise ValueError(f"images have {images.shape[1]} channels, channels= describes {channels.n_channels}")
            return EncoderInput(images.float(), channels, gsd_m=None)
        known = self._input(sensor)
        if images.shape[1] != len(known.bands):
            raise ValueError(
                f"{known.sensor.name}: got {images.shape[1]} channels, expected {len(known.bands)} in this order:"
                f" {', '.join(known.bands)}"
            )
        mean = torch.tensor(known.mean, device=images.device)[:, None, None]
        std = torch.tensor(known.std, device=images.device)[:, None, None]
        meta = known.sensor.channel_meta(known.bands).to(images.device)
        values = images.float()
        pixels = torch.where(known.sensor.is_measured(values), (values - mean) / std, 0.0)  # [B, C, H, W]
        return EncoderInput(pixels, meta, gsd_m=known.gsd_m)

    def _input(self, sensor: str | None) -> SensorInput:
        if sensor is None and len(self.inputs) == 1:
            return next(iter(self.inputs.values()))
        if not self.inputs:
            raise ValueError("this encoder has statistics for no sensor: give normalised images with channels=")
        if sensor not in self.inputs:
            raise ValueError(
                f"sensor {sensor!r}: this encoder has statistics for {', '.join(self.inputs)}; name one of them, or"
                " give normalised images with channels="
            )
        return self.inputs[sensor]


def write_bundle(folder: Path, encoder: Encoder, inputs: Mapping[str, SensorInput], facts: Mapping[str, Any]) -> None:
    """Write the bundle `folder`; `facts` are plain values kept beside the weights.

    Raises `OSError` that names the file which cannot be written; then, as after a kill, what `folder` holds is the old
    bundle, or a mixture that `load_bundle` refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = {
        "format": FORMAT,
        "sha256": write_tensors(folder / "encoder.safetensors", encoder.state_dict()),
        "encoder": asdict(encoder.cfg),
        "n_channels": encoder.n_channels,
        "inputs": {
            name: {**{f.name: getattr(known, f.name) for f in fields(known)}, "sensor": known.sensor.to_dict()}
            for name, known in inputs.items()
        },
        **facts,
    }
    atomic_write(folder / "encoder.json", json.dumps(page, indent=1))


def load_bundle(folder: str | Path) -> BundleEncoder:
    """The encoder of a bundle folder, in eval mode. Raises `ValueError` for anything that is not a whole bundle."""
    folder = Path(folder)
    page = _read_page(folder)
    with _faults_of(folder / "encoder.json"):
        cfg = _dataclass_from(EncoderConfig, page["encoder"])
        n_channels, sha256 = _count_or_none("n_channels", page["n_channels"]), str(page["sha256"])
        inputs = {name: _input_from(name, raw) for name, raw in page["inputs"].items()}
    tensors = read_tensors(folder / "encoder.safetensors", sha256)
    # On the meta device no size that a damaged file may state takes memory; a number of blocks takes time.
    with _faults_of(folder / "encoder.json"), torch.device("meta"):
        if cfg.n_blocks > len(tensors):
            raise ValueError(f"the encoder has {cfg.n_blocks} blocks, too many for a file of {len(tensors)} tensors")
        encoder = Encoder(cfg, n_channels)
    _check_fit(folder, encoder, tensors)
    encoder.to_empty(device="cpu").load_state_dict(tensors)
    facts = {k: v for k, v in page.items() if k not in ("format", "sha256", "encoder", "n_channels", "inputs")}
    return BundleEncoder(encoder, inputs, facts).eval()


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
    data = b"".join((struct.pack("<Q", len(text)), text, *map(_raw_bytes, tensors.values())))
    atomic_write(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; every offset, shape and dtype is checked before a tensor is made.

    Raises `ValueError` for a file that is not whole, or not the one of `sha256`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path}: its SHA-256 is not that of encoder.json, one of the two was changed; export again")
    if len(data) < 8:
        raise ValueError(f"{path}: {len(data)} bytes are too few for a safetensors file")
    (n_header,) = struct.unpack("<Q", data[:8])
    if n_header > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"{path}: header length {n_header} exceeds the file; truncated, or not a safetensors file")
    try:
        header = json.loads(data[8 : 8 + n_header])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a JSON object; not a safetensors file")
    header.pop("__metadata__", None)
    places = {name: _place(path, name, entry) for name, entry in header.items()}
    body = memoryview(data)[8 + n_header :]
    _check_places(path, places, len(body))
    return {name: _tensor(place, body) for name, place in places.items()}


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
        raise ValueError(f"{path}: entry {name!r} of the header lacks a known dtype, a shape or data_offsets")
    strides_fit = math.prod(size or 1 for size in shape) < 1 << 48
    if not strides_fit or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: tensor {name!r} of shape {shape} and {dtype} has {end - start} bytes")
    return _Place(start, end, dtype, tuple(shape))


def _check_places(path: Path, places: Mapping[str, _Place], n_bytes: int) -> None:
    """The tensors fill the body of the file without a gap and without an overlap."""
    expected = 0
    for name, place in sorted(places.items(), key=lambda item: item[1][:2]):
        if place.start != expected:
            raise ValueError(f"{path}: tensor {name!r} starts at byte {place.start} of the body, expected {expected}")
        expected = place.end
    if expected != n_bytes:
        raise ValueError(f"{path}: the tensors have {expected} bytes, the body of the file {n_bytes} (truncated?)")


def _tensor(place: _Place, body: memoryview) -> Tensor:
    start, end, dtype, shape = place
    if start == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(body[start:end]), dtype=dtype).reshape(shape)


def _read_page(folder: Path) -> dict[str, Any]:
    """The content of `encoder.json`, which is an object of the format that this version reads."""
    try:
        page = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: not an encoder bundle (encoder.json: {error})") from None
    if not isinstance(page, dict):
        raise ValueError(f"{folder}: not an encoder bundle (encoder.json holds no object)")
    if page.get("format") != FORMAT:
        raise ValueError(f"{folder}: bundle format {page.get('format')}, this version reads {FORMAT}; update ssl_eo")
    return page


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """Whatever a wrong value in the file `path` leads to is one `ValueError` that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def _check_fit(folder: Path, encoder: Encoder, tensors: Mapping[str, Tensor]) -> None:
    """The names and shapes are the encoder's, and the values are floating point, of whatever precision."""
    expected = {name: list(value.shape) for name, value in encoder.state_dict().items()}
    found = {name: list(value.shape) if value.is_floating_point() else value.dtype for name, value in tensors.items()}
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{folder}: {len(wrong)} tensors do not fit the encoder, the first is {first}: expected"
            f" {expected.get(first, 'none')}, found {found.get(first, 'none')}"
        )


def _input_from(name: str, raw: Mapping[str, Any]) -> SensorInput:
    return SensorInput(
        sensor=Sensor.from_dict(raw["sensor"], where=f"inputs.{name}"),
        bands=tuple(raw["bands"]),
        mean=tuple(raw["mean"]),
        std=tuple(raw["std"]),
        gsd_m=raw["gsd_m"],
    )


def _dataclass_from(cls: type, raw: Mapping[str, Any]) -> Any:
    """A (nested) dataclass from the plain values that `asdict` gave."""
    hints, spelt = get_type_hints(cls), {f.name: f.type for f in fields(cls)}
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ValueError(f"encoder config: unknown key {key!r}; written by a newer version of ssl_eo?")
        if is_dataclass(hints[key]):
            value = _dataclass_from(hints[key], value)
        elif not _fits(value, hints[key]):
            raise ValueError(f"encoder config: {key} is {value!r}, which this version does not know ({spelt[key]})")
        values[key] = value
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the type `hint`: a plain type, a union of such, or a `Literal`. Numbers are finite."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _count_or_none(key: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{key} must be a whole number from 1 or null, got {value!r}")
    return value
