"""A Parquet table of footprints with lists of images becomes one record for each image.

N rows of the table, I images in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import import_extra, one_line

__all__ = ["read_footprints"]

_LISTS = ("path", "sensor", "gsd", "timestamp", "img_height", "img_width")
_PLACE = ("latitude", "longitude")
_BATCH = 16_384  # rows at a time
_MAX_PATH = 1024  # bytes
_MAX_ROWS = 20_000_000  # the release has some hundred thousand
_OTHER = 255  # a sensor that was not asked for


def read_footprints(path: Path, sensors: Sequence[str]) -> NDArray[Any]:
    """`[I]` records in the order of the table: `row`, `sensor` (position in `sensors`), `gsd` (metres, NaN unknown),
    `time` (seconds of 1970, NaT unknown), `height`, `width` (pixels), `path`, `latitude`, `longitude` (NaN unknown).

    Images of other sensors are left out. Raises `ValueError` that names file and column for a table of another form.
    """
    parquet = import_extra("parquet", "pyarrow.parquet", "a list in Parquet")
    arrow = import_extra("parquet", "pyarrow", "a list in Parquet")
    try:
        with parquet.ParquetFile(path) as table:
            _check_columns(path, table.schema_arrow, table.metadata.num_rows)
            parts = list(_batches(path, table, sensors))
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable Parquet file: {one_line(error)}; download it again") from None
    if not (n_images := sum(len(p) for p in parts)):
        raise ValueError(f"{path} lists no image of {', '.join(sensors)}")
    widest = max(parts, key=lambda p: int(p.dtype["path"].itemsize)).dtype
    images = np.empty(n_images, widest)
    start = 0
    for part in parts:
        images[start : start + len(part)] = part
        start += len(part)
    return images


def _check_columns(path: Path, schema: Any, n_rows: int) -> None:
    if n_rows > _MAX_ROWS:
        raise ValueError(f"{path} has {n_rows:,} rows, expected at most {_MAX_ROWS:,}")
    if missing := [name for name in _LISTS if name not in schema.names]:
        raise ValueError(f"{path} has no column {', '.join(missing)} (it has {', '.join(schema.names)})")
    for name in _LISTS:
        kind = str(schema.field(name).type)
        if not kind.startswith(("list<", "large_list<")):
            raise ValueError(f"{path}: column {name} is {kind}, expected a list for each footprint")


def _batches(path: Path, table: Any, sensors: Sequence[str]) -> Iterator[NDArray[Any]]:
    place = [name for name in _PLACE if name in table.schema_arrow.names]
    first = 0
    for batch in table.iter_batches(_BATCH, columns=[*_LISTS, *place]):
        yield _images(path, batch, first, sensors)
        first += batch.num_rows


def _images(path: Path, batch: Any, first: int, sensors: Sequence[str]) -> NDArray[Any]:
    """Records of the images of one batch of rows, of which the first is row `first`."""
    row = np.repeat(np.arange(batch.num_rows), _lengths(path, batch, first))  # [I]
    flat = {name: batch.column(name).flatten() for name in _LISTS}  # [I]
    paths = np.array(flat["path"].cast("binary").to_pylist(), object)
    codes = np.array([sensors.index(s) if s in sensors else _OTHER for s in flat["sensor"].to_pylist()], np.uint8)
    kept = np.flatnonzero((codes != _OTHER) & np.array([p is not None for p in paths], bool))
    width = max((len(p) for p in paths[kept]), default=1)
    if width > _MAX_PATH:
        raise ValueError(f"{path}: a path of {width} bytes, expected at most {_MAX_PATH}")
    fields = [("row", "i8"), ("sensor", "u1"), ("gsd", "f4"), ("time", "i8"), ("height", "i4"), ("width", "i4")]
    images = np.zeros(len(kept), [*fields, ("latitude", "f8"), ("longitude", "f8"), ("path", f"S{max(width, 1)}")])
    images["row"], images["sensor"], images["path"] = first + row[kept], codes[kept], paths[kept]
    images["gsd"] = _plain(flat["gsd"].cast("float32"), np.nan, np.float32)[kept]
    seconds = flat["timestamp"].cast("timestamp[s]", safe=False).cast("int64")
    images["time"] = _plain(seconds, np.iinfo(np.int64).min, np.int64)[kept]
    for name, column in (("height", "img_height"), ("width", "img_width")):
        images[name] = _plain(flat[column].cast("int32"), 0, np.int32)[kept]
    for name in _PLACE:
        images[name] = np.nan
        if name in batch.schema.names:
            images[name] = _plain(batch.column(name).cast("float64"), np.nan, np.float64)[row[kept]]
    return images


def _lengths(path: Path, batch: Any, first: int) -> NDArray[np.int64]:
    """How many images each row has, `[N]`; raises `ValueError` where its lists differ in length."""
    lengths = {name: _plain(batch.column(name).value_lengths(), 0, np.int64) for name in _LISTS}
    expected = lengths["path"]
    for name, found in lengths.items():
        for i in np.flatnonzero(found != expected):
            raise ValueError(f"{path}: row {first + i} has {expected[i]} paths but {found[i]} entries of {name}")
    return expected


def _plain(array: Any, missing: float, dtype: type) -> NDArray[Any]:
    """An Arrow array as NumPy values, `missing` where it has none."""
    return np.asarray(array.fill_null(missing).to_numpy(zero_copy_only=False), dtype)
