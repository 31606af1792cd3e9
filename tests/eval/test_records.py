"""Results on disk: what tells them apart, what replaces what, and the table that other tools read."""

from __future__ import annotations

import csv
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from toy import results

from ssl_eo.eval.record_checks import is_of_evaluation, is_of_training
from ssl_eo.eval.records import (
    PLAN,
    RESULTS,
    add_to_plan,
    append,
    key_of,
    key_of_job,
    merged,
    packed,
    read_plan,
    read_results,
    unmeasured,
    write_csv,
)

FORK = multiprocessing.get_context("fork")
WHOLE = results.record("encoder", results.outcome(30))


def _result(key: str = "a", job: str = "j", **more: Any) -> dict[str, Any]:
    return {**WHOLE, "key": key, "job": job, **more}


def _error(key: str, job: str = "j") -> dict[str, Any]:
    head = {"task": "scenes", "features": "encoder", "model": "a", "date": results.DATE}
    return {"key": key, "kind": "error", "job": job, **head, "error": "OSError: gone"}


def test_a_key_is_of_the_values_and_not_of_their_order() -> None:
    facts = {"weights": "1f", "bands": ["B02", "B03"], "size_px": 64}
    assert key_of(facts) == key_of(dict(reversed(facts.items())))
    others = [{**facts, "size_px": 65}, {**facts, "bands": ["B03", "B02"]}, {**facts, "seed": None}]
    assert len({key_of(f) for f in (facts, *others)}) == 4


def test_the_newest_of_each_key_counts(tmp_path: Path) -> None:
    append(tmp_path, [_result("a", score=1), _result("b", score=2)])
    append(tmp_path, [_result("a", score=3)])
    assert [(r["key"], r["score"]) for r in read_results(tmp_path)] == [("a", 3), ("b", 2)]


