"""Every archive against every kind of bad input: one clear line, or a bad sample with a reason; never a hang.

Each cell of the table is tried in a process of its own, with a limit on its time and memory.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import tarfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py")
pytest.importorskip("pyarrow")
pytest.importorskip("rasterio")

import h5py
from archives import small, spoiling
from archives.small import ARCHIVES, N_SAMPLES, content_of, open_small
from archives.spoiling import Spoil
from archives.tiffs import write_raster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_eo.components import available
from ssl_eo.data.loader import Loader
from ssl_eo.data.masked_views import MaskedViews
from ssl_eo.data.masking import MaskConfig
from ssl_eo.data.members import encode_array
from ssl_eo.data.opening import DataConfig, WeightedSourceConfig
from ssl_eo.data.order import Order
from ssl_eo.data.pack import index
from ssl_eo.data.plans import CropConfig, SourceCrop
from ssl_eo.data.render import Renderer
from ssl_eo.data.shards import ShardError
from ssl_eo.data.sources._band_files import BandFiles, place_of
from ssl_eo.data.sources.eurosat import decode_jpeg
from ssl_eo.data.types import Source

VICTIM = 3  # index of the sample that is spoilt
LIMIT_S, LIMIT_MB = 20.0, 256  # rendering views of 202 bands takes 187 to 211 MB; files that lie ask for gigabytes
FORK = multiprocessing.get_context("fork")
BATCH_SIZE, N_LANES, SEED = 2, 2, 7
N_STEPS = N_SAMPLES // BATCH_SIZE  # of an epoch


@dataclass(frozen=True)
class Refused:
    """Opening the source fails with this reason."""

    reason: str


@dataclass(frozen=True)
class Bad:
    """The victim is replaced for this reason, all others are read."""

    reason: str


@dataclass(frozen=True)
class Fine:
    """It is no fault: all samples are read."""


@dataclass(frozen=True)
class Case:
    spoil: Spoil
    outcome: Refused | Bad | Fine
    options: Mapping[str, Any] = field(default_factory=dict)  # of the source
    crop: SourceCrop = field(default_factory=SourceCrop)
    size_px: int = 16  # of a view


DAMAGED = Bad(r"is truncated or damaged|is not a readable GeoTIFF")
NOT_A_TIFF = Bad(r"is not a readable GeoTIFF: .*not recognized")
NO_DEGREES = Bad(r"\.tif: its coordinates cannot be brought to degrees: ")
NOT_A_JPEG = Bad(r"train-000000\.tar: River_3\.jpg is not a readable JPEG: cannot identify its header")
OUTSIDE = r"leads out of this folder"
NOT_UTF8 = Refused(r"root: .*\\xff.*: the path is not UTF-8, which GDAL needs; rename it")
DEEP, LONG = "[" * 200_000, "[" + "9" * 5_000 + "]"
TOO_DEEP, TOO_LONG = r"nested too deeply", r"is not valid JSON \(Exceeds the limit"
V1_JSON = "BigEarthNet-v1.0/{key}/{key}_labels_metadata.json"
S12_JSON = "s2c/0000000/20210321T054639_20210321T054831_T43RCP/metadata.json"  # of sample 0000000_3
S12_METADATA = {"metadata": ["CLOUDY_PIXEL_PERCENTAGE"]}
INFO, STATISTICS = "data_1M_v001_64_tile_info.json", "data_1M_v001_64_band_stats.json"
SATLAS_LISTS = ("image_times", "train_lowres", "good_images_lowres_all")
GOOD = "metadata/good_images_lowres_all.json"
NAIP_STATISTICS = {"sensor": "naip", "statistics": "stats.json"}
BAD_TABLES = [  # contents of the metadata.csv of EuroSAT
    ("key,name\nRiver_3,/" + "a" * 200_000, Refused(r"metadata\.csv, line 2: field larger than field limit")),
    ("key" + 5_000 * ",name" + "\nRiver_3", Refused(r"metadata\.csv, line 2: 1 cells, its head has 5001")),
    ("id,name\nRiver_3,a", Refused(r"metadata\.csv has no column 'key' \(it has \['id', 'name'\]\)")),
    ("\n", Refused(r"metadata\.csv is empty, expected columns by key")),
    ("\ufeffkey,name\nRiver_3,a", Fine()),
]
EUROSAT = "classification_v1.0/m-eurosat"  # in the folder of GeoBench
BY_PLACE = {"split": "train", "split_by": "geography"}
NO_STATISTICS = Refused(r"statistics: stats\.json cannot be read")
WINDOW = SourceCrop(extent_m=(100.0, 200.0))
PLAIN = {"label": None, "meta": {}}  # JSON of a sample
LARGE_BLOCKS = {"tiled": False, "blockxsize": None, "blockysize": 8_000, "interleave": "pixel"}


def other_pixels(shape: tuple[int, int, int]) -> Spoil:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    return spoiling.repacked(lambda members: members.update({"naip.npy": encode_array(pixels)}))


def other_json(content: str) -> Spoil:
    return spoiling.repacked(lambda members: members.update(json=content.encode()))


def huge_npy(members: dict[str, bytes]) -> None:
    head = encode_array(np.zeros((4, 40, 40), np.uint8))
    members["naip.npy"] = head.replace(b"(4, 40, 40), }      ", b"(4, 20000, 20000), }", 1)


Row = dict[str, list[Case] | str]  # by archive: what is tried, or why it does not apply

TABLE: dict[str, Row] = {
    "truncated file": {
        "mmearth": [
            Case(lambda root, key: small.cut(root / f"{root.name}.h5"), Refused(r"is not a readable HDF5 file"))
        ],
        "fmow": [
            Case(spoiling.cut("fmow"), DAMAGED),
            Case(
                lambda root, key: small.cut(next(root.glob("fmow/metadata_v2/*.parquet"))),
                Refused(r"is no readable Parquet file: .*; download it again"),
            ),
        ],
        "satlas": [Case(spoiling.cut("satlas"), Bad(r"\.png is not a readable PNG: "))],
        "spectral_earth": [Case(spoiling.cut("spectral_earth"), DAMAGED)],
        "ssl4eo_s12": [Case(spoiling.cut("ssl4eo_s12"), DAMAGED)],
        "bigearthnet v1": [Case(spoiling.cut("bigearthnet v1"), DAMAGED)],
        "bigearthnet v2": [
            Case(spoiling.cut("bigearthnet v2"), DAMAGED),
            Case(
                lambda root, key: small.cut(root / "metadata.parquet"),
                Refused(r"root: .*metadata\.parquet is no metadata of BigEarthNet v2"),
            ),
        ],
        "eurosat webdataset": [
            Case(
                spoiling.retarred(lambda samples, key: samples[key].update(jpg=samples[key]["jpg"][:1000])),
                Bad(r"train-000000\.tar: River_3\.jpg is not a readable JPEG: .*truncated"),
            ),
            Case(spoiling.tar_member("jpg", b""), NOT_A_JPEG),
            Case(
                lambda root, key: small.cut(root / small.EUROSAT_TAR),
                Refused(r"train-000000\.tar, member 'River_\d\.\w+', byte \d+: .*truncated"),
            ),
            Case(
                spoiling.tar_index(lambda index: replace(index, tar_size=index.tar_size + 512)),
                Refused(r"train-000000\.tar: \d+ bytes, its index is of a tar of \d+: the tar was truncated"),
            ),
            Case(spoiling.table_place("44", "10,1"), Refused(r"metadata\.csv, line 5: 4 cells, its head has 3")),
        ],
        "eurosat geotiff": [
            Case(spoiling.cut("eurosat geotiff"), DAMAGED),
            Case(spoiling.written("River/{key}.tif", ""), Bad(r"River_3\.tif is not a readable GeoTIFF")),
            Case(spoiling.written("River/{key}.tif", ""), Fine(), {"split": "train"}),  # no place: it is in no split
        ],
        "geotiff": [Case(spoiling.cut("geotiff"), DAMAGED)],
        "image_folder": [
            Case(
                lambda root, key: small.cut(small.picture_of(root, key)),
                Bad(r"forest/place6\.jpg is not a readable JPEG or PNG: .*truncated"),
            ),
            Case(spoiling.written("{key}.jpg", ""), Bad(r"place6\.jpg is not a readable JPEG or PNG: cannot identify")),
        ],
        "image_folder geotiff": [
            Case(spoiling.cut("image_folder geotiff"), DAMAGED),
            Case(spoiling.written("{key}.tif", ""), Bad(r"place6\.tif is not a readable GeoTIFF")),
            Case(spoiling.written("{key}.tif", ""), Fine(), BY_PLACE),  # no place: it is in no split
        ],
        "raster_masks": [
            Case(spoiling.cut("raster_masks"), DAMAGED),
            Case(lambda root, key: small.cut(root / "masks" / f"{key}.tif"), DAMAGED),
        ],
        "geobench": [Case(spoiling.cut_geobench, Bad(r"id_3\.hdf5 cannot be used: .*truncated"))],
        "hdf5": [
            Case(lambda root, key: small.cut(root), Refused(r"tiles\.h5 is not a readable HDF5 file: .*truncated")),
        ],
        "shards": [Case(spoiling.shard_cut, Refused(r"shard-000000\.tar has .* bytes, the manifest lists .*copy it"))],
    },
    "wrong band count": {
        "mmearth": [
            Case(
                spoiling.h5_array(lambda file, pixels: file.create_dataset("sentinel2", data=pixels[:, :12])),
                Refused(r"sentinel2 in .*\.h5 has shape \(8, 12, 16, 16\), expected \(8, 13, height, width\)"),
            )
        ],
        "fmow": [Case(spoiling.raster("fmow", (3, 40, 50)), Bad(r"_ms\.tif has bands, height, width \(3, 40, 50\)"))],
        "satlas": [
            Case(spoiling.satlas_image(32, 3), Bad(r"\.png has mode, height, width \('RGB', 32, 32\), expected \('L'"))
        ],
        "spectral_earth": [
            Case(
                spoiling.raster("spectral_earth", (200, 128, 128), "int16"),
                Bad(r"\.tif has bands, height, width, dtype \(200, .*; expected \(202, .*, or 224 bands"),
            )
        ],
        "ssl4eo_s12": [
            Case(spoiling.raster("ssl4eo_s12", (2, 264, 264)), Bad(r"B3\.tif has bands, .* \(2, 264.*; expected \(1,"))
        ],
        "bigearthnet v1": [
            Case(
                spoiling.raster("bigearthnet v1", (2, 60, 60)),
                Bad(r"B06\.tif has bands, .* \(2, 60, 60, 'uint16'\); expected \(1, 60, 60, 'uint16'\)"),
            )
        ],
        "bigearthnet v2": [
            Case(
                spoiling.raster("bigearthnet v2", (2, 60, 60)),
                Bad(r"B06\.tif has bands, .* \(2, 60, 60, 'uint16'\); expected \(1, 60, 60, 'uint16'\)"),
            )
        ],
        "eurosat webdataset": [
            Case(
                spoiling.tar_member("jpg", small.jpeg(3, mode="L")),
                Bad(r"River_3\.jpg has mode L, 64 x 64 pixels; expected RGB, 64 x 64"),
            ),
            Case(spoiling.tar_member("jpg", small.jpeg(3, mode="CMYK")), Bad(r"River_3\.jpg has mode CMYK, 64 x 64")),
            *(
                Case(
                    spoiling.tar_member("cls", content),
                    Bad(r"River_3\.cls holds .*, expected the number of a class, 0 to 1"),
                )
                for content in (b"2", b"-1", b"", b"1.0", b"1_0", b"River")
            ),
        ],
        "eurosat geotiff": [
            Case(
                spoiling.raster("eurosat geotiff", (3, 64, 64)),
                Bad(r"River_3\.tif has bands, .* \(3, 64, 64, 'uint16'\); expected \(13, 64, 64, 'uint16'\)"),
            ),
            Case(
                spoiling.raster("eurosat geotiff", (13, 64, 64), "uint8"),
                Bad(r"River_3\.tif has .* \(13, 64, 64, 'uint8'\); expected \(13, 64, 64, 'uint16'\)"),
            ),
        ],
        "geotiff": [
            Case(
                spoiling.raster("geotiff", (3, 40, 40), "uint8"),
                Bad(r"scene3\.tif holds 3 bands, expected the 4 of sensor naip"),
            ),
            Case(
                spoiling.raster("geotiff", (4, 40, 40), "complex64"),
                Bad(r"scene3\.tif has dtype complex64, expected real numbers"),
            ),
        ],
        "image_folder": [
            Case(
                spoiling.written("{key}.jpg", small.jpeg(3, mode="L")),
                Bad(r"place6\.jpg has mode L, 64 x 64 pixels; expected mode RGB and at most"),
            ),
            Case(
                spoiling.nothing,
                Refused(r"place7\.jpg is a JPEG or PNG, of 1 band or 3, expected 4; name its bands"),
                {"sensor": "naip"},
            ),
        ],
        "image_folder geotiff": [
            Case(
                spoiling.raster("image_folder geotiff", (3, 40, 40), "uint8"),
                Bad(r"place6\.tif holds 3 bands, expected the 4 of sensor naip"),
            ),
        ],
        "raster_masks": [
            Case(
                spoiling.raster("raster_masks", (3, 40, 40), "uint8"),
                Bad(r"place3\.tif holds 3 bands, expected the 4 of sensor naip"),
            ),
            Case(
                spoiling.mask((2, 40, 40)), Bad(r"masks/place3\.tif has 2 bands of uint8 .*; a class map has one band")
            ),
            Case(
                spoiling.mask((1, 40, 40), 7),
                Bad(r"the mask of place3 holds 7, expected classes 0 to 1; name more classes, or set ignore"),
            ),
            Case(spoiling.mask((1, 40, 40), 7), Fine(), {"ignore": 7}),
        ],
        "geobench": [
            Case(
                spoiling.geobench_array(lambda file: None),
                Bad(r"id_3\.hdf5 cannot be used: it has no array '04 - Red', with or without a date"),
            ),
        ],
        "hdf5": [
            Case(
                spoiling.h5_array(lambda file, pixels: file.create_dataset("sentinel2", data=pixels[:, :12])),
                Refused(r"bands: sentinel2 in .*tiles\.h5 holds 12 bands, expected the 13 of sensor sentinel2_l1c"),
            ),
            Case(
                spoiling.h5_array(lambda file, pixels: file.create_dataset("sentinel2", data=pixels[0])),
                Refused(r"dataset: sentinel2 in .* must be \[N, C, H, W\], its shape is \(13, 16, 16\)"),
            ),
            Case(
                spoiling.h5_array(lambda file, pixels: file.create_dataset("sentinel2", data=7)),
                Refused(r"dataset: .*tiles\.h5: sentinel2 holds one value"),
            ),
            Case(
                spoiling.h5_array(
                    lambda file, pixels: file.create_dataset("sentinel2", data=pixels.astype("complex64"))
                ),
                Refused(r"dataset: sentinel2 in .*: dtype of sentinel2_l1c must be one of bool, .*, got 'complex64'"),
            ),
        ],
        "shards": [
            Case(
                other_pixels((3, 40, 40)), Bad(r"tile 'naip' of sample 'scene3' has shape \(3, 40, 40\), expected \(4,")
            )
        ],
    },
    "missing side file": {
        "mmearth": [
            Case(spoiling.without(INFO), Refused(r"tile_info\.json is missing: download it with the \.h5 file")),
            Case(spoiling.without(STATISTICS), Refused(r"band_stats\.json cannot be read.*set statistics: measured")),
        ],
        "fmow": [
            Case(
                spoiling.without("fmow/metadata_v2/fmow_iwm_onid_train.parquet"),
                Refused(r"root: no such file: .*parquet"),
            )
        ],
        "satlas": [
            Case(spoiling.without(GOOD), Refused(r"good_images_lowres_all\.json cannot be read .*expected a list of")),
            Case(spoiling.without("metadata/image_times.json"), Refused(r"image_times\.json cannot be read")),
            Case(spoiling.without("metadata/train_lowres.json"), Refused(r"train_lowres\.json cannot be read")),
        ],
        "spectral_earth": [
            Case(
                spoiling.without("splits/enmap/train.txt"),
                Refused(r"train\.txt cannot be read .*or take split_by: geography"),
            )
        ],
        "ssl4eo_s12": [
            Case(
                spoiling.without(S12_JSON),
                Bad(r"metadata\.json cannot be read \(No such file or directory\), expected the properties of a scene"),
                S12_METADATA,
            )
        ],
        "bigearthnet v1": [
            Case(
                spoiling.without(V1_JSON), Bad(r"_labels_metadata\.json cannot be read .*expected labels and metadata")
            )
        ],
        "bigearthnet v2": [
            Case(spoiling.without("metadata.parquet"), Refused(r"version: v2 needs .*metadata\.parquet")),
        ],
        "eurosat webdataset": [
            Case(spoiling.without("classes.json"), Fine()),
            Case(spoiling.without("metadata.csv"), Fine()),
            Case(
                spoiling.without("metadata.csv"),
                Refused(r"split_by: metadata\.csv .* no latitude for sample 'River_0'.*or take split: all"),
                {"split": "train"},
            ),
            *(
                Case(
                    spoiling.retarred(lambda samples, key, member=member: samples[key].pop(member)),
                    Bad(rf"train-000000\.tar: sample 'River_3' has no member '{member}'"),
                )
                for member in ("jpg", "cls")
            ),
        ],
        "eurosat geotiff": [
            Case(
                spoiling.nothing,
                Refused(r"split_by: metadata\.csv .* gives no split for sample 'River_0'.*choose the other split_by"),
                {"split": "train", "split_by": "file"},
            ),
        ],
        "geotiff": [
            Case(spoiling.nothing, Refused(r"label_csv: .*labels\.csv cannot be read"), {"label_csv": "labels.csv"}),
            Case(spoiling.nothing, Refused(r"stats\.json cannot be read"), {"tiles": [NAIP_STATISTICS]}),
        ],
        "image_folder": [Case(spoiling.nothing, NO_STATISTICS, {"statistics": "stats.json"})],
        "image_folder geotiff": [Case(spoiling.nothing, NO_STATISTICS, {"statistics": "stats.json"})],
        "raster_masks": [
            Case(spoiling.nothing, NO_STATISTICS, {"statistics": "stats.json"}),
            Case(spoiling.without("masks/{key}.tif"), Bad(r"place3 has no class map \(masks/\{key\}\.tif\)")),
        ],
        "geobench": [
            Case(spoiling.without(f"{EUROSAT}/band_stats.json"), Refused(r"band_stats\.json cannot be read")),
            Case(
                spoiling.without(f"{EUROSAT}/default_partition.json"),
                Refused(r"partition: .*default_partition\.json is not there \(there are: 0\.01x"),
            ),
            Case(
                spoiling.without(f"{EUROSAT}/{{key}}.hdf5"),
                Refused(r"names 8 samples, 1 have no file, such as id_3\.hdf5; unpack the whole archive"),
            ),
        ],
        "hdf5": [
            Case(spoiling.nothing, Refused(r"statistics: stats\.json cannot be read"), {"statistics": "stats.json"}),
            Case(
                spoiling.nothing,
                Refused(r"split_dataset: .*tiles\.h5 has no array 'split' \(it has label, sentinel2\)"),
                {"split": "train"},
            ),
        ],
        "shards": [
            Case(spoiling.without("manifest.json"), Refused(r"manifest\.json: no such file; packing was not finished")),
            Case(
                spoiling.without("shard-000000.index.npz"), Refused(r"index\.npz is missing; make it with 'ssl-eo data")
            ),
        ],
    },
    "non-UTF-8 path": {
        "mmearth": [Case(spoiling.not_utf8, Fine())],
        "fmow": [
            Case(spoiling.not_utf8, NOT_UTF8),
            Case(
                spoiling.fmow_list("path", b"fmow/\xff.tif"), Bad(r"the name 'fmow/\\\\xff\.tif' is not UTF-8; rename")
            ),
        ],
        "satlas": [
            Case(spoiling.not_utf8, Fine()),
            Case(
                lambda root, key: os.mkdir(os.fsencode(root) + b"/sentinel2/2022-\xff"),  # noqa: PTH102
                Refused(r"sentinel2: the name '2022-\\\\xff' is not UTF-8; rename"),
            ),
        ],
        "spectral_earth": [
            Case(spoiling.not_utf8, NOT_UTF8),
            Case(
                spoiling.renamed_not_utf8("spectral_earth"),
                Bad(r"the name 'enmap/scene_1/ENMAP.*\\\\xff\.tif' is not UTF-8; rename"),
                {"split": "all"},
            ),
        ],
        "ssl4eo_s12": [
            Case(spoiling.not_utf8, NOT_UTF8),
            Case(lambda root, key: os.mkdir(os.fsencode(root) + b"/s2c/000\xff"), Fine()),  # noqa: PTH102
            Case(lambda root, key: (root / "s2c" / "\u0663").mkdir(), Fine()),  # a digit, in another script
        ],
        "bigearthnet v1": [
            Case(spoiling.not_utf8, NOT_UTF8),
            Case(
                lambda root, key: (root / "BigEarthNet-v1.0" / f"{key[:-1]}\u0663").mkdir(), Fine()
            ),  # passed over, as all that is no patch
        ],
        "bigearthnet v2": [Case(spoiling.not_utf8, NOT_UTF8)],
        "eurosat webdataset": [
            Case(spoiling.not_utf8, Fine()),
            Case(
                lambda root, key: (root / small.EUROSAT_TAR).rename(root / os.fsdecode(b"train-\xff.tar")) and None,
                Fine(),
            ),
            Case(
                spoiling.retarred(lambda samples, key: samples.update({os.fsdecode(b"a\xff"): samples.pop(key)})),
                Refused(r"train-000000\.tar, member '.*: the name is not printable UTF-8"),
            ),
            Case(
                spoiling.tar_index(lambda index: replace(index, keys=np.char.replace(index.keys, b"River", b"\xff"))),
                Refused(r"the index of .*train-000000\.tar has a key that is not UTF-8; make it again"),
            ),
            Case(
                spoiling.written("metadata.csv", b"key,name\nRiver_3,\xff\n"),
                Refused(r"metadata\.csv is not UTF-8 .*expected columns by key"),
            ),
            Case(
                spoiling.written("classes.json", b'["\xff"]'), Refused(r"classes\.json is not UTF-8 .*names of classes")
            ),
            Case(
                spoiling.written("classes.json", r'["Forest", "\ud800"]'),
                Refused(r"classes\.json holds \['Forest', '\\ud800'\], expected names of classes"),
            ),
        ],
        "eurosat geotiff": [
            Case(spoiling.not_utf8, NOT_UTF8),
            Case(spoiling.renamed_not_utf8("eurosat geotiff"), Bad(r"River_3\\xff\.tif: the path is not UTF-8")),
            Case(
                lambda root, key: (root / "River").rename(root / os.fsdecode(b"\xff")) and None,
                Refused(r"root: folders of .* that are no EuroSAT class: \['\\udcff'\] \(classes: \['AnnualCrop',"),
            ),
        ],
        "geotiff": [
            Case(spoiling.not_utf8, NOT_UTF8),
            Case(spoiling.renamed_not_utf8("geotiff"), Bad(r"scene3\\xff\.tif: the path is not UTF-8")),
        ],
        "image_folder": [
            Case(spoiling.not_utf8, Fine()),
            Case(
                lambda root, key: (root / "forest").rename(root / os.fsdecode(b"\xff")) and None,
                Refused(r"root: .* has a class folder \\xff, whose name is not UTF-8; rename it"),
            ),
            Case(
                lambda root, key: (root / f"{key}.jpg").rename(root / os.fsdecode(b"forest/\xff.jpg")) and None, Fine()
            ),
        ],
        "image_folder geotiff": [
            Case(spoiling.not_utf8, NOT_UTF8),
            Case(
                spoiling.renamed_not_utf8("image_folder geotiff"),
                Bad(r"place6\\xff\.tif: the path is not UTF-8, which"),
            ),
        ],
        "raster_masks": [
            Case(spoiling.not_utf8, NOT_UTF8),
            Case(spoiling.renamed_not_utf8("raster_masks"), Bad(r"place3\\xff\.tif: the path is not UTF-8, which")),
        ],
        "geobench": [Case(spoiling.not_utf8, Fine())],
        "hdf5": [
            Case(spoiling.not_utf8, Fine()),
        ],
        "shards": [Case(spoiling.not_utf8, Fine())],
    },
    "empty folder": {
        "mmearth": [Case(spoiling.emptied, Refused(r"root: .* must hold one \.h5 file, .* found none"))],
        "fmow": [Case(spoiling.emptied, Refused(r"root: no such file: .*\.parquet"))],
        "satlas": [Case(spoiling.emptied, Refused(r"root: no folder metadata in .*; unpack it there"))],
        "spectral_earth": [Case(spoiling.emptied, Refused(r"root: no folder enmap in .*; root is the folder of"))],
        "ssl4eo_s12": [
            Case(spoiling.emptied, Refused(r"root: .* holds none of the folders s2c, s2a, s1 \(found: noth"))
        ],
        "bigearthnet v1": [Case(spoiling.emptied, Refused(r"root: .* holds no folder .*; unpack the archives there"))],
        "bigearthnet v2": [Case(spoiling.emptied, Refused(r"version: v2 needs .*metadata\.parquet"))],
        "eurosat webdataset": [
            Case(
                spoiling.emptied,
                Refused(r"root: .* holds neither EuroSAT shards .* nor GeoTIFFs 'CLASS/KEY\.tif' \(found: \[\]\)"),
            ),
            Case(spoiling.emptied, Refused(r"root: no '\*\.tar' in .* \(found: \[\]\)"), {"layout": "webdataset"}),
        ],
        "eurosat geotiff": [
            Case(
                spoiling.emptied,
                Refused(r"root: .* holds neither EuroSAT shards .* nor GeoTIFFs 'CLASS/KEY\.tif' \(found: \[\]\)"),
            ),
            Case(spoiling.emptied, Refused(r"root: no 'CLASS/KEY\.tif' in "), {"layout": "geotiff"}),
        ],
        "geotiff": [
            Case(spoiling.emptied, Refused(r"tiles\[0\]\.pattern: none of the 0 files of .* \(found: nothing\)"))
        ],
        "image_folder": [
            Case(
                spoiling.emptied,
                Refused(r"root: .* holds no <class>/<name> with one of \.jpg, .* \(found: nothing\)"),
            ),
        ],
        "image_folder geotiff": [
            Case(
                spoiling.emptied,
                Refused(r"root: .* holds no <split>/<class>/<name> with one of .* \(found: nothing\)"),
                {"split_by": "folder"},
            ),
        ],
        "raster_masks": [
            Case(spoiling.emptied, Refused(r"images: none of the 0 files of .* fits 'images/\{key\}\.tif'")),
        ],
        "geobench": [Case(spoiling.emptied, Refused(r"root: there is no folder m-eurosat in .*found: "))],
        "hdf5": [
            Case(spoiling.in_empty_folder, Refused(r"root: no such file: .*empty")),
        ],
        "shards": [
            Case(spoiling.emptied, Refused(r"manifest\.json: no such file; write the dataset with 'ssl-eo data"))
        ],
    },
    "huge tile": {
        "mmearth": [
            Case(
                spoiling.h5_array(
                    lambda file, pixels: file.create_dataset(
                        "sentinel2", (8, 13, 20_000, 20_000), "u2", chunks=(1, 13, 512, 512), compression="gzip"
                    )
                ),
                Refused(
                    r"\.h5: rows of sentinel2 have shape \(13, 20000, 20000\), 10,400,000,000 bytes; expected at most"
                ),
            )
        ],
        "fmow": [
            Case(
                spoiling.huge_fmow_image(), Bad(r"_ms\.tif: 8 bands of .* are too many to read at once: set crop\.ext")
            ),
            Case(spoiling.huge_fmow_image(nodata=7), Fine(), crop=WINDOW),
            Case(
                spoiling.huge_fmow_image(**LARGE_BLOCKS),
                Bad(r"_ms\.tif has blocks of 8 bands of 8000 x 20000 pixels, .*gdal_translate"),
                crop=WINDOW,
            ),
        ],
        "satlas": [
            Case(spoiling.png(spoiling.png_file(20_000)), Bad(r"b05/.*\.png is not a readable PNG: Image size")),
            Case(
                lambda root, key: (
                    small.satlas_image(root, key, "tci").write_bytes(spoiling.png_file(13_000, 2)) and None
                ),
                Bad(r"tci/.*\.png has 13000 x 13000 pixels, expected a square of at most 512"),
            ),
        ],
        "spectral_earth": [
            Case(
                spoiling.huge_raster("spectral_earth", dtype="int16"),
                Bad(r"\.tif has bands, height, width, dtype \(1, 20000, 20000, 'int16'\); expected \(202, 128, 128"),
            )
        ],
        "ssl4eo_s12": [
            Case(
                spoiling.huge_raster("ssl4eo_s12"),
                Bad(r"B3\.tif has bands, .* \(1, 20000, 20000, .*; expected \(1, 264"),
            )
        ],
        "bigearthnet v1": [
            Case(
                spoiling.huge_raster("bigearthnet v1"),
                Bad(r"B06\.tif has bands, .* \(1, 20000, .*; expected \(1, 60, 60"),
            )
        ],
        "bigearthnet v2": [
            Case(
                spoiling.huge_raster("bigearthnet v2"),
                Bad(r"B06\.tif has bands, .* \(1, 20000, .*; expected \(1, 60, 60"),
            )
        ],
        "eurosat webdataset": [
            Case(
                spoiling.tar_member("jpg", spoiling.jpeg_head(20_000)),
                Bad(r"River_3\.jpg is not a readable JPEG: Image size \(400000000 pixels\) exceeds limit"),
            ),
            Case(
                spoiling.tar_member("jpg", spoiling.jpeg_head(9_000)),
                Bad(r"River_3\.jpg has mode RGB, 9000 x 9000 pixels; expected RGB, 64 x 64"),
            ),
        ],
        "eurosat geotiff": [
            Case(
                spoiling.huge_raster("eurosat geotiff", 13),
                Bad(r"River_3\.tif has bands, .* \(13, 20000, 20000, .*; expected \(13, 64, 64, 'uint16'\)"),
            ),
            Case(
                spoiling.huge_raster("eurosat geotiff", 1, side=16_000), Bad(r"\(1, 16000, .*; expected \(13, 64, 64")
            ),
            Case(
                spoiling.huge_raster("eurosat geotiff", 13, **LARGE_BLOCKS),
                Bad(r"River_3\.tif has blocks of 13 bands of 8000 x 20000 pixels"),
            ),
        ],
        "geotiff": [
            Case(
                spoiling.huge_raster("geotiff", 4, "uint8"),
                Bad(r"scene3\.tif: 4 bands of .* are too many to read at once: set crop\.extent_m .* window_px"),
            ),
            Case(spoiling.huge_raster("geotiff", 4, "uint8"), Fine(), crop=WINDOW),
            Case(
                spoiling.huge_raster("geotiff", 4, "uint8", **LARGE_BLOCKS),
                Bad(r"scene3\.tif has blocks of 4 bands of 8000 x 20000 pixels, .*gdal_translate"),
                crop=WINDOW,
            ),
        ],
        "image_folder": [
            Case(
                spoiling.written("{key}.jpg", spoiling.jpeg_head(20_000)),
                Bad(r"place6\.jpg is not a readable JPEG or PNG: Image size \(400000000 pixels\) exceeds limit"),
            ),
            Case(
                spoiling.written("{key}.jpg", spoiling.jpeg_head(9_000)), Fine()
            ),  # it is left out, as of another size
            Case(
                spoiling.written("{key}.jpg", spoiling.jpeg_head(9_000)),
                Bad(r"place6\.jpg has mode RGB, 9000 x 9000 pixels; expected mode RGB and at most 67,108,864 pixels"),
                {"same_size": False},
            ),
        ],
        "image_folder geotiff": [
            Case(
                spoiling.huge_raster("image_folder geotiff", 4, "uint8"),
                Bad(r"place6\.tif: 4 bands of .* are too many to read at once"),
                {"same_size": False},
            ),
            Case(spoiling.huge_raster("image_folder geotiff", 4, "uint8"), Fine()),
        ],
        "raster_masks": [
            Case(
                spoiling.huge_raster("raster_masks", 4, "uint8"),
                Bad(r"masks/place3\.tif has no box for the pixels 0:20000, 0:20000 of .*images/place3\.tif"),
            ),
        ],
        "geobench": [
            Case(
                spoiling.geobench_array(
                    lambda file: file.create_dataset(
                        "04 - Red", (20_000, 20_000), "i2", chunks=(512, 512), compression="gzip"
                    )
                ),
                Bad(r"id_3\.hdf5 cannot be used: array '04 - Red' is not stored as one piece in this file"),
            ),
        ],
        "hdf5": [
            Case(
                spoiling.h5_array(
                    lambda file, pixels: file.create_dataset(
                        "sentinel2", (8, 13, 20_000, 20_000), "u2", chunks=(1, 13, 512, 512), compression="gzip"
                    )
                ),
                Refused(r"tiles\.h5: rows of sentinel2 have shape \(13, 20000, 20000\), 10,400,000,000 bytes"),
            ),
            Case(
                spoiling.h5_array(
                    lambda file, labels: file.create_dataset(
                        "label", (8, 200_000, 200_000), "u1", chunks=(1, 512, 512)
                    ),
                    "label",
                ),
                Refused(
                    r"label_dataset: .*tiles\.h5: rows of label have shape \(200000, 200000\), 40,000,000,000 bytes"
                ),
                {"label_dataset": "label"},
            ),
        ],
        "shards": [
            Case(spoiling.repacked(huge_npy), Bad(r"'scene3\.naip\.npy', byte .*: NPY header promises .* 20000\)"))
        ],
    },
    "tile smaller than the crop": {
        "mmearth": [Case(spoiling.nothing, Fine(), size_px=64)],
        "fmow": [
            Case(spoiling.nothing, Fine(), size_px=64),
            Case(spoiling.small_fmow_image(5), Fine()),
            Case(spoiling.small_fmow_image(1), Fine()),
        ],
        "satlas": [
            Case(spoiling.satlas_images(5), Fine(), size_px=64),
            Case(
                spoiling.satlas_image(5), Bad(r"\.png has mode, height, width \('L', 32, 32\), expected \('L', 5, 5\)")
            ),
        ],
        "spectral_earth": [
            Case(spoiling.nothing, Fine(), size_px=136),
            Case(
                spoiling.raster("spectral_earth", (202, 5, 5), "int16"), Bad(r"\(202, 5, 5, .*; expected \(202, 128, 1")
            ),
        ],
        "ssl4eo_s12": [
            Case(spoiling.nothing, Fine(), size_px=272),
            Case(
                spoiling.raster("ssl4eo_s12", (1, 5, 5)), Bad(r"B3\.tif has bands, .* \(1, 5, 5, .*; expected \(1, 264")
            ),
        ],
        "bigearthnet v1": [
            Case(spoiling.nothing, Fine(), size_px=64),
            Case(
                spoiling.raster("bigearthnet v1", (1, 5, 5)),
                Bad(r"B06\.tif has bands, .* \(1, 5, 5, .*; expected \(1, 60"),
            ),
        ],
        "bigearthnet v2": [
            Case(spoiling.nothing, Fine(), size_px=64),
            Case(
                spoiling.raster("bigearthnet v2", (1, 5, 5)),
                Bad(r"B06\.tif has bands, .* \(1, 5, 5, .*; expected \(1, 60"),
            ),
        ],
        "eurosat webdataset": [
            Case(spoiling.nothing, Fine(), size_px=72),
            Case(
                spoiling.tar_member("jpg", small.jpeg(3, (5, 7))),
                Bad(r"River_3\.jpg has mode RGB, 7 x 5 pixels; expected"),
            ),
        ],
        "eurosat geotiff": [
            Case(spoiling.nothing, Fine(), size_px=72),
            Case(
                spoiling.raster("eurosat geotiff", (13, 5, 7)),
                Bad(r"\(13, 5, 7, 'uint16'\); expected \(13, 64, 64, 'u"),
            ),
        ],
        "geotiff": [
            Case(spoiling.nothing, Fine(), size_px=64),
            Case(spoiling.raster("geotiff", (4, 5, 7), "uint8"), Fine()),
            Case(spoiling.raster("geotiff", (4, 1, 1), "uint8"), Fine()),
        ],
        "image_folder": [
            Case(spoiling.nothing, Fine(), size_px=72),
            Case(spoiling.written("{key}.jpg", small.jpeg(3, (5, 7))), Fine()),
            Case(spoiling.written("{key}.jpg", small.jpeg(3, (5, 7))), Fine(), {"same_size": False}),
        ],
        "image_folder geotiff": [
            Case(spoiling.nothing, Fine(), size_px=64),
            Case(spoiling.raster("image_folder geotiff", (4, 1, 1), "uint8"), Fine(), {"same_size": False}),
        ],
        "raster_masks": [
            Case(spoiling.nothing, Fine(), size_px=64),
            Case(spoiling.nothing, Fine(), {"window_px": 20}, size_px=64),
        ],
        "geobench": [
            Case(spoiling.nothing, Fine(), size_px=72),
            Case(
                spoiling.geobench_array(lambda file: file.create_dataset("04 - Red", data=np.ones((5, 5), np.int16))),
                Bad(r"array '04 - Red' has shape \(5, 5\) and dtype int16, expected \(64, 64\)"),
            ),
        ],
        "hdf5": [
            Case(spoiling.nothing, Fine(), size_px=64),
            Case(
                spoiling.h5_array(lambda file, pixels: file.create_dataset("sentinel2", data=pixels[:, :, :1, :1])),
                Fine(),
            ),
            Case(
                spoiling.h5_array(lambda file, pixels: file.create_dataset("sentinel2", data=pixels[:, :, :, :0])),
                Refused(r"dataset: sentinel2 in .*: shape of sentinel2_l1c must be \(height, width\) in pixels"),
            ),
            Case(
                spoiling.h5_array(lambda file, pixels: file.create_dataset("sentinel2", data=pixels[:0])),
                Refused(r"dataset: sentinel2 in .*tiles\.h5 is empty"),
            ),
        ],
        "shards": [
            Case(spoiling.nothing, Fine(), size_px=64),
            Case(other_pixels((4, 1, 1)), Fine()),
            Case(other_pixels((4, 0, 5)), Bad(r"has shape \(4, 0, 5\), expected \(4, 'height', 'width'\)")),
        ],
    },
    "path traversal": {
        "mmearth": [
            Case(spoil, Refused(r"\.h5 has sentinel2 in another file, which is not followed"))
            for spoil in (spoiling.h5_link(), spoiling.h5_raw, spoiling.h5_virtual)
        ],
        "fmow": [
            Case(spoiling.fmow_list("path", "../secret.tif"), Bad(rf"the name '\.\./secret\.tif' {OUTSIDE}")),
            Case(spoiling.fmow_list("path", "/etc/secret.tif"), Bad(rf"the name '/etc/secret\.tif' {OUTSIDE}")),
            Case(spoiling.virtual_raster("fmow"), NOT_A_TIFF),
        ],
        "satlas": [
            Case(spoiling.satlas_scene("../../secret"), Refused(rf"the name '\.\./\.\./secret' {OUTSIDE}")),
            Case(spoiling.other_format, Bad(r"\.png is not a readable PNG: cannot identify")),
        ],
        "spectral_earth": [
            Case(
                lambda root, key: spoiling.written(
                    "splits/enmap/train.txt",
                    (root / "splits/enmap/train.txt").read_text().replace(key, "../../secret"),
                )(root, key),
                Bad(rf"the name 'enmap/\.\./\.\./secret\.tif' {OUTSIDE}"),
            ),
            Case(spoiling.virtual_raster("spectral_earth"), NOT_A_TIFF),
        ],
        "ssl4eo_s12": [Case(spoiling.virtual_raster("ssl4eo_s12"), NOT_A_TIFF)],
        "bigearthnet v1": [Case(spoiling.virtual_raster("bigearthnet v1"), NOT_A_TIFF)],
        "bigearthnet v2": [
            Case(spoiling.virtual_raster("bigearthnet v2"), NOT_A_TIFF),
            Case(spoiling.v2_table("s1_name", "../../secret"), Refused(r"'\.\./\.\./secret' is no name of a patch")),
        ],
        "eurosat webdataset": [
            Case(
                spoiling.retarred(lambda samples, key: samples.update({"../secret": samples.pop(key)})),
                Refused(r"train-000000\.tar, member '\.\./secret\.jpg', .*names with '\.\.' are refused"),
            ),
            Case(spoiling.tar_member("jpg", spoiling.png_file(64, mode=2)), NOT_A_JPEG),
        ],
        "eurosat geotiff": [
            Case(spoiling.virtual_raster("eurosat geotiff"), NOT_A_TIFF),
        ],
        "geotiff": [
            Case(
                lambda root, key: (root.with_suffix(".txt").write_text("../secret.tif\n"), root.with_suffix(".txt"))[1],
                Refused(rf"root: .*the name '\.\./secret\.tif' {OUTSIDE}"),
            ),
            Case(spoiling.virtual_raster("geotiff"), NOT_A_TIFF),
        ],
        "image_folder": "names are those of the folder itself",
        "image_folder geotiff": [Case(spoiling.virtual_raster("image_folder geotiff"), NOT_A_TIFF)],
        "raster_masks": [
            Case(spoiling.virtual_raster("raster_masks"), NOT_A_TIFF),
            Case(
                spoiling.nothing,
                Refused(r"masks: '\.\./\{key\}\.tif' leads out of root: patterns are relative to it"),
                {"masks": "../{key}.tif"},
            ),
        ],
        "geobench": [
            Case(
                spoiling.edited(
                    f"{EUROSAT}/default_partition.json", lambda lists, key: lists["train"].append("../../secret")
                ),
                Refused(r"lists '\.\./\.\./secret', expected the name of a file in its folder"),
            ),
            Case(
                spoiling.geobench_array(
                    lambda file: file.__setitem__("04 - Red", h5py.ExternalLink("secret.h5", "04 - Red"))
                ),
                Bad(r"'04 - Red' is a link to somewhere else, which is not followed"),
            ),
        ],
        "hdf5": [
            *(
                Case(spoil, Refused(r"dataset: .*tiles\.h5 has sentinel2 in another file, which is not followed"))
                for spoil in (spoiling.h5_link(), spoiling.h5_raw, spoiling.h5_virtual)
            ),
            *(
                Case(
                    spoiling.h5_link("label"),
                    Refused(rf"{option}: .*tiles\.h5 has label in another file, which is not followed"),
                    {option: value, **others},
                )
                for option, value, others in (
                    ("label_dataset", "label", {}),
                    ("meta_datasets", ["label"], {}),
                    ("split_dataset", "label", {"split": "train"}),
                )
            ),
        ],
        "shards": [
            Case(
                spoiling.manifest(lambda content: content["shards"][0].update(name="../secret.tar")),
                Refused(r"manifest\.json: shard '\.\./secret\.tar' is not a plain file name"),
            )
        ],
    },
    "JSON bomb": {
        "mmearth": [
            Case(
                spoiling.written(INFO, '{"a":' * 100_000),
                Refused(r"tile_info\.json is not an object of records .*recurs"),
            ),
            Case(
                spoiling.written(INFO, '{"1":' + LONG), Refused(r"tile_info\.json is not an object .*Exceeds the limit")
            ),
            Case(
                spoiling.edited(INFO, lambda records, key: records[key].update(lat=10**400)),
                Refused(r"tile_info\.json: record '\d+': int too large"),
            ),
            Case(spoiling.written(STATISTICS, DEEP), Refused(rf"band_stats\.json is {TOO_DEEP}")),
            Case(spoiling.written(STATISTICS, LONG), Refused(rf"band_stats\.json {TOO_LONG}")),
            Case(spoiling.swollen(STATISTICS, 1 << 40), Refused(r"band_stats\.json has .* bytes, expected statistics")),
            Case(spoiling.h5_bomb, Bad(r"\.h5: row \d of sentinel2 cannot be read: more than 6656 bytes")),
        ],
        "fmow": [  # its list is Parquet
            Case(
                spoiling.fmow_list("img_height", 1 << 40),
                Refused(r"\.parquet is no readable Parquet file: .*not in range"),
            ),
            Case(
                spoiling.fmow_list("img_height", (1 << 31) - 1),
                Bad(r"_ms\.tif has bands, .*; expected \(8, 2147483647"),
            ),
            Case(spoiling.fmow_list("gsd", 1e308), Fine()),
            Case(spoiling.fmow_rows, Refused(r"\.parquet has 20,000,001 rows, expected at most 20,000,000")),
        ],
        "satlas": [
            *(
                Case(spoiling.written(f"metadata/{name}.json", DEEP), Refused(rf"{name}\.json is {TOO_DEEP}"))
                for name in SATLAS_LISTS
            ),
            *(
                Case(spoiling.written(f"metadata/{name}.json", LONG), Refused(rf"{name}\.json {TOO_LONG}"))
                for name in SATLAS_LISTS
            ),
            Case(
                spoiling.swollen(GOOD, 1 << 40), Refused(r"good_images_lowres_all\.json has .* bytes, expected a list")
            ),
            Case(
                spoiling.png(spoiling.png_file(32, text=bytes(64 << 20))),
                Bad(r"\.png is not a readable PNG: Decompress"),
            ),
        ],
        "spectral_earth": [
            Case(
                spoiling.swollen("splits/enmap/train.txt", 1 << 40), Refused(r"train\.txt has .* bytes, expected names")
            )
        ],
        "ssl4eo_s12": [
            Case(spoiling.written(S12_JSON, DEEP), Bad(rf"metadata\.json is {TOO_DEEP}"), S12_METADATA),
            Case(spoiling.written(S12_JSON, LONG), Bad(rf"metadata\.json {TOO_LONG}"), S12_METADATA),
            Case(spoiling.swollen(S12_JSON, 1 << 40), Bad(r"metadata\.json has .* bytes, expected the"), S12_METADATA),
        ],
        "bigearthnet v1": [
            Case(spoiling.written(V1_JSON, DEEP), Bad(rf"_labels_metadata\.json is {TOO_DEEP}")),
            Case(spoiling.written(V1_JSON, LONG), Bad(rf"_labels_metadata\.json {TOO_LONG}")),
            Case(spoiling.swollen(V1_JSON, 1 << 40), Bad(r"_labels_metadata\.json has .* bytes, expected labels")),
        ],
        "bigearthnet v2": [  # its table is Parquet, without numbers
            Case(
                spoiling.v2_rows, Refused(r"metadata\.parquet is no metadata .*it has 5,000,001 rows, expected at most")
            ),
        ],
        "eurosat webdataset": [
            Case(spoiling.written("classes.json", DEEP), Refused(rf"classes\.json is {TOO_DEEP}")),
            Case(spoiling.written("classes.json", LONG), Refused(rf"classes\.json {TOO_LONG}")),
            Case(
                spoiling.written("classes.json", "{}"), Refused(r"classes\.json holds dict, expected names of classes")
            ),
            *(
                Case(
                    spoiling.written("classes.json", content),
                    Refused(r"classes\.json holds \[.*, expected names of cla"),
                )
                for content in ("[]", "[1, 2]", '["River", "River"]')
            ),
            Case(
                spoiling.swollen("classes.json", 1 << 40), Refused(r"classes\.json has .* bytes, expected names of cla")
            ),
            Case(
                spoiling.tar_member("cls", b"9" * 5000),
                Bad(r"River_3\.cls holds b'9+', expected the number of a class"),
            ),
            *(Case(spoiling.written("metadata.csv", content), refused) for content, refused in BAD_TABLES),
            Case(spoiling.swollen("metadata.csv", 1 << 40), Refused(r"metadata\.csv has .* bytes, expected columns")),
            Case(spoiling.written("train-000000.index.npz", "{}"), Refused(r"index\.npz: not a shard index")),
        ],
        "eurosat geotiff": [
            *(Case(spoiling.written("metadata.csv", content), refused) for content, refused in BAD_TABLES),
            Case(spoiling.swollen("metadata.csv", 1 << 40), Refused(r"metadata\.csv has .* bytes, expected columns")),
        ],
        "geotiff": [
            Case(
                spoiling.swollen("labels.csv", 1 << 40),
                Refused(r"label_csv: .*labels\.csv has .* bytes, expected a CSV file"),
                {"label_csv": "labels.csv"},
            ),
            *(
                Case(
                    spoiling.written("stats.json", content),
                    Refused(rf"tiles\[0\]\.statistics: stats\.json {reason}"),
                    {"tiles": [NAIP_STATISTICS]},
                )
                for content, reason in ((DEEP, f"is {TOO_DEEP}"), (LONG, TOO_LONG))
            ),
        ],
        **{
            name: [
                Case(spoiling.written("stats.json", content), Refused(reason), {"statistics": "stats.json"})
                for content, reason in (
                    (DEEP, rf"statistics: stats\.json is {TOO_DEEP}"),
                    (LONG, rf"statistics: stats\.json {TOO_LONG}"),
                )
            ]
            for name in ("image_folder", "image_folder geotiff", "raster_masks")
        },
        "geobench": [
            *(
                Case(spoiling.written(f"{EUROSAT}/{name}.json", content), Refused(rf"{name}\.json {reason}"))
                for name in ("band_stats", "default_partition", "label_map")
                for content, reason in ((DEEP, f"is {TOO_DEEP}"), (LONG, TOO_LONG))
            ),
            Case(
                spoiling.swollen(f"{EUROSAT}/default_partition.json", 1 << 40),
                Refused(r"default_partition\.json has .* bytes, expected lists of sample names"),
            ),
        ],
        "hdf5": [
            Case(spoiling.h5_bomb, Bad(r"tiles\.h5: row 3 of sentinel2 cannot be read: more than 6656 bytes")),
            *(
                Case(
                    spoiling.in_folder_of(spoiling.written("stats.json", content)),
                    Refused(rf"statistics: stats\.json {reason}"),
                    {"statistics": "stats.json"},
                )
                for content, reason in ((DEEP, f"is {TOO_DEEP}"), (LONG, TOO_LONG))
            ),
        ],
        "shards": [
            Case(
                spoiling.written("manifest.json", DEEP), Refused(r"manifest\.json: not valid JSON \(maximum recursion")
            ),
            Case(
                spoiling.written("manifest.json", LONG), Refused(r"manifest\.json: not valid JSON \(Exceeds the limit")
            ),
            Case(other_json(DEEP), Bad(r"shard-000000\.tar, sample 3: not valid JSON: maximum recursion")),
            Case(other_json(LONG), Bad(r"shard-000000\.tar, sample 3: not valid JSON: Exceeds the limit")),
            Case(other_json(json.dumps({**PLAIN, "gsd_m": {"naip": 10**400}})), Bad(r"sample 3: gsd_m")),
            Case(
                other_json(json.dumps({**PLAIN, "constant": {"naip": dict.fromkeys(range(4, 500_004), "00")}})),
                Bad(r"sample 3, naip: 500000 constant bands beside an array of shape \(4, 40, 40\), expected 4 in all"),
            ),
        ],
    },
    "impossible place": {
        "mmearth": [
            Case(
                spoiling.edited(INFO, lambda records, key: records[key].update(lat=91.0)),
                Refused(r"tile_info\.json: record '\d+': lat 91\.0, lon .* are no degrees"),
            )
        ],
        "fmow": "places are columns of its list, and one that is no number is unknown",
        "satlas": [
            Case(
                spoiling.written("metadata/train_lowres.json", "[[8192, 0]]"),
                Refused(r"train_lowres\.json holds \[8192, 0\], expected a list of \[column, row\] of zoom 13"),
            )
        ],
        "spectral_earth": [
            Case(spoiling.displaced("spectral_earth", crs=spoiling.LOCAL_CRS), NO_DEGREES),
            Case(spoiling.displaced("spectral_earth", corner=(1e30, 1e30)), NO_DEGREES),
        ],
        "ssl4eo_s12": [Case(spoiling.displaced("ssl4eo_s12", "B2.tif", crs=spoiling.LOCAL_CRS), Fine())],  # in no split
        "bigearthnet v1": [
            *(
                Case(
                    spoiling.edited(V1_JSON, lambda found, key, value=value: found["coordinates"].update(ulx=value)),
                    Bad(r"_labels_metadata\.json is no label file of BigEarthNet v1: "),
                )
                for value in (1e308, float("nan"), 10**400)
            ),
            Case(
                spoiling.edited(V1_JSON, lambda found, key: found.update(projection='AUTHORITY["EPSG","999999"]')),
                Bad(r"_labels_metadata\.json is no label file .*EPSG:999999 lies in no zone of UTM"),
            ),
        ],
        "bigearthnet v2": [
            Case(spoiling.displaced("bigearthnet v2", "{key}_B02.tif", crs=spoiling.LOCAL_CRS), NO_DEGREES),
        ],
        "eurosat webdataset": [
            *(
                Case(
                    spoiling.table_place(latitude, longitude),
                    Refused(r"split_by: metadata\.csv .* gives sample 'River_3' latitude and longitude .* no degrees"),
                    {"split": "train"},
                )
                for latitude, longitude in (
                    ("91", "10"),
                    ("44", "181"),
                    ("1e308", "10"),
                    ("nan", "10"),
                    ("", "10"),
                    ("N", "10"),
                )
            ),
            Case(spoiling.table_place("91"), Fine()),  # without a split by place it is not looked at
        ],
        "eurosat geotiff": [
            Case(spoiling.displaced("eurosat geotiff", crs=spoiling.LOCAL_CRS), Fine()),
            *(
                Case(spoiling.displaced("eurosat geotiff", **place), Fine(), {"split": "train"})  # in no split
                for place in ({"crs": spoiling.LOCAL_CRS}, {"crs": None}, {"corner": (1e30, 1e30)})
            ),
        ],
        "geotiff": [
            Case(spoiling.displaced("geotiff", crs=spoiling.LOCAL_CRS), NO_DEGREES),
            Case(spoiling.displaced("geotiff", corner=(1e30, 1e30)), NO_DEGREES),
        ],
        "image_folder": "a picture does not say where it lies",
        "image_folder geotiff": [
            Case(spoiling.displaced("image_folder geotiff", crs=spoiling.LOCAL_CRS), NO_DEGREES),
            *(
                Case(spoiling.displaced("image_folder geotiff", **place), Fine(), BY_PLACE)  # in no split
                for place in ({"crs": spoiling.LOCAL_CRS}, {"crs": None}, {"corner": (1e30, 1e30)})
            ),
        ],
        "raster_masks": [
            Case(spoiling.displaced("raster_masks", crs=spoiling.LOCAL_CRS), NO_DEGREES),
            Case(
                spoiling.displaced("raster_masks", corner=(700_000.0, 5_000_000.0)),
                Bad(r"has no box for the pixels 0:40"),
            ),
        ],
        "geobench": "no place is looked at: those that its files name are wrong",
        "hdf5": "a place is a column like any other of `meta_datasets`, and none is looked at",
        "shards": "a place is not looked at: it comes back as it was packed",
    },
}


CELLS = [
    pytest.param(name, case, id=f"{what}-{name}-{i}")
    for what, row in TABLE.items()
    for name, cases in row.items()
    if not isinstance(cases, str)
    for i, case in enumerate(cases)
]


def test_the_table_has_no_holes() -> None:
    of_others = {"synthetic", "hls_burn_scars"}  # no files; those of raster_masks
    assert {archive.source for archive in ARCHIVES.values()} == {*available("ssl_eo.data.sources")} - of_others
    for row in TABLE.values():
        assert list(row) == list(ARCHIVES)
        assert all(row.values())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[str]]]:
    """`written(name)`: the root of an archive, made once, and the keys of its samples."""
    made: dict[str, tuple[Path, list[str]]] = {}

    def write(name: str) -> tuple[Path, list[str]]:
        if name not in made:
            archive = ARCHIVES[name]
            root = tmp_path_factory.mktemp("archive") / archive.folder
            archive.write(root)
            source: Any = open_small(archive, root)
            made[name] = root, [source.locate(i)[0] for i in range(len(source))]
            assert len(made[name][1]) == N_SAMPLES
        return made[name]

    return write


@pytest.fixture
def copied(written: Callable[[str], tuple[Path, list[str]]], tmp_path: Path) -> Callable[[str], tuple[Path, list[str]]]:
    """The same, of a copy that a test may spoil, without the index files that opening left."""

    def copy(name: str) -> tuple[Path, list[str]]:
        root, keys = written(name)
        if root.is_file():
            return Path(shutil.copy(root, tmp_path)), keys
        return shutil.copytree(root, tmp_path / root.name, ignore=shutil.ignore_patterns(".*")), keys

    return copy


# --- one line, or one bad sample --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("name", "case"), CELLS)
def test_bad_input_is_one_line_or_one_bad_sample(
    name: str, case: Case, copied: Callable[[str], tuple[Path, list[str]]]
) -> None:
    root, keys = copied(name)
    root = case.spoil(root, keys[VICTIM]) or root
    refusal, records = in_child(read_epoch, name, case, root)
    match case.outcome:
        case Refused(reason):
            assert records == []
            check_line(refusal, reason)
        case Bad(reason):
            assert refusal == ""
            assert {record["index"] for record in records} == {VICTIM}
            assert all(record["key"] is not None and record["shard"] for record in records)
            check_line(records[0]["reason"], reason)
        case Fine():
            assert (refusal, records) == ("", [])


def check_line(line: str, reason: str) -> None:
    assert re.search(reason, line), line
    assert line == " ".join(line.split())
    assert len(line.encode()) < 1000  # encodes, too


def read_epoch(name: str, case: Case, root: Path) -> tuple[str, list[dict[str, Any]]]:
    """Why the source is refused ("" if it is not), and the quarantine of an epoch, whose views are rendered."""
    os.chdir(root.parent if root.is_file() else root)
    quarantine = root.parent / "quarantine.jsonl"
    try:
        source = open_small(ARCHIVES[name], root, **case.options)
    except ValueError as error:
        return str(error), []
    renderer = Renderer([source.schema])
    with load(name, source, crop=case.crop, size_px=case.size_px, total_steps=N_STEPS, path=quarantine) as batches:
        for batch in batches:
            pixels = renderer.render(batch)["image"].pixels  # [R, C, H, W]
            assert pixels.shape[2:] == (case.size_px, case.size_px)
            assert pixels.isfinite().all()
    return "", records_of(quarantine)


def in_child(call: Callable[..., Any], *args: Any) -> Any:
    """What `call` returns in a process of its own; fails when it takes too long or too much memory."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_answer, args=(there, call, *args))
    process.start()
    there.close()
    try:
        assert here.poll(LIMIT_S), f"it hangs for {LIMIT_S} s"
        returned, error, grown_mb = here.recv()
    finally:
        process.kill()
        process.join()
    assert not error, error
    assert grown_mb < LIMIT_MB
    return returned


