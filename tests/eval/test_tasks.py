"""Tasks: fixed subsets, of train in equal parts, rendered whole, bad samples left out and wrong configs refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import scenes

from ssl_eo.data.opening import SourceConfig
from ssl_eo.eval import tasks
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.tasks import Task, TaskConfig

CPU = torch.device("cpu")


def _config(**changes: Any) -> TaskConfig:
    train = SourceConfig("toy.scenes", scenes.Config(n=90))
    test = SourceConfig("toy.scenes", scenes.Config(n=60, seed=1))
    return replace(TaskConfig("toy", train, test, max_train=30, max_test=12), **changes)


def test_training_subsets_are_balanced_and_all_are_fixed_and_chosen_by_the_seed() -> None:
    task = Task(_config())
    assert torch.bincount(task.train.labels).tolist() == [10, 10, 10]
    assert len(set(task.train.keys)) == len(task.train) == 30
    assert len(set(task.test.keys)) == len(task.test) == 12
    assert Task(_config()).train.keys == task.train.keys
    assert Task(_config(seed=1)).train.keys != task.train.keys
    assert Task(_config(seed=1)).test.keys != task.test.keys == Task(_config()).test.keys


def test_what_is_scored_has_classes_as_frequent_as_they_are() -> None:
    """Equal parts would score another question: how well classes are told apart that are all as frequent."""
    share = [0.7, 0.18, 0.12]
    train, val, test = (SourceConfig("toy.scenes", scenes.Config(n=600, seed=s, share=share)) for s in range(3))
    task = Task(_config(train=train, val=val, test=test, max_train=60, max_val=120, max_test=120))
    assert torch.bincount(task.train.labels).tolist() == [20, 20, 20]
    assert task.val is not None
    for split in (task.val, task.test):
        of_all = [int(scenes.Source(split._source.cfg).read(i).label) for i in range(600)]  # type: ignore[attr-defined]
        for k, n in enumerate(torch.bincount(split.labels, minlength=3).tolist()):
            expected = 120 * of_all.count(k) / 600
            assert abs(n - expected) <= 3 * (expected * (1 - expected / 120)) ** 0.5  # three standard deviations


def test_rare_classes_are_kept_and_the_rest_is_filled_up() -> None:
    skewed = SourceConfig("toy.scenes", scenes.Config(n=60, share=[0.85, 0.1, 0.05]))
    labels = [int(skewed_label) for skewed_label in Task(_config(train=skewed, max_train=60)).train.labels]
    kept = Task(_config(train=skewed)).train.labels.tolist()
    assert len(kept) == 30
    assert [kept.count(k) for k in (1, 2)] == [labels.count(k) for k in (1, 2)]


def test_batches_show_whole_normalised_tiles_in_the_asked_order() -> None:
    task = Task(_config())
    rows = torch.tensor([4, 0, 9])
    first, second = task.train.batches(rows, 2, CPU)
    assert first.inputs.pixels.shape == (2, 3, 8, 8)
    assert (second.keys, second.labels.tolist()) == ([task.train.keys[9]], [int(task.train.labels[9])])
    source = scenes.Source(scenes.Config(n=90))
    raw = source.read(int(task.train.keys[9].removeprefix("toy-0-"))).tiles["rgb"].pixels
    torch.testing.assert_close(second.inputs.pixels[0], (torch.from_numpy(raw).float() - 100) / 40)
    assert second.inputs.gsd_m is not None
    assert float(torch.as_tensor(second.inputs.gsd_m)) == 10.0


def test_ground_size_is_that_of_each_sample() -> None:
    task = Task(_config(train=SourceConfig("toy.scenes", scenes.Config(n=90, fine=[1, 4]))))
    (batch,) = task.train.batches(torch.arange(30), 30, CPU)
    expected = [0.3 if key in ("toy-0-001", "toy-0-004") else 10.0 for key in task.train.keys]
    assert 0.3 in expected
    torch.testing.assert_close(batch.inputs.gsd_m, torch.tensor(expected))


def test_size_and_bands_of_the_view() -> None:
    task = Task(_config(size_px=16, bands=["B", "R"]))
    (batch,) = task.test.batches(torch.arange(3), 8, CPU)
    inputs = batch.inputs
    assert inputs.pixels.shape == (3, 2, 16, 16)
    assert float(torch.as_tensor(inputs.gsd_m)[0]) == 5.0
    (plain,) = Task(_config()).test.batches(torch.arange(3), 8, CPU)
    expected = plain.inputs.pixels[:, [2, 0]].mean((2, 3))
    # The mean over a view does not depend on its size: bicubic weights sum to one over the tile, up to its edges.
    torch.testing.assert_close(inputs.pixels.mean((2, 3)), expected, atol=0.05, rtol=0)


def test_statistics_are_measured_on_all_of_train_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = scenes.Source.read
    monkeypatch.setattr(scenes.Source, "read", lambda source, i: reads.append(i) or read(source, i))
    train = SourceConfig("toy.scenes", scenes.Config(n=40, seed=9, broken=[7]))
    stated, measured = Task(_config(train=train)), Task(_config(train=train, statistics="measured"))
    assert reads == list(range(40))
    assert Task(_config(train=train, statistics="measured", bands=["R"])).schema == measured.schema
    assert len(reads) == 40  # once, however often it is opened
    assert stated.schema.mean == (100.0,) * 3
    source = scenes.Source(train.options)
    pixels = np.stack([read(source, i).tiles["rgb"].array for i in range(40) if i != 7]).astype(float)
    np.testing.assert_allclose(measured.schema.mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(measured.schema.std, pixels.std((0, 2, 3)))
    for split in (measured.train, measured.test):
        (batch,) = split.batches(torch.arange(3), 3, CPU)
        raw = torch.from_numpy(np.stack([read(split._source, i).tiles["rgb"].array for i in _positions(batch.keys)]))
        mean, std = (torch.tensor(v)[:, None, None] for v in (measured.schema.mean, measured.schema.std))
        torch.testing.assert_close(batch.inputs.pixels, (raw.float() - mean) / std, rtol=1e-4, atol=1e-4)
    nothing = SourceConfig("toy.scenes", scenes.Config(n=2, seed=8, broken=[0, 1]))
    with pytest.raises(ValueError, match="task toy: statistics are measured on train, which has no readable sample of"):
        Task(_config(train=nothing, statistics="measured"))


def _positions(keys: list[str]) -> list[int]:
    return [int(key.rpartition("-")[2]) for key in keys]


@pytest.mark.parametrize(
    ("kind", "probes"),
    [
        ("classification", ["knn", "ridge"]),
        ("multilabel", ["knn", "ridge"]),
        ("segmentation", ["ridge"]),
        ("regression", ["ridge"]),
    ],
)
def test_usual_probes_are_those_that_take_the_kind(kind: Kind, probes: list[str]) -> None:
    assert _config(kind=kind).usual_probes == probes
    assert _config(kind=kind, probes=["linear"]).usual_probes == ["linear"]


def test_unreadable_samples_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    task = Task(_config(train=SourceConfig("toy.scenes", scenes.Config(n=20, broken=[3]))))
    assert len(task.train) == 19
    assert "toy-0-003" not in task.train.keys
    assert "sample 3 is broken" in caplog.text


def test_a_split_without_readable_samples_is_an_error() -> None:
    for nothing, message in (
        (scenes.Config(n=1, broken=[0]), "train has 0 readable samples of 1, too few"),
        (scenes.Config(n=4, broken=[0, 1, 2, 3]), "2 samples of train could not be read, the last one is sample"),
    ):
        with pytest.raises(ValueError, match=message):
            len(Task(_config(train=SourceConfig("toy.scenes", nothing))).train)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": "rgbb"}, "no tile 'rgbb'; did you mean 'rgb'"),
        ({"bands": ["G", "NIR"]}, "no band 'NIR'"),
        ({"train": SourceConfig("toy.nowhere", None)}, "toy.nowhere"),
    ],
)
def test_a_task_that_cannot_be_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(_config(**changes))


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (
            ["water"],
            {},
            "task toy: the source toy.scenes names one class, 'water', and classification needs 2 at least",
        ),
        (["water"], {"kind": "segmentation"}, "names one class, 'water', and segmentation needs 2"),
        (
            ["a", "b"],
            {"kind": "segmentation", "ignore": 1},
            "task toy: ignore 1 leaves one of 2 classes, and segmentati",
        ),
        (
            ["a", "b"],
            {"kind": "segmentation", "no_data": [1, 7]},
            r"task toy: no_data holds \[7\], expected classes, fr",
        ),
        (["a", "b"], {"kind": "segmentation", "no_data": [-1]}, r"task toy: no_data holds \[-1\]"),
    ],
)
def test_there_is_something_to_tell_apart(
    names: list[str], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "open_source", lambda cfg: _named(names, cfg))
    with pytest.raises(ValueError, match=message):
        Task(_config(**changes))
    names += ["c"]  # so it is what the test says that was wrong
    if "no_data" not in changes:
        assert Task(_config(**changes)).n_classes == len(names)


def test_one_label_that_samples_have_or_not_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "open_source", lambda cfg: _named(["burnt"], cfg))
    assert Task(_config(kind="multilabel")).n_classes == 1


def _named(names: list[str], cfg: SourceConfig) -> scenes.Source:
    source = scenes.Source(cfg.options)
    source.label_names = tuple(names)
    return source


@pytest.mark.parametrize("value", [-3.4028235e38, -1e30])
def test_no_data_that_nobody_declared_is_named_where_statistics_are_measured(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(source: scenes.Source, index: int) -> Any:
        sample = plain(source, index)
        pixels = sample.tiles["rgb"].array.astype(np.float32)
        pixels[1, 2, 3] = value if index == 5 else 7
        return replace(sample, tiles={"rgb": replace(sample.tiles["rgb"], pixels=pixels)})

    def opened(cfg: SourceConfig) -> scenes.Source:
        source = scenes.Source(cfg.options)
        source.schema = {"rgb": replace(source.schema["rgb"], dtype="float32")}
        return source

    plain = scenes.Source.read
    monkeypatch.setattr(scenes.Source, "read", read)
    monkeypatch.setattr(tasks, "open_source", opened)
    monkeypatch.setattr(tasks, "_MEASURED", {})
    with pytest.raises(ValueError, match=r"band G of tile rgb of task toy holds -.*e\+3., .* declare it in no_data"):
        Task(_config(statistics="measured"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_train": 1}, "max_train"),
        ({"max_val": 1}, "max_val"),
        ({"size_px": 0}, "size_px"),
        ({"probes": ["ridg"]}, "did you mean 'ridge'"),
        ({"probes": []}, r"^task toy: probes is empty: name at least one, or leave the key out .* \(knn, ridge\)"),
        ({"probes": [], "kind": "regression"}, r"probes is empty: .* the usual \(ridge\)"),
        ({"probes": ["ridge", "ridge"]}, "probes must name at least one, and each once"),
        ({"bands": []}, r"^task toy: bands must name at least one, and each once, got \[\]"),
        ({"bands": ["R", "G", "R"]}, r"bands must name at least one, and each once, got \['R', 'G', 'R'\]"),
        ({"dataset": "\udcff"}, r"^task toy: dataset must be text that can be printed, got '\\udcff'"),
        ({"name": ""}, "^name must be text that can be printed, got ''"),
        ({"name": "a\nb"}, r"^name must be text that can be printed, got 'a\\nb'"),
        ({"name": "\ud800"}, r"^name must be text that can be printed, got '\\ud800'"),
        ({"kind": "segmentation", "no_data": [1, 1]}, r"no_data must name each class once, got \[1, 1\]"),
        (
            {"kind": "segmentation", "probes": ["knn"]},
            "knn does not take segmentation; it takes classification, multilabel",
        ),
        ({"metric": "miou"}, "metric: classification has no 'miou'"),
        ({"metric": "miou_present"}, r"metric: classification has no 'miou_present' \(accuracy, macro_accuracy, "),
        ({"kind": "regression", "probes": ["ridge"], "metric": "rmsee"}, r"no 'rmsee'; did you mean 'rmse'\?"),
        ({"kind": "segmentation", "probes": ["ridge"], "ignore": 65535}, "ignore must fit 16 bits"),
        ({"ignore": 255}, "ignore and no_data are of segmentation, got kind classification"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**changes)


def test_shipped_benchmarks_load_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_eo.config import build
    from ssl_eo.resources import resource_dir

    paths = sorted((resource_dir("datasets_meta") / "benchmarks").glob("*.yaml"))
    for variable in {name for path in paths for name in re.findall(r"oc\.env:(\w+)", path.read_text())}:
        monkeypatch.setenv(variable, "/data")
    names = [path.stem for path in paths]
    assert {"eurosat_rgb_geo", "synthetic_scenes"} <= set(names)
    for name in names:
        assert build(TaskConfig, name, "eval.tasks[0]").name == name


def test_eurosat_splits_are_apart_in_space(real_samples: Callable[[str], Path]) -> None:
    from ssl_eo.config import build

    real_samples("eurosat_rgb")  # where the task's file looks for it

    task = Task(replace(build(TaskConfig, "eurosat_rgb_geo", "task"), max_train=200, max_test=100))
    assert task.n_classes == 10
    assert torch.bincount(task.train.labels).tolist() == [20] * 10
    assert set(task.train.keys).isdisjoint(task.test.keys)
