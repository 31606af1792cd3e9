"""Checkpoints: kept by policy, the same bits in the background, on another world size, and never another model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import assert_same_bits, read_checkpoint
from torch import nn

from ssl_eo.distributed import barrier, rank
from ssl_eo.train.checkpoint import CheckpointConfig, Checkpointer, load_weights
from ssl_eo.train.sealing import CheckpointError, find_checkpoint, newest, verify

FACTS = {"data": ["a fingerprint"], "n_seen": 12}


class Run:
    """A small model with a fused AdamW, a buffer and something to learn; `seed` decides the first weights."""

    def __init__(self, folder: Path, seed: int = 0, width: int = 8, **policy: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        no_decay = [p for p in self.model.parameters() if p.ndim == 1]
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        groups = [{"params": decay, "lr": 0.01, "weight_decay": 0.1}, {"params": no_decay, "lr": 0.02}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), fused=True)
        self.checkpointer = Checkpointer(CheckpointConfig(**policy), folder, self.model, self.optimizer)

    def train(self, n_steps: int = 1, first: int = 0) -> None:
        for step in range(first, first + n_steps):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, step: int) -> None:
        self.checkpointer.save(step, FACTS)

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        found = find_checkpoint(self.checkpointer.root.parent)
        return None if found is None else self.checkpointer.restore(found)

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of every tensor of model and optimiser."""
        found = {f"model.{k}": v.clone() for k, v in self.model.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{k}": v.clone() for k, v in values.items()}
        return found


def _kept(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("policy", "steps", "kept"),
    [
        ({"keep": 2}, range(1, 6), [4, 5]),
        ({"keep": 1}, range(1, 6), [5]),
        ({"keep": 9}, range(1, 4), [1, 2, 3]),
        ({"keep": 1, "every_n_steps": 2, "keep_every_n_steps": 4}, range(2, 12, 2), [4, 8, 10]),
        ({"keep": 2, "every_n_steps": 2, "keep_every_n_steps": 4}, range(2, 14, 2), [4, 8, 10, 12]),
        ({"keep": 2, "asynchronous": True}, range(1, 6), [4, 5]),
    ],
)
def test_what_is_kept(tmp_path: Path, policy: dict[str, Any], steps: range, kept: list[int]) -> None:
    run = Run(tmp_path, **policy)
    for step in steps:
        assert run.checkpointer.due(step) == (step % policy.get("every_n_steps", 1000) == 0)
        run.save(step)
    run.checkpointer.close()
    assert _kept(tmp_path) == kept
    assert [verify(tmp_path / "checkpoints" / f"step_{step:08d}") for step in kept] == [None] * len(kept)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"every_n_steps": 10, "keep_every_n_steps": 25}, "25 is not a multiple of every_n_steps 10"),
    ],
)
def test_impossible_policies_are_refused(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**policy)


def test_background_save_holds_the_state_at_the_call(tmp_path: Path) -> None:
    """Training changes weights, buffers and optimiser in place as soon as `save` returns."""
    runs = [Run(tmp_path / name, width=2048, asynchronous=name == "background") for name in ("background", "at once")]
    for run in runs:
        run.train(3)
        run.save(3)
        with torch.no_grad():
            for value in (*run.model.state_dict().values(), *_optimizer_tensors(run)):
                value.fill_(9)
        run.checkpointer.close()
    background, at_once = (read_checkpoint(newest(run.checkpointer.root) or Path()) for run in runs)
    assert_same_bits(background, at_once)
    assert all(not (value == 9).all() for value in background.values())


def _optimizer_tensors(run: Run) -> list[torch.Tensor]:
    return [value for state in run.optimizer.state.values() for value in state.values()]


def test_training_goes_on_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    plain, saved = Run(tmp_path / "plain"), Run(tmp_path / "saved", asynchronous=True)
    plain.train(6)
    for step in range(6):
        saved.train(1, first=step)
        saved.save(step + 1)
    saved.checkpointer.close()
    assert_same_bits(plain.state(), saved.state())


