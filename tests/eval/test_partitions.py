"""Parts of a training set: ours are nested and keep every class, published ones are those of the dataset."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import tasks

from ssl_eo.data.opening import SourceConfig, open_source
from ssl_eo.data.sources.geobench import Config
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.partitions import parse_partition, partition_rows

sys.path.append(str(Path(__file__).parents[1] / "data"))

from write_geobench import write_dataset

TOY = tasks.source()


def _rows(name: str, labels: list[Any], kind: Kind = "classification", seed: int = 0) -> list[int]:
    keys = [f"toy-{i}" for i in range(len(labels))]
    rows, origin = partition_rows(parse_partition(name), TOY, kind, keys, torch.tensor(labels), seed)
    assert origin == ("all" if name in ("1.00x", "nested_1.00x") else "nested")
    return rows


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    ratios=st.lists(st.integers(1, 100), min_size=2, max_size=2),
    seed=st.integers(0, 3),
)
def test_ours_are_nested_stratified_and_keep_every_class(labels: list[int], ratios: list[int], seed: int) -> None:
    small, large = sorted(ratios)
    some, more = (_rows(f"nested_{percent / 100:.2f}x", labels, seed=seed) for percent in (small, large))
    assert set(some) <= set(more)
    assert some == sorted(set(some))
    for percent, rows in ((small, some), (large, more)):
        for value in set(labels):
            n = sum(labels[row] == value for row in rows)
            assert n == math.ceil(percent * labels.count(value) / 100) >= 1


def test_the_whole_is_all_of_it() -> None:
    labels = [0, 1, 1, 2] * 5
    assert _rows("1.00x", labels) == _rows("nested_1.00x", labels) == list(range(20))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("0.10x", ["0.10x", "0.1x", "0.100x"]),
        ("nested_0.10x", ["nested_0.1x", "nested_0.1000x"]),
        ("0.014x", ["0.014x", "0.0140x"]),
        ("0.00001x", ["0.00001x", "0.000010x"]),
        ("1.00x", ["1.0x", "1.000x", "nested_1.0x"]),  # all samples, by whichever draw
    ],
)
def test_a_part_has_one_name_however_it_is_written(name: str, written: list[str]) -> None:
    assert {parse_partition(text).name for text in written} == {name}
    assert parse_partition(name).name == name


@given(st.integers(1, 10**6))
def test_what_a_part_is_called_says_its_ratio(millionths: int) -> None:
    part = parse_partition(f"{millionths / 1e6:.6f}x")
    assert parse_partition(part.name) == part
    assert part.ratio == millionths / 1e6


def test_ours_depend_on_the_seed_alone() -> None:
    labels = [0, 1] * 50
    assert _rows("0.10x", labels) == _rows("nested_0.1x", labels) == _rows("0.10x", labels)
    assert _rows("0.10x", labels) != _rows("0.10x", labels, seed=1)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=120),
    ratios=st.lists(st.integers(1, 100), min_size=2, max_size=2),
)
def test_of_several_classes_a_sample_each_keeps_its_share_of_the_rarest(
    labels: list[list[int]], ratios: list[int]
) -> None:
    small, large = sorted(ratios)
    some, more = (_rows(f"nested_{percent / 100:.2f}x", labels, "multilabel") for percent in (small, large))
    assert set(some) <= set(more)
    n_with = [sum(sample[k] for sample in labels) for k in range(4)]
    rarest = [min((k for k in range(4) if s[k]), key=lambda k: (n_with[k], k), default=4) for s in labels]
    for percent, rows in ((small, some), (large, more)):
        for value in set(rarest):
            n = sum(rarest[row] == value for row in rows)
            assert n == math.ceil(percent * rarest.count(value) / 100) >= 1


def test_the_only_samples_of_a_rare_class_are_not_all_left_out() -> None:
    labels = [[1, 0]] * 98 + [[1, 1]] * 2
    assert any(row >= 98 for row in _rows("0.05x", labels, "multilabel"))


@pytest.mark.parametrize("kind", ["segmentation", "regression"])
def test_without_classes_of_samples_a_part_is_of_all(kind: Kind) -> None:
    assert len(_rows("0.25x", list(range(40)), kind)) == 10


OTHERS = ("0.5", "0x", "0.00x", "1.01x", "2.0x", "nested_x", "half", "0.1x ", "-0.1x", "", "\u0660.1x")


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^'.*' is no part; give for instance 0\.01x, 0\.10x, 1\.00x or nested"):
        parse_partition(name)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceConfig, Path]:
    written = write_dataset(tmp_path_factory.mktemp("geobench"), "m-eurosat", n_train=40)
    return SourceConfig("geobench", Config(root=str(written.root), dataset="m-eurosat")), written.folder


def _of_dataset(name: str, cfg: SourceConfig, n_left_out: int = 0) -> tuple[list[str], str]:
    source = open_source(cfg)
    keys = [source.read(i).key for i in range(len(source) - n_left_out)]
    labels = torch.zeros(len(keys), dtype=torch.long)
    rows, origin = partition_rows(parse_partition(name), cfg, "classification", keys, labels, 0)
    return [keys[row] for row in rows], origin


def test_published_parts_are_those_of_the_dataset(published: tuple[SourceConfig, Path]) -> None:
    cfg, folder = published
    for name in ("0.05x", "0.50x"):
        keys, origin = _of_dataset(name, cfg)
        assert origin == "published"
        assert sorted(keys) == sorted(json.loads((folder / f"{name}_train_partition.json").read_text())["train"])
    assert _of_dataset("0.5x", cfg) == _of_dataset("0.50x", cfg)


def test_what_was_not_published_is_ours(published: tuple[SourceConfig, Path]) -> None:
    cfg, _ = published
    for name, n in (("0.30x", 12), ("nested_0.50x", 20), ("0.504x", 21), ("0.495x", 20), ("0.014x", 1)):
        keys, origin = _of_dataset(name, cfg)
        assert (len(keys), origin) == (n, "nested")
    assert len(_of_dataset("1.00x", cfg)[0]) == 40


def test_a_published_part_of_a_limited_training_set_is_refused(published: tuple[SourceConfig, Path]) -> None:
    cfg, folder = published
    whole = json.loads((folder / "0.50x_train_partition.json").read_text())["train"]
    source = open_source(cfg)
    kept = {source.read(i).key for i in range(10)}
    n_absent = len(set(whole) - kept)
    with pytest.raises(ValueError, match=rf"partition 0.50x of geobench names {n_absent} samples .* max_train: null"):
        _of_dataset("0.50x", cfg, n_left_out=30)
