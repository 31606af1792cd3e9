"""Every archive at its smallest: eight samples of files in the real layout, one tile of them to look at.

For tests that ask the same of all sources.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from archives import bigearthnet, fmow, geotiff, mmearth, satlas, spectral_earth, ssl4eo_s12
from archives.tiffs import write_raster
from write_geobench import write_dataset

from ssl_eo.components import resolve
from ssl_eo.config import build
from ssl_eo.data.pack import pack
from ssl_eo.data.types import Batch, Source, map_tensors

__all__ = ["ARCHIVES", "N_SAMPLES", "Small", "content_of", "cut", "jpeg", "open_small", "raster_of", "write_tar"]

N_SAMPLES = 8
_SATLAS = [(1867 + n, 3287) for n in range(N_SAMPLES)]


@dataclass(frozen=True)
class Small:
    """One archive. `damage(root, key)` makes pixels of one sample's `tiles` unreadable, in a file of unchanged name."""

    source: str  # as data.sources names it
    folder: str  # name of the root, of `hdf5` that of a file
    write: Callable[[Path], Any]
    options: Mapping[str, Any]  # of the source, beside root
    tiles: tuple[str, ...]  # names of the tiles to look at; a sample has one of them
    damage: Callable[[Path, str], None]


def open_small(archive: Small, root: Path, **options: Any) -> Source:
    """The source of `archive`, opened at `root` with the options of a config."""
    module = resolve("ssl_eo.data.sources", archive.source)
    opened: Source = module.Source(build(module.Config, {"root": str(root), **archive.options, **options}, "source"))
    return opened


def content_of(batch: Batch) -> tuple[list[str], str]:
    """Keys of a batch, and a checksum of all its tensors: tiles, views, masks."""
    digest = hashlib.sha256()

    def add(tensor: torch.Tensor) -> torch.Tensor:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return tensor

    map_tensors(add, batch)
    return batch.keys, digest.hexdigest()


def cut(path: Path) -> None:
    """Leaves the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def overwrite(path: Path, start: int, size: int) -> None:
    """Puts junk in place of some bytes of a file."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xaa" * size)


# --- mmearth, hdf5 ----------------------------------------------------------------------------------------------------


def _write_mmearth(root: Path) -> None:
    mmearth.write_mmearth(root, n=N_SAMPLES)


def _write_hdf5(root: Path) -> None:
    shape = 13, 16, 16
    pixels = np.stack([geotiff.tile_pixels(n, shape) for n in range(N_SAMPLES)])  # [N, C, H, W]
    with h5py.File(root, "w") as file:
        file.create_dataset("sentinel2", data=pixels, chunks=(1, *shape), compression="gzip")
        file["label"] = np.arange(N_SAMPLES) % 2


def h5_path(root: Path) -> Path:
    return root if root.is_file() else root / f"{root.name}.h5"


def h5_row(file: Any, key: str) -> int:
    """The row of a sample in the array `sentinel2`."""
    if "metadata" in file:  # of MMEarth
        return [tile_id.decode() for tile_id in file["metadata"]["tile_id"]].index(key)
    return int(key.rpartition("_")[2])


def _damage_h5(root: Path, key: str) -> None:
    with h5py.File(h5_path(root)) as file:
        chunk = file["sentinel2"].id.get_chunk_info_by_coord((h5_row(file, key), 0, 0, 0))
    overwrite(h5_path(root), chunk.byte_offset, chunk.size)


# --- fmow, satlas, spectral_earth -------------------------------------------------------------------------------------

FOOTPRINTS = [(fmow.Image("wv23", datetime(2010 + n, 3, 4), (40, 50)),) for n in range(N_SAMPLES)]


def fmow_image(root: Path, key: str) -> Path:
    return root / fmow.path_of(int(key.rpartition("_")[2]), 0, "wv23")


def _write_satlas(root: Path) -> None:
    for tile in _SATLAS:
        satlas.write_images(root, tile, "sentinel2", [0], side=32)
    satlas.write_metadata(root, [[*tile, satlas.SCENES["sentinel2"][0]] for tile in _SATLAS], _SATLAS, [])


def satlas_image(root: Path, key: str, band: str = "b05") -> Path:
    return root / "sentinel2" / satlas.SCENES["sentinel2"][0] / band / f"{key}.png"


def _write_spectral_earth(root: Path) -> None:
    for n in range(N_SAMPLES):
        path = root / "enmap" / f"scene_{n // 2}" / f"{spectral_earth.name_of(n)}.tif"
        corner = 399_960.0, 5_000_000.0 + 55_600.0 * n
        options = {"interleave": "band", "compress": "deflate", "zlevel": 1}  # the quickest to read
        write_raster(path, spectral_earth.pixels_of(n), corner=corner, pixel=30.0, **options)
    spectral_earth.write_split(root, "train", range(N_SAMPLES))


def spectral_earth_patch(root: Path, key: str) -> Path:
    return root / "enmap" / f"{key}.tif"


# --- one file a band --------------------------------------------------------------------------------------------------


