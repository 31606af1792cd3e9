"""Our encoder and our masked autoencoder compute what the published code of Prithvi computes; its files come and go.

The numbers in `golden/prithvi.json` are the published code's, by `make_prithvi_golden.py` beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prithvi_cases import CASES, MAE_CASES, PrithviCase, PrithviMaeCase
from released_formula import summary, uniform, weights
from torch import Tensor

from ssl_eo.data.masking import stack_masks
from ssl_eo.data.series import SeriesConfig
from ssl_eo.data.types import Batch, PixelBatch, TileSchema
from ssl_eo.hub import load_bundle
from ssl_eo.models.decoders import DecoderConfig
from ssl_eo.models.space_time import sincos_3d
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.objectives import mae
from ssl_eo.sensors import load_sensor
from ssl_eo.weights import prithvi
from ssl_eo.weights.base import (
    Released,
    build_encoder,
    export_released,
    find_released,
    import_released,
    read_released,
    released_state_dict,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "prithvi.json").read_text())
TOLERANCE = 1e-5  # outputs are of order 1
HLS = load_sensor("hls").channel_meta()
N_TENSORS = {"prithvi_eo_v1_100": 254, "prithvi_eo_v2_300": 398, "prithvi_eo_v2_300_tl": 402}  # of whole files
N_PARAMETERS = {"prithvi_eo_v1_100": 86.2e6, "prithvi_eo_v2_tiny_tl": 5.6e6, "prithvi_eo_v2_300": 303.9e6}
N_PARAMETERS["prithvi_eo_v2_600"] = 631.2e6
TINY = "prithvi_eo_tiny"


def published(shapes: dict[str, list[int]], case: PrithviCase | PrithviMaeCase, native: int) -> dict[str, Tensor]:
    """Tensors by formula, with the positions that the published code computes."""
    found = weights({name: tuple(shape) for name, shape in shapes.items()})
    for name in (name for name in found if name.endswith("pos_embed")):
        found[name] = positions(case.n_dates, native, found[name].shape[-1])
    return found


def positions(n_dates: int, native: int, dim: int) -> Tensor:
    table = sincos_3d(n_dates, (native, native), dim, native, torch.device("cpu"))
    return torch.cat((torch.zeros(1, dim), table))[None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_numbers_of_the_published_encoder(case: PrithviCase) -> None:
    expected = GOLDEN[f"encoder: {case.name}"]
    released = find_released(case.model)
    released = replace(released, config=replace(released.config, depth=case.depth))
    tensors = published(expected["shapes"], case, 224 // released.config.patch_size)
    encoder = build_encoder(tensors, released, "file")
    item = EncoderInput(case.pixels(), HLS, dates=case.dates(), location=case.location())
    taps = encoder.intermediates(item, case.layers, norm=False) if case.layers else []
    found = {f"block {layer}": tokens.x for layer, tokens in zip(case.layers, taps, strict=True)}
    found["last"] = encoder([item])[0].x
    for name, numbers in expected["outputs"].items():
        ours = summary(found[name])
        assert ours["values"] == pytest.approx(numbers["values"], abs=TOLERANCE, rel=0), name
        assert (ours["mean"], ours["std"]) == pytest.approx((numbers["mean"], numbers["std"]), abs=TOLERANCE), name
    back = released_state_dict(encoder, released)
    assert {name: list(value.shape) for name, value in back.items() if name != "pos_embed"} == {
        name: shape for name, shape in expected["shapes"].items() if name != "pos_embed"
    }


@torch.no_grad()
def test_half_precision_does_not_confound_years() -> None:
    """In bfloat16 2017 and 2016 are one number: the code of the time is computed in float32 under autocast too."""
    (case,) = (case for case in CASES if case.name == "tiny, told")
    released = find_released(case.model)
    with torch.device("meta"):
        encoder = Encoder(released.config, released.n_channels)
    encoder = encoder.to_empty(device="cpu")
    encoder.init_weights()
    assert encoder.time_encoding is not None
    dates = case.dates()
    assert dates is not None
    whole = encoder.time_encoding(dates)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.time_encoding(dates), whole)
    with pytest.raises(ValueError, match="float32"):
        encoder.time_encoding(dates.bfloat16())


@pytest.mark.parametrize("case", MAE_CASES, ids=lambda case: case.name)
def test_numbers_of_the_published_pretraining(case: PrithviMaeCase) -> None:
    expected = GOLDEN[f"mae: {case.name}"]
    objective, batch = pretraining(case)
    native = case.size // 16
    tensors = published(expected["shapes"], case, native)
    objective.student.load_state_dict(prithvi.student_tensors(tensors, native))
    losses = objective(batch, {})
    assert losses.total.item() == pytest.approx(expected["loss"], rel=TOLERANCE)
    view, mask = objective._view(batch), batch.masks["image"]
    with torch.no_grad():
        features = objective._decode(view, batch.meta, mask.ids_keep, mask.ids_masked)
        found = summary(objective.student["output"](features, view.channels))
    assert found["values"] == pytest.approx(expected["predictions"]["values"], abs=TOLERANCE, rel=0)


def pretraining(case: PrithviMaeCase) -> tuple[mae.Objective, Batch]:
    """The objective of this design, and the batch that the published code is given."""
    sensor = load_sensor("hls")
    tile = TileSchema(sensor, sensor.band_names, "int16", (64, 64), 30.0, (0.0,) * 6, (1.0,) * 6)
    schemas = [{f"hls@{i}": tile for i in range(case.n_dates)}]
    config = mae.Config(
        tile=list(schemas[0]),
        series=SeriesConfig(case.n_dates),
        decoder=DecoderConfig("full", case.decoder_dim, case.depth, case.n_heads, norm_eps=1e-5),
        output="linear",
        norm_pix=case.norm_pix,
    )
    encoder = EncoderConfig(
        embed_dim=case.embed_dim,
        depth=case.depth,
        n_heads=case.n_heads,
        norm_eps=1e-5,
        position="sincos_3d",
        image_size=case.size,
        time_encoding=case.told,
        location_encoding=case.told,
        patch_embed="conv",
    )
    order = case.noise().argsort(dim=1)
    n_seen = int(order.shape[1] * (1 - case.mask_ratio))
    hidden = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :n_seen], False)
    rows = case.pixels().permute(2, 0, 1, 3, 4).flatten(0, 1)  # [T*B, C, H, W]
    batch = Batch(0, 0, ["a", "b"], {}, {}, {"image": stack_masks(list(hidden.numpy()))})
    batch.pixels = {"image": PixelBatch(rows, HLS, torch.full((len(rows),), 30.0))}
    dates, location = case.dates(), case.location()
    if dates is not None and location is not None:
        batch.meta = {"dates": dates, "location": location}
    return mae.Objective(config, encoder, schemas), batch


@pytest.mark.parametrize("name", N_PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    released = find_released(name)
    with torch.device("meta"):
        encoder = Encoder(released.config, released.n_channels)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(N_PARAMETERS[name], rel=1e-2)


@pytest.fixture(scope="module", autouse=True)
def _tiny_members_of_the_family() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        tiny = [_tiny(TINY, "prithvi_eo_v1_100"), _tiny(f"{TINY}_tl", "prithvi_eo_v2_300_tl")]
        patch.setattr(prithvi, "MODELS", (*prithvi.MODELS, *tiny))
        yield


def _tiny(name: str, like: str) -> Released:
    base = find_released(like)
    return replace(base, name=name, config=replace(base.config, embed_dim=32, depth=2, n_heads=2))


def tiny_file(name: str, n_dates: int) -> dict[str, Tensor]:
    """An encoder's tensors, by published names."""
    released = find_released(name)
    with torch.device("meta"):
        encoder = Encoder(released.config, released.n_channels)
    shapes = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    tensors = released.restore(weights(shapes))
    tensors["pos_embed"] = positions(n_dates, 14, 32)
    return tensors


