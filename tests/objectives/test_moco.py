"""MoCo v2 and v3 against their formulae; the queue; the frozen projection of patches; ranks; what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import fit
from pairing import (
    DEBUG,
    assert_ranks_are_one_process,
    batch_of,
    config_of,
    encoded,
    objective_of,
    setup,
    source_of,
    step_of_rank,
    unit,
    wrong_combination,
)
from torch import Tensor

from ssl_eo.cli import main
from ssl_eo.objectives.moco import Objective
from ssl_eo.train.optim import build_optimizer, set_hyper_parameters, step_if_finite
from ssl_eo.train.parallel import build_objective

NOW = {"momentum": 0.9}
VERSIONS = ("moco", "moco_v3")  # debug configs
SMALL_QUEUE = "objective.queue_size=20"


def _choice(query: list[float], candidates: list[list[float]], right: int, temperature: float) -> float:
    exps = [math.exp(math.fsum(a * b for a, b in zip(query, key, strict=True)) / temperature) for key in candidates]
    return -math.log(exps[right] / sum(exps))


def _projected(objective: Objective, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Of the two views: the student's projections and the teacher's, each view through the head alone."""
    found = []
    for network in (objective.student, objective.teacher):
        assert network is not None
        x = encoded(network, batch.pixels["global"], objective.cfg.pool)
        found.append([network["projector"](view) for view in x])
    return found[0], found[1]


