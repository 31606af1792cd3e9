"""Files of weights, from us or from others: read as plain tensors, and the encoder found in them.

Nothing but tensors is unpickled, and the values of a large file stay on disk until they are used.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_eo.files import check_regular
from ssl_eo.tensor_files import read_tensors
from ssl_eo.weights._downloads import how_to_renew

__all__ = ["find_encoder", "is_plain", "load_pickled", "read_state_dict"]

_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")  # what data-parallel and compiled modules put into names
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")  # DINOv2 with block_chunks > 0: blocks.<chunk>.<block>
_MAX_ENTRIES = 200_000  # of all dictionaries; those of the largest training states have some ten thousand
_MAX_NESTING = 16  # of dictionaries in dictionaries
_MAX_NAME = 1000  # characters, with the names of the dictionaries around it
_MAX_REASON = 200  # characters of what torch says
_ADVICE = ("In PyTorch 2.6", "Please file an issue", "Check the documentation")
_TOKEN = "cls_token"  # a tensor that every vision transformer of these families has, and nothing else


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a file of `torch.save`, by name.

    Dictionaries in dictionaries become dotted names: `{"teacher": {"backbone.norm.weight": ...}}` gives
    `teacher.backbone.norm.weight`. The parts `module.` and `_orig_mod.` are left out, and so is what is no tensor.
    Raises `ValueError` for a file that is neither, damaged, nested without end, or that would have to run code to be
    read.
    """
    path = Path(path)
    content: Any = _load_safetensors(path) if _is_safetensors(path) else load_pickled(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected tensors by name, found a {type(content).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in _flatten(path, content):
        if name in tensors:
            raise ValueError(f"{path}: two tensors are named {name} once parts such as 'module.' are left out")
        if not is_plain(tensor):
            raise ValueError(f"{path}: {name} {list(tensor.shape)} is sparse, or has fewer values than its shape says")
        tensors[name] = tensor
    if not tensors:
        raise ValueError(f"{path}: no tensor in it, the first keys are {', '.join(map(str, list(content)[:3]))}")
    return tensors


def find_encoder(
    path: Path, tensors: Mapping[str, Tensor], prefix: str | None = None, token: str = _TOKEN
) -> dict[str, Tensor]:
    """The tensors of the vision transformer in what `read_state_dict` gave, by the names that it has by itself.

    It is whatever stands beside a `cls_token`, or what else a family calls this `token`. Of several the teacher's is
    taken, as the published one; `prefix` chooses another. Blocks that were saved in chunks are numbered through. Raises
    `ValueError` when there is none, or no telling which.
    """
    found = [name.removesuffix(token) for name in tensors if re.search(rf"(^|\.){re.escape(token)}$", name)]
    if prefix is None:
        prefix = _choose(path, tensors, found, token)
    elif (prefix := f"{prefix.rstrip('.')}." if prefix else "") not in found:
        raise ValueError(f"{path}: no encoder under the prefix {prefix!r}, but under {_quoted(found)}")
    return {
        _CHUNK.sub(r"blocks.\1.", name.removeprefix(prefix)): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _choose(path: Path, tensors: Mapping[str, Tensor], found: list[str], token: str) -> str:
    if not found:
        first = ", ".join(list(tensors)[:3])
        layout = any(".attention.attention.query." in name for name in tensors)
        hint = "; this is the layout of the transformers package: give the authors' own file" if layout else ""
        raise ValueError(f"{path}: no encoder in it: no tensor is named {token}, the first are {first}{hint}")
    if len(found) == 1:
        return found[0]
    teachers = [prefix for prefix in found if "teacher" in prefix]
    if len(teachers) != 1:
        raise ValueError(f"{path}: it holds several encoders, choose one with --prefix: {_quoted(found)}")
    return teachers[0]


def is_plain(tensor: Tensor) -> bool:
    """Whether all values are there: a repeated one would take no place in a file, and any in memory."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _quoted(prefixes: list[str]) -> str:
    return ", ".join(repr(prefix) for prefix in prefixes) or "none"


def _is_safetensors(path: Path) -> bool:
    """Whether a JSON object follows the 8 bytes of its length, as in no pickle and no zip archive."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}{how_to_renew(path)}") from None


def load_pickled(path: Path) -> Any:
    """What a file of `torch.save` holds, if that is tensors and plain values. Raises `ValueError` otherwise."""
    try:
        # The format that torch wrote before 1.6 cannot be mapped.
        with torch.serialization.safe_globals([argparse.Namespace]):  # many keep the arguments of their training
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # Of damaged bytes torch raises whatever they lead it to: IndexError, AssertionError, BadZipFile, struct.error, ...
    except Exception as error:
        if unsafe := re.search(r"(?:[Uu]nsupported (?:global: )?GLOBAL|Unsupported class) (\S+)", str(error)):
            raise ValueError(
                f"{path}: holds Python objects ({unsafe[1]}) beside tensors, which could run code when they are read;"
                " if you trust the file, load it with torch.load and save its state dict alone"
            ) from None
        reason = ": ".join(filter(None, (type(error).__name__, _said(error))))[:_MAX_REASON]
        raise ValueError(
            f"{path}: neither a safetensors file nor one of torch.save, or damaged ({reason}){how_to_renew(path)}"
        ) from None


def _said(error: Exception) -> str:
    """What torch says, without its advice to read the file in a way that runs code."""
    lines = (line.removeprefix("Weights only load failed.").strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line and not line.startswith(_ADVICE))


def _flatten(path: Path, content: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in dictionaries in dictionaries, with dotted names.

    A file may name one dictionary many times, and one within itself: raises `ValueError` for more than can be walked.
    """
    n_entries = 0
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]  # name, value, depth; the next one is the last
    while waiting:
        prefix, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield prefix, value
        if not isinstance(value, Mapping):
            continue
        n_entries += len(value)
        if depth >= _MAX_NESTING or n_entries > _MAX_ENTRIES:
            raise ValueError(
                f"{path}: its dictionaries are nested {_MAX_NESTING} deep, or hold {_MAX_ENTRIES:,} entries, which no"
                " state of a training does; save its state dict alone"
            )
        begin = f"{prefix}." if prefix else ""
        names = [begin + _WRAPPERS.sub("", str(key)) for key in value]
        if longest := next((name for name in names if len(name) > _MAX_NAME), None):
            raise ValueError(f"{path}: {longest[:40]!r}... is a name of {len(longest):,} characters, which none has")
        waiting += [(name, part, depth + 1) for name, part in zip(names, value.values(), strict=True)][::-1]
