"""EuroSAT (Helber et al. 2019), labelled scenes: JPEGs in WebDataset shards, or the original 13-band GeoTIFFs.

- `webdataset`: `<split>-*.tar` of `KEY.jpg` and `KEY.cls` (class index), `classes.json` (names in order of the index)
- `geotiff`: `CLASS/KEY.tif`

Beside either, `metadata.csv` may give columns by `key`: `latitude` and `longitude`, `split`, and others that go into
each sample's meta.

Neighbouring scenes look alike, so a random split flatters every method. `split_by: geography` puts whole cells of a
grid of latitude and longitude into train, validation or test, 70 : 10 : 20 on average. Then the `meta["group"]` of a
sample is its cell, unless the table has a column `group`.

C bands, H W pixels.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, one_line
from ssl_eo.data.shard_reader import LocalShard, ShardReader
from ssl_eo.data.shards import ShardIndex, index_path
from ssl_eo.data.sources._columns import rows_in_cells
from ssl_eo.data.sources._content import content_of_some
from ssl_eo.data.sources._rasters import Rasters, ground_of
from ssl_eo.data.sources._side_files import dataset_card, read_json_list, read_lines
from ssl_eo.data.sources._splits import cell_name, cell_split, check_cell
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import load_sensor

__all__ = ["Config", "Source", "cell_split", "decode_jpeg"]

_NOT_META = ("key", "split", "shard", "cls", "class_name")  # columns that a sample holds elsewhere
_MAX_CLASSES_BYTES = 1 << 20
_MAX_METADATA_BYTES = 16 << 20  # a table of 16 columns for all 27,000 scenes has 4 MB
_NOWHERE = math.nan, math.nan


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
        self._files: _Files
        if layout == "webdataset":
            self._schema = _tile_schema(info["arrays"]["rgb"])
            self._files = _Shards(root, cfg.split if cfg.split_by == "file" else "all", info["labels"])
        else:
            self._schema = _tile_schema(info["arrays"]["multispectral"])
            self._files = _GeoTiffs(root, info["labels"], self._schema)
        metadata = _read_metadata(root / "metadata.csv", set(self._files.keys))
        places = _places(cfg, self._files, metadata)
        self._rows = _rows_of_split(cfg, self._files, metadata, places)
        if not self._rows:
            raise ValueError(f"split: no sample of {root} is in {cfg.split!r} (split_by: {cfg.split_by})")
        self._meta = [_meta(metadata.get(self._files.keys[row], {})) for row in self._rows]
        if places is not None:
            self._meta = [
                {"group": cell_name(*places[row], cfg.cell_deg), **meta}
                for row, meta in zip(self._rows, self._meta, strict=True)
            ]

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return {self._schema.sensor.name: self._schema}

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._files.label_names

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
        digest.update(self._files.content(self._rows))
        return digest.hexdigest()


class _Files(Protocol):
    """One layout: `keys` of all rows, and the pixels `[C, H, W]` and class index of a row."""

    keys: list[str]
    label_names: tuple[str, ...]

    def read(self, row: int) -> tuple[NDArray[Any], int]: ...
    def place(self, row: int) -> tuple[float, float] | None: ...  # as its file says; None: files of this layout do not
    def file_name(self, row: int) -> str: ...
    def checksum(self, row: int) -> bytes: ...
    def content(self, rows: Sequence[int]) -> bytes: ...  # a digest of what is not in their checksums


class _Shards:
    def __init__(self, root: Path, split: str, labels: list[str]) -> None:
        pattern = "*.tar" if split == "all" else f"{split}-*.tar"
        paths = sorted(root.glob(pattern))
        if not paths:
            raise ValueError(f"root: no '{pattern}' in {root} (found: {_content(root)})")
        readers = []
        for path in paths:
            saved = index_path(path)
            index = ShardIndex.load(saved) if saved.is_file() else ShardIndex.build(path)
            readers.append(ShardReader(LocalShard(path, index)))
        self._members = [(reader, row) for reader in readers for row in range(len(reader))]
        self.keys = [_key(reader, row) for reader, row in self._members]
        classes = root / "classes.json"
        self.label_names = _read_classes(classes) if classes.is_file() else tuple(labels)

    def read(self, row: int) -> tuple[NDArray[Any], int]:
        reader, i = self._members[row]
        where = f"{reader.storage.name}: {self.keys[row]}"
        pixels = decode_jpeg(f"{where}.jpg", reader.read(i, "jpg"))
        text, n_classes = reader.read(i, "cls").strip(), len(self.label_names)
        if not text.isdigit() or len(text) > 9 or int(text) >= n_classes:
            raise ValueError(f"{where}.cls holds {text[:20]!r}, expected the number of a class, 0 to {n_classes - 1}")
        return pixels, int(text)  # [C, H, W]

    def place(self, row: int) -> None:
        return None  # a JPEG does not say

    def file_name(self, row: int) -> str:
        return Path(self._members[row][0].storage.name).name

    def checksum(self, row: int) -> bytes:
        reader, i = self._members[row]
        return self.keys[row].encode() + bytes(reader.index.crc32[i].tobytes())

    def content(self, rows: Sequence[int]) -> bytes:
        return b""  # checksums are of pixels and labels


class _GeoTiffs:
    def __init__(self, root: Path, labels: list[str], schema: TileSchema) -> None:
        self._root, self._rasters, self._schema = root, Rasters(root, n_handles=1), schema
        paths = sorted(root.glob("*/*.tif"))
        if not paths:
            raise ValueError(f"root: no 'CLASS/KEY.tif' in {root}")
        if unknown := sorted({p.parent.name for p in paths} - set(labels)):
            raise ValueError(f"root: folders of {root} that are no EuroSAT class: {unknown[:10]} (classes: {labels})")
        self._names = [f"{p.parent.name}/{p.name}" for p in paths]
        self._labels = [labels.index(p.parent.name) for p in paths]
        self.keys = [p.stem for p in paths]
        self.label_names = tuple(labels)

    def read(self, row: int) -> tuple[NDArray[Any], int]:
        height, width = self._schema.shape or (0, 0)
        file = self._rasters.open(self._names[row])
        found = file.count, file.height, file.width, file.dtypes[0]
        expected = len(self._schema.bands), height, width, self._schema.dtype
        if found != expected:  # before decoding: a damaged header may say anything
            raise ValueError(f"{file.name} has bands, height, width, dtype {found}; expected {expected}")
        return self._rasters.read(self._names[row], range(file.count), (0, 0, height, width)), self._labels[row]

    def place(self, row: int) -> tuple[float, float]:
        """Latitude and longitude of the centre, from the file's header; NaN for a file that does not tell."""
        try:
            file = self._rasters.open(self._names[row])
            ground = ground_of(file, (0, 0, file.height, file.width))
        except (ValueError, OSError):  # a damaged file: it is in no split
            return _NOWHERE
        return _NOWHERE if ground is None else (ground.latitude, ground.longitude)

    def file_name(self, row: int) -> str:
        return self._names[row]

    def checksum(self, row: int) -> bytes:
        return os.fsencode(f"{self._names[row]} {self._rasters.size_bytes(self._names[row])}")

    def content(self, rows: Sequence[int]) -> bytes:
        return content_of_some(len(rows), lambda i: self._root / self._names[rows[i]])


