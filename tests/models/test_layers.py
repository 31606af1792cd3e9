"""Attention against a loop, packing, and stochastic depth."""

import math

import pytest
import torch
from torch import Tensor, nn

from ssl_eo.models.layers import (
    Attention,
    Block,
    CrossAttention,
    Group,
    LayerScale,
    SwiGlu,
    add_branch,
    attend,
    init_layers,
)
from ssl_eo.models.packed_attention import AttentionKernel, use_attention


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(q.shape[2]):
                weight = (k[b, head] @ q[b, head, i] / math.sqrt(q.shape[-1])).softmax(0)
                out[b, head, i] = weight @ v[b, head]
    return out


def test_attend_equals_a_loop():
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    torch.testing.assert_close(attend(q, k, v), naive_attention(q, k, v))


@pytest.mark.parametrize("n_tokens", [7, 600])
def test_attend_in_bfloat16_is_as_close_as_its_inputs(n_tokens: int):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n_tokens, 32, generator=generator) for _ in range(3))
    low = attend(*(t.bfloat16() for t in (q, k, v)))
    assert low.dtype == torch.bfloat16
    exact = attend(q, k, v)
    assert (low - exact).norm() < 0.01 * exact.norm()


def test_attention_reads_qkv_as_three_heads_d():
    attention = Attention(12, 3).double()
    x = torch.randn(10, 12, dtype=torch.float64)
    q, k, v = attention.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = attention.proj(naive_attention(q, k, v).transpose(1, 2).reshape(10, 12))
    torch.testing.assert_close(attention(x, [Group(2, 5)]), expected)


def test_cross_attention_equals_a_loop():
    attention = CrossAttention(12, 3).double()
    x, context = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 6, 12, dtype=torch.float64)
    q = attention.q(x).view(2, 4, 3, 4).transpose(1, 2)
    k, v = attention.kv(context).view(2, 6, 2, 3, 4).permute(2, 0, 3, 1, 4)
    expected = attention.proj(naive_attention(q, k, v).transpose(1, 2).reshape(2, 4, 12))
    torch.testing.assert_close(attention(x, context), expected)


def test_swiglu_width():
    mlp = SwiGlu(1536, 4 * 1536)
    assert mlp.w12.weight.shape == (2 * 4096, 1536)
    assert mlp.w3.weight.shape == (1536, 4096)


def test_init_layers_fills_everything():
    block = Block(8, 2, layer_scale_init=0.1, mlp="swiglu")
    for parameter in block.parameters():
        nn.init.constant_(parameter, math.nan)
    init_layers(block)
    assert all(p.isfinite().all() for p in block.parameters())
    assert isinstance(block.ls1, LayerScale)
    assert (block.ls1.gamma == 0.1).all()


GROUPS = [Group(5, 3), Group(1, 4), Group(8, 2)]


def test_dropped_samples_keep_their_value_and_the_others_are_scaled():
    """With a branch of ones, a row of a group gains B / S if its sample was kept, else nothing; all tokens alike."""
    torch.manual_seed(0)
    x = torch.randn(sum(g.n_rows for g in GROUPS), 6, dtype=torch.float64)
    seen: list[Group] = []

    def branch(rows: Tensor, groups: list[Group]) -> Tensor:
        seen.extend(groups)
        assert rows.shape[0] == sum(g.n_rows for g in groups)
        return torch.ones_like(rows)

    gain = add_branch(x, GROUPS, branch, 0.5) - x
    assert [(g.n_samples, g.n_tokens) for g in seen] == [(2, 3), (1, 4), (4, 2)]
    for part, group, scale in zip(gain.split([g.n_rows for g in GROUPS]), GROUPS, (2.5, 1.0, 2.0), strict=True):
        per_sample = part.view(group.n_samples, -1)
        assert (per_sample - per_sample[:, :1]).abs().max() < 1e-12
        torch.testing.assert_close(per_sample[:, 0].sum(), torch.tensor(float(group.n_samples)).double())
        kept = per_sample[:, 0] > 1e-6
        torch.testing.assert_close(per_sample[kept, 0], torch.full((int(kept.sum()),), scale).double())


