"""How much of its time training waits for data: a ViT-S/8 masked autoencoder on MMEarth64, on this CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from _reading import SIZE_PX, write_mmearth
from _table import Row

from ssl_eo.data.pack import pack
from ssl_eo.data.sources.mmearth import Config, Source

__all__ = ["measure_waiting"]

LOG_EVERY_N_STEPS = 2
CONFIG = """
run: {{name: {name}, out_dir: {out_dir}}}
objective:
  name: mae
  tile: [sentinel2_l1c, sentinel2_l2a]
  crop: {{size_px: 64}}
  output: linear
model: {{size: small, patch_size: 8, patch_embed: conv}}
data:
  sources: [{source}]
  n_workers: 1
train: {{total_steps: {steps}, global_batch_size: {batch}}}
checkpoint: {{every_n_steps: {steps}}}
log: {{every_n_steps: {every}, report: false}}
"""


def measure_waiting(folder: Path, quick: bool) -> list[Row]:
    """Trains on what was packed from an MMEarth64 file and on that file, for 30 steps of 32 (6 of 8 with `quick`)."""
    root, packed = folder / "mmearth", folder / "packed"
    n_samples, n_steps, batch = (48, 6, 8) if quick else (1024, 30, 32)
    write_mmearth(root, n_samples, SIZE_PX)
    pack(Source(Config(str(root), split="all", cirrus_band=False)), packed)
    sources = {
        "packed raw": f"{{name: shards, root: {packed}}}",
        "source mmearth": f"{{name: mmearth, root: {root}, split: all, cirrus_band: false}}",
    }
    rows = []
    for name, source in sources.items():
        ratio, samples_per_s = _train(folder, name.replace(" ", "_"), source, n_steps, batch)
        what = f"ViT-S/8 MAE, {name}, {samples_per_s:.0f} samples/s"
        rows.append(Row("waiting", what, 100 * ratio, "%", most=2))
    return rows


def _train(folder: Path, name: str, source: str, steps: int, batch: int) -> tuple[float, float]:
    """Share of the time that was spent waiting, and samples per second; without the start."""
    path = folder / f"{name}.yaml"
    sizes = {"steps": steps, "every": LOG_EVERY_N_STEPS, "batch": batch}
    path.write_text(CONFIG.format(name=name, out_dir=folder / "runs", source=source, **sizes), encoding="utf-8")
    command = [sys.executable, "-m", "ssl_eo", "train", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"training failed:\n{done.stderr}")
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][1:]  # the first one has the start of the workers in it
    seconds = [1 / record["samples_per_s"] for record in records]  # of a sample
    waited = sum(s * record["data_wait_ratio"] for s, record in zip(seconds, records, strict=True))
    return waited / sum(seconds), len(seconds) / sum(seconds)
