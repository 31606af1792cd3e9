"""MultiMAE meets Earth observation (arXiv 2505.14951): a ViT-B/8 for bands of Sentinel-2, elevation and land cover.

Its encoder has no final norm, and an embedding for each group of bands; an encoder of ours has one of them, so each
group is a model of its own here. `student_tensors` gives the whole: all embeddings and decoders, as the objective
multimae has them. Published positions are those of a view of 224 pixels, stretched to the grid at hand.

Pixels are Sentinel-2 with the statistics of Level-2A of MMEarth, for Level-1C too, as trained. Elevation is ASTER's,
standardised by those of MMEarth and then by the middle ranks of each view (`standardise: true` of the objective).
Land cover is ESA WorldCover; the last of its twelve codes is that of no data, and the class tree was shown where
there were none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count, takewhile

import torch
from torch import Tensor

from ssl_eo.hub import SensorInput
from ssl_eo.models.position import sincos_resized
from ssl_eo.models.vit import EncoderConfig
from ssl_eo.sensors import load_sensor
from ssl_eo.weights.base import Released

__all__ = ["MODELS", "student_tensors"]

_NATIVE_GRID = 28  # of a view of 224 pixels
_N_CLASSES = 12  # of the published model: WorldCover and no data
_POSITION_ERROR = 1e-2  # files of half precision round to 2e-3
_CLASSES = "semseg"  # the modality of class numbers
_GROUPS = {  # bands in the order of the convolution, their means and standard deviations
    "rgb": (("B04", "B03", "B02"), (1899.185, 1720.369, 1479.952), (2354.181, 2256.900, 2375.872)),
    "ired": (("B05", "B06", "B07"), (2253.931, 2808.200, 3003.424), (2292.996, 2033.217, 1920.174)),
    "ebands": (("B8A", "B08"), (3149.536, 3110.841), (1816.615, 1988.194)),
    "sired": (("B11", "B12"), (2399.086, 1811.799), (1473.225, 1390.678)),
}
_ENCODER = EncoderConfig(
    size="base",
    patch_size=8,
    position="sincos_resized",
    image_size=_NATIVE_GRID * 8,
    final_norm=False,
    patch_embed="conv",
)
_OF_DECODER = {  # ours: theirs
    "embed": "proj_context",
    "query_norm": "query_norm",
    "context_norm": "context_norm",
    "cross.q": "decoder.q",
    "cross.kv": "decoder.kv",
    "cross.proj": "decoder.proj",
    "out_norm": "out_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OF_BLOCK = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def student_tensors(
    tensors: Mapping[str, Tensor], inputs: Sequence[str], outputs: Sequence[str], n_classes: int = 11
) -> dict[str, Tensor]:
    """The student of an objective multimae with `model.patch_embed: conv` from the whole published state dict.

    `inputs` are the names of its modalities that are seen, the first of them embedded by the encoder itself, `outputs`
    the names of its targets of patches; in the published model, rgb, depth, semseg, ired, sired and ebands, and
    norm_rgb beside them. With the 11 classes of WorldCover the logits of its twelfth, no data, are left out.
    Raises `KeyError` for a name that is not in the file, `ValueError` for other positions.
    """
    found = {f"encoder.{name}": tensor for name, tensor in _trunk(tensors).items()}
    found |= _embeddings(tensors, inputs, n_classes)
    found |= _decoders(tensors, inputs, [f"output_adapters.{name}" for name in outputs])
    return found | _outputs(tensors, outputs, n_classes)


def _embeddings(tensors: Mapping[str, Tensor], inputs: Sequence[str], n_classes: int) -> dict[str, Tensor]:
    """Of each modality; the first is embedded by the encoder itself."""
    found = {}
    for i, name in enumerate(inputs):
        own = "encoder.patch_embed" if i == 0 else f"embeddings.{name}"
        weight, bias = (tensors[f"input_adapters.{name}.proj.{part}"] for part in ("weight", "bias"))
        if name == _CLASSES:
            codes = tensors[f"input_adapters.{name}.class_emb.weight"][: n_classes + 1]
            missing = codes.new_zeros(n_classes + 1 - len(codes), codes.shape[1])
            found[f"{own}.codes"] = torch.cat((codes, missing))
            weight = weight.permute(0, 2, 3, 1).flatten(1)  # a pixel's code is contiguous
        found[f"{own}.proj.weight"], found[f"{own}.proj.bias"] = weight, bias
    return found


def _decoders(tensors: Mapping[str, Tensor], inputs: Sequence[str], decoders: Sequence[str]) -> dict[str, Tensor]:
    """All but their outputs, one beside the other."""
    found = {"decoders.mask_token": torch.stack([tensors[f"{d}.mask_token"][0] for d in decoders])}  # [O, 1, d]
    found["decoders.modality_codes"] = torch.stack(
        [torch.stack([tensors[f"{d}.task_embeddings.{name}"][0, 0] for name in inputs]) for d in decoders]
    )
    layers = dict(_OF_DECODER)
    has_block = (f"{decoders[0]}.decoder_transformer.{i}.norm1.weight" in tensors for i in count())
    for i, _ in enumerate(takewhile(bool, has_block)):
        layers |= {f"blocks.{i}.{ours}": f"decoder_transformer.{i}.{theirs}" for ours, theirs in _OF_BLOCK.items()}
    for ours, theirs in layers.items():
        weight, bias = (torch.stack([tensors[f"{d}.{theirs}.{p}"] for d in decoders]) for p in ("weight", "bias"))
        if "norm" in ours:
            found[f"decoders.{ours}.gain"], found[f"decoders.{ours}.bias"] = weight[:, None, None], bias[:, None, None]
        else:
            found[f"decoders.{ours}.weight"], found[f"decoders.{ours}.bias"] = weight, bias
    return found


def _outputs(tensors: Mapping[str, Tensor], outputs: Sequence[str], n_classes: int) -> dict[str, Tensor]:
    """The last layer of each decoder, channel last."""
    found = {}
    for name in outputs:
        n_channels = tensors[f"input_adapters.{name.removeprefix('norm_')}.proj.weight"].shape[1]
        for part in ("weight", "bias"):
            values = tensors[f"output_adapters.{name}.out_proj.{part}"]
            n = _N_CLASSES if name == _CLASSES else n_channels
            by_channel = values.view(n, -1, *values.shape[1:])  # [C, p*p, ...]
            shown = by_channel[:n_classes] if name == _CLASSES else by_channel
            found[f"decoders.outputs.{name}.{part}"] = shown.transpose(0, 1).flatten(0, 1)  # channel last
    return found


def _trunk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLS token and blocks, by our names. Raises `ValueError` where a stored table is not that of the paper."""
    for name, stored in tensors.items():
        if re.fullmatch(r"input_adapters\.\w+\.pos_emb", name):
            table = _positions(_ENCODER.width)
            found = stored[0].flatten(1).T.float().cpu() if stored.ndim == 4 else stored  # [N, D]
            if found.shape != table.shape or not torch.allclose(found, table, atol=_POSITION_ERROR):
                raise ValueError(f"{name} is not the table of positions of MultiMAE for 224 pixels")
    blocks = {
        re.sub(r"^encoder\.", "blocks.", name): tensor
        for name, tensor in tensors.items()
        if name.startswith("encoder.")
    }
    return {"cls_token": tensors["global_tokens"], **blocks} if "global_tokens" in tensors else blocks


