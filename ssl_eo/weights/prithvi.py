"""Prithvi-EO 1.0 (arXiv 2310.18660) and 2.0 (2412.02732): series of six bands of HLS, as released for any use.

The files hold an encoder and, in most, the decoder of pretraining, which is left out. Positions are computed anew, for
as many dates as are shown, after a look at those that are stored. A kernel of theirs spans one date, so it is one of
two dimensions here. Those of `_tl` were told the dates and the location of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_eo.hub import SensorInput
from ssl_eo.models.space_time import sincos_3d
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.sensors import load_sensor
from ssl_eo.weights.base import Released

__all__ = ["MODELS", "student_tensors"]

_PIXELS = 224
_BANDS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
_SCALES = {
    "temporal_embed_enc.scale": "time_encoding.scale",
    "location_embed_enc.scale": "location_encoding.scale",
}
_OF_STUDENT = {
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "output.proj.",
    "mask_token": "decoder.mask_token",
    "temporal_embed_dec.": "decoder_time_encoding.",
    "location_embed_dec.": "decoder_location_encoding.",
}
_POSITION_ERROR = 1e-2  # files of half precision round to 2e-3


class _Statistics(NamedTuple):
    """Of stored values of HLS, for each of `_BANDS`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


_V1 = _Statistics((775, 1081, 1229, 2497, 2204, 1611), (1282, 1270, 1399, 1368, 1292, 1155))
_V2 = _Statistics((1087, 1342, 1433, 2734, 1958, 1363), (2248, 2179, 2178, 1850, 1242, 1049))


def _inputs(statistics: _Statistics) -> Mapping[str, SensorInput]:
    return {"hls": SensorInput(load_sensor("hls"), _BANDS, *statistics, gsd_m=30.0)}


def student_tensors(tensors: Mapping[str, Tensor], native: int) -> dict[str, Tensor]:
    """Encoder and decoder of a whole file, as `read_state_dict` gives it, as the student of the objective `mae`.

    That has a linear output, no `norm_pix`, and a decoder of 512, 8 blocks and 16 heads with `norm_eps: 1.0e-5`.
    `native` is the side of the grid of patches that the model was trained on: 14, or 16 for patches of 14 pixels.
    Raises `ValueError` where the file holds no decoder.
    """
    plain = {name.removeprefix("encoder.").removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    found = {f"encoder.{name}": tensor for name, tensor in _adapt(plain, native).items()}
    for theirs, ours in _OF_STUDENT.items():
        found |= {name.replace(theirs, ours, 1): t for name, t in plain.items() if name.startswith(theirs)}
    if "decoder.mask_token" not in found:
        raise ValueError(f"no decoder in these weights: no tensor is named mask_token, the first are {list(plain)[:3]}")
    return found


def _adapt(tensors: Mapping[str, Tensor], native: int) -> dict[str, Tensor]:
    """The encoder's tensors by our names; `native` is the side of the grid that it was trained on."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder") or "_embed_dec." in name or (name == "mask_token" and tensor.ndim == 3):
            continue
        if name == "pos_embed":
            _check_positions(tensor, native)
        elif name == "patch_embed.proj.weight" and tensor.ndim == 5 and tensor.shape[2] == 1:
            found[name] = tensor.squeeze(2)  # [D, C, p, p]
        else:
            found[_SCALES.get(name, name)] = tensor
    return found


def _check_positions(table: Tensor, native: int) -> None:
    """Raise `ValueError` unless `table [1, 1 + N, D]` is that of some number of dates, which is what we compute."""
    n_patches, dim = (table.shape[1] - 1, table.shape[2]) if table.ndim == 3 else (0, 0)
    n_dates = n_patches // native**2
    if n_patches > 0 and n_dates * native**2 == n_patches and dim % 16 == 0 and table.stride(1):
        ours = sincos_3d(n_dates, (native, native), dim, native, torch.device("cpu"))  # [N, D]
        if (table[0, 1:].float().cpu() - ours).abs().max() < _POSITION_ERROR and not table[0, 0].any():
            return
    raise ValueError(
        f"pos_embed {list(table.shape)} is not the sin-cos code of dates, rows and columns of {native} x {native}"
        " patches: it would be computed otherwise here"
    )


def _restore(tensors: Mapping[str, Tensor], n_dates: int, native: int) -> dict[str, Tensor]:
    """Back to published names and shapes, with the positions of as many dates as the model was trained on."""
    theirs = {ours: name for name, ours in _SCALES.items()}
    found = {theirs.get(name, name): tensor for name, tensor in tensors.items()}
    found["patch_embed.proj.weight"] = found["patch_embed.proj.weight"][:, :, None]  # [D, C, 1, p, p]
    dim = found["cls_token"].shape[-1]
    table = sincos_3d(n_dates, (native, native), dim, native, torch.device("cpu"))
    found["pos_embed"] = F.pad(table, (0, 0, 1, 0))[None]  # [1, 1 + N, D]
    return found


def _released(
    name: str,
    statistics: _Statistics,
    n_dates: int,
    size: str,
    patch_size: int = 16,
    is_told: bool = False,
) -> Released:
    native = _PIXELS // patch_size
    version = "1.0" if name.startswith("v1") else "2.0"
    return Released(
        name=f"prithvi_eo_{name}",
        config=EncoderConfig(
            size=size,
            patch_size=patch_size,
            norm_eps=1e-5,
            position="sincos_3d",
            image_size=_PIXELS,
            time_encoding=is_told,
            location_encoding=is_told,
            patch_embed="conv",
        ),
        licence="Apache-2.0",
        source=f"https://huggingface.co/ibm-nasa-geospatial, Prithvi-EO-{version}",
        n_channels=len(_BANDS),
        inputs=partial(_inputs, statistics),
        adapt=partial(_adapt, native=native),
        restore=partial(_restore, n_dates=n_dates, native=native),
        file_name=f"Prithvi_EO_{name.replace('00', '00M')}",
    )


MODELS = (
    _released("v1_100", _V1, 3, "base"),
    _released("v2_tiny_tl", _V2, 1, "tiny", is_told=True),
    _released("v2_100_tl", _V2, 4, "base", is_told=True),
    _released("v2_300", _V2, 4, "large"),
    _released("v2_300_tl", _V2, 4, "large", is_told=True),
    _released("v2_600", _V2, 4, "huge", patch_size=14),
    _released("v2_600_tl", _V2, 4, "huge", patch_size=14, is_told=True),
)
