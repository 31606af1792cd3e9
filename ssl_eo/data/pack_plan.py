"""The plan of a packing: which samples go into which shard, and one shard packed by it.

A shard holds a fixed range of the source's samples, so that it does not matter who packs it and when. It is finished
when its tar, its index and, last, `shard-000000.stats.json` are there.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from ssl_eo.components import one_line
from ssl_eo.data.manifest import FORMAT, PLAN_NAME, ShardEntry, content_hash, schema_to_dict
from ssl_eo.data.members import (
    LABEL_MEMBER,
    META_MEMBER,
    check_tile_names,
    drop_constant_bands,
    encode_array,
    encode_meta,
    escape_key,
    tile_member,
)
from ssl_eo.data.shards import ShardWriter, index_path
from ssl_eo.data.stacking import check_sample, loaded
from ssl_eo.data.statistics import BandStatistics, Statistics, merge_statistics, tile_statistics
from ssl_eo.data.types import Sample, Source, TileSchema
from ssl_eo.files import atomic_write

__all__ = ["Finished", "Plan", "check_budget", "claim", "make_plan", "pack_shard", "read_checked"]

_SIDE_BYTES = 2048  # per sample: its JSON member, padding
_GUESSED_SHAPE = (256, 256)  # of tiles that differ in size
_MEMBER_BYTES = 896  # per tile: tar header, NPY header, padding on average


@dataclass(frozen=True)
class Plan:
    """Everything that a shard's bytes follow from, besides the source."""

    folder: Path
    config: dict[str, Any]  # plain types
    codecs: dict[str, str]
    keep_constant_bands: bool
    n_samples: int
    samples_per_shard: int
    shard_size: int  # bytes, roughly, uncompressed
    max_bad: int

    @property
    def config_hash(self) -> str:
        return content_hash(self.config)

    @property
    def n_shards(self) -> int:
        return ceil(self.n_samples / self.samples_per_shard)

    def samples(self, shard: int) -> range:
        """Which of the source's samples this shard holds."""
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.n_samples))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.tar"


def make_plan(
    source: Source,
    folder: Path,
    codec: str | Mapping[str, str],
    shard_size_mb: float,
    samples_per_shard: int | None,
    keep_constant_bands: bool,
    max_bad_ratio: float,
) -> Plan:
    """Decide what goes into which shard. Arguments as in `pack`; `ValueError` for one that is out of range."""
    n_samples = len(source)
    if n_samples == 0:
        raise ValueError("the source has no samples, there is nothing to pack")
    if not 0 <= max_bad_ratio <= 1:
        raise ValueError(f"max_bad_ratio must lie in 0 to 1, got {max_bad_ratio}")
    codecs = _codecs(source.schema, codec)
    sample_size = _sample_size(source.schema)
    if samples_per_shard is None:
        samples_per_shard = max(1, int(shard_size_mb * 1e6 / sample_size))
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    config = {
        "format": FORMAT,
        "source_fingerprint": source.fingerprint(),
        "n_samples": n_samples,
        "samples_per_shard": samples_per_shard,
        "codecs": codecs,
        "keep_constant_bands": keep_constant_bands,
        "label_names": list(source.label_names),
        "schema": {name: schema_to_dict(schema) for name, schema in source.schema.items()},
    }
    shard_size, max_bad = samples_per_shard * sample_size, int(max_bad_ratio * n_samples)
    return Plan(folder, config, codecs, keep_constant_bands, n_samples, samples_per_shard, shard_size, max_bad)


def _codecs(schema: Mapping[str, TileSchema], codec: str | Mapping[str, str]) -> dict[str, str]:
    check_tile_names(schema)
    if isinstance(codec, str):
        codecs = dict.fromkeys(schema, codec)
    else:
        if unknown := sorted(set(codec) - set(schema)):
            raise ValueError(f"codec: the source has no tiles {', '.join(unknown)} (it has {', '.join(schema)})")
        codecs = {name: codec.get(name, "raw") for name in schema}
    for name, chosen in codecs.items():
        tile_member(name, chosen)  # raises for an unknown codec
    if "blosc" in codecs.values():
        encode_array(np.zeros(1), "blosc")  # raises here, rather than in a worker, when numcodecs is not installed
    return codecs


def _sample_size(schema: Mapping[str, TileSchema]) -> int:
    """Uncompressed bytes of one sample in a shard, roughly."""
    sizes = ((len(s.bands) * math.prod(s.shape or _GUESSED_SHAPE), np.dtype(s.dtype).itemsize) for s in schema.values())
    pixels = sum(n_values * n_bytes for n_values, n_bytes in sizes)
    return pixels + len(schema) * _MEMBER_BYTES + _SIDE_BYTES


