"""Pages of a study are read without the author at hand: classes, confusions, what is bold, counts, what is lacking."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_study import bundle, study, task

from ssl_eo.adapt.study_page import _charts, _confused, _flags, write_study_page
from ssl_eo.adapt.study_records import is_of_study
from ssl_eo.adapt.study_run import _n_of_class, run_study
from ssl_eo.adapt.study_tables import few, models_of, study_tables
from ssl_eo.eval.records import key_of
from ssl_eo.eval.result_tables import Table, as_latex, as_markdown

Record = dict[str, Any]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """A record of each kind of labels."""
    folder = bundle(tmp_path_factory.mktemp("tiny"), depth=1)
    kinds = ("segmentation", "classification", "multilabel")
    cfg = study(
        folder,
        tasks=[task(kind, 4, kind) for kind in kinds],
        encoders={"tiny": {"model": str(folder), "taps": [1.0]}},
        decoders={"linear": {}, "identity": {}},
        trainings={"default": {"n_steps": 1, "batch_size": 4, "lrs": [1e-2], "n_evaluations": 1}},
    )
    found = run_study(cfg, tmp_path_factory.mktemp("study"))
    assert [r["kind"] for r in found] == ["result"] * 3, [r.get("error") for r in found]
    return dict(zip(kinds, found, strict=True))


def of_models(record: Record, n: int, **changes: Any) -> list[Record]:
    return [{**record, **changes, "cell": {**record["cell"], "encoder": f"m{i}"}} for i in range(n)]


def with_classes(record: Record, n: int, **changes: Any) -> Record:
    """The record, of so many classes: of the first test has no sample, in the second none is right."""
    values = [None, 0.0, *[0.5] * (n - 2)]
    columns = {"support": [0, *range(1, n)], "recall": values, "iou": values}
    counts = {split: [10 * i for i in range(n)] for split in ("train", "val")}
    classes = [f"class {i}" for i in range(n)]
    found = {**record, "classes": classes, "per_class": columns, "confusion": [[1] * n] * n, "n_of_class": counts}
    return {**found, **changes}


def tables_of(records: list[Record], what: str) -> list[Table]:
    return [t for t in study_tables(models_of(records), records[0]["cell"]["task"]) if what in t.title]


def test_many_classes_are_rows_beside_a_few_models_at_a_time(records: dict[str, Record]) -> None:
    many = of_models(with_classes(records["segmentation"], 19), 13)
    tables = tables_of(many, "IoU of classes")
    assert [table.title.rpartition(", ")[2] for table in tables] == [f"part {i} of 3" for i in (1, 2, 3)]
    assert [column for table in tables for column in table.columns] == [f"m{i}, frozen, linear" for i in range(13)]
    for table in tables:
        assert [row.title for row in table.rows] == many[0]["classes"]
        assert [row.cells[0].text for row in table.rows[:3]] == ["", "0.0", "50.0"]
        assert table.rows[2].note == "train 20, val 20, test 2"
    (alone,) = tables_of(many[:2], "of classes")
    assert alone.title == "segmentation: IoU of classes, %"
    for text, sign in ((as_markdown(tables, []), "|"), (as_latex(tables, []), "&")):
        rows = [line for line in text.splitlines() if re.match(r"(\| )?class 18\b", line)]
        assert len(rows) == 3
        assert max(line.count(sign) for line in rows) <= 8


def test_few_classes_are_columns(records: dict[str, Record]) -> None:
    (table,) = tables_of(of_models(with_classes(records["classification"], 6), 13), "recall of classes")
    assert table.columns[2] == "class 2 (train 20, val 20, test 2)"
    assert [cell.text for cell in table.rows[0].cells[:3]] == ["", "0.0", "50.0"]
    assert len(table.rows) == 13


def test_every_table_of_numbers_that_need_it_says_what_they_are(records: dict[str, Record], tmp_path: Path) -> None:
    record = with_classes(records["classification"], 3, n_groups=4)
    seeds = [{**record, "cell": {**record["cell"], "seed": seed}} for seed in (0, 1)]
    (scores,), (classes,) = tables_of(seeds, "accuracy %"), tables_of(seeds, "of classes")
    assert scores.note == "Bold: the best of this table, before rounding. Means over 2 seeds."
    assert classes.note.startswith("Empty: test has no sample of the class; 0.0: it has some")
    assert "how many samples have it" in classes.note
    assert tables_of([with_classes(records["segmentation"], 3)], "classes")[0].note.startswith(
        "Empty: test has no pixel"
    )
    many = [{**r, "n_groups": 100} for r in seeds]
    assert "In brackets: the 95 % interval" in tables_of(many, "accuracy %")[0].note
    assert "Lines over bars: the 95 % interval" in _charts(models_of(many), "x").about_scores
    assert "interval" not in _charts(models_of(seeds), "x").about_scores
    for page in write_study_page(seeds, tmp_path, "a study", "x"):
        assert page.read_text().count("before rounding") == 1, page


def test_of_scores_that_are_equal_all_are_bold(records: dict[str, Record]) -> None:
    several = of_models(records["classification"], 4)
    for record, score in zip(several, (0.71841, 0.3, 0.71841, 0.71839), strict=True):
        record["scores"] = {**record["scores"], "accuracy": score}
    (table,) = tables_of(several, "accuracy %")
    assert [row.cells[0].text for row in table.rows] == ["71.8", "30.0", "71.8", "71.8"]
    assert [row.cells[0].is_best for row in table.rows] == [True, False, True, False]


def test_confusions_are_of_the_best_on_validation_in_the_order_of_tables(records: dict[str, Record]) -> None:
    several = of_models(with_classes(records["classification"], 3), 6)
    for record, score in zip(several, (0.5, 0.1, 0.7, 0.2, 0.6, 0.9), strict=True):
        record["curves"] = [{"lr": 1e-3, "scores": [score]}]
    shown, about = _confused(models_of(several))
    assert [m.encoder for m in shown] == ["m0", "m2", "m4", "m5"]
    assert about.startswith("The 4 of 6 models that were best on validation, in the order of the tables.")
    assert "test samples of one class, as shares in percent that sum to 100" in about
    assert _confused(models_of(several[:4]))[1].startswith("All models, in the order")
    assert _confused(models_of(of_models(records["multilabel"], 2))) == ([], "")


def test_a_caption_stands_over_confusions(records: dict[str, Record], tmp_path: Path) -> None:
    both = [records["classification"], records["multilabel"]]  # of several labels there is none
    text = write_study_page(both, tmp_path, "a study", "x")[0].read_text()
    assert text.count("confusion of classes</h3>") == text.count("as shares in percent that sum to 100") == 1
    assert "over cost, numbered as in the bars" in text


def test_classes_are_counted_in_train_and_val(records: dict[str, Record]) -> None:
    for kind, record in records.items():
        n = {"segmentation": 4 * 16 * 16, "classification": 4}.get(kind)
        assert record["n_of_class"].keys() == {"train", "val"}
        for counts in record["n_of_class"].values():
            assert len(counts) == len(record["classes"])
            assert sum(counts) == n or (n is None and 0 < max(counts) <= 4)
        assert is_of_study(record)
        assert is_of_study({key: value for key, value in record.items() if key != "n_of_class"})
        whole = record["n_of_class"]["train"]
        for odd in (
            None,
            {},
            {"train": whole},
            {"train": whole, "val": whole[1:]},
            {"train": whole, "val": [-1] * len(whole)},
        ):
            assert not is_of_study({**record, "n_of_class": odd}), odd


def test_classes_that_training_or_validation_lack_are_told(records: dict[str, Record], tmp_path: Path) -> None:
    counts = {"train": [3, 0, 3, 3], "val": [0] * 4}
    lacking = with_classes(records["classification"], 4, n_of_class=counts)
    html, markdown, _ = write_study_page([lacking], tmp_path, "a study", "x")
    for page in (html, markdown):
        assert "train has no sample of class 1: no model can learn these" in page.read_text()
        assert "val has no sample of class 0; class 1; class 2; class 3: they have no say" in page.read_text()
    assert few(list("abcdef"), "; ") == "a; b; c; d and 2 more"


def test_records_of_before_classes_were_counted_have_pages(records: dict[str, Record], tmp_path: Path) -> None:
    old = with_classes(records["segmentation"], 19)
    del old["n_of_class"]
    pages = write_study_page([old], tmp_path, "a study", "x")
    assert "| class 2 (test 2) | 50.0 |" in pages[1].read_text()
    assert "has no pixel of" not in pages[1].read_text().replace("test has no pixel of", "")


@pytest.mark.parametrize("n", [1, 2])
def test_notes_count_one_and_several(n: int, records: dict[str, Record], tmp_path: Path) -> None:
    changes = {"n_groups": n, "n_leaked": n, "n_leaked_val": 0, "n_shared_groups": n}
    text = write_study_page([{**records["classification"], **changes}], tmp_path, "a study", "x")[1].read_text()
    expected = {
        1: ("1 of 4 test samples has the", "1 place of test samples is a place of", "samples are of one place, fewer"),
        2: ("2 of 4 test samples have the", "2 places of test samples are places of", "samples are of 2 places, fewer"),
    }
    for said in expected[n]:
        assert said in text


def test_costs_are_written_without_powers_of_ten(records: dict[str, Record]) -> None:
    several = [
        {**r, "samples_per_s": value}
        for r, value in zip(of_models(records["classification"], 4), (3331.2, 999.6, 35.61, 0.03012), strict=True)
    ]
    (costs,) = tables_of(several, "cost")
    shown = [row.cells[costs.columns.index("samples/s")].text for row in costs.rows]
    assert shown == ["3,331", "1,000", "35.6", "0.0301"]


def test_numbers_have_no_classes(records: dict[str, Record], tmp_path: Path) -> None:
    of_numbers = SimpleNamespace(labels=SimpleNamespace(shown=SimpleNamespace(kind="regression")))
    counts = _n_of_class(of_numbers)  # type: ignore[arg-type]
    first = records["classification"]
    asked = {**first["asked"], "task": {**first["asked"]["task"], "kind": "regression"}}
    none = {"classes": [], "per_class": {}, "confusion": None, "resampled": None, "n_of_class": counts}
    record = {**first, **none, "asked": asked, "key": key_of(asked), "metric": "rmse", "scores": {"rmse": 2.0}}
    assert is_of_study(record)
    assert tables_of([record], "of classes") == []
    text = write_study_page([record], tmp_path, "a study", "x")[0].read_text()
    assert "confusion" not in text
    assert "has no sample of" not in text


def test_a_class_that_is_ignored_is_not_called_lacking(records: dict[str, Record]) -> None:
    """It is never counted, and none is to learn it."""
    record = with_classes(records["segmentation"], 3)
    ignored = {**record, "asked": {**record["asked"], "task": {**record["asked"]["task"], "ignore": 0}}}
    for some, n in ((record, 2), (ignored, 0)):
        assert sum("class 0" in flag for flag in _flags(models_of([some]))) == n
