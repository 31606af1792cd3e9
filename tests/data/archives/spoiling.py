"""Ways to spoil an archive of `small`: functions of (root, key of the victim), which may give another root."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from archives import bigearthnet, fmow, satlas, small
from archives.tiffs import write_raster

from ssl_eo.data.manifest import Manifest, ShardEntry
from ssl_eo.data.shard_reader import LocalShard, ShardReader
from ssl_eo.data.shards import ShardIndex, ShardWriter, index_path

Spoil = Callable[[Path, str], Path | None]

HUGE = 20_000  # pixels
LOCAL_CRS = 'LOCAL_CS["of a building",UNIT["metre",1]]'
_VRT = (
    '<VRTDataset rasterXSize="60" rasterYSize="60"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
    "<SourceFilename>{}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
)

# --- any folder -------------------------------------------------------------------------------------------------------


def nothing(root: Path, key: str) -> None:
    pass


def emptied(root: Path, key: str) -> None:
    shutil.rmtree(root)
    root.mkdir()


def in_empty_folder(root: Path, key: str) -> Path:
    (root.parent / "empty").mkdir()
    return root.parent / "empty"


def in_folder_of(spoil: Spoil) -> Spoil:
    """`spoil` of the folder of an archive that is a file."""
    return lambda root, key: spoil(root.parent, key)


def not_utf8(root: Path, key: str) -> Path:
    return root.rename(root.with_name(os.fsdecode(b"\xff" + root.name.encode())))


def without(name: str) -> Spoil:
    """Removes a file; `{key}` in its name is the victim's."""
    return lambda root, key: (root / name.format(key=key)).unlink()


def written(name: str, content: str | bytes) -> Spoil:
    """A file with other content."""

    def spoil(root: Path, key: str) -> None:
        (root / name.format(key=key)).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def swollen(name: str, size: int) -> Spoil:
    """A file that is `size` bytes long, zeros that take no room."""

    def spoil(root: Path, key: str) -> None:
        path = root / name.format(key=key)
        path.touch()
        os.truncate(path, size)

    return spoil


def edited(name: str, change: Callable[[Any, str], Any]) -> Spoil:
    """A JSON file after `change(content, key)`."""

    def spoil(root: Path, key: str) -> None:
        path = root / name.format(key=key)
        content = json.loads(path.read_text())
        change(content, key)
        path.write_text(json.dumps(content))

    return spoil


# --- rasters ----------------------------------------------------------------------------------------------------------


def cut(name: str) -> Spoil:
    return lambda root, key: small.cut(small.raster_of(name, root, key))


def renamed_not_utf8(name: str) -> Spoil:
    def spoil(root: Path, key: str) -> None:
        path = small.raster_of(name, root, key)
        path.rename(path.with_name(path.stem + os.fsdecode(b"\xff") + path.suffix))

    return spoil


def raster(name: str, shape: tuple[int, int, int], dtype: str = "uint16") -> Spoil:
    """A GeoTIFF of another shape in the victim's place."""

    def spoil(root: Path, key: str) -> None:
        pixels = (1 + np.arange(np.prod(shape)).reshape(shape) % 200).astype(dtype)
        write_raster(small.raster_of(name, root, key), pixels)

    return spoil


def huge_raster(name: str, n_bands: int = 1, dtype: str = "uint16", side: int = HUGE, **layout: Any) -> Spoil:
    """A GeoTIFF of `side` pixels squared, of which no block is on disk."""

    def spoil(root: Path, key: str) -> None:
        _write_sparse(small.raster_of(name, root, key), n_bands, dtype, side, **layout)

    return spoil


def virtual_raster(name: str) -> Spoil:
    """A file that GDAL would follow to another one, outside."""

    def spoil(root: Path, key: str) -> None:
        secret = write_raster(root.parent / "secret.tif", np.full((1, 60, 60), 7, np.uint16))
        small.raster_of(name, root, key).write_text(_VRT.format(secret))

    return spoil


def displaced(name: str, file: str | None = None, **place: Any) -> Spoil:
    """The victim's GeoTIFF, or `file` beside it, with another `crs` or `corner`."""

    def spoil(root: Path, key: str) -> None:
        import rasterio

        path = small.raster_of(name, root, key)
        path = path if file is None else path.with_name(file.format(key=key))
        with rasterio.open(path) as opened:
            pixels = opened.read()
        write_raster(path, pixels, **place)

    return spoil


def _write_sparse(path: Path, n_bands: int, dtype: str, side: int = HUGE, **layout: Any) -> None:
    import rasterio

    size = {"count": n_bands, "height": side, "width": side, "dtype": dtype}
    layout = {"tiled": True, "blockxsize": 1024, "blockysize": 1024, **layout}
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(600_000.0, 5_000_000.0, 1.0, 1.0)}
    with rasterio.open(path, "w", driver="GTiff", compress="deflate", SPARSE_OK=True, **size, **layout, **place):
        pass


# --- mmearth, hdf5 ----------------------------------------------------------------------------------------------------