def _write_ssl4eo_s12(root: Path) -> None:
    for n in range(N_SAMPLES):
        ssl4eo_s12.write_scene(root, "s2c", *divmod(n, 4), bands=("B2", "B3", "B4", "B8"))


def ssl4eo_s12_scene(root: Path, key: str) -> Path:
    place, season = key.split("_")
    return root / "s2c" / place / ssl4eo_s12.scene_name("s2c", int(season))


def v1_patch(root: Path, key: str) -> Path:
    return root / "BigEarthNet-v1.0" / key


def v2_patch(root: Path, key: str) -> Path:
    return root / "BigEarthNet-S2" / key.rsplit("_", 2)[0] / key


# --- eurosat ----------------------------------------------------------------------------------------------------------


EUROSAT_TAR = "train-000000.tar"


def _write_eurosat_webdataset(root: Path) -> None:
    root.mkdir()
    samples = {f"River_{n}": {"jpg": jpeg(n), "cls": b"%d" % (n % 2)} for n in range(N_SAMPLES)}
    write_tar(root / EUROSAT_TAR, samples)
    (root / "classes.json").write_text(json.dumps(["Forest", "River"]))
    places = "".join(f"River_{n},{44.25 + n},{10.25 + n}\n" for n in range(N_SAMPLES))
    (root / "metadata.csv").write_text(f"key,latitude,longitude\n{places}")


