"""From an encoder and a split of a task to features, for each sample or for each patch of it.

A tap is a place where features are read: a depth of the encoder, or a control. All taps come from one forward pass.
Encoders run in float32 unless `precision` says otherwise, and features are kept in float32; but where those of a tap,
for all patches of a split, would take more than half a gigabyte, `extract` keeps them in float16 if that holds them.

B batch, N samples of the split, h w patches of a sample, P patches that are kept of each, D width, F features, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssl_eo.distributed import gather, gather_objects, on_all_ranks, rank, world_size
from ssl_eo.eval.dense import PatchDraw
from ssl_eo.eval.splits import LabelledBatch, Split
from ssl_eo.models.vit import EncoderInput, Tokens
from ssl_eo.seeding import derive_seed

__all__ = [
    "ALL_TAPS",
    "Encode",
    "FeatureSet",
    "Featurise",
    "Pool",
    "Precision",
    "check_taps",
    "extract",
    "extract_over_ranks",
    "in_precision",
    "patch_taps",
    "pool_tokens",
    "pooled_taps",
    "tap_layers",
    "tap_name",
]

ALL_TAPS = "all"
Pool = Literal["cls", "mean", "cls_mean", "mean_std"]
Precision = Literal["float32", "bfloat16"]  # of an encoder's matrix products
Encode = Callable[[EncoderInput], Sequence[Tokens]]  # the tokens of each tapped layer
Featurise = Callable[[EncoderInput], dict[str, Tensor]]  # tap -> [B, F], or [B, h, w, F] of patches

_MAX_FLOAT32_BYTES = 2**29  # of a tap, for all patches of a split


@dataclass(frozen=True)
class FeatureSet:
    """Features of one split: `taps` maps a tap to `[N, F]`, or `[N, h, w, F]` of patches, or `[N, P, F]` of some.

    They are in the order of `keys`, `labels`, `groups` and `digests` (see `LabelledBatch`). `grid` is (h, w) of
    patches; `places [N, P]` says where in it those lie that are kept, -1 for none.
    """

    taps: dict[str, Tensor]
    labels: Tensor
    keys: list[str]
    groups: list[str]
    digests: list[str]
    grid: tuple[int, int] | None = None
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def n_rows(self) -> int:
        """Samples, or patches that are kept of all of them."""
        return next(iter(self.taps.values())).shape[:-1].numel()

    def at(self, tap: str, rows: Tensor) -> Tensor:
        """Features read at `tap`, or with `ALL_TAPS` at all of them side by side, float32 `[R, F]`.

        `rows [R]` count samples or, patch after patch, all patches that are kept.
        """
        names = list(self.taps) if tap == ALL_TAPS else [tap]
        flat = [self.taps[name].flatten(0, -2) for name in names]
        return torch.cat([x[rows.to(x.device)].float() for x in flat], 1)

    def evenly(self, tap: str, n_max: int) -> Tensor:
        """All rows at `tap`, or of more than `n_max` as many, evenly: float32 `[R, F]`."""
        return self.at(tap, torch.linspace(0, self.n_rows - 1, min(self.n_rows, n_max)).long())


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


def in_precision(encode: Encode, precision: Precision, device: torch.device) -> Encode:
    """`encode` with the matrix products of `precision`."""

    def encode_so(inputs: EncoderInput) -> Sequence[Tokens]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return encode(inputs)

    return encode_so


def extract(
    featurise: Featurise,
    split: Split,
    device: torch.device,
    batch_size: int = 128,
    n_workers: int = 0,
    draw: PatchDraw | None = None,
) -> FeatureSet:
    """Features of all samples of `split`, on `device`, by this process alone; raises what reading and encoding do.

    Of patches all are kept, or those that `draw` says.
    """
    kept = _Kept(len(split), device, draw, may_halve=True)
    return kept.collected(featurise, split.stream(batch_size, device, n_workers))


def extract_over_ranks(
    featurise: Featurise, split: Split, device: torch.device, batch_size: int = 128, draw: PatchDraw | None = None
) -> FeatureSet:
    """Features of all samples of a held `split`, on `device`, the same on every rank; `draw` as for `extract`.

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
    kept = _Kept(len(rows), device, draw)
    own = on_all_ranks(lambda: kept.collected(featurise, batches))
    taps = {name: gather(features)[: len(split)] for name, features in own.taps.items()}
    places = None if draw is None or own.grid is None else draw.places(split.labels, keys, own.grid)
    return FeatureSet(taps, split.labels.to(device), keys, split.groups, split.digests, own.grid, places)


