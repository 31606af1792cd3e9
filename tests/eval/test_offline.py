"""Evaluating a finished encoder: beside random weights and pixel statistics, resumable, shared by processes."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, make_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import scenes, tasks

from ssl_eo.data.types import Sample
from ssl_eo.eval import jobs, offline
from ssl_eo.eval.bands import bands_of
from ssl_eo.eval.bootstrap import resampled_scores
from ssl_eo.eval.controls import CONTROLS
from ssl_eo.eval.features import FeatureSet
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.metrics import HEADLINE, Outcome
from ssl_eo.eval.offline import Evaluation, Model, _fresh, evaluate
from ssl_eo.eval.probes import knn, linear, ridge
from ssl_eo.eval.provenance import code_digest
from ssl_eo.eval.records import RESULTS, read_plan, read_results, unmeasured, unpacked, write_csv
from ssl_eo.eval.splits import INTERPOLATION
from ssl_eo.eval.table import print_summary, rows_of_results
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.seeding import derive_seed

STEP = 1500
FEATURES = ["encoder", "random_encoder", *CONTROLS]
FORK = multiprocessing.get_context("fork")


def _evaluate(out: Path, encoder: Encoder | None = None, **changes: Any) -> list[dict[str, Any]]:
    plan = Evaluation(**{"tasks": [tasks.task()], "n_resamples": 0, **changes})
    return evaluate(Model("toy-run", encoder or tasks.encoder(), STEP), plan, out)


def _summary(records: list[Any]) -> tuple[str, bool]:
    stream = io.StringIO()
    complete = print_summary(records, stream)
    return stream.getvalue(), complete


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of an encoder that says the same of every image: chance is all it reaches."""
    return _evaluate(tmp_path_factory.mktemp("constant"), tasks.encoder(fill=0.1), n_resamples=50)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_encoder_random_weights_and_controls_are_probed(constant: list[dict[str, Any]]) -> None:
    assert [(r["features"], r["probe"]) for r in constant] == [(f, p) for f in FEATURES for p in ("knn", "ridge")]
    assert {r["kind"] for r in constant} == {"result"}
    accuracy = {r["features"]: r["scores"]["accuracy"] for r in constant if r["probe"] == "ridge"}
    assert accuracy["encoder"] == pytest.approx(1 / 3, abs=0.15)
    assert accuracy["random_encoder"] > 0.8  # the toy's classes differ in mean colour
    assert accuracy["band_statistics"] > 0.8
    steps = {r["features"]: (r["model"], r["step"]) for r in constant}
    assert steps["encoder"] == ("toy-run", STEP)
    assert steps["random_encoder"] == ("toy-run", None)
    assert steps["band_statistics"] == (None, None)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_record_says_all_that_its_score_depends_on(tmp_path: Path, kind: Kind) -> None:
    task = tasks.task(kind, n_test=30, val=tasks.source(seed=2, n=20, kind=kind, n_places=4))
    task = replace(task, test=tasks.source(seed=1, n=30, kind=kind, n_places=6), flags=["labels are noisy"])
    found = _evaluate(tmp_path, tasks=[task], n_resamples=40, taps=[0.5, 1.0])
    assert len(found) == (2 * 3 + 3) * len(tasks.PROBES[kind])
    for r in found:
        assert r["kind"] == "result"
        assert r["metric"] == HEADLINE[kind]
        low, high = r["intervals"][r["metric"]]
        assert low <= r["scores"][r["metric"]] <= high
        assert (r["n_train"], r["n_val"], r["n_test"], r["n_groups"]) == (60, 20, 30, 6)
        assert (r["n_leaked"], r["flags"], r["bands"]) == (0, ["labels are noisy"], ["R", "G", "B"])
        assert r["n_shared_groups"] == 4  # of test, which val has too
        assert (r["tap"] == "pixels") == (r["features"] in CONTROLS) == (r["encoder"] is None)
        assert (r["weights"] is not None) == (r["features"] == "encoder")
        if kind == "regression":
            assert "confusion" not in r
            assert r["per_class"] == {}
        else:
            assert all(len(column) == 3 for column in r["per_class"].values())
    assert {r["tap"] for r in found if r["features"] == "encoder"} == {"depth_0.50", "last", "all"}
    assert len({r["key"] for r in found}) == len(found)
    text, complete = _summary(rows_of_results(found))
    assert complete
    assert f"toy: {HEADLINE[kind]} of frozen features" in text


def test_evaluation_leaves_the_encoder_alone_and_repeats(tmp_path: Path) -> None:
    encoder = tasks.encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    first = _evaluate(tmp_path / "a" / "below", encoder)
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    torch.manual_seed(5)  # the random encoder does not depend on the state of the generator
    second = _evaluate(tmp_path / "b", encoder)
    assert _timeless(first) == _timeless(second)


def _timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if not k.startswith("seconds") and k != "date"} for r in records]


def test_without_controls_there_is_the_encoder_alone(tmp_path: Path) -> None:
    assert {r["features"] for r in _evaluate(tmp_path, controls=False)} == {"encoder"}


