"""Position tables against loops over patches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.models.layers import rotate
from ssl_eo.models.position import (
    interpolate_table,
    pad_rope,
    rope_tables,
    sincos_grid,
    sincos_metres,
    sincos_resized,
    take_patches,
)

CPU = torch.device("cpu")
GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7))


def code(position: float, dim: int) -> list[float]:
    omega = [10_000 ** (-k / (dim / 2)) for k in range(dim // 2)]
    return [math.sin(position * w) for w in omega] + [math.cos(position * w) for w in omega]


@given(grid=GRIDS)
@settings(max_examples=25, deadline=None)
def test_sincos_is_column_then_row(grid: tuple[int, int]):
    expected = torch.tensor([code(c, 8) + code(r, 8) for r in range(grid[0]) for c in range(grid[1])])
    torch.testing.assert_close(sincos_grid(grid, 16, CPU), expected, rtol=0, atol=1e-6)


@given(grid=GRIDS, ratios=st.lists(st.floats(0.05, 10.0), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_metres_scale_the_distance_from_the_corner(grid: tuple[int, int], ratios: list[float]):
    found = sincos_metres(grid, 16, torch.tensor(ratios, dtype=torch.float64))
    for table, ratio in zip(found, ratios, strict=True):
        places = [((c + 0.5) * ratio - 0.5, (r + 0.5) * ratio - 0.5) for r in range(grid[0]) for c in range(grid[1])]
        expected = torch.tensor([code(x, 8) + code(y, 8) for x, y in places])
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)


def test_metres_at_the_reference_are_grid_units():
    assert torch.equal(sincos_metres((3, 5), 32, torch.ones(1))[0], sincos_grid((3, 5), 32, CPU))


def test_metres_agree_where_two_sensors_see_the_same_ground():
    """The middle patch of 3 x 3 coarse ones has the centre of the middle one of 9 x 9 that are three times finer."""
    coarse = sincos_metres((3, 3), 32, torch.tensor([3.0]))[0]
    fine = sincos_metres((9, 9), 32, torch.tensor([1.0]))[0]
    torch.testing.assert_close(coarse.view(3, 3, -1), fine.view(9, 9, -1)[1::3, 1::3])


def cubic(t: float) -> float:
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def axis_weights(native: int, n: int) -> torch.Tensor:
    """Bicubic weights [n, native] with the 0.1 offset in the scale factor and clamped borders."""
    weights = torch.zeros(n, native, dtype=torch.float64)
    for i in range(n):
        source = (i + 0.5) * native / (n + 0.1) - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            weights[i, min(max(tap, 0), native - 1)] += cubic(source - tap)
    return weights


@pytest.mark.parametrize("grid", [(3, 7), (9, 4), (5, 6), (16, 16)])
def test_learned_table_is_stretched_as_in_dinov2(grid: tuple[int, int]):
    table = torch.randn(25, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = (axis_weights(5, n) for n in grid)
    expected = torch.einsum("hr,wc,rcd->hwd", rows, columns, table.view(5, 5, 4)).flatten(0, 1)
    torch.testing.assert_close(interpolate_table(table, 5, grid), expected, rtol=1e-10, atol=1e-10)


def test_learned_table_at_its_own_size():
    table = torch.randn(25, 4)
    assert torch.equal(interpolate_table(table, 5, (5, 5)), table)


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (4, 3)])
def test_rope_turns_pairs_by_row_and_column_angles(grid: tuple[int, int]):
    d, n_prefix = 8, 2
    x = torch.randn(1, 1, n_prefix + grid[0] * grid[1], d, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, pad_rope(*rope_tables(grid, d, CPU), n_prefix))[0, 0]
    assert torch.equal(turned[:n_prefix], x[0, 0, :n_prefix])
    for n in range(grid[0] * grid[1]):
        row, column = divmod(n, grid[1])
        places = ((row + 0.5) / grid[0] * 2 - 1, (column + 0.5) / grid[1] * 2 - 1)
        angles = [2 * math.pi * place / 100 ** (2 * j / (d / 2)) for place in places for j in range(d // 4)]
        for j, angle in enumerate(angles):
            a, b = x[0, 0, n_prefix + n, j].item(), x[0, 0, n_prefix + n, j + d // 2].item()
            assert turned[n_prefix + n, j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
            assert turned[n_prefix + n, j + d // 2].item() == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=1e-5
            )


def test_tables_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        sin, cos = rope_tables((6, 11), 8, CPU)
    weight = torch.ones(8, requires_grad=True)
    (weight * sin + weight * cos).sum().backward()
    assert weight.grad is not None


def test_take_patches():
    table, ids = torch.randn(6, 3), torch.tensor([[5, 0], [2, 2]])
    assert torch.equal(take_patches(table, ids), torch.stack([table[[5, 0]], table[[2, 2]]]))
    assert torch.equal(take_patches(table.expand(2, -1, -1), ids), take_patches(table, ids))
    assert take_patches(table, None) is table


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match="even width, got 3"):
        sincos_grid((2, 2), 6, CPU)


def test_a_stretched_table_is_the_native_one_and_its_halves_are_swapped():
    native = sincos_resized(6, (6, 6), 16, CPU)
    columns, rows = sincos_grid((6, 6), 16, CPU).chunk(2, dim=1)
    torch.testing.assert_close(native, torch.cat((rows, columns), dim=1))
    # Of every fourth grid point, linear interpolation between the two in the middle of four.
    small = sincos_resized(8, (2, 2), 16, CPU, "bilinear")
    table = sincos_resized(8, (8, 8), 16, CPU).view(8, 8, 16)
    torch.testing.assert_close(small[1], table[1:3, 5:7].mean((0, 1)))
    assert (sincos_resized(8, (2, 2), 16, CPU) - small).abs().max() > 1e-3
