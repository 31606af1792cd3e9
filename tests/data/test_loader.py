from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ssl_eo.data.loader import MAX_ATTEMPTS, BadSample, Loader, StepDataset, WorkerTraceback
from ssl_eo.data.opening import DataConfig, SourceConfig, WeightedSourceConfig, open_source
from ssl_eo.data.plans import CropConfig, resized_crop
from ssl_eo.data.stacking import stack_tiles, stack_views
from ssl_eo.data.types import Batch, Sample, Tile, TileSchema
from ssl_eo.sensors import Band, Sensor

BANDS = (Band("red", "optical", 10.0, 0.66), Band("nir", "optical", 10.0, 0.83))
SENSOR = Sensor("toy", "Toy", BANDS, "uint16", "dn", "", no_data=(0,))
SCHEMA = TileSchema(SENSOR, SENSOR.band_names, "uint16", (8, 8), 10.0, (100.0, 100.0), (50.0, 50.0))


@dataclass
class ToySource:
    """Pixels of a sample are its index plus one. Samples in `broken` fail in the way it says."""

    n_samples: int = 53
    broken: dict[int, str] | None = None
    schema: ClassVar = {"toy": SCHEMA}
    label_names: ClassVar = ()
    chunk_size: ClassVar = 5

    def __len__(self) -> int:
        return self.n_samples

    def read(self, index: int) -> Sample:
        pixels = np.full((2, 8, 8), index + 1, np.uint16)
        match (self.broken or {}).get(index):
            case "os":
                raise OSError("disk on fire")
            case "lines":
                raise OSError("two\n  lines")
            case "bands":
                pixels = pixels[:1]
            case "empty":
                pixels[:] = 0
            case "bug":
                raise KeyError("a bug")
            case "exit":
                os._exit(3)
            case "hang":
                time.sleep(1000)
        return Sample(f"toy_{index}", {"toy": Tile(pixels, SENSOR.band_names, 10.0)})

    def locate(self, index: int) -> tuple[str, str]:
        return f"toy_{index}", "toy.tar"

    def fingerprint(self) -> str:
        return f"toy {self.n_samples}"


class ToyViews:
    def plan(self, sample: Sample, rng: np.random.Generator) -> Any:
        if sample.key == "toy_7":
            raise ValueError("no view of 7")
        return resized_crop(sample, "toy", CropConfig(size_px=4), rng)

    def collate(self, planned: list[tuple[Sample, Any]], step: int, source: int, rng: np.random.Generator) -> Batch:
        samples = [s for s, _ in planned]
        tiles = stack_tiles(samples, ["toy"], {"toy": SCHEMA})
        return Batch(step, source, [s.key for s in samples], tiles, {"image": stack_views([[p for _, p in planned]])})


class SlotViews(ToyViews):
    """The keys of a batch are the slots of its samples."""

    def collate(self, planned: list[tuple[Sample, Any]], step: int, source: int, rng: np.random.Generator) -> Batch:
        return replace(super().collate(planned, step, source, rng), keys=[str(sample.slot) for sample, _ in planned])


CFG = DataConfig(
    [WeightedSourceConfig("toy", None, 2.0), WeightedSourceConfig("toy_too", None, 1.0)], n_lanes=4, n_workers=0
)
SOURCES = [ToySource(), ToySource(31)]


def load(n_workers: int = 0, cfg: DataConfig = CFG, sources: list[Any] = SOURCES, **options: Any) -> Loader:
    options = {"seed": 5, "global_batch_size": 12, "total_steps": 9, **options}
    return Loader(replace(cfg, n_workers=n_workers), sources, ToyViews(), **options)


def contents(batch: Batch) -> tuple[Any, ...]:
    (view,) = batch.views["image"]
    return (
        batch.step,
        batch.source,
        batch.keys,
        batch.tiles["toy"].pixels.tolist(),
        view.box.tolist(),
        view.flip.tolist(),
    )


