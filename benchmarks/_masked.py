"""A training step of the masked autoencoder that never embeds hidden patches, beside the plain order of the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from _objective_steps import MOST_PPM, Setting, Training
from _table import Row
from _timing import median_wall_seconds
from torch import Tensor, nn

from ssl_eo.data.plans import CropConfig
from ssl_eo.data.sources import synthetic
from ssl_eo.data.types import Batch
from ssl_eo.models import layers
from ssl_eo.models.decoders import DecoderConfig
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.objectives import base
from ssl_eo.objectives.mae import Config, Objective
from ssl_eo.sensors import ChannelMeta
from ssl_eo.train.parallel import build_objective

__all__ = ["measure_masked"]

CASES = {"convolution, RGB": ("conv", "sentinel2_l2a:rgb"), "channel attention, 12 bands": ("channel_attention", None)}


def measure_masked(setting: Setting, n_turns: int) -> list[Row]:
    """Steps of MAE ViT-B/16 on 224 pixels with the decoder of the paper, in both orders, and how far losses differ."""
    rows = []
    for what, (embed, sensor) in CASES.items():
        training = training_of(setting, embed, sensor or "sentinel2_l2a")
        batch = training.batch()
        ours = float(training.loss(batch).detach())
        with plain_order(training.objective):
            plain = float(training.loss(batch).detach())

        def plain_step(training: Training = training, batch: Batch = batch) -> None:
            with plain_order(training.objective):
                training.step(batch)

        calls = {"plain": plain_step, "ours": partial(training.step, batch)}
        seconds = median_wall_seconds(calls, n_turns, setting.device)
        rates = {name: setting.batch_size / taken for name, taken in seconds.items()}
        most = None if setting.bfloat16 else MOST_PPM
        rows += [
            Row("masked", f"{what}: embed all, drop, softmax", rates["plain"], "samples/s", 1.0),
            Row("masked", f"{what}: visible ones, fused", rates["ours"], "samples/s", rates["ours"] / rates["plain"]),
            Row("masked", f"{what}: loss, one beside the other", 1e6 * abs(ours / plain - 1), "ppm", most=most),
        ]
    return rows


def training_of(setting: Setting, embed: str, sensor: str) -> Training:
    """ViT-B/16 with the decoder of the paper, on procedural scenes of 224 pixels."""
    source = synthetic.Source(synthetic.Config(sensors=[sensor], extent_m=2240.0))
    small = {"embed_dim": 48, "depth": 2, "n_heads": 3} if setting.toy else {}
    model = EncoderConfig(size="base", patch_embed=embed, **small)  # type: ignore[arg-type]
    decoder = DecoderConfig("full", 64, 1, 4) if setting.toy else DecoderConfig("full", 512, 8, 16)
    config = Config(crop=CropConfig(64 if setting.toy else 224), decoder=decoder, output="linear")
    schemas = [source.schema]
    built = build_objective(lambda: Objective(config, model, schemas), 0, torch.device(setting.device)).train()
    return Training(setting, built, Objective.views(config, model, schemas), source)


class _EmbedAllThenDrop(nn.Module):
    """An embedding that computes the tokens of all patches, of which those that are hidden are dropped."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.products = embed.products

    def forward(
        self, pixels: Tensor, channels: ChannelMeta, ids_keep: Tensor | None, products: object
    ) -> tuple[Tensor, tuple[int, int]]:
        x, grid = self.embed(pixels, channels, None, products)  # [B, N, D]
        return (x if ids_keep is None else x.take_along_dim(ids_keep[..., None], dim=1)), grid


def _explicit_softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = q * q.shape[-1] ** -0.5 @ k.mT
    return (logits if bias is None else logits + bias).softmax(-1).to(v.dtype) @ v


@contextlib.contextmanager
def plain_order(objective: base.Objective) -> Iterator[None]:
    """Embeds every patch before hidden ones are dropped, and attends by an explicit softmax; with the same weights."""
    encoder, attend = objective.student["encoder"], layers.attend
    embed = encoder.patch_embed
    encoder.patch_embed, layers.attend = _EmbedAllThenDrop(embed), _explicit_softmax
    try:
        yield
    finally:
        encoder.patch_embed, layers.attend = embed, attend
