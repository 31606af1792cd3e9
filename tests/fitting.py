"""Training an objective on one batch over and over, for tests."""

from __future__ import annotations

import torch

from ssl_eo.data.types import Batch
from ssl_eo.objectives.base import Objective
from ssl_eo.train.optim import OptimConfig, build_optimizer, set_hyper_parameters, step_if_finite

_LR = 3e-3


def fit(objective: Objective, batch: Batch, n_steps: int) -> list[float]:
    """`n_steps` steps with a short warm-up and no decay; the loss of each."""
    optimizer = build_optimizer(OptimConfig(lr=_LR), objective)
    schedules, losses = objective.schedules(n_steps), []
    for step in range(n_steps):
        now = {name: schedule(step) for name, schedule in schedules.items()}
        set_hyper_parameters(optimizer, _LR * min(1.0, (step + 1) / 10), 0.0, step)
        found = objective(batch, now)
        found.total.backward()
        step_if_finite(optimizer, torch.ones(()))
        optimizer.zero_grad()
        objective.after_step(now, torch.ones(()), found.state)
        losses.append(float(found.total.detach()))
    return losses
