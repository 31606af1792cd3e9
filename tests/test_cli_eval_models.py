"""What `ssl-eo eval --model` names, what it is called, and how its features are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_eo import cli_eval_models
from ssl_eo.cli_eval_models import open_model
from ssl_eo.hub import write_bundle
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.weights import croma, dinov2
from ssl_eo.weights.base import find_released, import_released

TINY = "dinov2_tiny"


def _encoder(config: EncoderConfig | None = None, n_channels: int | None = 12) -> Encoder:
    torch.manual_seed(0)
    conv = EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=8, patch_embed="conv")
    encoder = Encoder(config or conv, n_channels)
    encoder.init_weights()
    return encoder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    write_bundle(folder, _encoder(), {}, {"step": 7, "features": {"pool": "cls", "taps": [1.0]}})
    return folder


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
        model, features = open_model(text)
        assert (model.name, model.step, features) == (name, 7, {"pool": "cls", "taps": [1.0]})


def test_a_folder_may_be_called_as_released_weights_are(bundle: Path) -> None:
    assert open_model(f"dinov2_vits14={bundle}")[0].encoder.cfg.embed_dim == 16


def test_what_exists_is_a_path(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    (odd := bundle.rename("lr=0.1")).touch()
    assert open_model("lr=0.1")[0].name == open_model(str(bundle.parent / odd))[0].name == "lr=0.1"
    assert open_model("rate=lr=0.1")[0].name == "rate"


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
    monkeypatch.setattr(cli_eval_models, "open_encoder", lambda path: (_encoder(), step, {}))
    assert open_model(text)[0].name == name


def test_released_weights_are_read_alike_from_a_file_and_from_a_bundle(weights: Path, tmp_path: Path) -> None:
    import_released(weights, TINY, tmp_path / "imported")
    of_file, of_bundle = open_model(f"{TINY}={weights}"), open_model(str(tmp_path / "imported"))
    assert of_file[1] == of_bundle[1] == {"pool": "cls", "taps": [1.0]}
    assert of_file[0].weights == of_bundle[0].weights
    assert (of_file[0].name, of_bundle[0].name) == (TINY, "imported")


def test_of_two_released_encoders_it_is_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "croma.pt").touch()
    pair = type("Pair", (), {"optical": _encoder()})()
    monkeypatch.setattr(croma, "load_pair", lambda path, pair_: pair)
    model, features = open_model(f"croma_base={tmp_path}/croma.pt")
    assert model.encoder is pair.optical
    assert features == {"pool": "mean", "taps": [1.0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{tmp}/min", "--model {tmp}/min: no such path; did you mean 'mine'?"),
        ("new={tmp}/min", "--model new={tmp}/min: no such path; did you mean 'mine'?"),
        (
            "dinov2_vits14",
            "--model dinov2_vits14: no such path; of released weights, give the file: dinov2_vits14=FILE",
        ),
        ("dinov2_vits14={tmp}/x.pth", "--model dinov2_vits14={tmp}/x.pth: no such path"),
        ("{tmp}/mine/encoder.json", "give the folder"),
        (
            "new={tmp}/mine/encoder.safetensors",
            "encoder.safetensors is a part of what {tmp}/mine holds; give the folder",
        ),
        ("{tmp}/tiny.pth", "--model {tmp}/tiny.pth: a file of released weights is given as NAME={tmp}/tiny.pth"),
        ("dinov2_tinny={tmp}/tiny.pth", "the name says which encoder it is: no published encoder 'dinov2_tinny'"),
        ("={tmp}/mine", "before the = must stand a name of 1 to 100 printable signs"),
        (" ={tmp}/mine", "before the = must stand a name"),
        ("a\nb={tmp}/mine", "before the = must stand a name"),
        ("a" * 101 + "={tmp}/mine", "before the = must stand a name"),
        ("new=", "--model new=: a path must stand behind the ="),
    ],
)
@pytest.mark.usefixtures("bundle", "weights")
def test_what_is_no_model_is_told_with_what_to_give(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--model") as caught:
        open_model(text.format(tmp=tmp_path))
    assert message.format(tmp=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["config.yaml", "checkpoints/step_00000001/complete.json"])
def test_of_a_file_of_a_run_the_folder_is_asked_for(part: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    path: Any = tmp_path / part
    path.touch()
    with pytest.raises(ValueError, match=r"is a part of what .* holds; give the folder"):
        open_model(str(path))
