"""The objective multimae reproduces numbers of the published code of MultiMAE-EO, and reads its weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from launching import ROOT
from multimae_published import INPUTS, OUTPUTS, SIDE, image, published, shapes, visible
from torch import Tensor

from ssl_eo.config import build, load
from ssl_eo.data.types import Batch, PixelBatch, TileSchema, VisibleBatch
from ssl_eo.models.vit import EncoderInput
from ssl_eo.objectives.multimae import Config, Objective
from ssl_eo.sensors import load_sensor
from ssl_eo.weights.base import find_released, read_released, released_state_dict
from ssl_eo.weights.multimae_eo import student_tensors

# Mean and standard deviation of what is predicted, its first three values as an image, and the loss.
EXPECTED = {
    "rgb": (0.000003, 0.292164, (0.13717, -0.20231, 0.33134), 1.070412),
    "depth": (-0.003796, 0.256030, (0.11326, -0.14227, 0.22654), 0.876069),
    "semseg": (-0.001274, 0.446687, (-0.58303, 0.40675, -0.58302), 2.582104),
    "ired": (-0.000226, 0.255672, (0.10257, -0.09223, 0.23901), 1.159529),
    "sired": (0.000612, 0.254108, (0.00775, -0.18566, 0.16361), 1.137587),
    "ebands": (0.003378, 0.266690, (0.04529, -0.13894, 0.24140), 1.262300),
    "norm_rgb": (0.000592, 0.407840, (-0.50748, 0.61860, -0.50812), 1.159780),
}
BANDS = {
    "rgb": ("sentinel2_l2a", ["B04", "B03", "B02"]),
    "depth": ("dem", ["elevation"]),
    "semseg": ("synthetic_landcover", ["class"]),  # which has 12 classes, too
    "ired": ("sentinel2_l2a", ["B05", "B06", "B07"]),
    "sired": ("sentinel2_l2a", ["B11", "B12"]),
    "ebands": ("sentinel2_l2a", ["B8A", "B08"]),
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return published()


def _modality(name: str) -> dict[str, object]:
    tile, bands = BANDS[name]
    modality: dict[str, object] = {"tile": tile, "bands": bands, "loss": "l1" if name == "depth" else "mse"}
    if name == "semseg":
        modality |= {"kind": "classes", "stride": 4}
    if name == "rgb":
        modality |= {"targets": ["values", "norm_pix"]}
    return modality


def _objective(tensors: dict[str, Tensor]) -> Objective:
    schema = {}
    for tile, bands in BANDS.values():
        sensor = load_sensor(tile)
        shown = (*schema[tile].bands, *bands) if tile in schema else tuple(bands)
        n = len(shown)
        schema[tile] = TileSchema(sensor, shown, sensor.dtype, (64, 64), 10.0, (0.0,) * n, (1.0,) * n)
    raw = {
        "modalities": {name: _modality(name) for name in INPUTS},
        "crop": {"size_px": SIDE},
        "budget": {"n_visible": 42},
        "decoder": {"embed_dim": 128, "depth": 2, "n_heads": 8},
    }
    cfg = build(Config, raw, "objective")
    with torch.device("meta"):
        objective = Objective(cfg, find_released("multimae_eo_vitb8_rgb").config, [schema])
    objective.to_empty(device="cpu")
    objective.student.load_state_dict(student_tensors(tensors, list(INPUTS), [o.name for o in cfg.outputs], 12))
    return objective.eval()


def _batch(objective: Objective) -> Batch:
    pixels, rows, ids, n = {}, {}, [], 0
    mask = torch.ones(1, 6 * 49, dtype=torch.bool)
    for task, name in enumerate(INPUTS):
        tile, bands = BANDS[name]
        pixels[name] = PixelBatch(image(name), load_sensor(tile).channel_meta(bands), torch.full((1,), 10.0))
        rows[name] = torch.tensor(visible(task))
        ids += [49 * task + patch for patch in visible(task)]
        n += len(rows[name])
    mask[0, ids] = False
    seen = VisibleBatch(mask, torch.tensor([ids]), rows, torch.arange(n))
    return Batch(0, 0, ["a"], {}, {}, pixels=pixels, visible=seen)


def test_fingerprint_of_the_published_code(tensors: dict[str, Tensor]) -> None:
    objective = _objective(tensors)
    batch = _batch(objective)
    assert batch.visible is not None
    with torch.no_grad():
        losses = objective(batch, {})
        images = objective._images(batch, batch.visible)
        answers = objective._decode(objective._encode(batch.visible, images), batch.visible)
    assert set(answers) == set(losses.parts) == set(OUTPUTS)
    for name, (mean, std, first, loss) in EXPECTED.items():
        pred = answers[name]
        assert pred.mean().item() == pytest.approx(mean, abs=2e-6), name
        assert pred.std().item() == pytest.approx(std, abs=2e-6), name
        n_channels = 12 if name == "semseg" else INPUTS[name.removeprefix("norm_")]
        of_first_row = pred[0, :2].view(2, -1, n_channels)[..., 0]  # [2, p*p] of the first channel
        side = 2 if name == "semseg" else 8
        row = torch.cat((of_first_row[0, :side], of_first_row[1, :side]))[:3]
        torch.testing.assert_close(row, torch.tensor(first), atol=1e-5, rtol=0)
        assert losses.parts[name].item() == pytest.approx(loss, abs=2e-6), name
    assert losses.total.item() == pytest.approx(sum(row[3] for row in EXPECTED.values()), abs=1e-5)


@pytest.mark.parametrize("group", ["rgb", "ired", "ebands", "sired"])
def test_a_file_of_the_authors_is_an_encoder_of_each_group(
    tensors: dict[str, Tensor], group: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "multimae_eo.pth"
    if not path.exists():
        torch.save({"model": tensors, "epoch": 999, "args": argparse.Namespace(batch_size=256)}, path)
    encoder = read_released(path, find_released(f"multimae_eo_vitb8_{group}"))[0]
    bands = find_released(f"multimae_eo_vitb8_{group}").inputs()["sentinel2_l2a"].bands
    assert list(bands) == BANDS[group][1]
    channels = load_sensor("sentinel2_l2a").channel_meta(bands)
    with torch.no_grad():
        found = encoder([EncoderInput(image(group), channels, 10.0)])[0]
    assert found.grid == (7, 7)
    assert found.x.shape == (1, 50, 768)
    back = released_state_dict(encoder, find_released(f"multimae_eo_vitb8_{group}"))
    own = (f"input_adapters.{group}.", "encoder.", "global_tokens")
    assert back.keys() == {name for name in tensors if name.startswith(own)}
    assert all(torch.equal(value, tensors[name]) for name, value in back.items())


def test_positions_that_are_not_those_of_the_paper_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    changed = {**tensors, "input_adapters.rgb.pos_emb": tensors["input_adapters.rgb.pos_emb"].transpose(2, 3)}
    with pytest.raises(ValueError, match=r"input_adapters.rgb.pos_emb is not the table of positions of MultiMAE"):
        student_tensors(changed, list(INPUTS), list(OUTPUTS))


def test_the_recipe_has_the_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our decoder of land cover predicts one class less, no data; our encoder has no positions to store."""
    monkeypatch.setenv("SSL_EO_DATA", "somewhere")
    config = load(ROOT / "configs" / "pretrain" / "multimae_vitb8_mmearth64.yaml")
    schema = {}
    for name in ("sentinel2_l2a", "dem", "worldcover"):
        sensor = load_sensor(name)
        n = len(sensor.bands)
        schema[name] = TileSchema(sensor, sensor.band_names, sensor.dtype, (64, 64), 10.0, (0.0,) * n, (1.0,) * n)
    with torch.device("meta"):
        objective = Objective(config.objective.options, config.model, [schema])
    ours = sum(p.numel() for p in objective.student.parameters())
    theirs = sum(torch.Size(shape).numel() for shape in shapes().values())
    assert theirs // 1000 == 90_780
    assert ours == theirs - 4 * (128 + 1)
