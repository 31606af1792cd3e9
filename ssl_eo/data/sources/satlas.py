"""SatlasPretrain (Bastani et al. 2023), low-resolution images: Sentinel-2, Sentinel-1 and Landsat in 8 bits.

- `<sensor>/<scene>/<band>/<column>_<row>.png`, tiles of the Web-Mercator grid of zoom 13
- `metadata/train_lowres.json` and `test_lowres.json`: lists of [column, row]
- `metadata/good_images_lowres_all.json`: list of [column, row, scene] of Sentinel-2 images with few clouds
- `metadata/image_times.json`: time of each scene (ISO 8601)

A sample is a tile of the grid. Its tiles are `<name>@0`, `<name>@1`, ... in the order of time (`satlas_landsat@pan-0`
where a sensor has several sizes of pixels); of more than `max_images_per_sensor` scenes those are taken that are evenly
spaced in that order. A missing band is no-data, and so absent for that sample.

C bands, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, check_names
from ssl_eo.data.sources._columns import Columns, cached_columns, rows_in_cells
from ssl_eo.data.sources._mercator import pixel_size_m, places_of_tiles
from ssl_eo.data.sources._png import PngBands
from ssl_eo.data.sources._scenes import PRODUCTS, Product, folder_facts, read_scenes, read_tiles
from ssl_eo.data.sources._side_files import card_schema, dataset_card, evenly_spaced, iso_date, printable
from ssl_eo.data.sources._splits import check_cell
from ssl_eo.data.types import Sample, Tile, TileSchema

__all__ = ["Config", "Source"]


@dataclass
class Config:
    """Which tiles of the grid, and which images of them."""

    root: str = field(metadata=FREE)  # folder of metadata, sentinel2, sentinel1, landsat
    split: Literal["train", "val", "test", "all"] = "train"  # of those of split_by
    split_by: Literal["file", "geography"] = "geography"  # file: published train and test; geography: cells of both
    cell_deg: float = 0.5  # side of a cell of the geographic split, degrees of latitude and of longitude
    split_seed: int = 0  # of the geographic split
    sensors: list[Product] = field(default_factory=lambda: list(PRODUCTS))  # whose tiles are offered
    max_images_per_sensor: int = 4  # scenes of a sensor in one sample

    def __post_init__(self) -> None:
        check_cell(self.cell_deg)
        if self.max_images_per_sensor < 1:
            raise ValueError(f"max_images_per_sensor must be at least 1, got {self.max_images_per_sensor}")
        check_names("sensors", self.sensors)
        if self.split == "val" and self.split_by == "file":
            raise ValueError("split: the archive has lists of train and test only; val needs split_by: geography")


class Source:
    """A `Source` (see `ssl_eo.data.types`) of SatlasPretrain."""

    label_names = ()
    chunk_size = 16

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._root = Path(cfg.root)
        for folder in ("metadata", *cfg.sensors):
            if not (self._root / folder).is_dir():
                raise ValueError(f"root: no folder {folder} in {cfg.root}; unpack it there, or leave it out of sensors")
        card = dataset_card("satlas")
        self._zoom: int = card["zoom"]
        self._arrays = {n: a for n, a in card["arrays"].items() if a["folder"] in cfg.sensors}
        self._schemas = {name: card_schema(array, "uint8") for name, array in self._arrays.items()}
        products = [p for p in PRODUCTS if p in cfg.sensors]
        bands: dict[str, list[str]] = {p: [] for p in products}  # files of a scene
        for array in self._arrays.values():
            bands[array["folder"]] += array["files"]
        self._scenes: Columns = cached_columns(
            self._root,
            f"satlas-{'-'.join(products)}",
            folder_facts(self._root, bands),
            lambda: read_scenes(self._root, bands, self._zoom),
        )
        self._find_samples()

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        scenes = range(self._cfg.max_images_per_sensor)
        return {_tile_name(name, i): schema for name, schema in self._schemas.items() for i in scenes}

    def __len__(self) -> int:
        return len(self._first)

    def read(self, index: int) -> Sample:
        scenes = self._scenes.rows[self._first[index] : self._stop[index]]
        column, row = self._place(index)
        latitude, longitude = (float(v[0]) for v in places_of_tiles(np.array([[column, row]]), self._zoom))
        tiles = dict(self._tiles(scenes, column, row, latitude))
        if not tiles:
            raise ValueError(f"{self._root}: no image of tile {column}_{row} is there, {len(scenes)} are listed")
        return Sample(
            f"{column}_{row}", tiles, {"column": column, "row": row, "latitude": latitude, "longitude": longitude}
        )

    def locate(self, index: int) -> tuple[str, str]:
        """(key, first scene) of a sample."""
        scene = self._scenes.rows[self._first[index]]
        column, row = self._place(index)
        return f"{column}_{row}", f"{PRODUCTS[scene['product']]}/{printable(scene['scene'])}"

    def fingerprint(self) -> str:
        content = f"{self._schemas!r} {self._cfg.max_images_per_sensor}"
        digest = blake2b(content.encode(), digest_size=16)
        for column in (self._first, self._stop, self._scenes.rows):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def _place(self, index: int) -> tuple[int, int]:
        return divmod(int(self._scenes.rows["cell"][self._first[index]]), 1 << self._zoom)

    def _tiles(self, scenes: NDArray[Any], column: int, row: int, latitude: float) -> Iterator[tuple[str, Tile]]:
        """Name and tile of each image that is there. Only headers are read."""
        for name, schema in self._schemas.items():
            array = self._arrays[name]
            of_sensor = scenes[scenes["product"] == PRODUCTS.index(array["folder"])]
            for i, k in enumerate(evenly_spaced(len(of_sensor), self._cfg.max_images_per_sensor)):
                scene = of_sensor[k]
                folder = self._root / array["folder"] / scene["scene"].decode()
                files = {folder / band / f"{column}_{row}.png": len(bands) for band, bands in array["files"].items()}
                pixels = PngBands.open(files)
                if pixels is not None:
                    gsd_m = pixel_size_m(latitude, pixels.shape[2], self._zoom)
                    yield _tile_name(name, i), Tile(pixels, schema.bands, gsd_m, iso_date(int(scene["time"])))

    def _find_samples(self) -> None:
        """First scene, and the one after the last, of each grid tile of the split: `[N]`."""
        cfg = self._cfg
        cell = np.asarray(self._scenes.rows["cell"])  # ascending
        first = np.flatnonzero(np.r_[True, cell[1:] != cell[:-1]])
        stop = np.r_[first[1:], len(cell)]
        lists = (cfg.split,) if cfg.split_by == "file" and cfg.split != "all" else ("train", "test")
        listed = np.concatenate([read_tiles(self._root, split, self._zoom) for split in lists])
        held = np.isin(cell[first], listed)
        if cfg.split_by == "geography" and cfg.split != "all":
            columns_rows = np.stack(np.divmod(cell[first], 1 << self._zoom), axis=1)  # [N, 2]
            places = places_of_tiles(columns_rows, self._zoom)
            chosen = rows_in_cells(*places, cfg.split, cfg.cell_deg, cfg.split_seed)
            held &= np.isin(np.arange(len(first)), chosen)
        if not held.any():
            raise ValueError(
                f"split: no tile of {self._root} with images is in {cfg.split!r} (split_by: {cfg.split_by})"
            )
        self._first, self._stop = first[held], stop[held]


def _tile_name(name: str, i: int) -> str:
    return f"{name}-{i}" if "@" in name else f"{name}@{i}"
