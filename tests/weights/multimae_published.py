"""MultiMAE-EO as it is published: names and shapes of its tensors, and values for them by a formula.

The formula and the inputs are those with which the published code gave the numbers in `test_multimae_parity.py` (in
float32 on a CPU); its positions are its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_eo.models.position import sincos_resized

INPUTS = {"rgb": 3, "depth": 1, "semseg": 12, "ired": 3, "sired": 2, "ebands": 2}  # channels or classes, in their order
OUTPUTS = ("rgb", "depth", "semseg", "ired", "sired", "ebands", "norm_rgb")
WIDTH, DECODER_WIDTH, DEPTH, SIDE = 768, 128, 12, 56


def shapes() -> dict[str, tuple[int, ...]]:
    """Of all tensors but the tables of positions."""
    found: dict[str, tuple[int, ...]] = {"global_tokens": (1, 1, WIDTH)}
    for name, n in INPUTS.items():
        patch = (64, 2, 2) if name == "semseg" else (n, 8, 8)
        found |= {f"input_adapters.{name}.proj.weight": (WIDTH, *patch), f"input_adapters.{name}.proj.bias": (WIDTH,)}
    found["input_adapters.semseg.class_emb.weight"] = (12, 64)
    for i in range(DEPTH):
        found |= _block(f"encoder.{i}", WIDTH)
    for name in OUTPUTS:
        where, d = f"output_adapters.{name}", DECODER_WIDTH
        found[f"{where}.mask_token"] = (1, 1, d)
        found |= {f"{where}.task_embeddings.{task}": (1, 1, d) for task in INPUTS}
        sizes = {"decoder.q": (d, d), "decoder.kv": (d, 2 * d), "decoder.proj": (d, d), "proj_context": (WIDTH, d)}
        sizes |= {"mlp.fc1": (d, 4 * d), "mlp.fc2": (4 * d, d)}
        n_values = 48 if name == "semseg" else 64 * INPUTS[name.removeprefix("norm_")]
        for layer, (n_in, n_out) in {**sizes, "out_proj": (d, n_values)}.items():
            found |= _linear(f"{where}.{layer}", n_in, n_out)
        for norm in ("context_norm", "query_norm", "out_norm"):
            found |= {f"{where}.{norm}.{part}": (d,) for part in ("weight", "bias")}
        for i in range(2):
            found |= _block(f"{where}.decoder_transformer.{i}", d)
    return found


def published() -> dict[str, Tensor]:
    """The whole state dict: v_j = 0.05 sin(0.37 j + h), h a hash of the name; plus 1 for gains."""
    tensors = {}
    for name, shape in shapes().items():
        h = sum(name.encode("ascii")) % 97
        values = 0.05 * torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + h)
        if len(shape) == 1 and name.endswith("weight"):
            values += 1.0
        tensors[name] = values.float().view(shape)
    for where, width in [
        *((f"input_adapters.{name}", WIDTH) for name in INPUTS),
        *((f"output_adapters.{name}", DECODER_WIDTH) for name in OUTPUTS),
    ]:
        table = sincos_resized(28, (28, 28), width, torch.device("cpu"))  # [784, D]
        tensors[f"{where}.pos_emb"] = table.T.reshape(1, width, 28, 28)
    return tensors


def image(name: str) -> Tensor:
    """`[1, C, H, W]`."""
    if name == "semseg":
        y, x = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
        return ((y + 2 * x) % 12)[None, None].float()
    f = {"rgb": 0.1, "depth": 0.2, "ired": 0.3, "sired": 0.4, "ebands": 0.5}[name]
    y, x = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    planes = [torch.sin(0.1 * (k + 1) * y + f) + torch.cos(0.07 * (k + 1) * x - f) for k in range(INPUTS[name])]
    return torch.stack(planes)[None]


def visible(task: int) -> list[int]:
    """The visible patches of the modality with this number."""
    return sorted({(7 * i + 5 * task) % 49 for i in range(8)})


def _linear(name: str, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def _block(name: str, d: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        f"{name}.{n}.{p}": (d,) for n in ("norm1", "norm2") for p in ("weight", "bias")
    }
    layers = {"attn.qkv": (d, 3 * d), "attn.proj": (d, d), "mlp.fc1": (d, 4 * d), "mlp.fc2": (4 * d, d)}
    for layer, (n_in, n_out) in layers.items():
        found |= _linear(f"{name}.{layer}", n_in, n_out)
    return found