def jpeg(seed: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(60, 200, (*size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    """A tar of members `<key>.<suffix>`, without an index beside it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in ((f"{k}.{suffix}", c) for k, members in samples.items() for suffix, c in members.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _write_eurosat_geotiff(root: Path) -> None:
    for n in range(N_SAMPLES):
        pixels = geotiff.tile_pixels(n, (13, 64, 64))
        write_raster(root / "River" / f"River_{n}.tif", pixels, corner=(600_000.0, 5_000_000.0 + 111_200.0 * n))


def _damage_tar(root: Path, key: str, member: str) -> None:
    for path in sorted(root.glob("*.tar")):
        content = path.read_bytes()
        if (start := content.find(f"{key}.{member}".encode())) >= 0:
            overwrite(path, start + 512, 64)  # the head of the pixels


# --- geobench, folders of one's own -----------------------------------------------------------------------------------


def _write_geobench(root: Path) -> None:
    root.mkdir()
    write_dataset(root, "m-eurosat", n_train=N_SAMPLES)


def geobench_sample(root: Path, key: str) -> Path:
    return root / "classification_v1.0" / "m-eurosat" / f"{key}.hdf5"


def _write_image_folder(root: Path) -> None:
    for n in range(N_SAMPLES):
        folder = root / ("forest", "water")[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"place{n}.jpg").write_bytes(jpeg(n))


def picture_of(root: Path, key: str) -> Path:
    return root / f"{key}.jpg"


def _write_class_rasters(root: Path) -> None:
    for n in range(N_SAMPLES):
        pixels = geotiff.tile_pixels(n, (4, 40, 40), "uint16").astype("uint8")
        path = root / ("forest", "water")[n % 2] / f"place{n}.tif"
        write_raster(path, pixels, corner=(600_000.0, 5_000_000.0 + 111_200.0 * n))


def _write_raster_masks(root: Path) -> None:
    for n in range(N_SAMPLES):
        corner = 600_000.0, 5_000_000.0 + 111_200.0 * n
        pixels = geotiff.tile_pixels(n, (4, 40, 40), "uint16").astype("uint8")
        write_raster(root / "images" / f"place{n}.tif", pixels, corner=corner)
        mask = np.random.default_rng(n).integers(0, 2, (1, 40, 40), np.uint8)
        write_raster(root / "masks" / f"place{n}.tif", mask, corner=corner)


# --- geotiff, shards --------------------------------------------------------------------------------------------------


def _write_geotiff(root: Path) -> None:
    for n in range(N_SAMPLES):
        pixels = geotiff.tile_pixels(n, (4, 40, 40), "uint16").astype("uint8")
        write_raster(root / f"scene{n}.tif", pixels, corner=(400_000.0 + 50_000 * n, 5_000_000.0))


def _write_shards(root: Path) -> None:
    scenes = root.with_name(f"{root.name} scenes")
    _write_geotiff(scenes)
    pack(open_small(ARCHIVES["geotiff"], scenes), root, samples_per_shard=4)


def raster_of(name: str, root: Path, key: str) -> Path:
    """A GeoTIFF (of SatlasPretrain a PNG) that holds pixels of a sample's tile."""
    find: dict[str, Callable[[], Path]] = {
        "fmow": lambda: fmow_image(root, key),
        "satlas": lambda: satlas_image(root, key),
        "spectral_earth": lambda: spectral_earth_patch(root, key),
        "ssl4eo_s12": lambda: ssl4eo_s12_scene(root, key) / "B3.tif",
        "bigearthnet v1": lambda: v1_patch(root, key) / f"{key}_B06.tif",
        "bigearthnet v2": lambda: v2_patch(root, key) / f"{key}_B06.tif",
        "eurosat geotiff": lambda: root / "River" / f"{key}.tif",
        "geotiff": lambda: root / f"{key}.tif",
        "image_folder geotiff": lambda: root / f"{key}.tif",
        "raster_masks": lambda: root / "images" / f"{key}.tif",
    }
    return find[name]()


def _all(**options: Any) -> dict[str, Any]:
    return {"split": "all", **options}


ARCHIVES = {
    "mmearth": Small(
        source="mmearth",
        folder="data_1M_v001_64",
        write=_write_mmearth,
        options=_all(cirrus_band=False),
        tiles=("sentinel2_l1c", "sentinel2_l2a"),
        damage=_damage_h5,
    ),
    "fmow": Small(
        source="fmow",
        folder="fmow",
        write=lambda root: fmow.write_archive(root, footprints=FOOTPRINTS),
        options={"sensors": ["worldview2_3"], "max_images_per_sensor": 1},
        tiles=("worldview2_3@0",),
        damage=lambda root, key: cut(raster_of("fmow", root, key)),
    ),
    "satlas": Small(
        source="satlas",
        folder="satlas",
        write=_write_satlas,
        options=_all(sensors=["sentinel2"], max_images_per_sensor=1),
        tiles=("satlas_sentinel2@0",),
        damage=lambda root, key: cut(raster_of("satlas", root, key)),
    ),
    "spectral_earth": Small(
        source="spectral_earth",
        folder="spectral_earth",
        write=_write_spectral_earth,
        options={"n_statistics_samples": 2},
        tiles=("enmap",),
        damage=lambda root, key: cut(raster_of("spectral_earth", root, key)),
    ),
    "ssl4eo_s12": Small(
        source="ssl4eo_s12",
        folder="ssl4eo",
        write=_write_ssl4eo_s12,
        options=_all(seasons="samples", tiles=["sentinel2_l1c@10m"]),
        tiles=("sentinel2_l1c@10m",),
        damage=lambda root, key: cut(raster_of("ssl4eo_s12", root, key)),
    ),
    "bigearthnet v1": Small(
        source="bigearthnet",
        folder="v1",
        write=lambda root: bigearthnet.make_v1(root, N_SAMPLES),
        options=_all(version="v1"),
        tiles=("sentinel2_l2a@20m",),
        damage=lambda root, key: cut(raster_of("bigearthnet v1", root, key)),
    ),
    "bigearthnet v2": Small(
        source="bigearthnet",
        folder="v2",
        write=lambda root: bigearthnet.make_v2(root, N_SAMPLES),
        options=_all(version="v2"),
        tiles=("sentinel2_l2a@20m",),
        damage=lambda root, key: cut(raster_of("bigearthnet v2", root, key)),
    ),
    "eurosat webdataset": Small(
        source="eurosat",
        folder="eurosat_rgb",
        write=_write_eurosat_webdataset,
        options=_all(),
        tiles=("sentinel2_tci",),
        damage=lambda root, key: _damage_tar(root, key, "jpg"),
    ),
    "eurosat geotiff": Small(
        source="eurosat",
        folder="eurosat_ms",
        write=_write_eurosat_geotiff,
        options=_all(),
        tiles=("sentinel2_l1c",),
        damage=lambda root, key: cut(raster_of("eurosat geotiff", root, key)),
    ),
    "geotiff": Small(
        source="geotiff",
        folder="scenes",
        write=_write_geotiff,
        options={"tiles": [{"sensor": "naip"}]},
        tiles=("naip",),
        damage=lambda root, key: cut(raster_of("geotiff", root, key)),
    ),
    "image_folder": Small(
        source="image_folder",
        folder="scenes by class",
        write=_write_image_folder,
        options=_all(),
        tiles=("rgb",),
        damage=lambda root, key: cut(picture_of(root, key)),
    ),
    "image_folder geotiff": Small(
        source="image_folder",
        folder="rasters by class",
        write=_write_class_rasters,
        options=_all(sensor="naip"),
        tiles=("naip",),
        damage=lambda root, key: cut(raster_of("image_folder geotiff", root, key)),
    ),
    "raster_masks": Small(
        source="raster_masks",
        folder="masked",
        write=_write_raster_masks,
        options=_all(sensor="naip", classes=["dry", "wet"]),
        tiles=("naip",),
        damage=lambda root, key: cut(raster_of("raster_masks", root, key)),
    ),
    "geobench": Small(
        source="geobench",
        folder="geobench",
        write=_write_geobench,
        options={"dataset": "m-eurosat"},
        tiles=("sentinel2_l1c",),
        damage=lambda root, key: cut(geobench_sample(root, key)),
    ),
    "hdf5": Small(
        source="hdf5",
        folder="tiles.h5",
        write=_write_hdf5,
        options={"sensor": "sentinel2_l1c"},
        tiles=("sentinel2_l1c",),
        damage=_damage_h5,
    ),
    "shards": Small(
        source="shards",
        folder="packed",
        write=_write_shards,
        options={},
        tiles=("naip",),
        damage=lambda root, key: _damage_tar(root, key, "naip.npy"),
    ),
}
