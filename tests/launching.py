"""Starting real runs and reading what they leave, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

ROOT = Path(__file__).parent.parent


def command(config: str, out_dir: Path, *overrides: str) -> list[str]:
    return ["-m", "ssl_eo", "train", "--config", config, f"run.out_dir={out_dir}", "log.report=false", *overrides]


def start(arguments: Sequence[str], n_ranks: int = 1) -> subprocess.Popen[str]:
    """A training process in a session of its own; torchrun for several ranks."""
    launcher = [sys.executable]
    if n_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[int, str]:
    """Exit status and everything printed."""
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def train(config: str, out_dir: Path, *overrides: str, n_ranks: int = 1) -> tuple[int, str]:
    return finish(start(command(config, out_dir, *overrides), n_ranks))


def records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file, none when it is not there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    """Until `condition()`; fails when the process ends or the time is up before."""
    limit = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"ended early:\n{process.communicate()[0]}"
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.002)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its full name."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, checkpoint_id=path, no_dist=True)
    return state


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, for instance {different[:3]}"
