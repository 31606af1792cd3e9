"""What a user may write for an encoder, how it is called then, and how its features are read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_eo import opening
from ssl_eo.bundles import BundleEncoder
from ssl_eo.cli import main
from ssl_eo.config import load as load_config
from ssl_eo.config import to_yaml
from ssl_eo.eval.provenance import digest_of_tensors
from ssl_eo.hub import write_bundle
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.opening import open_model
from ssl_eo.weights import croma, dinov2
from ssl_eo.weights._entries import fill_pair
from ssl_eo.weights.base import find_released, import_released

TINY = "dinov2_tiny"


def _encoder(config: EncoderConfig | None = None, n_channels: int | None = 12) -> Encoder:
    torch.manual_seed(0)
    conv = EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=8, patch_embed="conv")
    encoder = Encoder(config or conv, n_channels)
    encoder.init_weights()
    return encoder


def _weights(model: opening.OpenedEncoder) -> str:
    return digest_of_tensors(model.encoder.state_dict())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    write_bundle(folder, _encoder(), {}, {"step": 7, "features": {"pool": "cls", "taps": [1.0]}})
    return folder


@pytest.mark.parametrize("odd", ["d\udce9mo", "two\nlines"], ids=["not UTF-8", "a newline"])
def test_a_folder_whose_name_cannot_be_printed_needs_another(bundle: Path, odd: str) -> None:
    folder = bundle.rename(bundle.with_name(odd))
    with pytest.raises(ValueError, match=r"cannot be printed in a table; give a name: NAME=PATH$") as error:
        open_model(str(folder))
    assert str(error.value).isprintable()
    assert open_model(f"mine={folder}").name == "mine"


def test_a_run_that_has_only_begun_says_when_its_first_checkpoint_comes(tmp_path: Path) -> None:
    config = to_yaml(load_config("debug/mae", ["train.total_steps=70", "optim.warmup_steps=1"]))
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "checkpoints" / "step_00000070.partial").mkdir(parents=True)
    message = (
        r"this run has saved no checkpoint yet; the first comes after step 70 \(checkpoint.every_n_steps\), or where"
    )
    with pytest.raises(ValueError, match=message):
        open_model(f"begun={tmp_path}")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of released weights, of a small member of a family that is read at its CLS token."""
    small = find_released("dinov2_vits14")
    tiny = replace(small, name=TINY, config=replace(small.config, embed_dim=16, depth=1, n_heads=2, image_size=28))
    monkeypatch.setattr(dinov2, "MODELS", (*dinov2.MODELS, tiny))
    path = tmp_path / "tiny.pth"
    torch.save(_encoder(tiny.config, tiny.n_channels).state_dict(), path)
    return path


def test_a_bundle_is_called_as_its_folder_is_or_as_is_said(bundle: Path) -> None:
    for text, name in ((f"{bundle}", "mine"), (f"{bundle}/", "mine"), (f"ViT, 12 bands={bundle}", "ViT, 12 bands")):
        model = open_model(text)
        assert (model.name, model.step, model.features) == (name, 7, {"pool": "cls", "taps": [1.0]})


def test_a_bundle_may_be_a_zip_file(bundle: Path) -> None:
    shutil.make_archive(str(bundle.parent / "packed"), "zip", bundle)
    for text, name in ((f"{bundle.parent}/packed.zip", "packed"), (f"ours={bundle.parent}/packed.zip", "ours")):
        model = open_model(text)
        assert (model.name, model.step) == (name, 7)
        assert _weights(model) == _weights(open_model(str(bundle)))


def test_a_folder_may_be_called_as_released_weights_are(bundle: Path) -> None:
    assert open_model(f"dinov2_vits14={bundle}").encoder.cfg.embed_dim == 16


def test_what_exists_is_a_path(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    (odd := bundle.rename("lr=0.1")).touch()
    assert open_model("lr=0.1").name == open_model(str(bundle.parent / odd)).name == "lr=0.1"
    assert open_model("rate=lr=0.1").name == "rate"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/demo", "demo"),
        ("a/demo/checkpoints/step_00000100", "demo step 100"),
        ("b/demo/checkpoints/step_00000200", "demo step 200"),
        ("early=a/demo/checkpoints/step_00000100", "early"),
    ],
)
def test_checkpoints_are_called_by_their_run_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(text.rpartition("=")[2])
    path.mkdir(parents=True)
    step = int(path.name[5:]) if path.name.startswith("step_") else 200
    monkeypatch.setattr(opening, "open_encoder", lambda path: BundleEncoder(_encoder(), {}, {"step": step}))
    assert open_model(text).name == name


