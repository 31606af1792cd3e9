"""SSL4EO-S12 v1 (Wang et al. 2023): places in four seasons, seen by Sentinel-1 (`s1`) and Sentinel-2 (`s2c`, `s2a`).

`<product>/<place>/<scene>/<band>.tif`, one band a file, with a `metadata.json` in each scene. `s2c` is Level-1C and
`s2a` Level-2A; their scenes of one season may be of different days. Bands stay at the resolution they were measured at.

Tiles are `sentinel1_grd`, `sentinel2_l1c@10m`, `@20m`, `@60m` and the same of `sentinel2_l2a`. With `seasons: tiles`
each is there for every season, numbered in order of time: `sentinel1_grd@0`, `sentinel2_l1c@10m_0`, ...

N places, C bands, H W pixels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, suggest
from ssl_eo.data.sources._band_files import BandFiles, place_of
from ssl_eo.data.sources._columns import Columns, cached_columns, rows_in_cells
from ssl_eo.data.sources._rasters import check_utf8
from ssl_eo.data.sources._side_files import dataset_card, read_json_object
from ssl_eo.data.sources._splits import check_cell
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import load_sensor

__all__ = ["Config", "Source"]

PRODUCTS = ("s2c", "s2a", "s1")
N_SEASONS = 4

_TIME = r"[0-9]{8}T[0-9]{6}"
_SCENE = {
    "s1": re.compile(rf"S1[A-D]_IW_GRDH_1S[A-Z]{{2}}_{_TIME}_{_TIME}_[0-9A-F]{{6}}_[0-9A-F]{{6}}_[0-9A-F]{{4}}"),
    "s2c": re.compile(rf"{_TIME}_{_TIME}_T[0-9A-Z]{{5}}"),
    "s2a": re.compile(rf"{_TIME}_{_TIME}_T[0-9A-Z]{{5}}"),
}
_PLACE = re.compile(r"[0-9]{1,16}")
_ROW = np.dtype(
    [
        ("place", "S16"),
        ("s1", "S67", (N_SEASONS,)),  # scene of each season, empty where there is none
        ("s2c", "S38", (N_SEASONS,)),
        ("s2a", "S38", (N_SEASONS,)),
        ("damaged", "?"),  # more scenes than seasons
        ("latitude", "f8"),  # NaN where unknown
        ("longitude", "f8"),
    ]
)
_MAX_JSON_BYTES = 1 << 20  # they have some ten thousand
_FORMAT = "1"  # of the index file: another number makes it anew


@dataclass
class Config:
    """Which products and places, and what a sample is."""

    root: str = field(metadata=FREE)  # folder that holds s1, s2c and s2a, or some of them
    tiles: list[str] | None = None  # names of the tiles, without season, to offer; None: all whose product is there
    seasons: Literal["tiles", "samples"] = "tiles"  # tiles: a sample is a place; samples: a place in one season
    split: Literal["train", "val", "test", "all"] = "train"  # by place; all: every place
    cell_deg: float = 0.5  # side of a cell of the split, degrees of latitude and of longitude
    split_seed: int = 0  # of the split
    metadata: list[str] = field(default_factory=list)  # keys of the scenes' metadata.json that go into sample meta

    def __post_init__(self) -> None:
        check_cell(self.cell_deg)


@dataclass(frozen=True)
class _Kind:
    """The bands of one product that share a resolution: what a tile of any season is made of."""

    name: str  # of the tile, without season
    product: str
    files: tuple[str, ...]
    schema: TileSchema
    size: tuple[int, int]

    def in_season(self, season: int) -> str:
        return f"{self.name}{'_' if '@' in self.name else '@'}{season}"


class Source:
    """A `Source` (see `ssl_eo.data.types`) of SSL4EO-S12 v1, without labels."""

    label_names: tuple[str, ...] = ()
    chunk_size = 1  # a place is files of its own

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._root = Path(cfg.root)
        check_utf8(self._root, "root: ")
        self._kinds = _chosen(_kinds(), cfg.tiles, self._root)
        self._columns = _index(self._root)
        products = {kind.product for kind in self._kinds}
        rows = self._columns.rows
        if cfg.split == "all":
            places = np.arange(len(rows))
        else:
            places = rows_in_cells(rows["latitude"], rows["longitude"], cfg.split, cfg.cell_deg, cfg.split_seed)
        has = {p: rows[p][places] != b"" for p in products}  # [n, seasons]
        seen = np.logical_or.reduce(list(has.values()))  # [n, seasons]
        seen |= rows["damaged"][places, None]  # reading such a place says what is wrong
        if cfg.seasons == "samples":
            n, self._seasons = np.nonzero(seen)
        else:
            n, self._seasons = np.flatnonzero(seen.any(1)), np.zeros(0, np.int64)
        self._places = places[n]
        if not len(self._places):
            raise ValueError(f"split: no place of {cfg.root} with a scene of {sorted(products)} is in {cfg.split!r}")
        self._schema = dict(self._tile_schemas({p: h[n] for p, h in has.items()}))

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return self._schema

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> Sample:
        row = self._columns.rows[self._places[index]]
        place = row["place"].decode()
        if row["damaged"]:
            for product in PRODUCTS:
                _scenes(self._root / product / place, product)  # says what is wrong
            raise ValueError(f"place {place} was mended: remove {self._columns.path}, the old index")
        tiles, meta = {}, {"latitude": float(row["latitude"]), "longitude": float(row["longitude"])}
        for kind in self._kinds:
            for season, name in self._named(kind, index):
                if not (scene := row[kind.product][season].decode()):
                    continue
                folder = self._root / kind.product / place / scene
                paths = tuple(folder / f"{file}.tif" for file in kind.files)
                pixels = BandFiles(paths, kind.size, np.dtype(kind.schema.dtype))
                tiles[name] = Tile(pixels, kind.schema.bands, kind.schema.gsd_m, _instant(scene))
        for product in dict.fromkeys(kind.product for kind in self._kinds):
            meta.update(self._metadata(row, product, index))
        return Sample(self.locate(index)[0], tiles, meta)

    def locate(self, index: int) -> tuple[str, str]:
        """(key, folders) of a sample."""
        place = self._columns.rows["place"][self._places[index]].decode()
        key = place if self._cfg.seasons == "tiles" else f"{place}_{self._seasons[index]}"
        return key, f"*/{place}"

    def fingerprint(self) -> str:
        rows = self._columns.rows
        digest = blake2b(f"{self._schema!r} {self._cfg.seasons} {self._cfg.metadata}".encode(), digest_size=16)
        for column in ("place", *sorted({kind.product for kind in self._kinds})):
            digest.update(np.ascontiguousarray(rows[column][self._places]).tobytes())
        digest.update(self._seasons.astype("<i8").tobytes())
        return digest.hexdigest()

    def _named(self, kind: _Kind, index: int) -> list[tuple[int, str]]:
        """(season, name) of each tile of a kind in a sample."""
        if self._cfg.seasons == "samples":
            return [(int(self._seasons[index]), kind.name)]
        return [(season, kind.in_season(season)) for season in range(N_SEASONS)]

    def _tile_schemas(self, has: Mapping[str, NDArray[np.bool_]]) -> Iterator[tuple[str, TileSchema]]:
        """`has [n, seasons]` by product: which samples of the split have a scene. What some lack is optional."""
        for kind in self._kinds:
            held = has[kind.product]
            if self._cfg.seasons == "samples":
                mine = held[np.arange(len(held)), self._seasons]
                yield kind.name, replace(kind.schema, optional=not bool(mine.all()))
            else:
                for season in np.flatnonzero(held.any(0)).tolist():
                    yield kind.in_season(season), replace(kind.schema, optional=not bool(held[:, season].all()))

    def _metadata(self, row: Any, product: str, index: int) -> dict[str, Any]:
        """What the configuration asks for, as `<product>_<key>`, or `<product>_<season>_<key>` of several seasons."""
        found: dict[str, Any] = {}
        if not self._cfg.metadata:
            return found
        is_single = self._cfg.seasons == "samples"
        for season in [int(self._seasons[index])] if is_single else range(N_SEASONS):
            if scene := row[product][season].decode():
                path = self._root / product / row["place"].decode() / scene / "metadata.json"
                values = read_json_object(path, _MAX_JSON_BYTES, "the properties of a scene")
                prefix = product if is_single else f"{product}_{season}"
                found |= {f"{prefix}_{key}": values[key] for key in self._cfg.metadata if key in values}
        return found


def _kinds() -> list[_Kind]:
    """All tiles that the archive has, from its YAML."""
    kinds = []
    for product, entry in dataset_card("ssl4eo_s12")["products"].items():
        sensor = load_sensor(entry["sensor"])
        gsds = sorted({band["gsd_m"] for band in entry["bands"].values()})
        for gsd_m in gsds:
            bands = {name: band for name, band in entry["bands"].items() if band["gsd_m"] == gsd_m}
            mean, std = zip(*(band["statistics"] for band in bands.values()), strict=True)
            ((height, width),) = {tuple(band["shape"]) for band in bands.values()}
            schema = TileSchema(sensor, tuple(bands), entry["dtype"], (height, width), gsd_m, mean, std)
            name = sensor.name if len(gsds) == 1 else f"{sensor.name}@{gsd_m:.0f}m"
            kinds.append(_Kind(name, product, tuple(b["file"] for b in bands.values()), schema, (height, width)))
    return kinds


def _chosen(kinds: Sequence[_Kind], names: list[str] | None, root: Path) -> list[_Kind]:
    there = [kind for kind in kinds if (root / kind.product).is_dir()]
    if not there:
        found = [ascii(path.name) for path in sorted(root.iterdir())[:10]] if root.is_dir() else ["no such folder"]
        raise ValueError(
            f"root: {root} holds none of the folders {', '.join(PRODUCTS)} (found: {', '.join(found) or 'nothing'})"
        )
    if names is None:
        return there
    known = [kind.name for kind in kinds]
    for name in names:
        if name not in known:
            raise ValueError(f"tiles: no tile {name!r}{suggest(name, known)} (tiles: {', '.join(known)})")
    chosen = [kind for kind in kinds if kind.name in names]
    if not chosen:
        raise ValueError(f"tiles: none is named (tiles: {', '.join(known)})")
    if missing := sorted({kind.product for kind in chosen} - {kind.product for kind in there}):
        raise ValueError(f"tiles: they need the folder {', '.join(missing)}, which is not in {root}")
    return chosen


def _index(root: Path) -> Columns:
    """One row for each place: made by listing every folder once, then kept."""
    places: dict[str, None] = {}
    facts = ["ssl4eo_s12", _FORMAT]
    for product in PRODUCTS:
        if (root / product).is_dir():
            found = sorted(name for name in os.listdir(root / product) if _PLACE.fullmatch(name))  # noqa: PTH208
            facts += [product, str((root / product).stat().st_mtime_ns), *found]
            places |= dict.fromkeys(found)
    if not places:
        raise ValueError(f"root: {root} holds no place, expected folders such as s2c/0000200 with one for each season")

    def build() -> NDArray[Any]:
        with ThreadPoolExecutor(16) as pool:  # listing waits on the disk
            rows = list(pool.map(lambda place: _row(root, place), sorted(places)))
        return np.array(rows, _ROW)

    return cached_columns(root, "ssl4eo_s12", facts, build)


def _row(root: Path, place: str) -> tuple[Any, ...]:
    """The record of one place, in the order of `_ROW`."""
    scenes: dict[str, list[str]] = {product: [] for product in PRODUCTS}
    damaged = False
    for product in PRODUCTS:
        try:
            scenes[product] = _scenes(root / product / place, product)
        except ValueError:
            damaged = True
    by_season = _seasons_of(scenes)
    latitude = longitude = np.nan
    for product in PRODUCTS:
        for scene in scenes[product][:1]:
            file = "VV.tif" if product == "s1" else "B2.tif"
            with suppress(OSError, ValueError):
                if np.isnan(latitude):
                    latitude, longitude = place_of(root / product / place / scene / file)
    return (place, by_season["s1"], by_season["s2c"], by_season["s2a"], damaged, latitude, longitude)


def _scenes(folder: Path, product: str) -> list[str]:
    """Names of the scenes of a place in order of time, none where there is no folder."""
    if not folder.is_dir():
        return []
    found = [path.name for path in folder.iterdir() if _SCENE[product].fullmatch(path.name)]
    if len(found) > N_SEASONS:
        raise ValueError(f"{folder} holds {len(found)} scenes, expected at most {N_SEASONS}, one for each season")
    for scene in found:
        try:
            datetime.fromisoformat(_instant(scene))
        except ValueError as error:
            raise ValueError(f"{folder / scene}: no time in its name ({error}); unpack it again") from None
    return sorted(found, key=_instant)


def _seasons_of(scenes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The scene of each season by product, "" for none.

    Seasons are counted in order of time in the product with the most scenes. A product that lacks some is matched to
    it so that order is kept and the days between scenes of one season are fewest: else a missing scene would pair all
    that follow it with the wrong season.
    """
    days = {
        product: [date.fromisoformat(_instant(s)[:10]).toordinal() for s in found] for product, found in scenes.items()
    }
    longest = max(days.values(), key=len)
    out = {}
    for product, found in scenes.items():
        ways = combinations(range(len(longest)), len(found))
        best = min(ways, key=lambda way: sum(abs(longest[k] - d) for k, d in zip(way, days[product], strict=True)))
        out[product] = [""] * N_SEASONS
        for season, scene in zip(best, found, strict=True):
            out[product][season] = scene
    return out


def _instant(scene: str) -> str:
    """When a scene was taken, ISO 8601, from the first time in its name."""
    found = re.search(r"(\d{4})(\d{2})(\d{2})T(\d{2})(\d{2})(\d{2})_", scene)
    assert found is not None  # names were matched when they were listed
    year, month, day, hour, minute, second = found.groups()
    return f"{year}-{month}-{day}T{hour}:{minute}:{second}"
