"""Packed data and published partitions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from toy import scenes

from ssl_eo.data.opening import SourceConfig
from ssl_eo.data.pack import pack
from ssl_eo.data.sources import geobench, shards
from ssl_eo.eval.partitions import parse_partition, partition_rows

sys.path.append(str(Path(__file__).parents[1] / "data"))

from write_geobench import write_dataset


def test_a_published_partition_of_packed_data_is_refused(tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "data", "m-eurosat", n_train=20)
    pack(geobench.Source(geobench.Config(str(written.root), "m-eurosat")), tmp_path / "packed")
    packed = SourceConfig("shards", shards.Config(str(tmp_path / "packed")))
    keys, labels = written.splits["train"], torch.arange(20) % 10
    message = "partition 0.10x: geobench has a published one, which packed data lack; take nested_0.10x, or read"
    with pytest.raises(ValueError, match=message):
        partition_rows(parse_partition("0.10x"), packed, "classification", keys, labels, 0)
    for name, origin in (("nested_0.10x", "nested"), ("1.00x", "all"), ("0.30x", "nested")):  # no 0.30x was published
        assert partition_rows(parse_partition(name), packed, "classification", keys, labels, 0)[1] == origin
    pack(scenes.Source(scenes.Config(n=20)), tmp_path / "others")
    others = SourceConfig("shards", shards.Config(str(tmp_path / "others")))
    assert partition_rows(parse_partition("0.10x"), others, "classification", keys, labels, 0)[1] == "nested"


def test_of_data_packed_from_a_source_that_is_not_here_nothing_is_guessed(tmp_path: Path) -> None:
    elsewhere = type("Source", (scenes.Source,), {"__module__": "elsewhere.scenes"})
    pack(elsewhere(scenes.Config(n=20)), tmp_path)
    packed = SourceConfig("shards", shards.Config(str(tmp_path)))
    keys, labels = [str(i) for i in range(20)], torch.arange(20) % 3
    message = r"partition 0.10x: whether there is a published one is not known, .* 'elsewhere.scenes'.*nested_0.10x"
    with pytest.raises(ValueError, match=message):
        partition_rows(parse_partition("0.10x"), packed, "classification", keys, labels, 0)
    assert partition_rows(parse_partition("nested_0.10x"), packed, "classification", keys, labels, 0)[1] == "nested"
