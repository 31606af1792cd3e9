"""Labelled samples as a model is trained on them: pixels rendered when they are asked for, or features computed once.

N samples, B of them in a batch, C channels, D width, h w grid, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ssl_eo.adapt.model import TaskModel
from ssl_eo.eval.decoders import TapMaps
from ssl_eo.eval.splits import Split
from ssl_eo.models.vit import EncoderInput

__all__ = ["Examples", "Features", "gigabytes_of_features"]

_SYMMETRIES = 8  # of a square: four quarter turns, each flipped or not


@dataclass(frozen=True)
class Features:
    """What a frozen backbone makes of all samples of a split, on the device: for every decoder and learning rate."""

    maps: Sequence[Tensor]  # [N, D, h, w] of each tap
    cls: Tensor | None = None  # [N, D]

    @classmethod
    def of(
        cls, model: TaskModel, examples: Examples, batch_size: int, autocast: AbstractContextManager[object]
    ) -> Features:
        """Those of the backbone of `model`. `autocast` is the context in which it is asked, that of training."""
        parts = []
        model.eval()
        with torch.no_grad(), autocast:
            for rows in torch.split(torch.arange(len(examples)), batch_size):
                inputs, _ = examples.batch(rows)
                parts.append(model.taps(inputs))
        tokens = [part.cls for part in parts if part.cls is not None]
        maps = [torch.cat(maps) for maps in zip(*(part.maps for part in parts), strict=True)]
        return cls(maps, torch.cat(tokens) if tokens else None)

    def at(self, rows: Tensor) -> TapMaps:
        """Of the samples `rows`."""
        rows = rows.to(self.maps[0].device)
        return TapMaps([maps[rows] for maps in self.maps], None if self.cls is None else self.cls[rows])

    def channels(self, index: Sequence[Tensor]) -> Features:
        """The channels `index [d]` of each tap."""
        return Features([maps[:, some.to(maps.device)] for maps, some in zip(self.maps, index, strict=True)])


def gigabytes_of_features(model: TaskModel, examples: Examples) -> float:
    """What `Features` would take, from those of one sample, in float32."""
    model.eval()
    with torch.no_grad():
        taps = model.taps(examples.batch(torch.zeros(1, dtype=torch.long))[0])
    kept = [*taps.maps, *([] if taps.cls is None else [taps.cls])]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept) * len(examples) / 1e9


class Examples:
    """The samples `rows` of a held split, by their position in `rows`."""

    def __init__(self, split: Split, rows: Tensor, device: torch.device) -> None:
        self._split, self._rows, self.device = split, rows, device

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def labels(self) -> Tensor:
        """`[N, ...]`, see `LabelledBatch`; on the device."""
        return self._split.labels[self._rows].to(self.device)

    @property
    def groups(self) -> list[str]:
        """The place of each."""
        groups = self._split.groups
        return [groups[i] for i in self._rows.tolist()]

    @property
    def keys(self) -> list[str]:
        """The key of each."""
        keys = self._split.keys
        return [keys[i] for i in self._rows.tolist()]

    @property
    def digests(self) -> list[str]:
        """That of the pixels of each."""
        digests = self._split.digests
        return [digests[i] for i in self._rows.tolist()]

    @cached_property
    def shown(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width = self.batch(torch.zeros(1, dtype=torch.long))[0].pixels.shape[-2:]
        return height, width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what is predicted: of the maps where labels are such, else of the images."""
        return (self.labels.shape[1], self.labels.shape[2]) if self.has_maps else self.shown

    @property
    def has_maps(self) -> bool:
        """Whether every pixel has a label."""
        return self.labels.ndim == 3

    def batch(self, rows: Tensor, symmetries: Tensor | None = None) -> tuple[EncoderInput, Tensor]:
        """Inputs `[B, C, H, W]` and labels of the samples `rows`, each turned and flipped by its number of 0 to 7."""
        found = next(iter(self._split.batches(self._rows[rows], len(rows), self.device)))
        labels = self.labels[rows.to(self.labels.device)]
        if symmetries is None:
            return found.inputs, labels
        pixels = _transformed(found.inputs.pixels, symmetries)
        return replace(found.inputs, pixels=pixels), _transformed(labels, symmetries) if self.has_maps else labels

    def drawn_symmetries(self, n: int, generator: torch.Generator) -> Tensor:
        """A number for each of `n` samples; of images that are not square those that keep their shape."""
        height, width = self.shown
        if height == width:
            return torch.randint(_SYMMETRIES, (n,), generator=generator)
        return 2 * torch.randint(_SYMMETRIES // 2, (n,), generator=generator)  # half turns, flipped or not


def _transformed(images: Tensor, symmetries: Tensor) -> Tensor:
    """`images [B, ..., H, W]`, each turned by so many quarters as its number modulo 4, and flipped for 4 to 7."""
    out = torch.empty_like(images)
    for number in sorted(set(symmetries.tolist())):
        rows = (symmetries == number).nonzero()[:, 0].to(images.device)
        turned = torch.rot90(images[rows], number % 4, (-2, -1))
        out[rows] = turned.flip(-1) if number >= 4 else turned
    return out
