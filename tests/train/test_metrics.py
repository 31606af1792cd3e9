"""Meters, sinks and the progress line: the right numbers, readable anywhere, and nothing lost by a kill."""

from __future__ import annotations

import io
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_eo.components import MissingExtraError
from ssl_eo.distributed import rank
from ssl_eo.jsonl import JsonLines
from ssl_eo.train.metrics import (
    LogConfig,
    Meters,
    ProgressLine,
    TensorBoard,
    Wandb,
    open_sinks,
)

RECORD = {
    "step": 20,
    "loss": 0.51234,
    "loss/pixels": 0.25,
    "samples_per_s": 1234.6,
    "data_wait_ratio": 0.125,
    "eta_s": 95.0,
}

# (loss, whether the step was taken) by step
STEPS = [(1.0, True), (math.nan, False), (2.5, True), (math.inf, False), (0.5, True)]


def _add(meters: Meters, steps: list[tuple[float, bool]], offset: float = 0.0) -> None:
    for value, taken in steps:
        values = {"loss": torch.tensor(value + offset), "double": torch.tensor(2 * (value + offset)).double()}
        meters.add(values, torch.tensor(float(taken)))


def test_meters_average_the_steps_that_were_taken() -> None:
    meters = Meters()
    for _ in range(2):  # reading starts anew
        _add(meters, STEPS)
        means, flags = meters.read()
        assert means == pytest.approx({"loss": 4 / 3, "double": 8 / 3})
        assert flags == [taken for _, taken in STEPS]


def test_meters_of_skipped_steps_alone_are_zero() -> None:
    meters = Meters()
    _add(meters, [(math.nan, False), (math.nan, False)])
    assert meters.read() == ({"loss": None, "double": None}, [False, False])


def test_meters_leave_the_graph_alone() -> None:
    loss = torch.tensor(2.0, requires_grad=True)
    meters = Meters()
    meters.add({"loss": loss * 3}, torch.tensor(1.0))
    assert meters.read()[0] == {"loss": 6.0}


def _read_on_this_rank() -> tuple[dict[str, float], list[bool]]:
    meters = Meters()
    _add(meters, STEPS, offset=10.0 * rank())
    return meters.read()


def test_meters_average_over_ranks(on_ranks: Callable[..., list[Any]]) -> None:
    for means, flags in on_ranks(2, _read_on_this_rank):
        assert means == pytest.approx({"loss": 4 / 3 + 5, "double": 8 / 3 + 10})
        assert flags == [taken for _, taken in STEPS]


# --- the progress line ------------------------------------------------------------------------------------------------


def test_progress_is_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    progress = ProgressLine(200, stream)
    progress.write(RECORD)
    progress.note("report: runs/[demo]/report.html")
    progress.close()
    assert stream.getvalue() == (
        "step 20/200  loss 0.5123  1235 samples/s  data wait 12 %  0:01:35 left\nreport: runs/[demo]/report.html\n"
    )


def test_notes_are_shown_as_they_are() -> None:
    """Paths and keys may hold what a markup language would take for a tag."""
    stream = io.StringIO()
    ProgressLine(200, stream).note("step 3 was skipped (samples [/data/a], [bold]b, " + "x" * 200 + ")")
    assert stream.getvalue() == "step 3 was skipped (samples [/data/a], [bold]b, " + "x" * 200 + ")\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    stream = _Terminal()
    progress = ProgressLine(200, stream)
    progress.write(RECORD)
    progress.note("checkpoint [/a] written")
    progress.write({**RECORD, "step": 200, "eta_s": 0.0})
    progress.close()
    shown = stream.getvalue()
    assert "checkpoint [/a] written" in shown
    assert "200/200" in shown
    assert "loss 0.5123  1235 samples/s  data wait 12 %  0:00:00 left" in shown
    assert "\x1b[2K" in shown  # the line is erased and drawn again
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is shown again


# --- other sinks ------------------------------------------------------------------------------------------------------


def test_sinks_follow_the_config(tmp_path: Path) -> None:
    sinks = open_sinks(LogConfig(), tmp_path, {}, 0)
    assert [type(sink) for sink in sinks] == [JsonLines]
    for sink in sinks:
        sink.close()
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        LogConfig(every_n_steps=0)


def test_wandb_offline_writes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _, sink = open_sinks(LogConfig(wandb="offline", wandb_project="tests"), tmp_path, {"optim": {"lr": 0.125}}, 0)
    assert isinstance(sink, Wandb)
    sink.write(RECORD)
    sink.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # wandb's own process writes the file, and may still be at it
    while tmp_path.name.encode() not in (content := written.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in (b"samples_per_s", b"loss/pixels", b"0.51234", b"0.125", tmp_path.name.encode()):
        assert name in content


def test_a_resumed_run_goes_on_with_its_wandb_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start_step in (0, 20, 40, 0):  # the last starts anew
        _, sink = open_sinks(LogConfig(wandb="offline"), tmp_path, {}, start_step)
        sink.write({"step": start_step + 20, "loss": 0.5})
        sink.close()
        time.sleep(1.1)  # its folders are named by the second
    ids = [path.name.rpartition("-")[2] for path in sorted(tmp_path.glob("wandb/offline-run-*"))]
    assert len(ids) == 4
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_tensorboard_scalars_can_be_read_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoard(tmp_path, 0)
    sink.write(RECORD)
    sink.write({**RECORD, "step": 40, "loss": 0.25, "note": "not a number"})
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == RECORD.keys() - {"step"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(20, pytest.approx(0.51234)), (40, 0.25)]


def test_tensorboard_shows_a_step_that_is_done_again_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start_step, steps in ((0, (0, 10, 20, 30)), (10, (20, 30, 40))):
        sink = TensorBoard(tmp_path, start_step)
        for step in steps:
            sink.write({"step": step, "loss": 1.0 + start_step})
        sink.close()
        time.sleep(1.1)  # files are read in the order of their names, which hold the second
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 1), (10, 1), (20, 11), (30, 11), (40, 11)]


@pytest.mark.parametrize(
    ("package", "cfg"), [("wandb", LogConfig(wandb="offline")), ("tensorboard", LogConfig(tensorboard=True))]
)
def test_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, cfg: LogConfig
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = f"log.{package} needs the package {package}: pip install 'ssl_eo[{package}]'"
    with pytest.raises(MissingExtraError, match=re.escape(message)):
        open_sinks(cfg, tmp_path, {}, 0)
