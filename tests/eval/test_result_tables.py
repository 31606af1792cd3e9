"""Tables as text: what is left out, how they are labelled, how numbers are rounded."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ssl_eo.eval.metrics import number_text, score_text
from ssl_eo.eval.result_tables import Cell, Row, Table, as_latex, as_markdown, with_numbers
from ssl_eo.eval.rounding import fixed


@pytest.mark.parametrize(
    ("value", "shown"),
    [(46.25, "46.2"), (46.35, "46.4"), (46.45, "46.4"), (0.05, "0.0"), (-46.25, "-46.2"), (99.96, "100.0")],
)
def test_halves_go_to_the_even_digit_however_they_were_computed(value: float, shown: str) -> None:
    assert fixed(value, 1) == shown
    ratio = value / 100
    in_float32 = float(np.float32(ratio))
    as_mean = float(np.mean([ratio] * 3))
    assert {number_text("accuracy", v) for v in (ratio, in_float32, as_mean)} == {shown}
    assert score_text("accuracy", as_mean) == f"{shown} %"


def test_gains_have_a_sign_and_what_is_no_number_stays_none() -> None:
    assert [fixed(v, 1, "+") for v in (0.0, 1.26, -1.26)] == ["+0.0", "+1.3", "-1.3"]
    assert fixed(float("nan"), 1) == "nan"
    assert fixed(1e300, 1).startswith("1000000000000000")  # not more digits than can be rounded


def _table(title: str, *columns: tuple[str, ...]) -> Table:
    rows = [Row(f"row {i}", "", [Cell(column[i]) for column in columns]) for i in range(2)]
    return Table(title, "who", [f"column {i}" for i in range(len(columns))], rows)


def test_columns_and_tables_without_a_number_are_left_out() -> None:
    empty = Table("notes alone", "who", ["a"], [Row("b", "", [Cell(note="not measured")])])
    tables = with_numbers([_table("t", ("", ""), ("", "1"), ("", "")), _table("none"), empty])
    assert [(table.title, table.columns) for table in tables] == [("t", ["column 1"])]
    assert [[cell.text for cell in row.cells] for row in tables[0].rows] == [[""], ["1"]]
    assert "column 0" not in as_markdown(tables, [])


def test_every_table_of_latex_has_a_label_of_its_own() -> None:
    tables = [_table(title, ("1", "2")) for title in ("Ridge, 2 tasks", "Ridge: 2 tasks!", "--")]
    text = as_latex(tables, [])
    assert re.findall(r"\\label\{(.*?)\}", text) == ["tab:ridge-2-tasks", "tab:ridge-2-tasks-2", "tab:table"]
    assert r"\caption{Ridge, 2 tasks}" in text  # without a caption it is the title
