"""Encoders by what a user writes: on the command line, and in the config of a study.

    PATH        a run (its newest checkpoint), one of its checkpoints, or a bundle, a folder or a zip file: called as
                its folder is, a checkpoint as its run, with the step
    NAME=PATH   the same, called NAME; of a file of released weights, NAME says which encoder it is
    NAME        a released encoder or one of our recipes, with random weights

What exists as it is written is a path, whatever signs it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_eo.bundles import BundleEncoder, BundlePair, SensorInput
from ssl_eo.components import suggest
from ssl_eo.models.vit import Encoder
from ssl_eo.train.export import open_encoder
from ssl_eo.train.sealing import holds_checkpoints, name_of
from ssl_eo.weights._downloads import unpacked_bundle
from ssl_eo.weights._named import is_published, known_names, named
from ssl_eo.weights._recipes import RECIPES
from ssl_eo.weights.base import released_names

__all__ = ["OpenedEncoder", "open_model"]

_MOST_SIGNS = 100  # of a name, which stands in columns of tables


@dataclass(frozen=True)
class OpenedEncoder:
    """The published encoder of a model, and how it is called; `is_trained` is False where its weights are random."""

    name: str
    bundle: BundleEncoder
    is_trained: bool = True

    @property
    def encoder(self) -> Encoder:
        return self.bundle.encoder

    @property
    def inputs(self) -> Mapping[str, SensorInput]:
        """What it was trained on, by sensor."""
        return self.bundle.inputs

    @property
    def step(self) -> int:
        """After how many steps of training; of released weights, of which nobody says it, 1."""
        step: int = self.bundle.facts["step"]
        return step

    @property
    def features(self) -> Mapping[str, Any]:
        """How its run, or its authors, read features, as far as that is known: pool and taps."""
        features: Mapping[str, Any] = self.bundle.facts["features"]
        return features


def open_model(text: str, or_random: bool = False) -> OpenedEncoder:
    """The encoder that `text` names; one without weights only where it may be `or_random`.

    Raises `ValueError` that begins with `text` where it names none, and else what opening it raises.
    """
    name, path = _parted(text)
    if path.is_dir():
        bundle = open_encoder(path)
        return OpenedEncoder(name or _shown(_usual_name(path.resolve(), bundle.facts["step"]), text), bundle)
    if path.is_file():
        return _open_file(name, path, text)
    if or_random and text in known_names():
        return OpenedEncoder(text, _published(named(text, False)), is_trained=False)
    raise ValueError(f"{text}: no such path{_advice(text, path, or_random)}")


def _parted(text: str) -> tuple[str | None, Path]:
    """The name that is given, if any, and the path. Raises `ValueError` for names that would not fit a table."""
    if "=" not in text or Path(text).exists():
        return None, Path(text)
    name, _, path = text.partition("=")
    if name != name.strip() or not name.isprintable() or not 0 < len(name) <= _MOST_SIGNS:
        raise ValueError(
            f"{text!r:.200}: before the = must stand a name of 1 to {_MOST_SIGNS} printable signs, without blanks"
            " around it"
        )
    if not path:
        raise ValueError(f"{text}: a path must stand behind the =")
    return name, Path(path).expanduser()  # shells leave ~ alone behind a =


def _usual_name(path: Path, step: int) -> str:
    """Of a checkpoint the run and the step: all runs have folders of the same names for them."""
    is_checkpoint = path.name == name_of(step) and not (path / "encoder.json").exists()
    return f"{path.parent.parent.name} step {step}" if is_checkpoint else path.name


def _shown(name: str, text: str) -> str:
    """`name`, which a folder or file gives to what `text` says. Raises `ValueError` where it cannot be printed."""
    if not name.isprintable():
        raise ValueError(f"{text!r:.200}: {name!r:.100} cannot be printed in a table; give a name: NAME=PATH")
    return name


def _open_file(name: str | None, path: Path, text: str) -> OpenedEncoder:
    """The encoder of a packed bundle, or of a file of released weights, read as its authors read it."""
    if path.suffix == ".zip":
        with unpacked_bundle(path) as folder:
            return OpenedEncoder(name or _shown(path.stem, text), open_encoder(folder))
    if (folder_of := _folder_of(path)) is not None:
        raise ValueError(f"{text}: {path.name} is a part of what {folder_of} holds; give the folder")
    if name is None:
        raise ValueError(
            f"{text}: a file of released weights is given as NAME={text}, where NAME says which encoder it is, for"
            " instance dinov2_vits14"
        )
    if not is_published(name):
        raise ValueError(
            f"{text}: of a file, the name says which encoder it is, and {name!r} is none that was published"
            f"{suggest(name, released_names())}"
        )
    return OpenedEncoder(name, _published(named(name, path)))


def _published(found: BundleEncoder | BundlePair) -> BundleEncoder:
    return found.published if isinstance(found, BundlePair) else found


def _folder_of(path: Path) -> Path | None:
    """The bundle, the checkpoint or the run that the file `path` is of; None for a file by itself."""
    folder = path.parent
    if (folder / "encoder.json").is_file() or (folder / "complete.json").is_file():
        return folder
    return folder if holds_checkpoints(folder / "checkpoints") else None


def _advice(text: str, path: Path, or_random: bool) -> str:
    """What may have been meant."""
    if is_published(text):
        return f"; of released weights, give the file: {text}=FILE"
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    is_name = or_random and path.name == text
    if found := suggest(path.name, [*beside, *(name for name in known_names() if is_name and name not in beside)]):
        return found
    is_recipe = path.name in RECIPES
    return f"; a run of this recipe comes of: ssl-eo train --config pretrain/{path.name}" if is_recipe else ""
