"""How much memory loading processes take together, on a table of as many samples as MMEarth has.

A process takes its own pages and its share of those that it has in common with others (PSS). Each figure is of a fresh
Python process with a loader, after every worker has read for a while.

N tiles of the archive.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _table import Row

__all__ = ["environment_with", "in_fresh_process", "measure_memory"]

N_WORKERS = (1, 8)
BATCH = 64
SIZE_PX = 64
CONFIG = """
objective: {{name: mae, crop: {{size_px: 64}}}}
model: {{size: tiny, patch_size: 8}}
data:
  sources: [{{name: mmearth, root: {root}, tiles: [sentinel1_grd_ascending]}}]
  n_workers: {n_workers}
train: {{global_batch_size: {batch}}}
"""


def measure_memory(folder: Path, quick: bool) -> list[Row]:
    """Eight workers beside one, on 1.2 million tiles or, with `quick`, 20 thousand."""
    n = 20_000 if quick else 1_200_000
    what = f"{n:,} tiles"
    if not Path("/proc/self/smaps_rollup").exists():
        return [Row("memory", f"needs the /proc of Linux, {what}", None, "MB")]
    root = folder / "mmearth"
    write_archive(root, n)
    start = time.perf_counter()
    in_fresh_process(open_archive, root)
    rows = [Row("memory", f"opening for the first time, {what}", time.perf_counter() - start, "s")]
    few, many = (in_fresh_process(loading_mb, root, n_workers, 4 if quick else 16) for n_workers in N_WORKERS)
    return [
        *rows,
        Row("memory", f"loader, {N_WORKERS[0]} worker, {what}", few, "MB", 1.0),
        Row("memory", f"loader, {N_WORKERS[1]} workers, {what}", many, "MB", many / few),
        Row("memory", "what the other 7 workers add", many - few, "MB", most=300),
    ]


def in_fresh_process(call: Any, *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What `call`, a function of a module, returns in a Python process of its own, with `environment` added to ours."""
    with (
        environment_with(environment or {}),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor,
    ):
        return executor.submit(call, *arguments).result()


@contextlib.contextmanager
def environment_with(added: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started inside find `added` in their environment."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def open_archive(root: Path) -> int:
    """Opens the source, which makes its table if there is none; how many samples it has."""
    from ssl_eo.data.sources.mmearth import Config, Source

    return len(Source(Config(str(root), tiles=["sentinel1_grd_ascending"])))


def loading_mb(root: Path, n_workers: int, n_batches: int) -> float:
    """The most that this process and its workers took, in MB, over the second half of `n_batches` of each worker."""
    from ssl_eo.components import resolve
    from ssl_eo.config import load
    from ssl_eo.data.loader import Loader
    from ssl_eo.data.opening import open_sources

    path = root.parent / f"load-{n_workers}.yaml"
    path.write_text(CONFIG.format(root=root, n_workers=n_workers, batch=BATCH), encoding="utf-8")
    config = load(path)
    sources = open_sources(config.data)
    method = resolve("ssl_eo.objectives", config.objective.name).Objective
    views = method.views(config.objective.options, config.model, [source.schema for source in sources])
    steps = n_batches * n_workers
    with Loader(config.data, sources, views, seed=0, global_batch_size=BATCH, total_steps=2 * steps) as loader:
        most = 0.0
        for step in range(steps):
            next(loader)
            if step >= steps // 2:
                most = max(most, pss_mb())
        return most


def pss_mb() -> float:
    """Proportional set size of this process and its children, MB."""
    pids = ["self", *(child.pid for child in multiprocessing.active_children())]
    return sum(_pss_kb(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")) for pid in pids) * 1024 / 1e6


def _pss_kb(smaps: str) -> int:
    return next(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("Pss:"))


# --- an archive of any size -------------------------------------------------------------------------------------------


def write_archive(root: Path, n: int) -> None:
    """MMEarth64 with n tiles, of which only Sentinel-1 is there: all zero dB, in a file of holes that takes no disk."""
    import h5py

    rng = np.random.default_rng(0)
    ids = rng.permutation(10 * n)[:n]
    latitude, longitude = rng.uniform(-60, 75, n), rng.uniform(-180, 180, n)
    metadata = np.zeros(n, [("tile_id", "S100"), ("S2_type", "S10")])
    metadata["tile_id"], metadata["S2_type"] = ids.astype("S"), np.where(np.arange(n) % 2, b"l2a", b"l1c")
    root.mkdir()
    with h5py.File(root / f"{root.name}.h5", "w") as file:
        file["metadata"] = metadata
        for name, degrees in (("lat", latitude), ("lon", longitude)):
            angle = np.radians(degrees)
            file[name] = np.stack([np.sin(angle), np.cos(angle)], 1).astype(np.float32)  # [N, 2]
        _reserve(file, "sentinel1", (n, 8, SIZE_PX, SIZE_PX))
    statistics = {"sentinel1": {"mean": [-12.0] * 8, "std": [4.0] * 8}}
    (root / f"{root.name}_band_stats.json").write_text(json.dumps(statistics), encoding="utf-8")
    order = random.Random(0).sample(range(n), n)  # records are in another order than rows
    tiles = ((int(ids[i]), float(latitude[i]), float(longitude[i]), i % 2 == 1) for i in order)
    _write_records(root / f"{root.name}_tile_info.json", tiles)


def _reserve(file: Any, name: str, shape: tuple[int, ...]) -> None:
    """A float32 dataset whose place in the file is set apart and never written: it reads as zeros."""
    from h5py import h5d, h5p, h5s, h5t

    options = h5p.create(h5p.DATASET_CREATE)
    options.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5d.FILL_TIME_NEVER)
    h5d.create(file.id, name.encode(), h5t.IEEE_F32LE, h5s.create_simple(shape), options)


def _write_records(path: Path, tiles: Iterable[tuple[int, float, float, bool]]) -> None:
    """One record for each (id, latitude, longitude, is Level-2A), as long as those of the release."""
    era5 = ["temperature_2m", "temperature_2m_min", "temperature_2m_max", "total_precipitation_sum"]
    bands = {
        "sentinel2": [*(f"B{i}" for i in range(1, 8)), "B8A", "B8", "B9", "B11", "B12", "MSK_CLDPRB", "SCL", "QA60"],
        "sentinel1_asc": ["VV", "VH"],
        "sentinel1_desc": None,
        "aster": ["b1", "slope"],
        "era5": [f"{month}_{name}" for month in ("202006", "202007", "year") for name in era5],
        "dynamic_world": ["label"],
        "canopy_height_eth": ["height", "std"],
        "esa_worldcover": ["Map"],
    }
    weather = {part: [288.4171, 271.0932, 301.8264, 0.0713] for part in ("month1", "month2", "year")}
    common = {"S2_DATE": "2020-07-14", "CRS": "EPSG:32721", "biome": 3, "eco_region": 417, "NO_DATA": False}
    ending = json.dumps({**common, "BANDS": bands, "era5": weather})[1:]
    with path.open("w", encoding="utf-8") as file:
        for i, (tile_id, latitude, longitude, is_l2a) in enumerate(tiles):
            level = "l2a" if is_l2a else "l1c"
            start = f'"{tile_id}": {{"S2_type": "{level}", "lat": {latitude}, "lon": {longitude}, '
            file.write(("{" if i == 0 else ", ") + start + ending)
        file.write("}")
