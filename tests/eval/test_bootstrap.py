"""Intervals: they hold the truth as often as they say, know which samples belong together, and repeat exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssl_eo.eval.bootstrap import (
    Interval,
    aggregate,
    interquartile_mean,
    intervals,
    normalised,
    paired_difference,
)
from ssl_eo.eval.metrics import Classified, Regressed
from ssl_eo.seeding import numpy_generator, torch_generator


def _errors(n: int, *address: int | str) -> Regressed:
    """Errors of a standard normal distribution; the mean of their absolute values is sqrt(2 / pi)."""
    errors = torch.randn(n, generator=torch_generator(*address), dtype=torch.float64)
    targets = torch.arange(n, dtype=torch.float64)
    return Regressed(targets + errors, targets)


def _classified(accuracy: float, n: int, *address: int | str) -> Classified:
    g = torch_generator(*address)
    labels = torch.arange(n) % 2
    is_right = torch.rand(n, generator=g) < accuracy
    return Classified(torch.where(is_right, labels, 1 - labels), labels, 2)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    n_sets, n_held = 200, 0
    for number in range(n_sets):
        interval = intervals(_errors(100, number), n_resamples=200, seed=number)["mae"]
        n_held += interval.low <= math.sqrt(2 / math.pi) <= interval.high
    # Of 200 intervals at 95 %, whose count has a standard deviation of 3.1, and a little too narrow as percentiles are.
    assert 181 <= n_held <= 198


def test_clustered_intervals_hold_the_truth_and_others_do_not() -> None:
    n_sets, n_places, n_repeats, n_held, n_held_unclustered = 100, 40, 5, 0, 0
    groups = [place for place in range(n_places) for _ in range(n_repeats)]
    for number in range(n_sets):
        # Samples of a place have the same error: 40 independent errors, not 200.
        errors = torch.randn(n_places, generator=torch_generator(number, "places"), dtype=torch.float64)
        outcome = Regressed(errors.repeat_interleave(n_repeats), torch.zeros(n_places * n_repeats))
        clustered = intervals(outcome, groups, n_resamples=150)["mae"]
        unclustered = intervals(outcome, n_resamples=150)["mae"]
        n_held += clustered.low <= math.sqrt(2 / math.pi) <= clustered.high
        n_held_unclustered += unclustered.low <= math.sqrt(2 / math.pi) <= unclustered.high
    assert 87 <= n_held <= 99
    assert n_held_unclustered <= 75


def test_samples_that_were_copied_add_nothing_when_grouped() -> None:
    single = _errors(60, 0)
    copied = Regressed(single.predicted.repeat(4), single.targets.repeat(4))
    grouped = intervals(copied, groups=[f"place {i}" for i in range(60)] * 4)
    for metric, expected in intervals(single).items():
        assert grouped[metric].low == pytest.approx(expected.low, rel=1e-12)
        assert grouped[metric].high == pytest.approx(expected.high, rel=1e-12)
    naive, honest = intervals(copied)["mae"], grouped["mae"]
    assert (honest.high - honest.low) / (naive.high - naive.low) == pytest.approx(2.0, rel=0.15)


def test_groups_of_one_sample_are_samples() -> None:
    outcome = _classified(0.8, 50, 0)
    assert intervals(outcome, groups=list(range(50))) == intervals(outcome)


def test_intervals_equal_those_of_scipy() -> None:
    outcome = _classified(0.8, 200, 0)
    right = (outcome.predicted == outcome.labels).numpy().astype(float)
    for level in (0.5, 0.95):
        found = intervals(outcome, n_resamples=4000, level=level)["accuracy"]
        rng = numpy_generator(1, "reference")
        expected = stats.bootstrap(
            (right,), np.mean, n_resamples=4000, confidence_level=level, method="percentile", random_state=rng
        ).confidence_interval
        assert found.low == pytest.approx(expected.low, abs=0.006)
        assert found.high == pytest.approx(expected.high, abs=0.006)


def test_the_seed_decides() -> None:
    outcome = _errors(30, 0)
    assert intervals(outcome, n_resamples=50) == intervals(outcome, n_resamples=50)
    assert intervals(outcome, n_resamples=50) != intervals(outcome, n_resamples=50, seed=1)


def test_undefined_resamples_are_left_out_and_counted() -> None:
    # Of two samples every second resample holds one of them twice, and has no spread for r2.
    outcome = Regressed(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))
    found = intervals(outcome)
    assert 430 <= found["r2"].n_undefined <= 570
    assert found["r2"].low == found["r2"].high == pytest.approx(0.5)
    assert found["mae"] == Interval(0.0, 1.0, 0)


@pytest.mark.parametrize("groups", [["one place"] * 20, None])
def test_one_place_or_sample_says_nothing_of_others(groups: list[str] | None) -> None:
    outcome = _errors(20 if groups else 1, 0)
    for interval in intervals(outcome, groups, n_resamples=10).values():
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
        assert interval.n_undefined == 10


def test_pairs_share_their_resamples() -> None:
    a = _classified(0.9, 300, "a")
    # The other encoder is wrong at the same samples and at 15 more.
    predicted = a.predicted.clone()
    worse = (a.predicted == a.labels).nonzero()[:15, 0]
    predicted[worse] = 1 - predicted[worse]
    b = Classified(predicted, a.labels, 2)
    difference, interval = paired_difference(a, b, None, "accuracy", n_resamples=2000)
    assert difference == pytest.approx(0.05)
    # The difference of each sample is 1 at those 15 and 0 elsewhere: a binomial share.
    low, high = stats.binom.ppf([0.025, 0.975], 300, 0.05) / 300
    assert interval.low == pytest.approx(low, abs=0.004)
    assert interval.high == pytest.approx(high, abs=0.004)
    ours, theirs = intervals(a)["accuracy"], intervals(b)["accuracy"]
    assert interval.low > ours.low - theirs.high  # apart, the two intervals would overlap
    assert ours.low < theirs.high
    assert paired_difference(a, a, None, "kappa", n_resamples=20) == (0.0, Interval(0.0, 0.0, 0))


def test_pairs_take_groups() -> None:
    a, b = _classified(0.9, 60, "a"), _classified(0.6, 60, "b")
    copies = [Classified(o.predicted.repeat(3), o.labels.repeat(3), 2) for o in (a, b)]
    expected = paired_difference(a, b, None, "accuracy", n_resamples=100)
    difference, interval = paired_difference(*copies, list(range(60)) * 3, "accuracy", n_resamples=100)
    assert difference == pytest.approx(expected[0])
    assert (interval.low, interval.high) == pytest.approx((expected[1].low, expected[1].high))


def test_pairs_of_other_samples_are_refused() -> None:
    a = _classified(0.9, 20, "a")
    reordered = Classified(a.predicted.roll(1), a.labels.roll(1), 2)
    with pytest.raises(ValueError, match="same samples in the same order"):
        paired_difference(a, reordered, None, "accuracy")
    with pytest.raises(ValueError, match=r"no 'ece' in both outcomes \(accuracy, macro_accuracy"):
        paired_difference(a, a, None, "ece")


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=13))
def test_interquartile_mean_is_the_trimmed_mean_with_fractions(values: list[float]) -> None:
    # Of four copies of everything a quarter is a whole number, and cutting it is what scipy does.
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values * 4, 0.25), abs=1e-9)


def test_interquartile_mean_by_hand() -> None:
    assert interquartile_mean([8.0, 1.0, 2.0, 100.0]) == 5.0
    assert interquartile_mean([0.0, 1.0, 100.0]) == pytest.approx((0.25 * 0 + 1 + 0.25 * 100) / 1.5)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="at least one value, all of them finite"):
            interquartile_mean(bad)


@settings(max_examples=50, deadline=None)
@given(scores=st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=4), min_size=1, max_size=6))
def test_data_sets_weigh_the_same_whatever_their_numbers_of_seeds(scores: list[list[float]]) -> None:
    # 12 values of each, and four copies of those, so that a quarter is a whole number of them.
    copies = [value for values in scores for value in values * (12 // len(values)) * 4]
    found, _ = aggregate({str(i): values for i, values in enumerate(scores)}, n_resamples=1)
    assert found == pytest.approx(stats.trim_mean(copies, 0.25), abs=1e-9)


def test_equal_numbers_of_seeds_are_pooled_as_published() -> None:
    scores = numpy_generator(0, "equal").normal(size=(7, 3))
    found, _ = aggregate({str(i): row.tolist() for i, row in enumerate(scores)}, n_resamples=1)
    assert found == interquartile_mean(scores.flatten().tolist())


def test_aggregate_resamples_within_each_data_set() -> None:
    # Pools are [a, b, 5, 5] with a and b drawn from {0, 1}; the middle half is (max(a, b) + 5) / 2: 3 in three of four.
    scores = {"m-eurosat": [0.0, 1.0], "m-so2sat": [5.0, 5.0]}
    mean, interval = aggregate(scores)
    assert (mean, interval) == (3.0, Interval(2.5, 3.0, 0))
    assert aggregate(scores, level=0.4)[1] == Interval(3.0, 3.0, 0)
    # Data sets differ, seeds do not: no other seed would have come out otherwise.
    assert aggregate({"a": [0.1, 0.1], "b": [0.9, 0.9], "c": [0.5, 0.5]})[1] == Interval(0.5, 0.5, 0)


def test_aggregate_does_not_depend_on_the_order_of_data_sets() -> None:
    rng = numpy_generator(0, "scores")
    scores = {name: rng.normal(size=n).tolist() for name, n in (("a", 5), ("b", 3), ("c", 1))}
    mean, interval = aggregate(scores, n_resamples=200)
    assert aggregate(dict(reversed(scores.items())), n_resamples=200) == (mean, interval)
    assert aggregate(scores, n_resamples=200, seed=1)[1] != interval
    copies = [v for values in scores.values() for v in values * (15 // len(values))]
    assert mean == pytest.approx(interquartile_mean(copies), abs=1e-12)
    assert interval.low < mean < interval.high


def test_one_seed_each_has_no_interval() -> None:
    mean, interval = aggregate({"a": [0.2], "b": [0.6]}, n_resamples=10)
    assert mean == pytest.approx(0.4)
    assert math.isnan(interval.low)
    assert interval.n_undefined == 10


def test_normalised() -> None:
    assert normalised(0.6, 0.2, 1.0) == pytest.approx(0.5)
    assert normalised(1.5, 2.0, 1.0) == pytest.approx(0.5)  # an error: 2 is the bad end
    assert normalised(0.0, 0.5, 1.0) == -1.0
    with pytest.raises(ValueError, match=r"must be finite and differ, got 0\.5 and 0\.5"):
        normalised(0.1, 0.5, 0.5)


def test_what_does_not_fit_is_refused() -> None:
    outcome = _errors(5, 0)
    with pytest.raises(ValueError, match="each of the 5 samples, got 4"):
        intervals(outcome, groups=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="n_resamples must be at least 1"):
        intervals(outcome, n_resamples=0)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95"):
        intervals(outcome, level=95)
    with pytest.raises(ValueError, match="scores: no value of b"):
        aggregate({"a": [1.0], "b": []})
    with pytest.raises(ValueError, match="scores: values of b are not finite"):
        aggregate({"a": [1.0], "b": [1.0, math.nan]})
