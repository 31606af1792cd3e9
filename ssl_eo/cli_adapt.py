"""The commands `ssl-eo study`, `predict` and `export-ensemble`. Everything heavy is imported inside them."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_eo.cluster import EXIT_DONE, EXIT_FAILURE, read_launch

if TYPE_CHECKING:
    from ssl_eo.adapt.saved import SavedModel
    from ssl_eo.adapt.study import StudyConfig

__all__ = ["add_export_ensemble", "add_predict", "add_study"]

_MAX_SHOWN = 5  # classes in a line


def add_study(parser: argparse.ArgumentParser) -> None:
    """Add what `ssl-eo study` takes."""
    parser.add_argument("config", help="a YAML file, or a name below configs/ such as eval/decoder_study")
    overrides = "for instance trainings.default.n_steps=100, or decoders.fcn=null, which leaves it out"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    parser.add_argument("--out", required=True, help="folder of the study; several processes may share it")
    parser.set_defaults(run=_study)


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add what `ssl-eo predict` takes."""
    parser.add_argument("scene", metavar="SCENE.tif", help="a GeoTIFF of any size")
    of_maps = "folder of a model of a study (STUDY/models/...), trained on segmentation"
    parser.add_argument("--model", required=True, help=of_maps)
    yours = "a decoder of your own, pkg.module, which the model was trained with: its code is run"
    parser.add_argument("--decoder", default=None, help=yours)
    parser.add_argument("--out", required=True, metavar="CLASSES.tif", help="the class of every pixel")
    parser.add_argument("--probabilities", metavar="FILE.tif", default=None, help="also write a band for each class")
    parser.add_argument(
        "--bands", nargs="+", default=None, help="the model's bands in the file: names, or numbers from 1"
    )
    parser.add_argument("--window", type=int, default=None, help="side of a window in pixels; default: as in training")
    parser.add_argument("--overlap", type=float, default=0.5, help="of neighbouring windows; default 0.5")
    parser.add_argument("--blend", choices=["cosine", "gaussian"], default="cosine", help="how windows are joined")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a forward pass")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=_predict)


def add_export_ensemble(parser: argparse.ArgumentParser) -> None:
    """Add what `ssl-eo export-ensemble` takes."""
    what = "a folder that runs and bundles lie in, each of which becomes a specialist called as its folder"
    parser.add_argument("folder", metavar="FOLDER", help=what)
    parser.add_argument("--out", required=True, help="the ensemble folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the ensemble that is there")
    parser.set_defaults(run=_export_ensemble)


def _study(arguments: argparse.Namespace) -> int:
    from ssl_eo.cli_stopping import until_stopped

    return until_stopped(lambda: _work_on_study(arguments))


def _work_on_study(arguments: argparse.Namespace) -> int:
    from ssl_eo.adapt.study import StudyConfig, leave_out
    from ssl_eo.adapt.study_page import check_pages, print_study, write_study_page
    from ssl_eo.adapt.study_run import run_study
    from ssl_eo.config import build, find_config, read_overrides, read_yaml

    path, overrides = find_config(arguments.config), arguments.overrides
    raw = leave_out(read_yaml(path, overrides), read_overrides(overrides), read_yaml(path))
    cfg = build(StudyConfig, raw, "")
    out = Path(arguments.out)
    check_pages(out)
    records = run_study(_on_own_gpu(cfg), out)
    if read_launch(os.environ).rank != 0:
        return EXIT_DONE
    command = shlex.join(["ssl-eo", "study", arguments.config, *overrides, "--out", arguments.out])
    pages = write_study_page(records, out, path.stem.replace("_", " "), command)  # first: who reads may stop early
    print_study(records, sys.stdout)
    for page in pages:
        print(page)
    unsaved = [record["unsaved"] for record in records if "unsaved" in record]
    for folder in unsaved:
        print(f"not saved: {folder}; the same command trains it again")
    is_whole = all(record["kind"] == "result" for record in records) and not unsaved
    return EXIT_DONE if is_whole else EXIT_FAILURE


