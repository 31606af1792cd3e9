"""What a result depends on beside what was asked: the code, where samples come from, and what they hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ssl_eo
from ssl_eo.data.opening import SourceConfig
from ssl_eo.eval.features import FeatureSet
from ssl_eo.eval.tasks import TaskConfig

__all__ = ["code_digest", "content_of", "digest_of_tensors", "scoring_files", "source_facts", "task_facts"]

_PACKAGE = Path(ssl_eo.__file__).parent
_MEASURES = "ssl_eo.eval.offline"
# What it imports and gets no score from: who works at what, what is written beside scores and how, what a forward pass
# costs, how processes find each other and start others; and what the package offers to others.
_TELLS_NOTHING = frozenset(
    {
        "ssl_eo",
        *(f"ssl_eo.eval.{name}" for name in ("claims", "cost", "failures", "leaks", "provenance", "records")),
        *(f"ssl_eo.{name}" for name in ("cluster", "data.loader", "files", "installation")),
    }
)


@cache
def code_digest() -> str:
    """Of the sources of this package that a score can depend on: see `scoring_files`."""
    digest = blake2b(digest_size=12)
    for path in scoring_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def scoring_files() -> list[Path]:
    """Sources of what `evaluate` runs: its module, and whatever that imports, directly or not, here or in a function.

    A package that a string names is imported whole, since components are found by name. Left out is what no score comes
    from.
    """
    found: dict[str, Path] = {}
    left = [_MEASURES]
    while left:
        name = left.pop()
        path = _path_of(name)
        if name in found or name in _TELLS_NOTHING or path is None:
            continue
        found[name] = path
        left += _imports(path)
    return sorted(found.values())


def _imports(path: Path) -> Iterator[str]:
    """Names that a source imports, or that may be such: modules, and what is taken from them."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _modules_of(node.value)


def _modules_of(name: str) -> list[str]:
    """All modules of the package `name` of ours; none where there is no such package."""
    path = _path_of(name)
    if path is None or path.name != "__init__.py" or path.parent == _PACKAGE:
        return []
    return [name, *(f"{name}.{module.stem}" for module in sorted(path.parent.glob("*.py")) if module != path)]


def _path_of(name: str) -> Path | None:
    """Where the module `name` of ours lies; None for what is no module, or of others."""
    first, *rest = name.split(".")
    if first != "ssl_eo" or not all(part.isidentifier() for part in rest):
        return None
    path = _PACKAGE.joinpath(*rest)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def source_facts(cfg: SourceConfig) -> dict[str, Any]:
    """Name and options of a source, without what differs between machines that hold the same samples.

    Left out are options that change no sample (`ssl_eo.components.free`), such as the folder of the files. Of other
    files that options name, the last part of the path is kept.
    """
    options = asdict(cfg.options)
    kept = {f.name: options[f.name] for f in fields(cfg.options) if not f.metadata.get("free")}
    return {"name": cfg.name, "options": _portable(kept)}


def task_facts(cfg: TaskConfig) -> dict[str, Any]:
    """All of a task that a score can depend on, with the facts of its sources by split."""
    sources = {name: source for name in ("train", "val", "test") if (source := getattr(cfg, name)) is not None}
    options = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in ("train", "val", "test")}
    return {**options, "sources": {name: source_facts(source) for name, source in sources.items()}}


def content_of(samples: FeatureSet) -> str:
    """The digest of the samples that features were computed of: their keys, labels and pixels."""
    digest = blake2b(digest_size=16)
    for key, pixels in zip(samples.keys, samples.digests, strict=True):
        digest.update(f"{len(key)} {key} {pixels}\n".encode())
    digest.update(digest_of_tensors({"labels": samples.labels}).encode())
    return digest.hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of all values, by name."""
    digest = blake2b(digest_size=12)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _portable(value: Any) -> Any:
    """Values without the folders of this machine."""
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(inner) for inner in value]
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).exists():
        return Path(value).name
    return value
