"""Writes `golden/convnextv2_atto.json` anew: what timm's ConvNeXt V2 computes from weights by formula.

    python tests/weights/make_convnext_golden.py

It needs timm (numbers of 1.0.31), which is no part of this project. No file of released weights is needed.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from released_formula import summary, uniform, weights

# Channels and size in pixels of the inputs, of two samples each.
CASES = {"rgb": (3, (64, 64)), "sentinel2, not square": (13, (96, 32)), "sar": (2, (32, 64))}


@torch.no_grad()
def main() -> None:
    """Compute all cases."""
    golden = {}
    for name, (n_channels, size) in CASES.items():
        model = timm.create_model("convnextv2_atto", features_only=True, pretrained=False, in_chans=n_channels).eval()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(weights(shapes), strict=True)
        maps = model(uniform(f"pixels {name}", (2, n_channels, *size)))
        golden[name] = {
            "n_channels": n_channels,
            "size": size,
            "shapes": {key: list(shape) for key, shape in shapes.items()} if name == "rgb" else None,
            "levels": [{"shape": list(x.shape), **summary(x)} for x in maps],
        }
    path = Path(__file__).parent / "golden" / "convnextv2_atto.json"
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
