"""A whole scene through a model: classes of its pixels, or features of its patches, panel by panel.

Memory is bounded by the window and the panel, not by the scene: `tiling.panel_bytes`, beside 64 MB of GDAL's and what
the model takes. A finished panel is kept in the folder `OUT.panels` until the outputs are whole: a run that was killed
goes on after the last of them, and panels of another scene, model or tiling are refused. Outputs are written under
another name, `OUT.<random>.partial`, and renamed at the end: a file `OUT` is always a whole one. Files that no such run
has made are neither replaced nor removed: a folder that holds any is refused.

C bands, s side of a window in pixels, p side of a patch, B windows, K values of a cell, D features, h w cells of a
panel.
"""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_eo.adapt.scene_outputs import Output, TableOutput, class_map, value_map
from ssl_eo.adapt.scenes import Scene
from ssl_eo.adapt.tiling import Box, Tiling, WindowModel, blend_box, count_windows, panel_side, panels
from ssl_eo.components import one_line
from ssl_eo.files import atomic_file, atomic_write, locked_folder, sync

__all__ = ["SceneRun", "Windowed", "embed_scene", "map_scene", "predict_scene"]

_FORMAT = "panels 2"
_RASTERS = (".tif", ".tiff")
_OWN = re.compile(r"\.lock|inputs\.json|\d_\d{6,}\.npy|(inputs\.json|\d_\d{6,}\.npy)\.[0-9a-f]{8}\.partial")


@dataclass(frozen=True)
class Windowed:
    """A model of windows, which gives `n_values` values of a cell, and how its windows are cut and joined.

    With `softmax` what is joined are probabilities, the softmax over the values.
    """

    model: WindowModel
    n_values: int
    tiling: Tiling
    softmax: bool = False


@dataclass(frozen=True)
class SceneRun:
    """What holds for any output: `facts` say which model it is, as plain JSON types (its SHA-256).

    `progress` is told (windows done, all of them) after each batch. `memory_bytes` are for a panel.
    """

    facts: Mapping[str, Any]
    overwrite: bool = False
    progress: Callable[[int, int], None] | None = None
    memory_bytes: int = 1 << 30


def predict_scene(
    scene: Scene,
    model: WindowModel,
    class_names: Sequence[str],
    out: Path,
    tiling: Tiling,
    run: SceneRun,
    probabilities: Path | None = None,
    tags: Mapping[str, str] | None = None,
) -> list[int]:
    """Write the GeoTIFF `out` with the class of each pixel of `scene`, and with `probabilities` one of a band a class.

    Returns how many pixels are of each class, `[K + 1]`: the last number is that of pixels without one.

    `model` makes logits `[B, K, s, s]` of stored values `[B, C, s, s]`, NaN where nothing was measured (as
    `BundleEncoder.prepare` takes them); their softmax is blended. Pixels of which no band was measured have no class.
    Raises as `map_scene` does.
    """
    for path in (out, *([] if probabilities is None else [probabilities])):
        if path.suffix not in _RASTERS:
            raise ValueError(f"{path}: maps are written to a .tif file")
    counts = np.zeros(1 << 16, np.int64)  # of each value that is stored, uint8 or uint16

    def count(stored: NDArray[Any]) -> None:
        counts[:] += np.bincount(stored.reshape(-1), minlength=len(counts))

    classes = class_map(out, class_names, tags or {}, count)
    outputs: list[Output] = [classes]
    if probabilities is not None:
        outputs.append(value_map(probabilities, len(class_names), "float32", class_names, tags or {}))
    map_scene(scene, Windowed(model, len(class_names), tiling, softmax=True), outputs, run)
    return [*counts[: len(class_names)].tolist(), int(counts[int(classes.no_data)])]