def test_probes_are_those_of_the_task_unless_given(tmp_path: Path) -> None:
    both = [tasks.task(probes=["knn"]), tasks.task("segmentation", name="maps")]
    assert {(r["task"], r["probe"]) for r in _evaluate(tmp_path / "a", tasks=both)} == {
        ("toy", "knn"),
        ("maps", "ridge"),
    }
    given = _evaluate(tmp_path / "b", tasks=both, probes=["ridge", "knn"], controls=False)
    assert {(r["task"], r["probe"]) for r in given} == {("toy", "ridge"), ("toy", "knn"), ("maps", "ridge")}


def test_partitions_and_seeds(tmp_path: Path) -> None:
    found = _evaluate(tmp_path, partitions=["0.10x", "0.50x", "1.00x"], seeds=[0, 1], probes=["ridge"], controls=False)
    labels = {(r["partition"], r["seed"]): r["n_train"] for r in found}
    assert len(found) == len(labels) == 6
    assert {n for (part, _), n in labels.items() if part == "1.00x"} == {60}
    assert all(n == n_half for (part, _), n in labels.items() if part == "0.50x" for n_half in (labels["0.50x", 0],))
    assert 6 <= labels["0.10x", 0] <= 8  # of each class a tenth, rounded up
    assert {(r["partition"], r["partition_of"]) for r in found} == {
        ("0.10x", "nested"),
        ("0.50x", "nested"),
        ("1.00x", "all"),
    }
    score = {key: r["scores"]["accuracy"] for key, r in zip(labels, found, strict=True)}
    assert score["1.00x", 0] == score["1.00x", 1]  # nothing is drawn
    text, _ = _summary(rows_of_results(found))
    assert "toy, labels 0.10x: accuracy of frozen features" in text


def test_sizes_and_subsets(tmp_path: Path) -> None:
    found = _evaluate(tmp_path, sizes=["native", "16"], subsets=["all", "no-rgb"], probes=["ridge"])
    assert {(r["size"], r["size_px"]) for r in found if r["kind"] == "result"} == {("native", 8), ("16", 16)}
    skipped = [r for r in found if r["kind"] == "skipped"]
    assert {r["subset"] for r in skipped} == {"no-rgb"}
    assert len(skipped) == 2 * len(FEATURES)
    assert skipped[0]["error"] == "the tile has no bands no-rgb"
    text, complete = _summary(rows_of_results(found))
    assert complete
    assert "no-rgb" not in text


@pytest.mark.parametrize("asked", [["task"], ["native"], ["8"], ["08"], ["task", "native", "8"]], ids=str)
def test_a_size_is_called_by_what_is_shown(tmp_path: Path, asked: list[str]) -> None:
    """The tiles have 8 pixels, and the task has no size of its own: all of these are one condition."""
    first = _evaluate(tmp_path, controls=False)
    written = (tmp_path / RESULTS).read_bytes()
    assert _evaluate(tmp_path, controls=False, sizes=asked) == first
    assert {r["size"] for r in first} == {"native"}
    assert (tmp_path / RESULTS).read_bytes() == written


def test_the_size_of_a_task_is_its_pixels(tmp_path: Path) -> None:
    found = _evaluate(tmp_path, controls=False, tasks=[tasks.task(size_px=16)], sizes=["task", "native", "16"])
    assert [(r["size"], r["size_px"]) for r in found if r["probe"] == "knn"] == [("16", 16), ("native", 8)]


def test_a_subset_that_is_all_bands_is_all(tmp_path: Path) -> None:
    encoder = tasks.encoder()
    passes = _count_passes(encoder)
    found = _evaluate(tmp_path, encoder, controls=False, subsets=["rgb", "all"])
    assert [(r["probe"], r["subset"]) for r in found] == [("knn", "all"), ("ridge", "all")]
    assert len(passes) == 3  # train, test, and one sample whose operations are counted
    other_way_round = _evaluate(tmp_path, controls=False, subsets=["rgb"], tasks=[tasks.task(bands=["B", "G", "R"])])
    assert [(r["subset"], r["bands"]) for r in other_way_round] == [("rgb", ["R", "G", "B"])] * 2


def test_what_was_shown_and_in_which_precision_is_recorded(tmp_path: Path) -> None:
    measured = tasks.task(statistics="measured", dataset="toys")
    found = _evaluate(tmp_path, tasks=[tasks.task(name="stated"), measured], probes=["ridge"], precision="bfloat16")
    assert {(r["task"], r["normalization"], r["dataset"]) for r in found} == {
        ("stated", "stated", "stated"),
        ("toy", "measured", "toys"),
    }
    assert {r["interpolation"] for r in found} == {INTERPOLATION}
    assert {(r["features"] in CONTROLS, r["precision"]) for r in found} == {(False, "bfloat16"), (True, "float32")}


