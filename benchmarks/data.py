"""Samples per second of one core from packed shards, beside the `webdataset` library and `tarfile` on the same bytes.

    python benchmarks/data.py [--quick]

Builds its own shards in a temporary folder: 64 x 64 px samples of nine rasters (290 KB: 13 bands uint16, 8 bands
float32, 2 int16, 2 int8, 3 uint8, 2 uint16), smooth fields with noise. Every row touches every byte it reads: the
pixels are copied into a batch of 32 samples. The page cache is warm and what is counted is the processor time of this
one process. Rows are measured in turns and the best turn counts, so that a busy machine disturbs all rows alike; the
ratios are what to trust.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from ssl_eo.data.pack import pack
from ssl_eo.data.shards import ShardIndex, index_path
from ssl_eo.data.sources.shards import Config
from ssl_eo.data.sources.shards import Source as PackedSource
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import Band, Sensor

SIZE = 64
BATCH = 32
RASTERS = {  # tile name -> bands, dtype
    "optical": (13, "uint16"),
    "radar": (8, "float32"),
    "elevation": (2, "int16"),
    "canopy_height": (2, "int8"),
    "landcover": (1, "uint8"),
    "dynamic_landcover": (1, "uint8"),
    "scene_class": (1, "uint8"),
    "cloud_mask": (1, "uint16"),
    "cloud_prob": (1, "uint16"),
}
SUBSET = ["optical", "landcover", "elevation"]


class SmoothSource:
    """`n` samples cut from one smooth random field with noise."""

    label_names = ()
    chunk_size = 32

    def __init__(self, n: int) -> None:
        self.n = n
        rng = np.random.default_rng(0)
        spectrum = rng.normal(size=(512, 512)) + 1j * rng.normal(size=(512, 512))
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512))) + 1 / 512
        self.field = np.fft.ifft2(spectrum / frequency**1.5).real
        self.field /= self.field.std()
        self.schema = {}
        for name, (n_bands, dtype) in RASTERS.items():
            bands = tuple(Band(f"b{i}", "elevation", 10.0) for i in range(n_bands))
            sensor = Sensor(name, name, bands, dtype, "1", "generated")
            statistics = (0.0,) * n_bands, (1.0,) * n_bands
            self.schema[name] = TileSchema(sensor, sensor.band_names, dtype, (SIZE, SIZE), 10.0, *statistics)

    def __len__(self) -> int:
        return self.n

    def fingerprint(self) -> str:
        return f"smooth-{self.n}"

    def read(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        tiles = {}
        for name, (n_bands, dtype) in RASTERS.items():
            top, left = rng.integers(0, 512 - SIZE, 2)
            values = self.field[top : top + SIZE, left : left + SIZE] * rng.uniform(0.5, 1.5, (n_bands, 1, 1))
            values = values + rng.normal(0, 0.05, values.shape)
            scale = {"float32": 5, "uint16": 500, "int16": 300}.get(dtype, 10)
            tiles[name] = Tile((np.abs(values) * scale).astype(dtype), self.schema[name].bands, 10.0)
        return Sample(f"sample_{index:06d}", tiles, {"latitude": float(index % 90)}, index % 10)


def fill(sample: dict[str, np.ndarray], batch: dict[str, np.ndarray], row: int) -> None:
    for name, pixels in sample.items():
        batch[name][row] = pixels


def empty_batch(names: list[str]) -> dict[str, np.ndarray]:
    return {n: np.empty((BATCH, RASTERS[n][0], SIZE, SIZE), RASTERS[n][1]) for n in names}


def read_packed(folder: Path, names: list[str], access: str = "mmap", verify: bool = False) -> Callable[[int], float]:
    """Our reader, random order over all shards."""
    source = PackedSource(Config(str(folder), tiles=names, access=access, verify=verify))
    order = random.Random(0)

    def run(n: int) -> float:
        batch = empty_batch(names)
        indices = [order.randrange(len(source)) for _ in range(n)]
        start = time.process_time()
        for i, index in enumerate(indices):
            sample = source.read(index)
            fill({name: tile.pixels for name, tile in sample.tiles.items()}, batch, i % BATCH)
        return n / (time.process_time() - start)

    return run


def read_webdataset(
    folder: Path, names: list[str], decoder: Callable[..., object] | None = None
) -> Callable[[int], float]:
    """The `webdataset` library: sequential, as it reads."""
    import webdataset

    shards = sorted(str(p) for p in folder.glob("*.tar"))
    suffix = ".npy.blosc" if decoder else ".npy"

    def run(n: int) -> float:
        batch = empty_batch(names)
        stream = webdataset.WebDataset(shards, shardshuffle=False).decode(*([decoder] if decoder else []))
        start = time.process_time()
        for i, sample in enumerate(islice(stream, n)):
            fill({name: sample[name + suffix] for name in names}, batch, i % BATCH)
        return min(n, i + 1) / (time.process_time() - start)

    return run


def read_tarfile(folder: Path, names: list[str]) -> Callable[[int], float]:
    """`tarfile` of the standard library, sequential, `numpy.load` on each member."""
    shards = sorted(folder.glob("*.tar"))

    def run(n: int) -> float:
        batch = empty_batch(names)
        wanted = {f"{name}.npy": name for name in names}
        done, start = 0, time.process_time()
        for shard in shards:
            with tarfile.open(shard, "r|") as tar:
                for member in tar:
                    suffix = member.name.split(".", 1)[1]
                    data = tar.extractfile(member).read()
                    if suffix in wanted:
                        batch[wanted[suffix]][done % BATCH] = np.load(io.BytesIO(data))
                    elif suffix == "json":
                        json.loads(data)
                        done += 1
                    if done == n:
                        return n / (time.process_time() - start)
        return done / (time.process_time() - start)

    return run


def decode_blosc(key: str, data: bytes) -> object:
    """Decoder for `webdataset`: compressed members, as any user would write it."""
    if not key.endswith(".npy.blosc"):
        return None
    from numcodecs import blosc

    return np.load(io.BytesIO(blosc.decompress(data)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, rough numbers")
    arguments = parser.parse_args()
    n_samples, n_turns = (256, 2) if arguments.quick else (2000, 5)
    names = list(RASTERS)
    with tempfile.TemporaryDirectory() as temporary:
        folders, sizes = {}, {}
        for codec in ("raw", "blosc"):
            folder = Path(temporary) / codec
            start = time.process_time()
            report = pack(SmoothSource(n_samples), folder, codec=codec, samples_per_shard=512)
            seconds = time.process_time() - start
            folders[codec], sizes[codec] = folder, report.n_bytes / n_samples / 1e3
            rate = n_samples / seconds
            print(f"packed {n_samples} samples, codec {codec}: {sizes[codec]:.0f} KB a sample, {rate:.0f} samples/s")
        start = time.process_time()
        shards = sorted(folders["raw"].glob("*.tar"))
        n_bytes = sum(ShardIndex.build(shard).tar_size for shard in shards)
        print(f"indexing (header scan and CRC-32): {n_bytes / 1e6 / (time.process_time() - start):.0f} MB/s")
        index_size = sum(index_path(shard).stat().st_size for shard in shards)
        print(f"index: {index_size / n_samples:.0f} bytes a sample\n")
        rows = {
            "webdataset, all rasters, sequential": ("raw", read_webdataset(folders["raw"], names)),
            "tarfile, all rasters, sequential": ("raw", read_tarfile(folders["raw"], names)),
            "packed, all rasters, random": ("raw", read_packed(folders["raw"], names)),
            "packed, all rasters, random, pread": ("raw", read_packed(folders["raw"], names, "pread")),
            "packed, all rasters, random, verified": ("raw", read_packed(folders["raw"], names, verify=True)),
            "packed, 3 of 9 rasters, random": ("raw", read_packed(folders["raw"], SUBSET)),
            "webdataset, all rasters, blosc, sequential": (
                "blosc",
                read_webdataset(folders["blosc"], names, decode_blosc),
            ),
            "packed, all rasters, blosc, random": ("blosc", read_packed(folders["blosc"], names)),
            "packed, 3 of 9 rasters, blosc, random": ("blosc", read_packed(folders["blosc"], SUBSET)),
        }
        best = dict.fromkeys(rows, 0.0)
        for _ in range(n_turns):
            for name, (_, run) in rows.items():
                best[name] = max(best[name], run(n_samples))
        print(f"{'reader':<46}{'KB stored':>10}{'samples/s':>12}{'ratio':>8}")
        reference = next(iter(best.values()))
        for name, rate in best.items():
            print(f"{name:<46}{sizes[rows[name][0]]:>10.0f}{rate:>12.0f}{rate / reference:>8.1f}")


if __name__ == "__main__":
    main()
