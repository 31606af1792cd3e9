"""The samples of training sources on which an encoder is measured while it trains, without any label or task.

They are drawn by the seed of the run, the same at every step, on any number of ranks and after a resume. What is shown
of them is what the objective shows to its published encoder (which tile, or tiles of a joint view, in which size; all
bands, or where the encoder takes no others those of the objective), but whole and unaugmented; of tiles that differ in
size it is the middle. Samples without such a tile are passed over. A band in which a sample has no data is missing, for
an encoder that can leave bands out; to others it is shown as the mean of the band. Each rank reads its own part,
renders it once and holds that.

B batch, N samples of a source, n of them on this rank, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_eo.data.mixture import MixedSource
from ssl_eo.data.render import Renderer
from ssl_eo.data.stacking import check_sample, cut_to_views, shown_plans, stack
from ssl_eo.data.types import Batch, Prefetches, Sample, Source, ViewBatch, ViewPlan, Views, move_to
from ssl_eo.distributed import broadcast_object, gather, on_all_ranks, rank, world_size
from ssl_eo.eval.features import Encode, Pool, pool_tokens
from ssl_eo.eval.health import cls_patch_cosine, health
from ssl_eo.eval.splits import INTERPOLATION, UNREADABLE
from ssl_eo.models.vit import EncoderInput
from ssl_eo.seeding import numpy_generator
from ssl_eo.sensors import ChannelMeta

__all__ = ["Training", "WatchedSource", "watched_sources"]

logger = logging.getLogger(__name__)

_N_TRIES = 4  # samples that may take one place, where those before cannot be used
_ROLE = "image"


@dataclass(frozen=True)
class Training:
    """What a run trains on. `names` are those of `data.sources`; `check` raises `ValueError` for what its published
    encoder cannot embed. `has_optional_bands`: samples of one batch may lack different bands.
    """

    names: Sequence[str]
    sources: Sequence[Source]
    views: Views
    check: Callable[[ChannelMeta], None]
    seed: int
    has_optional_bands: bool = False


class _Held(NamedTuple):
    """This rank's part: batches on the host, and which of their rows `[n]` stand for a sample that could be read."""

    batches: list[EncoderInput]
    is_read: Tensor


def watched_sources(training: Training, n_samples: int, batch_size: int, device: torch.device) -> list[WatchedSource]:
    """Every source of a run, also where batches mix them; of equal names the later ones get their position."""
    places = []  # of each: the opened source and which of its samples
    for i, source in enumerate(training.sources):
        start = 0
        for part in source.parts if isinstance(source, MixedSource) else [source]:
            places.append((i, range(start, start + len(part))))
            start += len(part)
    names: list[str] = []
    for i, name in enumerate(training.names):
        names.append(f"{name}@{i}" if name in names else name)
    return [
        WatchedSource(training, i, ids, name, min(n_samples, len(ids)), batch_size, device)
        for (i, ids), name in zip(places, names, strict=True)
    ]