def test_model_and_fused_optimiser_come_back_exactly(tmp_path: Path) -> None:
    old = Run(tmp_path)
    old.train(5)
    old.save(5)
    new = Run(tmp_path, seed=1)
    assert new.restore() == (5, FACTS)
    assert_same_bits(old.state(), new.state())
    assert {float(v) for k, v in new.state().items() if k.endswith(".step")} == {5.0}
    settings = [{k: v for k, v in group.items() if k != "params"} for group in old.optimizer.param_groups]
    assert settings == [{k: v for k, v in group.items() if k != "params"} for group in new.optimizer.param_groups]
    for run in (old, new):
        run.train(3, first=5)
    assert_same_bits(old.state(), new.state())


def test_without_a_checkpoint_nothing_is_restored(tmp_path: Path) -> None:
    run = Run(tmp_path)
    before = run.state()
    assert run.restore() is None
    assert_same_bits(before, run.state())


def test_leftovers_of_a_killed_save_are_removed_at_the_start(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    leftover = tmp_path / "checkpoints" / "step_00000002.partial"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half of it")
    assert Run(tmp_path, seed=1).restore() == (1, FACTS)
    assert _kept(tmp_path) == [1]


def test_any_flipped_bit_of_the_seal_is_damage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.save(2)
    seal = tmp_path / "checkpoints" / "step_00000002" / "complete.json"
    content = seal.read_bytes()
    for i in range(len(content) - 1):  # the last is the end of the line
        seal.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        assert verify(seal.parent) is not None, i
    other = Run(tmp_path, seed=1)
    seal.write_bytes((tmp_path / "checkpoints" / "step_00000001" / "complete.json").read_bytes())
    assert verify(seal.parent) == "complete.json is that of step 1"
    assert other.restore() == (1, FACTS)


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, keep=1)
    run.save(1)

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    run.save(2)
    assert _kept(tmp_path) == [1, 2]
    assert "the old checkpoint" in caplog.text
    assert verify(tmp_path / "checkpoints" / "step_00000002") is None


def test_saving_an_existing_step_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    path = tmp_path / "checkpoints" / "step_00000001"
    before, written = read_checkpoint(path), path.stat().st_mtime_ns
    run.train(1)
    run.save(1)
    assert_same_bits(before, read_checkpoint(path))
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize("width", [6, 10])
def test_checkpoint_of_another_width_is_refused(tmp_path: Path, width: int) -> None:
    Run(tmp_path).save(1)
    other = Run(tmp_path, width=width)
    before = other.state()
    message = (
        r"step_00000001 cannot be loaded: \d+ tensors do not fit this config, the first is objective\.0\.weight:"
        rf" \[8, 4\] in the checkpoint, \[{width}, 4\] here"
    )
    with pytest.raises(CheckpointError, match=message):
        other.restore()
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "checkpoints" / "step_00000001", other.model)
    after = other.state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpoint_of_another_depth_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    path = tmp_path / "checkpoints" / "step_00000001"
    deeper, shallower = nn.Sequential(*run.model, nn.Linear(2, 2)), nn.Sequential(*run.model[:2])
    with pytest.raises(CheckpointError, match=r"objective\.3\.weight: absent in the checkpoint, \[2, 2\] here"):
        load_weights(path, deeper)
    with pytest.raises(CheckpointError, match=r"objective\.2\.\w+: .* in the checkpoint, absent here"):
        load_weights(path, shallower)


# --- another world size -----------------------------------------------------------------------------------------------


def _save_on_this_rank(folder: str, asynchronous: bool) -> dict[str, torch.Tensor]:
    run = Run(Path(folder), asynchronous=asynchronous)
    run.train(4)
    run.save(4)
    run.checkpointer.close()
    barrier()
    assert newest(run.checkpointer.root) is not None
    return run.state()


def _restore_on_this_rank(folder: str) -> tuple[Any, dict[str, torch.Tensor]]:
    run = Run(Path(folder), seed=1 + rank())
    return run.restore(), run.state()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_ranks_save_and_one_reads(tmp_path: Path, on_ranks: Callable[..., list[Any]], asynchronous: bool) -> None:
    saved = on_ranks(2, _save_on_this_rank, str(tmp_path), asynchronous)[0]
    found, state = _restore_on_this_rank(str(tmp_path))
    assert found == (4, FACTS)
    assert_same_bits(saved, state)


def test_one_rank_saves_and_two_read(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    saved = _save_on_this_rank(str(tmp_path), asynchronous=False)
    for found, state in on_ranks(2, _restore_on_this_rank, str(tmp_path)):
        assert found == (4, FACTS)
        assert_same_bits(saved, state)
