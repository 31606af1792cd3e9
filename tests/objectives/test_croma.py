"""CROMA against loops over samples and patches; what each view shows and hides; ranks; both encoders out of a run."""

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

from ssl_eo.cli import main
from ssl_eo.config import Config
from ssl_eo.data.loader import Loader
from ssl_eo.data.opening import open_source
from ssl_eo.data.render import Renderer
from ssl_eo.data.stacking import cut_to_views, shown_plans
from ssl_eo.data.types import Batch, PixelBatch, Sample, Source, Tile, TileSchema
from ssl_eo.distributed import mean_over_ranks
from ssl_eo.hub import BundleEncoder, BundlePair, load_bundle, write_pair_bundle
from ssl_eo.models.vit import EncoderInput
from ssl_eo.objectives.croma import Objective
from ssl_eo.sensors import load_sensor
from ssl_eo.train.export import load_encoder
from ssl_eo.train.initial import InitialWeights, begin_from
from ssl_eo.train.parallel import build_objective

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug" / "croma.yaml"
GROUPS = ("optical", "radar")
CONV = ("model.patch_embed=conv", "objective.output=linear")


def _source() -> Source:
    return source_of("croma")


def _config(*overrides: str) -> Config:
    return config_of("croma", *overrides)


def _objective(config: Config) -> Objective:
    """No bias is zero, so that a forgotten one shows."""
    objective = build_objective(
        lambda: Objective(config.objective.options, config.model, [_source().schema]), 0, torch.device("cpu")
    )
    assert isinstance(objective, Objective)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in objective.student.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return objective


def _batch(config: Config, n: int = 4) -> Batch:
    return batch_of(config, "croma", n)


def _setup(*overrides: str, n: int = 4) -> tuple[Objective, Batch]:
    config = _config(*overrides)
    return _objective(config), _batch(config, n)


# --- the formula ------------------------------------------------------------------------------------------------------


def _cut(view: PixelBatch, b: int, patch: int) -> tuple[Tensor, Tensor]:
    """Values of one patch in the order row, column, channel, and which of them were measured."""
    row, column = patch // 4 * 8, patch % 4 * 8
    valid = torch.ones_like(view.pixels, dtype=torch.bool) if view.valid is None else view.valid
    values, known = (
        x[b, :, row : row + 8, column : column + 8].permute(1, 2, 0).reshape(-1) for x in (view.pixels, valid)
    )
    return values.double(), known


def _naive_targets(batch: Batch, norm_pix: str, b: int, patch: int) -> dict[str, tuple[Tensor, Tensor]]:
    cuts = {group: _cut(batch.pixels[group], b, patch) for group in GROUPS}
    targets = {}
    for group, (values, known) in cuts.items():
        over = {"joint": GROUPS, "group": (group,), "none": ()}[norm_pix]
        mean, std = torch.tensor(0.0), torch.tensor(1.0)
        if over:
            measured = torch.cat([cuts[g][0][cuts[g][1]] for g in over])
            mean, std = measured.mean(), (measured.var() + 1e-6).sqrt()
        targets[group] = ((values - mean) / std, known)
    return targets


@torch.no_grad()
def _naive(objective: Objective, batch: Batch) -> dict[str, float]:
    """The losses in float64 by loops, from tokens, heads and the decoder called one by one."""
    cfg, student, n = objective.cfg, objective.student, len(batch.keys)
    tokens, pooled = {}, {}
    for group, name in (("optical", "encoder"), ("radar", "radar_encoder")):
        view, mask = batch.pixels[group], batch.masks[group]
        (tokens[group],) = student[name]([EncoderInput(view.pixels, view.channels, ids_keep=mask.ids_keep)])
        pooled[group] = student["pair_head"].get_submodule(group)(student[f"{group}_head"](tokens[group])).double()
    scale = student["pair_head"].logit_scale.double().exp()
    cosine = [[float(torch.cosine_similarity(o, r, dim=0) * scale) for r in pooled["radar"]] for o in pooled["optical"]]
    contrast = 0.0
    for i in range(n):
        contrast -= cosine[i][i] - math.log(sum(map(math.exp, cosine[i])))
        contrast -= cosine[i][i] - math.log(sum(math.exp(row[i]) for row in cosine))
    found = {"contrast": contrast / (2 * n)}

    ids = {group: batch.masks[group].ids_keep for group in GROUPS}
    joint = student["cross_encoder"](tokens["radar"], tokens["optical"], ids["radar"], ids["optical"])
    features = student["decoder"](joint, ids["radar"], batch.masks["radar"].ids_masked, all_patches=True)
    for group in GROUPS:
        pred = student[f"{group}_output"](features, batch.pixels[group].channels).double()
        errors = []
        for b in range(n):
            for patch in range(16):
                if batch.masks[group].mask[b, patch]:
                    target, known = _naive_targets(batch, cfg.norm_pix, b, patch)[group]
                    errors.append(float(((pred[b, patch] - target) * known).square().mean()))
        found[group] = float(np.mean(errors))
    return {
        **found,
        "total": cfg.contrast_weight * found["contrast"] + cfg.mae_weight * (found["optical"] + found["radar"]),
    }


