"""What flows from a source to an objective: `Sample` -> `ViewPlan`s -> `Batch` -> `PixelBatch`.

A sample holds raw tiles in their stored dtype. A plan says which pixels of a tile a view shows and how. A batch stacks
raw tiles and plans, crosses to the device as integers, and is rendered there into normalised pixels.

B samples per rank, V views of one role per sample, R = V*B rows (views outermost), r rows of a role that show one
tile, b samples that hold it, C bands of a tile, c bands of a view, H W tile pixels, h w view pixels, N patches of a
view, K visible patches, M = N - K masked patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_eo.sensors import ChannelMeta, Sensor

__all__ = [
    "Batch",
    "LazyPixels",
    "Locates",
    "MaskBatch",
    "PixelBatch",
    "Prefetches",
    "Sample",
    "Source",
    "Tile",
    "TileBatch",
    "TileSchema",
    "ViewBatch",
    "ViewLimits",
    "ViewPlan",
    "Views",
    "is_gsd_m",
    "map_tensors",
    "move_to",
]

T = TypeVar("T")

_UNSIGNED, _SIGNED = ("uint8", "uint16", "uint32", "uint64"), ("int8", "int16", "int32", "int64")
_DTYPES = ("bool", *_UNSIGNED, *_SIGNED, "float16", "float32", "float64")  # of pixels: what NumPy and torch share


class LazyPixels(Protocol):
    """Pixels `[C, H, W]` that are read when they are sliced, and only those: a file that may be larger than memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, part: tuple[slice, slice, slice]) -> NDArray[Any]: ...


@dataclass
class Tile:
    """Raw pixels of one sensor over one place: `pixels [C, H, W]` in the stored dtype, `bands` its C band names.

    `gsd_m` is the ground size of a pixel of this very tile, `date` when it was taken (ISO 8601, a day or an instant).
    After `stacking.cut_to_views`, `pixels` are those that views show, `origin` is the (row, column) of the first of
    them, and `measured [C, H, W]` says which of them hold data (None: all that the dtype and the sensor can tell).
    """

    pixels: NDArray[Any] | LazyPixels
    bands: tuple[str, ...]
    gsd_m: float
    date: str | None = None
    origin: tuple[int, int] = (0, 0)
    measured: NDArray[np.bool_] | None = None

    @property
    def array(self) -> NDArray[Any]:
        """All pixels, read now if they are lazy."""
        return self.pixels if isinstance(self.pixels, np.ndarray) else self.pixels[:, :, :]


@dataclass(frozen=True)
class ViewLimits:
    """Where the views of one sample lie, and how coarse they are; drawn once for all of them (`plans.SourceCrop`).

    `window_m` is (top, left, height, width) in metres from the corner that the tiles share, None for whole tiles.
    `gsd_m` is the range of the ground size of view pixels.
    """

    window_m: tuple[float, float, float, float] | None = None
    gsd_m: tuple[float, float] | None = None


@dataclass
class Sample:
    """One place, seen through one or more tiles. Tile names are keys of `Source.schema`: all but the optional ones.

    `label` is an integer class, a `[H, W]` integer map, a `[K]` multi-hot vector, or None. `meta` holds plain values
    (`latitude`, `longitude`, `date`, ...). `limits` come from `data.sources`, not from the source.
    """

    key: str
    tiles: dict[str, Tile]
    meta: dict[str, Any] = field(default_factory=dict)
    label: Any = None
    limits: ViewLimits = ViewLimits()


