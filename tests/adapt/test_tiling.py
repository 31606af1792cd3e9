from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ssl_eo.adapt.tiling import (
    Blend,
    Box,
    Tiling,
    blend,
    blend_box,
    blend_weights,
    count_windows,
    grid_of,
    panel_bytes,
    panel_side,
    panels,
    reflected,
    windows,
)

KINDS: tuple[Blend, ...] = ("cosine", "gaussian")


def identity(pixels: Tensor) -> Tensor:
    return pixels


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


tilings = st.builds(
    lambda patch, n, overlap, kind, batch: Tiling(patch * n, overlap, kind, patch, batch_size=batch),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    st.sampled_from(KINDS),
    st.integers(1, 5),
)
sides = st.integers(1, 40)


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(1, 16), st.floats(0, 0.97))
def test_windows_cover_an_axis(length: int, n_patches: int, patch: int, overlap: float) -> None:
    size = patch * n_patches
    starts = windows(length, size, overlap, patch)
    steps = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] == max(size, math.ceil(length / patch) * patch) - size
    assert all(start % patch == 0 for start in starts)
    assert (steps > 0).all()
    assert (steps <= max(patch, size * (1 - overlap) + 1e-6)).all()  # they overlap as asked, or touch at least
    assert (steps[:-1] == steps[0]).all() if len(steps) else True  # only the last may overlap more


def test_windows_of_known_axes() -> None:
    assert windows(10, 4, 0.5) == [0, 2, 4, 6]
    assert windows(11, 4, 0.5) == [0, 2, 4, 6, 7]
    assert windows(11, 4, 0.5, 2) == [0, 2, 4, 6, 8]
    assert windows(11, 4, 0.0) == [0, 4, 7]
    assert windows(3, 4, 0.5) == [0]
    assert windows(100, 10, 0.9) == list(range(91))
    with pytest.raises(ValueError, match="one pixel at least along each side, got 0"):
        windows(0, 4, 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 7, 14, 224, 512])
def test_weights_are_positive_symmetric_and_highest_in_the_middle(kind: Blend, size: int) -> None:
    weights = blend_weights(size, kind)
    assert weights.shape == (size,)
    assert (weights > 0).all()
    assert (weights.float().outer(weights.float()) > 0).all()
    torch.testing.assert_close(weights, weights.flip(0))
    assert (weights.diff()[: (size - 1) // 2] > 0).all()


@given(st.integers(1, 12), st.integers(1, 60))
def test_mirror_images(length: int, n: int) -> None:
    axis = np.arange(length)
    expected = np.pad(axis, (0, n), mode="reflect" if length > 1 else "edge")
    np.testing.assert_array_equal(reflected(0, length + n, length).numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(sides, sides, tilings)
def test_identity_gives_the_image(height: int, width: int, tiling: Tiling) -> None:
    image = noise(2, height, width)
    found = blend(image, identity, tiling)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, image, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(sides, sides, tilings, st.sampled_from([1.0, -3.7, 1e-3, 255.0]))
def test_constants_stay_constants(height: int, width: int, tiling: Tiling, value: float) -> None:
    found = blend(noise(1, height, width), lambda x: torch.full((len(x), 3, *x.shape[2:]), value), tiling)
    assert found.shape == (3, height, width)
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=1e-6, atol=0)


def from_window_to_window(pixels: Tensor) -> Tensor:
    """Not the same for rows and columns, and other values at other places of the window."""
    ramp = torch.arange(pixels.shape[2])[:, None] * 0.3 - torch.arange(pixels.shape[3]) * 0.1
    return torch.cat([pixels + ramp, pixels * pixels.mean((1, 2, 3), keepdim=True)], 1)


def naive(image: Tensor, model: Callable[[Tensor], Tensor], tiling: Tiling) -> Tensor:
    """The definition in float64: the whole image padded by numpy, a window at a time, one division at the end."""
    size, height, width = tiling.size_px, image.shape[1], image.shape[2]
    rows = windows(height, size, tiling.overlap_ratio, tiling.patch_px)
    columns = windows(width, size, tiling.overlap_ratio, tiling.patch_px)
    missing = [(0, 0), (0, max(0, rows[-1] + size - height)), (0, max(0, columns[-1] + size - width))]
    padded = torch.from_numpy(np.pad(image.numpy(), missing, mode="reflect"))
    weight = blend_weights(size, tiling.blend)
    weight = weight[:, None] * weight
    total, weights = 0.0, torch.zeros(padded.shape[1:], dtype=torch.float64)
    for top in rows:
        for left in columns:
            window = padded[None, :, top : top + size, left : left + size]
            values = model(window)[0].double()
            place = torch.zeros(len(values), *padded.shape[1:], dtype=torch.float64)
            place[:, top : top + size, left : left + size] = values * weight
            weights[top : top + size, left : left + size] += weight
            total = total + place
    return (total / weights)[:, :height, :width].float()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), tilings)
