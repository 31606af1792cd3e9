"""Objectives of debug configs, their batches and what a step of a rank leaves, for tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_eo.components import resolve
from ssl_eo.config import Config, load
from ssl_eo.data.loader import Loader
from ssl_eo.data.opening import open_source
from ssl_eo.data.render import Renderer
from ssl_eo.data.types import Batch, PixelBatch, Source
from ssl_eo.distributed import mean_over_ranks, rank, world_size
from ssl_eo.models.vit import EncoderInput
from ssl_eo.objectives.base import Objective
from ssl_eo.train.parallel import build_objective

DEBUG = Path(__file__).parent.parent / "configs" / "debug"


@cache
def source_of(name: str) -> Source:
    """The data of a debug config; its statistics are measured once, also for ranks, which are forks."""
    source = open_source(load(DEBUG / f"{name}.yaml").data.sources[0])
    assert source.schema
    return source


def config_of(name: str, *overrides: str) -> Config:
    return load(DEBUG / f"{name}.yaml", ["data.n_workers=0", "data.n_lanes=4", *overrides])


def objective_of(config: Config, name: str) -> Any:
    """Student and teacher differ, and no bias is zero."""
    method, schemas = resolve("ssl_eo.objectives", config.objective.name).Objective, [source_of(name).schema]
    objective = build_objective(
        lambda: method(config.objective.options, config.model, schemas), config.run.seed, torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in objective.state_dict().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return objective


def batch_of(config: Config, name: str, n: int) -> Batch:
    """This rank's part of a global batch of n samples."""
    method, source = resolve("ssl_eo.objectives", config.objective.name).Objective, source_of(name)
    views = method.views(config.objective.options, config.model, [source.schema])
    where = {"rank": rank(), "world_size": world_size()}
    with Loader(config.data, [source], views, seed=0, global_batch_size=n, total_steps=1, **where) as loader:
        batch = next(iter(loader))
    batch.pixels = Renderer([source.schema]).render(batch)
    return batch


def setup(name: str, *overrides: str, n: int = 4) -> tuple[Any, Batch]:
    config = config_of(name, *overrides)
    return objective_of(config, name), batch_of(config, name, n)


def encoded(network: nn.ModuleDict, view: PixelBatch, pool: str = "cls") -> Tensor:
    """`[2, B, D]`."""
    tokens = network["encoder"]([EncoderInput(view.pixels, view.channels, view.gsd_m)])[0]
    return torch.unflatten(tokens.cls if pool == "cls" else tokens.patches.mean(1), 0, (2, -1))


def unit(x: Tensor) -> Tensor:
    return x.double() / x.double().norm(dim=-1, keepdim=True)


def step_of_rank(name: str, now: dict[str, float], *overrides: str) -> dict[str, Any]:
    """Keys of this rank's part; loss and gradient as DDP averages them; buffers and teacher after the step."""
    objective, batch = setup(name, *overrides, n=8)
    losses = objective(batch, now)
    losses.total.backward()
    grads = {n: mean_over_ranks(p.grad) for n, p in objective.student.named_parameters()}
    objective.after_step(now, torch.ones(()), losses.state)
    after = {k: v for k, v in objective.state_dict().items() if not k.startswith("student.")}
    return {"keys": batch.keys, "total": mean_over_ranks(losses.total.detach()), "grads": grads, "after": after}


def assert_ranks_are_one_process(ranks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    assert [key for found in ranks for key in found["keys"]] == whole["keys"]
    for found in ranks:
        torch.testing.assert_close(found["total"], whole["total"], rtol=1e-5, atol=0)
        for name, grad in whole["grads"].items():
            torch.testing.assert_close(
                found["grads"][name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        torch.testing.assert_close(found["after"], whole["after"])


def wrong_combination(name: str, *overrides: str) -> None:
    """Goes through the places, all before training, at which a config may be refused."""
    config, schemas = config_of(name, *overrides), [source_of(name).schema]
    method: type[Objective] = resolve("ssl_eo.objectives", config.objective.name).Objective
    method.views(config.objective.options, config.model, schemas)
    method(config.objective.options, config.model, schemas)  # type: ignore[call-arg]
