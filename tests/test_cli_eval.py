"""`ssl-eo eval`: what it prints beside results of others, and how it ends when it is told to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssl_eo import opening
from ssl_eo.bundles import BundleEncoder
from ssl_eo.cli import main
from ssl_eo.eval.claims import claimed
from ssl_eo.eval.records import read_results
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.opening import OpenedEncoder

FORK = multiprocessing.get_context("fork")
TASK = {
    "train": {"name": "synthetic", "sensors": ["sentinel2_l2a"], "extent_m": 160.0, "n_samples": 40, "split": "train"},
    "test": {"name": "synthetic", "sensors": ["sentinel2_l2a"], "extent_m": 160.0, "n_samples": 20, "split": "test"},
    "max_train": 40,
    "max_test": 20,
    "probes": ["ridge"],
}


class _Slow(Encoder):
    """Says that it has begun, and never ends."""

    begun: Path

    def intermediates(self, *args: Any, **kwargs: Any) -> Any:
        self.begun.touch()
        time.sleep(600)


def _encoder(kind: type[Encoder] = Encoder) -> Encoder:
    torch.manual_seed(0)
    cfg = EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=8, patch_embed="conv")
    encoder = kind(cfg, n_channels=12)
    encoder.init_weights()
    return encoder


def _opened(name: str, encoder: Encoder, step: int = 0) -> OpenedEncoder:
    return OpenedEncoder(name, BundleEncoder(encoder, {}, {"step": step, "features": {}}))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "scenes.yaml"
    path.write_text(yaml.safe_dump(TASK))
    return path


def _evaluate_slowly(task: Path, out: Path, ignored: list[signal.Signals], n_workers: int) -> None:
    os.setpgrp()
    for name in ignored:
        signal.signal(name, signal.SIG_IGN)
    encoder = _encoder(_Slow)
    assert isinstance(encoder, _Slow)
    encoder.begun = out.with_name("begun")
    opening.open_model = lambda text: _opened(text, encoder)
    arguments = ["--model", "slow", "--tasks", str(task), "--out", str(out), "--no-controls", "--batch-size", "4"]
    sys.exit(main(["eval", *arguments, "--workers", str(n_workers)]))


def _stopped(
    task: Path, out: Path, names: list[signal.Signals], ignored: Sequence[signal.Signals] = (), n_workers: int = 0
) -> int | None:
    """How a process ends that gets the signals `names`, with those that read for it, in the middle of its first job."""
    process = FORK.Process(target=_evaluate_slowly, args=(task, out, ignored, n_workers))
    process.start()
    limit = time.monotonic() + 60
    while not out.with_name("begun").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    out.with_name("begun").unlink()
    assert process.pid is not None
    for name in names:
        os.killpg(process.pid, name)
    process.join(timeout=30)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def _deaths(out: Path) -> int:
    """How often a process has died at the one job."""
    (path,) = (p for p in (out / ".claims").iterdir() if p.name.startswith("scenes-"))
    with claimed(path.parent, path.name) as claim:
        assert claim is not None, "its process still holds it"
        return claim.n_before


@pytest.mark.parametrize(
    ("names", "status", "n_deaths"),
    [
        ([signal.SIGTERM], 75, 0),
        ([signal.SIGHUP], 75, 0),
        ([signal.SIGUSR1], 75, 0),
        ([signal.SIGTERM] * 3, 75, 0),
        ([signal.SIGINT], 130, 0),
        ([signal.SIGKILL], -signal.SIGKILL, 1),
    ],
    ids=["TERM", "HUP", "USR1", "TERM thrice", "INT", "KILL"],
)
def test_whoever_is_told_to_end_has_not_died_at_its_job(
    task: Path, tmp_path: Path, names: list[signal.Signals], status: int, n_deaths: int
) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # a claim that was given back is taken again
        assert _stopped(task, out, names) == status
    assert _deaths(out) == 2 * n_deaths
    assert read_results(out) == []


def test_so_with_those_that_read_for_it(tmp_path: Path) -> None:
    """As schedulers do, which signal all processes of a job."""
    whole = tmp_path / "scenes" / "scenes.yaml"
    whole.parent.mkdir()
    whole.write_text(yaml.safe_dump({**TASK, "max_train": None, "max_test": None}))
    assert _stopped(whole, tmp_path / "out", [signal.SIGTERM], n_workers=2) == 75
    assert _deaths(tmp_path / "out") == 0
    assert read_results(tmp_path / "out") == []


def test_what_runs_on_without_its_terminal_does_so(task: Path, tmp_path: Path) -> None:
    """As under nohup."""
    assert _stopped(task, tmp_path / "out", [signal.SIGHUP, signal.SIGINT], ignored=[signal.SIGHUP]) == 130


def test_handlers_are_given_back_and_the_message_is_one_line(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told_to_end(text: str) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")

    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    monkeypatch.setattr(opening, "open_model", told_to_end)
    assert main(["eval", "--model", "any", "--tasks", str(task), "--out", str(tmp_path / "out")]) == 75
    assert capsys.readouterr().err == "ssl-eo: stopped on request; the same command goes on\n"
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_results_of_others_in_the_folder_are_neither_printed_nor_count(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"of_12_bands": _opened("of_12_bands", _encoder(), 7), "other": _opened("other", _encoder(), 8)}
    next(models["other"].encoder.parameters()).data += 1.0
    monkeypatch.setattr(opening, "open_model", lambda text: models[text])
    small = tmp_path / "small.yaml"
    split = {"sensors": ["dem"], "extent_m": 240.0}  # one band, where the encoder takes twelve
    small.write_text(yaml.safe_dump({**TASK, "train": {**TASK["train"], **split}, "test": {**TASK["test"], **split}}))
    out = tmp_path / "out"

    def evaluate(model: str, path: Path) -> tuple[int, str]:
        arguments = ["--model", model, "--tasks", str(path), "--out", str(out), "--resamples", "0"]
        return main(["eval", *arguments]), capsys.readouterr().out

    status, text = evaluate("other", small)
    assert status == 1
    assert "small: " in text
    assert "could not be measured" in text
    status, text = evaluate("of_12_bands", task)
    assert status == 0
    assert "│ of_12_bands " in text
    for of_another in ("small", "│ other ", "could not be measured"):
        assert of_another not in text
    status, text = evaluate("other", task)
    assert status == 0
    assert "│ other " in text
    assert "│ of_12_bands " not in text
    measured = [r for r in read_results(out) if r["kind"] == "result"]
    assert len((out / "results.csv").read_text().splitlines()) == 1 + len(measured)
    assert {r["model"] for r in measured if r["features"] == "encoder"} == {"of_12_bands", "other"}