def test_blending_is_the_weighted_mean_of_windows(height: int, width: int, tiling: Tiling) -> None:
    image = noise(2, height, width)
    expected = naive(image, from_window_to_window, tiling)
    torch.testing.assert_close(blend(image, from_window_to_window, tiling), expected, rtol=1e-5, atol=1e-5)


def test_batches_change_nothing() -> None:
    image = noise(3, 37, 53)
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1)
    models = {"own": from_window_to_window, "convolution": convolution}
    found = {
        (name, n): blend(image, model, Tiling(16, batch_size=n))
        for name, model in models.items()
        for n in (1, 2, 5, 7, 64)
    }
    for name, n in found:
        if name == "own":  # computed window by window: the same bits
            assert torch.equal(found[name, n], found[name, 1])
        torch.testing.assert_close(found[name, n], found[name, 1], rtol=1e-5, atol=1e-6)
    assert not found["convolution", 5].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_no_seams(kind: Blend) -> None:
    """Windows that disagree by 1 with their neighbours: values pass from one to the other in small steps."""

    def disagreeing(pixels: Tensor) -> Tensor:
        parity = pixels[:, :1, :1, :1] // 16 + pixels[:, 1:, :1, :1] // 16
        return (parity % 2).expand(-1, 1, *pixels.shape[2:])

    y, x = torch.meshgrid(torch.arange(80.0), torch.arange(112.0), indexing="ij")
    image = torch.stack([y, x])

    def steps(tiling: Tiling) -> float:
        found = blend(image, disagreeing, tiling)[0]
        return max(float(found.diff(dim=0).abs().max()), float(found.diff(dim=1).abs().max()))

    assert steps(Tiling(32, 0.5, kind)) < 0.25
    assert steps(Tiling(16, 0.0, kind)) == pytest.approx(1.0)  # what the test would see


def test_probabilities_or_raw_outputs() -> None:
    image = 3 * noise(4, 20, 27)
    tiling = Tiling(8, batch_size=3)
    probabilities = blend(image, from_four, tiling, softmax=True)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(20, 27), rtol=0, atol=1e-6)
    expected = naive(image, lambda x: from_four(x).softmax(1), tiling)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-6)
    raw = blend(image, from_four, tiling)
    assert (raw.softmax(0) - probabilities).abs().max() > 1e-3  # it is not the softmax of the blended logits


