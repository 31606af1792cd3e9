"""Published CROMA computes in our modules what it does in its own, becomes a bundle, and goes back unchanged.

The numbers in `golden/croma.json` are the published code's, by `make_croma_golden.py` beside this file: weights and
pixels come from a formula, so no file of theirs is needed. Of each output 24 evenly spaced values are compared, and the
mean and standard deviation of all.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from croma_formula import CROMA, CromaCase
from released_formula import summary, weights
from torch import Tensor

from ssl_eo.cli import main
from ssl_eo.hub import BundleEncoder, BundlePair, load_bundle
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.models.vit import EncoderInput
from ssl_eo.sensors import load_sensor
from ssl_eo.weights import croma
from ssl_eo.weights.croma import PAIRS, ReleasedPair, build_pair, load_pair, pair_inputs, pair_state_dicts

GOLDEN = Path(__file__).parent / "golden" / "croma.json"
TOLERANCE = 1e-5  # outputs are of order 1
OPTICAL = [band for band in load_sensor("sentinel2_l2a").band_names if band != "B10"]
RADAR = ["VV", "VH"]
COUNTS = {  # tensors of each dictionary and parameters of the published code
    "croma_base": (
        {"s1_encoder": 70, "s1_GAP_FFN": 6, "s2_encoder": 136, "s2_GAP_FFN": 6, "joint_encoder": 110},
        194_365_440,
    ),
    "croma_large": (
        {"s1_encoder": 136, "s1_GAP_FFN": 6, "s2_encoder": 268, "s2_GAP_FFN": 6, "joint_encoder": 218},
        672_557_056,
    ),
}


def inputs_of(images: tuple[Tensor, Tensor]) -> tuple[EncoderInput, EncoderInput]:
    metas = load_sensor("sentinel2_l2a").channel_meta(OPTICAL), load_sensor("sentinel1_grd").channel_meta(RADAR)
    optical, radar = (EncoderInput(pixels, meta) for pixels, meta in zip(images, metas, strict=True))
    return optical, radar


@torch.no_grad()
def outputs_of(model: OpticalRadar, case: CromaCase) -> dict[str, Tensor]:
    optical, radar, joint = model(*inputs_of(case.images()))
    return {
        "optical tokens": optical.x,
        "optical": model.optical_head(optical),
        "radar tokens": radar.x,
        "radar": model.radar_head(radar),
        "joint tokens": joint.x,
        "joint": joint.pooled,
    }


def cut(size: str, **changes: Any) -> ReleasedPair:
    pair = PAIRS[f"croma_{size}"]
    return replace(pair, config=replace(pair.config, **changes))


def published_weights(pair: ReleasedPair) -> dict[str, Tensor]:
    """By their dotted names, by formula."""
    shapes = {}
    for part, tensors in layout(pair).items():
        shapes |= {f"{part}.{name}": tuple(value.shape) for name, value in tensors.items()}
    return weights(shapes)


@cache
def _filled_model(case: CromaCase) -> OpticalRadar:
    pair = cut(case.size, depth=case.depth)
    return build_pair(published_weights(pair), pair, case.name)


def layout(pair: ReleasedPair) -> dict[str, dict[str, Tensor]]:
    model = pair.build()
    model.to_empty(device="cpu")
    return pair_state_dicts(model, pair, pair_inputs())


@pytest.mark.parametrize("case", CROMA, ids=lambda case: case.name)
def test_numbers_of_the_published_code(case: CromaCase) -> None:
    golden = json.loads(GOLDEN.read_text())[case.name]
    assert {part: len(tensors) for part, tensors in layout(cut(case.size, depth=case.depth)).items()} == golden[
        "n_tensors"
    ]
    found = outputs_of(_filled_model(case), case)
    assert found.keys() == golden["outputs"].keys()
    for name, expected in golden["outputs"].items():
        ours = summary(found[name])
        assert ours["values"] == pytest.approx(expected["values"], abs=TOLERANCE, rel=0), name
        assert (ours["mean"], ours["std"]) == pytest.approx((expected["mean"], expected["std"]), abs=TOLERANCE), name


@pytest.mark.parametrize("name", PAIRS)
def test_models_are_those_that_were_published(name: str) -> None:
    tensors, n_parameters = COUNTS[name]
    model = PAIRS[name].build()
    assert sum(value.numel() for value in model.state_dict().values()) == n_parameters
    theirs = [n for ours in model.state_dict() for n in croma._published_names(ours)]
    assert len(set(theirs)) == len(theirs)
    parts = [n.partition(".")[0] for n in theirs]
    assert {part: parts.count(part) for part in parts} == tensors


# --- a small one, through files ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ReleasedPair:
    """One more model in the table, so that files are small."""
    pair = replace(cut("base", embed_dim=64, depth=2), name="croma_tiny")
    monkeypatch.setitem(PAIRS, "croma_tiny", pair)
    return pair


@pytest.fixture
def file(tiny: ReleasedPair, tmp_path: Path) -> Path:
    torch.save(nested(published_weights(tiny)), tmp_path / "CROMA_tiny.pt")
    return tmp_path / "CROMA_tiny.pt"


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        out.setdefault(part, {})[key] = tensor
    return out


def test_in_as_a_bundle_and_out_again_every_bit_stays(file: Path, tmp_path: Path, capsys: Any) -> None:
    bundle, back = tmp_path / "bundle", tmp_path / "back.pt"
    assert main(["import", str(file), "--as", "croma_tiny", "--out", str(bundle)]) == 0
    assert "croma_tiny; its weights are under MIT, see https://github.com/antofuller/CROMA" in capsys.readouterr().out
    assert main(["export", "--checkpoint", str(bundle), "--as", "croma_tiny", "--out", str(back)]) == 0
    before, after = (torch.load(path, weights_only=True) for path in (file, back))
    assert before.keys() == after.keys()
    for part, tensors in before.items():
        assert tensors.keys() == after[part].keys()
        assert all(torch.equal(tensor, after[part][name]) for name, tensor in tensors.items())
    assert back.stat().st_size < 1.1 * file.stat().st_size  # no tensor is stored twice


def test_a_bundle_of_both_is_written_anew(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As any bundle: in the newest format, under another licence; all else stays."""
    bundle, again = tmp_path / "bundle", tmp_path / "again"
    croma.import_pair(file, "croma_tiny", bundle)
    words = ["export", "--checkpoint", str(bundle), "--licence", "mine", "--out", str(again)]
    assert main(words) == 2
    assert "it holds two encoders; add --whole or --as" in capsys.readouterr().err
    assert main([*words, "--whole"]) == 0
    old, new = load_bundle(bundle), load_bundle(again)
    assert isinstance(old, BundlePair)
    assert isinstance(new, BundlePair)
    assert new.inputs == old.inputs == pair_inputs()
    assert new.facts == {**old.facts, "licence": "mine"}
    expected = old.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in new.state_dict().items())