def test_test_samples_that_val_has_too_are_counted(tmp_path: Path) -> None:
    task = tasks.task(val=tasks.source(seed=2, n=20), test=tasks.source(seed=3, n=30, copied_from=2, n_copied=4))
    (found, *_) = _evaluate(tmp_path, tasks=[task], controls=False)
    assert (found["n_leaked"], found["n_leaked_val"]) == (0, 4)


def test_tables_are_written_of_what_was_measured(constant: list[dict[str, Any]], tmp_path: Path) -> None:
    write_csv(tmp_path / "results.csv", constant)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + len(constant)
    assert lines[1].startswith("toy,knn,accuracy,")


# --- going on ---------------------------------------------------------------------------------------------------------


def _count_passes(encoder: Encoder) -> list[int]:
    """A list that grows with each forward pass."""
    passes: list[int] = []
    encoder.blocks[0].register_forward_hook(lambda *_: passes.append(len(passes)))
    return passes


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    encoder = tasks.encoder()
    passes = _count_passes(encoder)
    first = _evaluate(tmp_path, encoder, batch_size=20)
    written = (tmp_path / RESULTS).read_bytes()
    assert len(passes) == 3 + 2 + 1  # train, test, and one sample whose operations are counted
    assert _evaluate(tmp_path, encoder, batch_size=20) == first
    assert (tmp_path / RESULTS).read_bytes() == written
    assert len(passes) == 6


def test_what_is_missing_alone_is_measured(tmp_path: Path) -> None:
    encoder = tasks.encoder()
    first = _evaluate(tmp_path, encoder, probes=["ridge"])
    kept = (tmp_path / RESULTS).read_text().splitlines()[:-3]  # stopped before the last three results
    (tmp_path / RESULTS).write_text("\n".join(kept) + "\n")
    passes = _count_passes(encoder)
    assert _timeless(_evaluate(tmp_path, encoder, probes=["ridge"])) == _timeless(first)
    assert passes == []  # the last three are controls
    both = _evaluate(tmp_path, encoder, probes=["ridge", "knn"], controls=False)
    assert len(passes) == 3
    assert [r["probe"] for r in both] == ["ridge", "knn"]
    assert len(read_results(tmp_path)) == len(first) + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": tasks.encoder(seed=2)},
        {"tasks": [tasks.task(n_train=50)]},
        {"tasks": [tasks.task(max_train=40)]},
        {"tasks": [tasks.task(bands=["G", "R", "B"])]},
        {"tasks": [tasks.task(metric="macro_f1")]},
        {"tasks": [tasks.task(size_px=16)]},
        {"pool": "cls"},
        {"n_resamples": 10},
        {"precision": "bfloat16"},
        {"tasks": [tasks.task(statistics="measured")]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_changed_is_measured_anew(tmp_path: Path, changes: dict[str, Any]) -> None:
    before = {r["key"] for r in _evaluate(tmp_path, controls=False)}
    after = {r["key"] for r in _evaluate(tmp_path, controls=False, **changes)}
    assert len(before) == len(after) == 2
    assert before.isdisjoint(after)
    assert {r["key"] for r in read_results(tmp_path)} == before | after


def test_other_taps_are_other_results(tmp_path: Path) -> None:
    _evaluate(tmp_path, controls=False, probes=["ridge"], taps=[0.5, 1.0])
    found = _evaluate(tmp_path, controls=False, probes=["ridge"], taps=[0.3, 1.0])
    assert [r["tap"] for r in found] == ["depth_0.30", "last", "all"]
    assert sorted(r["tap"] for r in read_results(tmp_path)) == ["all", "all", "depth_0.30", "depth_0.50", "last"]


def test_results_of_other_models_and_plans_are_left_and_not_returned(tmp_path: Path) -> None:
    first = _evaluate(tmp_path, tasks.encoder(seed=2), probes=["ridge"])
    broken = tasks.task(train=tasks.source(n=60, broken=list(range(60))), name="broken")
    failed = _evaluate(tmp_path, tasks.encoder(seed=2), tasks=[broken])
    second = _evaluate(tmp_path, tasks.encoder(seed=3), probes=["ridge"])
    assert {r["kind"] for r in failed} == {"error"}
    assert [r["features"] for r in second] == FEATURES
    shared = [r["features"] for r in second if r in first]  # what does not depend on the weights serves both
    assert shared == FEATURES[1:]
    assert _summary(rows_of_results(second))[1]
    assert len(read_results(tmp_path)) == len(first) + len(failed) + 1


def test_an_error_of_another_plan_is_not_returned(tmp_path: Path) -> None:
    first = _evaluate(tmp_path, controls=False)
    (line, *_) = _lines(tmp_path)
    error = {**line, "key": f"job {line['job']}", "kind": "error", "error": "OSError: of other partitions"}
    with (tmp_path / RESULTS).open("a") as file:
        file.write(json.dumps(error) + "\n")
    assert _evaluate(tmp_path, controls=False) == first
    assert {r["kind"] for r in read_results(tmp_path)} == {"result"}  # nothing was missing: it does not fail any more
    more = _evaluate(tmp_path, controls=False, partitions=["0.50x"])
    assert {r["kind"] for r in more} == {"result"}


def _gone(source: scenes.Source, cfg: scenes.Config) -> None:
    raise OSError("the disk is gone")


def test_a_failure_that_passes_is_forgotten(tmp_path: Path) -> None:
    first = _evaluate(tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scenes.Source, "__init__", _gone)
        (failed,) = _evaluate(tmp_path)
        assert failed["error"] == "OSError: the disk is gone"
        n_lines = len(_lines(tmp_path))
        assert _evaluate(tmp_path) == [failed]
        assert len(_lines(tmp_path)) == n_lines  # said once
    assert failed in read_results(tmp_path)
    assert _evaluate(tmp_path) == first
    assert read_results(tmp_path) == first


# --- what was asked for -----------------------------------------------------------------------------------------------


class _StopError(BaseException):
    """As a request to end."""


def test_the_plan_says_what_an_interrupted_evaluation_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, n_begun = offline._Runner._measure, []

    def stop_at_the_third(runner: Any, job: Any) -> bool:
        n_begun.append(job.name)
        if len(n_begun) == 3:
            raise _StopError
        return measure(runner, job)

    monkeypatch.setattr(offline._Runner, "_measure", stop_at_the_third)
    with pytest.raises(_StopError):
        _evaluate(tmp_path, taps=[0.5, 1.0], partitions=["0.50x", "1.00x"])
    plan = read_plan(tmp_path)
    assert len(plan) == (2 * 3 + 3) * 2 * 2  # taps of the encoders and pixels of controls, probes, parts
    assert len(unmeasured(plan, read_results(tmp_path))) == 3 * 2 * 2
    assert {a["features"] for a in unmeasured(plan, read_results(tmp_path))} == set(CONTROLS)
    _evaluate(tmp_path, taps=[0.5, 1.0], partitions=["0.50x", "1.00x"])
    assert unmeasured(plan, read_results(tmp_path)) == []
    _evaluate(tmp_path, controls=False, probes=["linear"], subsets=["all", "no-rgb"])  # of which there are none
    assert len(read_plan(tmp_path)) == len(plan) + 2
    assert unmeasured(read_plan(tmp_path), read_results(tmp_path)) == []


def test_what_is_neither_there_nor_explained_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "work_through", lambda *_: None)
    found = _evaluate(tmp_path, controls=False)
    assert [(r["kind"], r["probe"], r["tap"]) for r in found] == [("error", "knn", "last"), ("error", "ridge", "last")]
    text, complete = _summary(rows_of_results(found))
    assert not complete
    assert "ridge at the last block could not be measured: no process has left a result of it" in text
    assert read_results(tmp_path) == []


