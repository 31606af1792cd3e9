"""What of an encoder is trained on labels, by one word."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ssl_eo.adapt.backbone import Backbone, EncoderBackbone
from ssl_eo.adapt.lora import LoraConfig, add_lora
from ssl_eo.components import suggest
from ssl_eo.seeding import derive_seed

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "apply_protocol",
    "check_for_ensemble",
    "check_protocol",
    "draws_encoder",
    "trains_encoder",
]

# frozen: nothing of the encoder. finetune: all of it. lora: low-rank additions to its attention (and MLP).
# retrain_input: its patch embedding alone. random_frozen, random_trained: weights are drawn anew, and left so or
# trained: what the architecture and the decoder come to without any pretraining.
Protocol = Literal["frozen", "finetune", "lora", "retrain_input", "random_frozen", "random_trained"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
_OF_ANY: tuple[Protocol, ...] = ("frozen", "finetune")  # for which a backbone need not be one vision transformer


def check_protocol(name: str) -> None:
    """Raise `ValueError` unless `name` is a protocol."""
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}{suggest(name, list(PROTOCOLS))} ({', '.join(PROTOCOLS)})")


def check_for_ensemble(protocol: str) -> None:
    """Raise `ValueError` unless an ensemble can be trained by `protocol`."""
    if protocol not in _OF_ANY:
        raise ValueError(f"protocol {protocol} is for a single encoder; for an ensemble there are {', '.join(_OF_ANY)}")


def trains_encoder(protocol: str) -> bool:
    """Whether features change while training, so that they cannot be computed once."""
    return protocol not in ("frozen", "random_frozen")


def draws_encoder(protocol: str) -> bool:
    """Whether the encoder's weights are drawn, whatever they were."""
    return protocol in ("random_frozen", "random_trained")


def apply_protocol(backbone: Backbone, protocol: str, lora: LoraConfig | None = None, seed: int = 0) -> None:
    """Change `backbone` in place: which of its weights train, which are added, which are drawn anew from `seed`.

    Raises `ValueError` where the protocol is one of vision transformers and the backbone is none.
    """
    check_protocol(protocol)
    backbone.requires_grad_(protocol in ("finetune", "random_trained"))
    backbone.is_finetuned = protocol == "finetune"
    if protocol in _OF_ANY:
        return
    if not isinstance(backbone, EncoderBackbone):
        raise ValueError(f"protocol {protocol} is for one vision transformer; all else takes {' and '.join(_OF_ANY)}")
    encoder = backbone.encoder
    if protocol == "lora":
        add_lora(encoder, LoraConfig() if lora is None else lora, seed)
    elif protocol == "retrain_input":
        encoder.patch_embed.requires_grad_(True)
    else:
        device = next(encoder.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "init"))
            encoder.cpu().init_weights()  # a GPU has a generator of its own, which draws others
        encoder.to(device)
