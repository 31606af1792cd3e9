"""Masked autoencoding of series: patches of all dates, what is told of when and where, tubelets, ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pairing import assert_ranks_are_one_process, setup, step_of_rank, wrong_combination
from torch import Tensor

from ssl_eo.data.types import Batch, PixelBatch
from ssl_eo.objectives.mae import Objective

NAME = "mae_temporal"
LINEAR = ("objective.output=linear", "model.patch_embed=conv")
TUBELET = (*LINEAR, "model.tubelet=3", "model.time_encoding=false", "objective.series.drop_dates_prob=0")
UNTOLD = (
    *("model.time_encoding=false", "model.location_encoding=false"),
    *("objective.series.drop_dates_prob=0", "objective.series.drop_location_prob=0"),
)


def loop_loss(objective: Objective, batch: Batch, pred: Tensor, tubelet: int = 1) -> float:
    """In float64, patch by patch: the dates of a batch are rows, views outermost."""
    mask, n_samples = batch.masks["image"], len(batch.keys)
    rows = batch.pixels["image"].pixels.double()  # [T*B, C, H, W]
    total, n_patches = 0.0, 16
    for b in range(n_samples):
        for m, patch in enumerate(mask.ids_masked[b].tolist()):
            step, place = divmod(patch, n_patches)
            y, x = place // 4 * 8, place % 4 * 8
            dates = [rows[(step * tubelet + s) * n_samples + b, :, y : y + 8, x : x + 8] for s in range(tubelet)]
            cut = torch.stack(dates, dim=1).flatten(0, 1)  # [C*s, 8, 8]
            values = cut.permute(1, 2, 0).reshape(-1)
            values = (values - values.mean()) / (values.var(correction=1) + objective.cfg.norm_pix_eps).sqrt()
            total += float((pred[b, m] - values).square().mean())
    return total / mask.ids_masked.numel()


@pytest.mark.parametrize("overrides", [(), UNTOLD, LINEAR, TUBELET], ids=["told", "untold", "linear", "tubelet"])
def test_loss_and_gradient_against_a_loop(overrides: tuple[str, ...]) -> None:
    objective, batch = setup(NAME, *overrides, n=4)
    objective = objective.double()
    batch.pixels = {"image": replace(batch.pixels["image"], pixels=batch.pixels["image"].pixels.double())}
    mask = batch.masks["image"]
    loss = objective(batch, {}).total
    view = objective._view(batch)
    features = objective._decode(view, batch.meta, mask.ids_keep, mask.ids_masked)
    pred = objective.student["output"](features, view.channels)
    expected = loop_loss(objective, batch, pred.detach(), objective.tubelet)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)  # the loss itself is taken in float32
    (grad,) = torch.autograd.grad(loss, pred_leaf := objective.student["decoder"].norm.bias)
    step = torch.zeros_like(pred_leaf)
    step[3] = 1e-4
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            pred_leaf.add_(sign * step)
            features = objective._decode(view, batch.meta, mask.ids_keep, mask.ids_masked)
            moved.append(
                loop_loss(objective, batch, objective.student["output"](features, view.channels), objective.tubelet)
            )
            pred_leaf.sub_(sign * step)
    assert float(grad[3]) == pytest.approx((moved[0] - moved[1]) / 2e-4, rel=1e-3, abs=1e-7)


def test_patches_of_all_dates_are_hidden() -> None:
    objective, batch = setup(NAME, n=4)
    mask = batch.masks["image"].mask
    assert mask.shape == (4, 48)
    assert mask.sum(1).tolist() == [36] * 4
    by_date = mask.view(4, 3, 16).sum(2)
    assert (by_date != by_date[0, 0]).any()  # each patch by itself
    assert batch.pixels["image"].pixels.shape == (12, 12, 32, 32)
    losses = objective(batch, {})
    assert set(losses.metrics) == {"known_dates", "known_location"}


def test_dates_of_a_sample_show_the_same_ground() -> None:
    _, batch = setup(NAME, n=4)
    boxes = torch.cat([view.box for view in batch.views["image"]])
    turns = torch.cat([view.rot90 for view in batch.views["image"]])
    by_date = boxes.view(3, 4, 4)
    assert torch.equal(by_date[0], by_date[1])
    assert torch.equal(by_date[0], by_date[2])
    assert torch.equal(turns.view(3, 4)[0], turns.view(3, 4)[2])
    assert (by_date[0, 0] != by_date[0, 1]).any()
    days = batch.meta["dates"][..., 0] * 366 + batch.meta["dates"][..., 1]
    known = days[days.isfinite().all(1)]
    assert len(known) > 0
    assert (known.diff(dim=1) > 0).all()


def changed(batch: Batch, meta: Mapping[str, Tensor]) -> Batch:
    return replace(batch, meta=dict(meta))


def test_when_and_where_matter_and_unknown_ones_do_not() -> None:
    objective, batch = setup(NAME, "objective.series.drop_dates_prob=0", "objective.series.drop_location_prob=0", n=4)
    told = objective(batch, {})
    unknown = {key: torch.full_like(value, torch.nan) for key, value in batch.meta.items()}
    untold = objective(changed(batch, unknown), {})
    assert float((told.total - untold.total).detach().abs()) > 1e-5
    assert float(told.metrics["known_dates"]) == 1.0
    assert float(untold.metrics["known_dates"]) == 0.0
    untold.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.student.parameters())
    for key in batch.meta:
        one = objective(changed(batch, {**batch.meta, key: unknown[key]}), {})
        assert abs(float((one.total - told.total).detach())) > 1e-7


def test_always_dropped_is_never_told() -> None:
    always = ("objective.series.drop_dates_prob=1", "objective.series.drop_location_prob=1")
    _, batch = setup(NAME, *always, n=4)
    assert all(value.isnan().all() for value in batch.meta.values())
    _, batch = setup(NAME, *UNTOLD, n=4)
    assert batch.meta == {}


def test_targets_of_gradients_and_statistics_are_those_of_each_date() -> None:
    objective, batch = setup(NAME, "objective.extra_targets=[statistics,gradients]", n=4)
    single, _ = setup("mae", "objective.extra_targets=[statistics,gradients]", n=4)
    view, ids = objective._view(batch), torch.arange(48).expand(4, -1)
    found = objective._targets(view, ids)
    rows = batch.pixels["image"]
    for date in range(3):
        cut = slice(4 * date, 4 * date + 4)
        valid = None if rows.valid is None else rows.valid[cut]
        one = PixelBatch(rows.pixels[cut], rows.of_one_sensor().channels, rows.gsd_m[cut], valid)
        expected = single._targets(one, torch.arange(16).expand(4, -1))
        for name, (values, _) in expected.items():
            torch.testing.assert_close(found[name][0][:, 16 * date : 16 * date + 16], values, msg=name)


@pytest.mark.parametrize("overrides", [(), TUBELET, ("objective.norm_pix=false",)], ids=["dates", "tubelet", "raw"])
def test_pictures_have_all_dates_one_below_the_other(overrides: tuple[str, ...]) -> None:
    objective, batch = setup(NAME, *overrides, n=4)
    pictures = objective.preview(batch)
    assert {tuple(p.shape) for p in pictures.values()} == {(4, 12, 96, 32)}
    rows = batch.pixels["image"].pixels
    for date in range(3):
        assert torch.equal(pictures["input"][:, :, 32 * date : 32 * date + 32], rows[4 * date : 4 * date + 4])
    seen = ~pictures["masked"].isnan()
    assert torch.equal(pictures["reconstruction"][seen], pictures["input"][seen])
    assert 0.2 < seen.float().mean() < 0.3


@pytest.mark.parametrize("overrides", [(), TUBELET], ids=["dates", "tubelet"])
def test_two_ranks_equal_one_process(on_ranks: Callable[..., list[Any]], overrides: tuple[str, ...]) -> None:
    whole = step_of_rank(NAME, {}, *overrides)
    assert_ranks_are_one_process(on_ranks(2, step_of_rank, NAME, {}, *overrides), whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("objective.series.n_dates=4",), r"n_dates is 4: objective.tile must name"),
        (("objective.series.n_dates=2", *TUBELET), "model.tubelet 3 does not divide"),
        ((*TUBELET, "objective.output=spectral"), "needs objective.output: linear"),
        ((*TUBELET, "objective.extra_targets=[gradients]"), "no gradients in extra_targets"),
        ((*UNTOLD, "model.position=sincos"), "nothing would tell the 3 dates"),
        (("objective.decoder.embed_dim=40",), "decoder.embed_dim must be divisible by 16"),
        (("model.location_encoding=false",), r"drop_location_prob is 0\.1, but nothing is told"),
        (("model.time_encoding=false",), r"drop_dates_prob is 0\.1, but nothing is told"),
    ],
)
def test_wrong_combinations_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong_combination(NAME, *overrides)