def test_stochastic_depth_in_a_block_works_on_whole_samples():
    """Kept samples must attend within themselves, with their own rotary tables, whatever else was kept."""
    torch.manual_seed(0)
    block = Block(8, 2, drop_path_prob=0.5).double()
    angle = torch.randn(6, 1, 3, 4, dtype=torch.float64)
    group = Group(6, 3, (angle.sin(), angle.cos()))
    x = torch.randn(18, 8, dtype=torch.float64)
    full = block.attn(block.norm1(x), [group]).view(6, 3, 8)
    gain = (add_branch(x, [group], lambda r, g: block.attn(block.norm1(r), g), 0.5) - x).view(6, 3, 8)
    kept = gain.flatten(1).abs().amax(1) > 0
    assert kept.sum() == 3
    torch.testing.assert_close(gain[kept], 2.0 * full[kept])


def test_stochastic_depth_is_off_in_evaluation():
    block = Block(8, 2, drop_path_prob=0.9).eval()
    x = torch.randn(6, 8)
    assert torch.equal(block(x, [Group(2, 3)]), block(x, [Group(2, 3)]))


def test_stochastic_depth_keeps_the_mean():
    torch.manual_seed(0)
    value = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    n_draws = 4000
    total = sum(add_branch(value, [Group(4, 1)], lambda rows, _: rows, 0.3) for _ in range(n_draws))
    torch.testing.assert_close(total / n_draws, 2 * value, rtol=0.05, atol=0)  # six standard errors


def _loop_over_sequences(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[tuple[int, int], ...]) -> Tensor:
    """What a packed kernel computes, `[T, A, d]` -> `[T, A, d]`, a sequence at a time."""
    tokens = [n_tokens for n_sequences, n_tokens in lengths for _ in range(n_sequences)]
    parts = [[part.transpose(0, 1)[None] for part in x.split(tokens)] for x in (q, k, v)]
    return torch.cat([naive_attention(*of_one)[0].transpose(0, 1) for of_one in zip(*parts, strict=True)])


@pytest.mark.parametrize("drop_path_prob", [0.0, 0.5])
@pytest.mark.parametrize("positions", ["none", "all", "each sample's own", "of the first alone"])
def test_groups_packed_for_one_kernel_equal_groups_by_themselves(positions: str, drop_path_prob: float):
    block = Block(24, 3, drop_path_prob=drop_path_prob).double()
    shapes = [(3, 5), (2, 7)]
    groups = []
    for i, (n_samples, n_tokens) in enumerate(shapes):
        table = torch.randn(n_samples if positions == "each sample's own" else 1, 1, n_tokens, 8, dtype=torch.float64)
        has_rope = positions != "none" and (i == 0 or positions != "of the first alone")
        groups.append(Group(n_samples, n_tokens, (table.sin(), table.cos()) if has_rope else None))
    x = torch.randn(sum(g.n_rows for g in groups), 24, dtype=torch.float64, requires_grad=True)
    results = []
    for kernel in (None, _loop_over_sequences):
        block.attn.packed_kernel = kernel
        torch.manual_seed(0)
        out = block(x, groups)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        results += [out, gradient]
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


def test_biases_keep_a_group_from_being_packed():
    attention = Attention(12, 3).double()
    group = Group(2, 5, bias=torch.randn(1, 3, 5, 5, dtype=torch.float64))
    x = torch.randn(10, 12, dtype=torch.float64)
    expected = attention(x, [group])
    attention.packed_kernel = _loop_over_sequences
    torch.testing.assert_close(attention(x, [group]), expected, rtol=0, atol=0)


def test_packed_kernels_are_for_gpus():
    with pytest.raises(ValueError, match=r"parallel.attention: varlen needs a GPU, this is a cpu; use sdpa"):
        use_attention(Attention(12, 3), "varlen", torch.device("cpu"))
    attention = Attention(12, 3)
    use_attention(attention, "sdpa", torch.device("cpu"))
    assert attention.packed_kernel is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernel", ["varlen", "xformers"])
def test_packed_kernels_equal_sdpa(kernel: AttentionKernel):
    if kernel == "xformers":
        pytest.importorskip("xformers")
    device = torch.device("cuda")
    block, groups = Block(384, 6).to(device), [Group(4, 197), Group(8, 37)]
    x = torch.randn(sum(g.n_rows for g in groups), 384, device=device, requires_grad=True)
    results = []
    for name in ("sdpa", kernel):
        use_attention(block, name, device)
        with torch.autocast("cuda", torch.bfloat16):
            out = block(x, groups)
        (gradient,) = torch.autograd.grad(out.float().square().mean(), x)
        results.append((out.float(), gradient))
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() < 0.01 * expected.norm()  # bfloat16 has eight bits
