"""What is particular to DOFA: generated kernels and outputs, one sensor a batch, a teacher that others trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import assert_same_bits, read_checkpoint
from torch import Tensor, nn

from ssl_eo.cli import main
from ssl_eo.config import Config, load
from ssl_eo.data.opening import open_sources
from ssl_eo.data.render import Renderer
from ssl_eo.data.stacking import cut_to_views
from ssl_eo.data.types import Batch, MaskBatch, PixelBatch, Sample, Tile, TileSchema
from ssl_eo.distributed import mean_over_ranks, rank, world_size
from ssl_eo.hub import write_bundle
from ssl_eo.models.vit import Encoder, EncoderInput
from ssl_eo.objectives.dofa import Objective
from ssl_eo.sensors import ChannelMeta, load_sensor
from ssl_eo.train.initial import InitialWeights, begin_from
from ssl_eo.train.parallel import build_objective

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug" / "dofa.yaml"
N_PATCHES = 16  # of 8 px in 32 px
ANY_TEACHER = "objective.teacher={embed_dim: 48, depth: 2, n_heads: 4, patch_size: 8, patch_embed: dynamic}"


def _schema(name: str, bands: str | list[str] | None = None, n_pixels: int = 40) -> TileSchema:
    sensor = load_sensor(name)
    names = sensor.resolve_bands(bands)
    n = len(names)
    return TileSchema(sensor, names, "float32", (n_pixels, n_pixels), 10.0, (2.0,) * n, (3.0,) * n)


S2, S1 = _schema("sentinel2_l2a"), _schema("sentinel1_grd", "vv_vh")


def _objective(*overrides: str, schemas: tuple[TileSchema, ...] = (S2, S1)) -> Objective:
    """No bias is zero, and generated weights are of a size that matters."""
    config = load(DEBUG, overrides)
    tiles = [{tile.sensor.name: tile} for tile in schemas]
    objective = build_objective(
        lambda: Objective(config.objective.options, config.model, tiles), 0, torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in objective.state_dict().items():
            tensor.add_((1.0 if "fc_weight" in name else 0.05) * torch.randn(tensor.shape, generator=generator))
    return objective


def _pixels(channels: ChannelMeta, size: int, n: int, valid_ratio: float = 1.0) -> PixelBatch:
    generator = torch.Generator().manual_seed(size)
    shape = (n, channels.n_channels, size, size)
    pixels = torch.randn(shape, generator=generator)
    valid = torch.rand(shape, generator=generator) < valid_ratio if valid_ratio < 1 else None
    return PixelBatch(pixels, channels, torch.full((n,), 10.0), valid)


def _batch(schema: TileSchema = S2, n: int = 2, valid_ratio: float = 1.0) -> Batch:
    channels = schema.sensor.channel_meta(schema.bands)
    compared = ["B04", "B03", "B02"] if schema is S2 else list(schema.bands)
    order = torch.rand(n, N_PATCHES, generator=torch.Generator().manual_seed(0)).argsort(1)
    ids_keep, ids_masked = order[:, :4].sort(1).values, order[:, 4:].sort(1).values
    mask = torch.ones(n, N_PATCHES, dtype=torch.bool).scatter(1, ids_keep, False)
    views = {
        "image": _pixels(channels, 32, n, valid_ratio),
        "compared": _pixels(schema.sensor.channel_meta(compared), 16, n),
    }
    keys = [str(i) for i in range(n)]
    return Batch(0, 0, keys, {}, {}, {"image": MaskBatch(mask, ids_keep, ids_masked)}, views)


def _with(batch: Batch, role: str, **changes: Any) -> Batch:
    return replace(batch, pixels={**batch.pixels, role: replace(batch.pixels[role], **changes)})


def _double(batch: Batch) -> Batch:
    for role in ("image", "compared"):
        batch = _with(batch, role, pixels=batch.pixels[role].pixels.double())
    return batch


# The formula


def _mean_of_tokens(encoder: Encoder, view: PixelBatch, pixels: Tensor) -> list[Tensor]:
    """Of each sample: block after block but the last, and then the mean of all tokens, with the CLS token."""
    found: list[Tensor] = []
    hook = encoder.blocks[-2].register_forward_hook(lambda module, inputs, output: found.append(output))
    encoder([EncoderInput(pixels, view.channels)])
    hook.remove()
    return [sum(sample) / len(sample) for sample in found[0].unflatten(0, (len(pixels), -1))]


@pytest.mark.parametrize("norm_pix", ["true", "false"])
@pytest.mark.parametrize("schema", [S2, S1], ids=["sentinel2", "sentinel1"])
def test_loss_is_that_of_a_loop(schema: TileSchema, norm_pix: str) -> None:
    """In float64: over hidden patches and their valid values, and over samples that teacher and student both see."""
    objective = _objective(f"objective.norm_pix={norm_pix}", "objective.distill_weight=0.7").double()
    batch = _double(_batch(schema, valid_ratio=0.9))
    losses = objective(batch, {})
    view, ids = batch.pixels["image"], batch.masks["image"].ids_masked
    assert view.valid is not None
    pred = objective._predict(view, batch.masks["image"].ids_keep, ids).detach()
    pixels, n_values = 0.0, view.pixels.shape[1] * 64
    for b in range(2):
        for m, patch in enumerate(ids[b].tolist()):
            rows, columns = (slice(8 * i, 8 * i + 8) for i in divmod(patch, 4))
            values, valid = (x[b, :, rows, columns].permute(1, 2, 0).reshape(-1) for x in (view.pixels, view.valid))
            known = values[valid]
            if norm_pix == "true":
                known = (known - known.mean()) / (known.var(correction=1) + 1e-6).sqrt()
            pixels += float((pred[b, m][valid] - known).square().sum()) / n_values
    assert losses.parts["pixels"].item() == pytest.approx(pixels / (2 * 12), rel=1e-5)

    seen = batch.pixels["compared"]
    padded = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    padded[:, : seen.pixels.shape[1]] = seen.pixels
    linear = objective.student["projector"].mlp[0]
    distill = 0.0
    students = _mean_of_tokens(objective.published_encoder(), seen, seen.pixels)
    teachers = _mean_of_tokens(objective.teacher["encoder"], seen, padded)
    for student, teacher in zip(students, teachers, strict=True):
        answer = (linear.weight @ student + linear.bias).detach()
        distill += 1 - float(answer @ teacher / (answer.norm() * teacher.norm()))
    assert losses.parts["distill"].item() == pytest.approx(distill / 2, rel=1e-5)
    assert losses.total.item() == pytest.approx(pixels / (2 * 12) + 0.7 * distill / 2, rel=1e-5)


def _gradients(objective: Objective, loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.student.named_parameters() if p.grad is not None}


def test_the_gradient_is_that_of_minus_cos() -> None:
    """DOFA minimises -cos; ours is larger by 1, and nothing else."""
    objective, batch = _objective("objective.distill_weight=1"), _batch()
    losses = objective(batch, {})
    ours = _gradients(objective, losses.total)
    view, mask = batch.pixels["image"], batch.masks["image"]
    pred = objective._predict(view, mask.ids_keep, mask.ids_masked)
    pixels = (pred - objective._target(view, mask.ids_masked)[0]).square().mean()
    found, wanted = objective._compare(batch.pixels["compared"])
    cos = (nn.functional.normalize(found, dim=1) * nn.functional.normalize(wanted, dim=1)).sum(1).mean()
    theirs = _gradients(objective, pixels - cos)
    torch.testing.assert_close(losses.total.detach() - 1, (pixels - cos).detach())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def _step_of_rank() -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient as DDP averages them, of this rank's rows of a global batch of four."""
    objective, whole = _objective(), _batch(n=4, valid_ratio=0.9)
    n = 4 // world_size()
    rows = slice(rank() * n, (rank() + 1) * n)
    mask = whole.masks["image"]
    batch = replace(whole, masks={"image": MaskBatch(mask.mask[rows], mask.ids_keep[rows], mask.ids_masked[rows])})
    for role, view in whole.pixels.items():
        valid = None if view.valid is None else view.valid[rows]
        batch = _with(batch, role, pixels=view.pixels[rows], gsd_m=view.gsd_m[rows], valid=valid)
    total = objective(batch, {}).total
    gradients = _gradients(objective, total)
    return mean_over_ranks(total.detach()), {name: mean_over_ranks(g) for name, g in gradients.items()}


