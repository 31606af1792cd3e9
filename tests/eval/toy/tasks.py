"""Tasks on the toy source, one for each kind of labels, and a small encoder to be probed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from toy import scenes

from ssl_eo.data.opening import SourceConfig
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.tasks import TaskConfig
from ssl_eo.models.vit import Encoder, EncoderConfig

KINDS: tuple[Kind, ...] = ("classification", "multilabel", "segmentation", "regression")
PROBES: dict[Kind, list[str]] = {
    "classification": ["knn", "ridge"],
    "multilabel": ["knn", "ridge"],
    "segmentation": ["ridge"],
    "regression": ["ridge"],
}


def source(seed: int = 0, **options: Any) -> SourceConfig:
    return SourceConfig("toy.scenes", scenes.Config(seed=seed, **options))


def task(kind: Kind = "classification", n_train: int = 60, n_test: int = 40, **changes: Any) -> TaskConfig:
    """`train` and `test` are held; `changes` are of the task."""
    train, test = (source(seed, n=n, kind=kind) for seed, n in ((0, n_train), (1, n_test)))
    ignore = scenes.UNLABELLED if kind == "segmentation" else None
    return replace(TaskConfig("toy", train, test, kind=kind, probes=PROBES[kind], ignore=ignore), **changes)


def encoder(fill: float | None = None, seed: int = 1) -> Encoder:
    """Of three channels and patches of 4 pixels; with `fill` all its weights are this, and all images alike to it."""
    torch.manual_seed(seed)
    found = Encoder(EncoderConfig(embed_dim=16, depth=2, n_heads=2, patch_size=4, patch_embed="conv"), n_channels=3)
    found.init_weights()
    if fill is not None:
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.fill_(fill)
    return found
