"""Attention in windows against loops over cells, by the definition of Swin; what surrounds it in MUSTER."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_eo.eval.decoders import TapShape, build_decoder
from ssl_eo.eval.decoders._windows import WindowAttention, Windows
from ssl_eo.eval.decoders.muster import _left_out

WIDTH, HEADS = 6, 2
CASES = [
    ((6, 6), 3),  # whole windows
    ((8, 4), 4),
    ((7, 5), 3),  # windows that the map does not fill
    ((7, 5), 4),
    ((2, 9), 4),  # an axis of less than a window
    ((3, 3), 8),  # a map of less than a window
    ((1, 1), 2),
    ((5, 4), 5),  # exactly one window along an axis
    ((4, 3), 1),  # windows of one cell
]


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _place(cell: int, length: int, side: int, is_shifted: bool) -> tuple[int, bool]:
    """Window of a cell on one axis, and whether it came there around the edge: Swin's cyclic shift and its mask."""
    if length <= side or not is_shifted:
        return cell // side, False
    shift, padded = side // 2, -(-length // side) * side
    return (cell - shift) % padded // side, cell < shift


def _naive(module: WindowAttention, queries: np.ndarray, context: np.ndarray) -> np.ndarray:
    state = {name: value.double().numpy() for name, value in module.state_dict().items()}
    n, height, width, _ = queries.shape
    d = WIDTH // HEADS
    q = queries @ state["attention.q.weight"].T + state["attention.q.bias"]
    kv = context @ state["attention.kv.weight"].T + state["attention.kv.bias"]
    k, v = kv[..., :WIDTH], kv[..., WIDTH:]
    cells = [(y, x) for y in range(height) for x in range(width)]
    sides = ((height, module.side, module.is_shifted), (width, module.side, module.is_shifted))
    place = {cell: tuple(_place(c, *axis) for c, axis in zip(cell, sides, strict=True)) for cell in cells}
    out = np.zeros_like(queries)
    for b in range(n):
        for y, x in cells:
            near = [cell for cell in cells if place[cell] == place[y, x]]
            for head in range(HEADS):
                part = slice(head * d, (head + 1) * d)
                logits = np.array(
                    [
                        q[b, y, x, part] @ k[b, i, j, part] / np.sqrt(d)
                        + state["offset_bias"][head, y - i + module.side - 1, x - j + module.side - 1]
                        for i, j in near
                    ]
                )
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                for weight, (i, j) in zip(weights, near, strict=True):
                    out[b, y, x, part] += weight * v[b, i, j, part]
    return out @ state["attention.proj.weight"].T + state["attention.proj.bias"]


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize(("grid", "side"), CASES)
def test_attention_is_that_of_swin(grid: tuple[int, int], side: int, is_shifted: bool) -> None:
    torch.manual_seed(0)
    module = WindowAttention(WIDTH, HEADS, side, is_shifted)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    queries, context = _drawn(2, *grid, WIDTH), _drawn(2, *grid, WIDTH, seed=1)
    found = module(queries, context)
    wanted = _naive(module, queries.double().numpy(), context.double().numpy())
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=2e-4, atol=2e-5)
    found.square().sum().backward()  # what lies outside of the map leaves no nan
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize(("grid", "side"), CASES)
def test_join_undoes_split(grid: tuple[int, int], side: int, is_shifted: bool) -> None:
    x, windows = _drawn(3, *grid, 2), Windows(grid, side, is_shifted)
    split = windows.split(x)
    assert torch.equal(windows.join(split, 3), x)
    outside = windows.outside(x.device)
    n_cells = split.shape[0] // 3 * split.shape[1]
    assert n_cells - (0 if outside is None else int(outside.sum())) == grid[0] * grid[1]
    assert outside is None or not bool(outside.all(1).any())  # no window without a cell of the map


def test_shift_lets_neighbours_of_different_windows_meet() -> None:
    """Cells 2 and 3 lie in different windows of 3 x 3, and in one of the shifted ones."""
    for is_shifted in (False, True):
        module = WindowAttention(WIDTH, HEADS, 3, is_shifted)
        context = _drawn(1, 6, 6, WIDTH).requires_grad_()
        module(_drawn(1, 6, 6, WIDTH, seed=1), context)[0, 2, 2].sum().backward()
        assert context.grad is not None
        assert bool(context.grad[0, 3, 3].any()) == is_shifted


def test_heads_of_the_published_defaults() -> None:
    """32, 16, 8 and 4 heads of 48 channels from the coarsest level of a ViT-B on; every second block is shifted."""
    with torch.device("meta"):
        decoder = build_decoder("muster", {}, TapShape((768,) * 4, (16,) * 4), 2)
    found = [m for m in decoder.modules() if isinstance(m, WindowAttention)]
    heads = [m.attention.n_heads for m in found]
    assert heads == [4, 4, 8, 8, 16, 16, 32, 32]
    assert {m.attention.q.out_features // m.attention.n_heads for m in found} == {48}
    assert [m.is_shifted for m in found] == [False, True] * 4
    assert {m.side for m in found} == {12}


def test_images_are_left_out_whole_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    found = _left_out(torch.ones(4000, 2, 2, 3), 0.25)
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(found, found[:, :1, :1, :1].expand_as(found))
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