def test_there_may_be_nothing_yet_and_half_a_line(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []
    append(tmp_path, [_result("a")])
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"key": "b", "ki')
    append(tmp_path, [_result("c")])
    assert [r["key"] for r in read_results(tmp_path)] == ["a", "c"]
    (tmp_path / RESULTS).write_text('{"step": 3}\n')  # not ours
    assert read_results(tmp_path) == []


def test_an_error_counts_until_it_is_made_good(tmp_path: Path) -> None:
    append(tmp_path, [_error(key_of_job("j")), _error(key_of_job("k"), "k"), {**_error("a"), "probe": "knn"}])
    assert len(read_results(tmp_path)) == 3
    append(tmp_path, [_result("b", probe="ridge")])  # the job works now, but not yet this probe
    assert [(r["key"], r["kind"]) for r in read_results(tmp_path)] == [
        (key_of_job("k"), "error"),
        ("a", "error"),
        ("b", "result"),
    ]
    append(tmp_path, [_result("a", probe="knn")])
    assert [r["kind"] for r in read_results(tmp_path)] == ["error", "result", "result"]


def test_a_later_result_answers_an_error_of_other_data_or_code(tmp_path: Path) -> None:
    asked = {"tap": "last", "probe": "ridge", "partition": "1.00x", "seed": 0}
    append(tmp_path, [{**_error("of old data"), **asked}, {**_error("of old data too"), **asked, "seed": 1}])
    append(tmp_path, [_result("of new data", **asked)])
    assert [r["key"] for r in read_results(tmp_path)] == ["of old data too", "of new data"]
    append(tmp_path, [_result("of another job", "k", **asked, taps=["last"]), {**_error("newer"), **asked}])
    assert [r["key"] for r in read_results(tmp_path)] == ["of old data too", "of new data", "of another job", "newer"]


def test_folders_are_put_together_by_the_rule_by_which_one_is_read(tmp_path: Path) -> None:
    """What happened in one folder, line by line, comes to the same from folders with a line each, by their dates."""
    asked = {"tap": "last", "probe": "ridge", "partition": "1.00x", "seed": 0}
    happened = [
        {**_error("old"), **asked},
        _error(key_of_job("j")),
        _result("a", **asked),
        {**_error("b"), **asked, "seed": 1},
        {**_error("b of other code"), **asked, "seed": 1},
        _error(key_of_job("k"), "k"),
        _result("c", "k", **{**asked, "probe": "knn"}),
        _error(key_of_job("k"), "k"),
    ]
    lines = [{**r, "date": f"2026-01-{day:02}"} for day, r in enumerate(happened, 1)]
    append(tmp_path, lines)
    expected = read_results(tmp_path)
    assert [r["key"] for r in expected] == ["a", "b of other code", "c", key_of_job("k")]
    for order in (lines, lines[::-1], lines[3:] + lines[:3] + lines):
        assert {r["key"]: r for r in merged(order)} == {r["key"]: r for r in expected}


def test_an_error_after_results_of_its_job_is_not_hidden(tmp_path: Path) -> None:
    append(tmp_path, [_result("a"), _error(key_of_job("j"))])
    assert [r["kind"] for r in read_results(tmp_path)] == ["result", "error"]


def test_an_error_that_was_cleared_is_gone_until_it_comes_back(tmp_path: Path) -> None:
    key = key_of_job("j")
    append(tmp_path, [_result("a"), _error(key), {"key": key, "kind": "cleared", "job": "j"}])
    assert [r["kind"] for r in read_results(tmp_path)] == ["result"]
    append(tmp_path, [_error(key)])
    assert [r["kind"] for r in read_results(tmp_path)] == ["result", "error"]


# --- lines that are no records ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "results"},
        {"kind": ["result"]},
        {"key": 3},
        {"task": None},
        {"scores": "high"},
        {"scores": {"macro_f1": 0.5}},
        {"scores": {"accuracy": float("nan")}},
        {"metric": "beauty"},
        {"metric": []},
        {"seed": "0"},
        {"seed": True},
        {"n_test": -1},
        {"n_test": 0},
        {"n_groups": 10**400},
        {"partition": "half"},
        {"partition_of": "mine"},
        {"chosen": [1]},
        {"intervals": {"accuracy": [0.1]}},
        {"resampled": "???"},
        {"resampled": packed([0.5])},
        {"sources": {"train": {"name": "toy"}}},
        {"step": None},
        {"classes": ["one"]},
        {"confusion": [[1]]},
        {"encoder": "tiny"},
        {"flags": "leak"},
        {"data": None},
        {"content": None},
        {"date": None},
    ],
    ids=str,
)
def test_what_is_no_result_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    append(tmp_path, [_result("a"), {**_result("b"), **changes}, _result("c")])
    for _ in range(2):
        assert [r["key"] for r in read_results(tmp_path)] == ["a", "c"]
    path = tmp_path / RESULTS
    assert [r.getMessage() for r in caplog.records] == [f"{path}, line 2: no record of this file; left out"]


def test_a_result_needs_all_its_keys_and_an_error_its_text() -> None:
    assert is_of_evaluation(_result())
    assert is_of_evaluation(_error("a"))
    needed = (
        "job",
        "date",
        "features",
        "probe",
        "tap",
        "subset",
        "size",
        "n_train",
        "weights",
        "chosen",
        "pool",
        "step",
    )
    for key in needed:
        assert not is_of_evaluation({k: v for k, v in _result().items() if k != key}), key
    assert not is_of_evaluation({**_error("a"), "error": None})
    assert not is_of_evaluation({k: v for k, v in _error("a").items() if k != "model"})
    assert not is_of_evaluation({"kind": "cleared", "job": "j"})


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "d\udce9mo"},  # of a folder whose name is not UTF-8
        {"task": "two\nlines"},
        {"classes": ["water", "\x1b[31mland"]},
        {"partition": "0.1x"},  # is called 0.10x
        {"scores": {"accuracy": -5.0}},
        {"scores": {"accuracy": 0.5, "kappa": -1.5}},
        {"scores": {"accuracy": 0.5, "rmse": -0.1}},
        {"scores": {"accuracy": 1e300}},
        {"intervals": {"accuracy": [0.5, 1.5]}},
    ],
    ids=str,
)
def test_names_that_no_table_can_show_and_scores_that_cannot_be_are_no_results(changes: dict[str, Any]) -> None:
    assert not is_of_evaluation(_result(**changes))


