"""EuroSAT (Helber et al. 2019), labelled scenes: JPEGs in WebDataset shards, or the original 13-band GeoTIFFs.

- `webdataset`: `<split>-*.tar` of `KEY.jpg` and `KEY.cls` (class index), `classes.json` (names in order of the index)
- `geotiff`: `CLASS/KEY.tif`

Beside either, `metadata.csv` may give columns by `key`: `latitude` and `longitude`, `split`, and others that go into
each sample's meta.

Neighbouring scenes look alike, so a random split flatters every method. `split_by: geography` puts whole cells of a
grid of latitude and longitude into train, validation or test, 70 : 10 : 20 on average.

C bands, H W pixels.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE
from ssl_eo.data.shard_reader import LocalShard, ShardReader
from ssl_eo.data.shards import ShardIndex, index_path
from ssl_eo.data.sources._band_files import place_of
from ssl_eo.data.sources._rasters import open_raster, read_box
from ssl_eo.data.sources._side_files import dataset_card
from ssl_eo.data.sources._splits import cell_split, check_cell
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import load_sensor

__all__ = ["Config", "Source", "cell_split"]

_NOT_META = ("key", "split", "shard", "cls", "class_name")  # columns that a sample holds elsewhere


@dataclass
class Config:
    """Which files and which part of them."""

    root: str = field(metadata=FREE)  # folder of the shards, or of the class folders
    layout: Literal["auto", "webdataset", "geotiff"] = "auto"  # auto: webdataset if there is a .tar
    split: Literal["train", "val", "test", "all"] = "train"  # of those of split_by; all: every image
    split_by: Literal["file", "geography"] = "geography"  # file: names of shards, or column `split` for GeoTIFFs
    cell_deg: float = 0.5  # side of a cell of the geographic split, degrees of latitude and of longitude
    split_seed: int = 0  # of the geographic split

    def __post_init__(self) -> None:
        check_cell(self.cell_deg)


class Source:
    """A `Source` (see `ssl_eo.data.types`) of EuroSAT."""

    def __init__(self, cfg: Config) -> None:
        root = Path(cfg.root)
        layout = _find_layout(root) if cfg.layout == "auto" else cfg.layout
        info = dataset_card("eurosat")
        metadata = _read_metadata(root / "metadata.csv")
        self._files: _Files
        if layout == "webdataset":
            self._files = _Shards(root, cfg.split if cfg.split_by == "file" else "all")
            self._schema = _tile_schema(info["arrays"]["rgb"])
        else:
            self._files = _GeoTiffs(root, info["labels"])
            self._schema = _tile_schema(info["arrays"]["multispectral"])
        self._label_names = self._files.label_names or tuple(info["labels"])
        self._rows = _rows_of_split(cfg, self._files, metadata)
        if not self._rows:
            raise ValueError(f"split: no sample of {root} is in {cfg.split!r} (split_by: {cfg.split_by})")
        self._meta = [
            {k: _number_or_text(v) for k, v in metadata.get(self._files.keys[row], {}).items() if k not in _NOT_META}
            for row in self._rows
        ]

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return {self._schema.sensor.name: self._schema}

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._label_names

    @property
    def chunk_size(self) -> int:
        return 16

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        row = self._rows[index]
        pixels, label = self._files.read(row)
        tile = Tile(pixels, self._schema.bands, self._schema.gsd_m)
        return Sample(self._files.keys[row], {self._schema.sensor.name: tile}, dict(self._meta[index]), label)

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample."""
        row = self._rows[index]
        return self._files.keys[row], self._files.file_name(row)

    def fingerprint(self) -> str:
        digest = blake2b(repr(self._schema).encode(), digest_size=16)
        for row in self._rows:
            digest.update(self._files.checksum(row))
        return digest.hexdigest()


class _Files(Protocol):
    """One layout: `keys` of all rows, and the pixels `[C, H, W]` and class index of a row."""

    keys: list[str]
    label_names: tuple[str, ...]

    def read(self, row: int) -> tuple[NDArray[Any], int]: ...
    def place(self, row: int) -> tuple[float, float] | None: ...
    def file_name(self, row: int) -> str: ...
    def checksum(self, row: int) -> bytes: ...


