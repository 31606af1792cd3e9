"""Each probe on each kind of labels, from the source to the score."""

from __future__ import annotations

import functools

import pytest
import torch
from toy import tasks

from ssl_eo.components import available
from ssl_eo.eval.controls import band_statistics
from ssl_eo.eval.dense import control_of_cells
from ssl_eo.eval.features import ALL_TAPS, FeatureSet, extract
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.metrics import HEADLINE, HIGHER_IS_BETTER, Segmented
from ssl_eo.eval.probes import Labelled, kinds_of, linear
from ssl_eo.eval.probes.base import hold_out
from ssl_eo.eval.probing import Probing
from ssl_eo.eval.tasks import Task
from ssl_eo.models.vit import EncoderInput

CPU = torch.device("cpu")
CASES = [(probe, kind) for probe in available("ssl_eo.eval.probes") for kind in kinds_of(probe)]
# Colours tell the labels up to noise. Of a regression the noise alone makes an error of 0.08.
LEAST = {"classification": 0.9, "multilabel": 0.95, "segmentation": 0.75, "regression": -0.15}


def _colours(of_patches: bool, inputs: EncoderInput) -> dict[str, torch.Tensor]:
    """Colours of the tile, or of each of its four cells; and, as another tap, their squares."""
    control = control_of_cells(band_statistics, 4) if of_patches else band_statistics
    found = control(inputs.pixels)
    return {"colours": found, "squares": found.square()}


def _sets(kind: Kind) -> tuple[Task, FeatureSet, FeatureSet, FeatureSet]:
    task = Task(tasks.task(kind, n_train=150, n_test=60, val=tasks.source(seed=2, n=60, kind=kind)))
    assert task.val is not None
    featurise = functools.partial(_colours, kind == "segmentation")
    train, val, test = (extract(featurise, split, CPU) for split in (task.train, task.val, task.test))
    return task, train, val, test


@pytest.mark.parametrize("has_val", [True, False], ids=["val", "no val"])
@pytest.mark.parametrize(("probe", "kind"), CASES)
def test_labels_that_can_be_read_are_read(probe: str, kind: Kind, has_val: bool) -> None:
    task, train, val, test = _sets(kind)
    probing = Probing(task.shown, train, val if has_val else None, test)
    assert probing.taps == ["colours", "squares", ALL_TAPS]
    n_rows = 150 * (4 if kind == "segmentation" else 1)
    for tap, n_features in (("colours", 6), (ALL_TAPS, 12)):
        probed = probing.run(probe, tap)
        metric = HEADLINE[kind]
        score = probed.outcome.scores()[metric]
        assert (score if HIGHER_IS_BETTER[metric] else -score) > LEAST[kind]
        assert (probed.n_features, probed.n_train, len(probed.outcome)) == (n_features, n_rows, 60)
        assert probed.seconds > 0


def test_options_of_a_probe_are_its_own() -> None:
    task, train, _, test = _sets("classification")
    probing = Probing(task.shown, train, None, test)
    assert probing.run("knn", "colours", {"n_neighbors": 3}).chosen == {"n_neighbors": 3}
    with pytest.raises(ValueError, match="probe knn has no option 'n_neighbours'; did you mean 'n_neighbors'"):
        probing.run("knn", "colours", {"n_neighbours": 3})
    segmented, train, _, test = _sets("segmentation")
    probing = Probing(segmented.shown, train, None, test)
    with pytest.raises(ValueError, match="the probe logistic does not take segmentation"):
        probing.run("logistic", "colours")


def test_pixels_without_a_label_and_classes_of_no_data_are_left_out() -> None:
    task, train, _, test = _sets("segmentation")
    outcome = Probing(task.shown, train, None, test, no_data=(0,)).run("ridge", "colours").outcome
    assert isinstance(outcome, Segmented)
    assert outcome.no_data == (0,)
    assert int(outcome.confusion.sum()) == 60 * 7 * 8  # the first row of each map has no label
    scores = outcome.scores()
    assert scores["miou_valid"] != scores["miou_present"]


def test_a_part_of_the_training_set_is_fitted_alone() -> None:
    task, train, _, test = _sets("classification")
    some = train.rows([5, 0, 7, 20, 33])
    assert some.keys == [train.keys[i] for i in (5, 0, 7, 20, 33)]
    assert some.digests == [train.digests[i] for i in (5, 0, 7, 20, 33)]
    assert torch.equal(some.labels, train.labels[[5, 0, 7, 20, 33]])
    assert torch.equal(some.at("colours"), train.at("colours")[[5, 0, 7, 20, 33]])
    assert Probing(task.shown, some, None, test).run("ridge", "colours").n_train == 5


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_tenth_of_the_places_is_held_out(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of patches, the images of whole places."""
    held: list[Labelled] = []

    def noted(train: Labelled, seed: int) -> tuple[Labelled, Labelled]:
        held.append(hold_out(train, seed)[1])
        return hold_out(train, seed)

    monkeypatch.setattr(linear, "hold_out", noted)
    task = Task(tasks.task(kind, train=tasks.source(n=120, kind=kind, n_places=30)))
    train, test = (
        extract(functools.partial(_colours, kind == "segmentation"), s, CPU) for s in (task.train, task.test)
    )
    Probing(task.shown, train, None, test).run("linear", "colours", {"n_epochs": 1})
    assert held[0].groups is not None
    n_rows = 4 if kind == "segmentation" else 1
    assert torch.bincount(held[0].groups).unique().tolist() == [0, 4 * n_rows]  # four samples of each place
    assert len(held[0]) == 3 * 4 * n_rows