def test_scores_at_their_bounds_and_names_in_any_script_are_results() -> None:
    n = len(WHOLE["classes"])
    names = ["\u6c34", "caf\u00e9", "no\u00a0break", *(f"c{i}" for i in range(n))][:n]
    scores = {"accuracy": 1.0 + 1e-9, "kappa": -0.5, "rmse": 1e9, "r2": -40.0, "of a newer version": 7.0}
    assert is_of_evaluation(_result(classes=names, model="\u6a21\u578b", scores=scores))


PROBED = {
    "step": 3,
    "kind": "probe",
    "task": "toy",
    "features": "encoder",
    "tap": "last",
    "probe": "knn",
    "metric": "accuracy",
    "accuracy": 0.5,
    "chosen": {"penalty": 1.0},
    "is_trained": True,
}
HEALTHY = {
    "step": 3,
    "kind": "health",
    "source": "toy",
    "features": "encoder",
    "tap": "last",
    "spread_ratio": 0.3,
    "collapsed": [],
}


def test_records_of_a_training_are_told_from_other_lines() -> None:
    failed = {"step": 0, "kind": "error", "task": "toy", "features": "encoder", "error": "OSError: gone"}
    put_off = {"step": 5, "kind": "skipped", "what": "probes", "reason": "it would take more"}
    for record in (PROBED, HEALTHY, failed, put_off):
        assert is_of_training(record)
        assert not is_of_training({**record, "step": "3"})
        assert not is_of_training({**record, "kind": None})
    for record, changes in (
        (PROBED, {"accuracy": "high"}),
        (PROBED, {"accuracy": 1.5}),
        (PROBED, {"task": "two\nlines"}),
        (PROBED, {"task": 3}),
        (PROBED, {"metric": "macro_f1"}),
        (PROBED, {"metric": "beauty", "beauty": 0.5}),
        (PROBED, {"chosen": []}),
        (HEALTHY, {"spread_ratio": None}),
        (HEALTHY, {"collapsed": "yes"}),
        (HEALTHY, {"source": None}),
        (failed, {"error": None}),
        (failed, {"probe": "knn"}),
    ):
        assert not is_of_training({**record, **changes}), changes
    assert not is_of_training({k: v for k, v in HEALTHY.items() if k != "source"})


# --- what was asked for -----------------------------------------------------------------------------------------------


def _job(name: str = "j", **changes: Any) -> dict[str, Any]:
    head = {"job": name, "task": "scenes", "features": "encoder", "model": "a", "subset": "all", "size": "native"}
    places = [{"tap": "last"}, {"tap": "all", "taps": ["depth_0.50", "last"]}]
    axes = {"places": places, "probes": ["ridge"], "partitions": ["1.00x"], "seeds": [0, 1]}
    return {**head, **axes, **changes}


def test_the_plan_is_what_all_calls_have_asked_for(tmp_path: Path) -> None:
    assert read_plan(tmp_path) == []
    add_to_plan(tmp_path, [_job()])
    add_to_plan(tmp_path, [_job(), _job(seeds=[1, 2])])  # a later call with another question
    assert len((tmp_path / PLAN).read_text().splitlines()) == 2
    asked = read_plan(tmp_path)
    assert [(a["tap"], a.get("taps"), a["seed"]) for a in asked] == [
        ("last", None, 0),
        ("last", None, 1),
        ("all", ["depth_0.50", "last"], 0),
        ("all", ["depth_0.50", "last"], 1),
        ("last", None, 2),
        ("all", ["depth_0.50", "last"], 2),
    ]
    of_last = {"job": "j", "task": "scenes", "features": "encoder", "model": "a", "subset": "all", "size": "native"}
    assert asked[0] == {**of_last, "tap": "last", "probe": "ridge", "partition": "1.00x", "seed": 0}


def test_what_was_asked_for_and_is_not_there_is_known(tmp_path: Path) -> None:
    add_to_plan(tmp_path, [_job(seeds=[0]), _job("no such bands", seeds=[0])])
    plan = read_plan(tmp_path)
    assert unmeasured(plan, []) == plan
    skipped = {**_error(key_of_job("no such bands"), "no such bands"), "kind": "skipped"}
    found = [_result("a", tap="last"), {**_error("b"), "tap": "all", "probe": "ridge"}, skipped]
    (missing,) = unmeasured(plan, found)
    assert (missing["job"], missing["tap"]) == ("j", "all")
    there = _result("b", tap="all", taps=["depth_0.50", "last"])
    assert unmeasured(plan, [*found, there]) == []