def test_the_bundle_takes_stored_values(file: Path, tiny: ReleasedPair, tmp_path: Path) -> None:
    """Cut at two standard deviations and mapped to [0, 1], with the statistics of SSL4EO-S12."""
    croma.import_pair(file, "croma_tiny", tmp_path / "bundle")
    bundle, model = load_bundle(tmp_path / "bundle"), load_pair(file, tiny)
    assert isinstance(bundle, BundlePair)
    assert list(bundle.optical.inputs) == ["sentinel2_l2a", "sentinel2_l1c"]
    known = bundle.optical.inputs["sentinel2_l1c"]
    assert known.bands == tuple(OPTICAL)
    generator = torch.Generator().manual_seed(0)
    optical = torch.randint(1, 6000, (2, 12, 32, 32), generator=generator)
    radar = torch.rand((2, 2, 32, 32), generator=generator) * 30 - 30
    pixels = []
    for images, given in ((optical, known), (radar, bundle.radar.inputs["sentinel1_grd"])):
        mean, std = (torch.tensor(values)[:, None, None] for values in (given.mean, given.std))
        low, high = mean - 2 * std, mean + 2 * std
        pixels.append(((images - low) / (high - low)).clip(0, 1))
    with torch.no_grad():
        tokens = model(*inputs_of((pixels[0], pixels[1])))
        torch.testing.assert_close(bundle.optical(optical, "sentinel2_l1c"), model.optical_head(tokens[0]))
        torch.testing.assert_close(bundle.radar(radar), model.radar_head(tokens[1]))
        torch.testing.assert_close(bundle.joint_features(optical, radar, "sentinel2_l1c").x, tokens[2].x)
        torch.testing.assert_close(bundle(optical, radar, "sentinel2_l1c"), tokens[2].x.mean(1))
        metas = [item.channels for item in inputs_of((pixels[0], pixels[1]))]
        torch.testing.assert_close(bundle.joint(*pixels, *metas), tokens[2].x.mean(1))
        nothing = torch.zeros(1, 12, 8, 8)  # no-data of Sentinel-2: as dark as the mean of the band
        assert (bundle.optical.prepare(nothing, "sentinel2_l2a").pixels == 0.5).all()
    assert bundle.encoder is bundle.optical.encoder
    assert not bundle.training
    with pytest.raises(ValueError, match="radar patches form a grid"):
        bundle.joint(optical, radar[..., :24], "sentinel2_l1c")


