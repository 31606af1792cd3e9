"""Masks of a batch: exact counts by slot, whatever the grid and the rank; blocks; the views that are left alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.spread_masking import SpreadMaskConfig, spread_masks

many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**62)
grids = st.tuples(st.integers(1, 20), st.integers(1, 150))
ratios = st.tuples(st.floats(0, 0.9), st.floats(0.05, 0.95)).map(lambda pair: tuple(sorted(pair)))


def masks_of(cfg, grid, n_views, slots, seed=0):
    """`[V, B, N]`."""
    return spread_masks(cfg, grid, n_views, slots, seed).mask.unflatten(0, (n_views, -1)).numpy()


@many
@given(grids, ratios, st.integers(1, 12), st.integers(1, 4), st.integers(0, 3), st.integers(0, 200), seeds)
def test_counts_are_exact_by_slot(grid, mask_ratio, n_ratios, n_masked_views, n_others, first, seed):
    """Masked view t of all is in bin (t + seed) modulo n of n equal bins of the ratios, and hides their middle."""
    cfg = SpreadMaskConfig(n_views=n_masked_views, mask_ratio=mask_ratio, n_ratios=n_ratios)
    n_patches = grid[0] * grid[1]
    masks = masks_of(cfg, grid, n_masked_views + n_others, range(first, first + 3), seed)
    assert masks.shape == (n_masked_views + n_others, 3, n_patches)
    edges = np.linspace(*mask_ratio, n_ratios + 1)
    for i in range(3):
        turns = [((first + i) * n_masked_views + j + seed) % n_ratios for j in range(n_masked_views)]
        middles = sorted(n_patches * (edges[turn] + edges[turn + 1]) / 2 for turn in turns)
        counts = sorted(masks[:, i].sum(1))
        assert counts[:n_others] == [0] * n_others
        for count, middle in zip(counts[n_others:], middles, strict=True):
            assert middle - 1 - 1e-9 < count <= middle + 1e-9


@many
@given(grids, ratios, st.integers(1, 3), st.integers(0, 2), st.integers(1, 9), seeds)
def test_ids_and_weights_are_those_of_the_mask(grid, mask_ratio, n_masked_views, n_others, n_samples, seed):
    cfg = SpreadMaskConfig(n_views=n_masked_views, mask_ratio=mask_ratio)
    batch = spread_masks(cfg, grid, n_masked_views + n_others, range(n_samples), seed)
    assert (batch.mask.dtype, batch.ids_masked.dtype, batch.weight.dtype) == (torch.bool, torch.int64, torch.float32)
    assert torch.equal(batch.ids_masked, batch.mask.flatten().nonzero()[:, 0])  # ascending, none twice
    expected = [1 / count for count in batch.mask.sum(1).tolist() for _ in range(count)]
    assert batch.weight.tolist() == pytest.approx(expected, rel=1e-6)


@many
@given(ratios, st.integers(1, 8), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4))
def test_all_ratios_are_equally_frequent_on_every_rank(mask_ratio, n_ratios, n_views, n_turns, n_ranks):
    """So a rank's part of a batch hides the same number of patches, if it has a multiple of `n_ratios` samples."""
    cfg, grid = SpreadMaskConfig(n_views=n_views, mask_ratio=mask_ratio, n_ratios=n_ratios), (6, 5)
    n_samples = n_ratios * n_turns
    ranks = [masks_of(cfg, grid, 2, range(r * n_samples, (r + 1) * n_samples)) for r in range(n_ranks)]
    found = [sorted(masks.sum(2).ravel().tolist()) for masks in ranks]
    each = cfg.counts(30).tolist()
    assert found == [sorted([*each * n_turns * n_views, *[0] * (2 - n_views) * n_samples])] * n_ranks


@many
@given(grids, st.permutations(range(12)), seeds)
def test_a_mask_depends_on_seed_and_slot_alone(grid, slots, seed):
    whole = masks_of(SpreadMaskConfig(), grid, 2, range(12), seed)
    for part in (slots[:5], slots[5:]):
        np.testing.assert_array_equal(masks_of(SpreadMaskConfig(), grid, 2, part, seed), whole[:, part])


def test_other_seeds_and_slots_have_other_masks():
    masks = masks_of(SpreadMaskConfig(n_ratios=1), (16, 16), 1, range(500))[0]
    assert len({mask.tobytes() for mask in masks}) == 500
    assert (masks_of(SpreadMaskConfig(n_ratios=1), (16, 16), 1, range(500), seed=1)[0] != masks).any(1).all()


def test_defaults_are_the_proportions_of_dinov2():
    """Every second view is masked, of 10 to 50 % of its patches, all of it equally often."""
    masks = masks_of(SpreadMaskConfig(), (16, 16), 2, range(800))
    hidden = masks.mean(2)
    assert (hidden == 0).mean() == 0.5
    assert hidden[hidden > 0].mean() == pytest.approx(0.3, abs=1 / 256)
    assert hidden[hidden > 0].min() == pytest.approx(0.125, abs=1 / 256)
    assert hidden.max() == pytest.approx(0.475, abs=1 / 256)
    assert hidden[0].astype(bool).mean() == pytest.approx(0.5, abs=0.06)  # which of the two views is masked is drawn


def test_masks_are_made_of_blocks_and_every_patch_is_hidden_sometimes():
    masks = masks_of(SpreadMaskConfig(mask_ratio=(0.3, 0.3)), (16, 16), 1, range(2000))[0].reshape(-1, 16, 16)
    assert (masks[:, :, 1:] == masks[:, :, :-1]).mean() > 0.85
    assert (masks[:, 1:] == masks[:, :-1]).mean() > 0.85
    often = masks.mean(0)
    assert 0.01 < often.min() < 0.3 < often.max() < 0.65  # corners least
    assert (often[:8] - often[8:]).mean() == pytest.approx(0, abs=0.01)  # top and bottom equally


def test_one_rectangle_has_the_aspect_asked_for():
    cfg = SpreadMaskConfig(mask_ratio=(0.2, 0.2), min_block_patches=10_000, max_block_ratio=1.0, min_block_aspect=1.0)
    masks = masks_of(cfg, (20, 20), 1, range(50))[0].reshape(-1, 20, 20)
    whole_rows = masks.all(2)  # as large a square as there is room for, cut off after a fifth from one end or the other
    assert (whole_rows[:, :4].all(1) ^ whole_rows[:, 16:].all(1)).all()
    assert masks.sum((1, 2)).tolist() == [80] * 50


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_views", 0),
        ("n_ratios", 0),
        ("min_block_patches", 0),
        ("mask_ratio", (0.5, 0.1)),
        ("mask_ratio", (0.0, 0.0)),
        ("mask_ratio", (0.1, 1.0)),
        ("mask_ratio", (-0.1, 0.5)),
        ("max_block_ratio", 0.0),
        ("min_block_aspect", 1.5),
    ],
)
def test_config_ranges(key, value):
    with pytest.raises(ValueError, match=key):
        SpreadMaskConfig(**{key: value})
