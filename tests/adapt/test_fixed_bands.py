"""The bands that stand for those of an encoder, and what training it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_study import encoder, opened_task, study, task

from ssl_eo.adapt.backbone import EncoderBackbone, fixed_bands
from ssl_eo.adapt.cost import energy_of, step_cost
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.saved import load_model, save_model
from ssl_eo.adapt.study_run import run_study
from ssl_eo.adapt.training import TrainingConfig
from ssl_eo.bundles import SensorInput
from ssl_eo.eval.decoders import build_decoder
from ssl_eo.hub import write_bundle
from ssl_eo.models.vit import EncoderInput
from ssl_eo.sensors import load_sensor


def known_of(sensor: str, *bands: str, clip_std: float | None = None) -> SensorInput:
    n = len(bands)
    return SensorInput(load_sensor(sensor), bands, (0.0,) * n, (1.0,) * n, 10.0, clip_std)


def test_bands_of_a_fixed_encoder_are_found_by_what_they_measure() -> None:
    """Whatever their names and order; what is missing is 0, the mean of standardised values."""
    hls = load_sensor("hls")
    bands = fixed_bands(known_of("sentinel2_l2a", "B04", "B05", "B8A", "B02"), hls.channel_meta())
    assert bands.picks == (2, None, 3, 0)
    assert bands.missing == ("B05",)
    pixels = torch.randn(2, 6, 4, 4)
    shown = bands(EncoderInput(pixels, hls.channel_meta()))
    assert torch.equal(shown.pixels[:, [0, 2, 3]], pixels[:, [2, 3, 0]])
    assert not shown.pixels[:, 1].any()
    assert shown.channels.n_channels == 4


def test_a_band_that_two_channels_fit_is_not_taken_for_one_that_is_missing() -> None:
    twice = load_sensor("sentinel2_l2a").channel_meta(("B08", "B08"))
    with pytest.raises(ValueError, match=r"band B08: channels 0 and 1 fit equally well; name one of them in the task"):
        fixed_bands(known_of("sentinel2_l2a", "B08"), twice)


def test_what_authors_bring_to_0_and_1_is_brought_there() -> None:
    seen: list[torch.Tensor] = []
    model = EncoderBackbone(encoder(), (1.0,), clip_std=2.0)
    model.encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    meta = load_sensor("sentinel1_grd").channel_meta()
    model(EncoderInput(torch.tensor([-5.0, -1.0, 0.0, 3.0]).view(1, 4, 1, 1).expand(1, 4, 4, 4), meta))
    assert seen[0][0, :, 0, 0].tolist() == [0.0, 0.25, 0.5, 1.0]


def test_a_bundle_of_fixed_bands_is_trained_on_other_images_and_says_what_it_lacked(tmp_path: Path) -> None:
    from ssl_eo.models.vit import Encoder, EncoderConfig

    conv = Encoder(EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=4, patch_embed="conv"), 3)
    conv.init_weights()
    s1 = load_sensor("sentinel1_grd")
    known = known_of("sentinel1_grd", *(band.name for band in s1.bands[:2]))
    other = known_of("sentinel2_l2a", "B02", "B03", "B04")
    write_bundle(tmp_path / "conv", conv, {"sentinel2_l2a": other, "sentinel1_grd": known}, {"step": 0})
    cell = {"encoders": {"conv": {"model": str(tmp_path / "conv"), "taps": [1.0]}}, "tasks": [task(n=4)]}
    (record,) = run_study(study(tmp_path, **cell), tmp_path / "out")
    assert record["kind"] == "error"
    assert "no band of task scenes is like one of B02, B03, B04" in record["error"]
    mixed = SensorInput(s1, (s1.bands[1].name, s1.bands[0].name, s1.bands[2].name), (0.0,) * 3, (1.0,) * 3, 10.0)
    write_bundle(tmp_path / "conv", conv, {"sentinel1_grd": mixed}, {"step": 0})
    (record,) = run_study(study(tmp_path, **cell), tmp_path / "out")
    assert record["kind"] == "result", record
    assert record["missing_bands"] == []


def test_a_saved_model_shows_its_encoder_the_same_bands(tmp_path: Path) -> None:
    """In the encoder's order, with what is missing and the range that its authors chose."""
    from ssl_eo.models.vit import Encoder, EncoderConfig

    opened = opened_task(n=4)
    names = opened.schema.sensor.band_names
    channels = opened.schema.sensor.channel_meta(opened.bands)
    gone = SensorInput(opened.schema.sensor, (names[2], names[0]), (0.0,) * 2, (1.0,) * 2, 10.0)
    bands = replace(fixed_bands(gone, channels), picks=(2, None))
    conv = Encoder(EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=4, patch_embed="conv"), 2)
    conv.init_weights()
    backbone = EncoderBackbone(conv, (1.0,), bands, clip_std=2.0)
    model = TaskModel(backbone, build_decoder("linear", {}, backbone.shape, opened.n_classes)).eval()
    facts = {"decoder": "linear", "options": {}, "taps": [1.0]}
    save_model(tmp_path / "model", model, opened, facts)
    saved = load_model(tmp_path / "model")
    stored = torch.rand(2, len(opened.bands), 16, 16)
    with torch.no_grad():
        expected = model.values(model(saved.bundle.prepare(stored)))
    assert torch.equal(saved.logits(stored), expected)
    assert expected.std() > 0
    page = json.loads((tmp_path / "model" / "task.json").read_text())
    page["fixed_bands"]["picks"] = [2]
    (tmp_path / "model" / "task.json").write_text(json.dumps(page))
    with pytest.raises(ValueError, match="2 names need as many picks"):
        load_model(tmp_path / "model")


