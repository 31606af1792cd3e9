"""What `ssl-eo embed` and `ssl-eo predict` share. Everything heavy is imported inside."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_eo.cluster import StoppedEarlyError
from ssl_eo.progress import say

if TYPE_CHECKING:
    from ssl_eo.adapt.scenes import Scene
    from ssl_eo.adapt.tiling import Blend, Tiling
    from ssl_eo.bundles import SensorInput

__all__ = ["opened_scene", "tiling_of"]

_OPTIONS = {"size_px": "--window", "overlap_ratio": "--overlap", "batch_size": "--batch-size"}


@contextmanager
def opened_scene(path: Path, given: Sequence[str] | None, known: SensorInput) -> Iterator[Scene]:
    """The scene with the bands of `known`, which `given` (--bands) finds in the file.

    Warnings are lines on stderr, and so is what is left of work on it that somebody stops.
    """
    bands = [int(band) if band.isdecimal() else band for band in given or known.bands]
    if len(bands) != len(known.bands):
        raise ValueError(f"--bands: the model takes {len(known.bands)}, {', '.join(known.bands)}; got {len(bands)}")
    with _warnings_as_lines(), _open(path, bands, known) as scene:
        for doubt in scene.doubts(known.sensor, known.gsd_m):
            _warn(doubt)
        try:
            yield scene
        except (KeyboardInterrupt, StoppedEarlyError) as stop:
            for note in getattr(stop, "__notes__", ()):
                say(f"ssl-eo: {note}")
            raise


def _open(path: Path, bands: Sequence[str | int], known: SensorInput) -> Scene:
    """The scene. Raises `NoBandError` that says what the model takes, and how to say where it is."""
    from ssl_eo.adapt.scenes import NoBandError, Scene

    try:
        return Scene(path, bands, known.sensor)
    except NoBandError as error:
        if set(error.held) & set(known.bands):  # it has others of them, so it is no matter of names
            raise
        numbers = " ".join(str(i + 1) for i in range(len(known.bands)))
        takes = f"the model takes {' '.join(known.bands)}: --bands {numbers} if the file has them in this order"
        raise NoBandError(f"{error}; {takes}", error.held) from None


def tiling_of(arguments: argparse.Namespace, window: int, patch_px: int, cell_px: int, blend: Blend) -> Tiling:
    """How the command asks to cut a scene. Raises `ValueError` with the option's name."""
    from ssl_eo.adapt.tiling import Tiling

    try:
        return Tiling(window, arguments.overlap, blend, patch_px, cell_px, arguments.batch_size)
    except ValueError as error:
        key, _, rest = str(error).partition(" ")
        raise ValueError(f"{_OPTIONS.get(key, key)} {rest}") from None


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Those of this package, each time, as the command's other warnings; what is warned of elsewhere as ever."""
    from ssl_eo.bundle_inputs import StoredValuesWarning

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _warn(str(message))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="ssl_eo")
        warnings.filterwarnings("ignore", category=StoredValuesWarning)  # the file has been doubted already
        warnings.showwarning = show
        yield


def _warn(text: str) -> None:
    say(f"ssl-eo: warning: {text}")
