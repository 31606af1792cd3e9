"""Encoders that others published: their architecture by name, their files in, and ours out in the same layout.

A family is a module of this package with `MODELS`, a tuple of `Released`; `dinov2_vits14` is looked for in
`ssl_eo.weights.dinov2`. State dicts keep their names and shapes on both ways: our encoder has those of DINOv2.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ssl_eo.components import available, one_line, suggest
from ssl_eo.files import atomic_file
from ssl_eo.hub import UNSAID, SensorInput, check_finite, check_free, write_bundle
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.tensor_files import write_tensors
from ssl_eo.weights._reading import find_encoder, read_state_dict

__all__ = [
    "Released",
    "build_encoder",
    "export_released",
    "find_released",
    "import_released",
    "read_released",
    "read_state_dict",
    "released_facts",
    "released_name_of",
    "released_names",
    "released_state_dict",
]

_N_NAMED = 3  # tensors that an error names


def _no_inputs() -> Mapping[str, SensorInput]:
    return {}


def _as_they_are(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


@dataclass(frozen=True)
class Released:
    """A published encoder: the name of its authors, what it is, and the pixels it was trained on."""

    name: str
    config: EncoderConfig
    licence: str  # of the weights
    source: str  # where the authors publish it
    n_channels: int | None = None  # of a convolution
    inputs: Callable[[], Mapping[str, SensorInput]] = _no_inputs  # empty where pixels are normalised by dataset
    token: str = "cls_token"  # the tensor in a published file beside which the encoder's others are
    # From these tensors to those of our encoder.
    adapt: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = _as_they_are
    restore: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = _as_they_are  # and back
    pool: Literal["cls", "mean"] = "cls"  # what the authors take as features of an image
    sha256: tuple[str, ...] = ()  # first digits, of files that are known to be this one and no other
    file_name: str | None = None  # what its authors call the file, without suffix, as a regular expression


def find_released(name: str) -> Released:
    """The published encoder `name`; `ValueError` with the names there are."""
    models = {released.name: released for released in _all_released()}
    if name not in models:
        known = released_names()
        raise ValueError(f"no published encoder {name!r}{suggest(name, known)} (known: {', '.join(known)})")
    return models[name]


def released_names() -> list[str]:
    """Of all published encoders, and of pairs of such, in the order of the alphabet."""
    return sorted(name for family in _families() for name, _ in _published_by(family))


def released_name_of(path: Path) -> str:
    """The name of the published encoder, or pair of such, whose file is called as `path`: by its authors, or by it.

    Raises `ValueError` for any other file, and where one file holds several.
    """
    patterns = {name: one.file_name for family in _families() for name, one in _published_by(family)}
    for name, pattern in patterns.items():
        if re.fullmatch(pattern or re.escape(name), path.stem, re.IGNORECASE) or path.stem == name:
            return name
    raise ValueError(
        f"{path}: no published file is known by this name: say which encoder it is with --as (known:"
        f" {', '.join(sorted(patterns))})"
    )


def build_encoder(tensors: Mapping[str, Tensor], released: Released, where: str) -> Encoder:
    """The encoder `released` with the weights `tensors`, in float32 and eval mode.

    What its name leaves open is read off the tensors: the native size of the position table, the kind of MLP, and
    whether there is a mask token. Raises `ValueError` that starts with `where` for any tensor missing, left over, of
    another shape, or not finite.
    """
    try:
        found = released.adapt(tensors)
    except (ValueError, IndexError, RuntimeError, KeyError) as error:
        raise ValueError(f"{where}: not the weights of {released.name}: {one_line(error)}{_hint(tensors)}") from None
    config = _config_of(found, released)
    problems = _misfits(found, config, released.n_channels)
    if problems:
        raise ValueError(f"{where}: not the weights of {released.name}: {'; '.join(problems)}{_hint(tensors)}")
    encoder = _on_meta(config, released.n_channels).to_empty(device="cpu")
    encoder.load_state_dict(found)
    check_finite(where, encoder)
    return encoder.eval()


def import_released(path: Path, name: str, out: Path, prefix: str | None = None, overwrite: bool = False) -> Released:
    """Write the bundle `out` from a file of published weights, and say what they are.

    Raises as `read_released`, and when `out` holds a bundle already, unless it may `overwrite` it.
    """
    check_free(out, overwrite)
    released = find_released(name)
    encoder, facts = read_released(path, released, prefix)
    write_bundle(out, encoder, released.inputs(), facts)
    return released


def read_released(path: Path, released: Released, prefix: str | None = None) -> tuple[Encoder, dict[str, Any]]:
    """The encoder in a published file, in eval mode, and what a bundle says of it beside its inputs.

    The file may also be of a training run in that layout. `prefix` is needed where it holds several encoders, see
    `find_encoder`. Raises `ValueError` when it is damaged, holds no encoder, or another one than `released`: also where
    all tensors fit, of a file that is known to be another one.
    """
    encoder = build_encoder(find_encoder(path, read_state_dict(path), prefix, released.token), released, str(path))
    facts = released_facts(path, released.name, released.licence, released.source)
    sha256 = facts["released"]["sha256"]
    for other in _all_released():
        if other.name != released.name and any(map(sha256.startswith, other.sha256)):
            raise ValueError(
                f"{path}: this is the file of {other.name}, by its SHA-256, of which {released.name} would compute"
                f" something else: choose --as {other.name}"
            )
    return encoder, {"features": {"pool": released.pool, "taps": [1.0]}, **facts}


def released_facts(path: Path, name: str, licence: str, source: str) -> dict[str, Any]:
    """What a bundle says of the published file `path` that it is from."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        **UNSAID,
        "licence": licence,
        # No file says after how many steps it was saved; evaluation takes step 0 for an encoder that nobody trained.
        "step": 1,
        "released": {"name": name, "licence": licence, "source": source, "file": path.name, "sha256": sha256},
    }


