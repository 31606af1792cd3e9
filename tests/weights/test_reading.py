"""Files of weights are read as people save them: wrapped, prefixed, in chunks; everything else is one clear line."""

from __future__ import annotations

import argparse
import datetime
import os
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssl_eo.tensor_files import write_tensors
from ssl_eo.weights._reading import find_encoder, read_state_dict

ENCODER = {
    "cls_token": torch.ones(1, 1, 4),
    "blocks.0.norm1.weight": torch.arange(4.0),
    "blocks.1.norm1.weight": torch.arange(4.0) + 1,
    "norm.bias": torch.zeros(4),
}
HEAD = {"mlp.0.weight": torch.ones(2, 4)}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_file(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "weights.pth", ENCODER, _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(path), ENCODER)


def test_a_safetensors_file_by_any_name(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.bin"):
        write_tensors(tmp_path / name, ENCODER)
        assert_same(read_state_dict(str(tmp_path / name)), ENCODER)


def test_parameters_are_tensors_and_the_rest_of_a_training_state_is_left_out(tmp_path: Path) -> None:
    state = {
        "model": {name: nn.Parameter(tensor) for name, tensor in ENCODER.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 1.0}]},
        "iteration": 7,
    }
    expected = {**prefixed("model.", ENCODER), "optimizer.state.0.exp_avg": torch.ones(1)}
    assert_same(read_state_dict(saved(tmp_path / "state.pth", state)), expected)


_NAMES = st.sampled_from(["model", "teacher", "backbone", "state_dict", "module", "_orig_mod", "ema"])


@settings(max_examples=40, deadline=None)
@given(st.lists(_NAMES, max_size=4), st.lists(_NAMES, max_size=3))
def test_any_nesting_and_prefix_is_undone(keys: list[str], prefix: list[str]) -> None:
    content: Any = prefixed("".join(f"{part}." for part in prefix), ENCODER)
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder) / "weights.pth", content)
        assert_same(find_encoder(path, read_state_dict(path)), ENCODER)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_of_modules_are_no_part_of_a_name(tmp_path: Path, wrapper: str) -> None:
    within = prefixed(f"model.{wrapper}", ENCODER)
    for content in ({"model": prefixed(wrapper, ENCODER)}, within, prefixed(wrapper, within)):
        found = read_state_dict(saved(tmp_path / "weights.pth", content))
        assert_same(found, prefixed("model.", ENCODER))


def test_of_student_and_teacher_the_teacher_is_taken_unless_asked(tmp_path: Path) -> None:
    teacher = {name: tensor + 10 for name, tensor in ENCODER.items()}
    state = {
        "student": {**prefixed("backbone.", ENCODER), **prefixed("dino_head.", HEAD)},
        "teacher": {**prefixed("backbone.", teacher), **prefixed("dino_head.", HEAD)},
    }
    path = saved(tmp_path / "state.pth", state)
    tensors = read_state_dict(path)
    assert_same(find_encoder(path, tensors), teacher)
    assert_same(find_encoder(path, tensors, "student.backbone"), ENCODER)
    with pytest.raises(
        ValueError,
        match=r"no encoder under the prefix 'student\.', but under 'student\.backbone\.', 'teacher\.backbone\.'",
    ):
        find_encoder(path, tensors, "student")


def test_several_encoders_and_no_teacher() -> None:
    tensors = {**prefixed("optical.", ENCODER), **prefixed("radar.", ENCODER)}
    with pytest.raises(ValueError, match=r"several encoders, choose one with --prefix: 'optical\.', 'radar\.'"):
        find_encoder(Path("x.pth"), tensors)
    with pytest.raises(ValueError, match=r"no encoder under the prefix '', but under"):
        find_encoder(Path("x.pth"), tensors, "")


