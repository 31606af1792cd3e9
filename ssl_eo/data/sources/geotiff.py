"""Any folder of GeoTIFFs: one raster, or several co-registered ones, a place; whole or cut into windows.

Each entry of `tiles` says which rasters are of one sensor, by a pattern with a `{key}`: rasters of one key show one
place. The first tile leads: windows are cut on its pixels, and other tiles are read where these lie on the ground, in
pixels of their own. `meta["group"]` is what samples have in common: their cell where the split is one of cells, else
the raster of windows.

N places, T tiles, C bands, H W pixels of a raster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE
from ssl_eo.data.sources._columns import Columns, cached_columns, rows_in_cells
from ssl_eo.data.sources._content import content_of_some
from ssl_eo.data.sources._patterns import FileMatch, list_files, match_files
from ssl_eo.data.sources._place_labels import LabelKind, PlaceLabels, read_label_table
from ssl_eo.data.sources._raster_tiles import RasterTile, TileConfig
from ssl_eo.data.sources._rasters import Box, Rasters, ground_of, matching_box
from ssl_eo.data.sources._side_files import printable
from ssl_eo.data.sources._splits import cell_name, check_cell, name_split
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.seeding import numpy_generator

__all__ = ["Config", "Source", "TileConfig"]

_N_HANDLES = 32  # open rasters, beside those of a sample
_N_PROBES = 100  # rasters that are tried for one that can be read
_HEADER = np.dtype([("size", "<i4", 2), ("place", "<f8", 2)])  # (H, W), 0 if unreadable; (latitude, longitude) or NaN


@dataclass
class Config:
    """Which files, how they are cut, what they are labelled with."""

    root: str = field(metadata=FREE)  # folder of the rasters, or a .txt file that lists them, one path a line
    tiles: list[TileConfig]  # the sensors of a place; the first leads
    window_px: int | None = None  # side of a window in pixels of the first tile; None: whole rasters
    stride_px: int | None = None  # from one window to the next; None: window_px
    rows_ratio: tuple[float, float] = (0.0, 1.0)  # part of a raster's height: only windows that lie wholly in it
    split: Literal["train", "val", "test", "all"] = "all"  # of those of split_by; all: every place
    split_by: Literal["geography", "name"] = "geography"  # cells of latitude and longitude, or a hash of the key
    cell_deg: float = 0.5  # side of a cell of the split, degrees of latitude and of longitude
    split_seed: int = 0  # of either split
    label_pattern: str | None = None  # class maps: rasters of one band on the first tile's grid, with {key}
    label_csv: str | None = None  # a label a place: a CSV file with a column `key`, its path relative to root
    label_column: str = "label"  # of label_csv: names or numbers of classes, or numbers to predict
    label_kind: LabelKind = "class"  # of label_csv, and of {label} in a pattern: number for regression
    n_statistics_windows: int = 256  # to measure statistics on, drawn once for all
    statistics_seed: int = 0  # of that draw

    def __post_init__(self) -> None:
        if not self.tiles:
            raise ValueError("tiles is empty: name at least one sensor")
        if self.tiles[0].optional:
            raise ValueError("tiles[0] cannot be optional: windows are cut on its pixels")
        for key in ("window_px", "stride_px", "n_statistics_windows"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        first, last = self.rows_ratio
        if not 0 <= first < last <= 1:
            raise ValueError(f"rows_ratio must rise from 0 at least to 1 at most, got {list(self.rows_ratio)}")
        if self.window_px is None and (self.stride_px is not None or self.rows_ratio != (0.0, 1.0)):
            raise ValueError("stride_px and rows_ratio need window_px: rasters are not cut")
        check_cell(self.cell_deg)
        ways = {"label_pattern": self.label_pattern, "label_csv": self.label_csv}
        ways["{label} in the first pattern"] = self.tiles[0].pattern if "{label}" in self.tiles[0].pattern else None
        if len(given := [name for name, value in ways.items() if value is not None]) > 1:
            raise ValueError(f"labels come from one place, got {' and '.join(given)}")
        if self.label_kind == "number" and (not given or self.label_pattern is not None):
            raise ValueError("label_kind: number needs label_csv, or {label} in the first pattern, the numbers")


class Source:
    """A `Source` (see `ssl_eo.data.types`) of GeoTIFFs. Each process opens them anew, a bounded number at a time."""

    def __init__(self, cfg: Config) -> None:
        self._cfg, self._root = cfg, Path(cfg.root)
        self._tiles = [RasterTile(tile) for tile in cfg.tiles]
        names = [tile.name for tile in self._tiles]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tiles: {', '.join(sorted(twice))} is named twice; tell them apart by what")
        self._folder = self._root if self._root.is_dir() else self._root.parent
        self._rasters = Rasters(self._folder, _N_HANDLES + len(names))
        self._list_places()
        try:
            self._learn()
            self._cut()
            self._measure()
        finally:
            self._rasters.close()  # workers inherit no open handle

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return {tile.name: tile.schema for tile in self._tiles}

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._labels.names

    @property
    def chunk_size(self) -> int:
        return 16

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Sample:
        place, top, left = self._window(index)
        reference = self._open(0, place)
        box = self._box(reference, top, left)
        tiles: dict[str, Tile] = {}
        meta: dict[str, Any] = {}
        for t, tile in enumerate(self._tiles):
            if not self._names[t][place] and tile.cfg.optional:
                continue
            file = self._open(t, place)
            own_box = matching_box(reference, box, file) if t else box
            ground, date = ground_of(file, own_box), self._dates[t][place].decode()
            tiles[tile.name] = tile.read(self._rasters, self._name(t, place), own_box, ground, date)
            if t == 0 and ground is not None:
                meta = {"latitude": ground.latitude, "longitude": ground.longitude}
        if (taken := tiles[self._tiles[0].name].date) is not None:
            meta["date"] = taken
        if (group := self._group(place)) is not None:
            meta["group"] = group
        return Sample(self.locate(index)[0], tiles, meta, self._label(place, box))

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample."""
        place, top, left = self._window(index)
        key = printable(self._keys[place])
        return (key if self._cfg.window_px is None else f"{key}_{top}_{left}"), printable(self._names[0][place])

    def fingerprint(self) -> str:
        # The schema holds the statistics, and so depends on the pixels, unless statistics were given.
        windows = self._cfg.window_px, self._cfg.stride_px, *self._first_rows[self._first_rows > 0].tolist()
        digest = blake2b(f"{self.schema!r} {windows} {self.label_names}".encode(), digest_size=16)
        labels = self._labels.values
        for array in (self._places, self._ends, self._keys, labels, self._maps, *self._names, *self._dates):
            digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        columns = [names[self._places] for names in (*self._names, self._maps) if len(names)]
        for names in columns:
            for name in names:
                with suppress(OSError):  # it may be gone: its sample is bad then
                    digest.update(f"{self._rasters.size_bytes(os.fsdecode(name)) if name else 0} ".encode())
        is_measured = [tile.statistics is None for tile in self._cfg.tiles]  # class maps, which are last, never are
        for names in (names for t, names in enumerate(columns) if t == len(is_measured) or not is_measured[t]):
            digest.update(self._content(names))
        return digest.hexdigest()

    def _content(self, names: NDArray[np.bytes_]) -> bytes:
        return content_of_some(len(names), lambda i: self._folder / os.fsdecode(names[i]))

    def _list_places(self) -> None:
        """Keys, and by tile the names and dates of files, as arrays of bytes `[N]`: workers share their memory."""
        cfg = self._cfg
        files = list_files(self._root)
        maps = {} if cfg.label_pattern is None else match_files("label_pattern", cfg.label_pattern, files)
        of_maps = {match.name for match in maps.values()}
        first = [name for name in files if name not in of_maps]  # a class map is no raster of the first tile
        found = [
            match_files(f"tiles[{t}].pattern", tile.pattern, files if t else first) for t, tile in enumerate(cfg.tiles)
        ]
        required = [(t, by_key) for t, by_key in enumerate(found) if not cfg.tiles[t].optional]
        for t, by_key in required:
            if not by_key:
                shown = ", ".join(printable(os.fsencode(name)) for name in files[:5])
                raise ValueError(
                    f"tiles[{t}].pattern: none of the {len(files)} files of {cfg.root} fits {cfg.tiles[t].pattern!r}"
                    f" (found: {shown or 'nothing'}{', ...' if len(files) > 5 else ''})"
                )
        keys = sorted(set().union(*(by_key for _, by_key in required)))
        if not any(all(key in by_key for _, by_key in required) for key in keys):
            patterns = ", ".join(repr(cfg.tiles[t].pattern) for t, _ in required)
            raise ValueError(
                f"tiles: no key has a raster of each of {patterns}; is {{key}} the same part of the paths?"
            )
        self._keys = _bytes(keys)
        self._names = [_column(by_key, keys, "name") for by_key in found]
        self._dates = [_column(by_key, keys, "date") for by_key in found]
        self._labels = PlaceLabels()
        self._maps = np.empty(0, "S1")  # class map of each place
        if cfg.label_pattern is not None:
            self._maps = _column(maps, keys, "name")
        elif cfg.label_csv is not None:
            table = read_label_table(self._folder / cfg.label_csv, cfg.label_column)
            self._labels = PlaceLabels.of([table.get(key, "") for key in keys], cfg.label_kind, "label_csv")
        elif "{label}" in cfg.tiles[0].pattern:
            texts = [found[0][key].label if key in found[0] else "" for key in keys]
            self._labels = PlaceLabels.of(texts, cfg.label_kind, "tiles[0].pattern")

    def _learn(self) -> None:
        """What each tile holds, from the first of its rasters that can be used."""
        for t, tile in enumerate(self._tiles):
            places = np.flatnonzero(self._names[t] != b"")[:_N_PROBES]
            last: Exception | None = None
            for place in places.tolist():
                try:
                    tile.learn(self._open(t, place))
                    break
                except (OSError, ValueError) as error:
                    last = error
            else:
                raise ValueError(f"tiles[{t}]: none of {len(places)} rasters can be used; the last: {last}")

    def _cut(self) -> None:
        """Which places belong to the split, and how many samples there are up to the end of each of them."""
        cfg, n = self._cfg, len(self._keys)
        self._places, sizes = np.arange(n), np.zeros((n, 2), np.int64)
        self._centres = np.empty((0, 2))  # degrees, of each place; empty where the split is not one of cells
        if cfg.window_px is not None or cfg.split != "all":
            rows = self._headers().rows
            sizes = rows["size"].astype(np.int64)  # [N, 2]
            if cfg.split != "all" and cfg.split_by == "geography":
                self._centres = np.array(rows["place"])
                latitude, longitude = self._centres.T
                self._places = rows_in_cells(latitude, longitude, cfg.split, cfg.cell_deg, cfg.split_seed)
        if cfg.split != "all" and cfg.split_by == "name":
            of_key = [name_split(printable(key), cfg.split_seed) for key in self._keys]
            self._places = np.flatnonzero(np.array(of_key) == cfg.split)
        if not len(self._places):
            ground = f"cells of {cfg.cell_deg} degrees" if cfg.split_by == "geography" else "hashes of keys"
            raise ValueError(f"split: no place of {cfg.root} is in {cfg.split!r} ({ground})")
        self._grids = np.ones((n, 2), np.int64)  # rows and columns of windows: whole ones, or one of a smaller raster
        self._first_rows = np.zeros(n, np.int64)  # of windows
        if cfg.window_px is not None:
            self._grids += np.maximum(sizes - cfg.window_px, 0) // self._stride_px
            self._keep_rows(sizes[:, 0], cfg.window_px)
        self._ends = np.cumsum(self._grids.prod(axis=1)[self._places])
        known = sizes[sizes.any(axis=1)]
        if cfg.window_px is not None and (known >= cfg.window_px).all():
            self._fix_shapes()

    def _keep_rows(self, heights: NDArray[np.int64], window_px: int) -> None:
        """Leave out windows beyond `rows_ratio`; a raster may keep none."""
        if self._cfg.rows_ratio == (0.0, 1.0):
            return
        first, last = (np.rint(ratio * heights) for ratio in self._cfg.rows_ratio)  # [N] pixels
        self._first_rows = np.ceil(first / self._stride_px).astype(np.int64)
        ends = np.floor((last - window_px) / self._stride_px).astype(np.int64) + 1
        self._grids[:, 0] = np.clip(np.minimum(ends, self._grids[:, 0]) - self._first_rows, 0, None)
        if not self._grids[self._places].prod(axis=1).any():
            raise ValueError(f"rows_ratio: no window of {window_px} pixels lies in {list(self._cfg.rows_ratio)}")

    def _fix_shapes(self) -> None:
        """All windows are whole: tiles have one shape. It is that of the first place that has them."""
        for t, tile in enumerate(self._tiles):
            for place in np.flatnonzero((self._names[t] != b"") & (self._names[0] != b""))[:_N_PROBES]:
                with suppress(OSError, ValueError):
                    reference = self._open(0, int(place))
                    box = self._box(reference, 0, 0)
                    box = matching_box(reference, box, self._open(t, int(place))) if t else box
                    tile.schema = replace(tile.schema, shape=box[2:])
                    break

    def _headers(self) -> Columns:
        """Size and position of the first tile's rasters. Opening them takes long, so it is done once."""

        def build() -> NDArray[Any]:
            rows = np.zeros(len(self._keys), _HEADER)
            rows["place"] = np.nan
            for place in range(len(rows)):
                with suppress(OSError, ValueError):  # its sample is bad, and found so when it is read
                    file = self._open(0, place)
                    rows["size"][place] = file.shape
                    if (ground := ground_of(file, (0, 0, *file.shape))) is not None:
                        rows["place"][place] = ground.latitude, ground.longitude
            return rows

        def facts() -> Iterator[str]:
            for name in map(os.fsdecode, self._names[0]):
                yield name  # empty for a place without this raster, which has a row all the same
                with suppress(OSError):
                    status = (self._folder / name).stat()
                    yield f"{status.st_size} {status.st_mtime_ns}" if name else ""

        return cached_columns(self._folder, "geotiff", facts(), build)

    def _measure(self) -> None:
        cfg = self._cfg
        rng = numpy_generator(cfg.statistics_seed, "geotiff statistics")
        n = min(cfg.n_statistics_windows, len(self))
        drawn = np.sort(rng.choice(len(self), n, replace=False)) if n < len(self) else np.arange(n)
        samples, error = [], None
        for index in drawn.tolist():
            try:
                samples.append(self.read(index))
            except (OSError, ValueError) as problem:
                error = problem
        if len(samples) <= n // 2:
            raise ValueError(
                f"root: of {n} samples of {cfg.root} only {len(samples)} can be used; the last problem: {error}"
            )
        for t, tile in enumerate(self._tiles):
            try:
                tile.measure((s.tiles[tile.name] for s in samples if tile.name in s.tiles), rng)
            except ValueError as problem:
                raise ValueError(f"tiles[{t}].{problem}") from None

    @property
    def _stride_px(self) -> int:
        return self._cfg.stride_px or self._cfg.window_px or 0

    def _window(self, index: int) -> tuple[int, int, int]:
        """(place, top, left) of a sample, in pixels of the first tile."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = int(np.searchsorted(self._ends, index, side="right"))
        place = int(self._places[row])
        first = int(self._ends[row - 1]) if row else 0
        i, j = divmod(index - first, int(self._grids[place, 1]))
        return place, int(self._first_rows[place] + i) * self._stride_px, j * self._stride_px

    def _box(self, reference: Any, top: int, left: int) -> Box:
        """The window at (top, left), as far as the raster goes."""
        size = self._cfg.window_px or max(reference.shape)
        return top, left, min(size, reference.height - top), min(size, reference.width - left)

    def _group(self, place: int) -> str | None:
        if len(self._centres):
            latitude, longitude = self._centres[place]
            return cell_name(float(latitude), float(longitude), self._cfg.cell_deg)
        return None if self._cfg.window_px is None else printable(self._keys[place])

    def _name(self, t: int, place: int) -> str:
        return os.fsdecode(self._names[t][place])

    def _open(self, t: int, place: int) -> Any:
        if not (name := self._name(t, place)):
            key, tile = printable(self._keys[place]), self._cfg.tiles[t]
            hint = f": set tiles[{t}].optional if places may lack it" if t else ""
            raise ValueError(f"{key} has no raster of tile {self._tiles[t].name} ({tile.pattern}){hint}")
        return self._rasters.open(name)

    def _label(self, place: int, box: Box) -> Any:
        key = printable(self._keys[place])
        if len(self._labels):
            if (label := self._labels.of_place(place)) is None:
                what = "label" if self._cfg.label_kind == "class" else "finite number"
                raise ValueError(f"{key} has no {what} in {self._cfg.label_csv or 'the pattern'}")
            return label
        if self._cfg.label_pattern is None:
            return None
        if not (name := os.fsdecode(self._maps[place])):
            raise ValueError(f"{key} has no class map ({self._cfg.label_pattern})")
        file = self._rasters.open(name)
        map_box = matching_box(self._open(0, place), box, file)
        if file.count != 1 or np.dtype(file.dtypes[0]).kind not in "iu" or map_box[2:] != box[2:]:
            raise ValueError(
                f"{file.name} has {file.count} bands of {file.dtypes[0]} and {map_box[2:]} pixels where the first tile"
                f" has {box[2:]}; a class map has one band of integers and as many pixels"
            )
        return self._rasters.read(name, [0], map_box)[0]  # [H, W]


def _column(by_key: Mapping[str, FileMatch], keys: list[str], what: Literal["name", "date"]) -> NDArray[np.bytes_]:
    return _bytes([getattr(by_key[key], what) if key in by_key else "" for key in keys])


def _bytes(texts: list[str]) -> NDArray[np.bytes_]:
    return np.array([os.fsencode(text) for text in texts], np.bytes_)
