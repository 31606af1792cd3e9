"""Our encoder computes what the published code of Panopticon and DINOv2 computes, from the same weights and inputs.

The numbers in `golden` are the published code's, by `make_released_golden.py` beside this file: weights and
inputs come from the formula in `released_formula.py`, so no file of theirs is needed. Of each output 24 evenly spaced
values are compared, and the mean and standard deviation of all.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from released_formula import DINOV2, PANOPTICON, Case, summary, weights
from torch import Tensor

from ssl_eo.models.vit import Encoder, EncoderInput
from ssl_eo.sensors import Band, ChannelMeta, Sensor
from ssl_eo.weights.base import build_encoder, find_released

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # outputs are of order 1
SAR_IDS = {  # Panopticon's id, -1 to -12: what our bands say
    -1 - i: pair for i, pair in enumerate(product((None, "ascending", "descending"), ("VV", "VH", "HH", "HV")))
}


def band(name: str, number: int) -> Band:
    if number < 0:
        orbit, polarization = SAR_IDS[number]
        return Band(name, "sar", 10.0, wavelength_um=55_466.0, polarization=polarization, orbit=orbit)
    return Band(name, "thermal" if number > 4000 else "optical", 10.0, wavelength_um=number / 1000)


def channels(case: Case) -> ChannelMeta:
    """`[B, C]`, or `[C]` where there is one sample."""
    rows = []
    for ids in case.ids:
        bands = tuple(band(f"b{i}", number) for i, number in enumerate(ids))
        rows.append(Sensor("any", "any", bands, "float32", "any", "any").channel_meta())
    valid = case.valid()
    if valid is None and len(rows) == 1:
        return rows[0]
    return replace(ChannelMeta.cat([row.expand(1) for row in rows]), valid=valid)


@lru_cache(maxsize=1)
def filled_encoder(model: str, depth: int | None) -> tuple[Encoder, int]:
    """The published encoder with weights by formula, and the number of its tensors."""
    released = find_released(model)
    if depth is not None:
        released = replace(released, config=replace(released.config, depth=depth))
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Encoder(released.config, released.n_channels).state_dict().items()}
    return build_encoder(weights(shapes), released, model), len(shapes)


def outputs_of(encoder: Encoder, case: Case) -> dict[str, Tensor]:
    item = EncoderInput(case.pixels(), channels(case), mask=case.mask())
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        if case.to_the_end:
            (tokens,) = encoder([item])
            found = {"cls": tokens.cls, "patches": tokens.patches}
            if encoder.cfg.n_registers:
                found["registers"] = tokens.registers
        if not case.masked:
            for layer, tokens in zip(case.layers, encoder.intermediates(item, case.layers), strict=True):
                found |= {f"block {layer} cls": tokens.cls, f"block {layer} patches": tokens.patches}
    return found


@lru_cache
def golden(family: str) -> dict[str, Any]:
    page: dict[str, Any] = json.loads((GOLDEN / f"{family}.json").read_text())
    return page


def test_the_twelve_sar_ids_are_told_apart() -> None:
    """Of the same pixels, no two of them give the same token: else the cases below could not notice a swap."""
    (case,) = (c for c in PANOPTICON if c.name == "each sar id")
    pixels = case.pixels()[:1].expand(12, -1, -1, -1)
    with torch.no_grad():
        cls = filled_encoder(case.model, None)[0]([EncoderInput(pixels, channels(case))])[0].cls  # [12, D]
    assert torch.cdist(cls, cls).fill_diagonal_(torch.inf).min() > 1.0


@pytest.mark.parametrize("case", [*PANOPTICON, *DINOV2], ids=lambda case: f"{case.model} {case.name}")
def test_numbers_of_the_published_code(case: Case) -> None:
    encoder, n_tensors = filled_encoder(case.model, case.depth)
    expected = golden(case.model.partition("_")[0])[case.name]
    assert n_tensors == expected["n_tensors"]
    assert sum(p.numel() for p in encoder.parameters()) == expected["n_parameters"]
    found = outputs_of(encoder, case)
    assert found.keys() == expected["outputs"].keys()
    for name, numbers in expected["outputs"].items():
        ours = summary(found[name])
        assert ours["values"] == pytest.approx(numbers["values"], abs=TOLERANCE, rel=0), name
        assert (ours["mean"], ours["std"]) == pytest.approx((numbers["mean"], numbers["std"]), abs=TOLERANCE), name
