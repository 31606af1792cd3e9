"""Decoders: from features at several depths of an encoder to labels, trained on labels.

One module a decoder, whose name is that of the decoder: of pixels `linear`, `fcn`, `segformer`, `upernet`, `muster`; of
images `identity`, `mlp`, `attentive_pool`.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

from torch import nn

from ssl_eo.components import resolve, suggest
from ssl_eo.eval.decoders.base import TapMaps, TapShape
from ssl_eo.eval.kinds import Kind

__all__ = ["TapMaps", "TapShape", "build_decoder", "decoder_config", "find_decoder", "kinds_of"]


def find_decoder(name: str) -> ModuleType:
    """The module of the decoder `name`; raises `ValueError` that suggests another where there is none."""
    return resolve("ssl_eo.eval.decoders", name)


def kinds_of(name: str) -> tuple[Kind, ...]:
    """The kinds of labels that the decoder `name` serves."""
    kinds: tuple[Kind, ...] = find_decoder(name).KINDS
    return kinds


def decoder_config(name: str, options: Mapping[str, Any]) -> Any:
    """The `Config` of the decoder `name`; raises `ValueError` for options that it has not."""
    module = find_decoder(name)
    known = [f.name for f in fields(module.Config)]
    for key in options:
        if key not in known:
            raise ValueError(f"decoder {name} has no option {key!r}{suggest(key, known)} ({', '.join(known)})")
    return module.Config(**options)


def build_decoder(name: str, options: Mapping[str, Any], shape: TapShape, n_outputs: int) -> nn.Module:
    """The decoder `name` with `options` of its `Config`, for taps of `shape`; raises `ValueError` for wrong options."""
    decoder: nn.Module = find_decoder(name).Decoder(decoder_config(name, options), shape, n_outputs)
    return decoder
