"""MMEarth, MMEarth64 and MMEarth100k (Nedungadi et al. 2024): places seen by several sensors, from the HDF5 files.

`<root>/<stem>.h5` holds an array for each product; `<stem>_tile_info.json` and `<stem>_band_stats.json` lie beside it.
`datasets_meta/datasets/mmearth.yaml` says which array, planes and codes make which tile. Only the arrays of the tiles
that are asked for are read, each as one chunk that is inflated without HDF5's lock.

A place was seen at Level-1C or at Level-2A, which are two tiles with statistics of their own. A tile that holds nothing
but no-data is left out of its sample. Class maps are given as class numbers of their sensor, not as stored codes.

N rows of the file, C bands, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, check_names, suggest
from ssl_eo.data.sources._columns import rows_in_cells
from ssl_eo.data.sources._hdf5_rows import HDF5Rows
from ssl_eo.data.sources._mmearth import Table, find_archive, published_statistics, tile_columns
from ssl_eo.data.sources._side_files import dataset_card
from ssl_eo.data.sources._splits import check_cell
from ssl_eo.data.statistics import merge_statistics, tile_statistics
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import POLARIZATIONS, Sensor, load_sensor

__all__ = ["Config", "Source"]

_UNKNOWN = 254  # in a table of class codes: no class, and not no-data either
_CIRRUS = "B10"
_RUN = 16  # samples read in a row, at least


@dataclass
class Config:
    """Which tiles of which samples. The release has no hold-out; `split` makes one by geography."""

    root: str = field(metadata=FREE)  # folder of the .h5 file and its side files, or that file
    # Of sentinel2_l1c, sentinel2_l2a, sentinel1_grd_ascending, sentinel1_grd_descending, dem, canopy_height,
    # dynamic_world, worldcover, sentinel2_scl, sentinel2_cloud_mask; nothing else is read.
    tiles: list[str] = field(default_factory=lambda: ["sentinel2_l1c", "sentinel2_l2a"])
    required: list[str] = field(default_factory=list)  # those that every sample must have; others may be missing
    cirrus_band: bool = True  # B10 of Level-1C; without it both levels have the same 12 bands
    polarizations: list[str] = field(default_factory=lambda: ["VV", "VH"])  # of Sentinel-1; HH, HV are rarely there
    split: Literal["train", "val", "test", "all"] = "train"  # 70 : 10 : 20 of the cells of a grid; all: every tile
    cell_deg: float = 0.5  # side of a cell, degrees of latitude and of longitude
    split_seed: int = 0  # which cells
    statistics: Literal["archive", "measured"] = "archive"  # <stem>_band_stats.json, or of evenly spaced samples
    n_statistics_samples: int = 1024  # to measure on

    def __post_init__(self) -> None:
        check_names("tiles", self.tiles)
        check_names("polarizations", self.polarizations)
        if extra := [name for name in self.required if name not in self.tiles]:
            raise ValueError(f"required: {', '.join(extra)} must be in tiles too ({', '.join(self.tiles)})")
        if not set(self.polarizations) <= set(POLARIZATIONS):
            raise ValueError(f"polarizations must be some of {', '.join(POLARIZATIONS)}, got {self.polarizations}")
        check_cell(self.cell_deg)
        if self.n_statistics_samples < 1:
            raise ValueError(f"n_statistics_samples must be at least 1, got {self.n_statistics_samples}")


class Source:
    """A `Source` (see `ssl_eo.data.types`) of MMEarth. The file is opened once in every process that reads."""

    label_names: tuple[str, ...] = ()

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._file = HDF5Rows(find_archive(cfg.root))
        try:
            self._file.open()
        except OSError as error:
            raise ValueError(f"root: {self._file.path} is not a readable HDF5 file: {error}") from None
        try:
            self._columns = tile_columns(self._file)
            self._tiles = _stored_tiles(cfg, self._file, len(self._entries))
            self._rows = self._chosen_rows()
            n_together = max(self._file.rows_per_chunk(tile.array) for tile in self._tiles.values())
            self._chunk_size = n_together * -(-_RUN // n_together)  # whole chunks of a file that was chunked anew
            if cfg.statistics == "measured":
                self._measure()
        finally:
            self._file.close()  # workers inherit no open handle

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return {name: tile.schema for name, tile in self._tiles.items()}

    @property
    def chunk_size(self) -> int:
        return self._chunk_size

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        row = int(self._rows[index])
        entry = dict(zip(self._entries.dtype.names or (), self._entries[row].item(), strict=True))
        date = entry["date"].isoformat()
        arrays: dict[str, NDArray[Any]] = {}
        tiles = {}
        for name, tile in self._tiles.items():
            if not tile.may_be_in(entry):
                continue
            if tile.array not in arrays:
                arrays[tile.array] = self._file.read(tile.array, row)
            pixels = tile.pixels(arrays[tile.array])  # [C, H, W]
            if _holds_data(pixels, tile.schema.sensor.no_data):
                when = date if tile.array.startswith("sentinel2") else None
                tiles[name] = Tile(pixels, tile.schema.bands, tile.schema.gsd_m, when)
        if missing := [name for name in self._cfg.required if name not in tiles]:
            raise ValueError(f"row {row} of {self._file.path} holds no data of {', '.join(missing)}")
        return Sample(entry["id"].decode(), tiles, _meta(entry, date))

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample. The key is the tile's id."""
        return self._entries[int(self._rows[index])]["id"].decode(), self._file.path.name

    def fingerprint(self) -> str:
        digest = blake2b(repr(self.schema).encode(), digest_size=16)
        digest.update(str(self._file.path.stat().st_size).encode())
        for array in (self._entries, self._rows):
            digest.update(array.view(np.uint8).data)
        return digest.hexdigest()

    @property
    def _entries(self) -> Table:
        return self._columns.rows

    def _chosen_rows(self) -> NDArray[np.int32]:
        """Rows of the split that may have a tile, and every required one."""
        cfg, entries = self._cfg, self._entries
        held = {name: np.broadcast_to(t.may_be_in(entries), len(entries)) for name, t in self._tiles.items()}  # [N]
        chosen = np.logical_or.reduce([*held.values()])
        for name in cfg.required:
            chosen &= held[name]
        rows = np.flatnonzero(chosen)
        if cfg.split != "all":
            places = entries["latitude"][rows], entries["longitude"][rows]
            rows = rows[rows_in_cells(*places, cfg.split, cfg.cell_deg, cfg.split_seed)]
        if not len(rows):
            wanted = ", ".join(cfg.required or cfg.tiles)
            raise ValueError(f"split: no sample of {self._file.path} is in {cfg.split!r} and has {wanted}")
        return rows.astype(np.int32)

    def _measure(self) -> None:
        """Statistics of evenly spaced samples of the split, in place of those of the archive."""
        n = min(self._cfg.n_statistics_samples, len(self))
        found = merge_statistics(self.schema, (tile_statistics(s, self.schema) for s in self._readable(n)))
        for name, tile in self._tiles.items():
            if not tile.schema.sensor.is_categorical:
                std = tuple(float(s) if s > 0 else 1.0 for s in found[name].std)
                tile.schema = replace(tile.schema, mean=tuple(found[name].mean.tolist()), std=std)

    def _readable(self, n: int) -> Iterable[Sample]:
        for i in range(n):
            try:
                yield self.read(i * len(self) // n)
            except (OSError, ValueError):  # the loader quarantines it when its turn comes
                continue


@dataclass
class _StoredTile:
    """How a tile lies in the file: `channels` of an array, and the class numbers of its codes if it is a class map."""

    schema: TileSchema
    array: str
    channels: slice | list[int]
    classes: NDArray[np.uint8] | None  # by code, the last one for all codes that are higher
    level: str | None  # "l1c" or "l2a": only samples of this level have it
    orbit: str | None
    polarizations: int  # bits of those that are read

    def may_be_in(self, entries: Any) -> Any:
        """False where the table says that the tile is not there: of one entry, or `[N]` of all."""
        if self.level is not None:
            return entries["is_l2a"] == (self.level == "l2a")
        if self.orbit is not None:
            return (entries[self.orbit] & self.polarizations) != 0
        return True

    def pixels(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The tile `[C, H, W]` from a row of its array."""
        pixels = stored[self.channels]
        if self.classes is None:
            return pixels
        classes = self.classes.take(pixels, mode="clip")
        if (classes == _UNKNOWN).any():
            codes = sorted(set(pixels[classes == _UNKNOWN].tolist()))
            raise ValueError(f"{self.array} holds codes that its legend does not have: {codes[:5]}")
        return classes


def _stored_tiles(cfg: Config, file: HDF5Rows, n_rows: int) -> dict[str, _StoredTile]:
    card = dataset_card("mmearth")
    known = card["tiles"]
    for name in cfg.tiles:
        if name not in known:
            raise ValueError(f"tiles: there is no {name!r}{suggest(name, list(known))} (there are {', '.join(known)})")
    return {name: _stored_tile(name, known[name], cfg, file, n_rows, card["gsd_m"]) for name in cfg.tiles}


def _stored_tile(
    name: str, layout: Mapping[str, Any], cfg: Config, file: HDF5Rows, n_rows: int, gsd_m: float
) -> _StoredTile:
    sensor, array, planes = load_sensor(name), file.dataset(layout["array"]), layout["bands"]
    where = f"{layout['array']} in {file.path}"
    if array.ndim != 4 or array.shape[:2] != (n_rows, len(planes)):
        raise ValueError(f"tiles: {where} has shape {array.shape}, expected ({n_rows}, {len(planes)}, height, width)")
    wanted = [band for band in planes if band is not None and (cfg.cirrus_band or band != _CIRRUS)]
    orbit = layout.get("orbit")
    if orbit is not None:
        wanted = cfg.polarizations
    channels = [planes.index(band) for band in wanted]
    classes = _class_table(layout, sensor) if sensor.is_categorical else None
    if classes is not None and array.dtype.kind != "u":
        raise ValueError(f"tiles: {where} has dtype {array.dtype}, expected unsigned integers")
    mean, std = [0.0] * len(planes), [1.0] * len(planes)
    if classes is None and cfg.statistics == "archive":
        mean, std = published_statistics(file.path, layout["statistics"], len(planes))
    try:
        schema = TileSchema(
            sensor=sensor,
            bands=tuple(wanted),
            dtype=str(array.dtype if classes is None else classes.dtype),
            shape=tuple(array.shape[2:]),
            gsd_m=gsd_m,
            mean=tuple(mean[i] for i in channels),
            std=tuple(std[i] for i in channels),
            optional=name not in cfg.required,
        )
    except ValueError as error:
        raise ValueError(f"tiles: {where}: {error}") from None
    bits = sum(1 << POLARIZATIONS.index(p) for p in cfg.polarizations)
    return _StoredTile(schema, layout["array"], _slice_of(channels), classes, layout.get("level"), orbit, bits)


def _class_table(layout: Mapping[str, Any], sensor: Sensor) -> NDArray[np.uint8]:
    """Class number by stored code, [n codes + 1]."""
    no_data = max(sensor.no_data)
    codes = {**layout["classes"], **dict.fromkeys(layout["no_data_codes"], no_data)}
    table = np.full(max(codes) + 2, _UNKNOWN, np.uint8)
    table[list(codes)] = list(codes.values())
    return table


def _slice_of(channels: list[int]) -> slice | list[int]:
    """A slice, which copies nothing, where the channels follow each other."""
    first, after = channels[0], channels[-1] + 1
    return slice(first, after) if channels == list(range(first, after)) else channels


def _holds_data(pixels: NDArray[Any], no_data: Sequence[float]) -> bool:
    """Whether any of `pixels [C, H, W]` was measured. Mostly the first one was, and then no other is looked at."""
    if any(math.isfinite(value) and value not in no_data for value in pixels[:, 0, 0].tolist()):
        return True
    measured = np.isfinite(pixels)
    for value in no_data:
        measured &= pixels != value
    return bool(measured.any())


def _meta(entry: Mapping[str, Any], date: str) -> dict[str, Any]:
    """What is known of the place. `era5` has mean, lowest and highest temperature (K) and precipitation (m) of the
    previous month, of this one and of the year.
    """
    meta: dict[str, Any] = {name: entry[name] for name in ("latitude", "longitude")}
    meta |= {"date": date, "month": entry["date"].month}
    meta |= {name: entry[name] for name in ("biome", "eco_region") if entry[name] >= 0}
    if np.isfinite(entry["era5"]).any():
        meta["era5"] = entry["era5"].tolist()
    return meta
