from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.order import MixedOrder, Mixture, Order, check_lanes

GOLDEN = ([8, 9, 10, 13, 22, 21], [1, 12, 19, 4, 28, 26], [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1])
property_test = settings(max_examples=40, deadline=None)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    n_lanes = draw(st.sampled_from([1, 2, 4, 8, 12]))
    return Order(
        n_samples=draw(st.integers(1, 300)),
        chunk_size=draw(st.integers(1, 40)),
        n_lanes=n_lanes,
        global_batch_size=n_lanes * draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**32)),
        window_chunks=draw(st.integers(1, 6)),
        source=draw(st.integers(0, 2)),
    )


def by_counter(order: Order, n_steps: int) -> np.ndarray:
    """Ids in the order of the global counter: a batch is `[lanes, per lane]`, a counter runs over lanes first."""
    batches = [order.batch(s).reshape(order.n_lanes, -1).T.reshape(-1) for s in range(n_steps)]
    return np.concatenate(batches)


@property_test
@given(orders())
def test_every_sample_once_per_epoch(order: Order) -> None:
    n_steps = -(-3 * order.n_samples // order.global_batch_size)
    ids = by_counter(order, n_steps)
    for epoch in range(3):
        of_epoch = ids[epoch * order.n_samples : (epoch + 1) * order.n_samples]
        assert sorted(of_epoch.tolist()) == list(range(order.n_samples))


@property_test
@given(orders(), st.integers(0, 1000), st.sampled_from([1, 2, 3, 4]))
def test_ranks_concatenate_to_the_single_process_batch(order: Order, step: int, world_size: int) -> None:
    if order.n_lanes % world_size:
        world_size = 1
    parts = [order.batch(step, rank, world_size) for rank in range(world_size)]
    assert {len(p) for p in parts} == {order.global_batch_size // world_size}
    np.testing.assert_array_equal(np.concatenate(parts), order.batch(step))
    slots = [s for rank in range(world_size) for s in order.slots(rank, world_size)]
    assert slots == list(range(order.global_batch_size))


@property_test
@given(orders(), st.integers(0, 60))
def test_a_step_is_found_without_the_ones_before(order: Order, step: int) -> None:
    walked = [order.batch(s) for s in range(step + 1)][-1]
    fresh = pickle.loads(pickle.dumps(order))
    np.testing.assert_array_equal(fresh.batch(step), walked)


@property_test
@given(orders(), st.integers(0, 50), st.integers(1, 20), st.data())
def test_replacement_is_the_slot_of_a_later_batch(order: Order, step: int, attempt: int, data: st.DataObject) -> None:
    slot = data.draw(st.integers(0, order.global_batch_size - 1))
    assert order.replacement(step, slot, attempt) == order.batch(step + attempt)[slot]


@property_test
@given(orders())
def test_lanes_share_an_epoch_evenly(order: Order) -> None:
    ids = by_counter(order, -(-2 * order.n_samples // order.global_batch_size))
    for epoch in range(2):
        lanes = np.arange(epoch * order.n_samples, (epoch + 1) * order.n_samples) % order.n_lanes
        counts = np.bincount(lanes, minlength=order.n_lanes)
        assert counts.max() - counts.min() <= 1
        # A lane's samples are one cut of the chunk sequence: it touches no more chunks than such a cut can.
        for lane in range(order.n_lanes):
            of_lane = ids[epoch * order.n_samples :][: order.n_samples][lanes == lane]
            assert len(set(of_lane // order.chunk_size)) <= len(of_lane) // order.chunk_size + 3


def test_a_lane_reads_few_chunks_at_a_time() -> None:
    order = Order(100_000, 50, n_lanes=8, global_batch_size=64, seed=0, window_chunks=4)
    for step in range(0, 1500, 100):
        lane = np.concatenate([order.batch(s).reshape(8, 8)[0] for s in range(step, step + 25)])  # one window
        assert len(np.unique(lane // 50)) <= 2 * (4 + 1)


@pytest.mark.parametrize("change", [{"seed": 1}, {"source": 1}])
def test_seed_source_and_epoch_change_the_order(change: dict[str, int]) -> None:
    kwargs = {"n_samples": 200, "chunk_size": 10, "n_lanes": 4, "global_batch_size": 20, "seed": 0}
    order = Order(**kwargs)
    first, second = by_counter(order, 10), by_counter(order, 20)[200:]
    assert np.mean(first == second) < 0.1
    assert np.mean(first == by_counter(Order(**{**kwargs, **change}), 10)) < 0.1
    assert np.mean(np.diff(first) == 1) < 0.1


def test_neighbouring_epochs_are_uncorrelated() -> None:
    order = Order(4096, 16, n_lanes=8, global_batch_size=64, seed=3)
    ids = by_counter(order, 128)
    assert abs(np.corrcoef(ids[:4096], ids[4096:])[0, 1]) < 0.06
    assert abs(np.corrcoef(ids[:4096], np.arange(4096))[0, 1]) < 0.06


def test_the_order_of_this_version_is_kept() -> None:
    """A run resumed after an upgrade must find its place: these values never change."""
    order = Order(30, 4, n_lanes=2, global_batch_size=6, seed=0, window_chunks=2)
    assert order.batch(0).tolist() == GOLDEN[0]
    assert order.batch(7).tolist() == GOLDEN[1]
    assert [Mixture((2.0, 1.0), seed=0, block=12).source(s) for s in range(12)] == GOLDEN[2]


def test_seek_is_fast_in_a_large_source() -> None:
    order = Order(50_000_000, 64, n_lanes=64, global_batch_size=4096, seed=0)
    order.batch(10**6)
    start = time.perf_counter()
    order.batch(10**6 + 1)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((10, 4, 1), r"train\.global_batch_size = 10 .* data\.n_lanes = 4.* 8 or 12"),
        ((3, 8, 1), r"set train\.global_batch_size to 8,"),
        ((24, 8, 3), r"data\.n_lanes = 8 .* world size 3.* 6 or 9"),
        ((8, 8, 16), r"set data\.n_lanes to 16,"),
        ((0, 8, 1), r"train\.global_batch_size must be at least 1, got 0"),
        ((8, -1, 1), r"data\.n_lanes must be at least 1, got -1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, int, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_lanes(*sizes)


def test_an_order_names_the_source_at_fault() -> None:
    with pytest.raises(ValueError, match=r"data\.sources\[2\] holds no samples"):
        Order(0, 1, 1, 1, 0, source=2)
    with pytest.raises(ValueError, match=r"data\.window_chunks .* got 0"):
        Order(1, 1, 1, 1, 0, window_chunks=0)
    with pytest.raises(ValueError, match="world size 3"):
        Order(10, 1, 4, 8, 0).batch(0, 0, 3)


weights = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5).map(tuple)


@property_test
@given(weights, st.integers(0, 2**32))
def test_mixture_is_exact_in_every_block(mix: tuple[float, ...], seed: int) -> None:
    mixture = Mixture(mix, seed)
    shares = np.array(mix) / sum(mix) * mixture.block
    assert sum(mixture.counts()) == mixture.block
    assert np.abs(np.array(mixture.counts()) - shares).max() < 1
    for block in range(2):
        sources = [mixture.source(s) for s in range(block * mixture.block, (block + 1) * mixture.block)]
        assert np.bincount(sources, minlength=len(mix)).tolist() == mixture.counts()


@property_test
@given(weights, st.integers(0, 700))
def test_source_step_counts_earlier_steps_of_the_source(mix: tuple[float, ...], step: int) -> None:
    mixture = Mixture(mix, seed=1)
    sources = [mixture.source(s) for s in range(step + 1)]
    assert mixture.source_step(step) == sources[:-1].count(sources[-1])


def test_mixture_blocks_and_seeds_differ() -> None:
    sources = {seed: [Mixture((1.0, 1.0), seed).source(s) for s in range(512)] for seed in (0, 1)}
    assert sources[0][:256] != sources[0][256:]
    assert sources[0] != sources[1]


@pytest.mark.parametrize(
    ("mix", "match"),
    [
        ((), r"data\.sources is empty"),
        ((1.0, 0.0), r"data\.sources\[1\]\.weight must be positive.* got 0\.0"),
        ((1.0, float("nan")), r"data\.sources\[1\]\.weight"),
        ((1.0, 1e-4), r"data\.sources\[1\]\.weight = 0\.0001 .* never be drawn"),
    ],
)
def test_bad_weights_are_refused(mix: tuple[float, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Mixture(mix, seed=0)


# --- batches of several sources ---------------------------------------------------------------------------------------


def mixed(sizes, weights, n_lanes, per_lane, seed=0):
    orders = tuple(Order(n, 3, n_lanes, n_lanes * per_lane, seed, 2, source=i) for i, n in enumerate(sizes))
    return MixedOrder(orders, weights)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 40),
    st.integers(0, 2**31),
)
def test_mixed_batches_do_not_depend_on_the_world_size(sizes, log_lanes, per_lane, step, seed):
    n_lanes = 2**log_lanes
    order = mixed(sizes, (1.0,) * len(sizes), n_lanes, per_lane, seed)
    whole = order.batch(step)
    assert len(whole) == n_lanes * per_lane
    assert 0 <= whole.min() <= whole.max() < sum(sizes)
    for world_size in (2**k for k in range(log_lanes + 1)):
        parts = [order.batch(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), whole)
    for slot in order.slots():
        assert order.replacement(step, slot, 2) == order.batch(step + 2)[slot]


def test_mixed_batches_keep_the_proportions_and_show_every_sample_once_per_epoch():
    order = mixed((30, 90), (1.0, 3.0), n_lanes=2, per_lane=4)
    ids = np.concatenate([order.batch(step) for step in range(128)])  # 1,024 samples: 2 lanes of 2 blocks
    assert np.count_nonzero(ids < 30) == 256
    assert np.count_nonzero(ids >= 30) == 768
    counts = np.bincount(ids, minlength=120)
    # 256 / 30 and 768 / 90 epochs; the two lanes are not always in the same one.
    assert set(counts.tolist()) <= {7, 8, 9, 10}
    first = [i for i in ids.tolist() if i < 30][:30]
    assert len(set(first)) >= 28
