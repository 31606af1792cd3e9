"""Probing a finished encoder: beside random weights and pixel statistics, and a table that says who is ahead."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import scenes

from ssl_eo.data.opening import SourceConfig
from ssl_eo.eval.controls import CONTROLS
from ssl_eo.eval.hook import EvalConfig
from ssl_eo.eval.offline import evaluate, print_summary
from ssl_eo.eval.tasks import TaskConfig
from ssl_eo.jsonl import read_jsonl
from ssl_eo.models.vit import Encoder, EncoderConfig

STEP = 1500


def _task(name: str = "toy", **changes: Any) -> TaskConfig:
    train, test = (SourceConfig("toy.scenes", scenes.Config(n=60, seed=seed, **changes)) for seed in (0, 1))
    return TaskConfig(name, train, test, max_train=45, max_test=30)


def _encoder(fill: float | None = None) -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(EncoderConfig(embed_dim=16, depth=2, n_heads=2, patch_size=4, patch_embed="conv"), n_channels=3)
    encoder.init_weights()
    if fill is not None:
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.fill_(fill)
    return encoder


def _evaluate(encoder: Encoder, out: Path, **changes: Any) -> list[dict[str, Any]]:
    cfg = EvalConfig(**{"every_n_steps": 1, "tasks": [_task()], **changes})
    evaluate(encoder, STEP, cfg, out)
    return read_jsonl(out / "eval.jsonl")


def _summary(path: Path) -> tuple[str, bool]:
    stream = io.StringIO()
    complete = print_summary(path, stream)
    return stream.getvalue(), complete


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of an encoder that says the same of every image: chance is all it reaches."""
    out = tmp_path_factory.mktemp("constant")
    _evaluate(_encoder(fill=0.1), out)
    return out / "eval.jsonl"


def test_encoder_random_weights_and_controls_are_probed(constant: Path) -> None:
    probes = [r for r in read_jsonl(constant) if r["kind"] == "probe"]
    rows = {(r["features"], r["step"]) for r in probes}
    assert rows == {("encoder", STEP), ("encoder", 0), *((name, 0) for name in CONTROLS)}
    assert len(probes) == 2 * len(rows)  # kNN and ridge of each
    accuracy = {(r["features"], r["step"]): r["accuracy"] for r in probes if r["probe"] == "ridge"}
    assert accuracy["encoder", STEP] == pytest.approx(1 / 3, abs=0.1)
    assert accuracy["encoder", 0] > 0.8  # the toy's classes differ in mean colour
    assert accuracy["band_statistics", 0] > 0.8


def test_evaluation_leaves_the_encoder_alone_and_repeats(tmp_path: Path) -> None:
    encoder = _encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    first = _evaluate(encoder, tmp_path / "a" / "below")
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    torch.manual_seed(5)  # the random encoder does not depend on the state of the generator
    second = _evaluate(encoder, tmp_path / "b")
    assert _without_times(first) == _without_times(second)


def _without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_worse_than_its_rivals_has_negative_margins(constant: Path) -> None:
    text, complete = _summary(constant)
    assert complete
    assert "toy: accuracy of frozen features" in text
    for row in ("encoder, step 1,500", "random encoder", "band statistics", "random convolution"):
        assert row in text
    ridge = {r["features"]: r["accuracy"] for r in read_jsonl(constant) if r.get("probe") == "ridge" and not r["step"]}
    ours = [r["accuracy"] for r in read_jsonl(constant) if r.get("probe") == "ridge" and r["step"]]
    margin = 100 * (ours[0] - ridge["band_statistics"])
    assert margin < -30
    (line,) = [line for line in text.splitlines() if "margin over band statistics" in line]
    assert line.endswith(f"ridge {margin:+.1f} points")


def _write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"task": "t", "kind": "probe", "tap": "last", **r}) + "\n" for r in records))
    return path


def _probe(features: str, step: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"features": features, "step": step, "probe": "ridge", "accuracy": accuracy, **more}


def test_margin_is_of_the_last_step_and_the_best_tap(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "eval.jsonl",
        _probe("encoder", 0, 0.40),
        _probe("band_statistics", 0, 0.55, tap="pixels"),
        _probe("encoder", 10, 0.99),
        _probe("encoder", 20, 0.60),
        _probe("encoder", 20, 0.50, tap="depth_0.50"),
    )
    text, complete = _summary(path)
    assert complete
    assert "  margin over random encoder: ridge +20.0 points\n" in text
    assert "  margin over band statistics: ridge +5.0 points\n" in text
    assert "99.0 %" not in text
    assert [cell in text for cell in ("60.0 %", "50.0 %", "40.0 %", "55.0 %")] == [True] * 4
    assert text.index("60.0 %") < text.index("40.0 %")  # ours comes first


def test_long_names_and_odd_characters_are_shown_whole(tmp_path: Path) -> None:
    name = "a_benchmark_whose_name_is_longer_than_most_and_ends_in_[/brackets]_of_some_kind_or_another"
    path = _write(tmp_path / "eval.jsonl", _probe("encoder", 5, 0.5, task=name, probe="a" * 70))
    text, _ = _summary(path)
    assert f"{name}: accuracy of frozen features" in text


def test_task_that_fails_makes_the_summary_incomplete(tmp_path: Path) -> None:
    tasks = [_task("whole"), _task("broken", broken=list(range(60)))]
    _evaluate(_encoder(), tmp_path, tasks=tasks, controls=False)
    text, complete = _summary(tmp_path / "eval.jsonl")
    assert not complete
    whole, broken = text.split("broken: accuracy")
    assert "margin over random encoder" in whole
    assert "could not be measured" not in whole
    assert "encoder, step 1,500 could not be measured: ValueError: task broken: train has 0 readable samples" in broken
    assert "margin" not in broken


def test_control_that_fails_is_named(tmp_path: Path) -> None:
    failed = {"features": "band_statistics", "step": 0, "kind": "error", "error": "RuntimeError: no memory for [/x]"}
    path = _write(tmp_path / "eval.jsonl", _probe("encoder", 0, 0.4), failed, _probe("encoder", 9, 0.5))
    text, complete = _summary(path)
    assert not complete
    assert "  band statistics could not be measured: RuntimeError: no memory for [/x]\n" in text


def test_failure_that_a_later_step_made_good_does_not_count(tmp_path: Path) -> None:
    failed = {"features": "encoder", "step": 10, "kind": "error", "error": "OSError: gone"}
    path = _write(tmp_path / "eval.jsonl", _probe("encoder", 0, 0.4), failed, _probe("encoder", 20, 0.5))
    text, complete = _summary(path)
    assert complete
    assert "gone" not in text
