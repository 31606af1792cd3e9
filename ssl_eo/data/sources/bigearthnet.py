"""BigEarthNet (Sumbul et al. 2021; v2: Clasen et al. 2024), pairs of Sentinel-1 and Sentinel-2 with land cover labels.

- v1: `BigEarthNet-v1.0/PATCH/PATCH_B01.tif ...`, `BigEarthNet-S1-v1.0/PATCH/PATCH_VV.tif ...`, labels and pairs in JSON
- v2: `BigEarthNet-S2/SCENE/PATCH/PATCH_B01.tif ...`, `BigEarthNet-S1/SCENE/PATCH/...` and, for class maps,
  `Reference_Maps/SCENE/PATCH/...`; labels, pairs and splits in `metadata.parquet`

Bands stay at the resolution they were measured at: one tile each of 10, 20 and 60 m, and one of radar. `meta["group"]`
of a patch is its cell where the split is one of cells, else the scene that it was cut from, as its name says: the day
and, in v2, the tile.

C bands, K classes, H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, suggest
from ssl_eo.data.sources._band_files import BandFiles, place_of
from ssl_eo.data.sources._bigearthnet import LABELS_JSON, SPLITS, Nomenclature, columns_v1, columns_v2, labels_of
from ssl_eo.data.sources._columns import rows_in_cells
from ssl_eo.data.sources._content import content_of_some
from ssl_eo.data.sources._rasters import check_utf8, open_raster, read_box
from ssl_eo.data.sources._side_files import dataset_card
from ssl_eo.data.sources._splits import cell_name, check_cell
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import load_sensor

__all__ = ["Config", "Source"]

_RADAR = "sentinel1_grd"
_MAPS = "Reference_Maps"
_MAP_SIZE = (120, 120)


@dataclass
class Config:
    """Which version, tiles, patches and labels."""

    root: str = field(metadata=FREE)  # folder that holds the unpacked archives and side files
    version: Literal["auto", "v1", "v2"] = "auto"  # auto: v2 if there is a metadata.parquet
    tiles: list[str] | None = None  # names of the tiles to offer; None: all whose archive is there
    split: Literal["train", "val", "test", "all"] = "train"  # of those of split_by; all: every patch
    split_by: Literal["auto", "official", "geography"] = "auto"  # auto: official where its lists are there
    cell_deg: float = 0.5  # side of a cell of the geographic split, degrees of latitude and of longitude
    split_seed: int = 0  # of the geographic split
    snow_and_clouds: bool = False  # whether to keep patches that are listed as under snow, cloud or shadow
    label: Literal["classes", "map"] = "classes"  # classes: multi-hot [K]; map: class of each pixel (v2)
    n_classes: int = 19  # of the nomenclature: 19, or 43 where the labels say so much

    def __post_init__(self) -> None:
        if self.n_classes not in (19, 43):
            raise ValueError(f"n_classes must be 19 or 43, got {self.n_classes}")
        check_cell(self.cell_deg)


class Source:
    """A `Source` (see `ssl_eo.data.types`) of BigEarthNet. Labels are `[K]` uint8, or `[H, W]` uint8 with 255: none."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._root = Path(cfg.root)
        if not self._root.is_dir():
            raise ValueError(f"root: no such folder: {cfg.root}")
        check_utf8(self._root, "root: ")
        info = dataset_card("bigearthnet")
        self._is_v2 = cfg.version == "v2" or (cfg.version == "auto" and (self._root / "metadata.parquet").is_file())
        self._nomenclature = Nomenclature.from_info(info)
        self._check_version()
        self._folders = self._find_folders(info["folders"][self.version])
        if self._is_v2:
            self._columns = columns_v2(self._root, self._nomenclature)
        else:
            s2, s1 = self._folders["sentinel2"], self._folders.get("sentinel1")
            self._columns = columns_v1(self._root, s2, s1, self._nomenclature)
        self._rows = self._choose_rows()
        self._schema = self._tile_schemas(info)
        self._check_scenes()

    @property
    def version(self) -> str:
        return "v2" if self._is_v2 else "v1"

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return self._schema

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._nomenclature.names(self._cfg.n_classes)

    @property
    def chunk_size(self) -> int:
        return 1  # a patch is files of its own

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        row = self._columns.rows[self._rows[index]]
        patch, radar = row["patch"].decode(), row["radar"].decode()
        if row["damaged"]:
            labels_of(self._folder(patch) / f"{patch}{LABELS_JSON}", self._nomenclature)  # says what is wrong
            raise ValueError(f"the labels of {patch} were mended: remove {self._columns.path}, the old index")
        tiles = {}
        for name, schema in self._schema.items():
            if key := radar if name == _RADAR else patch:
                paths = tuple(self._folder(key) / f"{key}_{band}.tif" for band in schema.bands)
                pixels = BandFiles(paths, schema.shape or _MAP_SIZE, np.dtype(schema.dtype))
                tiles[name] = Tile(pixels, schema.bands, schema.gsd_m, _date(key))
        return Sample(patch, tiles, self._meta(row, patch), self._label(row, patch))

    def locate(self, index: int) -> tuple[str, str]:
        """(key, folder) of a sample."""
        patch = self._columns.rows["patch"][self._rows[index]].decode()
        return patch, str(self._folder(patch).relative_to(self._root))

    def fingerprint(self) -> str:
        cfg = self._cfg
        facts = f"{self.version} {self._schema!r} {cfg.label} {cfg.n_classes}"
        digest = blake2b(facts.encode(), digest_size=16)
        for name in ("patch", "radar", "labels"):
            digest.update(np.ascontiguousarray(self._columns.rows[name][self._rows]).tobytes())
        digest.update(content_of_some(len(self), self._file_of))
        return digest.hexdigest()

    def _file_of(self, index: int) -> Path:
        """One of the files of a sample: its class map where that is the label, else a band."""
        patch = self._columns.rows["patch"][self._rows[index]].decode()
        if self._cfg.label == "map":
            return self._folder(patch, _MAPS) / f"{patch}_reference_map.tif"
        return self._folder(patch) / f"{patch}_B02.tif"

    def _check_version(self) -> None:
        cfg = self._cfg
        if self._is_v2 and not (self._root / "metadata.parquet").is_file():
            raise ValueError(f"version: v2 needs {self._root}/metadata.parquet, which is not there")
        if self._is_v2 and cfg.split_by == "geography":
            raise ValueError("split_by: v2 has official splits that hold out places; take auto or official")
        if self._is_v2 and cfg.label == "classes" and cfg.n_classes == 43:
            raise ValueError("n_classes: v2 names 19 classes; take 19, or the 43 of its maps with label: map")
        if self._is_v2 and cfg.label == "map" and not (self._root / _MAPS).is_dir():
            raise ValueError(f"label: map needs the folder {_MAPS}, which is not in {self._root}")
        if not self._is_v2 and cfg.label == "map":
            raise ValueError("label: v1 has no class maps; take classes, or version v2")

    def _find_folders(self, names: Mapping[str, list[str]]) -> dict[str, Path]:
        folders = {
            what: next(self._root / name for name in known if (self._root / name).is_dir())
            for what, known in names.items()
            if any((self._root / name).is_dir() for name in known)
        }
        if "sentinel2" not in folders:
            found = [ascii(p.name) for p in sorted(self._root.iterdir())[:10]]
            raise ValueError(
                f"root: {self._root} holds no folder {' or '.join(names['sentinel2'])} of BigEarthNet {self.version}"
                f" (found: {', '.join(found) or 'nothing'}); unpack the archives there"
            )
        return folders

    def _choose_rows(self) -> NDArray[np.int64]:
        cfg, rows = self._cfg, self._columns.rows
        is_official = bool((rows["split"] >= 0).any())
        self._is_of_cells = cfg.split != "all" and (cfg.split_by == "geography" or not is_official)
        if cfg.split_by == "official" and not is_official:
            files = ", ".join(f"{split}.csv" for split in SPLITS)
            raise ValueError(f"split_by: {self._root} has no official lists ({files}: a patch name first in each line)")
        if self._is_of_cells:
            chosen = rows_in_cells(rows["latitude"], rows["longitude"], cfg.split, cfg.cell_deg, cfg.split_seed)
        elif cfg.split == "all":
            chosen = np.arange(len(rows))
        else:
            chosen = np.flatnonzero(rows["split"] == SPLITS.index(cfg.split))
        if not cfg.snow_and_clouds:
            chosen = chosen[~rows["snow_or_cloud"][chosen]]
        if not len(chosen):
            raise ValueError(f"split: no patch of {self._root} is in {cfg.split!r} (split_by: {cfg.split_by})")
        return chosen

    def _tile_schemas(self, info: Mapping[str, Any]) -> dict[str, TileSchema]:
        names = list(info["arrays"])
        offered = [n for n in names if n != _RADAR or "sentinel1" in self._folders]
        wanted = offered if self._cfg.tiles is None else self._cfg.tiles
        for name in wanted:
            if name not in names:
                raise ValueError(f"tiles: no tile {name!r}{suggest(name, names)} (tiles: {', '.join(names)})")
            if name not in offered:
                raise ValueError(f"tiles: {name} needs the archive of Sentinel-1, which is not in {self._root}")
        if not wanted:
            raise ValueError(f"tiles: none is named (tiles: {', '.join(names)})")
        has_gaps = bool((self._columns.rows["radar"][self._rows] == b"").any())
        return {
            n: _tile_schema(info["arrays"][n], info["statistics"][self.version], n == _RADAR and has_gaps)
            for n in names
            if n in wanted
        }

    def _check_scenes(self) -> None:
        """Of v2, whose table names patches whether they were unpacked or not, look at the folder of every scene."""
        if not self._is_v2:
            return
        columns = ["patch", "radar"] if _RADAR in self._schema else ["patch"]
        names = (name.decode() for column in columns for name in self._columns.rows[column][self._rows].tolist())
        scenes = {self._folder(name).parent for name in names}
        if missing := sorted(str(scene) for scene in scenes if not scene.is_dir()):
            raise ValueError(
                f"root: metadata.parquet names {len(scenes)} scenes of split {self._cfg.split!r}, {len(missing)} of"
                f" them are not there, such as {missing[0]}; unpack the whole archive"
            )

    def _folder(self, name: str, within: str | None = None) -> Path:
        """Where the files of a patch are; v2 sorts patches by the scene they were cut from."""
        is_radar = name.startswith("S1")
        folder = self._folders["sentinel1" if is_radar else "sentinel2"] if within is None else self._root / within
        return folder / name.rsplit("_", 3 if is_radar else 2)[0] / name if self._is_v2 else folder / name

    def _meta(self, row: Any, patch: str) -> dict[str, Any]:
        if self._is_v2:
            latitude, longitude = place_of(self._folder(patch) / f"{patch}_B02.tif")
        else:
            latitude, longitude = float(row["latitude"]), float(row["longitude"])
        scene = patch.rsplit("_", 2)[0]  # the rest is the patch's row and column in it
        group = cell_name(latitude, longitude, self._cfg.cell_deg) if self._is_of_cells else scene
        meta = {"latitude": latitude, "longitude": longitude, "month": int(_date(patch)[5:7]), "group": group}
        return {**meta, "country": row["country"].decode()} if self._is_v2 else meta

    def _label(self, row: Any, patch: str) -> NDArray[np.uint8]:
        n_classes = self._cfg.n_classes
        if self._cfg.label == "classes":
            return self._nomenclature.multi_hot(int(row["labels"]), 19 if self._is_v2 else 43, n_classes)  # [K]
        codes = _read_map(self._folder(patch, _MAPS) / f"{patch}_reference_map.tif")
        return self._nomenclature.of_codes(codes, n_classes)  # [H, W]