def _answer(there: Any, call: Callable[..., Any], *args: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB; of a fork, what it holds now
    returned, failure = None, ""
    try:
        returned = call(*args)
    except BaseException:
        failure = traceback.format_exc()
    there.send((returned, failure, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


# --- an unreadable tile in the middle of an epoch ---------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_tile_that_breaks_while_training_is_replaced_as_stated(
    name: str, copied: Callable[[str], tuple[Path, list[str]]], tmp_path: Path
) -> None:
    root, keys = copied(name)
    source = open_small(ARCHIVES[name], root)
    order = Order(len(source), source.chunk_size, N_LANES, BATCH_SIZE, SEED)
    total_steps, start_step = 2 * N_STEPS, N_STEPS + 1
    bad = int(order.batch(N_STEPS // 2)[0])  # comes in the middle of the first epoch
    ARCHIVES[name].damage(root, keys[bad])

    path = tmp_path / "quarantine.jsonl"
    with load(name, source, total_steps=total_steps, n_workers=2, path=path) as loader:
        batches = [content_of(batch) for batch in loader]
        n_bad, n_seen = loader.n_bad, loader.n_seen
    expected, replaced = stated(order, bad, total_steps)
    assert [batch[0] for batch in batches] == [[keys[i] for i in step] for step in expected]
    records = records_of(path)
    assert [(r["step"], r["index"], r["key"]) for r in records] == [(step, bad, keys[bad]) for step in replaced]
    assert (n_bad, n_seen) == (len(replaced), total_steps * BATCH_SIZE)
    for record in records:
        assert record["source"] == name
        assert record["shard"]
        check_line(record["reason"], ".")
    first_epoch = [i for step in expected[:N_STEPS] for i in step]
    assert bad not in first_epoch
    assert set(first_epoch) == set(range(len(source))) - {bad}  # no other is lost; one of them comes a second time

    again = tmp_path / "again.jsonl"
    with load(name, source, total_steps=total_steps, path=again) as loader:
        assert [content_of(batch) for batch in loader] == batches
    assert records_of(again) == records
    again.unlink()
    with load(name, source, total_steps=total_steps, start_step=start_step, path=again) as loader:
        assert [content_of(batch) for batch in loader] == batches[start_step:]
    assert records_of(again) == [r for r in records if r["step"] >= start_step]


def stated(order: Order, bad: int, total_steps: int) -> tuple[list[list[int]], list[int]]:
    """The samples of each step, `bad` replaced as `Order` says, and the steps in which that happens, once for each."""
    steps, replaced = [], []
    for step in range(total_steps):
        ids = order.batch(step).tolist()
        for slot in range(BATCH_SIZE):
            attempt = 0
            while ids[slot] == bad:
                attempt += 1
                replaced.append(step)
                ids[slot] = order.replacement(step, slot, attempt)
        steps.append(ids)
    return steps, replaced


def load(
    name: str,
    source: Source,
    *,
    total_steps: int,
    path: Path,
    start_step: int = 0,
    n_workers: int = 0,
    crop: SourceCrop | None = None,
    size_px: int = 16,
) -> Loader:
    views = MaskedViews(
        CropConfig(size_px=size_px), MaskConfig(), size_px // 4, 1, [source.schema], list(ARCHIVES[name].tiles)
    )
    cfg = DataConfig(
        [WeightedSourceConfig(name, None, crop=crop or SourceCrop())],
        n_lanes=N_LANES,
        n_workers=n_workers,
        max_bad_ratio=1.0,
    )
    return Loader(
        cfg,
        [source],
        views,
        seed=SEED,
        global_batch_size=BATCH_SIZE,
        total_steps=total_steps,
        start_step=start_step,
        quarantine_path=path,
    )


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# --- damage anywhere in a header --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 320), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_raster_is_named_or_read(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    path, whole = tmp_path / "a.tif", tmp_path / "whole.tif"
    if not whole.exists():
        write_raster(whole, np.ones((1, 60, 60), np.uint16))
    content = bytearray(whole.read_bytes())
    for at, value in changes:
        content[at] = value
    path.write_bytes(content)
    try:
        pixels = BandFiles((path,), (60, 60), np.dtype(np.uint16))[:, :, :]
        place_of(path)
    except (ValueError, OSError) as error:
        check_line(str(error), re.escape(str(path)))
    else:
        assert pixels.shape == (1, 60, 60)


@settings(max_examples=50, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_jpeg_is_named_or_read(changes: list[tuple[int, int]]) -> None:
    content = bytearray(small.jpeg(0))
    for at, value in changes:
        content[at] = value
    try:
        pixels = decode_jpeg("River_0.jpg", bytes(content))
    except (ValueError, OSError) as error:
        check_line(str(error), r"^River_0\.jpg (is not a readable JPEG: |has mode )")
    else:
        assert pixels.shape == (3, 64, 64)


# --- tars of other tools ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["../../secret.npy", "/etc/secret.npy", "a/../../secret.npy"])
def test_a_member_of_a_tar_never_leads_out(member: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(member))
    with pytest.raises(ShardError) as caught:
        index(tmp_path)
    check_line(str(caught.value), rf"a\.tar.*{re.escape(member)}.*absolute names and names with '\.\.' are refused")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
