"""Norms against torch's, over ranks too; changes of resolution and pyramid pooling against loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_eo.eval.decoders import TapMaps, TapShape, build_decoder
from ssl_eo.eval.decoders._layers import BatchNorm, Norm, PixelHead, conv_norm, halved, make_norm, resized
from ssl_eo.eval.decoders.upernet import PyramidPooling

D = 6


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _with_weights(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(_drawn(*parameter.shape, seed=10 + i))
    return norm


def _step(norm: nn.Module, x: Tensor, gain: Tensor) -> list[Tensor]:
    """Output, gradients of input and of parameters, running statistics."""
    x = x.clone().requires_grad_()
    out = norm(x)
    (out * gain).sum().backward()
    gradients = [p.grad for p in norm.parameters()]
    assert x.grad is not None
    return [out.detach(), x.grad, *(g for g in gradients if g is not None), norm.running_mean, norm.running_var]


def test_batch_norm_is_torchs() -> None:
    x, gain = _drawn(3, D, 4, 5) * 3 + 2, _drawn(3, D, 4, 5, seed=1)
    ours, theirs = _with_weights(BatchNorm(D)), _with_weights(nn.BatchNorm2d(D))
    for found, wanted in zip(_step(ours, x, gain), _step(theirs, x, gain), strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def _step_of_rank(parts: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return _step(_with_weights(BatchNorm(D)), *parts[dist.get_rank()])


def test_batch_norm_over_ranks_is_one_process(on_ranks: Callable[..., list[Any]]) -> None:
    """With unequal batches; gradients of parameters are summed over ranks, as those of the input are."""
    x, gain = _drawn(4, D, 3, 5) * 3 + 2, _drawn(4, D, 3, 5, seed=1)
    out, of_input, of_weight, of_bias, mean, var = _step(_with_weights(nn.BatchNorm2d(D)), x, gain)
    ranks = on_ranks(2, _step_of_rank, [(x[:1], gain[:1]), (x[1:], gain[1:])])
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), out)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), of_input)
    torch.testing.assert_close(ranks[0][2] + ranks[1][2], of_weight)
    torch.testing.assert_close(ranks[0][3] + ranks[1][3], of_bias)
    for found in ranks:
        torch.testing.assert_close(found[4], mean)
        torch.testing.assert_close(found[5], var)


def test_batch_norm_of_one_value() -> None:
    norm = BatchNorm(D)
    with pytest.raises(ValueError, match="more than one value a channel in training, got \\(1, 6, 1, 1\\)"):
        norm(_drawn(1, D, 1, 1))
    assert norm.eval()(_drawn(1, D, 1, 1)).shape == (1, D, 1, 1)


def test_layer_norm_is_over_the_channels_of_a_cell() -> None:
    x = _drawn(2, D, 3, 4)
    wanted = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(make_norm("layer", D)(x), wanted)


@pytest.mark.parametrize(("width", "n_groups"), [(768, 32), (512, 32), (40, 5), (37, 1), (16, 2), (12, 1), (1, 1)])
def test_groups(width: int, n_groups: int) -> None:
    norm = make_norm("group", width)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == n_groups


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_convolutions_keep_the_size_and_have_a_bias_where_it_does_something(norm: Norm) -> None:
    for kernel in (1, 3):
        block = conv_norm(D, 16, kernel, norm)
        assert block(_drawn(2, D, 3, 5)).shape == (2, 16, 3, 5)
        assert (block[0].bias is None) == (norm == "batch")


# Resolution


def _bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells are areas of equal extent, and a value stands for the middle of its cell."""

    def along(n: int, m: int) -> np.ndarray:
        weights = np.zeros((m, n))
        for i in range(m):
            place = min(max((i + 0.5) * n / m - 0.5, 0.0), n - 1.0)
            first = int(place)
            weights[i, first] += 1 - (place - first)
            weights[i, min(first + 1, n - 1)] += place - first
        return weights

    return np.einsum("Hh,Ww,bdhw->bdHW", along(x.shape[2], size[0]), along(x.shape[3], size[1]), x)


def _pooled(x: np.ndarray, side: tuple[int, int], of: Callable[..., Any]) -> np.ndarray:
    """`of` the cells that touch each of `side` equal parts."""
    out = np.empty((*x.shape[:2], *side))
    for i in range(side[0]):
        for j in range(side[1]):
            rows = slice(i * x.shape[2] // side[0], math.ceil((i + 1) * x.shape[2] / side[0]))
            columns = slice(j * x.shape[3] // side[1], math.ceil((j + 1) * x.shape[3] / side[1]))
            out[:, :, i, j] = of(x[:, :, rows, columns], axis=(2, 3))
    return out


@pytest.mark.parametrize("size", [(9, 4), (2, 7), (3, 5), (1, 1)])
def test_resized_is_bilinear_by_areas(size: tuple[int, int]) -> None:
    x = _drawn(2, D, 3, 5)
    np.testing.assert_allclose(resized(x, size).numpy(), _bilinear(x.double().numpy(), size), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 2)])