@pytest.mark.parametrize("overrides", [(), ("objective.pool=cls",), (SMALL_QUEUE,)])
@torch.no_grad()
def test_version_2_is_the_formula(overrides: tuple[str, ...]) -> None:
    objective, batch = setup("moco", *overrides)
    objective.queue.copy_(torch.nn.functional.normalize(objective.queue, dim=-1))
    student, teacher = _projected(objective, batch)
    queries, keys, queue = unit(student[0]).tolist(), unit(teacher[1]).tolist(), objective.queue.double().tolist()
    expected = (
        sum(_choice(q, [k, *queue], 0, objective.cfg.temperature) for q, k in zip(queries, keys, strict=True)) / 4
    )
    found = objective(batch, NOW)
    assert found.total.item() == pytest.approx(expected, rel=2e-5)
    torch.testing.assert_close(found.state["keys"].double(), unit(teacher[1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overrides", [(), ("objective.pool=cls",), ("objective.head_norm=none",)])
@torch.no_grad()
def test_version_3_is_the_formula(overrides: tuple[str, ...]) -> None:
    objective, batch = setup("moco_v3", *overrides)
    student, teacher = _projected(objective, batch)
    queries = [unit(objective.student["predictor"](view)).tolist() for view in student]
    keys = [unit(view).tolist() for view in teacher]
    contrast = [_choice(q, keys[1 - view], i, 0.2) for view in (0, 1) for i, q in enumerate(queries[view])]
    found = objective(batch, NOW)
    assert found.parts["contrast"].item() == pytest.approx(sum(contrast) / 8, rel=2e-5)
    assert found.total.item() == pytest.approx(2 * 0.2 * sum(contrast) / 4, rel=2e-5)  # both directions
    assert found.state == {}


@pytest.mark.parametrize(("name", "queue_size"), [("moco", 256), ("moco", 12), ("moco", 5), ("moco_v3", 1)])
def test_two_ranks_are_one_process(on_ranks: Callable[..., list[Any]], name: str, queue_size: int) -> None:
    """The queue after the step too, whether eight keys are a part of it, no divisor of it or more than all of it."""
    override = f"objective.queue_size={queue_size}"
    whole = step_of_rank(name, NOW, override)
    assert ("queue" in whole["after"]) == (name == "moco")
    assert_ranks_are_one_process(on_ranks(2, step_of_rank, name, NOW, override), whole)


# The queue


def test_the_queue_begins_as_unit_vectors_that_depend_on_the_seed_alone() -> None:
    config, schemas = config_of("moco"), [source_of("moco").schema]

    def queue(seed: int) -> Tensor:
        return build_objective(
            lambda: Objective(config.objective.options, config.model, schemas), seed, torch.device("cpu")
        ).state_dict()["queue"]

    torch.testing.assert_close(queue(0).norm(dim=1), torch.ones(256))
    assert torch.equal(queue(0), queue(0))
    assert not torch.equal(queue(0), queue(1))


def test_the_newest_keys_come_first_and_the_oldest_fall_off() -> None:
    objective, batch = setup("moco", SMALL_QUEUE)
    before = objective.queue.clone()
    keys = []
    for i in range(6):  # of 4 keys each: the queue is passed through
        losses = objective(batch, NOW)
        assert torch.equal(objective.queue[: 4 * i], torch.cat([before[:0], *reversed(keys)])[:20])  # by no forward
        keys.append(losses.state["keys"])
        objective.after_step(NOW, torch.ones(()), losses.state)
        with torch.no_grad():
            objective.student["projector"].mlp[-1].weight.add_(0.1 * torch.randn(64, 128))
    assert torch.equal(objective.queue, torch.cat(keys[:0:-1]))


def test_nothing_is_enqueued_at_a_skipped_step() -> None:
    objective, batch = setup("moco")
    batch.pixels["global"].pixels[0, 0, 0, 0] = torch.nan
    before = objective.queue.clone()
    losses = objective(batch, NOW)
    objective.after_step(NOW, losses.total.isfinite().float(), losses.state)
    assert torch.equal(objective.queue, before)


def test_the_queue_goes_on_after_a_resume(tmp_path: Path) -> None:
    """The third and fourth step see the keys of the first two."""
    settings = [
        *("train.total_steps=4", "train.global_batch_size=8", "data.n_workers=0", "objective.queue_size=24"),
        *("checkpoint.every_n_steps=2", "optim.warmup_steps=1", "log.every_n_steps=1", "log.report=false"),
        f"run.out_dir={tmp_path}",
    ]
    command = ["train", "--config", str(DEBUG / "moco.yaml"), *settings]
    assert main([*command, "run.name=whole"]) == 0
    assert main([*command, "run.name=resumed"]) == 0
    found = {p.name for p in (tmp_path / "resumed" / "checkpoints").glob("step_*")}
    assert "step_00000002" in found
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000004")
    assert main([*command, "run.name=resumed"]) == 0

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    assert len(losses("whole")) == 4
    assert losses("resumed") == losses("whole")


def test_version_2_learns_beside_a_queue_of_the_same_places() -> None:
    """Once the queue holds keys of these eight places, one other key in eight is almost right: log 5, not 0."""
    objective, batch = setup("moco", "objective.queue_size=32", "objective.momentum=0.9", n=8)
    for _ in range(4):
        objective.after_step({"momentum": 1.0}, torch.ones(()), objective(batch, NOW).state)
    losses = fit(objective, batch, 80)
    assert losses[0] > 0.8 * math.log(33)
    assert math.log(5) - 0.1 < losses[-1] < 0.6 * losses[0]


# Version 3


def test_the_frozen_projection_of_patches_stays_as_it_was_drawn() -> None:
    """In student and teacher, weight decay or not, while everything else moves; it does get a gradient."""
    config = config_of("moco_v3")
    objective, batch = objective_of(config, "moco_v3"), batch_of(config, "moco_v3", 4)
    objective.copy_to_teacher()
    optimizer = build_optimizer(config.optim, objective)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    for step in range(2):
        set_hyper_parameters(optimizer, 1e-2, 0.1, step)
        losses = objective(batch, NOW)
        losses.total.backward()
        assert objective.student["encoder"].patch_embed.conv3d.conv3d.weight.grad.any()
        step_if_finite(optimizer, torch.ones(()))
        optimizer.zero_grad()
        objective.after_step(NOW, torch.ones(()), losses.state)
    still = {name for name, value in objective.state_dict().items() if torch.equal(value, before[name])}
    frozen = {name for name in before if ".conv3d." in name}
    assert len(frozen) == 4  # weight and bias, of student and teacher
    assert frozen <= still
    # The rest moves, but for rows of sensors that the batch does not show.
    rows = {"embed_transmit", "embed_receive", "embed_orbit"}
    assert {name.rpartition(".")[2] for name in still - frozen} <= rows


def test_the_factor_makes_gradients_of_one_size_at_any_temperature() -> None:
    """Far from the solution the gradient of the cross-entropy goes with 1 / temperature."""
    sizes = []
    for temperature in (1.0, 4.0):
        objective, batch = setup("moco_v3", f"objective.temperature={temperature}", n=8)
        objective(batch, NOW).total.backward()
        sizes.append(objective.student["predictor"].mlp[0].weight.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.25)


# Both


@pytest.mark.parametrize("name", VERSIONS)
def test_nothing_reaches_the_teacher(name: str) -> None:
    objective, batch = setup(name)
    losses = objective(batch, NOW)
    losses.total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert not any(v.requires_grad for v in losses.state.values())
    assert set(objective.teacher) == {"encoder", "projector"}
    assert ("predictor" in objective.student) == (name == "moco_v3")


@pytest.mark.parametrize("name", VERSIONS)
def test_autocast_gives_a_loss_in_float32(name: str) -> None:
    objective, batch = setup(name)
    expected = objective(batch, NOW)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(batch, NOW)
    values = (found.total, *found.metrics.values(), *found.state.values())
    assert all(v.dtype == torch.float32 for v in values)
    torch.testing.assert_close(found.total, expected.total, rtol=0.03, atol=0)


def test_version_2_asks_with_the_first_view_and_answers_with_the_second() -> None:
    objective, batch = setup("moco")
    pixels = batch.pixels["global"].pixels.requires_grad_()
    objective(batch, NOW).total.backward()
    touched = pixels.grad.flatten(1).any(1)
    assert touched.tolist() == [True] * 4 + [False] * 4


def test_accumulation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--config", str(DEBUG / "moco.yaml"), f"run.out_dir={tmp_path}"]
    assert main([*arguments, "train.accumulate=2"]) == 2
    assert "train.accumulate 2: the loss of objective moco mixes the samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.version=1", "objective.version: got 1, must be one of 2, 3"),
        ("objective.head_norm=batch", "head_norm must be none with version 2, got batch"),
        ("objective.queue_size=0", "queue_size must be positive"),
        ("objective.temperature=-1", "temperature must be positive"),
        ("objective.momentum=2", r"momentum must be in \[0, 1\], got 2"),
        ("model.mask_token=true", "model.mask_token: no patch is hidden"),
    ],
)
def test_wrong_combinations_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong_combination("moco", override)
