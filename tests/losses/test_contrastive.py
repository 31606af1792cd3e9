"""Contrastive losses against loops of float64 written from the formulae; two ranks against one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_eo.distributed import mean_over_ranks, rank, world_size
from ssl_eo.losses.contrastive import (
    in_batch_contrast,
    nt_xent_contrast,
    pair_metrics,
    queue_contrast,
    regression_loss,
)

B, K, D = 6, 9, 5
T = 0.2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def choice(similarities: list[Tensor], right: int) -> Tensor:
    """-log of the softmax of one candidate."""
    exps = [(s / T).exp() for s in similarities]
    return -(exps[right] / torch.stack(exps).sum()).log()


def naive_nt_xent(z: Tensor) -> Tensor:
    """Over 2N views, each against all others but itself."""
    views = [(v, b) for v in range(2) for b in range(z.shape[1])]
    losses = []
    for view, sample in views:
        others = [(v, b) for v, b in views if (v, b) != (view, sample)]
        similarities = [cosine(z[view, sample], z[v, b]) for v, b in others]
        losses.append(choice(similarities, others.index((1 - view, sample))))
    return torch.stack(losses).mean()


def naive_in_batch(q: Tensor, k: Tensor) -> Tensor:
    return torch.stack([choice([cosine(q[i], row) for row in k], i) for i in range(len(q))]).mean()


def naive_queue(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return torch.stack(
        [choice([cosine(q[i], k[i]), *(cosine(q[i], old) for old in queue)], 0) for i in range(len(q))]
    ).mean()


def naive_regression(p: Tensor, t: Tensor) -> Tensor:
    unit = [(a / a.norm(), b / b.norm()) for a, b in zip(p, t, strict=True)]
    return torch.stack([(a - b).square().sum() for a, b in unit]).mean()


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "nt_xent": (lambda z: nt_xent_contrast(z, T).loss(), naive_nt_xent, (drawn(2, B, D),)),
    "in_batch": (lambda q, k: in_batch_contrast(q, k, T).loss(), naive_in_batch, (drawn(B, D), drawn(B, D, seed=1))),
    "queue": (
        lambda q, k, queue: queue_contrast(q, k, queue, T).loss(),
        naive_queue,
        (drawn(B, D), drawn(B, D, seed=1), unit(drawn(K, D, seed=2))),
    ),
    "regression": (regression_loss, naive_regression, (drawn(B, D), drawn(B, D, seed=1))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_the_formula(name: str) -> None:
    loss, naive, inputs = LOSSES[name]
    found = [x.clone().requires_grad_() for x in inputs[:2]]
    expected = [x.clone().requires_grad_() for x in inputs[:2]]
    values = loss(*found, *inputs[2:]), naive(*expected, *inputs[2:])
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    for value in values:
        value.backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)


def _of_rank(name: str) -> tuple[Tensor, list[Tensor]]:
    """The loss over all ranks, and this rank's part of the gradient of it, as DDP averages what follows from it."""
    loss, _, inputs = LOSSES[name]
    samples_first = [x.transpose(0, 1) if x.ndim == 3 else x for x in inputs[:2]]
    mine = [x.chunk(world_size())[rank()].clone().requires_grad_() for x in samples_first]
    value = loss(*(x.transpose(0, 1) if x.ndim == 3 else x for x in mine), *inputs[2:])
    value.backward()
    return mean_over_ranks(value.detach()), [x.grad / world_size() for x in mine if x.grad is not None]


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_are_one_process(name: str, on_ranks: Callable[..., list[Any]]) -> None:
    value, grads = _of_rank(name)
    ranks = on_ranks(2, _of_rank, name)
    for found, _ in ranks:
        torch.testing.assert_close(found, value, rtol=1e-12, atol=0)
    for i, grad in enumerate(grads):
        torch.testing.assert_close(torch.cat([found[i] for _, found in ranks]), grad, rtol=1e-11, atol=1e-13)


def test_a_view_is_no_candidate_of_its_own() -> None:
    """With two samples that are opposite, the other view is one of three candidates; itself would be a fourth."""
    z = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]] * 2, dtype=torch.float64)
    expected = -math.log(math.exp(5) / (math.exp(5) + 2 * math.exp(-5)))
    assert nt_xent_contrast(z, T).loss().item() == pytest.approx(expected, rel=1e-4)
    equal = torch.ones(2, B, D)
    assert nt_xent_contrast(equal, T).loss().item() == pytest.approx(math.log(2 * B - 1))


def test_other_keys_of_the_batch_are_no_candidates_beside_a_queue() -> None:
    q, k, queue = LOSSES["queue"][2]
    together = queue_contrast(q, k, queue, T).loss()
    alone = [queue_contrast(q[i : i + 1], k[i : i + 1], queue, T).loss() for i in range(B)]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_accuracy_is_the_share_of_rows_that_choose_right() -> None:
    k = torch.eye(4)
    assert in_batch_contrast(k[[0, 1, 3, 2]], k, T).accuracy().item() == 0.5
    assert nt_xent_contrast(torch.stack((k, k)), T).accuracy().item() == 1.0
    assert queue_contrast(k, k, -k, T).accuracy().item() == 1.0


def test_regression_is_0_for_equal_and_4_for_opposite_directions() -> None:
    x = drawn(B, D)
    assert regression_loss(x, 3.0 * x).item() == pytest.approx(0.0, abs=1e-12)
    assert regression_loss(x, -x).item() == pytest.approx(4.0)


def test_metrics_tell_collapse_from_spread() -> None:
    x, y = drawn(B, D), drawn(B, D, seed=1)
    found = pair_metrics(x, y)
    assert found["alignment"].item() == pytest.approx(naive_regression(x, y).item(), rel=1e-5)
    mean = torch.cat((unit(x), unit(y))).mean(0)
    assert found["spread"].item() == pytest.approx(1.0 - float(mean @ mean), rel=1e-5)
    one_point = pair_metrics(torch.ones(B, D), torch.ones(B, D))
    assert one_point["alignment"].item() == pytest.approx(0.0, abs=1e-6)
    assert one_point["spread"].item() == pytest.approx(0.0, abs=1e-6)