def _on_own_gpu(cfg: StudyConfig) -> StudyConfig:
    """Processes of a node take one GPU each, unless the study says where."""
    from dataclasses import replace

    import torch

    if cfg.device is not None or not torch.cuda.is_available():
        return cfg
    return replace(cfg, device=f"cuda:{read_launch(os.environ).local_rank % torch.cuda.device_count()}")


def _predict(arguments: argparse.Namespace) -> int:
    from ssl_eo.cli_stopping import until_stopped

    return until_stopped(lambda: _map_scene(arguments))


def _map_scene(arguments: argparse.Namespace) -> int:
    import torch

    from ssl_eo.adapt.saved import load_model
    from ssl_eo.adapt.scene_maps import SceneRun, predict_scene
    from ssl_eo.cli_scenes import opened_scene, tiling_of
    from ssl_eo.progress import progress

    saved = load_model(arguments.model, arguments.decoder)
    if (kind := saved.facts["kind"]) != "segmentation":
        raise ValueError(
            f"--model: {arguments.model} was trained on {kind}, and a map needs segmentation; in Python it takes"
            f" images: ssl_eo.adapt.saved.load_model({arguments.model!r}).logits(images)"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saved.model.to(device)
    patch_px = max(saved.model.backbone.shape.strides_px)
    default = -(-saved.facts["size_px"] // patch_px) * patch_px
    window = default if arguments.window is None else arguments.window
    tiling = tiling_of(arguments, window, patch_px, 1, arguments.blend)
    outputs = [Path(arguments.out), *([] if arguments.probabilities is None else [Path(arguments.probabilities)])]
    with opened_scene(Path(arguments.scene), arguments.bands, saved.input) as scene, progress("windows") as tell:
        height, width = scene.shape
        counts = predict_scene(
            scene,
            lambda images: saved.logits(images.to(device)).cpu(),
            saved.classes,
            outputs[0],
            tiling,
            SceneRun(saved.identity, arguments.overwrite, tell),
            outputs[1] if outputs[1:] else None,
            _tags(saved, Path(arguments.model).resolve().name),
        )
    print(f"wrote {', '.join(map(str, outputs))}: {height} x {width} pixels (windows of {window} pixels)")
    print(_shares(saved.classes, counts))
    return EXIT_DONE


def _shares(classes: Sequence[str], counts: Sequence[int]) -> str:
    """What a map holds, the most frequent first; `counts` are pixels of each class and at last those without one."""
    *of_classes, n_without = counts
    n_pixels = sum(counts)
    found = sorted((c for c, n in enumerate(of_classes) if n), key=lambda c: -of_classes[c])
    shown = [f"{classes[c]} {_percent(of_classes[c], n_pixels)}" for c in found[:_MAX_SHOWN]]
    more = [f"{len(found) - _MAX_SHOWN} more"] if len(found) > _MAX_SHOWN else []
    return f"{', '.join([*shown, *more]) or 'no class'}; no data {_percent(n_without, n_pixels)}"


def _percent(n: int, of: int) -> str:
    """A part in percent, to one place, where none and all are none and all alone."""
    if n in (0, of):
        return "0 %" if n == 0 else "100 %"
    return f"{min(max(round(100 * n / of, 1), 0.1), 99.9)} %"


def _tags(saved: SavedModel, name: str) -> dict[str, str]:
    """What a map says of the model in the folder `name` that made it."""
    return {
        "model": name,
        "weights": saved.weights,
        "record": str(saved.facts.get("key", "")),  # its key in study.jsonl
        "task": str(saved.facts["task"]),
        "sensor": saved.input.sensor.name,
        "bands": " ".join(saved.input.bands),
    }


def _export_ensemble(arguments: argparse.Namespace) -> int:
    from ssl_eo.adapt.specialists import export_ensemble
    from ssl_eo.train.export import export_encoder

    folder, out = Path(arguments.folder), Path(arguments.out)
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--out: {out} is in {folder}, where runs and bundles lie; give a folder outside of it")
    names = export_ensemble(folder, out, export_encoder, arguments.overwrite)
    print(f"wrote {out}: {', '.join(names)}")
    return EXIT_DONE
