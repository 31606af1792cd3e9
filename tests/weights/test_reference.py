"""Reference outputs: every published architecture has them, this machine gives them, another would be noticed."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_eo.cli import main
from ssl_eo.weights import _reference, base
from ssl_eo.weights._formula import uniform, weight
from ssl_eo.weights._reference import compare, outputs_of, reference_names, reference_of
from ssl_eo.weights.croma import PAIRS

ROOT = Path(__file__).parent.parent.parent
SMALL = ("dinov2_vits14", "prithvi_eo_v2_tiny_tl")  # whole in half a second
TINY = SMALL[1]
ALL = reference_names()
MOST_WIDTH = 768  # of those that are computed whole here; `ssl-eo doctor --models` does it for all


def test_every_published_architecture_has_one() -> None:
    """Whatever `--as` and torch.hub know."""
    assert set(ALL) == {*(one.name for one in base._all_released()), *PAIRS}
    assert len(ALL) == 31


def test_the_formula_gives_these_bits() -> None:
    """What it gives is in files that others hold their machines against."""
    kinds = ("cls_token", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight", "norm.bias", "blocks.0.ls1.gamma")
    values = torch.cat([uniform("images", (2, 3)).flatten(), *(weight(kind, (4, 9)).flatten() for kind in kinds)])
    assert values[:2].tolist() == [1.069527268409729, 0.5336828231811523]
    assert hashlib.sha256(bytes(values.untyped_storage())).hexdigest()[:16] == "c4137bf1131c50c3"


@pytest.mark.parametrize("name", ALL)
def test_the_first_block_of_each(name: str) -> None:
    """Cut to one block, of two encoders to one each: the embedding, positions and norms of each are whole."""
    found = compare(name, depth=2 if name in PAIRS else 1)
    assert found.is_same, found
    assert found.output.endswith("after block 0")


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_whole(name: str) -> None:
    found = compare(name)
    assert found.is_same, found
    assert set(outputs_of(name)) == set(reference_of(name)["outputs"])


def _width(name: str) -> int:
    return (PAIRS[name] if name in PAIRS else base.find_released(name)).config.width


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in SMALL and _width(name) <= MOST_WIDTH])
def test_those_of_middle_size_whole(name: str) -> None:
    found = compare(name)
    assert found.is_same, found


def test_what_is_kept_of_each_output() -> None:
    for name in ALL:
        page = reference_of(name)
        assert page["tolerance"] == 1e-4
        for output in page["outputs"].values():
            assert len(output["values"]) == 24
            assert all(math.isfinite(value) for value in (*output["values"], output["mean"]))
            assert 0.5 < output["std"] < 10.0  # a tolerance says something
    assert (ROOT / "ssl_eo" / "weights" / "reference_outputs.json").stat().st_size < 100_000


def _change(name: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine with another value of the weights `name`."""
    plain = _reference.weight
    monkeypatch.setattr(
        _reference, "weight", lambda n, shape: change(plain(n, shape)) if n == name else plain(n, shape)
    )


@pytest.mark.parametrize(
    ("weights", "change"),
    [
        ("patch_embed.proj.weight", lambda value: value.flip(1)),  # bands in another order
        ("blocks.11.attn.proj.bias", lambda value: value * 1.01),
        ("location_encoding.scale", lambda value: value + 0.01),
        ("norm.bias", lambda value: value.fill_(torch.nan)),
    ],
)
def test_another_computation_is_noticed(weights: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _change(weights, change, monkeypatch)
    found = compare(TINY)
    assert not found.is_same
    assert found.output in reference_of(TINY)["outputs"]


def test_outputs_of_another_shape_or_name_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = reference_of(TINY)["outputs"]
    with monkeypatch.context() as patch:
        patch.setitem(outputs["hls tokens"], "shape", [2, 12, 192])
        found = compare(TINY)
        assert (found.is_same, found.output) == (False, "hls tokens")
        assert math.isnan(found.worst)
    monkeypatch.setitem(outputs, "hls more", outputs["hls tokens"])
    assert not compare(TINY).is_same
    assert compare(TINY, depth=1).is_same


# --- ssl-eo doctor --models -------------------------------------------------------------------------------------------


def test_doctor_says_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--models", TINY]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{TINY}: ok, hls ")
    assert line.endswith("away from the reference at most, allowed are 0.0001")


def test_doctor_says_which_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _change("norm.bias", lambda value: value + 1.0, monkeypatch)
    assert main(["doctor", "--models", TINY]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{TINY}: wrong, hls ")
    assert line.endswith("; this machine computes something else: try another build of torch")
    assert main(["doctor", "--json", "--models", TINY]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], [found["status"] for found in said["findings"]]) == (False, ["wrong"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--models", "prithvi_tiny"], "no reference outputs of 'prithvi_tiny'"),
        (["debug/mae", "--models"], "--models looks at no paths, got debug/mae: leave it out, or --models"),
    ],
)
def test_doctor_refuses_in_one_line(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
