"""Our encoder computes what the published code of DOFA computes; its files come in whatever was saved with them.

The numbers in `golden/dofa.json` are the published code's, by `make_dofa_golden.py` beside this file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from dofa_cases import CASES, SAR_UM, DofaCase
from released_formula import summary, uniform, weights
from torch import Tensor

from ssl_eo.cli import main
from ssl_eo.hub import load_bundle
from ssl_eo.models.patch_embed import DynamicConfig
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.sensors import Band, ChannelMeta, Sensor
from ssl_eo.weights import base, dofa
from ssl_eo.weights.base import Released, build_encoder, find_released, released_state_dict

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "dofa.json").read_text())
TOLERANCE = 1e-5  # outputs are of order 1
NAMES = ("dofa_vitb16", "dofa_vitl16", "dofa_vitb16_legacy", "dofa_vitl16_legacy")


def channels_of(um: tuple[float, ...]) -> ChannelMeta:
    """As our sensors say it: SAR has its true wavelength, and a polarisation."""
    bands = []
    for i, (wavelength, polarization) in enumerate(zip(um, ("VV", "VH") * len(um), strict=False)):
        if wavelength == SAR_UM:
            bands.append(Band(f"b{i}", "sar", 10.0, wavelength_um=55_466.0, polarization=polarization))
        else:
            bands.append(Band(f"b{i}", "optical", 10.0, wavelength_um=wavelength))
    return Sensor("any", "any", tuple(bands), "float32", "any", "any").channel_meta()


def shapes_of(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Encoder(config).state_dict().items()}


def published(config: EncoderConfig, *norms: str, **more: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors by formula of a file that has `norms` (norm, fc_norm) and `more`."""
    width = (config.width,)
    shapes = {name: shape for name, shape in shapes_of(config).items() if not name.startswith("norm.")}
    of_norms = {f"{norm}.{key}": width for norm in norms for key in ("weight", "bias")}
    return weights({**shapes, **of_norms, **more})


@lru_cache(maxsize=1)
def filled(model: str, depth: int | None, size: int, norm: str) -> Encoder:
    released = find_released(model)
    released = replace(released, config=replace(released.config, depth=depth, image_size=size))
    width = released.config.width
    head = {"head.weight": (45, width), "head.bias": (45,)}
    return build_encoder(published(released.config, norm, **head), released, "file")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_numbers_of_the_published_code(case: DofaCase) -> None:
    encoder = filled(case.model, case.depth, case.size, "fc_norm" if case.global_pool else "norm")
    expected = GOLDEN[case.name]
    n_of_norm_and_head = 4
    assert len(encoder.state_dict()) - 2 + n_of_norm_and_head == expected["n_tensors"]
    item = EncoderInput(case.pixels(), channels_of(case.um))
    tokens = encoder.intermediates(item, case.layers, norm=False)
    found = {f"block {layer}": t.x for layer, t in zip(case.layers, tokens, strict=True)}
    found["features"] = encoder.norm(tokens[-1].patches.mean(1)) if case.global_pool else encoder([item])[0].cls
    assert found.keys() == expected["outputs"].keys()
    for name, numbers in expected["outputs"].items():
        ours = summary(found[name])
        assert ours["values"] == pytest.approx(numbers["values"], abs=TOLERANCE, rel=0), name
        assert (ours["mean"], ours["std"]) == pytest.approx((numbers["mean"], numbers["std"]), abs=TOLERANCE), name


def test_names_and_shapes_are_those_of_the_published_model() -> None:
    expected = {name: tuple(shape) for name, shape in GOLDEN["shapes"].items()}
    assert (len(expected), sum(map(prod, expected.values()))) == (172, 111_346_733)
    ours = shapes_of(find_released("dofa_vitb16").config)
    fc_norm = {name.replace("norm.", "fc_norm."): ours.pop(name) for name in ("norm.weight", "norm.bias")}
    assert {**ours, **fc_norm, "head.weight": (45, 768), "head.bias": (45,)} == expected
    large = shapes_of(find_released("dofa_vitl16").config)
    head = 45 * 1024 + 45
    assert (len(large) + 2, sum(map(prod, large.values())) + head) == (316, 337_151_533)


