"""Features of a split: each sample's own, whatever the batches are and whichever samples are left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy import scenes

from ssl_eo.data.plans import whole
from ssl_eo.eval.features import extract
from ssl_eo.eval.splits import Shown, Split
from ssl_eo.models.vit import EncoderInput

CPU = torch.device("cpu")


def _split(**options: object) -> Split:
    source = scenes.Source(scenes.Config(**{"n": 250, **options}))  # type: ignore[arg-type]
    shown = Shown("toy", "rgb", source.schema["rgb"], whole("rgb", (8, 8), 8), "classification", 3)
    return Split("train", source, shown, None)


def _taps(inputs: EncoderInput) -> dict[str, Tensor]:
    pixels = inputs.pixels  # [B, 3, 8, 8]
    cells = pixels.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))  # [B, 3, 2, 2]
    return {"mean": pixels.mean((2, 3)).half(), "cells": cells.movedim(1, 3)}


def test_features_are_those_of_their_samples_without_those_left_out() -> None:
    found = extract(_taps, _split(broken=[7, 130]), CPU, batch_size=32)
    assert len(found) == 248
    assert {name: f.shape for name, f in found.taps.items()} == {"mean": (248, 3), "cells": (248, 2, 2, 3)}
    assert {f.dtype for f in found.taps.values()} == {torch.float32}
    expected: dict[str, list[Tensor]] = {"mean": [], "cells": []}
    for batch in _split().stream(1, CPU):  # one at a time, put together as they come
        if batch.keys != ["toy-0-007"] and batch.keys != ["toy-0-130"]:
            for name, features in _taps(batch.inputs).items():
                expected[name].append(features.float())
    for name, parts in expected.items():
        torch.testing.assert_close(found.taps[name], torch.cat(parts), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.taps["cells"], torch.cat(expected["cells"]), rtol=1e-6, atol=1e-6)


def test_features_lie_where_they_were_first_written() -> None:
    """A second copy of those of all patches is what runs out of memory."""
    found = extract(_taps, _split(broken=[7]), CPU, batch_size=32)
    for features in found.taps.values():
        assert features.untyped_storage().nbytes() == 250 * features[0].numel() * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tap_that_is_not_finite_is_named(value: float) -> None:
    def broken(inputs: EncoderInput) -> dict[str, Tensor]:
        return {"good": inputs.pixels.mean((2, 3)), "bad": torch.full((len(inputs.pixels), 2), value)}

    with pytest.raises(ValueError, match="features of tap 'bad' are not finite"):
        extract(broken, _split(), CPU)