def claim(plan: Plan) -> None:
    """Write the plan into the folder, which the caller has locked, or make sure that the one there is ours.

    Removes what a killed run left.
    """
    path = plan.folder / PLAN_NAME
    mine = json.loads(json.dumps(plan.config))
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if differing:
            raise ValueError(
                f"{plan.folder} holds shards that were packed from something else ({', '.join(differing)} differ,"
                f" see {PLAN_NAME} there): choose an empty folder, or delete this one"
            )
    elif any(plan.folder.glob("*.tar")):
        raise ValueError(f"{plan.folder} holds tar files that 'ssl-eo data pack' did not write: choose an empty folder")
    else:
        atomic_write(path, json.dumps(plan.config, indent=1) + "\n")
    for partial_file in plan.folder.glob("*.partial"):
        partial_file.unlink(missing_ok=True)


# --- one shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A finished shard: the content of its sidecar `shard-000000.stats.json`."""

    entry: ShardEntry
    statistics: Statistics
    quarantine: list[dict[str, Any]]

    @staticmethod
    def path(plan: Plan, shard: int) -> Path:
        return plan.path(shard).with_suffix(".stats.json")

    def save(self, plan: Plan, shard: int) -> None:
        content = {
            "config_hash": plan.config_hash,
            "entry": asdict(self.entry),
            "statistics": {name: s.to_dict() for name, s in self.statistics.items()},
            "quarantine": self.quarantine,
        }
        atomic_write(self.path(plan, shard), json.dumps(content))

    @classmethod
    def load(cls, plan: Plan, shard: int) -> Finished | None:
        """None unless the shard is finished, by this very plan, and its files are there."""
        path, tar = cls.path(plan, shard), plan.path(shard)
        if not (path.is_file() and tar.is_file() and index_path(tar).is_file()):
            return None
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["config_hash"] != plan.config_hash:
            raise ValueError(f"{path}: this shard was packed from something else; delete {plan.folder} and pack again")
        entry = ShardEntry(**raw["entry"])
        if tar.stat().st_size != entry.size:
            return None
        return cls(entry, {n: BandStatistics.from_dict(s) for n, s in raw["statistics"].items()}, raw["quarantine"])


def pack_shard(source: Source, plan: Plan, shard: int) -> Finished:
    """Pack one shard, unless it is finished already."""
    if (finished := Finished.load(plan, shard)) is not None:
        return finished
    path = plan.path(shard)
    statistics = merge_statistics(source.schema, ())
    quarantine: list[dict[str, Any]] = []
    with ShardWriter.create(path) as writer:
        for index in plan.samples(shard):
            try:
                sample = read_checked(source, index)
                part = tile_statistics(sample, source.schema)
                writer.add(
                    escape_key(sample.key), _members(sample, source.schema, plan.codecs, plan.keep_constant_bands)
                )
            except ValueError as error:
                quarantine.append({"shard": path.name, "index": index, "reason": one_line(error)})
                check_budget(quarantine, plan)
                continue
            statistics |= {name: statistics[name].merge(found) for name, found in part.items()}
    entry = ShardEntry(path.name, len(writer.index), writer.index.tar_size, writer.sha256)
    if not entry.matches(path):  # reads it back
        raise OSError(errno.EIO, f"{path} does not hold what was written to it; see to the disk, then pack again")
    finished = Finished(entry, statistics, quarantine)
    finished.save(plan, shard)
    return finished


def _members(
    sample: Sample, schema: Mapping[str, TileSchema], codecs: Mapping[str, str], keep_constant_bands: bool
) -> dict[str, bytes]:
    members, gsd_m, date, constant = {}, {}, {}, {}
    for name, tile in sample.tiles.items():
        pixels, dropped = (tile.array, {}) if keep_constant_bands else drop_constant_bands(tile.array)
        if dropped:
            constant[name] = dropped
        members[tile_member(name, codecs[name])] = encode_array(pixels, codecs[name])
        if tile.gsd_m != schema[name].gsd_m:
            gsd_m[name] = tile.gsd_m
        if tile.date is not None:
            date[name] = tile.date
    label = sample.label
    if isinstance(label, np.ndarray):
        members[LABEL_MEMBER] = encode_array(label)
        label = None
    members[META_MEMBER] = encode_meta(label, sample.meta, gsd_m, date, constant)
    return members


def read_checked(source: Source, index: int) -> Sample:
    """Sample `index`, with `ValueError` for one that cannot be read or does not fit the source's schema."""
    try:
        sample = loaded(source.read(index))
    except OSError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if unknown := sample.tiles.keys() - source.schema.keys():
        raise ValueError(f"it has tiles {sorted(unknown)} that are not in the schema ({', '.join(source.schema)})")
    check_sample(sample, source.schema)
    return sample


def check_budget(quarantine: Sequence[Mapping[str, Any]], plan: Plan) -> None:
    """Raise `ValueError` when there are more bad samples than the plan allows."""
    if len(quarantine) > plan.max_bad:
        first = "; ".join(f"sample {q['index']}: {q['reason']}" for q in quarantine[:3])
        raise ValueError(
            f"{len(quarantine)} bad samples so far, allowed are {plan.max_bad} of {plan.n_samples}: repair them, or"
            f" raise max_bad_ratio (--max-bad-ratio); finished shards are kept. The first are {first}"
        )