def _read_map(path: Path) -> NDArray[Any]:
    with open_raster(path) as file:
        if (file.count, *file.shape) != (1, *_MAP_SIZE) or not np.issubdtype(file.dtypes[0], np.integer):
            found = f"{file.count} bands of {file.height} x {file.width} pixels, {file.dtypes[0]}"
            raise ValueError(f"{path} has {found}; expected one of 120 x 120 pixels, integers")
        codes: NDArray[Any] = read_box(file, [0], (0, 0, *_MAP_SIZE))[0]  # [H, W]
        return codes


def _date(name: str) -> str:
    """When a patch was taken: the day, of radar also the time.

    The times in the names of Sentinel-2 patches of v1 lack zeros, and some are no time of day.
    """
    found = re.search(r"_(\d{4})(\d{2})(\d{2})T(\d{2})(\d{2})(\d*)_", name)
    assert found is not None  # names were matched when the index was made
    year, month, day, hour, minute, second = found.groups()
    return f"{year}-{month}-{day}" + (f"T{hour}:{minute}:{second}" if name.startswith("S1") else "")


def _tile_schema(array: Mapping[str, Any], statistics: Mapping[str, Any], optional: bool) -> TileSchema:
    mean, std = zip(*(statistics[array["sensor"]][band] for band in array["bands"]), strict=True)
    return TileSchema(
        sensor=load_sensor(array["sensor"]),
        bands=tuple(array["bands"]),
        dtype=array["dtype"],
        shape=(array["shape"][0], array["shape"][1]),
        gsd_m=array["gsd_m"],
        mean=mean,
        std=std,
        optional=optional,
    )
