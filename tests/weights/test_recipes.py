"""Entries of our own recipes: `ssl_eo/recipes.json` is what they make, and bundles of anything else are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("h5py")
pytest.importorskip("rasterio")

from launching import ROOT
from make_recipes import RECIPES as TABLE
from make_recipes import recipes, small

from ssl_eo.cli import main
from ssl_eo.hub import BundleEncoder, BundlePair, load_bundle, write_bundle, write_pair_bundle
from ssl_eo.sensors import load_sensor
from ssl_eo.weights import _recipes

MICRO, CROMA = "mae_vitmicro4_eurosat", "croma_vitb8_ssl4eo"
ONE_STEP = (
    *("train.total_steps=1", "train.global_batch_size=8", "train.precision=float32", "optim.warmup_steps=0"),
    *("data.sources[0].split=all", "data.n_workers=0", "log.report=false", "checkpoint.every_n_steps=1"),
    *("eval.tasks=[]", "eval.every_n_steps=0", "eval.health_every_n_steps=0", "log.pictures_every_n_steps=0"),
)


def load(name: str, *args: Any, **kwargs: Any) -> Any:
    return torch.hub.load(str(ROOT), name, *args, source="local", **kwargs)


def test_the_table_is_what_the_recipes_make() -> None:
    assert TABLE.read_text(encoding="utf-8") == recipes(), "run python tests/make_recipes.py"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one step of the recipe, by the commands."""
    folder = tmp_path_factory.mktemp("recipe")
    small.ARCHIVES["eurosat webdataset"].write(folder / "eurosat_rgb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_EO_SAMPLES", str(folder))
        assert main(["train", "--config", f"pretrain/{MICRO}", f"run.out_dir={folder}", *ONE_STEP]) == 0
    assert main(["export", "--checkpoint", str(folder / MICRO), "--out", str(folder / "bundle")]) == 0
    return folder / "bundle"


def test_a_bundle_of_the_recipe_has_its_features(bundle: Path) -> None:
    model, expected = load(MICRO, pretrained=str(bundle)), load_bundle(bundle)
    assert (model.facts, model.inputs, model.training) == (expected.facts, expected.inputs, False)
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))


def test_random_weights_take_normalised_pixels() -> None:
    model = load(MICRO, pretrained=False)
    assert isinstance(model, BundleEncoder)
    assert not model.training
    assert model.inputs == {}
    features = {"pool": "mean_std", "taps": [0.25, 0.5, 0.75, 1.0]}
    assert model.facts == {"objective": "mae", "features": features, "step": 0}
    assert not torch.equal(*(one.encoder.patch_embed.proj.weight for one in (model, load(MICRO, pretrained=False))))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 8, 8), channels=load_sensor("rgb").channel_meta()).shape == (1, 128)


def _narrow(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The recipe with one block of each encoder, of 64 values."""
    found = dict(_recipes.RECIPES[name])
    small_ones = {
        group: {**part, "encoder": {**part["encoder"], "embed_dim": 64, "depth": 1}}
        for group, part in found["encoders"].items()
    }
    monkeypatch.setitem(_recipes.RECIPES, name, {**found, "encoders": small_ones, "cross_depth": 1})


def test_a_recipe_of_two_encoders_gives_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _narrow(monkeypatch, CROMA)
    pair = load(CROMA, pretrained=False)
    assert isinstance(pair, BundlePair)
    assert pair.facts["published"] == "optical"
    no_inputs: dict[str, Any] = {"optical": {}, "radar": {}}
    write_pair_bundle(tmp_path / "both", pair.model, no_inputs, pair.facts)
    read = load(CROMA, str(tmp_path / "both"))
    images = torch.randn(1, 12, 16, 16), torch.randn(1, 2, 16, 16)
    channels = [
        load_sensor(name).channel_meta(bands)
        for name, bands in (("sentinel2_l2a", None), ("sentinel1_grd", ["VV", "VH"]))
    ]
    with torch.no_grad():
        assert torch.equal(read(*images, *channels), pair(*images, *channels))
    write_bundle(tmp_path / "one", pair.encoder, {}, {})
    with pytest.raises(ValueError, match=rf"one: it holds one encoder, and the recipe {CROMA} makes two: .* --whole$"):
        load(CROMA, str(tmp_path / "one"))
    with pytest.raises(ValueError, match=rf"both: it holds two encoders, and the recipe {MICRO} makes one$"):
        load(MICRO, str(tmp_path / "both"))
    monkeypatch.setitem(_recipes.RECIPES, CROMA, {**_recipes.RECIPES[CROMA], "cross_depth": 6})
    with pytest.raises(ValueError, match=rf"both: not of the recipe {CROMA}: its cross_depth is 1, expected 6"):
        load(CROMA, str(tmp_path / "both"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mae_vitt8_eurosat", "its encoder.embed_dim is 128, expected 192"),
        ("dinov2_vitmicro4_eurosat", "its encoder.mask_token is False, expected True"),
    ],
)
def test_a_bundle_of_another_recipe_is_one_clear_line(bundle: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{bundle}: not of the recipe {name}: {message}; the entry `encoder` takes"):
        load(name, str(bundle))


def test_what_features_do_not_depend_on_may_differ(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop-path is for training, and an encoder with a convolution has no attention over channels."""
    found = _recipes.RECIPES[MICRO]
    unused = {**found["encoder"]["channel_attention"], "elevation": True}
    changed = {**found["encoder"], "drop_path_prob": 0.3, "channel_attention": unused}
    monkeypatch.setitem(_recipes.RECIPES, MICRO, {**found, "encoder": changed})
    assert isinstance(load(MICRO, str(bundle)), BundleEncoder)
    monkeypatch.setitem(_recipes.RECIPES, MICRO, {**found, "encoder": {**changed, "conv": {"padding": 1}}})
    with pytest.raises(ValueError, match=r"its encoder\.conv\.padding is 0, expected 1"):
        load(MICRO, str(bundle))


def test_another_number_of_bands_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_recipes.RECIPES, MICRO, {**_recipes.RECIPES[MICRO], "n_channels": 4})
    with pytest.raises(ValueError, match="its n_channels is 3, expected 4"):
        load(MICRO, str(bundle))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (MICRO, {}, rf"ssl-eo train --config pretrain/{MICRO}, then ssl-eo export\), or False for random weights"),
        (CROMA, {"pretrained": True}, r"ssl-eo export --whole\), or False"),
        (MICRO, {"pretrained": False, "sha256": "0" * 64}, "sha256 is that of a file, and pretrained=False reads none"),
        (MICRO, {"pretrained": "nowhere.zip"}, "nowhere.zip: no such file"),
    ],
)
def test_what_names_no_weights_is_one_clear_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


def test_a_name_that_a_published_encoder_has_is_not_taken_from_it() -> None:
    entries = _recipes.entries(taken={"dofa_vitb16"})
    assert {*_recipes.RECIPES, "dofa_vitb16_recipe"} - {"dofa_vitb16"} == entries.keys()
    with torch.device("meta"):
        assert load("dofa_vitb16", pretrained=False).inputs.keys() != set()
        assert load("dofa_vitb16_recipe", pretrained=False).inputs == {}
