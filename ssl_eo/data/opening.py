"""What a run reads: `data` in a config, and its sources, opened."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ssl_eo.components import free, resolve
from ssl_eo.data.mixture import MixedSource
from ssl_eo.data.plans import SourceCrop
from ssl_eo.data.remote import RemoteConfig
from ssl_eo.data.render import Interpolation
from ssl_eo.data.types import Source

__all__ = ["DataConfig", "SourceConfig", "WeightedSourceConfig", "open_source", "open_sources"]


@dataclass
class SourceConfig:
    """A component of `ssl_eo.data.sources` and its `Config`."""

    name: str  # a module of ssl_eo.data.sources, or a dotted name of yours
    options: Any = field(metadata={"package": "ssl_eo.data.sources"})


@dataclass
class WeightedSourceConfig(SourceConfig):
    """One entry of `data.sources`."""

    weight: float = 1.0  # share of the steps this source feeds, relative to the other sources' weights
    crop: SourceCrop = field(default_factory=SourceCrop)  # where its views lie and how coarse they are

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight must be positive and finite, got {self.weight}")


@dataclass
class DataConfig:
    """What is read, in which order, and how. From `n_workers` on, nothing changes a batch."""

    sources: list[WeightedSourceConfig]  # one or more, each with the keys of its source
    # A batch comes from one source, or from all; then tiles are optional, and the objective draws among a sample's own.
    mixing: Literal["step", "sample"] = "step"
    temperature: float | None = None  # multiplies weights by n_samples ** (1 / temperature); None: as they are
    n_lanes: int = 8  # parallel streams of samples; a multiple of the world size, divides train.global_batch_size
    window_chunks: int = 8  # chunks of a lane that are shuffled together
    interpolation: Interpolation = "bicubic"  # of views that are resized
    n_workers: int = free(2)  # reading processes per rank; 0 reads in the training process
    prefetch_batches: int = free(2)  # batches that each worker prepares ahead
    read_ahead_steps: int = free(16)  # steps whose samples are fetched ahead, from sources that lie far away
    max_bad_ratio: float = free(0.01)  # share of unreadable samples at which the run stops
    pin_memory: bool = free(True)  # page-locked batches, for copies that overlap with compute; CUDA only
    start_method: Literal["auto", "fork", "forkserver"] = free("auto")  # of workers; auto forks unless CUDA is in use

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty: name at least one source")
        at_least = {"n_lanes": 1, "window_chunks": 1, "n_workers": 0, "prefetch_batches": 1, "read_ahead_steps": 0}
        for key, least in at_least.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be positive or null, got {self.temperature}")
        if not 0 <= self.max_bad_ratio <= 1:
            raise ValueError(f"max_bad_ratio must be between 0 and 1, got {self.max_bad_ratio}")


def open_source(cfg: SourceConfig) -> Source:
    """The source that `cfg` names, opened with its options."""
    source: Source = resolve("ssl_eo.data.sources", cfg.name).Source(cfg.options)
    return source


def open_sources(cfg: DataConfig) -> list[Source]:
    """What feeds a run: every source that `cfg` names, or all of them as one where batches mix them."""
    _check_caches(cfg)
    opened = []
    for i, source in enumerate(cfg.sources):
        try:
            opened.append(open_source(source))
        except ValueError as error:
            raise ValueError(f"data.sources[{i}] ({source.name}): {error}") from None
    return [MixedSource(opened)] if cfg.mixing == "sample" else opened


def _check_caches(cfg: DataConfig) -> None:
    """Raise `ValueError` where sources share a cache and do not agree on its size: the smallest would rule."""
    first: dict[Path, tuple[int, float]] = {}
    for i, source in enumerate(cfg.sources):
        remote = getattr(source.options, "remote", None)
        if not isinstance(remote, RemoteConfig):
            continue
        j, size_gb = first.setdefault(remote.folder, (i, remote.cache_gb))
        if remote.cache_gb != size_gb:
            raise ValueError(
                f"data.sources[{i}].remote.cache_gb is {remote.cache_gb:g} and that of data.sources[{j}] {size_gb:g},"
                f" in one folder ({remote.folder}): give both one size, or another cache_dir"
            )
