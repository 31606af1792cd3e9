"""What is particular to the masked autoencoder: hidden pixels stay hidden, no-data stays out, any sensor goes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_eo.config import load
from ssl_eo.data.render import Renderer
from ssl_eo.data.stacking import cut_to_views
from ssl_eo.data.types import Batch, MaskBatch, PixelBatch, Sample, Tile, TileSchema
from ssl_eo.objectives.mae import Objective
from ssl_eo.sensors import load_sensor
from ssl_eo.train.parallel import build_objective

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug" / "mae.yaml"
SHAPE = (2, 32, 32)  # samples, height, width: 16 patches of 8 px


def _objective(*overrides: str) -> Objective:
    config = load(DEBUG, overrides)

    def make() -> Objective:
        return Objective(config.objective.options, config.model, [])

    objective = build_objective(make, 0, torch.device("cpu"))
    assert isinstance(objective, Objective)
    return objective


def _batch(sensor: str = "sentinel2_l2a", bands: str | list[str] | None = None, valid_ratio: float = 1.0) -> Batch:
    known = load_sensor(sensor)
    channels = known.channel_meta(known.resolve_bands(bands))
    n, height, width = SHAPE
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels.n_channels, height, width)
    pixels = torch.randn(shape, generator=generator)
    valid = torch.rand(shape, generator=generator) < valid_ratio if valid_ratio < 1 else None
    order = torch.rand(n, 16, generator=generator).argsort(1)
    ids_keep, ids_masked = order[:, :4].sort(1).values, order[:, 4:].sort(1).values
    mask = torch.ones(n, 16, dtype=torch.bool).scatter(1, ids_keep, False)
    view = PixelBatch(pixels, channels, torch.full((n,), 10.0), valid)
    masks = {"image": MaskBatch(mask, ids_keep, ids_masked)}
    return Batch(0, 0, ["a", "b"], {}, {}, masks, {"image": view})


def _with_pixels(batch: Batch, pixels: torch.Tensor) -> Batch:
    return replace(batch, pixels={"image": replace(batch.pixels["image"], pixels=pixels)})


EXTRA = "objective.extra_targets=[statistics,gradients]"


@pytest.mark.parametrize("norm_pix", ["true", "false"])
def test_loss_is_the_paper_s_on_the_masked_patches(norm_pix: str) -> None:
    """Against a float64 loop over hidden patches and their values."""
    objective, batch = _objective(f"objective.norm_pix={norm_pix}").double(), _batch()
    view, mask = batch.pixels["image"], batch.masks["image"]
    batch = _with_pixels(batch, view.pixels.double())
    loss = objective(batch, {}).total
    features = objective._decode(batch.pixels["image"], {}, mask.ids_keep, mask.ids_masked)
    pred = objective.student["output"](features, view.channels).detach()
    total = 0.0
    for b in range(2):
        for m, patch in enumerate(mask.ids_masked[b].tolist()):
            row, column = patch // 4 * 8, patch % 4 * 8
            cut = view.pixels.double()[b, :, row : row + 8, column : column + 8]  # [C, 8, 8]
            values = cut.permute(1, 2, 0).reshape(-1)
            if norm_pix == "true":
                values = (values - values.mean()) / (values.var(correction=1) + 1e-6).sqrt()
            total += float((pred[b, m] - values).square().mean())
    assert float(loss.detach()) == pytest.approx(total / (2 * 12), rel=1e-6)  # the loss itself is taken in float32


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    objective, batch = _objective(EXTRA), _batch()
    view, mask = batch.pixels["image"], batch.masks["image"]
    hidden = mask.mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = replace(view, pixels=torch.where(hidden, 7.0, view.pixels))
    before, after = (objective._decode(v, {}, mask.ids_keep, mask.ids_masked) for v in (view, changed))
    assert torch.equal(before, after)


def test_no_data_reaches_neither_loss_nor_gradient() -> None:
    """Rendering puts 0 where nothing was measured; were it anything else, the hidden side would not notice."""
    objective, batch = _objective(EXTRA), _batch(valid_ratio=0.9)
    view, mask = batch.pixels["image"], batch.masks["image"]
    assert view.valid is not None
    hidden = mask.mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    results = []
    for filler in (0.0, 1e6):
        pixels = torch.where(view.valid | ~hidden, view.pixels, filler)
        objective.zero_grad()
        losses = objective(_with_pixels(batch, pixels), {})
        losses.total.backward()
        grads = [p.grad.clone() for p in objective.student.parameters() if p.grad is not None]
        results.append((losses.total.detach(), grads))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_tile_without_any_data_is_zero_and_not_nan() -> None:
    objective, batch = _objective(EXTRA), _batch()
    view = batch.pixels["image"]
    empty = replace(view, pixels=torch.zeros_like(view.pixels), valid=torch.zeros_like(view.pixels, dtype=torch.bool))
    loss = objective(replace(batch, pixels={"image": empty}), {}).total
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize(
    ("sensor", "bands"),
    [
        ("sentinel2_l2a", None),
        ("sentinel1_grd", "vv_vh"),
        ("landsat8_9", None),
        ("enmap", "spectral_earth"),
        ("naip", None),
    ],
)
def test_the_same_weights_take_any_sensor(sensor: str, bands: str | None) -> None:
    objective = _objective(EXTRA)
    losses = objective(_batch(sensor, bands), {})
    assert losses.total.isfinite()
    assert set(losses.parts) == {"pixels", "statistics", "gradients"}
    torch.testing.assert_close(losses.total, torch.stack(list(losses.parts.values())).sum())


@pytest.mark.parametrize("overrides", [(), (EXTRA,), ("objective.norm_pix=false",)], ids=str)
def test_preview_keeps_what_is_visible(overrides: tuple[str, ...]) -> None:
    objective, batch = _objective(*overrides), _batch()
    pictures = objective.preview(batch)
    hidden = batch.masks["image"].mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    visible = (~hidden).expand_as(pictures["input"])
    assert torch.equal(pictures["reconstruction"][visible], pictures["input"][visible])
    assert pictures["masked"].isnan().equal(~visible)
    assert not pictures["reconstruction"].isnan().any()


def _optional(name: str, bands: list[str]) -> TileSchema:
    n = len(bands)
    return TileSchema(load_sensor(name), tuple(bands), "uint16", (40, 40), 10.0, (9.0,) * n, (2.0,) * n, optional=True)


def test_two_products_of_a_sensor_share_a_batch() -> None:
    """Each sample has one of two tiles, with statistics of its own; both are learned from in one step."""
    bands = [band for band in load_sensor("sentinel2_l1c").band_names if band != "B10"]
    schema = {name: _optional(name, bands) for name in ("sentinel2_l1c", "sentinel2_l2a")}
    config = load(DEBUG, ["objective.tile=[sentinel2_l1c,sentinel2_l2a]"])
    views = Objective.views(config.objective.options, config.model, [schema])
    rng = np.random.default_rng(0)
    planned = []
    for i, name in enumerate(("sentinel2_l2a", "sentinel2_l1c", "sentinel2_l2a")):
        pixels = rng.integers(1, 9000, (12, 40, 40)).astype(np.uint16)
        sample = Sample(str(i), {name: Tile(pixels, tuple(bands), 10.0)})
        plan = views.plan(sample, rng)
        planned.append((cut_to_views(sample, [plan.views[0]], schema), plan))
    batch = views.collate(planned, 0, 0, rng)
    batch.pixels = Renderer([schema]).render(batch)
    assert batch.pixels["image"].channels.wavelength_um.shape == (3, 12)
    objective = build_objective(
        lambda: Objective(config.objective.options, config.model, [schema]), 0, torch.device("cpu")
    )
    losses = objective(batch, {})
    losses.total.backward()
    assert losses.total.isfinite()
    with pytest.raises(ValueError, match="it has none of the tiles of objective"):
        views.plan(Sample("x", {"dem": sample.tiles[name]}), rng)
    uneven = {**schema, "sentinel2_l1c": _optional("sentinel2_l1c", [*bands, "B10"])}
    with pytest.raises(ValueError, match="need as many bands each, but sentinel2_l1c has 13, sentinel2_l2a has 12"):
        Objective.views(config.objective.options, config.model, [uneven])


def test_ema_follows_the_student_and_is_what_is_published() -> None:
    objective = _objective("objective.ema_momentum=0.75")
    assert objective.teacher is not None
    student, teacher = objective.student["encoder"].norm.weight, objective.teacher["encoder"].norm.weight
    student.data.fill_(5.0)
    objective.after_step({"momentum": 0.75}, torch.ones(()), {})
    torch.testing.assert_close(teacher, torch.full_like(teacher, 0.75 * 1 + 0.25 * 5))
    objective.after_step({"momentum": 0.75}, torch.zeros(()), {})
    torch.testing.assert_close(teacher, torch.full_like(teacher, 2.0))
    assert objective.published_encoder() is objective.teacher["encoder"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.crop.size_px=30", "objective.crop.size_px 30 is not a multiple of model.patch_size 8"),
        ("objective.tile=naip", "objective.tile: no tile 'naip' in a source that has sentinel2_l2a"),
        ("objective.gradient_cell_px=3", "objective.gradient_cell_px 3 does not divide model.patch_size 8"),
    ],
)
def test_wrong_combinations_are_refused(override: str, message: str) -> None:
    from ssl_eo.data.opening import open_source

    config = load(DEBUG, [override, EXTRA])
    schemas = [open_source(s).schema for s in config.data.sources]
    with pytest.raises(ValueError, match=message):
        Objective.views(config.objective.options, config.model, schemas)
