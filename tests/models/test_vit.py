"""The encoder: released layout, list in and list out, hidden patches, positions, intermediates."""

import copy
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_eo.models.patch_embed import ChannelAttentionConfig, DynamicConfig
from ssl_eo.models.position import interpolate_table
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput, Tokens
from ssl_eo.sensors import Band, ChannelMeta, Sensor

BANDS = (
    Band("blue", "optical", 10.0, wavelength_um=0.49),
    Band("green", "optical", 10.0, wavelength_um=0.56),
    Band("red", "optical", 10.0, wavelength_um=0.665),
    Band("vv", "sar", 10.0, wavelength_um=55_465.0, polarization="VV"),
)
BASE = EncoderConfig(
    embed_dim=24,
    depth=2,
    n_heads=3,
    patch_size=4,
    image_size=16,
    channel_attention=ChannelAttentionConfig(attn_dim=24, n_heads=3),
    dynamic=DynamicConfig(generator_dim=16, n_weight_tokens=4, n_heads=2, ffn_dim=16),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "dinov2": {"position": "learned", "layer_scale_init": 0.5, "mask_token": True},
    "registers": {"position": "rope", "n_registers": 2, "mlp": "swiglu", "mask_token": True},
    "metres": {"position": "sincos_metres", "patch_embed": "dynamic", "mask_token": True},
    "mae": {"position": "sincos", "patch_embed": "conv", "mask_token": True},
}


def channels(n: int) -> ChannelMeta:
    return Sensor("test", "test", BANDS, "uint16", "dn", "test").channel_meta([b.name for b in BANDS[:n]])


def build(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(replace(BASE, **changes), n_channels=3).double()
    encoder.init_weights()
    if encoder.mask_token is not None:
        nn.init.normal_(encoder.mask_token)
    return encoder


def item(batch: int, size: tuple[int, int], n_channels: int = 3, seed: int = 0, **more: Any) -> EncoderInput:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_channels, *size, generator=generator, dtype=torch.float64)
    gsd_m = torch.rand(batch, generator=generator) * 20 + 1
    return EncoderInput(x, channels(n_channels), gsd_m, **more)


def panopticon_layout() -> dict[str, tuple[int, ...]]:
    layout: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 1370, 768),
        "mask_token": (1, 768),
        "patch_embed.conv3d.conv3d.weight": (2304, 1, 1, 14, 14),
        "patch_embed.conv3d.conv3d.bias": (2304,),
        "patch_embed.chnfus.query": (1, 1, 2304),
        "patch_embed.chnfus.chnemb.embed_transmit": (2, 768),
        "patch_embed.chnfus.chnemb.embed_receive": (2, 768),
        "patch_embed.chnfus.chnemb.embed_orbit": (2, 768),
        "patch_embed.chnfus.xattn.inproj_k.weight": (2304, 2304),
        "patch_embed.chnfus.xattn.inproj_v.weight": (2304, 2304),
        "patch_embed.proj.weight": (768, 2304),
        "patch_embed.proj.bias": (768,),
        "norm.weight": (768,),
        "norm.bias": (768,),
    }
    for i in range(12):
        block = {
            "norm1.weight": (768,),
            "norm1.bias": (768,),
            "attn.qkv.weight": (2304, 768),
            "attn.qkv.bias": (2304,),
            "attn.proj.weight": (768, 768),
            "attn.proj.bias": (768,),
            "ls1.gamma": (768,),
            "norm2.weight": (768,),
            "norm2.bias": (768,),
            "mlp.fc1.weight": (3072, 768),
            "mlp.fc1.bias": (3072,),
            "mlp.fc2.weight": (768, 3072),
            "mlp.fc2.bias": (768,),
            "ls2.gamma": (768,),
        }
        layout |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return layout


def test_state_dict_is_that_of_panopticon():
    cfg = EncoderConfig(
        size="base", patch_size=14, position="learned", image_size=518, layer_scale_init=1e-5, mask_token=True
    )
    with torch.device("meta"):
        encoder = Encoder(cfg)
    found = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert found == panopticon_layout()
    assert len(found) == 183
    assert sum(p.numel() for p in encoder.parameters()) == 98_976_000


