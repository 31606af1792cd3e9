"""Which radar image is of the same place as this optical one, and the other way round, over the samples of all ranks.

InfoNCE in both directions with a learned temperature, as in CLIP (arXiv 2103.00020) and CROMA (arXiv 2311.00566).
The gradient flows through both sides on all ranks, so that the mean of the ranks' losses is what one process would
have, gradient too; every rank holds equally many samples.

B samples of a rank, N = ranks * B of all, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_eo.distributed import gather, rank
from ssl_eo.losses.contrastive import Contrast

__all__ = ["pair_contrasts"]


def pair_contrasts(first: Tensor, second: Tensor, logit_scale: Tensor) -> tuple[Contrast, Contrast]:
    """Each row of `first [B, D]` among the `second` of all samples of all ranks, and each of `second` among `first`.

    Row i of the one belongs to row i of the other. Logits are cosines times exp(`logit_scale`), a 0-d tensor.
    """
    both = F.normalize(torch.stack((first, second), dim=1), dim=-1)  # [B, 2, D]
    candidates = gather(both)  # [N, 2, D]
    own = rank() * len(both) + torch.arange(len(both), device=both.device)  # [B]
    scale = logit_scale.exp()
    to_second = scale * both[:, 0] @ candidates[:, 1].T  # [B, N]
    to_first = scale * both[:, 1] @ candidates[:, 0].T  # [B, N]
    return Contrast(to_second, own), Contrast(to_first, own)
