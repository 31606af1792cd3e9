"""Writes `golden/prithvi.json` anew: what the published code computes from weights by formula.

    python tests/weights/make_prithvi_golden.py CHECKOUT

It is a clone of github.com/IBM/terratorch, at commit 85467a9f, which is asked for its model, with timm 1.0.31 and
einops, and is no part of this repository. No file of released weights is needed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from prithvi_cases import CASES, MAE_CASES, N_BANDS, PrithviCase, PrithviMaeCase
from released_formula import summary, weights
from torch import Tensor, nn

SIZES = {"v1_100": (768, 12), "tiny": (192, 3), "v2_100": (768, 12), "v2_300": (1024, 16), "v2_600": (1280, 16)}


def published_module(checkout: str) -> ModuleType:
    """The module of the model alone: the whole package needs far more than it."""
    path = Path(checkout) / "terratorch" / "models" / "backbones" / "prithvi_mae.py"
    spec = importlib.util.spec_from_file_location("published_prithvi", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weights by formula for all but the fixed positions; the shapes of all that a file holds."""
    tensors = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    model.load_state_dict(tensors | weights({name: s for name, s in shapes.items() if "pos_embed" not in name}))
    model.eval()
    return shapes


def published_encoder(module: ModuleType, case: PrithviCase) -> Any:
    name = case.model.removeprefix("prithvi_eo_")
    width, n_heads = next(sizes for key, sizes in SIZES.items() if key in name)
    return module.PrithviViT(
        patch_size=14 if "600" in name else 16,
        num_frames=case.n_dates,
        in_chans=N_BANDS,
        embed_dim=width,
        depth=case.depth,
        num_heads=n_heads,
        coords_encoding=["time", "location"] if name.endswith("tl") else [],
        coords_scale_learn=True,
    )


def published_mae(module: ModuleType, case: PrithviMaeCase) -> Any:
    return module.PrithviMAE(
        img_size=case.size,
        num_frames=case.n_dates,
        in_chans=N_BANDS,
        embed_dim=case.embed_dim,
        depth=case.depth,
        num_heads=case.n_heads,
        decoder_embed_dim=case.decoder_dim,
        decoder_depth=case.depth,
        decoder_num_heads=case.n_heads,
        norm_pix_loss=case.norm_pix,
        coords_encoding=["time", "location"] if case.told else [],
        coords_scale_learn=True,
    )


@torch.no_grad()
def encoder_numbers(module: ModuleType, case: PrithviCase) -> dict[str, Any]:
    model = published_encoder(module, case)
    shapes = fill(model)
    tokens = model.forward_features(case.pixels(), case.dates(), case.location())
    outputs = {f"block {layer}": tokens[layer] for layer in case.layers} | {"last": tokens[-1]}
    return {"shapes": shapes, "outputs": {name: summary(output) for name, output in outputs.items()}}


@torch.no_grad()
def mae_numbers(module: ModuleType, case: PrithviMaeCase) -> dict[str, Any]:
    model, pixels = published_mae(module, case), case.pixels()
    shapes = fill(model)
    model.encoder.random_masking = partial(model.encoder.random_masking, noise=case.noise())
    latent, mask, restore = model.encoder(pixels, case.dates(), case.location(), case.mask_ratio)
    pred: Tensor = model.decoder(latent, restore, case.dates(), case.location(), input_size=pixels.shape)
    hidden = pred[mask.bool()].view(len(pred), -1, pred.shape[-1])  # [B, M, P*P*C]
    loss = model.forward_loss(pixels, pred, mask).item()
    return {"shapes": shapes, "loss": loss, "predictions": summary(hidden)}


def main(checkout: str) -> None:
    module = published_module(checkout)
    golden = {f"encoder: {case.name}": encoder_numbers(module, case) for case in CASES}
    golden |= {f"mae: {case.name}": mae_numbers(module, case) for case in MAE_CASES}
    path = Path(__file__).parent / "golden" / "prithvi.json"
    path.write_text("{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(c)}" for n, c in golden.items()) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