def embed_scene(
    scene: Scene,
    model: WindowModel,
    n_features: int,
    out: Path,
    tiling: Tiling,
    run: SceneRun,
    dtype: Literal["float16", "float32"] = "float32",
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write features of the patches of `scene`: a `.tif` of D bands, or a `.parquet` file with a row a patch.

    `model` makes features `[B, D, s / p, s / p]` of stored values `[B, C, s, s]`, and `tiling.cell_px` is p. Patches of
    which nothing was measured are NaN, and have no row. Raises as `map_scene` does.
    """
    output: Output
    if out.suffix == ".parquet":
        output = TableOutput(out, n_features, dtype, tags or {})
    elif out.suffix in _RASTERS:
        output = value_map(out, n_features, dtype, (), tags or {})
    else:
        raise ValueError(f"{out}: features are written to a .tif or a .parquet file")
    map_scene(scene, Windowed(model, n_features, tiling), [output], run)


def map_scene(scene: Scene, windowed: Windowed, outputs: Sequence[Output], run: SceneRun) -> None:
    """Write all `outputs` from the values that a model of windows gives for each cell of `scene`.

    Raises `ValueError` for paths that are taken, a model that gives something else, too little memory, and panels of a
    killed run with another scene, model, tiling or memory, a folder of panels that holds something else, or a scene
    that is changed meanwhile, of which nothing is kept; `OSError` for a scene that cannot be read and a disk that is
    full. Finished panels stay then, and the same call goes on with them; whatever stops it, an interrupt too, has a
    note of how many there are. Warns where nothing of the scene was measured.
    """
    _check_paths(scene.path, [output.path for output in outputs], run.overwrite)
    tiling = windowed.tiling
    side = panel_side(scene.shape, tiling, scene.n_bands, windowed.n_values, run.memory_bytes)
    folder = outputs[0].path.with_name(f"{outputs[0].path.name}.panels")
    kept = _Panels(folder, panels(scene.grid.coarser(tiling.cell_px).shape, side))
    kept.check()
    with locked_folder(folder, "write to another path"):
        try:
            stamp = scene.stamp()
            token = kept.begin(_inputs(scene, windowed, outputs, run, side))
            with _left_noted(kept, len(outputs)):
                _make_panels(kept, scene, windowed, outputs, run)
            if scene.stamp() != stamp:
                kept.remove()
                raise ValueError(f"{scene.path} was changed while it was read, so the map would be of two: run again")
            with _left_noted(kept, len(outputs)):
                if not any(outputs[0].has_values(stored) for _, stored in kept.load(0)):
                    warnings.warn(
                        f"{scene.path}: nothing of it was measured, so there are no values to write", stacklevel=3
                    )
                _write_outputs(kept, scene, outputs, tiling, side, run.overwrite, token)
        except BaseException:
            if not kept.has_any:
                with suppress(OSError):  # what went wrong before says more
                    kept.remove()
            raise
        kept.remove()


@contextmanager
def _left_noted(kept: _Panels, n_outputs: int) -> Iterator[None]:
    """Whatever stops a run, an interrupt too, gets a note of what is left of it."""
    try:
        yield
    except BaseException as error:
        error.add_note(kept.left(n_outputs))
        raise


def _make_panels(kept: _Panels, scene: Scene, windowed: Windowed, outputs: Sequence[Output], run: SceneRun) -> None:
    """Make the panels that are not there yet."""
    tiling, n_values = windowed.tiling, windowed.n_values
    n_windows = [count_windows(scene.shape, box, tiling) for box in kept.boxes]
    done, total = 0, sum(n_windows)

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if run.progress is not None:
            run.progress(done, total)

    def make(i: int, box: Box) -> None:
        values = blend_box(scene.read, scene.shape, box, windowed.model, tiling, windowed.softmax, advance)  # [K, h, w]
        if values is None:
            values = torch.full((n_values, *box[2:]), torch.nan)
        if values.shape[0] != n_values:
            raise ValueError(f"the model gives {values.shape[0]} values of a cell, expected {n_values}")
        for o, output in enumerate(outputs):
            kept.save(o, i, output.panel(values))

    for i, box in enumerate(kept.boxes):
        if kept.has(i, len(outputs)):
            advance(n_windows[i])
        else:
            make(i, box)


def _write_outputs(
    kept: _Panels, scene: Scene, outputs: Sequence[Output], tiling: Tiling, side: int, overwrite: bool, token: str
) -> None:
    grid = scene.grid.coarser(tiling.cell_px)
    unfinished = [output.path.with_name(f"{output.path.name}.{token}.partial") for output in outputs]
    try:
        for i, (output, path) in enumerate(zip(outputs, unfinished, strict=True)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # GDAL would open what a kill has left
            output.write(path, grid, partial(kept.load, i), side)
            sync(path)
        _check_paths(scene.path, [output.path for output in outputs], overwrite)  # others may have written meanwhile
        for output, path in zip(outputs, unfinished, strict=True):
            path.replace(output.path)
            sync(path.parent)
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)


class _Panels:
    """The finished panels of a run, in a folder that says what they were made of."""

    def __init__(self, folder: Path, boxes: Sequence[Box]) -> None:
        self.boxes = boxes
        self._folder, self._inputs = folder, folder / "inputs.json"

    @property
    def has_any(self) -> bool:
        return any(self._folder.glob("*.npy"))

    def check(self) -> None:
        """Raise `ValueError` where the folder is a link or holds what no such run has made, which is left as it is."""
        if self._folder.is_symlink():
            raise ValueError(f"{self._folder} is a link, and panels are kept there: write to another path")
        if not self._folder.is_dir():
            return  # whoever makes it says so if it is a file
        with os.scandir(self._folder) as entries:
            foreign = sorted(e.name for e in entries if not _is_own(e))
        if foreign:
            raise ValueError(
                f"{self._folder} holds {foreign[0]!r}, which no run of this command has made: write to another path, or"
                " move the folder"
            )
        if self.has_any or self._inputs.exists():
            self._begun()

    def begin(self, inputs: Mapping[str, Any]) -> str:
        """The random part of the names of unfinished outputs, the same for a run that goes on.

        Raises `ValueError` where there are panels that were made of something else.
        """
        if not self.has_any:
            token = token_hex(4)
            atomic_write(self._inputs, json.dumps({**inputs, "token": token}, indent=1))
            return token
        found = self._begun()
        for key, value in inputs.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{self._folder} holds panels of a run with another {key} ({_shown(found.get(key))}, now"
                    f" {_shown(value)}): give what it was begun with, or remove the folder to begin anew"
                )
        return str(found["token"])

    def _begun(self) -> dict[str, Any]:
        """What a run that was stopped has noted. Raises `ValueError` for what is no such note."""
        hint = f"write to another path, or remove {self._folder}"
        try:
            found = json.loads(self._inputs.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"{self._folder} holds panels, and no {self._inputs.name} that says of which run: {hint}"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self._inputs} cannot be read ({one_line(error)}): {hint}") from None
        if not isinstance(found, dict) or not str(found.get("format")).startswith("panels "):
            raise ValueError(f"{self._inputs} was not written by a run of this command: {hint}")
        if found["format"] == _FORMAT and not re.fullmatch("[0-9a-f]{8}", str(found.get("token"))):
            raise ValueError(f"{self._inputs} is damaged (token: {_shown(found.get('token'))}): {hint}")
        return found

    def remove(self) -> None:
        """Remove what this run has made, and the folder unless something else was put there meanwhile."""
        with os.scandir(self._folder) as entries:
            own = [entry.path for entry in entries if _is_own(entry)]
        for path in own:
            Path(path).unlink()
        try:
            self._folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            warnings.warn(f"{self._folder} stays: it holds files that are not of this run", stacklevel=4)

    def has(self, i: int, n_outputs: int) -> bool:
        return all(self._path(o, i).exists() for o in range(n_outputs))

    def left(self, n_outputs: int) -> str:
        """What a run that is stopped leaves to the next one, in words."""
        n, n_finished = len(self.boxes), sum(self.has(i, n_outputs) for i in range(len(self.boxes)))
        if n_finished == 0:
            return f"no panel of {n} is finished, so the same command begins with the first"
        return f"{n_finished} of {n} panels are kept in {self._folder}; the same command goes on"

    def save(self, output: int, i: int, values: NDArray[Any]) -> None:
        values = np.ascontiguousarray(values)
        with atomic_file(self._path(output, i)) as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
            file.write(values.data.cast("B"))

    def load(self, output: int) -> Iterator[tuple[Box, NDArray[Any]]]:
        for i, box in enumerate(self.boxes):
            path = self._path(output, i)
            try:
                values: NDArray[Any] = np.load(path, allow_pickle=False)
                if values.shape[-2:] != tuple(box[2:]):
                    raise ValueError(f"its shape is {values.shape}, expected {tuple(box[2:])} at its end")
            except (ValueError, EOFError) as error:
                raise ValueError(f"{path} is damaged ({one_line(error)}): remove it, and run again") from None
            yield box, values

    def _path(self, output: int, i: int) -> Path:
        return self._folder / f"{output}_{i:06d}.npy"


def _is_own(entry: os.DirEntry[str]) -> bool:
    """Whether it may be a file of a run: by its name, and no link."""
    return _OWN.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


def _inputs(scene: Scene, windowed: Windowed, outputs: Sequence[Output], run: SceneRun, side: int) -> dict[str, Any]:
    """What panels depend on, as plain JSON types."""
    cut = {key: value for key, value in asdict(windowed.tiling).items() if key != "batch_size"}
    return {
        "format": _FORMAT,
        "scene": scene.digest(),
        "bands": list(scene.channels),
        "no_data": list(scene.no_data),
        "model": json.loads(json.dumps(dict(run.facts))),
        "tiling": {**cut, "softmax": windowed.softmax},
        "outputs": [output.facts() for output in outputs],
        "panel_side": side,
    }


def _check_paths(scene: Path, paths: Sequence[Path], overwrite: bool) -> None:
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"outputs must differ, got {', '.join(map(str, paths))}")
    for path in paths:
        with suppress(FileNotFoundError):
            if path.samefile(scene):
                raise ValueError(f"{path} is the scene itself: give another path")
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the path of a file")
        if os.path.lexists(path) and not overwrite:
            raise ValueError(f"{path} exists already; give another path, or overwrite it (--overwrite)")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no regular file: give another path")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
