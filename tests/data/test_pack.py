"""Packing: exact, resumable after a kill, the same bytes every time; and what checks, statistics and errors say."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data import pack as packing
from ssl_eo.data.manifest import Manifest, content_hash, schema_from_dict, schema_to_dict
from ssl_eo.data.pack_check import Problem, check
from ssl_eo.data.shard_reader import LocalShard, ShardReader
from ssl_eo.data.shards import ShardError, ShardIndex, ShardWriter, index_path
from ssl_eo.data.sources.shards import Config
from ssl_eo.data.sources.shards import Source as PackedSource
from ssl_eo.data.statistics import BandStatistics
from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import Band, Sensor


def schema(name: str, dtype: str, n_bands: int, side: int, no_data: tuple[float, ...] = ()) -> TileSchema:
    bands = tuple(Band(f"b{i}", "optical", 10.0, wavelength_um=0.5 + i / 10, fwhm_um=0.05) for i in range(n_bands))
    sensor = Sensor(name.split("@")[0], name, bands, dtype, "1", "generated", no_data=no_data)
    ones = (1.0,) * n_bands
    return TileSchema(sensor, sensor.band_names, dtype, (side, side), 10.0, mean=ones, std=ones)


class TinySource:
    """Samples that follow from their index. `bad` cannot be read, `delay_s` is the time that one takes."""

    schema: ClassVar = {
        "optical@10m": schema("optical@10m", "uint16", 3, 8, no_data=(0.0,)),
        "optical@20m": schema("optical@20m", "uint16", 2, 4),
        "radar": schema("radar", "float32", 2, 8),
    }
    label_names = ("field", "forest", "lake")
    chunk_size = 8

    def __init__(self, n: int = 20, bad: tuple[int, ...] = (), delay_s: float = 0.0, seed: int = 0) -> None:
        self.n, self.bad, self.delay_s, self.seed = n, bad, delay_s, seed

    def __len__(self) -> int:
        return self.n

    def fingerprint(self) -> str:
        return f"tiny-{self.n}-{self.seed}"

    def read(self, index: int) -> Sample:
        time.sleep(self.delay_s)
        if index in self.bad:
            raise OSError(f"cannot read {index}")
        rng = np.random.default_rng([self.seed, index])
        radar = rng.normal(-12, 4, (2, 8, 8)).astype(np.float32)
        radar[1, :, : index % 3] = np.nan
        pixels = {
            "optical@10m": rng.integers(0, 5, (3, 8, 8), np.uint16) * 700,
            "optical@20m": rng.integers(0, 4000, (2, 4, 4), np.uint16),
            "radar": radar,
        }
        gsd_m = {"optical@10m": 10.0, "optical@20m": 10.0, "radar": 10.0 + index % 2}
        tiles = {name: Tile(p, self.schema[name].bands, gsd_m[name]) for name, p in pixels.items()}
        label = (index % 3, rng.integers(0, 9, (8, 8)).astype(np.uint8), None)[index % 3]
        return Sample(f"scene.{index}/é", tiles, {"latitude": index / 7, "date": "2020-01-01"}, label)


class VariedSource(TinySource):
    """Every other sample has a second tile, of a size and a date of its own."""

    schema: ClassVar = {
        "radar": TinySource.schema["radar"],
        "thermal@noon": replace(schema("thermal@noon", "float32", 1, 8), shape=None, optional=True),
    }

    def read(self, index: int) -> Sample:
        sample = TinySource(self.n).read(index)
        tiles = {"radar": replace(sample.tiles["radar"], date="2021-06-01")}
        if index % 2:
            pixels = np.full((1, 3 + index, 5), index, np.float32)
            tiles["thermal@noon"] = Tile(pixels, ("b0",), 10.0, date=f"2021-06-{1 + index:02d}T12:00")
        return replace(sample, tiles=tiles)


def assert_same_samples(packed: PackedSource, source: TinySource, indices: list[int]) -> None:
    assert len(packed) == len(indices)
    for row, index in enumerate(indices):
        mine, theirs = packed.read(row), source.read(index)
        assert (mine.key, mine.meta) == (theirs.key, theirs.meta)
        assert type(mine.label) is type(theirs.label)
        assert np.array_equal(mine.label, theirs.label)
        assert mine.tiles.keys() == theirs.tiles.keys()
        for name, tile in mine.tiles.items():
            expected = theirs.tiles[name]
            assert (tile.bands, tile.gsd_m, tile.date) == (expected.bands, expected.gsd_m, expected.date)
            assert tile.pixels.dtype == expected.pixels.dtype
            assert tile.pixels.shape == expected.pixels.shape
            assert tile.pixels.tobytes() == expected.pixels.tobytes()


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def fork(function: Callable[..., None], *arguments: object) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def wait_for(path: Path, process: BaseProcess | subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, process
        time.sleep(0.005)


# --- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "blosc", {"radar": "blosc"}])
@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_what_is_packed_comes_back(tmp_path, codec, access):
    source, seen = TinySource(), []
    report = packing.pack(
        source, tmp_path, codec=codec, samples_per_shard=7, progress=lambda *progress: seen.append(progress)
    )
    assert (report.n_samples, report.n_bad, report.n_shards, report.n_shards_kept) == (20, 0, 3, 0)
    assert seen == [(7, 20), (14, 20), (20, 20)]
    packed = PackedSource(Config(str(tmp_path), access=access, verify=True, max_open_shards=1))
    assert packed.schema == source.schema
    assert packed.label_names == source.label_names
    assert packed.locate(8) == (source.read(8).key, "shard-000001.tar")
    assert_same_samples(packed, source, list(range(20)))
    assert_same_samples(pickle.loads(pickle.dumps(packed)), source, list(range(20)))
    with pytest.raises(IndexError):
        packed.read(20)


@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_tiles_that_not_every_sample_has_and_that_differ_in_size(tmp_path, codec):
    source = VariedSource(12)
    report = packing.pack(source, tmp_path, codec=codec, samples_per_shard=5)
    packed = PackedSource(Config(str(tmp_path), verify=True))
    assert packed.schema == source.schema
    assert_same_samples(packed, source, list(range(12)))
    thermal = report.statistics["thermal@noon"]
    assert thermal.count.tolist() == [sum(5 * (3 + i) for i in range(1, 12, 2))]
    assert (thermal.minimum.tolist(), thermal.maximum.tolist()) == ([1], [11])
    assert check(tmp_path).ok


class FlatSource(TinySource):
    """Bands without content: one of radar in every sample, all of optical@20m in some."""

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        sample.tiles["radar"].array[0] = -np.inf
        if index % 2:
            sample.tiles["optical@20m"].array[:] = [[[index]], [[0]]]
        return sample


@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_constant_bands_cost_nothing_and_come_back(tmp_path, codec):
    source = FlatSource()
    for name, keep in (("dropped", False), ("kept", True)):
        packing.pack(source, tmp_path / name, codec=codec, samples_per_shard=9, keep_constant_bands=keep)
        assert_same_samples(PackedSource(Config(str(tmp_path / name), verify=True)), source, list(range(20)))
        assert check(tmp_path / name).ok
    reader = ShardReader(tmp_path / "dropped" / "shard-000000.tar")
    suffix = ".npy" if codec == "raw" else ".npy.blosc"
    assert reader.array(1, f"radar{suffix}").shape == (1, 8, 8)
    assert reader.array(1, f"optical@20m{suffix}").shape == (0, 4, 4)
    assert json.loads(reader.read(1, "json"))["constant"] == {
        "optical@20m": {"0": "0100", "1": "0000"},
        "radar": {"0": "000080ff"},
    }
    kept = ShardReader(tmp_path / "kept" / "shard-000000.tar")
    assert kept.array(1, f"radar{suffix}").shape == (2, 8, 8)


def test_a_band_count_that_does_not_fit_its_constants_is_found(tmp_path):
    packing.pack(FlatSource(), tmp_path, samples_per_shard=20)
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"radar":{"0":"000080ff"}', b'"radar":{"9":"000080ff"}', 1))
    ShardIndex.build(shard).save(index_path(shard))  # else the checksum says so first
    problems = check(tmp_path).problems
    assert [p.member for p in problems if "constant bands {9: '000080ff'} do not fit 1 stored bands" in p.reason]
    with pytest.raises(ValueError, match="do not fit 1 stored bands"):
        PackedSource(Config(str(tmp_path))).read(0)


def test_a_shard_that_reads_back_otherwise_stops_it(tmp_path, monkeypatch):
    replaced = Path.replace

    def failing_disk(self: Path, target: Path) -> Path:
        if target.suffix == ".tar":
            data = bytearray(self.read_bytes())
            data[5000] ^= 1
            self.write_bytes(data)
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", failing_disk)
    with pytest.raises(OSError, match=r"shard-000000\.tar does not hold what was written to it; see to the disk"):
        packing.pack(TinySource(), tmp_path, samples_per_shard=7)
    monkeypatch.undo()
    packing.pack(TinySource(), tmp_path, samples_per_shard=7)  # nothing of it is taken for finished
    assert check(tmp_path).ok


def test_bytes_do_not_depend_on_the_run_or_the_workers(tmp_path):
    for name, n_workers in (("a", 0), ("b", 0), ("c", 2)):
        packing.pack(TinySource(), tmp_path / name, codec="blosc", samples_per_shard=6, n_workers=n_workers)
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")


def test_tiles_and_statistics_can_be_chosen(tmp_path):
    report = packing.pack(TinySource(), tmp_path, split="train")
    with pytest.raises(ValueError, match="train lie in folders of their own"):
        PackedSource(Config(str(tmp_path)))
    whole = PackedSource(Config(str(tmp_path), split="train"))
    chosen = PackedSource(Config(str(tmp_path), split="train", tiles=["radar"], statistics="measured"))
    assert list(chosen.read(3).tiles) == list(chosen.schema) == ["radar"]
    assert chosen.schema["radar"].mean == tuple(report.statistics["radar"].mean)
    assert chosen.schema["radar"].std == tuple(report.statistics["radar"].std)
    assert whole.fingerprint() != chosen.fingerprint()
    with pytest.raises(ValueError, match="no tile 'radra'; did you mean 'radar'"):
        PackedSource(Config(str(tmp_path), split="train", tiles=["radra"]))


def test_the_manifest_names_the_source_as_a_config_would(tmp_path):
    packing.pack(TinySource(), tmp_path / "a", samples_per_shard=20)
    packing.pack(PackedSource(Config(str(tmp_path / "a"))), tmp_path / "b", samples_per_shard=20)
    first, second = Manifest.load(tmp_path / "a"), Manifest.load(tmp_path / "b")
    assert first.shards == second.shards
    assert (first.source_name, second.source_name) == (__name__, "shards")


def test_shard_size_in_megabytes(tmp_path):
    report = packing.pack(TinySource(100), tmp_path, shard_size_mb=0.1)
    assert 3 < report.n_shards < 20
    assert all(0.03e6 < s.size < 0.2e6 for s in Manifest.load(tmp_path).shards)


# --- resume -----------------------------------------------------------------------------------------------------------


def pack_slowly(out: Path, delay_s: float = 0.02) -> None:
    packing.pack(TinySource(delay_s=delay_s), out, samples_per_shard=4)


def test_killed_in_the_middle_then_resumed(tmp_path):
    packing.pack(TinySource(), tmp_path / "whole", samples_per_shard=4)
    out = tmp_path / "killed"
    child = fork(pack_slowly, out)
    wait_for(out / "shard-000001.stats.json", child)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="run the same 'ssl-eo data pack' again"):
        PackedSource(Config(str(out)))
    finished = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("shard-00000[01].*")}
    assert len(finished) == 6
    report = packing.pack(TinySource(), out, samples_per_shard=4)
    assert 2 <= report.n_shards_kept < 5
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in finished} == finished
    assert content(out) == content(tmp_path / "whole")


def test_a_killed_parent_takes_its_workers_along(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_pack import *\n"
        "packing.pack(TinySource(200, delay_s=0.02), sys.argv[1], samples_per_shard=5, n_workers=1)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE)
    wait_for(tmp_path / "out" / "shard-000000.stats.json", child)
    child.kill()
    child.communicate(timeout=30)  # returns when the last process that holds its output is gone
    assert len(list((tmp_path / "out").glob("*.stats.json"))) < 40


def test_packing_again_changes_nothing(tmp_path):
    packing.pack(TinySource(), tmp_path, samples_per_shard=6)
    before = content(tmp_path)
    inodes = {p.name: p.stat().st_ino for p in tmp_path.glob("shard*")}
    report = packing.pack(TinySource(), tmp_path, samples_per_shard=6)
    assert report.n_shards_kept == report.n_shards == 4
    assert content(tmp_path) == before
    assert {p.name: p.stat().st_ino for p in tmp_path.glob("shard*")} == inodes


def test_a_folder_with_something_else_is_refused(tmp_path):
    packing.pack(TinySource(), tmp_path, samples_per_shard=6)
    with pytest.raises(ValueError, match=r"something else \(samples_per_shard differ"):
        packing.pack(TinySource(), tmp_path, samples_per_shard=5)
    with pytest.raises(ValueError, match=r"\(source_fingerprint differ"):
        packing.pack(TinySource(seed=1), tmp_path, samples_per_shard=6)
    (tmp_path / "pack.json").unlink()
    with pytest.raises(ValueError, match="did not write"):
        packing.pack(TinySource(), tmp_path, samples_per_shard=6)


def test_a_second_process_is_refused_and_spoils_nothing(tmp_path):
    packing.pack(TinySource(), tmp_path / "alone", samples_per_shard=4)
    out = tmp_path / "shared"
    first = fork(pack_slowly, out, 0.1)
    wait_for(out / "shard-000000.stats.json", first)
    with pytest.raises(ValueError, match=r"shared is in use by another process; .* choose another folder$"):
        packing.pack(TinySource(), out, samples_per_shard=4)
    first.join()
    assert first.exitcode == 0
    assert content(out) == content(tmp_path / "alone")
    assert packing.pack(TinySource(), out, samples_per_shard=4).n_shards_kept == 5


# --- bad samples, full disks ------------------------------------------------------------------------------------------


def test_bad_samples_are_listed_and_left_out(tmp_path):
    report = packing.pack(TinySource(bad=(3, 11)), tmp_path, samples_per_shard=5, max_bad_ratio=0.1)
    assert (report.n_samples, report.n_bad) == (18, 2)
    records = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(r["shard"], r["index"]) for r in records] == [("shard-000000.tar", 3), ("shard-000002.tar", 11)]
    assert records[0]["reason"] == "OSError: cannot read 3"
    assert_same_samples(PackedSource(Config(str(tmp_path))), TinySource(), [i for i in range(20) if i not in (3, 11)])


@pytest.mark.parametrize(("bad", "samples_per_shard"), [((1, 8, 15), 5), ((1, 2, 3), 20)])
def test_too_many_bad_samples_stop_it(tmp_path, bad, samples_per_shard):
    with pytest.raises(ValueError, match=r"3 bad samples so far, allowed are 2 of 20: .*--max-bad-ratio") as caught:
        packing.pack(TinySource(bad=bad), tmp_path, samples_per_shard=samples_per_shard, max_bad_ratio=0.1)
    assert f"sample {bad[1]}: OSError: cannot read {bad[1]}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()
    report = packing.pack(TinySource(bad=bad), tmp_path, samples_per_shard=samples_per_shard, max_bad_ratio=0.15)
    assert report.n_bad == 3  # the same command with another limit goes on


class WrongSource(TinySource):
    """Sample 2 lacks a tile, 3 has another dtype, 4 another shape, 5 repeats the key of 0, 6 has other bands."""

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        tile = sample.tiles["radar"]
        if index == 2:
            del sample.tiles["radar"]
        elif index == 3:
            tile.pixels = tile.pixels.astype(np.float64)
        elif index == 4:
            tile.pixels = tile.pixels[:, :4]
        elif index == 5:
            sample.key = super().read(0).key
        elif index == 6:
            tile.bands = ("b1", "b0")
        return sample


def test_samples_that_do_not_fit_the_schema_are_bad(tmp_path):
    report = packing.pack(WrongSource(), tmp_path, max_bad_ratio=0.5)
    assert report.n_bad == 5
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    parts = [
        "has no tile 'radar'",
        "dtype float64, expected float32",
        "shape (2, 4, 8), expected (2, 8, 8)",
        "comes twice",
    ]
    for reason, part in zip(reasons, [*parts, "bands ('b1', 'b0'), expected"], strict=True):
        assert part in reason


class GrowingSource(TinySource):
    """From sample 10 on there is much to store."""

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        sample.meta["note"] = "x" * (60_000 if index >= 10 else 1)
        return sample


def pack_with_little_space(out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        packing.pack(GrowingSource(), out / "packed", samples_per_shard=5)
    except OSError as error:
        (out / "message").write_text(str(error))


def test_a_full_disk_keeps_what_is_finished(tmp_path):
    """A limit on the size of files stands for the full disk: the third shard exceeds it."""
    fork(pack_with_little_space, tmp_path).join()
    message = (tmp_path / "message").read_text()
    assert "2 of 4 shards are finished and kept" in message
    assert "run the same command again" in message
    assert not list((tmp_path / "packed").glob("*.partial"))
    assert {p.name for p in (tmp_path / "packed").glob("*.tar")} == {"shard-000000.tar", "shard-000001.tar"}
    assert packing.pack(GrowingSource(), tmp_path / "packed", samples_per_shard=5).n_shards_kept == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codec": "blocs"}, "no codec 'blocs'; did you mean 'blosc'"),
        ({"codec": {"radra": "raw"}}, "codec: the source has no tiles radra \\(it has optical@10m"),
        ({"samples_per_shard": 0}, "at least 1"),
        ({"max_bad_ratio": 1.5}, "0 to 1"),
        ({"split": "../x"}, "plain name"),
        ({"n_workers": -1}, "must not be negative"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        packing.pack(TinySource(), tmp_path, **arguments)


# --- reading what is not whole ----------------------------------------------------------------------------------------


def test_missing_and_cut_files_say_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"manifest.json: no such file; write the dataset with 'ssl-eo data pack'"):
        PackedSource(Config(str(tmp_path / "nowhere")))
    packing.pack(TinySource(), tmp_path, samples_per_shard=10)
    shard = tmp_path / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=r"shard-000001.tar has \d+ bytes, the manifest lists"):
        PackedSource(Config(str(tmp_path)))
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000001.tar is missing"):
        PackedSource(Config(str(tmp_path)))
    shard.write_bytes(whole)
    index_path(shard).unlink()
    with pytest.raises(ValueError, match="ssl-eo data index"):
        PackedSource(Config(str(tmp_path)))
    packing.index(tmp_path)
    assert_same_samples(PackedSource(Config(str(tmp_path))), TinySource(), list(range(20)))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool) -> None:
    """Apply `change` to the manifest; with `seal` its checksum fits again, as only a program would make it."""
    path = folder / "manifest.json"
    page = json.loads(path.read_text())
    del page["checksum"]
    before = hashlib.sha256(json.dumps(page, separators=(",", ":")).encode()).hexdigest()
    assert before == json.loads(path.read_text())["checksum"]  # as docs/data.md has it
    change(page)
    after = hashlib.sha256(json.dumps(page, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps({**page, "checksum": after if seal else before}))


def radar(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda page: page["tiles"]["radar"].update(values)


def shard(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda page: page["shards"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda page: page.update(shards=[]), "lists no samples"),
        (lambda page: page.update(format=99), "format 99, this version reads format 1"),
        (lambda page: page.pop("shards"), "key 'shards' is missing"),
        (lambda page: page.update(tiles={"radar": {}}), "key 'codec' is missing"),
        (lambda page: page.update(tiles={}), "tiles is empty"),
        (lambda page: page["shards"].append(page["shards"][0]), r"lists shard-000000\.tar twice"),
        (shard(name="../x.tar"), "not a plain file name"),
        (shard(name=7), "not a plain file name"),
        (shard(sha256="../../escaped"), r"sha256 of shard shard-000000\.tar must be 64 hexadecimal digits"),
        (shard(n_samples=10**18), r"shard-000000\.tar of \d+ bytes cannot hold 1000000000000000000 samples"),
        (radar(statistics={"count": [10**400, 1]}), "too large"),
        (shard(n_samples="5"), "n_samples of shard shard-000000.tar must be a whole number from 0, got '5'"),
        (shard(size=-1), "size of shard shard-000000.tar must be a whole number from 0, got -1"),
        (shard(other=1), "other"),
        (radar(dtype="nope"), r"tiles\.radar: dtype of radar must be one of bool, .*, got 'nope'"),
        (radar(dtype="complex64"), "dtype of radar must be one of .*, got 'complex64'"),
        (radar(gsd_m=-1), "gsd_m of radar must be metres, above 0 and up to 1e6, got -1"),
        (radar(gsd_m="10"), "gsd_m of radar must be metres, above 0 and up to 1e6, got '10'"),
        (radar(bands=["b0", "b0"]), "named twice: b0, b0"),
        (radar(bands=["b0", "b7"]), "no band 'b7'"),
        (radar(shape=[8, -8]), r"shape of radar must be \(height, width\) in pixels or None, got \(8, -8\)"),
        (radar(shape=8), r"tiles\.radar: "),
        (radar(mean=["1", "2"]), "must be finite"),
        (radar(codec="zip"), "codec: 'zip' is none of"),
    ],
)
def test_manifests_that_cannot_be_right(tmp_path, change, message):
    packing.pack(TinySource(), tmp_path)
    change_manifest(tmp_path, change, seal=True)
    with pytest.raises(ValueError, match=message) as caught:
        PackedSource(Config(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda page: page["tiles"]["radar"].update(mean=[10 * m for m in page["tiles"]["radar"]["mean"]]),
        lambda page: page["tiles"]["radar"]["bands"].reverse(),
        lambda page: page["tiles"]["radar"]["sensor"]["bands"][0].update(wavelength_um=0.9),
        lambda page: page.update(tiles=dict(reversed(page["tiles"].items()))),
        lambda page: page["label_names"].reverse(),
        lambda page: page["shards"].reverse(),
    ],
)
def test_a_changed_manifest_is_refused_and_written_anew(tmp_path, change):
    packing.pack(TinySource(), tmp_path, samples_per_shard=10)
    whole = content(tmp_path)
    change_manifest(tmp_path, change, seal=False)
    for use in (check, packing.index, lambda folder: PackedSource(Config(str(folder)))):
        with pytest.raises(ValueError, match=r"manifest\.json was changed or damaged after it was written"):
            use(tmp_path)
    assert packing.pack(TinySource(), tmp_path, samples_per_shard=10).n_shards_kept == 2
    assert content(tmp_path) == whole


json_values = st.one_of(
    *(st.none(), st.booleans(), st.integers(-4, 40), st.just(10**400), st.floats(), st.text(max_size=4)),
    *(st.lists(st.integers(-4, 40), max_size=3), st.just({}), st.just({"a": 1}), st.lists(st.just({}), min_size=1)),
)


@pytest.mark.parametrize("optional", [False, True])
def test_a_schema_comes_back_and_is_not_optional_unless_it_says_so(optional):
    schema = replace(TinySource.schema["optical@10m"], optional=optional)
    raw = json.loads(json.dumps(schema_to_dict(schema)))
    assert schema_from_dict("tile", raw) == schema
    del raw["optional"]
    assert schema_from_dict("tile", raw) == replace(schema, optional=False)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_description_is_a_schema_or_a_value_error(data):
    tree = raw = json.loads(json.dumps(schema_to_dict(TinySource.schema["optical@10m"])))
    while True:
        key = data.draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree))))
        if not isinstance(tree[key], (dict, list)) or not tree[key] or data.draw(st.booleans()):
            break
        tree = tree[key]
    if isinstance(tree, dict) and data.draw(st.booleans()):
        del tree[key]
    else:
        tree[key] = data.draw(json_values)
    for value in (raw, None, [raw]):
        try:
            made = schema_from_dict("tile", value)
        except ValueError as error:
            assert str(error).startswith("tiles.tile: ")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert content_hash(schema_to_dict(made))


@pytest.mark.parametrize("gsd_m", [[], None, 3, {"radar": "10"}, {"radar": None}, {"radar": -1}, {"radar": True}])
def test_a_ground_sampling_that_is_none_spoils_its_sample_alone(tmp_path, gsd_m):
    packing.pack(TinySource(), tmp_path)
    path = tmp_path / "shard-000000.tar"
    reader = ShardReader(LocalShard(path, access="pread"))
    with ShardWriter.create(path) as writer:
        for row in range(20):
            suffixes = [s.decode() for s in reader.index.suffixes]
            members = {s: reader.read(row, s) for s in suffixes if reader.has(row, s)}
            if row == 3:
                members["json"] = json.dumps({**json.loads(members["json"]), "gsd_m": gsd_m}).encode()
            writer.add(reader.key(row), members)
    change_manifest(tmp_path, shard(size=writer.index.tar_size, sha256=writer.sha256), seal=True)
    packed = PackedSource(Config(str(tmp_path)))
    with pytest.raises(
        ValueError, match=r"gsd_m in a sample's JSON is an object of metres \(above 0, up to 1e6\) by tile name"
    ):
        packed.read(3)
    assert packed.read(4).tiles["radar"].gsd_m == 10.0
    (problem,) = check(tmp_path).problems
    assert (problem.member, problem.size > 0) == ("scene%2E3%2F%C3%A9.json", True)
    assert "metres (above 0" in problem.reason
    assert packing.stats(tmp_path).n_bad == 1


@pytest.mark.parametrize("bad", [{"root": ""}, {"tiles": []}, {"chunk_size": 0}, {"access": "read"}])
def test_config_names_the_key(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Config(**{"root": "x", **bad})


# --- check, index, stats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_check_finds_a_flipped_byte(tmp_path, codec):
    packing.pack(TinySource(), tmp_path, samples_per_shard=10, codec=codec)
    report = check(tmp_path)
    assert report.ok
    assert (report.n_shards, report.n_samples) == (2, 20)
    shard = tmp_path / "shard-000001.tar"
    index = ShardIndex.load(index_path(shard))
    data = bytearray(shard.read_bytes())
    row, column = 4, 2
    offset, size = int(index.offset[row, column]), int(index.size[row, column])
    data[offset + size - 3] ^= 1
    shard.write_bytes(data)
    (problem,) = check(tmp_path).problems
    assert (problem.shard, problem.member) == ("shard-000001.tar", index.member_name(row, column))
    assert (problem.offset, problem.size) == (offset, size)
    assert "CRC-32" in problem.reason
    with pytest.raises(ShardError, match="CRC-32"):
        PackedSource(Config(str(tmp_path), verify=True)).read(10 + row)
    with pytest.raises(ShardError, match="SHA-256"):  # an index made now would hide the damage
        packing.index(tmp_path)


def test_check_finds_other_damage(tmp_path):
    packing.pack(TinySource(), tmp_path, samples_per_shard=10)
    shard = tmp_path / "shard-000000.tar"
    index = ShardIndex.load(index_path(shard))
    whole = shard.read_bytes()
    header = int(index.offset[6, 1]) - 512

    def problems_with(data: bytes) -> list[Problem]:
        shard.write_bytes(data)
        return list(check(tmp_path).problems)

    (problem,) = problems_with(whole[: header + 3] + b"?" + whole[header + 4 :])
    assert (problem.member, problem.offset) == (index.member_name(6, 1), header)
    assert "header is damaged" in problem.reason
    size, cut = problems_with(whole[: header + 600])
    assert "the manifest lists" in size.reason
    assert (cut.member, cut.offset) == (index.member_name(6, 1), header + 512)
    padding = int(index.offset[0, 3] + index.size[0, 3])
    (problem,) = problems_with(whole[:padding] + b"?" + whole[padding + 1 :])
    assert "every member is as indexed" in problem.reason
    shard.unlink()
    assert [p.reason for p in check(tmp_path).problems] == ["the file is missing"]


def test_check_compares_members_with_the_schema(tmp_path):
    packing.pack(TinySource(), tmp_path, samples_per_shard=20)
    change_manifest(tmp_path, radar(shape=[8, 9]), seal=True)
    problems = check(tmp_path).problems
    assert {p.reason for p in problems} == {"shape (2, 8, 8), expected (2, 8, 9)"}
    assert all(p.member.endswith("radar.npy") for p in problems)


def test_check_compares_the_index_with_the_tar(tmp_path):
    packing.pack(TinySource(), tmp_path, samples_per_shard=20)
    path = index_path(tmp_path / "shard-000000.tar")
    index = ShardIndex.load(path)
    offset = index.offset.copy()
    offset[[2, 3]] = offset[[3, 2]]
    ShardIndex(index.tar_size, index.keys, index.suffixes, offset, index.size, index.crc32).save(path)
    problems = check(tmp_path).problems
    assert {p.member.split(".")[0] for p in problems} == {"scene%2E2%2F%C3%A9", "scene%2E3%2F%C3%A9"}
    assert all("the index has it at byte" in p.reason for p in problems)
    packing.index(tmp_path)
    assert check(tmp_path).ok


def test_index_of_foreign_tars(tmp_path):
    with pytest.raises(ValueError, match=r"holds no .tar file"):
        packing.index(tmp_path)
    subprocess.run(["tar", "cf", tmp_path / "x.tar", "-C", Path(__file__).parent, Path(__file__).name], check=True)
    report = packing.index(tmp_path)
    assert (report.n_shards, report.n_samples, report.n_members) == (1, 1, 1)
    assert index_path(tmp_path / "x.tar").is_file()
    for use in (check, lambda folder: PackedSource(Config(str(folder)))):
        with pytest.raises(ValueError, match=r"did not write these tars: .* packed datasets, 'data index' serves"):
            use(tmp_path)


def test_stats_are_those_of_all_pixels_at_once(tmp_path):
    source = TinySource(50)
    report = packing.pack(source, tmp_path, samples_per_shard=7)
    again, direct = packing.stats(tmp_path), packing.stats(source, n_workers=1)
    for name, tile_schema in source.schema.items():
        pixels = np.stack([source.read(i).tiles[name].pixels for i in range(50)], axis=1).astype(np.float64)
        for band in range(len(tile_schema.bands)):
            values = pixels[band][np.isfinite(pixels[band])]
            values = values[~np.isin(values, tile_schema.sensor.no_data)]
            for s in (report.statistics[name], again.statistics[name], direct.statistics[name]):
                assert (s.count[band], s.minimum[band], s.maximum[band]) == (values.size, values.min(), values.max())
                np.testing.assert_allclose([s.mean[band], s.std[band]], [values.mean(), values.std()], rtol=1e-12)
    assert len(list(again.rows())) == 7
    assert next(iter(again.rows()))[:3] == ("optical@10m", "b0", int(report.statistics["optical@10m"].count[0]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-5, 5), min_size=2, max_size=6), min_size=1, max_size=6), st.randoms())
def test_merging_statistics_in_any_order(parts, rng):
    each = [BandStatistics.of(np.array([part], np.int16) * 1000, no_data=(0.0,)) for part in parts]
    rng.shuffle(each)
    while len(each) > 1:
        each.append(each.pop(rng.randrange(len(each))).merge(each.pop(rng.randrange(len(each)))))
    values = np.array([v for part in parts for v in part if v], np.float64) * 1000
    (merged,) = each
    assert merged.count[0] == values.size
    if values.size:
        np.testing.assert_allclose(
            [merged.mean[0], merged.std[0]], [values.mean(), values.std()], rtol=1e-12, atol=1e-9
        )
    back = BandStatistics.from_dict(json.loads(json.dumps(merged.to_dict())))
    for name in ("count", "mean", "m2", "minimum", "maximum"):
        assert np.array_equal(getattr(back, name), getattr(merged, name))


def test_a_constant_or_empty_band_is_not_divided_by_zero(tmp_path):
    class Constant(TinySource):
        def read(self, index: int) -> Sample:
            sample = super().read(index)
            sample.tiles["radar"].pixels[0] = 3.0
            sample.tiles["radar"].pixels[1] = np.nan
            return sample

    packing.pack(Constant(), tmp_path)
    measured = PackedSource(Config(str(tmp_path), statistics="measured")).schema["radar"]
    assert (measured.mean, measured.std) == ((3.0, 0.0), (1.0, 1.0))


def test_webdataset_reads_packed_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    packing.pack(TinySource(), tmp_path, samples_per_shard=8)
    packed = PackedSource(Config(str(tmp_path)))
    shards = sorted(str(p) for p in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == len(packed) == 20
    for row, theirs in enumerate(samples):
        mine = packed.read(row)
        assert theirs["json"]["meta"] == mine.meta
        for name, tile in mine.tiles.items():
            assert np.array_equal(theirs[f"{name}.npy"], tile.pixels, equal_nan=tile.pixels.dtype.kind == "f")
        if isinstance(mine.label, np.ndarray):
            assert np.array_equal(theirs["label.npy"], mine.label)
        else:
            assert theirs["json"]["label"] == mine.label


def test_no_more_shards_are_open_than_allowed(tmp_path):
    packing.pack(TinySource(40), tmp_path, samples_per_shard=2)
    for access in ("mmap", "pread"):
        packed = PackedSource(Config(str(tmp_path), access=access, max_open_shards=3))
        before = len(list(Path("/proc/self/fd").iterdir()))
        for i in range(40):
            packed.read(i)
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= 3
