"""Ensembles on disk: a folder with `ensemble.json` and a safetensors file for each encoder of it.

Nothing is unpickled on the way in. `ensemble.json` says of each encoder, a *specialist*, what it is called, how it is
built, which file of weights it belongs to (by SHA-256), and which sensors it knows, with their bands and statistics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ssl_eo.adapt.backbone import Backbone, EncoderBackbone, clip_of
from ssl_eo.bundles import BundleEncoder, BundlePair, SensorInput
from ssl_eo.components import told_of
from ssl_eo.eval.decoders import TapMaps, TapShape
from ssl_eo.files import atomic_write
from ssl_eo.hub import (
    check_blocks,
    count_or_none,
    dataclass_from,
    faults_of,
    fill,
    input_from,
    load_bundle,
    page_of,
)
from ssl_eo.json_page import read_page
from ssl_eo.models.convnext import ConvNeXt, ConvNeXtConfig
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.tensor_files import read_tensors, write_tensors

__all__ = [
    "FORMAT",
    "PyramidBackbone",
    "Specialist",
    "export_ensemble",
    "is_ensemble",
    "load_ensemble",
    "specialist_of",
    "write_ensemble",
]

FORMAT = 1
_PAGE = "ensemble.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")  # also that of a file
_CONFIGS: Mapping[str, type] = {"vit": EncoderConfig, "convnextv2": ConvNeXtConfig}  # by kind


class PyramidBackbone(Backbone):
    """A ConvNeXt as decoders see it. What is known of its channels is not looked at."""

    def __init__(self, encoder: ConvNeXt) -> None:
        super().__init__()
        self.encoder = encoder
        self.shape, self.depth = TapShape(encoder.cfg.widths, encoder.cfg.strides_px), 0

    def forward(self, inputs: EncoderInput) -> TapMaps:
        """Maps `[B, D, h, w]` of each level."""
        return TapMaps(self.encoder(inputs.pixels))


@dataclass(frozen=True, eq=False)
class Specialist:
    """An encoder of an ensemble, with the sensors it was trained on; none where only their number of bands is known."""

    name: str
    backbone: EncoderBackbone | PyramidBackbone
    inputs: Mapping[str, SensorInput] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # plain values, where it is from

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"a specialist is named by up to 100 letters, digits, - and _, beginning with none of these two; got"
                f" {self.name!r:.80}"
            )

    @property
    def encoder(self) -> Encoder | ConvNeXt:
        return self.backbone.encoder

    @property
    def kind(self) -> str:
        return "vit" if isinstance(self.backbone, EncoderBackbone) else "convnextv2"

    @property
    def n_channels(self) -> int | None:
        """How many channels it takes; None for an encoder of any sensor."""
        return self.encoder.n_channels


def specialist_of(
    name: str, encoder: Encoder | ConvNeXt, inputs: Mapping[str, SensorInput], facts: Mapping[str, Any]
) -> Specialist:
    """The specialist `name`, in eval mode.

    Raises `ValueError` for a name that is none, or a transformer of too few blocks for four levels.
    """
    backbone: EncoderBackbone | PyramidBackbone
    if isinstance(encoder, Encoder):
        backbone = EncoderBackbone(encoder, clip_std=clip_of(inputs))
    else:
        backbone = PyramidBackbone(encoder)
    return Specialist(name, backbone.eval(), dict(inputs), dict(facts))


def write_ensemble(folder: Path, specialists: Sequence[Specialist], overwrite: bool = False) -> None:
    """Write the ensemble `folder`.

    Raises `ValueError` for no specialists, two of one name, and a folder that holds an ensemble already, unless it may
    be overwritten. `ensemble.json` comes last, so that after a kill the folder holds the old ensemble or none that
    `load_ensemble` takes.
    """
    _check_names([specialist.name for specialist in specialists])
    if (folder / _PAGE).exists() and not overwrite:
        raise ValueError(f"{folder} holds an ensemble already; give another folder, or overwrite it")
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for specialist in specialists:
        encoder: Any = specialist.encoder
        sha256 = write_tensors(_weights(folder, specialist.name), encoder.state_dict())
        head = {"name": specialist.name, "kind": specialist.kind, "sha256": sha256}
        entries.append({**head, **page_of(encoder, specialist.inputs), "facts": dict(specialist.facts)})
    atomic_write(folder / _PAGE, json.dumps({"format": FORMAT, "specialists": entries}, indent=1))


def is_ensemble(folder: Path) -> bool:
    """Whether `folder` is to be read by `load_ensemble`."""
    return (folder / _PAGE).is_file()


def load_ensemble(folder: str | Path) -> list[Specialist]:
    """The specialists of an ensemble folder, in eval mode. Raises `ValueError` for anything that is not a whole one."""
    folder = Path(folder)
    where = folder / _PAGE
    try:
        page = read_page(where)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{folder}: not an ensemble ({_PAGE}: {reason})") from None
    if not isinstance(page.get("specialists"), list):
        raise ValueError(f"{folder}: not an ensemble ({_PAGE} holds no list of specialists)")
    if type(page.get("format")) is not int or page["format"] != FORMAT:
        raise ValueError(
            f"{where}: ensemble format {page.get('format')!r:.40}, this version reads {FORMAT}; update ssl_eo"
        )
    with faults_of(where):
        _check_names([entry["name"] for entry in page["specialists"]])
    return [_load_specialist(folder, entry) for entry in page["specialists"]]


def export_ensemble(
    folder: Path, out: Path, export_run: Callable[[Path, Path], object] | None = None, overwrite: bool = False
) -> list[str]:
    """Write the ensemble `out` of all runs and encoder bundles that lie in `folder`; returns the specialists' names.

    They are called as their folders; a bundle of two encoders gives `<folder>-optical` and `<folder>-radar`. A run is
    exported by `export_run(run, bundle)` (`ssl_eo.train.export.export_encoder`). Other folders are left alone. Raises
    `ValueError` where there is nothing to export, and what `load_bundle`, `export_run` and `write_ensemble` raise.
    """
    specialists = list(_specialists_in(folder, export_run))
    if not specialists:
        raise ValueError(f"{folder}: neither runs (folders with config.yaml) nor bundles (with encoder.json) lie in it")
    write_ensemble(out, specialists, overwrite)
    return [specialist.name for specialist in specialists]


def _specialists_in(folder: Path, export_run: Callable[[Path, Path], object] | None) -> Iterator[Specialist]:
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None
    for path in found:
        if (path / "encoder.json").is_file():
            yield from _specialists_of(path, load_bundle(path))
        elif (path / "config.yaml").is_file():
            if export_run is None:
                raise ValueError(f"{path}: a run; export its encoder as a bundle first")
            with TemporaryDirectory() as scratch:
                export_run(path, Path(scratch, "bundle"))
                yield from _specialists_of(path, load_bundle(Path(scratch, "bundle")))


def _specialists_of(path: Path, bundle: BundleEncoder | BundlePair) -> list[Specialist]:
    name = path.name
    if isinstance(bundle, BundlePair):
        parts = {f"{name}-optical": bundle.optical, f"{name}-radar": bundle.radar}
    else:
        parts = {name: bundle}
    with told_of(str(path)):
        return [specialist_of(part, found.encoder, found.inputs, found.facts) for part, found in parts.items()]


def _load_specialist(folder: Path, entry: Mapping[str, Any]) -> Specialist:
    where, path = folder / _PAGE, _weights(folder, entry["name"])
    with faults_of(where):
        kind, sha256, facts = entry["kind"], str(entry["sha256"]), dict(entry["facts"])
        if kind not in _CONFIGS:
            raise ValueError(f"specialist {entry['name']}: kind {kind!r}, this version knows {', '.join(_CONFIGS)}")
        cfg = dataclass_from(_CONFIGS[kind], entry["encoder"])
        n_channels = count_or_none("n_channels", entry["n_channels"])
        inputs = {name: input_from(name, raw) for name, raw in entry["inputs"].items()}
    tensors = read_tensors(path, sha256)
    # On the meta device no size that a damaged file may state takes memory; a number of blocks takes time.
    with faults_of(where), torch.device("meta"):
        encoder = _on_meta(cfg, n_channels, tensors)
        specialist = specialist_of(entry["name"], encoder, inputs, facts)
    fill(path, encoder, tensors)
    return specialist


def _on_meta(cfg: EncoderConfig | ConvNeXtConfig, n_channels: int | None, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(cfg, EncoderConfig):
        check_blocks(cfg.n_blocks, tensors)
        return Encoder(cfg, n_channels)
    check_blocks(sum(cfg.depths), tensors)
    return ConvNeXt(cfg, n_channels or 0)


def _weights(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _check_names(names: Sequence[Any]) -> None:
    """Names become files, so none may lead out of the folder, and none may come twice on a disk without cases."""
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r:.80} is no name of a specialist: up to 100 letters, digits, - and _")
    if not names:
        raise ValueError("an ensemble needs one specialist at least")
    taken: set[str] = set()
    for name in names:
        if name.lower() in taken:
            raise ValueError(f"two specialists are called {name}: give each a name of its own")
        taken.add(name.lower())