@pytest.mark.parametrize("variant", VARIANTS)
def test_init_weights_fills_everything_after_meta(variant: str):
    with torch.device("meta"):
        encoder = Encoder(replace(BASE, **VARIANTS[variant]), n_channels=3)
    encoder = encoder.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*encoder.parameters(), *encoder.buffers()):
            tensor.fill_(math.nan)
    encoder.init_weights()
    assert all(t.isfinite().all() for t in encoder.state_dict().values())
    view = item(2, (16, 16))
    tokens = encoder([replace(view, pixels=view.pixels.float())])[0]
    assert tokens.x.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_are_left_as_they_are(variant: str):
    """The original rounds the caller's wavelengths in place: a second forward of the same input then sees others."""
    encoder = build(**VARIANTS[variant])
    given = item(2, (16, 8), mask=torch.arange(16).view(2, 8) % 3 == 0)
    kept = copy.deepcopy(given)
    first, second = (encoder([given])[0].x for _ in range(2))
    assert torch.equal(first, second)
    for name in ("pixels", "gsd_m", "mask"):
        assert torch.equal(getattr(given, name), getattr(kept, name))
    for f in fields(ChannelMeta):
        value, before = getattr(given.channels, f.name), getattr(kept.channels, f.name)
        assert value is before is None or torch.equal(value, before), f.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_list_equals_one_call_per_input(variant: str):
    encoder = build(**VARIANTS[variant])
    n_channels = 3 if VARIANTS[variant].get("patch_embed") == "conv" else 4
    ids = torch.tensor([[5, 0, 3], [1, 2, 11]])
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.4
    inputs = [
        item(3, (16, 16), seed=1),
        item(2, (12, 16), n_channels, seed=2, ids_keep=ids),
        item(2, (16, 12), seed=3, mask=mask),
        item(1, (8, 8), seed=4),
    ]
    together = encoder(inputs)
    assert [t.grid for t in together] == [(4, 4), (3, 4), (4, 3), (2, 2)]
    for view, tokens in zip(inputs, together, strict=True):
        (alone,) = encoder([view])
        torch.testing.assert_close(tokens.x, alone.x, rtol=1e-10, atol=1e-10)
    for parameter, gradient in zip(
        encoder.named_parameters(),
        torch.autograd.grad(sum(t.x.pow(3).sum() for t in together), list(encoder.parameters()), allow_unused=True),
        strict=True,
    ):
        assert gradient is not None, f"{parameter[0]} has no gradient"


def straight_forward(encoder: Encoder, view: EncoderInput) -> Tensor:
    """The DINOv2 forward pass, one line per step."""
    x, grid = encoder.patch_embed(view.pixels, view.channels)
    if view.mask is not None:
        x = torch.stack([torch.where(m[:, None], encoder.mask_token[0], t) for m, t in zip(view.mask, x, strict=True)])
    x = torch.cat((encoder.cls_token.expand(len(x), 1, -1), x), 1)
    table = interpolate_table(encoder.pos_embed[0, 1:], encoder.native_grid, grid)
    x = x + torch.cat((encoder.pos_embed[0, :1], table))
    x = torch.cat((x[:, :1], encoder.register_tokens.expand(len(x), -1, -1), x[:, 1:]), 1)
    for block in encoder.blocks:
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, block.attn.n_heads, -1)).permute(2, 0, 3, 1, 4)
        weight = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + block.ls1.gamma * block.attn.proj((weight @ v).transpose(1, 2).flatten(2))
        y = block.mlp.fc1(block.norm2(x))
        x = x + block.ls2.gamma * block.mlp.fc2(y * 0.5 * (1 + torch.erf(y / 2**0.5)))
    return encoder.norm(x)


def test_forward_equals_dinov2_step_by_step():
    encoder = build(position="learned", layer_scale_init=0.5, mask_token=True, n_registers=2)
    view = item(2, (12, 20), mask=torch.rand(2, 15, generator=torch.Generator().manual_seed(3)) < 0.4)
    (tokens,) = encoder([view])
    torch.testing.assert_close(tokens.x, straight_forward(encoder, view), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_visible_patches_in_any_order(variant: str):
    """Showing all patches, shuffled, gives the same tokens, shuffled."""
    encoder = build(**VARIANTS[variant])
    view = item(2, (12, 16))
    order = torch.rand(2, 12, generator=torch.Generator().manual_seed(5)).argsort(1)
    (all_of_them,) = encoder([view])
    (shuffled,) = encoder([replace(view, ids_keep=order)])
    torch.testing.assert_close(shuffled.cls, all_of_them.cls, rtol=1e-10, atol=1e-10)
    expected = all_of_them.patches.take_along_dim(order[..., None], 1)
    torch.testing.assert_close(shuffled.patches, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["ids_keep", "mask"])
def test_hidden_pixels_have_no_influence(variant: str, how: str):
    encoder = build(**VARIANTS[variant])
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 5] = True  # rows and columns 4..8
    ids = torch.tensor([[n for n in range(16) if n != 5]] * 2)
    view = item(2, (16, 16), **({"mask": mask} if how == "mask" else {"ids_keep": ids}))
    changed = replace(view, pixels=view.pixels.clone())
    changed.pixels[:, :, 4:8, 4:8] += 100.0
    assert torch.equal(encoder([view])[0].x, encoder([changed])[0].x)


