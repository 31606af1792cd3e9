"""Parameter groups, schedules, and a step that is skipped on the device."""

import itertools
import math

import pytest
import torch
from torch import nn

from ssl_eo.models.heads import HeadConfig, PrototypeHead
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.train.optim import OptimConfig, lr_schedule, param_groups, set_hyper_parameters, step_if_finite

NAMES = {
    "encoder.cls_token": (1, 1, 4),
    "encoder.pos_embed": (1, 9, 4),
    "encoder.patch_embed.proj.weight": (4, 8),
    "encoder.patch_embed.proj.bias": (4,),
    "encoder.blocks.0.attn.qkv.weight": (12, 4),
    "encoder.blocks.0.norm1.weight": (4,),
    "encoder.blocks.1.ls1.gamma": (4,),
    "encoder.blocks.1.mlp.fc1.weight": (16, 4),
    "encoder.norm.weight": (4,),
    "decoder.embed.weight": (4, 4),
    "output.kind_rows": (5, 4),
    "dino_head.mlp.0.bias": (4,),
    "dino_head.last_layer.weight_g": (6, 1),
    "dino_head.last_layer.weight_v": (6, 4),
}


def _parameters(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def _by_name(named: list[tuple[str, nn.Parameter]], depth: int, cfg: OptimConfig, key: str) -> dict[str, float]:
    """What the groups hold under `key`, by the name of the parameter."""
    found = {id(p): group[key] for group in param_groups(named, depth, cfg) for p in group["params"]}
    return {name: found[id(p)] for name, p in named if id(p) in found}


def test_groups_have_layer_multipliers_and_true_no_decay() -> None:
    frozen = ("decoder.frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    named, cfg = [*_parameters(NAMES), frozen], OptimConfig(layer_decay=0.5)
    lr, decay = (_by_name(named, 2, cfg, key) for key in ("lr_multiplier", "weight_decay_multiplier"))
    assert {name: (lr[name], decay[name]) for name in lr} == {
        "encoder.cls_token": (0.125, 0),
        "encoder.pos_embed": (0.125, 0),
        "encoder.patch_embed.proj.weight": (0.125, 1),
        "encoder.patch_embed.proj.bias": (0.125, 0),
        "encoder.blocks.0.attn.qkv.weight": (0.25, 1),
        "encoder.blocks.0.norm1.weight": (0.25, 0),
        "encoder.blocks.1.ls1.gamma": (0.5, 0),
        "encoder.blocks.1.mlp.fc1.weight": (0.5, 1),
        "encoder.norm.weight": (1.0, 0),
        "decoder.embed.weight": (1.0, 1),
        "output.kind_rows": (1.0, 0),
        "dino_head.mlp.0.bias": (1.0, 0),
        "dino_head.last_layer.weight_g": (1.0, 0),
        "dino_head.last_layer.weight_v": (1.0, 1),
    }


# DINOv2's rule with a factor of 0.9 and the twelve blocks of a ViT-B/14.
OF_BLOCK = {i: 0.9 ** (12 - i) for i in range(12)}
BEFORE_THE_BLOCKS, AFTER_THEM = 0.9**13, 1.0


def test_layer_decay_of_panopticon_vit_b_14() -> None:
    shape = {"size": "base", "patch_size": 14, "image_size": 518}
    cfg = EncoderConfig(**shape, position="learned", mask_token=True, layer_scale_init=1e-5)
    with torch.device("meta"):
        named = [(f"encoder.{name}", p) for name, p in Encoder(cfg).named_parameters()]
        named += [(f"dino_head.{name}", p) for name, p in PrototypeHead(768, HeadConfig()).named_parameters()]
    found = _by_name(named, 12, OptimConfig(layer_decay=0.9), "lr_multiplier")
    expected = {}
    for name in found:
        parts = name.split(".")
        if parts[0] == "dino_head" or parts[1] == "norm":
            expected[name] = AFTER_THEM
        elif parts[1] == "blocks":
            expected[name] = OF_BLOCK[int(parts[2])]
        else:
            assert parts[1] in ("cls_token", "pos_embed", "mask_token", "patch_embed")
            expected[name] = BEFORE_THE_BLOCKS
    assert sum(name.startswith("encoder.") for name in found) == 183
    assert found == expected
    assert found["encoder.patch_embed.proj.weight"] == pytest.approx(0.2542, abs=1e-4)


def test_factors_of_all_matching_regexes_multiply_with_layer_decay() -> None:
    cfg = OptimConfig(layer_decay=0.5, lr_multipliers={r"blocks\.": 0.2, "norm": 3.0, r"^decoder\.": 0.0})
    found = _by_name(_parameters(NAMES), 2, cfg, "lr_multiplier")
    assert found["encoder.blocks.0.norm1.weight"] == pytest.approx(0.25 * 0.2 * 3)
    assert found["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.25 * 0.2)
    assert (found["encoder.norm.weight"], found["decoder.embed.weight"]) == (3.0, 0.0)
    assert found["encoder.cls_token"] == 0.125


def test_the_last_regex_decides_on_weight_decay() -> None:
    cfg = OptimConfig(weight_decay_multipliers={"token|pos_embed|weight_g": 1.0, "encoder": 0.5, r"qkv\.weight": 0.0})
    found = _by_name(_parameters(NAMES), 2, cfg, "weight_decay_multiplier")
    changed = {"encoder.blocks.0.attn.qkv.weight": 0.0, "dino_head.last_layer.weight_g": 1.0}
    default = _by_name(_parameters(NAMES), 2, OptimConfig(), "weight_decay_multiplier")
    others = {name: 0.5 if name.startswith("encoder") else value for name, value in default.items()}
    assert found == others | changed


def test_groups_come_in_the_same_order_whatever_the_order_of_the_regexes() -> None:
    rules = {"norm": 0.5, "blocks": 0.5, "bias": 0.25}
    orders = [
        [group["lr_multiplier"] for group in param_groups(_parameters(NAMES), 2, OptimConfig(lr_multipliers=dict(o)))]
        for o in itertools.permutations(rules.items())
    ]
    assert len(orders[0]) > 3
    assert all(order == orders[0] for order in orders)


def test_hyper_parameters_reach_every_group() -> None:
    cfg = OptimConfig(layer_decay=0.5, weight_decay_multipliers={"decoder": 0.1}, freeze_steps={"last_layer": 3})
    optimizer = torch.optim.AdamW(param_groups(_parameters(NAMES), 2, cfg), lr=1.0)
    for step in (0, 2, 3):
        set_hyper_parameters(optimizer, lr=0.1, weight_decay=0.2, step=step)
        for group in optimizer.param_groups:
            is_frozen = group["freeze_steps"] == 3 and step < 3
            assert group["lr"] == (0.0 if is_frozen else 0.1 * group["lr_multiplier"])
            assert group["weight_decay"] == 0.2 * group["weight_decay_multiplier"]
    assert {group["freeze_steps"] for group in optimizer.param_groups} == {0, 3}
    assert {group["weight_decay_multiplier"] for group in optimizer.param_groups} == {0.0, 0.1, 1.0}


def test_what_is_frozen_keeps_its_bits_while_its_moments_go_on() -> None:
    shapes = {"head.last_layer.weight_v": (4, 4), "head.mlp.0.weight": (4, 4), "head.mlp.2.weight": (4, 4)}
    named = [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]
    cfg = OptimConfig(freeze_steps={"last_layer": 2, "head.*layer": 3, r"mlp\.2": 1}, weight_decay=0.1)
    optimizer = torch.optim.AdamW(param_groups(named, 1, cfg), fused=True)
    moved = []
    for step in range(5):
        before = [p.detach().clone() for _, p in named]
        for _, parameter in named:
            parameter.grad = torch.full_like(parameter, 0.5)
        set_hyper_parameters(optimizer, 0.1, 0.1, step)
        step_if_finite(optimizer, torch.ones(()))
        moved.append([not torch.equal(b, p.detach()) for b, (_, p) in zip(before, named, strict=True)])
        moments = [optimizer.state[p]["exp_avg"] for _, p in named]
        assert torch.equal(moments[0], moments[1])
        assert moments[0].all()
    assert [list(column) for column in zip(*moved, strict=True)] == [
        [False, False, False, True, True],
        [True] * 5,
        [False, True, True, True, True],
    ]


@pytest.mark.parametrize("key", ["lr_multipliers", "weight_decay_multipliers", "freeze_steps"])
def test_a_regex_that_matches_nothing_names_what_is_close(key: str) -> None:
    def groups(regex: str) -> None:
        param_groups(_parameters(NAMES), 2, OptimConfig(**{key: {"encoder": 1, regex: 1}}))

    with pytest.raises(ValueError, match=rf"optim\.{key}: 'last_layers' matches no .*; close to it are .*last_layer"):
        groups("last_layers")
    with pytest.raises(ValueError, match=r"'\^encoder\\\\.bloks' matches no .*; close to it are encoder\.blocks"):
        groups(r"^encoder\.bloks")
    with pytest.raises(ValueError, match=r"'xyz' matches no .*; the first are encoder\.cls_token, encoder\.pos_embed"):
        groups("xyz")
    with pytest.raises(ValueError, match=rf"{key}: 'blocks\[' is not a regular expression: unterminated"):
        groups("blocks[")
    with pytest.raises(ValueError, match=f"{key} must not be negative, got -1"):
        OptimConfig(**{key: {"encoder": -1}})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_step_changes_nothing(bad: float) -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1, fused=True)
    for gradient, finite in ((1.0, 1.0), (bad, 0.0)):
        before = weight.detach().clone()
        moments = [v.clone() for v in optimizer.state[weight].values()]
        weight.grad = torch.full_like(weight, gradient)
        step_if_finite(optimizer, torch.tensor(finite))
        assert torch.equal(before, weight.detach()) == (finite == 0)
    assert all(torch.equal(a, b) for a, b in zip(moments, optimizer.state[weight].values(), strict=True))


def test_schedules_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.warmup_steps 80 .* exceed train\.total_steps 50"):
        lr_schedule(OptimConfig(warmup_steps=80), 50)
    with pytest.raises(ValueError, match="cooldown_steps is for schedule trapezoid"):
        OptimConfig(cooldown_steps=5)
