"""What is written of a scene: a GeoTIFF on its grid, or a table of its cells. Both from panels, one at a time.

K values of a cell, n bands of the output, h w cells of a panel.
"""

from __future__ import annotations

import colorsys
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_eo.adapt.scenes import Grid
from ssl_eo.adapt.tiling import BLOCK_SIDES, Box
from ssl_eo.components import import_extra, one_line
from ssl_eo.data.sources._rasters import check_utf8

__all__ = ["Output", "Panels", "RasterOutput", "TableOutput", "class_map", "value_map"]

Dtype = Literal["uint8", "uint16", "float16", "float32"]
Colour = tuple[int, int, int, int]  # red, green, blue and opacity, from 0 to 255
Panels = Callable[[], Iterable[tuple[Box, NDArray[Any]]]]  # each call gives all panels, row by row

_CACHE_BYTES = 64 << 20  # of GDAL's blocks
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples are spread over a circle, however many there are
_SHADES = ((0.65, 0.85), (0.85, 0.6), (0.45, 0.95))  # saturation and value
_UNSEEN: Colour = (0, 0, 0, 0)


class Output(Protocol):
    """A file to be made of the values of all cells."""

    @property
    def path(self) -> Path: ...

    def facts(self) -> dict[str, Any]:
        """What its panels depend on, as plain JSON types."""
        ...

    def panel(self, values: Tensor) -> NDArray[Any]:
        """What is kept of `values [K, h, w]` float32, NaN where nothing was measured."""
        ...

    def has_values(self, stored: NDArray[Any]) -> bool:
        """Whether a panel holds anything that was measured."""
        ...

    def write(self, path: Path, grid: Grid, panels: Panels, side: int) -> None:
        """Write all `panels`, of `side` cells, to `path`. Raises `OSError` that names the output if they do not fit."""
        ...


@dataclass(frozen=True)
class RasterOutput:
    """A GeoTIFF of `n_bands` bands, tiled and compressed. float16 are stored as TIFF's half precision.

    `convert` makes what is stored, `[n, h, w]`, of finite values `[K, h, w]`; cells without become `no_data`.
    """

    path: Path
    n_bands: int
    dtype: Dtype
    no_data: float
    convert: Callable[[Tensor], Tensor]
    descriptions: tuple[str, ...] = ()  # of each band
    tags: Mapping[str, str] = field(default_factory=dict)
    colours: Mapping[int, Colour] = field(default_factory=dict)  # of stored values of the first band; none: no table
    told: Callable[[NDArray[Any]], None] | None = None  # gets each panel that is written, once

    def __post_init__(self) -> None:
        check_utf8(self.path)

    def facts(self) -> dict[str, Any]:
        return {"kind": "raster", "n_bands": self.n_bands, "dtype": self.dtype}

    def panel(self, values: Tensor) -> NDArray[Any]:
        missing = values.isnan().any(0)  # [h, w]
        stored = _stored(self.convert(values), self.dtype, self.path)  # [n, h, w]
        stored[:, missing.cpu().numpy()] = self.no_data
        return stored

    def has_values(self, stored: NDArray[Any]) -> bool:
        missing = np.isnan(stored) if math.isnan(self.no_data) else stored == self.no_data
        return not missing.all()

    def write(self, path: Path, grid: Grid, panels: Panels, side: int) -> None:
        rasterio = import_extra("geo", "rasterio", "writing a GeoTIFF")
        with _write_errors(self.path), _quiet(rasterio), rasterio.open(path, "w", **self._profile(grid, side)) as file:
            file.update_tags(**self.tags)
            if self.descriptions:
                file.descriptions = self.descriptions
            if self.colours:
                file.write_colormap(1, dict(self.colours))
            for box, stored in panels():
                file.write(stored.astype(file.dtypes[0], copy=False), window=_window(box))
                if self.told is not None:
                    self.told(stored)
        self._check(path, panels)

    def _profile(self, grid: Grid, side: int) -> dict[str, Any]:
        block = next(size for size in BLOCK_SIDES if side % size == 0)
        is_float = self.dtype.startswith("float")
        return {
            "driver": "GTiff",
            "height": grid.shape[0],
            "width": grid.shape[1],
            "count": self.n_bands,
            "dtype": "float32" if is_float else self.dtype,
            "nodata": self.no_data,
            "crs": grid.crs,
            "transform": _affine(grid),
            "tiled": True,
            "blockxsize": block,
            "blockysize": block,
            "interleave": "band",  # each block is then complete, and written once, by one panel
            "compress": "deflate",
            "predictor": 3 if is_float else 2,
            "bigtiff": "if_safer",
            **({"nbits": 16} if self.dtype == "float16" else {}),
        }

    def _check(self, path: Path, panels: Panels) -> None:
        """Raise `OSError` unless the file holds what was written: GDAL does not report all that goes wrong."""
        rasterio = import_extra("geo", "rasterio", "writing a GeoTIFF")
        with _write_errors(self.path), _quiet(rasterio), rasterio.open(path, driver="GTiff") as file:
            is_whole = all(
                np.array_equal(file.read(window=_window(box)), stored, equal_nan=stored.dtype.kind == "f")
                for box, stored in panels()
            )
        if not is_whole:
            raise OSError(f"{self.path} could not be written: it does not hold what was written; is the disk full?")


