"""Results side by side: means, margins and their intervals against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toy.results import N_RESAMPLES, N_TEST, outcome, record

from ssl_eo.eval.bootstrap import aggregate, paired_difference
from ssl_eo.eval.comparison import Comparison, read_ranges
from ssl_eo.eval.metrics import Regressed
from ssl_eo.eval.records import packed, unpacked


def test_margins_are_those_of_pairs() -> None:
    own, random, weak, strong = (outcome(n) for n in (48, 30, 20, 40))
    controls = {"band_statistics": weak, "texture_statistics": strong}
    records = [record("encoder", own), record("random_encoder", random)]
    records += [record(name, found) for name, found in controls.items()]
    margins = Comparison(records).margins("scenes", "ridge")
    assert [m.rival.title for m in margins] == ["random encoder", "texture statistics"]
    for found, rival in zip(margins, (random, strong), strict=True):
        gain, interval = paired_difference(own, rival, None, "accuracy", n_resamples=N_RESAMPLES)
        assert found.margin.gain == pytest.approx(gain)
        assert found.interval is not None
        assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_margins_of_errors_are_gains() -> None:
    targets = torch.linspace(0, 1, N_TEST)
    own, rival = (Regressed(targets + off * (-1) ** torch.arange(N_TEST), targets) for off in (0.1, 0.3))
    (margin,) = Comparison([record("encoder", own), record("band_statistics", rival)]).margins("scenes", "ridge")
    assert margin.margin.gain == pytest.approx(0.2)
    assert margin.interval is not None
    assert margin.interval.low > 0


def test_scores_of_other_samples_give_no_interval_and_a_flag() -> None:
    records = [record("encoder", outcome(40)), record("band_statistics", outcome(30), data={"test": "z"})]
    comparison = Comparison(records)
    (margin,) = comparison.margins("scenes", "ridge")
    assert margin.interval is None
    assert comparison.flags("scenes") == ["scores are of 2 different sets of test samples and do not compare"]


def test_the_interquartile_mean_is_of_all_tasks_or_absent() -> None:
    n_right = {"p": 6, "q": 12, "r": 36, "s": 54}  # accuracies of 0.1, 0.2, 0.6, 0.9
    records = [record("encoder", outcome(n), task=task) for task, n in n_right.items()]
    records += [record("encoder", outcome(60), "b", task=task) for task in "pqr"]
    a, b = Comparison(records).aggregates("ridge", None)
    assert a.mean == pytest.approx(0.4)
    assert a.over_samples is not None
    assert a.over_samples.low < 0.4 < a.over_samples.high
    assert a.over_seeds is None  # one seed says nothing of seeds
    assert (b.mean, b.n_tasks) == (None, 3)
    ranges = {"p": (0.0, 0.2), "q": (0.0, 0.2), "r": (0.5, 0.7), "s": (0.8, 1.0)}  # 0.5, 1, 0.5, 0.5 on one scale
    assert Comparison(records).aggregates("ridge", ranges)[0].mean == pytest.approx(0.5)
    assert Comparison(records).tasks_of_mean("ridge", {"p": (0.0, 0.2)}) == ["p"]


def test_seeds_are_averaged_and_resampled_within_tasks() -> None:
    right = {("p", 0): 12, ("p", 1): 18, ("q", 0): 40, ("q", 1): 50}
    records = [record("encoder", outcome(n), task=task, seed=seed) for (task, seed), n in right.items()]
    comparison = Comparison(records)
    score = comparison.score(comparison.entrants[0], "p", "ridge")
    assert score is not None
    assert score.value == pytest.approx(0.25)
    assert score.spread == pytest.approx(np.std([0.2, 0.3], ddof=1))
    mean, interval = aggregate({"p": [12 / 60, 18 / 60], "q": [40 / 60, 50 / 60]})
    (found,) = comparison.aggregates("ridge", None)
    assert (found.mean, found.over_seeds) == (pytest.approx(mean), interval)


def test_seeds_that_change_nothing_have_no_interval() -> None:
    comparison = Comparison([record("encoder", outcome(30), seed=seed) for seed in (0, 1)])
    assert comparison.aggregates("ridge", None)[0].over_seeds is None


def test_what_is_no_ratio_stays_out_of_a_plain_mean() -> None:
    targets = torch.linspace(0, 1, N_TEST)
    heights = record("encoder", Regressed(targets + 0.1, targets), task="heights")
    comparison = Comparison([record("encoder", outcome(30)), heights])
    assert comparison.tasks_of_mean("ridge", None) == ["scenes"]
    assert comparison.aggregates("ridge", None)[0].mean == pytest.approx(0.5)


def test_the_setting_compared_is_the_richest() -> None:
    variants = {"1.00x": 50, "0.10x": 20, "nested_1.00x": 10}
    records = [record("encoder", outcome(n), partition=part) for part, n in variants.items()]
    records += [record("encoder", outcome(5), subset="rgb"), record("encoder", outcome(7), tap="depth_0.50")]
    comparison = Comparison(records)
    (model,) = comparison.entrants
    at = {part: comparison.score(model, "scenes", "ridge", partition=part) for part in variants}
    assert {part: score.value for part, score in at.items() if score} == {p: n / N_TEST for p, n in variants.items()}
    score = comparison.score(model, "scenes", "ridge")
    assert score is not None
    assert score.value == 50 / N_TEST
    assert comparison.steps("scenes", "partition") == ["0.10x", "1.00x", "nested_1.00x"]


def test_what_was_measured_again_counts_once() -> None:
    later = record("encoder", outcome(40), date="2026-02-01T00:00:00+00:00")
    comparison = Comparison([later, record("encoder", outcome(10))])
    score = comparison.score(comparison.entrants[0], "scenes", "ridge")
    assert score is not None
    assert score.values == [40 / N_TEST]


def test_entrants_are_told_apart_and_no_more() -> None:
    other = {"encoder": {"size": "small"}}
    shared = [record(f, outcome(9), m) for m in "ab" for f in ("encoder", "random_encoder", "band_statistics")]
    assert [e.title for e in Comparison(shared).entrants] == ["a", "b", "random encoder", "band statistics"]
    apart = [{**r, **other} if r["model"] == "b" else r for r in shared]
    titles = [e.title for e in Comparison(apart).entrants]
    assert titles == ["a", "b", "random encoder as a", "random encoder as b", "band statistics"]
    for changes, expected in (
        ({"step": 90}, ["a, step 30", "a, step 90"]),
        ({}, ["a, step 30 (11aa)", "a, step 30 (99)"]),
    ):
        twice = [record("encoder", outcome(9)), record("encoder", outcome(9), weights="99", **changes)]
        assert [e.title for e in Comparison(twice).entrants] == expected


def test_margins_are_over_the_random_encoder_of_the_same_shape() -> None:
    records = [record("encoder", outcome(40), m) for m in "ab"] + [record("random_encoder", outcome(10))]
    records.append(record("random_encoder", outcome(20), "b", encoder={"size": "small"}))
    records[1] = {**records[1], "encoder": {"size": "small"}}
    margins = Comparison(records).margins("scenes", "ridge")
    assert [(m.model.title, m.margin.rival_score) for m in margins] == [("a", 10 / N_TEST), ("b", 20 / N_TEST)]


def test_a_task_ranked_by_two_metrics_is_refused() -> None:
    records = [record("encoder", outcome(9)), record("encoder", outcome(9), "b", metric="macro_f1")]
    with pytest.raises(ValueError, match="task scenes is ranked by accuracy and macro_f1"):
        Comparison(records)


def test_ranges_are_found_by_name_and_turned_for_errors(tmp_path: Path) -> None:
    path = tmp_path / "normalizer.json"
    path.write_text(json.dumps({"m-eurosat": [0.5, 0.9], "heights": [2, 6]}))
    found = read_ranges([path], {"geobench/m-eurosat": "accuracy", "heights": "rmse"})
    assert found == {"geobench/m-eurosat": (0.5, 0.9), "heights": (6, 2)}
    more = tmp_path / "more.json"
    more.write_text('{"scenes": [0, 1]}')
    tasks = {"scenes": "accuracy", "heights": "mae", "unknown": "accuracy"}
    assert read_ranges([path, more], tasks) == {"scenes": (0, 1), "heights": (6, 2)}
    with pytest.raises(ValueError, match=r"has m-eurosat, heights, but none of scenes; add their \[low, high\]"):
        read_ranges([path], {"scenes": "accuracy"})
    path.write_text('{"scenes": [0.9, 0.5]}')
    with pytest.raises(ValueError, match="the range of scenes must rise"):
        read_ranges([path], {"scenes": "accuracy"})
    path.write_text('{"scenes": 0.5}')
    with pytest.raises(ValueError, match=r"the range of scenes must be \[low, high\], got 0.5"):
        read_ranges([path], {"scenes": "accuracy"})
    path.write_text("[]")
    with pytest.raises(ValueError, match="got a list"):
        read_ranges([path], {"scenes": "accuracy"})
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_ranges([path], {"scenes": "accuracy"})


def test_packed_numbers_come_back_as_float32() -> None:
    values = np.random.default_rng(0).random(7)
    assert np.array_equal(unpacked(packed(values)), values.astype(np.float32))
