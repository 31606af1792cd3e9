"""Panopticon's dictionary in, and out what its code gives: its numbers, names and shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from released_formula import PANOPTICON, Case, summary
from test_released_parity import TOLERANCE, filled_encoder, golden
from torch import Tensor

from ssl_eo.bundles import BundleEncoder
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.sensors import ChannelMeta, load_sensor
from ssl_eo.weights.base import find_released

NAMES = ("sentinel2", "sar with optical", "each sar id", "thermal", "padded", "not square")
CASES = [case for case in PANOPTICON if case.name in NAMES]
IDS = torch.tensor([[664, 559, 493]] * 2)


def dictionary(case: Case) -> dict[str, Tensor]:
    valid = case.valid()
    found = {"imgs": case.pixels(), "chn_ids": torch.tensor(case.ids)}
    return found if valid is None else {**found, "spec_masks": ~valid}


@pytest.fixture(scope="module")
def tiny() -> BundleEncoder:
    torch.manual_seed(0)
    config = replace(find_released("panopticon_vitb14").config, embed_dim=16, depth=3, n_heads=2, image_size=56)
    encoder = Encoder(config)
    encoder.init_weights()
    with torch.no_grad():
        for name in ("transmit", "receive", "orbit"):  # zeros at first: no SAR channel would be another
            encoder.patch_embed.get_parameter(f"chnfus.chnemb.embed_{name}").normal_()
    return BundleEncoder(encoder, {}, {}).eval()


def images(n_channels: int = 3) -> Tensor:
    return torch.randn(2, n_channels, 28, 42, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_numbers_of_the_published_code(case: Case) -> None:
    model = BundleEncoder(filled_encoder(case.model, None)[0], {}, {})
    features = model.forward_features(dictionary(case))
    found: dict[str, Any] = {"cls": features["x_norm_clstoken"], "patches": features["x_norm_patchtokens"]}
    layers = model.get_intermediate_layers(dictionary(case), n=case.layers, return_class_token=True)
    for layer, (patches, cls) in zip(case.layers, layers, strict=True):
        found |= {f"block {layer} cls": cls, f"block {layer} patches": patches}
    expected = golden("panopticon")[case.name]["outputs"]
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        ours = summary(found[name])
        assert ours["values"] == pytest.approx(numbers["values"], abs=TOLERANCE, rel=0), name
    assert torch.equal(model(dictionary(case)), features["x_norm_clstoken"])


@torch.no_grad()
def test_outputs_have_the_published_names_and_shapes(tiny: BundleEncoder) -> None:
    given = {"imgs": images(), "chn_ids": IDS}
    features = tiny.forward_features(given)
    assert list(features) == ["x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm", "masks"]
    shapes = [None if value is None else list(value.shape) for value in features.values()]
    assert shapes == [[2, 16], [2, 0, 16], [2, 6, 16], [2, 7, 16], None]
    assert torch.equal(tiny.encoder.norm(features["x_prenorm"])[:, 1:], features["x_norm_patchtokens"])
    patches = tiny.get_intermediate_layers(given, 2)
    assert [list(layer.shape) for layer in patches] == [[2, 6, 16]] * 2
    assert torch.equal(patches[1], features["x_norm_patchtokens"])
    (raw,) = tiny.get_intermediate_layers(given, n=[2], norm=False)
    assert torch.equal(raw, features["x_prenorm"][:, 1:])
    # By position, as in published code: n, reshape, return_class_token.
    for layer, (as_map, cls) in zip(patches, tiny.get_intermediate_layers(given, 2, True, True), strict=True):
        assert torch.equal(as_map, torch.stack([layer[:, :3], layer[:, 3:]], 1).permute(0, 3, 1, 2))  # rows stay rows
        assert cls.shape == (2, 16)


@torch.no_grad()
def test_the_dictionary_stays_as_it_was_and_numbers_are_rounded_down(tiny: BundleEncoder) -> None:
    ids = IDS + torch.tensor([0.9, 0.0, 0.5])
    given = {"imgs": images(), "chn_ids": ids.clone(), "spec_masks": torch.zeros(2, 3, dtype=torch.bool)}
    expected = tiny({"imgs": images(), "chn_ids": IDS})
    torch.testing.assert_close(tiny(given), expected, atol=1e-6, rtol=0)
    assert torch.equal(given["chn_ids"], ids)
    assert not torch.equal(expected, tiny({"imgs": images(), "chn_ids": IDS + 1}))


@torch.no_grad()
def test_padding_makes_no_difference(tiny: BundleEncoder) -> None:
    ids, padded = torch.tensor([[664, 559, 493, -99]] * 2), torch.tensor([[False, False, False, True]] * 2)
    found = tiny({"imgs": images(4), "chn_ids": ids, "spec_masks": padded})
    torch.testing.assert_close(found, tiny({"imgs": images(4)[:, :3], "chn_ids": IDS}), atol=1e-5, rtol=0)


@pytest.mark.parametrize("nanometres", [442, 12_005, 16_777, 31_999, 32_767])
def test_whole_nanometres_stay_whole(tiny: BundleEncoder, nanometres: int) -> None:
    """Also where float32 micrometres would be rounded to the next one."""
    channels = tiny.prepare({"imgs": images(1), "chn_ids": torch.full((2, 1), nanometres)}).channels
    code = tiny.encoder.patch_embed.get_submodule("chnfus.chnemb")
    exact = replace(channels, wavelength_um=torch.full((2, 1), (nanometres + 0.5) / 1000, dtype=torch.float64))
    assert torch.equal(code(channels), code(exact))


@torch.no_grad()
def test_a_sensor_or_wavelengths_say_the_same(tiny: BundleEncoder) -> None:
    bands = ["B04", "B03", "B02"]
    expected = tiny({"imgs": images(), "chn_ids": IDS - torch.tensor([0, 0, 1])})  # 664.6, 559.6 and 493.0 nanometres
    named = tiny(images(), sensor="sentinel2_l2a", bands=bands)
    assert torch.equal(named, tiny(images(), channels=load_sensor("sentinel2_l2a").channel_meta(bands)))
    assert torch.equal(named, tiny(images(), sensor="sentinel2_l2a", bands="rgb"))
    torch.testing.assert_close(named, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(tiny(images(), wavelengths_um=[0.664, 0.559, 0.492]), expected, atol=1e-6, rtol=0)
    sar = tiny(images(2), sensor="sentinel1_grd_ascending", bands=["VV", "VH"])
    torch.testing.assert_close(sar, tiny({"imgs": images(2), "chn_ids": torch.tensor([[-5, -6]] * 2)}))
    thermal = tiny(images(1), wavelengths_um=[10.895])
    torch.testing.assert_close(thermal, tiny({"imgs": images(1), "chn_ids": torch.tensor([[10_895]] * 2)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chn_id": IDS}, "holds imgs and chn_ids, and may hold spec_masks, got imgs, chn_ids, chn_id"),
        ({"imgs": images()[0]}, r"imgs must be a tensor \[B, C, H, W\], got torch.float32 \[3, 28, 42\]"),
        ({"chn_ids": IDS[0]}, r"chn_ids must be numbers \[B, C\] = \[2, 3\], got torch.int64 \[3\]"),
        ({"chn_ids": IDS[..., None].expand(-1, -1, 2)}, r"chn_ids must be numbers .* got torch.int64 \[2, 3, 2\]"),
        ({"chn_ids": IDS.tolist()}, "chn_ids must be numbers .* got a list"),
        (
            {"chn_ids": -IDS},
            "chn_ids: -664 names no channel: whole nanometres of a band's centre, or -1 to -12 for SAR",
        ),
        ({"chn_ids": torch.full((2, 3), -1.5)}, "-1.5 names no channel"),
        ({"chn_ids": torch.full((2, 3), torch.nan)}, "nan names no channel"),
        ({"spec_masks": torch.zeros(2, 3)}, r"spec_masks must be truths \[B, C\] = \[2, 3\]"),
    ],
)
def test_what_is_no_such_dictionary_is_refused(tiny: BundleEncoder, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny({"imgs": images(), "chn_ids": IDS, **change})
    assert "\n" not in str(caught.value)


META = ChannelMeta(*(torch.ones(3) for _ in range(6)))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sensor": "rgb", "channels": META}, "got sensor and channels: give sensor with or without bands"),
        ({"bands": ["R"], "wavelengths_um": [0.6]}, "got bands and wavelengths_um: give sensor"),
        ({"bands": ["R", "G", "B"]}, "statistics for no sensor: give normalised images with channels=, sensor= or"),
        ({"sensor": "rgb", "bands": ["R", "G"]}, "images have 3 channels, bands= describes 2"),
        ({"sensor": "sentinel2_l2a"}, "images have 3 channels, sensor= describes 12"),
        ({"wavelengths_um": [0.6]}, "images have 3 channels, wavelengths_um= describes 1"),
        ({"sensor": "sentinel2"}, "datasets_meta/sensors has no 'sentinel2'; did you mean"),
        ({"sensor": "rgb", "bands": ["R", "G", "IR"]}, "sensor rgb has no band 'IR'"),
        ({"wavelengths_um": [664, 559, 493]}, "0.2 to 20, got 664: write 0.664, if 664 is nanometres"),
        ({"wavelengths_um": [0.6, 0.5, 55_466]}, "wavelengths_um are micrometres, 0.2 to 20, got 55466$"),
    ],
)
def test_what_says_nothing_or_two_things_is_refused(tiny: BundleEncoder, said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(images(), **said)


def test_a_dictionary_says_it_all(tiny: BundleEncoder) -> None:
    with pytest.raises(ValueError, match="says all that there is to say: leave the rest out"):
        tiny({"imgs": images(), "chn_ids": IDS}, sensor="rgb")


def test_tensors_give_tokens(tiny: BundleEncoder) -> None:
    for asked in ({"reshape": True}, {"return_class_token": True}):
        with pytest.raises(ValueError, match=r"for a dictionary of imgs and chn_ids; Tokens of a tensor have \.cls"):
            tiny.get_intermediate_layers(images(), wavelengths_um=[0.6, 0.5, 0.4], **asked)


def test_encoders_that_know_channels_otherwise_take_no_dictionary() -> None:
    conv = BundleEncoder(Encoder(EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_embed="conv"), 3), {}, {})
    with pytest.raises(ValueError, match=r"\(patch_embed: conv\) was not trained with: give a tensor"):
        conv({"imgs": images(), "chn_ids": IDS})
    for said in ({"wavelengths_um": [0.6, 0.5, 0.4]}, {"sensor": "rgb"}):
        with pytest.raises(ValueError, match="was built for one set of bands"):
            conv(images(), **said)
