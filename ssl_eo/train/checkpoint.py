"""Checkpoints through torch's distributed checkpoint (DCP): atomic, checked, kept by policy, optionally asynchronous.

A checkpoint is a directory `step_00000200`. It is written under a partial name, sealed with `complete.json` (size and
CRC32 of every file), synced and renamed, so a directory with the final name is whole or has been damaged later; damage
is found by the seal, reported, and the one before is used.
"""

from __future__ import annotations

import errno
import logging
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ssl_eo.distributed import (
    background_group,
    barrier,
    broadcast_object,
    is_main,
    raise_on_all_ranks,
    tell_by,
    world_size,
)
from ssl_eo.train.metadata_reader import MetadataReader, ValuePlanner
from ssl_eo.train.sealing import CheckpointError, candidates, name_of, read_seal, seal, step_of

__all__ = ["CheckpointConfig", "Checkpointer", "load_weights", "read_weights"]

logger = logging.getLogger(__name__)

# DCP warns whenever there is one process; here that is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_ENTRY_BYTES = 2048  # what DCP's container adds to each tensor, roughly
_DCP_ERRORS = (Exception, CheckpointException)  # the latter derives from BaseException
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class CheckpointConfig:
    """When to save and what to keep. The last step and a stop on request are always saved."""

    every_n_steps: int = 1000  # and after the last step
    keep: int = 2  # newest checkpoints kept
    keep_every_n_steps: int | None = None  # these are kept for good
    asynchronous: bool = False  # write in the background while training goes on

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {self.every_n_steps}")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")
        every = self.keep_every_n_steps
        if every is not None and (every < 1 or every % self.every_n_steps):
            raise ValueError(f"keep_every_n_steps {every} is not a multiple of every_n_steps {self.every_n_steps}")


