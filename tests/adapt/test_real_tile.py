"""Every decoder of maps learns a real tile by heart: a corner of a BigEarthNet patch with three classes of cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_eo.adapt.backbone import Backbone, EncoderBackbone, PixelBackbone
from ssl_eo.adapt.examples import Examples
from ssl_eo.adapt.model import TaskModel
from ssl_eo.components import available
from ssl_eo.config import build, read_yaml
from ssl_eo.eval.decoders import build_decoder, kinds_of
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.resources import find_resource

SIDE = 48  # pixels
SMALL: dict[str, dict[str, Any]] = {
    "linear": {"dropout_prob": 0.0},
    "fcn": {"channels": 16, "n_convs": 1},
    "segformer": {"channels": 16},
    "upernet": {"channels": 16},
    "muster": {"channels": 16, "n_heads": 1, "window": 4, "depth": 1, "drop_path_prob": 0.0, "dropout_prob": 0.0},
    "unet": {"widths": [8, 16, 16]},
}


@pytest.fixture(scope="module")
def tile(real_samples: Callable[[str], Path]) -> tuple[EncoderInput, Tensor]:
    """Pixels `[1, 4, 48, 48]`, and a class of 0 to 2 for each."""
    real_samples("bigearthnet_v2_s1s2")
    raw = read_yaml(find_resource("datasets_meta/benchmarks", "bigearthnet_v2_s2_pixels"), [])
    cfg = build(TaskConfig, {"name": "tile", **raw}, "")
    task = Task(replace(cfg, max_train=1000, max_val=1000, max_test=1000))
    train = Examples(task.train, torch.arange(len(task.train)), torch.device("cpu"))
    corners = train.labels[:, :SIDE, :SIDE].long()
    sizes = [torch.bincount(corner.flatten(), minlength=256) for corner in corners]
    # Of those with three classes, none of which is a few pixels, the one whose fields are most compact.
    fits = [int((n > 0).sum()) == 3 and int(n[n > 0].min()) > 200 and int(n[255]) == 0 for n in sizes]
    row = min((i for i, fit in enumerate(fits) if fit), key=lambda i: _length_of_borders(corners[i]))
    inputs, _ = train.batch(torch.tensor([row]))
    pixels = inputs.pixels[:, :, :SIDE, :SIDE]
    return replace(inputs, pixels=pixels), torch.searchsorted(corners[row].unique(), corners[row])[None]


def _length_of_borders(labels: Tensor) -> int:
    return int((labels[1:] != labels[:-1]).sum() + (labels[:, 1:] != labels[:, :-1]).sum())


def backbone_of(decoder: str) -> Backbone:
    if decoder == "unet":
        return PixelBackbone(4)
    encoder = Encoder(
        EncoderConfig(embed_dim=16, depth=4, n_heads=2, patch_size=4, mlp_ratio=2.0, patch_embed="conv"), 4
    )
    encoder.init_weights()
    return EncoderBackbone(encoder)


def miou(predicted: Tensor, labels: Tensor) -> float:
    both = [((predicted == k) & (labels == k)).sum() / ((predicted == k) | (labels == k)).sum() for k in range(3)]
    return float(torch.stack(both).mean())


def test_all_decoders_of_maps_are_here() -> None:
    assert sorted(SMALL) == [d for d in available("ssl_eo.eval.decoders") if kinds_of(d) == ("segmentation",)]


@pytest.mark.parametrize("decoder", SMALL)
def test_overfits_a_real_tile(decoder: str, tile: tuple[EncoderInput, Tensor]) -> None:
    inputs, labels = tile
    torch.manual_seed(0)
    backbone = backbone_of(decoder)
    model = TaskModel(backbone, build_decoder(decoder, SMALL[decoder], backbone.shape, 3))
    n_steps = 160
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=n_steps, pct_start=0.2)
    found = [0.0]
    for step in range(1, n_steps + 1):
        model.train()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            with torch.no_grad():
                found.append(miou(model.eval()(inputs).argmax(1), labels))
            if found[-1] > 0.95:
                break
    assert found[-1] > 0.95, found
