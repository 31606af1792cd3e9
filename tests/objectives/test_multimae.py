"""What is particular to many modalities: one ground, one budget, what is missing, what is known of a whole sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairing import batch_of, config_of, source_of
from torch import Tensor

from ssl_eo.config import Config
from ssl_eo.data.render import Renderer
from ssl_eo.data.stacking import cut_to_views, shown_plans
from ssl_eo.data.types import Batch, Sample, Source, Tile, TileSchema
from ssl_eo.distributed import mean_over_ranks, rank, world_size
from ssl_eo.models.vit import EncoderInput
from ssl_eo.objectives.multimae import Objective
from ssl_eo.seeding import numpy_generator
from ssl_eo.sensors import load_sensor
from ssl_eo.train.optim import OptimConfig, param_groups
from ssl_eo.train.parallel import build_objective

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug" / "multimae.yaml"
SIDE, PATCH, N_PATCHES = 32, 8, 16
NORM = "objective.modalities.optical.targets=[values,norm_pix]"
UNCERTAINTY = "objective.balancing=uncertainty"
CONV = "model.patch_embed=conv"
DYNAMIC = "model={patch_embed: dynamic, dynamic: {generator_dim: 16, n_weight_tokens: 4, ffn_dim: 32}}"


def _source() -> Source:
    return source_of("multimae")


def _config(*overrides: str) -> Config:
    return config_of("multimae", NORM, "objective.budget.n_visible=12", *overrides)


def _objective(config: Config, schemas: list[dict[str, TileSchema]] | None = None) -> Objective:
    known = schemas or [dict(_source().schema)]
    objective = build_objective(
        lambda: Objective(config.objective.options, config.model, known), config.run.seed, torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in objective.state_dict().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    assert isinstance(objective, Objective)
    return objective


def _batch(config: Config, n: int = 4) -> Batch:
    return batch_of(config, "multimae", n)


def _setup(*overrides: str, n: int = 4) -> tuple[Objective, Batch]:
    config = _config(*overrides)
    return _objective(config), _batch(config, n)


def _answers(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    assert batch.visible is not None
    tokens = objective._encode(batch.visible, objective._images(batch, batch.visible))
    return objective._decode(tokens, batch.visible)


def _hidden(batch: Batch, name: str) -> Tensor:
    """Patches of a modality that are hidden, `[B, N]`."""
    assert batch.visible is not None
    masks = batch.visible.mask.view(len(batch.keys), -1, N_PATCHES)
    return masks[:, list(batch.visible.rows).index(name)]


def _pixels(mask: Tensor, side: int = SIDE) -> Tensor:
    """`[B, N]` of patches as `[B, 1, H, W]` of pixels."""
    return mask.view(-1, 1, 4, 4).repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)


def _with_hole(batch: Batch, name: str, valid: Tensor, filler: float = 0.0) -> Batch:
    view = batch.pixels[name]
    pixels = torch.where(valid, view.pixels, filler)
    return replace(batch, pixels={**batch.pixels, name: replace(view, pixels=pixels, valid=valid.expand_as(pixels))})


# The formula


def _naive(objective: Objective, batch: Batch) -> dict[str, float]:
    """Losses of patches by loops in float64 over samples, hidden patches and pixels."""
    answers = {name: value.double() for name, value in _answers(objective, batch).items()}
    found = {}
    for output in objective.cfg.outputs:
        modality, view = objective.cfg.modalities[output.modality], batch.pixels[output.modality]
        p, n_classes = PATCH // modality.stride, objective.n_classes[output.modality]
        total = 0.0
        for b in range(len(batch.keys)):
            errors = []
            for patch in _hidden(batch, output.modality)[b].nonzero()[:, 0].tolist():
                row, column = patch // 4 * p, patch % 4 * p
                cut = view.pixels[b, :, row : row + p, column : column + p].double().permute(1, 2, 0)  # [p, p, C]
                pred = answers[output.name][b, patch]
                if modality.kind == "classes":
                    logits = pred.view(p * p, n_classes)
                    for i, label in enumerate(cut.flatten().long().tolist()):
                        errors.append(float(logits[i].logsumexp(0) - logits[i, label]))
                    continue
                target = cut.flatten()
                if output.kind == "norm_pix":
                    target = (target - target.mean()) / (target.var(correction=1) + 1e-6).sqrt()
                difference = pred - target
                errors += (difference.square() if modality.loss == "mse" else difference.abs()).tolist()
            total += sum(errors) / max(len(errors), 1)
        found[output.name] = total / len(batch.keys)
    return found


L1 = "objective.modalities.radar.loss=l1"


@pytest.mark.parametrize("overrides", [(), (L1, CONV), (DYNAMIC,)], ids=str)
@torch.no_grad()
def test_losses_of_patches_are_the_formula(overrides: tuple[str, ...]) -> None:
    objective, batch = _setup(*overrides)
    found, expected = objective(batch, {}), _naive(objective, batch)
    assert set(expected) == {"optical", "norm_optical", "radar", "cover"}
    for name, value in expected.items():
        assert found.parts[name].item() == pytest.approx(value, rel=2e-5), name
    assert set(found.parts) == {*expected, "latitude", "month"}
    torch.testing.assert_close(found.total, torch.stack(list(found.parts.values())).sum())


@torch.no_grad()
def test_weights_and_learned_uncertainties() -> None:
    objective, batch = _setup("objective.modalities.radar.weight=0.25", "objective.image_targets.month.weight=3")
    found = objective(batch, {})
    expected = {"radar": 0.25, "month": 3.0}
    total = sum(expected.get(name, 1.0) * part for name, part in found.parts.items())
    torch.testing.assert_close(found.total, total)

    objective, batch = _setup(UNCERTAINTY)
    found = objective(batch, {})
    s = {name: found.metrics[f"log_variance/{name}"] for name in found.parts}
    total = sum(part * (-s[name]).exp() + s[name] for name, part in found.parts.items())
    torch.testing.assert_close(found.total, total)


@torch.no_grad()
def test_what_is_known_of_samples_is_predicted_where_it_is_known() -> None:
    objective, batch = _setup("objective.image_targets.season={key: month, kind: class, size: 13}")
    assert batch.visible is not None
    batch.meta["season"] = torch.tensor([3.0, torch.nan, 12.0, 0.0])
    batch.meta["latitude"][2] = torch.nan
    tokens = objective._encode(batch.visible, objective._images(batch, batch.visible))
    answers, found = objective.student["image_heads"](tokens.x), objective(batch, {}).parts
    of_latitude = [(answers["latitude"][b] - batch.meta["latitude"][b]).square().mean() for b in (0, 1, 3)]
    torch.testing.assert_close(found["latitude"], torch.stack(of_latitude).sum() / 4)
    of_season = [-answers["season"][b].log_softmax(0)[int(batch.meta["season"][b])] for b in (0, 2, 3)]
    torch.testing.assert_close(found["season"], torch.stack(of_season).sum() / 4)


def test_angles_and_numbers_are_encoded_on_the_host() -> None:
    config = _config("objective.image_targets.sun={key: sun_elevation_deg, mean: [45.0], std: [10.0]}")
    batch, source = _batch(config), _source()
    metas = {sample.key: sample.meta for sample in map(source.read, range(512)) if sample.key in batch.keys}
    for b, key in enumerate(batch.keys):
        latitude, month = math.radians(metas[key]["latitude"]), int(metas[key]["date"][5:7]) * math.pi / 6
        assert batch.meta["latitude"][b].tolist() == pytest.approx([math.sin(latitude), math.cos(latitude)], abs=1e-6)
        assert batch.meta["month"][b].tolist() == pytest.approx([math.sin(month), math.cos(month)], abs=1e-6)
        assert batch.meta["sun"][b].tolist() == pytest.approx([(metas[key]["sun_elevation_deg"] - 45) / 10], abs=1e-5)


# What is seen


def test_all_modalities_show_one_ground() -> None:
    config, source = _config("objective.crop.scale=[0.1, 0.5]"), _source()
    views = Objective.views(config.objective.options, config.model, [source.schema])
    for slot in range(10):
        plans = views.plan(source.read(slot), numpy_generator("view", slot)).views
        ground = {name: [edge * source.schema[plan.tile].gsd_m for edge in plan.box] for name, plan in plans.items()}
        assert set(plans) == {"optical", "radar", "cover"}
        assert len({(plan.flip, plan.rot90) for plan in plans.values()}) == 1
        assert {name: plan.size for name, plan in plans.items()} == {
            "optical": (32, 32),
            "radar": (32, 32),
            "cover": (16, 16),
        }
        for box in ground.values():
            assert box == pytest.approx(ground["optical"])


def test_hidden_patches_reach_no_prediction_and_visible_ones_all() -> None:
    objective, batch = _setup()
    before = _answers(objective, batch)
    hidden = {n: _pixels(_hidden(batch, n), batch.pixels[n].pixels.shape[-1]) for n in batch.pixels}
    changed = {n: replace(v, pixels=torch.where(hidden[n], 3.0, v.pixels)) for n, v in batch.pixels.items()}
    after = _answers(objective, replace(batch, pixels=changed))
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, view in batch.pixels.items():
        seen = (~_hidden(batch, name)).any(1)
        shifted = {**batch.pixels, name: replace(view, pixels=(view.pixels + 1) % 5)}
        after = _answers(objective, replace(batch, pixels=shifted))
        for answer, old in zip(after.values(), before.values(), strict=True):
            assert torch.equal((answer != old).flatten(1).any(1), seen), name


def test_the_encoder_sees_what_it_would_of_one_modality_alone() -> None:
    """A sample whose visible patches are all optical has the tokens of the published encoder."""
    objective, batch = _setup("objective.budget.alpha=[1000, 0.0001, 0.0001]")
    assert batch.visible is not None
    ids = batch.visible.ids_keep
    assert (ids < N_PATCHES).all()
    found = objective._encode(batch.visible, objective._images(batch, batch.visible))
    view = batch.pixels["optical"]
    inputs = EncoderInput(view.pixels, view.channels, view.gsd_m, ids_keep=ids)
    torch.testing.assert_close(found.x, objective.published_encoder()([inputs])[0].x)


@pytest.mark.parametrize("position", ["sincos", "sincos_metres", "sincos_resized", "learned", "rope", "alibi"])
def test_every_kind_of_position_reaches_patches(position: str) -> None:
    objective, batch = _setup(f"model.position={position}", "model.image_size=64")
    assert batch.visible is not None
    images = objective._images(batch, batch.visible)
    tokens = objective._encode(batch.visible, images).x
    visible = batch.visible
    # The same pixels elsewhere: what is in patch i moves to the patch that `to` says.
    reflected, shifted = torch.arange(N_PATCHES).flip(0), (torch.arange(N_PATCHES) + 5) % N_PATCHES
    for to in (reflected, shifted):
        elsewhere = {n: replace(v, pixels=_moved(v.pixels, to)) for n, v in images.items()}
        rows = {n: r // N_PATCHES * N_PATCHES + to[r % N_PATCHES] for n, r in visible.rows.items()}
        ids = visible.ids_keep // N_PATCHES * N_PATCHES + to[visible.ids_keep % N_PATCHES]
        moved = objective._encode(replace(visible, rows=rows, ids_keep=ids), elsewhere).x
        if position == "alibi" and to is reflected:  # only distances matter, and these are the same
            torch.testing.assert_close(moved, tokens)
        else:
            assert (moved - tokens).abs().mean() > 1e-4


def _moved(pixels: Tensor, to: Tensor) -> Tensor:
    """`[B, C, H, W]` with the patch i of 4 x 4 at `to[i]`."""
    p = pixels.shape[-1] // 4
    tiles = pixels.unflatten(3, (4, p)).unflatten(2, (4, p)).transpose(3, 4).flatten(2, 3)  # [B, C, 16, p, p]
    placed = torch.empty_like(tiles)
    placed[:, :, to] = tiles
    return placed.unflatten(2, (4, 4)).transpose(3, 4).flatten(4).flatten(2, 3)


# What is missing


def _schema(name: str, n: int = 40, gsd_m: float = 10.0, optional: bool = True) -> TileSchema:
    sensor = load_sensor(name)
    bands = ("VV", "VH") if name.startswith("sentinel1") else sensor.band_names
    c = len(bands)
    return TileSchema(sensor, bands, sensor.dtype, (n, n), gsd_m, (9.0,) * c, (2.0,) * c, optional=optional)


SCHEMA = {
    "sentinel2_l2a": _schema("sentinel2_l2a"),
    "sentinel1_grd": _schema("sentinel1_grd", n=20, gsd_m=20.0),
    "worldcover": _schema("worldcover"),
}
SPARSE = (
    "objective.modalities.optical.tile=[sentinel2_l2a]",
    "objective.modalities.cover.tile=worldcover",
    "objective.modalities.cover.stride=4",
)


def _sparse_batch(config: Config, *held: tuple[str, ...]) -> Batch:
    """A sample for each entry of `held`, which has these tiles."""
    planned = []
    views = Objective.views(config.objective.options, config.model, [SCHEMA])
    for i, names in enumerate(held):
        rng, tiles = np.random.default_rng(i), {}
        for name in names:
            tile = SCHEMA[name]
            values = rng.integers(1, 9, (len(tile.bands), *(tile.shape or ()))).astype(tile.dtype)
            tiles[name] = Tile(values, tile.bands, tile.gsd_m)
        sample = Sample(str(i), tiles, {}, slot=i)
        plan = views.plan(sample, rng)
        planned.append((cut_to_views(sample, shown_plans(plan), SCHEMA), plan))
    batch = views.collate(planned, 0, 0, np.random.default_rng(9))
    batch.pixels = Renderer([SCHEMA]).render(batch)
    return batch


EVERY = ("sentinel2_l2a", "sentinel1_grd", "worldcover")


@pytest.mark.parametrize("overrides", [(), (CONV,), (DYNAMIC,), (UNCERTAINTY,)], ids=str)
def test_a_modality_that_a_sample_lacks_is_neither_seen_nor_predicted(overrides: tuple[str, ...]) -> None:
    config = _config(*SPARSE, *overrides)
    objective = _objective(config, [SCHEMA])
    batch = _sparse_batch(config, EVERY, EVERY[:1], EVERY[1:], EVERY[::2])
    assert batch.visible is not None
    assert _hidden(batch, "radar")[[1, 3]].all()
    assert _hidden(batch, "optical")[2].all()
    assert _hidden(batch, "cover")[1].all()
    losses = objective(batch, {})
    losses.total.backward()
    assert losses.total.isfinite()
    grads = {name: p.grad for name, p in objective.student.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    # A batch of which no sample has radar: every parameter has a gradient all the same, zero for what is of radar.
    objective.zero_grad()
    batch = _sparse_batch(config, EVERY[:1], EVERY[::2])
    assert "radar" not in batch.pixels
    losses = objective(batch, {})
    losses.total.backward()
    assert losses.parts["radar"].item() == 0
    for name, parameter in objective.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if "outputs.radar" in name or "embeddings.radar" in name:
            assert not parameter.grad.any(), name


def test_a_sample_that_lacks_a_modality_changes_no_other_sample() -> None:
    config = _config(*SPARSE)
    objective = _objective(config, [SCHEMA])
    both, alone = _sparse_batch(config, EVERY, EVERY[:1]), _sparse_batch(config, EVERY)
    first = {name: value[:1] for name, value in _answers(objective, both).items()}
    torch.testing.assert_close(first, _answers(objective, alone))


def test_no_data_reaches_neither_loss_nor_gradient() -> None:
    """On the hidden side; a NaN target is a case of it."""
    objective, batch = _setup()
    generator, results = torch.Generator().manual_seed(0), []
    valid = {
        name: torch.rand(view.pixels.shape, generator=generator).gt(0.3)
        | ~_pixels(_hidden(batch, name), view.pixels.shape[-1])
        for name, view in batch.pixels.items()
    }
    for filler in (0.0, 1e6, torch.nan):
        spoilt = batch
        for name in batch.pixels:
            spoilt = _with_hole(spoilt, name, valid[name], filler)
        objective.zero_grad()
        losses = objective(spoilt, {})
        losses.total.backward()
        grads = [p.grad.clone() for p in objective.student.parameters() if p.grad is not None]
        results.append((losses.total.detach(), grads))
    for total, grads in results:
        assert total.isfinite()
        assert torch.equal(total, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


def test_the_gradient_is_finite_where_all_of_a_modality_is_visible() -> None:
    """A mean over no masked patch is 0 / 0; left out of the mean over samples, it still makes all gradients NaN."""
    objective, batch = _setup("objective.budget={n_visible: 16, alpha: [0.0001, 1000, 0.0001]}")
    assert not _hidden(batch, "radar").any()
    losses = objective(batch, {})
    losses.total.backward()
    assert losses.parts["radar"].item() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.student.parameters())
    objective, batch = _setup(
        "objective.budget={n_visible: 16, alpha: [0.0001, 1000, 0.0001]}", "objective.loss_on_visible=true"
    )
    assert objective(batch, {}).parts["radar"].item() > 0


def test_a_modality_may_be_predicted_alone_or_seen_alone() -> None:
    only = ("objective.modalities.radar.input=false", "objective.modalities.cover.targets=[]")
    objective, batch = _setup(*only)
    assert batch.visible is not None
    assert list(batch.visible.rows) == ["optical", "cover"]
    losses = objective(batch, {})
    assert set(losses.parts) == {"optical", "norm_optical", "radar", "latitude", "month"}
    losses.total.backward()
    assert all(p.grad is not None for p in objective.student.parameters())
    pred, view = _answers(objective, batch)["radar"], batch.pixels["radar"]
    target = view.pixels.unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 3, 5, 1).reshape(4, 16, -1)
    torch.testing.assert_close(losses.parts["radar"], (pred - target).square().mean().detach())  # of every patch


def test_whole_samples_may_be_all_that_is_predicted() -> None:
    nothing = tuple(f"objective.modalities.{name}.targets=[]" for name in ("optical", "radar", "cover"))
    objective, batch = _setup(*nothing)
    losses = objective(batch, {})
    assert set(losses.parts) == {"latitude", "month"}
    losses.total.backward()
    assert all(p.grad is not None for p in objective.student.parameters())
    assert not objective.preview(batch)


# Ranks


def _step_of_rank(*overrides: str) -> dict[str, Any]:
    objective, batch = _setup(*overrides, n=8)
    if world_size() == 1 or rank() == 0:  # the first samples lose most of their radar, and one its latitude
        valid = torch.ones_like(batch.pixels["radar"].pixels, dtype=torch.bool)
        valid[:2], valid[2, :, :20] = False, False
        batch = _with_hole(batch, "radar", valid)
        batch.meta["latitude"][1] = torch.nan
    losses = objective(batch, {})
    losses.total.backward()
    return {
        "keys": batch.keys,
        "mask": batch.visible.mask if batch.visible else None,
        "total": mean_over_ranks(losses.total.detach()),
        "grads": {name: mean_over_ranks(p.grad) for name, p in objective.student.named_parameters()},
    }


@pytest.mark.parametrize("overrides", [(), (UNCERTAINTY, CONV)], ids=str)
def test_two_ranks_are_one_process_though_one_knows_less(
    on_ranks: Callable[..., list[Any]], overrides: tuple[str, ...]
) -> None:
    whole = _step_of_rank(*overrides)
    ranks = on_ranks(2, _step_of_rank, *overrides)
    assert [*ranks[0]["keys"], *ranks[1]["keys"]] == whole["keys"]
    assert torch.equal(torch.cat([found["mask"] for found in ranks]), whole["mask"])
    for found in ranks:
        torch.testing.assert_close(found["total"], whole["total"], rtol=1e-5, atol=0)
        for name, grad in whole["grads"].items():
            torch.testing.assert_close(
                found["grads"][name], grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


# Pictures, precision, and what is refused


def test_preview_keeps_what_is_visible() -> None:
    objective, batch = _setup()
    pictures = objective.preview(batch)
    visible = ~_pixels(_hidden(batch, "optical")).expand_as(pictures["input"])
    assert torch.equal(pictures["reconstruction"][visible], pictures["input"][visible])
    assert pictures["masked"].isnan().equal(~visible)
    assert not objective.preview(replace(batch, pixels={}))


def test_autocast_gives_losses_in_float32() -> None:
    objective, batch = _setup()
    expected = objective(batch, {})
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(batch, {})
    for name, part in {**found.parts, "total": found.total}.items():
        assert part.dtype == torch.float32, name
    torch.testing.assert_close(found.total, expected.total, rtol=0.02, atol=0)


def test_only_what_multiplies_decays() -> None:
    objective = _objective(_config(UNCERTAINTY))
    named = dict(objective.student.named_parameters())
    groups = param_groups(named.items(), 4, OptimConfig())
    decays = {id(p) for group in groups if group["weight_decay_multiplier"] for p in group["params"]}
    free = ("bias", "gain", "token", "codes", "log_variance", "query")
    for name, parameter in named.items():
        if name.startswith(("decoders.", "embeddings.", "balance.", "image_heads.")) and "norm" not in name:
            assert (id(parameter) in decays) != name.endswith(free), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.crop.size_px=30", "objective.crop.size_px 30 is not a multiple of model.patch_size 8"),
        ("objective.crop.jitter_prob=0.5", "crop.jitter_prob must be 0"),
        ("objective.budget.n_visible=49", "objective.budget.n_visible 49 is more than the 3 x 16 patches"),
        ("objective.budget.alpha=[1.0,2.0]", "objective.budget.alpha has 2 values for the 3 modalities that are seen"),
        ("objective.modalities.radar.tile=naip", "objective.modalities.radar.tile: no source has naip"),
        ("objective.modalities.radar.bands=[VW]", "objective.modalities.radar.bands: sentinel1_grd has no VW"),
        (
            "objective.modalities.radar.kind=classes",
            "objective.modalities.radar.kind is classes, but sentinel1_grd is no",
        ),
        ("objective.modalities.cover.kind=pixels", "stride is for kind classes, got 2 for pixels"),
        (
            "objective.modalities.cover.stride=3",
            "objective.modalities.cover.stride 3 does not divide model.patch_size 8",
        ),
        ("objective.modalities.cover.standardise=true", "standardise and the target norm_pix are for kind pixels"),
        ("objective.modalities.radar={tile: sentinel1_grd, input: false, targets: []}", "would have no use"),
        ("objective.modalities.radar.weight=-1", "weight must not be negative"),
        ("objective.modalities.norm_optical={tile: sentinel1_grd}", "two targets are named norm_optical"),
        ("objective.image_targets.radar={key: month}", "two targets are named radar"),
        ("objective.image_targets.month.period=0", "period and std positive"),
        ("objective.image_targets.latitude.mean=[1.0,2.0]", "mean must have as many values as size says, 1, got 2"),
        ("model.mask_token=true", "model.mask_token: hidden patches never reach the encoder of multimae"),
        ("model={patch_embed: conv, conv: {padding: 1}}", "model.conv.padding must be 0"),
    ],
)
def test_wrong_combinations_are_refused(override: str, message: str) -> None:
    schemas = [_source().schema]
    with pytest.raises(ValueError, match=message):  # noqa: PT012 - found at one of three places, all before training
        config = _config(override)
        Objective.views(config.objective.options, config.model, schemas)
        Objective(config.objective.options, config.model, schemas)


def test_uncertainty_learns_all_weights() -> None:
    with pytest.raises(ValueError, match="leave every weight at 1"):
        _config(UNCERTAINTY, "objective.modalities.radar.weight=2")


def test_a_sample_that_cannot_fill_the_budget_is_replaced() -> None:
    config = _config(*SPARSE, "objective.budget.n_visible=20")
    with pytest.raises(ValueError, match=r"its 1 modalities of 16 patches are too few .* 20 \(it has sentinel2_l2a\)"):
        _sparse_batch(config, EVERY[:1])
