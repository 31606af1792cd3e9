"""All objectives on the same procedural data, with the same encoder, for the same time of one core: a Markdown table.

    python benchmarks/comparison.py [--seconds 180] [--only NAME ...] [--folder FOLDER]

Each is the debug recipe of its objective with a larger encoder, on scenes of Sentinel-2 and Sentinel-1 with land
cover, packed once; `mae_temporal` sees the same places at three dates. A short run measures how many samples a second
it takes, a second one trains for `--seconds`. Both are processes of one thread that read their own data.

kNN and ridge are accuracies of `synthetic_scenes` (Sentinel-2), effective rank is that of its test features; beside
them are those of the same encoder before the first step. Memory is the peak of the short run, with Python and torch.
What is better with these minutes, on these scenes and with these recipes, is not what is better.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_eo.data.pack import pack
from ssl_eo.data.sources.synthetic import Config, Source

ROOT = Path(__file__).parents[1]
EXTENT_M = 640.0
BATCH = 32
N_SHORT_STEPS = 60
CROP = "{size_px: 32, scale: [0.25, 1.0]}"
JITTERED = "{size_px: 32, scale: [0.25, 1.0], jitter_prob: 0.5, contrast: 0.2, brightness: 0.2}"
PAIR = (f"objective.crops.crop={JITTERED}",)
# What of a debug recipe is said anew; all else is its own.
RECIPES: dict[str, tuple[str, ...]] = {
    "mae": (f"objective.crop={CROP}", "objective.tile=sentinel2_l2a"),
    "mae_temporal": (f"objective.crop={CROP}",),
    "simclr": PAIR,
    # Over more steps than the debug recipe has, keys of a faster teacher are told apart by their age.
    "moco": (*PAIR, "objective.momentum=0.99", "optim.lr=1.0e-3"),
    "moco_v3": (*PAIR, "optim.freeze_steps={}"),
    "byol": PAIR,
    "dinov2": (),
    "multimae": (f"objective.crop={CROP}", "objective.budget.n_visible=48"),
    "croma": (f"objective.crop={CROP}",),
    "dofa": (f"objective.crop={CROP}", "objective.tile=sentinel2_l2a", "data.mixing=sample"),
}
COMMON = (
    *("model.embed_dim=64", "model.depth=4", "model.n_heads=4", "model.patch_size=4"),
    *("data.n_workers=0", f"train.global_batch_size={BATCH}", "train.n_threads=1", "optim.warmup_steps=50"),
    *("eval.tasks=[synthetic_scenes]", "eval.pool=mean_std", "eval.taps=[1.0]", "eval.controls=false"),
    *("log.every_n_steps=10", "log.report=false"),
)


@dataclass(frozen=True)
class Result:
    """What one objective came to; ratios, samples per second, megabytes."""

    name: str
    n_steps: int
    samples_per_s: float
    peak_mb: float
    after: dict[str, float]  # knn, ridge, effective_rank
    before: dict[str, float]

    def row(self) -> str:
        changes = [
            *(f"{100 * self.after[k]:.1f} ({100 * self.before[k]:.1f})" for k in ("knn", "ridge")),
            f"{self.after['effective_rank']:.1f} ({self.before['effective_rank']:.1f})",
        ]
        cells = [f"`{self.name}`", *changes, f"{self.samples_per_s:.0f}", f"{self.n_steps:,}", f"{self.peak_mb:.0f}"]
        return f"| {' | '.join(cells)} |"


HEADER = """| debug recipe | kNN, % | ridge, % | effective rank | samples/s | steps | peak memory, MB |
|---|---|---|---|---|---|---|"""


def compare(name: str, seconds: float, folder: Path) -> Result:
    """A short run to see how fast it is, and one of so many `seconds`."""
    source = folder / ("series" if name == "mae_temporal" else "places")
    given = (*COMMON, *RECIPES[name], f"data.sources=[{{name: shards, root: {source}}}]")
    short = (f"train.total_steps={N_SHORT_STEPS}", f"checkpoint.every_n_steps={N_SHORT_STEPS}", "eval.every_n_steps=0")
    peak_mb = _train(name, folder / "short", *given, *short)
    rates = sorted(r["samples_per_s"] for r in _records(folder / "short", name, "metrics"))
    samples_per_s = rates[len(rates) // 2]
    n_steps = max(N_SHORT_STEPS, round(seconds * samples_per_s / BATCH))
    steps = (f"train.total_steps={n_steps}", f"checkpoint.every_n_steps={n_steps}", f"eval.every_n_steps={n_steps}")
    _train(name, folder / "runs", *given, *steps)
    found = [r for r in _records(folder / "runs", name, "eval") if r.get("tap") == "last"]
    after, before = ([r for r in found if r["step"] == step] for step in (n_steps, 0))
    return Result(name, n_steps, samples_per_s, peak_mb, after=_numbers(after), before=_numbers(before))


def _numbers(records: list[dict[str, Any]]) -> dict[str, float]:
    """Of one step: by the name of the probe or of the measure."""
    found = {r["probe"]: r[r["metric"]] for r in records if r["kind"] == "probe"}
    return found | {"effective_rank": next(r["effective_rank"] for r in records if r["kind"] == "health")}


def _train(name: str, out_dir: Path, *overrides: str) -> float:
    """Trains in a process of its own; its peak memory in MB."""
    config = str(ROOT / "configs" / "debug" / f"{name}.yaml")
    command = [sys.executable, "-m", "ssl_eo", "train", "--config", config, f"run.out_dir={out_dir}", *overrides]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"training failed:\n{output.read().decode(errors='replace')}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes * 1024 / 1e6


def _records(out_dir: Path, name: str, kind: str) -> list[dict[str, Any]]:
    lines = (out_dir / f"debug_{name}" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_data(folder: Path, names: list[str], n_places: int) -> None:
    """Packs the scenes that `names` need."""
    sensors = ["sentinel2_l2a", "sentinel1_grd:vv_vh", "synthetic_landcover"]
    places = Config(n_samples=n_places, extent_m=EXTENT_M, sensors=sensors)
    if names != ["mae_temporal"]:
        pack(Source(places), folder / "places", n_workers=2)
    if "mae_temporal" in names:
        dated = Config(n_samples=n_places, extent_m=EXTENT_M, sensors=sensors[:1], n_dates=3)
        pack(Source(dated), folder / "series", n_workers=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="of training, for each")
    parser.add_argument("--only", choices=RECIPES, nargs="+", default=list(RECIPES), help="some objectives")
    parser.add_argument("--places", type=int, default=4096, help="to train on")
    parser.add_argument("--folder", type=Path, help="where data and runs are left; default: nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        write_data(folder, arguments.only, arguments.places)
        print(HEADER, flush=True)
        for name in arguments.only:
            print(compare(name, arguments.seconds, folder).row(), flush=True)


if __name__ == "__main__":
    main()