def test_two_ranks_are_one_process(on_ranks: Callable[..., list[Any]]) -> None:
    total, gradients = _step_of_rank()
    for found in on_ranks(2, _step_of_rank):
        torch.testing.assert_close(found[0], total, rtol=1e-5, atol=0)
        torch.testing.assert_close(found[1], gradients, rtol=1e-3, atol=1e-6)


def test_autocast_gives_losses_in_float32() -> None:
    objective, batch = _objective(), _batch()
    expected = objective(batch, {})
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(batch, {})
    assert {part.dtype for part in (found.total, *found.parts.values())} == {torch.float32}
    torch.testing.assert_close(found.total, expected.total, rtol=0.03, atol=0)


# Sensors


def test_the_order_of_bands_makes_no_difference() -> None:
    """What a channel's wavelength writes are the pixels of this channel, where they are read and where predicted."""
    objective, batch = _objective(), _batch()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    view = batch.pixels["image"]
    other = _with(batch, "image", pixels=view.pixels[:, order], channels=view.channels.select(order))
    torch.testing.assert_close(objective(other, {}).total, objective(batch, {}).total)


def test_sensors_with_as_many_bands_are_different_sensors() -> None:
    """VV with VH, HH with HV: the same pixels and two channels, but other kernels; and VV is not VH."""
    land, ice = S1, _schema("sentinel1_grd", "hh_hv")
    objective = _objective(schemas=(S2, land))
    embed = objective.published_encoder().patch_embed
    codes = [embed.codes(tile.sensor.channel_meta(tile.bands)) for tile in (land, ice)]
    assert torch.cdist(torch.cat(codes), torch.cat(codes)).fill_diagonal_(torch.inf).min() > 0.1
    swapped = _with(_batch(land), "image", channels=land.sensor.channel_meta(["VH", "VV"]))
    assert (objective(swapped, {}).total - objective(_batch(land), {}).total).abs() > 1e-3


