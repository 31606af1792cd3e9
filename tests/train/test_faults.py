"""What goes wrong in real life: each is one clear line, and nothing that was written is lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import ROOT, read_checkpoint, records

from ssl_eo.cli import main
from ssl_eo.train.sealing import newest, verify

DEBUG = str(ROOT / "configs" / "debug" / "mae.yaml")
SHORT = (
    "data.n_workers=0",
    "train.global_batch_size=8",
    "train.total_steps=8",
    "optim.warmup_steps=2",
    "checkpoint.every_n_steps=4",
    "log.every_n_steps=1",
    "log.report=false",
)


def _train(out_dir: Path, *overrides: str) -> int:
    return main(["train", "--config", DEBUG, f"run.out_dir={out_dir}", *SHORT, *overrides])


def _checkpoints(out_dir: Path) -> list[str]:
    return sorted(p.name for p in (out_dir / "debug_mae" / "checkpoints").iterdir())


def test_config_changed_under_an_existing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path) == 0
    before = read_checkpoint(tmp_path / "debug_mae" / "checkpoints" / "step_00000008")
    assert _train(tmp_path, "optim.lr=0.5", "model.depth=2") == 2
    message = capsys.readouterr().err
    assert "optim.lr: 0.001 -> 0.5" in message
    assert "model.depth: 4 -> 2" in message
    assert "set another run.name" in message
    after = read_checkpoint(tmp_path / "debug_mae" / "checkpoints" / "step_00000008")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_data_changed_under_an_existing_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _train(tmp_path) == 0
    from ssl_eo.data.sources import synthetic

    monkeypatch.setattr(synthetic.Source, "fingerprint", lambda self: "other")
    assert _train(tmp_path) == 2
    assert "the data is not what this run was trained on" in capsys.readouterr().err


def test_checkpoints_without_their_config_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path) == 0
    (tmp_path / "debug_mae" / "config.yaml").unlink()
    assert _train(tmp_path, "optim.lr=0.5") == 2
    assert "config.yaml is missing" in capsys.readouterr().err


def test_a_name_that_looks_like_a_number_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert _train(tmp_path, "run.name='1e5'") == 0
    assert "has finished its 8 steps" in capsys.readouterr().err


def test_run_of_another_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path) == 0
    saved = tmp_path / "debug_mae" / "config.yaml"
    saved.write_text(saved.read_text().replace("layer_decay: 1.0", ""))  # before this key existed
    assert _train(tmp_path) == 0
    saved.write_text(saved.read_text() + "gone: 1\n")  # a key that exists no more
    assert _train(tmp_path) == 2
    assert "config.yaml is damaged, or of another version of ssl_eo (gone: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_run_directory_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    out_dir = tmp_path / "file" if place == "a file" else tmp_path / "file" / "below"
    assert _train(out_dir) == 2
    assert "cannot be used" in (message := capsys.readouterr().err)
    assert "set another run.name or run.out_dir" in message
    assert (tmp_path / "file").read_text() == "in the way"


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    holder = (
        "import fcntl, os, sys; os.makedirs(sys.argv[1]); f = os.open(sys.argv[1] + '/.lock', os.O_RDWR | os.O_CREAT);"
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", holder, str(tmp_path / "debug_mae")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert _train(tmp_path) == 2
        process.communicate("")
    assert _train(tmp_path) == 0


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "no seal"])
def test_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    assert _train(tmp_path) == 0
    expected = read_checkpoint(tmp_path / "debug_mae" / "checkpoints" / "step_00000008")
    last = tmp_path / "debug_mae" / "checkpoints" / "step_00000008"
    data = next(last.glob("*.distcp"))
    if damage == "flipped byte":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "truncated":
        os.truncate(data, data.stat().st_size // 2)
    else:
        (last / "complete.json").unlink()
    assert verify(last) is not None
    found = newest(last.parent)
    assert found is not None
    assert found.name == "step_00000004"
    assert "is damaged" in caplog.text
    assert _train(tmp_path) == 0  # the damaged one is set aside and its steps are done again
    again = read_checkpoint(last)
    assert all(torch.equal(expected[k], again[k]) for k in expected)
    assert _checkpoints(tmp_path) == ["step_00000004", "step_00000008", "step_00000008.damaged"]
    shutil.rmtree(tmp_path / "debug_mae" / "checkpoints" / "step_00000004")
    (last / "complete.json").write_text("{")
    capsys.readouterr()
    assert _train(tmp_path) == 1
    assert "none of 1 checkpoints is whole; bring a copy back" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# With half a checkpoint's room the run is stopped before it writes; with nearly all of it, while it writes.
@pytest.mark.parametrize(("room_ratio", "reason"), [(0.5, "MB free"), (0.98, "No space left on device")])
def test_disk_full_while_saving(
    small_disk: Path, capsys: pytest.CaptureFixture[str], room_ratio: float, reason: str
) -> None:
    assert _train(small_disk, "train.time_limit_s=0.0") == 75
    kept = small_disk / "debug_mae" / "checkpoints" / "step_00000001"
    n_bytes = sum(p.stat().st_size for p in kept.iterdir())
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * int(shutil.disk_usage(small_disk).free - room_ratio * n_bytes))
    assert _train(small_disk) == 1
    message = capsys.readouterr().err
    assert reason in message
    assert "the newest kept is step_00000001" in message
    assert "start the same command again" in message
    assert _checkpoints(small_disk) == ["step_00000001"]
    assert verify(kept) is None
    filler.unlink()
    assert _train(small_disk) == 0
    assert _checkpoints(small_disk) == ["step_00000004", "step_00000008"]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_write_error_in_mid_save(tmp_path: Path, capsys: pytest.CaptureFixture[str], asynchronous: str) -> None:
    """A file size limit makes the write itself fail, past the check of free space."""
    assert _train(tmp_path, f"checkpoint.asynchronous={asynchronous}", "train.time_limit_s=0.0") == 75
    kept = _checkpoints(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        status = _train(tmp_path, f"checkpoint.asynchronous={asynchronous}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    message = capsys.readouterr().err
    assert "not written: " in message
    assert "File too large" in message
    assert f"the newest kept is {kept[0]}" in message
    assert _checkpoints(tmp_path) == kept
    assert _train(tmp_path, f"checkpoint.asynchronous={asynchronous}") == 0


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.usefixtures("toys")
def test_non_finite_step_is_skipped_counted_and_logged(tmp_path: Path) -> None:
    stumbling = ("objective.name=toys.stumbling", "objective.ema_momentum=0.5")
    assert _train(tmp_path / "a", *stumbling, "objective.bad_steps=[5]", "checkpoint.every_n_steps=1") == 0
    run = tmp_path / "a" / "debug_mae"
    log = records(run / "metrics.jsonl")
    assert [r["n_skipped_steps"] for r in log] == [0, 0, 0, 0, 0, 1, 1, 1]
    skipped = records(run / "skipped.jsonl")
    assert [r["step"] for r in skipped] == [5]
    assert len(skipped[0]["keys"]) == 8
    keep = ("checkpoint.every_n_steps=1", "checkpoint.keep=8")
    assert _train(tmp_path / "b", *stumbling, "objective.bad_steps=[5]", *keep) == 0
    before, after, later = (
        read_checkpoint(tmp_path / "b" / "debug_mae" / "checkpoints" / f"step_{s:08d}") for s in (5, 6, 7)
    )
    weights = [k for k in before if k.startswith(("objective.", "optimizer.state."))]
    assert any(k.startswith("objective.teacher") for k in weights)
    assert all(torch.equal(before[k], after[k]) for k in weights)
    assert any(not torch.equal(after[k], later[k]) for k in weights)


@pytest.mark.usefixtures("toys")
def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = ("objective.name=toys.stumbling", "objective.bad_steps=[3,4,5]", "train.max_skipped_steps=3")
    assert _train(tmp_path, *bad) == 1
    message = capsys.readouterr().err
    assert "3 steps in a row had a non-finite loss or gradient (train.max_skipped_steps)" in message
    assert "weights are those of step 3" in message


@pytest.mark.usefixtures("toys")
def test_what_happened_before_a_checkpoint_is_written_before_it(tmp_path: Path) -> None:
    """Else a run that is killed after its checkpoint would forget it."""
    bad = ("objective.name=toys.stumbling", "objective.bad_steps=[2]", "log.every_n_steps=100")
    assert _train(tmp_path, *bad) == 0
    assert [(r["step"], r["n_skipped_steps"]) for r in records(tmp_path / "debug_mae" / "metrics.jsonl")] == [
        (4, 1),
        (8, 1),
    ]