class WatchedSource:
    """`n_samples` of the samples `ids` of the source at position `source`, read at the first use."""

    def __init__(
        self,
        training: Training,
        source: int,
        ids: range,
        name: str,
        n_samples: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.name = name
        self._training, self._position = training, source
        self._source = training.sources[source]
        self._n, self._batch_size, self._device = n_samples, batch_size, device
        order = numpy_generator(training.seed, "health", name).permutation(len(ids))
        self._order = [ids[i] for i in order[: _N_TRIES * n_samples].tolist()]
        self._renderer = Renderer([self._source.schema], INTERPOLATION)

    def measure(self, encode: Encode, taps: Sequence[str], pool: Pool) -> dict[str, dict[str, Any]]:
        """All measures of what `encode` finds at each of `taps`, the same on every rank. Collective.

        What is not finite has no measures, only the number of samples that are not.
        """
        held = self._held
        found = on_all_ranks(lambda: self._collect(held.batches, encode, taps, pool))
        is_read = gather(held.is_read.float().to(self._device))[: self._n].cpu() > 0
        return {tap: _measures(gather(x)[: self._n].cpu()[is_read]) for tap, x in found.items()}

    @torch.no_grad()
    def _collect(
        self, batches: Iterable[EncoderInput], encode: Encode, taps: Sequence[str], pool: Pool
    ) -> dict[str, Tensor]:
        """Features of this rank's samples by tap, `[n, F + 1]`: the last column is how alike CLS and patches are."""
        rows: dict[str, list[Tensor]] = {}
        for inputs in batches:
            for name, tokens in zip(taps, encode(move_to(inputs, self._device)), strict=True):
                features, alike = pool_tokens(tokens, pool), cls_patch_cosine(tokens)
                column = features.new_full((len(features),), torch.inf) if alike is None else alike.to(features.dtype)
                rows.setdefault(name, []).append(torch.cat([features, column[:, None]], 1))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    @cached_property
    def _held(self) -> _Held:
        plans = broadcast_object(on_all_ranks(self._shown))
        return on_all_ranks(lambda: self._read(plans))

    def _read(self, plans: list[ViewPlan]) -> _Held:
        share = -(-self._n // world_size())
        places = [min(place, self._n - 1) for place in range(rank() * share, (rank() + 1) * share)]
        if isinstance(self._source, Prefetches) and self._source.is_remote:
            self._source.prefetch([self._order[place] for place in places])
        batches, is_read = [], []
        spare: Sample | None = None
        for start in range(0, share, self._batch_size):
            found = [self._sample_at(place, plans) for place in places[start : start + self._batch_size]]
            spare = next((sample for sample in found if sample is not None), spare)
            if spare is None:
                raise ValueError(f"none of {len(found)} samples of {self.name} could be used; see the warnings")
            # Every rank has as many rows: a sharded encoder needs equal numbers of forward passes.
            batches.append(self._render([spare if sample is None else sample for sample in found], plans))
            is_read += [sample is not None for sample in found]
        return _Held(batches, torch.tensor(is_read))

    def _sample_at(self, place: int, plans: Sequence[ViewPlan]) -> Sample | None:
        """What stands at a place: the first usable sample of its own few, whatever stands elsewhere."""
        for index in self._order[place :: self._n]:
            try:
                sample = self._source.read(index)
                if all(plan.tile in sample.tiles for plan in plans):
                    return self._cut(sample, plans)
            except UNREADABLE as error:
                logger.warning("health of %s: sample %d is left out: %s", self.name, index, error)
        return None

    def _cut(self, sample: Sample, plans: Sequence[ViewPlan]) -> Sample:
        schema = self._source.schema
        check_sample(sample, schema)
        return cut_to_views(sample, [self._placed(plan, sample) for plan in plans], schema)

    def _shown(self) -> list[ViewPlan]:
        """What of a sample the encoder sees: a plan, or those of a joint view. Boxes are still to be set."""
        problem = "it has no samples"
        for index in self._order[: _N_TRIES * 4]:
            try:
                for plans in self._views_of(index):
                    if self._can_embed(index, plans):
                        return plans
                problem = "its published encoder can embed nothing of what the objective shows"
            except UNREADABLE as error:
                problem = f"sample {index}: {error}"
        raise ValueError(f"the health of {self.name} cannot be measured: {problem}")

    def _views_of(self, index: int) -> Iterator[list[ViewPlan]]:
        """The first view of each role that the objective makes of a sample, with all bands, then with those shown."""
        training, schema = self._training, self._source.schema
        sample = self._source.read(index)
        check_sample(sample, schema)
        planned = training.views.plan(sample, numpy_generator(training.seed, "health", self.name, "plan"))
        cut = cut_to_views(sample, shown_plans(planned), schema)
        rng = numpy_generator(training.seed, "health", self.name, "batch")
        for role in training.views.collate([(cut, planned)], 0, self._position, rng).views.values():
            shown = _first_view(role)
            yield [replace(plan, bands=None) for plan in shown]
            yield shown

    def _can_embed(self, index: int, plans: Sequence[ViewPlan]) -> bool:
        cut = self._cut(self._source.read(index), plans)
        try:
            self._training.check(self._render([cut], plans).channels)
        except ValueError:
            return False
        return True

    def _render(self, samples: Sequence[Sample], plans: Sequence[ViewPlan]) -> EncoderInput:
        """Samples as `cut_to_views` left them."""
        views = [tuple(self._placed(plan, sample) for plan in plans) for sample in samples]
        tiles, stacked = stack(samples, {_ROLE: [views]}, self._source.schema)
        batch = Batch(0, 0, [sample.key for sample in samples], tiles, stacked)
        shown = self._renderer.to(self._device).render(move_to(batch, self._device))[_ROLE]
        if not self._training.has_optional_bands:
            shown = shown.of_one_sensor()  # all rows are of the same tiles
        return move_to(EncoderInput(shown.pixels, shown.channels, shown.gsd_m), "cpu")

    def _placed(self, plan: ViewPlan, sample: Sample) -> ViewPlan:
        """The plan for all of a tile, or where tiles differ in size for its middle, as it is stored.

        Of a tile that was cut this is what is left of it.
        """
        if plan.tile not in sample.tiles:
            raise ValueError(f"sample {sample.key!r} has no tile {plan.tile!r}")
        tile = sample.tiles[plan.tile]
        height, width = full = tile.pixels.shape[-2:]
        if self._source.schema[plan.tile].shape is None:
            height, width = (min(a, b) for a, b in zip(full, plan.size, strict=True))
        top, left = (at + (a - b) // 2 for at, a, b in zip(tile.origin, full, (height, width), strict=True))
        return replace(plan, box=(float(top), float(left), float(height), float(width)))


def _first_view(role: Sequence[ViewBatch]) -> list[ViewPlan]:
    """Tiles, size and bands of the first row of a role, which has several parts where the view is a joint one."""
    plans = []
    for view in role:
        if view.role_shape is None or view.place is None:
            rows = [0]
        else:
            rows = (view.place[:, 0] < view.role_shape[1]).nonzero()[:, 0].tolist()
        for row in rows:
            bands = None if view.bands is None else tuple(band for band in view.bands[row].tolist() if band >= 0)
            plans.append(ViewPlan(view.tile, (0.0, 0.0, 0.0, 0.0), view.size, bands=bands))
    return plans


def _measures(rows: Tensor) -> dict[str, Any]:
    features, alike = rows[:, :-1], rows[:, -1]  # [N, F], [N]
    n_bad = int((~features.isfinite().all(1)).sum())
    counts = {"n_samples": len(features), "n_features": features.shape[1]}
    if n_bad:
        return {**counts, "n_not_finite": n_bad}
    measured = health(features)
    if alike.isfinite().all():
        measured["cls_patch_cosine"] = float(alike.double().mean())
    return {**counts, **measured}