@contextmanager
def _counted(module: nn.Module) -> Iterator[list[int]]:
    """The number of channels of each call of a generator."""
    calls: list[int] = []
    hook = module.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    yield calls
    hook.remove()


def test_generators_run_once_for_a_set_of_channels_however_many_samples() -> None:
    objective = _objective()
    with (
        _counted(objective.published_encoder().patch_embed.weight_generator) as kernels,
        _counted(objective.student["output"].weight_generator) as outputs,
    ):
        objective(_batch(n=5), {})
    assert sorted(kernels) == [3, 12]
    assert outputs == [12]


def _planned(config: Config, schemas: list[dict[str, TileSchema]], source: int, band_without_data: int | None) -> Batch:
    views = Objective.views(config.objective.options, config.model, schemas)
    ((name, tile),) = schemas[source].items()
    rng, planned = np.random.default_rng(0), []
    for i in range(3):
        pixels = rng.normal(2.0, 3.0, (len(tile.bands), 40, 40)).astype(np.float32)
        if band_without_data is not None and i == 1:
            pixels[band_without_data] = -np.inf
        sample = Sample(str(i), {name: Tile(pixels, tile.bands, 10.0)})
        plan = views.plan(sample, rng)
        planned.append((cut_to_views(sample, [plan.masked.views[0]], schemas[source]), plan))
    batch = views.collate(planned, 0, source, rng)
    batch.pixels = Renderer(schemas).render(batch)
    return batch


def test_the_teacher_s_view_is_the_same_crop_of_a_few_bands() -> None:
    schemas = [{"s2": S2}, {"s1": S1}]
    batch = _planned(load(DEBUG), schemas, 0, None)
    seen, compared = batch.pixels["image"].pixels, batch.pixels["compared"]
    index = [S2.bands.index(band) for band in ("B04", "B03", "B02")]
    torch.testing.assert_close(compared.pixels, seen[:, index])
    assert compared.channels.wavelength_um[0].tolist() == pytest.approx([0.6646, 0.5596, 0.493], abs=2e-3)
    small = _planned(load(DEBUG, ["objective.distill_size_px=16"]), schemas, 0, None).pixels["compared"]
    assert small.pixels.shape == (3, 3, 16, 16)
    halves = nn.functional.avg_pool2d(compared.pixels, 2)
    assert np.corrcoef(small.pixels.flatten(), halves.flatten())[0, 1] > 0.9


def test_a_band_without_data_in_one_sample_stops_nothing() -> None:
    config = load(DEBUG)
    batch = _planned(config, [{"s2": S2}, {"s1": S1}], 1, band_without_data=1)
    view = batch.pixels["image"]
    assert view.channels.valid is not None
    objective = _objective()
    losses = objective(batch, {})
    losses.total.backward()
    assert losses.total.isfinite()
    hidden = batch.masks["image"].mask.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert view.valid is not None
    other = objective(_with(batch, "image", pixels=torch.where(hidden & ~view.valid, 1e6, view.pixels)), {})
    assert torch.equal(other.total, losses.total)


