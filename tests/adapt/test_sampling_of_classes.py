"""How often classes occur, and epochs in which they are seen equally often."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.adapt.sampling import balanced_rows, class_counts, drawn_classes
from ssl_eo.eval.kinds import Kind

labels_of_samples = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def test_counts_of_each_kind() -> None:
    assert class_counts(torch.tensor([0, 2, 2]), "classification", 4).tolist() == [1, 0, 2, 0]
    maps = torch.tensor([[[0, 1], [1, 9]], [[9, 9], [9, 3]]], dtype=torch.int16)
    assert class_counts(maps, "segmentation", 4, ignore=9).tolist() == [1, 2, 0, 1]
    several = torch.tensor([[1, 0, 1], [1, 0, 0]], dtype=torch.uint8)
    assert class_counts(several, "multilabel", 3).tolist() == [[0, 2, 1], [2, 0, 1]]


@settings(deadline=None)
@given(labels_of_samples, st.integers(0, 40))
def test_counts_of_parts_add_up(labels: list[int], cut: int) -> None:
    def counts(some: list[int]) -> torch.Tensor:
        return class_counts(torch.tensor(some, dtype=torch.int64), "classification", 5)

    assert torch.equal(counts(labels[:cut]) + counts(labels[cut:]), counts(labels))
    assert counts(labels).sum() == len(labels)


def test_a_map_is_drawn_for_its_rarest_class() -> None:
    maps = torch.zeros(4, 2, 3, dtype=torch.int16)
    maps[1, 0], maps[2, 0, :2], maps[2, 1, 0] = 1, 1, 2
    maps[3] = 7
    assert drawn_classes(maps, "segmentation", 3, ignore=7).tolist() == [0, 1, 2, -1]
    # Pixels to ignore are no class, even if they have the number of one.
    assert drawn_classes(maps, "segmentation", 8, ignore=2).tolist() == [0, 1, 1, 7]


@settings(deadline=None)
@given(labels_of_samples, st.integers(1, 100), st.integers(0, 2**62))
def test_classes_and_samples_of_a_class_come_equally_often(labels: list[int], n_rows: int, seed: int) -> None:
    rows = balanced_rows(torch.tensor(labels), seed, n_rows)
    assert rows.shape == (n_rows,)
    by_class = Counter(labels[i] for i in rows.tolist())
    of_each = [by_class[c] for c in set(labels)]
    assert max(of_each) - min(of_each) <= 1
    by_row = Counter(rows.tolist())
    for c in set(labels):
        times = [by_row[i] for i, label in enumerate(labels) if label == c]
        assert max(times) - min(times) <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_maps_are_balanced_by_their_rarest_class(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = (torch.rand(20, 3, 3, generator=generator) ** 6 * 4).to(torch.int16)  # class 0 is in most of them
    maps[0] = 255
    classes = drawn_classes(maps, "segmentation", 4, 255)
    rows = balanced_rows(classes, seed, 50)
    counts = classes[rows].bincount(minlength=4)[classes[1:].unique()]
    assert 0 not in rows
    assert counts.max() - counts.min() <= 1


def test_an_epoch_is_as_long_as_the_labels_and_a_function_of_its_seed() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    epochs = [balanced_rows(labels, seed) for seed in (5, 5, 6)]
    assert len(epochs[0]) == 100
    assert labels[epochs[0]].bincount().tolist() == [50, 50]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0].sort().values, epochs[2].sort().values)
    assert labels[epochs[0][:50]].unique().tolist() == [0, 1]  # in random order


def test_what_is_left_over_goes_to_no_class_in_particular() -> None:
    labels = torch.tensor([0, 1, 2])
    drawn = [int(balanced_rows(labels, seed, 1)[0]) for seed in range(60)]
    assert min(Counter(drawn)[c] for c in range(3)) >= 8


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((4,), "regression", "classes are counted of classification, segmentation, multilabel, got regression"),
        ((4, 2), "classification", r"labels of classification must be \[N\], got \[4, 2\]"),
        ((4,), "segmentation", r"labels of segmentation must be \[N, H, W\], got \[4\]"),
        ((4, 2), "multilabel", r"labels must be \[N, 3\], got \[4, 2\]"),
    ],
)
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...], kind: Kind, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_counts(torch.zeros(shape, dtype=torch.int64), kind, 3)


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="labels must be classes from 0 to 2, found 0 to 255"):
        class_counts(torch.tensor([[[0, 255]]]), "segmentation", 3)
    with pytest.raises(ValueError, match="labels must be integers"):
        class_counts(torch.tensor([0.5]), "classification", 3)


def test_what_cannot_be_balanced_is_refused() -> None:
    with pytest.raises(ValueError, match="balanced sampling is for classification and segmentation, got multilabel"):
        drawn_classes(torch.ones(2, 3), "multilabel", 3)
    with pytest.raises(ValueError, match="needs a labelled sample and a row at least, got 0 and 0"):
        balanced_rows(drawn_classes(torch.full((2, 4, 4), 255), "segmentation", 3, 255), 0)
    with pytest.raises(ValueError, match="got 1 and 0"):
        balanced_rows(torch.tensor([0]), 0, n_rows=0)