class _Kept:
    """Room for the features of at most `n_max` samples, of patches those that `draw` says.

    They are written to their place at once: of patches there are gigabytes, which must not be there twice.
    """

    def __init__(self, n_max: int, device: torch.device, draw: PatchDraw | None, may_halve: bool = False) -> None:
        self._n_max, self._device, self._draw, self._may_halve = n_max, device, draw, may_halve
        self._taps: dict[str, Tensor] = {}

    @torch.no_grad()
    def collected(self, featurise: Featurise, batches: Iterable[LabelledBatch]) -> FeatureSet:
        """Features of all `batches`."""
        labels, places = [], []
        keys: list[str] = []
        groups: list[str] = []
        digests: list[str] = []
        grid: tuple[int, int] | None = None
        for batch in batches:
            found = featurise(batch.inputs)
            _, *middle, _ = next(iter(found.values())).shape
            grid = (middle[0], middle[1]) if middle else None
            of_batch: Tensor | None = None
            if self._draw is not None and grid is not None:
                of_batch = self._draw.places(batch.labels, batch.keys, grid)  # [B, P]
                places.append(of_batch)
            for name, features in found.items():
                self._put(name, len(keys), features, of_batch)
            labels.append(batch.labels)
            keys += batch.keys
            groups += batch.groups
            digests += batch.digests
        taps = {name: features[: len(keys)] for name, features in self._taps.items()}
        which = torch.cat(places) if places else None
        return FeatureSet(taps, torch.cat(labels).to(self._device), keys, groups, digests, grid, which)

    def _put(self, name: str, first: int, features: Tensor, places: Tensor | None) -> None:
        """Write `features` of one tap to their place, from the sample `first` on."""
        if not features.isfinite().all():
            raise ValueError(f"features of tap {name!r} are not finite")
        n_bytes = self._n_max * features[0].numel() * torch.float32.itemsize  # whichever patches are kept
        if places is not None:
            flat, at = features.flatten(1, 2), places.clamp(min=0).to(features.device)  # [B, h*w, F], [B, P]
            features = flat.gather(1, at[..., None].expand(-1, -1, flat.shape[2]))  # [B, P, F]
        if name not in self._taps:
            is_large = self._may_halve and features.ndim > 2 and n_bytes > _MAX_FLOAT32_BYTES
            dtype = torch.float16 if is_large else torch.float32
            self._taps[name] = torch.empty(self._n_max, *features.shape[1:], dtype=dtype, device=features.device)
        if self._taps[name].dtype == torch.float16 and features.abs().max() > torch.finfo(torch.float16).max:
            self._taps[name] = self._taps[name].float()
        self._taps[name][first : first + len(features)] = features


def _rows_of_rank(n: int) -> Tensor:
    share = -(-n // world_size())
    return torch.arange(rank() * share, (rank() + 1) * share).clamp(max=n - 1)


def _check_same(keys: Sequence[str]) -> None:
    """Raise on every rank when ranks hold different samples."""
    digests = gather_objects(derive_seed(*keys))
    if differing := [f"rank {i}" for i, digest in enumerate(digests) if digest != digests[0]]:
        raise RuntimeError(f"{', '.join(differing)}: could not read the same samples as rank 0; see the warnings there")