def collect(loader: Loader) -> list[tuple[Any, ...]]:
    with loader:
        return [contents(b) for b in loader]


@pytest.fixture(scope="module")
def expected() -> list[tuple[Any, ...]]:
    return collect(load())


def test_batches_hold_what_order_and_seed_say(expected: list[tuple[Any, ...]]) -> None:
    assert [b[0] for b in expected] == list(range(9))
    assert {b[1] for b in expected} == {0, 1}
    boxes = [tuple(box) for b in expected for box in b[4]]
    assert len(set(boxes)) == len(boxes)  # no two samples share a view, nor one sample two of its steps
    other = collect(load(seed=6))
    assert [b[2] for b in other] != [b[2] for b in expected]


@pytest.mark.parametrize(("n_workers", "start_method"), [(1, "fork"), (3, "fork"), (2, "forkserver")])
def test_workers_change_nothing(n_workers: int, start_method: Any, expected: list[tuple[Any, ...]]) -> None:
    cfg = replace(CFG, start_method=start_method)
    assert collect(load(n_workers, cfg)) == expected
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_concatenate_to_the_single_process_batch(world_size: int, expected: list[tuple[Any, ...]]) -> None:
    parts = [collect(load(rank=r, world_size=world_size)) for r in range(world_size)]
    for step, whole in enumerate(expected):
        for i in range(2, len(whole)):
            assert [value for p in parts for value in p[step][i]] == whole[i]


def test_samples_know_their_slots() -> None:
    """Also those that take the place of a bad one, whatever rank and micro-batch they are of."""
    sources, n_bad = [ToySource(), ToySource(31, {3: "os", 8: "empty"})], 0
    slots: list[list[str]] = [[] for _ in range(9)]
    for rank in range(2):
        options: dict[str, Any] = {"seed": 5, "global_batch_size": 12, "total_steps": 9, "rank": rank, "world_size": 2}
        with Loader(CFG, sources, SlotViews(), n_micro_batches=3, **options) as loader:
            for batch in loader:
                slots[batch.step] += batch.keys
            n_bad += loader.n_bad
    assert slots == [[str(slot) for slot in range(12)]] * 9
    assert n_bad > 0


@pytest.mark.parametrize("n_workers", [0, 2])
def test_micro_batches_concatenate_to_the_batch_of_a_step(n_workers: int, expected: list[tuple[Any, ...]]) -> None:
    parts = collect(load(n_workers, n_micro_batches=3, start_step=2))
    assert [b[0] for b in parts] == [step for step in range(2, 9) for _ in range(3)]
    for step, whole in enumerate(expected[2:]):
        for i in range(2, len(whole)):
            assert [value for b in parts[3 * step : 3 * step + 3] for value in b[i]] == whole[i]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_resumed_loader_goes_on_where_it_was(n_workers: int, expected: list[tuple[Any, ...]]) -> None:
    assert collect(load(n_workers, start_step=4)) == expected[4:]
    assert collect(load(n_workers, start_step=9)) == []


def test_a_sample_that_comes_twice_gets_two_views() -> None:
    cfg = replace(CFG, sources=CFG.sources[:1], n_lanes=2)
    loader = load(cfg=cfg, sources=[ToySource(3)], global_batch_size=8)
    batch = next(loader)
    assert len(set(batch.keys)) == 3
    assert len(np.unique(batch.views["image"][0].box.numpy(), axis=0)) == 8


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    collect(load(1))
    assert torch.equal(torch.get_rng_state(), state)


BROKEN = [ToySource(53, {3: "os", 4: "bands", 9: "empty", 20: "os"}), ToySource(31)]


