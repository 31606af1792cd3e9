"""`ssl-eo data check`: read every byte of a packed dataset and say what is wrong, down to member and byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ssl_eo.data.manifest import Manifest, ShardEntry
from ssl_eo.data.members import LABEL_MEMBER, META_MEMBER, Constants, decode_meta, restore_constant_bands, tile_member
from ssl_eo.data.pack import Progress
from ssl_eo.data.pool import in_order
from ssl_eo.data.remote import is_remote
from ssl_eo.data.shard_reader import LocalShard, ShardReader
from ssl_eo.data.shards import ShardError, ShardIndex, index_path
from ssl_eo.data.tar import BLOCK
from ssl_eo.data.types import TileSchema

__all__ = ["CheckReport", "Problem", "check"]

_MAX_PROBLEMS = 20  # reported per shard


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: bytes `offset` to `offset + size` of `shard`, in `member` (empty: the shard itself)."""

    shard: str
    member: str
    offset: int
    size: int
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """What `check` looked at and what it found. Sizes in bytes."""

    n_shards: int
    n_samples: int
    n_members: int
    n_bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def check(root: str | Path, *, n_workers: int = 0, progress: Progress | None = None) -> CheckReport:
    """Read every byte of the packed dataset in the folder `root` and compare it with index and manifest.

    Damage is reported, up to 20 problems a shard, not raised; `ValueError` when there is no manifest.
    """
    if is_remote(str(root)):
        raise ValueError(
            f"{root}: only folders on disk are checked; members from a server are verified as they are read"
        )
    folder = Path(root)
    manifest = Manifest.load(folder)
    n_samples = n_members = n_bytes = 0
    problems: list[Problem] = []
    results = in_order(partial(_check_shard, folder, manifest), manifest.shards, n_workers)
    for done, (found, shard_problems) in enumerate(results, start=1):
        problems += shard_problems
        if found is not None:
            n_samples += len(found)
            n_members += int((found.offset >= 0).sum())
            n_bytes += found.tar_size
        if progress is not None:
            progress(done, len(manifest.shards))
    return CheckReport(len(manifest.shards), n_samples, n_members, n_bytes, tuple(problems))


def _check_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> tuple[ShardIndex | None, list[Problem]]:
    """The index as the tar itself gives it (None when it cannot be walked), and what is wrong."""
    path = folder / entry.name

    def whole(size: int, reason: str) -> Problem:
        return Problem(entry.name, "", 0, size, reason)

    if not path.is_file():
        return None, [whole(0, "the file is missing")]
    size = path.stat().st_size
    problems = [] if size == entry.size else [whole(size, f"{size} bytes, the manifest lists {entry.size}")]
    saved = None
    try:
        saved = ShardIndex.load(index_path(path))
    except ValueError as error:
        problems.append(whole(size, str(error)))
    try:
        found = ShardIndex.build(path)
    except ShardError as error:
        member, reason = error.member, error.reason
        if (name := _member_of_header(saved, error.offset)) is not None:
            member, reason = name, "its tar header is damaged or cut off"
        return None, [*problems, Problem(entry.name, member, error.offset, size - error.offset, reason)]
    if len(found) != entry.n_samples:
        problems.append(whole(size, f"{len(found)} samples, the manifest lists {entry.n_samples}"))
    if saved is not None:
        problems += _compare(entry.name, saved, found)
    damaged = {problem.member for problem in problems}
    problems += [p for p in _decode_all(path, manifest, found) if p.member not in damaged]
    if not problems and not entry.matches(path):
        problems.append(whole(size, "its SHA-256 is not the manifest's, though every member is as indexed"))
    return found, problems[:_MAX_PROBLEMS]


def _member_of_header(index: ShardIndex | None, offset: int) -> str | None:
    """Name of the member whose header is at byte `offset`."""
    if index is None:
        return None
    hits = np.argwhere(index.offset == offset + BLOCK)
    return index.member_name(*hits[0]) if len(hits) else None


def _compare(shard: str, saved: ShardIndex, found: ShardIndex) -> Iterator[Problem]:
    """Where the saved index and the tar disagree."""
    if not (np.array_equal(saved.keys, found.keys) and np.array_equal(saved.suffixes, found.suffixes)):
        yield Problem(shard, "", 0, found.tar_size, "the index names other members than the tar holds")
        return
    moved = (saved.offset != found.offset) | (saved.size != found.size)
    for row, column in np.argwhere(moved | (saved.crc32 != found.crc32)):
        offset, size = int(found.offset[row, column]), int(found.size[row, column])
        reason = f"its CRC-32 is {found.crc32[row, column]:08x}, the index has {saved.crc32[row, column]:08x}"
        if moved[row, column]:
            reason = f"the index has it at byte {saved.offset[row, column]}, {saved.size[row, column]} bytes"
        yield Problem(shard, found.member_name(row, column), offset, size, reason)


def _decode_all(path: Path, manifest: Manifest, index: ShardIndex) -> Iterator[Problem]:
    """Members that are missing, cannot be decoded, or do not fit the schema."""
    reader = ShardReader(LocalShard(path, index))
    columns = {suffix.decode(): column for column, suffix in enumerate(index.suffixes)}
    schemas = {tile_member(name, tile.codec): tile.schema for name, tile in manifest.tiles.items()}
    for row in range(len(index)):
        labels = (LABEL_MEMBER,) if reader.has(row, LABEL_MEMBER) else ()
        absent = {s for s, schema in schemas.items() if schema.optional and not reader.has(row, s)}
        constant: dict[str, Constants] = {}  # by member, known once the JSON is read
        for suffix in (META_MEMBER, *(s for s in schemas if s not in absent), *labels):
            try:
                if suffix == META_MEMBER:
                    found = decode_meta(reader.read(row, suffix)).get("constant", {})
                    constant = {
                        tile_member(n, tile.codec): found[n] for n, tile in manifest.tiles.items() if n in found
                    }
                else:
                    _decode(reader, row, suffix, schemas.get(suffix), constant.get(suffix))
            except ValueError as error:
                place = (row, columns[suffix]) if reader.has(row, suffix) else None
                offset, size = (int(index.offset[place]), int(index.size[place])) if place else (0, 0)
                reason = error.reason if isinstance(error, ShardError) else str(error)
                yield Problem(path.name, f"{reader.key(row)}.{suffix}", offset, size, reason)


def _decode(reader: ShardReader, row: int, suffix: str, schema: TileSchema | None, constant: Constants | None) -> None:
    array = reader.array(row, suffix)
    if schema is not None:
        schema.check(restore_constant_bands(array, constant, len(schema.bands), schema.shape) if constant else array)
