"""Biases by distance, computed from where patches are, beside the table of the whole grid that they stand for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ssl_eo.models.alibi import alibi_bias, alibi_slopes
from ssl_eo.models.layers import Group, JointBlock, attend
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.sensors import load_sensor

CPU = torch.device("cpu")


def _table(grid: tuple[int, int], slopes: list[float]) -> Tensor:
    """`[A, N, N]`, value by value, each product rounded to float32 once."""
    points = list(itertools.product(range(grid[0]), range(grid[1])))
    distance = torch.tensor([[math.dist(p, q) for q in points] for p in points])
    return -torch.tensor(slopes)[:, None, None] * distance


def _some_ids(n_samples: int, n_kept: int, n_patches: int, seed: int) -> Tensor:
    """In no order."""
    return torch.rand(n_samples, n_patches, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :n_kept]


def test_slopes_of_a_power_of_two() -> None:
    assert alibi_slopes(16) == pytest.approx([2 ** (-(h + 1) / 2) for h in range(16)], rel=1e-14)
    assert alibi_slopes(8) == [2.0 ** -(h + 1) for h in range(8)]
    assert alibi_slopes(1) == [2.0**-8]


@pytest.mark.parametrize(("n", "below"), [(3, 2), (6, 4), (12, 8), (20, 16)])
def test_other_numbers_take_every_other_slope_of_the_power_above(n: int, below: int) -> None:
    between = [2 ** (-8 * (h + 1) / (2 * below)) for h in range(0, 2 * below, 2)]
    assert alibi_slopes(n) == pytest.approx([*alibi_slopes(below), *between[: n - below]], rel=1e-14)
    assert len(set(alibi_slopes(n))) == n


@pytest.mark.parametrize(("grid", "n_heads"), [((15, 15), 16), ((7, 11), 12), ((3, 5), 6)])
def test_the_closed_form_is_the_gathered_table_to_the_last_bit(grid: tuple[int, int], n_heads: int) -> None:
    n_patches = grid[0] * grid[1]
    table = _table(grid, alibi_slopes(n_heads))
    queries, keys = (_some_ids(3, n_patches // 4 + extra, n_patches, extra) for extra in (0, 2))
    found = alibi_bias(grid, n_heads, CPU, queries, keys)
    assert found.dtype == torch.float32
    for b in range(3):
        assert torch.equal(found[b], table[:, queries[b]][:, :, keys[b]])
    assert torch.equal(alibi_bias(grid, n_heads, CPU, queries), alibi_bias(grid, n_heads, CPU, queries, queries))
    assert torch.equal(alibi_bias(grid, n_heads, CPU)[0], table)


def test_it_is_float32_under_autocast() -> None:
    queries, keys = _some_ids(2, 10, 225, 0), _some_ids(2, 10, 225, 1)
    expected = alibi_bias((15, 15), 16, CPU, queries, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = alibi_bias((15, 15), 16, CPU, queries, keys)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_prefix_tokens_are_at_no_distance() -> None:
    bias = alibi_bias((2, 3), 4, CPU, n_prefix=2)
    assert torch.equal(bias[:, :, 2:, 2:], alibi_bias((2, 3), 4, CPU))
    assert not bias[:, :, :2].any()
    assert not bias[:, :, :, :2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_adds_the_bias_to_its_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator).to(dtype) for n in (5, 6, 6))
    bias = torch.randn(2, 4, 5, 6, generator=generator)
    logits = q.double() @ k.double().mT / math.sqrt(8) + bias.double()
    expected = logits.softmax(-1) @ v.double()
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attend(q, k, v, bias).double(), expected, atol=atol, rtol=0)


def test_samples_that_are_kept_keep_their_bias() -> None:
    samples = torch.tensor([2, 0])
    own, shared = torch.randn(3, 4, 5, 5), torch.randn(1, 4, 5, 5)
    assert torch.equal(Group(3, 5, bias=own).select(samples).bias, own[samples])  # type: ignore[arg-type]
    assert Group(3, 5, bias=shared).select(samples).bias is shared


# --- the encoder ------------------------------------------------------------------------------------------------------


def _encoder(**changes: object) -> Encoder:
    cfg = EncoderConfig(
        **{
            "embed_dim": 32,
            "depth": 2,
            "n_heads": 4,
            "patch_size": 4,
            "patch_embed": "conv",
            "position": "alibi",
            "cls_token": False,
            "qkv_bias": False,
            **changes,
        }
    )
    encoder = Encoder(cfg, 3)
    torch.manual_seed(0)
    encoder.init_weights()
    return encoder.eval()


def _input(ids: Tensor | None = None) -> EncoderInput:
    pixels = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    return EncoderInput(pixels, load_sensor("rgb").channel_meta(), ids_keep=ids)


@torch.no_grad()
def test_tokens_do_not_depend_on_the_order_in_which_patches_are_kept() -> None:
    ids = _some_ids(2, 9, 24, 0)
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    encoder = _encoder()
    first, second = (encoder([_input(i)])[0].x for i in (ids, ids[:, shuffle]))
    torch.testing.assert_close(first[:, shuffle], second)
    moved = encoder([_input((ids + 7) % 24)])[0].x
    assert not torch.allclose(first, moved, atol=1e-2)


@torch.no_grad()
def test_all_patches_kept_is_nothing_hidden() -> None:
    encoder = _encoder()
    torch.testing.assert_close(encoder([_input()])[0].x, encoder([_input(torch.arange(24).expand(2, -1))])[0].x)


@torch.no_grad()
def test_distance_counts() -> None:
    """Without a position patches would be a set: two that trade places would change nothing else."""
    tokens = []
    for position in ("alibi", "sincos"):
        encoder = _encoder(position=position)
        if position == "sincos":
            encoder.position_table = lambda *_: None  # type: ignore[method-assign,assignment]
        item = _input()
        traded = item.pixels.clone()
        traded[..., :4, :4], traded[..., -4:, -4:] = item.pixels[..., -4:, -4:], item.pixels[..., :4, :4]
        both = (encoder([EncoderInput(p, item.channels)])[0].x[:, 5] for p in (item.pixels, traded))
        tokens.append(tuple(both))
    assert (tokens[0][0] - tokens[0][1]).abs().max() > 1e-3
    torch.testing.assert_close(*tokens[1])


@torch.no_grad()
def test_views_of_two_sizes_in_one_call() -> None:
    encoder = _encoder(cls_token=True)
    large, small = _input(), EncoderInput(_input().pixels[..., :8, :8], _input().channels)
    for together, alone in zip(encoder([large, small]), (encoder([v])[0] for v in (large, small)), strict=True):
        torch.testing.assert_close(together.x, alone.x)


def test_an_encoder_without_a_cls_token() -> None:
    encoder = _encoder(position="learned", image_size=16)
    assert encoder.pos_embed is not None
    assert encoder.pos_embed.shape == (1, 16, 32)
    assert not any(name.startswith("cls") or name.endswith("qkv.bias") for name in encoder.state_dict())
    (tokens,) = encoder([_input()])
    assert tokens.x.shape == (2, 24, 32)
    assert torch.equal(tokens.pooled, tokens.x.mean(1))
    with pytest.raises(ValueError, match="this encoder has no CLS token"):
        _ = tokens.cls
    with pytest.raises(ValueError, match="n_registers 2 needs cls_token: true"):
        _encoder(n_registers=2)
    with_cls = _encoder(cls_token=True)([_input()])[0]
    assert torch.equal(with_cls.pooled, with_cls.cls)


def test_drop_path_under_alibi_drops_whole_samples() -> None:
    encoder = _encoder(drop_path_prob=0.5).train()
    ids = _some_ids(2, 9, 24, 0)
    torch.manual_seed(1)
    encoder([_input(ids)])[0].x.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


# --- the block that joins ---------------------------------------------------------------------------------------------


def test_joint_block_is_the_formula() -> None:
    block = JointBlock(16, 4, 4.0, 1e-5, qkv_bias=False).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    x, context = (torch.randn(2, n, 16, generator=generator, dtype=torch.float64) for n in (3, 5))
    bias, cross_bias = (torch.randn(2, 4, 3, n, generator=generator, dtype=torch.float64) for n in (3, 5))

    def attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        for b, h in itertools.product(range(2), range(4)):
            cut = slice(4 * h, 4 * h + 4)
            logits = q[b, :, cut] @ k[b, :, cut].T / 2.0 + added[b, h]
            out[b, :, cut] = logits.softmax(-1) @ v[b, :, cut]
        return out

    y = block.norm1(x)
    q, k, v = (y @ part.T for part in block.attn.qkv.weight.chunk(3))
    y = x + block.attn.proj(attention(q, k, v, bias))
    told = block.norm2(context)
    k, v = (told @ part.T for part in block.cross_attn.kv.weight.chunk(2))
    y = y + block.cross_attn.proj(attention(block.norm2(y) @ block.cross_attn.q.weight.T, k, v, cross_bias))
    expected = y + block.mlp(block.norm3(y))
    torch.testing.assert_close(block(x, context, bias, cross_bias), expected)
