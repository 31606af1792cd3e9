"""What features cost: the floating point operations of one forward pass."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_eo.eval.features import Featurise
from ssl_eo.eval.splits import Split

__all__ = ["forward_gflop"]


def forward_gflop(featurise: Featurise, split: Split, device: torch.device) -> float:
    """GFLOP of the features of one sample of `split`, two a multiply-add.

    Counted are matrix products, convolutions and attention. Attention is taken apart into its products, since not every
    fused kernel is known to the counter.
    """
    batch = next(iter(split.stream(1, device)))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        featurise(batch.inputs)
    return float(counter.get_total_flops()) / 1e9
