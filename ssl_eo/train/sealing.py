"""Folders that are checkpoints: how they are named, sealed with a checksum of every file, checked and found.

A folder with the name of a checkpoint is whole, or has been damaged later; damage is found by the seal.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ssl_eo.distributed import broadcast_object, is_main, raise_on_all_ranks
from ssl_eo.files import is_seen, sync

__all__ = [
    "CheckpointError",
    "OtherFormatError",
    "candidates",
    "find_checkpoint",
    "holds_checkpoints",
    "locate",
    "name_of",
    "newest",
    "read_seal",
    "seal",
    "step_of",
    "verify",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})")
_SEAL = "complete.json"
_FORMAT = 2
_SEEN_WITHIN_S = 60.0  # what another node has written


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


class OtherFormatError(ValueError):
    """A checkpoint of another version of ssl_eo: not damaged, and nothing to pass over."""


def seal(partial: Path, final: Path, facts: dict[str, Any], expected: Collection[str]) -> None:
    """Make the folder `partial`, which holds the `expected` files, the checkpoint `final`, in one go.

    Raises `OSError`, also when a file that another rank has written does not come to be seen here.
    """
    _await(partial, expected)
    files = {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(partial.iterdir())}
    (partial / _SEAL).write_text(_signed({"format": _FORMAT, "step": step_of(final), "facts": facts, "files": files}))
    for path in (partial / _SEAL, partial):  # each rank has synced what it wrote
        sync(path)
    partial.rename(final)
    sync(final.parent)


def _await(folder: Path, expected: Collection[str]) -> None:
    def missing() -> list[str]:
        return [name for name in expected if not (folder / name).is_file()]

    if not is_seen(lambda: not missing(), _SEEN_WITHIN_S):
        raise OSError(
            f"{len(missing())} of {len(expected)} files are not there, the first is {missing()[0]}: do all nodes write"
            " to one file system?"
        )


def name_of(step: int) -> str:
    """Of the checkpoint after `step` finished steps."""
    return f"step_{step:08d}"


def find_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint to go on from, on every rank, or None where nothing was saved yet. Collective.

    Damaged ones that are newer are set aside, since training will write these steps again. Raises as `newest` does.
    """
    root = run_dir / "checkpoints"
    path: Path | None = None
    error: Exception | None = None
    if is_main():
        try:
            path = newest(root)
        except (CheckpointError, OtherFormatError, OSError) as caught:
            error = caught
    raise_on_all_ranks(error)
    if path is not None:
        for damaged in (p for p in candidates(root) if step_of(p) > step_of(path)):
            aside = damaged.with_name(f"{damaged.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
    agreed: Path | None = broadcast_object(path)
    return agreed


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint below `root` (a `checkpoints` folder), or None where nothing was saved yet.

    Damaged ones are reported and passed over. Raises `CheckpointError` when all are: to start over without a word
    would be to throw the run away.
    """
    found = candidates(root)
    for path in found:
        problem = verify(path)
        if problem is None:
            return path
        logger.warning("checkpoint %s is damaged (%s) and is passed over", path, problem)
    if found:
        raise CheckpointError(
            f"{root}: none of {len(found)} checkpoints is whole; bring a copy back, or move the folder away to"
            " start over"
        )
    return None


def locate(path: Path) -> Path:
    """The whole checkpoint that `path` names: itself a `step_` directory, or a run directory, whose newest it is.

    Raises `ValueError` when `path` is neither, `CheckpointError` when the checkpoint is damaged.
    """
    if _NAME.fullmatch(path.name) and path.is_dir():
        if (problem := verify(path)) is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: {problem}")
        return path
    if (found := newest(path / "checkpoints")) is None:
        raise ValueError(
            f"{path}: no run with a whole checkpoint here, and no bundle (encoder.json); give a run directory, one of"
            " its checkpoints, or a bundle"
        )
    return found


def holds_checkpoints(root: Path) -> bool:
    """Whether something was saved below `root`, whole or not."""
    return bool(candidates(root))


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint directory `path`, or None when every file is as it was sealed."""
    try:
        sealed = read_seal(path)
    except CheckpointError as error:
        return str(error)
    if sealed["step"] != step_of(path):
        return f"{_SEAL} is that of step {sealed['step']}"
    for name, expected in sealed["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            n_bytes, crc32 = file.stat().st_size, _crc32(file)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if n_bytes != expected["bytes"]:
            return f"{name} has {n_bytes} bytes, {expected['bytes']} were written"
        if crc32 != expected["crc32"]:
            return f"{name} does not match its checksum"
    return None


def candidates(root: Path) -> list[Path]:
    """Folders below `root` with the name of a checkpoint, the newest first."""
    found = [p for p in root.glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _signed(facts: dict[str, Any]) -> str:
    """The text of a seal: its content, and the checksum of that on the last line."""
    content = json.dumps(facts, indent=1)
    return f"{content}\n{zlib.crc32(content.encode()):08x}\n"


def read_seal(path: Path) -> dict[str, Any]:
    """`step`, `facts` and `files` of the checkpoint `path`.

    Raises `CheckpointError` when its seal is not as it was, `OtherFormatError` when it may well be.
    """
    try:
        content, _, checksum = (path / _SEAL).read_bytes().rstrip(b"\n").rpartition(b"\n")
    except OSError as error:
        raise CheckpointError(f"{_SEAL} cannot be read: {error.strerror}") from error
    if b"%08x" % zlib.crc32(content) != checksum:
        raise CheckpointError(f"{_SEAL} does not match its checksum")
    sealed = _parse(content)
    if sealed["format"] != _FORMAT:
        raise OtherFormatError(
            f"{path}: the checkpoint has format {sealed['format']}, this version of ssl_eo reads {_FORMAT}; use the"
            " version that wrote it"
        )
    return sealed


def _parse(content: bytes) -> dict[str, Any]:
    """Raises `CheckpointError` for what no seal says; a checksum is easily made."""
    try:
        sealed = json.loads(content)
        assert isinstance(sealed["format"], int)
        assert isinstance(sealed["step"], int)
        assert isinstance(sealed["facts"], dict)
        files = sealed["files"].values()
        assert all(isinstance(f["bytes"], int) and isinstance(f["crc32"], int) for f in files)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError):
        raise CheckpointError(f"{_SEAL} is no seal") from None
    found: dict[str, Any] = sealed
    return found


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
