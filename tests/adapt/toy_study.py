"""A small encoder, small tasks of procedural scenes, and studies of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ssl_eo.adapt.study import StudyConfig
from ssl_eo.config import build
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.hub import SensorInput, write_bundle
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.sensors import load_sensor

SENSOR = "sentinel1_grd"  # two bands: quick


def encoder(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 3, "n_heads": 2, "patch_size": 4, "patch_embed": "dynamic"}
    made = Encoder(EncoderConfig(**{**sizes, **changes}))  # type: ignore[arg-type]
    made.init_weights()
    return made.eval()


def bundle(folder: Path, **changes: Any) -> Path:
    sensor = load_sensor(SENSOR)
    bands = tuple(band.name for band in sensor.bands)
    known = SensorInput(sensor, bands, (0.0,) * len(bands), (1.0,) * len(bands), 10.0)
    write_bundle(folder, encoder(**changes), {SENSOR: known}, {"step": 0})
    return folder


def source(labels: str, split: str, n: int, extent_m: float = 160.0) -> dict[str, Any]:
    of_scenes = {"name": "synthetic", "sensors": [SENSOR], "labels": labels, "split": split}
    return {**of_scenes, "n_samples": n, "extent_m": extent_m}


def task(kind: str = "segmentation", n: int = 12, name: str = "scenes", **changes: Any) -> dict[str, Any]:
    labels = {"segmentation": "landcover", "classification": "scene", "multilabel": "presence"}[kind]
    splits = {split: source(labels, split, n) for split in ("train", "val", "test")}
    limits: dict[str, Any] = dict.fromkeys(("max_train", "max_val", "max_test"))
    return {"name": name, "kind": kind, **splits, **limits, **changes}


def opened_task(kind: str = "segmentation", n: int = 12, **changes: Any) -> Task:
    raw = task(kind, n, **{"max_train": n, "max_val": n, "max_test": n, **changes})
    return Task(build(TaskConfig, raw, ""))


def study(folder: Path, **changes: Any) -> StudyConfig:
    raw = {
        "tasks": [task()],
        "encoders": {"tiny": {"model": str(folder), "taps": [0.34, 0.67, 1.0]}},
        "decoders": {"linear": {}},
        "trainings": {"default": {"n_steps": 4, "batch_size": 4, "lrs": [1e-2], "n_evaluations": 2}},
        "unet": False,
        "n_resamples": 20,
        "device": "cpu",
    }
    return build(StudyConfig, {**raw, **changes}, "")
