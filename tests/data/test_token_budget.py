"""The split of the visible patches: exact, within what there is, fair, and by seed and slot alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.token_budget import TokenBudgetConfig, apportion, choose_visible, draw_shares

many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def budgets(draw):
    """Shares `[B, T]` of which some are 0, patches of a modality, and a budget that every sample can fill."""
    n_modalities, n_patches, n_samples = draw(st.integers(1, 6)), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(seeds))
    present = rng.random((n_samples, n_modalities)) < 0.6
    present[np.arange(n_samples), rng.integers(n_modalities, size=n_samples)] = True
    alpha = draw(st.floats(0.01, 100))
    shares = np.stack([draw_shares(TokenBudgetConfig(alpha=alpha), row, rng) for row in present])
    n_visible = draw(st.integers(1, int(present.sum(1).min()) * n_patches))
    return shares, n_patches, n_visible


@many
@given(budgets())
def test_counts_are_exact_and_only_of_what_is_there(budget):
    shares, n_patches, n_visible = budget
    counts = apportion(shares, n_patches, n_visible)
    assert (counts.sum(1) == n_visible).all()
    assert (counts <= n_patches).all()
    assert not counts[shares == 0].any()


@many
@given(st.integers(2, 6), st.integers(1, 60), seeds)
def test_counts_are_shares_rounded(n_modalities, n_visible, seed):
    """Where no modality runs out. Rounding to a given sum moves a count by less than two."""
    shares = np.random.default_rng(seed).dirichlet(np.ones(n_modalities), 4)
    counts = apportion(shares, 60, n_visible)
    assert (np.abs(counts - shares * n_visible) < 1 + n_modalities / 2).all()
    assert (np.abs(counts - shares * n_visible) < 1).mean() > 0.5


@many
@given(budgets(), seeds)
def test_ids_rows_and_order_say_the_same(budget, seed):
    shares, n_patches, n_visible = budget
    n_samples, n_modalities = shares.shape
    names = [f"m{i}" for i in range(n_modalities)]
    found = choose_visible(names, shares, n_patches, n_visible, range(7, 7 + n_samples), seed)
    mask = found.mask.view(n_samples, n_modalities, n_patches)
    assert (~mask).sum((1, 2)).tolist() == [n_visible] * n_samples
    np.testing.assert_array_equal((~mask).sum(2).numpy(), apportion(shares, n_patches, n_visible))
    for sample in range(n_samples):
        assert found.ids_keep[sample].tolist() == (~found.mask[sample]).nonzero()[:, 0].tolist()
    for i, name in enumerate(names):
        assert found.rows[name].tolist() == (~mask[:, i].flatten()).nonzero()[:, 0].tolist()
    every = [(i, row) for i, name in enumerate(names) for row in found.rows[name].tolist()]
    placed = [every[at] for at in found.order.tolist()]
    ids = [
        (id // n_patches, b * n_patches + id % n_patches) for b, row in enumerate(found.ids_keep) for id in row.tolist()
    ]
    assert placed == ids


@many
@given(st.permutations(range(12)), seeds)
def test_a_choice_depends_on_seed_and_slot_alone(slots, seed):
    shares = np.random.default_rng(1).dirichlet(np.ones(3), 12)
    whole = choose_visible("abc", shares, 16, 12, range(12), seed).mask
    for part in (slots[:5], slots[5:]):
        assert torch.equal(choose_visible("abc", shares[part], 16, 12, part, seed).mask, whole[part])
    assert not torch.equal(choose_visible("abc", shares, 16, 12, range(12), seed + 1).mask, whole)


def test_every_patch_is_seen_equally_often():
    seen = ~choose_visible("ab", np.full((4000, 2), 0.5), 9, 6, range(4000), 3).mask
    assert (seen.float().mean(0) - 1 / 3).abs().max() < 0.035


@pytest.mark.parametrize("alpha", [0.5, 1.0, [1.0, 4.0, 0.5]])
def test_shares_are_dirichlet(alpha):
    """Mean and variance of a component: a_i / s and a_i (s - a_i) / (s^2 (s + 1))."""
    rng, cfg = np.random.default_rng(0), TokenBudgetConfig(alpha=alpha)
    shares = np.stack([draw_shares(cfg, [True] * 3, rng) for _ in range(4000)])
    a = cfg.alphas(3)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(shares.mean(0), a / a.sum(), atol=0.02)
    np.testing.assert_allclose(shares.var(0), a * (a.sum() - a) / (a.sum() ** 2 * (a.sum() + 1)), atol=0.01)


def test_all_subsets_of_the_modalities_that_are_there_are_equally_frequent():
    rng, cfg = np.random.default_rng(0), TokenBudgetConfig(alpha=50.0, uniform_subsets=True)
    shares = np.stack([draw_shares(cfg, [True, False, True, True], rng) for _ in range(3500)])
    assert not shares[:, 1].any()
    subsets, times = np.unique(shares > 1e-3, axis=0, return_counts=True)
    assert len(subsets) == 7
    assert times.min() > 400
    few = apportion(shares[(shares > 1e-3).sum(1) == 1][:5], 10, 15)  # one modality has too few patches: others fill up
    assert (np.sort(few, axis=1)[:, -1] == 10).all()


@pytest.mark.parametrize(("key", "value"), [("n_visible", 0), ("alpha", 0.0), ("alpha", [1.0, -1.0]), ("alpha", [])])
def test_config_ranges(key, value):
    with pytest.raises(ValueError, match=key):
        TokenBudgetConfig(**{key: value})
