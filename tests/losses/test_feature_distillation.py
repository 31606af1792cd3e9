"""The cosine loss against a loop in float64, value and gradient, both worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ssl_eo.losses.feature_distillation import cosine_loss


def test_value_and_gradient_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    loss = cosine_loss(found, wanted)
    loss.backward()
    total, gradient = 0.0, torch.zeros(5, 7, dtype=torch.float64)
    for i, (a, b) in enumerate(zip(found.tolist(), wanted.tolist(), strict=True)):
        length, other = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(y * y for y in b))
        cos = sum(x * y for x, y in zip(a, b, strict=True)) / (length * other)
        total += (1 - cos) / 5
        for j, (x, y) in enumerate(zip(a, b, strict=True)):
            gradient[i, j] = -(y / (length * other) - cos * x / length**2) / 5
    assert loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(found.grad, gradient, rtol=1e-10, atol=1e-12)


def test_lengths_do_not_count_and_the_least_is_0() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert cosine_loss(5 * x, x).item() == pytest.approx(0.0, abs=1e-6)
    assert cosine_loss(x, -0.1 * x).item() == pytest.approx(2.0)
