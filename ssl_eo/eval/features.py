"""From an encoder and a split of a task to one float32 feature vector a sample and tap, equal on every rank.

A tap is a place where features are read: a depth of the encoder, or a control. All taps come from one forward pass.

B batch, N samples of the split, P patches, D width, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_eo.distributed import gather, rank, world_size
from ssl_eo.eval.tasks import Split
from ssl_eo.models.vit import EncoderInput, Tokens
from ssl_eo.seeding import derive_seed

__all__ = [
    "Encode",
    "FeatureSet",
    "Featurise",
    "Pool",
    "extract",
    "pool_tokens",
    "pooled_taps",
    "tap_layers",
    "tap_name",
]

Pool = Literal["cls", "mean", "cls_mean", "mean_std"]
Encode = Callable[[EncoderInput], Sequence[Tokens]]  # the tokens of each tapped layer
Featurise = Callable[[EncoderInput], dict[str, Tensor]]  # tap -> [B, F]


@dataclass(frozen=True)
class FeatureSet:
    """Features of one split: `taps` maps a tap to float32 `[N, F]`, in the order of `labels [N]`."""

    taps: dict[str, Tensor]
    labels: Tensor

    def concatenated(self) -> Tensor:
        """All taps side by side, `[N, sum of F]`."""
        return torch.cat(list(self.taps.values()), 1)


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


def pooled_taps(encode: Encode, names: Sequence[str], pool: Pool) -> Featurise:
    """`encode` as a function from inputs to pooled features, one tap for each tapped layer."""

    def featurise(inputs: EncoderInput) -> dict[str, Tensor]:
        return {name: pool_tokens(t, pool) for name, t in zip(names, encode(inputs), strict=True)}

    return featurise


def extract(featurise: Featurise, split: Split, device: torch.device, batch_size: int = 128) -> FeatureSet:
    """Features of all samples of `split`, on `device`, the same on every rank.

    Each rank holds the whole split, since which samples it has depends on the labels read before, and forwards an equal
    share. Ranks past the end repeat the last sample, so that all make the same number of forward passes (a sharded
    encoder needs that), and the repeats are dropped. An error before the results are gathered, on any rank, is raised
    on all of them, so that no rank is left waiting for another. So is a difference between the samples that ranks hold.
    """
    error: Exception | None = None
    local: dict[str, Tensor] = {}
    try:
        local = _forward(featurise, split.batches(_rows_of_rank(len(split)), batch_size, device))
    except Exception as caught:
        error = caught
    _agree(error, [] if error else split.keys)
    taps = {name: gather(features)[: len(split)] for name, features in local.items()}
    return FeatureSet(taps, split.labels.to(device))


@torch.no_grad()
def _forward(featurise: Featurise, batches: Iterable[EncoderInput]) -> dict[str, Tensor]:
    collected: dict[str, list[Tensor]] = {}
    for inputs in batches:
        for name, features in featurise(inputs).items():
            collected.setdefault(name, []).append(features.float())
    taps = {name: torch.cat(parts) for name, parts in collected.items()}
    for name, features in taps.items():
        if not features.isfinite().all():
            raise ValueError(f"features of tap {name!r} are not finite")
    return taps


def _rows_of_rank(n: int) -> Tensor:
    share = -(-n // world_size())
    return torch.arange(rank() * share, (rank() + 1) * share).clamp(max=n - 1)


def _agree(error: Exception | None, keys: Sequence[str]) -> None:
    """Raise on every rank when one has an `error`, or when ranks hold different samples."""
    if world_size() == 1:
        if error is not None:
            raise error
        return
    told: list[tuple[str | None, int]] = [(None, 0)] * world_size()
    message = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(told, (message, derive_seed(*keys)))
    if failed := [f"rank {i}: {message}" for i, (message, _) in enumerate(told) if message is not None]:
        raise RuntimeError("; ".join(failed)) from error
    if differing := [f"rank {i}" for i, (_, digest) in enumerate(told) if digest != told[0][1]]:
        raise RuntimeError(f"{', '.join(differing)}: could not read the same samples as rank 0; see the warnings there")
