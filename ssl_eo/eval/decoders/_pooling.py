"""One vector of an image, from its taps.

B images, D width of a tap, h w patches.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ssl_eo.eval.decoders.base import TapMaps, TapShape

__all__ = ["Pool", "Pooling", "Taps"]

Pool = Literal["mean", "cls", "cls_mean"]  # of patches; the CLS token of the last tap; both, one behind the other
Taps = Literal["last", "all"]  # whose patches are averaged; of several, one behind the other


class Pooling(nn.Module):
    """`forward(taps) -> [B, width]`; no weights.

    Raises `ValueError` where the encoder has no CLS token that `pool` names, or `pool` and `taps` disagree.
    """

    def __init__(self, shape: TapShape, pool: Pool, taps: Taps) -> None:
        super().__init__()
        if pool != "mean" and not shape.has_cls:
            raise ValueError(f"pool: {pool}, but the encoder has no CLS token; pool: mean needs none")
        if pool == "cls" and taps == "all":
            raise ValueError("pool: cls with taps: all, but the CLS token is that of the last tap: take taps: last")
        self._has_cls = pool != "mean"
        averaged = shape.widths if taps == "all" else shape.widths[-1:]
        self._n_averaged = 0 if pool == "cls" else len(averaged)
        self.width = self._has_cls * shape.widths[-1] + (0 if pool == "cls" else sum(averaged))

    def forward(self, taps: TapMaps) -> Tensor:
        """`[B, width]`; raises `ValueError` where the CLS token was promised and is not there."""
        averaged = taps.maps[len(taps.maps) - self._n_averaged :]
        parts = [features.mean(dim=(2, 3)) for features in averaged]
        if self._has_cls:
            if taps.cls is None:
                raise ValueError("pool: the encoder is said to have a CLS token, but gave none")
            parts.insert(0, taps.cls)
        return torch.cat(parts, dim=1)
