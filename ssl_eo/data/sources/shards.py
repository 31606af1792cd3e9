"""Packed datasets: the shards and manifest that `ssl-eo data pack` writes, read sample by sample in any order.

Layout: `<root>/manifest.json`, `shard-000000.tar`, `shard-000000.index.npz`, ...; with `split`, in `<root>/<split>/`.
The format is described in `docs/data.md`. `root` is a folder, or the address of one (`https://`, `s3://`): then chunks
of samples are fetched into a cache on this node. Tiles come back bit for bit as they were packed, read-only, most
of them views of mapped files: copy (collating does) before writing to them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from ssl_eo.components import FREE, free, one_line, suggest
from ssl_eo.data.manifest import Manifest, content_hash, schema_to_dict
from ssl_eo.data.members import (
    LABEL_MEMBER,
    META_MEMBER,
    Constants,
    decode_meta,
    restore_constant_bands,
    tile_member,
    unescape_key,
)
from ssl_eo.data.remote import RemoteConfig, RemoteFolder, is_remote
from ssl_eo.data.remote_shards import RemoteShards
from ssl_eo.data.shard_reader import LocalShard, ShardReader
from ssl_eo.data.shards import index_path
from ssl_eo.data.types import Sample, Tile, TileSchema

__all__ = ["Config", "Source"]


@dataclass
class Config:
    """How a packed dataset is read."""

    root: str = field(metadata=FREE)  # folder that 'ssl-eo data pack' wrote, or its address (https://, s3://)
    split: str | None = None  # the folder under root; None: root itself
    tiles: list[str] | None = None  # tile names to read; None: all
    statistics: Literal["source", "measured"] = "source"  # mean and std: as the source gave them | measured in packing
    chunk_size: int = 32  # samples that are read in one run
    access: Literal["mmap", "pread"] = free("mmap")  # pread: for file systems that map files badly (Lustre, NFS)
    verify: bool = free(False)  # check the CRC-32 of each member that is read
    max_open_shards: int = free(128)  # per process; each takes a file descriptor and its index
    remote: RemoteConfig = field(default_factory=RemoteConfig, metadata=FREE)  # where root is an address

    def __post_init__(self) -> None:
        if not self.root:
            raise ValueError("root is empty; give the folder that 'ssl-eo data pack' wrote")
        if self.tiles is not None and not self.tiles:
            raise ValueError("tiles is an empty list; name at least one tile, or leave it out for all")
        for name, allowed in (("statistics", ("source", "measured")), ("access", ("mmap", "pread"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("chunk_size", "max_open_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Source:
    """The samples of a packed dataset, in the order in which they were packed.

    Raises `ValueError` when the manifest or a shard is missing, or a shard does not have the size the manifest states.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._remote: RemoteShards | None = None
        if is_remote(cfg.root):
            folder = RemoteFolder("/".join([cfg.root.rstrip("/"), *filter(None, [cfg.split])]), cfg.remote)
            self.manifest = folder.manifest()
            self._remote = RemoteShards(folder, self.manifest, cfg.chunk_size)
        else:
            self._folder = Path(cfg.root) / (cfg.split or "")
            self.manifest = Manifest.load(self._folder)
        if not self.manifest.n_samples:
            raise ValueError(
                f"{cfg.root}: the manifest lists no samples; run 'ssl-eo data pack' on a source that has some"
            )
        if self._remote is None:
            self._check_files()
        names = self._tile_names(cfg.tiles)
        packed = {name: self.manifest.tiles[name] for name in names}
        self._schema = {n: t.measured_schema() if cfg.statistics == "measured" else t.schema for n, t in packed.items()}
        self._members = {name: tile_member(name, tile.codec) for name, tile in packed.items()}
        self._starts = list(accumulate((s.n_samples for s in self.manifest.shards), initial=0))
        self._open: OrderedDict[int, ShardReader] = OrderedDict()  # least recently used first

    @property
    def schema(self) -> dict[str, TileSchema]:
        return self._schema

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.manifest.label_names

    @property
    def chunk_size(self) -> int:
        return self.cfg.chunk_size

    def __len__(self) -> int:
        return self._starts[-1]

    def fingerprint(self) -> str:
        """Hash of the shards' checksums and of what is read from them."""
        shards = [s.sha256 for s in self.manifest.shards]
        return content_hash({"shards": shards, "schema": {n: schema_to_dict(s) for n, s in self._schema.items()}})

    def read(self, index: int) -> Sample:
        """Sample `index`; its pixels are read-only. Raises `ShardError` for a damaged one."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a source of {len(self)}")
        shard = bisect_right(self._starts, index) - 1
        row = index - self._starts[shard]
        reader = self._reader(shard)
        where = f"{reader.storage.name}, sample {row}"
        content = _decoded(where, reader.read(row, META_MEMBER))
        gsd_m, date = content.get("gsd_m", {}), content.get("date", {})
        names = [n for n, s in self._schema.items() if not s.optional or reader.has(row, self._members[n])]
        arrays = reader.arrays(row, [self._members[name] for name in names])
        constant = content.get("constant", {})
        if constant:
            arrays = [
                _restored(f"{where}, {n}", a, constant[n], self._schema[n]) if n in constant else a
                for n, a in zip(names, arrays, strict=True)
            ]
        tiles = {
            name: Tile(pixels, self._schema[name].bands, gsd_m.get(name, self._schema[name].gsd_m), date.get(name))
            for name, pixels in zip(names, arrays, strict=True)
        }
        label = reader.array(row, LABEL_MEMBER) if reader.has(row, LABEL_MEMBER) else content["label"]
        return Sample(unescape_key(reader.key(row)), tiles, content["meta"], label)

    @property
    def is_remote(self) -> bool:
        """Whether the shards lie behind an address."""
        return self._remote is not None

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start to fetch what these samples need, in the background. Nothing to do for files on disk."""
        if self._remote is not None:
            self._remote.prefetch(indices)

    def locate(self, index: int) -> tuple[str | None, str]:
        """Key and file of sample `index`; None for a key that cannot be read."""
        shard = bisect_right(self._starts, index) - 1
        try:
            key = unescape_key(self._reader(shard).key(index - self._starts[shard]))
        except (ValueError, OSError):
            key = None
        return key, self.manifest.shards[shard].name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _reader(self, shard: int) -> ShardReader:
        reader = self._open.get(shard)
        if reader is None:
            entry, remote = self.manifest.shards[shard], self._remote
            storage = LocalShard(self._folder / entry.name, access=self.cfg.access) if remote is None else remote[shard]
            reader = ShardReader(storage, verify=self.cfg.verify or remote is not None)
            if len(reader) != entry.n_samples:
                raise ValueError(
                    f"the index of {storage.name} lists {len(reader)} samples, the manifest {entry.n_samples};"
                    " make the index again with 'ssl-eo data index'"
                )
            self._open[shard] = reader
            if len(self._open) > self.cfg.max_open_shards:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(shard)
        return reader

    def _tile_names(self, chosen: Iterable[str] | None) -> list[str]:
        known = list(self.manifest.tiles)
        for name in chosen or ():
            if name not in known:
                raise ValueError(
                    f"tiles: {self.cfg.root} has no tile {name!r}{suggest(name, known)} (it has {', '.join(known)})"
                )
        return known if chosen is None else list(dict.fromkeys(chosen))

    def _check_files(self) -> None:
        for entry in self.manifest.shards:
            path = self._folder / entry.name
            found = path.stat().st_size if path.is_file() else None
            if found != entry.size:
                what = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(
                    f"{path} {what}, the manifest lists {entry.size} bytes: copy it again, or delete it and run the"
                    " same 'ssl-eo data pack' again; 'ssl-eo data check' looks at all shards"
                )
            if not index_path(path).is_file():
                raise ValueError(f"{index_path(path)} is missing; make it with 'ssl-eo data index'")


def _decoded(where: str, data: bytes) -> dict[str, Any]:
    try:
        return decode_meta(data)
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error)}") from None


def _restored(where: str, pixels: NDArray[Any], constants: Constants, schema: TileSchema) -> NDArray[Any]:
    try:
        return restore_constant_bands(pixels, constants, len(schema.bands), schema.shape)
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error)}") from None
