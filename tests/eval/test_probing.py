"""Each probe on each kind of labels, from the source to the score."""

from __future__ import annotations

import functools
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import scenes, tasks

from ssl_eo.components import available
from ssl_eo.data.types import Sample
from ssl_eo.eval.controls import band_statistics
from ssl_eo.eval.dense import class_fractions, control_of_cells
from ssl_eo.eval.features import ALL_TAPS, FeatureSet, Featurise, extract
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.metrics import HEADLINE, HIGHER_IS_BETTER, Segmented
from ssl_eo.eval.probes import Labelled, kinds_of, linear, ridge
from ssl_eo.eval.probes.base import hold_out
from ssl_eo.eval.probing import Part, Probing, draw_of
from ssl_eo.eval.splits import Split
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
    train, val = _kept(task.train), _kept(task.val)
    return task, train, val, extract(_featurise(kind), task.test, CPU)


def _featurise(kind: Kind) -> Featurise:
    return functools.partial(_colours, kind == "segmentation")


def _kept(split: Split) -> FeatureSet:
    """What probes are fitted or chosen on."""
    return extract(_featurise(split.shown.kind), split, CPU, draw=draw_of(split.shown, split.name, len(split)))


@pytest.mark.parametrize("has_val", [True, False], ids=["val", "no val"])
@pytest.mark.parametrize(("probe", "kind"), CASES)
def test_labels_that_can_be_read_are_read(probe: str, kind: Kind, has_val: bool) -> None:
    task, train, val, test = _sets(kind)
    probing = Probing(task.shown, train, val if has_val else None, test)
    assert probing.taps == ["colours", "squares", ALL_TAPS]
    n_rows = 150 * (4 if kind == "segmentation" else 1)  # labelled patches: the lower half of each cell has labels
    for tap, n_features in (("colours", 6), (ALL_TAPS, 12)):
        probed = probing.run(probe, tap)
        metric = HEADLINE[kind]
        score = probed.outcome.scores()[metric]
        assert (score if HIGHER_IS_BETTER[metric] else -score) > LEAST[kind]
        assert (probed.n_features, probed.n_fitted, len(probed.outcome)) == (n_features, n_rows, 60)
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


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_part_of_the_training_set_is_fitted_alone(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    task, train, _, test = _sets(kind)
    rows = [5, 0, 7, 20, 33]
    fitted_on: list[Labelled] = []
    fit = ridge.fit
    monkeypatch.setattr(ridge, "fit", lambda train, *rest: fitted_on.append(train) or fit(train, *rest))
    probing = Probing(task.shown, train, None, test)
    part = Part(rows)
    assert probing.run("ridge", "colours", part=part).n_fitted == 5 * (4 if kind == "segmentation" else 1)
    whole = _kept(Task(tasks.task(kind, n_train=150)).train)
    assert whole.keys == train.keys
    at = torch.tensor(rows)
    if kind == "segmentation":
        assert train.places is not None
        of_image = train.taps["colours"][at]  # [5, 4, F], in the order of the draw
        places = train.places[at]
        expected = of_image.gather(1, places.argsort(1)[..., None].expand_as(of_image)).flatten(0, 1)
        assert torch.equal(fitted_on[0].targets, class_fractions(train.labels[at], (2, 2), 3, task.cfg.ignore))
    else:
        expected = train.at("colours", at)
        assert torch.equal(fitted_on[0].targets, train.labels[at])
    assert torch.equal(fitted_on[0].features, expected)
    probing.run("ridge", "colours", part=part)
    assert fitted_on[1] is fitted_on[0]  # one copy for all that is asked of it
    probing.run("ridge", "squares", part=part)
    assert fitted_on[2] is not fitted_on[0]


class _Sparse(scenes.Source):
    """Of each image one, two or three of four cells are labelled, in turn."""

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        label = np.array(sample.label)
        for cell in range(index % 3 + 1, 4):
            row, column = divmod(cell, 2)
            label[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = scenes.UNLABELLED
        return replace(sample, label=label)


@pytest.mark.parametrize(("n_enough", "n_fitted"), [(60 * 4, 20 * (1 + 2 + 3)), (60 * 2, 20 * (1 + 2 + 2)), (1, 60)])
def test_patches_without_a_label_are_none_of_those_that_are_fitted(
    n_enough: int, n_fitted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither do they count in the number that is enough."""
    monkeypatch.setattr("ssl_eo.eval.dense._MAX_FITTED", n_enough)
    task, _, _, test = _sets("segmentation")
    train = _kept(Split("train", _Sparse(scenes.Config(n=60, kind="segmentation")), task.shown, None))
    assert train.places is not None
    assert train.places.shape == (60, max(1, n_enough // 60))
    assert Probing(task.shown, train, None, test).run("ridge", "colours").n_fitted == n_fitted


def test_images_without_any_label_are_an_error() -> None:
    task, train, _, test = _sets("segmentation")
    nothing = replace(train, labels=torch.full_like(train.labels, 255), places=torch.full_like(train.places, -1))
    with pytest.raises(ValueError, match="task toy: none of the 150 images of train has a label"):
        Probing(task.shown, nothing, None, test).run("ridge", "colours")


def test_features_are_not_held_by_what_has_used_them() -> None:
    """Of two jobs that follow each other, only one may be in memory."""
    task, train, val, test = _sets("classification")
    probing = Probing(task.shown, train, val, test)
    probing.run("ridge", "colours")
    gone = weakref.ref(probing)
    gc.disable()
    try:
        del probing
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_tenth_of_the_places_is_held_out(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of patches, the images of whole places."""
    held: list[Labelled] = []

    def noted(train: Labelled, seed: int) -> tuple[Labelled, Labelled]:
        held.append(hold_out(train, seed)[1])
        return hold_out(train, seed)

    monkeypatch.setattr(linear, "hold_out", noted)
    task = Task(tasks.task(kind, train=tasks.source(n=120, kind=kind, n_places=30)))
    train, test = _kept(task.train), extract(_featurise(kind), task.test, CPU)
    Probing(task.shown, train, None, test).run("linear", "colours", {"n_epochs": 1})
    assert held[0].groups is not None
    n_rows = 4 if kind == "segmentation" else 1
    assert torch.bincount(held[0].groups).unique().tolist() == [0, 4 * n_rows]  # four samples of each place
    assert len(held[0]) == 3 * 4 * n_rows
