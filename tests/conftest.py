"""Shared fixtures. One thread per process: tests run beside each other, and a fork must not find threads."""

from __future__ import annotations

import importlib
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

torch.set_num_threads(1)


def pytest_configure() -> None:
    """A shell that starts the tests in the background, or nohup, has processes ignore these, and theirs inherit it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden", action="store_true", help="write tests/golden/*.json anew; look at the diff"
    )


def _enter(rank: int, n_ranks: int, folder: str, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    try:
        torch.save(call(*args), f"{folder}/rank{rank}.pt")
    finally:
        if dist.is_initialized():  # a training run has left it
            dist.destroy_process_group()


@pytest.fixture(scope="session")
def imported() -> None:
    """What runs on ranks, imported before the fork, once and not by each of them."""
    for name in ("ssl_eo.train.trainer", "ssl_eo.config", "torch._dynamo", "torch.distributed.fsdp"):
        importlib.import_module(name)


@pytest.fixture
def on_ranks(imported: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`on_ranks(n, call, *args)` runs `call(*args)` in n forked gloo processes and returns what each returned."""

    def run(n_ranks: int, call: Callable[..., Any], *args: Any) -> list[Any]:
        folder = str(tmp_path_factory.mktemp("ranks"))
        mp.start_processes(_enter, (n_ranks, folder, call, args), nprocs=n_ranks, start_method="fork")
        return [torch.load(f"{folder}/rank{rank}.pt", weights_only=False) for rank in range(n_ranks)]

    return run


@pytest.fixture(scope="session")
def real_samples() -> Callable[[str], Path]:
    """`real_samples("eurosat_rgb")`: that file or folder of real sample imagery; the test is skipped without it."""

    def find(name: str) -> Path:
        path = Path(os.environ.get("SSL_EO_SAMPLES", "none"), name)
        if not path.exists():
            pytest.skip(f"SSL_EO_SAMPLES does not name a folder that holds {name}")
        return path

    return find


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty and of this test alone."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache
