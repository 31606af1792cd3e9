"""An encoder made for one sensor gives the features it gave for that sensor, and needs no word about it."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_eo.baking import bake
from ssl_eo.bundles import BundleEncoder
from ssl_eo.cli import main
from ssl_eo.hub import UNSAID, SensorInput, load_bundle, write_bundle
from ssl_eo.models.patch_embed import DynamicConfig
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.sensors import load_sensor

BANDS = ("B02", "B03", "B04", "B08")
SMALL = EncoderConfig(
    embed_dim=32,
    depth=2,
    n_heads=2,
    patch_size=4,
    n_registers=1,
    position="learned",
    image_size=16,
    mask_token=True,
    patch_embed="dynamic",
    dynamic=DynamicConfig(generator_dim=16, n_weight_tokens=4, n_heads=2, ffn_dim=32),
)


def _inputs() -> dict[str, SensorInput]:
    s2, s1 = load_sensor("sentinel2_l2a"), load_sensor("sentinel1_grd")
    mean, std = (900.0, 1000.0, 1100.0, 2500.0), (300.0, 400.0, 500.0, 900.0)
    return {
        "sentinel2_l2a": SensorInput(s2, BANDS, mean, std, 10.0),
        "sentinel1_grd": SensorInput(s1, ("VV", "VH"), (-12.5, -20.0), (5.0, 6.0), 10.0, clip_std=2.0),
    }


def _encoder(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    cfg = replace(SMALL, **changes)
    encoder = Encoder(cfg, len(BANDS) if cfg.patch_embed == "conv" else None)
    encoder.init_weights()
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if "fc_weight" in name:
                value.mul_(100.0)  # untrained kernels are too small for pixels to be seen beside the positions
    return encoder.eval()


def _images(known: SensorInput) -> torch.Tensor:
    """Stored values, some of which were not measured."""
    noise = torch.randn(2, len(known.bands), 8, 12, generator=torch.Generator().manual_seed(1))
    images = noise * torch.tensor(known.std)[:, None, None] + torch.tensor(known.mean)[:, None, None]
    images[0, 0, :3], images[1, 1, 4, 4] = 0.0, torch.nan
    return images


DOFA = replace(SMALL.dynamic, padding=1, sar="dofa_v1")


@pytest.mark.parametrize("sensor", ["sentinel2_l2a", "sentinel1_grd"])
@pytest.mark.parametrize("dynamic", [SMALL.dynamic, DOFA, replace(DOFA, layout="legacy")], ids=["own", "v1", "old"])
@torch.no_grad()
def test_features_stay_what_they_were(dynamic: DynamicConfig, sensor: str) -> None:
    """Also of metres, of pixels that were not measured, and where no sensor is named."""
    for position in ("learned", "sincos_metres"):
        encoder, known = _encoder(dynamic=dynamic, position=position), _inputs()[sensor]
        baked = BundleEncoder(*bake(encoder, _inputs(), sensor), {})
        assert (baked.encoder.cfg.patch_embed, list(baked.inputs)) == ("conv", [sensor])
        images = _images(known)
        expected = BundleEncoder(encoder, _inputs(), {}).forward_features(images, sensor)
        torch.testing.assert_close(baked.forward_features(images).x, expected.x, atol=1e-5, rtol=0)
        assert not baked.encoder.training
        assert (expected.patches[0] - expected.patches[1]).abs().mean() > 0.1  # pixels make a difference


@pytest.mark.parametrize(("text", "bands"), [("rgb", ("B04", "B03", "B02")), ("B08,B02", ("B08", "B02"))])
@torch.no_grad()
def test_some_bands_of_a_sensor(text: str, bands: tuple[str, ...]) -> None:
    encoder, known = _encoder(), _inputs()["sentinel2_l2a"]
    baked = BundleEncoder(*bake(encoder, _inputs(), f"sentinel2_l2a:{text}"), {})
    assert baked.inputs["sentinel2_l2a"].bands == bands
    images = _images(known)[:, [known.bands.index(band) for band in bands]]
    expected = BundleEncoder(encoder, _inputs(), {})(images, "sentinel2_l2a", bands=bands)
    torch.testing.assert_close(baked(images), expected, atol=1e-5, rtol=0)


def test_it_knows_no_other_sensor() -> None:
    baked = BundleEncoder(*bake(_encoder(), _inputs(), "sentinel2_l2a"), {})
    with pytest.raises(ValueError, match="sensor 'sentinel1_grd': this encoder has statistics for sentinel2_l2a"):
        baked(torch.zeros(1, 2, 8, 8), "sentinel1_grd")
    with pytest.raises(ValueError, match="was built for one set of bands and cannot look at what others are"):
        baked(torch.zeros(1, 4, 8, 8), wavelengths_um=[0.5, 0.6, 0.7, 0.8])


def test_a_convolution_stays_what_it_is() -> None:
    encoder = _encoder(patch_embed="conv")
    baked, inputs = bake(encoder, _inputs(), "sentinel2_l2a")
    assert (baked.cfg, list(inputs)) == (encoder.cfg, ["sentinel2_l2a"])
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in baked.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "sensor", "problem"),
    [
        (
            {"patch_embed": "channel_attention"},
            "sentinel2_l2a",
            "bake sentinel2_l2a: channel attention cannot be baked into a convolution: how it weighs the channels",
        ),
        ({}, "landsat", r"bake landsat: .* no such sensor \(known: sentinel2_l2a, sentinel1_grd\)"),
        ({}, "sentinel2_l2a:B12", "bands of sentinel2_l2a: this encoder has no statistics of B12, but of B02, B03"),
        ({}, "sentinel2_l2a:red", "sensor sentinel2_l2a has no band 'red'"),
        ({"patch_embed": "conv"}, "sentinel2_l2a:rgb", "takes B02, B03, B04, B08, in this order"),
        ({"patch_embed": "conv"}, "sentinel1_grd", "bake sentinel1_grd: .* was built for 4 channels and got 2"),
    ],
)
def test_what_cannot_be_baked_is_said(changes: dict[str, Any], sensor: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        bake(_encoder(**changes), _inputs(), sensor)


# --- ssl-eo export ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "any", _encoder(), _inputs(), {**UNSAID, "step": 7, "commit": "0123abc"})
    return tmp_path / "any"


@torch.no_grad()
def test_export_bakes_a_bundle(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one"
    words = ["export", "--checkpoint", str(bundle), "--bake", "sentinel2_l2a", "--licence", "CC0-1.0"]
    assert main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out} (encoder after step 7)\n"
    images = _images(_inputs()["sentinel2_l2a"])
    before, after = load_bundle(bundle), load_bundle(out)
    torch.testing.assert_close(after(images), before(images, "sentinel2_l2a"), atol=1e-5, rtol=0)
    assert after.facts == {**before.facts, "baked": "sentinel2_l2a", "licence": "CC0-1.0"}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--bake", "sentinel2_l2a", "--whole"], "--bake is for a bundle of one encoder: leave out --whole and --as"),
        (["--bake", "sentinel2_l2a", "--as", "dofa_vitb16"], "--bake is for a bundle of one encoder"),
        (["--licence", "MIT", "--as", "dofa_vitb16"], "--licence is for a bundle, and other layouts have no place"),
        (["--bake", "hls"], "bake hls: this encoder has statistics for no such sensor"),
    ],
)
def test_export_refuses_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    assert main(["export", "--checkpoint", str(bundle), *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_measurement_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["baking.py", "--size", "toy", "--turns", "1"])
    runpy.run_path(str(folder / "baking.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("toy")]
    assert [row[4] for row in rows] == ["as", "baked", "difference"]
    assert rows[-1][-1] == "yes"
