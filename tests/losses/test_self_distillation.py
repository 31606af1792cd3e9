"""Each loss against the formula written out in loops of float64; two ranks against one process."""

from __future__ import annotations

import math

import pytest
import torch

from ssl_eo.distributed import mean_over_ranks, rank
from ssl_eo.losses.self_distillation import centered_targets, dino_loss, ibot_loss, koleo_loss, sinkhorn_targets

B, K, D = 5, 32, 12
T_STUDENT, T_TEACHER = 0.1, 0.05


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


def cross_entropy(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Of one row `[K]`, in float64."""
    z = logits.double() / T_STUDENT
    return -sum(t * (v - z.exp().sum().log()) for t, v in zip(target.double(), z, strict=True))


def assert_same(loss: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    """In value, and in the gradient of `x`."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(value, x)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_centered_targets():
    logits, center = drawn(B, K), drawn(K, seed=1)
    found = centered_targets(logits, center, T_TEACHER)
    for row, expected in zip(found.tolist(), logits.tolist(), strict=True):
        assert row == pytest.approx(
            softmax([(z - c) / T_TEACHER for z, c in zip(expected, center.tolist(), strict=True)]), rel=1e-4, abs=1e-7
        )


def naive_sinkhorn(logits: list[list[float]], n_iterations: int = 3) -> list[list[float]]:
    q = [[math.exp(z / T_TEACHER) for z in row] for row in logits]
    n, k = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[v / total for v in row] for row in q]
    for _ in range(n_iterations):
        columns = [sum(row[j] for row in q) for j in range(k)]
        q = [[v / columns[j] / k for j, v in enumerate(row)] for row in q]
        q = [[v / sum(row) / n for v in row] for row in q]
    return [[v * n for v in row] for row in q]


def test_sinkhorn():
    logits = drawn(B, K)
    found = sinkhorn_targets(logits, T_TEACHER)
    for row, expected in zip(found.tolist(), naive_sinkhorn(logits.double().tolist()), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert torch.allclose(found.sum(1), torch.ones(B))


def test_sinkhorn_does_not_overflow():
    found = sinkhorn_targets(300 * drawn(B, K), 0.04)
    assert found.isfinite().all()
    assert torch.allclose(found.sum(1), torch.ones(B))


@pytest.mark.parametrize("n_locals", [0, 4])
def test_dino_is_the_mean_over_pairs_of_different_views(n_locals):
    logits = drawn(2 + n_locals, B, K).double().requires_grad_()
    targets = drawn(2, B, K, seed=1).double().softmax(-1)
    pairs = [(s, t) for s in range(2 + n_locals) for t in range(2) if s != t]
    assert len(pairs) == 2 + 2 * n_locals
    expected = sum(cross_entropy(targets[t, b], logits[s, b]) for s, t in pairs for b in range(B)) / (len(pairs) * B)
    assert_same(dino_loss(logits, targets, T_STUDENT), expected, logits)


def test_ibot_weighs_views_equally():
    counts = [3, 0, 1, 2]
    owner = [i for i, n in enumerate(counts) for _ in range(n)]
    logits = drawn(len(owner), K).double().requires_grad_()
    targets = drawn(len(owner), K, seed=1).double().softmax(-1)
    weight = torch.tensor([1 / counts[i] for i in owner], dtype=torch.float64)
    each = [cross_entropy(t, z) for t, z in zip(targets, logits, strict=True)]
    expected = sum(sum(each[j] for j, o in enumerate(owner) if o == i) / n for i, n in enumerate(counts) if n) / 4
    assert_same(ibot_loss(logits, targets, weight, 4, T_STUDENT), expected, logits)


def naive_koleo(x: torch.Tensor) -> torch.Tensor:
    rows = [row / row.square().sum().sqrt() for row in x]
    distances = [[(a - b).square().sum().sqrt() for j, b in enumerate(rows) if j != i] for i, a in enumerate(rows)]
    return -sum(min(of_row).log() for of_row in distances) / len(rows)


def test_koleo():
    x = drawn(B, D).double().requires_grad_()
    # The loss has 1e-8 added to each difference and each distance.
    assert koleo_loss(x, eps=0.0).item() == pytest.approx(koleo_loss(x).item(), rel=1e-6)
    assert_same(koleo_loss(x, eps=0.0), naive_koleo(x), x)


def test_koleo_of_equal_rows_and_of_one_row_is_finite():
    for x in (drawn(1, D).expand(3, D).clone(), drawn(1, D)):
        x.requires_grad_()
        loss = koleo_loss(x)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
    assert loss.item() == 0.0


def _of_rank(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    part = x.chunk(2)[rank()].clone().requires_grad_()
    loss = koleo_loss(part, over_ranks=True)
    (grad,) = torch.autograd.grad(loss, part)
    return (
        mean_over_ranks(loss.detach()),
        grad / 2,
        sinkhorn_targets(part.detach(), T_TEACHER),
    )  # DDP averages gradients


def test_two_ranks_are_one_process(on_ranks):
    x = drawn(8, D, seed=3)
    whole = x.clone().requires_grad_()
    loss = koleo_loss(whole)
    (grad,) = torch.autograd.grad(loss, whole)
    first, second = on_ranks(2, _of_rank, x)
    torch.testing.assert_close(first[0], loss.detach())
    torch.testing.assert_close(torch.cat([first[1], second[1]]), grad)
    torch.testing.assert_close(torch.cat([first[2], second[2]]), sinkhorn_targets(x, T_TEACHER))
