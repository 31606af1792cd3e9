"""What features look like, without any label: how much of their width is used, and whether they have collapsed.

N samples, F features of a sample, K eigenvalues.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ssl_eo.models.vit import Tokens

__all__ = [
    "alpha_req",
    "cls_patch_cosine",
    "dead_ratio",
    "effective_rank",
    "first_ratio",
    "health",
    "mean_cosine",
    "mean_norm",
    "norm_spread_ratio",
    "spectrum",
    "spread_ratio",
    "uniformity",
]

_MAX_PAIRED = 2048  # samples whose pairs are all looked at; of more, as many, evenly
_ROUNDING = 1e-12  # of float32, squared, with room: variance below this part of the mean squared norm is none
_NO_SPREAD = 1e-4  # a feature with a standard deviation of this part of the root mean square of all says nothing
_MIN_FITTED = 4  # eigenvalues that a slope is fitted to


def health(features: Tensor) -> dict[str, float]:
    """All measures of this module for finite `features [N, F]` of N > 1, by name; what is undefined is left out."""
    eigenvalues = spectrum(features)
    found = {
        "effective_rank": effective_rank(features),
        "alpha_req": alpha_req(eigenvalues),
        "uniformity": uniformity(features),
        "mean_norm": mean_norm(features),
        "norm_spread_ratio": norm_spread_ratio(features),
        "mean_cosine": mean_cosine(features),
        "spread_ratio": spread_ratio(features),
        "first_ratio": first_ratio(eigenvalues),
        "dead_ratio": dead_ratio(features),
    }
    return {name: value for name, value in found.items() if value is not None}


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values (RankMe; Garrido et al. 2023, eq. 1): from 1 to min(N, F).

    The features are not centred: a collapse to one point counts as rank 1.
    """
    x = features.double()
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(x.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def spectrum(features: Tensor) -> Tensor:
    """Eigenvalues `[K]` of the covariance of `features`, the largest first; K = min(N - 1, F), fewer where the others
    are no more than rounding of float32.
    """
    x = features.double()
    centred = x - x.mean(0)
    gram = centred.T @ centred if x.shape[1] <= x.shape[0] else centred @ centred.T
    every: Tensor = torch.linalg.eigvalsh(gram).flip(0) / x.shape[0]
    is_real = every > _ROUNDING * x.square().sum(1).mean()
    return every[is_real][: min(x.shape[0] - 1, x.shape[1])]


def alpha_req(eigenvalues: Tensor) -> float | None:
    """Exponent a of the power law j^-a that the eigenvalues of the covariance follow (alpha-ReQ; Agrawal et al. 2022).

    The slope of log eigenvalue over log j by least squares, j = 1 ... K/2: the smaller half falls for want of samples.
    About 1 is said to be good; large means few directions, 0 all alike. None for fewer than 8 eigenvalues.
    """
    n = len(eigenvalues) // 2
    if n < _MIN_FITTED:
        return None
    x = torch.arange(1, n + 1, dtype=torch.float64, device=eigenvalues.device).log()
    y = eigenvalues[:n].log()
    x, y = x - x.mean(), y - y.mean()
    return float(-(x @ y) / (x @ x))


def first_ratio(eigenvalues: Tensor) -> float | None:
    """Share of the variance that is along one direction: 1 where features lie on a line. None without variance."""
    return float(eigenvalues[0] / eigenvalues.sum()) if len(eigenvalues) else None


def spread_ratio(features: Tensor) -> float:
    """Root mean square distance from the mean, over the root mean square norm: 0 where all are one point, up to 1."""
    x = features.double()
    squared = (x - x.mean(0)).square().sum(1).mean() / x.square().sum(1).mean().clamp_min(torch.finfo(x.dtype).tiny)
    return float(squared.sqrt())


def uniformity(features: Tensor) -> float:
    """log of the mean of exp(-2 |u - v|^2) over pairs of different samples (Wang & Isola 2020, section 4.1, t = 2).

    u and v are features of unit length. From 0, all the same, down to about -4 of many evenly spread directions. Of
    more than 2048 samples as many are taken, evenly.
    """
    _check_pairs(features, "uniformity")
    every = torch.linspace(0, len(features) - 1, min(len(features), _MAX_PAIRED), device=features.device).long()
    unit = normalize(features[every].double(), dim=1)
    n = len(unit)
    own = unit.square().sum(1)  # 1, but for a feature that is 0
    squared = (own[:, None] + own - 2 * unit @ unit.T).clamp_min(0.0)  # [N, N]
    without_itself = squared.mul(-2.0).exp().sum() - n
    return math.log(float(without_itself / (n * (n - 1))))


def mean_norm(features: Tensor) -> float:
    """Mean Euclidean length of a sample's features."""
    return float(features.double().norm(dim=1).mean())


def norm_spread_ratio(features: Tensor) -> float | None:
    """Standard deviation of the lengths over their mean. None where all are 0."""
    norms = features.double().norm(dim=1)
    return float(norms.std(correction=0) / norms.mean()) if norms.mean() > 0 else None


def mean_cosine(features: Tensor) -> float:
    """Mean cosine similarity over pairs of different samples: 1 when all features point the same way."""
    _check_pairs(features, "mean_cosine")
    n = len(features)
    unit = normalize(features.double(), dim=1)
    # The squared length of the sum counts every ordered pair; a sample's pair with itself is its own squared length.
    pairs = unit.sum(0).square().sum() - unit.square().sum()
    return float(pairs / (n * (n - 1)))


def dead_ratio(features: Tensor) -> float:
    """Share of the F features that are the same for all samples, up to 1e-4 of the root mean square of all."""
    x = features.double()
    return float((x.std(0, correction=0) <= _NO_SPREAD * x.square().mean().sqrt()).double().mean())


def cls_patch_cosine(tokens: Tokens) -> Tensor | None:
    """`[B]`: cosine of the CLS token of a sample and the mean of its patches; None for an encoder without CLS token."""
    if not tokens.n_prefix_tokens:
        return None
    found: Tensor = cosine_similarity(tokens.cls.double(), tokens.patches.double().mean(1))
    return found


def _check_pairs(features: Tensor, name: str) -> None:
    if len(features) < 2:
        raise ValueError(f"{name} compares pairs of samples, got {len(features)} sample(s)")
