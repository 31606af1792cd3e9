"""How fast one core reads MMEarth: from the HDF5 file as it was downloaded, and from packed shards.

All rows but the last two read the same pixels of the same samples, Sentinel-2 (12 bands), elevation and slope, and
WorldCover, 64 x 64, and copy them into a batch. Rows whose names say nothing else read in random order.

B samples of a batch, C bands, H = W = 64 pixels.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from _table import Row
from numpy.typing import NDArray

from ssl_eo.data.pack import pack
from ssl_eo.data.shards import ShardIndex
from ssl_eo.data.sources import mmearth, shards, synthetic
from ssl_eo.data.types import Source

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))
from archives.mmearth import write_mmearth

__all__ = ["measure_reading"]

BATCH = 32
SIZE_PX = 64
TILES = ["sentinel2_l1c", "sentinel2_l2a", "dem", "worldcover"]
ALL_TILES = [
    *TILES,
    *("sentinel1_grd_ascending", "sentinel1_grd_descending", "canopy_height", "dynamic_world"),
    *("sentinel2_scl", "sentinel2_cloud_mask"),
]
S2_BANDS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12]  # planes of the array; B10 is not read
S2_GROUPS = [[1, 2, 3], [4, 5, 6], [7, 8], [0, 9, 11, 12]]  # visible, red edge, infrared, the others
PLANES = {"sentinel2": S2_BANDS, "aster": [0, 1], "esa_worldcover": [0]}  # HDF5 array -> planes that are read

# Copies one sample into a batch at each step, without end.
Reader = Iterator[None]


def measure_reading(folder: Path, quick: bool) -> list[Row]:
    """Writes an archive into `folder`, packs it, and reads it in every way."""
    n_samples, n_turns, turn_s = (256, 2, 0.1) if quick else (2048, 25, 0.2)
    root = folder / "mmearth"
    write_mmearth(root, n_samples, SIZE_PX)
    archive = root / f"{root.name}.h5"
    packed, packing = _packed(root, folder)
    raw, blosc, whole = (folder / name for name in ("raw", "blosc", "all"))
    stored = {"HDF5": _stored_kb(archive, list(PLANES)), "HDF5, all": _stored_kb(archive), **packed}
    readers: dict[str, tuple[str, Reader, float | None]] = {  # row -> what is stored, reader, least ratio
        "HDF5 opened for each sample, lists": ("HDF5", _reopened(archive, [S2_BANDS]), None),  # the yardstick
        "HDF5 opened for each sample, lists, Sentinel-2 in 4 parts": ("HDF5", _reopened(archive, S2_GROUPS), None),
        "HDF5 opened once, NumPy picks bands": ("HDF5", _opened_once(archive), None),
        "source mmearth": ("HDF5", _source(_mmearth(root, TILES)), 8),
        "packed raw": ("raw", _source(_shards(raw)), 60),
        "packed raw, pread": ("raw", _source(_shards(raw, access="pread")), None),
        "packed raw, CRC-32 verified": ("raw", _source(_shards(raw, verify=True)), None),
        "packed blosc": ("blosc", _source(_shards(blosc)), 20),
        "packed raw by webdataset, sequential": ("raw", _webdataset(raw, ".npy"), None),
        "packed blosc by webdataset, sequential": ("blosc", _webdataset(blosc, ".npy.blosc"), None),
        "packed raw by tarfile, sequential": ("raw", _tarfile(raw), None),
        "source mmearth, all 10 tiles": ("HDF5, all", _source(_mmearth(root, ALL_TILES)), None),
        "packed raw, all 10 tiles": ("all", _source(_shards(whole)), None),
    }
    rates = _best_rates({name: reader for name, (_, reader, _) in readers.items()}, n_turns, turn_s)
    yardstick = next(iter(rates.values()))
    least = {"packed raw, all 10 tiles": 8000}
    rows = [
        Row("reading", name, rate, "samples/s", rate / yardstick, stored[what], least_ratio, least.get(name))
        for (name, (what, _, least_ratio)), rate in zip(readers.items(), rates.values(), strict=True)
    ]
    return [*rows, *packing, _scenes(n_samples // 4)]


def _scenes(n: int) -> Row:
    """Procedural scenes, which are made rather than read."""
    source = synthetic.Source(synthetic.Config(n_samples=n, sensors=["sentinel2_l2a"]))
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        for index in range(n):
            source.read(index)
        best = max(best, n / (time.process_time() - start))
    return Row("scenes", "source synthetic, Sentinel-2, 64 px", best, "samples/s", least=300)


def _best_rates(readers: dict[str, Reader], n_turns: int, turn_s: float) -> dict[str, float]:
    """Samples per second of processor time. Rows take turns and the best counts: a busy machine disturbs all alike."""
    for reader in readers.values():  # opens files, fills the page cache
        next(reader)
    best = dict.fromkeys(readers, 0.0)
    for _ in range(n_turns):
        for name, reader in readers.items():
            best[name] = max(best[name], _rate(reader, turn_s))
    return best


def _rate(reader: Reader, seconds: float) -> float:
    n, elapsed, start = 0, 0.0, time.process_time()
    while elapsed < seconds:
        for _ in islice(reader, BATCH):
            n += 1
        elapsed = time.process_time() - start
    return n / elapsed


def _packed(root: Path, folder: Path) -> tuple[dict[str, float], list[Row]]:
    """Packs the archive three times. KB of a sample in each, and how fast that was.

    Constant bands are kept, since not every reader here would restore them.
    """
    stored, rows = {}, []
    for name, tiles, codec in (("raw", TILES, "raw"), ("blosc", TILES, "blosc"), ("all", ALL_TILES, "raw")):
        start = time.process_time()
        report = pack(
            _mmearth(root, tiles), folder / name, codec=codec, samples_per_shard=512, keep_constant_bands=True
        )
        rate = report.n_samples / (time.process_time() - start)
        stored[name] = report.n_bytes / report.n_samples / 1e3
        if name != "all":
            rows.append(Row("packing", f"pack, {codec}", rate, "samples/s", stored_kb=stored[name]))
    start = time.process_time()
    n_bytes = sum(ShardIndex.build(path).tar_size for path in sorted((folder / "raw").glob("*.tar")))
    rows.append(Row("packing", "index: headers and CRC-32", n_bytes / 1e6 / (time.process_time() - start), "MB/s"))
    return stored, rows


def _stored_kb(archive: Path, names: list[str] | None = None) -> float:
    """KB of a sample in the arrays `names` of the file, or in all of those that are tiles."""
    import h5py

    with h5py.File(archive) as file:
        arrays = [file[name] for name in names or file if file[name].ndim == 4]
        return sum(a.id.get_storage_size() / len(a) for a in arrays) / 1e3


# --- readers ----------------------------------------------------------------------------------------------------------


def _empty_batch() -> dict[str, NDArray[Any]]:
    """What the rows that read HDF5 by themselves fill: `[B, C, H, W]` by array."""
    dtypes = {"sentinel2": "uint16", "aster": "int16", "esa_worldcover": "uint8"}
    return {name: np.empty((BATCH, len(planes), SIZE_PX, SIZE_PX), dtypes[name]) for name, planes in PLANES.items()}


def _random_rows(n: int) -> Iterator[tuple[int, int]]:
    """(place in the batch, sample), for ever."""
    order, place = random.Random(0), 0
    while True:
        yield place, order.randrange(n)
        place = (place + 1) % BATCH


def _reopened(archive: Path, s2_groups: list[list[int]]) -> Reader:
    """What research code does: open the file for each sample, and index each modality by a list of its planes."""
    import h5py

    batch = _empty_batch()
    with h5py.File(archive) as file:
        n_samples = len(file["metadata"])
    for place, row in _random_rows(n_samples):
        with h5py.File(archive) as file:
            for planes in s2_groups:
                batch["sentinel2"][place, [S2_BANDS.index(plane) for plane in planes]] = file["sentinel2"][row, planes]
            for name in ("aster", "esa_worldcover"):
                batch[name][place] = file[name][row, PLANES[name], ...]
        yield


def _opened_once(archive: Path) -> Reader:
    import h5py

    batch = _empty_batch()
    with h5py.File(archive) as file:
        arrays = {name: file[name] for name in PLANES}
        for place, row in _random_rows(len(file["metadata"])):
            for name, planes in PLANES.items():
                batch[name][place] = arrays[name][row][planes]
            yield


def _mmearth(root: Path, tiles: list[str]) -> mmearth.Source:
    return mmearth.Source(mmearth.Config(str(root), tiles=tiles, split="all", cirrus_band=False))


def _shards(folder: Path, **options: Any) -> shards.Source:
    return shards.Source(shards.Config(str(folder), **options))


def _source(source: Source) -> Reader:
    batch = _batch_of(source)
    for place, index in _random_rows(len(source)):
        for name, tile in source.read(index).tiles.items():
            batch[name][place] = tile.pixels
        yield


def _batch_of(source: Source) -> dict[str, NDArray[Any]]:
    """`[B, C, H, W]` by tile. Both levels of Sentinel-2 go to one array, as they do in the rows without a source."""
    batch = {name: np.empty((BATCH, len(t.bands), *t.shape), t.dtype) for name, t in source.schema.items()}
    batch["sentinel2_l1c"] = batch["sentinel2_l2a"]
    return batch


def _webdataset(folder: Path, ending: str) -> Reader:
    """The `webdataset` library: sequential, as it reads."""
    import webdataset

    batch = _batch_of(_shards(folder))
    decoders = [_decode_blosc] if ending == ".npy.blosc" else []
    paths = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(paths, shardshuffle=False).repeat().decode(*decoders)
    for i, sample in enumerate(samples):
        for name in batch:
            if name + ending in sample:
                batch[name][i % BATCH] = sample[name + ending]
        yield


def _decode_blosc(key: str, data: bytes) -> NDArray[Any] | None:
    """Decoder for `webdataset`: compressed members, as any user would write it."""
    if not key.endswith(".npy.blosc"):
        return None
    from numcodecs import blosc

    return np.load(io.BytesIO(blosc.decompress(data)))


def _tarfile(folder: Path) -> Reader:
    """`tarfile` of the standard library, sequential, `numpy.load` on each member."""
    batch = _batch_of(_shards(folder))
    place = 0
    while True:
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path, "r|") as tar:
                for member in tar:
                    suffix = member.name.split(".", 1)[1]
                    data = tar.extractfile(member).read()
                    if suffix != "json":
                        batch[suffix.removesuffix(".npy")][place] = np.load(io.BytesIO(data))
                    else:  # the last member of a sample
                        json.loads(data)
                        place = (place + 1) % BATCH
                        yield
