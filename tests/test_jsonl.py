"""Files of one JSON object a line: whole lines at once, and nothing lost by a kill at any byte."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.jsonl import JsonLines, read_jsonl

RECORDS = [{"step": i, "text": "é" * i} for i in range(5)]


def test_lines_are_in_the_file_at_once_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    first.write(RECORDS[0])
    assert path.read_text() == json.dumps(RECORDS[0]) + "\n"  # before it is closed
    first.close()
    with JsonLines(path) as second:
        second.write(RECORDS[1])
    assert path.read_text() == "".join(json.dumps(r) + "\n" for r in RECORDS[:2])


@given(cut=st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_takes_new_ones(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS).encode()[:cut]
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    path.write_bytes(data)
    n_whole = data.count(b"\n")
    found = read_jsonl(path)
    assert found[:n_whole] == RECORDS[:n_whole]
    assert len(found) <= n_whole + 1
    with JsonLines(path) as file:
        file.write({"step": 9})
    assert read_jsonl(path) == [*found, {"step": 9}]


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    files = [JsonLines(tmp_path / "keys.jsonl") for _ in range(4)]

    def write(rank: int) -> None:
        for step in range(100):
            files[rank].write({"step": step, "rank": rank, "keys": ["k" * step]})
        files[rank].close()

    with ThreadPoolExecutor(len(files)) as ranks:
        list(ranks.map(write, range(len(files))))
    found = [json.loads(line) for line in (tmp_path / "keys.jsonl").read_text().splitlines()]
    assert sorted((r["rank"], r["step"]) for r in found) == [(rank, step) for rank in range(4) for step in range(100)]


def test_odd_lines_are_left_out_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.jsonl"
    lines = [
        '{"step": 0}',
        "[" * 200_000,
        '{"a": ' + "9" * 5000 + "}",
        "[1]",
        '{"text": "\u2028"}',
        "",
        '{"step": 1}',
        '{"step": 2}{"step": 3}',
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_jsonl(path) == [{"step": 0}, {"text": "\u2028"}, {"step": 1}]
    assert [r.getMessage() for r in caplog.records] == [f"{path}, line 2 and 3 more: no record of this file; left out"]
    read_jsonl(path)
    assert len(caplog.records) == 1  # files are read again and again
    caplog.clear()
    path.write_text('{"step": 0}\n{"step": "x"}\n\n')
    assert read_jsonl(path, lambda record: isinstance(record["step"], int)) == [{"step": 0}]
    assert [r.getMessage() for r in caplog.records] == [f"{path}, line 2: no record of this file; left out"]


def test_a_last_line_without_an_end_is_silent_and_any_other_cut_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"step": 0}\n{"st')
    assert read_jsonl(path) == [{"step": 0}]
    assert caplog.text == ""  # a killed run is nothing to be warned of
    with JsonLines(path) as file:
        file.write({"step": 1})
    assert read_jsonl(path) == [{"step": 0}, {"step": 1}]
    assert [r.getMessage() for r in caplog.records] == [f"{path}, line 2: no record of this file; left out"]
    caplog.clear()
    path.write_text('{"step": 0}\n[1]')  # no kill leaves this
    assert read_jsonl(path) == [{"step": 0}]
    assert "line 2: no record" in caplog.text


def test_a_disk_that_is_full_is_told_with_the_file() -> None:
    with (
        JsonLines(Path("/dev/full")) as file,
        pytest.raises(OSError, match=r"^\[Errno 28\] /dev/full could not be wri"),
    ):
        file.write({"step": 0})


def test_a_file_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none.jsonl") == []