def test_released_weights_are_read_alike_from_a_file_and_from_a_bundle(weights: Path, tmp_path: Path) -> None:
    import_released(weights, TINY, tmp_path / "imported")
    of_file, of_bundle = open_model(f"{TINY}={weights}"), open_model(str(tmp_path / "imported"))
    assert of_file.features == of_bundle.features == {"pool": "cls", "taps": [1.0]}
    assert of_file.step == of_bundle.step == 1
    assert _weights(of_file) == _weights(of_bundle)
    assert (of_file.name, of_bundle.name) == (TINY, "imported")
    assert of_file.inputs == of_bundle.inputs
    assert of_file.is_trained


def test_of_two_released_encoders_it_is_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = replace(croma.PAIRS["croma_base"].config, embed_dim=32, depth=4, n_heads=4)
    tiny = replace(croma.PAIRS["croma_base"], name="croma_tiny", config=cfg)
    monkeypatch.setitem(croma.PAIRS, "croma_tiny", tiny)
    pair = fill_pair(tiny.build().to_empty(device="cpu"))
    torch.save(croma.pair_state_dicts(pair, tiny, croma.pair_inputs()), tmp_path / "croma.pt")
    found = open_model(f"croma_tiny={tmp_path}/croma.pt")
    assert digest_of_tensors(found.encoder.state_dict()) == digest_of_tensors(pair.optical.state_dict())
    assert (found.features, found.inputs) == ({"pool": "mean", "taps": [1.0]}, croma.pair_inputs()["optical"])


@pytest.mark.usefixtures("weights")
def test_random_weights_are_opened_where_they_are_of_use() -> None:
    for name in (TINY, "mae_vitmicro4_eurosat"):
        found = open_model(name, or_random=True)
        assert (found.name, found.is_trained, found.step) == (name, False, 0)
        assert found.encoder.training is False
        with pytest.raises(ValueError, match=f"^{name}: no such path"):
            open_model(name)
    with pytest.raises(ValueError, match=r"^mae_vitmicro_eurosat: no such path; did you mean 'mae_vitmicro4_eurosat'"):
        open_model("mae_vitmicro_eurosat", or_random=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{tmp}/min", "{tmp}/min: no such path; did you mean 'mine'?"),
        ("{tmp}/mae_vitt8_s2l2a", "{tmp}/mae_vitt8_s2l2a: no such path; a run of this recipe comes of: ssl-eo train"),
        ("new={tmp}/min", "new={tmp}/min: no such path; did you mean 'mine'?"),
        (
            "dinov2_vits14",
            "dinov2_vits14: no such path; of released weights, give the file: dinov2_vits14=FILE",
        ),
        ("dinov2_vits14={tmp}/x.pth", "dinov2_vits14={tmp}/x.pth: no such path"),
        ("{tmp}/mine/encoder.json", "give the folder"),
        (
            "new={tmp}/mine/encoder.safetensors",
            "encoder.safetensors is a part of what {tmp}/mine holds; give the folder",
        ),
        ("{tmp}/tiny.pth", "{tmp}/tiny.pth: a file of released weights is given as NAME={tmp}/tiny.pth"),
        ("dinov2_tinny={tmp}/tiny.pth", "the name says which encoder it is, and 'dinov2_tinny' is none"),
        ("={tmp}/mine", "before the = must stand a name of 1 to 100 printable signs"),
        (" ={tmp}/mine", "before the = must stand a name"),
        ("a\nb={tmp}/mine", "before the = must stand a name"),
        ("a" * 101 + "={tmp}/mine", "before the = must stand a name"),
        ("new=", "new=: a path must stand behind the ="),
    ],
)
@pytest.mark.usefixtures("bundle", "weights")
def test_what_is_no_model_is_told_with_what_to_give(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        open_model(text.format(tmp=tmp_path))
    assert message.format(tmp=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [["eval", "--tasks", "synthetic_scenes"], ["embed", "scene.tif"]])
def test_commands_name_their_option(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--model", f"{tmp_path}/gone", "--out", f"{tmp_path}/out.tif"]) == 2
    assert f"--model: {tmp_path}/gone: no such path" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["config.yaml", "checkpoints/step_00000001/complete.json"])
def test_of_a_file_of_a_run_the_folder_is_asked_for(part: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    path: Any = tmp_path / part
    path.touch()
    with pytest.raises(ValueError, match=r"is a part of what .* holds; give the folder"):
        open_model(str(path))
