"""Encoders take stored values: who gives reflectances instead is told, once for each sensor."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from ssl_eo.bundles import BundleEncoder, SensorInput
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.sensors import load_sensor


@pytest.fixture
def model() -> BundleEncoder:
    """Of Sentinel-2, which is stored in whole numbers, and of Sentinel-1, which is not."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=4, patch_embed="dynamic"), None)
    encoder.init_weights()
    optical, radar = load_sensor("sentinel2_l2a"), load_sensor("sentinel1_grd")
    inputs = {
        "sentinel2_l2a": SensorInput(optical, ("B02", "B03"), (900.0, 1000.0), (300.0, 400.0), 10.0),
        "sentinel1_grd": SensorInput(radar, ("VV", "VH"), (0.1, 0.02), (0.1, 0.02), 10.0),
    }
    return BundleEncoder(encoder, inputs, {}).eval()


def test_reflectances_are_told_once(model: BundleEncoder) -> None:
    images = torch.rand(2, 2, 8, 8) * 1.1
    with pytest.warns(UserWarning, match=r"^images of sentinel2_l2a are fractions up to 1\.\d+, .* stored as uint16"):
        model(images, sensor="sentinel2_l2a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images, sensor="sentinel2_l2a")


@pytest.mark.parametrize(
    "images",
    [
        torch.randint(0, 5000, (1, 2, 8, 8)),
        torch.rand(1, 2, 8, 8) * 5000,  # enlarged
        torch.randint(0, 2, (1, 2, 8, 8)).float(),  # a dark corner
        torch.full((1, 2, 8, 8), torch.nan),
        torch.rand(1, 2, 8, 8) - 0.5,
    ],
    ids=["stored", "resampled", "zeros and ones", "nothing measured", "below zero"],
)
def test_what_may_be_stored_values_is_taken_without_a_word(model: BundleEncoder, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images, sensor="sentinel2_l2a")


def test_a_sensor_that_is_stored_in_fractions_may_have_them(model: BundleEncoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.rand(1, 2, 8, 8), sensor="sentinel1_grd")
