"""Linear heads trained by stochastic gradient descent on cached features, at all learning rates of a grid at once.

This is the linear probe of most papers, whose result depends on the learning rate by many points; `logistic` is the
same model without one. It also takes kinds of targets that `logistic` does not.

N training samples, B batch, V validation samples, M test samples, D features, K classes, L learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.probes.base import (
    Fitted,
    Labelled,
    Prediction,
    Standardiser,
    check_inputs,
    hold_out,
    indicators,
    is_at_edge,
    mean_response,
    selection_score,
)
from ssl_eo.seeding import torch_generator

__all__ = ["KINDS", "Config", "fit", "predict"]

KINDS: tuple[Kind, ...] = ("classification", "multilabel", "segmentation", "regression")


@dataclass
class Config:
    """How the heads are trained, and which learning rates there are to choose from."""

    lrs: list[float] = field(default_factory=lambda: [10.0 ** (0.5 * e) for e in range(-10, 1)])  # at the start
    n_epochs: int = 50
    batch_size: int = 256
    momentum: float = 0.9
    standardise: bool = (
        True  # by mean and deviation of the training set, as BatchNorm without affine does; else as given
    )
    seed: int = 0  # of the order of samples, and of the tenth of train that is held out where there is no val

    def __post_init__(self) -> None:
        if not self.lrs or not all(lr > 0 for lr in self.lrs):
            raise ValueError(f"lrs must be positive, and one at least, got {list(self.lrs)}")
        if self.n_epochs < 1 or self.batch_size < 1:
            raise ValueError(f"n_epochs and batch_size must be positive, got {self.n_epochs} and {self.batch_size}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1, got {self.momentum}")


def predict(train: Labelled, val: Labelled | None, test: Tensor, cfg: Config | None = None) -> Prediction:
    """See `fit`."""
    return fit(train, val, cfg).predict(test)


def fit(train: Labelled, val: Labelled | None, cfg: Config | None = None) -> Fitted:
    """A linear head trained with momentum, a cosine schedule down to 0 and no weight decay, from zero weights.

    The loss is cross-entropy (of fractions for segmentation; binary for several labels) or the squared error of
    standardised targets. The learning rate is the one whose last head is best on `val`, the smallest of equal ones.
    Without `val` it is chosen on a tenth of `train` that is held out, then used on all.

    Raises `ValueError` where every learning rate diverges, and in predicting where the head does.
    """
    cfg = cfg or Config()
    check_inputs("linear", KINDS, train, val)
    fitted_on, judged_on = hold_out(train, cfg.seed) if val is None else (train, val)
    lrs = sorted(cfg.lrs)
    heads = _Heads(fitted_on, lrs, cfg)
    found = [selection_score(scores, judged_on) for scores in heads.scores(judged_on.features)]  # [L]
    best = max(range(len(lrs)), key=found.__getitem__)
    if found[best] == -math.inf:
        raise ValueError(
            f"linear: training diverged at every one of lrs {lrs}; add smaller ones, or standardise the features"
        )
    chosen_heads, at = (_Heads(train, [lrs[best]], cfg), 0) if val is None else (heads, best)

    def scores(features: Tensor) -> Tensor:
        of_best = chosen_heads.scores(features)[at]  # [M, K]
        if not bool(of_best.isfinite().all()):
            raise ValueError(f"linear: scores at the learning rate {lrs[best]:g} are not finite; take smaller lrs")
        return of_best

    probabilities = None if train.kind == "regression" else partial(mean_response, train.kind)
    chosen = {"lr": lrs[best], "n_epochs": cfg.n_epochs, "at_edge": is_at_edge(lrs[best], lrs)}
    return Fitted(scores, probabilities, 0.0, chosen, train.features.shape[1])


class _Heads:
    """A head for each learning rate, trained on the same batches."""

    def __init__(self, train: Labelled, lrs: Sequence[float], cfg: Config) -> None:
        self._standardise = Standardiser(train.features) if cfg.standardise else None
        targets = indicators(train)  # [N, K]
        self._shift, self._scale = torch.zeros_like(targets[0]), torch.ones_like(targets[0])  # of scores
        if train.kind == "regression":
            self._shift, std = targets.mean(0), targets.std(0, correction=0)
            self._scale = torch.where(std > 0, std, 1.0)
        y = ((targets - self._shift) / self._scale).float()
        self._weights = self._train(self._inputs(train.features), y, train.kind, lrs, cfg)  # [D + 1, L, K]

    def scores(self, features: Tensor) -> Tensor:
        """`[L, M, K]` of `features [M, D]`, nan or infinite where training diverged."""
        scores = torch.einsum("md,dlk->lmk", self._inputs(features), self._weights)
        return scores * self._scale.float() + self._shift.float()

    def _inputs(self, features: Tensor) -> Tensor:
        """`[M, D + 1]`, the last of which is the constant 1."""
        x = features.float() if self._standardise is None else self._standardise(features).float()
        return torch.cat([x, x.new_ones(len(x), 1)], 1)

    @staticmethod
    def _train(x: Tensor, y: Tensor, kind: Kind, lrs: Sequence[float], cfg: Config) -> Tensor:
        rates = x.new_tensor(lrs)[:, None]  # [L, 1]
        weights = x.new_zeros(x.shape[1], len(lrs), y.shape[1])  # [D + 1, L, K]
        velocity = torch.zeros_like(weights)
        n_steps = cfg.n_epochs * -(-len(x) // cfg.batch_size)
        step = 0
        for epoch in range(cfg.n_epochs):
            order = torch.randperm(len(x), generator=torch_generator(cfg.seed, "linear", epoch)).to(x.device)
            for rows in torch.split(order, cfg.batch_size):
                inputs = x[rows]  # [B, D + 1]
                scores = (inputs @ weights.flatten(1)).view(-1, *weights.shape[1:])  # [B, L, K]
                error = mean_response(kind, scores) - y[rows][:, None]  # gradient of all three losses
                gradient = (inputs.T @ error.flatten(1)).view_as(weights) / len(rows)
                velocity.mul_(cfg.momentum).add_(gradient)
                decay = (1 + math.cos(math.pi * step / n_steps)) / 2
                weights.sub_(velocity * (rates * decay))
                step += 1
        return weights
