"""Splits: held in memory or read as they are used, the same samples; labels of every kind, checked; bad samples."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy import scenes, tasks

from ssl_eo.data.loader import worker_context
from ssl_eo.data.plans import whole
from ssl_eo.data.types import Sample
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.splits import LabelledBatch, Shown, Split, _Parts

CPU = torch.device("cpu")
SHAPES = {"classification": (), "multilabel": (3,), "segmentation": (8, 8), "regression": ()}
DTYPES = {
    "classification": torch.int64,
    "multilabel": torch.uint8,
    "segmentation": torch.int16,
    "regression": torch.float32,
}


class Given(scenes.Source):
    """The toy source with labels that are given."""

    def __init__(self, labels: Sequence[Any]) -> None:
        super().__init__(scenes.Config(n=len(labels)))
        self._labels = labels

    def read(self, index: int) -> Sample:
        return replace(super().read(index), label=self._labels[index])


def _shown(kind: Kind, source: scenes.Source, ignore: int | None = None) -> Shown:
    return Shown("toy", "rgb", source.schema["rgb"], whole("rgb", (8, 8), 8), kind, 3, ignore)


def _split(kind: Kind = "classification", n_max: int | None = None, **options: Any) -> Split:
    source = scenes.Source(scenes.Config(**{"n": 30, "kind": kind, **options}))
    return Split("train", source, _shown(kind, source, scenes.UNLABELLED if kind == "segmentation" else None), n_max)


def _by_key(batches: Sequence[LabelledBatch]) -> dict[str, tuple[list[Any], list[Any], str, str]]:
    found = {}
    for b in batches:
        for i, key in enumerate(b.keys):
            found[key] = (b.inputs.pixels[i].tolist(), b.labels[i].tolist(), b.groups[i], b.digests[i])
    return found


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_held_and_streamed_splits_give_the_same_samples(kind: Kind) -> None:
    held, streamed = _split(kind, n_max=30, n_places=7), _split(kind, n_places=7)
    first = list(held.stream(8, CPU))
    second = list(streamed.stream(4, CPU))
    assert [len(b.keys) for b in first] == [8, 8, 8, 6]
    assert [len(b.keys) for b in second] == [4] * 7 + [2]
    assert [key for b in second for key in b.keys] == [f"toy-0-{i:03d}" for i in range(30)]
    assert _by_key(first) == _by_key(second)
    assert len(held) == len(streamed) == 30
    for batch in (first[0], second[0]):
        assert batch.labels.shape[1:] == SHAPES[kind]
        assert batch.labels.dtype == DTYPES[kind]


@pytest.mark.parametrize("options", [{}, {"broken": [5]}], ids=["whole", "one broken"])
def test_readers_in_other_processes_change_nothing(options: dict[str, Any]) -> None:
    one, two = (list(_split("segmentation", **options).stream(4, CPU, n_workers)) for n_workers in (0, 2))
    assert [b.keys for b in one] == [b.keys for b in two]
    assert _by_key(one) == _by_key(two)


def test_readers_are_no_forks_of_a_process_that_uses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def noted(start_method: str, on_cuda: bool) -> Any:
        asked.append((start_method, on_cuda))
        raise InterruptedError

    monkeypatch.setattr("ssl_eo.eval.splits.worker_context", noted)
    for device in ("cpu", "cuda"):
        with pytest.raises(InterruptedError):
            next(_split().stream(4, torch.device(device), n_workers=1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(InterruptedError):
        next(_split().stream(4, CPU, n_workers=1))
    assert asked == [("auto", False), ("auto", True), ("auto", True)]
    methods = [worker_context("auto", on_cuda).get_start_method() for on_cuda in (False, True)]
    assert methods == ["fork" if sys.platform == "linux" else "forkserver", "forkserver"]


def test_what_readers_are_given_can_be_sent_to_them() -> None:
    source = scenes.Source(scenes.Config(n=9))
    parts = _Parts(source, _shown("classification", source), 4)
    sent = pickle.loads(pickle.dumps(parts))
    assert [sent[i].digests for i in range(3)] == [parts[i].digests for i in range(3)]


def test_samples_are_of_one_place_where_the_source_says_so() -> None:
    (batch,) = _split(n_places=7).stream(30, CPU)
    assert batch.groups == [f"place {i % 7}" for i in range(30)]
    (alone,) = _split().stream(30, CPU)
    assert alone.groups == alone.keys


def test_equal_pixels_and_no_others_have_one_digest() -> None:
    (first,) = _split(seed=0).stream(30, CPU)
    (copied,) = _split(seed=1, copied_from=0, n_copied=4).stream(30, CPU)
    assert len(set(first.digests)) == 30
    assert copied.digests[:4] == first.digests[:4]
    assert set(copied.digests[4:]).isdisjoint(first.digests)
    assert _split(seed=0, n_max=30).digests != first.digests  # in the order in which they were chosen
    assert sorted(_split(seed=0, n_max=30).digests) == sorted(first.digests)


WRONG: list[tuple[Kind, Any, str]] = [
    ("classification", 3, "classification needs a label from 0 to 2, got 3"),
    (
        "classification",
        np.ones((64, 64), dtype=np.uint8),
        "a label from 0 to 2, got uint8 of shape [64, 64]: labels of this form need kind: segmentation in the task",
    ),
    ("classification", np.ones(3, dtype=np.uint8), "of shape [3]: labels of this form need kind: multilabel"),
    ("multilabel", np.ones((8, 8), dtype=np.uint8), "of shape [8, 8]: labels of this form need kind: segmentation"),
    ("regression", np.ones((8, 8), dtype=int), "got int64 of shape [8, 8]: labels of this form need kind: segmenta"),
    ("classification", -1, "from 0 to 2, got -1"),
    ("classification", 1.0, "from 0 to 2, got 1.0"),
    ("classification", None, "from 0 to 2, got None"),
    ("multilabel", np.array([1, 0]), "multilabel needs 3 labels of 0 or 1, got int64 of shape [2]"),
    ("multilabel", np.array([1, 0, 2]), "3 labels of 0 or 1"),
    ("multilabel", 1, "3 labels of 0 or 1, got int64 of shape []"),
    ("multilabel", None, "3 labels of 0 or 1"),
    ("segmentation", 1, "segmentation needs a label for each pixel, got int64 of shape []"),
    ("segmentation", np.zeros((8, 8)), "a label for each pixel, got float64 of shape [8, 8]"),
    ("segmentation", np.full((8, 8), 3), "labels from 0 to 2 or 255, got 3"),
    ("segmentation", np.full((8, 8), -1), "labels from 0 to 2 or 255, got -1"),
    ("regression", math.nan, "regression needs a finite number, got nan"),
    ("regression", np.float32("inf"), "a finite number, got"),
    ("regression", "warm", "a finite number, got 'warm'"),
    ("regression", 10**400, "a finite number, got 1000"),
    ("regression", 1e300, "got 1e+300 (single precision holds up to 3.403e+38)"),
    ("regression", np.zeros(2), "a finite number, got float64 of shape [2] (single"),
]
RIGHT = {"classification": 1, "multilabel": np.array([1, 0, 1]), "segmentation": np.full((8, 8), 2), "regression": 0.5}


@pytest.mark.parametrize(("kind", "label", "message"), WRONG, ids=[f"{kind}, {m}" for kind, _, m in WRONG])
@pytest.mark.parametrize("n_max", [8, None], ids=["held", "streamed"])
def test_a_wrong_label_is_named_and_its_sample_left_out(
    kind: Kind, label: Any, message: str, n_max: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    source = Given([RIGHT[kind]] * 5 + [label] + [RIGHT[kind]] * 2)
    split = Split("train", source, _shown(kind, source, 255 if kind == "segmentation" else None), n_max)
    keys = [key for batch in split.stream(3, CPU) for key in batch.keys]
    assert sorted(keys) == [f"toy-0-{i:03d}" for i in (0, 1, 2, 3, 4, 6, 7)]
    assert "toy-0-005" in caplog.text
    assert message in caplog.text


def test_unlabelled_pixels_need_a_value_that_says_so(caplog: pytest.LogCaptureFixture) -> None:
    source = Given([np.full((8, 8), 255)] * 4)
    assert Split("test", source, _shown("segmentation", source, 255), 4).labels.unique().tolist() == [255]
    with pytest.raises(
        ValueError, match=r"2 samples of test could not be read, the last one is sample [0-3]: toy-0-00"
    ):
        len(Split("test", source, _shown("segmentation", source), 4))
    assert "labels from 0 to 2, got 255" in caplog.text


def test_maps_of_several_sizes_are_refused() -> None:
    source = Given([np.zeros((8, 8), int), np.zeros((4, 4), int)])
    split = Split("test", source, _shown("segmentation", source), None)
    with pytest.raises(ValueError, match=r"task toy: labels differ in size: \(4, 4\), \(8, 8\)"):
        list(split.stream(2, CPU))


@pytest.mark.parametrize(
    ("n_max", "n", "n_tolerated"), [(200, 200, 2), (1000, 200, 2), (20, 20, 1), (5, 600, 1), (150, 600, 2)]
)
def test_a_held_split_is_another_one_too_where_many_are_bad(
    n_max: int, n: int, n_tolerated: int, caplog: pytest.LogCaptureFixture
) -> None:
    met = _split(n=n, n_max=n_max).keys  # in the order in which they are met
    indices = [int(key.removeprefix("toy-0-")) for key in met]
    held = _split(n=n, n_max=n_max, broken=indices[:n_tolerated])
    assert len(held) == min(n_max, n - n_tolerated)
    assert caplog.text.count("a sample of train is left out") == n_tolerated
    assert set(held.keys).isdisjoint(met[:n_tolerated])
    last = indices[n_tolerated]
    message = rf"task toy: {n_tolerated + 1} samples of train could not be read, the last one is sample {last}: sample"
    with pytest.raises(ValueError, match=message):
        len(_split(n=n, n_max=n_max, broken=indices[: n_tolerated + 1]))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_one_in_a_hundred_may_be_bad_and_no_more(n_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    keys = [k for b in _split(n=200, broken=[3, 100]).stream(32, CPU, n_workers) for k in b.keys]
    assert len(keys) == 198
    assert caplog.text.count("a sample of train is left out") == 2
    assert "sample 100: sample 100 is broken" in caplog.text
    too_many = _split(n=200, broken=[3, 100, 199])
    with pytest.raises(ValueError, match=r"3 samples of train could not be read, the last one is sample 199: sample"):
        list(too_many.stream(32, CPU, n_workers))


def test_a_batch_of_nothing_but_bad_samples_is_passed_over() -> None:
    batches = list(_split(n=400, broken=[4, 5, 6, 7]).stream(4, CPU))
    assert len(batches) == 99
    assert "toy-0-004" not in [key for b in batches for key in b.keys]


def test_a_source_that_has_nothing_is_an_error() -> None:
    for options in ({"n": 0}, {"n": 1, "broken": [0]}):
        with pytest.raises(ValueError, match=r"task toy: train has 0 readable samples of [01], too few"):
            list(_split(**options).stream(4, CPU))


@pytest.mark.parametrize("n_max", [4, None], ids=["held", "streamed"])
def test_one_sample_is_no_split(n_max: int | None) -> None:
    for options, n in (({"n": 1}, 1), ({"n": 2, "broken": [1]}, 2)):
        with pytest.raises(ValueError, match=f"task toy: train has 1 readable samples of {n}, too few for a probe"):
            list(_split(n_max=n_max, **options).stream(4, CPU))


def test_what_is_read_as_it_is_used_has_no_positions() -> None:
    with pytest.raises(RuntimeError, match=r"the split train is read as it is used: take stream\(\)"):
        _ = _split().keys


def test_a_split_is_told_by_its_source_and_by_what_of_it_is_taken() -> None:
    found = {_split(**options).fingerprint() for options in ({}, {"n_max": 30}, {"n_max": 20}, {"seed": 1})}
    assert len(found) == 4
    assert _split(n_max=20).fingerprint() in found
    assert (len(_split(n_max=20)), _split(n_max=20).n_source) == (20, 30)
    source = scenes.Source(scenes.Config(n=30))
    balanced = Split("train", source, _shown("classification", source), 20, is_balanced=True)
    assert balanced.fingerprint() not in found


def test_all_samples_are_shown_the_same_bands() -> None:
    """As `[C]`: generated kernels are of one set of bands, and `[B, C]` may be of several."""
    source = scenes.Source(scenes.Config(n=4))
    shown = replace(_shown("classification", source), plan=replace(whole("rgb", (8, 8), 8), bands=(2, 0)))
    (batch,) = Split("train", source, shown, None).stream(4, CPU)
    all_bands = next(iter(_split().stream(4, CPU))).inputs.channels
    assert batch.inputs.pixels.shape == (4, 2, 8, 8)
    assert batch.inputs.channels.kind.shape == (2,)
    assert batch.inputs.channels.wavelength_um.tolist() == all_bands.wavelength_um[[2, 0]].tolist()
