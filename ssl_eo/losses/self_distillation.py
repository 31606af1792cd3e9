"""Self-distillation: targets from a teacher's logits, and what a student loses against them.

DINO (arXiv 2104.14294), iBOT (arXiv 2111.07832), Sinkhorn-Knopp centering (arXiv 2006.09882) and KoLeo
(arXiv 1806.03198), as DINOv2 puts them together (arXiv 2304.07193). Targets, and KoLeo where asked to, look at the
samples of all ranks, so that the mean of the ranks' losses is what one process would have.

B samples of a rank, S student views, T teacher views (the first T of the S), M masked patches, K prototypes, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_eo.distributed import gather, rank

__all__ = ["centered_targets", "dino_loss", "ibot_loss", "koleo_loss", "sinkhorn_targets"]


def centered_targets(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Softmax of `logits [..., K]` less the running mean `center [K]`: centering against collapse onto a prototype."""
    return ((logits - center) / temperature).softmax(-1)


def sinkhorn_targets(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Rows of `logits [N, K]` as distributions that together use every prototype equally, over all ranks.

    Ranks may hold different N. Computed with logarithms: exp(logit / temperature) overflows once a head's weights grow.
    Masses are relative, each row's being 1: the constants of the original (1 / K, 1 / N) cancel.
    """
    log_q = logits / temperature  # [N, K]
    for _ in range(n_iterations):
        log_q = log_q - _logsumexp_over_ranks(log_q)  # prototypes of equal mass
        log_q = log_q.log_softmax(1)  # rows of equal mass
    return log_q.exp()


def _logsumexp_over_ranks(x: Tensor) -> Tensor:
    """Of the rows of `x [N, K]` of all ranks, `[1, K]`."""
    own = x.logsumexp(0, keepdim=True)  # [1, K]
    return gather(own).logsumexp(0, keepdim=True)


def dino_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of the student's views `logits [S, B, K]` with `targets [T, B, K]` of the teacher's.

    The mean is over all pairs of different views: view i of the student is compared with every teacher view but i.
    """
    n_views, n_samples, _ = logits.shape
    n_teacher = len(targets)
    log_p = F.log_softmax(logits / temperature, dim=-1)  # [S, B, K]
    others = targets.sum(0, keepdim=True).expand(n_views, -1, -1)  # [S, B, K], of all teacher views
    of_globals = (log_p[:n_teacher] * (others[:n_teacher] - targets)).sum()
    of_locals = (log_p[n_teacher:] * others[n_teacher:]).sum()
    n_pairs = n_teacher * (n_views - 1)
    return -(of_globals + of_locals) / (n_pairs * n_samples)


def ibot_loss(logits: Tensor, targets: Tensor, weight: Tensor, n_views: int, temperature: float) -> Tensor:
    """Cross-entropy of masked patches: `logits [M, K]` of the student, `targets [M, K]` of the teacher.

    `weight [M]` is one over the number of masked patches of the patch's view, so that each view with a mask counts
    once; `n_views` are all views, with a mask or without.
    """
    log_p = F.log_softmax(logits / temperature, dim=-1)  # [M, K]
    return -((targets * log_p).sum(-1) * weight).sum() / n_views


def koleo_loss(x: Tensor, over_ranks: bool = False, eps: float = 1e-8) -> Tensor:
    """Differential entropy of `x [B, D]` on the sphere, by the distance of each row to its nearest neighbour.

    With `over_ranks` neighbours are looked for among the rows of all ranks. Zero where there is no neighbour; finite,
    with a finite gradient, where two rows are equal.
    """
    x = F.normalize(x, dim=-1)
    others = gather(x) if over_ranks else x  # [N, D]
    if len(others) < 2:
        return x.sum() * 0.0
    own = torch.arange(len(x), device=x.device)
    with torch.no_grad():
        similarity = x @ others.T  # [B, N]
        similarity[own, own + (rank() * len(x) if over_ranks else 0)] = -2.0  # a row is no neighbour of its own
        nearest = similarity.argmax(1)  # [B]
    distance = F.pairwise_distance(x, others[nearest], eps=eps)  # [B]
    return -(distance + eps).log().mean()
