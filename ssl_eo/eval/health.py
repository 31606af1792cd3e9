"""What the features look like, without any label: has the representation collapsed, and how much of its width is used?

N samples, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_rank", "health", "mean_cosine", "mean_norm"]


def health(features: Tensor) -> dict[str, float]:
    """All measures of this module for `features [N, D]`, by name."""
    return {
        "effective_rank": effective_rank(features),
        "mean_norm": mean_norm(features),
        "mean_cosine": mean_cosine(features),
    }


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values (RankMe; Garrido et al. 2023, eq. 1): from 1 to min(N, D).

    The features are not centred: a collapse to one point counts as rank 1.
    """
    x = features.double()
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(x.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def mean_norm(features: Tensor) -> float:
    """Mean Euclidean length of a sample's features."""
    return float(features.double().norm(dim=1).mean())


def mean_cosine(features: Tensor) -> float:
    """Mean cosine similarity over pairs of different samples: 1 when all features point the same way."""
    n = len(features)
    if n < 2:
        raise ValueError(f"mean_cosine compares pairs of samples, got {n} sample(s)")
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    # The squared length of the sum counts every ordered pair; a sample's pair with itself is its own squared length.
    pairs = unit.sum(0).square().sum() - unit.square().sum()
    return float(pairs / (n * (n - 1)))