DECODER = {"mask_token": (1, 1, 8), "decoder_embed.weight": (8, 32), "decoder_pos_embed": (1, 589, 8)}


@pytest.mark.parametrize("layout", ["version 1", "version 2", "timm module"])
def test_files_of_both_versions_come_in_and_go_back(layout: str, tmp_path: Path) -> None:
    name = f"{TINY}_tl" if layout == "version 2" else TINY
    own = tiny_file(name, 4 if layout == "version 2" else 3)
    decoder = {key: uniform(key, shape) for key, shape in DECODER.items()}
    if layout == "version 2":
        decoder["temporal_embed_dec.scale"] = torch.ones(1)
        file = {f"encoder.{k}": v for k, v in own.items()} | {f"decoder.{k}": v for k, v in decoder.items()}
    else:
        prefix = "_timm_module." if layout == "timm module" else ""
        file = {f"{prefix}{k}": v for k, v in (own | decoder).items()}
    torch.save(file, tmp_path / "prithvi.pt")
    import_released(tmp_path / "prithvi.pt", name, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    export_released(bundle.encoder, name, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)


def test_a_bundle_takes_stored_values_of_several_dates(tmp_path: Path) -> None:
    torch.save(tiny_file(f"{TINY}_tl", 4), tmp_path / "prithvi.pt")
    import_released(tmp_path / "prithvi.pt", f"{TINY}_tl", tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    stored = 1000 + 500 * uniform("stored", (2, 6, 3, 32, 32))
    stored[0, 2, 1, :4] = -9999  # no data
    dates = torch.tensor([[[2020.0, 10.0], [2020.0, 100.0], [2020.0, 190.0]]]).expand(2, -1, -1)
    location = torch.tensor([[52.0, 13.0], [-3.0, -60.0]])
    told = bundle(stored, dates=dates, location=location)
    assert told.shape == (2, 32)
    assert (told - bundle(stored)).abs().max() > 1e-3  # when and where make a difference
    unknown = torch.full_like(dates, torch.nan)
    assert torch.equal(bundle(stored, dates=unknown), bundle(stored))
    for swapped in ({"dates": dates.flip(2)}, {"location": torch.tensor([[13.0, 52.0], [-120.0, -3.0]])}):
        with pytest.raises(ValueError, match="in this order, within"):
            bundle(stored, **swapped)
    with pytest.raises(ValueError, match=r"dates must be a tensor \[2, 3, 2\]"):
        bundle(stored, dates=dates[:, :2])
    tokens = bundle.forward_features(stored)
    assert (tokens.n_steps, tokens.grid, tokens.patches.shape) == (3, (2, 2), (2, 12, 32))
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (prithvi._V2.mean, prithvi._V2.std))
    pixels = torch.where(stored == -9999, 0.0, (stored - mean) / std)
    assert torch.equal(bundle.encoder([EncoderInput(pixels, HLS)])[0].cls, bundle(stored))
    one_date = bundle(stored[:, :, 0])
    assert torch.equal(one_date, bundle(stored[:, :, :1]))


def test_foreign_positions_are_refused(tmp_path: Path) -> None:
    file = tiny_file(TINY, 3)
    file["pos_embed"] = file["pos_embed"] + 0.1
    torch.save(file, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: not the weights of prithvi_eo_tiny: pos_embed"):
        read_released(tmp_path / "other.pt", find_released(TINY))


def test_an_encoder_that_is_told_is_no_other(tmp_path: Path) -> None:
    torch.save(tiny_file(f"{TINY}_tl", 4), tmp_path / "told.pt")
    with pytest.raises(ValueError, match="time_encoding"):
        read_released(tmp_path / "told.pt", find_released(TINY))
    encoder = read_released(tmp_path / "told.pt", find_released(f"{TINY}_tl"))[0]
    with pytest.raises(ValueError, match="time_encoding"):
        released_state_dict(encoder, find_released(TINY))


def test_whole_files_have_as_many_tensors_as_published() -> None:
    """The encoder's names, with those of the decoder of which the same are published for all models."""
    n_decoder = 1 + 1 + 2 + 8 * 12 + 2 + 2  # mask token, positions, embedding, blocks, norm, prediction
    for name, expected in N_TENSORS.items():
        released = find_released(name)
        with torch.device("meta"):
            encoder = Encoder(released.config, released.n_channels)
        n_told = 2 * released.config.time_encoding
        assert len(encoder.state_dict()) + 1 + n_decoder + n_told == expected
