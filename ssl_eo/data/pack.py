"""`ssl-eo data pack | index | stats`: make packed datasets.

Packing is parallel and resumable, and gives the same bytes every time: one that was killed goes on after the shards
that are finished, and `manifest.json` is written when all are. The format is described in `docs/data.md`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ssl_eo.data.manifest import MANIFEST_NAME, Manifest, PackedTile, ShardEntry
from ssl_eo.data.pack_plan import Finished, Plan, check_budget, claim, make_plan, pack_shard, read_checked
from ssl_eo.data.pool import in_order
from ssl_eo.data.shards import ShardError, ShardIndex, index_path
from ssl_eo.data.statistics import Statistics, merge_statistics, tile_statistics
from ssl_eo.data.types import Source, TileSchema
from ssl_eo.files import locked_folder
from ssl_eo.jsonl import JsonLines

__all__ = ["IndexReport", "PackReport", "Progress", "StatsReport", "index", "pack", "stats"]

Progress = Callable[[int, int], None]  # called with (done, total)

QUARANTINE_NAME = "quarantine.jsonl"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STATS_RUN = 256  # samples whose statistics are one task


# --- pack -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackReport:
    """What `pack` did. Sizes in bytes."""

    folder: Path
    n_samples: int
    n_bad: int
    n_shards: int
    n_shards_kept: int  # finished by an earlier run
    n_bytes: int
    statistics: Statistics


def pack(
    source: Source,
    out: str | Path,
    *,
    split: str | None = None,
    codec: str | Mapping[str, str] = "raw",
    shard_size_mb: float = 512,
    samples_per_shard: int | None = None,
    keep_constant_bands: bool = False,
    source_options: Mapping[str, Any] | None = None,
    max_bad_ratio: float = 0.01,
    n_workers: int = 0,
    progress: Progress | None = None,
) -> PackReport:
    """Write every sample of `source` into shards under `out` (under `out/split` when `split` is given).

    `codec` is `"raw"` or `"blosc"`, for all tiles or by tile name (raw for those not named). `samples_per_shard`
    follows from the uncompressed `shard_size_mb` unless given. A band of which all pixels of a tile are equal becomes
    one value in the sample's JSON, unless such bands are to be kept: for readers other than ours. `n_workers=0` packs
    in this process. Samples that cannot be read or do not fit the source's schema are left out and listed in
    `quarantine.jsonl`. Every shard is read back when it is written. `source_options` go into the manifest as they are.

    Run again after a kill, it keeps the finished shards. Raises `ValueError` when `out` holds something else, cannot be
    used or is packed into by another process, or more than `max_bad_ratio` of the samples are bad, `OSError` when the
    disk is full (finished shards are kept).
    """
    folder = _folder(Path(out), split)
    plan = make_plan(source, folder, codec, shard_size_mb, samples_per_shard, keep_constant_bands, max_bad_ratio)
    with locked_folder(plan.folder, "choose another folder"):
        try:
            claim(plan)
            return _pack(source, plan, split, dict(source_options or {}), n_workers, progress)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise _no_space(error, plan) from error
            raise


def _pack(
    source: Source,
    plan: Plan,
    split: str | None,
    source_options: dict[str, Any],
    n_workers: int,
    progress: Progress | None,
) -> PackReport:
    n_kept = _n_finished(plan)
    finished = _pack_shards(source, plan, n_workers, progress)
    statistics = merge_statistics(source.schema, (f.statistics for f in finished))
    manifest = _manifest(source, plan, split, source_options, finished, statistics)
    manifest.save(plan.folder)
    return PackReport(
        folder=plan.folder,
        n_samples=manifest.n_samples,
        n_bad=plan.n_samples - manifest.n_samples,
        n_shards=plan.n_shards,
        n_shards_kept=n_kept,
        n_bytes=sum(f.entry.size for f in finished),
        statistics=statistics,
    )


def _manifest(
    source: Source,
    plan: Plan,
    split: str | None,
    source_options: dict[str, Any],
    finished: Sequence[Finished],
    statistics: Statistics,
) -> Manifest:
    return Manifest(
        source_name=type(source).__module__.removeprefix("ssl_eo.data.sources."),  # as data.sources names it
        source_fingerprint=source.fingerprint(),
        source_options=source_options,
        config_hash=plan.config_hash,
        split=split,
        label_names=tuple(source.label_names),
        tiles={n: PackedTile(schema, plan.codecs[n], statistics[n]) for n, schema in source.schema.items()},
        shards=tuple(f.entry for f in finished),
    )


def _pack_shards(source: Source, plan: Plan, n_workers: int, progress: Progress | None) -> list[Finished]:
    finished: list[Finished] = []
    quarantine: list[dict[str, Any]] = []
    (plan.folder / QUARANTINE_NAME).unlink(missing_ok=True)
    with JsonLines(plan.folder / QUARANTINE_NAME) as log:
        for shard in in_order(partial(pack_shard, source, plan), range(plan.n_shards), n_workers):
            finished.append(shard)
            quarantine += shard.quarantine
            for record in shard.quarantine:
                log.write(record)
            check_budget(quarantine, plan)
            if progress is not None:
                progress(min(len(finished) * plan.samples_per_shard, plan.n_samples), plan.n_samples)
    return finished


def _n_finished(plan: Plan) -> int:
    return sum(Finished.load(plan, shard) is not None for shard in range(plan.n_shards))


def _no_space(error: OSError, plan: Plan) -> OSError:
    n_finished = _n_finished(plan)
    needed_gb = (plan.n_shards - n_finished) * plan.shard_size / 1e9
    return OSError(
        error.errno,
        f"no space left for {plan.folder}: {n_finished} of {plan.n_shards} shards are finished and kept. Free"
        f" {needed_gb:.3g} GB (less with a codec) and run the same command again, it goes on from there",
    )


def _folder(out: Path, split: str | None) -> Path:
    if split is not None and (Path(split).name != split or split == ".."):
        raise ValueError(f"split must be a plain name such as 'train', got {split!r}")
    return out / (split or "")


# --- index ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexReport:
    """What `index` found. Sizes in bytes."""

    n_shards: int
    n_samples: int
    n_members: int
    n_bytes: int


def index(root: str | Path, *, n_workers: int = 0, progress: Progress | None = None) -> IndexReport:
    """Make the index of every tar in the folder `root`, written by us or by any WebDataset tool.

    Raises `ValueError` for a folder without tars, `ShardError` for a damaged tar, or one that is not the one its
    manifest lists.
    """
    folder = Path(root)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder} holds no .tar file; give the folder of the shards")
    manifest = Manifest.load(folder) if (folder / MANIFEST_NAME).is_file() else None
    entries = {entry.name: entry for entry in manifest.shards} if manifest else {}
    n_samples = n_members = n_bytes = 0
    tasks = [(path, entries.get(path.name)) for path in paths]
    for done, made in enumerate(in_order(_index_shard, tasks, n_workers), start=1):
        n_samples += len(made)
        n_members += int((made.offset >= 0).sum())
        n_bytes += made.tar_size
        if progress is not None:
            progress(done, len(paths))
    return IndexReport(len(paths), n_samples, n_members, n_bytes)


def _index_shard(task: tuple[Path, ShardEntry | None]) -> ShardIndex:
    path, entry = task
    made = ShardIndex.build(path)
    if entry is not None and not entry.matches(path):
        # An index made now would declare the damage to be the content.
        raise ShardError(path, "", 0, "its SHA-256 is not the manifest's; see 'ssl-eo data check', restore the file")
    made.save(index_path(path))
    return made


# --- stats ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatsReport:
    """Statistics of the valid pixels of each band of each tile."""

    n_samples: int
    n_bad: int
    schema: Mapping[str, TileSchema]
    statistics: Statistics

    def rows(self) -> Iterator[tuple[str, str, int, float, float, float, float]]:
        """Table of (tile, band, valid pixels, mean, std, min, max), values in stored units."""
        for name, schema in self.schema.items():
            s = self.statistics[name]
            columns = zip(schema.bands, s.count, s.mean, s.std, s.minimum, s.maximum, strict=True)
            for band, count, *values in columns:
                mean, std, low, high = map(float, values)
                yield name, band, int(count), mean, std, low, high


def stats(source: Source | str | Path, *, n_workers: int = 0, progress: Progress | None = None) -> StatsReport:
    """Measure every band of a source, or of the packed dataset in a folder. Bad samples are counted and left out."""
    if isinstance(source, (str, Path)):
        from ssl_eo.data.sources.shards import Config
        from ssl_eo.data.sources.shards import Source as PackedSource

        source = PackedSource(Config(root=str(source)))
    n_samples = len(source)
    runs = [range(start, min(start + _STATS_RUN, n_samples)) for start in range(0, n_samples, _STATS_RUN)]
    parts, n_bad = [], 0
    for run, (part, n_bad_of_run) in zip(runs, in_order(partial(_stats_of, source), runs, n_workers), strict=True):
        parts.append(part)
        n_bad += n_bad_of_run
        if progress is not None:
            progress(run.stop, n_samples)
    return StatsReport(n_samples - n_bad, n_bad, source.schema, merge_statistics(source.schema, parts))


def _stats_of(source: Source, run: Sequence[int]) -> tuple[Statistics, int]:
    parts, n_bad = [], 0
    for i in run:
        try:
            parts.append(tile_statistics(read_checked(source, i), source.schema))
        except ValueError:
            n_bad += 1
    return merge_statistics(source.schema, parts), n_bad
