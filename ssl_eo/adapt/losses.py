"""Losses on labels: what is asked for by name, for a kind of labels, with weights for rare classes.

All are computed in float32, whatever comes in, and give a 0-d float32 tensor. Logits go in as decoders give them,
without a softmax or a sigmoid. Pixels of the class `ignore` touch neither value nor gradient, whatever their logits are
(nan too), and a batch of nothing else has loss 0 and gradient 0. Labels are not looked at on the host, which would wait
for the device: that they are classes from 0 to K - 1 is for `class_counts` to check once.

Sums are over one batch: of several processes, or of micro-batches, each divides by its own sum of weights. So their
mean is that of one large batch only where all have the same sum, and Dice is never that of the large batch.

B samples, K classes, `...` nothing or H W pixels, y labels, p softmax of the logits, w weights of classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_eo.adapt.class_weights import (
    RULES,
    Rule,
    given_positive_weights,
    given_weights,
    positive_weights,
    rule_weights,
)
from ssl_eo.components import suggest
from ssl_eo.eval.kinds import Kind

__all__ = ["LossConfig", "LossName", "build_loss", "check_loss", "cross_entropy", "dice"]

LossName = Literal["ce", "focal", "logit_adjusted", "dice", "ce_dice", "bce", "mse", "l1", "smooth_l1"]

_OF_KIND: dict[Kind, tuple[LossName, ...]] = {
    "classification": ("ce", "focal", "logit_adjusted"),
    "segmentation": ("ce", "focal", "logit_adjusted", "dice", "ce_dice"),
    "multilabel": ("bce",),
    "regression": ("mse", "l1", "smooth_l1"),
}
# Which losses read a key of the config; a value that nothing reads is an error.
_READ_BY: dict[str, tuple[LossName, ...]] = {
    "class_weights": ("ce", "focal", "ce_dice", "bce"),
    "max_weight_ratio": ("ce", "focal", "ce_dice", "bce"),
    "effective_beta": ("ce", "focal", "ce_dice"),
    "gamma": ("focal",),
    "smooth": ("dice", "ce_dice"),
    "tau": ("logit_adjusted",),
}
_REGRESSION: dict[LossName, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
}
_LEAST = torch.finfo(torch.float32).tiny


@dataclass
class LossConfig:
    """Which loss, and what it is weighted by. Every key but those of the named loss stays as it is.

    - `ce`: cross-entropy, sum of w_y (-log p_y) over sum of w_y.
    - `focal`: sum of w_y (1 - p_y)^gamma (-log p_y) over sum of w_y (Lin et al., arXiv 1708.02002, eq. 5, with a weight
      for each class, and divided as `ce` is, so that gamma 0 is `ce`).
    - `logit_adjusted`: `ce` of logits + tau log prior, with the priors of the training set (Menon et al., arXiv
      2007.07314, eq. 10), of classes that occur. Predict by the logits alone. It has no weights: both correct for the
      same thing.
    - `dice`: 1 - (2 sum p g + smooth) / (sum p + sum g + smooth), with g 1 for pixels of the class, summed over all
      pixels of the batch, mean over classes that are present (Drozdzal et al., arXiv 1608.04117, after Milletari et
      al., arXiv 1606.04797). It has no weights: each class counts once.
    - `ce_dice`: `ce` + `dice` (Isensee et al., arXiv 1809.10486); weights are those of `ce`.
    - `bce`: for each class -(w y log s + (1 - y) log(1 - s)), s the sigmoid, mean over samples and classes.
    - `mse`, `l1`, `smooth_l1`: means over samples; the last turns from squares to distances at 1.

    Weights have mean 1: by a rule of `class_weights.rule_weights`, or given. Those of `bce` are of samples with a class
    against those without: `balanced` is their ratio, and given ones are taken as they are.
    """

    name: LossName = "ce"  # which one; not all are for all kinds of labels
    class_weights: Rule | list[float] | None = None  # inverse, balanced, effective, median, or a number for each class
    max_weight_ratio: float = 20.0  # of a rule: the largest weight over the smallest
    effective_beta: float = 0.999  # of the rule effective: from 0, all classes alike, to below 1
    gamma: float = 2.0  # of focal: how much less a pixel counts that is right already
    smooth: float = 1.0  # of dice, in pixels
    tau: float = 1.0  # of logit_adjusted

    def __post_init__(self) -> None:
        names = get_args(LossName)
        if self.name not in names:
            raise ValueError(f"name must be one of {', '.join(names)}, got {self.name!r}{suggest(self.name, [*names])}")
        defaults = {f.name: f.default for f in fields(self)}
        for key, readers in _READ_BY.items():
            value = getattr(self, key)
            if value != defaults[key] and self.name not in readers:
                raise ValueError(f"{key} is of {', '.join(readers)}, got {value!r} with loss {self.name}; leave it out")
        if isinstance(self.class_weights, str) and self.class_weights not in RULES:
            given = self.class_weights
            raise ValueError(
                f"class_weights must be one of {', '.join(RULES)}, or a number for each class, got {given!r}"
                f"{suggest(given, list(RULES))}"
            )
        by_rule = isinstance(self.class_weights, str)
        if self.max_weight_ratio != defaults["max_weight_ratio"] and not by_rule:
            raise ValueError("max_weight_ratio limits weights of a rule: set class_weights to one, or leave it out")
        if self.effective_beta != defaults["effective_beta"] and self.class_weights != "effective":
            raise ValueError("effective_beta is of class_weights effective: set it so, or leave it out")
        self._check_numbers()

    def _check_numbers(self) -> None:
        if not 1.0 <= self.max_weight_ratio < math.inf:
            raise ValueError(f"max_weight_ratio must be finite and at least 1, got {self.max_weight_ratio}")
        if not 0.0 <= self.effective_beta < 1.0:
            raise ValueError(f"effective_beta must be in [0, 1), got {self.effective_beta}")
        for key in ("gamma", "smooth", "tau"):
            if not 0.0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be finite and not negative, got {getattr(self, key)}")


def check_loss(name: LossName, kind: Kind) -> None:
    """Raise `ValueError` unless the loss `name` is for labels of `kind`."""
    if name not in _OF_KIND[kind]:
        raise ValueError(f"loss {name} is not for {kind}; for {kind} there are {', '.join(_OF_KIND[kind])}")


def build_loss(
    cfg: LossConfig, kind: Kind, n_classes: int, class_counts: Tensor | None = None, ignore: int | None = None
) -> nn.Module:
    """The loss of `cfg` for labels of `kind`: a module whose `forward(logits, labels)` gives a 0-d float32 tensor.

    Logits are `[B, K]`, or `[B, K, H, W]` for maps, or `[B, 1]` for regression, where `n_classes` is of no account.
    Rules of weights and `logit_adjusted` need `class_counts`, those of `sampling.class_counts` on training labels.
    Raises `ValueError` for a loss that is not for `kind`, and for weights or pixels to ignore where there can be none.
    """
    check_loss(cfg.name, kind)
    if ignore is not None and kind != "segmentation":
        raise ValueError(f"ignore is of segmentation, got {ignore} with {kind}")
    if kind == "regression":
        return _Regression(_REGRESSION[cfg.name])
    if kind == "multilabel":
        return _BinaryCrossEntropy(_positive_weights(cfg, n_classes, class_counts))
    if n_classes < 2:
        raise ValueError(f"loss {cfg.name} compares classes: n_classes must be at least 2, got {n_classes}")
    if cfg.name == "dice":
        return _Dice(cfg.smooth, ignore)
    if cfg.name == "logit_adjusted":
        counts = _checked(class_counts, (n_classes,), "loss logit_adjusted").double()
        # A class without labels would be preferred to all others; unadjusted it is learned to be unlikely.
        log_prior = torch.where(counts > 0, (counts / counts.sum()).log(), 0.0)
        return _CrossEntropy(None, cfg.tau * log_prior, 0.0, ignore)
    gamma = cfg.gamma if cfg.name == "focal" else 0.0
    own = _CrossEntropy(_weights(cfg, n_classes, class_counts), None, gamma, ignore)
    return _Sum(own, _Dice(cfg.smooth, ignore)) if cfg.name == "ce_dice" else own


def cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore: int | None, gamma: float = 0.0
) -> Tensor:
    """Weighted cross-entropy of `logits [B, K, ...]` and `labels [B, ...]`, or focal loss where `gamma` is not 0."""
    logits, labels, counts = _masked(logits, labels, ignore)
    log_p = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)  # [B, ...], of the label
    weight = counts.float() if weights is None else weights[labels] * counts
    values = -log_p
    if gamma > 0.0:
        # The power of 0 has no finite slope below gamma 1.
        values = values * (-torch.expm1(log_p)).clamp_min(_LEAST) ** gamma
    return (weight * values).sum() / weight.sum().clamp_min(_LEAST)


def dice(logits: Tensor, labels: Tensor, smooth: float, ignore: int | None) -> Tensor:
    """Dice loss of `logits [B, K, H, W]` and `labels [B, H, W]`, mean over classes present in the batch."""
    logits, labels, counts = _masked(logits, labels, ignore)
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    truth = (labels[:, None] == classes) & counts[:, None]  # [B, K, H, W]
    p = logits.softmax(1) * counts[:, None]  # [B, K, H, W]
    n_true = truth.sum((0, 2, 3))  # [K]
    both, either = (p * truth).sum((0, 2, 3)), p.sum((0, 2, 3)) + n_true
    loss = 1.0 - (2.0 * both + smooth) / (either + smooth).clamp_min(_LEAST)  # [K]
    is_present = n_true > 0
    return (loss * is_present).sum() / is_present.sum().clamp_min(1)


def _masked(logits: Tensor, labels: Tensor, ignore: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 logits and int64 labels, both 0 at pixels to ignore, and `[B, ...]`, whether a pixel counts."""
    if logits.ndim < 2 or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}")
    if ignore is None:
        return logits.float(), labels.long(), torch.ones_like(labels, dtype=torch.bool)
    counts = labels != ignore
    return torch.where(counts[:, None], logits.float(), 0.0), torch.where(counts, labels, 0).long(), counts


