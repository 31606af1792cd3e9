"""Samples, and places, that are in more than one split of a task: what a probe has seen, it need not have understood.

A task may say that it knows: `SHARED_KEYS`, `LEAK` and `SHARED_PLACES` begin the flags that do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LEAK",
    "MAX_LEAKED_RATIO",
    "SHARED_KEYS",
    "SHARED_PLACES",
    "Identified",
    "Placed",
    "count_alike",
    "count_leaked",
    "count_shared_groups",
    "digest_of_pixels",
]

logger = logging.getLogger(__name__)

# "shared keys: both archives count from 1": samples of one key are not one sample.
SHARED_KEYS = "shared keys"
# "leak: 3 % of the scenes were drawn twice": equal pixels are known, they are counted and no more said of them.
LEAK = "leak"
# "shared places: the published split parts dates, not fields": likewise for groups in several splits.
SHARED_PLACES = "shared places"

# Of the test samples: where more of them have the pixels of a training sample, the task is in no mean over tasks. So
# many, all of them right for that alone, move an accuracy by a point.
MAX_LEAKED_RATIO = 0.01

_BLANK = "blank "  # begins the digest of a tile without a picture: such tiles are alike whatever they are of


class Identified(Protocol):
    """Samples of a split by what tells them apart: keys, and digests of their pixels."""

    @property
    def keys(self) -> list[str]: ...

    @property
    def digests(self) -> list[str]: ...


class Placed(Protocol):
    """Samples of a split by the groups that they belong to: those of one group share a place."""

    @property
    def groups(self) -> list[str]: ...


def digest_of_pixels(pixels: NDArray[Any]) -> str:
    """What tells the pixels `[C, H, W]` of a tile from others; it knows tiles of which every band has one value."""
    digest = blake2b(pixels.tobytes(), digest_size=16).hexdigest()
    is_blank = np.array_equal(pixels, np.broadcast_to(pixels[:, :1, :1], pixels.shape), equal_nan=True)
    return f"{_BLANK}{digest}" if is_blank else digest


def count_leaked(task: str, splits: Mapping[str, Identified], flags: Sequence[str] = ()) -> int:
    """How many samples of the last of `splits`, the one that is scored, have the pixels of a sample of the first.

    `splits` are in the order train, val, test. Raises `ValueError` where two of them share a key, and warns where one
    has samples with the pixels of another's, unless `flags` admit it.
    """
    if not _admits(flags, SHARED_KEYS):
        for first, second in combinations(splits, 2):
            _check_keys(task, first, second, splits)
    if not _admits(flags, LEAK):
        for first, second in combinations(splits, 2):
            _warn_of_alike(task, first, second, splits)
    train, *_, scored = splits.values()
    return count_alike(scored, train)


def count_alike(scored: Identified, other: Identified) -> int:
    """How many samples of `scored` have the pixels of a sample of `other`; blank tiles are those of none."""
    return len(_alike(scored, other))


def count_shared_groups(task: str, splits: Mapping[str, Placed], flags: Sequence[str] = ()) -> int:
    """How many groups of the last of `splits`, the one that is scored, have a sample in an earlier one too.

    Warns of them, once, unless `flags` admit it. Where they say that keys of the splits mean different samples, their
    names of places mean nothing either, and there is none to count.
    """
    if _admits(flags, SHARED_KEYS):
        return 0
    *earlier, scored = splits
    known = set[str]().union(*(splits[name].groups for name in earlier))
    groups = splits[scored].groups
    shared = [group for group in dict.fromkeys(groups) if group in known]
    if shared and not _admits(flags, LEAK) and not _admits(flags, SHARED_PLACES):
        n_samples = sum(group in known for group in groups)
        _warn_once(
            f"task {task}: {len(shared)} of {len(set(groups))} places of {scored}, with {n_samples} of its"
            f" {len(groups)} samples, are in an earlier split too, the first is {shared[0]}; scores flatter whoever"
            f" remembers. A flag of the task that begins with {SHARED_PLACES!r} says that this is known"
        )
    return len(shared)


@cache
def _warn_once(message: str) -> None:
    """Once in a process: all features of a task have the same samples."""
    logger.warning("%s", message)


def _check_keys(task: str, first: str, second: str, splits: Mapping[str, Identified]) -> None:
    known = set(splits[first].keys)
    shared = [key for key in splits[second].keys if key in known]
    if shared:
        raise ValueError(
            f"task {task}: {len(shared)} of {len(splits[second].keys)} samples of {second} are in {first} too, the"
            f" first is {shared[0]}; give splits that share no sample, or, where the keys alone are the same, a flag"
            f" that begins with {SHARED_KEYS!r}"
        )


def _warn_of_alike(task: str, first: str, second: str, splits: Mapping[str, Identified]) -> None:
    if alike := _alike(splits[second], splits[first]):
        logger.warning(
            "task %s: %d of %d samples of %s have the pixels of a sample of %s, the first is %s; scores flatter whoever"
            " remembers. A flag of the task that begins with %r says that this is known",
            *(task, len(alike), len(splits[second].keys), second, first, alike[0], LEAK),
        )


def _alike(samples: Identified, other: Identified) -> list[str]:
    """Keys of `samples` whose pixels are those of a sample of `other`, but for blank tiles."""
    known = set(other.digests)
    pairs = zip(samples.keys, samples.digests, strict=True)
    return [key for key, digest in pairs if digest in known and not digest.startswith(_BLANK)]


def _admits(flags: Sequence[str], word: str) -> bool:
    return any(flag.startswith(word) for flag in flags)
