"""One crop of the ground through several modalities: what each of them is, and the views of a sample.

A modality is a tile of a sample, or some bands of it: an image or a class map. A sample may lack any of them, as long
as what it has fills the budget of visible patches.

B samples, T modalities that are seen, N patches of a view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_eo.data.plans import CropConfig, resized_crop, same_ground
from ssl_eo.data.stacking import stack, stack_meta
from ssl_eo.data.token_budget import TokenBudgetConfig, choose_visible, draw_shares
from ssl_eo.data.types import Batch, Sample, TileSchema, ViewPlan

__all__ = ["ImageTargetConfig", "JointPlan", "JointViews", "ModalityConfig", "schemas_of"]


@dataclass
class ModalityConfig:
    """What a modality is, and what is done with it."""

    tile: str | list[str]  # of a sample; of a list, the first that a sample has
    bands: list[str] | None = None  # of the tile, in this order; null: all
    kind: Literal["pixels", "classes"] = "pixels"  # an image, or a class map
    input: bool = True  # whether its patches are ever seen
    # What is predicted of it, each by a decoder of its own: the values (pixels or classes), or pixels with mean and
    # variance of each patch taken out. Empty: it is only seen.
    targets: list[Literal["values", "norm_pix"]] = field(default_factory=lambda: ["values"])
    loss: Literal["mse", "l1"] = "mse"  # of pixels; classes have cross-entropy
    weight: float = 1.0  # of the loss of each of its targets
    standardise: bool = False  # pixels: each view by mean and spread of its own middle ranks (10 to 90 %)
    stride: int = 1  # classes: a pixel of the map is this many pixels of an image to a side
    code_dim: int = 64  # classes: width of a class's code

    def __post_init__(self) -> None:
        if not self.input and not self.targets:
            raise ValueError("input is false and targets is empty: the modality would have no use")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets are named twice: {', '.join(self.targets)}")
        if self.weight < 0 or self.stride < 1 or self.code_dim < 1:
            raise ValueError(
                "weight must not be negative, stride and code_dim must be at least 1, got"
                f" {self.weight}, {self.stride} and {self.code_dim}"
            )
        if self.kind == "classes" and (self.standardise or "norm_pix" in self.targets):
            raise ValueError("standardise and the target norm_pix are for kind pixels, not for classes")
        if self.kind == "pixels" and self.stride != 1:
            raise ValueError(f"stride is for kind classes, got {self.stride} for pixels")

    @property
    def tiles(self) -> list[str]:
        return [self.tile] if isinstance(self.tile, str) else self.tile


@dataclass
class ImageTargetConfig:
    """Something known of a whole sample that is predicted, as MP-MAE does (arXiv 2405.02771)."""

    key: str  # of Sample.meta; month is taken from the date where a sample has no month
    kind: Literal["numbers", "angle", "class"] = "numbers"  # angle: its sine and cosine are predicted
    size: int = 1  # how many numbers or angles, or how many classes
    period: float = 360.0  # angle: one turn, in the unit of the value (12 for months)
    mean: list[float] = field(default_factory=list)  # numbers: what is taken off each; empty: nothing
    std: list[float] = field(default_factory=list)  # numbers: what each is divided by; empty: 1
    weight: float = 1.0  # of its loss

    def __post_init__(self) -> None:
        if self.size < (2 if self.kind == "class" else 1):
            raise ValueError(f"size must be at least 1, and 2 for classes, got {self.size}")
        for key in ("mean", "std"):
            if (n := len(getattr(self, key))) not in (0, self.size):
                raise ValueError(f"{key} must have as many values as size says, {self.size}, got {n}")
        if self.kind == "class" and self.key == "month" and self.size < 13:
            raise ValueError("months are 1 to 12: size 13 for kind class, or kind angle with period 12")
        if self.weight < 0 or not self.period > 0 or not all(value > 0 for value in self.std):
            raise ValueError(f"weight must not be negative, period and std positive, got {self.weight}, {self.period}")

    @property
    def n_values(self) -> int:
        """What a head predicts."""
        return 2 * self.size if self.kind == "angle" else self.size

    @property
    def n_stored(self) -> int:
        """How many values a sample has."""
        return 1 if self.kind == "class" else self.size

    def encode(self, values: Tensor) -> Tensor:
        """Values of samples `[B]` or `[B, size]` as they are predicted, `[B, n_values]`; class numbers stay `[B]`."""
        if self.kind == "class":
            return values
        values = values.view(len(values), -1)
        if self.kind == "angle":
            angle = values * (2 * math.pi / self.period)
            return torch.cat((angle.sin(), angle.cos()), dim=1)
        mean, std = torch.tensor(self.mean or [0.0]), torch.tensor(self.std or [1.0])
        return (values - mean) / std


class JointPlan(NamedTuple):
    """The view of each modality that a sample has, and the shares of those that are seen in what is seen, `[T]`."""

    views: dict[str, ViewPlan]
    shares: NDArray[np.float64]


@dataclass(frozen=True)
class JointViews:
    """One random crop of each sample, the same ground in all modalities, and a budget of visible patches."""

    modalities: Mapping[str, ModalityConfig]
    crop: CropConfig
    budget: TokenBudgetConfig
    image_targets: Mapping[str, ImageTargetConfig]
    n_patches: int  # of a view
    schemas: Sequence[Mapping[str, TileSchema]]

    @property
    def inputs(self) -> list[str]:
        return [name for name, modality in self.modalities.items() if modality.input]

    def check(self) -> None:
        """Raise `ValueError` where the budget does not fit the modalities that are seen."""
        inputs, alpha, n_visible = self.inputs, self.budget.alpha, self.budget.n_visible
        if isinstance(alpha, list) and len(alpha) != len(inputs):
            raise ValueError(
                f"objective.budget.alpha has {len(alpha)} values for the {len(inputs)} modalities that are seen:"
                f" {', '.join(inputs)}"
            )
        if n_visible > len(inputs) * self.n_patches:
            raise ValueError(
                f"objective.budget.n_visible {n_visible} is more than the {len(inputs)} x {self.n_patches} patches that"
                " are seen at most"
            )

    def plan(self, sample: Sample, rng: np.random.Generator) -> JointPlan:
        """Raises `ValueError` for a sample whose modalities have too few patches, or lie on different ground."""
        tiles = {name: tile for name, modality in self.modalities.items() if (tile := _tile_of(modality, sample))}
        present = [name in tiles for name in self.inputs]
        if sum(present) * self.n_patches < self.budget.n_visible:
            raise ValueError(
                f"its {sum(present)} modalities of {self.n_patches} patches are too few for objective.budget.n_visible"
                f" {self.budget.n_visible} (it has {', '.join(sample.tiles)})"
            )
        drawn = resized_crop(sample, _smallest(sample, tiles.values()), self.crop, rng)
        views = {name: self._view(self.modalities[name], tile, drawn, sample) for name, tile in tiles.items()}
        return JointPlan(views, draw_shares(self.budget, present, rng))

    def collate(
        self, planned: list[tuple[Sample, JointPlan]], step: int, source: int, rng: np.random.Generator
    ) -> Batch:
        samples, plans = [sample for sample, _ in planned], [plan for _, plan in planned]
        roles = {name: [[plan.views.get(name, ()) for plan in plans]] for name in self.modalities}
        tiles, views = stack(samples, roles, self.schemas[source])
        shares, slots = np.stack([plan.shares for plan in plans]), [sample.slot for sample in samples]
        seed = int(rng.integers(2**62))
        return Batch(
            step=step,
            source=source,
            keys=[sample.key for sample in samples],
            tiles=tiles,
            views=views,
            visible=choose_visible(self.inputs, shares, self.n_patches, self.budget.n_visible, slots, seed),
            meta={name: _known(target, samples) for name, target in self.image_targets.items()},
        )

    def _view(self, modality: ModalityConfig, tile: str, drawn: ViewPlan, sample: Sample) -> ViewPlan:
        side, own = self.crop.size_px // modality.stride, sample.tiles[tile]
        bands = None if modality.bands is None else tuple(own.bands.index(band) for band in modality.bands)
        shown = drawn if tile == drawn.tile else same_ground(sample, drawn, tile)
        return replace(shown, size=(side, side), bands=bands)


def schemas_of(name: str, modality: ModalityConfig, schemas: Sequence[Mapping[str, TileSchema]]) -> list[TileSchema]:
    """The tiles of all sources that show a modality, with its bands alone.

    Raises `ValueError` where there is none, one is no such modality, or they differ in how many bands or classes.
    """
    where, known = f"objective.modalities.{name}", dict.fromkeys(tile for schema in schemas for tile in schema)
    found = [schema[tile] for schema in schemas for tile in modality.tiles if tile in schema]
    if not found:
        raise ValueError(f"{where}.tile: no source has {' or '.join(modality.tiles)} (there are {', '.join(known)})")
    shown = [_with_bands(where, tile, modality.bands) for tile in found]
    for tile in shown:
        if tile.sensor.is_categorical != (modality.kind == "classes"):
            is_what = "a class map" if tile.sensor.is_categorical else "no class map"
            raise ValueError(f"{where}.kind is {modality.kind}, but {tile.sensor.name} is {is_what}")
    if len(counts := {(len(tile.bands), tile.sensor.bands[0].n_classes) for tile in shown}) > 1:
        raise ValueError(f"{where}: its tiles need as many bands and classes each, got {sorted(counts, key=str)}")
    if modality.kind == "classes" and len(shown[0].bands) != 1:
        raise ValueError(f"{where}.bands: name one class map of {', '.join(shown[0].bands)}")
    return shown


def _with_bands(where: str, tile: TileSchema, bands: list[str] | None) -> TileSchema:
    if bands is None:
        return tile
    if missing := [band for band in bands if band not in tile.bands]:
        raise ValueError(
            f"{where}.bands: {tile.sensor.name} has no {', '.join(missing)} (there are {', '.join(tile.bands)})"
        )
    index = [tile.bands.index(band) for band in bands]
    mean, std = (tuple(values[i] for i in index) for values in (tile.mean, tile.std))
    return replace(tile, bands=tuple(bands), mean=mean, std=std)


def _tile_of(modality: ModalityConfig, sample: Sample) -> str | None:
    return next((tile for tile in modality.tiles if tile in sample.tiles), None)


def _smallest(sample: Sample, names: Iterable[str]) -> str:
    """The tile of the smallest footprint, of several the finest: what it shows, all of them do."""

    def size(name: str) -> tuple[float, float]:
        tile = sample.tiles[name]
        height, width = tile.pixels.shape[-2:]
        return height * width * tile.gsd_m**2, tile.gsd_m

    return min(dict.fromkeys(names), key=size)


def _known(target: ImageTargetConfig, samples: Sequence[Sample]) -> Tensor:
    return target.encode(stack_meta(samples, {target.key: target.n_stored})[target.key])