def test_blocks_in_chunks_are_numbered_through() -> None:
    chunked = {
        "cls_token": ENCODER["cls_token"],
        "blocks.0.0.norm1.weight": ENCODER["blocks.0.norm1.weight"],
        "blocks.1.1.norm1.weight": ENCODER["blocks.1.norm1.weight"],
        "norm.bias": ENCODER["norm.bias"],
    }
    assert_same(find_encoder(Path("x.pth"), prefixed("teacher.backbone.", chunked)), ENCODER)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (HEAD, "no encoder in it: no tensor is named cls_token, the first are mlp.0.weight"),
        (
            {"encoder.layer.0.attention.attention.query.weight": torch.ones(1)},
            "this is the layout of the transformers package: give the authors' own file",
        ),
    ],
)
def test_no_encoder(tensors: dict[str, Tensor], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        find_encoder(Path("x.pth"), tensors)


def test_the_arguments_of_a_training_are_left_out(tmp_path: Path) -> None:
    saved(tmp_path / "whole.pth", {"model": ENCODER, "args": argparse.Namespace(lr=1.0, betas=(0.9, 0.95), name="run")})
    found = read_state_dict(tmp_path / "whole.pth")
    assert found.keys() == {f"model.{name}" for name in ENCODER}


def _shared(n: int) -> Any:
    """A dictionary that holds the one before twice, n times: small in a file, and 2^n tensors to walk."""
    content: Any = {"w": torch.zeros(2)}
    for _ in range(n):
        content = {"a": content, "b": content}
    return content


def test_a_dictionary_may_have_two_names_and_not_without_end(tmp_path: Path) -> None:
    assert len(read_state_dict(saved(tmp_path / "twice.pth", _shared(3)))) == 8
    within: dict[str, Any] = {"w": torch.zeros(2)}
    within["self"] = within
    contents = {"deep": _shared(30), "within": within, "wide": {str(n): _shared(12) for n in range(100)}}
    for name, content in contents.items():
        with pytest.raises(ValueError, match=r"its dictionaries are nested 16 deep, or hold 200,000 entries"):
            read_state_dict(saved(tmp_path / f"{name}.pth", content))
    with pytest.raises(ValueError, match=r"'aaa[a]+'\.\.\. is a name of 1,001 characters") as refusal:
        read_state_dict(saved(tmp_path / "long.pth", {"a" * 1001: torch.zeros(1)}))
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("content", [b"x", b"<html></html>", b"GIF89a" + bytes(9)])
def test_torch_gives_no_advice_to_run_code(content: bytes, tmp_path: Path) -> None:
    """Of what is no file of it, it says how to have the file unpickled all the same."""
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"or damaged \(UnpicklingError: \S[^)]*\)$") as caught:
        read_state_dict(tmp_path / "page.pth")
    assert "weights_only" not in str(caught.value)
    assert "PyTorch" not in str(caught.value)


_FAULTS = (IndexError("pop"), AssertionError("key"), zipfile.BadZipFile("disks"), struct.error("unpack"), TypeError())


@pytest.mark.parametrize("fault", _FAULTS, ids=lambda fault: type(fault).__name__)
def test_whatever_torch_says_of_a_damaged_file(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*args: Any, **options: Any) -> Any:
        raise fault

    path = saved(tmp_path / "weights.pth", ENCODER)
    monkeypatch.setattr(torch, "load", damaged)
    with pytest.raises(ValueError, match=rf"weights\.pth: neither .* or damaged \({type(fault).__name__}(: \S|\))"):
        read_state_dict(path)


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), zipped=st.booleans())
@example(at=0, byte=ord("t"), zipped=False)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_read_or_refused(at: int, byte: int, zipped: bool) -> None:
    """Any other exception fails the test."""
    reason = ""
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder) / "weights.pth", {"model": HEAD, "n": [1]}, _use_new_zipfile_serialization=zipped)
        data = bytearray(path.read_bytes())
        data[at % len(data)] = byte
        path.write_bytes(data)
        try:
            read_state_dict(path)
        except ValueError as error:
            reason = str(error)
    assert len(reason) < 600
    assert "\n" not in reason


class _Code:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("false",))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "config.pth").write_text("train: {name: x}\n")
    (tmp_path / "empty.pth").touch()
    whole = saved(tmp_path / "whole.pth", {"weight": torch.ones(10_000)})
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:20_000])
    write_tensors(tmp_path / "whole.safetensors", ENCODER)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-1])
    saved(tmp_path / "objects.pth", {"model": ENCODER, "when": datetime.date(2020, 1, 1)})
    saved(tmp_path / "tensor.pth", torch.ones(3))
    saved(tmp_path / "code.pth", {"a": _Code()})
    os.mkfifo(tmp_path / "pipe")
    saved(tmp_path / "numbers.pth", {"epoch": 3, "lr": 0.1})
    saved(tmp_path / "twice.pth", {"a": torch.ones(1), "module.a": torch.ones(1)})
    problems = {
        "absent.pth": "No such file",
        ".": "it is no regular file",
        "pipe": "it is no regular file",
        "code.pth": r"holds Python objects \(posix.system\) beside tensors, which could run code",
        "text.pth": "neither a safetensors file nor one of torch.save",
        "config.pth": "neither a safetensors file nor one of torch.save",
        "empty.pth": "neither a safetensors file nor one of torch.save",
        "cut.pth": "neither a safetensors file nor one of torch.save",
        "cut.safetensors": "truncated",
        "objects.pth": r"holds Python objects \(datetime.date\) beside tensors, which could run code",
        "tensor.pth": "expected tensors by name, found a Tensor",
        "numbers.pth": "no tensor in it, the first keys are epoch, lr",
        "twice.pth": "two tensors are named a once parts",
    }
    for name, problem in problems.items():
        with pytest.raises(ValueError, match=problem) as caught:
            read_state_dict(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
