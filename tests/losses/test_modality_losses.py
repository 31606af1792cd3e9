"""Losses of modalities against loops in float64, and what happens where there is nothing to learn from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssl_eo.losses.balancing import UncertaintyWeights
from ssl_eo.losses.modalities import class_errors, mean_of_samples, pixel_errors


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_pixels_are_the_mean_over_samples_of_the_mean_over_their_values(kind: str) -> None:
    pred, target, known = _random(4, 5, 6).requires_grad_(), _random(4, 5, 6, seed=1), _random(4, 5, 6, seed=2) > -0.5
    counts = known & (_random(4, 5, 1, seed=3) > 0)
    counts[2] = False
    loss, share = mean_of_samples(pixel_errors(pred, target, known, kind), counts)  # type: ignore[arg-type]
    total, grad = 0.0, torch.zeros_like(pred)
    for b in range(4):
        places = counts[b].nonzero().tolist()
        for n, e in places:
            difference = float(pred[b, n, e].detach() - target[b, n, e])
            total += (difference**2 if kind == "mse" else abs(difference)) / len(places) / 4
            slope = 2 * difference if kind == "mse" else math.copysign(1, difference)
            grad[b, n, e] = slope / len(places) / 4
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert share.item() == 0.75
    torch.testing.assert_close(pred.grad, grad)


def test_classes_are_cross_entropy_of_what_has_a_class() -> None:
    logits, labels = _random(3, 4, 2, 5).requires_grad_(), torch.arange(24).view(3, 4, 2) % 5
    valid = _random(3, 4, 2, seed=4) > 0
    loss, _ = mean_of_samples(class_errors(logits, torch.where(valid, labels, 255), valid), valid)
    total, grad = 0.0, torch.zeros_like(logits)
    for b in range(3):
        places = valid[b].nonzero().tolist()
        for n, e in places:
            p = logits[b, n, e].detach().exp()
            p = p / p.sum()
            total -= math.log(p[labels[b, n, e]]) / len(places) / 3
            p[labels[b, n, e]] -= 1
            grad[b, n, e] = p / len(places) / 3
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(logits.grad, grad)


@pytest.mark.parametrize("nothing", ["no masked patch", "NaN target", "nothing known", "infinite prediction"])
def test_the_gradient_is_finite_where_a_sample_has_nothing_to_learn_from(nothing: str) -> None:
    """0 / 0 for a sample, left out of the mean, gives a finite value and NaN gradients."""
    pred, target = _random(2, 3, 4), _random(2, 3, 4, seed=1)
    valid, hidden = torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(2, 3, 1, dtype=torch.bool)
    if nothing == "no masked patch":
        hidden[0] = False
    elif nothing == "NaN target":
        target[0, 0], valid[0, 0] = torch.nan, False
    elif nothing == "nothing known":
        target[:], valid[:] = torch.nan, False
    else:
        pred[0, 0], valid[0, 0] = torch.inf, False
    pred.requires_grad_()
    loss, share = mean_of_samples(pixel_errors(pred, target, valid, "mse"), hidden & valid)
    logits = torch.stack((pred, -pred), dim=-1)
    of_classes, _ = mean_of_samples(class_errors(logits, target.nan_to_num().long().clamp(0, 1), valid), hidden & valid)
    (loss + of_classes).backward()
    assert loss.isfinite()
    assert of_classes.isfinite()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()
    if nothing == "nothing known":
        assert (loss.item(), share.item()) == (0, 0)


def test_means_over_micro_batches_are_the_global_loss() -> None:
    """Though one part has hardly a value and the other many."""
    errors, counts = _random(8, 3, 4).square(), _random(8, 3, 4, seed=1) > -1
    counts[:4] &= _random(4, 3, 4, seed=2) > 1
    counts[1] = False
    whole = mean_of_samples(errors, counts)
    parts = [mean_of_samples(errors[i : i + 4], counts[i : i + 4]) for i in (0, 4)]
    for i in range(2):
        torch.testing.assert_close((parts[0][i] + parts[1][i]) / 2, whole[i])


def test_uncertainty_weights_are_the_formula_and_bounded() -> None:
    balance = UncertaintyWeights(3, bound=2.0)
    balance.init_weights()
    losses, shares = torch.tensor([0.5, 2.0, 0.0]), torch.tensor([1.0, 0.5, 0.0])
    torch.testing.assert_close(balance(losses, shares), losses)  # s is 0 at the start
    balance(losses, shares).sum().backward()
    assert balance.log_variance.grad is not None
    torch.testing.assert_close(balance.log_variance.grad, shares - losses)  # a task that is not there is not pushed
    with torch.no_grad():
        balance.log_variance.copy_(torch.tensor([0.3, -50.0, 50.0]))
    s = balance.clamped()
    torch.testing.assert_close(s, torch.tensor([2 * math.tanh(0.15), -2.0, 2.0]))
    torch.testing.assert_close(balance(losses, shares), losses * (-s).exp() + s * shares)


def test_learned_uncertainties_are_the_losses() -> None:
    """The least of L exp(-s) + s is at s = log L."""
    balance = UncertaintyWeights(2, bound=5.0)
    balance.init_weights()
    losses = torch.tensor([0.1, 4.0])
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        balance(losses, torch.ones(2)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(balance.clamped().detach(), losses.log(), atol=1e-2, rtol=0)
