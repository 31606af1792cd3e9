"""The contrastive loss between two groups, against loops over samples, and over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_eo.distributed import mean_over_ranks, rank, world_size
from ssl_eo.losses.contrastive import pair_contrasts

SCALE = math.log(1 / 0.07)


def _features(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second, torch.tensor(SCALE, dtype=torch.float64)


def _naive(first: Tensor, second: Tensor, logit_scale: Tensor) -> Tensor:
    """The mean over samples and both directions of -log of the share of the right candidate."""
    total = torch.zeros((), dtype=torch.float64)
    for queries, candidates in ((first, second), (second, first)):
        for i, query in enumerate(queries):
            cosines = [query @ c / (query.norm() * c.norm()) for c in candidates]
            weights = [torch.exp(torch.exp(logit_scale) * cosine) for cosine in cosines]
            total = total - torch.log(weights[i] / sum(weights))
    return total / (2 * len(first))


def _loss(first: Tensor, second: Tensor, logit_scale: Tensor) -> Tensor:
    return torch.stack([contrast.loss() for contrast in pair_contrasts(first, second, logit_scale)]).mean()


def test_value_and_gradient_are_the_formula() -> None:
    found = [x.requires_grad_() for x in _features()]
    expected = [x.detach().clone().requires_grad_() for x in found]
    ours, theirs = _loss(*found), _naive(*expected)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert a.grad is not None
        assert a.grad.any()


def test_accuracy_counts_both_directions() -> None:
    first = torch.eye(4)
    second = first[[0, 1, 3, 2]]
    contrasts = pair_contrasts(first, second, torch.tensor(0.0))
    assert [contrast.accuracy().item() for contrast in contrasts] == [0.5, 0.5]


def test_a_feature_of_zeros_is_no_division_by_zero() -> None:
    first, second, scale = _features()
    first[0] = 0.0
    first.requires_grad_()
    loss = _loss(first, second, scale)
    loss.backward()
    assert loss.isfinite()
    assert first.grad is not None
    assert first.grad.isfinite().all()


def _step_of_rank() -> dict[str, Any]:
    """This rank's rows of the global batch: loss and gradients as DDP averages them, each in its place."""
    first, second, scale = _features(8)
    n = 8 // world_size()
    mine = slice(rank() * n, (rank() + 1) * n)
    for x in (first, second, scale):
        x.requires_grad_()
    loss = _loss(first[mine], second[mine], scale)
    loss.backward()
    grads = [mean_over_ranks(x.grad) for x in (first, second, scale) if x.grad is not None]
    return {"loss": mean_over_ranks(loss.detach()), "grads": grads}


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_are_one_process(on_ranks: Callable[..., list[Any]], n_ranks: int) -> None:
    whole = _step_of_rank()
    first, second, scale = _features(8)
    torch.testing.assert_close(whole["loss"], _naive(first, second, scale))
    for found in on_ranks(n_ranks, _step_of_rank):
        torch.testing.assert_close(found["loss"], whole["loss"])
        for ours, theirs in zip(found["grads"], whole["grads"], strict=True):
            torch.testing.assert_close(ours, theirs)
