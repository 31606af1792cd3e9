"""The pyramid against its formulas, and what becomes of taps that are not four."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.eval.decoders import TapShape
from ssl_eo.eval.decoders._neck import Neck, NeckWidths, tap_of_level

D = 8


def _maps(n_taps: int, grid: tuple[int, int]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, D, *grid, generator=g) for _ in range(n_taps)]


def _doubled(x: np.ndarray, conv: nn.Module) -> np.ndarray:
    """Each cell becomes 2 x 2 cells, each by a matrix of its own."""
    assert isinstance(conv, nn.ConvTranspose2d)
    weight = conv.weight.detach().double().numpy()  # [in, out, 2, 2]
    n, _, height, width = x.shape
    out = np.zeros((n, weight.shape[1], 2 * height, 2 * width))
    for row in range(2):
        for column in range(2):
            out[:, :, row::2, column::2] = np.einsum("io,bihw->bohw", weight[:, :, row, column], x)
    bias = 0.0 if conv.bias is None else conv.bias.detach().double().numpy()[:, None, None]
    return out + bias


def _gelu(x: np.ndarray) -> np.ndarray:
    return F.gelu(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize(
    ("form", "widths"),
    [("kept", (8, 8, 8, 8)), ("halved", (2, 4, 8, 8)), ("proportional", (2, 4, 8, 16))],
)
def test_levels_are_the_formulas(form: NeckWidths, widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    neck = Neck(TapShape((D,) * 4, (16,) * 4), form, "batch").eval()
    x4, x2, _, half = neck.levels
    assert isinstance(x4, nn.Sequential)
    with torch.no_grad():  # as after training
        x4[1].running_mean.normal_()
        x4[1].running_var.uniform_(0.5, 2.0)
    maps = _maps(4, (4, 6))
    found = [level.detach().double().numpy() for level in neck(maps)]
    assert neck.widths == widths
    assert [level.shape[1:] for level in found] == [
        (w, 16 // n, 24 // n) for w, n in zip(widths, (1, 2, 4, 8), strict=True)
    ]

    one, two, three, four = (m.double().numpy() for m in maps)
    mean, var = (x4[1].get_buffer(f"running_{key}").double().numpy()[:, None, None] for key in ("mean", "var"))
    finest = _doubled(_gelu((_doubled(one, x4[0]) - mean) / np.sqrt(var + 1e-5)), x4[3])
    np.testing.assert_allclose(found[0], finest, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], _doubled(two, x2), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[2], three)
    largest = four.reshape(2, D, 2, 2, 3, 2).max(axis=(3, 5))
    if form == "proportional":
        fit = half.fit
        weight, bias = (p.detach().double().numpy() for p in (fit.weight[:, :, 0, 0], fit.bias))
        largest = np.einsum("oi,bihw->bohw", weight, largest) + bias[:, None, None]
    np.testing.assert_allclose(found[3], largest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("n_taps", "levels"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 1, 2, 2]), (4, [0, 1, 2, 3])]
)
def test_taps_of_levels(n_taps: int, levels: list[int]) -> None:
    assert tap_of_level(n_taps) == levels
    maps = _maps(n_taps, (3, 5))
    for m in maps:
        m.requires_grad_()
    made = Neck(TapShape((D,) * n_taps, (16,) * n_taps), "kept", "group")(maps)
    assert [level.shape[2:] for level in made] == [(12, 20), (6, 10), (3, 5), (2, 3)]
    for level, tap in zip(made, levels, strict=True):
        gradients = torch.autograd.grad(level.sum(), maps, retain_graph=True, allow_unused=True)
        assert [g is not None for g in gradients] == [i == tap for i in range(n_taps)]


def test_too_many_taps() -> None:
    with pytest.raises(ValueError, match="4 levels and is made of as many taps at most, got 6"):
        Neck(TapShape((D,) * 6, (16,) * 6), "kept", "batch")


def test_a_pyramid_passes() -> None:
    shape = TapShape((8, 16, 24), (4, 8, 16))
    maps = [torch.randn(1, width, 24 // stride, 24 // stride) for width, stride in ((8, 1), (16, 2), (24, 4))]
    neck = Neck(shape, "halved", "batch")
    assert all(made is given for made, given in zip(neck(maps), maps, strict=True))
    assert neck.widths == shape.widths
    assert not list(neck.parameters())


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_tiny_widths(width: int) -> None:
    """No level is left without a channel."""
    for form in ("kept", "halved", "proportional"):
        neck = Neck(TapShape((width,) * 2, (16,) * 2), form, "layer")  # type: ignore[arg-type]
        made = neck([torch.randn(1, width, 1, 2)] * 2)
        assert tuple(level.shape[1] for level in made) == neck.widths
        assert min(neck.widths) >= 1
        assert [level.shape[2:] for level in made] == [(4, 8), (2, 4), (1, 2), (1, 1)]