class _CrossEntropy(nn.Module):
    """`cross_entropy` of logits + `offsets [K]`, with `weights [K]`."""

    def __init__(self, weights: Tensor | None, offsets: Tensor | None, gamma: float, ignore: int | None) -> None:
        super().__init__()
        self.gamma, self.ignore = gamma, ignore
        self.weights: Tensor | None
        self.offsets: Tensor | None
        self.register_buffer("weights", None if weights is None else weights.float())
        self.register_buffer("offsets", None if offsets is None else offsets.float())

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.offsets is not None:
            logits = logits.float() + self.offsets.view(-1, *(1 for _ in logits.shape[2:]))
        return cross_entropy(logits, labels, self.weights, self.ignore, self.gamma)


class _Dice(nn.Module):
    """`dice`."""

    def __init__(self, smooth: float, ignore: int | None) -> None:
        super().__init__()
        self.smooth, self.ignore = smooth, ignore

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return dice(logits, labels, self.smooth, self.ignore)


class _Sum(nn.Module):
    """The sum of several losses."""

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([loss(logits, labels) for loss in self.losses]).sum()


class _BinaryCrossEntropy(nn.Module):
    """Of each class against none, with `weights [K]` for samples that have it."""

    def __init__(self, weights: Tensor | None) -> None:
        super().__init__()
        self.weights: Tensor | None
        self.register_buffer("weights", None if weights is None else weights.float())

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape != labels.shape:
            raise ValueError(f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}")
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=self.weights)


