"""Beginning from given weights: what goes where, what is said of it, and what is refused before training starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ROOT, assert_same_bits, read_checkpoint
from torch import Tensor

from ssl_eo.cli import main
from ssl_eo.config import load
from ssl_eo.data.opening import open_source
from ssl_eo.hub import write_bundle
from ssl_eo.objectives import mae
from ssl_eo.objectives.base import Objective
from ssl_eo.tensor_files import write_tensors
from ssl_eo.train.checkpoint import CheckpointConfig, Checkpointer
from ssl_eo.train.initial import InitialWeights, _condensed, begin_from
from ssl_eo.train.optim import OptimConfig, build_optimizer
from ssl_eo.train.parallel import build_objective
from ssl_eo.train.sealing import CheckpointError

DEBUG = ROOT / "configs" / "debug" / "mae.yaml"
SMALL = ("objective.ema_momentum=0.9", "model.position=learned", "model.image_size=32", "model.depth=2")
PREFIX = {"^": "encoder."}


def _objective(seed: int, *overrides: str) -> Objective:
    """A masked autoencoder with a moving average, initialised from `seed`."""
    config = load(DEBUG, [*SMALL, *overrides])
    schemas = [open_source(source).schema for source in config.data.sources]
    return build_objective(
        lambda: mae.Objective(config.objective.options, config.model, schemas), seed, torch.device("cpu")
    )


def _copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _encoder_of(seed: int, *overrides: str) -> dict[str, Tensor]:
    return _copies(_objective(seed, *overrides).student["encoder"].state_dict())


def _checkpoint(folder: Path, objective: Objective) -> Path:
    optimizer = build_optimizer(OptimConfig(), objective)
    Checkpointer(CheckpointConfig(), folder, objective, optimizer).save(7, {"data": []})
    return folder / "checkpoints" / "step_00000007"


def _begin(objective: Objective, folder: Path, *entries: InitialWeights) -> tuple[list[str], dict[str, Any]]:
    lines = begin_from(entries, objective, folder)
    return lines, json.loads((folder / "init.json").read_text())


@pytest.mark.parametrize("kind", ["torch.save", "safetensors"])
def test_an_encoder_by_itself(tmp_path: Path, kind: str) -> None:
    given, path = _encoder_of(1), tmp_path / "weights"
    content = given | {"head.weight": torch.zeros(3, 2), "head.bias": torch.zeros(3)}
    if kind == "torch.save":
        torch.save(content, path)
    else:
        write_tensors(path, content)
    objective, untouched = _objective(2), _objective(2)
    lines, page = _begin(
        objective, tmp_path, InitialWeights(str(path), rename=PREFIX, exclude=["pos_embed|patch_embed"])
    )

    student, before = objective.student.state_dict(), untouched.student.state_dict()
    taken = {f"encoder.{name}" for name in given if name != "pos_embed" and not name.startswith("patch_embed")}
    for name, tensor in student.items():
        assert torch.equal(tensor, given[name.removeprefix("encoder.")] if name in taken else before[name]), name
    assert objective.teacher is not None
    assert_same_bits(objective.teacher["encoder"].state_dict(), objective.student["encoder"].state_dict())

    (file,) = page["files"]
    assert set(file["taken"]) == taken
    assert file["taken"]["encoder.norm.weight"] == "norm.weight"
    assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    n_patch_embed = sum(name.startswith("patch_embed") for name in given)
    assert sorted(file["unused"]) == ["head (2)", f"patch_embed ({n_patch_embed})", "pos_embed"]
    assert page["random"][:2] == ["encoder.pos_embed", f"encoder.patch_embed ({n_patch_embed})"]
    assert [entry.split()[0] for entry in page["random"][2:]] == ["decoder", "output"]
    assert lines[0].startswith(f"init: {len(taken)} tensors of {path}; unused: ")
    assert lines[1].startswith("init: random in the student: encoder.pos_embed, encoder.patch_embed (")


def test_a_training_checkpoint_of_dinov2(tmp_path: Path) -> None:
    teacher, student = _encoder_of(1), _encoder_of(2)
    content = {f"teacher.backbone.{k}": v for k, v in teacher.items()}
    content |= {f"student.backbone.{k}": v for k, v in student.items()} | {"dino_loss.center": torch.zeros(1, 4)}
    torch.save({"model": content, "iteration": 5}, tmp_path / "model_0005.pth")
    objective = _objective(3)
    rename = {r"^teacher\.backbone\.": "encoder."}
    _, page = _begin(objective, tmp_path, InitialWeights(str(tmp_path / "model_0005.pth"), rename=rename))
    assert_same_bits(objective.student["encoder"].state_dict(), teacher)
    assert page["files"][0]["unused"] == [f"student ({len(student)})", "dino_loss.center"]


def test_what_is_for_the_teacher_is_not_overwritten_by_the_student(tmp_path: Path) -> None:
    student, teacher = _encoder_of(1), _encoder_of(2)
    torch.save(student, tmp_path / "student.pth")
    torch.save({"norm.weight": teacher["norm.weight"] + 1}, tmp_path / "teacher.pth")
    objective = _objective(3)
    to_teacher = InitialWeights(str(tmp_path / "teacher.pth"), rename={"^": "teacher.encoder."})
    _begin(objective, tmp_path, to_teacher, InitialWeights(str(tmp_path / "student.pth"), rename=PREFIX))
    assert_same_bits(objective.student["encoder"].state_dict(), student)
    assert objective.teacher is not None
    found = objective.teacher["encoder"].state_dict()
    assert_same_bits(found, student | {"norm.weight": teacher["norm.weight"] + 1})


@pytest.mark.parametrize("of", ["run", "step"])
def test_a_checkpoint_of_ours_fits_as_it_is(tmp_path: Path, of: str) -> None:
    """Student and teacher both, as they were."""
    old, new = _objective(1), _objective(2)
    assert old.teacher is not None
    with torch.no_grad():
        for parameter in old.teacher.parameters():
            parameter.add_(1)
    step = _checkpoint(tmp_path / "old", old)
    path = tmp_path / "old" if of == "run" else step
    _, page = _begin(new, tmp_path, InitialWeights(str(path)))
    assert_same_bits(new.state_dict(), old.state_dict())
    assert (page["random"], page["files"][0]["unused"]) == ([], [])
    assert page["files"][0]["sha256"] == hashlib.sha256((step / "complete.json").read_bytes()).hexdigest()


def test_the_student_may_take_the_teacher_of_a_checkpoint(tmp_path: Path) -> None:
    old, new = _objective(1), _objective(2)
    assert old.teacher is not None
    with torch.no_grad():
        for parameter in old.teacher.parameters():
            parameter.add_(1)
    _checkpoint(tmp_path / "old", old)
    _begin(new, tmp_path, InitialWeights(str(tmp_path / "old"), rename={r"^teacher\.": ""}))
    assert new.teacher is not None
    for part in (new.student, new.teacher):
        assert_same_bits(part["encoder"].state_dict(), old.teacher["encoder"].state_dict())


def test_a_bundle_and_a_later_entry_over_an_earlier_one(tmp_path: Path) -> None:
    first, second = _objective(1), _encoder_of(2)
    write_bundle(tmp_path / "bundle", first.published_encoder(), {}, {"licence": "CC-BY-NC-4.0"})
    torch.save({k: v.half() for k, v in second.items()}, tmp_path / "half.pth")
    objective = _objective(3)
    later = InitialWeights(str(tmp_path / "half.pth"), rename=PREFIX, include=[r"blocks\.1\."], exclude=["norm"])
    _, page = _begin(objective, tmp_path, InitialWeights(str(tmp_path / "bundle")), later)
    assert [file["licence"] for file in page["files"]] == ["CC-BY-NC-4.0", None]
    from_second = {k.removeprefix("encoder.") for k in page["files"][1]["taken"]}
    assert from_second == {k for k in second if k.startswith("blocks.1.") and "norm" not in k}
    expected = {
        k: second[k].half().float() if k in from_second else v for k, v in first.student["encoder"].state_dict().items()
    }
    assert_same_bits(objective.student["encoder"].state_dict(), expected)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, r"it has no tensor of the student; .*; with rename: \{'\^': 'encoder\.'\} \d+ of them would fit"),
    ({"rename": {"^": "teacher.backbone."}}, r"with rename: \{'\^teacher\\.backbone\\.': 'encoder\.'\} \d+ of them"),
    ({"rename": PREFIX, "include": ["dino"]}, "include: 'dino' is found in none of its "),
    ({"rename": PREFIX, "exclude": ["pos_embd"]}, "exclude: 'pos_embd' is found in none of its "),
    ({"rename": {"backbone": "encoder"}}, "rename: 'backbone' is found in none of its "),
    ({"rename": PREFIX, "include": ["norm"], "exclude": ["n"]}, "include and exclude leave nothing of what the "),
    ({"rename": {r"^.*$": "encoder.norm.weight"}}, r"rename makes both \S+ and \S+ to encoder\.norm\.weight"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG)
def test_an_entry_that_takes_nothing_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(_encoder_of(1), path)
    objective = _objective(2)
    before = _copies(objective.state_dict())
    whole = InitialWeights(str(path), rename=PREFIX)
    with pytest.raises(ValueError, match=message) as caught:
        begin_from([whole, InitialWeights(str(path), **keys)], objective, tmp_path)
    assert str(caught.value).startswith(f"init[1] ({path}): ")
    assert "\n" not in str(caught.value)
    assert_same_bits(objective.state_dict(), before)


def test_another_shape_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(_encoder_of(1, "model.image_size=64"), path)
    with pytest.raises(ValueError, match=r"1 of .* another shape") as caught:
        begin_from([InitialWeights(str(path), rename=PREFIX)], _objective(2), tmp_path)
    assert (
        "encoder.pos_embed: [1, 65, 64] there, [1, 17, 64] here (a table of positions on another grid: see model."
        in (str(caught.value))
    )
    advice = str(caught.value).split("exclude: ['")[1].removesuffix("']")
    assert advice == r"^encoder\.pos_embed$"
    _, page = _begin(_objective(2), tmp_path, InitialWeights(str(path), rename=PREFIX, exclude=[advice]))
    assert page["random"][0] == "encoder.pos_embed"
    torch.save(_encoder_of(1, "model.embed_dim=32"), path)
    with pytest.raises(ValueError, match=r"another shape, the first is encoder\.\S+ .* is it of another model\?$"):
        begin_from([InitialWeights(str(path), rename=PREFIX)], _objective(2), tmp_path)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    objective = _objective(2)

    def begin(name: str) -> None:
        begin_from([InitialWeights(str(tmp_path / name), rename=PREFIX)], objective, tmp_path)

    with pytest.raises(ValueError, match=r"nowhere\.pth: No such file"):
        begin("nowhere.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: no run with a whole checkpoint here"):
        begin("folder")
    broken = _encoder_of(1)
    broken["norm.weight"][3] = torch.nan
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"encoder\.norm\.weight holds values that are not finite"):
        begin("broken.pth")
    step = _checkpoint(tmp_path / "old", objective)
    data = max(step.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        begin("old/checkpoints/step_00000007")
    assert not (tmp_path / "init.json").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"path": "w", "include": ["a["]}, r"include: 'a\[' is not a regular expression"),
        ({"path": "w", "rename": {"(": "a"}}, r"rename: '\(' is not a regular expression"),
        ({"path": "w", "rename": {"a": r"\1"}}, r"rename: '\\\\1' cannot replace 'a': invalid group reference"),
        ({"path": "w", "rename": {"a": r"\g<b>"}}, r"cannot replace 'a': unknown group name 'b'"),
    ],
)
def test_wrong_rules_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InitialWeights(**keys)


NAMES = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join)


@given(data=st.data(), among=st.sets(NAMES, min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_condensed_names_stand_for_exactly_these(data: st.DataObject, among: set[str]) -> None:
    """As in any module, no tensor's name is the beginning of another's."""
    among = {name for name in among if not any(other.startswith(f"{name}.") for other in among)}
    names = data.draw(st.sets(st.sampled_from(sorted(among))))
    found = _condensed(names, sorted(among))
    stood_for = []
    for entry in found:
        prefix, _, count = entry.partition(" (")
        under = [name for name in sorted(among) if name == prefix or name.startswith(f"{prefix}.")]
        assert count in ("", f"{len(under)})")
        stood_for += under
    assert stood_for == sorted(names)
    assert not names or len(found) <= len(names)


def _begin_on_a_rank(path: str, folder: Path) -> tuple[dict[str, Tensor], list[str], str]:
    """The weights of a rank that began from `path`, what is said there, and the error of a file that is not there."""
    rank = torch.distributed.get_rank()
    objective = _objective(rank)
    objective.register_buffer("flags", torch.tensor([rank > 0]))
    lines = begin_from([InitialWeights(path, rename=PREFIX)], objective, folder)
    try:
        begin_from([InitialWeights("nowhere.pth")], objective, folder)
        error = ""
    except ValueError as caught:
        error = str(caught)
    return _copies(objective.state_dict()), lines, error


def test_all_ranks_begin_with_the_same_and_fail_together(on_ranks: Callable[..., Any], tmp_path: Path) -> None:
    torch.save(_encoder_of(5), tmp_path / "weights.pth")
    first, second = on_ranks(2, _begin_on_a_rank, str(tmp_path / "weights.pth"), tmp_path)
    assert_same_bits(first[0], second[0])
    encoder = {k.removeprefix("student.encoder."): v for k, v in first[0].items() if k.startswith("student.encoder.")}
    assert_same_bits(encoder, _encoder_of(5))
    assert len(first[1]) == 2
    assert second[1] == []
    assert first[2] == second[2] == "nowhere.pth: No such file or directory"


def test_a_run_begins_from_them_and_goes_on_without_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(_encoder_of(5), path)
    run = tmp_path / "frozen"
    (tmp_path / "run.yaml").write_text(
        f"include: {DEBUG}\n"
        f"init: [{{path: {path}, rename: {{'^': encoder.}}, exclude: ['patch_embed']}}]\n"
        "optim: {freeze_steps: {'^encoder\\.': 100}}\n"
    )
    short = ("train.total_steps=2", "train.global_batch_size=16", "data.n_workers=0", "log.report=false")
    command = ["train", "--config", str(tmp_path / "run.yaml"), f"run.out_dir={tmp_path}", "run.name=frozen"]
    command += [*SMALL, *short, "optim.warmup_steps=0"]
    assert main([*command, "train.time_limit_s=0.0"]) == 75
    page = (run / "init.json").read_bytes()
    path.unlink()
    assert main(command) == 0
    assert (run / "init.json").read_bytes() == page
    found, given = read_checkpoint(run / "checkpoints" / "step_00000002"), _encoder_of(5)
    given = {name: tensor for name, tensor in given.items() if not name.startswith("patch_embed")}
    assert_same_bits({name: found[f"objective.student.encoder.{name}"] for name in given}, given)


def test_nothing_is_said_of_a_run_that_begins_at_random(tmp_path: Path) -> None:
    (tmp_path / "init.json").write_text("of an attempt before")
    assert begin_from([], _objective(1), tmp_path) == []
    assert not (tmp_path / "init.json").exists()
