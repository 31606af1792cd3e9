"""SimCLR against loops over views; which views; ranks; what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairing import (
    DEBUG,
    assert_ranks_are_one_process,
    config_of,
    encoded,
    setup,
    source_of,
    step_of_rank,
    unit,
    wrong_combination,
)

from ssl_eo.cli import main
from ssl_eo.objectives.simclr import Objective
from ssl_eo.seeding import numpy_generator


@torch.no_grad()
def _naive(objective: Objective, z: torch.Tensor) -> float:
    """NT-Xent in float64 of projections `[2, B, O]`, by loops over the 2B views."""
    views = unit(z).flatten(0, 1).tolist()  # first views, then second ones
    total = 0.0
    for i, view in enumerate(views):
        exps = [math.exp(math.fsum(a * b for a, b in zip(view, v, strict=True)) / 0.2) for v in views]
        positive = (i + len(views) // 2) % len(views)
        total -= math.log(exps[positive] / (sum(exps) - exps[i]))
    return total / len(views)


@pytest.mark.parametrize("overrides", [(), ("objective.pool=cls",), ("objective.head_norm=none",)])
def test_forward_is_the_formula(overrides: tuple[str, ...]) -> None:
    objective, batch = setup("simclr", *overrides)
    found = objective(batch, {})
    x = encoded(objective.student, batch.pixels["global"], objective.cfg.pool)
    z = objective.student["projector"](x.flatten(0, 1)).unflatten(0, (2, -1))  # normalised over both views
    assert found.total.item() == pytest.approx(_naive(objective, z), rel=2e-5)
    assert torch.equal(found.parts["contrast"], found.total)
    u = unit(z)
    assert found.metrics["alignment"].item() == pytest.approx((u[0] - u[1]).square().sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize(("pairing", "n_sensors"), [("across", 2), ("within", 1)])
def test_positives_are_two_sensors_or_two_crops(pairing: str, n_sensors: int) -> None:
    config, source = config_of("simclr", f"objective.crops.pairing={pairing}"), source_of("simclr")
    views = Objective.views(config.objective.options, config.model, [source.schema])
    for slot in range(5):
        plan = views.plan(source.read(slot), numpy_generator("view", slot))
        assert len(plan["global"]) == 2
        assert plan["local"] == []
        assert len({view.tile for view in plan["global"]}) == n_sensors
        assert plan["global"][0].box != plan["global"][1].box


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_two_ranks_are_one_process(on_ranks: Callable[..., list[Any]], norm: str) -> None:
    override = f"objective.head_norm={norm}"
    whole = step_of_rank("simclr", {}, override)
    assert_ranks_are_one_process(on_ranks(2, step_of_rank, "simclr", {}, override), whole)


def test_autocast_gives_a_loss_in_float32() -> None:
    objective, batch = setup("simclr")
    expected = objective(batch, {})
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(batch, {})
    assert all(v.dtype == torch.float32 for v in (found.total, *found.metrics.values()))
    torch.testing.assert_close(found.total, expected.total, rtol=0.03, atol=0)


def test_accumulation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Micro-batches would have fewer candidates than the batch."""
    arguments = ["train", "--config", str(DEBUG / "simclr.yaml"), f"run.out_dir={tmp_path}"]
    assert main([*arguments, "train.accumulate=2"]) == 2
    assert "train.accumulate 2: the loss of objective simclr mixes the samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.temperature=0", "temperature must be positive, got 0"),
        ("objective.projector_layers=0", "projector_layers must be positive"),
        ("objective.crops.crop.size_px=30", "crops.crop.size_px 30 is not a multiple of model.patch_size 4"),
        ("objective.crops.tiles=[sentinel2]", "no source has sentinel2"),
        ("model.mask_token=true", "model.mask_token: no patch is hidden"),
    ],
)
def test_wrong_combinations_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong_combination("simclr", override)


def test_a_cls_token_that_is_asked_for_must_be_there() -> None:
    wrong_combination("simclr", "model.cls_token=false")
    with pytest.raises(ValueError, match="pool cls needs"):
        wrong_combination("simclr", "model.cls_token=false", "objective.pool=cls")


def test_a_convolution_shows_the_same_bands_in_every_view() -> None:
    with pytest.raises(ValueError, match=r"bands\.n_bands must be null with model\.patch_embed conv"):
        wrong_combination("simclr", "model.patch_embed=conv", "objective.crops.bands.n_bands=[4, 6]")
