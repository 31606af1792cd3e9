"""The probes against scikit-learn, brute force and the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.eval.probes import RidgePath, knn, ridge, score
from ssl_eo.seeding import torch_generator


def _problem(n: int, d: int, n_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features with unequal scales, offsets and correlations, and labels that depend on them."""
    g = torch_generator(seed, "problem", n, d)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    labels = (x[:, :n_classes] + 2.0 * torch.randn(n, n_classes, generator=g)).argmax(1)
    return x * torch.logspace(-2, 2, d, dtype=torch.float64) + 7.0, labels


def _targets(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, n_classes).double() * 2 - 1


@pytest.mark.parametrize(("n", "d"), [(80, 12), (30, 50), (24, 24)])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 50.0, 1e5])
def test_ridge_equals_scikit_learn(n: int, d: int, penalty: float) -> None:
    from sklearn.linear_model import Ridge

    x, labels = _problem(n, d, 4)
    test, _ = _problem(17, d, 4, seed=1)
    y = _targets(labels, 4)
    path = RidgePath(x, y)
    mean, std = x.mean(0), x.std(0, correction=0)
    reference = Ridge(alpha=penalty, solver="svd").fit(((x - mean) / std).numpy(), y.numpy())
    np.testing.assert_allclose(path.weights(penalty).T.numpy(), reference.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(path.intercept.numpy(), reference.intercept_, rtol=0, atol=1e-6)
    expected = reference.predict(((test - mean) / std).numpy())
    np.testing.assert_allclose(path.predict(test, penalty).numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (15, 30), (20, 20)])
def test_gcv_equals_the_explicit_hat_matrix(n: int, d: int) -> None:
    x, labels = _problem(n, d, 3)
    y = _targets(labels, 3)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    penalties = torch.tensor([1e-2, 1.0, 30.0, 1e4], dtype=torch.float64)
    expected = []
    for penalty in penalties:
        hat = torch.full((n, n), 1.0 / n, dtype=torch.float64)
        hat += z @ torch.linalg.inv(z.T @ z + penalty * torch.eye(d, dtype=torch.float64)) @ z.T
        left = torch.eye(n, dtype=torch.float64) - hat
        expected.append(n * (left @ y).square().sum() / left.trace().square())
    torch.testing.assert_close(RidgePath(x, y).gcv(penalties), torch.stack(expected), rtol=1e-7, atol=0)


def test_gcv_is_the_mean_leave_one_out_error_where_all_leverages_are_equal() -> None:
    # An orthogonal design of +-1 gives every sample the same leverage; there GCV and leave-one-out are the same thing.
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    design = torch.kron(torch.kron(one, one), one)[:, 1:6]  # 8 samples, 5 centred columns
    y = torch.randn(8, 2, generator=torch_generator(3), dtype=torch.float64)
    penalty = 2.5
    error = 0.0
    for i in range(8):
        rest = [j for j in range(8) if j != i]
        # The intercept is a sixth, unpenalised column; the standardisation is that of the full design.
        x = torch.cat([torch.ones(8, 1, dtype=torch.float64), design], 1)
        gram = x[rest].T @ x[rest] + penalty * torch.diag(torch.tensor([0.0] + [1.0] * 5, dtype=torch.float64))
        weights = torch.linalg.solve(gram, x[rest].T @ y[rest])
        error += float((y[i] - x[i] @ weights).square().sum()) / 8
    gcv = RidgePath(design, y).gcv(torch.tensor([penalty], dtype=torch.float64))
    assert float(gcv) == pytest.approx(error, rel=1e-10)


def test_ridge_chooses_the_penalty_of_least_gcv_and_never_sees_the_test_set() -> None:
    x, labels = _problem(60, 8, 3)
    test, test_labels = _problem(30, 8, 3, seed=2)
    result = ridge(x, labels, test, test_labels, 3)
    again = ridge(x, labels, test.flip(0), (test_labels + 1) % 3, 3)
    assert result.penalty == again.penalty
    path = RidgePath(x, _targets(labels, 3))
    around = torch.tensor([result.penalty * f for f in (10**-0.5, 1.0, 10**0.5)], dtype=torch.float64)
    assert path.gcv(around).argmin() == 1


def test_ridge_ignores_scale_offset_and_constant_features() -> None:
    x, labels = _problem(60, 8, 3)
    test, test_labels = _problem(30, 8, 3, seed=2)
    plain = ridge(x, labels, test, test_labels, 3)

    def change(f: torch.Tensor) -> torch.Tensor:
        return torch.cat([f * 1e3 - 5e4, torch.full((len(f), 2), 0.1)], 1)

    changed = ridge(change(x), labels, change(test), test_labels, 3)
    assert changed.accuracy == plain.accuracy
    assert changed.penalty == plain.penalty


def test_ridge_learns_separable_classes_and_not_noise() -> None:
    g = torch_generator("separable")
    labels, test_labels = torch.arange(300) % 5, torch.arange(200) % 5
    centres = 3.0 * torch.eye(5, 20)
    x, test = (centres[y] + torch.randn(len(y), 20, generator=g) for y in (labels, test_labels))
    assert ridge(x, labels, test, test_labels, 5).accuracy > 0.85
    assert knn(x, labels, test, test_labels, 5).accuracy > 0.85
    noise, test_noise = torch.randn(300, 20, generator=g), torch.randn(200, 20, generator=g)
    assert 0.1 < ridge(noise, labels, test_noise, test_labels, 5).accuracy < 0.3


def test_ridge_is_finite_on_useless_features() -> None:
    labels = torch.arange(12) % 3
    result = ridge(torch.ones(12, 4), labels, torch.ones(6, 4), labels[:6], 3)
    assert result.accuracy == pytest.approx(1 / 3)


@given(
    n=st.integers(1, 30), m=st.integers(1, 12), k=st.integers(1, 25), chunk=st.integers(1, 5), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_knn_equals_brute_force(n: int, m: int, k: int, chunk: int, seed: int) -> None:
    g = torch_generator(seed)
    train, test = torch.randn(n, 6, generator=g), torch.randn(m, 6, generator=g)
    labels, test_labels = torch.randint(0, 4, (n,), generator=g), torch.randint(0, 4, (m,), generator=g)
    result = knn(train, labels, test, test_labels, 4, n_neighbors=k, chunk_size=chunk)
    a, b = train.double().numpy(), test.double().numpy()
    correct = 0
    for i in range(m):
        cosines = [float(b[i] @ a[j] / np.linalg.norm(b[i]) / np.linalg.norm(a[j])) for j in range(n)]
        votes = [0.0] * 4
        for j in sorted(range(n), key=lambda j: -cosines[j])[:k]:
            votes[int(labels[j])] += float(np.exp(cosines[j] / 0.07))
        correct += votes.index(max(votes)) == int(test_labels[i])
    assert result.accuracy == pytest.approx(correct / m)
    assert result.n_neighbors == min(k, n)


def test_knn_weights_the_nearer_neighbour() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])  # one very near, two far
    result = knn(train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.05]]), torch.tensor([0]), 2)
    assert result.accuracy == 1.0


def test_score_averages_over_samples_and_over_present_classes() -> None:
    labels = torch.tensor([0, 0, 0, 0, 2, 2])
    predicted = torch.tensor([0, 0, 0, 1, 2, 1])
    accuracy, macro_accuracy = score(predicted, labels)
    assert accuracy == pytest.approx(4 / 6)
    assert macro_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
