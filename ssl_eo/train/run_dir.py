"""The run directory: one process group at a time, one config, and the facts that make a run readable later."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_eo.components import one_line
from ssl_eo.config import Config, build, difference, read_yaml, to_yaml
from ssl_eo.data.manifest import schema_from_dict, schema_to_dict
from ssl_eo.data.types import TileSchema
from ssl_eo.distributed import (
    World,
    barrier,
    broadcast_object,
    is_main,
    on_all_ranks,
    raise_on_all_ranks,
    world_size,
)
from ssl_eo.eval.panel import save_panel
from ssl_eo.files import atomic_write, is_seen, locked_folder
from ssl_eo.installation import commit
from ssl_eo.jsonl import JsonLines, read_jsonl
from ssl_eo.train.sealing import holds_checkpoints

__all__ = [
    "check_own",
    "claim",
    "describe",
    "identify",
    "read_environment",
    "read_schemas",
    "record_skipped",
    "save_pictures",
]

_WORD = "run_id"
_SHARED_WITHIN_S = 30.0  # a network file system may show a new file late


@contextlib.contextmanager
def claim(path: Path, config: Config) -> Iterator[None]:
    """Hold the run directory `path` for this process group.

    Raises `ValueError` on every rank for a directory in use, of another config, or that not every rank sees.
    """
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        if is_main():
            try:
                stack.enter_context(locked_folder(path, "set another run.name or run.out_dir"))
                _check_config(path, config)
            except (ValueError, OSError) as caught:
                error = caught
        raise_on_all_ranks(error)
        _check_shared(path)
        yield


def describe(config: Config, schemas: Sequence[Mapping[str, TileSchema]], world: World, step: int) -> None:
    """Write `config.yaml`, `schemas.json` and `env.json`, and drop log records of steps that will be done again."""
    path = config.run_dir
    atomic_write(path / "config.yaml", to_yaml(config))
    table = [{name: schema_to_dict(schema) for name, schema in source.items()} for source in schemas]
    atomic_write(path / "schemas.json", json.dumps(table, indent=1))
    atomic_write(path / "env.json", json.dumps(_environment(world), indent=1))
    for name in ("metrics.jsonl", "eval.jsonl", "keys.jsonl"):  # by the number of finished steps
        _keep_until(path / name, step if step else -1)  # a run that starts anew also measures step 0 anew
    for name in ("quarantine.jsonl", "skipped.jsonl"):  # by the step itself, counted from 0
        _keep_until(path / name, step - 1)


def identify(path: Path, is_new: bool) -> str:
    """The word by which the run in `path` is known, on every rank; a new one where it `is_new`. Collective.

    A folder may be removed and used again while an old process still writes to it, and checkpoints may be copied from
    elsewhere: each says which run it is of.
    """
    word = ""
    if is_main():
        file = path / _WORD
        if is_new or not file.is_file():
            path.mkdir(parents=True, exist_ok=True)
            atomic_write(file, token_hex(8))
        word = file.read_text(encoding="utf-8")
    return str(broadcast_object(word))


def check_own(path: Path, word: str) -> None:
    """Raise `RuntimeError` on every rank unless `path` is still the folder of the run that is known by `word`."""
    error: RuntimeError | None = None
    if is_main():
        file = path / _WORD
        if not file.is_file() or file.read_text(encoding="utf-8") != word:
            error = RuntimeError(f"{path} was removed or replaced while this run was going on; it ends here")
    raise_on_all_ranks(error)


def read_schemas(path: Path) -> list[dict[str, TileSchema]]:
    """The schemas that `describe` wrote, one mapping of tile names a source."""
    file = path / "schemas.json"
    try:
        sources = json.loads(file.read_text(encoding="utf-8"))
        return [{name: schema_from_dict(name, raw) for name, raw in source.items()} for source in sources]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {one_line(error)}; bring it back from a copy of the run") from error


def read_environment(path: Path) -> dict[str, Any]:
    """The facts that `describe` wrote to `env.json`."""
    facts: dict[str, Any] = json.loads((path / "env.json").read_text(encoding="utf-8"))
    return facts


def record_skipped(path: Path, step: int, rank: int, keys: Sequence[str]) -> None:
    """Append the sample keys of a skipped step to `skipped.jsonl`."""
    with JsonLines(path / "skipped.jsonl") as file:
        file.write({"step": step, "rank": rank, "keys": list(keys)})


def save_pictures(path: Path, step: int, pictures: Mapping[str, Tensor], schema: TileSchema) -> None:
    """Write a panel of normalised `[n, C, H, W]` pictures, a row a title.

    In true colour where the sensor has it: bands in stored values, since each was normalised by itself. Else the first
    bands as they are.
    """
    names = schema.sensor.true_color
    mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    if names is not None and set(names) <= set(schema.bands):
        shown = [schema.bands.index(name) for name in names]
        mean, std = (torch.tensor([values[i] for i in shown])[:, None, None] for values in (schema.mean, schema.std))
    else:
        shown = [0, 0, 0] if len(schema.bands) < 3 else [0, 1, 2]
    stored = {title: v[:, shown].float().cpu() * std + mean for title, v in pictures.items()}  # [n, 3, H, W]
    rows = [(title, v.permute(0, 2, 3, 1).numpy()) for title, v in stored.items()]
    folder = path / "pictures"
    folder.mkdir(exist_ok=True)
    save_panel(folder / f"step_{step:08d}.png", rows)


def _check_shared(path: Path) -> None:
    """Raise `ValueError` on every rank when one does not see what the first has written to `path`."""
    if world_size() == 1:
        return
    word = broadcast_object(token_hex(8))
    page = path / ".seen_by_all"
    if is_main():
        atomic_write(page, word)
    barrier()

    def look() -> None:
        if not is_seen(lambda: page.is_file() and page.read_text(encoding="utf-8") == word, _SHARED_WITHIN_S):
            raise ValueError(
                f"{path} is not the folder that the first rank writes to; set run.out_dir to one that all nodes share"
            )

    on_all_ranks(look)
    if is_main():
        page.unlink()


def _check_config(path: Path, config: Config) -> None:
    if not holds_checkpoints(path / "checkpoints"):
        return
    saved = path / "config.yaml"
    if not saved.exists():
        raise ValueError(f"{saved} is missing, and says what the checkpoints beside it are; bring it back")
    try:
        before = build(Config, read_yaml(saved), "")
    except ValueError as error:
        raise ValueError(
            f"{saved} is damaged, or of another version of ssl_eo ({error}); bring it back, or set another run.name"
        ) from None
    if lines := difference(before, config):
        raise ValueError(
            f"{path} holds a run of another config (saved -> now): {'; '.join(lines)}. Put the keys back to go on with"
            " it, or set another run.name"
        )


def _keep_until(path: Path, step: int) -> None:
    """Keep the records of steps up to `step`: later ones are written again, and a killed run may end in half a line."""
    if path.exists():
        kept = [record for record in read_jsonl(path) if isinstance(at := record.get("step", 0), int) and at <= step]
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept))


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
        "commit": commit(),
        "command": sys.argv,
    }
