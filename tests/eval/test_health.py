"""Label-free measures against their definitions in NumPy, closed forms, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_eo.eval.health import (
    alpha_req,
    cls_patch_cosine,
    dead_ratio,
    effective_rank,
    first_ratio,
    health,
    mean_cosine,
    mean_norm,
    norm_spread_ratio,
    spectrum,
    spread_ratio,
    uniformity,
)
from ssl_eo.models.vit import Tokens
from ssl_eo.seeding import torch_generator

ALL = {
    "effective_rank",
    "alpha_req",
    "uniformity",
    "mean_norm",
    "norm_spread_ratio",
    "mean_cosine",
    "spread_ratio",
    "first_ratio",
    "dead_ratio",
}


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, *shape))


def _of_spectrum(eigenvalues: Tensor, n: int, seed: int = 0) -> Tensor:
    """Features `[n, K]` with mean 0 whose covariance has exactly these eigenvalues, in random directions."""
    k = len(eigenvalues)
    x = _normal(n, k, seed=seed).double()
    left = torch.linalg.qr(x - x.mean(0)).Q  # [n, K], columns of mean 0
    right = torch.linalg.qr(_normal(k, k, seed=seed + 1).double()).Q
    return math.sqrt(n) * left * eigenvalues.double().sqrt() @ right


@pytest.mark.parametrize(("n", "d"), [(50, 8), (6, 40), (20, 20)])
def test_measures_equal_their_definitions(n: int, d: int) -> None:
    x = _normal(n, d) + 0.3
    a = x.double().numpy()
    p = np.linalg.svd(a, compute_uv=False)
    p = p / p.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    norms = np.array([np.sqrt((row**2).sum()) for row in a])
    assert mean_norm(x) == pytest.approx(norms.mean(), rel=1e-12)
    assert norm_spread_ratio(x) == pytest.approx(np.sqrt(((norms - norms.mean()) ** 2).mean()) / norms.mean())
    unit = a / norms[:, None]
    pairs = [(unit[i], unit[j]) for i in range(n) for j in range(n) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean([u @ v for u, v in pairs]), abs=1e-12)
    kernel = [np.exp(-2 * ((u - v) ** 2).sum()) for u, v in pairs]
    assert uniformity(x) == pytest.approx(np.log(np.mean(kernel)), rel=1e-9)
    variances = np.linalg.svd(a - a.mean(0), compute_uv=False)[: min(n - 1, d)] ** 2 / n
    assert spectrum(x).tolist() == pytest.approx(variances.tolist(), rel=1e-9)
    assert first_ratio(spectrum(x)) == pytest.approx(variances[0] / variances.sum())
    assert spread_ratio(x) == pytest.approx(np.sqrt(variances.sum() / (norms**2).mean()))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_alpha_is_the_exponent_of_a_power_law(alpha: float) -> None:
    x = _of_spectrum(torch.arange(1, 41) ** -alpha, n=100)
    found = alpha_req(spectrum(x))
    assert found == pytest.approx(alpha, abs=1e-6)
    assert first_ratio(spectrum(x)) == pytest.approx(1 / sum(j**-alpha for j in range(1, 41)))


def test_alpha_does_not_look_at_the_smaller_half() -> None:
    law = torch.arange(1, 41) ** -1.0
    cut = torch.where(torch.arange(40) < 20, law, 1e-3 * law)
    assert alpha_req(spectrum(_of_spectrum(cut, n=100))) == pytest.approx(1.0, abs=1e-6)


def test_alpha_and_first_ratio_are_undefined_without_enough_variance() -> None:
    assert alpha_req(spectrum(_normal(50, 7))) is None
    assert alpha_req(spectrum(_normal(50, 8))) is not None
    point = torch.full((32, 16), 2.0)
    assert first_ratio(spectrum(point)) is None
    # Rounding of float32 is no variance.
    rounded = point + 1e-7 * _normal(32, 16)
    assert len(spectrum(rounded)) == 0
    assert set(health(point)) == ALL - {"alpha_req", "first_ratio"}
    assert set(health(_normal(50, 40))) == ALL


def test_collapse_and_full_use_are_told_apart() -> None:
    point, spread = torch.full((32, 16), 2.0), torch.eye(16)
    assert effective_rank(point) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(spread) == pytest.approx(16.0)
    assert mean_cosine(point) == pytest.approx(1.0)
    assert mean_cosine(spread) == pytest.approx(0.0, abs=1e-12)
    assert uniformity(point) == pytest.approx(0.0, abs=1e-12)
    assert uniformity(spread) == pytest.approx(-4.0)  # pairs are at a squared distance of 2
    assert spread_ratio(point) == 0.0
    assert spread_ratio(spread) == pytest.approx(math.sqrt(15 / 16))
    assert dead_ratio(point) == 1.0
    assert dead_ratio(spread) == 0.0


def test_features_on_a_line() -> None:
    x = torch.ones(20, 12) + torch.arange(20.0)[:, None] * _normal(1, 12)
    assert first_ratio(spectrum(x)) == pytest.approx(1.0, abs=1e-6)
    assert spread_ratio(x) > 0.3


def test_dead_features_are_counted() -> None:
    x = _normal(64, 10)
    x[:, :3] = torch.tensor([0.0, 5.0, -1.0])
    x[:, 3] *= 1e-6
    assert dead_ratio(x) == pytest.approx(0.4)


def test_features_that_are_all_zero_have_measures_too() -> None:
    assert health(torch.zeros(8, 4)) == {
        "effective_rank": 1.0,
        "uniformity": pytest.approx(0.0),
        "mean_norm": 0.0,
        "mean_cosine": 0.0,
        "spread_ratio": 0.0,
        "dead_ratio": 1.0,
    }


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.integers(1, 24), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_scale_order_and_rotation_change_nothing_that_they_should_not(n: int, d: int, seed: int, scale: float) -> None:
    x = _normal(n, d, seed=seed).double() + 0.5
    rotation = torch.linalg.qr(_normal(d, d, seed=seed + 1).double()).Q
    other = scale * x[torch.randperm(n, generator=torch_generator(seed))] @ rotation
    expected, found = health(x), health(other)
    assert found.keys() == expected.keys()
    assert found.pop("mean_norm") == pytest.approx(scale * expected.pop("mean_norm"), rel=1e-6)
    for name in ("dead_ratio",):  # of the axes, which the rotation changes
        del found[name], expected[name]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert 1 - 1e-6 <= expected["effective_rank"] <= min(n, d) + 1e-6
    assert 0 <= expected["spread_ratio"] <= 1
    assert -8 - 1e-9 <= expected["uniformity"] <= 1e-9


def test_uniformity_of_many_is_that_of_a_part_of_them() -> None:
    some = _normal(2048, 6)
    assert uniformity(some.repeat_interleave(3, 0)) == pytest.approx(uniformity(some), abs=0.02)


def test_cls_and_patches() -> None:
    x = torch.tensor(
        [[[3.0, 0.0], [9.0, 9.0], [1.0, 1.0], [-1.0, 1.0]], [[0.0, 2.0], [9.0, 9.0], [1.0, 0.0], [3.0, 0.0]]]
    )
    found = cls_patch_cosine(Tokens(x, 2, (1, 2)))  # a register between them does not count
    assert found is not None
    assert found.tolist() == pytest.approx([0.0, 0.0])
    assert cls_patch_cosine(Tokens(x[:, [0, 0, 0]], 1, (1, 2))).tolist() == pytest.approx([1.0, 1.0])  # type: ignore[union-attr]
    assert cls_patch_cosine(Tokens(x, 0, (2, 2))) is None


@pytest.mark.parametrize("measure", [mean_cosine, uniformity])
def test_one_sample_has_no_pairs(measure: object) -> None:
    with pytest.raises(ValueError, match=r"pairs of samples, got 1"):
        measure(torch.ones(1, 4))  # type: ignore[operator]