def _of_group(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"input_adapters.{group}.proj."
    embed = {f"patch_embed.proj.{n.removeprefix(prefix)}": t for n, t in tensors.items() if n.startswith(prefix)}
    return {**_trunk(tensors), **embed}


def _of_ours(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What published code loads into a model of one modality."""
    found = {f"input_adapters.{group}.pos_emb": _positions(_ENCODER.width).T.reshape(1, -1, _NATIVE_GRID, _NATIVE_GRID)}
    for name, tensor in tensors.items():
        name = re.sub(r"^blocks\.", "encoder.", name)
        name = re.sub(r"^patch_embed\.", f"input_adapters.{group}.", name)
        found["global_tokens" if name == "cls_token" else name] = tensor
    return found


def _positions(width: int) -> Tensor:
    """The published table, `[N, D]`."""
    return sincos_resized(_NATIVE_GRID, (_NATIVE_GRID, _NATIVE_GRID), width, torch.device("cpu"))


def _released(group: str) -> Released:
    def inputs() -> Mapping[str, SensorInput]:
        bands, mean, std = _GROUPS[group]
        return {"sentinel2_l2a": SensorInput(load_sensor("sentinel2_l2a"), bands, mean, std, gsd_m=10.0)}

    return Released(
        name=f"multimae_eo_vitb8_{group}",
        config=_ENCODER,
        licence="none stated; that of MultiMAE, on which it builds, is CC-BY-NC-4.0",
        source="https://github.com/josesosajs/multimae-meets-eo",
        n_channels=len(_GROUPS[group][0]),
        inputs=inputs,
        token="global_tokens",
        adapt=partial(_of_group, group),
        restore=partial(_of_ours, group),
        pool="mean",
    )


MODELS = tuple(_released(group) for group in _GROUPS)