@pytest.mark.parametrize(
    ("sensor", "bands", "chosen"),
    [
        ("sentinel2_l2a", None, ["B04", "B03", "B02"]),
        ("naip", None, ["R", "G", "B"]),
        ("landsat8_9", None, ["B04", "B03", "B02"]),
        ("enmap", None, ["B048", "B030", "B016"]),  # 47, 29 and 15 from 0, which is what DOFA takes
        ("satlas_sentinel2", None, ["B05", "B06", "B07"]),  # has none of the three colours
        ("sentinel2_l2a", ["B08", "B04"], ["B04", "B08"]),
        ("sentinel1_grd", None, ["VV", "VH"]),
        ("sentinel1_grd", "hh_hv", ["HH", "HV"]),
        ("satlas_sentinel1", None, ["VV", "VH"]),
    ],
)
def test_which_bands_the_teacher_sees(sensor: str, bands: str | list[str] | None, chosen: list[str]) -> None:
    schema, config = _schema(sensor, bands), load(DEBUG)
    views = Objective.views(config.objective.options, config.model, [{"x": schema}])
    (index,) = views.bands.values()
    assert [schema.bands[i] for i in index] == chosen


def test_other_bands_may_be_named() -> None:
    config = load(DEBUG, ["objective.distill_bands={x: [B12, B08, B04]}"])
    views = Objective.views(config.objective.options, config.model, [{"x": S2}])
    (index,) = views.bands.values()
    assert [S2.bands[i] for i in index] == ["B12", "B08", "B04"]


@pytest.mark.parametrize("schema", [S2, S1], ids=["sentinel2", "sentinel1"])
def test_any_encoder_may_be_the_teacher(schema: TileSchema) -> None:
    """One for any sensor sees the two channels of SAR as what they are, and no empty third."""
    objective, batch = _objective(ANY_TEACHER), _batch(schema)
    seen: list[int] = []
    embed = objective.teacher["encoder"].patch_embed
    embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    assert objective(batch, {}).total.isfinite()
    assert seen == [3 if schema is S2 else 2]


def test_without_a_teacher_pixels_are_all() -> None:
    objective = _objective("objective.teacher=null", "objective.random_teacher=false")
    batch = _batch()
    del batch.pixels["compared"]
    losses = objective(batch, {})
    assert set(losses.parts) == {"pixels"}
    assert set(objective.student) == {"encoder", "decoder", "output"}
    assert objective.given() == {}


def test_preview_keeps_what_is_visible() -> None:
    objective, batch = _objective(), _batch()
    pictures = objective.preview(batch)
    hidden = batch.masks["image"].mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    visible = (~hidden).expand_as(pictures["input"])
    assert torch.equal(pictures["reconstruction"][visible], pictures["input"][visible])
    assert pictures["masked"].isnan().equal(~visible)


# The weights of the teacher


def _trained(*overrides: str) -> Objective:
    return _objective("objective.random_teacher=false", *overrides)


