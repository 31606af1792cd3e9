"""Results side by side: means, margins and their intervals against counts by hand."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from toy.results import N_RESAMPLES, N_TEST, outcome, problem, record, written

from ssl_eo.eval.aggregates import aggregates, mean_ranks, read_ranges, tasks_of_mean, tasks_of_rank
from ssl_eo.eval.bootstrap import interval_of, interval_over_seeds, resampled_scores
from ssl_eo.eval.comparison import Comparison, probe_shown
from ssl_eo.eval.experiments import Score
from ssl_eo.eval.metrics import Regressed
from ssl_eo.eval.records import packed, read_results, unpacked
from ssl_eo.resources import resource_dir


def test_margins_are_those_of_pairs() -> None:
    own, random, weak, strong = (outcome(n) for n in (48, 30, 20, 40))
    controls = {"band_statistics": weak, "texture_statistics": strong}
    records = [record("encoder", own), record("random_encoder", random)]
    records += [record(name, found) for name, found in controls.items()]
    margins = Comparison(records).margins("scenes", "ridge")
    assert [m.rival.title for m in margins] == ["random encoder", "texture statistics"]
    for found, rival in zip(margins, (random, strong), strict=True):
        ours, theirs = (resampled_scores(of, None, N_RESAMPLES)["accuracy"] for of in (own, rival))
        interval = interval_of(ours - theirs)
        assert found.margin.gain == pytest.approx(own.scores()["accuracy"] - rival.scores()["accuracy"])
        assert found.interval is not None
        assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_margins_of_errors_are_gains() -> None:
    targets = torch.linspace(0, 1, N_TEST)
    own, rival = (Regressed(targets + off * (-1) ** torch.arange(N_TEST), targets) for off in (0.1, 0.3))
    (margin,) = Comparison([record("encoder", own), record("band_statistics", rival)]).margins("scenes", "ridge")
    assert margin.margin.gain == pytest.approx(0.2)
    assert margin.interval is not None
    assert margin.interval.low > 0


def test_a_model_against_another_is_on_the_same_resamples() -> None:
    first, second = outcome(48), outcome(40)
    comparison = Comparison([record("encoder", first), record("encoder", second, "b"), record("encoder", first, "c")])
    duels = comparison.duels("scenes", "ridge")
    assert [(d.model.title, d.rival.title) for d in duels] == [("a", "b"), ("a", "c"), ("b", "c")]
    ours, theirs = (resampled_scores(of, None, N_RESAMPLES)["accuracy"] for of in (first, second))
    interval = interval_of(ours - theirs)
    one, same, reverse = duels
    assert one.margin.gain == pytest.approx(8 / N_TEST) == -reverse.margin.gain
    assert one.interval is not None
    assert (one.interval.low, one.interval.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert same.interval is not None
    assert (same.margin.gain, same.interval.low, same.interval.high) == (0.0, 0.0, 0.0)
    assert one.reading == ""


def test_a_duel_needs_the_same_test_samples_and_says_where_readings_differ() -> None:
    other = record("encoder", outcome(30), "b", content={"train": "x", "test": "z"})
    assert Comparison([record("encoder", outcome(40)), other]).duels("scenes", "ridge") == []
    deeper = record("encoder", outcome(30), "b", tap="depth_0.50")
    (duel,) = Comparison([record("encoder", outcome(40)), deeper]).duels("scenes", "ridge")
    assert duel.reading == "read at the last block, mean against read at depth 0.50, mean"


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


def test_seeds_are_averaged_and_have_an_interval_from_three_on() -> None:
    right = {("p", 0): 12, ("p", 1): 18, ("p", 2): 15, ("q", 0): 40, ("q", 1): 50, ("q", 2): 33}
    records = [record("encoder", outcome(n), task=task, seed=seed) for (task, seed), n in right.items()]
    comparison = Comparison(records)
    score = comparison.score(comparison.entrants[0], "p", "ridge")
    assert score is not None
    assert score.value == pytest.approx(0.25)
    assert score.spread == pytest.approx(np.std([0.2, 0.3, 0.25], ddof=1))
    (found,) = aggregates(comparison, "ridge", None)
    # Of two tasks the middle half is a half of each, so that of a seed is its mean.
    of_seeds = [(right["p", i] + right["q", i]) / 2 / N_TEST for i in range(3)]
    assert found.over_seeds is not None
    assert found.interquartile_mean is not None
    expected = interval_over_seeds(found.interquartile_mean, of_seeds)
    assert (found.over_seeds.low, found.over_seeds.high) == pytest.approx((expected.low, expected.high))
    two = [r for r in records if r["seed"] < 2]
    one_more = [*two, records[2]]  # of one task alone
    assert [aggregates(Comparison(of), "ridge", None)[0].over_seeds for of in (two, one_more)] == [None, None]


def test_seeds_that_change_nothing_have_no_interval() -> None:
    comparison = Comparison([record("encoder", outcome(30), seed=seed) for seed in range(3)])
    assert aggregates(comparison, "ridge", None)[0].over_seeds is None


def test_what_is_no_ratio_stays_out_of_a_plain_mean() -> None:
    targets = torch.linspace(0, 1, N_TEST)
    heights = record("encoder", Regressed(targets + 0.1, targets), task="heights")
    comparison = Comparison([record("encoder", outcome(30)), heights])
    assert tasks_of_mean(comparison, "ridge", None) == ["scenes"]
    assert aggregates(comparison, "ridge", None)[0].interquartile_mean == pytest.approx(0.5)


def test_the_setting_compared_is_the_richest() -> None:
    variants = {"0.50x": 50, "0.10x": 20, "nested_0.50x": 10}
    records = [record("encoder", outcome(n), partition=part) for part, n in variants.items()]
    others: list[dict[str, Any]] = [{"subset": "rgb"}, {"tap": "depth_0.50"}]
    records += [record("encoder", outcome(5), partition="0.50x", **other) for other in others]
    comparison = Comparison(records)
    (model,) = comparison.entrants
    at = {part: comparison.score(model, "scenes", "ridge", partition=part) for part in variants}
    assert {part: score.value for part, score in at.items() if score} == {p: n / N_TEST for p, n in variants.items()}
    score = comparison.score(model, "scenes", "ridge")
    assert score is not None
    assert score.value == 50 / N_TEST
    assert comparison.steps("scenes", "partition") == ["0.10x", "0.50x", "nested_0.50x"]


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
    assert readings == ["read at the last block, cls", "read at depth 0.50, mean", ""]
    assert len(aggregates(comparison, "ridge", None)) == 3
    assert all(a.mean is not None for a in aggregates(comparison, "ridge", None))

    together = Comparison(
        [*records, record("encoder", outcome(20), "b", tap="all"), record("encoder", outcome(19), "b")]
    )
    assert _n_right(together)["b"] == 20
    alike = Comparison([record("encoder", outcome(9), m) for m in "ab"])
    assert [alike.reading(e, ["scenes"], ["ridge"]) for e in alike.entrants] == ["", ""]


def test_a_model_that_is_read_at_other_depths_on_some_tasks_is_mixed() -> None:
    records = [record("encoder", outcome(40), task=task, tap=tap) for task, tap in (("p", "all"), ("q", "depth_0.50"))]
    records += [record("encoder", outcome(30), "b", task=task) for task in "pq"]
    records += [record("band_statistics", outcome(9), task=task) for task in "pq"]
    comparison = Comparison(records)
    a, b, control = comparison.entrants
    assert [comparison.is_mixed(e, ["p", "q"], "ridge") for e in (a, b, control)] == [True, False, False]
    assert not comparison.is_mixed(a, ["p"], "ridge")
    assert comparison.reading(a, ["p", "q"], ["ridge"]) == (
        "read at all depths together, mean; read at depth 0.50, mean on q"
    )
    assert comparison.reading(b, ["p", "q"], ["ridge"]) == "read at the last block, mean"
    patches = [
        record("encoder", outcome(9), m, task="maps", tap=t, pool=None) for m, t in (("a", "all"), ("b", "last"))
    ]
    with_maps = Comparison([*records, *patches])
    readings = [with_maps.reading(e, with_maps.tasks, ["ridge"]) for e in with_maps.entrants[:2]]
    assert readings == [comparison.reading(e, ["p", "q"], ["ridge"]) for e in (a, b)]  # they are not pooled: no word
    alone = Comparison([r for r in records if r["model"] != "b"])
    assert alone.reading(alone.entrants[0], ["p", "q"], ["ridge"]) == (
        "read at all depths together, mean; read at depth 0.50, mean on q"
    )


def test_the_random_encoder_is_read_where_it_is_best() -> None:
    records = [record("encoder", outcome(40), tap=tap) for tap in ("all", "last")]
    records += [record("random_encoder", outcome(n), tap=tap) for tap, n in (("all", 10), ("last", 30))]
    (margin,) = Comparison(records).margins("scenes", "ridge")
    assert margin.margin.rival_score == 30 / N_TEST
    assert margin.reading == "read at the last block, mean"


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
        "native",
    ]
    assert _n_right(comparison) == {"a": 20, "b": 21, "band statistics": None}
    control = comparison.entrants[-1]
    assert comparison.absence(control, "scenes", "ridge") == "only with labels 1.00x, bands rgb, size 224 px"
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
        {"dataset": "another"},
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


def test_scores_over_unequal_numbers_of_seeds_are_told_by_probe() -> None:
    records = [record("encoder", outcome(30 + seed), seed=seed, probe=p) for seed in range(3) for p in ("ridge", "knn")]
    records += [record("random_encoder", outcome(20), seed=seed, probe="ridge") for seed in range(3)]
    assert Comparison(records).flags("scenes") == []
    records += [record("encoder", outcome(30), "b", probe=p) for p in ("ridge", "knn")]
    assert Comparison(records).flags("scenes") == [
        "scores by ridge are over unequal numbers of seeds: 3 (a, random encoder), 1 (b)",
        "scores by knn are over unequal numbers of seeds: 3 (a), 1 (b)",
    ]


def test_random_bands_may_differ_between_seeds() -> None:
    records = [record("encoder", outcome(9), subset="random", seed=i, bands=[f"b{i}"]) for i in (0, 1)]
    assert Comparison(records).flags("scenes") == []


def test_scores_of_other_test_samples_are_not_compared() -> None:
    records = [record("encoder", outcome(40)), record("encoder", outcome(50), "b", content={"test": "z"})]
    records += [record(name, outcome(30)) for name in ("random_encoder", "band_statistics")]
    comparison = Comparison(records)
    assert {m.model.title for m in comparison.margins("scenes", "ridge")} == {"a"}
    assert "scored on other test samples than the rest, and not compared with it: b" in comparison.flags("scenes")
    found = {a.entrant.title: a.mean for a in aggregates(comparison, "ridge", None)}
    assert found["b"] is None
    assert found["a"] == pytest.approx(40 / N_TEST)
    assert {r.entrant.title: r.n_ranked for r in mean_ranks(comparison, "ridge")}["a"] == 3


def test_what_was_read_decides_and_not_what_was_asked_for() -> None:
    records = [record("encoder", outcome(40)), record("band_statistics", outcome(30), data={"test": "other"})]
    (margin,) = Comparison(records).margins("scenes", "ridge")
    assert margin.interval is not None


def test_margins_of_other_resamples_have_no_interval() -> None:
    for key in ("code", "dataset"):  # draws of other datasets have another seed
        records = [record("encoder", outcome(40), **{key: "1"}), record("band_statistics", outcome(30), **{key: "2"})]
        (margin,) = Comparison(records).margins("scenes", "ridge")
        assert (margin.margin.gain, margin.interval) == (pytest.approx(10 / N_TEST), None)


def test_tasks_that_leak_are_in_no_mean_and_no_rank() -> None:
    records = [record("encoder", outcome(30), task="sound"), record("encoder", outcome(60), task="counted", n_leaked=2)]
    records += [record("encoder", outcome(60), task="admitted", flags=["noisy", "leak: chips overlap"])]
    comparison = Comparison(records)
    assert comparison.left_out == {
        "counted": "leak: 2 of 60 test samples (3.3 %) have the content of a training sample",
        "admitted": "leak: chips overlap",
    }
    assert tasks_of_mean(comparison, "ridge", None) == tasks_of_rank(comparison, "ridge") == ["sound"]
    assert tasks_of_mean(comparison, "ridge", dict.fromkeys(comparison.tasks, (0.0, 1.0))) == ["sound"]
    assert aggregates(comparison, "ridge", None)[0].mean == pytest.approx(0.5)
    assert _score(comparison, "a", "admitted") is not None
    assert aggregates(Comparison(records[1:]), "ridge", None) == mean_ranks(Comparison(records[1:]), "ridge") == []


@pytest.mark.parametrize(("n_leaked", "is_left_out"), [(1, False), (10, False), (11, True)])
def test_a_task_may_leak_up_to_a_hundredth_of_its_test_samples(n_leaked: int, is_left_out: bool) -> None:
    comparison = Comparison([record("encoder", outcome(30), n_test=1000, n_leaked=n_leaked)])
    flag = f"{n_leaked} of 1,000 test samples ({n_leaked / 10:g} %) have the content of a training sample"
    assert comparison.flags("scenes") == [flag]
    assert comparison.left_out == ({"scenes": f"leak: {flag}"} if is_left_out else {})


@pytest.mark.parametrize(("n_leaked", "percent"), [(60, "100"), (59, "98"), (1, "1.7")])
def test_a_leak_of_nearly_all_is_a_plain_number(n_leaked: int, percent: str) -> None:
    (flag,) = Comparison([record("encoder", outcome(30), n_leaked=n_leaked)]).flags("scenes")
    assert flag == f"{n_leaked} of 60 test samples ({percent} %) have the content of a training sample"


def test_a_leak_of_all_but_one_in_a_thousand_is_not_all() -> None:
    (flag,) = Comparison([record("encoder", outcome(30), n_test=1000, n_leaked=999)]).flags("scenes")
    assert "(99 %)" in flag


def test_a_leak_that_was_mended_and_measured_anew_is_no_more() -> None:
    old = record("encoder", outcome(30), n_leaked=30, date="2026-01-01", content={"train": "1", "test": "2"})
    new = record("encoder", outcome(20), date="2026-03-01", content={"train": "3", "test": "4"})
    for records in ([old, new], [new, old]):
        comparison = Comparison(records)
        assert comparison.left_out == {}
        assert not any("have the content" in flag for flag in comparison.flags("scenes"))


def test_copies_of_validation_samples_are_told_and_leave_no_task_out() -> None:
    comparison = Comparison([record("encoder", outcome(30), n_leaked_val=6)])
    assert comparison.flags("scenes") == ["6 of 60 test samples (10 %) have the content of a validation sample"]
    assert comparison.left_out == {}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n_test": 1}, "they are of one test sample"),
        ({"per_class": {"support": [0, 60, 0]}}, "all test samples are of one class (wood)"),
        (
            {"per_class": {"support": [0, 60, 0]}, "kind_of_task": "segmentation"},
            "all test pixels are of one class (wood)",
        ),
        (
            {"classes": ["ash", "no ash"], "kind_of_task": "segmentation", "ignore": 0, "per_class": {}},
            "beside what is ignored there is one class (no ash)",
        ),
    ],
    ids=["one sample", "one class", "one class of pixels", "ignored"],
)
def test_a_score_that_tells_nothing_is_said_to_and_is_in_no_mean(changes: dict[str, Any], why: str) -> None:
    comparison = Comparison([record("encoder", outcome(40)), record("encoder", outcome(40), task="odd", **changes)])
    said = f"its scores tell nothing: {why}"
    assert said in comparison.flags("odd")
    assert comparison.left_out == {"odd": said}
    assert comparison.flags("scenes") == []
    assert tasks_of_rank(comparison, "ridge") == ["scenes"]


def test_an_ignored_value_that_is_no_class_leaves_all_of_them() -> None:
    two = {"classes": ["a", "b"], "kind_of_task": "segmentation", "ignore": 255, "per_class": {"support": [3, 4]}}
    assert Comparison([record("encoder", outcome(40), **two)]).flags("scenes") == []


def test_parts_that_are_as_large_as_others_are_named() -> None:
    sizes = {"0.01x": 15, "0.10x": 15, "nested_0.10x": 15, "0.50x": 60, "1.00x": 120}
    comparison = Comparison([record("encoder", outcome(9), partition=p, n_train=n) for p, n in sizes.items()])
    (flag,) = [flag for flag in comparison.flags("scenes") if "equally" in flag]
    assert flag == (
        "the parts 0.01x and 0.10x of the training set have equally many samples (15): it is too small for both"
    )


# --- datasets ---------------------------------------------------------------------------------------------------------


def _of_two_datasets(**seeds: Any) -> list[dict[str, Any]]:
    """`optical` and `radar` show one dataset, `other` is one of its own; accuracies 0.2, 0.4, 0.6 and 0.5, 0.5, 0.1."""
    right = {"optical": (12, 30), "radar": (24, 30), "other": (36, 6)}
    of = {"optical": "places", "radar": "places", "other": None}
    return [
        record("encoder", outcome(n), m, task=task, dataset=of[task], **seeds)
        for task, pair in right.items()
        for m, n in zip("ab", pair, strict=True)
    ]


def test_tasks_of_one_dataset_count_as_one() -> None:
    comparison = Comparison(_of_two_datasets())
    assert comparison.datasets == {"optical": "places", "radar": "places", "other": "other"}
    a, b = aggregates(comparison, "ridge", None)
    assert (a.mean, b.mean) == (pytest.approx((0.3 + 0.6) / 2), pytest.approx((0.5 + 0.1) / 2))
    assert (a.interquartile_mean, a.n_tasks) == (pytest.approx(0.45), 3)
    # 0.3 against 0.5 in the places, 0.6 against 0.1 elsewhere: each is first once.
    assert [r.mean_rank for r in mean_ranks(comparison, "ridge")] == [1.5, 1.5]
    alone = Comparison([{**r, "dataset": None} for r in _of_two_datasets()])
    assert [a.mean for a in aggregates(alone, "ridge", None)] == pytest.approx([1.2 / 3, 1.1 / 3])
    assert [r.mean_rank for r in mean_ranks(alone, "ridge")] == pytest.approx([5 / 3, 4 / 3])


def test_who_lacks_one_task_of_a_dataset_has_no_mean() -> None:
    records = [r for r in _of_two_datasets() if (r["task"], r["model"]) != ("radar", "a")]
    a, b = aggregates(Comparison(records), "ridge", None)
    assert (a.mean, a.n_tasks) == (None, 2)
    assert b.mean is not None


def test_resamples_of_one_dataset_are_averaged_one_by_one() -> None:
    """What is hard in both tasks stays hard in their mean: it varies as one of them does, not as two draws would."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.5, 0.1, size=(2, N_RESAMPLES))
    records = [
        record("encoder", outcome(30), task=task, dataset="places", resampled=packed(first)) for task in ("p", "q")
    ]
    records.append(record("encoder", outcome(30), task="r", resampled=packed(second)))
    (found,) = aggregates(Comparison(records), "ridge", None)
    expected = interval_of(((first + second) / 2).astype(np.float32))
    assert found.over_samples is not None
    assert (found.over_samples.low, found.over_samples.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_seeds_of_one_dataset_are_averaged_one_by_one_where_they_are_the_same() -> None:
    right = {("p", 0): 6, ("p", 1): 12, ("p", 2): 18, ("q", 0): 18, ("q", 1): 12, ("q", 2): 6}
    records = [record("encoder", outcome(n), task=t, seed=i, dataset="d") for (t, i), n in right.items()]
    records += [record("encoder", outcome(30 + i), task="r", seed=i) for i in range(3)]
    (found,) = aggregates(Comparison(records), "ridge", None)
    # 0.2 for every seed of the dataset: only the third task varies.
    of_seeds = [(0.2 + (30 + i) / N_TEST) / 2 for i in range(3)]
    assert found.interquartile_mean is not None
    assert found.over_seeds is not None
    assert found.over_seeds.high == pytest.approx(interval_over_seeds(found.interquartile_mean, of_seeds).high)
    fewer = [r for r in records if (r["task"], r["seed"]) != ("q", 2)]
    (found,) = aggregates(Comparison(fewer), "ridge", None)
    assert found.mean == pytest.approx(((12 + 15) / 2 + 31) / 2 / N_TEST)
    assert found.over_seeds is None


def test_metrics_of_one_dataset_are_ranked_apart() -> None:
    targets = torch.linspace(0, 1, N_TEST)
    right = {"a": (40, 0.3), "b": (30, 0.2)}
    records = [record("encoder", outcome(n), m, task="scenes", dataset="d") for m, (n, _) in right.items()]
    records += [
        record("encoder", Regressed(targets + off, targets), m, task="heights", dataset="d")
        for m, (_, off) in right.items()
    ]
    records += [record("encoder", outcome(n), m, task="other") for m, n in (("a", 9), ("b", 8))]
    # Each is first by one metric of the dataset: 1.5 there; 1 and 2 elsewhere.
    assert [r.mean_rank for r in mean_ranks(Comparison(records), "ridge")] == [1.25, 1.75]


def test_the_newest_record_says_the_dataset() -> None:
    records = [record("encoder", outcome(9), dataset="old", date="2026-01-01")]
    records += [
        record("encoder", outcome(9), "b", dataset="new", date="2026-02-01"),
        record("band_statistics", outcome(5)),
    ]
    assert Comparison(records).datasets == {"scenes": "new"}


def test_parts_of_the_training_set_are_told_apart_by_where_they_come_from() -> None:
    origins = {"0.10x": "published", "0.014x": "nested", "nested_0.10x": "nested", "1.00x": "all"}
    records = [record("encoder", outcome(9), partition=p, partition_of=o) for p, o in origins.items()]
    assert Comparison(records).parts("scenes") == {
        "all": ["1.00x"],
        "published": ["0.10x"],
        "nested": ["0.014x", "nested_0.10x"],
    }


def test_a_part_that_is_published_for_some_alone_is_flagged() -> None:
    origins = {"a": "published", "b": "nested"}
    records = [record("encoder", outcome(9), m, partition="0.10x", partition_of=o) for m, o in origins.items()]
    said = "the part 0.10x of the training set is published for some, and for others nested"
    assert Comparison(records).flags("scenes") == [said]


def test_shipped_tasks_that_show_one_dataset_say_so() -> None:
    shipped = resource_dir("datasets_meta") / "benchmarks"
    names: dict[str, set[str]] = {}
    for path in sorted(shipped.rglob("*.yaml")):
        task = yaml.safe_load(path.read_text())
        folder = str(task["train"].get("root", path.stem)).rpartition("/")[2]  # HDF5 files and folders of images
        shown = task["train"]["dataset"] if path.parent.name == "geobench" else folder
        names.setdefault(shown, set()).add(task.get("dataset", path.stem))
    assert all(len(of) == 1 for of in names.values()), names
    assert names["m-so2sat"] == {"m-so2sat"}
    assert names["ben_v2_s1s2_120px.h5"] == {"bigearthnet_v2"}


def test_the_probe_that_is_shown_is_chosen_by_its_name() -> None:
    assert probe_shown(["knn", "logistic", "ridge"]) == "ridge"
    assert probe_shown(["knn", "logistic"]) == "knn"


def test_a_score_without_intervals_is_said_to_have_none() -> None:
    comparison = Comparison(
        [
            record(f, outcome(n), metric="worst_class_recall", resampled=packed(np.full(N_RESAMPLES, np.nan)))
            for f, n in (("encoder", 40), ("band_statistics", 30))
        ]
    )
    score, (margin,) = _score(comparison, "a"), comparison.margins("scenes", "ridge")
    assert score is not None
    assert (score.interval, margin.interval) == (None, None)
    assert comparison.flags("scenes") == ["no intervals: those of worst_class_recall by a bootstrap are biased"]


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

    def said(*records: dict[str, Any]) -> list[str]:
        return [r["error"] for r in Comparison(records).problems]

    later = {**result, "date": "2026-01-02T00:00:00+00:00"}
    earlier = {**result, "date": "2025-12-31T00:00:00+00:00"}
    assert said(later, error, whole_job, skipped) == ["no such bands"]
    assert said(earlier, error, whole_job) == ["OSError: gone", "OSError: all gone"]  # it fails since
    assert said(result, error) == ["OSError: gone"]  # of one second
    assert said({**error, "seed": 1}, later) == ["OSError: gone"]


def test_of_problems_of_one_question_the_newest_counts(tmp_path: Path) -> None:
    asked = {"tap": "last", "probe": "ridge", "partition": "1.00x", "seed": 0}
    old = problem("error", "OSError: gone", key="of an older version", **asked)
    new = problem("error", "OSError: other", key="of this version", date="2026-01-02T00:00:00+00:00", **asked)
    assert [r["error"] for r in Comparison([new, old]).problems] == ["OSError: other"]
    assert [r["error"] for r in read_results(written(tmp_path, [old, new]))] == ["OSError: other"]


def _state(comparison: Comparison) -> Any:
    """All that a page says of who has which score, and why others have none, whatever its order."""
    scores = {
        (e.identity, task, probe): (None if (s := comparison.score(e, task, probe)) is None else (s.values, s.setting))
        for e in comparison.entrants
        for task in comparison.tasks
        for probe in comparison.probes
    }
    margins = {
        (m.model.title, m.rival.kind): m.margin for t in comparison.tasks for m in comparison.margins(t, "ridge")
    }
    steps = {
        (task, axis): comparison.steps(task, axis) for task in comparison.tasks for axis in ("tap", "pool", "size")
    }
    return scores, margins, steps, sorted(r["error"] for r in comparison.problems)


def test_folders_may_come_in_any_order_and_twice(tmp_path: Path) -> None:
    old, new = {"date": "2026-01-01T00:00:00+00:00"}, {"date": "2026-02-01T00:00:00+00:00"}
    again = {"key": "the same question", **new}
    a = [record("encoder", outcome(30), pool="cls"), record("band_statistics", outcome(20), size="224", **old)]
    a += [
        record("encoder", outcome(30), pool="mean", **old),
        {**record("encoder", outcome(9), task="t"), **again, **old},
    ]
    b = [record("encoder", outcome(31), "b", size="224"), {**record("encoder", outcome(50), task="t"), **again}]
    b += [record("texture_statistics", outcome(20), size="224", **old)]
    answered = {key: a[0][key] for key in ("job", "tap", "probe", "partition", "seed")} | {"date": "2025-12-31"}
    c = [problem("error", "OSError: gone then", **answered), problem("error", "OSError: still gone", job="z", key="z")]
    folders = [written(tmp_path / name, records) for name, records in (("a", a), ("b", b), ("c", c))]
    expected = _state(Comparison.read(folders))
    assert expected[-1] == ["OSError: still gone"]
    assert expected[0]["a 11aa", "t", "ridge"][0] == [50 / N_TEST]
    for order in permutations([*folders, folders[1]]):
        assert _state(Comparison.read(order)) == expected


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
