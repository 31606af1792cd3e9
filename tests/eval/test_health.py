"""Label-free measures against their definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssl_eo.eval.health import effective_rank, health, mean_cosine, mean_norm
from ssl_eo.seeding import torch_generator


@pytest.mark.parametrize(("n", "d"), [(50, 8), (6, 40), (20, 20)])
def test_measures_equal_their_definitions(n: int, d: int) -> None:
    x = torch.randn(n, d, generator=torch_generator(n, d)) + 0.3
    a = x.double().numpy()
    p = np.linalg.svd(a, compute_uv=False)
    p = p / p.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    norms = np.array([np.sqrt((row**2).sum()) for row in a])
    assert mean_norm(x) == pytest.approx(norms.mean(), rel=1e-12)
    pairs = [a[i] @ a[j] / norms[i] / norms[j] for i in range(n) for j in range(n) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_collapse_and_full_use_are_told_apart() -> None:
    point = torch.full((32, 16), 2.0)
    assert effective_rank(point) == pytest.approx(1.0, abs=1e-4)
    assert mean_cosine(point) == pytest.approx(1.0)
    assert effective_rank(torch.eye(16)) == pytest.approx(16.0)
    assert mean_cosine(torch.eye(16)) == pytest.approx(0.0, abs=1e-12)
    assert set(health(point)) == {"effective_rank", "mean_norm", "mean_cosine"}


def test_one_sample_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="pairs"):
        mean_cosine(torch.ones(1, 4))
