"""The first ten losses of every debug config are those that were recorded: no change of the numbers goes unnoticed.

A change that is meant is recorded with `pytest tests/train/test_golden.py --regenerate-golden` and seen in the diff.

The tolerance is for machines that sum in another order. Over ten steps, losses on other instruction sets, libraries
and thread counts were within a few 1e-7 of each other, and a learning rate that is wrong by one percent moves them by
2e-3. 1e-4 leaves a wide margin to both.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import ROOT, records

from ssl_eo.cli import main

CONFIGS = sorted((ROOT / "configs" / "debug").glob("*.yaml"))
GOLDEN = ROOT / "tests" / "golden"
REL_TOLERANCE = 1e-4
TEN_STEPS = (
    *("train.total_steps=10", "train.precision=float32", "train.n_threads=1", "data.n_workers=0"),
    *("optim.warmup_steps=2", "optim.cooldown_steps=0", "checkpoint.every_n_steps=10", "eval.every_n_steps=0"),
    *("log.every_n_steps=1", "log.report=false"),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the losses were recorded on a CPU")
@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_first_ten_losses(config: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    assert main(["train", "--config", str(config), f"run.out_dir={tmp_path}", "run.name=golden", *TEN_STEPS]) == 0
    losses = [record["loss"] for record in records(tmp_path / "golden" / "metrics.jsonl")]
    assert len(losses) == 10
    path = GOLDEN / f"{config.stem}.json"
    if pytestconfig.getoption("--regenerate-golden"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
    assert path.is_file(), f"no losses are recorded for {config.name}: run pytest {__file__} --regenerate-golden"
    assert losses == pytest.approx(json.loads(path.read_text())["losses"], rel=REL_TOLERANCE, abs=0)


def test_every_recording_has_its_config() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == {path.stem for path in CONFIGS}
