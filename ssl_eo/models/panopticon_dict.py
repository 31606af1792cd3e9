"""Panopticon's way to call an encoder (arXiv 2503.10845): images and numbers of channels in a dictionary.

A channel is whole nanometres of a band's centre, or -1 to -12 for SAR: VV, VH, HH, HV of an unknown orbit, then of
ascending ones, then of descending ones. What comes back is named and shaped as in DINOv2.

B samples, C channels, H W pixels, h w grid, N patches, P prefix tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_eo.models.vit import Tokens
from ssl_eo.sensors import KINDS, ORBITS, POLARIZATIONS, ChannelMeta

__all__ = ["open_dictionary", "published_features", "published_layers"]

_KEYS = ("imgs", "chn_ids", "spec_masks")
_N_SAR = len(POLARIZATIONS) * (len(ORBITS) + 1)


def open_dictionary(given: Mapping[str, Any]) -> tuple[Tensor, ChannelMeta]:
    """Images `imgs [B, C, H, W]`, normalised, and what `chn_ids [B, C]` and `spec_masks [B, C]` say of their channels.

    `spec_masks` are True where a channel is padding; they may be left out. Nothing in `given` is changed. Raises
    `ValueError` for other keys and shapes, and, where `chn_ids` are on the CPU, for numbers that name no channel.
    """
    if not {*_KEYS[:2]} <= given.keys() <= {*_KEYS}:
        raise ValueError(
            f"a dictionary holds imgs and chn_ids, and may hold spec_masks, got {', '.join(map(str, given))}"
        )
    images, ids, padded = (given.get(key) for key in _KEYS)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ValueError(f"imgs must be a tensor [B, C, H, W], got {_found(images)}")
    if not isinstance(ids, Tensor) or ids.shape != images.shape[:2] or ids.dtype == torch.bool:
        raise ValueError(f"chn_ids must be numbers [B, C] = {list(images.shape[:2])}, got {_found(ids)}")
    if padded is not None and (
        not isinstance(padded, Tensor) or padded.shape != ids.shape or padded.dtype != torch.bool
    ):
        raise ValueError(
            f"spec_masks must be truths [B, C] = {list(ids.shape)}, True for padding, got {_found(padded)}"
        )
    valid = None if padded is None else ~padded.to(images.device)
    return images.float(), _channels(ids, valid).to(images.device)


def published_features(raw: Tokens, normed: Tensor) -> dict[str, Tensor | None]:
    """The dictionary that `forward_features` of published code gives; `normed [B, P + N, D]` are the tokens `raw`."""
    of_normed = Tokens(normed, raw.n_prefix_tokens, raw.grid)
    return {
        "x_norm_clstoken": of_normed.cls,
        "x_norm_regtokens": of_normed.registers,
        "x_norm_patchtokens": of_normed.patches,
        "x_prenorm": raw.x,
        "masks": None,
    }


def published_layers(layers: Sequence[Tokens], reshape: bool, return_class_token: bool) -> tuple[Any, ...]:
    """Of each layer the patches `[B, N, D]`, or maps `[B, D, h, w]`; with the CLS token `[B, D]` as a pair."""
    found = []
    for tokens in layers:
        patches = tokens.patches
        if reshape:
            patches = torch.unflatten(patches, 1, tokens.grid).permute(0, 3, 1, 2).contiguous()
        found.append((patches, tokens.cls) if return_class_token else patches)
    return tuple(found)


def _channels(ids: Tensor, valid: Tensor | None) -> ChannelMeta:
    numbers = ids.double()
    if valid is not None:
        numbers = numbers.where(valid.to(ids.device), 0.0)  # what padding is called makes no difference
    is_sar = numbers < 0
    known = torch.where(is_sar, (numbers >= -_N_SAR) & (numbers == numbers.floor()), numbers.isfinite())
    if ids.device.type == "cpu" and not bool(known.all()):
        raise ValueError(
            f"chn_ids: {ids[~known][0].item():g} names no channel: whole nanometres of a band's centre, or -1 to"
            f" -{_N_SAR} for SAR"
        )
    kind = torch.where(is_sar, KINDS.index("sar"), KINDS.index("optical")).where(known, -1)  # thermal is named alike
    row = torch.where(is_sar & known, -1.0 - numbers, 0.0).long()
    unknown = torch.full_like(row, -1)
    return ChannelMeta(
        # In double: whole nanometres must be whole again where the embedding rounds them down.
        wavelength_um=torch.where(is_sar, 0.0, numbers.floor()) / 1000.0,
        fwhm_um=torch.zeros_like(numbers),
        kind=kind,
        polarization=torch.where(is_sar, row % len(POLARIZATIONS), unknown),
        orbit=torch.where(is_sar, row // len(POLARIZATIONS) - 1, unknown),
        gsd_m=torch.full_like(numbers, torch.nan),  # not known, and not looked at
        valid=valid,
    )


def _found(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