def decode_jpeg(where: str, data: bytes) -> NDArray[np.uint8]:
    """`[C, H, W]`. Raises `ValueError` or `OSError`, with `where`, for a scene that is damaged or different."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            found = f"{image.mode}, {image.width} x {image.height}"
            # Only what is expected is decoded: a damaged header may say anything.
            pixels = np.asarray(image) if found == "RGB, 64 x 64" else None  # [H, W, C]
    except UnidentifiedImageError:
        raise OSError(f"{where} is not a readable JPEG: cannot identify its header") from None
    except (SyntaxError, ValueError, EOFError, OSError, Image.DecompressionBombError) as error:
        raise OSError(f"{where} is not a readable JPEG: {one_line(error)}") from None
    if pixels is None:
        raise ValueError(f"{where} has mode {found} pixels; expected RGB, 64 x 64")
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # [C, H, W]


def _key(reader: ShardReader, row: int) -> str:
    try:
        return reader.key(row)
    except UnicodeDecodeError:
        raise ValueError(
            f"the index of {reader.storage.name} has a key that is not UTF-8; make it again with 'ssl-eo data index'"
        ) from None


def _read_classes(path: Path) -> tuple[str, ...]:
    expected = "names of classes in the order of their numbers"
    names = read_json_list(path, _MAX_CLASSES_BYTES, expected)
    if not names or not all(isinstance(n, str) and n.isprintable() for n in names) or len(set(names)) < len(names):
        raise ValueError(f"{path} holds {names!r:.80}, expected {expected}, each once")
    return tuple(names)


def _find_layout(root: Path) -> str:
    if next(root.glob("*.tar"), None) is not None:
        return "webdataset"
    if next(root.glob("*/*.tif"), None) is not None:
        return "geotiff"
    raise ValueError(
        f"root: {root} holds neither EuroSAT shards '<split>-*.tar' nor GeoTIFFs 'CLASS/KEY.tif'"
        f" (found: {_content(root)})"
    )


def _content(root: Path) -> list[str] | str:
    return sorted(p.name for p in root.glob("*"))[:10] if root.is_dir() else "no such folder"


def _places(cfg: Config, files: _Files, metadata: Mapping[str, Mapping[str, str]]) -> list[tuple[float, float]] | None:
    """Latitude and longitude of all rows, where the split asks for them."""
    if cfg.split == "all" or cfg.split_by != "geography":
        return None
    places = [_place(files, row, metadata) for row in range(len(files.keys))]
    if np.isnan(places).all():
        raise ValueError(f"split_by: no file in {cfg.root} says where it lies; take split: all")
    return places


def _rows_of_split(
    cfg: Config,
    files: _Files,
    metadata: Mapping[str, Mapping[str, str]],
    places: Sequence[tuple[float, float]] | None,
) -> list[int]:
    rows = range(len(files.keys))
    if places is not None:
        latitude, longitude = np.array(places).T
        chosen: list[int] = rows_in_cells(latitude, longitude, cfg.split, cfg.cell_deg, cfg.split_seed).tolist()
        return chosen
    if cfg.split == "all" or isinstance(files, _Shards):  # whose names say the split
        return list(rows)
    return [r for r in rows if _column(metadata, files.keys[r], "split") == cfg.split]


def _place(files: _Files, row: int, metadata: Mapping[str, Mapping[str, str]]) -> tuple[float, float]:
    """Latitude and longitude of a row, from the table where it has the row, since opening every file takes long."""
    key = files.keys[row]
    if key not in metadata and (place := files.place(row)) is not None:
        return place
    found = [_column(metadata, key, column) for column in ("latitude", "longitude")]
    try:
        latitude, longitude = map(float, found)
    except ValueError:
        latitude, longitude = _NOWHERE
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise ValueError(
            f"split_by: metadata.csv of the folder `root` gives sample {key!r} latitude and longitude {found!r:.80},"
            " which are no degrees: correct them, or take split: all"
        )
    return latitude, longitude


def _read_metadata(path: Path, keys: Collection[str]) -> dict[str, dict[str, str]]:
    """Columns by sample of the table, where there is one. Of others than `keys` nothing is kept."""
    if not path.is_file():
        return {}
    lines = read_lines(path, _MAX_METADATA_BYTES, "columns by key")
    rows = csv.reader([lines[0].removeprefix("\ufeff"), *lines[1:]])
    table: dict[str, dict[str, str]] = {}
    try:
        columns = next(rows)
        if "key" not in columns:
            raise ValueError(f"{path} has no column 'key' (it has {columns!r:.80})")
        at = columns.index("key")
        for row in rows:
            if len(row) != len(columns):  # a few bytes could become any number of cells
                raise ValueError(f"{path}, line {rows.line_num}: {len(row)} cells, its head has {len(columns)}")
            if row[at] in keys:
                table[row[at]] = dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    return table


def _column(metadata: Mapping[str, Mapping[str, str]], key: str, column: str) -> str:
    try:
        return metadata[key][column]
    except KeyError:
        raise ValueError(
            f"split_by: metadata.csv of the folder `root` gives no {column} for sample {key!r}: complete it, choose the"
            " other split_by, or take split: all"
        ) from None


def _meta(columns: Mapping[str, str]) -> dict[str, Any]:
    return {name: _number_or_text(text) for name, text in columns.items() if name not in _NOT_META}


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
