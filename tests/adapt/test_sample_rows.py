"""Which samples are trained, chosen and scored on: stratified, thinned to a long tail, held out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_study import opened_task

from ssl_eo.adapt.samples import SamplesConfig, choose_rows, long_tail_rows, stratified_rows


@given(st.lists(st.integers(3, 40), min_size=1, max_size=6), st.integers(0, 99))
def test_every_class_is_in_every_part_and_no_sample_in_two(sizes: list[int], seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    parts = stratified_rows(labels, [0.7, 0.15, 0.15], seed)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))
    for part in parts:
        assert set(labels[part].tolist()) == set(range(len(sizes)))
    for c, size in enumerate(sizes):
        assert abs(int((labels[parts[1]] == c).sum()) - 0.15 * size) <= 1


def test_a_class_of_two_samples_cannot_be_in_three_parts() -> None:
    """The class is called by its name, and what helps is said."""
    parts = [0.6, 0.2, 0.2]
    with pytest.raises(ValueError, match=r"^samples\.stratified: class 1 has 2 samples in train, too few for 3 parts"):
        stratified_rows(torch.tensor([0, 0, 0, 1, 1]), parts)
    task = opened_task("classification", 30)
    counts = torch.bincount(task.train.labels).tolist()
    rare, n = next((c, n) for c, n in enumerate(counts) if 0 < n < 3)
    what = rf"class {task.class_names[rare]} \({rare}\) has {n} samples? in train"
    message = rf"^task scenes: samples\.stratified: {what}, too few for 3 parts; .*split: all"
    with pytest.raises(ValueError, match=message):
        choose_rows(task, SamplesConfig(stratified=parts))


@given(st.floats(1.0, 100.0), st.integers(1, 5))
def test_a_long_tail_falls_geometrically_and_keeps_the_fewest(ratio: float, fewest: int) -> None:
    labels = torch.arange(4).repeat(100)
    rows = long_tail_rows(labels, [2, 0, 3, 1], ratio, fewest)
    sizes = torch.bincount(labels[rows], minlength=4)[[2, 0, 3, 1]].tolist()
    assert sizes == [max(fewest, round(100 * ratio ** (-i / 3))) for i in range(4)]
    assert len(set(rows.tolist())) == len(rows)


def test_splits_of_a_task_are_taken_as_they_are_or_held_out_or_split_anew() -> None:
    task = opened_task("classification", 30)
    assert {k: (of, len(rows)) for k, (of, rows) in choose_rows(task, SamplesConfig()).items()} == {
        "train": ("train", 30), "val": ("val", 30), "test": ("test", 30),
    }  # fmt: skip
    held = choose_rows(opened_task("classification", 30, val=None), SamplesConfig())
    assert [held[name][0] for name in ("train", "val", "test")] == ["train", "train", "test"]
    assert sorted([*held["train"][1].tolist(), *held["val"][1].tolist()]) == list(range(30))
    assert len(held["val"][1]) == 3
    anew = choose_rows(opened_task("classification", 200), SamplesConfig(stratified=[0.5, 0.25, 0.25]))
    assert {of for of, _ in anew.values()} == {"train"}
    assert sorted(torch.cat([rows for _, rows in anew.values()]).tolist()) == list(range(200))


def test_a_long_tail_thins_all_splits_in_one_order() -> None:
    task = opened_task("classification", 120)
    rows = choose_rows(task, SamplesConfig(long_tail_ratio=20.0, fewest=1))
    sizes = {
        name: torch.bincount(getattr(task, of).labels[some], minlength=task.n_classes).tolist()
        for name, (of, some) in rows.items()
    }
    whole = torch.bincount(task.train.labels, minlength=task.n_classes)
    rarest, largest = int(whole.argmin()), int(whole.argmax())
    for found in sizes.values():
        assert found[rarest] < found[largest]
    assert len(rows["train"][1]) < len(task.train)


def test_maps_have_no_classes_of_samples() -> None:
    with pytest.raises(ValueError, match="are for classification, and it is segmentation"):
        choose_rows(opened_task(), SamplesConfig(long_tail_ratio=2.0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stratified": [0.5, 0.5]}, "three positive parts"),
        ({"stratified": [0.5, 0.6, 0.1]}, "sum to 1"),
        ({"long_tail_ratio": 0.5}, "at least 1"),
        ({"fewest": 0}, "at least 1"),
    ],
)
def test_wrong_keys_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplesConfig(**keys)  # type: ignore[arg-type]