@dataclass(frozen=True)
class TileSchema:
    """What every tile of one name looks like in a source, and the statistics that normalise it.

    `mean` and `std` are per band, in stored units, over valid pixels. `shape` is (H, W), None where tiles differ in
    size. `gsd_m` is what a tile has that does not say otherwise. A sample may lack an `optional` tile. A tile name is
    the sensor's name unless a source holds several tiles of one sensor (resolutions, dates, products with statistics
    of their own): then `sensor_name@what`.
    """

    sensor: Sensor
    bands: tuple[str, ...]
    dtype: str
    shape: tuple[int, int] | None
    gsd_m: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    optional: bool = False

    def __post_init__(self) -> None:
        name, n = self.sensor.name, len(self.bands)
        self.sensor.index(self.bands)
        if not n or len(set(self.bands)) != n:
            raise ValueError(f"bands of {name} are none, or named twice: {', '.join(self.bands) or 'none'}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype of {name} must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        shape = (1, 1) if self.shape is None else self.shape
        if len(shape) != 2 or not all(isinstance(s, (int, np.integer)) and s > 0 for s in shape):
            raise ValueError(f"shape of {name} must be (height, width) in pixels or None, got {self.shape}")
        if not isinstance(self.optional, bool):
            raise ValueError(f"optional of {name} must be true or false, got {self.optional!r}")
        if not is_gsd_m(self.gsd_m):
            raise ValueError(f"gsd_m of {name} must be metres, above 0 and up to 1e6, got {self.gsd_m!r:.80}")
        if len(self.mean) != n or len(self.std) != n:
            raise ValueError(
                f"statistics of {name}: {len(self.mean)} means and {len(self.std)} standard deviations for {n} bands"
            )
        if not all(map(_is_number, self.mean)) or not all(_is_number(s) and s > 0 for s in self.std):
            raise ValueError(f"statistics of {name} must be finite and std positive, got std {self.std}")

    def check(self, pixels: NDArray[Any] | LazyPixels, bands: tuple[str, ...] | None = None) -> None:
        """Raise `ValueError` unless `pixels [C, H, W]`, and their `bands` where they are known, are as stated here.

        The message says what was found and what is expected; whoever calls adds whose pixels they are.
        """
        has_any_size = self.shape is None and len(pixels.shape) == 3 and min(pixels.shape) > 0
        size = pixels.shape[1:] if has_any_size else self.shape
        shape, dtype = (len(self.bands), *(size or ("height", "width"))), np.dtype(self.dtype)
        for what, found, expected in (
            ("bands", self.bands if bands is None else bands, self.bands),
            ("shape", pixels.shape, shape),
            ("dtype", pixels.dtype, dtype),
        ):
            if found != expected:
                raise ValueError(f"{what} {found}, expected {expected}")


def is_gsd_m(value: Any) -> bool:
    """Whether `value` can be the ground size of a pixel: metres above 0, up to a thousand kilometres."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_number and bool(0 < value <= 1e6)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)


@runtime_checkable
class Locates(Protocol):
    """A source that knows (key, file) of a sample without reading it. Optional; it completes the quarantine lines."""

    def locate(self, index: int) -> tuple[str | None, str | None]: ...


@runtime_checkable
class Prefetches(Protocol):
    """A source that can start to fetch samples in the background. Optional; it is told what is needed ahead of time.

    `is_remote` says whether there is anything to fetch: else the loader spares itself the telling.
    """

    @property
    def is_remote(self) -> bool: ...

    def prefetch(self, indices: Sequence[int]) -> None: ...


class Source(Protocol):
    """A readable collection of samples. Cheap to pickle or fork: file handles are opened on first use in a process.

    `read` raises `ValueError` or `OSError` for a bad sample; the loader quarantines it. `chunk_size` is the length of
    the contiguous runs that are cheap to read together. `fingerprint` identifies the content (not the location).
    """

    @property
    def schema(self) -> Mapping[str, TileSchema]: ...

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def chunk_size(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class ViewPlan:
    """One view: a box of a tile, resized, then flipped, then turned, with an affine change of normalised values.

    `box` is (top, left, height, width) in pixels of the tile, fractions allowed. The box is resized to `size` (h, w),
    flipped left-right if `flip`, then turned by `rot90` quarter turns counter-clockwise (`torch.rot90` on (H, W); with
    an odd count `size` is the size after turning). `bands` are positions in the tile, None for all. A normalised
    value v becomes `v * gain + bias`.
    """

    tile: str
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool = False
    rot90: int = 0
    bands: tuple[int, ...] | None = None
    gain: float = 1.0
    bias: float = 0.0


@dataclass
class TileBatch:
    """Raw tiles of one name, stacked: `pixels [b, C, H, W]` in the stored dtype, `gsd_m [b]` float32 of their pixels.

    Tiles of different sizes are zero beyond their own. `has_no_data` is decided by the worker that read the tiles; when
    False, rendering skips all validity work. `present [b, C]` bool says which bands of a tile hold any data; None when
    all do.
    """

    pixels: Tensor
    gsd_m: Tensor
    has_no_data: bool
    present: Tensor | None = None


@dataclass
class ViewBatch:
    """The plans of one role that show one tile, as tensors of r rows in the order of the role's R (views outermost).

    All rows of a role share view size and c. `place [r]`: which rows of the role these are, None for all of them.
    `row [r]`: which of the stacked tiles each view shows; `bands [r, c]` or None, -1 where a row has fewer bands than
    c; `box [r, 4]`; `flip [r]` bool; `rot90 [r]`; `gain [r]`, `bias [r]`. `resample` is False when every row shows the
    top left pixels of its tile as they are: then rendering only normalises them. `has_padding`: some `bands` are -1.
    """

    tile: str
    size: tuple[int, int]
    row: Tensor
    box: Tensor
    flip: Tensor
    rot90: Tensor
    gain: Tensor
    bias: Tensor
    bands: Tensor | None = None
    resample: bool = True
    place: Tensor | None = None
    has_padding: bool = False


@dataclass
class MaskBatch:
    """Patch masks of one role with exact counts, so that shapes are static.

    `mask [R, N]` bool, True = hidden. `ids_keep [R, K]` and `ids_masked [R, M]`: flat patch indices, ascending.
    """

    mask: Tensor
    ids_keep: Tensor
    ids_masked: Tensor


@dataclass
class PixelBatch:
    """Rendered views of one role: `pixels [R, c, h, w]` float32, normalised, zero where not valid.

    `valid [R, c, h, w]` bool or None when every pixel is valid. `gsd_m [R]` is the ground size of a view pixel.
    """

    pixels: Tensor
    channels: ChannelMeta
    gsd_m: Tensor
    valid: Tensor | None = None


@dataclass
class Batch:
    """One rank's part of a global batch. `views`, `masks` and `pixels` are keyed by role ("image", "global", ...).

    A role has one `ViewBatch` for each tile that its views show. `source` is the index of the source in `data.sources`.
    `pixels` is empty until `render` fills it.
    """

    step: int
    source: int
    keys: list[str]
    tiles: dict[str, TileBatch]
    views: dict[str, list[ViewBatch]]
    masks: dict[str, MaskBatch] = field(default_factory=dict)
    pixels: dict[str, PixelBatch] = field(default_factory=dict)


class Views(Protocol):
    """How an objective looks at samples. Picklable: it travels to the loader's workers."""

    def plan(self, sample: Sample, rng: np.random.Generator) -> Any:
        """All random choices for one sample: plans and masks, in tuples, lists, dicts or dataclasses.

        A sample is replaced when a tile that one of its `ViewPlan`s shows holds only no-data.
        """
        ...

    def collate(self, planned: list[tuple[Sample, Any]], step: int, source: int, rng: np.random.Generator) -> Batch:
        """Stack samples and their plans into a batch of static shapes.

        `rng` is for choices that all samples of a step share; it is the same on all ranks and for all micro-batches.
        """
        ...


def map_tensors(function: Callable[[Tensor], Tensor], value: T) -> T:
    """`value` with `function` applied to every tensor inside it (dataclasses, dicts, lists)."""
    if isinstance(value, Tensor):
        return function(value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {k: map_tensors(function, v) for k, v in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [map_tensors(function, v) for v in value]  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type) and not isinstance(value, (Sensor, TileSchema)):
        return type(value)(**{f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value)})
    return value


def move_to(value: T, device: torch.device | str, non_blocking: bool = False) -> T:
    """`value` with every tensor inside it moved to `device`."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), value)
