"""LoRA on our encoders by peft: what it changes, what trains, merging, adapters in files."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_eo.adapt.lora import (
    FusedB,
    LoraConfig,
    add_lora,
    base_sha256,
    load_adapters,
    lora_config,
    lora_state,
    merge_lora,
    save_adapters,
)
from ssl_eo.components import MissingExtraError
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.sensors import ChannelMeta
from ssl_eo.tensor_files import read_tensors, write_tensors

ALL = ("q", "k", "v", "proj", "fc1", "fc2")
WIDTH = 16


def encoder_of(seed: int = 0, **keys: Any) -> Encoder:
    sizes = {"embed_dim": WIDTH, "depth": 2, "n_heads": 2, "patch_size": 4, "image_size": 16, "patch_embed": "conv"}
    cfg = EncoderConfig(**{**sizes, **keys})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(cfg, n_channels=3)
        encoder.init_weights()
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return encoder


def views(dtype: torch.dtype = torch.float32) -> list[EncoderInput]:
    """Two sizes, so that a pass has groups."""
    channels = ChannelMeta(*(torch.zeros(3) for _ in range(6)))
    generator = torch.Generator().manual_seed(1)
    return [
        EncoderInput(torch.randn(n, 3, side, side, generator=generator).to(dtype), channels)
        for n, side in ((2, 16), (3, 8))
    ]


def features(encoder: Encoder) -> list[Tensor]:
    dtype = next(encoder.parameters()).dtype
    return [tokens.x for tokens in encoder(views(dtype))]


def train_adapters(encoder: Encoder, seed: int = 3) -> None:
    """Values that B might have after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in lora_state(encoder).items():
        if ".lora_B" in name:
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("keys", [{}, {"mlp": "swiglu"}, {"position": "rope"}, {"position": "alibi"}])
def test_an_encoder_with_new_adapters_is_as_before(keys: dict[str, Any]) -> None:
    encoder = encoder_of(**keys).eval()
    before, between = features(encoder), encoder.intermediates(views()[0], [0, 1])
    add_lora(encoder, LoraConfig(rank=4, dropout=0.5, targets=ALL))
    assert all(torch.equal(a, b) for a, b in zip(before, features(encoder), strict=True))
    after = encoder.intermediates(views()[0], [0, 1])
    assert all(torch.equal(a.x, b.x) for a, b in zip(between, after, strict=True))


def test_only_adapters_train() -> None:
    encoder = encoder_of()
    add_lora(encoder, LoraConfig(rank=4, targets=ALL))
    train_adapters(encoder)
    sum(x.square().sum() for x in features(encoder)).backward()
    for name, parameter in encoder.named_parameters():
        if ".lora_" in name:
            assert parameter.requires_grad, name
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name


def test_a_step_on_the_adapters_lowers_a_loss() -> None:
    encoder = encoder_of()
    add_lora(encoder, LoraConfig(rank=4))
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(5):
        loss = torch.stack([x.square().mean() for x in encoder.intermediates(views()[0], [1], norm=False)[0].x]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("targets", [("q", "v"), ("v",), ("k",), ("q", "k", "v")])
def test_each_part_of_qkv_has_an_update_of_its_own(targets: Any) -> None:
    """Merged weights are W + alpha / r * B A, part by part; those of other parts are the same bits."""
    encoder = encoder_of()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    add_lora(encoder, LoraConfig(rank=4, alpha=6.0, targets=targets))
    train_adapters(encoder)
    state = {name: value.clone() for name, value in lora_state(encoder).items()}
    merge_lora(encoder)
    after = encoder.state_dict()
    for i in range(2):
        name = f"blocks.{i}.attn.qkv"
        old, new = before.pop(f"{name}.weight").chunk(3), after[f"{name}.weight"].chunk(3)
        for part, w_old, w_new in zip("qkv", old, new, strict=True):
            if part not in targets:
                assert torch.equal(w_old, w_new)
                continue
            j = targets.index(part)
            a, b = state[f"{name}.lora_A.weight"][4 * j : 4 * (j + 1)], state[f"{name}.lora_B.{part}"]
            torch.testing.assert_close(w_new, w_old + 6.0 / 4 * b @ a)
            assert not torch.equal(w_old, w_new)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("keys", [{}, {"mlp": "swiglu"}, {"position": "rope", "qkv_bias": False}])
@pytest.mark.parametrize("targets", [("q", "v"), ALL])
def test_merged_is_unmerged(dtype: torch.dtype, tolerance: float, keys: dict[str, Any], targets: Any) -> None:
    encoder = encoder_of(**keys).to(dtype).eval()
    names, modules = list(encoder.state_dict()), [*map(type, encoder.modules())]
    plain = features(encoder)
    add_lora(encoder, LoraConfig(rank=4, dropout=0.3, targets=targets))
    train_adapters(encoder)
    adapted = features(encoder)
    merge_lora(encoder)
    merged = features(encoder)
    for x_plain, x_adapted, x_merged in zip(plain, adapted, merged, strict=True):
        torch.testing.assert_close(x_merged, x_adapted, rtol=tolerance, atol=tolerance)
        assert (x_plain - x_adapted).abs().max() > 1e-2
    assert list(encoder.state_dict()) == names
    assert [*map(type, encoder.modules())] == modules
    assert lora_config(encoder) is None
    assert all(p.requires_grad for p in encoder.parameters())
    add_lora(encoder, LoraConfig())  # and again


def test_numbers_of_parameters() -> None:
    """Of a ViT-B at rank 8, and of a gated MLP."""
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(size="base", patch_embed="conv"), n_channels=3)
        add_lora(encoder, LoraConfig())
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == 294_912
    assert sum(value.numel() for value in lora_state(encoder).values()) == 294_912
    encoder = encoder_of(mlp="swiglu")
    add_lora(encoder, LoraConfig(rank=2, targets=("fc1", "fc2")))
    hidden = encoder.get_submodule("blocks.0.mlp.w3").in_features
    n_block = 2 * (WIDTH + 2 * hidden) + 2 * (hidden + WIDTH)
    assert sum(value.numel() for value in lora_state(encoder).values()) == 2 * n_block