def test_lost_results_are_measured_again_whatever_became_of_the_claims(tmp_path: Path) -> None:
    first = _evaluate(tmp_path, controls=False)
    (tmp_path / RESULTS).unlink()
    (tmp_path / ".claims" / ".turns").unlink()
    assert _timeless(_evaluate(tmp_path, controls=False)) == _timeless(first)


def test_each_pass_is_told_of_and_what_was_there_already(tmp_path: Path) -> None:
    said: list[str] = []
    plan = Evaluation([tasks.task("regression")], n_resamples=0, seeds=[0, 1])
    out = tmp_path / "my scores"
    evaluate(Model("toy-run", tasks.encoder(), STEP), plan, out, said.append)
    *passes, last = said
    assert [line.rpartition(", ")[0] for line in passes] == [
        "1/7 toy, all, native, encoder",
        "2/7 toy, all, native, random_encoder, seed 0",
        "3/7 toy, all, native, random_encoder, seed 1",
        "4/7 toy, all, native, band_statistics",
        "5/7 toy, all, native, texture_statistics",
        "6/7 toy, all, native, random_convolution, seed 0",
        "7/7 toy, all, native, random_convolution, seed 1",
    ]
    assert all(line.endswith(" s") for line in passes)
    assert last == f"results in '{out}'; for a page of them: ssl-eo report '{out}' --out report.html"
    said.clear()
    evaluate(Model("toy-run", tasks.encoder(), STEP), plan, out, said.append)
    assert said == ["all 10 results were there already", last]
    said.clear()
    more = replace(plan, tasks=[tasks.task("regression"), replace(tasks.task("regression"), name="more")])
    evaluate(Model("toy-run", tasks.encoder(), STEP), replace(more, controls=False), out, said.append)
    assert [line.rpartition(", ")[0] for line in said[:1]] == ["2/2 more, all, native, encoder"]
    assert said[1:] == ["1 of 2 passes were there already", last]


def test_how_far_a_pass_is_counts_all_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def watched(title: str, is_kept: bool) -> Iterator[Callable[[int, int], None]]:
        assert not is_kept
        yield lambda done, n_all: told.setdefault(title, []).append((done, n_all))

    monkeypatch.setattr("ssl_eo.eval.offline.progress", watched)
    _evaluate(tmp_path, controls=False, batch_size=32)
    (found,) = told.values()
    assert list(told) == ["toy, all, native, encoder"]
    assert [done for done, _ in found] == sorted({done for done, _ in found})
    assert found[-1] == (found[0][1],) * 2


