"""Encoder bundles: a folder with `encoder.safetensors` and `encoder.json`, written and read with torch alone.

Nothing is unpickled on the way in. `encoder.json` says how to build the encoder, which file of weights it belongs to
(by SHA-256), and what the pixels must look like: sensors with their bands, and the mean and standard deviation that
normalise stored values; and where it all is from: step, commit, config, probe scores, licence. A bundle holds one
encoder, or those of two groups of sensors with what joins them: its kind says which. One of an older format is brought
up to date as it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ssl_eo.bundles import BundleEncoder, BundlePair, SensorInput
from ssl_eo.components import one_line
from ssl_eo.files import atomic_write
from ssl_eo.json_page import read_page
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.sensors import Sensor
from ssl_eo.tensor_files import check_fit, read_tensors, write_tensors

__all__ = [
    "FORMAT",
    "UNSAID",
    "BundleEncoder",
    "BundlePair",
    "SensorInput",
    "check_blocks",
    "check_finite",
    "check_free",
    "count_or_none",
    "dataclass_from",
    "faults_of",
    "fill",
    "input_from",
    "load_bundle",
    "page_of",
    "write_bundle",
    "write_pair_bundle",
]

FORMAT = 2
# Where an encoder is from: what is said of any, and stands there where nothing is known.
UNSAID: Mapping[str, Any] = {
    "commit": None,  # of the code that trained it, with + where files differed from it
    "config": None,  # of its run, resolved
    "scores": [],  # of probes, the newest of its run
    "licence": "not stated",  # of the weights
}
_GROUPS = ("optical", "radar")
# Of a page, all that is needed to build what the bundle holds, and to read its images; the rest are facts.
_NO_FACTS = {"format", "kind", "sha256", "encoder", "encoders", "n_channels", "cross_depth", "inputs"}
_OF_RUNS = ("checkpoints", "complete.json")  # what a run has, and what a checkpoint


def write_bundle(folder: Path, encoder: Encoder, inputs: Mapping[str, SensorInput], facts: Mapping[str, Any]) -> None:
    """Write the bundle `folder`; `facts` are plain values kept beside the weights.

    Raises `ValueError` for facts that are called as what an encoder is built from, and `OSError` that names the file
    which cannot be written; then, as after a kill, what `folder` holds is the old bundle, or a mixture that
    `load_bundle` refuses.
    """
    _write(folder, encoder, "encoder", page_of(encoder, inputs), facts)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise `ValueError` where `folder` holds a bundle already, unless it may be overwritten, or is no folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{folder}: {there.name} is no folder, and a bundle is one; give another --out")
    if (folder / "encoder.json").exists() and not overwrite:
        raise ValueError(f"{folder} holds a bundle already; give another --out, or add --overwrite")


def write_pair_bundle(
    folder: Path, model: OpticalRadar, inputs: Mapping[str, Mapping[str, SensorInput]], facts: Mapping[str, Any]
) -> None:
    """Write the bundle `folder` of both encoders and what joins them; `inputs` are those of `optical` and of `radar`.

    Errors are those of `write_bundle`. `facts["published"]`, "optical" or "radar", says which is the published encoder.
    """
    encoders = {"optical": model.optical, "radar": model.radar}
    page = {
        "encoders": {group: page_of(encoder, inputs[group]) for group, encoder in encoders.items()},
        "cross_depth": len(model.cross.blocks),
    }
    _write(folder, model, "pair", page, facts)


def _write(folder: Path, module: nn.Module, kind: str, page: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    if taken := sorted(_NO_FACTS & facts.keys()):
        raise ValueError(
            f"{folder}: facts must have other names than {', '.join(taken)}, which say what a bundle holds"
        )
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = write_tensors(folder / "encoder.safetensors", module.state_dict())
    head = {"format": FORMAT, "kind": kind, "sha256": sha256}
    atomic_write(folder / "encoder.json", json.dumps({**head, **page, **facts}, indent=1))


def page_of(encoder: Encoder, inputs: Mapping[str, SensorInput]) -> dict[str, Any]:
    """What is said of one encoder."""
    return {
        "encoder": asdict(encoder.cfg),
        "n_channels": encoder.n_channels,
        "inputs": {
            name: {**{f.name: getattr(known, f.name) for f in fields(known)}, "sensor": known.sensor.to_dict()}
            for name, known in inputs.items()
        },
    }


def load_bundle(folder: str | Path) -> BundleEncoder | BundlePair:
    """What a bundle folder holds, in eval mode. Raises `ValueError` for anything that is not a whole bundle."""
    folder = Path(folder)
    page = _read_page(folder)
    where = folder / "encoder.json"
    if page.get("kind") == "pair":
        return _load_pair(folder, page)
    if page.get("kind") != "encoder":
        raise ValueError(f"{where}: kind must be encoder or pair, got {page.get('kind')!r:.40}")
    with faults_of(where):
        said, sha256 = _said_of(page), str(page["sha256"])
    tensors = read_tensors(folder / "encoder.safetensors", sha256)
    # On the meta device no size that a damaged file may state takes memory; a number of blocks takes time.
    with faults_of(where), torch.device("meta"):
        check_blocks(said.cfg.n_blocks, tensors)
        encoder = Encoder(said.cfg, said.n_channels)
    fill(folder, encoder, tensors)
    return BundleEncoder(encoder, said.inputs, _facts_of(page)).eval()


def _load_pair(folder: Path, page: Mapping[str, Any]) -> BundlePair:
    where = folder / "encoder.json"
    with faults_of(where):
        said, sha256 = {group: _said_of(page["encoders"][group]) for group in _GROUPS}, str(page["sha256"])
        cross_depth = count_or_none("cross_depth", page["cross_depth"])
    tensors = read_tensors(folder / "encoder.safetensors", sha256)
    with faults_of(where), torch.device("meta"):
        optical, radar = (said[group] for group in _GROUPS)
        check_blocks(max(optical.cfg.n_blocks, radar.cfg.n_blocks, cross_depth or 0), tensors)
        counts = (optical.n_channels, radar.n_channels)
        model = OpticalRadar.of_sizes(optical.cfg, radar.cfg, counts, cross_depth or 0)
    fill(folder, model, tensors)
    return BundlePair(model, {group: said[group].inputs for group in _GROUPS}, _facts_of(page)).eval()


def _facts_of(page: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in page.items() if key not in _NO_FACTS}


class _Said(NamedTuple):
    """What `encoder.json` says of one encoder."""

    cfg: EncoderConfig
    n_channels: int | None
    inputs: dict[str, SensorInput]


def _said_of(page: Mapping[str, Any]) -> _Said:
    return _Said(
        dataclass_from(EncoderConfig, page["encoder"]),
        count_or_none("n_channels", page["n_channels"]),
        {name: input_from(name, raw) for name, raw in page["inputs"].items()},
    )


def check_blocks(n_blocks: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for more blocks than there are tensors: each has several, and building them takes time."""
    if n_blocks > len(tensors):
        raise ValueError(f"the encoder has {n_blocks} blocks, too many for a file of {len(tensors)} tensors")


