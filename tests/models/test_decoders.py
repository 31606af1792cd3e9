"""Decoders answer for hidden patches; spectral heads answer for any channels."""

import math
from dataclasses import fields
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from ssl_eo.models.decoders import DecoderConfig, LinearOutput, MaskedDecoder, SpectralConfig, SpectralOutput
from ssl_eo.models.vit import Tokens
from ssl_eo.sensors import Band, ChannelMeta, Sensor

KINDS = pytest.mark.parametrize("kind", ["full", "cross"])
BANDS = (
    *(Band(f"b{i}", "optical", 30.0, wavelength_um=0.42 + 0.01 * i, fwhm_um=0.008) for i in range(202)),
    Band("vv", "sar", 10.0, wavelength_um=55_465.0, polarization="VV"),
    Band("vh", "sar", 10.0, wavelength_um=55_465.0, polarization="VH"),
    Band("height", "elevation", 30.0),
)


def channels(*names: str) -> ChannelMeta:
    return Sensor("test", "test", BANDS, "uint16", "dn", "test").channel_meta(names or None)


def build(kind: Literal["full", "cross"]) -> MaskedDecoder:
    torch.manual_seed(0)
    decoder = MaskedDecoder(DecoderConfig(kind=kind, embed_dim=16, depth=2, n_heads=2), encoder_dim=12).double()
    decoder.init_weights()
    return decoder


def visible(batch: int = 2, n_keep: int = 4) -> tuple[Tokens, Tensor, Tensor]:
    """Tokens of 4 of 12 patches with a CLS and a register, and the ids of visible and hidden ones."""
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(batch, 12, generator=generator).argsort(1)
    x = torch.randn(batch, 2 + n_keep, 12, generator=generator, dtype=torch.float64)
    return Tokens(x, 2, (3, 4)), order[:, :n_keep], order[:, n_keep:]


@KINDS
def test_answers_are_those_of_the_whole_grid(kind: Literal["full", "cross"]):
    decoder = build(kind)
    tokens, ids_keep, ids_masked = visible()
    everything = decoder(tokens, ids_keep, ids_masked, all_patches=True)
    assert everything.shape == (2, 12, 16)
    hidden = decoder(tokens, ids_keep, ids_masked)
    torch.testing.assert_close(hidden, everything.take_along_dim(ids_masked[..., None], 1), rtol=1e-10, atol=1e-10)


@KINDS
def test_order_of_tokens_does_not_matter(kind: Literal["full", "cross"]):
    decoder = build(kind)
    tokens, ids_keep, ids_masked = visible()
    patches = tokens.patches.flip(1)
    flipped = Tokens(torch.cat((tokens.x[:, :2], patches), 1), 2, tokens.grid)
    torch.testing.assert_close(
        decoder(flipped, ids_keep.flip(1), ids_masked.flip(1)),
        decoder(tokens, ids_keep, ids_masked).flip(1),
        rtol=1e-10,
        atol=1e-10,
    )


def test_cross_queries_do_not_see_each_other():
    decoder = build("cross")
    tokens, ids_keep, ids_masked = visible()
    some = decoder(tokens, ids_keep, ids_masked[:, [1, 4]])
    torch.testing.assert_close(some, decoder(tokens, ids_keep, ids_masked)[:, [1, 4]], rtol=1e-10, atol=1e-10)


@KINDS
def test_every_visible_token_and_parameter_counts(kind: Literal["full", "cross"]):
    decoder = build(kind)
    tokens, ids_keep, ids_masked = visible()
    tokens.x.requires_grad_()
    decoder(tokens, ids_keep, ids_masked).pow(3).sum().backward()
    assert (tokens.x.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in decoder.parameters())


def nan_then_init(module: nn.Module) -> None:
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(math.nan)
    module.init_weights()
    assert all(t.isfinite().all() for t in module.state_dict().values())


def test_init_weights_fills_everything_after_meta():
    with torch.device("meta"):
        modules = [
            MaskedDecoder(DecoderConfig(kind="full"), 48),
            MaskedDecoder(DecoderConfig(kind="cross"), 48),
            LinearOutput(16, 3, 16),
            SpectralOutput(16, 16, SpectralConfig()),
        ]
    for module in modules:
        nan_then_init(module)


def test_linear_output_shape():
    assert LinearOutput(16, 5, 16)(torch.randn(2, 7, 16), channels("b0")).shape == (2, 7, 80)


def spectral() -> SpectralOutput:
    torch.manual_seed(0)
    output = SpectralOutput(16, 16, SpectralConfig(rank=6, code_dim=8, hidden=10)).double()
    output.init_weights()
    return output


def test_spectral_output_mixes_basis_patches():
    output, meta = spectral(), channels("b3", "vv", "height")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    found = output(x, meta).view(2, 5, 16, 3)  # pixel of the patch, then channel
    basis = output.basis(x).view(2, 5, 16, 6)
    mixing = output.coefficients(meta)
    for c in range(3):
        expected = sum(mixing[c, r] * basis[..., r] for r in range(6))
        torch.testing.assert_close(found[..., c], expected)


def test_spectral_output_of_many_bands_and_of_bands_per_sample():
    output, meta = spectral(), channels()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    whole = output(x, meta)
    assert whole.shape == (2, 3, 16 * len(BANDS))
    rows = torch.tensor([[0, 50, 203], [202, 7, 204]])
    picked = ChannelMeta(
        *(getattr(meta, f.name)[rows] for f in fields(meta) if f.name != "valid"),
        valid=torch.ones(2, 3, dtype=torch.bool),
    )
    expected = whole.view(2, 3, 16, -1).take_along_dim(rows[:, None, None], -1).flatten(2)
    torch.testing.assert_close(output(x, picked), expected, rtol=1e-10, atol=1e-10)


def test_spectral_coefficients_tell_channels_apart_and_neighbours_are_close():
    mixing = spectral().coefficients(channels())
    distance = torch.cdist(mixing, mixing)
    assert distance.fill_diagonal_(1.0).min() > 1e-4
    assert distance.diagonal(1)[:201].mean() < 0.5 * distance[:202, :202].mean()


def test_every_spectral_parameter_gets_a_gradient():
    output = spectral()
    output(torch.randn(2, 3, 16, dtype=torch.float64), channels("b0")).pow(2).sum().backward()
    assert all(p.grad is not None for p in output.parameters())


@pytest.mark.parametrize(
    ("build_config", "message"),
    [
        (lambda: DecoderConfig(embed_dim=30, n_heads=3), "multiple of 4 and of n_heads, got 30 and 3"),
        (lambda: DecoderConfig(embed_dim=32, n_heads=5), "got 32 and 5"),
        (lambda: DecoderConfig(depth=0), "depth, mlp_ratio and norm_eps must be positive"),
        (lambda: SpectralConfig(code_dim=7), "code_dim even"),
    ],
)
def test_config_errors(build_config, message: str):
    with pytest.raises(ValueError, match=message):
        build_config()