def test_an_encoder_of_any_sensor_is_shown_all_bands_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever bands it was trained on: here others than those of the task, and of another number."""
    write_bundle(tmp_path / "any", encoder(), {"sentinel2_l2a": known_of("sentinel2_l2a", "B02", "B03")}, {"step": 0})
    seen: set[int] = set()
    forward = EncoderBackbone.forward

    def looked_at(self: EncoderBackbone, inputs: EncoderInput) -> Any:
        seen.add(inputs.pixels.shape[1] if self.bands is None else -1)
        return forward(self, inputs)

    monkeypatch.setattr(EncoderBackbone, "forward", looked_at)
    encoders = {"any": {"model": str(tmp_path / "any"), "taps": [1.0]}}
    (record,) = run_study(study(tmp_path, encoders=encoders, tasks=[task(n=4)]), tmp_path / "out")
    assert (record["kind"], record["missing_bands"], seen) == ("result", [], {4})


def test_the_cost_of_a_step_is_that_of_its_products() -> None:
    """Less than three times as much forward and backward, where the encoder trains; little more than once where not."""
    opened = opened_task(n=4)
    backbone = EncoderBackbone(encoder(depth=1), (1.0,))
    model = TaskModel(backbone, build_decoder("linear", {"norm": "layer"}, backbone.shape, opened.n_classes))
    meta = opened.schema.sensor.channel_meta(opened.bands)
    cfg = TrainingConfig()
    few, more = (step_cost(model, EncoderInput(torch.randn(n, 4, 16, 16), meta), (16, 16), cfg) for n in (1, 4))
    # By hand: the head on 16 patches, the block on 17 tokens of width 16, the embedding of 4 bands of 16 pixels.
    head = 2 * 16 * 16 * opened.n_classes
    block = 2 * 16 * 17 * (3 * 16 + 16 + 4 * 16 + 4 * 16) + 2 * 2 * 17 * 17 * 16
    embedding = 2 * 16 * 64 * 16
    # The kernels of the embedding are generated once a batch: what a sample adds is the same for any batch.
    assert 1e9 * (4 * more.forward_gflop - few.forward_gflop) == pytest.approx(3 * (head + block + embedding), rel=0.01)
    assert 2.4 < more.step_gflop / more.forward_gflop < 3.2
    backbone.requires_grad_(False)
    frozen = step_cost(model, EncoderInput(torch.randn(4, 4, 16, 16), meta), (16, 16), cfg)
    assert frozen.forward_gflop == more.forward_gflop
    assert frozen.step_gflop < 1.5 * frozen.forward_gflop
    assert frozen.memory_gb < more.memory_gb
    assert all(p.grad is None for p in model.parameters())


def test_energy_is_measured_where_a_country_is_named() -> None:
    with energy_of(None) as nothing:
        pass
    assert (nothing.kwh, nothing.co2_kg) == (None, None)
    with energy_of("FRA") as found:
        sum(i * i for i in range(100_000))
    assert found.kwh is not None
    assert found.co2_kg is not None
    assert 0 < found.co2_kg < found.kwh  # France: less than 0.1 kg a kWh