def _with_holes(batch: Batch) -> Batch:
    """A tenth of the radar pixels, and none of the optical ones, hold no data."""
    view = batch.pixels["radar"]
    valid = torch.rand(view.pixels.shape, generator=torch.Generator().manual_seed(0)) > 0.1
    pixels = {**batch.pixels, "radar": replace(view, pixels=torch.where(valid, view.pixels, 0.0), valid=valid)}
    return replace(batch, pixels=pixels)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("norm_pix", ["joint", "group", "none"])
def test_forward_is_the_formula(norm_pix: str, holes: bool) -> None:
    objective, batch = _setup(
        f"objective.norm_pix={norm_pix}", "objective.contrast_weight=0.7", "objective.mae_weight=1.3"
    )
    batch = _with_holes(batch) if holes else batch
    found = objective(batch, {})
    values = {**found.parts, "total": found.total}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(_naive(objective, batch), rel=2e-5)
    assert found.metrics["temperature"].item() == pytest.approx(
        math.exp(-objective.student["pair_head"].logit_scale.item())
    )


def test_no_data_reaches_neither_loss_nor_gradient() -> None:
    objective, batch = _setup("objective.norm_pix=joint")
    batch = _with_holes(batch)
    view, hidden = batch.pixels["radar"], batch.masks["radar"].mask
    hidden = hidden.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert view.valid is not None
    results = []
    for filler in (0.0, 1e6):
        shown = replace(view, pixels=torch.where(view.valid | ~hidden, view.pixels, filler))
        objective.zero_grad()
        losses = objective(replace(batch, pixels={**batch.pixels, "radar": shown}), {})
        losses.total.backward()
        grads = [p.grad.clone() for p in objective.student.parameters() if p.grad is not None]
        results.append((losses.total.detach(), grads))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


# --- who sees what ----------------------------------------------------------------------------------------------------


def test_hidden_pixels_of_neither_view_reach_the_prediction() -> None:
    objective, batch = _setup()
    before = _predicted(objective, batch)
    for group in GROUPS:
        view = batch.pixels[group]
        hidden = batch.masks[group].mask.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        batch.pixels[group] = replace(view, pixels=torch.where(hidden, 7.0, view.pixels))
    after = _predicted(objective, batch)
    assert all(torch.equal(before[group], after[group]) for group in GROUPS)


