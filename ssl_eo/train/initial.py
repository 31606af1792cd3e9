"""Beginning from given weights: which tensors of which files go where in the student and the teacher.

The first rank reads the files and hands its weights to all others, so these are equal by construction and the files
need to be in one place only. A run that goes on never comes here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_eo.components import check_patterns
from ssl_eo.distributed import is_main, raise_on_all_ranks, world_size
from ssl_eo.files import atomic_write
from ssl_eo.hub import UNSAID, BundlePair, load_bundle
from ssl_eo.objectives.base import Objective
from ssl_eo.train.checkpoint import read_weights
from ssl_eo.train.sealing import locate
from ssl_eo.weights._reading import read_state_dict

__all__ = ["InitialWeights", "begin_from", "licences_of_init"]

_N_SHOWN = 8  # names in a line for people


@dataclass
class InitialWeights:
    """Weights to begin from: each tensor of a file whose new name is one of the objective's.

    `encoder.norm.weight` is the student's, and the teacher begins with the same; `teacher.encoder.norm.weight` is the
    teacher's alone.
    """

    path: str  # a .pth or .safetensors file, a bundle, a run directory or one of its checkpoints
    # {regex: replacement} for the names in the file, one after the other, as by re.sub. Where it is empty, a leading
    # student. is dropped, so that a checkpoint of this package fits as it is.
    rename: dict[str, str] = field(default_factory=dict)
    include: list[str] = field(default_factory=list)  # regexes: take only new names that match one; empty takes all
    exclude: list[str] = field(default_factory=list)  # regexes: leave out new names that match one

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; it names a file of weights")
        for key in ("rename", "include", "exclude"):
            check_patterns(key, getattr(self, key))
        for regex, replacement in self.rename.items():
            try:
                re.sub(regex, replacement, "")
            except (re.error, IndexError) as error:
                raise ValueError(f"rename: {replacement!r} cannot replace {regex!r}: {error}") from None


@dataclass(frozen=True)
class _Taken:
    """What one entry of `init` gives: the tensors by their new names, and how the file calls them."""

    path: str
    sha256: str
    licence: str | None  # of the weights, as a bundle says it; other files say none
    tensors: dict[str, Tensor]
    names: dict[str, str]
    unused: list[str]


def begin_from(entries: Sequence[InitialWeights], objective: Objective, run_dir: Path) -> list[str]:
    """Copy the weights that `entries` name into `objective`, a later entry over an earlier one.

    Collective. What was taken from where is written to `init.json` of the run; returns lines that tell a person of it.
    Raises `ValueError` on all ranks, and changes nothing, when an entry takes nothing, what it takes does not fit, or
    something is missing that must be given (`Objective.given`).
    """
    page = run_dir / "init.json"
    if is_main():
        page.unlink(missing_ok=True)  # of an attempt that ended before its first checkpoint
    if not entries and not objective.given():
        return []
    lines: list[str] = []
    error: Exception | None = None
    if is_main():
        try:
            targets = _targets(objective)
            found = [_take(f"init[{i}]", entry, targets) for i, entry in enumerate(entries)]
            _check_given(found, objective.given(), targets)
            _copy(found, objective)
            summary = _summary(found, objective)
            atomic_write(page, json.dumps(summary, indent=1))
            lines = _lines(summary)
        except Exception as caught:  # of any kind: the other ranks wait to hear of it
            error = caught
    raise_on_all_ranks(error)
    if world_size() > 1:
        for tensor in objective.state_dict().values():
            dist.broadcast(tensor, src=0)
    return lines


def licences_of_init(run: Path) -> dict[str, str | None]:
    """The licences of the files that the run began from, by path; None of those that say none."""
    page = run / "init.json"
    files = json.loads(page.read_text(encoding="utf-8"))["files"] if page.exists() else []
    return {file["path"]: file.get("licence") for file in files}  # runs of before did not note it


def _targets(objective: Objective) -> dict[str, Tensor]:
    """What weights may be copied into, by the names that `rename` is to give."""
    student, teacher = objective.student.state_dict(), objective.teacher
    if teacher is None:
        return student
    return student | {f"teacher.{name}": tensor for name, tensor in teacher.state_dict().items()}


def _take(where: str, entry: InitialWeights, targets: Mapping[str, Tensor]) -> _Taken:
    tensors, file, licence = _read(Path(entry.path))
    try:
        names = _choose(entry, list(tensors), targets)
        chosen = {new: tensors[name] for new, name in names.items()}
        _check_fit(chosen, targets)
    except ValueError as error:
        raise ValueError(f"{where} ({entry.path}): {error}") from None
    unused = _condensed(set(tensors) - set(names.values()), tensors)
    return _Taken(entry.path, _sha256(file), licence, chosen, names, unused)


def _read(path: Path) -> tuple[dict[str, Tensor], Path, str | None]:
    """The tensors at `path` by name, the file whose content stands for all of them, and their licence if it is said.

    Names in nested dictionaries are joined by dots; a `model.` around all of a training state is left out.
    """
    if (path / "encoder.json").is_file():
        bundle = load_bundle(path)
        parts = bundle.parts if isinstance(bundle, BundlePair) else {"encoder": bundle.encoder}
        tensors = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
        return tensors, path / "encoder.safetensors", _said(bundle.facts.get("licence"))
    if path.is_dir():
        checkpoint = locate(path)
        return read_weights(checkpoint), checkpoint / "complete.json", None  # which holds a checksum of every file
    tensors = read_state_dict(path)
    unwrapped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return unwrapped if len(unwrapped) == len(tensors) else tensors, path, None


def _said(licence: Any) -> str | None:
    return licence if isinstance(licence, str) and licence != UNSAID["licence"] else None


def _choose(entry: InitialWeights, names: Sequence[str], targets: Collection[str]) -> dict[str, str]:
    """Names in the file by the new names that `targets` knows and `entry` wants."""
    renamed = list(names)
    for regex, replacement in entry.rename.items():
        _check_found("rename", regex, renamed)
        renamed = [re.sub(regex, replacement, name) for name in renamed]
    if not entry.rename:
        renamed = [name.removeprefix("student.") for name in renamed]
    for key, regexes in (("include", entry.include), ("exclude", entry.exclude)):
        for regex in regexes:
            _check_found(key, regex, renamed)
    if not set(renamed) & set(targets):
        raise ValueError(
            f"it has no tensor of the student; renamed, its names are such as {', '.join(renamed[:3])}, the student's"
            f" such as {', '.join(list(targets)[:3])}{_rename_hint(renamed, targets)}"
        )
    chosen: dict[str, str] = {}
    for name, new in zip(names, renamed, strict=True):
        if new in targets and _is_wanted(entry, new):
            if new in chosen:
                raise ValueError(f"rename makes both {chosen[new]} and {name} to {new}; name one of them more closely")
            chosen[new] = name
    if not chosen:
        raise ValueError("include and exclude leave nothing of what the student has")
    return chosen


def _check_found(key: str, regex: str, names: Sequence[str]) -> None:
    if not any(re.search(regex, name) for name in names):
        raise ValueError(f"{key}: {regex!r} is found in none of its {len(names)} names, such as {', '.join(names[:3])}")


def _is_wanted(entry: InitialWeights, name: str) -> bool:
    included = not entry.include or any(re.search(regex, name) for regex in entry.include)
    return included and not any(re.search(regex, name) for regex in entry.exclude)


def _rename_hint(names: Sequence[str], targets: Collection[str]) -> str:
    """The one prefix to replace by which most of `names` become names of the student."""
    prefixes: defaultdict[str, set[str]] = defaultdict(set)
    for target in (target for target in targets if not target.startswith("teacher.")):
        for prefix, suffix in _splits(target):
            prefixes[suffix].add(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name in names:
        for prefix, suffix in _splits(name):  # the longest suffix first
            if len(known := prefixes.get(suffix, set())) == 1:
                votes[prefix, next(iter(known))] += 1
                break
    if not votes:
        return ""
    (old, new), n = votes.most_common(1)[0]
    return f"; with rename: {{'^{re.escape(old)}': '{new}'}} {n} of them would fit"


def _splits(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    for i in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:i]), ".".join(parts[i:])


def _check_fit(chosen: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    misfits = [name for name, tensor in chosen.items() if tensor.shape != targets[name].shape]
    if misfits:
        first = misfits[0]
        grid = " (a table of positions on another grid: see model.image_size)" if first.endswith("pos_embed") else ""
        regexes = ", ".join(f"'^{re.escape(name)}$'" for name in misfits)
        remedy = f"begin without by exclude: [{regexes}]" if len(misfits) <= _N_SHOWN else "is it of another model?"
        raise ValueError(
            f"{len(misfits)} of {len(chosen)} tensors have another shape, the first is {first}:"
            f" {list(chosen[first].shape)} there, {list(targets[first].shape)} here{grid}; {remedy}"
        )
    for name, tensor in chosen.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite; the file is damaged or its training diverged")


def _check_given(found: Sequence[_Taken], given: Mapping[str, str], targets: Collection[str]) -> None:
    """Raise `ValueError` unless the files bring every tensor whose name begins as one in `given`."""
    brought = {name for taken in found for name in taken.tensors}
    for beginning, advice in given.items():
        wanted = [name for name in targets if name.startswith(beginning)]
        if missing := [name for name in wanted if name not in brought]:
            raise ValueError(
                f"init gives no weights to {len(missing)} of the {len(wanted)} tensors of {beginning.rstrip('.')}:"
                f" {_shortened(_condensed(set(missing), wanted))}; {advice}"
            )


@torch.no_grad()
def _copy(found: Sequence[_Taken], objective: Objective) -> None:
    """Into the student, from there into the teacher, and then what is for the teacher alone."""
    merged = {name: tensor for taken in found for name, tensor in taken.tensors.items()}
    for_teacher = {name: tensor for name, tensor in merged.items() if name.startswith("teacher.")}
    student = objective.student.state_dict()
    for name in merged.keys() - for_teacher.keys():
        student[name].copy_(merged[name])
    objective.copy_to_teacher()
    if objective.teacher is not None:
        teacher = objective.teacher.state_dict()
        for name, tensor in for_teacher.items():
            teacher[name.removeprefix("teacher.")].copy_(tensor)


def _summary(found: Sequence[_Taken], objective: Objective) -> dict[str, Any]:
    trained = [name for name, parameter in objective.student.named_parameters() if parameter.requires_grad]
    left = set(trained).difference(*(taken.names for taken in found))
    return {
        "files": [
            {
                "path": taken.path,
                "sha256": taken.sha256,
                "licence": taken.licence,
                "taken": taken.names,
                "unused": taken.unused,
            }
            for taken in found
        ],
        "random": _condensed(left, trained),
    }


def _lines(summary: Mapping[str, Any]) -> list[str]:
    lines = [
        f"init: {len(file['taken'])} tensors of {file['path']}; unused: {_shortened(file['unused'])}"
        for file in summary["files"]
    ]
    return [*lines, f"init: random in the student: {_shortened(summary['random'])}"]


def _condensed(names: Collection[str], among: Collection[str]) -> list[str]:
    """`names` in the order of `among`, with one prefix and a count for all that begin so where none is left out."""
    partly = {prefix for name in among if name not in names for prefix in _prefixes(name)}
    below: defaultdict[str, list[str]] = defaultdict(list)
    for name in (name for name in among if name in names):
        below[next(prefix for prefix in _prefixes(name) if prefix not in partly)].append(name)
    return [f"{prefix} ({len(found)})" if len(found) > 1 else found[0] for prefix, found in below.items()]


def _prefixes(name: str) -> Iterator[str]:
    """`a`, `a.b` and `a.b.c` of `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _shortened(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _N_SHOWN} more (init.json)" if len(names) > _N_SHOWN else ""
    return ", ".join(names[:_N_SHOWN]) + rest if names else "none"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