def test_halved(grid: tuple[int, int]) -> None:
    """2 x 2 cells where the grid is even; else cells of equal extents, as many as half the grid rounded up."""
    x = _drawn(2, D, *grid)
    half = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    np.testing.assert_array_equal(halved(x).numpy(), _pooled(x.numpy(), half, np.max))
    if grid == (4, 6):
        assert torch.equal(halved(x), nn.MaxPool2d(2)(x))


@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (2, 3)])
def test_pyramid_pooling_is_the_formula(grid: tuple[int, int]) -> None:
    """Pooled, projected, normalised in groups, rectified, enlarged, beside the map; also to more cells than it has."""
    channels, pools = 16, (1, 2, 3, 6)
    torch.manual_seed(0)
    pooling, x = PyramidPooling(D, channels, pools, "batch"), _drawn(2, D, *grid)
    pooling.join = nn.Identity()  # type: ignore[assignment]
    parts = [x.double().numpy()]
    for side, branch in zip(pools, pooling.branches, strict=True):
        conv = branch.get_submodule("0")
        weight, bias = (p.detach().double().numpy() for p in (conv.weight[:, :, 0, 0], conv.bias))
        found = _pooled(parts[0], (side, side), np.mean)
        found = np.einsum("oi,bihw->bohw", weight, found) + bias[:, None, None]
        groups = found.reshape(2, 2, -1)  # 16 channels are two groups of eight
        groups = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
        parts.append(_bilinear(np.maximum(groups.reshape(found.shape), 0.0), grid))
    np.testing.assert_allclose(pooling(x).detach().numpy(), np.concatenate(parts, 1), rtol=1e-4, atol=1e-5)


def test_one_pool_and_one_image_train() -> None:
    """The mean of a single image is no batch: it has to reach the output all the same."""
    pooling = PyramidPooling(D, 16, [1], "batch")
    torch.manual_seed(0)
    x = _drawn(1, D, 4, 4)
    seen = []
    pooling.join.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, D:].detach()))
    pooling(x)
    pooling(2 * x + _drawn(1, D, 1, 1))
    assert float(seen[0].std()) > 0
    assert not torch.allclose(*seen)


def test_pixel_head() -> None:
    """Linear at each cell, then enlarged; training drops whole channels of an image."""
    head, x = PixelHead(D, 3, 0.5), _drawn(2, D, 3, 5)
    weight, bias = (p.detach().double().numpy() for p in (head.classifier.weight[:, :, 0, 0], head.classifier.bias))
    cells = np.einsum("oi,bihw->bohw", weight, x.double().numpy()) + bias[:, None, None]
    found = head.eval()(x, (7, 9)).detach().numpy()
    np.testing.assert_allclose(found, _bilinear(cells, (7, 9)), rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    dropped = head.train().dropout(torch.ones(64, D, 3, 5))
    assert torch.equal(dropped, dropped[:, :, :1, :1].expand_as(dropped))
    assert 0.35 < float((dropped == 0).float().mean()) < 0.65


# What single decoders do of their own


def test_shuffle_gives_each_pixel_logits_of_its_own() -> None:
    shape, x = TapShape((D,), (4,)), _drawn(1, D, 2, 3)
    torch.manual_seed(0)
    decoder = build_decoder("fcn", {"channels": 8, "n_convs": 1, "upsampling": "shuffle"}, shape, 3).eval()
    cells: list[Tensor] = []
    decoder.classifier.register_forward_hook(lambda *given: cells.append(given[2]))
    found = decoder(TapMaps([x]), (8, 12))
    (of_cells,) = cells  # [1, 3 * 4 * 4, 2, 3]
    for row in range(8):
        for column in range(12):
            within = (row % 4) * 4 + column % 4
            wanted = of_cells[0, within::16, row // 4, column // 4]
            assert torch.equal(found[0, :, row, column], wanted)
    assert decoder(TapMaps([x]), (7, 10)).shape == (1, 3, 7, 10)


@pytest.mark.parametrize(("taps", "seen"), [("all", [True] * 4), ("last", [False, False, False, True])])
@pytest.mark.parametrize("strides", [(8, 8, 8, 8), (2, 4, 8, 16)])
def test_taps_that_segformer_sees(taps: str, seen: list[bool], strides: tuple[int, ...]) -> None:
    maps = [_drawn(1, D, 32 // stride, 48 // stride).requires_grad_() for stride in strides]
    decoder = build_decoder("segformer", {"channels": 8, "taps": taps}, TapShape((D,) * 4, strides), 3).eval()
    gradients = torch.autograd.grad(decoder(TapMaps(maps), (9, 9)).square().sum(), maps, allow_unused=True)
    assert [g is not None and bool(g.any()) for g in gradients] == seen


def test_linear_starts_near_zero_and_judges_each_token_by_itself() -> None:
    torch.manual_seed(0)
    decoder = build_decoder("linear", {}, TapShape((64,), (8,)), 3).eval()
    x = _drawn(1, 64, 3, 4)
    logits = decoder(TapMaps([x]), (3, 4))
    assert float(logits.detach().abs().max()) < 0.5
    other = x.clone()
    other[..., 1, 2] += 5.0
    changed = (decoder(TapMaps([other]), (3, 4)) != logits).any(1)[0]
    assert changed.nonzero().tolist() == [[1, 2]]