def test_a_record_has_a_date_and_a_commit_and_neither_makes_it_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tasks.task(name="broken", tile="none")
    monkeypatch.setattr(offline, "_commit", lambda: "1f0a")
    first = _evaluate(tmp_path, controls=False, tasks=[broken, tasks.task()])
    assert [r["kind"] for r in first] == ["error", "result", "result"]
    for r in first:
        assert r["commit"] == "1f0a"
        assert datetime.fromisoformat(r["date"]).tzinfo == UTC
    monkeypatch.setattr(offline, "_commit", lambda: None)
    assert _evaluate(tmp_path, controls=False) == first[1:]


def test_tasks_of_any_name_stay_apart(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "x" * 300, "é" * 200]
    found = _evaluate(tmp_path, controls=False, tasks=[tasks.task("regression", name=name) for name in names])
    assert [(r["task"], r["kind"]) for r in found] == [(name, "result") for name in names]
    assert len({r["job"] for r in found}) == len(names)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_what_a_seed_draws_is_measured_for_each(tmp_path: Path) -> None:
    encoder = tasks.encoder()
    passes = _count_passes(encoder)
    asked: dict[str, Any] = {"tasks": [tasks.task("regression")], "batch_size": 64}
    found = _evaluate(tmp_path, encoder, seeds=[0, 1, 2], **asked)
    assert len(passes) == 3
    assert [(r["features"], r["seed"]) for r in found] == [(f, s) for f in FEATURES for s in range(3)]
    assert {r["kind"] for r in found} == {"result"}
    assert len({r["key"] for r in found}) == len(found)
    for features in FEATURES:
        errors = {r["scores"]["rmse"] for r in found if r["features"] == features}
        assert len(errors) == (3 if features in ("random_encoder", "random_convolution") else 1)
    again = _evaluate(tmp_path / "alone", encoder, seeds=[2], **asked)
    assert _timeless(again) == _timeless([r for r in found if r["seed"] == 2])


def test_what_draws_nothing_is_fitted_once_for_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[str] = []
    for probe in (knn, ridge, linear):

        def noted(*args: Any, probe: Any = probe, fit: Any = probe.fit) -> Any:
            fitted.append(probe.__name__.rpartition(".")[2])
            return fit(*args)

        monkeypatch.setattr(probe, "fit", noted)
    asked: dict[str, Any] = {"seeds": [0, 1, 2], "controls": False, "probes": ["knn", "ridge", "linear"]}
    found = _evaluate(tmp_path, **asked)
    assert sorted(fitted) == ["knn", *["linear"] * 3, "ridge"]
    assert [(r["probe"], r["seed"]) for r in found] == [(p, s) for p in asked["probes"] for s in range(3)]
    assert len({r["key"] for r in found}) == 9
    fitted.clear()
    parts = _evaluate(tmp_path, **asked, partitions=["nested_0.50x", "1.00x"])
    assert sorted(fitted) == [*["knn"] * 3, *["linear"] * 3, *["ridge"] * 3]  # of the half, which is drawn
    assert all(r["n_fitted"] == r["n_train"] for r in parts)
    alone = _evaluate(tmp_path / "alone", **{**asked, "seeds": [2]}, partitions=["nested_0.50x", "1.00x"])
    assert _timeless(alone) == _timeless([r for r in parts if r["seed"] == 2])


