"""One rank goes wrong: all end, one of them says which and where, and the last checkpoint serves the next start."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, assert_same_bits, command, finish, read_checkpoint, records, start, wait_for

from ssl_eo.cli import main
from ssl_eo.data.sources import synthetic
from ssl_eo.distributed import rank
from ssl_eo.train import run_dir

OnRanks = Callable[..., list[Any]]

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
SHORT = (
    "train.total_steps=12",
    "train.global_batch_size=8",
    "optim.warmup_steps=1",
    "checkpoint.every_n_steps=4",
    "log.every_n_steps=1",
    "log.report=false",
    "data.n_workers=0",
    "eval.every_n_steps=0",
)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # forked ranks find them too


def _train(out_dir: str, *overrides: str) -> int:
    return main(["train", "--config", DEBUG, f"run.out_dir={out_dir}", *SHORT, *overrides])


def _checkpoints(out_dir: Path) -> list[str]:
    return sorted(p.name for p in (out_dir / "debug_mae" / "checkpoints").iterdir())


def _pid_of_rank(launcher: int, rank: int) -> int | None:
    """Of the process that torchrun started for `rank`, once it is there."""
    for children in Path(f"/proc/{launcher}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                return pid
    return None


def _is_past(out_dir: Path, step: int) -> bool:
    return any(r["step"] > step for r in records(out_dir / "debug_mae" / "metrics.jsonl"))


def _is_saving(out_dir: Path) -> bool:
    """The second checkpoint: beside a first one that is whole."""
    root = out_dir / "debug_mae" / "checkpoints"
    return (root / "step_00000004").is_dir() and any(root.glob("step_00000008.partial/*"))


def _killed(
    out_dir: Path, rank: int, when: Callable[[Path], bool], *options: str, overrides: tuple[str, ...] = ()
) -> tuple[int, str, float]:
    """Status and words of a run of two ranks, one of which is killed; and how long it lived on."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    process = start([*launch, *command(DEBUG, out_dir, *SHORT, *overrides)])
    wait_for(lambda: when(out_dir), process)
    pid = _pid_of_rank(process.pid, rank)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    status, output = finish(process, timeout_s=120)
    return status, output, time.monotonic() - killed_at


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_9_of_a_rank_ends_the_other_which_says_so(rank: int, tmp_path: Path) -> None:
    status, output, lived_s = _killed(tmp_path, rank, partial(_is_past, step=5))
    assert status == 1, output
    assert re.search(rf"ssl-eo: rank {rank} (on \S+ )?is gone.* stop(s|ped) at step \d+ \(", output), output
    assert lived_s < 30
    assert _checkpoints(tmp_path) == ["step_00000004"]


@pytest.mark.parametrize(("rank", "asynchronous"), [(0, "true"), (1, "false")])
def test_kill_9_in_mid_save_is_told_too(rank: int, asynchronous: str, tmp_path: Path) -> None:
    """Large files and many, so that the save takes a while; what the others then meet is an error of the save."""
    overrides = (f"checkpoint.asynchronous={asynchronous}", "model.embed_dim=384", "model.n_heads=6")
    status, output, lived_s = _killed(tmp_path, rank, _is_saving, overrides=overrides)
    assert status == 1, output
    assert re.search(rf"ssl-eo: rank {rank} (on \S+ )?is gone.* stop(s|ped) at step \d+ \(", output), output
    assert lived_s < 30
    assert "step_00000004" in _checkpoints(tmp_path)


def test_torchrun_starts_again_after_kill_9_and_ends_in_the_same_bits(tmp_path: Path, on_ranks: OnRanks) -> None:
    status, output, _ = _killed(tmp_path / "killed", 1, partial(_is_past, step=5), "--max-restarts=2")
    assert status == 0, output
    assert "going on after step 4" in output
    assert on_ranks(2, _train, str(tmp_path / "whole")) == [0, 0]
    last = Path("debug_mae", "checkpoints", "step_00000012")
    assert_same_bits(read_checkpoint(tmp_path / "killed" / last), read_checkpoint(tmp_path / "whole" / last))


