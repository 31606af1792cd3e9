"""What `hubconf.py` offers: encoders of bundles, and published architectures with or without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ssl_eo.hub import BundleEncoder, BundlePair, load_bundle
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.models.vit import Encoder
from ssl_eo.weights._downloads import local_file, unpacked_bundle
from ssl_eo.weights.base import find_released, read_released
from ssl_eo.weights.croma import PAIR_FACTS, PAIRS, pair_inputs, read_pair

__all__ = ["fill_pair", "open_bundle", "released", "released_pair", "weights_of"]


def open_bundle(where: str | Path, sha256: str | None = None) -> BundleEncoder | BundlePair:
    """What a bundle holds: a folder, or a zip file of one, or the address of such a file, whose SHA-256 may be given.

    Raises `ValueError` for anything else, and as `load_bundle` and `local_file` do.
    """
    try:
        is_folder = Path(where).is_dir()
    except OSError as error:  # a name that is too long
        raise ValueError(f"{where!s:.200}: {error.strerror}") from None
    if is_folder:
        if sha256 is not None:
            raise ValueError(
                f"{where}: sha256 is that of a file, and this is a folder, which has its own; leave it out"
            )
        return load_bundle(where)
    path = local_file(where, sha256)
    if path.suffix in (".pth", ".pt", ".safetensors"):
        raise ValueError(
            f"{path}: weights alone, expected a bundle (a folder, or a zip file of one): give them with the name of the"
            " published encoder that they are of, or make a bundle of them by ssl-eo import"
        )
    with unpacked_bundle(path) as folder:
        return load_bundle(folder)


def released(name: str, pretrained: str | Path | bool, sha256: str | None = None) -> BundleEncoder:
    """The published encoder `name` in eval mode, with weights from a file or an address, or random ones for False.

    Raises `ValueError` for True, for no address is known here, and as `read_released` and `local_file` do.
    """
    found = find_released(name)
    where = weights_of(name, _authors_file(found.source), pretrained, sha256)
    facts: dict[str, Any]
    if where is None:
        encoder = Encoder(found.config, found.n_channels)
        encoder.init_weights()
        facts = {"features": {"pool": found.pool, "taps": [1.0]}, "step": 0}
    else:
        encoder, facts = read_released(local_file(where, sha256), found)
    return BundleEncoder(encoder, found.inputs(), facts).eval()


def released_pair(name: str, pretrained: str | Path | bool, sha256: str | None = None) -> BundlePair:
    """As `released`, a published model of two encoders."""
    pair = PAIRS[name]
    where = weights_of(name, _authors_file(pair.source), pretrained, sha256)
    facts: dict[str, Any]
    if where is None:
        model = fill_pair(pair.build().to_empty(device=torch.get_default_device()))
        facts = {**PAIR_FACTS, "step": 0}
    else:
        model, facts = read_pair(local_file(where, sha256), pair)
    return BundlePair(model, pair_inputs(), facts).eval()


def fill_pair(model: OpticalRadar) -> OpticalRadar:
    """The same model, with random weights."""
    for part in (model.optical, model.radar, model.cross, model.optical_head, model.radar_head):
        part.init_weights()
    return model


def weights_of(name: str, advice: str, pretrained: str | Path | bool, sha256: str | None) -> str | Path | None:
    """The path or address of weights, not looked at yet; None for random ones.

    Raises `ValueError` with `advice`, what to give, for True, and for a checksum of no file.
    """
    if pretrained is False:
        if sha256 is not None:
            raise ValueError(f"{name}: sha256 is that of a file, and pretrained=False reads none: leave it out")
        return None
    if not isinstance(pretrained, str | Path):
        raise ValueError(f"{name}: pretrained is {pretrained!r}: {advice}, or False for random weights")
    return pretrained


def _authors_file(source: str) -> str:
    return f"give the path or address of the authors' file (see {source})"
