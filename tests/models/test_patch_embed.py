"""Patch embeddings against direct, slow forms written from the papers."""

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from direct_channel_attention import DirectChannelAttention, direct_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_eo.models.patch_embed import (
    ChannelAttentionConfig,
    ChannelAttentionPatchEmbed,
    ConvConfig,
    ConvPatchEmbed,
    DynamicConfig,
    DynamicPatchEmbed,
    PatchEmbed,
    cut_patches,
)
from ssl_eo.sensors import KINDS, ORBITS, POLARIZATIONS, Band, ChannelMeta, Sensor

DIM, PATCH = 24, 4
SMALL = ChannelAttentionConfig(attn_dim=48, n_heads=4)
BANDS = (
    Band("blue", "optical", 10.0, wavelength_um=0.443),
    Band("red", "optical", 10.0, wavelength_um=0.6646),
    Band("thermal", "thermal", 30.0, wavelength_um=10.847),
    Band("vv", "sar", 10.0, wavelength_um=55_465.0, polarization="VV", orbit="ascending"),
    Band("hv", "sar", 10.0, wavelength_um=55_465.0, polarization="HV", orbit="descending"),
    Band("vh", "sar", 10.0, wavelength_um=55_465.0, polarization="VH"),
    Band("height", "elevation", 30.0),
    Band("cover", "categorical", 10.0, n_classes=4),
)
PLAIN = ("blue", "red", "thermal", "vv", "hv", "vh")


def channels(*names: str) -> ChannelMeta:
    return Sensor("test", "test", BANDS, "uint16", "dn", "test").channel_meta(names)


def stack(*metas: ChannelMeta, valid: Tensor | None = None) -> ChannelMeta:
    columns = [torch.stack([getattr(m, f.name) for m in metas]) for f in fields(ChannelMeta) if f.name != "valid"]
    return ChannelMeta(*columns, valid=valid)


def random_weights(embed: PatchEmbed) -> PatchEmbed:
    """Every parameter random and of a size that matters, so that a term left out would show."""
    embed.init_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in embed.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return embed


def pixels(batch: int, n_channels: int, size: tuple[int, int] = (12, 8)) -> Tensor:
    return torch.randn(batch, n_channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def direct_code(embed: ChannelAttentionPatchEmbed, meta: ChannelMeta, c: int) -> Tensor:
    """The embedding of channel `c`, one case at a time."""
    table = embed.chnfus.chnemb
    kind = KINDS[meta.kind[c]]
    if kind == "elevation":
        return table.embed_elevation[0]
    if kind == "sar":
        pair = POLARIZATIONS[meta.polarization[c]]
        orbit = table.embed_orbit.mean(0) if meta.orbit[c] < 0 else table.embed_orbit[meta.orbit[c]]
        return torch.cat((table.embed_transmit["VH".index(pair[0])], table.embed_receive["VH".index(pair[1])], orbit))
    nanometres = torch.tensor(math.floor(round(float(meta.wavelength_um[c]) * 1000, 2)), dtype=torch.float32)
    half = table.dim // 2
    omega = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float32) / half)
    return torch.cat((torch.sin(nanometres * omega), torch.cos(nanometres * omega))).double()


def direct_codes(embed: ChannelAttentionPatchEmbed, meta: ChannelMeta) -> Tensor:
    """Of the channels of each sample, `[B, C, F]`."""
    columns = [getattr(meta, f.name) for f in fields(meta) if f.name != "valid"]
    rows = [ChannelMeta(*of_sample) for of_sample in zip(*columns, strict=True)]
    return torch.stack([torch.stack([direct_code(embed, row, c) for c in range(meta.n_channels)]) for row in rows])