def test_a_rank_that_stalls_ends_all_within_the_timeout(
    toys: None, tmp_path: Path, on_ranks: OnRanks, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 1"):
        on_ranks(2, _train, str(tmp_path), "objective.name=toys.stumbling", "objective.stalls_at=5", *_within(2))
    assert time.monotonic() - begun < 40
    told = capfd.readouterr().err
    assert re.search(r"ssl-eo: rank 1 on \S+ is at step 5 \(forward\) for more than 2 s \(parallel.timeout_s\)", told)
    assert told.count("ssl-eo:") == 1
    assert _checkpoints(tmp_path) == ["step_00000004"]


def test_a_rank_that_fails_is_named_by_itself_alone(
    toys: None, tmp_path: Path, on_ranks: OnRanks, capfd: pytest.CaptureFixture[str]
) -> None:
    statuses = on_ranks(2, _train, str(tmp_path), "objective.name=toys.stumbling", "objective.falls_at=5")
    assert statuses == [1, 1]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ssl-eo:")]
    assert len(told) == 1
    assert re.match(r"ssl-eo: out of luck \(rank 1 on \S+, step 5 \(forward\)\)", told[0])


def test_a_loader_that_fails_on_one_rank_ends_all(
    tmp_path: Path, on_ranks: OnRanks, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = synthetic.Source.read

    def fail(self: synthetic.Source, *arguments: Any) -> Any:
        if rank() == 1:
            raise MemoryError("the machine is too small")
        return read(self, *arguments)

    monkeypatch.setattr(synthetic.Source, "read", fail)
    assert on_ranks(2, _train, str(tmp_path)) == [1, 1]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ssl-eo:")]
    assert len(told) == 1
    assert re.search(r"the machine is too small.* \(rank 1 on \S+, step \d+ \(waiting for a batch\)\)", told[0])


def test_nan_on_one_rank_skips_the_step_on_all(toys: None, tmp_path: Path, on_ranks: OnRanks) -> None:
    stumbling = ("objective.name=toys.stumbling", "objective.bad_steps=[3,6]")
    for strategy in ("ddp", "fsdp"):
        overrides = (*stumbling, "objective.bad_rank=1", f"parallel.strategy={strategy}")
        assert on_ranks(2, _train, str(tmp_path / strategy), *overrides) == [0, 0]
        skipped = records(tmp_path / strategy / "debug_mae" / "skipped.jsonl")
        assert sorted({(r["step"], r["rank"]) for r in skipped}) == [(3, 0), (3, 1), (6, 0), (6, 1)]
    assert on_ranks(2, _train, str(tmp_path / "both"), *stumbling) == [0, 0]
    last = Path("debug_mae", "checkpoints", "step_00000012")
    assert_same_bits(read_checkpoint(tmp_path / "ddp" / last), read_checkpoint(tmp_path / "both" / last))


def test_unequal_data_is_found_at_the_start(
    tmp_path: Path, on_ranks: OnRanks, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes with a copy of the data each, one of them without the last shard."""
    whole = tmp_path / "node0"
    scenes = ["n_samples=40", "sensors=[sentinel2_l2a]", "extent_m=320.0"]
    packing = ["data", "pack", "--source", "synthetic", "--out", str(whole), "--shard-size-mb", "0.5", "--workers", "0"]
    assert main([*packing, *scenes]) == 0
    shutil.copytree(whole, tmp_path / "node1")
    shards = sorted((tmp_path / "node1").rglob("*.tar"))
    assert len(shards) > 1
    shards[-1].unlink()

    def on_node(out_dir: str) -> int:
        return _train(out_dir, f"data.sources=[{{name: shards, root: {tmp_path / f'node{rank()}'}}}]")

    assert on_ranks(2, on_node, str(tmp_path / "run")) == [2, 2]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ssl-eo:")]
    assert len(told) == 1
    assert shards[-1].name in told[0]
    assert "rank 1 on" in told[0]


def test_a_run_directory_that_is_not_shared_is_found_at_the_start(
    tmp_path: Path, on_ranks: OnRanks, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir, "_SHARED_WITHIN_S", 0.5)

    def on_node(out_dir: str) -> int:
        return _train(f"{out_dir}/node{rank()}")

    assert on_ranks(2, on_node, str(tmp_path)) == [2, 2]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ssl-eo:")]
    assert len(told) == 1
    assert "set run.out_dir to one that all nodes share (rank 1 on" in told[0]


def test_a_wrong_config_is_told_once(tmp_path: Path, on_ranks: OnRanks, capfd: pytest.CaptureFixture[str]) -> None:
    assert on_ranks(2, _train, str(tmp_path), "data.n_lanes=1", "train.global_batch_size=8") == [2, 2]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ssl-eo:")]
    assert len(told) == 1
    assert "data.n_lanes = 1 must be a multiple of the world size" in told[0]


def _within(seconds: float) -> tuple[str, ...]:
    return (f"parallel.timeout_s={seconds}",)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_disk_that_one_rank_cannot_write_to(
    asynchronous: str, tmp_path: Path, on_ranks: OnRanks, capfd: pytest.CaptureFixture[str]
) -> None:
    """The save fails on all ranks and says so once; the checkpoint before it stands, and serves the next start."""
    overrides = ("parallel.strategy=fsdp", f"checkpoint.asynchronous={asynchronous}")

    def on_node(out_dir: str) -> int:
        if rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return _train(out_dir, *overrides)

    assert on_ranks(2, _train, str(tmp_path), *overrides, "train.time_limit_s=0.0") == [75, 75]
    kept = _checkpoints(tmp_path)
    assert on_ranks(2, on_node, str(tmp_path)) == [1, 1]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ssl-eo:")]
    assert len(told) == 1
    assert "File too large" in told[0]
    assert f"the newest kept is {kept[0]}" in told[0]
    assert _checkpoints(tmp_path) == kept
    assert on_ranks(2, _train, str(tmp_path), *overrides) == [0, 0]
