"""Feature targets against naive loops; no-data changes nothing that counts as valid."""

import math

import pytest
import torch

from ssl_eo.losses.reconstruction import patchify
from ssl_eo.losses.targets import gradient_histograms, moments_of, patch_statistics


def test_statistics_equal_a_naive_loop() -> None:
    patches = torch.randn(2, 3, 4 * 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, valid = patch_statistics(patches, n_channels=5)
    assert valid is None
    for b in range(2):
        for m in range(3):
            for c in range(5):
                values = [float(patches[b, m, i * 5 + c]) for i in range(4)]
                mean = sum(values) / 4
                std = math.sqrt(sum((v - mean) ** 2 for v in values) / 4)
                assert float(found[b, m, c]) == pytest.approx(mean, abs=1e-12)
                assert float(found[b, m, 5 + c]) == pytest.approx(math.log((std + 0.03) / 0.15), abs=1e-12)


def test_moments_of_a_patch_follow_from_its_statistics() -> None:
    patches = 3 + torch.randn(2, 3, 4 * 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patches[0, 0] = 7.0  # flat
    mean, var = moments_of(patch_statistics(patches, n_channels=5)[0])
    torch.testing.assert_close(mean, patches.mean(-1, keepdim=True))
    torch.testing.assert_close(var, patches.var(-1, correction=0, keepdim=True))


def naive_histogram(grey: torch.Tensor, top: int, left: int, cell: int, n_bins: int) -> list[float]:
    height, width = grey.shape
    bins = [0.0] * n_bins
    for y in range(top, top + cell):
        for x in range(left, left + cell):
            dx = float(grey[y, x + 1] - grey[y, x - 1]) if 0 < x < width - 1 else 0.0
            dy = float(grey[y + 1, x] - grey[y - 1, x]) if 0 < y < height - 1 else 0.0
            position = (math.atan2(dy, dx) / math.pi) % 1 * n_bins
            low, share = int(position) % n_bins, position - int(position)
            bins[low] += math.hypot(dx, dy) * (1 - share)
            bins[(low + 1) % n_bins] += math.hypot(dx, dy) * share
    return [math.log((b / cell**2 + 0.01) / 0.025) for b in bins]


@pytest.mark.parametrize(("patch_size", "cell"), [(4, 2), (4, 4), (8, 4)])
def test_histograms_equal_a_naive_loop(patch_size: int, cell: int) -> None:
    pixels = torch.randn(1, 3, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, valid = gradient_histograms(pixels, patch_size, n_bins=6, cell=cell)
    assert valid is None
    grey, n = pixels[0].mean(0), patch_size // cell
    for patch in range(found.shape[1]):
        top, left = patch // (8 // patch_size) * patch_size, patch % (8 // patch_size) * patch_size
        for i in range(n * n):
            expected = naive_histogram(grey, top + i // n * cell, left + i % n * cell, cell, 6)
            assert found[0, patch, i * 6 : (i + 1) * 6].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("garbage", [0.0, 1e9, math.nan])
def test_no_data_reaches_no_valid_target(garbage: float) -> None:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    valid = torch.rand(2, 3, 16, 16, generator=generator) > 0.02
    filled = torch.where(valid, pixels, garbage)
    for clean, dirty in (
        (gradient_histograms(pixels, 8, 8, 4, valid), gradient_histograms(filled, 8, 8, 4, valid)),
        (
            patch_statistics(patchify(pixels, 8), 3, patchify(valid, 8)),
            patch_statistics(patchify(filled, 8), 3, patchify(valid, 8)),
        ),
    ):
        assert clean[1] is not None
        assert clean[1].any()
        assert torch.equal(clean[1], dirty[1])
        assert torch.equal(clean[0][clean[1]], dirty[0][clean[1]])
    whole, _ = gradient_histograms(pixels, 8, 8, 4)
    partial, known = gradient_histograms(filled, 8, 8, 4, valid)
    assert known is not None
    assert not known.all()
    torch.testing.assert_close(partial[known], whole[known])
