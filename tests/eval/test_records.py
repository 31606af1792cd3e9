"""Results on disk: what tells them apart, what replaces what, and the table that other tools read."""

from __future__ import annotations

import csv
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from ssl_eo.eval.records import RESULTS, append, key_of, key_of_job, read_results, write_csv

FORK = multiprocessing.get_context("fork")


def _result(key: str = "a", job: str = "j", **more: Any) -> dict[str, Any]:
    return {"key": key, "kind": "result", "job": job, **more}


def _error(key: str, job: str = "j") -> dict[str, Any]:
    return {"key": key, "kind": "error", "job": job, "error": "OSError: gone"}


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


def test_an_error_after_results_of_its_job_is_not_hidden(tmp_path: Path) -> None:
    append(tmp_path, [_result("a"), _error(key_of_job("j"))])
    assert [r["kind"] for r in read_results(tmp_path)] == ["result", "error"]


N_TOGETHER = 200  # records appended at once, which takes longer than a process is left alone


def _append_many(folder: Path, n_of: int) -> None:
    for i in range(8):
        append(folder, [_result(f"{n_of}-{i}-{k}", text="x" * 2000) for k in range(N_TOGETHER)])


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
    )
    (row,) = rows
    expected = {"dataset": "scenes", "method": "logistic", "metric_name": "accuracy", "metric_value": "0.75"}
    expected |= {"ci_lower": "0.7", "ci_upper": "0.8", "best_c": "0.5", "best_lr": "", "seed": "3", "model": "run"}
    expected |= {"name": "run/encoder/last", "partition": "0.10x", "bands": "rgb", "image_size": "64"}
    assert {key: row[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"probe": "ridge"}, {"best_c": ""}),  # a penalty of another loss
        ({"chosen": {"lr": 0.1}, "probe": "linear"}, {"best_lr": "0.1", "best_batch_size": "", "c_range": ""}),
        ({"intervals": {}}, {"ci_lower": "", "ci_upper": ""}),
        ({"features": "band_statistics", "model": None, "tap": "pixels"}, {"model": "band_statistics"}),
    ],
)
def test_what_a_result_lacks_is_empty(tmp_path: Path, changes: dict[str, Any], expected: dict[str, str]) -> None:
    (row,) = _rows(tmp_path / "results.csv", _measured(**changes))
    assert {key: row[key] for key in expected} == expected
