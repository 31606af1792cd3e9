"""Views of a batch: planned, stacked and rendered together, or cropped and resized sample by sample.

B samples, C bands, H = W = 128 pixels of a tile, h = w = 112 pixels of a view.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _table import Row
from _timing import best_processor_seconds
from torch import Tensor

from ssl_eo.data.plans import CropConfig, resized_crop
from ssl_eo.data.render import Renderer
from ssl_eo.data.stacking import stack
from ssl_eo.data.types import Batch, Sample, Tile, TileSchema, move_to
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.sensors import load_sensor

__all__ = ["measure_rendering"]

BATCH = 64
TILE = "sentinel2_l2a"
SECTION = "rendering"


def measure_rendering(folder: Path, quick: bool) -> list[Row]:
    """On one thread of the CPU, and beside a training step where there is a GPU. Writes nothing into `folder`."""
    scene = Scene(tile_px=128, view_px=112)
    calls = {
        "crop, F.interpolate, flip, turn, normalise each sample": scene.one_by_one,
        "plan, stack and render the batch": lambda: scene.renderer.render(scene.plan_and_stack()),
        "  of which plan and stack": scene.plan_and_stack,
    }
    seconds = best_processor_seconds(calls, 8 if quick else 40)
    yardstick = next(iter(seconds.values()))
    least = {"plan, stack and render the batch": 1.0}
    rows = [
        Row(SECTION, name, BATCH / took, "samples/s", yardstick / took, least_ratio=least.get(name))
        for name, took in seconds.items()
    ]
    return [*rows, _gpu_row()]


class Scene:
    """Sentinel-2 tiles of 12 bands, random resized crops of them, and both ways to make these."""

    def __init__(self, tile_px: int, view_px: int, device: str = "cpu") -> None:
        sensor = load_sensor(TILE)
        n_bands = len(sensor.bands)
        statistics = (2000.0,) * n_bands, (900.0,) * n_bands
        self.schema = TileSchema(sensor, sensor.band_names, "uint16", (tile_px, tile_px), 10.0, *statistics)
        pixels = np.random.default_rng(0).integers(1, 4000, (BATCH, n_bands, tile_px, tile_px), dtype=np.uint16)
        self.samples = [Sample(str(i), {TILE: Tile(p, sensor.band_names, 10.0)}) for i, p in enumerate(pixels)]
        self.crop = CropConfig(view_px)
        self.rng = np.random.default_rng(0)
        self.renderer = Renderer([{TILE: self.schema}]).to(device)
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in statistics)  # [C, 1, 1]

    def plan_and_stack(self) -> Batch:
        """What loading processes do with samples that they have read."""
        plans = [resized_crop(sample, TILE, self.crop, self.rng) for sample in self.samples]
        tiles, views = stack(self.samples, {"image": [plans]}, {TILE: self.schema})
        return Batch(0, 0, [sample.key for sample in self.samples], tiles, views)

    def one_by_one(self) -> Tensor:
        """`[B, C, h, w]`, each row by itself; boxes of whole pixels."""
        views = []
        for sample in self.samples:
            plan = resized_crop(sample, TILE, self.crop, self.rng)
            top, left, height, width = map(round, plan.box)
            crop = sample.tiles[TILE].array[:, top : top + height, left : left + width]
            x = torch.from_numpy(crop.astype(np.float32))[None]  # [1, C, height, width]
            x = F.interpolate(x, plan.size, mode="bicubic", antialias=True)[0]  # [C, h, w]
            x = torch.rot90(x.flip(2) if plan.flip else x, plan.rot90, (1, 2))
            views.append(x.sub_(self.mean).div_(self.std))
        return torch.stack(views)


# --- beside a training step ------------------------------------------------------------------------------------------


def _gpu_row() -> Row:
    name = "plan, stack and render beside a ViT-B/16 step, 224 px"
    if not torch.cuda.is_available():
        return Row(SECTION, f"{name}: no GPU here", None, "%", most=10)
    return Row(SECTION, name, 100 * step_share("cuda", EncoderConfig(size="base", patch_size=16)), "%", most=10)


def step_share(device: str, cfg: EncoderConfig, n_turns: int = 20) -> float:
    """Seconds to plan, stack and render a batch over those of a step: forward and backward of all tokens, bfloat16."""
    scene = Scene(tile_px=256, view_px=224, device=device)
    encoder = Encoder(cfg, n_channels=len(scene.schema.bands)).to(device)
    encoder.init_weights()
    batch = move_to(scene.plan_and_stack(), device)
    view = scene.renderer.render(batch)["image"]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            (tokens,) = encoder([EncoderInput(view.pixels, view.channels, view.gsd_m)])
        tokens.x.float().square().mean().backward()
        encoder.zero_grad(set_to_none=True)

    on_host = _wall_seconds(scene.plan_and_stack, "cpu", n_turns)
    on_device = _wall_seconds(lambda: scene.renderer.render(batch), device, n_turns)
    return (on_host + on_device) / _wall_seconds(step, device, n_turns)


def _wall_seconds(call: Callable[[], object], device: str, n_turns: int) -> float:
    """The fastest of several calls, with what they queued on the device."""
    best = float("inf")
    for _ in range(n_turns):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
