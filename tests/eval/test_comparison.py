"""Results side by side: means, margins and their intervals against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy.results import N_RESAMPLES, N_TEST, outcome, problem, record

from ssl_eo.eval.aggregates import aggregates, mean_ranks, read_ranges, tasks_of_mean, tasks_of_rank
from ssl_eo.eval.bootstrap import aggregate, paired_difference
from ssl_eo.eval.comparison import Comparison
from ssl_eo.eval.experiments import Score
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


def test_the_interquartile_mean_is_of_all_tasks_or_absent() -> None:
    n_right = {"p": 6, "q": 12, "r": 36, "s": 54}  # accuracies of 0.1, 0.2, 0.6, 0.9
    records = [record("encoder", outcome(n), task=task) for task, n in n_right.items()]
    records += [record("encoder", outcome(60), "b", task=task) for task in "pqr"]
    a, b = aggregates(Comparison(records), "ridge", None)
    assert a.interquartile_mean == pytest.approx(0.4)
    assert a.over_samples is not None
    assert a.over_samples.low < 0.4 < a.over_samples.high
    assert a.over_seeds is None  # one seed says nothing of seeds
    assert (b.interquartile_mean, b.n_tasks) == (None, 3)
    ranges = {"p": (0.0, 0.2), "q": (0.0, 0.2), "r": (0.5, 0.7), "s": (0.8, 1.0)}  # 0.5, 1, 0.5, 0.5 on one scale
    assert aggregates(Comparison(records), "ridge", ranges)[0].interquartile_mean == pytest.approx(0.5)
    assert tasks_of_mean(Comparison(records), "ridge", {"p": (0.0, 0.2)}) == ["p"]


def test_seeds_are_averaged_and_resampled_within_tasks() -> None:
    right = {("p", 0): 12, ("p", 1): 18, ("q", 0): 40, ("q", 1): 50}
    records = [record("encoder", outcome(n), task=task, seed=seed) for (task, seed), n in right.items()]
    comparison = Comparison(records)
    score = comparison.score(comparison.entrants[0], "p", "ridge")
    assert score is not None
    assert score.value == pytest.approx(0.25)
    assert score.spread == pytest.approx(np.std([0.2, 0.3], ddof=1))
    mean, interval = aggregate({"p": [12 / 60, 18 / 60], "q": [40 / 60, 50 / 60]})
    (found,) = aggregates(comparison, "ridge", None)
    assert (found.interquartile_mean, found.over_seeds) == (pytest.approx(mean), interval)


def test_seeds_that_change_nothing_have_no_interval() -> None:
    comparison = Comparison([record("encoder", outcome(30), seed=seed) for seed in (0, 1)])
    assert aggregates(comparison, "ridge", None)[0].over_seeds is None


def test_what_is_no_ratio_stays_out_of_a_plain_mean() -> None:
    targets = torch.linspace(0, 1, N_TEST)
    heights = record("encoder", Regressed(targets + 0.1, targets), task="heights")
    comparison = Comparison([record("encoder", outcome(30)), heights])
    assert tasks_of_mean(comparison, "ridge", None) == ["scenes"]
    assert aggregates(comparison, "ridge", None)[0].interquartile_mean == pytest.approx(0.5)


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


def _score(comparison: Comparison, title: str, task: str = "scenes", probe: str = "ridge") -> Score | None:
    (entrant,) = [e for e in comparison.entrants if e.title == title]
    return comparison.score(entrant, task, probe)


def _n_right(comparison: Comparison) -> dict[str, int | None]:
    """Of every entrant, as it is compared."""
    scores = {e.title: _score(comparison, e.title) for e in comparison.entrants}
    return {title: None if s is None else round(s.value * N_TEST) for title, s in scores.items()}


def test_each_model_is_read_in_its_own_way() -> None:
    records = [record("encoder", outcome(40), pool="cls"), record("band_statistics", outcome(9))]
    records += [record("encoder", outcome(n), "b", tap=f"depth_{t}") for t, n in (("0.25", 31), ("0.50", 30))]
    comparison = Comparison(records)
    assert _n_right(comparison) == {"a": 40, "b": 30, "band statistics": 9}
    readings = [comparison.reading(e, ["scenes"], ["ridge"]) for e in comparison.entrants]
    assert readings == ["read at last, cls", "read at depth 0.50, mean", ""]
    assert len(aggregates(comparison, "ridge", None)) == 3
    assert all(a.mean is not None for a in aggregates(comparison, "ridge", None))

    together = Comparison(
        [*records, record("encoder", outcome(20), "b", tap="all"), record("encoder", outcome(19), "b")]
    )
    assert _n_right(together)["b"] == 20
    alike = Comparison([record("encoder", outcome(9), m) for m in "ab"])
    assert [alike.reading(e, ["scenes"], ["ridge"]) for e in alike.entrants] == ["", ""]


def test_the_random_encoder_is_read_where_it_is_best() -> None:
    records = [record("encoder", outcome(40), tap=tap) for tap in ("all", "last")]
    records += [record("random_encoder", outcome(n), tap=tap) for tap, n in (("all", 10), ("last", 30))]
    (margin,) = Comparison(records).margins("scenes", "ridge")
    assert margin.margin.rival_score == 30 / N_TEST
    assert margin.reading == "read at last, mean"


def test_controls_that_see_cells_are_read_by_their_size() -> None:
    records = [record("encoder", outcome(40), pool=None)]
    alone = [*records, record("band_statistics", outcome(20), cell_px=14)]
    both = [*alone, record("band_statistics", outcome(30), cell_px=16)]
    for found, n_right, reading in ((alone, 20, ""), (both, 30, "read at pixels, cells of 16 px")):
        comparison = Comparison(found)
        (margin,) = comparison.margins("scenes", "ridge")
        assert margin.margin.rival_score == n_right / N_TEST
        assert margin.reading == reading
        assert comparison.flags("scenes") == []
    said = [comparison.reading(e, ["scenes"], ["ridge"]) for e in comparison.entrants]
    assert said == ["", "read at pixels, cells of 14 px"]


def test_conditions_are_those_of_most_entrants_and_who_lacks_them_is_named() -> None:
    records = [record("encoder", outcome(n), m, partition="0.10x") for m, n in (("a", 20), ("b", 21))]
    records += [record("encoder", outcome(50), partition="1.00x")]
    records += [record("band_statistics", outcome(9), partition="1.00x", size="224", subset="rgb")]
    comparison = Comparison(records)
    assert [comparison.condition("scenes", axis) for axis in ("partition", "subset", "size")] == [
        "0.10x",
        "all",
        "task",
    ]
    assert _n_right(comparison) == {"a": 20, "b": 21, "band statistics": None}
    control = comparison.entrants[-1]
    assert comparison.absence(control, "scenes", "ridge") == "only with labels 1.00x, bands rgb, size 224"
    assert comparison.absence(control, "scenes", "knn") == "not measured"
    assert [a.mean is None for a in aggregates(comparison, "ridge", None)] == [False, False, True]


def test_seeds_of_other_experiments_are_not_averaged() -> None:
    old, new = {"date": "2026-01-01", "version": "1"}, {"date": "2026-03-01", "version": "2"}
    records = [record("encoder", outcome(20 + seed), seed=seed, **old) for seed in (0, 1)]
    going_on = Comparison([*records, record("encoder", outcome(40), seed=0, **new)])
    whole = Comparison([*records, *(record("encoder", outcome(40 + seed), seed=seed, **new) for seed in (0, 1))])
    for comparison, n_right, day in ((going_on, (20, 21), "2026-01-01"), (whole, (40, 41), "2026-03-01")):
        score = _score(comparison, "a")
        assert score is not None
        assert score.values == [n / N_TEST for n in n_right]
        assert comparison.flags("scenes") == [
            "a has results of several experiments by ridge, which differ in version: shown is the newest whole one,"
            f" of {day}"
        ]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"train": "z", "test": "y"}},
        {"content": {"train": "1", "test": "2"}},
        {"classes": ["sea", "town", "wood"]},
        {"n_resamples": 7, "resampled": packed(np.zeros(7))},
        {"code": "c0de"},
        {"options": {"n_neighbours": 5}},
        {"sources": {"train": {"name": "toy"}}},
        {"bands": ["red"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_differs_in_more_than_the_seed_is_another_experiment(changes: dict[str, Any]) -> None:
    comparison = Comparison([record("encoder", outcome(10)), record("encoder", outcome(40), seed=1, **changes)])
    score = _score(comparison, "a")
    assert score is not None
    assert score.values == [40 / N_TEST]
    assert f"differ in {next(iter(changes))}" in comparison.flags("scenes")[0]


def test_random_bands_may_differ_between_seeds() -> None:
    records = [record("encoder", outcome(9), subset="random", seed=i, bands=[f"b{i}"]) for i in (0, 1)]
    assert Comparison(records).flags("scenes") == []


def test_scores_of_other_test_samples_are_not_compared() -> None:
    for here, other in (
        ({"data": {"test": "y"}}, {"data": {"test": "z"}}),
        ({"content": {"test": "y"}}, {"content": {"test": "z"}}),
    ):
        records = [record("encoder", outcome(40), **here), record("encoder", outcome(50), "b", **other)]
        records += [record(name, outcome(30), **here) for name in ("random_encoder", "band_statistics")]
        comparison = Comparison(records)
        assert {m.model.title for m in comparison.margins("scenes", "ridge")} == {"a"}
        assert "scored on other test samples than the rest, and not compared with it: b" in comparison.flags("scenes")
        found = {a.entrant.title: a.mean for a in aggregates(comparison, "ridge", None)}
        assert found["b"] is None
        assert found["a"] == pytest.approx(40 / N_TEST)
        assert {r.entrant.title: r.n_ranked for r in mean_ranks(comparison, "ridge")}["a"] == 3


def test_what_was_read_decides_where_both_records_say_it() -> None:
    moved = {"data": {"test": "other"}, "content": {"test": "same"}}
    records = [
        record("encoder", outcome(40), content={"test": "same"}),
        record("band_statistics", outcome(30), **moved),
    ]
    (margin,) = Comparison(records).margins("scenes", "ridge")
    assert margin.interval is not None


def test_margins_of_other_resamples_have_no_interval() -> None:
    records = [record("encoder", outcome(40), code="1"), record("band_statistics", outcome(30), code="2")]
    (margin,) = Comparison(records).margins("scenes", "ridge")
    assert (margin.margin.gain, margin.interval) == (pytest.approx(10 / N_TEST), None)


def test_tasks_that_leak_are_in_no_mean_and_no_rank() -> None:
    records = [record("encoder", outcome(30), task="sound"), record("encoder", outcome(60), task="counted", n_leaked=2)]
    records += [record("encoder", outcome(60), task="admitted", flags=["noisy", "leak: chips overlap"])]
    comparison = Comparison(records)
    assert comparison.left_out == {
        "counted": "leak: 2 test samples have the content of a training sample",
        "admitted": "leak: chips overlap",
    }
    assert tasks_of_mean(comparison, "ridge", None) == tasks_of_rank(comparison, "ridge") == ["sound"]
    assert tasks_of_mean(comparison, "ridge", dict.fromkeys(comparison.tasks, (0.0, 1.0))) == ["sound"]
    assert aggregates(comparison, "ridge", None)[0].mean == pytest.approx(0.5)
    assert _score(comparison, "a", "admitted") is not None
    assert aggregates(Comparison(records[1:]), "ridge", None) == mean_ranks(Comparison(records[1:]), "ridge") == []


def test_few_places_give_no_interval_or_a_remark() -> None:
    for n_groups, is_known, flags in (
        (4, False, ["no intervals: test samples are of 4 places, fewer than 5"]),
        (5, True, ["intervals are too narrow: test samples are of 5 places, fewer than 20"]),
        (20, True, []),
    ):
        records = [record(f, outcome(40 - i), n_groups=n_groups) for i, f in enumerate(("encoder", "band_statistics"))]
        comparison = Comparison(records)
        score = _score(comparison, "a")
        assert score is not None
        intervals = [score.interval, comparison.margins("scenes", "ridge")[0].interval]
        intervals += [a.over_samples for a in aggregates(comparison, "ridge", None)]
        assert [interval is not None for interval in intervals] == [is_known] * 4
        assert comparison.flags("scenes") == flags


def test_resamples_without_a_score_are_counted() -> None:
    def resampled(n_undefined: int, least: float) -> str:
        return packed([*[np.nan] * n_undefined, *np.linspace(least, 1, N_RESAMPLES - n_undefined)])

    records = [record("encoder", outcome(40), resampled=resampled(7, 0.5))]
    records += [record("band_statistics", outcome(30), resampled=resampled(9, 0.2))]
    comparison = Comparison(records)
    score, (margin,) = _score(comparison, "a"), comparison.margins("scenes", "ridge")
    a, _ = aggregates(comparison, "ridge", None)
    intervals = [score.interval if score else None, margin.interval, a.over_samples]
    assert [interval.n_undefined if interval else None for interval in intervals] == [7, 9, 7]


def test_every_task_weighs_the_same_whatever_its_number_of_seeds() -> None:
    right = {"p": [6], "q": [12, 18, 24], "r": [36, 42], "s": [54]}
    records = [record("encoder", outcome(n), task=t, seed=i) for t, of in right.items() for i, n in enumerate(of)]
    (found,) = aggregates(Comparison(records), "ridge", None)
    copies = sorted(n / N_TEST for of in right.values() for n in of for _ in range(6 // len(of)))  # 6 of each task
    assert found.interquartile_mean == pytest.approx(np.mean(copies[6:18]))
    assert found.mean == pytest.approx(np.mean([np.mean(of) for of in right.values()]) / N_TEST)


def test_mean_ranks_are_those_of_a_count() -> None:
    right = {"p": (40, 30, 30), "q": (10, 20, 15), "r": (5, 6, 7)}
    names = ("encoder", "band_statistics", "texture_statistics")
    records = [record(f, outcome(n), task=t) for t, of in right.items() for f, n in zip(names, of, strict=True)]
    targets = torch.linspace(0, 1, N_TEST)
    records += [record(f, Regressed(targets + 0.1 * (i + 1), targets), task="errors") for i, f in enumerate(names)]
    records.append(record("random_convolution", outcome(60), task="p"))  # of one task alone: it has no rank
    found = {r.entrant.title: (r.mean_rank, r.n_ranked, r.n_tasks) for r in mean_ranks(Comparison(records), "ridge")}
    assert found == {
        "a": ((1 + 3 + 3 + 1) / 4, 3, 4),
        "band statistics": ((2.5 + 1 + 2 + 2) / 4, 3, 4),
        "texture statistics": ((2.5 + 2 + 1 + 3) / 4, 3, 4),
        "random convolution": (None, 3, 1),
    }


def test_an_error_that_a_later_result_answers_is_none() -> None:
    result = record("encoder", outcome(9))
    asked = {key: result[key] for key in ("job", "tap", "probe", "partition", "seed")}
    error = problem("error", "OSError: gone", **{**asked, "key": "of an older version"})
    whole_job = problem("error", "OSError: all gone", job=result["job"])
    skipped = problem("skipped", "no such bands")
    assert Comparison([error, whole_job, skipped, result]).problems == [skipped]
    assert Comparison([result, error, whole_job]).problems == [error, whole_job]
    other = {**error, "seed": 1}
    assert Comparison([other, result]).problems == [other]


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