class Checkpointer:
    """Saves and restores one objective and its optimiser below `run_dir/checkpoints`. All methods are collective."""

    def __init__(
        self,
        cfg: CheckpointConfig,
        run_dir: Path,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        timeout_s: float = 1800.0,  # of ranks for each other, in the background
    ) -> None:
        self.cfg = cfg
        self.root = run_dir / "checkpoints"
        self.objective = objective
        self.optimizer = optimizer
        self._pending: Future[Any] | None = None
        self._finaliser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # Background saves need their own group: their collectives run beside those of training.
        self._group = background_group(timeout_s) if cfg.asynchronous else None
        if is_main():
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob("*.partial"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        barrier()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` finished steps."""
        return step % self.cfg.every_n_steps == 0

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """Save the state after `step` finished steps; `facts` are plain values stored in the seal."""
        self.wait()
        final = self.root / name_of(step)
        if broadcast_object(final.exists()):
            return
        state = self._state()
        raise_on_all_ranks(self._lack_of_space(state) if is_main() else None)
        partial = self.root / f"{final.name}.partial"
        alone = world_size() == 1
        try:
            if self.cfg.asynchronous:
                saving = async_save(state, checkpoint_id=partial, process_group=self._group, no_dist=alone)
                assert isinstance(saving, Future)
                self._pending = self._finaliser.submit(self._finish, saving, partial, final, facts)
                return
            save(state, checkpoint_id=partial, no_dist=alone)
            problem = self._seal(partial, final, facts) if is_main() else None
        except CheckpointException as error:  # DCP's own, the same on all ranks; any other tells of a rank that is gone
            raise tell_by(0, self._write_error(error, partial, step)) from error
        raise_on_all_ranks(problem)

    def wait(self) -> None:
        """Return when the save in progress, if any, is complete; raises what it raised, on all ranks."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            error = pending.exception()
            raise_on_all_ranks(error)

    def close(self) -> None:
        """Finish what is being written. Not collective: a rank may come here alone, with an error of its own.

        Something is pending only where the run ends by an error. That is the one to raise, so a save that fails too is
        only reported.
        """
        self._finaliser.shutdown()
        if self._pending is not None and (error := self._pending.exception()) is not None:
            logger.warning("%s", error)

    def restore(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Load the checkpoint `path`, of any number of ranks and any strategy, into objective and optimiser.

        Returns its step and facts.
        """
        sealed = read_seal(path)
        state = self._state()
        _load(state, path, alone=world_size() == 1)
        set_state_dict(
            self.objective,
            self.optimizer,
            model_state_dict=state["objective"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )
        return sealed["step"], sealed["facts"]

    def _state(self) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(self.objective, self.optimizer, options=_OPTIONS)
        return {"objective": model_state, "optimizer": optimizer_state}

    def _finish(self, saving: Future[Any], partial: Path, final: Path, facts: dict[str, Any]) -> None:
        """In the background: what `save` does after DCP's part, without its collectives."""
        try:
            saving.result()
        except _DCP_ERRORS as error:
            raise self._write_error(error, partial, step_of(final)) from error
        if is_main() and (problem := self._seal(partial, final, facts)) is not None:
            raise problem

    def _seal(self, partial: Path, final: Path, facts: dict[str, Any]) -> CheckpointError | None:
        """Make the written files a checkpoint; returns what prevented it."""
        try:
            written = MetadataReader(partial).read_metadata().storage_data.values()
            seal(partial, final, facts, expected={entry.relative_path for entry in written})
        except OSError as error:
            return self._write_error(error, partial, step_of(final))
        self._prune(final)
        return None

    def _prune(self, written: Path) -> None:
        found = candidates(self.root)
        expendable = [p for p in found if not self._is_kept_for_good(p) and p != written]
        for path in expendable[self.cfg.keep - 1 :]:
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                pass  # somebody else has removed it, or is at it
            except OSError as error:  # the new one is written: no reason to end the run
                logger.warning("the old checkpoint %s could not be removed: %s", path, error)

    def _is_kept_for_good(self, path: Path) -> bool:
        every = self.cfg.keep_every_n_steps
        return every is not None and step_of(path) % every == 0

    def _lack_of_space(self, state: dict[str, Any]) -> CheckpointError | None:
        tensors = [v for part in state.values() for v in part.values() if isinstance(v, torch.Tensor)]
        needed = sum(t.numel() * t.element_size() + _ENTRY_BYTES for t in tensors)
        free = shutil.disk_usage(self.root).free
        if free >= needed:
            return None
        return CheckpointError(
            f"{self.root}: {free / 1e6:.1f} MB free, a checkpoint needs {needed / 1e6:.1f} MB;"
            f" {self._kept('Free some space and start')}"
        )

    def _write_error(self, error: BaseException, partial: Path, step: int) -> CheckpointError:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        cause = _root_cause(error)
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        is_full = isinstance(cause, OSError) and cause.errno in _OUT_OF_SPACE
        advice = "Free some space and start" if is_full else "Mend that and start"
        return CheckpointError(f"checkpoint of step {step} not written: {_first_line(cause)}; {self._kept(advice)}")

    def _kept(self, advice: str) -> str:
        whole = candidates(self.root)
        kept = f"the newest kept is {whole[0].name}" if whole else "none was written before"
        return f"{kept}. {advice} the same command again: it goes on from there"


def load_weights(path: Path, objective: nn.Module) -> dict[str, Any]:
    """Load a whole checkpoint's weights into `objective`, without optimiser or process group; returns the seal."""
    state = objective.state_dict()
    _load({"objective": state}, path, alone=True)
    objective.load_state_dict(state)
    return read_seal(path)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a whole checkpoint by their names in the objective, whichever that is; no process group."""
    entries = MetadataReader(path).read_metadata().state_dict_metadata
    state = {
        name.removeprefix("objective."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith("objective.") and isinstance(entry, TensorStorageMetadata)
    }
    _load({"objective": state}, path, alone=True)
    return state


def _load(state: dict[str, Any], path: Path, *, alone: bool) -> None:
    """Read the parts that `state` names into its tensors."""
    try:
        _check_fit(state, path)
        load(state, storage_reader=MetadataReader(path), planner=ValuePlanner(), no_dist=alone)
    except (CheckpointException, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {_first_line(_root_cause(error))}") from error


def _check_fit(state: dict[str, Any], path: Path) -> None:
    """DCP compares sizes only in part, and leaves tensors that the objective lacks unread."""
    entries = MetadataReader(path).read_metadata().state_dict_metadata
    saved = {name: list(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    wanted = {
        f"{part}.{name}": list(value.shape)
        for part, values in state.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    named = dict.fromkeys([*wanted, *(name for name in saved if name.startswith("objective."))])
    wrong = [name for name in named if saved.get(name) != wanted.get(name)]
    if wrong:
        there, here = saved.get(wrong[0], "absent"), wanted.get(wrong[0], "absent")
        raise ValueError(
            f"{len(wrong)} tensors do not fit this config, the first is {wrong[0]}:"
            f" {there} in the checkpoint, {here} here"
        )


def _root_cause(error: BaseException) -> BaseException:
    """The innermost error: DCP wraps a full disk into several layers."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        return _root_cause(first[0] if isinstance(first, tuple) else first)
    inner = error.__cause__ or (error.__context__ if isinstance(error, RuntimeError) else None)
    return error if inner is None else _root_cause(inner)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
