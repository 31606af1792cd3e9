"""From an encoder and a split of a task to float32 features, for each sample or for each patch of it.

A tap is a place where features are read: a depth of the encoder, or a control. All taps come from one forward pass.

B batch, N samples of the split, h w patches of a sample, D width, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssl_eo.distributed import gather, gather_objects, on_all_ranks, rank, world_size
from ssl_eo.eval.splits import LabelledBatch, Split
from ssl_eo.models.vit import EncoderInput, Tokens
from ssl_eo.seeding import derive_seed

__all__ = [
    "ALL_TAPS",
    "Encode",
    "FeatureSet",
    "Featurise",
    "Pool",
    "check_taps",
    "extract",
    "extract_over_ranks",
    "patch_taps",
    "pool_tokens",
    "pooled_taps",
    "tap_layers",
    "tap_name",
]

ALL_TAPS = "all"
Pool = Literal["cls", "mean", "cls_mean", "mean_std"]
Encode = Callable[[EncoderInput], Sequence[Tokens]]  # the tokens of each tapped layer
Featurise = Callable[[EncoderInput], dict[str, Tensor]]  # tap -> [B, F], or [B, h, w, F] of patches


@dataclass(frozen=True)
class FeatureSet:
    """Features of one split: `taps` maps a tap to float32 `[N, F]`, or `[N, h, w, F]` of patches.

    They are in the order of `keys`, `labels`, `groups` and `digests` (see `LabelledBatch`).
    """

    taps: dict[str, Tensor]
    labels: Tensor
    keys: list[str]
    groups: list[str]
    digests: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def at(self, tap: str) -> Tensor:
        """Features read at `tap`, or with `ALL_TAPS` at all of them, side by side."""
        return torch.cat(list(self.taps.values()), -1) if tap == ALL_TAPS else self.taps[tap]

    def rows(self, index: Sequence[int]) -> FeatureSet:
        """The samples at `index`."""
        at = torch.tensor(index, dtype=torch.long)
        taps = {name: features[at.to(features.device)] for name, features in self.taps.items()}
        labels = self.labels[at.to(self.labels.device)]
        keys, groups, digests = ([column[i] for i in index] for column in (self.keys, self.groups, self.digests))
        return FeatureSet(taps, labels, keys, groups, digests)


def pool_tokens(tokens: Tokens, pool: Pool) -> Tensor:
    """One float32 vector a sample: `[B, D]`, or `[B, 2D]` for the pools with two parts."""
    parts = []
    if pool in ("cls", "cls_mean"):
        parts.append(tokens.cls.float())
    if pool in ("mean", "cls_mean", "mean_std"):
        parts.append(tokens.patches.float().mean(1))
    if pool == "mean_std":
        parts.append(tokens.patches.float().std(1, correction=0))
    return torch.cat(parts, 1)


def tap_layers(depth_ratios: Sequence[float], n_layers: int) -> list[int]:
    """Indices of the blocks after which features are read: ratio 1 is the last block, 0.5 the middle one."""
    return [max(1, round(ratio * n_layers)) - 1 for ratio in depth_ratios]


def tap_name(depth_ratio: float) -> str:
    """How a depth is called in records: `"last"`, or `"depth_0.67"`."""
    return "last" if depth_ratio == 1.0 else f"depth_{depth_ratio:.2f}"


def check_taps(depth_ratios: Sequence[float]) -> None:
    """Raise `ValueError` unless features can be read at `depth_ratios`, and told apart by `tap_name`."""
    if not depth_ratios or not all(0 < ratio <= 1 for ratio in depth_ratios):
        raise ValueError(f"taps are ratios of the depth, above 0 and up to 1, got {list(depth_ratios)}")
    if len({tap_name(ratio) for ratio in depth_ratios}) < len(depth_ratios):
        raise ValueError(f"taps must differ in their first two decimals, got {list(depth_ratios)}")


def pooled_taps(encode: Encode, names: Sequence[str], pool: Pool) -> Featurise:
    """`encode` as a function from inputs to pooled features, one tap for each tapped layer."""

    def featurise(inputs: EncoderInput) -> dict[str, Tensor]:
        return {name: pool_tokens(t, pool) for name, t in zip(names, encode(inputs), strict=True)}

    return featurise


def patch_taps(encode: Encode, names: Sequence[str]) -> Featurise:
    """`encode` as a function from inputs to features of patches `[B, h, w, D]`, one tap for each tapped layer."""

    def featurise(inputs: EncoderInput) -> dict[str, Tensor]:
        found = {}
        for name, tokens in zip(names, encode(inputs), strict=True):
            patches = tokens.patches.float()  # [B, N, D]
            found[name] = patches.reshape(len(patches), *tokens.grid, patches.shape[-1])  # [B, h, w, D]
        return found

    return featurise


def extract(
    featurise: Featurise, split: Split, device: torch.device, batch_size: int = 128, n_workers: int = 0
) -> FeatureSet:
    """Features of all samples of `split`, on `device`, by this process alone; raises what reading and encoding do."""
    return _collect(featurise, split.stream(batch_size, device, n_workers), len(split), device)


def extract_over_ranks(featurise: Featurise, split: Split, device: torch.device, batch_size: int = 128) -> FeatureSet:
    """Features of all samples of a held `split`, on `device`, the same on every rank.

    Each rank holds the whole split, since which samples it has depends on the labels read before, and forwards an equal
    share. Ranks past the end repeat the last sample, so that all make the same number of forward passes (a sharded
    encoder needs that), and the repeats are dropped. An error on any rank is raised on all of them, so that no rank is
    left waiting for another; so is a difference between the samples that ranks hold. (But what fails on one rank inside
    a forward pass of a sharded encoder leaves the others in its collectives, as in a training step.)
    """
    keys = on_all_ranks(lambda: split.keys)  # read now: ranks must agree before the first forward pass
    _check_same(keys)
    rows = _rows_of_rank(len(split))
    batches = split.batches(rows, batch_size, device)
    own = on_all_ranks(lambda: _collect(featurise, batches, len(rows), device))
    taps = {name: gather(features)[: len(split)] for name, features in own.taps.items()}
    return FeatureSet(taps, split.labels.to(device), keys, split.groups, split.digests)


@torch.no_grad()
def _collect(featurise: Featurise, batches: Iterable[LabelledBatch], n_max: int, device: torch.device) -> FeatureSet:
    """Features of all `batches`, which have at most `n_max` samples.

    They are written to their place at once: of patches there are gigabytes, which must not be there twice.
    """
    taps: dict[str, Tensor] = {}
    labels: list[Tensor] = []
    keys: list[str] = []
    groups: list[str] = []
    digests: list[str] = []
    for batch in batches:
        first = len(keys)
        for name, features in featurise(batch.inputs).items():
            if not features.isfinite().all():
                raise ValueError(f"features of tap {name!r} are not finite")
            if name not in taps:
                taps[name] = torch.empty(n_max, *features.shape[1:], dtype=torch.float32, device=features.device)
            taps[name][first : first + len(features)] = features
        labels.append(batch.labels)
        keys += batch.keys
        groups += batch.groups
        digests += batch.digests
    taps = {name: features[: len(keys)] for name, features in taps.items()}
    return FeatureSet(taps, torch.cat(labels).to(device), keys, groups, digests)


def _rows_of_rank(n: int) -> Tensor:
    share = -(-n // world_size())
    return torch.arange(rank() * share, (rank() + 1) * share).clamp(max=n - 1)


def _check_same(keys: Sequence[str]) -> None:
    """Raise on every rank when ranks hold different samples."""
    digests = gather_objects(derive_seed(*keys))
    if differing := [f"rank {i}" for i, digest in enumerate(digests) if digest != digests[0]]:
        raise RuntimeError(f"{', '.join(differing)}: could not read the same samples as rank 0; see the warnings there")