def h5_array(change: Callable[[h5py.File, Any], Any], name: str = "sentinel2") -> Spoil:
    """The array `name` after `change(file, its values)`, which writes it anew."""

    def spoil(root: Path, key: str) -> None:
        with h5py.File(small.h5_path(root), "a") as file:
            values = file[name][:]
            del file[name]
            change(file, values)

    return spoil


def h5_bomb(root: Path, key: str) -> None:
    """The victim's chunk swells from kilobytes to a quarter of a gigabyte."""
    with h5py.File(small.h5_path(root), "a") as file:
        row = small.h5_row(file, key)
        file["sentinel2"].id.write_direct_chunk((row, 0, 0, 0), zlib.compress(bytes(256 << 20), 1))


def h5_link(name: str = "sentinel2") -> Spoil:
    def spoil(root: Path, key: str) -> None:
        path = small.h5_path(root)
        with h5py.File(root.parent / "secret.h5", "w") as other, h5py.File(path, "a") as file:
            file.copy(name, other)
            del file[name]
            file[name] = h5py.ExternalLink(os.path.relpath(root.parent / "secret.h5", path.parent), name)

    return spoil


def h5_raw(root: Path, key: str) -> None:
    secret = root.parent / "secret.bin"
    shape = 8, 13, 16, 16
    secret.write_bytes(bytes(2 * 8 * 13 * 16 * 16))
    change = h5_array(lambda file, pixels: file.create_dataset("sentinel2", shape, "u2", external=str(secret)))
    change(root, key)


def h5_virtual(root: Path, key: str) -> None:
    with h5py.File(root.parent / "secret.h5", "w") as other, h5py.File(small.h5_path(root), "a") as file:
        file.copy("sentinel2", other)
        layout = h5py.VirtualLayout(file["sentinel2"].shape, "u2")
        layout[:] = h5py.VirtualSource(other["sentinel2"])
        del file["sentinel2"]
        file.create_virtual_dataset("sentinel2", layout)


# --- geobench, masks --------------------------------------------------------------------------------------------------


def cut_geobench(root: Path, key: str) -> None:
    small.cut(small.geobench_sample(root, key))


def geobench_array(write: Callable[[h5py.File], Any]) -> Spoil:
    """The red band of the victim as `write` does it, or gone."""

    def spoil(root: Path, key: str) -> None:
        with h5py.File(small.geobench_sample(root, key), "r+") as file:
            del file["04 - Red"]
            write(file)

    return spoil


def mask(shape: tuple[int, int, int], value: int = 1) -> Spoil:
    """The mask of the victim with another shape or class."""
    pixels = np.full(shape, value, np.uint8)
    return lambda root, key: write_raster(root / "masks" / f"{key}.tif", pixels, crs=None) and None


# --- fmow -------------------------------------------------------------------------------------------------------------


def fmow_list(column: str, value: Any) -> Spoil:
    """The list with another value for the victim's image."""

    def spoil(root: Path, key: str) -> None:
        columns = fmow.columns_of(small.FOOTPRINTS)
        row = int(key.rpartition("_")[2])
        if isinstance(value, bytes):
            columns[column] = [[path.encode() for path in paths] for paths in columns[column]]
        columns[column][row] = [value]
        fmow.write_list(root / fmow.LIST.format(split="train"), columns)

    return spoil


def fmow_image(size: tuple[int, int], write: Callable[[Path], Any]) -> Spoil:
    """The victim's image has another size, as the list says."""

    def spoil(root: Path, key: str) -> None:
        footprints = list(small.FOOTPRINTS)
        row = int(key.rpartition("_")[2])
        footprints[row] = (footprints[row][0]._replace(size=size),)
        fmow.write_list(root / fmow.LIST.format(split="train"), fmow.columns_of(footprints))
        write(small.raster_of("fmow", root, key))

    return spoil


def huge_fmow_image(**layout: Any) -> Spoil:
    return fmow_image((HUGE, HUGE), lambda path: _write_sparse(path, 8, "uint16", **layout))


def small_fmow_image(side: int) -> Spoil:
    pixels = np.arange(1, 8 * side * side + 1, dtype=np.uint16).reshape(8, side, side)
    return fmow_image((side, side), lambda path: write_raster(path, pixels, crs=None))


# --- satlas -----------------------------------------------------------------------------------------------------------


def png(content: bytes) -> Spoil:
    return lambda root, key: small.satlas_image(root, key).write_bytes(content) and None


