"""A run directory in which others have written, or of which files are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssl_eo.eval.run_records import Run

HEALTH = {"step": 5, "kind": "health", "source": "scenes", "features": "encoder", "tap": "last", "spread_ratio": 0.3}
PUT_OFF = {"step": 6, "kind": "skipped", "what": "probes", "reason": "it would take more"}


def _write(path: Path, *lines: object) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_odd_lines_of_a_run_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0}, {"step": "2"}, {"step": None}, {"step": 3})
    odd = ({**HEALTH, "step": "5"}, {**HEALTH, "source": ["scenes"]}, {**PUT_OFF, "what": 3}, {"step": 7, "kind": {}})
    _write(tmp_path / "eval.jsonl", HEALTH, *odd, PUT_OFF)
    run = Run.read(tmp_path)
    assert [r["step"] for r in run.metrics] == [1, 3]
    assert (run.health, run.put_off) == ([HEALTH], [PUT_OFF])
    said = [r.getMessage() for r in caplog.records]
    assert f"{tmp_path / 'metrics.jsonl'}, line 2 and 1 more: no record of this file; left out" in said
    assert f"{tmp_path / 'eval.jsonl'}, line 2 and 3 more: no record of this file; left out" in said


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "9" * 5000])
def test_a_damaged_description_of_the_machine_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "env.json").write_text(text)
    with pytest.raises(ValueError, match=r"env\.json cannot be read"):
        Run.read(tmp_path)


def test_a_description_that_is_none_is_empty(tmp_path: Path) -> None:
    (tmp_path / "env.json").write_text("[1]")
    assert Run.read(tmp_path).env == {}
