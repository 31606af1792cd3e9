"""Losses on labels against loops of float64 written from the formulae, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_eo.adapt.class_weights import RULES, given_weights, positive_weights, rule_weights
from ssl_eo.adapt.losses import LossConfig, LossName, build_loss
from ssl_eo.config import build
from ssl_eo.eval.kinds import Kind

B, K, H, W, IGNORE = 2, 4, 3, 5, 255
COUNTS = torch.tensor([400, 30, 7, 1])  # class 3 is not in the maps below
BY_CLASS = [0.5, 1.0, 2.0, 4.5]

Naive = Callable[[Tensor, Tensor], Tensor]


def drawn(*shape: int) -> Tensor:
    return 2.0 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def maps(n_ignored: int = 6) -> Tensor:
    """Most pixels of class 0, some of 1 and 2, none of 3."""
    labels = torch.zeros(B, H, W, dtype=torch.int16)
    labels[0, 0, :3], labels[1, 2, 1] = 1, 2
    labels.view(-1)[torch.arange(n_ignored) * 4 + 1] = IGNORE
    return labels


def images() -> Tensor:
    return torch.tensor([0, 0, 2, 0, 1, 0, 0])


def pixels(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, int]]:
    """Logits `[K]` and label of every pixel that counts."""
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return [(row, int(y)) for row, y in zip(rows, labels.flatten(), strict=True) if int(y) != IGNORE]


def weights_of(values: list[float]) -> list[float]:
    return [value * len(values) / sum(values) for value in values]


def naive_ce(weights: list[float], gamma: float = 0.0, offsets: list[float] | None = None) -> Naive:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        total, norm = torch.zeros((), dtype=torch.float64), 0.0
        for row, y in pixels(logits, labels):
            exps = (row if offsets is None else row + torch.tensor(offsets, dtype=torch.float64)).exp()
            p = exps[y] / exps.sum()
            total = total - weights[y] * (1 - p) ** gamma * p.log()
            norm += weights[y]
        return total / norm

    return loss


def naive_dice(smooth: float) -> Naive:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        found = pixels(logits, labels)
        terms = []
        for c in sorted({y for _, y in found}):
            p = [row.exp()[c] / row.exp().sum() for row, _ in found]
            both = sum(p_i for p_i, (_, y) in zip(p, found, strict=True) if y == c)
            either = sum(p) + sum(y == c for _, y in found)
            terms.append(1 - (2 * both + smooth) / (either + smooth))
        return torch.stack(terms).mean()

    return loss


def naive_ce_dice(logits: Tensor, labels: Tensor) -> Tensor:
    return naive_ce(weights_of(BY_CLASS))(logits, labels) + naive_dice(1.0)(logits, labels)


def naive_bce(weights: list[float]) -> Naive:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        terms = []
        for i in range(len(logits)):
            for k in range(K):
                s = 1 / (1 + (-logits[i, k]).exp())
                terms.append(-weights[k] * s.log() if labels[i, k] else -(1 - s).log())
        return torch.stack(terms).mean()

    return loss


def naive_regression(of_difference: Callable[[Tensor], Tensor]) -> Naive:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([of_difference(logits[i, 0] - labels[i]) for i in range(len(logits))]).mean()

    return loss


def log_prior(tau: float) -> list[float]:
    return [tau * math.log(int(n) / int(COUNTS.sum())) for n in COUNTS]


EVEN = [1.0] * K
# 1 / n, of at most 20 times the least, which is that of class 0.
INVERSE = weights_of([1 / 400, min(1 / 30, 1 / 20), min(1 / 7, 1 / 20), 1 / 20])
MULTILABEL = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.uint8)
MAP_LOSSES: dict[str, tuple[LossConfig, Naive]] = {
    "ce": (LossConfig(), naive_ce(EVEN)),
    "ce, given weights": (LossConfig(class_weights=BY_CLASS), naive_ce(weights_of(BY_CLASS))),
    "ce, a rule": (LossConfig(class_weights="inverse"), naive_ce(INVERSE)),
    "focal": (LossConfig("focal"), naive_ce(EVEN, 2.0)),
    "focal, below 1": (LossConfig("focal", gamma=0.5), naive_ce(EVEN, 0.5)),
    "focal, weights": (LossConfig("focal", class_weights="balanced", gamma=3.0), naive_ce(INVERSE, 3.0)),
    "logit_adjusted": (LossConfig("logit_adjusted"), naive_ce(EVEN, offsets=log_prior(1.0))),
    "logit_adjusted, tau": (LossConfig("logit_adjusted", tau=0.5), naive_ce(EVEN, offsets=log_prior(0.5))),
    "dice": (LossConfig("dice"), naive_dice(1.0)),
    "dice, not smooth": (LossConfig("dice", smooth=0.0), naive_dice(0.0)),
    "ce_dice": (LossConfig("ce_dice", class_weights=BY_CLASS), naive_ce_dice),
}
OTHER_LOSSES: dict[str, tuple[LossConfig, Kind, Tensor, Tensor, Naive]] = {
    "ce": (LossConfig(class_weights=BY_CLASS), "classification", images(), drawn(7, K), naive_ce(weights_of(BY_CLASS))),
    "focal": (LossConfig("focal"), "classification", images(), drawn(7, K), naive_ce(EVEN, 2.0)),
    "bce": (LossConfig("bce"), "multilabel", MULTILABEL, drawn(3, K), naive_bce(EVEN)),
    "bce, given": (
        LossConfig("bce", class_weights=BY_CLASS),
        "multilabel",
        MULTILABEL,
        drawn(3, K),
        naive_bce(BY_CLASS),
    ),
    "bce, balanced": (
        LossConfig("bce", class_weights="balanced"),
        "multilabel",
        MULTILABEL,
        drawn(3, K),
        naive_bce([9.0, 20.0, 1.0, 1 / 20]),
    ),
    "mse": (LossConfig("mse"), "regression", drawn(5), drawn(5, 1) + 0.3, naive_regression(lambda d: d * d)),
    "l1": (LossConfig("l1"), "regression", drawn(5), drawn(5, 1) + 0.3, naive_regression(lambda d: d.abs())),
    "smooth_l1": (
        LossConfig("smooth_l1"),
        "regression",
        drawn(5),
        drawn(5, 1) * 1.7 + 0.3,
        naive_regression(lambda d: 0.5 * d * d if d.abs() < 1 else d.abs() - 0.5),
    ),
}
POSITIVES = torch.tensor([[90, 990, 50, 0], [10, 10, 50, 100]])


def assert_same(cfg: LossConfig, kind: Kind, logits: Tensor, labels: Tensor, naive: Naive) -> None:
    counts = POSITIVES if kind == "multilabel" else COUNTS
    loss_of = build_loss(cfg, kind, K, counts, IGNORE if kind == "segmentation" else None)
    ours, theirs = logits.float().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = loss_of(ours, labels), naive(theirs, labels)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-7)
    (found,), (wanted,) = torch.autograd.grad(loss, [ours]), torch.autograd.grad(expected, [theirs])
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("case", MAP_LOSSES)
def test_losses_of_maps_are_their_formulae(case: str) -> None:
    cfg, naive = MAP_LOSSES[case]
    assert_same(cfg, "segmentation", drawn(B, K, H, W), maps(), naive)


@pytest.mark.parametrize("case", OTHER_LOSSES)
def test_losses_of_samples_are_their_formulae(case: str) -> None:
    cfg, kind, labels, logits, naive = OTHER_LOSSES[case]
    assert_same(cfg, kind, logits, labels, naive)


@pytest.mark.parametrize("case", MAP_LOSSES)
def test_ignored_pixels_touch_neither_value_nor_gradient(case: str) -> None:
    """Not even where their logits are not numbers."""
    loss_of = build_loss(MAP_LOSSES[case][0], "segmentation", K, COUNTS, IGNORE)
    labels, found = maps(), []
    ignored = (labels == IGNORE)[:, None].expand(B, K, H, W)
    for value in (0.0, 50.0, math.inf, math.nan):
        logits = torch.where(ignored, value, drawn(B, K, H, W).float()).requires_grad_()
        loss = loss_of(logits, labels)
        loss.backward()
        assert logits.grad is not None
        assert logits.grad[ignored].eq(0.0).all()
        found.append((loss.detach(), logits.grad))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("case", MAP_LOSSES)
def test_a_batch_without_labels_has_loss_and_gradient_zero(case: str) -> None:
    loss_of = build_loss(MAP_LOSSES[case][0], "segmentation", K, COUNTS, IGNORE)
    logits = drawn(B, K, H, W).float().requires_grad_()
    loss = loss_of(logits, torch.full((B, H, W), IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.eq(0.0).all()


def test_a_class_may_be_the_one_to_ignore() -> None:
    labels = maps(0)
    cfg = LossConfig("ce_dice")
    of_zero = build_loss(cfg, "segmentation", K, ignore=0)(drawn(B, K, H, W), labels)
    of_255 = build_loss(cfg, "segmentation", K, ignore=255)(drawn(B, K, H, W), labels.masked_fill(labels == 0, 255))
    assert torch.equal(of_zero, of_255)


def test_weights_change_the_focal_loss_of_imbalanced_labels() -> None:
    logits, labels = drawn(7, K), images()
    plain = build_loss(LossConfig("focal"), "classification", K)(logits, labels)
    weighted = build_loss(LossConfig("focal", class_weights="inverse"), "classification", K, COUNTS)(logits, labels)
    assert (weighted - plain).abs() > 0.1 * plain


def test_certain_and_half_precision_logits_have_finite_gradients() -> None:
    """p is 1 to the last bit, where a power of 1 - p has no slope."""
    for gamma in (0.3, 1.0, 2.0):
        logits = torch.tensor([[80.0, 0.0], [0.0, 80.0]], dtype=torch.bfloat16).requires_grad_()
        loss = build_loss(LossConfig("focal", gamma=gamma), "classification", 2)(logits, torch.tensor([0, 1]))
        loss.backward()
        assert loss.dtype == torch.float32
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_a_class_without_labels_is_not_adjusted_for() -> None:
    """Its prior of 0 would make it the class that raw logits prefer."""
    counts = torch.tensor([90, 10, 0, 0])
    loss_of = build_loss(LossConfig("logit_adjusted"), "classification", K, counts)
    logits = torch.zeros(1, K, requires_grad=True)
    loss_of(logits, torch.tensor([0])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 2] > logits.grad[0, 1] > 0


def test_weights_move_with_the_module() -> None:
    for cfg in (LossConfig(class_weights=BY_CLASS), LossConfig("logit_adjusted")):
        assert {b.device.type for b in build_loss(cfg, "classification", K, COUNTS).to("meta").buffers()} == {"meta"}


SUPPORTED = {
    "classification": {"ce", "focal", "logit_adjusted"},
    "segmentation": {"ce", "focal", "logit_adjusted", "dice", "ce_dice"},
    "multilabel": {"bce"},
    "regression": {"mse", "l1", "smooth_l1"},
}


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("name", get_args(LossName))
def test_a_loss_is_for_its_kinds_alone(kind: Kind, name: LossName) -> None:
    counts = POSITIVES if kind == "multilabel" else COUNTS
    if name in SUPPORTED[kind]:
        build_loss(LossConfig(name), kind, K, counts)
        return
    with pytest.raises(ValueError, match=f"loss {name} is not for {kind}; for {kind} there are"):
        build_loss(LossConfig(name), kind, K, counts)


UNREAD = {
    "class_weights": ("inverse", {"dice", "logit_adjusted", "mse", "l1", "smooth_l1"}),
    "gamma": (1.0, set(get_args(LossName)) - {"focal"}),
    "smooth": (0.5, set(get_args(LossName)) - {"dice", "ce_dice"}),
    "tau": (2.0, set(get_args(LossName)) - {"logit_adjusted"}),
    "max_weight_ratio": (5.0, {"dice", "logit_adjusted", "mse", "l1", "smooth_l1"}),
    "effective_beta": (0.9, set(get_args(LossName)) - {"ce", "focal", "ce_dice"}),
}


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, (_, names) in UNREAD.items() for name in sorted(names)])
def test_a_key_that_the_loss_does_not_read_is_refused(key: str, name: Any) -> None:
    with pytest.raises(ValueError, match=rf"{key} is of .*, got .* with loss {name}; leave it out"):
        LossConfig(name, **{key: UNREAD[key][0]})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "focall"}, "name must be one of ce, .*, got 'focall'; did you mean 'focal'"),
        ({"class_weights": "inverted"}, "class_weights must be one of .*, got 'inverted'; did you mean 'inverse'"),
        ({"max_weight_ratio": 5.0}, "max_weight_ratio limits weights of a rule"),
        ({"max_weight_ratio": 5.0, "class_weights": BY_CLASS}, "max_weight_ratio limits weights of a rule"),
        ({"max_weight_ratio": 0.5, "class_weights": "inverse"}, "max_weight_ratio must be finite and at least 1"),
        ({"effective_beta": 0.9, "class_weights": "inverse"}, "effective_beta is of class_weights effective"),
        ({"effective_beta": 1.0, "class_weights": "effective"}, r"effective_beta must be in \[0, 1\), got 1.0"),
        ({"name": "focal", "gamma": -1.0}, "gamma must be finite and not negative, got -1.0"),
        ({"name": "dice", "smooth": math.nan}, "smooth must be finite and not negative, got nan"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**keys)


@pytest.mark.parametrize(
    ("cfg", "kind", "counts", "message"),
    [
        (LossConfig(class_weights="inverse"), "classification", None, "class_weights inverse needs class_counts"),
        (LossConfig(class_weights="inverse"), "classification", COUNTS[:2], r"of shape \[4\], got \[2\]"),
        (LossConfig(class_weights="inverse"), "classification", COUNTS * 0, "class_counts are all 0"),
        (LossConfig("logit_adjusted"), "segmentation", None, "logit_adjusted needs class_counts"),
        (LossConfig("bce", class_weights="balanced"), "multilabel", COUNTS, r"of shape \[2, 4\], got \[4\]"),
        (LossConfig("bce", class_weights="median"), "multilabel", POSITIVES, "must be balanced, or a number for each"),
        (LossConfig(class_weights=[1.0, 2.0]), "classification", None, "class_weights must be 4 finite numbers"),
        (LossConfig(class_weights=[0.0] * 4), "classification", None, "not all 0"),
        (LossConfig("bce", class_weights=[1.0, -1.0, 1.0, 1.0]), "multilabel", None, "not negative"),
    ],
)
def test_weights_that_cannot_be_are_refused(cfg: LossConfig, kind: Kind, counts: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss(cfg, kind, K, counts)


def test_one_class_and_pixels_to_ignore_of_what_has_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n_classes must be at least 2, got 1$"):
        build_loss(LossConfig(), "segmentation", 1)
    with pytest.raises(ValueError, match="ignore is of segmentation, got 0 with regression"):
        build_loss(LossConfig("mse"), "regression", 1, ignore=0)


@pytest.mark.parametrize(
    ("name", "kind", "logits", "labels"),
    [
        ("ce", "segmentation", (2, 4, 8, 8), (2, 4, 4)),
        ("dice", "segmentation", (2, 4, 8, 8), (8, 8)),
        ("ce", "classification", (3, 4), (3, 4)),
        ("bce", "multilabel", (3, 4), (3,)),
        ("mse", "regression", (3,), (3,)),
        ("mse", "regression", (3, 3), (3,)),
    ],
)
def test_labels_that_do_not_fit_are_refused(name: Any, kind: Kind, logits: Any, labels: Any) -> None:
    """Broadcasting would compare every sample with every other."""
    loss_of = build_loss(LossConfig(name), kind, K)
    with pytest.raises(ValueError, match="do not fit"):
        loss_of(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))


def test_it_is_a_section_of_a_config() -> None:
    assert build(LossConfig, {"name": "ce", "class_weights": [1, 2.5]}, "loss") == LossConfig(class_weights=[1.0, 2.5])
    assert build(LossConfig, {"name": "focal", "class_weights": "median"}, "loss").class_weights == "median"
    with pytest.raises(ValueError, match=r"loss: gamma is of focal, got 1\.0 with loss ce"):
        build(LossConfig, {"gamma": 1.0}, "loss")


counted = st.lists(st.integers(0, 10**9), min_size=1, max_size=12).filter(any)


@settings(deadline=None)
@given(counted, st.sampled_from(RULES), st.floats(1.0, 1e4), st.sampled_from([0.0, 0.5, 0.999, 0.999999]))
def test_weights_have_mean_1_keep_to_the_limit_and_favour_the_rare(
    counts: list[int], rule: Any, max_ratio: float, beta: float
) -> None:
    weights = rule_weights(rule, torch.tensor(counts), max_ratio, beta)
    assert weights.isfinite().all()
    assert math.isclose(weights.mean(), 1.0, rel_tol=1e-12)
    of = {n: float(w) for n, w in zip(counts, weights, strict=True) if n}
    assert max(of.values()) <= max_ratio * min(of.values()) * (1 + 1e-12)
    ordered = [of[n] for n in sorted(of)]
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(ordered))
    assert all(w == 1.0 for n, w in zip(counts, weights, strict=True) if n == 0)


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1e6), min_size=2, max_size=8).filter(lambda values: sum(values) > 1e-3))
def test_given_weights_keep_their_ratios(values: list[float]) -> None:
    weights = given_weights(values, len(values))
    assert math.isclose(weights.mean(), 1.0, rel_tol=1e-12)
    torch.testing.assert_close(weights * sum(values) / len(values), torch.tensor(values, dtype=torch.float64))


def test_rules_by_hand() -> None:
    counts = torch.tensor([100, 10, 1])
    for rule in ("inverse", "balanced", "median"):
        weights = rule_weights(rule, counts, 1e9, 0.999)  # type: ignore[arg-type]
        torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    weights = rule_weights("effective", counts, 1e9, 0.9)
    expected = torch.tensor([0.1 / (1 - 0.9**n) for n in (100, 10, 1)], dtype=torch.float64)
    torch.testing.assert_close(weights / weights[0], expected / expected[0])
    torch.testing.assert_close(positive_weights(POSITIVES, 20.0), torch.tensor([9, 20, 1, 1 / 20]).double())
