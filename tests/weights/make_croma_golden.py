"""Writes `golden/croma.json` anew: what the published code computes from weights by formula.

    python tests/weights/make_croma_golden.py CHECKOUT [--whole SIZE]

CHECKOUT is a clone of github.com/antofuller/CROMA (numbers of commit 59505a6), which is asked for its model and is no
part of this repository; it needs the package einops. No file of released weights is needed. With `--whole base` or
`--whole large` nothing is written: the model is computed in full depth, and beside it ours, and the largest difference
of any output is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from croma_formula import CROMA, CromaCase
from released_formula import summary, weights
from torch import Tensor

NAMES = {  # of the published code's results
    "optical tokens": "optical_encodings",
    "optical": "optical_GAP",
    "radar tokens": "SAR_encodings",
    "radar": "SAR_GAP",
    "joint tokens": "joint_encodings",
    "joint": "joint_GAP",
}


def published_state(case: CromaCase, use_croma: Any) -> dict[str, dict[str, Tensor]]:
    """The five dictionaries of a file, with weights by formula."""
    width, depth = {"base": (768, 12), "large": (1024, 24)}[case.size]
    depth = case.depth or depth
    with torch.device("meta"):
        parts = {
            "s1_encoder": use_croma.ViT(width, depth // 2, 2),
            "s1_GAP_FFN": head(width),
            "s2_encoder": use_croma.ViT(width, depth, 12),
            "s2_GAP_FFN": head(width),
            "joint_encoder": use_croma.BaseTransformerCrossAttn(width, depth // 2, num_heads=16),
        }
    shapes = {f"{part}.{k}": tuple(v.shape) for part, m in parts.items() for k, v in m.state_dict().items()}
    filled = weights(shapes)
    return {part: {k: filled[f"{part}.{k}"] for k in m.state_dict()} for part, m in parts.items()}


def head(width: int) -> torch.nn.Module:
    """As their class builds it inside its constructor."""
    nn = torch.nn
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


@torch.no_grad()
def published_outputs(case: CromaCase, state: dict[str, dict[str, Tensor]], use_croma: Any) -> dict[str, Tensor]:
    """By the published class, which fixes widths and depths: it is asked for another depth where a case is cut."""
    depths = {"s1_encoder": "s1_encoder", "s2_encoder": "s2_encoder", "joint_encoder": "cross_encoder"}
    with tempfile.NamedTemporaryFile(suffix=f"{case.size}.pt") as file:
        model_class = use_croma.PretrainedCROMA
        if case.depth is None:
            torch.save(state, file.name)
            model = model_class(file.name, case.size, "both", case.side_px)
        else:
            original = torch.nn.Module.load_state_dict
            torch.nn.Module.load_state_dict = lambda *_, **__: None  # it loads before it can be cut
            torch.save({part: {} for part in state}, file.name)
            model = model_class(file.name, case.size, "both", case.side_px)
            torch.nn.Module.load_state_dict = original
            for part, attribute in depths.items():
                module = getattr(model, attribute)
                layers = module.transformer.layers if hasattr(module, "transformer") else module.layers
                n = case.depth if part == "s2_encoder" else case.depth // 2
                del layers[n:]
                module.load_state_dict(state[part], strict=True)
            model.GAP_FFN_s1.load_state_dict(state["s1_GAP_FFN"], strict=True)
            model.GAP_FFN_s2.load_state_dict(state["s2_GAP_FFN"], strict=True)
    images = case.images()
    found = model.eval()(SAR_images=images.radar, optical_images=images.optical)
    return {ours: found[theirs] for ours, theirs in NAMES.items()}


def compare_whole(size: str, use_croma: Any) -> None:
    from test_croma_weights import outputs_of

    from ssl_eo.weights.croma import PAIRS, load_pair

    case = CromaCase(size, None, 120)
    state = published_state(case, use_croma)
    expected = published_outputs(case, state, use_croma)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(state, file.name)
        del state
        found = outputs_of(load_pair(file.name, PAIRS[f"croma_{size}"]), case)
    for name, value in expected.items():
        print(f"{name}: {(found[name] - value).abs().max():.2e} of {value.std():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout")
    parser.add_argument("--whole", choices=("base", "large"))
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.checkout)
    import use_croma  # of the checkout

    if arguments.whole:
        compare_whole(arguments.whole, use_croma)
        return
    golden = {}
    for case in CROMA:
        state = published_state(case, use_croma)
        outputs = published_outputs(case, state, use_croma)
        golden[case.name] = {
            "n_tensors": {part: len(tensors) for part, tensors in state.items()},
            "outputs": {name: summary(value) for name, value in outputs.items()},
        }
        print(case.name, *(f"{name} {value.std():.3f}" for name, value in outputs.items()))
    path = Path(__file__).parent / "golden" / "croma.json"
    rows = (f"{json.dumps(name)}: {json.dumps(case)}" for name, case in golden.items())
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
