"""The command `ssl-eo embed`. Everything heavy is imported inside it.

B windows, C bands, s side of a window in pixels, p side of a patch, D features.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_eo.cluster import EXIT_DONE
from ssl_eo.components import told_of

if TYPE_CHECKING:
    from torch import Tensor

    from ssl_eo.bundles import BundleEncoder, SensorInput
    from ssl_eo.models.vit import EncoderConfig
    from ssl_eo.opening import OpenedEncoder

__all__ = ["add_embed"]

_WINDOW_PX = 224  # what most encoders are trained on; rounded up to a multiple of the patch
_HAS_TABLE = ("learned", "sincos_resized", "sincos_3d")  # positions that are stretched to any size but image_size


def add_embed(parser: argparse.ArgumentParser) -> None:
    """Add what `ssl-eo embed` takes."""
    window = (
        f"side of a window in pixels, a multiple of the patch; default: {_WINDOW_PX}, or the size that the encoder's"
        " table of positions is made for; no more than the scene needs"
    )
    some = "bands of the sensor to look at, for an encoder of any sensor; default: all that it has statistics of"
    parser.add_argument("scene", metavar="SCENE.tif", help="a GeoTIFF of any size")
    parser.add_argument(
        "--model",
        required=True,
        help="a run, a checkpoint or a bundle; NAME=PATH calls it NAME; RELEASED=FILE: released weights",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="a .tif with a band a feature, or a .parquet")
    parser.add_argument("--sensor", default=None, help="which of the model's the scene is of; needed if it has several")
    parser.add_argument(
        "--bands", nargs="+", default=None, help="the model's bands in the file: names, or numbers from 1"
    )
    parser.add_argument("--sensor-bands", nargs="+", default=None, metavar="BAND", help=some)
    parser.add_argument("--window", type=int, default=None, help=window)
    parser.add_argument("--overlap", type=float, default=0.5, help="of neighbouring windows; default 0.5")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a forward pass; default 8")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32", help="of what is written")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> int:
    from ssl_eo.cli_stopping import until_stopped

    return until_stopped(lambda: _embed_scene(arguments))


def _embed_scene(arguments: argparse.Namespace) -> int:
    import torch

    from ssl_eo.adapt.scene_maps import SceneRun, embed_scene
    from ssl_eo.adapt.tiling import grid_of
    from ssl_eo.bundle_inputs import with_bands
    from ssl_eo.cli_scenes import opened_scene, tiling_of
    from ssl_eo.opening import open_model
    from ssl_eo.progress import progress

    path, out = Path(arguments.scene), Path(arguments.out)
    with told_of("--model"):
        opened = open_model(arguments.model)
    sensor, model = _sensor_of(opened, arguments.sensor), opened.bundle
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with told_of("--sensor-bands"):
        is_fixed = model.encoder.cfg.patch_embed == "conv"
        known = with_bands(opened.inputs[sensor], arguments.sensor_bands, is_fixed)
    facts = _facts(model, known)
    with (
        _some_bands_named(known, is_fixed),
        opened_scene(path, arguments.bands, known) as scene,
        progress("windows") as tell,
    ):
        patch_px = model.encoder.patch_size
        given = arguments.window
        window = _default_window(model.encoder.cfg, scene.shape) if given is None else given
        tiling = tiling_of(arguments, window, patch_px, patch_px, "cosine")
        run = SceneRun(facts, arguments.overwrite, tell)
        n_features = model.encoder.embed_dim
        tags = {"model": opened.name, "weights": facts["weights"], "sensor": sensor, "bands": " ".join(known.bands)}
        look = partial(_features, model, sensor, known.bands)
        embed_scene(scene, look, n_features, out, tiling, run, arguments.dtype, tags)
        height, width = grid_of(scene.shape, patch_px)
    print(
        f"wrote {out}: {n_features} features of {height} x {width} patches of {patch_px} pixels"
        f" (sensor {sensor}; windows of {window} pixels)"
    )
    return EXIT_DONE


@contextmanager
def _some_bands_named(known: SensorInput, is_fixed: bool) -> Iterator[None]:
    """Where a scene lacks some of the bands, the error says how an encoder of any sensor takes the others."""
    from ssl_eo.adapt.scenes import NoBandError

    try:
        yield
    except NoBandError as error:
        there = [band for band in known.bands if band in error.held]
        if is_fixed or not there:
            raise
        raise ValueError(f"{error}; to look at those that are there, add --sensor-bands {' '.join(there)}") from None


def _sensor_of(opened: OpenedEncoder, given: str | None) -> str:
    """Which of the model's sensors the scene is of. Raises `ValueError` with those there are."""
    from ssl_eo.components import suggest

    known = list(opened.inputs)
    if not known:
        raise ValueError(
            f"--model {opened.name}: it has statistics for no sensor, so stored values cannot be normalised; give"
            " standardised pixels to ssl_eo.adapt.scene_maps.embed_scene from Python"
        )
    if given is None:
        if len(known) > 1:
            raise ValueError(f"--sensor: {opened.name} knows several; say which the scene is of: {', '.join(known)}")
        return known[0]
    if given not in known:
        raise ValueError(
            f"--sensor: {opened.name} does not know {given!r}{suggest(given, known)} (it knows {', '.join(known)})"
        )
    return given


def _default_window(cfg: EncoderConfig, shape: tuple[int, int]) -> int:
    """Side in pixels, a multiple of the patch: the encoder's own, or that of the scene where it is smaller."""
    wanted = cfg.image_size if cfg.position in _HAS_TABLE else _WINDOW_PX
    n_patches = min(-(-wanted // cfg.patch_size), -(-max(shape) // cfg.patch_size))
    return n_patches * cfg.patch_size


def _features(model: BundleEncoder, sensor: str, bands: Sequence[str], images: Tensor) -> Tensor:
    """Features `[B, D, s / p, s / p]` of stored values `[B, C, s, s]`, NaN where nothing was measured.

    `sensor` is what the model calls its input, of which it may have two for one sensor.
    """
    device = next(model.parameters()).device
    tokens = model.forward_features(images.to(device), sensor, bands=bands)
    patches = tokens.patches.transpose(1, 2)  # [B, D, h*w]
    return patches.reshape(*patches.shape[:2], *tokens.grid).cpu()  # [B, D, h, w]


def _facts(model: BundleEncoder, known: SensorInput) -> Mapping[str, Any]:
    """All of the model that features depend on, as plain JSON types."""
    from ssl_eo.eval.provenance import digest_of_tensors

    of_input = {"bands": list(known.bands), "mean": list(known.mean), "std": list(known.std)}
    return {
        "weights": digest_of_tensors(model.encoder.state_dict()),
        "encoder": asdict(model.encoder.cfg),
        "sensor": known.sensor.to_dict(),
        "input": {**of_input, "gsd_m": known.gsd_m, "clip_std": known.clip_std},
    }
