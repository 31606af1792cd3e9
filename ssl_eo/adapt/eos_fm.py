"""The published ensemble of EoS-FM (arXiv 2511.21523), read without running anything that its file may hold.

It is a list of `(in_chans, state_dict, config)`, of encoders that timm calls `convnextv2_atto` with `features_only`. It
says how many channels each takes and not what they are: whoever knows can say so, by the name of the encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_eo.adapt.specialists import Specialist, specialist_of, write_ensemble
from ssl_eo.bundles import SensorInput
from ssl_eo.components import suggest
from ssl_eo.hub import faults_of, fill
from ssl_eo.models.convnext import ConvNeXt, ConvNeXtConfig
from ssl_eo.weights._reading import is_plain, load_pickled

__all__ = ["from_timm", "import_published", "read_published"]

# Files are read into memory; the published one has 23 encoders of 14 MB.
_MAX_BYTES = 4 << 30
_MAX_SPECIALISTS = 1000
_BACKBONES = ("convnextv2_atto", "timm_convnextv2_atto")
_STAGE = re.compile(r"^(stem|stages)_(\d+)\.")
_POINTWISE = re.compile(r"\.mlp\.fc[12]\.weight$")


def from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm's `features_only` ConvNeXt V2 by the names and shapes of `ConvNeXt`.

    timm may keep the linear layers of a block as convolutions of one pixel.
    """
    return {
        _STAGE.sub(r"\1.\2.", name): tensor.flatten(1) if _POINTWISE.search(name) and tensor.ndim == 4 else tensor
        for name, tensor in tensors.items()
    }


def read_published(path: str | Path, inputs: Mapping[str, SensorInput] | None = None) -> list[Specialist]:
    """The specialists of a published `.pth` file, in eval mode.

    `inputs` says of encoders, by name, what their channels are. Names are those of the file, with `_` for what cannot
    be in the name of a file, and a number behind one that comes again. Raises `ValueError` for a file that is damaged,
    no such list, too large, or would have to run code to be read, and for `inputs` of an encoder that there is not, or
    of another number of channels.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if size > _MAX_BYTES:
        raise ValueError(f"{path}: {size} bytes, of an ensemble at most {_MAX_BYTES} are read")
    content = load_pickled(path)
    if not isinstance(content, list) or not 0 < len(content) <= _MAX_SPECIALISTS:
        found = f"one of {len(content)}" if isinstance(content, list) else f"a {type(content).__name__}"
        raise ValueError(f"{path}: expected a list of 1 to {_MAX_SPECIALISTS} encoders, found {found}")
    known = dict(inputs or {})
    names: list[str] = []
    for i, entry in enumerate(content):
        names.append(_name_of(path, i, entry, names))
    if unknown := [name for name in known if name not in names]:
        raise ValueError(f"{path}: holds no encoder {unknown[0]!r}{suggest(unknown[0], names)} ({', '.join(names)})")
    return [_specialist(path, name, entry, known.get(name)) for name, entry in zip(names, content, strict=True)]


def import_published(
    path: str | Path, out: Path, inputs: Mapping[str, SensorInput] | None = None, overwrite: bool = False
) -> list[str]:
    """Write the ensemble `out` of a published `.pth` file; returns the specialists' names. Raises as what it calls."""
    specialists = read_published(path, inputs)
    write_ensemble(out, specialists, overwrite)
    return [specialist.name for specialist in specialists]


def _name_of(path: Path, i: int, entry: Any, taken: list[str]) -> str:
    """The name of encoder `i`, checked to be an entry as published."""
    is_triple = isinstance(entry, tuple | list) and len(entry) == 3
    if not is_triple or type(entry[0]) is not int or not all(isinstance(part, Mapping) for part in entry[1:]):
        raise ValueError(f"{path}: encoder {i} is no (in_chans, state_dict, config), but {_described(entry)}")
    backbone = entry[2].get("backbone")
    if backbone not in _BACKBONES:
        raise ValueError(f"{path}: encoder {i} is a {backbone!r}; {' and '.join(_BACKBONES)} can be read")
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", str(entry[2].get("encoder_name", f"encoder_{i + 1}"))).lstrip("_-")[:90]
    plain = plain or f"encoder_{i + 1}"
    lower, name, again = {other.lower() for other in taken}, plain, 1
    while name.lower() in lower:
        again += 1
        name = f"{plain}_{again}"
    return name


def _described(entry: Any) -> str:
    if not isinstance(entry, tuple | list):
        return f"a {type(entry).__name__}"
    return f"({', '.join(type(part).__name__ for part in entry[:4])})"


def _specialist(path: Path, name: str, entry: Any, known: SensorInput | None) -> Specialist:
    n_channels, tensors, config = entry
    if known is not None and len(known.bands) != n_channels:
        raise ValueError(f"{path}: encoder {name} takes {n_channels} channels, its inputs are {len(known.bands)} bands")
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not is_plain(tensor):
            raise ValueError(f"{path}: {key} of encoder {name} is no plain tensor, but {type(tensor).__name__}")
    where = f"{path}, encoder {name}"
    with faults_of(where), torch.device("meta"):
        encoder = ConvNeXt(ConvNeXtConfig(), n_channels)
    fill(where, encoder, from_timm({str(key): tensor for key, tensor in tensors.items()}))
    inputs = {} if known is None else {known.sensor.name: known}
    facts = {"file": path.name, "published": {key: str(value) for key, value in config.items()}}
    return specialist_of(name, encoder, inputs, facts)
