"""Which samples make up a global batch: pure integer functions of (seed, config, step).

Counter g = step * B + j numbers the samples that a run consumes (B = global batch size, 0 <= j < B). Lane l of L takes
the counters with g % L == l, so every batch holds B / L samples of every lane, and a rank owns L / world_size whole
lanes: neither the world size nor the workers can change a batch.

Epoch e is the counters [e * N, (e + 1) * N) of a source of N samples. Its samples are put in order by a permutation of
chunks (contiguous runs, cheap to read together), and that sequence is cut into one contiguous piece per lane, each as
long as the number of counters the lane has in the epoch. Inside a piece, samples are shuffled within windows of a few
chunks. So each sample comes once per epoch for any N, a lane reads long runs, and any step is found without
replaying the ones before it. A batch may span epochs; with N < B it holds some samples more than once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ssl_eo.seeding import numpy_generator

__all__ = ["MixedOrder", "Mixture", "Order", "check_lanes"]

Ids = NDArray[np.int64]


def check_lanes(global_batch_size: int, n_lanes: int, world_size: int = 1) -> None:
    """Raise `ValueError` unless `n_lanes` divides `global_batch_size` and `world_size` divides `n_lanes`."""
    for key, value in (
        ("train.global_batch_size", global_batch_size),
        ("data.n_lanes", n_lanes),
        ("the world size", world_size),
    ):
        if value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}")
    if n_lanes % world_size:
        raise ValueError(
            f"data.n_lanes = {n_lanes} must be a multiple of the world size {world_size}, since each rank owns whole"
            f" lanes: set data.n_lanes to {_multiples_near(n_lanes, world_size)}, or use a number of processes that"
            f" divides {n_lanes}"
        )
    if global_batch_size % n_lanes:
        raise ValueError(
            f"train.global_batch_size = {global_batch_size} must be a multiple of data.n_lanes = {n_lanes}, since each"
            f" batch takes the same number of samples from every lane: set train.global_batch_size to"
            f" {_multiples_near(global_batch_size, n_lanes)}, or data.n_lanes to a divisor of {global_batch_size}"
        )


@dataclass(frozen=True)
class Order:
    """The order of one source. `source` tells apart the sources of a mixture, which share the seed.

    A *slot* is a position in the global batch, `0 <= slot < global_batch_size`, lane after lane: with k = B / L
    samples per lane, lane l holds the slots [l * k, (l + 1) * k).
    """

    n_samples: int
    chunk_size: int
    n_lanes: int
    global_batch_size: int
    seed: int
    window_chunks: int = 8
    source: int = 0

    def __post_init__(self) -> None:
        if self.n_samples < 1:
            raise ValueError(f"data.sources[{self.source}] holds no samples")
        if self.chunk_size < 1:
            raise ValueError(f"data.sources[{self.source}]: chunk_size must be at least 1, got {self.chunk_size}")
        if self.window_chunks < 1:
            raise ValueError(f"data.window_chunks must be at least 1, got {self.window_chunks}")
        check_lanes(self.global_batch_size, self.n_lanes)

    def slots(self, rank: int = 0, world_size: int = 1) -> range:
        """The slots of `rank`: equal, contiguous parts whose concatenation over ranks is the global batch."""
        check_lanes(self.global_batch_size, self.n_lanes, world_size)
        assert 0 <= rank < world_size
        n = self.global_batch_size // world_size
        return range(rank * n, (rank + 1) * n)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Ids:
        """Sample ids of this rank's part of global batch `step`, int64 `[global_batch_size / world_size]`."""
        slots = self.slots(rank, world_size)
        n = self._per_lane
        lanes = range(slots.start // n, slots.stop // n)
        return np.concatenate([self._lane_run(lane, step * n, n) for lane in lanes])

    def replacement(self, step: int, slot: int, attempt: int) -> int:
        """The id that takes the place of an unreadable sample: what its lane holds `attempt` >= 1 batches later."""
        assert 0 <= slot < self.global_batch_size
        assert attempt >= 1
        lane, i = divmod(slot, self._per_lane)
        return int(self._lane_run(lane, (step + attempt) * self._per_lane + i, 1)[0])

    @property
    def _per_lane(self) -> int:
        return self.global_batch_size // self.n_lanes

    def _lane_run(self, lane: int, start: int, n: int) -> Ids:
        """Ids of the samples `start`, ..., `start + n - 1` of a lane, counted from the beginning of the run."""
        parts = []
        stop = start + n
        while start < stop:
            epoch = (start * self.n_lanes + lane) // self.n_samples
            position = start - self._lane_count(lane, epoch)
            window, offset = divmod(position, self.window_chunks * self.chunk_size)
            part = _window_ids(self, epoch, lane, window)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _lane_count(self, lane: int, epoch: int) -> int:
        """How many samples a lane has given before `epoch`: the counters below epoch * N that are `lane` modulo L."""
        return (epoch * self.n_samples - lane + self.n_lanes - 1) // self.n_lanes

    def _lane_cut(self, epoch: int, lane: int) -> tuple[int, int]:
        """The piece [start, stop) of the epoch's sequence of samples that belongs to a lane."""
        lengths = [self._lane_count(k, epoch + 1) - self._lane_count(k, epoch) for k in range(lane + 1)]
        return sum(lengths[:lane]), sum(lengths)


@dataclass(frozen=True)
class Mixture:
    """Which source feeds a step: the same on every rank, in exact proportion to `weights` in each block of steps.

    The counts in a block are the shares of `block` rounded by largest remainder; their order is a permutation keyed by
    (seed, block), and by `lane` where each lane of a batch has a mixture of its own (then a step is a sample of it).
    """

    weights: tuple[float, ...]
    seed: int
    block: int = 256
    lane: int | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("data.sources is empty: name at least one source")
        for i, weight in enumerate(self.weights):
            if not (weight > 0 and np.isfinite(weight)):
                raise ValueError(f"data.sources[{i}].weight must be positive and finite, got {weight}")
        for i, count in enumerate(self.counts()):
            if count == 0:
                raise ValueError(
                    f"data.sources[{i}].weight = {self.weights[i]} is {self.weights[i] / sum(self.weights):.2g} of the"
                    f" sum: at less than a step in {self.block} the source would never be drawn; raise it or drop it"
                )

    def counts(self) -> list[int]:
        """Steps of each source in a block."""
        total = sum(self.weights)
        shares = [w / total * self.block for w in self.weights]
        counts = [int(s) for s in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
        for i in by_remainder[: self.block - sum(counts)]:
            counts[i] += 1
        return counts

    def source(self, step: int) -> int:
        """Index of the source that feeds `step`."""
        block, offset = divmod(step, self.block)
        return int(_block_sources(self, block)[offset])

    def source_step(self, step: int) -> int:
        """How many steps before `step` were fed by the same source: the step in that source's own `Order`."""
        block, offset = divmod(step, self.block)
        sources = _block_sources(self, block)
        earlier = np.count_nonzero(sources[:offset] == sources[offset])
        return block * self.counts()[int(sources[offset])] + int(earlier)


@dataclass(frozen=True)
class MixedOrder:
    """The order of batches whose samples come from several sources, which are numbered one after the other.

    Every lane draws the source of each of its samples from a `Mixture` of its own, and takes them from each source in
    that source's order. So proportions hold exactly in each block of a lane, and what is said of `Order` holds here.
    """

    orders: tuple[Order, ...]
    weights: tuple[float, ...]

    def slots(self, rank: int = 0, world_size: int = 1) -> range:
        """The slots of `rank`, as in `Order`."""
        return self.orders[0].slots(rank, world_size)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Ids:
        """Sample ids of this rank's part of global batch `step`, int64 `[global_batch_size / world_size]`."""
        return np.array([self._id(step, slot) for slot in self.slots(rank, world_size)], dtype=np.int64)

    def replacement(self, step: int, slot: int, attempt: int) -> int:
        """The id that takes the place of an unreadable sample: what its lane holds `attempt` >= 1 batches later."""
        assert attempt >= 1
        return self._id(step + attempt, slot)

    def _id(self, step: int, slot: int) -> int:
        lane, i = divmod(slot, self.orders[0]._per_lane)
        mixture = _lane_mixture(self.weights, self.orders[0].seed, lane)
        position = step * self.orders[0]._per_lane + i  # in the lane
        source = mixture.source(position)
        first = sum(order.n_samples for order in self.orders[:source])
        return first + int(self.orders[source]._lane_run(lane, mixture.source_step(position), 1)[0])


def _permutation(n: int, *address: int | str) -> Ids:
    # Raw bits and a stable sort: NumPy keeps those fixed between versions, which it does not promise for
    # `Generator.permutation`, and a run must find its place again after an upgrade.
    bits = numpy_generator(*address).bit_generator.random_raw(n)
    return np.argsort(bits, kind="stable")


@lru_cache(maxsize=4096)
def _lane_mixture(weights: tuple[float, ...], seed: int, lane: int) -> Mixture:
    return Mixture(weights, seed, lane=lane)


@lru_cache(maxsize=8)
def _chunk_layout(order: Order, epoch: int) -> tuple[Ids, Ids]:
    """The epoch's chunks in order, and the position in the epoch's sequence at which each starts (and the end)."""
    n_chunks = -(-order.n_samples // order.chunk_size)
    chunks = _permutation(n_chunks, order.seed, "chunks", order.source, epoch)
    lengths = np.minimum(order.chunk_size, order.n_samples - chunks * order.chunk_size)
    return chunks, np.concatenate([[0], np.cumsum(lengths)])


@lru_cache(maxsize=256)
def _window_ids(order: Order, epoch: int, lane: int, window: int) -> Ids:
    """Shuffled ids of one window of a lane's piece."""
    start, stop = order._lane_cut(epoch, lane)
    size = order.window_chunks * order.chunk_size
    start += window * size
    positions = np.arange(start, min(start + size, stop))
    assert len(positions)
    chunks, starts = _chunk_layout(order, epoch)
    rank = np.searchsorted(starts, positions, side="right") - 1
    ids = chunks[rank] * order.chunk_size + positions - starts[rank]
    shuffle = _permutation(len(ids), order.seed, "window", order.source, epoch, lane, window)
    return np.asarray(ids[shuffle], dtype=np.int64)


@lru_cache(maxsize=1024)
def _block_sources(mixture: Mixture, block: int) -> Ids:
    """The sources of the steps of one block."""
    counts = mixture.counts()
    sources = np.repeat(np.arange(len(counts)), counts)
    lane = () if mixture.lane is None else (mixture.lane,)
    return sources[_permutation(mixture.block, mixture.seed, "mixture", *lane, block)]


def _multiples_near(value: int, divisor: int) -> str:
    """The multiples of `divisor` on both sides of `value`, as "16 or 24"."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"
