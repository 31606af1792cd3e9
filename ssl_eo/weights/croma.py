"""CROMA (arXiv 2311.00566), base and large: two encoders, what joins them and their pooling heads, in one file.

A file holds five dictionaries, `s1_encoder`, `s1_GAP_FFN`, `s2_encoder`, `s2_GAP_FFN` and `joint_encoder`. Sentinel-2
has twelve bands (none of them B10), Sentinel-1 VV and VH; values are cut at two standard deviations from the mean of
their band and mapped to [0, 1]. Its authors take mean and standard deviation of the images at hand, so that the numbers
of an image depend on which others it comes with; a bundle has those of SSL4EO-S12, where CROMA was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_eo.files import atomic_file
from ssl_eo.hub import SensorInput, check_finite, check_free, write_pair_bundle
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.sensors import load_sensor
from ssl_eo.tensor_files import check_fit
from ssl_eo.weights._reading import read_state_dict
from ssl_eo.weights.base import Released, released_facts

__all__ = [
    "MODELS",
    "PAIRS",
    "PAIR_FACTS",
    "ReleasedPair",
    "build_pair",
    "export_pair",
    "import_pair",
    "load_pair",
    "pair_inputs",
    "pair_state_dicts",
    "read_pair",
]

MODELS: tuple[Released, ...] = ()  # none is a single encoder

_BANDS = {
    "optical": ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"),
    "radar": ("VV", "VH"),
}
_CLIP_STD = 2.0
# Of SSL4EO-S12, stored values: mean and standard deviation of each of `_BANDS`.
_Statistics = tuple[tuple[float, ...], tuple[float, ...]]
_STATISTICS: dict[str, dict[str, _Statistics]] = {
    "optical": {
        "sentinel2_l2a": (
            (
                752.40087073,
                884.29673756,
                1144.16202635,
                1297.47289228,
                1624.90992062,
                2194.6423161,
                2422.21248945,
                2517.76053101,
                2581.64687018,
                2645.51888987,
                2368.51236873,
                1805.06846033,
            ),
            (
                1108.02887453,
                1155.15170768,
                1183.6292542,
                1368.11351514,
                1370.265037,
                1355.55390699,
                1416.51487101,
                1474.78900051,
                1439.3086061,
                1582.28010962,
                1455.52084939,
                1343.48379601,
            ),
        ),
        "sentinel2_l1c": (
            (
                1605.57504906,
                1390.78157673,
                1314.8729939,
                1363.52445545,
                1549.44374991,
                2091.74883118,
                2371.7172463,
                2299.90463006,
                2560.29504086,
                830.06605044,
                2177.07172323,
                1524.06546312,
            ),
            (
                786.78685367,
                850.34818441,
                875.06484736,
                1138.84957046,
                1122.17775652,
                1161.59187054,
                1274.39184232,
                1248.42891965,
                1345.52684884,
                577.31607053,
                1336.09932639,
                1136.53823676,
            ),
        ),
    },
    "radar": {
        "sentinel1_grd": (
            (-12.54847273, -20.19237134),
            (5.25697717, 5.91150917),
        ),
    },
}

_PARTS = {
    "optical": "s2_encoder",
    "radar": "s1_encoder",
    "cross": "joint_encoder",
    "optical_head": "s2_GAP_FFN",
    "radar_head": "s1_GAP_FFN",
}
_SELF_ATTENTION = {"norm1": "0.input_norm", "attn.qkv": "0.to_qkv", "attn.proj": "0.to_out"}
_LAYERS = {  # of a block: our names and theirs; where they have several, ours are theirs one below the other
    "encoder": {**_SELF_ATTENTION, "norm2": "1.input_norm", "mlp.fc1": "1.net.0", "mlp.fc2": "1.net.3"},
    "cross": {
        **_SELF_ATTENTION,
        "norm2": "1.input_norm",
        "cross_attn.q": "1.to_q",
        "cross_attn.kv": "1.to_k 1.to_v",
        "cross_attn.proj": "1.to_out",
        "norm3": "2.input_norm",
        "mlp.fc1": "2.net.0",
        "mlp.fc2": "2.net.3",
    },
}
_HEAD = {"norm": "0", "fc1": "1", "fc2": "3"}


@dataclass(frozen=True)
class ReleasedPair:
    """A published model of both encoders; the radar encoder and the cross encoder have half the depth of `config`."""

    name: str
    config: EncoderConfig  # of the optical encoder
    licence: str = "MIT"
    source: str = "https://github.com/antofuller/CROMA"

    @property
    def file_name(self) -> str:
        """What its authors and torchgeo call the file, without suffix, as a regular expression."""
        return rf"{self.name}(-[0-9a-f]{{8}})?"

    def build(self) -> OpticalRadar:
        """The model without values, on the meta device."""
        half = self.config.n_blocks // 2
        with torch.device("meta"):
            counts = (len(_BANDS["optical"]), len(_BANDS["radar"]))
            return OpticalRadar.of_sizes(self.config, replace(self.config, depth=half), counts, half)


def _pair(size: str) -> ReleasedPair:
    config = EncoderConfig(
        size=size,
        n_heads=16,
        patch_size=8,
        qkv_bias=False,
        cls_token=False,
        norm_eps=1e-5,
        position="alibi",
        patch_embed="conv",
    )
    return ReleasedPair(f"croma_{size}", config)


PAIR_FACTS = {"published": "optical", "features": {"pool": "mean", "taps": [1.0]}}  # what a bundle says of each
PAIRS = {pair.name: pair for pair in map(_pair, ("base", "large"))}


def pair_inputs() -> dict[str, dict[str, SensorInput]]:
    """What the pixels must look like: those of SSL4EO-S12 at either level of Sentinel-2, and of Sentinel-1."""
    return {
        group: {
            name: SensorInput(load_sensor(name), _BANDS[group], mean, std, 10.0, _CLIP_STD)
            for name, (mean, std) in sensors.items()
        }
        for group, sensors in _STATISTICS.items()
    }


def load_pair(path: str | Path, pair: ReleasedPair) -> OpticalRadar:
    """The model in a published file, in float32 and eval mode.

    Nothing but tensors is unpickled. Raises `ValueError` that starts with the path for a file that is damaged, and for
    any tensor missing, left over, or of another shape.
    """
    return build_pair(read_state_dict(path), pair, str(path))


def build_pair(theirs: Mapping[str, Tensor], pair: ReleasedPair, where: str) -> OpticalRadar:
    """The model with published tensors, by dotted names; errors as of `load_pair`, beginning with `where`."""
    model = pair.build()
    ours: dict[str, Tensor] = {}
    problems, used = [], set[str]()
    for name, value in model.state_dict().items():
        names = _published_names(name)
        used.update(names)
        if missing := [n for n in names if n not in theirs]:
            problems.append(f"{missing[0]} is missing")
            continue
        if flat := [n for n in names if theirs[n].ndim == 0 and len(names) > 1]:
            problems.append(f"{flat[0]} is one number")
            continue
        found = torch.cat([theirs[n] for n in names]) if len(names) > 1 else theirs[names[0]]
        shape = value.flatten(1).shape if name.endswith("patch_embed.proj.weight") else value.shape
        if found.shape != shape or not found.is_floating_point():
            problems.append(f"{names[0]} is {list(found.shape)} of {found.dtype}, expected {list(shape)} in all")
        else:
            ours[name] = found.reshape(value.shape)
    problems += [f"{name} is not expected" for name in theirs if name not in used]
    if problems:
        raise ValueError(f"{where}: not the weights of {pair.name}: {len(problems)} tensors do not fit: {problems[0]}")
    model.to_empty(device="cpu").load_state_dict(ours)
    check_finite(where, model)
    return model.eval()


def import_pair(path: Path, name: str, out: Path, overwrite: bool = False) -> ReleasedPair:
    """Write the bundle `out` of the whole model from a published file, and say what it is.

    Raises as `load_pair`, and when `out` holds a bundle already, unless it may `overwrite` it.
    """
    check_free(out, overwrite)
    pair = PAIRS[name]
    model, facts = read_pair(path, pair)
    write_pair_bundle(out, model, pair_inputs(), facts)
    return pair


def read_pair(path: Path, pair: ReleasedPair) -> tuple[OpticalRadar, dict[str, Any]]:
    """The model in a published file, and what a bundle says of it beside its inputs; errors as of `load_pair`."""
    model = load_pair(path, pair)
    return model, {**PAIR_FACTS, **released_facts(path, pair.name, pair.licence, pair.source)}


def pair_state_dicts(
    model: OpticalRadar, pair: ReleasedPair, inputs: Mapping[str, Mapping[str, SensorInput]]
) -> dict[str, dict[str, Tensor]]:
    """The weights of `model`, which was trained on `inputs`, as the five dictionaries that published code loads.

    In float32 on the CPU, with the bands of a patch in the published order. Raises `ValueError` when that code would
    compute something else from them, or cannot hold them.
    """
    for encoder in (model.optical, model.radar):
        for key in ("heads", "patch_size", "position", "norm_eps", "patch_embed", "conv", "mlp"):
            expected, found = getattr(pair.config, key), getattr(encoder.cfg, key)
            if found != expected:
                raise ValueError(f"this model is no {pair.name}: its {key} is {found}, expected {expected}")
    ours = model.state_dict()
    check_fit(f"this model is no {pair.name}", "it", pair.build().state_dict(), ours)
    out: dict[str, dict[str, Tensor]] = {part: {} for part in sorted(_PARTS.values())}
    for name, tensor in ours.items():
        names = _published_names(name)
        value = tensor.detach().float().cpu()
        if name.endswith("patch_embed.proj.weight"):
            group = name.partition(".")[0]
            value = value[:, _published_order(pair, group, inputs[group])].flatten(1)
        for full_name, rows in zip(names, value.chunk(len(names)), strict=True):
            part, _, key = full_name.partition(".")
            out[part][key] = rows.clone()  # else a file would hold all rows twice
    return out


def _published_order(pair: ReleasedPair, group: str, inputs: Mapping[str, SensorInput]) -> list[int]:
    """Where among the bands of an encoder those of the published one are."""
    published = _BANDS[group]
    orders = list(dict.fromkeys(known.bands for known in inputs.values())) or [published]
    for bands in orders:
        if len(orders) > 1 or sorted(bands) != sorted(published):
            raise ValueError(
                f"this model is no {pair.name}: its {group} encoder was trained on {', '.join(bands)}, expected"
                f" {', '.join(published)}, in one order"
            )
    (bands,) = orders
    return [bands.index(band) for band in published]


def export_pair(
    model: OpticalRadar,
    name: str,
    inputs: Mapping[str, Mapping[str, SensorInput]],
    out: Path,
    overwrite: bool = False,
) -> None:
    """Write `model`, trained on `inputs`, to the file `out` (`.pt` or `.pth`) in the published layout `name`."""
    if out.suffix not in (".pth", ".pt"):
        raise ValueError(
            f"{out}: the name must end in .pt or .pth: dictionaries in a dictionary are a file of torch.save"
        )
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; give another --out, or add --overwrite")
    tensors = pair_state_dicts(model, PAIRS[name], inputs)
    with atomic_file(out) as file:
        torch.save(tensors, file)


def _published_names(name: str) -> list[str]:
    """What published files call the tensor `name` of `OpticalRadar`: one name, or two that are one below the other."""
    part, _, rest = name.partition(".")
    module, _, kind = rest.rpartition(".")  # kind: weight or bias
    prefix = "" if part == "cross" else "transformer."
    if part.endswith("_head"):
        theirs = _HEAD[module]
    elif block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        layers = _LAYERS["cross" if part == "cross" else "encoder"][block[2]].split()
        return [f"{_PARTS[part]}.{prefix}layers.{block[1]}.{layer}.{kind}" for layer in layers]
    else:
        theirs = {"patch_embed.proj": "linear_input", "norm": f"{prefix}norm_out"}[module]
    return [f"{_PARTS[part]}.{theirs}.{kind}"]
