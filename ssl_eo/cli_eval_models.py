"""What `--model` of `ssl-eo eval` names: an encoder, what it is called, and how its features are read.

    PATH        a run (its newest checkpoint), one of its checkpoints, or a bundle: called as its folder is, a
                checkpoint as its run, with the step
    NAME=PATH   the same, called NAME; of a file of released weights, NAME says which encoder it is

What exists as it is written is a path, whatever signs it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_eo.components import suggest
from ssl_eo.eval.offline import Model
from ssl_eo.train.export import open_encoder
from ssl_eo.train.sealing import holds_checkpoints, name_of
from ssl_eo.weights import croma
from ssl_eo.weights.base import find_released, read_released

__all__ = ["open_model"]

_MOST_SIGNS = 100  # of a name, which stands in columns of tables
_NO_STEP = 0  # after how many steps released weights were saved is not known


def open_model(text: str) -> tuple[Model, Mapping[str, Any]]:
    """The encoder that `text` names, and how its features are read, as far as that is known: pool and taps.

    Raises `ValueError` that begins with `--model` where `text` names none, besides what opening it raises.
    """
    name, path = _parted(text)
    if path.is_file():
        return _open_file(name, path, text)
    if not path.is_dir():
        raise ValueError(f"--model {text}: no such path{_advice(name, path)}")
    encoder, step, features = open_encoder(path)
    return Model(name or _usual_name(path.resolve(), step), encoder, step), features


def _parted(text: str) -> tuple[str | None, Path]:
    """The name that is given, if any, and the path. Raises `ValueError` for names that would not fit a table."""
    if "=" not in text or Path(text).exists():
        return None, Path(text)
    name, _, path = text.partition("=")
    if name != name.strip() or not name.isprintable() or not 0 < len(name) <= _MOST_SIGNS:
        raise ValueError(
            f"--model {text!r:.200}: before the = must stand a name of 1 to {_MOST_SIGNS} printable signs, without"
            " blanks around it"
        )
    if not path:
        raise ValueError(f"--model {text}: a path must stand behind the =")
    return name, Path(path).expanduser()  # shells leave ~ alone behind a =


def _usual_name(path: Path, step: int) -> str:
    """Of a checkpoint the run and the step: all runs have folders of the same names for them."""
    is_checkpoint = path.name == name_of(step) and not (path / "encoder.json").exists()
    return f"{path.parent.parent.name} step {step}" if is_checkpoint else path.name


def _open_file(name: str | None, path: Path, text: str) -> tuple[Model, Mapping[str, Any]]:
    """The encoder of a file of released weights, read as its authors read it, as a bundle that is imported from it."""
    if (folder := _folder_of(path)) is not None:
        raise ValueError(f"--model {text}: {path.name} is a part of what {folder} holds; give the folder")
    if name is None:
        raise ValueError(
            f"--model {text}: a file of released weights is given as NAME={text}, where NAME says which encoder it is,"
            " for instance dinov2_vits14"
        )
    if name in croma.PAIRS:
        pair = croma.load_pair(path, croma.PAIRS[name])
        return Model(name, pair.optical, _NO_STEP), _features(croma.PAIR_FACTS)
    try:
        released = find_released(name)
    except ValueError as error:
        raise ValueError(f"--model {text}: of a file, the name says which encoder it is: {error}") from None
    encoder, facts = read_released(path, released)
    return Model(name, encoder, _NO_STEP), _features(facts)


def _features(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = facts["features"]
    return found


def _folder_of(path: Path) -> Path | None:
    """The bundle, the checkpoint or the run that the file `path` is of; None for a file by itself."""
    folder = path.parent
    if (folder / "encoder.json").is_file() or (folder / "complete.json").is_file():
        return folder
    return folder if holds_checkpoints(folder / "checkpoints") else None


def _advice(name: str | None, path: Path) -> str:
    """What may have been meant."""
    if name is None and _is_released(str(path)):
        return f"; of released weights, give the file: {path}=FILE"
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return suggest(path.name, beside)


def _is_released(name: str) -> bool:
    try:
        return name in croma.PAIRS or find_released(name).name == name
    except ValueError:
        return False
