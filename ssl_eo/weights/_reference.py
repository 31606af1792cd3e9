"""Known outputs of every published architecture, by which an installation can be checked; no weights are needed.

`reference_outputs.json` beside this file holds what each of them makes of images and weights by formula
(`ssl_eo.weights._formula`): of each output its shape, 24 values, mean and standard deviation. That our code computes
what the published code does is shown by the tests (`tests/weights`); here, that this machine computes what it should.

B samples, C channels, T dates, H W pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ssl_eo.bundles import BundleEncoder, BundlePair, SensorInput
from ssl_eo.components import suggest
from ssl_eo.models.vit import Encoder
from ssl_eo.sensors import load_sensor
from ssl_eo.weights._formula import summary, uniform, weight
from ssl_eo.weights.base import find_released
from ssl_eo.weights.croma import PAIRS, pair_inputs

__all__ = ["Comparison", "compare", "outputs_of", "reference_names", "reference_of"]

_PATH = Path(__file__).with_name("reference_outputs.json")
_UNTOLD = ("sentinel2_l2a", "sentinel1_grd_ascending")  # shown to an encoder that has statistics for no sensor
_N_DATES = 2
_FIRST = "after block 0"  # what the outputs are called that a model cut to few blocks has too

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Comparison:
    """How far an architecture is from its reference outputs; not a number where its outputs are of another shape."""

    worst: float  # of all values, means and standard deviations
    output: str  # where
    tolerance: float

    @property
    def is_same(self) -> bool:
        return self.worst <= self.tolerance


def reference_names() -> list[str]:
    """All architectures that there are outputs of."""
    return list(_pages())


def reference_of(name: str) -> dict[str, Any]:
    """`tolerance`, and `outputs` by what they are called. Raises `ValueError` for an unknown name."""
    pages = _pages()
    if name not in pages:
        raise ValueError(f"no reference outputs of {name!r}{suggest(name, list(pages))} (known: {', '.join(pages)})")
    page: dict[str, Any] = pages[name]
    return page


def compare(name: str, depth: int | None = None) -> Comparison:
    """Compute the outputs of the architecture `name`, and hold them against the reference.

    With `depth`, of a model that is cut to so many blocks (of two encoders: an even number), those after its first
    block alone. Whole models are as large as their weights: 0.1 to 4.6 GB. Raises `ValueError` for an unknown name.
    """
    page = reference_of(name)
    found = outputs_of(name, depth)
    expected = {key: value for key, value in page["outputs"].items() if depth is None or key.endswith(_FIRST)}
    if found.keys() != expected.keys():
        return Comparison(torch.nan, f"{', '.join(found)} instead of {', '.join(expected)}", page["tolerance"])
    gaps = {key: _gap(value, expected[key]) for key, value in found.items()}
    odd = [key for key, gap in gaps.items() if gap != gap]
    worst = odd[0] if odd else max(gaps, key=lambda key: gaps[key])
    return Comparison(gaps[worst], worst, page["tolerance"])


@torch.no_grad()
def outputs_of(name: str, depth: int | None = None) -> dict[str, Tensor]:
    """What the architecture `name` makes of images by formula, with weights by formula; `depth` as in `compare`."""
    if name in PAIRS:
        return _of_pair(name, depth)
    released = find_released(name)
    config = released.config if depth is None else replace(released.config, depth=depth)
    with torch.device("meta"):
        encoder = Encoder(config, released.n_channels)
    return _of_encoder(name, BundleEncoder(_filled(encoder), released.inputs(), {}).eval(), depth is None)


def _of_encoder(name: str, model: BundleEncoder, is_whole: bool) -> dict[str, Tensor]:
    """The tokens of the first sensor, and the features of each."""
    inputs = dict(model.inputs) or {sensor: _standardised(sensor) for sensor in _UNTOLD}
    said: dict[str, dict[str, Any]] = {sensor: {"sensor": sensor} for sensor in inputs}
    cfg, first = model.encoder.cfg, next(iter(inputs))
    n_dates = _N_DATES if cfg.takes_series else None
    images = {
        sensor: _images(f"{name} {sensor}", known, cfg.patch_size, n_dates, has_gaps=bool(model.inputs))
        for sensor, known in inputs.items()
    }
    if cfg.time_encoding:
        said[first]["dates"] = torch.tensor([[[2017.0, 12.0], [2017.0, 49.0]], [[2023.0, 200.0], [2024.0, 1.0]]])
    if cfg.location_encoding:
        said[first]["location"] = torch.tensor([[52.4, 13.1], [-3.1, -60.0]])
    (tokens,) = model.get_intermediate_layers(images[first], [0], **said[first])
    found = {f"{first} {_FIRST}": tokens.x}
    if is_whole:
        found[f"{first} tokens"] = model.forward_features(images[first], **said[first]).x
        found |= {f"{sensor} features": model(images[sensor], **said[sensor]) for sensor in inputs}
    return found


def _of_pair(name: str, depth: int | None) -> dict[str, Tensor]:
    """The tokens of each encoder, its features, and those of both together."""
    pair = PAIRS[name] if depth is None else replace(PAIRS[name], config=replace(PAIRS[name].config, depth=depth))
    model = BundlePair(_filled(pair.build()), pair_inputs(), {}).eval()
    found: dict[str, Tensor] = {}
    shown: dict[str, tuple[Tensor, str]] = {}
    for group, part in {"optical": model.optical, "radar": model.radar}.items():
        sensor, known = next(iter(part.inputs.items()))
        images = _images(f"{name} {sensor}", known, pair.config.patch_size, None, has_gaps=True)
        (tokens,) = part.get_intermediate_layers(images, [0], sensor=sensor)
        found[f"{sensor} {_FIRST}"] = tokens.x
        shown[group] = (images, sensor)
        if depth is None:
            found[f"{sensor} features"] = part(images, sensor)
    if depth is None:
        (optical, seen_by), (radar, heard_by) = shown["optical"], shown["radar"]
        found["joint features"] = model.joint(optical, radar, seen_by, heard_by)
    return found


def _standardised(sensor: str) -> SensorInput:
    """Of images that are normalised already."""
    known = load_sensor(sensor)
    n = len(known.bands)
    return SensorInput(known, known.band_names, (0.0,) * n, (1.0,) * n, 10.0)


def _images(name: str, known: SensorInput, patch_px: int, n_dates: int | None, has_gaps: bool) -> Tensor:
    """Stored values `[B, C, (T,) H, W]` of two patches by three, a pixel of which was not measured."""
    dates = () if n_dates is None else (n_dates,)
    shape = (2, len(known.bands), *dates, 2 * patch_px, 3 * patch_px)
    mean, std = (torch.tensor(v).view(-1, *[1] * (len(shape) - 2)) for v in (known.mean, known.std))
    images = uniform(name, shape) * std + mean
    if has_gaps:
        images[0, 0, ..., 1, 2] = torch.nan
    return images


def _filled(module: M) -> M:
    """A module of the meta device with weights by formula, tensor by tensor, on the CPU."""
    module = module.to_empty(device="cpu")
    for name, value in module.state_dict().items():
        value.copy_(weight(name, tuple(value.shape)))
    return module


def _gap(output: Tensor, expected: dict[str, Any]) -> float:
    if list(output.shape) != expected["shape"]:
        return torch.nan
    found = summary(output)
    pairs = [(found["mean"], expected["mean"]), (found["std"], expected["std"])]
    ours, theirs = found["values"], expected["values"]
    assert isinstance(ours, list)
    gaps = [abs(a - b) for a, b in [*zip(ours, theirs, strict=True), *pairs]]
    return torch.nan if any(gap != gap for gap in gaps) else float(max(gaps))


@cache
def _pages() -> dict[str, Any]:
    pages: dict[str, Any] = json.loads(_PATH.read_text(encoding="utf-8"))
    return pages
