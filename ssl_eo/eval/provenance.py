"""What a result depends on beside what was asked: the code, where samples come from, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
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

__all__ = ["SHOWN_ONLY", "code_digest", "content_of", "digest_of_tensors", "source_facts", "task_facts"]

_PACKAGE = Path(ssl_eo.__file__).parent
_CODE = ("eval/**/*.py", "models/**/*.py", "data/**/*.py", "seeding.py", "sensors.py")

# Modules of eval that show results and change none: to edit a page is no reason to measure again.
SHOWN_ONLY = (
    *("aggregates", "comparison", "entrants", "experiments", "figures", "page", "report", "result_figures"),
    *("result_tables", "results_page", "summary", "table"),
)


@cache
def code_digest() -> str:
    """Of the sources of this package that a score can depend on."""
    shown_only = {_PACKAGE / "eval" / f"{name}.py" for name in SHOWN_ONLY}
    paths = {path for pattern in _CODE for path in _PACKAGE.glob(pattern)} - shown_only
    digest = blake2b(digest_size=12)
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


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
