"""Parts of a training set, for curves of accuracy over labels: those that were published, and our nested ones.

`0.10x` is a tenth of the training samples: the published tenth where the dataset has one, else ours. `nested_0.10x` is
ours in any case. Ours are nested: a larger one holds all samples of a smaller one, so a curve over them rises by what
is added, not by the draw. They keep the shares of classes; where samples have several, those of the rarest class of
each. Maps and numbers are drawn from all alike.

N samples, K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from ssl_eo.components import resolve
from ssl_eo.data.opening import SourceConfig, open_source
from ssl_eo.data.sources import shards
from ssl_eo.eval.kinds import Kind
from ssl_eo.seeding import torch_generator

__all__ = ["WHOLE", "Partition", "parse_partition", "partition_rows"]

WHOLE = "1.00x"
_NAME = re.compile(r"(nested_)?([01]\.[0-9]+)x")


@dataclass(frozen=True)
class Partition:
    """A part of the training set; `ratio` of its samples."""

    name: str  # the one way to write it: `0.10x` of `0.1x`
    ratio: float
    is_nested: bool  # ours, whatever was published


def parse_partition(name: str) -> Partition:
    """`0.01x`, `nested_0.5x`, ...; raises `ValueError` for anything else.

    However a part is written, it has one name, with two decimals at least; ours of all samples is the whole.
    """
    match = _NAME.fullmatch(name)
    if match is None or not 0 < float(match[2]) <= 1:
        raise ValueError(f"{name!r:.80} is no part; give for instance 0.01x, 0.10x, 1.00x or nested_0.10x")
    ratio = float(match[2])
    is_nested = match[1] is not None and ratio < 1
    whole, _, decimals = format(Decimal(repr(ratio)), "f").partition(".")
    return Partition(f"{'nested_' * is_nested}{whole}.{decimals.rstrip('0').ljust(2, '0')}x", ratio, is_nested)


def partition_rows(
    partition: Partition, train: SourceConfig, kind: Kind, keys: Sequence[str], labels: Tensor, seed: int
) -> tuple[list[int], Literal["all", "published", "nested"]]:
    """Positions in `keys` of the samples of `partition`, and where that comes from.

    `train` is the source of the samples `keys`, `labels` are theirs. Raises `ValueError` where the published partition
    names samples that are not among them.
    """
    if partition.ratio == 1:
        return list(range(len(keys))), "all"
    published = None if partition.is_nested else _published(partition, train)
    if published is None:
        return _nested(partition.ratio, kind, labels, seed), "nested"
    position = {key: i for i, key in enumerate(keys)}
    if absent := [key for key in published if key not in position]:
        raise ValueError(
            f"partition {partition.name} of {train.name} names {len(absent)} samples that are not in the training set,"
            f" the first is {absent[0]}; set max_train: null where it is limited, and see the warnings: samples that"
            " cannot be read are left out"
        )
    return sorted(position[key] for key in published), "published"


def _published(partition: Partition, train: SourceConfig) -> list[str] | None:
    """Keys of the published partition, None where the dataset has none of this ratio.

    Raises `ValueError` for packed data of a dataset that has it: which sample is in which was not packed.
    """
    if isinstance(train.options, shards.Config):
        _check_packed(partition, shards.Source(train.options).manifest.source_name)
        return None
    if (name := _name_of(partition, type(train.options))) is None:
        return None
    source: Any = open_source(replace(train, options=replace(train.options, partition=name)))
    return [source.locate(i)[0] for i in range(len(source))]


def _check_packed(partition: Partition, packed_from: str) -> None:
    try:
        options = resolve("ssl_eo.data.sources", packed_from).Config
    except ValueError as error:
        raise ValueError(
            f"partition {partition.name}: whether there is a published one is not known, since the data were packed"
            f" from another source: {error}; take nested_{partition.name}"
        ) from None
    if _name_of(partition, options) is not None:
        raise ValueError(
            f"partition {partition.name}: {packed_from} has a published one, which packed data lack; take"
            f" nested_{partition.name}, or read the published files with name: {packed_from}"
        )


def _name_of(partition: Partition, options: type[Any]) -> str | None:
    """What a source with such options calls the published partition of this ratio; None where it has none.

    A source of a dataset with published partitions has an option `partition`, whose values are their names.
    """
    if "partition" not in {f.name for f in fields(options)}:
        return None
    known = get_args(get_type_hints(options)["partition"])
    return next((name for name in known if _ratio(name) == partition.ratio), None)


def _nested(ratio: float, kind: Kind, labels: Tensor, seed: int) -> list[int]:
    """A share of each class, at least one sample; of maps and numbers, a share of all."""
    order = torch.randperm(len(labels), generator=torch_generator(seed, "nested partitions"))
    of_class = _strata(kind, labels.cpu())[order]
    chosen: list[int] = []
    for value in sorted(set(of_class.tolist())):
        members = order[of_class == value]
        n_kept = math.ceil(round(ratio * len(members), 6))  # 0.07 * 100 is a little more than 7
        chosen += members[:n_kept].tolist()
    return sorted(chosen)


def _strata(kind: Kind, labels: Tensor) -> Tensor:
    """What each sample counts as, `[N]`: its class, or the rarest of its classes; K where it has none."""
    if kind == "classification":
        return labels
    if kind == "multilabel":
        has = labels > 0  # [N, K]
        rarest = torch.where(has, has.sum(0), len(labels) + 1).argmin(1)
        return torch.where(has.any(1), rarest, labels.shape[1])
    return torch.zeros(len(labels), dtype=torch.long)


def _ratio(name: str) -> float | None:
    """Of a published partition; None for those that are no share, such as `default`."""
    match = _NAME.fullmatch(name)
    return None if match is None else float(match[2])