def quarantined(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_samples_are_replaced_recorded_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "quarantine.jsonl"
    options = {"sources": BROKEN, "total_steps": 12, "quarantine_path": path}
    cfg = replace(CFG, max_bad_ratio=1.0)
    with load(2, cfg, **options) as loader:
        batches = [contents(b) for b in loader]
    records = quarantined(path)
    assert loader.n_bad == len(records) > 4
    assert loader.n_seen == 12 * 12
    by_key = {r["key"]: r for r in records if r["source"] == "toy"}
    assert "disk on fire" in by_key["toy_3"]["reason"]
    assert "shape (1, 8, 8), expected (2, 8, 8)" in by_key["toy_4"]["reason"]
    assert "no view of 7" in by_key["toy_7"]["reason"]
    assert "all no-data" in by_key["toy_9"]["reason"]
    assert set(records[0]) == {"step", "source", "index", "key", "shard", "reason"}
    assert records[0]["shard"] == "toy.tar"
    used = {k for b in batches if b[1] == 0 for k in b[2]}
    assert not used & {"toy_3", "toy_4", "toy_7", "toy_9", "toy_20"}
    assert "replaced" in caplog.text

    path.unlink()
    assert collect(load(0, cfg, **options)) == batches
    assert quarantined(path) == records
    path.unlink()
    assert collect(load(0, cfg, start_step=7, **options)) == batches[7:]
    assert quarantined(path) == [r for r in records if r["step"] >= 7]


@dataclass
class TwoTiles(ToySource):
    """A second tile, of which no view is taken and which is empty."""

    schema: ClassVar = {"toy": SCHEMA, "toy@coarse": SCHEMA}

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        sample.tiles["toy@coarse"] = Tile(np.zeros((2, 8, 8), np.uint16), SENSOR.band_names, 10.0)
        return sample


def test_only_tiles_that_are_shown_must_hold_something(tmp_path: Path) -> None:
    cfg, path = replace(CFG, sources=CFG.sources[:1]), tmp_path / "quarantine.jsonl"
    with load(cfg=cfg, sources=[TwoTiles(53, {9: "empty"})], quarantine_path=path) as loader:
        used = {key for batch in loader for key in batch.keys}
    assert used == {f"toy_{i}" for i in range(53)} - {"toy_7", "toy_9"}
    empty = "ValueError: tile 'toy' of sample 'toy_9' is all no-data where a view looks"
    assert {r["reason"] for r in quarantined(path)} == {"ValueError: no view of 7", empty}


def test_the_reason_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    with load(sources=[ToySource(53, {3: "lines"}), ToySource(31)], quarantine_path=path) as loader:
        list(loader)
    assert "OSError: two lines" in {r["reason"] for r in quarantined(path)}


def test_a_run_stops_above_the_bad_ratio(tmp_path: Path) -> None:
    broken = dict.fromkeys(range(0, 53, 3), "os")
    path = tmp_path / "quarantine.jsonl"
    loader = load(sources=[ToySource(53, broken), ToySource(31)], total_steps=100, quarantine_path=path)
    with pytest.raises(RuntimeError, match=r"data\.max_bad_ratio = 0\.01 .*quarantine\.jsonl"):
        list(loader)
    assert 10 < loader.n_bad < 40
    assert loader.n_bad == len(quarantined(path))


def test_few_bad_samples_never_stop_a_run() -> None:
    cfg = replace(CFG, max_bad_ratio=0.0, sources=CFG.sources[:1])
    with load(cfg=cfg, sources=[ToySource(1000, dict.fromkeys(range(5), "os"))], total_steps=80) as loader:
        list(loader)
    assert 0 < loader.n_bad <= 10


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_source_without_any_good_sample_ends_with_an_error(n_workers: int, tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    cfg = replace(CFG, sources=CFG.sources[:1])
    with (
        load(n_workers, cfg, [ToySource(4, dict.fromkeys(range(4), "os"))], quarantine_path=path) as loader,
        pytest.raises(RuntimeError, match=r"step 0, data\.sources\[0\] \(toy\): .*100 samples in a row.*disk on fire"),
    ):
        next(loader)
    assert len(quarantined(path)) == MAX_ATTEMPTS


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_error_in_a_worker_is_one_line_with_its_traceback_as_cause(n_workers: int) -> None:
    broken = [ToySource(53, dict.fromkeys(range(53), "bug")), ToySource(31)]
    with load(n_workers, sources=broken) as loader, pytest.raises(RuntimeError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.endswith("data.sources[0] (toy): KeyError: 'a bug'")
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    assert "in read" in str(caught.value.__cause__)
    assert not multiprocessing.active_children()


def test_a_dead_worker_is_an_error() -> None:
    broken = [ToySource(53, dict.fromkeys(range(53), "exit")), ToySource(31)]
    with load(1, sources=broken) as loader, pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(loader)


def test_workers_leave_signals_to_the_training_process(expected: list[tuple[Any, ...]]) -> None:
    loader = load(2)
    got = [contents(next(loader)) for _ in range(2)]  # one from each, so that both have started
    for child in multiprocessing.active_children():
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(child.pid or 0, name)
    assert got + collect(loader) == expected


def test_close_ends_a_worker_that_hangs() -> None:
    cfg = replace(CFG, sources=CFG.sources[:1])
    loader = load(1, cfg, [ToySource(53, dict.fromkeys(range(53), "hang"))])
    (child,) = multiprocessing.active_children()
    loader.close()
    assert not child.is_alive()
    assert list(loader) == []


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    code = """
import multiprocessing, time
from test_loader import *
if __name__ == "__main__":
    loaders = [load(2, replace(CFG, start_method=m), total_steps=10**6) for m in ("fork", "forkserver")]
    for loader in loaders:
        next(loader)
    print(*(c.pid for c in multiprocessing.active_children()), flush=True)
    time.sleep(1000)
"""
    script = tmp_path / "run.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 4
        assert all(map(is_running, workers))
        parent.kill()
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sources": []}, "sources is empty"),
        ({"n_lanes": 0}, "n_lanes must be at least 1, got 0"),
        ({"n_workers": -1}, "n_workers must be at least 0"),
        ({"prefetch_batches": 0}, "prefetch_batches must be at least 1"),
        ({"window_chunks": 0}, "window_chunks must be at least 1"),
        ({"max_bad_ratio": 1.5}, r"max_bad_ratio must be between 0 and 1, got 1\.5"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(CFG, **change)


def test_wrong_sizes_are_refused_before_workers_start() -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size = 10"):
        load(2, global_batch_size=10)
    with pytest.raises(ValueError, match="world size 3"):
        load(2, world_size=3)
    with pytest.raises(ValueError, match=r"train\.accumulate = 4 does not divide the 6 samples of a rank"):
        load(2, world_size=2, n_micro_batches=4)
    with pytest.raises(ValueError, match=r"weight must be positive and finite, got -1\.0"):
        WeightedSourceConfig("toy", None, -1.0)
    assert not multiprocessing.active_children()


def test_open_source_resolves_the_module(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no component 'eurosatt'.*did you mean 'eurosat'"):
        open_source(SourceConfig("eurosatt", None))
    from ssl_eo.data.sources import eurosat

    with pytest.raises(ValueError, match="neither EuroSAT shards"):
        open_source(SourceConfig("eurosat", eurosat.Config(str(tmp_path))))


def test_what_crosses_processes_can_be_pickled() -> None:
    dataset = StepDataset(CFG, SOURCES, ToyViews(), seed=0, global_batch_size=12)
    copy = pickle.loads(pickle.dumps(dataset))
    assert contents(copy[3].batch) == contents(dataset[3].batch)
    record = BadSample(1, "toy", 2, None, None, "why")
    assert pickle.loads(pickle.dumps(record)) == record


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned_for_a_gpu(expected: list[tuple[Any, ...]]) -> None:
    with load(2, device="cuda") as loader:
        batches = list(loader)
    assert all(b.tiles["toy"].pixels.is_pinned() and b.views["image"][0].box.is_pinned() for b in batches)
    assert [contents(b) for b in batches] == expected