def png_file(side: int, mode: int = 0, text: bytes = b"") -> bytes:
    """The head of a PNG of `side` pixels squared (mode 0: grey, 2: RGB), compressed `text` in it, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, mode, 0, 0, 0))
    note = chunk(b"zTXt", b"note\0\0" + zlib.compress(text)) if text else b""
    return b"\x89PNG\r\n\x1a\n" + head + note + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def other_format(root: Path, key: str) -> None:
    """A JPEG under the name of a PNG: Pillow has decoders for formats that nobody expects in an archive."""
    from PIL import Image

    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(small.satlas_image(root, key), format="JPEG")


def satlas_image(side: int, n_bands: int = 1) -> Spoil:
    """One image of the victim with another size or number of bands."""
    return lambda root, key: satlas.write_png(small.satlas_image(root, key), 7, side, n_bands)


def satlas_images(side: int) -> Spoil:
    """All images of the victim with another size."""
    return lambda root, key: satlas.write_images(root, _cell(key), "sentinel2", [0], side)


def satlas_scene(name: str) -> Spoil:
    """A scene of that name in the list of good images, for the victim."""
    return edited("metadata/good_images_lowres_all.json", lambda rows, key: rows.append([*_cell(key), name]))


def _cell(key: str) -> tuple[int, int]:
    column, row = map(int, key.split("_"))
    return column, row


def fmow_rows(root: Path, key: str) -> None:
    """A list of very many rows without images, small on disk."""
    _write_empty_rows(root / fmow.LIST.format(split="train"), 20_000_001)


# --- eurosat ----------------------------------------------------------------------------------------------------------


def retarred(change: Callable[[dict[str, dict[str, bytes]], str], Any]) -> Spoil:
    """The tar after `change(members by sample, key)`."""

    def spoil(root: Path, key: str) -> None:
        path = root / small.EUROSAT_TAR
        samples = _members(ShardReader(LocalShard(path, ShardIndex.build(path))))
        change(samples, key)
        small.write_tar(path, samples)

    return spoil


def tar_member(suffix: str, content: bytes) -> Spoil:
    """Other content of one of the victim's members."""
    return retarred(lambda samples, key: samples[key].update({suffix: content}))


def jpeg_head(side: int) -> bytes:
    """A JPEG whose header says that it has `side` pixels squared."""
    content = small.jpeg(0)
    at = content.index(b"\xff\xc0") + 5  # behind marker, length and precision
    return content[:at] + struct.pack(">HH", side, side) + content[at + 4 :]


def tar_index(change: Callable[[ShardIndex], ShardIndex]) -> Spoil:
    """An index beside the tar, after `change`."""

    def spoil(root: Path, key: str) -> None:
        path = root / small.EUROSAT_TAR
        change(ShardIndex.build(path)).save(index_path(path))

    return spoil


def table_place(latitude: str, longitude: str = "10.25") -> Spoil:
    """The table `metadata.csv` with another place of the victim."""

    def spoil(root: Path, key: str) -> None:
        table = (root / "metadata.csv").read_text()
        (root / "metadata.csv").write_text(re.sub(rf"{key},.*", f"{key},{latitude},{longitude}", table))

    return spoil


# --- bigearthnet ------------------------------------------------------------------------------------------------------


def v2_table(column: str, value: Any) -> Spoil:
    """The table of patches with another value for the victim."""

    def spoil(root: Path, key: str) -> None:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(root / "metadata.parquet").to_pylist()
        for row in rows:
            if row["patch_id"] == key:
                row[column] = value
        bigearthnet.write_table(root / "metadata.parquet", rows)

    return spoil


def v2_rows(root: Path, key: str) -> None:
    """A table of very many rows without content, small on disk."""
    _write_empty_rows(root / "metadata.parquet", 5_000_001)


def _write_empty_rows(path: Path, n: int) -> None:
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    pyarrow.parquet.write_table(pyarrow.table([pyarrow.nulls(n, kind) for kind in schema.types], schema), path)


# --- shards -----------------------------------------------------------------------------------------------------------


def repacked(change: Callable[[dict[str, bytes]], Any]) -> Spoil:
    """Shards, indexes and manifest that fit together, with `change(members)` of the victim made before."""

    def spoil(root: Path, key: str) -> None:
        entries = []
        manifest = Manifest.load(root)
        for entry in manifest.shards:
            samples = _members(ShardReader(root / entry.name))
            if key in samples:
                change(samples[key])
            with ShardWriter.create(root / entry.name) as shard:
                for name, members in samples.items():
                    shard.add(name, members)
            entries.append(ShardEntry(entry.name, len(samples), shard.index.tar_size, shard.sha256))
        replace(manifest, shards=tuple(entries)).save(root)

    return spoil


def manifest(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """The manifest after `change`, with a checksum that fits."""

    def spoil(root: Path, key: str) -> None:
        content = json.loads((root / "manifest.json").read_text())
        del content["checksum"]
        change(content)
        plain = json.dumps(content, separators=(",", ":")).encode()
        (root / "manifest.json").write_text(json.dumps({**content, "checksum": hashlib.sha256(plain).hexdigest()}))

    return spoil


def shard_cut(root: Path, key: str) -> None:
    small.cut(sorted(root.glob("*.tar"))[0])


def _members(reader: ShardReader) -> dict[str, dict[str, bytes]]:
    suffixes = [suffix.decode() for suffix in reader.index.suffixes]
    found = {
        reader.key(row): {s: bytes(reader.read(row, s)) for s in suffixes if reader.has(row, s)}
        for row in range(len(reader))
    }
    reader.close()
    return found