def from_four(pixels: Tensor) -> Tensor:
    return pixels * torch.arange(1, pixels.shape[2] + 1) / 4


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 1), (3, 4), (7, 40), (40, 7), (33, 65)])
def test_what_the_model_sees_of_small_images(shape: tuple[int, int]) -> None:
    image, seen = noise(2, *shape), []

    def look(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return pixels

    tiling = Tiling(16, 0.5, patch_px=4, batch_size=1)
    blend(image, look, tiling)
    missing = [(0, 0), *((0, max(16 - n, -n % 4)) for n in shape)]
    padded = np.asarray(image)
    for axis, n in enumerate(shape, start=1):
        only = [pad if i == axis else (0, 0) for i, pad in enumerate(missing)]
        padded = np.pad(padded, only, mode="reflect" if n > 1 else "edge")
    starts = [windows(n, 16, 0.5, 4) for n in shape]
    places = [(top, left) for top in starts[0] for left in starts[1]]
    assert len(seen) == len(places)
    for (top, left), pixels in zip(places, seen, strict=True):
        np.testing.assert_array_equal(pixels[0], padded[:, top : top + 16, left : left + 16])


@settings(max_examples=30, deadline=None)
@given(sides, sides, st.sampled_from(KINDS), st.sampled_from([0.25, 0.5]), st.integers(1, 9))
def test_panels_make_the_whole(height: int, width: int, kind: Blend, overlap: float, side: int) -> None:
    """Panels of any size, put together, have the very bits of one that is as large as the image."""
    image, tiling = noise(2, height, width), Tiling(8, overlap, kind, 4, 2)

    def means(pixels: Tensor) -> Tensor:
        return functional.avg_pool2d(from_window_to_window(pixels), 2)

    def read(box: Box) -> Tensor:
        assert box[0] + box[2] <= height
        assert box[1] + box[3] <= width
        return image[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]

    grid = grid_of((height, width), 2)
    whole = blend(image, means, tiling)
    assert whole.shape == (4, *grid)
    found, done = torch.full_like(whole, torch.nan), []
    for box in panels(grid, side):
        part = blend_box(read, (height, width), box, means, tiling, advance=done.append)
        assert part is not None
        top, left, h, w = box
        assert found[:, top : top + h, left : left + w].isnan().all()  # no cell is in two panels
        found[:, top : top + h, left : left + w] = part
    assert torch.equal(found, whole)
    assert sum(done) == sum(count_windows((height, width), box, tiling) for box in panels(grid, side))


def test_cells_of_patches() -> None:
    """A model of one value a patch: that of each patch of the image, also of those that the edge cuts."""
    image = noise(2, 21, 34)
    tiling = Tiling(12, 0.5, patch_px=4, cell_px=4)
    found = blend(image, lambda pixels: functional.avg_pool2d(pixels, 4), tiling)
    assert found.shape == (2, 6, 9)
    expected = functional.avg_pool2d(image, 4)
    torch.testing.assert_close(found[:, :5, :8], expected, rtol=1e-5, atol=1e-6)
    corner = reflected(20, 4, 21), reflected(32, 4, 34)
    torch.testing.assert_close(found[:, 5, 8], image[:, corner[0]][:, :, corner[1]].mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_cells_without_a_measured_value_are_nan() -> None:
    image = noise(2, 24, 40)
    image[:, :10, :18] = torch.nan  # a corner of both bands
    image[0, 15, 30] = torch.nan  # one band: the pixel was measured by the other
    seen = []

    def model(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return pixels.nan_to_num(7.0)

    found = blend(image, model, Tiling(8, 0.5, batch_size=3))
    hole = torch.zeros(24, 40, dtype=torch.bool)
    hole[:10, :18] = True
    assert torch.equal(found.isnan().any(0), hole)
    torch.testing.assert_close(found[:, ~hole], image.nan_to_num(7.0)[:, ~hole], rtol=1e-6, atol=1e-6)
    assert not any(window.isnan().all() for batch in seen for window in batch)  # the model need not look at nothing
    cells = blend(image, lambda x: functional.avg_pool2d(x.nan_to_num(0.0), 4), Tiling(8, 0.5, patch_px=4, cell_px=4))
    of_cells = torch.zeros(6, 10, dtype=torch.bool)
    of_cells[:2, :4] = True  # rows 0 to 7 and columns 0 to 15: the others hold a measured pixel
    assert torch.equal(cells.isnan().any(0), of_cells)
    with pytest.raises(ValueError, match="nothing of the image was measured"):
        blend(torch.full((1, 9, 9), torch.nan), identity, Tiling(4))


def test_mirror_images_are_not_measured() -> None:
    """The last cell lies in the image by one column, which was not measured; what is mirrored into it was."""
    image = noise(1, 8, 9)
    image[:, :, 8] = torch.nan
    found = blend(image, lambda x: functional.avg_pool2d(x.nan_to_num(0.0), 4), Tiling(8, patch_px=4, cell_px=4))
    assert found.isnan().any(0).tolist() == [[False, False, True]] * 2


def test_outputs_that_cannot_be_used() -> None:
    image = noise(2, 20, 20)
    with pytest.raises(ValueError, match=r"the model gave \[4, 2, 4, 4\] for 4 windows, expected \[4, K, 8, 8\]"):
        blend(image, lambda x: x[:, :, ::2, ::2], Tiling(8, batch_size=4))
    with pytest.raises(ValueError, match=r"the model gave \[4, 2\] for 4 windows"):
        blend(image, lambda x: x.mean((2, 3)), Tiling(8, batch_size=4))
    image[0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="values that are not finite; NaN in its input is what was not measured"):
        blend(image, identity, Tiling(8))


def test_sums_are_float32() -> None:
    image = noise(1, 30, 30)
    found = blend(image, lambda x: x.bfloat16(), Tiling(8, 0.75))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, image.bfloat16().float(), rtol=1e-6, atol=1e-6)  # nothing is added to its error
    integers = torch.arange(900, dtype=torch.int16).view(1, 30, 30)
    torch.testing.assert_close(blend(integers, identity, Tiling(8)), integers.float(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size_px": 0}, "size_px must be at least 1, got 0"),
        ({"size_px": 8, "batch_size": 0}, "batch_size must be at least 1"),
        ({"size_px": 8, "overlap_ratio": 1.0}, "overlap_ratio must be at least 0 and below 1, got 1.0"),
        ({"size_px": 8, "overlap_ratio": math.nan}, "overlap_ratio must be"),
        ({"size_px": 8, "blend": "hann"}, "blend must be one of cosine, gaussian, got 'hann'"),
        ({"size_px": 8, "patch_px": 3}, "size_px must be a multiple of the patch, 3 pixels, got 8"),
        ({"size_px": 8, "patch_px": 4, "cell_px": 3}, "cell_px must divide the patch, 4 pixels, got 3"),
    ],
)
def test_wrong_tilings_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Tiling(**options)


@pytest.mark.parametrize("shape", [(8, 8), (2, 0, 4), (1, 3, 4, 4)])
def test_images_have_three_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"an image is \[C, H, W\] with one pixel at least"):
        blend(torch.zeros(shape), identity, Tiling(4))


@given(
    st.tuples(st.integers(1, 60_000), st.integers(1, 60_000)),
    st.sampled_from([(64, 1), (224, 1), (224, 16), (512, 8)]),
    st.integers(1, 30),
    st.integers(1, 1024),
)
def test_panels_keep_to_the_memory(shape: tuple[int, int], cut: tuple[int, int], n_bands: int, n_outputs: int) -> None:
    size, cell = cut
    tiling = Tiling(size, patch_px=cell, cell_px=cell, batch_size=2)
    memory = 8 << 30
    side = panel_side(shape, tiling, n_bands, n_outputs, memory)
    assert panel_bytes(side, shape, tiling, n_bands, n_outputs) <= memory
    assert side % 16 == 0
    assert 2 * size <= side * cell <= 2304


def test_memory_that_is_too_little_is_named() -> None:
    tiling = Tiling(512, batch_size=4)
    large = 20_000, 30_000
    match = r"windows of 512 pixels of 224 bands, 5 values of a cell, need \d{4} MB, allowed are 500: allow more, or"
    with pytest.raises(ValueError, match=match):
        panel_side(large, tiling, 224, 5, 500_000_000)
    assert panel_side(large, tiling, 3, 2, 500_000_000) == 2048
    assert 1024 <= panel_side(large, tiling, 3, 40, 1_000_000_000) < 2048
    assert panel_bytes(2048, large, tiling, 3, 2) == panel_bytes(
        2048, (90_000, 90_000), tiling, 3, 2
    )  # not the scene's
