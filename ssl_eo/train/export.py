"""From a run to an encoder that can be used: any checkpoint, no process group, no data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ssl_eo.components import resolve
from ssl_eo.config import Config, build, read_yaml
from ssl_eo.hub import SensorInput, load_bundle, write_bundle
from ssl_eo.models.vit import Encoder
from ssl_eo.objectives.base import Objective
from ssl_eo.train.checkpoint import load_weights, newest
from ssl_eo.train.parallel import build_objective
from ssl_eo.train.run_dir import read_environment, read_schemas

__all__ = ["export_encoder", "load_encoder", "open_encoder"]


def load_encoder(path: Path) -> tuple[Encoder, Config, dict[str, Any]]:
    """The published encoder of a run directory (its newest whole checkpoint) or of one `step_` directory of a run.

    Returns it with the run's config and the checkpoint's seal (`step`, `facts`). Raises `ValueError` when `path` is
    neither.
    """
    run, checkpoint = _locate(path)
    config = build(Config, read_yaml(run / "config.yaml"), "")
    method = resolve("ssl_eo.objectives", config.objective.name).Objective
    schemas = read_schemas(run)
    objective: Objective = build_objective(
        lambda: method(config.objective.options, config.model, schemas), config.run.seed, torch.device("cpu")
    )
    seal = load_weights(checkpoint, objective)
    return objective.published_encoder().eval(), config, seal


def open_encoder(path: Path) -> tuple[Encoder, int, dict[str, Any]]:
    """The encoder of a run, a checkpoint or a bundle folder, its step, and how its run reads features."""
    if (path / "encoder.json").is_file():
        bundle = load_bundle(path)
        if not isinstance(bundle.facts.get("step"), int):
            raise ValueError(f"{path}/encoder.json: step must be a whole number, got {bundle.facts.get('step')!r}")
        return bundle.encoder, bundle.facts["step"], bundle.facts.get("features", {})
    encoder, config, seal = load_encoder(path)
    return encoder, seal["step"], {"pool": config.eval.pool, "taps": config.eval.taps}


def export_encoder(path: Path, out: Path) -> int:
    """Write the bundle `out` from the run or checkpoint at `path`; returns the training step it is from."""
    encoder, config, seal = load_encoder(path)
    run, _ = _locate(path)
    inputs = {
        name: SensorInput(schema.sensor, schema.bands, schema.mean, schema.std, schema.gsd_m)
        for source in read_schemas(run)
        for name, schema in source.items()
    }
    facts = {
        "objective": config.objective.name,
        "step": seal["step"],
        "run": config.run.name,
        "features": {"pool": config.eval.pool, "taps": config.eval.taps},
        "commit": read_environment(run).get("commit"),
    }
    write_bundle(out, encoder, inputs, facts)
    step: int = seal["step"]
    return step


def _locate(path: Path) -> tuple[Path, Path]:
    """(run directory, checkpoint directory) of either."""
    if path.name.startswith("step_") and path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, path
    checkpoint = newest(path / "checkpoints")
    if checkpoint is None or not (path / "config.yaml").is_file():
        raise ValueError(f"{path}: no run with a whole checkpoint here; give a run directory or one of its checkpoints")
    return path, checkpoint
