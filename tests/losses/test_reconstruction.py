"""Losses against naive float64 loops, value and gradient; no-data never reaches either."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.losses.reconstruction import masked_mse, normalise_patches, patchify, unpatchify


def naive_masked_mse(pred: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None) -> float:
    total, count = 0.0, 0
    for index in torch.cartesian_prod(*(torch.arange(n) for n in pred.shape)).tolist():
        i = tuple(index)
        count += 1
        if valid is None or valid[i]:
            total += (float(pred[i]) - float(target[i])) ** 2
    return total / count


def naive_normalise(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    var = sum((v - mean) ** 2 for v in row) / (len(row) - 1)
    return [(v - mean) / math.sqrt(var + 1e-6) for v in row]


@given(b=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 3), w=st.integers(1, 3), p=st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_patchify_order_and_inverse(b: int, c: int, h: int, w: int, p: int) -> None:
    pixels = torch.arange(b * c * h * w * p * p).view(b, c, h * p, w * p)
    patches = patchify(pixels, p)
    assert patches.shape == (b, h * w, p * p * c)
    for row in range(h * p):
        for col in range(w * p):
            patch, inside = (row // p) * w + col // p, ((row % p) * p + col % p) * c
            assert torch.equal(patches[:, patch, inside : inside + c], pixels[:, :, row, col])
    assert torch.equal(unpatchify(patches, p, (h, w)), pixels)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (3, 5, 12)])
@pytest.mark.parametrize("with_valid", [False, True])
def test_masked_mse_equals_naive_loop(shape: tuple[int, int, int], with_valid: bool) -> None:
    torch.manual_seed(0)
    pred = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randn(shape, dtype=torch.float64)
    valid = torch.rand(shape) > 0.3 if with_valid else None
    loss = masked_mse(pred, target, valid)
    assert float(loss.detach()) == pytest.approx(naive_masked_mse(pred.detach(), target, valid), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, pred)
    used = torch.ones(shape) if valid is None else valid
    expected = 2 * (pred.detach() - target) * used / pred.numel()
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


def test_normalise_patches_equals_naive() -> None:
    patches = torch.randn(2, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = [[naive_normalise(row.tolist()) for row in image] for image in patches]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(normalise_patches(patches), expected, rtol=1e-12, atol=1e-12)


def test_normalise_patches_sees_only_valid_values() -> None:
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(2, 3, 10, dtype=torch.float64, generator=generator)
    valid = torch.rand(2, 3, 10, generator=generator) > 0.4
    out = normalise_patches(patches, valid)
    for i in range(2):
        for j in range(3):
            expected = torch.tensor(naive_normalise(patches[i, j][valid[i, j]].tolist()), dtype=torch.float64)
            torch.testing.assert_close(out[i, j][valid[i, j]], expected, rtol=1e-10, atol=1e-10)
            assert (out[i, j][~valid[i, j]] == 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_no_data_reaches_neither_value_nor_gradient(garbage: float) -> None:
    torch.manual_seed(3)
    pred = torch.randn(2, 3, 4, requires_grad=True)
    target, valid = torch.randn(2, 3, 4), torch.rand(2, 3, 4) > 0.5
    results = []
    for filler in (0.0, garbage):
        filled = torch.where(valid, target, filler)
        for normalise in (False, True):
            loss = masked_mse(pred, normalise_patches(filled, valid) if normalise else filled, valid)
            (grad,) = torch.autograd.grad(loss, pred)
            results.append((loss.detach(), grad))
    for clean, dirty in zip(results[:2], results[2:], strict=True):
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[1], dirty[1])
    assert (results[0][1][~valid] == 0).all()


def test_a_batch_without_any_valid_value_gives_zero_and_no_nan() -> None:
    pred = torch.randn(2, 3, 4, requires_grad=True)
    valid = torch.zeros(2, 3, 4, dtype=torch.bool)
    loss = masked_mse(pred, normalise_patches(torch.full((2, 3, 4), math.nan), valid), valid)
    (grad,) = torch.autograd.grad(loss, pred)
    assert float(loss.detach()) == 0
    assert (grad == 0).all()


def test_mean_over_parts_is_the_loss_of_the_whole() -> None:
    """What makes data parallelism and accumulation exact, no-data included."""
    generator = torch.Generator().manual_seed(4)
    pred, target = (torch.randn(8, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    valid = torch.rand(8, 3, 4, generator=generator) > 0.5
    whole = masked_mse(pred, target, valid)
    parts = [masked_mse(*(t[i : i + 2] for t in (pred, target, valid))) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)
