"""Shards behind an address: the same samples as from disk, whatever the server does; one download a node; bounded."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from range_server import RangeServer

from ssl_eo.data import remote, remote_shards
from ssl_eo.data.block_cache import BlockCache, CacheError
from ssl_eo.data.loader import Loader, StepDataset
from ssl_eo.data.mixture import MixedSource
from ssl_eo.data.opening import DataConfig, WeightedSourceConfig, open_sources
from ssl_eo.data.pack import pack
from ssl_eo.data.plans import CropConfig
from ssl_eo.data.remote import RemoteConfig, RemoteError
from ssl_eo.data.shards import ShardIndex
from ssl_eo.data.sources.shards import Config, Source
from ssl_eo.data.sources.synthetic import Config as SceneConfig
from ssl_eo.data.sources.synthetic import Source as SceneSource
from ssl_eo.data.types import Sample
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.objectives.mae import Config as MAEConfig
from ssl_eo.objectives.mae import Objective

pytest.importorskip("aiohttp")
N = 40


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    scenes = SceneSource(SceneConfig(sensors=["sentinel2_l2a", "dem"], extent_m=180.0, n_samples=N))
    pack(scenes, folder, split="train", samples_per_shard=12)
    return folder


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote_shards, "RENEWAL_PAUSE_S", 0.01)


def far(server: RangeServer, cache: Path, **options: Any) -> Source:
    known = {"chunk_size": 4, "split": "train"}
    own = {k: options.pop(k) for k in list(options) if k in ("chunk_size", "tiles")}
    return Source(Config(root=server.url, remote=RemoteConfig(cache_dir=str(cache), **options), **{**known, **own}))


def near(packed: Path) -> Source:
    return Source(Config(root=str(packed), split="train", chunk_size=4))


def blocks_of(cache: Path) -> list[Path]:
    return [p for p in (cache / "ssl_eo_blocks").glob("*/*") if p.is_file()]


def assert_same(a: Sample, b: Sample) -> None:
    assert (a.key, a.meta, a.label, list(a.tiles)) == (b.key, b.meta, b.label, list(b.tiles))
    for name, tile in a.tiles.items():
        np.testing.assert_array_equal(tile.array, b.tiles[name].array)
        assert tile.array.dtype == b.tiles[name].array.dtype


def test_samples_from_a_server_are_those_from_disk(packed, tmp_path):
    with RangeServer(packed) as server:
        there, here = far(server, tmp_path, request_mb=0.003), near(packed)
        assert there.fingerprint() == here.fingerprint()  # so a run may go on from the other place
        order = np.random.default_rng(0).permutation(N).tolist()
        for i in order:
            assert_same(there.read(i), here.read(i))
    assert max(Counter(server.answered).values()) == 1  # each byte is fetched once
    spans = [span.removeprefix("bytes=").split("-") for path, span in server.answered if path.endswith(".tar")]
    sizes = [int(last) - int(first) + 1 for first, last in spans]
    assert max(sizes) <= 3000  # in requests that are no longer than request_mb


@pytest.mark.parametrize("fault", ["503", "429", "404", "416", "cut", "short", "empty", "flip"])
def test_a_request_that_fails_is_repeated(packed, tmp_path, fault):
    def every_first(path: str, n: int) -> str | None:
        return (
            fault if n == 0 and (fault != "flip" or path.endswith(".tar")) and path.endswith((".tar", ".npz")) else None
        )

    with RangeServer(packed, every_first) as server:
        there, here = far(server, tmp_path), near(packed)
        for i in range(0, N, 5):
            assert_same(there.read(i), here.read(i))


def test_a_silent_server_is_asked_again(packed, tmp_path):
    with RangeServer(
        packed, lambda path, n: "hang" if n == 0 and path.endswith(".tar") else None, hang_s=3.0
    ) as server:
        there = far(server, tmp_path, timeout_s=0.3)
        start = time.monotonic()
        assert_same(there.read(0), near(packed).read(0))
    assert time.monotonic() - start < 2.5


@pytest.mark.parametrize(("fault", "n_asked"), [("503", 3), ("403", 1)])
def test_a_server_that_stays_away_stops_the_run_rather_than_replacing_samples(packed, tmp_path, fault, n_asked):
    with RangeServer(packed) as server:
        there = far(server, tmp_path, n_retries=2)
        server.fault = lambda path, n: fault
        with pytest.raises(RemoteError, match=rf"{server.url}/train/shard-000000.index.npz: .*{fault}"):
            there.read(0)
    asked = [path for path, _ in server.log if path.endswith("shard-000000.index.npz")]
    assert len(asked) == n_asked  # what is refused is refused again
    assert not isinstance(RemoteError(), (ValueError, OSError, EOFError))  # which the loader takes for bad samples


def test_a_member_that_is_damaged_there_is_a_bad_sample(packed, tmp_path):
    with RangeServer(packed, lambda path, n: "flip" if path.endswith("shard-000001.tar") else None) as server:
        there, here = far(server, tmp_path), near(packed)
        messages = []
        for i in range(12, 24):
            try:
                assert_same(there.read(i), here.read(i))
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) == 3  # one bit in each of its three blocks
    assert all(f"{server.url}/train/shard-000001.tar" in m and "CRC-32" in m for m in messages)
    spans = Counter(span for path, span in server.log if path.endswith("shard-000001.tar"))
    assert max(spans.values()) == 4  # fetched three times more before it is given up


def test_a_block_that_is_damaged_on_its_way_now_and_then_is_never_a_bad_sample(packed, tmp_path):
    with RangeServer(packed, lambda path, n: "flip" if n % 2 == 0 and path.endswith(".tar") else None) as server:
        there, here = far(server, tmp_path), near(packed)
        for _ in range(3):
            for i in range(0, N, 3):
                assert_same(there.read(i), here.read(i))
            shutil.rmtree(tmp_path)  # something that cleans up
            there._remote._blocks.clear()


def test_an_index_that_was_damaged_there_is_fetched_anew_when_it_was_put_right(packed, tmp_path):
    root = tmp_path / "there"
    shutil.copytree(packed, root)
    path = root / "train" / "shard-000000.index.npz"
    index = ShardIndex.load(path)
    index.crc32[:] ^= 1
    with RangeServer(root) as server:
        content = path.read_bytes()
        index.save(path)
        with pytest.raises(ValueError, match="CRC-32"):
            far(server, tmp_path / "cache").read(0)
        path.write_bytes(content)
        assert_same(far(server, tmp_path / "cache").read(0), near(packed).read(0))


def test_a_server_that_ignores_ranges_is_refused_at_once(packed, tmp_path):
    with (
        RangeServer(packed, lambda path, n: "whole" if path.endswith(".tar") else None) as server,
        pytest.raises(RemoteError, match="the server ignores byte ranges; shards need one that supports them"),
    ):
        far(server, tmp_path).read(0)
    assert sum(path.endswith(".tar") for path, _ in server.log) == 1


def test_blocks_that_left_the_cache_give_their_place_on_the_disk_back(packed, tmp_path):
    with RangeServer(packed) as server:
        there = far(server, tmp_path, cache_gb=200e-6)
        for i in range(N):
            there.read(i)
        assert len(there._remote._blocks) <= len(blocks_of(tmp_path))


def test_a_shard_that_is_shorter_there_gives_bad_samples(packed, tmp_path):
    root = tmp_path / "there"
    shutil.copytree(packed, root)
    with (root / "train" / "shard-000001.tar").open("r+b") as file:
        file.truncate(40_000)
    with RangeServer(root) as server:
        there = far(server, tmp_path / "cache", n_retries=2)
        with pytest.raises(OSError, match=r"shard-000001\.tar.* copy it there again"):
            there.read(23)
        assert there.locate(23)[1] == "shard-000001.tar"


def test_a_missing_shard_gives_bad_samples_and_a_missing_manifest_no_source(packed, tmp_path):
    root = tmp_path / "there"
    shutil.copytree(packed, root)
    (root / "train" / "shard-000002.tar").unlink()
    with RangeServer(root) as server:
        with pytest.raises(FileNotFoundError, match=r"shard-000002\.tar: no such file"):
            far(server, tmp_path / "cache", n_retries=2).read(30)
        with pytest.raises(ValueError, match=r"nothing/manifest\.json: no such file; the address must be"):
            Source(Config(root=server.url, split="nothing", remote=RemoteConfig(cache_dir=str(tmp_path / "cache"))))


def test_an_index_of_another_shard_is_refused(packed, tmp_path):
    root = tmp_path / "there"
    shutil.copytree(packed, root)
    (root / "train" / "shard-000003.index.npz").replace(root / "train" / "shard-000000.index.npz")
    with (
        RangeServer(root) as server,
        pytest.raises(ValueError, match=r"is the index of 4 samples in .* the manifest lists 12"),
    ):
        far(server, tmp_path / "cache").read(0)


def test_a_cached_block_that_was_damaged_on_disk_is_fetched_anew(packed, tmp_path):
    with RangeServer(packed) as server:
        far(server, tmp_path).read(0)
        (block,) = (p for p in blocks_of(tmp_path) if p.suffix != ".npz")
        content = bytearray(block.read_bytes())
        for i in range(0, len(content), 512):
            content[i] ^= 1
        block.write_bytes(content)
        assert_same(far(server, tmp_path).read(0), near(packed).read(0))
        block.write_bytes(b"")  # as a power cut may leave it
        assert_same(far(server, tmp_path).read(0), near(packed).read(0))


def _read_all(source: Source, indices: list[int]) -> None:
    for i in indices:
        source.read(i)


def test_processes_share_one_download(packed, tmp_path):
    with RangeServer(packed, lambda path, n: None) as server:
        source = far(server, tmp_path)
        source.read(0)  # connections of the parent do not reach the children
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=_read_all, args=(source, list(range(N)))) for _ in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0, 0, 0]
    assert max(Counter(server.answered).values()) == 1


def test_the_cache_is_bounded_and_drops_what_was_not_used_for_longest(tmp_path):
    cache = BlockCache(tmp_path, limit=1000)
    fetched: list[str] = []

    def get(name: str, size: int = 300) -> bytes:
        def fetch() -> bytes:
            fetched.append(name)
            return bytes(size)

        time.sleep(0.01)  # modification times tell the blocks apart
        return cache.get(f"shard/{name}", size, fetch).read_bytes()

    for name in ("a", "b", "c", "a", "d"):
        assert get(name) == bytes(300)
    assert sorted(p.name for p in blocks_of(tmp_path)) == ["a", "c", "d"]
    get("b")
    assert fetched == ["a", "b", "c", "d", "b"]
    assert sum(p.stat().st_size for p in blocks_of(tmp_path)) <= 1000
    with pytest.raises(CacheError, match=r"does not fit into a cache .* cache_gb"):
        get("huge", 1001)


def test_the_users_own_files_in_the_cache_folder_stay(tmp_path):
    own = tmp_path / "photos" / "mine.tif"
    (own.parent / "sub").mkdir(parents=True)
    own.write_bytes(bytes(5000))
    cache = BlockCache(tmp_path, limit=1000)
    for name in "abcdef":
        cache.get(f"shard/{name}", 300, lambda: bytes(300))
    assert own.stat().st_size == 5000
    assert len(blocks_of(tmp_path)) == 3


def test_a_count_that_was_lost_is_made_anew(tmp_path):
    cache = BlockCache(tmp_path, limit=1000)
    for content in ("", "junk", "999999", "0"):
        (tmp_path / "ssl_eo_locks" / "total_bytes").write_text(content)
        for i in range(8):
            cache.get(f"shard/{content}{i}", 300, lambda: bytes(300))
        assert sum(p.stat().st_size for p in blocks_of(tmp_path)) <= 1000 + 600  # it may be late by what was lost


def test_sources_that_share_a_cache_agree_on_its_size(packed, tmp_path):
    def source(cache_gb: float, folder: str) -> WeightedSourceConfig:
        remote_cfg = RemoteConfig(cache_dir=str(tmp_path / folder), cache_gb=cache_gb)
        return WeightedSourceConfig("shards", Config(root=str(packed), split="train", remote=remote_cfg))

    assert len(open_sources(DataConfig([source(1, "a"), source(1, "a"), source(2, "b")]))) == 3
    with pytest.raises(ValueError, match=r"data\.sources\[1\]\.remote\.cache_gb is 2 and that of data\.sources\[0\] 1"):
        open_sources(DataConfig([source(1, "a"), source(2, "a")]))


def test_samples_stay_readable_when_their_blocks_leave_the_cache(packed, tmp_path):
    with RangeServer(packed) as server:
        there, here = far(server, tmp_path, cache_gb=60e-6), near(packed)  # room for about one block
        held = [there.read(i) for i in range(N)]
        for i, sample in enumerate(held):
            assert_same(sample, here.read(i))
    size = sum(p.stat().st_size for p in blocks_of(tmp_path))
    assert size <= 60_000


def test_a_full_or_unusable_cache_stops_the_run(packed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with RangeServer(packed) as server:
        with pytest.raises(ValueError, match=r"cannot hold a cache .* cache_dir"):
            far(server, tmp_path / "file")
        there = far(server, tmp_path / "cache")

        def no_space(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", no_space)
        with pytest.raises(CacheError, match="No space left on device; free some, or lower cache_gb"):
            there.read(0)


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_block(tmp_path):
    cache = BlockCache(tmp_path, limit=1000)
    context = multiprocessing.get_context("fork")

    def die() -> bytes:
        (cache.folder / "shard").mkdir()
        (cache.folder / "shard" / "a.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    child = context.Process(target=cache.get, args=("shard/a", 8, die))
    child.start()
    child.join(30)
    assert child.exitcode == -9
    assert cache.get("shard/a", 8, lambda: b"complete").read_bytes() == b"complete"  # the lock went with the process


def test_reading_ahead_fetches_in_the_background(packed, tmp_path):
    with RangeServer(packed) as server:
        there = far(server, tmp_path)
        there.prefetch(list(range(0, N, 3)))
        deadline = time.monotonic() + 20
        while sum(path.endswith(".tar") for path, _ in server.answered) < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        n_before = len(server.log)
        _read_all(there, list(range(N)))
        assert len(server.log) == n_before  # nothing was left to fetch
        assert pickle.loads(pickle.dumps(there)).read(5).key == near(packed).read(5).key


def test_reading_ahead_leaves_errors_to_whoever_needs_the_samples(packed, tmp_path):
    with RangeServer(packed) as server:
        there = far(server, tmp_path, n_retries=0)
        server.fault = lambda path, n: "503"
        there.prefetch([0, 20])
        deadline = time.monotonic() + 20
        while len(server.log) < 3 and time.monotonic() < deadline:  # the manifest, then one refused request each
            time.sleep(0.02)
        assert len(server.log) >= 3
        with pytest.raises(RemoteError):
            there.read(0)
        server.fault = lambda path, n: None
        there.prefetch([36])  # the threads go on after their errors
        while not any(path.endswith("shard-000003.tar") for path, _ in server.answered):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert_same(there.read(20), near(packed).read(20))


def _batches(root: str, cache: Path, n_workers: int, start_step: int = 0) -> list[Any]:
    source = Config(root=root, split="train", chunk_size=4, remote=RemoteConfig(cache_dir=str(cache)))
    cfg = DataConfig([WeightedSourceConfig("shards", source)], n_lanes=2, n_workers=n_workers, read_ahead_steps=3)
    opened = Source(source)
    mae = MAEConfig(tile="sentinel2_l2a", crop=CropConfig(size_px=8))
    views = Objective.views(mae, EncoderConfig(patch_size=4), [opened.schema])
    options = {"seed": 1, "global_batch_size": 4, "total_steps": 25, "start_step": start_step}
    with Loader(cfg, [opened], views, **options) as loader:
        return [
            (b.keys, b.tiles["sentinel2_l2a"].pixels.numpy().tobytes(), b.views["image"][0].box.tolist())
            for b in loader
        ]


def test_the_loader_tells_what_it_will_need_only_where_there_is_something_to_fetch(packed, tmp_path):
    with RangeServer(packed) as server:
        there, here = far(server, tmp_path), near(packed)
        told: list[tuple[bool, list[int]]] = []
        for source in (there, here, MixedSource([there]), MixedSource([here])):
            source.prefetch = lambda ids, source=source: told.append((source.is_remote, ids))
            mixing = "sample" if isinstance(source, MixedSource) else "step"
            cfg = DataConfig([WeightedSourceConfig("shards", None)], mixing=mixing, n_lanes=2, read_ahead_steps=3)
            dataset = StepDataset(cfg, [source], None, seed=1, global_batch_size=4)
            for step in (5, 6):
                dataset._announce(step)
            if source.is_remote:
                assert [ids for _, ids in told[-5:]] == [dataset.orders[0].batch(s).tolist() for s in range(5, 10)]
    assert [is_remote for is_remote, _ in told] == [True] * 10


@pytest.mark.parametrize("n_workers", [0, 2])
def test_batches_are_those_from_disk_though_requests_fail(packed, tmp_path, n_workers):
    expected = _batches(str(packed), tmp_path / "unused", 0)
    flaky = lambda path, n: ("503", "cut", None)[min(n, 2)] if path.endswith(".tar") else None  # noqa: E731
    with RangeServer(packed, flaky) as server:
        assert _batches(server.url, tmp_path / "cache", n_workers) == expected
        assert _batches(server.url, tmp_path / "cache", n_workers, start_step=11) == expected[11:]


def test_any_address_that_fsspec_knows_will_do(packed, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/bucket", recursive=True)
    try:
        there = Source(Config(root="memory://bucket", split="train", remote=RemoteConfig(cache_dir=str(tmp_path))))
        assert_same(there.read(17), near(packed).read(17))
    finally:
        memory.rm("/bucket", recursive=True)


def test_s3(packed, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    root = tmp_path / "endpoint"
    shutil.copytree(packed, root / "bucket")
    with RangeServer(root, lambda path, n: "503" if n == 0 and path.endswith(".tar") else None) as server:
        options = {"anon": True, "endpoint_url": server.url}
        there = Source(
            Config(
                root="s3://bucket",
                split="train",
                chunk_size=4,
                remote=RemoteConfig(cache_dir=str(tmp_path / "cache"), options=options),
            )
        )
        here = near(packed)
        for i in (0, 13, 39):
            assert_same(there.read(i), here.read(i))


def test_wrong_settings_are_refused():
    for name, value in (("cache_gb", 0), ("request_mb", -1), ("timeout_s", 0), ("n_connections", 0), ("n_retries", -1)):
        with pytest.raises(ValueError, match=name):
            RemoteConfig(**{name: value})
    with pytest.raises(ValueError, match="root: nosuch://bucket: "):
        Source(Config(root="nosuch://bucket", remote=replace(RemoteConfig(), n_retries=0)))
