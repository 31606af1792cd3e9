"""Intervals: they hold the truth as often as they say, know which samples belong together, and repeat exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssl_eo.eval.bootstrap import (
    FEWEST_SEEDS,
    Interval,
    equal_shares,
    interquartile_mean,
    interval_of,
    interval_over_seeds,
    normalised,
    resampled_scores,
)
from ssl_eo.eval.metrics import Classified, Outcome, Regressed
from ssl_eo.seeding import numpy_generator, torch_generator


def _intervals(
    outcome: Outcome,
    groups: Sequence[str | int] | None = None,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    resampled = resampled_scores(outcome, groups, n_resamples, seed)
    return {metric: interval_of(values, level) for metric, values in resampled.items()}


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
        interval = _intervals(_errors(100, number), n_resamples=200, seed=number)["mae"]
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
        clustered = _intervals(outcome, groups, n_resamples=150)["mae"]
        unclustered = _intervals(outcome, n_resamples=150)["mae"]
        n_held += clustered.low <= math.sqrt(2 / math.pi) <= clustered.high
        n_held_unclustered += unclustered.low <= math.sqrt(2 / math.pi) <= unclustered.high
    assert 87 <= n_held <= 99
    assert n_held_unclustered <= 75


def test_samples_that_were_copied_add_nothing_when_grouped() -> None:
    single = _errors(60, 0)
    copied = Regressed(single.predicted.repeat(4), single.targets.repeat(4))
    grouped = _intervals(copied, groups=[f"place {i}" for i in range(60)] * 4)
    for metric, expected in _intervals(single).items():
        assert grouped[metric].low == pytest.approx(expected.low, rel=1e-12)
        assert grouped[metric].high == pytest.approx(expected.high, rel=1e-12)
    naive, honest = _intervals(copied)["mae"], grouped["mae"]
    assert (honest.high - honest.low) / (naive.high - naive.low) == pytest.approx(2.0, rel=0.15)


def test_groups_of_one_sample_are_samples() -> None:
    outcome = _classified(0.8, 50, 0)
    assert _intervals(outcome, groups=list(range(50))) == _intervals(outcome)


def test_intervals_equal_those_of_scipy() -> None:
    outcome = _classified(0.8, 200, 0)
    right = (outcome.predicted == outcome.labels).numpy().astype(float)
    for level in (0.5, 0.95):
        found = _intervals(outcome, n_resamples=4000, level=level)["accuracy"]
        rng = numpy_generator(1, "reference")
        expected = stats.bootstrap(
            (right,), np.mean, n_resamples=4000, confidence_level=level, method="percentile", random_state=rng
        ).confidence_interval
        assert found.low == pytest.approx(expected.low, abs=0.006)
        assert found.high == pytest.approx(expected.high, abs=0.006)


def test_the_seed_decides() -> None:
    outcome = _errors(30, 0)
    assert _intervals(outcome, n_resamples=50) == _intervals(outcome, n_resamples=50)
    assert _intervals(outcome, n_resamples=50) != _intervals(outcome, n_resamples=50, seed=1)


def test_undefined_resamples_are_left_out_and_counted() -> None:
    # Of two samples every second resample holds one of them twice, and has no spread for r2.
    outcome = Regressed(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))
    found = _intervals(outcome)
    assert 430 <= found["r2"].n_undefined <= 570
    assert found["r2"].low == found["r2"].high == pytest.approx(0.5)
    assert found["mae"] == Interval(0.0, 1.0, 0)


@pytest.mark.parametrize("groups", [["one place"] * 20, None])
def test_one_place_or_sample_says_nothing_of_others(groups: list[str] | None) -> None:
    outcome = _errors(20 if groups else 1, 0)
    for interval in _intervals(outcome, groups, n_resamples=10).values():
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
        assert interval.n_undefined == 10


def _difference(a: Outcome, b: Outcome, groups: Sequence[int] | None, n_resamples: int) -> Interval:
    """Of the accuracies of two outcomes on the same resamples."""
    first, second = (resampled_scores(outcome, groups, n_resamples)["accuracy"] for outcome in (a, b))
    return interval_of(first - second)


def test_outcomes_of_the_same_samples_share_their_resamples() -> None:
    a = _classified(0.9, 300, "a")
    # The other encoder is wrong at the same samples and at 15 more.
    predicted = a.predicted.clone()
    worse = (a.predicted == a.labels).nonzero()[:15, 0]
    predicted[worse] = 1 - predicted[worse]
    b = Classified(predicted, a.labels, 2)
    interval = _difference(a, b, None, 2000)
    # The difference of each sample is 1 at those 15 and 0 elsewhere: a binomial share.
    low, high = stats.binom.ppf([0.025, 0.975], 300, 0.05) / 300
    assert interval.low == pytest.approx(low, abs=0.004)
    assert interval.high == pytest.approx(high, abs=0.004)
    ours, theirs = _intervals(a)["accuracy"], _intervals(b)["accuracy"]
    assert interval.low > ours.low - theirs.high  # apart, the two intervals would overlap
    assert ours.low < theirs.high


def test_they_share_them_by_groups_too() -> None:
    a, b = _classified(0.9, 60, "a"), _classified(0.6, 60, "b")
    first, second = (Classified(o.predicted.repeat(3), o.labels.repeat(3), 2) for o in (a, b))
    expected, found = _difference(a, b, None, 100), _difference(first, second, list(range(60)) * 3, 100)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_what_resampling_takes_for_error_has_no_interval() -> None:
    """Of a calibrated probe nearly all resamples have a greater calibration error than the sample has."""
    g = torch_generator("calibrated")
    top = 0.5 + 0.5 * torch.rand(200, generator=g, dtype=torch.float64)
    labels = (torch.rand(200, generator=g, dtype=torch.float64) > top).long()
    outcome = Classified(torch.zeros(200, dtype=torch.long), labels, 2, torch.stack([top, 1 - top], 1))
    draws = numpy_generator(0, "draws").integers(200, size=(100, 200))
    errors = [outcome.scores(torch.from_numpy(np.bincount(rows, minlength=200).astype(float)))["ece"] for rows in draws]
    assert np.mean(np.array(errors) > outcome.scores()["ece"]) > 0.9
    found = _intervals(outcome, n_resamples=20)
    assert {metric for metric, interval in found.items() if math.isnan(interval.low)} == {"ece", "worst_class_recall"}


def test_a_class_that_a_resample_lacks_is_in_no_mean_of_it() -> None:
    """Of class 1 there is one sample, always wrong: about a third of the resamples do not hold it."""
    labels = torch.tensor([0] * 19 + [1])
    resampled = resampled_scores(Classified(torch.zeros(20, dtype=torch.long), labels, 2))["macro_accuracy"]
    assert set(resampled.tolist()) == {0.5, 1.0}
    assert float((resampled == 1.0).mean()) == pytest.approx((19 / 20) ** 20, abs=0.05)


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
    found = interquartile_mean([value for values in scores for value in values], equal_shares(list(map(len, scores))))
    assert found == pytest.approx(stats.trim_mean(copies, 0.25), abs=1e-9)


def test_equal_numbers_of_seeds_are_pooled_as_published() -> None:
    scores = numpy_generator(0, "equal").normal(size=(7, 3)).flatten().tolist()
    assert interquartile_mean(scores, equal_shares([3] * 7)) == interquartile_mean(scores)


@pytest.mark.parametrize("n_seeds", [3, 4, 5, 10, 31])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_intervals_over_seeds_are_those_of_scipy(n_seeds: int, level: float) -> None:
    values = numpy_generator(0, "seeds").normal(0.7, 0.02, size=n_seeds)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    found = interval_over_seeds(float(values.mean()), values.tolist(), level)
    assert (found.low, found.high, found.n_undefined) == (pytest.approx(expected.low), pytest.approx(expected.high), 0)


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_intervals_over_seeds_hold_the_truth_as_often_as_they_say(n_seeds: int) -> None:
    draws = numpy_generator(0, "coverage", n_seeds).normal(0.7, 0.02, size=(1000, n_seeds))
    found = [interval_over_seeds(float(row.mean()), row.tolist()) for row in draws]
    # Of 1,000 at 95 %, whose count has a standard deviation of 6.9.
    assert 930 <= sum(interval.low <= 0.7 <= interval.high for interval in found) <= 970


def test_too_few_seeds_have_no_interval() -> None:
    for values in ([], [0.2], [0.2, 0.6]):
        assert len(values) < FEWEST_SEEDS
        interval = interval_over_seeds(0.4, values)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)


def test_normalised() -> None:
    assert normalised(0.6, 0.2, 1.0) == pytest.approx(0.5)
    assert normalised(1.5, 2.0, 1.0) == pytest.approx(0.5)  # an error: 2 is the bad end
    assert normalised(0.0, 0.5, 1.0) == -1.0
    with pytest.raises(ValueError, match=r"must be finite and differ, got 0\.5 and 0\.5"):
        normalised(0.1, 0.5, 0.5)


def test_what_does_not_fit_is_refused() -> None:
    outcome = _errors(5, 0)
    with pytest.raises(ValueError, match="each of the 5 samples, got 4"):
        _intervals(outcome, groups=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="n_resamples must be at least 1"):
        _intervals(outcome, n_resamples=0)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95"):
        _intervals(outcome, level=95)