class _Shards:
    def __init__(self, root: Path, split: str) -> None:
        pattern = "*.tar" if split == "all" else f"{split}-*.tar"
        paths = sorted(root.glob(pattern))
        if not paths:
            found = sorted(p.name for p in root.glob("*")) if root.is_dir() else "no such folder"
            raise ValueError(f"root: no '{pattern}' in {root} (found: {found})")
        readers = []
        for path in paths:
            saved = index_path(path)
            index = ShardIndex.load(saved) if saved.is_file() else ShardIndex.build(path)
            readers.append(ShardReader(LocalShard(path, index)))
        self._members = [(reader, row) for reader in readers for row in range(len(reader))]
        self.keys = [reader.key(row) for reader, row in self._members]
        classes = root / "classes.json"
        self.label_names = tuple(json.loads(classes.read_text(encoding="utf-8"))) if classes.is_file() else ()

    def read(self, row: int) -> tuple[NDArray[Any], int]:
        from PIL import Image

        reader, i = self._members[row]
        try:
            with Image.open(io.BytesIO(reader.read(i, "jpg")), formats=["JPEG"]) as image:
                if image.mode != "RGB" or image.size != (64, 64):  # before decoding: a damaged header may say anything
                    found = f"mode {image.mode}, {image.width} x {image.height} pixels"
                    raise ValueError(f"{reader.storage.name}: {self.keys[row]}.jpg has {found}; expected RGB, 64 x 64")
                pixels = np.asarray(image)  # [H, W, C]
        except Image.DecompressionBombError as error:
            raise ValueError(f"{reader.storage.name}: {self.keys[row]}.jpg: {error}") from None
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), int(reader.read(i, "cls"))

    def place(self, row: int) -> None:
        return None  # a JPEG does not say

    def file_name(self, row: int) -> str:
        return Path(self._members[row][0].storage.name).name

    def checksum(self, row: int) -> bytes:
        reader, i = self._members[row]
        return self.keys[row].encode() + bytes(reader.index.crc32[i].tobytes())


class _GeoTiffs:
    def __init__(self, root: Path, labels: list[str]) -> None:
        self._paths = sorted(root.glob("*/*.tif"))
        if not self._paths:
            raise ValueError(f"root: no 'CLASS/KEY.tif' in {root}")
        if unknown := sorted({p.parent.name for p in self._paths} - set(labels)):
            raise ValueError(f"root: folders of {root} that are no EuroSAT class: {unknown} (classes: {labels})")
        self._labels = [labels.index(p.parent.name) for p in self._paths]
        self.keys = [p.stem for p in self._paths]
        self.label_names = tuple(labels)

    def read(self, row: int) -> tuple[NDArray[Any], int]:
        with open_raster(self._paths[row]) as file:
            pixels = read_box(file, range(file.count), (0, 0, file.height, file.width))
        return pixels, self._labels[row]  # [C, H, W]

    def place(self, row: int) -> tuple[float, float]:
        """Latitude and longitude of the centre, from the file's header."""
        return place_of(self._paths[row])

    def file_name(self, row: int) -> str:
        return f"{self._paths[row].parent.name}/{self._paths[row].name}"

    def checksum(self, row: int) -> bytes:
        return f"{self.file_name(row)} {self._paths[row].stat().st_size}".encode()


def _find_layout(root: Path) -> str:
    if next(root.glob("*.tar"), None) is not None:
        return "webdataset"
    if next(root.glob("*/*.tif"), None) is not None:
        return "geotiff"
    found = sorted(p.name for p in root.glob("*"))[:10] if root.is_dir() else "no such folder"
    raise ValueError(
        f"root: {root} holds neither EuroSAT shards '<split>-*.tar' nor GeoTIFFs 'CLASS/KEY.tif' (found: {found})"
    )


def _rows_of_split(cfg: Config, files: _Files, metadata: Mapping[str, Mapping[str, str]]) -> list[int]:
    rows = range(len(files.keys))
    if cfg.split == "all" or (cfg.split_by == "file" and isinstance(files, _Shards)):
        return list(rows)
    if cfg.split_by == "file":
        return [r for r in rows if _column(metadata, files.keys[r], "split") == cfg.split]
    return [r for r in rows if cell_split(*_place(files, r, metadata), cfg.cell_deg, cfg.split_seed) == cfg.split]


def _place(files: _Files, row: int, metadata: Mapping[str, Mapping[str, str]]) -> tuple[float, float]:
    """Latitude and longitude of a row, from the table where it has the row, since opening every file takes long."""
    key = files.keys[row]
    if key not in metadata and (place := files.place(row)) is not None:
        return place
    return float(_column(metadata, key, "latitude")), float(_column(metadata, key, "longitude"))


def _read_metadata(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def _column(metadata: Mapping[str, Mapping[str, str]], key: str, column: str) -> str:
    try:
        return metadata[key][column]
    except KeyError:
        raise ValueError(
            f"split_by: metadata.csv of the folder `root` gives no {column} for sample {key!r}: complete it, choose the"
            " other split_by, or take split: all"
        ) from None


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _tile_schema(array: Mapping[str, Any]) -> TileSchema:
    return TileSchema(
        sensor=load_sensor(array["sensor"]),
        bands=tuple(array["bands"]),
        dtype=array["dtype"],
        shape=tuple(array["shape"]),
        gsd_m=array["gsd_m"],
        mean=tuple(array["mean"]),
        std=tuple(array["std"]),
    )