def test_parts_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of one part at one tap are there at a time, whatever the order in which results are asked for."""
    asked_for: list[tuple[str, int]] = []
    at = FeatureSet.at

    def noted(features: FeatureSet, tap: str, rows: torch.Tensor) -> torch.Tensor:
        asked_for.append((tap, len(rows)))
        return at(features, tap, rows)

    monkeypatch.setattr(FeatureSet, "at", noted)
    _evaluate(
        tmp_path, controls=False, taps=[0.5, 1.0], partitions=["0.50x", "1.00x"], seeds=[0, 1], probes=["knn", "ridge"]
    )
    of_train = [place for place in asked_for if place[1] != 40]
    assert len(of_train) == 9  # two halves and the whole, at three taps


def test_random_weights_are_those_of_the_seed() -> None:
    first, second, again = (_fresh(tasks.encoder(), seed).state_dict() for seed in (0, 1, 0))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_random_bands_are_those_of_each_seed(tmp_path: Path) -> None:
    """The encoder takes no single band, and the controls any."""
    found = _evaluate(tmp_path, seeds=[0, 1, 2], subsets=["random"], probes=["ridge"])
    bands = {r["seed"]: r["bands"] for r in found if r["features"] == "band_statistics"}
    names = ("R", "G", "B")
    assert bands == {seed: bands_of("random", names, names, "toy", seed) for seed in range(3)}
    assert len({tuple(some) for some in bands.values()}) > 1
    for features in CONTROLS:
        assert [r["seed"] for r in found if r["features"] == features] == [0, 1, 2]


# --- what a result depends on -----------------------------------------------------------------------------------------


def test_other_code_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _evaluate(tmp_path, controls=False)
    assert {r["code"] for r in before} == {code_digest()}
    monkeypatch.setattr("ssl_eo.eval.offline.code_digest", lambda: "other")
    after = _evaluate(tmp_path, controls=False)
    assert {r["code"] for r in after} == {"other"}
    assert {r["key"] for r in before}.isdisjoint(r["key"] for r in after)


def test_other_options_of_a_probe_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _evaluate(tmp_path, controls=False, probes=["knn", "linear"])
    assert before[0]["options"] == {"n_neighbors": 20, "temperature": 0.07, "chunk_size": 1024}
    assert before[1]["options"]["n_epochs"] == 50
    assert "seed" not in before[1]["options"]  # that is a column of its own, by which scores are averaged
    fewer = make_dataclass("Config", [("n_neighbors", int, 5)], bases=(knn.Config,))
    monkeypatch.setattr(knn, "Config", fewer)
    after = _evaluate(tmp_path, controls=False, probes=["knn", "linear"])
    assert after[0]["options"]["n_neighbors"] == after[0]["chosen"]["n_neighbors"] == 5
    assert after[0]["key"] != before[0]["key"]
    assert after[1] == before[1]


def test_the_content_of_samples_is_recorded(tmp_path: Path) -> None:
    first = _evaluate(tmp_path / "a")
    assert len({json.dumps(r["content"]) for r in first}) == 1  # of all features
    assert first[0]["content"].keys() == {"train", "test"}
    assert first[0]["sources"]["train"] == {"name": "toy.scenes", "options": asdict(tasks.source().options)}
    (second, *_) = _evaluate(tmp_path / "b", tasks=[tasks.task(test=tasks.source(seed=4, n=40))])
    assert second["content"]["train"] == first[0]["content"]["train"]
    assert second["content"]["test"] != first[0]["content"]["test"]


def _encoder_of(patch_px: int) -> Encoder:
    cfg = EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=patch_px, patch_embed="conv")
    encoder = Encoder(cfg, n_channels=3)
    encoder.init_weights()
    return encoder


def test_controls_of_images_do_not_depend_on_the_encoder(tmp_path: Path) -> None:
    fine = _evaluate(tmp_path, _encoder_of(4), probes=["ridge"])
    coarse = _evaluate(tmp_path, _encoder_of(3), probes=["ridge"])
    sizes = {r["features"]: r["size_px"] for r in coarse}
    assert sizes == {**dict.fromkeys(FEATURES[:2], 9), **dict.fromkeys(CONTROLS, 8)}
    assert coarse[2:] == fine[2:]
    assert {r["cell_px"] for r in coarse} == {None}
    assert len(_lines(tmp_path)) == len(FEATURES) + 2


@pytest.mark.parametrize(("patch_px", "n_times"), [(4, 1), (3, 2)], ids=["whole patches", "enlarged"])
def test_samples_are_read_once_for_all_that_are_shown_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch_px: int, n_times: int
) -> None:
    read, keys = scenes.Source.read, []

    def noted(source: scenes.Source, index: int) -> Sample:
        keys.append(f"{source.cfg.seed} {index}")
        return read(source, index)

    monkeypatch.setattr(scenes.Source, "read", noted)
    _evaluate(tmp_path, _encoder_of(patch_px), seeds=[0, 1])
    assert len(keys) == n_times * len(set(keys)) == n_times * 100


def test_controls_of_patches_see_the_patches_of_the_encoder(tmp_path: Path) -> None:
    found = {side: _evaluate(tmp_path, _encoder_of(side), tasks=[tasks.task("segmentation")]) for side in (2, 4)}
    for side, records in found.items():
        assert {r["n_fitted"] for r in records} == {60 * (8 // side) ** 2}
        assert {r["features"]: r["cell_px"] for r in records} == {
            **dict.fromkeys(FEATURES[:2]),
            **dict.fromkeys(CONTROLS, side),
        }
    assert {r["key"] for r in found[2]}.isdisjoint(r["key"] for r in found[4])


def test_tasks_are_resampled_apart_and_their_features_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def noted(outcome: Outcome, groups: list[str], n: int, seed: int) -> Any:
        seeds.append(seed)
        return resampled_scores(outcome, groups, n, seed)

    monkeypatch.setattr("ssl_eo.eval.scoring.resampled_scores", noted)
    both = [tasks.task(), tasks.task(name="other")]
    _evaluate(tmp_path, tasks=both, probes=["ridge"], n_resamples=5)
    assert seeds == [derive_seed(0, "bootstrap", name) for name in ("toy", "other") for _ in FEATURES]


@pytest.mark.parametrize(("n_places", "is_resampled"), [(None, True), (5, True), (4, False), (1, False)])
def test_few_places_are_not_resampled(tmp_path: Path, n_places: int | None, is_resampled: bool) -> None:
    task = tasks.task(test=tasks.source(seed=1, n=40, n_places=n_places))
    for r in _evaluate(tmp_path, tasks=[task], controls=False, n_resamples=20):
        assert (r["resampled"] is not None) == (r["metric"] in r["intervals"]) == bool(r["intervals"]) == is_resampled
        assert r["n_undefined"] == (sum(math.isnan(v) for v in unpacked(r["resampled"])) if is_resampled else 0)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_an_encoder_of_fixed_bands_is_not_shown_others(tmp_path: Path) -> None:
    of_two = Encoder(tasks.encoder().cfg, n_channels=2)
    of_two.init_weights()
    (error,) = _evaluate(tmp_path, of_two, controls=False)
    said = "toy-run takes 2 bands and was shown 3; show as many, or evaluate an encoder for any sensor"
    assert error["error"] == f"ValueError: {said}"


def test_a_task_that_fails_leaves_the_others(tmp_path: Path) -> None:
    broken = tasks.task(name="broken", train=tasks.source(n=60, broken=list(range(60))))
    found = _evaluate(tmp_path, tasks=[broken, tasks.task("classification", name="whole")])
    text, complete = _summary(rows_of_results(found))
    assert not complete
    failed, whole = text.split("whole: accuracy")
    assert "margin over random encoder" in whole
    assert "could not be measured" not in whole
    assert "toy-run could not be measured: ValueError: task broken: " in failed
    assert "margin" not in failed


def test_tasks_that_cannot_be_opened_are_one_line_and_a_record_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [tasks.task("segmentation", name=name, tile="none") for name in ("maps", "more_maps")]
    found = _evaluate(tmp_path, tasks=[*bad, tasks.task()], sizes=["native", "16"], seeds=[0, 1])
    failed = [r for r in found if r["kind"] == "error"]
    assert [(r["task"], r["features"], r["of_task"]) for r in failed] == [
        ("maps", "encoder", True),
        ("more_maps", "encoder", True),
    ]
    assert {(r["metric"], r["kind_of_task"]) for r in failed} == {("miou_present", "segmentation")}
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 3 tasks cannot be opened: maps, more_maps. The first: task maps: there is no tile 'none' (rgb)"
    ]
    assert len([r for r in _lines(tmp_path) if r["kind"] == "error"]) == 2
    assert {r["kind"] for r in found if r["task"] == "toy"} == {"result"}


@pytest.mark.parametrize("sizes", [["native", "16"], ["16", "native"]], ids=str)
def test_a_size_that_a_task_cannot_be_shown_in_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[str]
) -> None:
    def resized_alone(cfg: TaskConfig, patch_px: int) -> Task:
        if cfg.size_px is None:
            raise ValueError("tiles are not square, set size_px")
        return Task(cfg, patch_px)

    monkeypatch.setattr(jobs, "Task", resized_alone)
    found = {r["size"]: r for r in _evaluate(tmp_path, sizes=sizes, controls=False, probes=["ridge"])}
    assert (found["native"]["kind"], found["16"]["kind"]) == ("error", "result")
    assert "of_task" not in found["native"]


@pytest.mark.parametrize("is_held", [True, False])
def test_splits_that_share_samples_are_refused_before_any_pass_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_held: bool
) -> None:
    def locate(source: scenes.Source, index: int) -> tuple[str, None]:
        return f"toy-{source.cfg.seed}-{index:03d}", None

    monkeypatch.setattr(scenes.Source, "locate", locate, raising=False)
    limits = {} if is_held else {"max_train": None, "max_test": None}
    task = tasks.task(test=tasks.source(seed=0, n=40), **limits)
    encoder = tasks.encoder()
    passes = _count_passes(encoder)
    (failed,) = _evaluate(tmp_path, encoder, tasks=[task])
    assert passes == []
    assert failed["error"].startswith("ValueError: task toy: 40 of 40 samples of test are in train too, the first is")
    assert failed["of_task"]
    assert len(caplog.records) == len(_lines(tmp_path)) == 1
    admitted = replace(task, flags=["shared keys: both count from 0"])
    assert {r["kind"] for r in _evaluate(tmp_path, tasks=[admitted], probes=["ridge"])} == {"result"}


def test_an_error_is_gone_once_it_is_mended(tmp_path: Path) -> None:
    broken = tasks.task(train=tasks.source(n=60, broken=list(range(60))))
    assert {r["kind"] for r in _evaluate(tmp_path, tasks=[broken])} == {"error"}
    found = _evaluate(tmp_path)
    assert len(found) == 2 * len(FEATURES)
    assert {r["kind"] for r in found} == {"result"}


def test_a_probe_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """Of a single sample nothing can be held out to choose a learning rate on."""
    asked = {"tasks": [tasks.task("regression")], "partitions": ["0.01x"], "controls": False}
    found = _evaluate(tmp_path, probes=["linear", "ridge"], **asked)
    assert {r["probe"]: r["kind"] for r in found} == {"linear": "error", "ridge": "result"}
    text, complete = _summary(rows_of_results(found))
    assert not complete
    assert "toy-run: linear at the last block could not be measured: ValueError: train has one sample" in text
    again = _evaluate(tmp_path, probes=["linear", "ridge"], **asked)
    assert [r["key"] for r in again] == [r["key"] for r in found]
    assert [r["kind"] for r in _lines(tmp_path)] == ["error", "result", "error"]  # it alone is tried again


class _Deadly(Encoder):
    """Its first forward pass kills the process, as the kernel does where memory ends."""

    def intermediates(self, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def _in_process(target: Any, *args: Any) -> int | None:
    process = FORK.Process(target=target, args=args)
    process.start()
    process.join(timeout=60)
    return process.exitcode


def _evaluate_deadly(out: Path) -> None:
    cfg = EncoderConfig(embed_dim=16, depth=2, n_heads=2, patch_size=4, patch_embed="conv")
    encoder = _Deadly(cfg, n_channels=3)
    encoder.init_weights()
    _evaluate(out, encoder)


def test_a_job_at_which_two_processes_died_is_an_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    codes = [_in_process(_evaluate_deadly, tmp_path) for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    records = _lines(tmp_path)
    assert [r["features"] for r in records if r["kind"] == "error"] == ["encoder"]
    assert records[0]["error"] == "2 processes have ended while they were at it (out of memory?)"
    assert {r["features"] for r in records if r["kind"] == "result"} == set(FEATURES) - {"encoder"}


def _evaluate_after(all_begun: Any, out: Path) -> None:
    all_begun.wait(30)
    _evaluate(out, tasks=[tasks.task(), tasks.task("segmentation", name="maps")])


def test_two_processes_find_together_what_one_finds(tmp_path: Path) -> None:
    alone = _evaluate(tmp_path / "one", tasks=[tasks.task(), tasks.task("segmentation", name="maps")])
    all_begun = FORK.Barrier(2)
    processes = [FORK.Process(target=_evaluate_after, args=(all_begun, tmp_path / "two")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    together = _lines(tmp_path / "two")
    assert len(together) == len({r["key"] for r in together})  # nothing was done twice
    assert sorted(_timeless(together), key=_key) == sorted(_timeless(alone), key=_key)


def _key(record: dict[str, Any]) -> str:
    return str(record["key"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ["big"]}, "^sizes: 'big' must be task, native, or a number of pixels"),
        ({"sizes": ["0"]}, "^sizes: '0' must be"),
        ({"subsets": ["nir"]}, "^subsets: got 'nir', must be one of all, rgb"),
        ({"partitions": ["10%"]}, "^partitions: '10%' is no part"),
        ({"probes": ["knnn"]}, "^probes: .*did you mean 'knn'"),
        (
            {"probes": ["knn"], "tasks": [tasks.task("regression")]},
            "^probes: none of knn takes regression",
        ),
        ({"taps": [2.0]}, "^taps: taps are ratios of the depth"),
        ({"pool": "max"}, "^pool: got 'max', must be one of cls, mean"),
        ({"precision": "float16"}, "^precision: got 'float16', must be one of float32, bfloat16; did you mean"),
        ({"batch_size": 0}, "^batch_size: must be at least 1, got 0"),
        ({"tasks": [tasks.task(), tasks.task()]}, "tasks must name at least one, and each once"),
        ({"seeds": [1, 1]}, "seeds must name at least one, and each once"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(**{"tasks": [tasks.task()], **changes})


def test_a_part_that_is_written_in_two_ways_is_one() -> None:
    plan = Evaluation([tasks.task()], partitions=["0.1x", "1.0x", "0.100x", "nested_1.00x", "nested_0.1x"])
    assert plan.partitions == ["0.10x", "1.00x", "nested_0.10x"]


# --- what is printed --------------------------------------------------------------------------------------------------


def test_worse_than_its_rivals_has_negative_margins(constant: list[dict[str, Any]]) -> None:
    text, complete = _summary(rows_of_results(constant))
    assert complete
    assert "toy: accuracy of frozen features" in text
    for row in ("toy-run", "random encoder", "band statistics", "random convolution"):
        assert row in text
    ridge = {r["features"]: r["scores"]["accuracy"] for r in constant if r["probe"] == "ridge"}
    margin = 100 * (ridge["encoder"] - ridge["band_statistics"])
    assert margin < -30
    (line,) = [line for line in text.splitlines() if "margin over band statistics" in line]
    assert line.endswith(f"ridge {margin:+.1f} points")


def test_a_released_encoder_has_no_step(tmp_path: Path) -> None:
    plan = Evaluation([tasks.task()], probes=["ridge"], n_resamples=0)
    text, complete = _summary(rows_of_results(evaluate(Model("released", tasks.encoder(), 0), plan, tmp_path)))
    assert complete
    assert "released " in text
    assert "step" not in text
    assert "margin over random encoder" in text
