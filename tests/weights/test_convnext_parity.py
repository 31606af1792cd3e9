"""Our ConvNeXt V2 computes what timm's does, from the same weights and inputs, under timm's names of them.

The numbers in `golden` are timm's, by `make_convnext_golden.py` beside this file: weights and inputs come from the
formula in `released_formula.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from released_formula import summary, uniform, weights

from ssl_eo.adapt.eos_fm import from_timm
from ssl_eo.models.convnext import ConvNeXt, ConvNeXtConfig

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "convnextv2_atto.json").read_text())


def timm_shapes(n_channels: int) -> dict[str, tuple[int, ...]]:
    """timm's names and shapes, which are listed for three channels."""
    shapes = {name: tuple(shape) for name, shape in GOLDEN["rgb"]["shapes"].items()}
    width = shapes["stem_0.weight"][0]
    return {**shapes, "stem_0.weight": (width, n_channels, 4, 4)}


@pytest.mark.parametrize("name", GOLDEN)
def test_maps_of_all_levels_are_those_of_timm(name: str) -> None:
    case = GOLDEN[name]
    encoder = ConvNeXt(ConvNeXtConfig(), case["n_channels"])
    encoder.load_state_dict(from_timm(weights(timm_shapes(case["n_channels"]))), strict=True)
    with torch.no_grad():
        maps = encoder.eval()(uniform(f"pixels {name}", (2, case["n_channels"], *case["size"])))
    assert encoder.cfg.widths == (40, 80, 160, 320)
    for found, expected in zip(maps, case["levels"], strict=True):
        assert list(found.shape) == expected["shape"]
        got = summary(found)
        scale = expected["std"]
        torch.testing.assert_close(
            torch.tensor(got["values"]), torch.tensor(expected["values"]), atol=2e-5 * scale, rtol=0
        )
        assert got["mean"] == pytest.approx(expected["mean"], abs=1e-5 * scale)
        assert got["std"] == pytest.approx(scale, rel=1e-5)
