"""What `ssl_eo` itself offers: encoders by whatever names them, and training from Python.

`load` needs torch alone for bundles and published weights; what training needs is imported when it is called.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ssl_eo.bundles import BundleEncoder, BundlePair
from ssl_eo.cluster import EXIT_DONE
from ssl_eo.components import suggest
from ssl_eo.jsonl import read_jsonl
from ssl_eo.weights._entries import open_bundle
from ssl_eo.weights._named import is_published, known_names, named

if TYPE_CHECKING:
    from ssl_eo.config import Config

__all__ = ["TrainedRun", "load", "train"]


def load(
    where: str | Path, weights: str | Path | bool | None = None, sha256: str | None = None
) -> BundleEncoder | BundlePair:
    """The encoder that `where` names, in eval mode, on the CPU.

    - A run directory, or one `step_` directory of its checkpoints: what `ssl-eo export` would write of it.
    - A bundle: its folder, a zip file of it, or the `https://` or `file://` address of one, of which `sha256` are the
      first 8 to 64 digits of the checksum.
    - The name of a published encoder (`dofa_vitb16`), with `weights` the path or address of its authors' file, or that
      of one of our recipes (`mae_vitmicro4_eurosat`), with that of a bundle: `sha256` then belongs to these. With False
      either has random ones.

    Two encoders (`BundlePair`) come of CROMA's names, and of bundles that hold both. No code of any file is run, but a
    run's config may name modules of yours, which are imported. Raises `ValueError` that begins with what is wrong.
    """
    if not isinstance(where, str | os.PathLike):
        raise ValueError(f"{where!r:.80}: expected a path, an address or a name, got a {type(where).__name__}")
    if weights is not None:
        return named(str(where), weights, sha256)
    path = Path(where)
    try:
        is_there, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        raise ValueError(f"{where!s:.200}: {error.strerror}") from None
    if is_folder and not (path / "encoder.json").exists():
        if sha256 is not None:
            raise ValueError(
                f"{path}: sha256 is that of a file, and a checkpoint has checksums of its own; leave it out"
            )
        from ssl_eo.train.export import open_encoder

        return open_encoder(path)
    if "://" not in str(where) and not is_there:
        raise ValueError(_not_there(str(where)))
    return open_bundle(where, sha256)


def _not_there(name: str) -> str:
    """What to say of a name that is no path: an encoder that is called so needs weights."""
    nothing = f"{name}: there is no such run, bundle or file"
    if name not in (known := known_names()):
        return nothing + suggest(name, known)
    what = "the file of its weights" if is_published(name) else "a bundle"
    return f"{nothing}; of the encoder {name} give {what}, ssl_eo.load({name!r}, 'PATH'), or False for random weights"


@dataclass(frozen=True)
class TrainedRun:
    """What `train` has left: the run directory, and its last record of `metrics.jsonl`."""

    folder: Path
    is_finished: bool  # False: stopped on request, with a checkpoint; the same call goes on
    metrics: Mapping[str, Any]  # `step`, `loss`, ..., and where probes ran eval/<task>/<tap>/<probe>

    @property
    def step(self) -> int:
        """How many steps are done."""
        return int(self.metrics["step"])


def train(config: str | Path | Mapping[str, Any], *overrides: str) -> TrainedRun:
    """Pretrain as `ssl-eo train` does, and go on with a run that was begun.

    `config` is the path of a YAML file, a name below `configs/` such as `"debug/mae"`, or what such a file would hold,
    as a mapping; `overrides` are written as on the command line: `"optim.lr=0.001"`. While it trains, SIGTERM, SIGUSR1,
    SIGUSR2 and Ctrl-C save and end the run; afterwards they mean again what they meant before.

    Raises `ValueError` for a wrong config or wrong data, `RuntimeError` (`TrainingError`) or `OSError` where a run
    cannot go on, `KeyboardInterrupt` at a second Ctrl-C; nothing ends the process. Must be called in the main thread:
    Python gives signals to no other.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("ssl_eo.train must be called in the main thread, which alone is sent signals")
    from ssl_eo.train.trainer import train as run

    if wrong := [override for override in overrides if not isinstance(override, str)]:
        raise ValueError(f"an override is text, key=value, got {wrong[0]!r:.80}")
    loaded = _load_config(config, overrides)
    status = run(loaded)
    log = loaded.run_dir / "metrics.jsonl"
    if not (records := read_jsonl(log)):
        raise RuntimeError(f"{log} holds no record, though the run has: bring it back, or set another run.name")
    return TrainedRun(loaded.run_dir, status == EXIT_DONE, records[-1])


def _load_config(config: str | Path | Mapping[str, Any], overrides: tuple[str, ...]) -> Config:
    from ssl_eo.config import load as load_config

    if isinstance(config, str | Path):
        return load_config(config, overrides)
    with TemporaryDirectory(prefix="ssl_eo-") as folder:  # the way of a file, so that includes and `${...}` work too
        path = Path(folder, "config.yaml")
        try:
            path.write_text(json.dumps(dict(config), default=os.fspath), encoding="utf-8")
        except TypeError as error:
            raise ValueError(f"config: a mapping must hold what a YAML file can hold: {error}") from None
        try:
            return load_config(path, overrides)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), "config")) from None
