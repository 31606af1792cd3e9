"""Encoders by what a user writes: a run, a bundle, a checkpoint that others released, the name of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssl_eo.bundles import BundleEncoder, SensorInput
from ssl_eo.hub import load_bundle
from ssl_eo.models.vit import Encoder
from ssl_eo.train.export import inputs_of_run, load_encoder
from ssl_eo.weights import croma
from ssl_eo.weights.base import find_released, load_released

__all__ = ["OpenedEncoder", "open_model"]


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder and what it was trained on, by sensor; `is_trained` is False where it has random weights."""

    name: str
    encoder: Encoder
    inputs: Mapping[str, SensorInput]
    is_trained: bool = True


def open_model(text: str) -> OpenedEncoder:
    """What `text` names: a run, a checkpoint, a bundle folder, NAME=FILE, or NAME alone, which has random weights.

    Of a model of two encoders it is the one that is published. Raises `ValueError` where there is no such thing.
    """
    path = Path(text)
    if path.exists():
        name = path.resolve().name
        if (path / "encoder.json").is_file():
            bundle = load_bundle(path)
            of_published = bundle if isinstance(bundle, BundleEncoder) else bundle.published
            return OpenedEncoder(name, of_published.encoder, of_published.inputs)
        trained = load_encoder(path)
        return OpenedEncoder(name, trained.encoder, inputs_of_run(trained))
    name, _, file = text.partition("=")
    if name in croma.PAIRS:
        pair = croma.PAIRS[name]
        model = croma.load_pair(file, pair) if file else pair.build()
        if not file:
            model.to_empty(device="cpu").optical.init_weights()
        return OpenedEncoder(name, model.optical, croma.pair_inputs()["optical"], is_trained=bool(file))
    if "/" in name or name.endswith((".pth", ".pt", ".safetensors")):
        raise ValueError(f"{text}: there is no such run or bundle; a file of released weights is given as NAME={text}")
    released = find_released(name)
    if file:
        return OpenedEncoder(name, load_released(file, name), released.inputs())
    encoder = Encoder(released.config, released.n_channels)
    encoder.init_weights()
    return OpenedEncoder(name, encoder, released.inputs(), is_trained=False)