@torch.no_grad()
def _predicted(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    return objective._predict(batch, {group: objective._encode_visible(batch, group) for group in GROUPS})


def test_each_view_helps_to_predict_the_other() -> None:
    objective, batch = _setup()
    before = _predicted(objective, batch)
    for group, other in (GROUPS, GROUPS[::-1]):
        view = batch.pixels[group]
        changed = replace(batch, pixels={**batch.pixels, group: replace(view, pixels=view.pixels.flip(0))})
        assert (_predicted(objective, changed)[other] - before[other]).abs().max() > 1e-3


def test_each_group_is_scored_where_its_own_view_is_hidden() -> None:
    """Also where the other view is visible: the decoder answers for all patches, in the order of the grid."""
    objective, batch = _setup()
    caught: dict[str, Tensor] = {}

    def keep(group: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            output.retain_grad()
            caught[group] = output

        return hook

    for group in GROUPS:
        objective.student[f"{group}_output"].register_forward_hook(keep(group))
    objective(batch, {}).total.backward()
    for group in GROUPS:
        grad = caught[group].grad
        assert grad is not None
        assert torch.equal(grad.abs().sum(-1) > 0, batch.masks[group].mask)
    both = batch.masks["optical"].mask & ~batch.masks["radar"].mask
    assert both.any()


def test_both_views_show_one_ground_and_hide_other_patches() -> None:
    config, source = _config(), _source()
    views = Objective.views(config.objective.options, config.model, [source.schema])
    plans = [views.plan(source.read(i), np.random.default_rng(i)) for i in range(6)]
    for plan in plans:
        optical, radar = (plan.views[group] for group in GROUPS)
        assert (optical.tile, radar.tile) == ("sentinel2_l2a", "sentinel1_grd")
        assert (optical.box, optical.flip, optical.rot90) == (radar.box, radar.flip, radar.rot90)  # both of 10 m
        assert [int(plan.hidden[group].sum()) for group in GROUPS] == [8, 8]
    assert any((plan.hidden["optical"] != plan.hidden["radar"]).any() for plan in plans)
    assert {plan.views["optical"].rot90 for plan in plans} > {0}


def _tile_schema(name: str, bands: list[str], size: int, gsd_m: float, optional: bool = False) -> TileSchema:
    n = len(bands)
    sensor = load_sensor(name.partition("@")[0])
    dtype = "float32" if name.startswith("sentinel1") else "uint16"
    return TileSchema(sensor, tuple(bands), dtype, (size, size), gsd_m, (9.0,) * n, (2.0,) * n, optional)


def _seasons() -> dict[str, TileSchema]:
    """Two seasons of Sentinel-2 in two resolutions, and of Sentinel-1, as SSL4EO-S12 has them."""
    schema = {}
    for season in range(2):
        schema[f"sentinel2_l2a@10m_{season}"] = _tile_schema("sentinel2_l2a", ["B02", "B03", "B04"], 64, 10.0)
    for season in range(2):
        schema[f"sentinel2_l2a@20m_{season}"] = _tile_schema("sentinel2_l2a", ["B05", "B11"], 32, 20.0)
    for season in range(2):
        schema[f"sentinel1_grd@{season}"] = _tile_schema("sentinel1_grd", ["VV", "VH"], 64, 10.0, optional=season == 1)
    return schema


def _place(schema: dict[str, TileSchema], rng: np.random.Generator) -> Sample:
    tiles = {}
    for name, known in schema.items():
        assert known.shape is not None
        shape = (len(known.bands), *known.shape)
        pixels = rng.integers(1, 99, shape).astype(known.dtype)
        tiles[name] = Tile(pixels, known.bands, known.gsd_m, f"2020-0{name[-1]}-01")
    return Sample("place", tiles)


@pytest.mark.parametrize("overrides", [(), CONV], ids=["any sensor", "conv"])
def test_resolutions_of_one_image_are_shown_together_and_seasons_are_drawn(overrides: tuple[str, ...]) -> None:
    schema, rng = _seasons(), np.random.default_rng(0)
    config = _config(*overrides, "objective.optical=sentinel2_l2a")
    views = Objective.views(config.objective.options, config.model, [schema])
    planned, shown = [], set()
    for _ in range(8):
        sample = _place(schema, rng)
        plan = views.plan(sample, rng)
        planned.append((cut_to_views(sample, shown_plans(plan), schema), plan))
        parts = plan.views["optical"]
        assert isinstance(parts, tuple)
        assert [part.tile[:17] for part in parts] == ["sentinel2_l2a@10m", "sentinel2_l2a@20m"]
        assert parts[0].tile[-1] == parts[1].tile[-1]
        assert parts[0].box == pytest.approx([2 * edge for edge in parts[1].box])
        shown |= {(parts[0].tile[-1], plan.views["radar"].tile[-1])}
    assert len(shown) > 2
    batch = views.collate(planned, 0, 0, rng)
    batch.pixels = Renderer([schema]).render(batch)
    assert batch.pixels["optical"].pixels.shape == (8, 5, 32, 32)
    objective = build_objective(
        lambda: Objective(config.objective.options, config.model, [schema]), 0, torch.device("cpu")
    )
    assert isinstance(objective, Objective)
    assert objective.shown["optical"][0].bands == ("B02", "B03", "B04", "B05", "B11")
    assert objective(batch, {}).total.isfinite()
    lacking = replace(sample, tiles={n: t for n, t in sample.tiles.items() if not n.startswith("sentinel1")})
    with pytest.raises(ValueError, match=r"it has none of the tiles of objective\.radar, but sentinel2_l2a@10m_0"):
        views.plan(lacking, rng)


def test_a_group_may_be_several_sensors() -> None:
    """With other numbers of bands: channels that only fill up reach neither loss nor gradient."""
    sensors = "[sentinel2_l2a, 'landsat8_9:oli', 'sentinel1_grd:vv_vh']"
    config = _config(
        "objective.optical=[sentinel2_l2a, landsat8_9]",
        f"data.sources=[{{name: synthetic, n_samples: 64, sensors: {sensors}, extent_m: 480.0}}]",
    )
    source = open_source(config.data.sources[0])
    views = Objective.views(config.objective.options, config.model, [source.schema])
    with Loader(config.data, [source], views, seed=0, global_batch_size=8, total_steps=1) as loader:
        batch = next(iter(loader))
    batch.pixels = Renderer([source.schema]).render(batch)
    optical = batch.pixels["optical"]
    assert optical.channels.valid is not None
    assert set(optical.channels.valid.sum(1).tolist()) == {7, 12}
    objective = build_objective(
        lambda: Objective(config.objective.options, config.model, [source.schema]), 0, torch.device("cpu")
    )
    losses = []
    for filler in (0.0, 5.0):
        filled = torch.where(optical.channels.valid[:, :, None, None], optical.pixels, filler)
        batch.pixels["optical"] = replace(optical, pixels=filled)
        losses.append(objective(batch, {}).total)
    losses[0].backward()
    assert losses[0].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.student.parameters())
    torch.testing.assert_close(losses[1], losses[0])


# --- the learned temperature ------------------------------------------------------------------------------------------


def test_the_temperature_is_held_above_its_bound_after_the_step() -> None:
    objective, batch = _setup()
    scale = objective.student["pair_head"].logit_scale
    for value, expected in ((6.0, math.log(100)), (2.0, 2.0), (-3.0, -3.0)):
        scale.data.fill_(value)
        losses = objective(batch, {})
        losses.total.backward()
        assert scale.grad is not None
        assert scale.grad != 0  # also beyond the bound
        objective.after_step({}, torch.zeros(()), losses.state)
        assert scale.item() == value  # a step that was skipped
        objective.after_step({}, torch.ones(()), losses.state)
        assert scale.item() == pytest.approx(expected)


# --- ranks ------------------------------------------------------------------------------------------------------------


def _step_of_rank() -> dict[str, Any]:
    """Loss and gradient as DDP averages them, and what this rank's part was."""
    objective, batch = _setup(n=8)
    losses = objective(batch, {})
    losses.total.backward()
    grads = {name: mean_over_ranks(p.grad) for name, p in objective.student.named_parameters()}
    return {"keys": batch.keys, "total": mean_over_ranks(losses.total.detach()), "grads": grads}


def test_two_ranks_are_one_process(on_ranks: Callable[..., list[Any]]) -> None:
    whole = _step_of_rank()
    ranks = on_ranks(2, _step_of_rank)
    assert [*ranks[0]["keys"], *ranks[1]["keys"]] == whole["keys"]
    for found in ranks:
        torch.testing.assert_close(found["total"], whole["total"], rtol=1e-5, atol=0)
        for name, grad in whole["grads"].items():
            torch.testing.assert_close(
                found["grads"][name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", GROUPS)
def test_either_encoder_may_be_the_published_one(published: str) -> None:
    objective, batch = _setup(f"objective.published={published}", *CONV)
    depth, n_channels = {"optical": (4, 12), "radar": (2, 2)}[published]
    encoder = objective.published_encoder()
    assert (len(encoder.blocks), encoder.n_channels) == (depth, n_channels)
    assert next(iter(batch.pixels)) == published
    pictures = objective.preview(batch)
    assert pictures["input"].shape == (4, n_channels, 32, 32)
    hidden = batch.masks[published].mask.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    visible = (~hidden).expand_as(pictures["input"])
    assert torch.equal(pictures["reconstruction"][visible], pictures["input"][visible])
    assert pictures["masked"].isnan().equal(~visible)
    assert not pictures["reconstruction"].isnan().any()


def test_one_encoder_or_all_of_it_come_out_of_a_run(tmp_path: Path) -> None:
    few = ("train.total_steps=2", "train.global_batch_size=8", "optim.warmup_steps=1", "checkpoint.every_n_steps=2")
    run = ("run.name=run", f"run.out_dir={tmp_path}", "data.n_workers=0", "log.report=false", *few, *CONV)
    assert main(["train", "--config", str(DEBUG), *run]) == 0
    for flags, out in (((), "one"), (("--whole",), "all")):
        assert main(["export", "--checkpoint", str(tmp_path / "run"), *flags, "--out", str(tmp_path / out)]) == 0
    objective = load_encoder(tmp_path / "run").objective
    assert isinstance(objective, Objective)
    one, whole = load_bundle(tmp_path / "one"), load_bundle(tmp_path / "all")
    assert isinstance(one, BundleEncoder)
    assert isinstance(whole, BundlePair)
    assert list(one.inputs) == ["sentinel2_l2a"]
    assert (list(whole.radar.inputs), whole.facts["published"], whole.facts["step"]) == (
        ["sentinel1_grd"],
        "optical",
        2,
    )
    images = torch.randint(1, 4000, (2, 12, 32, 32), dtype=torch.int16), torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        optical, radar, joint = objective.eval().whole()(one.prepare(images[0]), whole.radar.prepare(images[1]))
        assert torch.equal(one.forward_features(images[0]).x, optical.x)
        assert torch.equal(one(images[0]), optical.x.mean(1))
        assert torch.equal(whole.optical(images[0]), objective.student["optical_head"](optical))
        assert torch.equal(whole.radar(images[1]), objective.student["radar_head"](radar))
        assert torch.equal(whole.joint(*images), joint.x.mean(1))


@pytest.mark.parametrize("published", GROUPS)
def test_a_run_begins_from_all_that_a_bundle_holds(published: str, tmp_path: Path) -> None:
    config = _config(f"objective.published={published}")
    objective = _objective(config)
    inputs: dict[str, Any] = {group: {} for group in GROUPS}
    write_pair_bundle(tmp_path / "bundle", objective.whole(), inputs, {"published": published, "step": 1})
    other = build_objective(
        lambda: Objective(config.objective.options, config.model, [_source().schema]), 1, torch.device("cpu")
    )
    assert isinstance(other, Objective)
    begin_from([InitialWeights(str(tmp_path / "bundle"))], other, tmp_path)
    for name, value in objective.whole().state_dict().items():
        assert torch.equal(value, other.whole().state_dict()[name]), name


def test_an_objective_of_one_encoder_has_no_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("train.total_steps=1", "train.global_batch_size=8", "optim.warmup_steps=0", "log.report=false")
    run = ("run.name=run", f"run.out_dir={tmp_path}", "data.n_workers=0", *few)
    assert main(["train", "--config", str(DEBUG.with_name("mae.yaml")), *run]) == 0
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--whole", "--out", str(tmp_path / "out")]) != 0
    assert "objective mae has one encoder" in capsys.readouterr().err


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.crop.size_px=30", r"objective\.crop\.size_px 30 is not a multiple of model\.patch_size 8"),
        ("objective.mask.mask_ratio=0.0", "hides 0 of 16 patches"),
        (
            "objective.radar=sentinel1",
            r"objective\.radar: no source has a tile 'sentinel1'; did you mean 'sentinel1_grd'",
        ),
        (
            "objective.radar=thermal",
            r"objective\.radar: thermal is not among the tiles of a source, which has sentinel2",
        ),
        ("objective.optical=[optical,sar]", "sentinel1_grd is in both"),
    ],
)
def test_views_that_do_not_fit_are_refused(override: str, message: str) -> None:
    config = _config(override)
    with pytest.raises(ValueError, match=message):
        Objective.views(config.objective.options, config.model, [_source().schema])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.mask.predict_ratio=0.5", r"mask\.predict_ratio must be 1, got 0.5"),
        ("objective.temperature=0.001", "temperature must be at least min_temperature"),
        ("objective.min_temperature=0", "and that above 0"),
        ("objective.radar_depth=0", "radar_depth must be at least 1"),
        ("objective.mae_weight=-1", "mae_weight must not be negative"),
        ("objective.norm_pix_eps=0", "norm_pix_eps must be positive"),
    ],
)
def test_wrong_values_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(override)


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="contrast_weight and mae_weight are both 0"):
        _config("objective.contrast_weight=0", "objective.mae_weight=0")


def test_encoders_that_do_not_fit_are_refused() -> None:
    config = _config("model.mask_token=true")
    with pytest.raises(ValueError, match=r"model\.mask_token: hidden patches never reach an encoder of croma"):
        Objective(config.objective.options, config.model, [_source().schema])
    config, other = (
        _config("objective.output=linear"),
        {"sentinel2_l2a": _tile_schema("sentinel2_l2a", ["B02"], 64, 10.0)},
    )
    other["sentinel1_grd"] = _tile_schema("sentinel1_grd", ["VV", "VH"], 64, 10.0)
    with pytest.raises(ValueError, match=r"objective\.output: linear needs one number of bands in objective\.optical"):
        Objective(config.objective.options, config.model, [_source().schema, other])
