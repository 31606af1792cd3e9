"""LoRA by the package peft: adapters on the blocks of an encoder are added, trained alone, merged, kept in files.

LoRA (Hu et al., arXiv 2106.09685, eq. 3) adds alpha / r * B A to the weight of a linear layer, with A `[r, in]` random
and B `[out, r]` zero at first, so that an encoder begins as it was. Our queries, keys and values are one linear layer,
which peft would adapt as a whole. To adapt some of them, each with an A and a B of its own as if they were apart, peft
is asked for an A `[P*r, D]` of the fused layer, and its B is replaced by a `FusedB`. All else is peft's: the forward
pass, dropout, what trains, merging, the names of tensors.

P adapted parts of a fused layer, r rank, D width.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.components import check_names, import_extra, one_line, suggest
from ssl_eo.files import atomic_write
from ssl_eo.json_page import read_page
from ssl_eo.models.vit import Encoder
from ssl_eo.seeding import derive_seed
from ssl_eo.tensor_files import check_fit, read_tensors, write_tensors

__all__ = [
    "FORMAT",
    "LoraConfig",
    "Target",
    "add_lora",
    "base_sha256",
    "load_adapters",
    "lora_config",
    "lora_state",
    "merge_lora",
    "save_adapters",
]

FORMAT = 1

Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]

_FUSED = ("q", "k", "v")  # parts of the output of `Attention.qkv`, in their order
_LAYERS = {
    "gelu": {"proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    "swiglu": {"proj": "attn.proj", "fc1": "mlp.w12", "fc2": "mlp.w3"},
}
_ADAPTER = "default"  # peft's name for the only adapter of a model
_CONFIG = "lora_config"  # attribute of an encoder that has adapters


@dataclass
class LoraConfig:
    """Which layers of all blocks get adapters, and how large these are."""

    rank: int = 8  # of the update of each part
    alpha: float = 16.0  # the update is alpha / rank * B A
    dropout: float = 0.0  # of what goes into A
    # q, k, v of attention and proj after it; fc1 and fc2 of the MLP, which of a SwiGLU are w12, as one layer, and w3.
    targets: tuple[Target, ...] = ("q", "v")

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a whole number from 1, got {self.rank!r}")
        if type(self.alpha) not in (int, float) or not 0.0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {self.alpha!r}")
        if type(self.dropout) not in (int, float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        allowed = get_args(Target)
        if not isinstance(self.targets, list | tuple):
            raise ValueError(f"targets must be a list of {', '.join(allowed)}, got {self.targets!r}")
        for target in self.targets:
            if target not in allowed:
                raise ValueError(
                    f"targets are among {', '.join(allowed)}, got {target!r}{suggest(str(target), [*allowed])}"
                )
        check_names("targets", self.targets)
        self.targets = tuple(target for target in allowed if target in self.targets)


class FusedB(nn.Module):
    """The B of LoRA for some of the equal parts of a fused layer's output: each sees its own r of the P*r inputs.

    It begins as zeros, a parameter `[D, r]` by the name of each adapted part. peft reads `weight`, `[3*D, P*r]`: blocks
    among zeros, so that what is not adapted stays as it is to the bit.
    """

    def __init__(self, replaced: Tensor, parts: Sequence[str], rank: int) -> None:
        super().__init__()
        for part in parts:
            self.register_parameter(part, nn.Parameter(replaced.new_zeros(len(replaced) // len(_FUSED), rank)))

    @property
    def weight(self) -> Tensor:
        parts = dict(self.named_parameters())
        width, rank = next(iter(parts.values())).shape
        weight = next(iter(parts.values())).new_zeros(len(_FUSED), width, len(parts), rank)
        for i, (part, values) in enumerate(parts.items()):
            weight[_FUSED.index(part), :, i] = values
        return weight.flatten(2).flatten(0, 1)  # [3*D, P*r]

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., P*r]` -> `[..., 3*D]`."""
        return F.linear(x, self.weight)


def add_lora(encoder: Encoder, cfg: LoraConfig, seed: int = 0) -> None:
    """Add adapters to `encoder` in place, drawn from `seed`; from then on they alone train, and all else is frozen.

    Outputs stay as they are to the bit until B is trained. Do it before blocks are compiled or spread. Raises
    `ValueError` for an encoder that has adapters already, and for a rank above its width.
    """
    if lora_config(encoder) is not None:
        raise ValueError("this encoder has adapters already; merge them with merge_lora, or take a plain one")
    if cfg.rank > encoder.embed_dim:
        raise ValueError(f"rank must be at most the encoder's width of {encoder.embed_dim}, got {cfg.rank}")
    peft = import_extra("lora", "peft", "LoRA")
    parts = [part for part in _FUSED if part in cfg.targets]
    layers = [layer for target, layer in _LAYERS[encoder.cfg.mlp].items() if target in cfg.targets]
    names = "|".join(map(re.escape, [*layers, "attn.qkv"] if parts else layers))
    # alpha / rank is the same of the fused layer, whose rank is that of all its parts.
    fused = {r"attn\.qkv": len(parts)} if parts else {}
    asked = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=rf"blocks\.\d+\.({names})",
        rank_pattern={name: n * cfg.rank for name, n in fused.items()},
        alpha_pattern={name: n * cfg.alpha for name, n in fused.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "lora"))
        peft.inject_adapter_in_model(asked, encoder, _ADAPTER)
    for name, layer in _adapted(encoder):
        if name.endswith("attn.qkv"):
            layer.lora_B[_ADAPTER] = FusedB(layer.lora_B[_ADAPTER].weight, parts, cfg.rank)
    setattr(encoder, _CONFIG, cfg)
    encoder.train(encoder.training)  # dropout too