def test_the_two_layouts_are_different_functions_of_the_same_tensors() -> None:
    x = EncoderInput(uniform("x", (1, 3, 32, 32)), channels_of((0.665, 0.56, 0.49)))
    found = []
    for name in ("dofa_vitb16", "dofa_vitb16_legacy"):
        config = replace(TINY, dynamic=replace(TINY.dynamic, layout=find_released(name).config.dynamic.layout))
        encoder = build_encoder(published(TINY, "norm"), _tiny(name, config), "file")
        found.append(encoder([x])[0].cls)
    assert (found[0] - found[1]).abs().max() > 0.1


TINY = EncoderConfig(
    embed_dim=16,
    depth=2,
    n_heads=2,
    patch_size=8,
    image_size=32,
    position="learned",
    patch_embed="dynamic",
    dynamic=DynamicConfig(generator_dim=8, n_weight_tokens=4, n_heads=2, ffn_dim=16, padding=1, sar="dofa_v1"),
)


def _tiny(like: str = "dofa_vitb16", config: EncoderConfig = TINY) -> Released:
    return replace(find_released(like), name="dofa_tiny", config=config, sha256=())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Released:
    """One more model in the table of DOFA, so that files are small."""
    released = _tiny()
    monkeypatch.setattr(dofa, "MODELS", (*dofa.MODELS, released))
    return released


@pytest.mark.parametrize(("version", "placeholder"), [("dofa_v1", 3.75), ("dofa_v2", 5.405)])
@torch.no_grad()
def test_sar_is_the_placeholder_of_its_version(version: str, placeholder: float) -> None:
    """A sensor's own wavelength never reaches the generator, which cannot tell VV from VH."""
    config = replace(TINY, dynamic=replace(TINY.dynamic, sar=version))
    embed = build_encoder(published(TINY, "norm"), _tiny(config=config), "file").patch_embed
    sar = channels_of((SAR_UM, SAR_UM))
    as_optical = replace(sar, kind=torch.zeros_like(sar.kind))
    codes = embed.codes(sar)
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(embed.codes(replace(as_optical, wavelength_um=torch.full((2,), placeholder))), codes)
    for other in (3.75 + 5.405 - placeholder, 55_466.0):
        assert not torch.equal(embed.codes(replace(as_optical, wavelength_um=torch.full((2,), other))), codes)


@pytest.mark.parametrize("left", ["norm.bias", "norm.weight", "fc_norm.bias", "fc_norm.weight"])
def test_half_a_norm_is_refused(left: str, tiny: Released) -> None:
    """The other half would be made up."""
    tensors = published(TINY, left.partition(".")[0])
    gone = "weight" if left.endswith("bias") else "bias"
    tensors.pop(f"{left.partition('.')[0]}.{gone}")
    with pytest.raises(ValueError, match="missing"):
        build_encoder(tensors, tiny, "file")


@pytest.mark.parametrize("norms", [("norm",), ("fc_norm",), ()], ids=["authors", "classifier", "torchgeo"])
def test_files_with_either_norm_or_none(norms: tuple[str, ...], tiny: Released) -> None:
    """What pretraining and a classifier had beside the encoder is left out; everything else must fit."""
    more = {"head.weight": (45, 16), "head.bias": (45,), "mask_token": (1, 1, 8)}
    more |= {"projector.weight": (16, 16), "projector.bias": (16,), "decoder_embed.weight": (8, 16)}
    more |= {"decoder_pos_embed": (1, 17, 8), "decoder_pred.weight_generator.bias_token": (1, 8)}
    tensors = published(TINY, *norms, **more)
    found = build_encoder(tensors, tiny, "file").state_dict()
    assert found.keys() == shapes_of(TINY).keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found if not name.startswith("norm."))
    for key, initial in (("weight", torch.ones(16)), ("bias", torch.zeros(16))):
        assert torch.equal(found[f"norm.{key}"], tensors[f"{norms[0]}.{key}"] if norms else initial)
    tensors["blocks.0.ls1.gamma"] = tensors.pop("pos_embed")
    with pytest.raises(ValueError, match=r"1 missing \(pos_embed\); 1 not expected \(blocks.0.ls1.gamma\)"):
        build_encoder(tensors, tiny, "file")


