"""Nearest neighbours: do samples lie beside others of their class? Nothing is fitted, and no validation set is used.

N training samples, M test samples, m of them at once, D features, K classes, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.probes.base import Fitted, Labelled, Prediction, check_inputs, indicators

__all__ = ["KINDS", "Config", "fit", "predict"]

KINDS: tuple[Kind, ...] = ("classification", "multilabel")

# Products of equal vectors differ in their last bits with their place in a matrix. Cosines are rounded to this grid, so
# that what is equal ties, whatever was computed beside it.
_STEPS_OF_COSINE = 2.0**40


@dataclass
class Config:
    """How many neighbours vote, and how much more the nearer ones count."""

    n_neighbors: int = 20  # all training samples where these are fewer
    temperature: float = 0.07  # a neighbour of cosine s votes with exp(s / temperature)
    chunk_size: int = 1024  # test samples at once

    def __post_init__(self) -> None:
        for key in ("n_neighbors", "temperature", "chunk_size"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be positive, got {getattr(self, key)}")


def predict(train: Labelled, val: Labelled | None, test: Tensor, cfg: Config | None = None) -> Prediction:
    """See `fit`."""
    return fit(train, val, cfg).predict(test)


def fit(train: Labelled, val: Labelled | None, cfg: Config | None = None) -> Fitted:
    """Weighted nearest neighbours by cosine similarity s, each voting exp(s / temperature) (Wu et al. 2018).

    Scores and probabilities are the share of the votes that a class gets; of several labels, those above one half are
    predicted. Of neighbours that are equally near, the first in `train` are taken. `val` is not used.
    """
    cfg = cfg or Config()
    check_inputs("knn", KINDS, train, val)
    n_neighbors = min(cfg.n_neighbors, len(train))
    bank, targets = _unit_rows(train.features), indicators(train)  # [N, D], [N, K]

    def scores(features: Tensor) -> Tensor:
        shares = []
        for queries in torch.split(_unit_rows(features), cfg.chunk_size):
            cosine = (queries @ bank.T).mul_(_STEPS_OF_COSINE).round_().div_(_STEPS_OF_COSINE)  # [m, N]
            nearest, index = _first_of_the_nearest(cosine, n_neighbors)  # [m, k]
            weights = ((nearest - nearest.amax(1, keepdim=True)) / cfg.temperature).exp()  # the nearest has 1
            weights = weights / weights.sum(1, keepdim=True)
            shares.append((weights[:, None] @ targets[index]).squeeze(1))  # [m, K]
        return torch.cat(shares) if shares else targets.new_zeros(0, train.n_classes)

    return Fitted(scores, lambda found: found, 0.5, {"n_neighbors": n_neighbors}, bank.shape[1])


def _unit_rows(features: Tensor) -> Tensor:
    x = features.double()
    return functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)  # however small features are


def _first_of_the_nearest(cosine: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
    """Cosines and positions `[m, k]` of the nearest in `cosine [m, N]`; of equal ones at the edge, the first."""
    nearest, index = cosine.topk(n_neighbors)
    edge = nearest[:, -1:]  # [m, 1]
    # topk takes any of those that are as near as the last one. Rows where it had the choice are done again.
    tied = (cosine >= edge).sum(1) > n_neighbors  # [m]
    if bool(tied.any()):
        ranked, places = cosine[tied].sort(dim=1, descending=True, stable=True)
        nearest[tied], index[tied] = ranked[:, :n_neighbors], places[:, :n_neighbors]
    return nearest, index
