"""The tables in a terminal: which rows, whose margins, and what is said below them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ssl_eo.eval.summary import read_task_records
from ssl_eo.eval.table import print_summary


def _summary(records: list[Any]) -> tuple[str, bool]:
    stream = io.StringIO()
    complete = print_summary(records, stream)
    return stream.getvalue(), complete


def _written(path: Path, *records: dict[str, Any]) -> list[Any]:
    """What is read of the results of a training run."""
    path.write_text("".join(json.dumps({"task": "t", "kind": "probe", "tap": "last", **r}) + "\n" for r in records))
    return list(read_task_records(path))


def _probe(features: str, step: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"features": features, "step": step, "probe": "ridge", "metric": "accuracy", "accuracy": accuracy, **more}


def test_margin_is_of_the_last_step_and_the_best_tap(tmp_path: Path) -> None:
    records = _written(
        tmp_path / "eval.jsonl",
        _probe("encoder", 0, 0.40),
        _probe("band_statistics", 0, 0.55, tap="pixels"),
        _probe("encoder", 10, 0.99),
        _probe("encoder", 20, 0.60),
        _probe("encoder", 20, 0.50, tap="depth_0.50"),
    )
    text, complete = _summary(records)
    assert complete
    assert "  margin over random encoder: ridge +20.0 points\n" in text
    assert "  margin over band statistics: ridge +5.0 points\n" in text
    assert "99.0 %" not in text
    assert [cell in text for cell in ("60.0 %", "50.0 %", "40.0 %", "55.0 %")] == [True] * 4
    assert text.index("60.0 %") < text.index("40.0 %")  # ours comes first


def test_long_names_and_odd_characters_are_shown_whole(tmp_path: Path) -> None:
    name = "a_benchmark_whose_name_is_longer_than_most_and_ends_in_[/brackets]_of_some_kind_or_another"
    records = _written(tmp_path / "eval.jsonl", _probe("encoder", 5, 0.5, task=name, probe="a" * 70))
    text, _ = _summary(records)
    assert f"{name}: accuracy of frozen features" in text


def test_control_that_fails_is_named(tmp_path: Path) -> None:
    failed = {"features": "band_statistics", "step": 0, "kind": "error", "error": "RuntimeError: no memory for [/x]"}
    records = _written(tmp_path / "eval.jsonl", _probe("encoder", 0, 0.4), failed, _probe("encoder", 9, 0.5))
    text, complete = _summary(records)
    assert not complete
    assert "  band statistics could not be measured: RuntimeError: no memory for [/x]\n" in text


def test_failure_that_a_later_step_made_good_does_not_count(tmp_path: Path) -> None:
    failed = {"features": "encoder", "step": 10, "kind": "error", "error": "OSError: gone"}
    records = _written(tmp_path / "eval.jsonl", _probe("encoder", 0, 0.4), failed, _probe("encoder", 20, 0.5))
    text, complete = _summary(records)
    assert complete
    assert "gone" not in text


def test_a_choice_at_the_end_of_a_grid_is_remarked(tmp_path: Path) -> None:
    records = _written(
        tmp_path / "eval.jsonl",
        _probe("encoder", 0, 0.40, chosen={"lambda": 1.0, "at_edge": 0.0}),
        _probe("encoder", 10, 0.50, chosen={"lambda": 1e-6, "at_edge": 1.0}),
        _probe("encoder", 20, 0.60, tap="depth_0.50", chosen={"lambda": 1e-6, "at_edge": 1.0}),
        _probe("texture_statistics", 0, 0.60, tap="pixels", chosen={"lambda": 1e3, "at_edge": 1.0}),
    )
    text, complete = _summary(records)
    assert complete
    remark = "  ridge chose the end of its grid for encoder, step 20 at depth 0.50, texture statistics at pixels\n"
    assert remark in text
    assert "step 10 at" not in text
