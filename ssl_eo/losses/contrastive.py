"""Contrastive losses: which of many is the other view of this place? And BYOL's, which knows no others.

NT-Xent (SimCLR, arXiv 2002.05709), InfoNCE with keys of a moving average (MoCo v2, arXiv 2003.04297, and v3,
arXiv 2104.02057) or between two encoders with a learned temperature (CLIP, arXiv 2103.00020, and CROMA, arXiv
2311.00566), and the regression of BYOL (arXiv 2006.07733). Candidates are those of all ranks, so that the mean of
the ranks' losses is what one process would have; every rank holds equally many samples.

B samples of a rank, N = ranks * B of all, K keys of a queue, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_eo.distributed import gather, rank

__all__ = [
    "Contrast",
    "in_batch_contrast",
    "nt_xent_contrast",
    "pair_contrasts",
    "pair_metrics",
    "queue_contrast",
    "regression_loss",
]


class Contrast(NamedTuple):
    """Rows that choose among candidates: `logits [R, M]`, and `positive [R]`, the candidate that is right."""

    logits: Tensor
    positive: Tensor

    def loss(self) -> Tensor:
        """Mean cross-entropy over rows; where all candidates are equally similar, the logarithm of their number."""
        return F.cross_entropy(self.logits, self.positive)

    def accuracy(self) -> Tensor:
        """For which share of the rows the right candidate is the most similar one."""
        return (self.logits.detach().argmax(1) == self.positive).float().mean()


def nt_xent_contrast(z: Tensor, temperature: float) -> Contrast:
    """SimCLR, equation 1: each view of `z [2, B, D]` among all 2N views of all ranks, itself left out.

    Its positive is the other view of the sample. The gradient flows through both sides, on all ranks.
    """
    u = F.normalize(z, dim=-1).transpose(0, 1).flatten(0, 1)  # [2B, D], the views of a sample side by side
    candidates = gather(u)  # [2N, D]
    logits = u @ candidates.T / temperature  # [2B, 2N]
    own = rank() * len(u) + torch.arange(len(u), device=u.device)
    is_own = own[:, None] == torch.arange(len(candidates), device=u.device)  # [2B, 2N]
    return Contrast(logits.masked_fill(is_own, -torch.inf), own ^ 1)


def in_batch_contrast(queries: Tensor, keys: Tensor, temperature: float) -> Contrast:
    """MoCo v3: `queries [B, D]` of one view among the `keys [B, D]` of the other view of all samples of all ranks."""
    candidates = gather(F.normalize(keys, dim=-1))  # [N, D]
    logits = F.normalize(queries, dim=-1) @ candidates.T / temperature  # [B, N]
    return Contrast(logits, rank() * len(queries) + torch.arange(len(queries), device=queries.device))


def pair_contrasts(first: Tensor, second: Tensor, logit_scale: Tensor) -> tuple[Contrast, Contrast]:
    """CLIP: each row of `first [B, D]` among the `second` of all samples of all ranks, and the other way round.

    Row i of the one belongs to row i of the other. Logits are cosines times exp(`logit_scale`), a 0-d tensor. The
    gradient flows through both sides, on all ranks.
    """
    both = F.normalize(torch.stack((first, second), dim=1), dim=-1)  # [B, 2, D]
    candidates = gather(both)  # [N, 2, D]
    own = rank() * len(both) + torch.arange(len(both), device=both.device)  # [B]
    scale = logit_scale.exp()
    to_second = scale * both[:, 0] @ candidates[:, 1].T  # [B, N]
    to_first = scale * both[:, 1] @ candidates[:, 0].T  # [B, N]
    return Contrast(to_second, own), Contrast(to_first, own)


def queue_contrast(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Contrast:
    """MoCo v2: each of `queries [B, D]` among its own of `keys [B, D]` and all of a `queue [K, D]` of unit length.

    Other keys of the batch are no candidates: they will be when they are in the queue.
    """
    q, k = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    logits = torch.cat(((q * k).sum(-1, keepdim=True), q @ queue.T), 1) / temperature  # [B, 1 + K]
    return Contrast(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL, equation 2: mean squared distance 2 - 2 cos of rows `[..., D]` on the sphere, from 0 to 4."""
    return 2.0 - 2.0 * F.cosine_similarity(predictions, targets, dim=-1).mean()


@torch.no_grad()
def pair_metrics(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Of the two views' projections `[B, D]`, as they lie on the sphere, over the samples of this rank.

    `alignment`: mean squared distance of the views of a sample (arXiv 2005.10242), 0 where they are equal. `spread`:
    one minus the squared length of the mean, 0 where all samples are in one point, near 1 where they are all over.
    """
    u, v = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
    mean = torch.cat((u, v)).mean(0)  # [D]
    return {"alignment": (u - v).square().sum(-1).mean(), "spread": 1.0 - mean.square().sum()}
