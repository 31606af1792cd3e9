"""Decoders that run as one are the decoders one by one; patches of class maps; the middle ranks of a view."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.models.modalities import ClassPatchEmbed, ImageHeads, take_visible, truncated_standardise
from ssl_eo.models.modality_decoders import DecoderTarget, ModalityDecoderConfig, ModalityDecoders
from ssl_eo.models.patch_embed import ConvPatchEmbed, cut_patches
from ssl_eo.models.position import sincos_grid
from ssl_eo.models.vit import Tokens

CFG = ModalityDecoderConfig(embed_dim=16, depth=2, n_heads=2)
TARGETS = {
    "a": DecoderTarget(6, 0),
    "b": DecoderTarget(4, 2),
    "b2": DecoderTarget(4, 2),
    "unseen": DecoderTarget(3, None),
}
GRID, N_INPUTS, ENCODER_DIM, N_PREFIX = (3, 4), 3, 24, 2


def _decoders(targets: dict[str, DecoderTarget] = TARGETS) -> ModalityDecoders:
    decoders = ModalityDecoders(CFG, ENCODER_DIM, targets, N_INPUTS).double()
    torch.manual_seed(0)
    decoders.init_weights()
    with torch.no_grad():
        for parameter in decoders.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoders


def _tokens(n_samples: int = 2, n_visible: int = 7) -> tuple[Tokens, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_samples, N_PREFIX + n_visible, ENCODER_DIM, generator=generator, dtype=torch.float64)
    ids = torch.rand(n_samples, N_INPUTS * 12, generator=generator).argsort(1)[:, :n_visible].sort(1).values
    return Tokens(x, N_PREFIX, GRID), ids, sincos_grid(GRID, 16, torch.device("cpu")).double()


def _slice(decoders: ModalityDecoders, o: int, name: str) -> ModalityDecoders:
    """One of the decoders by itself."""
    alone = ModalityDecoders(CFG, ENCODER_DIM, {name: TARGETS[name]}, N_INPUTS).double()
    mine = {}
    for key, value in decoders.state_dict().items():
        if key.startswith("outputs."):
            if key.startswith(f"outputs.{name}."):
                mine[key] = value
        elif key == "target_codes":
            if TARGETS[name].input is None:
                mine[key] = value  # there is only one
        else:
            mine[key] = value[o : o + 1]
    alone.load_state_dict(mine)
    return alone


def test_decoders_run_as_one_are_a_loop_over_decoders() -> None:
    decoders, (tokens, ids, table) = _decoders(), _tokens()
    tokens.x.requires_grad_()
    together = decoders(tokens, ids, table)
    (gradient,) = torch.autograd.grad(sum(out.square().sum() for out in together.values()), tokens.x)
    expected = torch.zeros_like(gradient)
    for o, name in enumerate(TARGETS):
        out = _slice(decoders, o, name)(tokens, ids, table)[name]
        assert out.shape == (2, 12, TARGETS[name].n_values)
        torch.testing.assert_close(together[name], out, rtol=1e-10, atol=1e-12)
        expected += torch.autograd.grad(out.square().sum(), tokens.x)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def _naive(decoders: ModalityDecoders, o: int, name: str, tokens: Tokens, ids: Tensor, table: Tensor) -> Tensor:
    """The paper's decoder from its parts, patch by patch: `[B, N, n_values]`."""
    target, outputs = TARGETS[name], []

    def linear(module: nn.Module, x: Tensor) -> Tensor:
        return x @ module.weight[o].T + module.bias[o]

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        return F.layer_norm(x, (16,), module.gain[o, 0, 0], module.bias[o, 0, 0], 1e-6)

    def mlp(module: nn.Module, x: Tensor) -> Tensor:
        return linear(module.fc2, F.gelu(linear(module.fc1, x)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [(q[:, h : h + 8] @ k[:, h : h + 8].T / 8**0.5).softmax(-1) @ v[:, h : h + 8] for h in (0, 8)]
        return torch.cat(heads, 1)

    for b in range(len(ids)):
        context = linear(decoders.embed, tokens.x[b])
        placed = {
            int(i): context[N_PREFIX + j] + decoders.modality_codes[o, int(i) // 12] + table[int(i) % 12]
            for j, i in enumerate(ids[b])
        }
        rows = []
        for patch in range(12):
            code = decoders.target_codes[0] if target.input is None else decoders.modality_codes[o, target.input]
            own = -1 if target.input is None else target.input * 12 + patch
            rows.append(placed.get(own, decoders.mask_token[o, 0] + code + table[patch]))
        seen = norm(decoders.context_norm, torch.stack([*context[:N_PREFIX], *placed.values()]))
        q, kv = linear(decoders.cross.q, norm(decoders.query_norm, torch.stack(rows))), linear(decoders.cross.kv, seen)
        x = linear(decoders.cross.proj, attend(q, kv[:, :16], kv[:, 16:]))
        x = x + mlp(decoders.mlp, norm(decoders.out_norm, x))
        for block in decoders.blocks:
            qkv = linear(block.qkv, norm(block.norm1, x))
            x = x + linear(block.proj, attend(qkv[:, :16], qkv[:, 16:32], qkv[:, 32:]))
            x = x + mlp(block.mlp, norm(block.norm2, x))
        outputs.append(decoders.outputs[name](x))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_is_that_of_the_paper(name: str) -> None:
    decoders, (tokens, ids, table) = _decoders(), _tokens()
    expected = _naive(decoders, list(TARGETS).index(name), name, tokens, ids, table)
    torch.testing.assert_close(decoders(tokens, ids, table)[name], expected, rtol=1e-9, atol=1e-11)


def test_decoders_are_filled_as_they_would_be_alone() -> None:
    decoders = ModalityDecoders(CFG, ENCODER_DIM, TARGETS, N_INPUTS)
    decoders.init_weights()
    for weight, n_in, n_out in ((decoders.embed.weight, 24, 16), (decoders.mlp.fc1.weight, 16, 64)):
        bound = (6 / (n_in + n_out)) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_patches_are_taken_where_they_are_visible() -> None:
    image = torch.randn(3, 2, 8, 12)
    rows = torch.tensor([0, 5, 7, 11, 17])
    every, grid = cut_patches(image, 4)  # [B, N, C, E]
    assert grid == (2, 3)
    torch.testing.assert_close(take_visible(image, rows, grid).flatten(2), every.flatten(0, 1)[rows])


def test_classes_of_a_patch_are_a_convolution_over_codes() -> None:
    embed = ClassPatchEmbed(10, 2, n_classes=5, code_dim=3)
    embed.init_weights()
    labels = torch.randint(0, 6, (4, 2, 2))  # 5: no class
    image = embed.codes[labels].permute(0, 3, 1, 2)  # [4, G, 2, 2]
    kernel = embed.proj.weight.view(10, 2, 2, 3).permute(0, 3, 1, 2)
    expected = F.conv2d(image, kernel, embed.proj.bias, stride=2)[..., 0, 0]
    torch.testing.assert_close(embed(labels), expected)
    assert embed(torch.full((1, 2, 2), 5)).isfinite().all()


def test_a_view_is_standardised_by_its_middle_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = 40 + 7 * torch.randn(3, 2, 9, 9, generator=generator).double()
    pixels[0, 0, 0, 0] = 1e6  # an outlier counts in no way
    valid = torch.rand(3, 2, 9, 9, generator=generator) < 0.7
    valid[2, 1] = False
    for known in (None, valid):
        found = truncated_standardise(torch.where(valid, pixels, torch.nan) if known is not None else pixels, known)
        for b in range(3):
            for c in range(2):
                own = pixels[b, c].flatten() if known is None else pixels[b, c][valid[b, c]]
                middle = own.sort().values[int(0.1 * len(own)) : int(0.9 * len(own))]
                expected = (own - middle.mean()) / (middle.var() + 1e-6).sqrt() if len(own) else own
                actual = found[b, c].flatten() if known is None else found[b, c][valid[b, c]]
                torch.testing.assert_close(actual, expected)
                if known is not None:
                    assert not found[b, c][~valid[b, c]].any()


def test_heads_of_samples_read_the_mean_token() -> None:
    heads = ImageHeads(8, {"place": 2, "biome": 5}, 1e-6)
    heads.init_weights()
    x = torch.randn(3, 7, 8)
    found = heads(x)
    assert {name: value.shape for name, value in found.items()} == {"place": (3, 2), "biome": (3, 5)}
    torch.testing.assert_close(found["place"], heads.outputs["place"](F.layer_norm(x.mean(1), (8,), eps=1e-6)))


def test_a_patch_by_itself_is_embedded_as_in_its_view() -> None:
    """Which is how visible patches of all samples share one call; borders of a padded convolution would differ."""
    from ssl_eo.sensors import load_sensor

    embed = ConvPatchEmbed(10, 4, 3)
    embed.init_weights()
    channels = load_sensor("rgb").channel_meta()
    image, rows = torch.randn(2, 3, 8, 8), torch.tensor([1, 6])
    whole = embed(image, channels)[0].flatten(0, 1)[rows]
    torch.testing.assert_close(embed(take_visible(image, rows, (2, 2)), channels)[0][:, 0], whole)
