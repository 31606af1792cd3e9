"""A saved model: whose code it runs (none), which files belong together, what a kill leaves, what is no model."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_study import encoder, opened_task

from ssl_eo.adapt import saved as saved_module
from ssl_eo.adapt.backbone import EncoderBackbone
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.saved import load_model, save_model
from ssl_eo.eval.decoders import build_decoder
from ssl_eo.eval.tasks import Task
from ssl_eo.tensor_files import read_tensors, write_tensors

TAPS = [0.34, 1.0]
LINEAR = "from ssl_eo.eval.decoders.linear import KINDS, Config, Decoder\n"


@pytest.fixture(scope="module")
def task() -> Task:
    return opened_task(n=4)


def model_of(task: Task, decoder: str = "linear", shift: float = 0.0) -> TaskModel:
    made = encoder()
    with torch.no_grad():
        next(made.parameters()).add_(shift)
    backbone = EncoderBackbone(made, TAPS)
    return TaskModel(backbone, build_decoder(decoder, {}, backbone.shape, task.n_classes)).eval()


def save(folder: Path, task: Task, decoder: str = "linear", shift: float = 0.0) -> Path:
    facts = {"decoder": decoder, "options": {}, "taps": TAPS}
    save_model(folder, model_of(task, decoder, shift), task, facts)
    return folder


def change(folder: Path, **changes: Any) -> None:
    page = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps({**page, **changes}))


def test_no_module_is_imported_that_a_folder_names(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the caller has named it too."""
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "payload.py").write_text(LINEAR)
    monkeypatch.syspath_prepend(tmp_path)
    folder = save(tmp_path / "model", task)
    for name in ("strange.payload", "os.path", "ssl_eo.eval.decoders.linear"):
        change(folder, decoder=name)
        with pytest.raises(ValueError, match=r"task\.json: its decoder is .* none of this package.*\(--decoder, "):
            load_model(folder)
    change(folder, decoder="strange.payload")
    with pytest.raises(ValueError, match=r"its decoder is 'strange\.payload', and 'strange\.other' was given"):
        load_model(folder, "strange.other")
    assert not any(name.startswith("strange") for name in sys.modules)
    assert load_model(folder, "strange.payload").classes == task.class_names
    assert "strange.payload" in sys.modules


def test_files_of_two_models_are_not_taken_for_one(task: Task, tmp_path: Path) -> None:
    """Their decoders have the same shapes: nothing else tells."""
    mine, other = save(tmp_path / "mine", task), save(tmp_path / "other", task, shift=1.0)
    for names, message in (
        (["encoder.json", "encoder.safetensors"], r"encoder\.json: its SHA-256 is not that in task\.json"),
        (["encoder.safetensors"], r"encoder\.safetensors: its SHA-256 is not that"),
        (["encoder.json"], r"encoder\.json: its SHA-256 is not that in task\.json"),
        (["task.json"], r"encoder\.json: its SHA-256 is not that in task\.json"),
    ):
        mixed = tmp_path / "mixed"
        shutil.copytree(mine, mixed)
        for name in names:
            shutil.copy(other / name, mixed / name)
        with pytest.raises(ValueError, match=message):
            load_model(mixed)
        shutil.rmtree(mixed)
    page = json.loads((mine / "encoder.json").read_text())
    (known,) = page["inputs"].values()
    known["mean"][0] += 1.0  # the pixels would be normalised by it
    (mine / "encoder.json").write_text(json.dumps(page))
    with pytest.raises(ValueError, match=r"encoder\.json: its SHA-256 is not that in task\.json"):
        load_model(mine)
    (mine / "encoder.json").unlink()
    with pytest.raises(ValueError, match=r"encoder\.json: No such file"):
        load_model(mine)


