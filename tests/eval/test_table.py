"""The tables in a terminal: which rows, whose margins, and what is said below them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from toy.results import outcome, problem, record

from ssl_eo.eval.summary import read_task_records
from ssl_eo.eval.table import print_summary, rows_of_results


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
    remark = (
        "  ridge took the first or the last option of its grid (beyond it may be a slightly better score) for encoder,"
        " step 20 at depth 0.50, texture statistics at pixels\n"
    )
    assert remark in text
    assert "step 10 at" not in text


def test_conditions_are_named_and_seeds_averaged() -> None:
    right = {("0.10x", 0): 30, ("0.10x", 1): 36, ("1.00x", 0): 45, ("1.00x", 1): 45}
    records = [
        record(f, outcome(n), partition=part, seed=seed, size="native")
        for (part, seed), n in right.items()
        for f in ("encoder", "band_statistics")
    ]
    text, complete = _summary(rows_of_results(records))
    assert complete
    seeds = "accuracy of frozen features, mean of 2 seeds ± their standard deviation"
    assert [line for line in text.splitlines() if "frozen" in line] == [
        f"scenes, labels 0.10x: {seeds}",
        f"scenes, labels 1.00x: {seeds}",
    ]
    assert text.count("55.0 % ± 7.1") == 2  # 50 and 60, of both rows
    assert text.count("75.0 %") == 2
    assert "75.0 % ±" not in text  # no seed differs


def test_means_over_unequal_numbers_of_seeds_are_of_up_to_so_many() -> None:
    records = [record("encoder", outcome(30), seed=seed) for seed in range(3)] + [record("band_statistics", outcome(9))]
    text, _ = _summary(rows_of_results(records))
    assert text.startswith("scenes: accuracy of frozen features, mean of up to 3 seeds ± their standard deviation\n")


def test_a_model_is_called_by_its_name_and_is_no_control_of_that_name() -> None:
    records = [record("encoder", outcome(45), "band statistics")]
    records += [record(f, outcome(30)) for f in ("random_encoder", "band_statistics")]
    text, _ = _summary(rows_of_results(records))
    rows = [line for line in text.splitlines() if " %" in line]
    assert [re.findall(r"[a-z][a-z ]+[a-z]|[\d.]+ %", line) for line in rows] == [
        ["band statistics", "the last block", "75.0 %"],
        ["random encoder", "the last block", "50.0 %"],
        ["band statistics", "pixels", "50.0 %"],
    ]
    assert "step" not in text
    assert "margin over band statistics: ridge +25.0 points" in text


def test_a_seed_that_fails_is_named_behind_those_that_did_not() -> None:
    records = [record("random_encoder", outcome(30), seed=0)]
    failed = {"features": "random_encoder", "subset": "all", "seed": 1}
    text, complete = _summary(rows_of_results([problem("error", "OSError: gone", **failed), *records]))
    assert not complete
    assert "50.0 %" in text
    assert "random encoder could not be measured: OSError: gone (seed 1)" in text


def test_a_task_that_failed_is_called_so_and_has_no_table() -> None:
    maps = {"metric": "miou_present"}
    for changes in ({}, maps):
        text, complete = _summary(rows_of_results([problem("error", "OSError: gone", task="maps", **changes)]))
        assert not complete
        assert text == "maps: failed\n  a could not be measured: OSError: gone\n"


def test_depths_are_called_by_their_names(tmp_path: Path) -> None:
    records = _written(tmp_path / "eval.jsonl", *(_probe("encoder", 9, 0.5, tap=tap) for tap in ("all", "last")))
    text, _ = _summary(records)
    assert "all depths together" in text
    assert "the last block" in text
