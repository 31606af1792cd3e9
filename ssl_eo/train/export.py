"""From a run to an encoder that can be used: any checkpoint, no process group, no data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import torch

from ssl_eo.baking import bake
from ssl_eo.components import resolve
from ssl_eo.config import Config, build, read_yaml, to_dict
from ssl_eo.data.types import TileSchema
from ssl_eo.eval.features import Pool, check_taps
from ssl_eo.eval.summary import read_task_records, score_of
from ssl_eo.hub import (
    UNSAID,
    BundleEncoder,
    BundlePair,
    SensorInput,
    check_finite,
    check_free,
    load_bundle,
    write_bundle,
    write_pair_bundle,
)
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.models.vit import Encoder
from ssl_eo.objectives.base import Objective, Schemas
from ssl_eo.resources import resource_dir
from ssl_eo.train.checkpoint import load_weights
from ssl_eo.train.initial import licences_of_init
from ssl_eo.train.parallel import build_objective
from ssl_eo.train.run_dir import read_environment, read_schemas
from ssl_eo.train.sealing import holds_checkpoints, locate

__all__ = [
    "PairedObjective",
    "Trained",
    "export_encoder",
    "export_pair",
    "load_encoder",
    "open_encoder",
    "open_pair",
]


Inputs = dict[str, SensorInput]  # by the name of the sensor or the tile


class Trained(NamedTuple):
    """A published encoder, the step it is from, and the run that made it."""

    encoder: Encoder
    step: int
    run: Path
    config: Config
    objective: Objective


@runtime_checkable
class PairedObjective(Protocol):
    """An objective of two encoders: all of it that outlives pretraining, and what views of each may show."""

    shown: dict[str, list[TileSchema]]  # by group, "optical" and "radar"
    published: str  # whose encoder is exported by itself

    def whole(self) -> OpticalRadar: ...


def load_encoder(path: Path) -> Trained:
    """The published encoder of a run directory (its newest whole checkpoint) or of one `step_` directory of a run.

    Raises `ValueError` when `path` is neither, or its weights are not finite, `CheckpointError` when the checkpoint is
    damaged.
    """
    _check_saved(path)
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
    encoder = objective.published_encoder().eval()
    check_finite(str(checkpoint), encoder)
    return Trained(encoder, seal["step"], run, config, objective)


def _check_saved(path: Path) -> None:
    """Raise `ValueError` where `path` is a run that has only begun."""
    if not (path / "config.yaml").is_file() or holds_checkpoints(path / "checkpoints"):
        return
    config = build(Config, read_yaml(path / "config.yaml"), "")
    first = min(config.checkpoint.every_n_steps, config.train.total_steps)
    raise ValueError(
        f"{path}: this run has saved no checkpoint yet; the first comes after step {first:,}"
        " (checkpoint.every_n_steps), or where the run is stopped (Ctrl-C)"
    )


def open_pair(path: Path) -> BundlePair:
    """Both encoders, with what joins them, of a run, a checkpoint or a bundle folder; its facts say the `step`.

    Raises `ValueError` where there is one encoder, besides what `load_bundle` and `load_encoder` raise.
    """
    if (path / "encoder.json").is_file():
        bundle = load_bundle(path)
        if not isinstance(bundle, BundlePair):
            raise ValueError(f"{path}: it holds one encoder; give the run or checkpoint that it is from")
        _step_of(path, bundle)
        return bundle
    trained = load_encoder(path)
    paired = trained.objective
    if not isinstance(paired, PairedObjective):
        raise ValueError(f"{trained.run}: objective {trained.config.objective.name} has one encoder; export that")
    inputs = {group: _inputs_of(tiles) for group, tiles in paired.shown.items()}
    whole = paired.whole()
    check_finite(str(path), whole)
    return BundlePair(whole, inputs, {**_facts(trained), "published": paired.published}).eval()


def open_encoder(path: Path) -> BundleEncoder:
    """The published encoder of a run, a checkpoint or a bundle folder, with what it was trained on.

    Its facts say after how many steps (`step`) it is, and how its run reads features (`features`: pool and taps).
    Raises `ValueError` for a bundle whose facts are not such, besides what `load_bundle` and `load_encoder` raise.
    """
    if not (path / "encoder.json").is_file():
        return _of_run(load_encoder(path))
    bundle = load_bundle(path)
    found = bundle.published if isinstance(bundle, BundlePair) else bundle
    found.facts["step"] = _step_of(path, found)
    found.facts["features"] = _features_of(path, found.facts.get("features", {}))
    return found


def _of_run(trained: Trained) -> BundleEncoder:
    return BundleEncoder(trained.encoder, _inputs_of_run(trained), _facts(trained)).eval()


def _step_of(path: Path, bundle: BundleEncoder | BundlePair) -> int:
    step = bundle.facts.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"{path}/encoder.json: step must be a whole number from 0, got {step!r:.40}")
    return step


def _features_of(path: Path, raw: Any) -> dict[str, Any]:
    """What a bundle may say of an evaluation: how features are read, and not what is asked of them."""
    try:
        if not isinstance(raw, Mapping):
            raise ValueError("they are no mapping")
        features = {key: raw[key] for key in ("pool", "taps") if key in raw}
        if features.get("pool", "mean") not in get_args(Pool):
            raise ValueError(f"pools are {', '.join(get_args(Pool))}")
        taps = features.get("taps", [1.0])
        if not isinstance(taps, list) or not all(type(tap) in (int, float) for tap in taps):
            raise ValueError("taps are a list of numbers")
        check_taps(taps)
    except ValueError as error:
        raise ValueError(
            f"{path}/encoder.json: features must be a pool and a list of numbers, taps, got {raw!r:.80}: {error!s:.200}"
        ) from None
    return features


def export_encoder(
    path: Path, out: Path, overwrite: bool = False, licence: str | None = None, sensor: str | None = None
) -> int:
    """Write the bundle `out` from the run, checkpoint or bundle at `path`; returns the training step it is from.

    `licence` is that of the weights. With a `sensor` the encoder is made for it alone, see `ssl_eo.baking.bake`. Raises
    `ValueError` when `out` holds a bundle already, unless it may `overwrite` it, and for a bundle of two encoders.
    """
    check_free(out, overwrite)
    found = _alone(path)
    encoder, inputs, facts, step = found.encoder, found.inputs, found.facts, _step_of(path, found)
    if licence is not None:
        facts["licence"] = licence
    if sensor is not None:
        encoder, inputs = bake(encoder, inputs, sensor)
        facts["baked"] = sensor
    write_bundle(out, encoder, inputs, facts)
    return step


def _alone(path: Path) -> BundleEncoder:
    """As `open_encoder`, but of a bundle of two encoders neither: the other one would be lost."""
    found = load_bundle(path) if (path / "encoder.json").is_file() else open_encoder(path)
    if isinstance(found, BundlePair):
        raise ValueError(f"{path}: it holds two encoders; add --whole or --as, or give the run that it is from")
    return found


def _inputs_of_run(trained: Trained) -> Inputs:
    """What a run has shown to the encoder that it publishes."""
    if isinstance(trained.objective, PairedObjective):
        return _inputs_of(trained.objective.shown[trained.objective.published])
    return _inputs(read_schemas(trained.run))


def export_pair(path: Path, out: Path, overwrite: bool = False, licence: str | None = None) -> int:
    """Write the bundle `out` of both encoders and what joins them; returns the training step they are from.

    `path` is a run, a checkpoint or a bundle, `licence` that of the weights. Raises `ValueError` when `out` holds a
    bundle already, unless it may `overwrite` it, and as `open_pair` does.
    """
    check_free(out, overwrite)
    pair = open_pair(path)
    facts = pair.facts if licence is None else {**pair.facts, "licence": licence}
    write_pair_bundle(out, pair.model, pair.inputs, facts)
    return _step_of(path, pair)


def _facts(trained: Trained) -> dict[str, Any]:
    config = trained.config
    return {
        **UNSAID,
        "objective": config.objective.name,
        "step": trained.step,
        "run": config.run.name,
        "features": {"pool": config.eval.pool, "taps": config.eval.taps},
        "commit": read_environment(trained.run).get("commit"),
        "licence": _licence(trained.run, config),
        "scores": _scores(trained.run, trained.step),
        "config": to_dict(config),
    }


def _licence(run: Path, config: Config) -> str:
    """What is known of it: nobody has stated that of the weights, but there are those of what they were made from."""
    files = licences_of_init(run)
    begun = "; ".join(f"{Path(path).name}: {licence or UNSAID['licence']}" for path, licence in files.items())
    known = {"the data": _licence_of_data(config), "the weights that training began from": begun}
    return "; ".join([UNSAID["licence"], *(f"of {what}: {said}" for what, said in known.items() if said)])


def _licence_of_data(config: Config) -> str | None:
    """Of the datasets that a run has seen, by their cards; None where one of them has none."""
    import yaml

    found: dict[str, str] = {}
    for source in config.data.sources:
        card = resource_dir("datasets_meta") / "datasets" / f"{source.name}.yaml"
        if not card.is_file():
            return None
        found[source.name] = yaml.safe_load(card.read_text(encoding="utf-8"))["licence"]
    return "; ".join(f"{name}: {licence}" for name, licence in found.items())


def _scores(run: Path, step: int) -> list[dict[str, Any]]:
    """What probes have found at `step` or, before it, last; with the controls, which are measured once a run."""
    probed = [r for r in read_task_records(run / "eval.jsonl") if _is_scored(r) and r["step"] <= step]
    last = max((r["step"] for r in probed if r["features"] == "encoder"), default=None)
    kept = [r for r in probed if r["features"] != "encoder" or r["step"] == last]
    keys = ("step", "task", "split", "features", "tap", "probe", "metric")
    return [{**{key: r.get(key) for key in keys}, "score": score_of(r)} for r in kept]


def _is_scored(record: Mapping[str, Any]) -> bool:
    metric = record.get("metric")
    if record["kind"] != "probe" or type(record["step"]) is not int or not isinstance(metric, str):
        return False
    return isinstance(record.get(metric), float | int)


def _inputs_of(tiles: list[TileSchema]) -> Inputs:
    """What an encoder was trained on, by sensor; a later tile of a sensor that differs is `name@<index>`."""
    return _told_apart((i, tile.sensor.name, tile) for i, tile in enumerate(tiles))


def _inputs(schemas: Schemas) -> Inputs:
    """What the encoder was trained on, by tile name; a later source that differs is `name@<index of the source>`.

    Dates of one sensor with the same statistics are one input, by the sensor's name. Class maps are none.
    """
    return _told_apart((i, name, tile) for i, source in enumerate(schemas) for name, tile in _distinct(source).items())


def _told_apart(tiles: Iterable[tuple[int, str, TileSchema]]) -> Inputs:
    """Inputs by name; `name@<index>` for one that differs from the first that is called so."""
    inputs: Inputs = {}
    for i, name, tile in tiles:
        known = SensorInput(tile.sensor, tile.bands, tile.mean, tile.std, tile.gsd_m)
        if inputs.setdefault(name, known) != known:
            inputs[f"{name}@{i}"] = known
    return inputs


def _distinct(source: Mapping[str, TileSchema]) -> dict[str, TileSchema]:
    """The tiles that an encoder may see; of those of a sensor that are all alike, as its dates are, only one."""
    shown = {n: replace(schema, optional=False) for n, schema in source.items() if not schema.sensor.is_categorical}
    found: dict[str, TileSchema] = {}
    for name, schema in shown.items():
        of_sensor = [other for other in shown.values() if other.sensor.name == schema.sensor.name]
        is_alike = len(of_sensor) > 1 and all(other == schema for other in of_sensor)
        found[schema.sensor.name if is_alike else name] = schema
    return found