def test_adapters_are_a_function_of_the_seed() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 7)
        encoder = encoder_of()
        state = torch.random.get_rng_state()
        add_lora(encoder, LoraConfig(rank=4, targets=ALL), seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return lora_state(encoder)

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == (".lora_B" in name) for name in first)


def test_dropout_is_of_training_alone() -> None:
    encoder = encoder_of().eval()
    add_lora(encoder, LoraConfig(rank=4, dropout=0.5))
    train_adapters(encoder)
    assert all(torch.equal(a, b) for a, b in zip(features(encoder), features(encoder), strict=True))
    encoder.train()
    assert not any(torch.equal(a, b) for a, b in zip(features(encoder), features(encoder), strict=True))


def test_a_copy_has_adapters_of_its_own() -> None:
    encoder = encoder_of()
    add_lora(encoder, LoraConfig(rank=4))
    other = copy.deepcopy(encoder)
    train_adapters(other)
    merge_lora(other)
    assert lora_config(encoder) == LoraConfig(rank=4)
    assert all(value.eq(0).all() for name, value in lora_state(encoder).items() if ".lora_B" in name)


def test_the_hash_of_the_base_is_that_of_the_plain_encoder() -> None:
    encoder = encoder_of()
    plain = base_sha256(encoder)
    add_lora(encoder, LoraConfig(rank=4, targets=ALL))
    train_adapters(encoder)
    assert base_sha256(encoder) == plain
    merge_lora(encoder)
    assert len({plain, base_sha256(encoder), base_sha256(encoder_of(1)), base_sha256(encoder_of().bfloat16())}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_adapters_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = encoder_of().to(dtype).eval()
    cfg = LoraConfig(rank=4, alpha=2.0, dropout=0.1, targets=("v", "q", "fc1"))
    add_lora(encoder, cfg)
    train_adapters(encoder)
    save_adapters(tmp_path / "run", encoder)
    other = encoder_of().to(dtype).eval()
    assert load_adapters(tmp_path / "run", other) == cfg == lora_config(other)
    assert all(torch.equal(a, b) for a, b in zip(features(encoder), features(other), strict=True))
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in encoder.named_parameters() if p.requires_grad
    ]
    kept = read_tensors(tmp_path / "run" / "adapters.safetensors")
    assert list(kept) == list(lora_state(encoder))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapters.json", "adapters.safetensors"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    encoder = encoder_of()
    add_lora(encoder, LoraConfig(rank=4))
    save_adapters(tmp_path, encoder)
    return tmp_path


def refused(folder: Path, encoder: Encoder, message: str) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_adapters(folder, encoder)
    after = encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in encoder.parameters())