def released_state_dict(encoder: Encoder, released: Released) -> dict[str, Tensor]:
    """The weights of `encoder` as published code loads them, in float32 on the CPU.

    Raises `ValueError` when that code would compute something else from them, or cannot hold them. Where published
    layouts have a mask token, it is zeros for an encoder that was trained without one, as before their training.
    """
    expected, found = _essence(released.config), _essence(encoder.cfg)
    for key, value in expected.items():
        if found.get(key) != value:
            raise ValueError(f"this encoder is no {released.name}: its {key} is {found.get(key)}, expected {value}")
    tensors = encoder.state_dict()
    if released.config.mask_token:
        tensors.setdefault("mask_token", torch.zeros(1, encoder.embed_dim))
    problems = _misfits(tensors, _config_of(tensors, released), released.n_channels)
    if problems:
        raise ValueError(f"this encoder is no {released.name}: {'; '.join(problems)}")
    return {name: tensor.detach().float().cpu() for name, tensor in released.restore(tensors).items()}


def export_released(encoder: Encoder, name: str, out: Path, overwrite: bool = False) -> None:
    """Write `encoder` to the file `out` (`.pth`, `.pt` or `.safetensors`) in the published layout `name`."""
    if out.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{out}: the name must end in .pth, .pt or .safetensors, which says how it is written")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; give another --out, or add --overwrite")
    tensors = released_state_dict(encoder, find_released(name))
    if out.suffix == ".safetensors":
        write_tensors(out, tensors)
        return
    with atomic_file(out) as file:
        torch.save(tensors, file)


def _all_released() -> list[Released]:
    return [released for family in _families() for released in family.MODELS]


def _published_by(family: ModuleType) -> list[tuple[str, Any]]:
    """Encoders and pairs of a family, by name."""
    return [*((released.name, released) for released in family.MODELS), *getattr(family, "PAIRS", {}).items()]


def _families() -> list[ModuleType]:
    package = __name__.rpartition(".")[0]
    return [importlib.import_module(f"{package}.{family}") for family in available(package)]


def _config_of(tensors: Mapping[str, Tensor], released: Released) -> EncoderConfig:
    """The configuration of `released` with what the tensors of a file may decide themselves."""
    config = replace(
        released.config,
        mask_token="mask_token" in tensors,
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in tensors else "gelu",
    )
    shape = tensors["pos_embed"].shape if "pos_embed" in tensors else torch.Size()
    n_patches = shape[1] - 1 if len(shape) == 3 else 0
    side = math.isqrt(max(n_patches, 0))
    return replace(config, image_size=side * config.patch_size) if side and side**2 == n_patches else config


def _on_meta(config: EncoderConfig, n_channels: int | None) -> Encoder:
    with torch.device("meta"):
        return Encoder(config, n_channels)


def _misfits(tensors: Mapping[str, Tensor], config: EncoderConfig, n_channels: int | None) -> list[str]:
    """What keeps `tensors` from being the state dict of such an encoder, in words; empty when nothing does."""
    expected = {name: list(value.shape) for name, value in _on_meta(config, n_channels).state_dict().items()}
    missing = [name for name in expected if name not in tensors]
    left_over = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {list(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and list(tensors[name].shape) != shape
    ]
    no_numbers = [f"{name} of {tensors[name].dtype}" for name in tensors if not tensors[name].is_floating_point()]
    kinds = {"missing": missing, "not expected": left_over, "of another shape": misshapen, "no weights": no_numbers}
    return [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_N_NAMED]) + (", ..." if len(names) > _N_NAMED else "")


def _hint(tensors: Mapping[str, Tensor]) -> str:
    """Which published encoder `tensors` are instead, if any."""
    n_blocks = sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in tensors)
    same_depth = (other for other in _all_released() if other.config.n_blocks == n_blocks)
    names = " or ".join(other.name for other in same_depth if _fits(tensors, other))
    return f"; it is one of {names}: choose --as {names}" if names else ""


def _fits(tensors: Mapping[str, Tensor], released: Released) -> bool:
    try:
        found = released.adapt(tensors)
    except (ValueError, IndexError, RuntimeError, KeyError):  # what its family cannot take is none of it
        return False
    return not _misfits(found, _config_of(found, released), released.n_channels)


def _essence(config: EncoderConfig) -> dict[str, Any]:
    """What of a configuration decides the numbers that an encoder computes and no tensor's shape tells."""
    return {
        "embed_dim": config.width,
        "depth": config.n_blocks,
        "n_heads": config.heads,
        "patch_size": config.patch_size,
        "n_registers": config.n_registers,
        "position": config.position,
        "position_resize": config.position_resize,
        # The grid that positions are stretched from; that of a learned table is read off the table.
        "image_size": config.image_size if config.position in ("sincos_3d", "sincos_resized") else None,
        "tubelet": config.tubelet,
        "time_encoding": config.time_encoding,
        "location_encoding": config.location_encoding,
        "norm_eps": config.norm_eps,
        "final_norm": config.final_norm,
        "LayerScale": config.layer_scale_init is not None,
        "patch_embed": config.patch_embed,
        config.patch_embed: getattr(config, config.patch_embed),
    }
