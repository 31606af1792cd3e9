"""The shards of a packed dataset behind an address, read through files on this node.

What is read together (a chunk of samples) is fetched together, as one run of bytes, into a `BlockCache`, when it is
needed or ahead of that. Every member is checked against the CRC-32 in its shard's index.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from typing import Any

from ssl_eo.data.block_cache import BlockCache
from ssl_eo.data.manifest import Manifest, ShardEntry
from ssl_eo.data.remote import RemoteFolder
from ssl_eo.data.shards import ShardIndex, index_path

__all__ = ["RemoteShard", "RemoteShards"]

logger = logging.getLogger(__name__)

_MAX_OPEN_BLOCKS = 256  # per process
_MAX_OPEN_INDEXES = 256
_MAX_RENEWALS = 3  # of a damaged block, before its samples are bad
_FORGIVEN_S = 600.0  # after which earlier renewals do not count
RENEWAL_PAUSE_S = 2.0


class RemoteShards:
    """The shards that a manifest lists, in a folder far away; `shards[i]` is the `Storage` of one.

    A block is a chunk of `chunk_size` samples of the dataset, as far as it lies in one shard. It may be pickled and
    forked. Raises `ValueError` when the cache cannot be used.
    """

    def __init__(self, folder: RemoteFolder, manifest: Manifest, chunk_size: int) -> None:
        self.folder = folder
        self.chunk_size = chunk_size
        self.cache = BlockCache(folder.cfg.folder, int(folder.cfg.cache_gb * 1e9))
        self._entries = manifest.shards
        self._starts = list(accumulate((s.n_samples for s in manifest.shards), initial=0))
        self._forget_all()

    def __getitem__(self, shard: int) -> RemoteShard:
        found = self._shards.get(shard)
        if found is None:
            found = self._shards[shard] = RemoteShard(self, self._entries[shard], self._starts[shard])
            if len(self._shards) > _MAX_OPEN_INDEXES:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        return found

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start to fetch the blocks of the samples `indices` of the dataset, in the background."""
        if self._pid != os.getpid():
            self._forget_all()
        while len(self._threads) < self.folder.cfg.n_connections:
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()
        rows: dict[int, list[int]] = {}
        for index in indices:
            shard = bisect_right(self._starts, index) - 1
            rows.setdefault(shard, []).append(index - self._starts[shard])
        for shard, found in rows.items():
            self._wanted.put((self[shard], found))

    def map(self, shard: RemoteShard, row: int) -> tuple[mmap, int]:
        """The mapped block that holds sample `row`, and the byte of the shard at which it starts."""
        name, start, stop = shard.block(row)
        if name not in self._blocks:
            for gone in [other for other in self._blocks if not self.cache.holds(other)]:
                del self._blocks[gone]  # mapped, it would keep its place on the disk
            self._blocks[name] = self._open(shard.entry.name, name, start, stop)
            if len(self._blocks) > _MAX_OPEN_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(name)
        return self._blocks[name], start

    def drop(self, name: str) -> None:
        """Forget a block, here and in the cache."""
        self._blocks.pop(name, None)
        self.cache.drop(name)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("folder", "chunk_size", "cache", "_entries", "_starts")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_all()

    def _forget_all(self) -> None:
        """Start anew in this process: threads do not outlive a fork, nor what they were asked to do."""
        self._pid = os.getpid()
        self._shards: OrderedDict[int, RemoteShard] = OrderedDict()  # least recently used first
        self._blocks: OrderedDict[str, mmap] = OrderedDict()  # the same
        self._threads: list[threading.Thread] = []
        self._wanted: queue.SimpleQueue[tuple[RemoteShard, list[int]]] = queue.SimpleQueue()

    def _open(self, file_name: str, name: str, start: int, stop: int) -> mmap:
        while True:
            path = self.cache.get(name, stop - start, partial(self.folder.read, file_name, (start, stop)))
            try:
                with path.open("rb") as file:
                    return mmap(file.fileno(), 0, access=ACCESS_READ)
            except FileNotFoundError:
                logger.warning("%s had to go for other blocks before it was read: raise remote.cache_gb", path)

    def _work(self) -> None:
        wanted = self._wanted
        while True:
            shard, rows = wanted.get()
            try:
                for name, start, stop in dict.fromkeys(shard.block(row) for row in rows):
                    if name not in self._blocks:
                        fetch = partial(self.folder.read, shard.entry.name, (start, stop))
                        self.cache.prefetch(name, stop - start, fetch)
            except (RuntimeError, ValueError, OSError) as error:
                # Whoever needs the samples meets the same error, and says what is wrong with which of them.
                logger.debug("reading ahead in %s: %s", shard.name, error)


class RemoteShard:
    """One of `RemoteShards`: a `Storage`. `first` is the number of its first sample in the dataset."""

    def __init__(self, shards: RemoteShards, entry: ShardEntry, first: int) -> None:
        self.entry = entry
        self._shards = shards
        self._first = first
        self._index: ShardIndex | None = None
        self._renewed: dict[str, tuple[int, float]] = {}  # block -> how often it was fetched anew, when last

    @property
    def name(self) -> str:
        return f"{self._shards.folder.url}/{self.entry.name}"

    def open(self) -> ShardIndex:
        if self._index is None:
            try:
                self._index = self._load()
            except ValueError:  # damaged on its way, or here on disk
                self._shards.cache.drop(self._index_block)
                self._index = self._load()
        return self._index

    def block(self, row: int) -> tuple[str, int, int]:
        """The block that holds sample `row`: name in the cache, first byte in the shard and the one after it."""
        index, chunk_size = self.open(), self._shards.chunk_size
        chunk = (self._first + row) // chunk_size
        rows = slice(max(0, chunk * chunk_size - self._first), (chunk + 1) * chunk_size - self._first)
        offset, held = index.offset[rows], index.offset[rows] >= 0
        start, stop = int(offset[held].min()), int((offset + index.size[rows])[held].max())
        return f"{self.entry.sha256}/{start}-{stop}", start, stop

    def read(self, row: int, offset: int, size: int) -> tuple[mmap, int]:
        data, start = self._shards.map(self, row)
        return data, offset - start

    def renew(self, row: int) -> bool:
        name, _, _ = self.block(row)
        n_times, last = self._renewed.get(name, (0, 0.0))
        if time.monotonic() - last > _FORGIVEN_S:
            n_times = 0
        if n_times == _MAX_RENEWALS:
            return False
        time.sleep(n_times * RENEWAL_PAUSE_S)  # at once, then with some patience
        self._renewed[name] = n_times + 1, time.monotonic()
        self._shards.drop(name)
        self._shards.cache.drop(self._index_block)  # the damage may be in what the index says
        self._index = None
        return True

    def close(self) -> None:
        self._index = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}

    @property
    def _index_block(self) -> str:
        return f"{self.entry.sha256}/{index_path(self.entry.name).name}"

    def _load(self) -> ShardIndex:
        """The index from the cache. Raises `ValueError` for one that is damaged or of another shard."""
        file_name = index_path(self.entry.name).name
        index = ShardIndex.load(
            self._shards.cache.get(self._index_block, None, partial(self._shards.folder.read, file_name))
        )
        if index.tar_size != self.entry.size or len(index) != self.entry.n_samples:
            raise ValueError(
                f"{self._shards.folder.url}/{file_name} is the index of {len(index)} samples in {index.tar_size}"
                f" bytes, the manifest lists {self.entry.n_samples} in {self.entry.size}; copy the folder again"
            )
        return index