def lora_config(encoder: Encoder) -> LoraConfig | None:
    """What `encoder`'s adapters are, or None where it has none."""
    cfg: LoraConfig | None = getattr(encoder, _CONFIG, None)
    return cfg


def merge_lora(encoder: Encoder) -> None:
    """Add the adapters' updates to the weights in place: what is left is a plain encoder, all of which trains.

    Names of its weights are those before `add_lora`, and features those of the adapted encoder without dropout, but for
    rounding. Raises `ValueError` where there are no adapters, or one holds values that are not finite.
    """
    for name, value in lora_state(encoder).items():
        if not value.isfinite().all():
            raise ValueError(f"adapter {name} holds values that are not finite: nothing was merged")
    for name, layer in _adapted(encoder):
        layer.merge()
        encoder.set_submodule(name, layer.get_base_layer())
    delattr(encoder, "peft_config")
    delattr(encoder, _CONFIG)
    encoder.requires_grad_(True)


def lora_state(encoder: Encoder) -> dict[str, Tensor]:
    """The adapters' tensors by name, sharing memory with them. Raises `ValueError` where there are none."""
    _config_of(encoder)
    peft = import_extra("lora", "peft", "LoRA")
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(encoder, adapter_name=_ADAPTER)
    return state


def base_sha256(encoder: Encoder) -> str:
    """SHA-256 of the names, dtypes, shapes and values of an encoder's own weights, with adapters on them or not."""
    digest = hashlib.sha256()
    own = {name.replace(".base_layer.", "."): v for name, v in encoder.state_dict().items() if ".lora_" not in name}
    for name, value in sorted(own.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapters(folder: Path, encoder: Encoder) -> None:
    """Write the adapters alone: `adapters.safetensors`, and `adapters.json`, which says what they belong to.

    Raises `ValueError` where there are none, and `OSError` that names the file which cannot be written.
    """
    cfg = _config_of(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = write_tensors(folder / "adapters.safetensors", lora_state(encoder))
    page = {"format": FORMAT, "sha256": sha256, "base_sha256": base_sha256(encoder), "lora": asdict(cfg)}
    atomic_write(folder / "adapters.json", json.dumps(page, indent=1))


def load_adapters(folder: Path, encoder: Encoder) -> LoraConfig:
    """Add the adapters of `save_adapters` to the plain `encoder` in place, and say what they are.

    Nothing is unpickled. Raises `ValueError` for files that are not whole, do not belong together or do not fit, for an
    encoder that has adapters, and for one whose weights are not those that the adapters were trained on; then `encoder`
    is as before.
    """
    cfg, sha256, base = _said_in(folder / "adapters.json")
    tensors = read_tensors(folder / "adapters.safetensors", sha256)
    if (found := base_sha256(encoder)) != base:
        raise ValueError(
            f"{folder}: these adapters belong to an encoder with weights of SHA-256 {base:.12}, not to this one"
            f" ({found:.12}); load that one first"
        )
    with torch.device("meta"):
        trial = Encoder(encoder.cfg, encoder.n_channels)
        add_lora(trial, cfg)
    check_fit(folder, "the adapters", lora_state(trial), tensors)
    add_lora(encoder, cfg)
    import_extra("lora", "peft", "LoRA").set_peft_model_state_dict(encoder, tensors, _ADAPTER)
    return cfg


def _config_of(encoder: Encoder) -> LoraConfig:
    if (cfg := lora_config(encoder)) is None:
        raise ValueError("this encoder has no adapters; add some with add_lora")
    return cfg


def _adapted(encoder: Encoder) -> list[tuple[str, Any]]:
    """Names and modules of peft's layers."""
    return [(name, module) for name, module in encoder.named_modules() if hasattr(module, "lora_A")]


def _said_in(path: Path) -> tuple[LoraConfig, str, str]:
    """What `adapters.json` says: the config, SHA-256 of the tensors' file and of the weights they belong to."""
    try:
        page = read_page(path)
        if page["format"] != FORMAT:
            raise ValueError(f"format {page['format']!r}, this version reads {FORMAT}; update ssl_eo")
        lora = {f.name: page["lora"][f.name] for f in fields(LoraConfig)}  # a default would be other adapters
        return LoraConfig(**lora), str(page["sha256"]), str(page["base_sha256"])
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