def class_map(
    path: Path,
    class_names: Sequence[str],
    tags: Mapping[str, str],
    told: Callable[[NDArray[Any]], None] | None = None,
) -> RasterOutput:
    """The class of each cell, the one of the highest value: uint8, or uint16 above 255 classes; the highest is no-data.

    The names of classes are tags `CLASS_0`, ...; maps of uint8 have a table of colours. `told` gets each panel that is
    written.
    """
    n = len(class_names)
    dtype: Dtype = "uint8" if n <= 255 else "uint16"
    if not 1 <= n <= 65535:
        raise ValueError(f"a map has 1 to 65535 classes, got {n}")
    named = {f"CLASS_{i}": name for i, name in enumerate(class_names)}
    no_data = int(np.iinfo(dtype).max)
    colours = {**{i: _colour(i) for i in range(n)}, no_data: _UNSEEN} if dtype == "uint8" else {}
    return RasterOutput(path, 1, dtype, float(no_data), _highest, ("class",), {**tags, **named}, colours, told)


def _colour(i: int) -> Colour:
    """That of class `i`: neighbours, and the next ones too, lie far apart in hue, and differ in lightness."""
    saturation, value = _SHADES[i % len(_SHADES)]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(i * _GOLDEN % 1.0, saturation, value))
    return red, green, blue, 255


def value_map(
    path: Path, n_values: int, dtype: Dtype, descriptions: Sequence[str], tags: Mapping[str, str]
) -> RasterOutput:
    """All values of each cell, as they are; NaN is no-data."""
    return RasterOutput(path, n_values, dtype, math.nan, _as_they_are, tuple(descriptions), tags)


@dataclass(frozen=True)
class TableOutput:
    """A Parquet file with a row for each cell of which anything was measured, a row group a panel.

    Columns: `row` and `column` of the cell in the grid, from 0; `x` and `y`, the coordinates of its centre in the
    scene's reference system, or in pixels without one; `embedding`, a list of `n_values` numbers. The schema's metadata
    hold `crs` (WKT, empty without one), `transform` (its six coefficients, of the grid), `shape` and the tags.
    """

    path: Path
    n_values: int
    dtype: Literal["float16", "float32"]
    tags: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        return {"kind": "table", "n_values": self.n_values, "dtype": self.dtype}

    def panel(self, values: Tensor) -> NDArray[Any]:
        return _stored(values, self.dtype, self.path)

    def has_values(self, stored: NDArray[Any]) -> bool:
        return not np.isnan(stored).all()

    def write(self, path: Path, grid: Grid, panels: Panels, side: int) -> None:
        del side
        pyarrow = import_extra("parquet", "pyarrow", "writing a table of cells")
        parquet = import_extra("parquet", "pyarrow.parquet", "writing a table of cells")
        facts = {"transform": json.dumps(grid.transform), "shape": json.dumps(grid.shape)}
        facts["crs"] = "" if grid.crs is None else grid.crs.to_wkt()
        place = [
            ("row", pyarrow.int32()),
            ("column", pyarrow.int32()),
            ("x", pyarrow.float64()),
            ("y", pyarrow.float64()),
        ]
        numbers = pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(self.dtype)), self.n_values)
        schema = pyarrow.schema([*place, ("embedding", numbers)], metadata={**self.tags, **facts})
        with _write_errors(self.path), parquet.ParquetWriter(path, schema, compression="zstd") as file:
            for (top, left, _, _), stored in panels():
                rows, columns = np.nonzero(~np.isnan(stored).any(0))
                values = pyarrow.array(np.ascontiguousarray(stored[:, rows, columns].T).reshape(-1))
                rows, columns = rows + top, columns + left
                arrays = [rows.astype("int32"), columns.astype("int32"), *grid.centres(rows, columns)]
                lists = pyarrow.FixedSizeListArray.from_arrays(values, self.n_values)
                file.write_table(pyarrow.Table.from_arrays([*map(pyarrow.array, arrays), lists], schema=schema))


def _highest(values: Tensor) -> Tensor:
    return values.argmax(0, keepdim=True)


def _as_they_are(values: Tensor) -> Tensor:
    return values


def _stored(values: Tensor, dtype: Dtype, path: Path) -> NDArray[Any]:
    """`values` in `dtype`. Raises `ValueError` for those that float16 cannot hold."""
    if dtype == "float16" and (values.abs() > torch.finfo(torch.float16).max).any():
        raise ValueError(f"{path}: values above 65504 do not fit float16; write float32")
    stored: NDArray[Any] = values.cpu().numpy().astype(dtype)
    return stored


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Errors of GDAL and Arrow as `OSError` that names the output; those of other files name these."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # rasterio says little itself
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else one_line(cause)
        text = f"{path} could not be written: {reason}; is the disk full?"
        raise (OSError(text) if error.errno is None else OSError(error.errno, text)) from None


@contextmanager
def _quiet(rasterio: Any) -> Iterator[None]:
    """No warnings of a raster without georeference, and a bounded cache of blocks."""
    with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def _window(box: Box) -> Any:
    from rasterio.windows import Window

    return Window(box[1], box[0], box[3], box[2])


def _affine(grid: Grid) -> Any:
    """None for pixels that lie nowhere: GDAL would take a transform that was given for a place."""
    from rasterio.transform import Affine

    affine = Affine(*grid.transform)
    return None if affine.is_identity else affine