@pytest.mark.parametrize("elevation", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_channel_attention_equals_direct_form(elevation: bool, hidden: bool, masked: bool):
    cfg = ChannelAttentionConfig(attn_dim=48, n_heads=4, elevation=elevation)
    embed = random_weights(ChannelAttentionPatchEmbed(DIM, PATCH, cfg)).double()
    names = (*PLAIN, "height") if elevation else PLAIN
    valid = torch.ones(3, len(names), dtype=torch.bool)
    if masked:
        valid[0, 2:], valid[1, 0] = False, False
    meta = stack(*(channels(*names[i:], *names[:i]) for i in range(3)), valid=valid if masked else None)
    x = pixels(3, len(names))
    ids = torch.tensor([[0, 5], [3, 1], [2, 4]]) if hidden else None

    tokens, grid = embed(x, meta, ids)
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad((tokens * weight).sum(), list(embed.parameters()))
    expected = direct_tokens(embed, x, direct_codes(embed, meta), meta.valid)
    if ids is not None:
        expected = expected.take_along_dim(ids[..., None], 1)
    wanted = torch.autograd.grad((expected * weight).sum(), list(embed.parameters()))

    assert grid == (3, 2)
    torch.testing.assert_close(tokens, expected, rtol=1e-12, atol=1e-12)
    for (name, _), ours, theirs in zip(embed.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert theirs.abs().max() > 1e-6, f"{name} has no influence in this test"


@pytest.mark.parametrize("hidden", [False, True])
def test_direct_form_takes_its_place(hidden: bool):
    embed = random_weights(ChannelAttentionPatchEmbed(DIM, PATCH, SMALL)).double()
    direct = DirectChannelAttention(DIM, PATCH, SMALL).double()
    direct.load_state_dict(embed.state_dict())
    x, meta = pixels(2, len(PLAIN)), channels(*PLAIN)
    ids = torch.tensor([[0, 5], [3, 1]]) if hidden else None
    (found, found_grid), (expected, grid) = direct(x, meta, ids, direct.products()), embed(x, meta, ids)
    assert found_grid == grid
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_channel_attention_shared_channels_equal_one_row_per_sample():
    embed = random_weights(ChannelAttentionPatchEmbed(DIM, PATCH, SMALL)).double()
    x, meta = pixels(2, len(PLAIN)), channels(*PLAIN)
    torch.testing.assert_close(embed(x, meta)[0], embed(x, stack(meta, meta))[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("embed", [ChannelAttentionPatchEmbed(DIM, PATCH, SMALL), DynamicPatchEmbed(DIM, PATCH)])
def test_order_of_bands_does_not_matter(embed: PatchEmbed):
    random_weights(embed).double()
    x, order = pixels(2, len(PLAIN)), [3, 0, 5, 1, 4, 2]
    shuffled = embed(x[:, order], channels(*(PLAIN[i] for i in order)))[0]
    torch.testing.assert_close(shuffled, embed(x, channels(*PLAIN))[0], rtol=1e-10, atol=1e-10)


def test_padded_channels_have_no_influence():
    embed = random_weights(ChannelAttentionPatchEmbed(DIM, PATCH, SMALL)).double()
    x, meta = pixels(1, 3), channels("blue", "red", "cover")
    valid = torch.tensor([[True, True, False]])
    padded = embed(x, stack(meta, valid=valid))[0]
    torch.testing.assert_close(padded, embed(x[:, :2], channels("blue", "red"))[0], rtol=1e-12, atol=1e-12)


@given(st.integers(200, 20_000))
@settings(max_examples=50, deadline=None)
def test_whole_nanometres_survive_float32_micrometres(nanometres: int):
    embed = ChannelAttentionPatchEmbed(DIM, PATCH, SMALL)
    embed.init_weights()
    meta = channels("blue")

    def code(micrometres: float) -> Tensor:
        return embed.chnfus.chnemb(
            ChannelMeta(torch.tensor([micrometres]), *(getattr(meta, f.name) for f in fields(meta)[1:]))
        )

    phase = torch.tensor(float(nanometres))
    assert code(nanometres / 1000)[0, 0] == torch.sin(phase)
    assert torch.equal(code((nanometres + 0.9) / 1000), code(nanometres / 1000)), "fractions are cut off"


@pytest.mark.parametrize("nanometres", [32_767, 32_768, 65_536, 100_000])
def test_long_wavelengths_are_not_cut_to_16_bits(nanometres: int):
    embed = ChannelAttentionPatchEmbed(DIM, PATCH, SMALL)
    embed.init_weights()
    meta = replace(channels("blue"), wavelength_um=torch.tensor([(nanometres + 0.5) / 1000]))
    assert embed.chnfus.chnemb(meta)[0, 0] == torch.sin(torch.tensor(float(nanometres)))


def test_every_sar_channel_has_its_own_code():
    embed = random_weights(ChannelAttentionPatchEmbed(DIM, PATCH, SMALL))
    n_orbits = len(ORBITS) + 1
    n = len(POLARIZATIONS) * n_orbits
    zeros = torch.zeros(n)
    meta = ChannelMeta(
        wavelength_um=zeros,
        fwhm_um=zeros,
        kind=torch.full((n,), KINDS.index("sar")),
        polarization=torch.arange(n) // n_orbits,
        orbit=torch.arange(n) % n_orbits - 1,
        gsd_m=zeros,
    )
    dynamic = random_weights(DynamicPatchEmbed(DIM, PATCH))
    for code in (embed.chnfus.chnemb(meta), dynamic._code(meta)):
        assert torch.cdist(code, code).fill_diagonal_(1.0).min() > 1e-3


def direct_kernel(embed: DynamicPatchEmbed, code: Tensor) -> tuple[Tensor, Tensor]:
    """DOFA's generator, step by step, with attention written out."""
    generator, mlp = embed.weight_generator, embed.fclayer
    layer = generator.transformer_encoder.layers[0]
    u = code + torch.relu(mlp.w2(torch.relu(mlp.w1(code))))
    z = torch.cat((generator.weight_tokens, u, generator.bias_token))
    q, k, v = F.linear(z, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(3, -1)
    heads = []
    for head in range(layer.self_attn.num_heads):
        d = z.shape[1] // layer.self_attn.num_heads
        part = slice(head * d, (head + 1) * d)
        heads.append((q[:, part] @ k[:, part].T / math.sqrt(d)).softmax(-1) @ v[:, part])
    z = layer.norm1(z + layer.self_attn.out_proj(torch.cat(heads, -1)))
    z = layer.norm2(z + layer.linear2(F.gelu(layer.linear1(z))))
    n = len(generator.weight_tokens)
    return 0.01 * generator.fc_weight(z[n:-1] + u), 0.01 * generator.fc_bias(z[-1])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("layout", ["channel_major", "legacy"])
@pytest.mark.parametrize(("sar", "placeholder"), [("dofa_v1", 3.75), ("dofa_v2", 5.405)])
def test_dynamic_equals_direct_form(padding: int, layout: str, sar: str, placeholder: float):
    embed = random_weights(DynamicPatchEmbed(DIM, PATCH, DynamicConfig(layout=layout, padding=padding, sar=sar)))
    embed.double()
    meta = channels("blue", "red", "thermal", "vv")
    wavelength = torch.tensor([0.443, 0.6646, 10.847, placeholder]) * 1000
    omega = 1.0 / 10000 ** (torch.arange(64, dtype=torch.float32) / 64)
    phase = wavelength[:, None] * omega
    values, bias = direct_kernel(embed, torch.cat((phase.sin(), phase.cos()), -1).double())
    if layout == "legacy":
        kernel = values.view(DIM, 4, PATCH, PATCH)
    else:
        kernel = values.view(4, PATCH, PATCH, DIM).permute(3, 0, 1, 2)
    x = pixels(2, 4)
    expected = F.conv2d(x, kernel, bias, stride=PATCH, padding=padding).flatten(2).mT

    tokens, grid = embed(x, meta)
    assert grid == (3, 2)
    torch.testing.assert_close(tokens, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(embed.bake(meta)(x, meta)[0], expected, rtol=1e-10, atol=1e-12)
    ids = torch.tensor([[4, 1], [0, 5]])
    torch.testing.assert_close(embed(x, meta, ids)[0], expected.take_along_dim(ids[..., None], 1))


def test_released_dofa_names_and_shapes():
    with torch.device("meta"):
        embed = DynamicPatchEmbed(768, 16, DynamicConfig(padding=1, sar="dofa_v1"))
    found = {name: tuple(p.shape) for name, p in embed.state_dict().items()}
    layer = "weight_generator.transformer_encoder.layers.0"
    assert found == {
        "fclayer.w1.weight": (128, 128),
        "fclayer.w1.bias": (128,),
        "fclayer.w2.weight": (128, 128),
        "fclayer.w2.bias": (128,),
        "weight_generator.weight_tokens": (128, 128),
        "weight_generator.bias_token": (1, 128),
        "weight_generator.fc_weight.weight": (256 * 768, 128),
        "weight_generator.fc_weight.bias": (256 * 768,),
        "weight_generator.fc_bias.weight": (768, 128),
        "weight_generator.fc_bias.bias": (768,),
        f"{layer}.self_attn.in_proj_weight": (384, 128),
        f"{layer}.self_attn.in_proj_bias": (384,),
        f"{layer}.self_attn.out_proj.weight": (128, 128),
        f"{layer}.self_attn.out_proj.bias": (128,),
        f"{layer}.linear1.weight": (2048, 128),
        f"{layer}.linear1.bias": (2048,),
        f"{layer}.linear2.weight": (128, 2048),
        f"{layer}.linear2.bias": (128,),
        f"{layer}.norm1.weight": (128,),
        f"{layer}.norm1.bias": (128,),
        f"{layer}.norm2.weight": (128,),
        f"{layer}.norm2.bias": (128,),
    }


@pytest.mark.parametrize("padding", [0, 1])
@given(h=st.integers(1, 4), w=st.integers(1, 4), patch=st.integers(3, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_cut_patches_is_what_a_convolution_sees(padding: int, h: int, w: int, patch: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, h * patch, w * patch, generator=generator)
    ids = torch.rand(2, h * w, generator=generator).argsort(1)[:, : max(1, h * w // 2)]
    expected = F.unfold(x, patch, stride=patch, padding=padding).mT.unflatten(2, (3, -1))  # [B, N, C, E]
    found, grid = cut_patches(x, patch, padding=padding)
    assert grid == (h, w)
    assert torch.equal(found, expected)
    assert torch.equal(cut_patches(x, patch, ids, padding)[0], expected.take_along_dim(ids[..., None, None], 1))


@pytest.mark.parametrize("padding", [0, 1])
def test_conv_equals_conv2d(padding: int):
    embed = random_weights(ConvPatchEmbed(DIM, PATCH, 2, ConvConfig(padding))).double()
    x, meta = pixels(2, 2), channels("blue", "red")
    torch.testing.assert_close(embed(x, meta)[0], embed.proj(x).flatten(2).mT, rtol=1e-12, atol=1e-12)
    assert embed.bake(meta) is embed


def test_products_may_be_shared():
    embed = random_weights(ChannelAttentionPatchEmbed(DIM, PATCH, SMALL))
    x, meta = pixels(2, 2).float(), channels("blue", "red")
    assert torch.equal(embed(x, meta, products=embed.products())[0], embed(x, meta)[0])


def test_logits_stay_float32_under_autocast():
    """bfloat16 logits of this size would be off by whole units, and the softmax with them."""
    embed = random_weights(ChannelAttentionPatchEmbed(DIM, PATCH, SMALL))
    with torch.no_grad():
        embed.chnfus.query.mul_(100.0)
    x, meta = pixels(2, 6).float(), channels(*PLAIN)
    exact = embed(x, meta)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = embed(x, meta)[0]
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() < 0.01 * exact.norm()


def test_errors_tell_what_to_do():
    attention, dynamic = ChannelAttentionPatchEmbed(DIM, PATCH, SMALL), DynamicPatchEmbed(DIM, PATCH)
    conv = ConvPatchEmbed(DIM, PATCH, 3)
    for embed in (attention, dynamic):
        with pytest.raises(ValueError, match="elevation: true"):
            embed(pixels(1, 1).float(), channels("height"))
        with pytest.raises(ValueError, match="targets, not pixels"):
            embed.check(channels("blue", "cover"))
    with pytest.raises(ValueError, match="built for 3 channels and got 2"):
        conv(pixels(1, 2).float(), channels("blue", "red"))
    with pytest.raises(ValueError, match=r"13 x 8 .* 4 x 4"):
        conv(pixels(1, 3, (13, 8)).float(), channels("blue", "red", "vv"))
    with pytest.raises(ValueError, match="depends on the pixels"):
        attention.bake(channels("blue"))
    with pytest.raises(ValueError, match="same channels in all samples"):
        dynamic(pixels(1, 1).float(), stack(channels("blue")))


def test_unchecked_unsupported_channels_give_nan():
    """Where channels cannot be looked at without a stall, a wrong one must still not pass for a right one."""
    embed = random_weights(ChannelAttentionPatchEmbed(DIM, PATCH, SMALL))
    assert embed.chnfus.chnemb(channels("height", "cover")).isnan().all()
    assert not embed.chnfus.chnemb(channels(*PLAIN)).isnan().any()


def test_elevation_of_dynamic():
    embed = random_weights(DynamicPatchEmbed(DIM, PATCH, DynamicConfig(elevation=True)))
    tokens, _ = embed(pixels(1, 2).float(), channels("blue", "height"))
    assert tokens.isfinite().all()
    (gradient,) = torch.autograd.grad(tokens.sum(), embed.elevation_code)
    assert gradient.abs().max() > 0
