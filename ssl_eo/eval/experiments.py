"""Scores out of records: the seeds of one experiment are averaged, and nothing else is.

Two things vary and are kept apart: which samples the test set happens to hold (intervals), and the seed of what is
drawn (spread). A score is the mean over seeds.

S seeds, R resamples of the test samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_eo.eval.bootstrap import Interval, interval_of
from ssl_eo.eval.metrics import HIGHER_IS_BETTER
from ssl_eo.eval.records import Record, unpacked

__all__ = [
    "AXES",
    "CONDITIONS",
    "Score",
    "Setting",
    "known",
    "newest_whole",
    "over_seeds",
    "paired_interval",
    "split_digest",
]

# What seeds of one experiment have in common. Bands too, unless they are drawn by the seed.
_FACTS = (
    *("dataset", "metric", "classes", "ignore", "no_data", "data", "content", "sources", "n_test", "n_groups", "n_val"),
    *("tile", "sensor", "size_px", "interpolation", "normalization", "taps", "encoder", "precision", "partition_of"),
    *("options", "n_resamples", "version", "code", "torch"),
)
_FACTS_OF_RESAMPLES = ("dataset", "n_test", "n_groups", "n_resamples", "version", "code")  # the dataset seeds the draw


class Setting(NamedTuple):
    """What results of one entrant on one task by one probe may differ by: conditions, then how it is read."""

    partition: str
    subset: str
    size: str
    tap: str
    pool: str  # of controls that see cells, the size of these; "None" of patches

    @classmethod
    def of(cls, record: Record) -> Setting:
        """That of a result."""
        cell_px = record.get("cell_px")
        pool = str(record["pool"]) if cell_px is None else f"cells of {cell_px} px"
        return cls(str(record["partition"]), str(record["subset"]), str(record["size"]), str(record["tap"]), pool)


AXES = Setting._fields
CONDITIONS = AXES[:3]  # the same for all that are compared; taps and pools are each model's own


@dataclass(frozen=True, eq=False)
class Score:
    """An entrant on one task by one probe in one setting; `records` are those of its seeds, all of one experiment.

    `others` is what sets apart the experiments that were left for this one; empty where it is the only one.
    """

    metric: str
    setting: Setting
    records: Sequence[Record]
    others: Sequence[str] = ()

    @property
    def values(self) -> list[float]:
        """`[S]`."""
        return [float(r["scores"][self.metric]) for r in self.records]

    @property
    def value(self) -> float:
        return over_seeds(self.values)[0]

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None where no two of them differ."""
        return over_seeds(self.values)[1]

    @property
    def n_groups(self) -> int:
        """Places of the test samples, or samples where none share one."""
        return int(self.records[0]["n_groups"])

    @cached_property
    def resampled(self) -> NDArray[np.float64] | None:
        """Scores on resamples of the test samples, `[S, R]`; None where a record has none."""
        texts = [r.get("resampled") for r in self.records]
        if not all(texts):
            return None
        return np.stack([unpacked(str(text)) for text in texts])

    @property
    def interval(self) -> Interval | None:
        """Over the test samples."""
        return None if self.resampled is None else known(interval_of(self.resampled.mean(0)))

    def is_on_the_samples_of(self, other: Score) -> bool:
        """Whether both were scored on the same test samples."""
        return split_digest(self.records[0], "test") == split_digest(other.records[0], "test")


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of the scores `[S]`, and their standard deviation; None where no two of them differ."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(set(values)) > 1 else None


def split_digest(record: Record, split: str) -> str:
    """What tells the samples of a split from others: the digest of what was read of them."""
    return str(record["content"].get(split))


def newest_whole(setting: Setting, records: Sequence[Record]) -> Score:
    """The score of a setting, of which several experiments may have results.

    That is the newest of those with the most seeds: one that is still going on counts once it is through. In it the
    newest result of each seed counts.
    """
    found: dict[str, dict[int, Record]] = {}
    for r in sorted(records, key=lambda r: str(r["date"])):
        seeds = found.pop(_facts(r), {})
        found[_facts(r)] = {**seeds, r["seed"]: r}  # behind those whose last result is older
    whole = max(reversed(found.values()), key=len)
    chosen = [whole[seed] for seed in sorted(whole)]
    firsts = [next(iter(seeds.values())) for seeds in found.values()]
    others = [key for key in (*_FACTS, "bands") if len({_text(r.get(key)) for r in firsts}) > 1]
    return Score(str(chosen[0]["metric"]), setting, chosen, others if len(found) > 1 else ())


def paired_interval(own: Score, rival: Score) -> Interval | None:
    """Of the gain of `own`, on the same resamples for both; None where their resamples are not the same."""
    if own.resampled is None or rival.resampled is None or not own.is_on_the_samples_of(rival):
        return None
    if any(own.records[0].get(key) != rival.records[0].get(key) for key in _FACTS_OF_RESAMPLES):
        return None
    gains = own.resampled.mean(0) - rival.resampled.mean(0)  # [R]
    return known(interval_of(gains if HIGHER_IS_BETTER[own.metric] else -gains))


def known(interval: Interval) -> Interval | None:
    """None instead of an interval without bounds."""
    return interval if np.isfinite([interval.low, interval.high]).all() else None


def _facts(record: Record) -> str:
    keys = _FACTS if record["subset"] == "random" else (*_FACTS, "bands")
    return _text([record.get(key) for key in keys])


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