def test_odd_lines_of_a_plan_are_left_out(tmp_path: Path) -> None:
    add_to_plan(tmp_path, [_job(places=[3]), _job(job=None), _job(seeds=0), _job()])
    assert len(read_plan(tmp_path)) == 4


N_TOGETHER = 200  # records appended at once, which takes longer than a process is left alone


def _append_many(folder: Path, n_of: int) -> None:
    for i in range(8):
        append(folder, [{"key": f"{n_of}-{i}-{k}", "text": "x" * 2000} for k in range(N_TOGETHER)])


def test_processes_append_beside_each_other(tmp_path: Path) -> None:
    processes = [FORK.Process(target=_append_many, args=(tmp_path, n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    keys = [json.loads(line)["key"] for line in (tmp_path / RESULTS).read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 3 * 8 * N_TOGETHER
    for i in range(0, len(keys), N_TOGETHER):  # what is appended together stays together
        head = keys[i].rpartition("-")[0]
        assert keys[i : i + N_TOGETHER] == [f"{head}-{k}" for k in range(N_TOGETHER)]


def _measured(**changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "task": "scenes",
        "features": "encoder",
        "model": "run",
        "tap": "last",
        "probe": "logistic",
        "metric": "accuracy",
        "scores": {"accuracy": 0.75, "macro_f1": 0.5},
        "intervals": {"accuracy": [0.7, 0.8]},
        "chosen": {"lambda": 0.01, "penalty": 2.0},
        "n_features": 64,
        "n_train": 100,
        "n_val": 0,
        "n_test": 50,
        "n_groups": 50,
        "seed": 3,
        "normalization": "task",
        "size_px": 64,
        "interpolation": "bicubic",
        "partition": "0.10x",
        "subset": "rgb",
        "n_resamples": 1000,
        "pool": "cls",
        "step": 40,
        "weights": "11aa",
    }
    return _result(**{**record, **changes})


def _rows(path: Path, *records: dict[str, Any]) -> list[dict[str, str]]:
    write_csv(path, records)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_has_the_columns_of_torchgeo_bench(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "results.csv", _measured(), _error("e"))
    header = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert header == (
        "dataset,method,metric_name,metric_value,ci_lower,ci_upper,feature_dim,best_c,best_lr,best_batch_size,n_train,"
        "n_val,n_test,seed,model,name,normalization,image_size,interpolation,partition,bands,bootstrap,c_range,merge_val"
        ",tap,pool,step,weights"
    )
    (row,) = rows
    expected = {"dataset": "scenes", "method": "logistic", "metric_name": "accuracy", "metric_value": "0.75"}
    expected |= {"ci_lower": "0.7", "ci_upper": "0.8", "best_c": "0.5", "best_lr": "", "seed": "3", "model": "run"}
    expected |= {"name": "run/encoder/last", "partition": "0.10x", "bands": "rgb", "image_size": "64"}
    expected |= {"tap": "last", "pool": "cls", "step": "40", "weights": "11aa"}
    assert {key: row[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"probe": "ridge"}, {"best_c": ""}),  # a penalty of another loss
        ({"chosen": {"lr": 0.1}, "probe": "linear"}, {"best_lr": "0.1", "best_batch_size": "", "c_range": ""}),
        ({"intervals": {}}, {"ci_lower": "", "ci_upper": ""}),
        (
            {"features": "band_statistics", "model": None, "tap": "pixels", "pool": None},
            {"model": "band_statistics", "name": "band_statistics/pixels", "tap": "pixels", "pool": ""},
        ),
    ],
)
def test_what_a_result_lacks_is_empty(tmp_path: Path, changes: dict[str, Any], expected: dict[str, str]) -> None:
    (row,) = _rows(tmp_path / "results.csv", _measured(**changes))
    assert {key: row[key] for key in expected} == expected
