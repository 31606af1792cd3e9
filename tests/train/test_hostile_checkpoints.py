"""Checkpoints that somebody has made up, copied or left behind: none runs code, none is taken for this run's own."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT, command, finish, records, start, wait_for
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from ssl_eo.cli import main
from ssl_eo.train.metadata_reader import MetadataReader
from ssl_eo.train.sealing import CheckpointError, newest, read_seal, verify

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
SHORT = (
    "train.total_steps=6",
    "train.global_batch_size=8",
    "optim.warmup_steps=1",
    "checkpoint.every_n_steps=3",
    "log.report=false",
    "data.n_workers=0",
    "eval.every_n_steps=0",
)


def _train(out_dir: Path, *overrides: str) -> int:
    return main(["train", "--config", DEBUG, f"run.out_dir={out_dir}", *SHORT, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("trained")
    assert _train(out_dir) == 0
    return out_dir / "debug_mae"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "debug_mae"))


def _seal_again(checkpoint: Path) -> None:
    """As someone would who has changed the files on purpose."""
    seal = checkpoint / "complete.json"
    content = json.loads(seal.read_text().rsplit("\n", 2)[0])
    for name in content["files"]:
        data = (checkpoint / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    _write_seal(checkpoint, json.dumps(content, indent=1))


def _write_seal(checkpoint: Path, text: str) -> None:
    (checkpoint / "complete.json").write_text(f"{text}\n{zlib.crc32(text.encode()):08x}\n")


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("ask", ["resume", "export", "eval", "init"])
def test_a_table_of_contents_runs_no_code(
    ask: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "was_run"
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / ".metadata").write_bytes(pickle.dumps(_Call(os.system, f"touch {mark}")))
        _seal_again(checkpoint)
    last = run / "checkpoints" / "step_00000006"
    out = str(tmp_path / "out")
    status = {
        "resume": lambda: _train(tmp_path, "train.time_limit_s=100") if _without_last(last) else 0,
        "export": lambda: main(["export", "--checkpoint", str(run), "--out", out]),
        "eval": lambda: main(["eval", "--model", str(run), "--tasks", "synthetic_scenes", "--out", out]),
        "init": lambda: _train(tmp_path, "run.name=other", f"init=[{{path: {run}}}]"),
    }[ask]()
    told = capsys.readouterr().err
    assert status in (1, 2)
    assert not mark.exists()
    assert "is no table of contents of a checkpoint: it names posix.system" in told
    assert "Traceback" not in told


def test_a_value_runs_no_code(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values of the optimiser that are no tensors are pickles of their own, beside the tensors."""
    mark = tmp_path / "was_run"
    buffer = io.BytesIO()
    torch.save(_Call(os.system, f"touch {mark}"), buffer)
    _without_last(run / "checkpoints" / "step_00000006")
    for checkpoint in (run / "checkpoints").iterdir():
        contents = MetadataReader(checkpoint).read_metadata()
        entries = contents.state_dict_metadata
        index = next(i for i in contents.storage_data if isinstance(entries[i.fqn], BytesStorageMetadata))
        kept = contents.storage_data[index]
        with (checkpoint / kept.relative_path).open("ab") as file:
            where = {"offset": file.tell(), "length": len(buffer.getvalue())}
            file.write(buffer.getvalue())
        contents.storage_data[index] = replace(kept, **where)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(contents))
        _seal_again(checkpoint)
    status = _train(tmp_path, "train.time_limit_s=100")
    told = capsys.readouterr().err
    assert not mark.exists()
    assert status == 1
    assert "cannot be loaded" in told
    assert "Traceback" not in told


def _without_last(last: Path) -> bool:
    shutil.rmtree(last)  # a run that is not finished goes on from the one before
    return True


@given(st.binary(max_size=200))
def test_odd_bytes_are_no_table_of_contents(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("odd")
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="is no table of contents"):
        MetadataReader(folder).read_metadata()


@pytest.mark.parametrize("value", [torch.nn.Linear(1, 1), print, Path, Metadata, {"a": 1}])
def test_other_objects_are_no_table_of_contents(tmp_path: Path, value: Any) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match="is no table of contents"):
        MetadataReader(tmp_path).read_metadata()


@pytest.mark.parametrize(
    "text", ["[1]", "1", "{}", '{"format": 2}', "", "null", '{"format": 2, "step": "6", "facts": {}, "files": {}}', "x"]
)
def test_a_made_up_seal_is_damage_and_the_checkpoint_before_is_used(text: str, run: Path) -> None:
    last = run / "checkpoints" / "step_00000006"
    _write_seal(last, text)
    with pytest.raises(CheckpointError, match=r"complete\.json is no seal"):
        read_seal(last)
    assert verify(last) == "complete.json is no seal"
    assert newest(run / "checkpoints") == run / "checkpoints" / "step_00000003"


def test_another_format_is_told_and_not_called_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = run / "checkpoints" / "step_00000006"
    content = json.loads((last / "complete.json").read_text().rsplit("\n", 2)[0])
    _write_seal(last, json.dumps({**content, "format": 3}))
    assert _train(run.parent) == 2
    assert "has format 3, this version of ssl_eo reads 2" in capsys.readouterr().err
    assert last.is_dir()  # not set aside


def test_a_checkpoint_of_another_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same shape, but of another seed: nothing else would tell."""
    assert _train(tmp_path / "b", "run.seed=5") == 0
    checkpoints = tmp_path / "b" / "debug_mae" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000006")
    shutil.copytree(run / "checkpoints" / "step_00000006", checkpoints / "step_00000006")
    capsys.readouterr()
    assert _train(tmp_path / "b", "run.seed=5") == 2
    assert "step_00000006 is of another run than" in capsys.readouterr().err


def test_a_run_whose_folder_was_taken_over_ends(tmp_path: Path) -> None:
    """Its own folder was removed, and another run began there: it saves nothing into that one."""
    steps = ("train.total_steps=2000", "checkpoint.every_n_steps=100", "log.every_n_steps=1")
    process = start(command(DEBUG, tmp_path, *SHORT, *steps))
    run = tmp_path / "debug_mae"
    wait_for(lambda: bool(records(run / "metrics.jsonl")), process)
    process.send_signal(signal.SIGSTOP)
    shutil.rmtree(run)
    assert _train(tmp_path, "run.seed=5", "train.time_limit_s=0.0") == 75
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    process.send_signal(signal.SIGCONT)
    status, output = finish(process)
    assert status == 1, output
    assert "was removed or replaced while this run was going on" in output
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == kept


def test_an_odd_record_in_a_log_is_dropped(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": "7"}\n{"step": null}\n')
    assert _train(run.parent) == 0
    assert all(isinstance(r["step"], int) for r in records(run / "metrics.jsonl"))
