"""Series of dates in the encoder: order of patches, tubelets, positions in three dimensions, when and where."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_eo.models.space_time import CoordinateEncoding, below_each_other, one_by_one, sincos_3d
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.sensors import ChannelMeta, load_sensor

CPU = torch.device("cpu")
RGB = load_sensor("rgb").channel_meta()
POSITIONS_OF_A_GRID = ("sincos", "sincos_metres", "sincos_resized", "learned", "rope", "alibi")


def encoder_of(**changes: Any) -> Encoder:
    """A small one, whose every parameter is set at random."""
    settings: dict[str, Any] = {"embed_dim": 64, "depth": 2, "n_heads": 4, "patch_size": 4, "image_size": 16}
    encoder = Encoder(EncoderConfig(**settings | {"patch_embed": "conv"} | changes), 3)
    encoder.init_weights()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder.eval()


def series(n_dates: int = 3, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randn(2, 3, n_dates, *size, generator=torch.Generator().manual_seed(0))


@given(n_steps=st.integers(1, 4), tubelet=st.integers(1, 3), c=st.integers(1, 3), h=st.integers(1, 3))
def test_there_and_back(n_steps: int, tubelet: int, c: int, h: int) -> None:
    x = torch.arange(2 * c * n_steps * tubelet * h * 2.0).view(2, c, n_steps * tubelet, h, 2)
    tall = below_each_other(x, tubelet)
    assert tall.shape == (2, c * tubelet, n_steps * h, 2)
    assert torch.equal(one_by_one(tall, n_steps * tubelet, tubelet), x)
    for date in range(n_steps * tubelet):
        step, part = divmod(date, tubelet)
        assert torch.equal(tall[:, part::tubelet, step * h : (step + 1) * h], x[:, :, date])


def test_tubelets_divide_the_dates() -> None:
    with pytest.raises(ValueError, match=r"3 dates .* tubelets of 2"):
        below_each_other(series(3), 2)


def test_positions_against_a_loop() -> None:
    """In float64: column, row and date, each with its own part of the width."""
    dim, (n_dates, side) = 32, (3, 4)
    table = sincos_3d(n_dates, (side, side), dim, side, CPU)
    assert table.shape == (n_dates * side * side, dim)
    for t in range(n_dates):
        for y in range(side):
            for x in range(side):
                expected: list[float] = []
                for place, width in ((x, 12), (y, 12), (t, 8)):
                    angles = [place / 10_000 ** (k / (width // 2)) for k in range(width // 2)]
                    expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                row = table[(t * side + y) * side + x].tolist()
                assert row == pytest.approx(expected, abs=1e-6)


def test_positions_of_other_sizes_keep_the_corners() -> None:
    native, larger = (sincos_3d(2, (n, n), 64, 4, CPU).view(2, n, n, 64) for n in (4, 7))
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(larger[:, corner[0], corner[1]], native[:, corner[0], corner[1]])
    assert sincos_3d(1, (2, 5), 64, 4, CPU).shape == (10, 64)
    with pytest.raises(ValueError, match="divisible by 16"):
        sincos_3d(1, (2, 2), 40, 4, CPU)


def test_patches_are_those_of_each_date_in_order() -> None:
    encoder, x = encoder_of(), series()
    (tokens,) = encoder([EncoderInput(x, RGB, 10.0)])
    assert (tokens.n_steps, tokens.grid, tokens.patches.shape) == (3, (4, 4), (2, 48, 64))
    embedded = torch.cat([encoder.patch_embed(x[:, :, t], RGB)[0] for t in range(3)], dim=1)
    assert torch.equal(encoder.patch_embed(below_each_other(x), RGB)[0], embedded)


@pytest.mark.parametrize("embed", ["conv", "channel_attention", "dynamic"])
def test_any_embedding_takes_series(embed: str) -> None:
    encoder = encoder_of(patch_embed=embed, position="sincos_3d")
    (whole,) = encoder([EncoderInput(series(), RGB)])
    (one,) = encoder([EncoderInput(series()[:, :, :1], RGB)])
    (image,) = encoder([EncoderInput(series()[:, :, 0], RGB)])
    assert whole.patches.shape == (2, 48, 64)
    assert torch.equal(one.x, image.x)


@pytest.mark.parametrize("position", POSITIONS_OF_A_GRID)
def test_positions_of_a_grid_are_the_same_at_all_dates(position: str) -> None:
    """Of equal images of two dates nothing tells one from the other, also where some patches are hidden."""
    encoder = encoder_of(position=position)
    x = series(1).expand(-1, -1, 2, -1, -1)
    (tokens,) = encoder([EncoderInput(x, RGB, 10.0)])
    first, second = tokens.patches.chunk(2, dim=1)
    torch.testing.assert_close(first, second)
    assert (first[:, 0] - first[:, 5]).abs().max() > 1e-3
    ids = torch.tensor([[0, 3, 9, 16, 19, 25], [1, 2, 4, 17, 18, 20]])  # the same places of both dates
    (tokens,) = encoder([EncoderInput(x, RGB, 10.0, ids_keep=ids)])
    first, second = tokens.patches.chunk(2, dim=1)
    torch.testing.assert_close(first, second)


def test_positions_in_time_tell_dates_apart() -> None:
    encoder = encoder_of(position="sincos_3d")
    (tokens,) = encoder([EncoderInput(series(1).expand(-1, -1, 2, -1, -1), RGB)])
    first, second = tokens.patches.chunk(2, dim=1)
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("position", [*POSITIONS_OF_A_GRID, "sincos_3d"])
def test_hidden_patches_change_nothing_and_order_does_not_matter(position: str) -> None:
    told = {"dates": torch.tensor([[[2020.0, 1.0], [2020.0, 90.0], [2021.0, 180.0]]]).expand(2, -1, -1)}
    told["location"] = torch.tensor([[50.0, 8.0], [-20.0, 30.0]])
    encoder = encoder_of(position=position, time_encoding=True, location_encoding=True)
    x, ids = series(), torch.tensor([[0, 17, 20, 47], [5, 6, 30, 40]])
    (tokens,) = encoder([EncoderInput(x, RGB, 10.0, ids_keep=ids, **told)])
    shown = torch.zeros(2, 48, dtype=torch.bool).scatter(1, ids, True).view(2, 1, 3, 4, 4)
    spoilt = torch.where(shown.repeat_interleave(4, 3).repeat_interleave(4, 4), x, 1e3)
    (again,) = encoder([EncoderInput(spoilt, RGB, 10.0, ids_keep=ids, **told)])
    assert torch.equal(tokens.x, again.x)
    (turned,) = encoder([EncoderInput(x, RGB, 10.0, ids_keep=ids.flip(1), **told)])
    torch.testing.assert_close(turned.patches.flip(1), tokens.patches)
    (whole,) = encoder([EncoderInput(x, RGB, 10.0, **told)])
    every = torch.arange(48).expand(2, -1)
    torch.testing.assert_close(encoder([EncoderInput(x, RGB, 10.0, ids_keep=every, **told)])[0].x, whole.x)


def test_one_call_with_images_equals_calls_of_their_own() -> None:
    encoder = encoder_of(position="sincos_3d")
    items = [EncoderInput(series(), RGB), EncoderInput(series()[:, :, 0, :8], RGB)]
    together, apart = encoder(items), [encoder([item])[0] for item in items]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a.x, b.x)
        assert (a.grid, a.n_steps) == (b.grid, b.n_steps)


def test_tubelets_are_a_convolution_in_three_dimensions() -> None:
    encoder = encoder_of(tubelet=2, position="sincos_3d")
    x = series(4)
    found = encoder.patch_embed(below_each_other(x, 2), RGB)[0]  # [B, N, D]
    proj = encoder.patch_embed.proj
    assert isinstance(proj, torch.nn.Conv2d)
    kernel = proj.weight.unflatten(1, (3, 2))  # [D, C, s, p, p]
    expected = F.conv3d(x, kernel, proj.bias, stride=(2, 4, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    (tokens,) = encoder([EncoderInput(x, RGB)])
    assert (tokens.n_steps, tokens.patches.shape) == (2, (2, 32, 64))
    with pytest.raises(ValueError, match=r"pixels \[B, C, T, H, W\]"):
        encoder([EncoderInput(x[:, :, 0], RGB)])


def test_coordinates_against_a_loop_and_unknown_ones_add_nothing() -> None:
    encoding = CoordinateEncoding(16)
    encoding.init_weights()
    pairs = torch.tensor([[2019.0, 32.0], [math.nan, 5.0], [48.1, -11.6], [7.0, math.inf]], requires_grad=False)
    code = encoding(pairs)
    for row, pair in ((0, (2019.0, 32.0)), (2, (48.1, -11.6))):
        expected: list[float] = []
        for value in pair:
            angles = [value / 10_000 ** (k / 4) for k in range(4)]
            expected += [0.1 * math.sin(a) for a in angles] + [0.1 * math.cos(a) for a in angles]
        assert code[row].tolist() == pytest.approx(expected, abs=2e-5)  # of 2019 radians, float32 knows 1e-4
    assert not code[1].any()
    assert not code[3].any()
    code.sum().backward()
    assert encoding.scale.grad is not None
    assert encoding.scale.grad.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(year=st.integers(1984, 2100), day=st.integers(1, 366))
def test_no_precision_confounds_days(year: int, day: int) -> None:
    encoding = CoordinateEncoding(64)
    encoding.init_weights()
    pairs = torch.tensor([[float(year), float(day)], [year + 1.0, float(day)], [float(year), day + 1.0]])
    whole = encoding(pairs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoding(pairs), whole)
    assert (whole[0] - whole[1]).abs().max() > 1e-3
    assert (whole[0] - whole[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tubelet": 0}, "tubelet must be"),
        ({"tubelet": 2, "patch_embed": "dynamic"}, "tubelet must be"),
        ({"tubelet": 2, "time_encoding": True}, "tubelet must be"),
        ({"position": "sincos_3d", "embed_dim": 24}, "divisible by 16"),
        ({"location_encoding": True, "embed_dim": 6, "n_heads": 1, "position": "learned"}, "divisible by 4"),
        ({"position": "sincos_3d", "image_size": 15}, "multiple of patch_size"),
    ],
)
def test_wrong_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder_of(**changes)


def test_channels_of_samples_that_differ() -> None:
    """A series whose samples show other bands: the channels are those of the samples, at all dates."""
    encoder = encoder_of(patch_embed="channel_attention", position="sincos_3d")
    valid = torch.tensor([[True, True, True], [True, False, True]])
    expanded = RGB.expand(2)
    channels = ChannelMeta(
        *(getattr(expanded, name) for name in ("wavelength_um", "fwhm_um", "kind", "polarization", "orbit", "gsd_m")),
        valid=valid,
    )
    x = series()
    (tokens,) = encoder([EncoderInput(x, channels)])
    spoilt = x.clone()
    spoilt[1, 1] = 7.0
    assert torch.equal(encoder([EncoderInput(spoilt, channels)])[0].x, tokens.x)


@pytest.mark.parametrize("size", [(2, 6, 16), (4, 2, 16), (2, 16, 6), (0, 16, 16)])
def test_patches_never_straddle_two_dates(size: tuple[int, int, int]) -> None:
    """Also where the pixels of all dates together could be cut, and where only some patches are looked at."""
    encoder = encoder_of(position="sincos_3d")
    for ids in (None, torch.tensor([[0, 1]])):
        with pytest.raises(ValueError, match=rf"{size[0]} dates of {size[1]} x {size[2]} pixels cannot be cut"):
            encoder([EncoderInput(torch.zeros(1, 3, *size), RGB, ids_keep=ids)])


@pytest.mark.parametrize("n_told", [1, 2, 5])
def test_dates_are_those_of_the_pixels(n_told: int) -> None:
    encoder = encoder_of(position="sincos_3d", time_encoding=True)
    for ids in (None, torch.tensor([[0, 17], [3, 40]])):
        with pytest.raises(ValueError, match=f"dates of {n_told} images are given for 3 images"):
            encoder([EncoderInput(series(), RGB, ids_keep=ids, dates=torch.ones(2, n_told, 2))])