def test_a_training_state_with_its_teacher(tiny: Released, tmp_path: Path) -> None:
    """A frozen vision transformer of another shape stands beside the student, which has no prefix."""
    tensors = published(TINY, "norm")
    teacher = {
        f"teacher.{name}": torch.ones(shape) for name, shape in {"cls_token": (1, 1, 24), "norm.bias": (24,)}.items()
    }
    torch.save({**tensors, **teacher, "projector.weight": torch.ones(24, 16)}, tmp_path / "full.pth")
    found = base.read_released(tmp_path / "full.pth", base.find_released("dofa_tiny"), prefix="")[0].state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found)


def test_positions_are_loaded_and_their_grid_is_read_off(tiny: Released) -> None:
    tensors = published(replace(TINY, image_size=48), "norm")
    encoder = build_encoder(tensors, tiny, "file")
    assert encoder.cfg.image_size == 48
    assert encoder.pos_embed is not None
    assert torch.equal(encoder.pos_embed, tensors["pos_embed"])
    assert tensors["pos_embed"].any()


def test_in_and_out_again_and_what_the_bundle_says(tiny: Released, tmp_path: Path) -> None:
    tensors = published(TINY, "norm", mask_token=(1, 1, 8))
    torch.save({"model": tensors}, tmp_path / "dofa.pth")
    bundle, out = tmp_path / "bundle", tmp_path / "back.pth"
    assert main(["import", str(tmp_path / "dofa.pth"), "--as", "dofa_tiny", "--out", str(bundle)]) == 0
    assert main(["export", "--checkpoint", str(bundle), "--as", "dofa_tiny", "--out", str(out)]) == 0
    back = torch.load(out, weights_only=True)
    assert back.keys() == tensors.keys() - {"mask_token"}
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    model = load_bundle(bundle)
    assert model.facts["features"] == {"pool": "mean", "taps": [1.0]}
    assert (model.encoder.cfg.dynamic.sar, model.encoder.cfg.dynamic.padding) == ("dofa_v1", 1)
    known = model.inputs["sentinel2"]
    assert known.sensor.channel_meta().wavelength_um.tolist() == pytest.approx(
        [0.665, 0.56, 0.49, 0.705, 0.74, 0.783, 0.842, 1.61, 2.19]
    )
    assert known.sensor.dtype == "uint8"
    assert {name: len(known.bands) for name, known in model.inputs.items()} == {
        "sentinel2": 9,
        "sentinel1": 2,
        "rgb": 3,
        "gaofen2": 4,
    }
    with torch.no_grad():
        found = model(uniform("images", (1, 2, 32, 32)).add(2).mul(50), sensor="sentinel1")
    assert found.isfinite().all()


def test_another_convention_is_not_exported(tiny: Released) -> None:
    encoder = Encoder(replace(TINY, dynamic=replace(TINY.dynamic, padding=0)))
    encoder.init_weights()
    with pytest.raises(ValueError, match="this encoder is no dofa_tiny: its dynamic is"):
        released_state_dict(encoder, tiny)


def test_a_file_that_is_known_goes_by_no_other_name(
    tiny: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(published(TINY), tmp_path / "dofa.pth")
    with (tmp_path / "dofa.pth").open("rb") as file:
        digits = base.hashlib.file_digest(file, "sha256").hexdigest()[:8]
    legacy = replace(_tiny("dofa_vitb16_legacy"), name="dofa_tiny_legacy", sha256=(digits,))
    monkeypatch.setattr(dofa, "MODELS", (*dofa.MODELS, legacy))
    words = ["import", str(tmp_path / "dofa.pth"), "--out", str(tmp_path / "out"), "--as"]
    assert main([*words, "dofa_tiny"]) == 2
    assert "this is the file of dofa_tiny_legacy, by its SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "dofa_tiny_legacy"]) == 0


def test_the_hint_does_not_choose_between_the_layouts() -> None:
    shapes = shapes_of(find_released("dofa_vitb16").config)
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="it is one of dofa_vitb16 or dofa_vitb16_legacy: choose --as "):
        build_encoder(tensors, find_released("dinov2_vitb14"), "file")


def test_every_released_model_has_its_files_and_convention() -> None:
    models = [find_released(name) for name in NAMES]
    assert [m.sha256 for m in models] == [("a0275954",), ("0ff904d3",), ("7cc0f413",), ("fbd47fa9",)]
    assert [m.config.dynamic.layout for m in models] == ["channel_major"] * 2 + ["legacy"] * 2
    assert {(m.config.dynamic.padding, m.config.dynamic.sar, m.pool) for m in models} == {(1, "dofa_v1", "mean")}