def test_another_base_is_refused(saved: Path) -> None:
    refused(
        saved, encoder_of(1), r"adapters belong to an encoder with weights of SHA-256 [0-9a-f]{12}, not to this one"
    )


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapters.json"
    page = json.loads(path.read_text())
    for key, value in values.items():
        (page["lora"] if key in page["lora"] else page)[key] = value
    path.write_text(json.dumps(page))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"format": [1]}, r"format \[1\], this version reads 1"),
        ({"lora": 3}, "adapters.json: "),
        ({"lora": {"rank": 4}}, "key 'alpha' is missing"),
        ({"rank": 10**12}, "rank must be at most the encoder's width of 16"),
        ({"rank": True}, "rank must be a whole number from 1, got True"),
        ({"rank": "4"}, "rank must be a whole number from 1, got '4'"),
        ({"rank": 8}, r"6 tensors do not fit the adapters, the first is .*: expected \[16, 16\], found \[8, 16\]"),
        ({"alpha": float("nan")}, "alpha must be positive and finite, got nan"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"targets": "qv"}, "targets must be a list of q, k, v, proj, fc1, fc2, got 'qv'"),
        ({"targets": ["q", ["v"]]}, r"targets are among q, .*, got \['v'\]"),
        ({"targets": ["q", "k"]}, r"4 tensors do not fit .*: expected \[16, 4\], found none"),
        ({"targets": []}, "targets must name at least one"),
        ({"sha256": "0" * 64}, "adapters.safetensors: its SHA-256 is not that"),
        ({"base_sha256": None}, "these adapters belong to an encoder"),
    ],
)
def test_what_is_said_of_adapters_is_checked(saved: Path, values: dict[str, Any], message: str) -> None:
    change(saved, **values)
    refused(saved, encoder_of(), message)


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, "\udcff", '{"format": 1}', "null"])
def test_a_page_of_anything_else_is_refused(saved: Path, text: str) -> None:
    (saved / "adapters.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(saved, encoder_of(), "adapters.json: ")


def test_missing_files_are_refused(saved: Path) -> None:
    (saved / "adapters.safetensors").unlink()
    refused(saved, encoder_of(), "adapters.safetensors: No such file")
    (saved / "adapters.json").unlink()
    refused(saved, encoder_of(), "adapters.json: No such file")


NAME = "blocks.0.attn.qkv.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NAME: torch.zeros(8, 15)}, r"1 tensors do not fit .* blocks.0.*: expected \[8, 16\], found \[8, 15\]"),
        ({NAME: torch.zeros(8, 16, dtype=torch.int64)}, r"expected \[8, 16\], found torch.int64"),
        ({NAME: None}, r"expected \[8, 16\], found none"),
        ({"blocks.0.norm1.weight": torch.zeros(16)}, r"blocks.0.norm1.weight: expected none, found \[16\]"),
        ({"blocks.0.attn.qkv.base_layer.weight": torch.zeros(48, 16)}, r"expected none, found \[48, 16\]"),
    ],
)
def test_tensors_that_are_no_adapters_are_refused(saved: Path, tensors: dict[str, Any], message: str) -> None:
    kept = read_tensors(saved / "adapters.safetensors") | tensors
    sha256 = write_tensors(saved / "adapters.safetensors", {n: v for n, v in kept.items() if v is not None})
    change(saved, sha256=sha256)
    refused(saved, encoder_of(), message)


class Hostile:
    """Unpickled, it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(saved: Path) -> None:
    torch.save({NAME: Hostile(saved / "trace")}, saved / "adapters.safetensors")
    refused(saved, encoder_of(), "adapters.safetensors: ")
    assert not (saved / "trace").exists()


def test_what_makes_no_sense_is_refused(saved: Path) -> None:
    encoder = encoder_of()
    for call in (merge_lora, lora_state, lambda e: save_adapters(saved / "none", e)):
        with pytest.raises(ValueError, match="this encoder has no adapters; add some with add_lora"):
            call(encoder)
    with pytest.raises(ValueError, match="rank must be at most the encoder's width of 16, got 17"):
        add_lora(encoder, LoraConfig(rank=17))
    add_lora(encoder, LoraConfig(rank=4))
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(encoder, LoraConfig(rank=4))
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapters(saved, encoder)


def test_adapters_that_diverged_are_not_merged() -> None:
    encoder = encoder_of()
    add_lora(encoder, LoraConfig(rank=4))
    before = base_sha256(encoder)
    lora_state(encoder)["blocks.1.attn.qkv.lora_B.v"][0] = float("nan")
    with pytest.raises(ValueError, match=r"adapter blocks\.1\.attn\.qkv\.lora_B\.v holds values that are not finite"):
        merge_lora(encoder)
    assert base_sha256(encoder) == before
    assert lora_config(encoder) is not None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "rank must be a whole number from 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"targets": ("q", "q")}, "targets must name at least one, and each once"),
        ({"targets": ("fc3",)}, "got 'fc3'; did you mean 'fc"),
    ],
)
def test_configs_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**keys)


def test_a_fused_b_is_blocks_among_zeros() -> None:
    fused = FusedB(torch.zeros(6, 2), ["q", "v"], 1)
    fused.load_state_dict({"q": torch.tensor([[1.0], [2.0]]), "v": torch.tensor([[3.0], [4.0]])})
    assert fused.weight.tolist() == [[1, 0], [2, 0], [0, 0], [0, 0], [0, 3], [0, 4]]
    assert fused(torch.tensor([[10.0, 100.0]])).tolist() == [[10, 20, 0, 0, 300, 400]]


def test_peft_is_asked_for_when_it_is_needed_and_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = "import sys, ssl_eo.adapt.lora; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "peft", None)
    encoder = encoder_of()
    with pytest.raises(MissingExtraError, match=r"LoRA needs the package peft: pip install 'ssl_eo\[lora\]'"):
        add_lora(encoder, LoraConfig(rank=4))
    assert lora_config(encoder) is None
