"""Images of any size through a model of windows: windows that overlap, blended, a box of the image at a time.

A cell is what the model gives values for: a pixel, or a patch of them. A value that is NaN was not measured.

C channels, H W pixels of the image, B windows, s side of a window in pixels, c side of a window in cells, K values of a
cell, h w cells of a box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "BLOCK_SIDES",
    "Blend",
    "Box",
    "ReadPixels",
    "Tiling",
    "WindowModel",
    "blend",
    "blend_box",
    "blend_weights",
    "count_windows",
    "grid_of",
    "panel_bytes",
    "panel_side",
    "panels",
    "reflected",
    "windows",
]

Blend = Literal["cosine", "gaussian"]
Box = tuple[int, int, int, int]  # (top, left, height, width), of pixels or of cells
ReadPixels = Callable[[Box], Tensor]  # a box of pixels within the image -> [C, height, width] float32
WindowModel = Callable[[Tensor], Tensor]  # [B, C, s, s] float32 -> [B, K, c, c], of each window by itself

_PANEL_PX = 2048  # side of a panel, where memory allows: windows that two panels share are seen twice, one in ten here
# Of the blocks of a GeoTIFF, for which GDAL wants multiples of 16: each is to be written once, by one panel.
BLOCK_SIDES = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Tiling:
    """How an image is cut: windows of `size_px`, of which neighbours overlap by `overlap_ratio` of a window or more.

    Windows begin at multiples of `patch_px`, and a cell of the output is `cell_px` wide: 1, or the patch for features.
    `batch_size` windows go through the model at once.
    """

    size_px: int
    overlap_ratio: float = 0.5
    blend: Blend = "cosine"
    patch_px: int = 1
    cell_px: int = 1
    batch_size: int = 8

    def __post_init__(self) -> None:
        for key in ("size_px", "patch_px", "cell_px", "batch_size"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        if not 0 <= self.overlap_ratio < 1:
            raise ValueError(f"overlap_ratio must be at least 0 and below 1, got {self.overlap_ratio}")
        if self.blend not in get_args(Blend):
            raise ValueError(f"blend must be one of {', '.join(get_args(Blend))}, got {self.blend!r}")
        if self.size_px % self.patch_px:
            raise ValueError(f"size_px must be a multiple of the patch, {self.patch_px} pixels, got {self.size_px}")
        if self.patch_px % self.cell_px:
            raise ValueError(f"cell_px must divide the patch, {self.patch_px} pixels, got {self.cell_px}")

    @property
    def size_cells(self) -> int:
        return self.size_px // self.cell_px


def grid_of(shape: tuple[int, int], cell_px: int) -> tuple[int, int]:
    """Cells (h, w) of an image of `shape` (H, W); those at the right and lower edge may reach beyond it."""
    return -(-shape[0] // cell_px), -(-shape[1] // cell_px)


def windows(length: int, size: int, overlap_ratio: float, multiple: int = 1) -> list[int]:
    """First pixels of the windows of `size` that cover an axis of `length` pixels: ascending multiples of `multiple`.

    The axis is taken to be as long as one window at least, and a multiple of `multiple`; the last window ends with it.
    """
    if length < 1:
        raise ValueError(f"an image has one pixel at least along each side, got {length}")
    stride = max(multiple, math.floor(size * (1 - overlap_ratio) + 1e-9) // multiple * multiple)
    last = max(size, -(-length // multiple) * multiple) - size
    return [*range(0, last, stride), last]


def blend_weights(size: int, kind: Blend) -> Tensor:
    """`[size]` float64 above 0, symmetric: a raised cosine, or a Gaussian whose sigma is an eighth of the window."""
    centre = torch.arange(size, dtype=torch.float64) + 0.5
    if kind == "cosine":
        return torch.sin(math.pi * centre / size) ** 2
    return torch.exp(-0.5 * ((centre - size / 2) / (size / 8)) ** 2)


def reflected(first: int, n: int, length: int) -> Tensor:
    """Positions `[n]` in an axis of `length` that its mirror images show from `first` on; its ends are not repeated."""
    period = max(1, 2 * (length - 1))
    at = torch.arange(first, first + n) % period
    return torch.where(at < length, at, period - at)


def blend(image: Tensor, model: WindowModel, tiling: Tiling, softmax: bool = False) -> Tensor:
    """Values `[K, h, w]` float32 of the cells of `image [C, H, W]`: weighted means of what overlapping windows give.

    With `softmax` what is averaged are probabilities, the softmax over K of what the model gives. An image is mirrored
    at its right and lower edge up to one window and to a multiple of the patch. Cells of which nothing was measured are
    NaN. Windows are added in their order, row by row, whatever the batch: results depend on the batch size no more than
    those of the model do, which are the same bits for one that is computed window by window, and equal within rounding
    where a matmul runs over the batch. Raises `ValueError` for outputs of another shape or that are not finite.
    """
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"an image is [C, H, W] with one pixel at least, got {list(image.shape)}")
    shape = image.shape[1], image.shape[2]

    def read(box: Box) -> Tensor:
        top, left, height, width = box
        return image[:, top : top + height, left : left + width].float()

    grid = grid_of(shape, tiling.cell_px)
    found = blend_box(read, shape, (0, 0, *grid), model, tiling, softmax)
    if found is None:
        raise ValueError("nothing of the image was measured: all its values are NaN")
    return found


@torch.no_grad()
def blend_box(
    read: ReadPixels,
    shape: tuple[int, int],
    box: Box,
    model: WindowModel,
    tiling: Tiling,
    softmax: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Tensor | None:
    """Values `[K, h, w]` of a `box` of cells of an image of `shape` (H, W), as `blend` has them there.

    Pixels are `read` one row of windows at a time. Windows without a measured value are not shown to the model; None
    where there is no other. `advance` is told of each number of windows that are done.
    """
    rows = _spans(shape[0], box[0], box[2], tiling)
    columns = _spans(shape[1], box[1], box[3], tiling)
    canvas = _Canvas(box, model, softmax, tiling.size_cells)
    pending: list[_Window] = []
    tell = advance or _nobody
    for row in rows:
        strip, measured = _read_strip(read, shape, row, columns, tiling)  # [C, s, n], [c, n / cell]
        left = columns[0].first_px
        canvas.mark(row, measured[:, box[1] - left // tiling.cell_px :])
        for column in columns:
            at = column.first_px - left
            first = at // tiling.cell_px
            if measured[:, first : first + tiling.size_cells].any():
                pending.append(_Window(row, column, strip[:, :, at : at + tiling.size_px]))
            else:
                tell(1)
            if len(pending) == tiling.batch_size:
                canvas.add(pending)
                tell(len(pending))
                pending = []
    if pending:
        canvas.add(pending)
        tell(len(pending))
    return canvas.finish()


def panels(grid: tuple[int, int], side: int) -> list[Box]:
    """Boxes of at most `side` by `side` cells that part a grid of cells, row by row."""
    height, width = grid
    return [
        (top, left, min(side, height - top), min(side, width - left))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def count_windows(shape: tuple[int, int], box: Box, tiling: Tiling) -> int:
    """How many windows `blend_box` goes through for a `box` of cells."""
    return len(_starts(shape[0], box[0], box[2], tiling)) * len(_starts(shape[1], box[1], box[3], tiling))


def panel_bytes(side: int, shape: tuple[int, int], tiling: Tiling, n_channels: int, n_outputs: int) -> int:
    """An upper bound of the memory that a panel of `side` by `side` cells takes, but for the model's own.

    It follows from the window and the panel, and never exceeds that of a whole image that is smaller.
    """
    s, c, b = tiling.size_px, tiling.size_cells, tiling.batch_size
    height, width = (min(side, n) for n in grid_of(shape, tiling.cell_px))
    strip = n_channels * s * min(side * tiling.cell_px + 2 * s, max(s, shape[1] + tiling.patch_px))
    return (
        height * width * (12 * n_outputs + 2 * 8)  # accumulators, what is stored, masks; classes as int64
        + 18 * strip  # float32, twice, while it is made from values of up to 8 bytes; masks
        + 8 * b * n_channels * s * s  # windows, in a batch and in strips that wait for it
        + 8 * b * n_outputs * c * c  # outputs, and their softmax
    )


def panel_side(shape: tuple[int, int], tiling: Tiling, n_channels: int, n_outputs: int, memory_bytes: int) -> int:
    """Side in cells of the panels for an image of `shape`: as large as `memory_bytes` allow, up to 2048 pixels.

    It is a multiple of the side of a block of a GeoTIFF, and two windows wide at least. Raises `ValueError` with the
    memory that is needed where that is too much.
    """
    least = -(-2 * tiling.size_px // tiling.cell_px)
    most = max(least, _PANEL_PX // tiling.cell_px)
    step = next((side for side in BLOCK_SIDES if side <= least), BLOCK_SIDES[-1])
    needed = 0
    for side in range(-(-most // step) * step, 0, -step):
        if side < least:
            break
        needed = panel_bytes(side, shape, tiling, n_channels, n_outputs)
        if needed <= memory_bytes:
            return side
    raise ValueError(
        f"windows of {tiling.size_px} pixels of {n_channels} bands, {n_outputs} values of a cell, need"
        f" {needed / 1e6:.0f} MB, allowed are {memory_bytes / 1e6:.0f}: allow more, or make windows or batches smaller"
    )


@dataclass(frozen=True)
class _Span:
    """A window along one axis, seen from a box of cells."""

    first_px: int
    cells: slice  # of the box
    inside: slice  # the same cells, of the window
    share: Tensor  # [cells] float32: this window's part of each; parts of all windows sum to 1


@dataclass(frozen=True)
class _Window:
    row: _Span
    column: _Span
    pixels: Tensor  # [C, s, s]


class _Canvas:
    """Sums of weighted outputs over a box of cells."""

    def __init__(self, box: Box, model: WindowModel, softmax: bool, size_cells: int) -> None:
        self._model, self._softmax, self._size = model, softmax, size_cells
        self._shape = box[2:]
        self._measured = torch.zeros(self._shape, dtype=torch.bool)
        self._sum: Tensor | None = None  # [K, h, w] float32, where the model's outputs are

    def mark(self, row: _Span, measured: Tensor) -> None:
        """Which cells of a row of windows hold anything: `[c, n]`, from the box's first column on."""
        self._measured[row.cells] = measured[row.inside, : self._shape[1]]

    def add(self, batch: Sequence[_Window]) -> None:
        values = self._model(torch.stack([window.pixels for window in batch]))
        if values.ndim != 4 or values.shape[0] != len(batch) or values.shape[2:] != (self._size, self._size):
            raise ValueError(
                f"the model gave {list(values.shape)} for {len(batch)} windows,"
                f" expected [{len(batch)}, K, {self._size}, {self._size}]"
            )
        values = values.float().softmax(1) if self._softmax else values.float()
        if not values.isfinite().all():
            raise ValueError("the model gave values that are not finite; NaN in its input is what was not measured")
        if self._sum is None:
            self._sum = values.new_zeros(values.shape[1], *self._shape)
        for window, given in zip(batch, values, strict=True):
            row, column = window.row, window.column
            weight = (row.share[:, None] * column.share).to(given.device)
            self._sum[:, row.cells, column.cells].addcmul_(given[:, row.inside, column.inside], weight)

    def finish(self) -> Tensor | None:
        if self._sum is not None:
            self._sum.masked_fill_(~self._measured.to(self._sum.device), torch.nan)
        return self._sum