def test_the_published_encoder_can_be_probed_and_begun_from(file: Path, tmp_path: Path) -> None:
    from ssl_eo.train.export import open_encoder, open_pair

    croma.import_pair(file, "croma_tiny", tmp_path / "bundle")
    found = open_encoder(tmp_path / "bundle")
    encoder = found.encoder
    assert (encoder.n_channels, found.facts["step"], found.facts["features"]["pool"]) == (12, 1, "mean")
    assert open_pair(tmp_path / "bundle").model.optical.n_channels == 12
    single = tmp_path / "single"
    from ssl_eo.hub import write_bundle

    write_bundle(single, encoder, pair_inputs()["optical"], {"step": 1})
    loaded = load_bundle(single)
    assert isinstance(loaded, BundleEncoder)
    assert loaded.inputs == pair_inputs()["optical"]
    with pytest.raises(ValueError, match="it holds one encoder"):
        open_pair(single)


def test_files_that_do_not_fit_are_refused(file: Path, tiny: ReleasedPair, tmp_path: Path) -> None:
    tensors = published_weights(tiny)
    missing = {k: v for k, v in tensors.items() if k != "joint_encoder.layers.0.1.to_v.weight"}
    with pytest.raises(
        ValueError, match=r"x: not the weights of croma_tiny: 1 .* joint_encoder.layers.0.1.to_v.weight is"
    ):
        build_pair(missing, tiny, "x")
    with pytest.raises(ValueError, match=r"s1_encoder\.cls is not expected"):
        build_pair({**tensors, "s1_encoder.cls": torch.zeros(1)}, tiny, "x")
    name = "s2_encoder.linear_input.weight"
    with pytest.raises(ValueError, match=rf"{name} is \[64, 832\] of torch.float32, expected \[64, 768\]"):
        build_pair({**tensors, name: torch.zeros(64, 13 * 64)}, tiny, "x")
    with pytest.raises(ValueError, match=r"^x: \d+ tensors have values that are NaN .* first is optical\."):
        build_pair({**tensors, name: torch.full_like(tensors[name], torch.inf)}, tiny, "x")
    with pytest.raises(ValueError, match=r"not the weights of croma_base"):
        load_pair(file, PAIRS["croma_base"])
    model = build_pair(tensors, tiny, "x")
    with pytest.raises(ValueError, match="its heads is 16, expected 8"):
        pair_state_dicts(model, replace(tiny, config=replace(tiny.config, n_heads=8)), pair_inputs())
    with pytest.raises(ValueError, match=r"this model is no croma_base: .* tensors do not fit it, the first is"):
        pair_state_dicts(model, PAIRS["croma_base"], pair_inputs())
    out = tmp_path / "bundle"
    croma.import_pair(file, "croma_tiny", out)
    with pytest.raises(ValueError, match="holds a bundle already"):
        croma.import_pair(file, "croma_tiny", out)
    with pytest.raises(ValueError, match=r"must end in \.pt or \.pth"):
        croma.export_pair(model, "croma_tiny", pair_inputs(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="exists already"):
        croma.export_pair(model, "croma_tiny", pair_inputs(), file)


def test_bands_in_another_order_go_back_in_the_published_one(tiny: ReleasedPair) -> None:
    """Else published code would take near infrared for blue, and nobody would be told."""
    tensors = published_weights(tiny)
    model, inputs = build_pair(tensors, tiny, "x"), pair_inputs()
    order = [*range(6, 12), *range(6)]
    known = inputs["optical"]["sentinel2_l2a"]
    bands, mean, std = (tuple(values[i] for i in order) for values in (known.bands, known.mean, known.std))
    with torch.no_grad():
        weight = model.optical.patch_embed.get_parameter("proj.weight")
        weight.copy_(weight[:, order].clone())
    turned = {**inputs, "optical": {"sentinel2_l2a": replace(known, bands=bands, mean=mean, std=std)}}
    found = pair_state_dicts(model, tiny, turned)
    assert all(torch.equal(value, tensors[f"s2_encoder.{name}"]) for name, value in found["s2_encoder"].items())
    with pytest.raises(ValueError, match=r"its optical encoder was trained on .*, in one order"):
        pair_state_dicts(model, tiny, {**inputs, "optical": {**inputs["optical"], **turned["optical"]}})
    other = replace(known, bands=known.bands[:11], mean=known.mean[:11], std=known.std[:11])
    with pytest.raises(ValueError, match=r"trained on B01, B02, .*, expected B01"):
        pair_state_dicts(model, tiny, {**inputs, "optical": {"sentinel2_l2a": other}})


def test_damaged_bundles_are_refused(file: Path, tmp_path: Path) -> None:
    croma.import_pair(file, "croma_tiny", tmp_path)
    path = tmp_path / "encoder.json"
    page = json.loads(path.read_text())
    for change, message in (
        (lambda p: p.pop("encoders"), "key 'encoders' is missing"),
        (lambda p: p["encoders"]["radar"]["encoder"].update(depth=4), "tensors do not fit the encoder"),
        (lambda p: p.update(cross_depth="3"), "cross_depth must be a whole number"),
        (lambda p: p.update(cross_depth=10**9), "too many for a file"),
        (lambda p: p.update(format="pair 2"), "bundle format 'pair 2', expected a number"),
    ):
        changed = json.loads(json.dumps(page))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_bundle(tmp_path)
