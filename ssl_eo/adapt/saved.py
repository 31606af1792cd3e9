"""A model that was trained on labels, as a folder: its encoder as a bundle, its decoder, and what both were told.

    encoder.json encoder.safetensors   a bundle (`ssl_eo.hub`), with the statistics of the training images
    decoder.safetensors task.json      decoder, taps, classes, and the SHA-256 of the other files

Nothing is unpickled on the way in, and no module is imported that the folder names: decoders are those of this package.

B images, C channels, H W pixels, K outputs.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_eo.adapt.backbone import EncoderBackbone, FixedBands
from ssl_eo.adapt.lora import lora_config, merge_lora
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.saved_page import DECODER, ENCODER, FORMAT, PAGE, read_facts
from ssl_eo.bundles import BundleEncoder, SensorInput
from ssl_eo.eval.decoders import build_decoder
from ssl_eo.eval.provenance import digest_of_tensors
from ssl_eo.eval.tasks import Task
from ssl_eo.files import atomic_write, check_regular
from ssl_eo.hub import check_finite, faults_of, load_bundle, write_bundle
from ssl_eo.sensors import Sensor
from ssl_eo.tensor_files import check_fit, read_tensors, write_tensors

__all__ = ["SavedModel", "load_model", "save_model"]


@dataclass(frozen=True)
class SavedModel:
    """A trained model in eval mode: `logits` of images as they are stored."""

    model: TaskModel
    bundle: BundleEncoder
    facts: Mapping[str, Any]  # of task.json

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.facts["classes"])

    @property
    def input(self) -> SensorInput:
        """What it takes: a sensor, bands in order, statistics."""
        return next(iter(self.bundle.inputs.values()))

    @cached_property
    def weights(self) -> str:
        """The digest of all its weights."""
        return digest_of_tensors(self.model.state_dict())

    @property
    def identity(self) -> dict[str, Any]:
        """All that what it predicts depends on, as plain JSON types."""
        known = self.input
        statistics = {"mean": list(known.mean), "std": list(known.std), "gsd_m": known.gsd_m}
        return {"weights": self.weights, "page": dict(self.facts), "statistics": statistics}

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """`[B, K, H, W]` or `[B, K]` of images `[B, C, H, W]` of stored values, NaN where nothing was measured.

        Numbers (of regression) are in the unit of labels.
        """
        return self.model.values(self.model(self.bundle.prepare(images)))


def save_model(folder: Path, model: TaskModel, task: Task, facts: Mapping[str, Any]) -> None:
    """Write `model`, which was trained on `task`; adapters are merged into the weights of its encoder.

    `facts` are `decoder`, `options` and `taps` of it, and further plain values. `task.json` is taken away first and
    comes last: after a kill the folder holds the old model, or one that `load_model` refuses. Raises `ValueError` for a
    backbone that is no vision transformer, and `OSError` for what cannot be written.
    """
    backbone = model.backbone
    if not isinstance(backbone, EncoderBackbone):
        raise ValueError("a model without an encoder of its own (the UNet, ensembles) cannot be saved as a bundle")
    encoder = backbone.encoder
    if lora_config(encoder) is not None:
        encoder = copy.deepcopy(encoder)
        merge_lora(encoder)
    schema, plan = task.schema, task.shown.plan
    chosen = range(len(schema.bands)) if plan.bands is None else plan.bands
    mean, std = (tuple(values[i] for i in chosen) for values in (schema.mean, schema.std))
    gsd_m = schema.gsd_m * (1.0 if schema.shape is None else schema.shape[0] / plan.size[0])
    # Where bands are found first, it is the backbone that brings them to [0, 1]: those that are missing too.
    clip_std = backbone.clip_std if backbone.bands is None else None
    known = SensorInput(schema.sensor, tuple(task.bands), mean, std, gsd_m, clip_std)
    (folder / PAGE).unlink(missing_ok=True)
    write_bundle(folder, encoder, {schema.sensor.name: known}, {"step": 0, **facts})
    of_decoder = write_tensors(folder / DECODER, _without_backbone(model))
    page = {
        "format": FORMAT,
        "task": task.name,
        "kind": task.cfg.kind,
        "classes": list(task.class_names),
        "bands": list(task.bands),
        "size_px": plan.size[0],
        "n_outputs": task.n_classes,
        "fixed_bands": _page_of(backbone.bands),
        "clip_std": backbone.clip_std,
        # That of the encoder's weights is in its page.
        "sha256": {ENCODER: hashlib.sha256((folder / ENCODER).read_bytes()).hexdigest(), DECODER: of_decoder},
        **facts,
    }
    atomic_write(folder / PAGE, json.dumps(page, indent=1))


def load_model(folder: str | Path, decoder: str | None = None) -> SavedModel:
    """What `save_model` wrote to `folder`.

    A decoder of your own, a module of a dotted name, is imported only if it is given as `decoder`: the folder may be of
    somebody else. Raises `ValueError` for anything that is not a whole model.
    """
    folder = Path(folder)
    page = read_facts(folder)
    _check_decoder(folder, page["decoder"], decoder)
    _check_encoder(folder, page["sha256"])
    bundle = load_bundle(folder)
    if not isinstance(bundle, BundleEncoder) or len(bundle.inputs) != 1:
        raise ValueError(
            f"{folder / ENCODER}: a trained model has one encoder, and statistics for images of one sensor"
        )
    with faults_of(folder / PAGE):
        backbone = _backbone_of(page, bundle)
        # On the meta device no size that a damaged file may state takes memory; code of your own may not know it.
        with torch.device("meta" if decoder is None else "cpu"):
            trial = TaskModel(backbone, _decoder_of(page, backbone))
    tensors = read_tensors(folder / DECODER, page["sha256"][DECODER])
    check_fit(folder / DECODER, f"the decoder {page['decoder']}", _without_backbone(trial), tensors)
    model = TaskModel(backbone, _decoder_of(page, backbone))
    model.load_state_dict(tensors, strict=False)
    check_finite(str(folder), model)
    return SavedModel(model.requires_grad_(False).eval(), bundle, page)


def _backbone_of(page: Mapping[str, Any], bundle: BundleEncoder) -> EncoderBackbone:
    (known,) = bundle.inputs.values()
    if page["bands"] != list(known.bands):
        raise ValueError(f"bands must be those of {ENCODER}, {', '.join(known.bands)}, got {page['bands']!r:.80}")
    clip_std = replace(known, clip_std=page["clip_std"]).clip_std  # it says what that may be
    bands = _bands_from(page["fixed_bands"], len(known.bands))
    # Pixels come in [0, 1] already where the bundle clips them.
    return EncoderBackbone(bundle.encoder, page["taps"], bands, clip_std if known.clip_std is None else None)


def _decoder_of(page: Mapping[str, Any], backbone: EncoderBackbone) -> nn.Module:
    return build_decoder(page["decoder"], page["options"], backbone.shape, page["n_outputs"])


def _without_backbone(model: TaskModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}


def _page_of(bands: FixedBands | None) -> dict[str, Any] | None:
    if bands is None:
        return None
    return {"sensor": bands.sensor.to_dict(), "names": list(bands.names), "picks": list(bands.picks)}


def _bands_from(page: Mapping[str, Any] | None, n_shown: int) -> FixedBands | None:
    """What stands for the bands of the encoder among the `n_shown` of an image."""
    if page is None:
        return None
    names, picks = tuple(page["names"]), tuple(page["picks"])
    sensor = Sensor.from_dict(page["sensor"], "fixed_bands.sensor")
    sensor.index(names)
    are_channels = all(pick is None or (type(pick) is int and 0 <= pick < n_shown) for pick in picks)
    if len(picks) != len(names) or not are_channels:
        raise ValueError(
            f"fixed_bands: {len(names)} names need as many picks, from 0 to {n_shown - 1} or null, got {picks}"
        )
    return FixedBands(sensor, names, picks)


def _check_decoder(folder: Path, named: Any, given: str | None) -> None:
    """Raise `ValueError` unless the decoder that the folder names may be built: shipped, or the one that was given."""
    if given is not None and named != given:
        raise ValueError(f"{folder / PAGE}: its decoder is {named!r:.100}, and {given!r} was given")
    if not isinstance(named, str) or ("." in named and given is None):
        raise ValueError(
            f"{folder / PAGE}: its decoder is {named!r:.100}, which is none of this package, and to import it runs its"
            " code; if you trust it, give it by its name (--decoder, decoder= of load_model)"
        )


def _check_encoder(folder: Path, expected: Mapping[str, Any]) -> None:
    """Raise `ValueError` for the encoder of another model: a decoder fits any of its width."""
    path = folder / ENCODER
    try:
        check_regular(path)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()  # however long the file is
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if found != expected[ENCODER]:
        raise ValueError(
            f"{path}: its SHA-256 is not that in {PAGE}: it is of another model, or was changed; train it again"
        )
