"""Writes `golden/dofa.json` anew: what the published code computes from weights by formula.

    python tests/weights/make_dofa_golden.py CHECKOUT LEGACY_CHECKOUT

Both are clones of github.com/torchgeo/torchgeo, at commits 65507db and c5380ab: the second reads generated kernels as
the first public weights need it. They are asked for their model, with timm 1.0.31, and are no part of this repository.
No file of released weights is needed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from dofa_cases import CASES, DofaCase
from released_formula import summary, weights
from torch import Tensor, nn

SIZES = {"b": (768, 12, 12), "l": (1024, 24, 16)}  # width, blocks, heads


def published_module(checkout: str) -> ModuleType:
    """The module of the model alone: the whole package needs far more than it."""
    spec = importlib.util.spec_from_file_location("published_dofa", Path(checkout) / "torchgeo" / "models" / "dofa.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def published_outputs(model: Any, case: DofaCase) -> dict[str, Tensor]:
    """Tokens of some blocks, and the features that the code gives out."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    for layer in case.layers:
        model.blocks[layer].register_forward_hook(keep(f"block {layer}"))
    features = model.forward_features(case.pixels(), list(case.um))
    return {**outputs, "features": features}


def published_model(module: ModuleType, case: DofaCase) -> nn.Module:
    width, depth, n_heads = SIZES[case.model.removeprefix("dofa_vit")[0]]
    model: nn.Module = module.DOFA(
        img_size=case.size,
        patch_size=16,
        embed_dim=width,
        depth=case.depth or depth,
        num_heads=n_heads,
        global_pool=case.global_pool,
    )
    return model.eval()


def main(checkout: str, legacy_checkout: str) -> None:
    golden = {}
    for case in CASES:
        is_legacy = case.model.endswith("_legacy")
        model = published_model(published_module(legacy_checkout if is_legacy else checkout), case)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict(weights(shapes), strict=True)
        outputs = {name: summary(output) for name, output in published_outputs(model, case).items()}
        golden[case.name] = {"shapes": shapes, "outputs": outputs}
        print(case.name, *(f"{name} {s['std']:.3f}" for name, s in outputs.items()))
    of_file = golden["rgb"]["shapes"]  # those of the others follow from it
    for case in golden.values():
        case["n_tensors"] = len(case.pop("shapes"))
    path = Path(__file__).parent / "golden" / "dofa.json"
    rows = [f'"shapes": {json.dumps(of_file)}', *(f"{json.dumps(n)}: {json.dumps(c)}" for n, c in golden.items())]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