def _starts(length: int, first: int, n: int, tiling: Tiling) -> list[int]:
    """First cells of the windows along an axis of `length` pixels that meet its `n` cells from `first` on."""
    all_px = windows(length, tiling.size_px, tiling.overlap_ratio, tiling.patch_px)
    starts = [px // tiling.cell_px for px in all_px]
    return [start for start in starts if start < first + n and start + tiling.size_cells > first]


def _spans(length: int, first: int, n: int, tiling: Tiling) -> list[_Span]:
    """The windows that meet the `n` cells from `first` on: they are all that have a part in these."""
    weights = blend_weights(tiling.size_cells, tiling.blend)
    places = []
    total = torch.zeros(n, dtype=torch.float64)
    for start in _starts(length, first, n, tiling):
        low, high = max(start, first), min(start + tiling.size_cells, first + n)
        cells, inside = slice(low - first, high - first), slice(low - start, high - start)
        total[cells] += weights[inside]
        places.append((start * tiling.cell_px, cells, inside))
    return [_Span(px, cells, inside, (weights[inside] / total[cells]).float()) for px, cells, inside in places]


def _read_strip(
    read: ReadPixels, shape: tuple[int, int], row: _Span, columns: Sequence[_Span], tiling: Tiling
) -> tuple[Tensor, Tensor]:
    """All pixels `[C, s, n]` of a row of windows, and which of its cells hold a measured value, `[c, n / cell]`."""
    size, cell, left = tiling.size_px, tiling.cell_px, columns[0].first_px
    width = columns[-1].first_px + size - left
    ys, xs = reflected(row.first_px, size, shape[0]), reflected(left, width, shape[1])
    y, x = int(ys.min()), int(xs.min())
    strip = read((y, x, int(ys.max()) + 1 - y, int(xs.max()) + 1 - x))
    if row.first_px + size > shape[0]:
        strip = strip[:, ys - y]
    if left + width > shape[1]:
        strip = strip[:, :, xs - x]
    measured = ~strip.isnan().all(0)  # [s, n]
    measured[max(0, shape[0] - row.first_px) :] = False  # mirror images show nothing that was measured there
    measured[:, max(0, shape[1] - left) :] = False
    return strip, measured.view(size // cell, cell, width // cell, cell).any(3).any(1)


def _nobody(n_windows: int) -> None:
    del n_windows