class _Regression(nn.Module):
    """A mean over samples, of one number each."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape != (*labels.shape, 1):
            raise ValueError(f"labels of shape {list(labels.shape)} do not fit values of shape {list(logits.shape)}")
        return self.function(logits.squeeze(1).float(), labels.float())


def _weights(cfg: LossConfig, n_classes: int, counts: Tensor | None) -> Tensor | None:
    rule = cfg.class_weights
    if rule is None:
        return None
    if isinstance(rule, str):
        known = _checked(counts, (n_classes,), f"class_weights {rule}")
        return rule_weights(rule, known, cfg.max_weight_ratio, cfg.effective_beta)
    return given_weights(rule, n_classes)


def _positive_weights(cfg: LossConfig, n_classes: int, counts: Tensor | None) -> Tensor | None:
    rule = cfg.class_weights
    if rule is None:
        return None
    if rule == "balanced":
        return positive_weights(_checked(counts, (2, n_classes), "class_weights balanced"), cfg.max_weight_ratio)
    if isinstance(rule, str):
        raise ValueError(f"class_weights of loss bce must be balanced, or a number for each class, got {rule!r}")
    return given_positive_weights(rule, n_classes)


def _checked(counts: Tensor | None, shape: tuple[int, ...], what: str) -> Tensor:
    """`counts`, which `what` needs, of `shape`."""
    if counts is None:
        raise ValueError(f"{what} needs class_counts, how often each class occurs in training")
    if tuple(counts.shape) != shape:
        raise ValueError(f"{what} needs class_counts of shape {list(shape)}, got {list(counts.shape)}")
    return counts