def test_mask_and_ids_keep_together():
    encoder = build(mask_token=True)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    ids = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    (full,) = encoder([item(2, (16, 16), mask=mask)])
    (both,) = encoder([item(2, (16, 16), mask=mask, ids_keep=ids)])
    torch.testing.assert_close(both.patches, full.patches.take_along_dim(ids[..., None], 1), rtol=1e-10, atol=1e-10)


def test_metres_at_the_reference_equal_grid_units():
    metres, grid = build(position="sincos_metres", reference_gsd_m=7.0), build(position="sincos")
    view = item(2, (12, 16))
    for gsd_m in (7.0, torch.tensor([7.0, 7.0])):
        at_reference = replace(view, gsd_m=gsd_m)
        torch.testing.assert_close(metres([at_reference])[0].x, grid([at_reference])[0].x)
    tokens = metres([replace(view, gsd_m=torch.tensor([7.0, 21.0]))])[0].x
    torch.testing.assert_close(tokens[0], grid([view])[0].x[0])
    assert (tokens[1] - grid([view])[0].x[1]).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["sincos", "sincos_metres", "learned", "rope"])
def test_positions_tell_patches_apart(position: str):
    """Equal patches at different places must give different tokens."""
    encoder = build(position=position)
    view = item(1, (12, 16))
    tokens = encoder([replace(view, pixels=torch.ones_like(view.pixels))])[0].patches[0]
    assert torch.cdist(tokens, tokens).fill_diagonal_(1.0).min() > 1e-6


def test_intermediates():
    encoder = build(depth=4, n_registers=1)
    view = item(2, (12, 16))
    (final,) = encoder([view])
    last_two = encoder.intermediates(view, 2)
    torch.testing.assert_close(last_two[1].x, final.x)
    picked = encoder.intermediates(view, [3, 2, 0], norm=False)
    torch.testing.assert_close(encoder.norm(picked[0].x), final.x)
    torch.testing.assert_close(encoder.norm(picked[1].x), last_two[0].x)
    assert all(t.grid == (3, 4) and t.patches.shape == (2, 12, 24) for t in picked)
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        encoder.intermediates(view, [4])
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        encoder.intermediates(view, 5)


def test_intermediates_stop_early():
    encoder = build(depth=3)
    encoder.blocks[2].register_forward_hook(lambda *_: pytest.fail("this block is not needed"))
    encoder.intermediates(item(1, (8, 8)), [1])


def test_tokens_are_named():
    tokens = Tokens(torch.arange(2 * 7 * 1).view(2, 7, 1), n_prefix_tokens=3, grid=(2, 2))
    assert tokens.cls.flatten().tolist() == [0, 7]
    assert tokens.registers.flatten().tolist() == [1, 2, 8, 9]
    assert tokens.patches.flatten().tolist() == [3, 4, 5, 6, 10, 11, 12, 13]


def test_stochastic_depth_in_training_only():
    encoder = build(drop_path_prob=0.5)
    inputs = [item(8, (16, 16)), item(5, (8, 8), ids_keep=torch.arange(3).expand(5, -1))]
    first, second = encoder(inputs), encoder(inputs)
    assert all((a.x - b.x).abs().max() > 0 for a, b in zip(first, second, strict=True))
    sum(t.x.sum() for t in first).backward()
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.eval()
    assert torch.equal(encoder(inputs)[0].x, encoder(inputs)[0].x)


def test_bfloat16_autocast_is_close():
    encoder = build(position="rope").float()
    view = item(2, (16, 16))
    view = replace(view, pixels=view.pixels.float())
    exact = encoder([view])[0].x
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder([view])[0].x
    assert (low - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "bas"}, "did you mean 'base'"),
        ({"n_heads": 5}, r"n_heads must divide .* got 5 and 24"),
        ({"drop_path_prob": 1.0}, "drop_path_prob"),
        ({"embed_dim": 30, "n_heads": 3}, "divisible by 4, got 30"),
        ({"position": "rope", "n_heads": 4}, "head width divisible by 4, got 6"),
        ({"position": "learned", "image_size": 18}, "got 18 and 4"),
        ({"reference_gsd_m": 0.0}, "reference_gsd_m"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **changes)


def test_input_errors():
    with pytest.raises(ValueError, match="number of channels"):
        Encoder(replace(BASE, patch_embed="conv"))
    with pytest.raises(ValueError, match=r"18 x 16 .* 4 x 4"):
        build()([item(1, (18, 16))])
    with pytest.raises(ValueError, match="needs gsd_m"):
        build(position="sincos_metres")([replace(item(1, (8, 8)), gsd_m=None)])
    with pytest.raises(ValueError, match=r"model\.mask_token: true"):
        build()([item(1, (8, 8), mask=torch.zeros(1, 4, dtype=torch.bool))])
