"""Labels of pixels as fractions of patches, and scores of patches as pixels again, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_eo.eval.controls import band_statistics
from ssl_eo.eval.dense import PatchDraw, class_fractions, control_of_cells, patches_of_each, pixel_confusions
from ssl_eo.seeding import torch_generator

IGNORE = 255


def _maps(n_images: int, height: int, width: int, n_classes: int, ignored_prob: float = 0.0) -> Tensor:
    g = torch_generator("maps", n_images, height, width)
    maps = torch.randint(n_classes, (n_images, height, width), generator=g, dtype=torch.int16)
    return torch.where(torch.rand(maps.shape, generator=g) < ignored_prob, IGNORE, maps)


def _counted(label: NDArray[np.int16], grid: tuple[int, int], n_classes: int) -> NDArray[np.float64]:
    """Fractions of one map, `[h*w, K]`; a patch that ends inside a pixel has all of it."""
    rows = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            edges = [(k * n // g, -(-(k + 1) * n // g)) for k, n, g in zip((i, j), label.shape, grid, strict=True)]
            patch = label[slice(*edges[0]), slice(*edges[1])]
            counts = np.array([(patch == c).sum() for c in range(n_classes)], float)
            rows.append(counts / max(counts.sum(), 1))
    return np.stack(rows)


@pytest.mark.parametrize("grid", [(2, 2), (4, 2), (1, 1), (8, 12), (3, 5)])
@pytest.mark.parametrize("ignored_prob", [0.0, 0.3, 1.0])
def test_fractions_are_counts(grid: tuple[int, int], ignored_prob: float) -> None:
    maps = _maps(18, 8, 12, 4, ignored_prob)  # more than are worked on at once
    fractions = class_fractions(maps, grid, 4, IGNORE)
    expected = np.concatenate([_counted(label.numpy(), grid, 4) for label in maps])
    np.testing.assert_allclose(fractions.numpy(), expected, atol=1e-6)
    sums = fractions.sum(1)
    assert (((sums - 1).abs() < 1e-5) | (sums == 0)).all()
    if ignored_prob == 1.0:
        assert (sums == 0).all()


def test_a_constant_map_is_of_one_class() -> None:
    fractions = class_fractions(torch.full((2, 6, 6), 2), (3, 3), 4, None)
    assert fractions.tolist() == [[0.0, 0.0, 1.0, 0.0]] * 18


def test_labelled_patches_are_drawn_by_the_image_and_no_others() -> None:
    labels = torch.full((3, 6, 6), IGNORE, dtype=torch.int16)
    labels[0, :, :] = 1
    labels[1, 0, 0] = labels[1, 5, 5] = 0  # the first and the last patch of nine
    grid, keys = (3, 3), ["a", "b", "c"]
    found = PatchDraw(4, IGNORE, seed=0).places(labels, keys, grid)
    assert found.shape == (3, 4)
    assert len(set(found[0].tolist())) == 4
    assert min(found[0].tolist()) >= 0
    assert sorted(found[1].tolist()) == [-1, -1, 0, 8]
    assert found[2].tolist() == [-1] * 4
    assert torch.equal(PatchDraw(4, IGNORE, 0).places(labels[[2, 0]], ["c", "a"], grid)[1], found[0])  # whatever beside
    assert torch.equal(PatchDraw(2, IGNORE, 0).places(labels, keys, grid), found[:, :2])  # the first of a larger number
    assert sorted(PatchDraw(50, IGNORE, 0).places(labels, keys, grid)[0].tolist()) == list(range(9))
    others = [
        PatchDraw(4, IGNORE, 1).places(labels, keys, grid),
        PatchDraw(4, IGNORE, 0).places(labels, ["d"] * 3, grid),
    ]
    assert all(not torch.equal(other[0], found[0]) for other in others)


def test_a_hundred_thousand_patches_are_enough() -> None:
    assert [patches_of_each(n) for n in (1, 3_000, 100_000, 200_000)] == [100_000, 33, 1, 1]


def _enlarged(scores: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear, between the centres of patches, `[h, w, K]` to `[H, W, K]`."""
    h, w = scores.shape[:2]
    out = np.zeros((height, width, scores.shape[2]))
    for i in range(height):
        for j in range(width):
            y = np.clip((i + 0.5) * h / height - 0.5, 0, h - 1)
            x = np.clip((j + 0.5) * w / width - 0.5, 0, w - 1)
            top, left = int(y), int(x)
            for a, wa in ((top, 1 - (y - top)), (min(top + 1, h - 1), y - top)):
                for b, wb in ((left, 1 - (x - left)), (min(left + 1, w - 1), x - left)):
                    out[i, j] += wa * wb * scores[a, b]
    return out


def test_confusions_are_counts_of_enlarged_scores() -> None:
    n_images, grid, k = 18, (3, 4), 3
    labels = _maps(n_images, 9, 16, k, 0.2)
    scores = torch.randn(n_images * 12, k, generator=torch_generator("scores"))
    found = pixel_confusions(scores, labels, grid, k, IGNORE)
    assert found.dtype == torch.int64
    for image in range(n_images):
        maps = scores.view(n_images, *grid, k)[image].double().numpy()
        predicted = _enlarged(maps, 9, 16).argmax(2)
        expected = np.zeros((k, k), int)
        for true, guess in zip(labels[image].numpy().ravel(), predicted.ravel(), strict=True):
            if true != IGNORE:
                expected[true, guess] += 1
        assert found[image].tolist() == expected.tolist()


def test_one_class_everywhere_fills_one_column() -> None:
    labels = _maps(2, 8, 8, 3)
    scores = torch.tensor([0.0, 2.0, 1.0]).repeat(2 * 4, 1)
    confusions = pixel_confusions(scores, labels, (2, 2), 3, None)
    assert confusions[:, :, [0, 2]].sum() == 0
    assert confusions.sum((1, 2)).tolist() == [64, 64]


def test_a_control_of_cells_is_the_control_of_each_cell() -> None:
    pixels = torch.randn(3, 2, 8, 12, generator=torch_generator("cells"))
    found = control_of_cells(band_statistics, 4)(pixels)
    assert found.shape == (3, 2, 3, 4)
    for i in range(2):
        for j in range(3):
            cell = pixels[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            torch.testing.assert_close(found[:, i, j], band_statistics(cell))


@pytest.mark.parametrize("shape", [(10, 10), (9, 15), (3, 3)])
def test_cells_fill_the_image_whatever_its_size(shape: tuple[int, int]) -> None:
    pixels = torch.randn(2, 1, *shape, generator=torch_generator("cells"))
    found = control_of_cells(band_statistics, 4)(pixels)
    assert found.shape == (2, max(1, shape[0] // 4), max(1, shape[1] // 4), 2)
    uneven = torch.nn.functional.interpolate(
        pixels, [g * -(-n // g) for n, g in zip(shape, found.shape[1:3], strict=True)], mode="nearest"
    )
    torch.testing.assert_close(found[..., 0].mean((1, 2)), uneven.mean((1, 2, 3)))  # no pixel is left out
