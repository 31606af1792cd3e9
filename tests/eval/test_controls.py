"""Controls: right numbers, any number of channels, the same every time, and no more than they should see."""

from __future__ import annotations

import pytest
import torch

from ssl_eo.eval.controls import (
    CONTROLS,
    DRAWN_CONTROLS,
    band_statistics,
    control_of,
    control_taps,
    random_convolution,
    texture_statistics,
)
from ssl_eo.models.vit import EncoderInput
from ssl_eo.seeding import torch_generator
from ssl_eo.sensors import load_sensor


def _pixels(n_channels: int) -> torch.Tensor:
    return torch.randn(3, n_channels, 16, 20, generator=torch_generator(n_channels))


@pytest.mark.parametrize("n_channels", [1, 3, 12])
@pytest.mark.parametrize("name", list(CONTROLS))
def test_controls_are_finite_deterministic_and_per_sample(name: str, n_channels: int) -> None:
    control, pixels = CONTROLS[name], _pixels(n_channels)
    features = control(pixels)
    assert features.dtype == torch.float32
    assert features.shape[0] == 3
    assert features.isfinite().all()
    torch.testing.assert_close(control(pixels), features, rtol=0, atol=0)
    torch.testing.assert_close(control(pixels[1:2]), features[1:2])


def test_band_statistics_are_means_and_standard_deviations() -> None:
    pixels = _pixels(3)
    expected = torch.cat([pixels.mean((2, 3)), pixels.std((2, 3), correction=0)], 1)
    torch.testing.assert_close(band_statistics(pixels), expected)


def test_texture_statistics_see_order_of_pixels_and_products() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    features = texture_statistics(ramp)[0]
    assert features.shape == (9 + 45,)
    # mean, spread, quantiles 10, 50 and 90 %, then mean and spread of the steps across and down
    torch.testing.assert_close(features[:9], torch.tensor([3.5, 21**0.5 / 2, 0.0, 4.0, 7.0, 1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(features[9 + 1], features[0] * features[1])
    shuffled = ramp.flatten()[torch.randperm(64, generator=torch_generator(0))].view(1, 1, 8, 8)
    torch.testing.assert_close(texture_statistics(shuffled)[0, :2], features[:2])
    assert texture_statistics(shuffled)[0, 7] > 0.5


@pytest.mark.parametrize(("n_channels", "n_multiplied"), [(3, 27), (12, 24), (20, 20), (40, 0)])
def test_products_are_bounded_for_any_number_of_channels(n_channels: int, n_multiplied: int) -> None:
    features = texture_statistics(_pixels(n_channels))
    assert features.shape == (3, 9 * n_channels + n_multiplied * (n_multiplied + 1) // 2)
    if n_multiplied:
        last = features[:, n_multiplied - 1]
        torch.testing.assert_close(features[:, -1], last * last)


def test_random_convolution_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    features = random_convolution(_pixels(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert features.shape == (3, 256)
    assert features.std(0).max() > 0


@pytest.mark.parametrize("name", list(CONTROLS))
def test_controls_stand_where_an_encoder_does(name: str) -> None:
    inputs = EncoderInput(_pixels(3), load_sensor("rgb").channel_meta())
    (of_images,) = control_taps(CONTROLS[name], of_patches=False)(inputs).items()
    assert of_images[0] == "pixels"
    torch.testing.assert_close(of_images[1], CONTROLS[name](inputs.pixels))
    of_patches = control_taps(CONTROLS[name], of_patches=True)(inputs)["pixels"]
    assert of_patches.shape == (3, 2, 2, of_images[1].shape[1])  # cells of 8 x 10
    torch.testing.assert_close(of_patches[:, 0, 0], CONTROLS[name](inputs.pixels[:, :, :8, :10]))
    of_cells = control_taps(CONTROLS[name], of_patches=True, cell_px=4)(inputs)["pixels"]
    assert of_cells.shape[:3] == (3, 4, 5)
    torch.testing.assert_close(of_cells[:, 3, 1], CONTROLS[name](inputs.pixels[:, :, 12:, 4:8]))


def test_filters_are_drawn_by_the_seed_and_nothing_else_is() -> None:
    pixels = _pixels(3)
    for name, control in CONTROLS.items():
        found = [control_of(name, seed)(pixels) for seed in (0, 1, 1)]
        assert torch.equal(found[0], control(pixels))
        assert torch.equal(found[1], found[2])
        assert torch.equal(found[0], found[1]) == (name not in DRAWN_CONTROLS)
