import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.masking import MaskConfig, block_mask, draw, n_masked, predicted, random_mask, stack_masks

many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@many
@given(st.integers(1, 500), st.floats(0, 1), seeds)
def test_random_masks_have_exact_counts(n_patches, share, seed):
    count = int(share * n_patches)
    mask = random_mask(np.random.default_rng(seed), n_patches, count)
    assert mask.shape == (n_patches,)
    assert mask.dtype == bool
    assert mask.sum() == count


@many
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.floats(0, 1),
    st.integers(1, 30),
    st.floats(0.05, 1),
    st.floats(0.1, 1),
    seeds,
)
def test_block_masks_have_exact_counts(grid, share, min_patches, max_ratio, min_aspect, seed):
    count = round(share * grid[0] * grid[1])
    mask = block_mask(np.random.default_rng(seed), grid, count, min_patches, max_ratio, min_aspect)
    assert mask.shape == (grid[0] * grid[1],)
    assert mask.dtype == bool
    assert mask.sum() == count


def test_block_masks_are_made_of_blocks():
    """Neighbours agree far more often than those of a random mask with as many hidden patches."""

    def agreement(masks):
        grids = np.stack(masks).reshape(-1, 16, 16)
        return (grids[:, :, 1:] == grids[:, :, :-1]).mean(), (grids[:, 1:] == grids[:, :-1]).mean()

    rng = np.random.default_rng(0)
    blocks = agreement([block_mask(rng, (16, 16), 77) for _ in range(200)])
    noise = agreement([random_mask(rng, 256, 77) for _ in range(200)])
    assert min(blocks) > 0.85
    assert max(noise) < 0.62


def test_one_block_has_the_area_and_aspect_asked_for():
    """A single rectangle is all there is when its smallest area is the whole count."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = block_mask(rng, (20, 20), 36, min_block_patches=36, min_block_aspect=1.0).reshape(20, 20)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert len(rows) == len(columns) == 6
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


@pytest.mark.parametrize("grid", [(16, 16), (5, 9)])
def test_every_patch_is_hidden_sometimes(grid):
    rng = np.random.default_rng(0)
    n = grid[0] * grid[1]
    for masks in (
        [block_mask(rng, grid, n // 3) for _ in range(500)],
        [random_mask(rng, n, n // 3) for _ in range(500)],
    ):
        share = np.mean(masks, axis=0)
        assert share.min() > 0.01  # the corners, which only rectangles flush with two edges reach, are the rarest
        assert share.max() < 0.75


@pytest.mark.parametrize("kind", ["random", "block"])
def test_masks_are_a_function_of_the_generator(kind):
    cfg = MaskConfig(kind=kind, mask_ratio=0.6)
    first, second, other = (draw(cfg, np.random.default_rng(s), (8, 6)) for s in (1, 1, 2))
    assert (first == second).all()
    assert (first != other).any()
    assert first.sum() == n_masked(48, 0.6)


@pytest.mark.parametrize(
    ("n_patches", "ratio", "expected"), [(196, 0.75, 147), (64, 0.9, 58), (49, 0.5, 25), (49, 0, 0)]
)
def test_the_visible_count_is_rounded_down(n_patches, ratio, expected):
    assert n_masked(n_patches, ratio) == expected


@many
@given(st.integers(1, 12), st.integers(1, 100), st.floats(0, 1), seeds)
def test_stacked_masks(n_rows, n_patches, share, seed):
    rng = np.random.default_rng(seed)
    count = int(share * n_patches)
    batch = stack_masks([random_mask(rng, n_patches, count) for _ in range(n_rows)])
    assert batch.mask.dtype == torch.bool
    assert batch.ids_keep.dtype == batch.ids_masked.dtype == torch.int64
    assert batch.ids_masked.shape == (n_rows, count)
    both = torch.cat([batch.ids_keep, batch.ids_masked], dim=1)
    assert torch.equal(both.sort(1).values, torch.arange(n_patches).expand(n_rows, -1))
    for ids, hidden in ((batch.ids_keep, False), (batch.ids_masked, True)):
        assert (batch.mask.gather(1, ids) == hidden).all()
        assert (ids.diff(dim=1) > 0).all()


@many
@given(st.integers(2, 100), st.floats(0.01, 1), seeds)
def test_some_of_the_hidden_patches_are_predicted(n_patches, predict_ratio, seed):
    rng = np.random.default_rng(seed)
    cfg = MaskConfig(predict_ratio=predict_ratio)
    masks = [draw(cfg, rng, (n_patches, 1)) for _ in range(3)]
    batch = stack_masks(masks, [predicted(cfg, rng, mask) for mask in masks])
    hidden = n_masked(n_patches, cfg.mask_ratio)
    assert batch.ids_masked.shape == (3, max(1, round(predict_ratio * hidden)))
    assert batch.mask.gather(1, batch.ids_masked).all()
    assert batch.ids_keep.shape == (3, n_patches - hidden)


def test_uneven_counts_are_refused():
    masks = [random_mask(np.random.default_rng(0), 16, n) for n in (4, 6)]
    with pytest.raises(ValueError, match=r"equal counts of visible patches, got \[10, 12\]"):
        stack_masks(masks)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "spiral"),
        ("mask_ratio", 1.0),
        ("mask_ratio", -0.1),
        ("predict_ratio", 0.0),
        ("min_block_patches", 0),
        ("max_block_ratio", 0.0),
        ("min_block_aspect", 1.5),
    ],
)
def test_config_ranges(key, value):
    with pytest.raises(ValueError, match=key):
        MaskConfig(**{key: value})


@pytest.mark.parametrize("count", [-1, 17])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match="between 0 and the 16 patches"):
        random_mask(np.random.default_rng(0), 16, count)
    with pytest.raises(ValueError, match="between 0 and the 16 patches"):
        block_mask(np.random.default_rng(0), (4, 4), count)
