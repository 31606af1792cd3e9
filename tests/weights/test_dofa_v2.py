"""Version 2 of DOFA: from a file our encoder computes what the formula of the published code gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from released_formula import uniform, weights
from torch import Tensor, nn

from ssl_eo.cli import main
from ssl_eo.hub import load_bundle
from ssl_eo.models.patch_embed import DynamicConfig
from ssl_eo.models.vit import Encoder, EncoderInput
from ssl_eo.sensors import Band, ChannelMeta, Sensor
from ssl_eo.weights import dofa
from ssl_eo.weights.base import Released, build_encoder, find_released, read_released, released_state_dict

WIDTH, HEADS, DEPTH, PATCH, SIZE = 16, 2, 2, 14, 56
GENERATOR, TOKENS = 8, 4  # width of the generator, and its learned tokens
DYNAMIC = DynamicConfig(GENERATOR, TOKENS, n_heads=2, ffn_dim=16, padding=1, sar="dofa_v2")
RGB_UM, SAR_UM = (0.665, 0.56, 0.49), (5.405, 5.405)  # of published examples


def shapes(
    width: int, depth: int, patch: int, size: int, generator: int, tokens: int, ffn: int
) -> dict[str, list[int]]:
    """Of a file, as the classes of published code have them: a generator, timm's transformer, a norm beside it."""
    g, d, n_values = generator, width, patch * patch * width
    layer = "transformer_encoder.layers.0"
    of_generator = {
        "weight_tokens": [tokens, g],
        "bias_token": [1, g],
        "fc_weight.weight": [n_values, g],
        "fc_weight.bias": [n_values],
        "fc_bias.weight": [d, g],
        "fc_bias.bias": [d],
        f"{layer}.self_attn.in_proj_weight": [3 * g, g],
        f"{layer}.self_attn.in_proj_bias": [3 * g],
        f"{layer}.self_attn.out_proj.weight": [g, g],
        f"{layer}.self_attn.out_proj.bias": [g],
        f"{layer}.linear1.weight": [ffn, g],
        f"{layer}.linear1.bias": [ffn],
        f"{layer}.linear2.weight": [g, ffn],
        f"{layer}.linear2.bias": [g],
        **{f"{layer}.norm{i}.{part}": [g] for i in (1, 2) for part in ("weight", "bias")},
    }
    of_block = {
        **{f"norm{i}.{part}": [d] for i in (1, 2) for part in ("weight", "bias")},
        "attn.qkv.weight": [3 * d, d],
        "attn.qkv.bias": [3 * d],
        "attn.proj.weight": [d, d],
        "attn.proj.bias": [d],
        "ls1.gamma": [d],
        "ls2.gamma": [d],
        "mlp.fc1.weight": [4 * d, d],
        "mlp.fc1.bias": [4 * d],
        "mlp.fc2.weight": [d, 4 * d],
        "mlp.fc2.bias": [d],
    }
    return {
        **{f"patch_embed.weight_generator.{name}": shape for name, shape in of_generator.items()},
        **{f"patch_embed.fclayer.{w}.weight": [g, g] for w in ("w1", "w2")},
        **{f"patch_embed.fclayer.{w}.bias": [g] for w in ("w1", "w2")},
        "model.cls_token": [1, 1, d],
        "model.pos_embed": [1, 1 + (size // patch) ** 2, d],
        **{f"model.blocks.{i}.{name}": shape for i in range(depth) for name, shape in of_block.items()},
        **{f"{norm}.{part}": [d] for norm in ("model.norm", "norm") for part in ("weight", "bias")},
    }


def file_of() -> dict[str, Tensor]:
    found = shapes(WIDTH, DEPTH, PATCH, SIZE, GENERATOR, TOKENS, 16)
    return weights({name: tuple(shape) for name, shape in found.items()})


def embedded(tensors: dict[str, Tensor], images: Tensor, um: tuple[float, ...]) -> Tensor:
    """Tokens `[B, N, D]` by a kernel that torch's own layers write, read as channel, row, column, width."""
    own = {name.removeprefix("patch_embed."): tensor for name, tensor in tensors.items()}
    rates = 10000.0 ** -(torch.arange(GENERATOR // 2) / (GENERATOR // 2))
    angles = torch.tensor(um)[:, None] * 1000 * rates
    code = torch.cat((angles.sin(), angles.cos()), 1)
    hidden = F.linear(code, own["fclayer.w1.weight"], own["fclayer.w1.bias"]).relu()
    code = code + F.linear(hidden, own["fclayer.w2.weight"], own["fclayer.w2.bias"]).relu()
    begin = "weight_generator.transformer_encoder.layers.0."
    layer = nn.TransformerEncoderLayer(GENERATOR, 2, 16, dropout=0.0, activation="gelu").eval()
    layer.load_state_dict({n.removeprefix(begin): t for n, t in own.items() if n.startswith(begin)})
    ours = {n.removeprefix("weight_generator."): t for n, t in own.items()}
    out = layer(torch.cat((ours["weight_tokens"], code, ours["bias_token"])))
    kernel = F.linear(out[TOKENS:-1] + code, ours["fc_weight.weight"], ours["fc_weight.bias"])
    bias = F.linear(out[-1], ours["fc_bias.weight"], ours["fc_bias.bias"])
    kernel = kernel.view(len(um), PATCH, PATCH, WIDTH).permute(3, 0, 1, 2)
    return F.conv2d(images, kernel * 0.01, bias * 0.01, PATCH, padding=1).flatten(2).transpose(1, 2)


def blocks_of(tensors: dict[str, Tensor], tokens: Tensor) -> list[Tensor]:
    """Tokens `[B, 1 + N, D]` after each block, whose norm comes first and whose branches are scaled."""
    own = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    x = torch.cat((own["cls_token"].expand(len(tokens), -1, -1), tokens), 1) + own["pos_embed"]
    found = []
    for i in range(DEPTH):
        b = {name.removeprefix(f"blocks.{i}."): tensor for name, tensor in own.items()}
        y = F.layer_norm(x, (WIDTH,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        qkv = F.linear(y, b["attn.qkv.weight"], b["attn.qkv.bias"]).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-1, -2)) / (WIDTH / HEADS) ** 0.5).softmax(-1) @ v  # [B, heads, N, d]
        y = F.linear(y.transpose(1, 2).flatten(2), b["attn.proj.weight"], b["attn.proj.bias"])
        x = x + b["ls1.gamma"] * y
        y = F.layer_norm(x, (WIDTH,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + b["ls2.gamma"] * F.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
        found.append(x)
    return found


def channels_of(um: tuple[float, ...]) -> ChannelMeta:
    """As our sensors say it: SAR has its true wavelength."""
    if um == SAR_UM:
        bands = [Band(p, "sar", 10.0, wavelength_um=55_466.0, polarization=p) for p in ("VV", "VH")]
    else:
        bands = [Band(f"b{i}", "optical", 10.0, wavelength_um=value) for i, value in enumerate(um)]
    return Sensor("any", "any", tuple(bands), "float32", "any", "any").channel_meta()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Released:
    """One more model in the table of DOFA, so that files are small."""
    base = find_released("dofa_v2_vitb14")
    config = replace(base.config, embed_dim=WIDTH, depth=DEPTH, n_heads=HEADS, image_size=SIZE, dynamic=DYNAMIC)
    released = replace(base, name="dofa_v2_tiny", config=config)
    monkeypatch.setattr(dofa, "MODELS", (*dofa.MODELS, released))
    return released


@pytest.mark.parametrize("um", [RGB_UM, SAR_UM], ids=["rgb", "sar"])
@torch.no_grad()
def test_tokens_are_those_of_the_formula(um: tuple[float, ...], tiny: Released) -> None:
    tensors, images = file_of(), uniform("images", (2, len(um), SIZE, SIZE))
    encoder = build_encoder(dict(tensors), tiny, "file")
    item = EncoderInput(images, channels_of(um))
    expected = blocks_of(tensors, embedded(tensors, images, um))
    found = encoder.intermediates(item, list(range(DEPTH)), norm=False)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.x, theirs, atol=1e-5, rtol=0)
    assert expected[-1].std() > 0.1
    (last,) = encoder([item])
    gain, bias = tensors["model.norm.weight"], tensors["model.norm.bias"]
    torch.testing.assert_close(last.x, F.layer_norm(expected[-1], (WIDTH,), gain, bias, 1e-6), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "width", "depth"), [("dofa_v2_vitb14", 768, 12), ("dofa_v2_vitl14", 1024, 24)])
def test_names_and_shapes_are_those_of_the_published_classes(name: str, width: int, depth: int) -> None:
    released = find_released(name)
    with torch.device("meta"):
        encoder = Encoder(released.config)
        ours = released.restore(encoder.state_dict())
    assert {key: list(value.shape) for key, value in ours.items()} == shapes(width, depth, 14, 224, 128, 128, 2048)


def test_in_as_a_bundle_and_out_again(tiny: Released, tmp_path: Path) -> None:
    """All bits stay but those of the norm that published code never uses."""
    tensors = file_of()
    torch.save(tensors, tmp_path / "dofav2.pth")
    bundle, back = tmp_path / "bundle", tmp_path / "back.pth"
    assert main(["import", str(tmp_path / "dofav2.pth"), "--as", tiny.name, "--out", str(bundle)]) == 0
    assert main(["export", "--checkpoint", str(bundle), "--as", tiny.name, "--out", str(back)]) == 0
    found = torch.load(back, weights_only=True)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors if name not in ("norm.weight", "norm.bias"))
    model = load_bundle(bundle)
    assert (model.inputs, model.facts["features"]["pool"]) == ({}, "mean")
    assert model(uniform("images", (1, 3, 28, 42)), wavelengths_um=RGB_UM).shape == (1, WIDTH)


def test_the_versions_are_told_apart(tiny: Released, tmp_path: Path) -> None:
    torch.save(file_of(), tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"two\.pth: not the weights of dofa_vitb16: .* missing \("):
        read_released(tmp_path / "two.pth", find_released("dofa_vitb16"))
    one = Encoder(replace(tiny.config, layer_scale_init=None, dynamic=replace(DYNAMIC, sar="dofa_v1")))
    one.init_weights()
    torch.save(one.state_dict(), tmp_path / "one.pth")
    with pytest.raises(ValueError, match=r"one\.pth: no encoder in it: no tensor is named model\.cls_token"):
        read_released(tmp_path / "one.pth", tiny)
    with pytest.raises(ValueError, match="this encoder is no dofa_v2_tiny: its LayerScale is False"):
        released_state_dict(one, tiny)
