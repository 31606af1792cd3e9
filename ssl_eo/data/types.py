"""What flows from a source to an objective: `Sample` -> `ViewPlan`s -> `Batch` -> `PixelBatch`.

A sample holds raw tiles in their stored dtype. A plan says which pixels of a tile a view shows and how. A batch stacks
raw tiles and plans, crosses to the device as integers, and is rendered there into normalised pixels.

B samples per rank, V views of one role per sample, R = V*B rows (views outermost), r rows of a role that show one
tile, b samples that hold it, C bands of a tile, c bands of a view, H W tile pixels, h w view pixels, N patches of a
view, K visible patches, M = N - K masked patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_eo.data.schema import LazyPixels, TileSchema
from ssl_eo.data.spectral import Synthesis
from ssl_eo.sensors import ChannelMeta, Sensor

__all__ = [
    "Batch",
    "LazyPixels",
    "Locates",
    "MaskBatch",
    "PixelBatch",
    "Prefetches",
    "RaggedMaskBatch",
    "Sample",
    "Source",
    "Synthesis",
    "Tile",
    "TileBatch",
    "TileSchema",
    "View",
    "ViewBatch",
    "ViewLimits",
    "ViewPlan",
    "Views",
    "VisibleBatch",
    "map_tensors",
    "move_to",
]

T = TypeVar("T")


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

    `label` is an integer class, a `[H, W]` integer map, a `[K]` multi-hot vector, a float (a number to predict), or
    None. `meta` holds plain values (`latitude`, `longitude`, `date`, ...). `limits` come from `data.sources`, not from
    the source. `slot` is the position in the global batch, set by the loader.
    """

    key: str
    tiles: dict[str, Tile]
    meta: dict[str, Any] = field(default_factory=dict)
    label: Any = None
    limits: ViewLimits = ViewLimits()
    slot: int = 0


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
    an odd count `size` is the size after turning). `bands` are positions in the tile, None for all. With `synthesis`
    the view shows virtual bands, mixed from those of the tile, and `bands` is None. A normalised value v becomes
    `v * gain + bias`.
    """

    tile: str
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool = False
    rot90: int = 0
    bands: tuple[int, ...] | None = None
    gain: float = 1.0
    bias: float = 0.0
    synthesis: Synthesis | None = None


# One plan; or a joint view: plans of the same ground, size, flip and quarter turns, whose channels follow one another
# (bands of several resolutions, several sensors).
View = ViewPlan | tuple[ViewPlan, ...]


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

    All rows of a role share the view size. `row [r]`: which of the stacked tiles each view shows; `bands [r, c]` or
    None, -1 where a row has fewer bands than c; `box [r, 4]`; `flip [r]` bool; `rot90 [r]`; `gain [r]`, `bias [r]`.
    `resample` is False when every row shows the top left pixels of its tile as they are: then rendering only normalises
    them. `has_padding`: some rows have fewer bands than c.

    Virtual bands: `weights [r, c, C]`, all 0 where a row has fewer, with `wavelength_um [r, c]` and `fwhm_um [r, c]`.
    Plans of a tile with and without virtual bands make two of these.

    `place [r, c]` and `role_shape`, both None where rows and channels of the role are just these: the role is a table
    of `role_shape` (R, channels), and `place` says where in it, counted row after row, each channel goes; R * channels
    where there is none to go. A joint view has as many rows as parts, which go to one row of the role.
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
    has_padding: bool = False
    weights: Tensor | None = None
    wavelength_um: Tensor | None = None
    fwhm_um: Tensor | None = None
    place: Tensor | None = None
    role_shape: tuple[int, int] | None = None

    def of_role(self, values: Tensor) -> Tensor:
        """The part `[r, c, ...]` of `values [R, channels, ...]` of the role that is of this tile."""
        if self.place is None:
            return values
        flat = values.flatten(0, 1)  # [R * channels, ...]
        return flat[self.place.clamp(max=len(flat) - 1)]


@dataclass
class MaskBatch:
    """Patch masks of one role with exact counts, so that shapes are static.

    `mask [R, N]` bool, True = hidden. `ids_keep [R, K]` and `ids_masked [R, M]`: flat patch indices, ascending.
    """

    mask: Tensor
    ids_keep: Tensor
    ids_masked: Tensor


@dataclass
class RaggedMaskBatch:
    """Patch masks of one role whose rows differ in how many patches they hide, none included; M are hidden in all.

    `mask [R, N]` bool, True = hidden. `ids_masked [M]`: ascending positions in the flat mask. `weight [M]`: one over
    the number of patches that the row hides.
    """

    mask: Tensor
    ids_masked: Tensor
    weight: Tensor


@dataclass
class VisibleBatch:
    """Which patches of several modalities are seen: exactly K of a sample, of all its modalities together.

    There are T modalities, named by `rows`, of N patches each. `mask [B, T*N]` bool, True = hidden, one modality after
    the other. `ids_keep [B, K]`: ascending positions in a row of it. `rows` (each `[n]`): the visible patches of a
    modality, ascending positions in its `[B*N]`. `order [B*K]`: where in all `rows`, put one after the other, the
    visible patches of the first sample are, then those of the second, ...
    """

    mask: Tensor
    ids_keep: Tensor
    rows: dict[str, Tensor]
    order: Tensor


@dataclass
class PixelBatch:
    """Rendered views of one role: `pixels [R, c, h, w]` float32, normalised, zero where not valid.

    `valid [R, c, h, w]` bool or None when every pixel is valid. `gsd_m [R]` is the ground size of a view pixel.
    """

    pixels: Tensor
    channels: ChannelMeta
    gsd_m: Tensor
    valid: Tensor | None = None

    def of_one_sensor(self) -> PixelBatch:
        """With `channels [C]`, for rows that differ at most in which bands hold data: the others are not valid."""
        if self.channels.kind.ndim == 1:
            return self
        first = {f.name: getattr(self.channels, f.name)[0] for f in fields(ChannelMeta) if f.name != "valid"}
        return replace(self, channels=ChannelMeta(**first))


@dataclass
class Batch:
    """One rank's part of a global batch. All but `tiles` are keyed by role ("image", "global", ...).

    A role has a `ViewBatch` for each tile that its views show. `source` is the index of the source in `data.sources`.
    `pixels` is empty until `render` fills it. `meta` has what is known of the samples (`stacking.stack_meta`).
    """

    step: int
    source: int
    keys: list[str]
    tiles: dict[str, TileBatch]
    views: dict[str, list[ViewBatch]]
    masks: dict[str, MaskBatch] = field(default_factory=dict)
    pixels: dict[str, PixelBatch] = field(default_factory=dict)
    ragged_masks: dict[str, RaggedMaskBatch] = field(default_factory=dict)
    visible: VisibleBatch | None = None
    meta: dict[str, Tensor] = field(default_factory=dict)


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
