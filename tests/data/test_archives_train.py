"""Every archive trains through the real trainer as it was downloaded, and packed it gives the same batches and loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("h5py")
pytest.importorskip("pyarrow")
pytest.importorskip("rasterio")

from archives.small import ARCHIVES, N_SAMPLES, content_of, open_small
from launching import ROOT, records

from ssl_eo import config
from ssl_eo.cli import main
from ssl_eo.components import resolve
from ssl_eo.data.loader import Loader
from ssl_eo.data.opening import open_sources
from ssl_eo.data.pack import pack

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
N_STEPS, BATCH_SIZE = 3, 4
SHORT = (
    "model.depth=1",
    "data.n_workers=0",
    "data.n_lanes=2",
    f"train.global_batch_size={BATCH_SIZE}",
    f"train.total_steps={N_STEPS}",
    "optim.warmup_steps=1",
    f"checkpoint.every_n_steps={N_STEPS}",
    "log.every_n_steps=1",
    "log.report=false",
)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", [name for name in ARCHIVES if name != "shards"])
def test_an_archive_trains_and_packed_it_trains_the_same(name: str, tmp_path: Path) -> None:
    archive, root = ARCHIVES[name], tmp_path / ARCHIVES[name].folder
    archive.write(root)
    source: Any = open_small(archive, root)
    direct = train(tmp_path / "direct", name, {"name": archive.source, "root": str(root), **archive.options})
    assert len(direct) == N_STEPS
    assert all(math.isfinite(step["loss"]) and step["n_bad_samples"] == 0 for step in direct)
    batches = batches_of(tmp_path / "direct")
    keys = [source.locate(i)[0] for i in range(N_SAMPLES)]
    assert sorted(key for batch in batches[: N_SAMPLES // BATCH_SIZE] for key in batch[0]) == sorted(keys)

    report = pack(source, tmp_path / "packed", samples_per_shard=3)
    assert (report.n_samples, report.n_bad) == (N_SAMPLES, 0)
    shards = {"name": "shards", "root": str(tmp_path / "packed"), "chunk_size": source.chunk_size}
    packed = train(tmp_path / "from_shards", name, shards)
    assert batches_of(tmp_path / "from_shards") == batches
    assert [step["loss"] for step in packed] == [step["loss"] for step in direct]


def train(out_dir: Path, name: str, source: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of each step of a run on one source."""
    tiles = f"objective.tile={json.dumps(ARCHIVES[name].tiles)}"
    sources = f"data.sources={json.dumps([source])}"
    assert main(["train", "--config", DEBUG, f"run.out_dir={out_dir}", *SHORT, tiles, sources]) == 0
    return records(out_dir / "debug_mae" / "metrics.jsonl")


def batches_of(out_dir: Path) -> list[tuple[list[str], str]]:
    """Keys and checksum of every batch that the run saw, by the config that it left."""
    saved = config.load(out_dir / "debug_mae" / "config.yaml")
    sources = open_sources(saved.data)
    method = resolve("ssl_eo.objectives", saved.objective.name).Objective
    views = method.views(saved.objective.options, saved.model, [source.schema for source in sources])
    size = {"global_batch_size": saved.train.global_batch_size, "total_steps": saved.train.total_steps}
    with Loader(saved.data, sources, views, seed=saved.run.seed, **size) as loader:
        return [content_of(batch) for batch in loader]
