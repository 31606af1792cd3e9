"""Parameter groups, schedules, and a step that is skipped on the device."""

import math

import pytest
import torch
from torch import nn

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
}


def test_groups_have_layer_multipliers_and_true_no_decay() -> None:
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in NAMES.items()]
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    groups = param_groups([*named, ("decoder.frozen", frozen)], depth=2, layer_decay=0.5)
    found = {id(p): (g["lr_multiplier"], g["decays"]) for g in groups for p in g["params"]}
    by_name = {name: found[id(p)] for name, p in named}
    assert by_name == {
        "encoder.cls_token": (0.125, False),
        "encoder.pos_embed": (0.125, False),
        "encoder.patch_embed.proj.weight": (0.125, True),
        "encoder.patch_embed.proj.bias": (0.125, False),
        "encoder.blocks.0.attn.qkv.weight": (0.25, True),
        "encoder.blocks.0.norm1.weight": (0.25, False),
        "encoder.blocks.1.ls1.gamma": (0.5, False),
        "encoder.blocks.1.mlp.fc1.weight": (0.5, True),
        "encoder.norm.weight": (1.0, False),
        "decoder.embed.weight": (1.0, True),
        "output.kind_rows": (1.0, False),
    }
    assert id(frozen) not in found


def test_hyper_parameters_reach_every_group() -> None:
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in NAMES.items()]
    optimizer = torch.optim.AdamW(param_groups(named, 2, 0.5), lr=1.0)
    set_hyper_parameters(optimizer, lr=0.1, weight_decay=0.2)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.1 * group["lr_multiplier"]
        assert group["weight_decay"] == (0.2 if group["decays"] else 0.0)


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