def _bundle_of(objective: Objective, folder: Path) -> Path:
    assert objective.teacher is not None
    encoder = objective.teacher["encoder"]
    assert isinstance(encoder, Encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(0.25)
    write_bundle(folder, encoder, {}, {})
    return folder


def test_a_teacher_without_weights_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    bundle = _bundle_of(_trained(), tmp_path / "bundle")
    objective = _trained()
    with pytest.raises(ValueError, match=r"init gives no weights to (\d+) of the \1 tensors of teacher:") as caught:
        begin_from([], objective, tmp_path)
    assert "\n" not in str(caught.value)
    advice = re.search(r"rename: \{'(\S+)': '(\S+)'\}\}\]", str(caught.value))
    assert advice is not None
    before = {name: value.clone() for name, value in objective.student.state_dict().items()}
    entry = InitialWeights(str(bundle), rename={advice[1]: advice[2]})
    begin_from([entry], objective, tmp_path)
    assert all((value == 0.25).all() for value in objective.teacher.state_dict().values())
    assert all(torch.equal(value, before[name]) for name, value in objective.student.state_dict().items())
    with pytest.raises(
        ValueError, match=r"init gives no weights to 1 of the \d+ tensors of teacher: teacher.encoder.cls"
    ):
        begin_from([replace(entry, exclude=["cls_token"])], objective, tmp_path)


def test_only_the_engine_may_be_tried_with_a_random_teacher(tmp_path: Path) -> None:
    assert begin_from([], _objective(), tmp_path) == []
    with pytest.raises(ValueError, match="random_teacher is true, but teacher says of no encoder what it is"):
        load(DEBUG, ["objective.teacher=null"])


def test_a_run_is_refused_before_its_first_step_and_resumes_to_the_same_bits_without_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = _bundle_of(_trained(), tmp_path / "bundle")
    (tmp_path / "run.yaml").write_text(
        f"include: {DEBUG}\nobjective: {{random_teacher: false}}\n"
        f"init: [{{path: {bundle}, rename: {{'^encoder\\.': 'teacher.encoder.'}}}}]\n"
    )
    short = ("train.total_steps=4", "train.global_batch_size=8", "data.n_workers=0", "log.report=false")
    command = ["train", "--config", str(tmp_path / "run.yaml"), f"run.out_dir={tmp_path}", *short]
    command += ["optim.warmup_steps=0"]
    assert main([*command, "run.name=none", "init=[]"]) == 2
    assert "nothing is learned from a random teacher: write init: [" in capsys.readouterr().err
    assert main([*command, "run.name=straight"]) == 0
    assert main([*command, "run.name=stopped", "train.time_limit_s=0.0"]) == 75
    (bundle / "encoder.safetensors").unlink()
    assert main([*command, "run.name=stopped"]) == 0
    ends = [read_checkpoint(tmp_path / name / "checkpoints" / "step_00000004") for name in ("straight", "stopped")]
    assert_same_bits(*ends)
    teacher = {name: value for name, value in ends[0].items() if "teacher." in name}
    assert teacher
    assert all((value == 0.25).all() for value in teacher.values())


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.patch_embed=conv"], "model.patch_embed must be dynamic"),
        (["model.mask_token=true"], "model.mask_token: hidden patches never reach the encoder of dofa"),
        (["model.depth=1"], "model.depth must be at least 2"),
        (["objective.teacher.depth=1"], "objective.teacher.depth must be at least 2"),
        (["objective.crop.size_px=30"], "objective.crop.size_px 30 is not a multiple of model.patch_size 8"),
        (["objective.distill_size_px=20"], "20 is not a multiple of model.patch_size 8"),
        (["objective.teacher.patch_size=6"], "32 is not a multiple of objective.teacher.patch_size 6"),
        (["objective.distill_size_px=0"], "distill_size_px must be at least 1"),
        (["objective.distill_weight=0"], "distill_weight must be positive"),
        (["objective.distill_um=[]"], "distill_um must be one or more positive micrometres"),
        (["objective.norm_pix_eps=0"], "norm_pix_eps must be positive"),
        (["objective.distill_bands={sentinel2_l2a: [B04, B04]}"], "distill_bands.sentinel2_l2a must name at least one"),
        (["objective.distill_bands={sentinel2_l2a: [R]}"], "distill_bands.sentinel2_l2a: no band 'R', but B01"),
        (
            ["objective.distill_bands={sentinel2_l2a: [B01, B02, B03, B04]}"],
            "names 4 bands, but the convolution of objective.teacher has 3 channels",
        ),
        (["objective.tile=naip"], "objective.tile: a source has none of naip, but sentinel2_l2a"),
        (["data.mixing=sample"], "a batch of dofa is of one sensor, .* take turns by data.mixing: step"),
    ],
)
def test_wrong_combinations_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # noqa: PT012 - found at one of three places, all before training
        config = load(DEBUG, overrides)
        schemas = [source.schema for source in open_sources(config.data)]
        Objective.views(config.objective.options, config.model, schemas)
        Objective(config.objective.options, config.model, schemas)


def test_a_tile_of_several_is_to_be_named() -> None:
    config, pair = load(DEBUG), {"s2": S2, "s1": S1}
    with pytest.raises(ValueError, match="a source has s2, s1; name one of them"):
        Objective.views(config.objective.options, config.model, [pair])
    config = load(DEBUG, ["objective.tile=[s1,optical]"])
    views = Objective.views(config.objective.options, config.model, [pair, {"optical": S2}])
    assert {name for name, _ in views.bands} == {"s1", "optical"}
