"""BYOL against its formula; global statistics; the teacher; ranks; what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fitting import fit
from pairing import (
    assert_ranks_are_one_process,
    config_of,
    encoded,
    objective_of,
    setup,
    step_of_rank,
    unit,
    wrong_combination,
)

from ssl_eo.train.optim import OptimConfig, build_optimizer, step_if_finite

NOW = {"momentum": 0.9}


@torch.no_grad()
def _naive(objective: Any, batch: Any) -> dict[str, float]:
    """The loss in float64, view by view and sample by sample; each view goes through the heads alone."""
    online, target = (
        encoded(network, batch.pixels["global"], objective.cfg.pool)
        for network in (objective.student, objective.teacher)
    )
    predictions = [unit(objective.student["predictor"](objective.student["projector"](x))) for x in online]
    targets = [unit(objective.teacher["projector"](x)) for x in target]
    total = 0.0
    for view in (0, 1):
        for p, t in zip(predictions[view].tolist(), targets[1 - view].tolist(), strict=True):
            total += (2 - 2 * math.fsum(a * b for a, b in zip(p, t, strict=True))) / len(batch.keys)
    together = torch.cat(targets).mean(0)
    return {
        "total": total,
        "regression": total,
        "alignment": (targets[0] - targets[1]).square().sum(-1).mean().item(),
        "spread": 1 - float(together @ together),
    }


@pytest.mark.parametrize("overrides", [(), ("objective.pool=cls",), ("objective.head_norm=none",)])
def test_forward_is_the_formula(overrides: tuple[str, ...]) -> None:
    objective, batch = setup("byol", *overrides)
    found, expected = objective(batch, NOW), _naive(objective, batch)
    values = {**found.parts, **found.metrics, "total": found.total}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, rel=2e-5)


def test_the_heads_are_those_of_the_paper() -> None:
    """One hidden layer that is normalised, no bias at the output, which is not normalised."""
    objective, _ = setup("byol")
    for head in (objective.student["projector"], objective.student["predictor"]):
        assert [type(layer).__name__ for layer in head.mlp] == ["Linear", "GlobalBatchNorm", "ReLU", "Linear"]
        assert head.mlp[-1].bias is None


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_two_ranks_are_one_process(on_ranks: Callable[..., list[Any]], norm: str) -> None:
    override = f"objective.head_norm={norm}"
    whole = step_of_rank("byol", NOW, override)
    assert_ranks_are_one_process(on_ranks(2, step_of_rank, "byol", NOW, override), whole)


def test_nothing_reaches_the_teacher() -> None:
    objective, batch = setup("byol")
    objective(batch, NOW).total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert set(objective.teacher) == {"encoder", "projector"}


def test_the_teacher_follows_and_stays_at_a_skipped_step() -> None:
    objective, batch = setup("byol")
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(1.0)
    weight = objective.teacher["projector"].mlp[0].weight
    start, student = weight.clone(), objective.student["projector"].mlp[0].weight.detach()
    objective.after_step(NOW, torch.zeros(()), {})
    assert torch.equal(weight, start)
    objective.after_step(NOW, torch.ones(()), objective(batch, NOW).state)
    torch.testing.assert_close(weight, 0.9 * start + 0.1 * student)


def test_momentum_is_a_cosine_to_one() -> None:
    objective = objective_of(config_of("byol", "objective.momentum=0.996"), "byol")
    momentum = objective.schedules(100)["momentum"]
    expected = [1 - (1 - 0.996) * (math.cos(math.pi * s / 100) + 1) / 2 for s in (0, 1, 50, 100)]
    assert [momentum(s) for s in (0, 1, 50, 100)] == pytest.approx(expected, rel=1e-12)


def test_learning_does_not_collapse() -> None:
    """The loss is 0 for one point too: targets stay spread while it falls."""
    objective, batch = setup("byol", "objective.momentum=0.9", "objective.end_momentum=0.9", n=8)
    losses = fit(objective, batch, 60)
    assert losses[-1] < 0.1 * losses[0]
    assert objective(batch, NOW).metrics["spread"] > 0.5


def test_autocast_gives_a_loss_in_float32() -> None:
    objective, batch = setup("byol")
    expected = objective(batch, NOW)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(batch, NOW)
    assert all(v.dtype == torch.float32 for v in (found.total, *found.metrics.values()))
    torch.testing.assert_close(found.total, expected.total, rtol=0.03, atol=0)


def test_a_batch_that_is_not_finite_leaves_every_bit() -> None:
    objective, batch = setup("byol")
    optimizer = build_optimizer(OptimConfig(lr=1e-3), objective)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    batch.pixels["global"].pixels[0, 0, 0, 0] = torch.nan
    losses = objective(batch, NOW)
    losses.total.backward()
    finite = losses.total.isfinite().float()
    step_if_finite(optimizer, finite)
    objective.after_step(NOW, finite, losses.state)
    assert not finite
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.predictor_layers=0", "predictor_layers must be positive, got 0"),
        ("objective.momentum=1.5", r"momentum must be in \[0, 1\], got 1.5"),
        ("objective.end_momentum=-0.1", r"end_momentum must be in \[0, 1\]"),
        ("model.mask_token=true", "model.mask_token: no patch is hidden"),
    ],
)
def test_wrong_combinations_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong_combination("byol", override)