def fill(where: str | Path, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The module, built on meta, with `tensors` on the CPU. Errors begin with `where`."""
    check_fit(where, "the encoder", module.state_dict(), tensors)
    module.to_empty(device="cpu").load_state_dict(tensors)
    check_finite(str(where), module)


def check_finite(where: str, module: nn.Module) -> None:
    """Raise `ValueError` that begins with `where` for weights that are not finite: what is computed would be NaN."""
    found = [name for name, value in module.state_dict().items() if not _is_finite(value)]
    if found:
        raise ValueError(
            f"{where}: {len(found)} tensors have values that are NaN or infinite, the first is {found[0]}: damaged, or"
            " of a training that diverged; take an earlier checkpoint, or the file anew"
        )


def _is_finite(values: Tensor) -> bool:
    if values.numel() == 0 or not values.is_floating_point():
        return True
    return all(bool(bound.isfinite()) for bound in values.aminmax())  # takes no memory, NaN is the bound of any


def _read_page(folder: Path) -> dict[str, Any]:
    """The content of `encoder.json`, an object, as one of the format of this version."""
    if not (folder / "encoder.json").exists() and any((folder / name).exists() for name in _OF_RUNS):
        raise ValueError(
            f"{folder}: a run, or a checkpoint of one, and not an encoder bundle; make one of it: ssl-eo export"
            f" --checkpoint {folder} --out FOLDER"
        )
    try:
        page = read_page(folder / "encoder.json")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{folder}: not an encoder bundle (encoder.json: {reason})") from None
    # Format 1 called itself "pair 1" where it was one of two encoders.
    found = 1 if page.get("format") == "pair 1" else page.get("format")
    if type(found) is not int or found < 1:
        raise ValueError(f"{folder}: bundle format {found!r:.40}, expected a number from 1 to {FORMAT}; export it anew")
    if found > FORMAT:
        raise ValueError(f"{folder}: bundle format {found}, this version reads formats up to {FORMAT}; update ssl_eo")
    upgraded: dict[str, Any] = page
    for number in range(found, FORMAT):
        upgraded = _UPGRADES[number](upgraded)
    return upgraded


def _upgrade_1_to_2(page: dict[str, Any]) -> dict[str, Any]:
    """What a bundle holds was said by its format, and the licence of published weights beside their source alone."""
    kind = "pair" if page["format"] == "pair 1" else "encoder"
    released = page.get("released")
    licence = {"licence": released["licence"]} if isinstance(released, dict) and "licence" in released else {}
    return {**UNSAID, **licence, **page, "format": 2, "kind": kind}


# From the pages of each format to those of the next, as they are read.
_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _upgrade_1_to_2}


@contextmanager
def faults_of(where: str | Path) -> Iterator[None]:
    """Whatever a wrong value in the file `where` leads to is one `ValueError` that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where}: key {error} is missing") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from error


def input_from(name: str, raw: Mapping[str, Any]) -> SensorInput:
    """What `page_of` said of one sensor."""
    return SensorInput(
        sensor=Sensor.from_dict(raw["sensor"], where=f"inputs.{name}"),
        bands=tuple(raw["bands"]),
        mean=tuple(raw["mean"]),
        std=tuple(raw["std"]),
        gsd_m=raw["gsd_m"],
        clip_std=raw.get("clip_std"),
    )


def dataclass_from(cls: type, raw: Mapping[str, Any]) -> Any:
    """A (nested) dataclass from the plain values that `asdict` gave."""
    hints, spelt = get_type_hints(cls), {f.name: f.type for f in fields(cls)}
    for key in (key for key in hints if key not in raw):
        raise KeyError(key)  # a default in its place would be another encoder
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ValueError(f"encoder config: unknown key {key!r:.80}; written by a newer version of ssl_eo?")
        if is_dataclass(hints[key]):
            value = dataclass_from(hints[key], value)
        elif not _fits(value, hints[key]):
            raise ValueError(f"encoder config: {key} is {value!r:.80}, which this version does not know ({spelt[key]})")
        values[key] = value
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the type `hint`: a plain type, a union of such, or a `Literal`. Numbers are finite."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def count_or_none(key: str, value: Any) -> int | None:
    """`value`, checked to be null or a whole number from 1; errors name `key`."""
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{key} must be a whole number from 1 or null, got {value!r:.80}")
    return value
