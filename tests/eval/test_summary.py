"""What is compared with what: decided once, for the printed table and for the page."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from ssl_eo.eval.comparison import Margin
from ssl_eo.eval.report import write_report
from ssl_eo.eval.summary import Summary, read_task_records, summarise
from ssl_eo.eval.table import print_summary


def _probe(features: str, step: int, accuracy: float, tap: str = "last", probe: str = "ridge") -> dict[str, Any]:
    head = {"task": "t", "kind": "probe", "features": features, "step": step, "tap": tap, "probe": probe}
    return {**head, "metric": "accuracy", "accuracy": accuracy, "macro_accuracy": accuracy}


def _error(features: str, step: int) -> dict[str, Any]:
    return {"task": "t", "kind": "error", "features": features, "step": step, "error": "OSError: gone"}


RESULTS = (
    _probe("encoder", 0, 0.40),
    _probe("encoder", 0, 0.45, tap="depth_0.50"),
    _probe("band_statistics", 0, 0.55, tap="pixels"),
    _probe("encoder", 10, 0.99),
    _probe("encoder", 20, 0.70, tap="depth_0.50"),
    _probe("encoder", 20, 0.60),
    _probe("encoder", 20, 0.50, probe="knn"),
)


def _summary(folder: Path, *records: dict[str, Any]) -> Summary:
    path = folder / "eval.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    (summary,) = summarise(read_task_records(path))
    return summary


def test_rows_and_margins(tmp_path: Path) -> None:
    summary = _summary(tmp_path, *RESULTS)
    assert [(row.title, row.tap) for row in summary.rows] == [
        ("encoder, step 20", "depth_0.50"),
        ("encoder, step 20", "last"),
        ("random encoder", "last"),
        ("random encoder", "depth_0.50"),
        ("band statistics", "pixels"),
    ]
    # Our tap is the last layer though another one is better; a rival's is its best. No rival has a kNN result.
    assert summary.margins == [
        Margin("ridge", "accuracy", 0.60, "random encoder", "random", 0.45),
        Margin("ridge", "accuracy", 0.60, "band statistics", "control", 0.55),
    ]
    together = _summary(tmp_path, *RESULTS, _probe("encoder", 20, 0.58, tap="all"))
    assert together.final is not None
    assert together.final.tap == "all"
    inside = _summary(tmp_path, *(_probe("encoder", 20, 0.5, tap=f"depth_{t}") for t in ("0.25", "0.75", "0.50")))
    assert inside.final is not None
    assert inside.final.tap == "depth_0.75"


def test_table_and_page_say_the_same(tmp_path: Path) -> None:
    summary = _summary(tmp_path, *RESULTS)
    (tmp_path / "config.yaml").write_text("{}")
    html = write_report(tmp_path).read_text()
    stream = io.StringIO()
    assert print_summary(read_task_records(tmp_path / "eval.jsonl"), stream)
    for text in (html, stream.getvalue()):
        for row in summary.rows:
            assert row.title in text
        assert "before training" not in text
    closest = min(summary.margins, key=lambda m: m.gain)
    assert closest.text == "+5.0 points"
    assert f"margin over {closest.rival}: ridge {closest.text}" in stream.getvalue()
    (verdict,) = re.findall(r'class="verdict">(.*?)</p>', html, re.DOTALL)
    for margin in (closest, *(m for m in summary.margins if m.rival == "random encoder" and m.probe == "ridge")):
        assert f"{margin.text} over {margin.rival}" in verdict


def test_a_run_that_has_only_begun_is_compared_with_nothing(tmp_path: Path) -> None:
    summary = _summary(tmp_path, _probe("encoder", 0, 0.4), _probe("band_statistics", 0, 0.55, tap="pixels"))
    assert [row.title for row in summary.rows] == ["random encoder", "band statistics"]
    assert summary.final is None
    assert summary.margins == summary.failures == []


def test_the_last_step_that_could_be_measured_counts_and_the_failure_is_named(tmp_path: Path) -> None:
    summary = _summary(tmp_path, _probe("encoder", 0, 0.4), _probe("encoder", 10, 0.6), _error("encoder", 20))
    assert summary.rows[0].title == "encoder, step 10"
    assert summary.failures == ["encoder, step 20 could not be measured: OSError: gone"]


def test_a_failure_that_was_made_good_is_none(tmp_path: Path) -> None:
    again = (_error("encoder", 20), _error("band_statistics", 0), _probe("encoder", 20, 0.6))
    summary = _summary(tmp_path, *again, _probe("band_statistics", 20, 0.5, tap="pixels"))
    assert summary.failures == []


def test_one_result_written_twice_counts_once_and_half_lines_never(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    lines = [json.dumps(r) for r in (_probe("encoder", 5, 0.1), {"step": 3}, _probe("encoder", 5, 0.2))]
    path.write_text("\n".join(lines) + '\n{"step": 7, "ta')
    (record,) = read_task_records(path)
    assert record["accuracy"] == 0.2


def test_of_errors_the_smaller_one_is_better(tmp_path: Path) -> None:
    def of(features: str, step: int, rmse: float, tap: str = "last") -> dict[str, Any]:
        return {**_probe(features, step, 0.0, tap), "metric": "rmse", "rmse": rmse}

    rivals = (of("encoder", 0, 3.0), of("encoder", 0, 2.5, tap="depth_0.50"), of("band_statistics", 0, 1.5, "pixels"))
    summary = _summary(tmp_path, *rivals, of("encoder", 20, 2.0))
    random, bands = summary.margins
    assert (random.rival_score, bands.rival_score) == (2.5, 1.5)
    assert (random.text, bands.text) == ("+0.5", "-0.5")  # above 0 where the encoder is better, in the unit of targets


def test_a_probe_that_fails_is_named_though_others_of_its_row_do_not(tmp_path: Path) -> None:
    failed = {**_error("encoder", 20), "tap": "last", "probe": "logistic"}
    summary = _summary(tmp_path, failed, _probe("encoder", 20, 0.6))
    assert summary.failures == ["encoder, step 20: logistic at the last block could not be measured: OSError: gone"]
    made_good = _summary(tmp_path, failed, _probe("encoder", 20, 0.6, probe="logistic"))
    assert made_good.failures == []


def test_what_only_failed_has_the_metric_that_its_errors_name_or_none(tmp_path: Path) -> None:
    assert _summary(tmp_path, _error("encoder", 20)).metric == ""
    assert _summary(tmp_path, {**_error("encoder", 20), "metric": "miou_present"}).metric == "miou_present"
