"""From a run to an encoder that can be used: any checkpoint, no process group, no data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssl_eo.components import resolve
from ssl_eo.config import Config, build, read_yaml
from ssl_eo.hub import SensorInput, load_bundle, write_bundle
from ssl_eo.models.vit import Encoder
from ssl_eo.objectives.base import Objective, Schemas
from ssl_eo.train.checkpoint import load_weights, locate
from ssl_eo.train.parallel import build_objective
from ssl_eo.train.run_dir import read_environment, read_schemas

__all__ = ["Trained", "export_encoder", "load_encoder", "open_encoder"]


class Trained(NamedTuple):
    """A published encoder, the step it is from, and the run that made it."""

    encoder: Encoder
    step: int
    run: Path
    config: Config


def load_encoder(path: Path) -> Trained:
    """The published encoder of a run directory (its newest whole checkpoint) or of one `step_` directory of a run.

    Raises `ValueError` when `path` is neither, `CheckpointError` when the checkpoint is damaged.
    """
    checkpoint = locate(path)
    run = checkpoint.parent.parent
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{path}: there is no {run / 'config.yaml'}, which says what the checkpoint is of")
    config = build(Config, read_yaml(run / "config.yaml"), "")
    method = resolve("ssl_eo.objectives", config.objective.name).Objective
    schemas = read_schemas(run)
    objective: Objective = build_objective(
        lambda: method(config.objective.options, config.model, schemas), config.run.seed, torch.device("cpu")
    )
    seal = load_weights(checkpoint, objective)
    return Trained(objective.published_encoder().eval(), seal["step"], run, config)


def open_encoder(path: Path) -> tuple[Encoder, int, dict[str, Any]]:
    """The encoder of a run, a checkpoint or a bundle folder, its step, and how its run reads features."""
    if (path / "encoder.json").is_file():
        bundle = load_bundle(path)
        if not isinstance(bundle.facts.get("step"), int):
            raise ValueError(f"{path}/encoder.json: step must be a whole number, got {bundle.facts.get('step')!r}")
        return bundle.encoder, bundle.facts["step"], bundle.facts.get("features", {})
    trained = load_encoder(path)
    return trained.encoder, trained.step, {"pool": trained.config.eval.pool, "taps": trained.config.eval.taps}


def export_encoder(path: Path, out: Path, overwrite: bool = False) -> int:
    """Write the bundle `out` from the run or checkpoint at `path`; returns the training step it is from.

    Raises `ValueError` when `out` holds a bundle already, unless it may `overwrite` it.
    """
    if (out / "encoder.json").exists() and not overwrite:
        raise ValueError(f"{out} holds a bundle already; give another --out, or add --overwrite")
    encoder, step, run, config = load_encoder(path)
    facts = {
        "objective": config.objective.name,
        "step": step,
        "run": config.run.name,
        "features": {"pool": config.eval.pool, "taps": config.eval.taps},
        "commit": read_environment(run).get("commit"),
    }
    write_bundle(out, encoder, _inputs(read_schemas(run)), facts)
    return step


def _inputs(schemas: Schemas) -> dict[str, SensorInput]:
    """What the encoder was trained on, by tile name; a later source that differs is `name@<index of the source>`."""
    inputs: dict[str, SensorInput] = {}
    for i, source in enumerate(schemas):
        for name, schema in source.items():
            known = SensorInput(schema.sensor, schema.bands, schema.mean, schema.std, schema.gsd_m)
            if inputs.setdefault(name, known) != known:
                inputs[f"{name}@{i}"] = known
    return inputs