@pytest.mark.parametrize("at", ["write_bundle", "write_tensors", "atomic_write"])
def test_what_a_kill_leaves_of_a_model_over_an_older_one_is_refused(
    at: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", task)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saved_module, at, killed)
        with pytest.raises(KeyboardInterrupt):
            save(folder, task, shift=1.0)
    with pytest.raises(ValueError, match=r"not a trained model"):
        load_model(folder)
    expected = model_of(task, shift=1.0).backbone.state_dict()
    found = load_model(save(folder, task, shift=1.0)).model.backbone.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.items())


def test_weights_that_are_no_numbers_are_refused(task: Task, tmp_path: Path) -> None:
    """Of the decoder, of the encoder: all pixels would be of the first class."""
    folder = save(tmp_path / "model", task)
    tensors = read_tensors(folder / "decoder.safetensors")
    name = next(name for name, value in tensors.items() if value.is_floating_point() and value.numel() > 1)
    tensors[name].view(-1)[0] = torch.nan
    page = json.loads((folder / "task.json").read_text())
    sha256 = write_tensors(folder / "decoder.safetensors", tensors)
    change(folder, sha256={**page["sha256"], "decoder.safetensors": sha256})
    with pytest.raises(
        ValueError, match=rf"/model: 1 tensors have values that are NaN or infinite, the first is {name}"
    ):
        load_model(folder)
    broken = save(tmp_path / "broken", task, shift=torch.inf)
    with pytest.raises(ValueError, match=r"/broken: .* have values that are NaN or infinite, the first is cls_token"):
        load_model(broken)


def test_a_folder_that_is_no_model_says_where_one_is(task: Task, tmp_path: Path) -> None:
    study = tmp_path / "study"
    models = [save(study / "models" / name, task) for name in ("a", "b")]
    for folder in (study, study / "models"):
        with pytest.raises(ValueError, match=f"not a trained model: in it are {models[0]}, {models[1]}; give one"):
            load_model(folder)
    how = "one is what ssl-eo study leaves with save_models=true, in STUDY/models"
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=f"it holds no task.json; {how}"):
        load_model(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ValueError, match=f"it is an encoder alone, with no decoder that was trained on labels; {how}"):
        load_model(tmp_path / "run")
    with pytest.raises(ValueError, match=f"gone: not a trained model: there is no such folder; {how}"):
        load_model(tmp_path / "gone")
    (models[0] / "task.json").write_text("{")
    with pytest.raises(ValueError, match=r"not a trained model \(task\.json: Expecting"):
        load_model(models[0])
    change(models[1], sha256="ab")
    with pytest.raises(
        ValueError, match=r"sha256 must be an object with those of encoder\.json and decoder\.safetensors, got 'ab'"
    ):
        load_model(models[1])


@pytest.mark.parametrize(
    ("kind", "decoder", "size"), [("segmentation", "linear", (9, 13)), ("classification", "identity", ())]
)
def test_logits_are_those_of_stored_values(kind: str, decoder: str, size: tuple[int, ...], tmp_path: Path) -> None:
    """Of every pixel, of images of any size, or of the image; what was not measured is the mean of its band."""
    labelled = opened_task(kind, n=4)
    saved = load_model(str(save(tmp_path / "model", labelled, decoder)))
    images = torch.randn(2, len(saved.input.bands), 9, 13)
    logits = saved.logits(images)
    assert logits.shape == (2, len(saved.classes), *size)
    images[1, 0, 2, 3] = torch.nan
    holed = saved.logits(images)
    assert holed.isfinite().all()
    assert not torch.equal(holed[1], logits[1])
    images[1, 0, 2, 3] = saved.input.mean[0]
    torch.testing.assert_close(saved.logits(images), holed)


def test_an_encoder_page_of_any_length_takes_no_memory(task: Task, tmp_path: Path) -> None:
    """A sparse file of 64 MB, of which a piece at a time is looked at."""
    folder = save(tmp_path / "model", task)
    os.truncate(folder / "encoder.json", 64 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"encoder\.json: its SHA-256 is not that in task\.json"):
            load_model(folder)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
