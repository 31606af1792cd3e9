"""The run directory: one process group at a time, one config, and the facts that make a run readable later."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_eo.config import Config, difference, read_yaml, to_dict
from ssl_eo.data.manifest import schema_from_dict, schema_to_dict
from ssl_eo.data.types import TileSchema
from ssl_eo.distributed import World, barrier, is_main
from ssl_eo.eval.report import read_jsonl, save_panel
from ssl_eo.train.checkpoint import newest

__all__ = ["claim", "describe", "read_environment", "read_schemas", "record_skipped", "save_pictures"]


@contextlib.contextmanager
def claim(path: Path, config: Config) -> Iterator[None]:
    """Hold the run directory `path` for this process group; refuses a directory in use or of another config."""
    handle = _lock(path) if is_main() else None
    try:
        if is_main():
            _check_config(path, config)
        barrier()
        yield
    finally:
        if handle is not None:
            os.close(handle)


def describe(config: Config, schemas: Sequence[Mapping[str, TileSchema]], world: World, step: int) -> None:
    """Write `config.yaml`, `schemas.json` and `env.json`, and drop log records of steps that will be done again."""
    import yaml

    path = config.run_dir
    _write(path / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    table = [{name: schema_to_dict(schema) for name, schema in source.items()} for source in schemas]
    _write(path / "schemas.json", json.dumps(table, indent=1))
    _write(path / "env.json", json.dumps(_environment(world), indent=1))
    for name in ("metrics.jsonl", "eval.jsonl", "keys.jsonl"):  # by the number of finished steps
        _keep_until(path / name, step)
    for name in ("quarantine.jsonl", "skipped.jsonl"):  # by the step itself, counted from 0
        _keep_until(path / name, step - 1)


def read_schemas(path: Path) -> list[dict[str, TileSchema]]:
    """The schemas that `describe` wrote, one mapping of tile names a source."""
    sources = json.loads((path / "schemas.json").read_text(encoding="utf-8"))
    return [{name: schema_from_dict(name, raw) for name, raw in source.items()} for source in sources]


def read_environment(path: Path) -> dict[str, Any]:
    """The facts that `describe` wrote to `env.json`."""
    facts: dict[str, Any] = json.loads((path / "env.json").read_text(encoding="utf-8"))
    return facts


def record_skipped(path: Path, step: int, rank: int, keys: Sequence[str]) -> None:
    """Append the sample keys of a skipped step to `skipped.jsonl`."""
    with (path / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "rank": rank, "keys": list(keys)}) + "\n")


def save_pictures(path: Path, step: int, pictures: Mapping[str, Tensor], schema: TileSchema) -> None:
    """Write a panel of normalised `[n, C, H, W]` pictures in true colour, a row a title."""
    names = schema.sensor.true_color
    if names is not None and set(names) <= set(schema.bands):
        shown = [schema.bands.index(name) for name in names]
    else:
        shown = [0, 0, 0] if len(schema.bands) < 3 else [0, 1, 2]
    rows = [(title, v[:, shown].float().cpu().permute(0, 2, 3, 1).numpy()) for title, v in pictures.items()]
    folder = path / "pictures"
    folder.mkdir(exist_ok=True)
    save_panel(folder / f"step_{step:08d}.png", rows)


def _lock(path: Path) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(
            f"run directory {path} cannot be used: {error.strerror}; set run.out_dir to a folder you may write to"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ValueError(
            f"run directory {path} is in use by another process; wait for it, stop it, or set another run.name"
        ) from None
    return handle


def _check_config(path: Path, config: Config) -> None:
    saved = path / "config.yaml"
    if not saved.exists() or newest(path / "checkpoints") is None:
        return
    lines = difference(read_yaml(saved), to_dict(config))
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(
            f"{path} holds a run of another config; these keys differ (saved -> now):\n  {listed}\n"
            "put them back to go on with it, or set another run.name"
        )


def _keep_until(path: Path, step: int) -> None:
    """Keep the records of steps up to `step`: later ones are written again, and a killed run may end in half a line."""
    if path.exists():
        kept = [record for record in read_jsonl(path) if record.get("step", 0) <= step]
        _write(path, "".join(json.dumps(record) + "\n" for record in kept))


def _write(path: Path, text: str) -> None:
    """Replace `path` in one go, so that a kill leaves the old or the new file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _environment(world: World) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": device,
        "world_size": world.size,
        "n_threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": sys.argv,
    }


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with `+` when files differ from it; None outside one."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if dirty else "")
