"""Writes `golden/{panopticon,dinov2}.json` anew: what the published code computes from weights by formula.

    python tests/weights/make_released_golden.py panopticon CHECKOUT
    python tests/weights/make_released_golden.py dinov2 CHECKOUT

CHECKOUT is a clone of github.com/Panopticon-FM/panopticon (numbers of commit 5ad7f82) or of
github.com/facebookresearch/dinov2 (commit b8931f7), which are asked for their models and are no part of this
repository. No file of released weights is needed.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from released_formula import DINOV2, PANOPTICON, Case, summary, weights
from torch import Tensor, nn


def published_model(case: Case) -> nn.Module:
    """The published class, with the arguments of its hub entry."""
    from dinov2.models import vision_transformer as vits

    import hubconf  # of the checkout

    if case.model == "panopticon_vitb14":
        return hubconf._panopticon_vitb14()
    if case.depth is None:
        return getattr(hubconf, case.model)(pretrained=False)
    widths = {"b": (768, 12, "mlp"), "l": (1024, 16, "mlp"), "g": (1536, 24, "swiglufused")}
    embed_dim, num_heads, ffn_layer = widths[case.model.removeprefix("dinov2_vit")[0]]
    kwargs: dict[str, Any] = {"embed_dim": embed_dim, "num_heads": num_heads, "depth": case.depth}
    if case.model.endswith("_reg"):
        kwargs |= {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
    block = partial(vits.Block, attn_class=vits.MemEffAttention)
    return vits.DinoVisionTransformer(
        img_size=518, patch_size=14, init_values=1.0, ffn_layer=ffn_layer, block_chunks=0, block_fn=block, **kwargs
    )


def published_input(case: Case) -> Any:
    """Pixels, or Panopticon's dictionary; made anew for each call, since a call may change the ids."""
    if case.model != "panopticon_vitb14":
        return case.pixels()
    found = {"imgs": case.pixels(), "chn_ids": torch.tensor(case.ids)}
    valid = case.valid()
    return found if valid is None else {**found, "spec_masks": ~valid}


@torch.no_grad()
def published_outputs(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """Tokens by name, as the tests name them."""
    outputs: dict[str, Tensor] = {}
    if case.to_the_end:
        features = model.forward_features(published_input(case), masks=case.mask())
        outputs = {"cls": features["x_norm_clstoken"], "patches": features["x_norm_patchtokens"]}
        if features["x_norm_regtokens"].shape[1]:
            outputs["registers"] = features["x_norm_regtokens"]
    if not case.masked:
        found = model.get_intermediate_layers(published_input(case), n=case.layers, return_class_token=True)
        for layer, (patches, cls) in zip(case.layers, found, strict=True):
            outputs |= {f"block {layer} cls": cls, f"block {layer} patches": patches}
    return outputs


def main(family: str, checkout: str) -> None:
    """Compute all cases of a family."""
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path.insert(0, checkout)
    golden = {}
    for case in {"panopticon": PANOPTICON, "dinov2": DINOV2}[family]:
        model = published_model(case).eval()
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict(weights(shapes), strict=True)
        golden[case.name] = {
            "n_tensors": len(shapes),
            "n_parameters": sum(value.numel() for value in model.state_dict().values()),
            "outputs": {name: summary(output) for name, output in published_outputs(model, case).items()},
        }
        print(case.name, *(f"{name} {s['std']:.3f}" for name, s in golden[case.name]["outputs"].items()))
    path = Path(__file__).parent / "golden" / f"{family}.json"
    rows = (f"{json.dumps(name)}: {json.dumps(case)}" for name, case in golden.items())
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
