"""Features of a split: each sample's own, whatever the batches are and whichever samples are left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy import scenes

from ssl_eo.data.plans import whole
from ssl_eo.eval.dense import PatchDraw
from ssl_eo.eval.features import ALL_TAPS, FeatureSet, Precision, extract, in_precision
from ssl_eo.eval.splits import Shown, Split
from ssl_eo.models.vit import EncoderInput, Tokens
from ssl_eo.sensors import load_sensor

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


def _segmented(**options: object) -> Split:
    source = scenes.Source(scenes.Config(**{"n": 40, "kind": "segmentation", **options}))  # type: ignore[arg-type]
    shown = Shown("toy", "rgb", source.schema["rgb"], whole("rgb", (8, 8), 8), "segmentation", 3, scenes.UNLABELLED)
    return Split("train", source, shown, None)


def _cells(inputs: EncoderInput) -> dict[str, Tensor]:
    return {"cells": _taps(inputs)["cells"]}


def test_patches_that_are_drawn_alone_are_kept() -> None:
    every = extract(_cells, _segmented(), CPU, batch_size=7)
    drawn = extract(_cells, _segmented(), CPU, batch_size=16, draw=PatchDraw(3, scenes.UNLABELLED, seed=0))
    assert (every.grid, drawn.grid, every.places) == ((2, 2), (2, 2), None)
    assert drawn.places is not None
    assert drawn.taps["cells"].shape == (40, 3, 3)
    assert drawn.taps["cells"].untyped_storage().nbytes() == 40 * 3 * 3 * 4
    for i, places in enumerate(drawn.places.tolist()):
        rows = torch.tensor([4 * i + place for place in places])
        of_image = torch.arange(3 * i, 3 * i + 3)
        torch.testing.assert_close(drawn.at("cells", of_image), every.at("cells", rows), rtol=1e-5, atol=1e-6)


def test_rows_of_taps_are_given_on_demand() -> None:
    found = extract(_taps, _split(n=9), CPU)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(found.at("mean", rows), found.taps["mean"][rows])
    found = FeatureSet({"a": torch.rand(9, 3), "b": torch.rand(9, 2).half()}, *[[]] * 4)  # type: ignore[arg-type]
    both = found.at(ALL_TAPS, rows)
    assert both.dtype == torch.float32
    assert torch.equal(both, torch.cat([found.taps["a"][rows], found.taps["b"][rows].float()], 1))
    assert torch.equal(found.evenly("a", 100), found.taps["a"])
    assert torch.equal(found.evenly("a", 3), found.taps["a"][[0, 4, 8]])


def test_many_patches_are_kept_in_sixteen_bits_as_far_as_these_go(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = extract(_cells, _segmented(), CPU).taps["cells"]
    monkeypatch.setattr("ssl_eo.eval.features._MAX_FLOAT32_BYTES", 40 * 4 * 3 * 4 - 1)
    halved = extract(_cells, _segmented(), CPU)
    assert halved.taps["cells"].dtype == torch.float16
    torch.testing.assert_close(halved.at("cells", torch.arange(160)), exact.flatten(0, -2), rtol=1e-3, atol=1e-4)
    few = extract(_cells, _segmented(), CPU, draw=PatchDraw(1, scenes.UNLABELLED, 0))
    assert few.taps["cells"].dtype == torch.float16  # by the number of all, whichever are kept
    monkeypatch.setattr("ssl_eo.eval.features._MAX_FLOAT32_BYTES", 0)
    assert extract(_taps, _split(), CPU).taps["mean"].dtype == torch.float32  # of images

    def large(inputs: EncoderInput) -> dict[str, Tensor]:
        return {"cells": 1e6 * _taps(inputs)["cells"]}

    found = extract(large, _segmented(), CPU, batch_size=8)
    assert found.taps["cells"].dtype == torch.float32
    torch.testing.assert_close(found.taps["cells"], 1e6 * exact)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_encoders_run_in_the_precision_that_is_asked_for(precision: Precision) -> None:
    seen: list[torch.dtype] = []

    def encode(inputs: EncoderInput) -> list[Tokens]:
        seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return []

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "float32"):  # whatever is set around it
        in_precision(encode, precision, CPU)(EncoderInput(torch.zeros(1, 3, 8, 8), load_sensor("rgb").channel_meta()))
    assert seen == [getattr(torch, precision)]


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
