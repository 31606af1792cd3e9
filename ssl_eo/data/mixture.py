"""Several sources in one run: their weights, and batches whose samples come from all of them.

By default a step is fed by one source (`order.Mixture`). With `data.mixing: sample` the sources become one, whose
samples may lack tiles, and every batch holds samples of each in proportion (`order.MixedOrder`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import accumulate

from ssl_eo.data.types import Locates, Prefetches, Sample, Source, TileSchema

__all__ = ["MixedSource", "scaled_weights"]


def scaled_weights(weights: Sequence[float], sizes: Sequence[int], temperature: float | None) -> tuple[float, ...]:
    """`weights` as they are, or times `size ** (1 / temperature)`: 1 is in proportion to the sizes, large is equal."""
    if temperature is None:
        return tuple(weights)
    largest = max(sizes)
    return tuple(w * (n / largest) ** (1 / temperature) for w, n in zip(weights, sizes, strict=True))


class MixedSource:
    """The samples of all `parts`, one part after the other. Every tile is optional: a sample has those of its part.

    Parts whose tiles of one name are alike share the name; where dtype, bands, size or statistics differ, the later one
    is called `name@<position of the part>`.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self._starts = list(accumulate(map(len, self.parts), initial=0))
        self._schema: dict[str, TileSchema] = {}
        self._names: list[dict[str, str]] = []  # of each part: its tile name -> the name here
        for i, part in enumerate(self.parts):
            names = {}
            for name, own in part.schema.items():
                schema = replace(own, optional=True)
                names[name] = name if self._schema.setdefault(name, schema) == schema else f"{name}@{i}"
                self._schema[names[name]] = schema
            self._names.append(names)

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return self._schema

    @property
    def label_names(self) -> tuple[str, ...]:
        """Those of the parts, where all agree."""
        found = {part.label_names for part in self.parts}
        return found.pop() if len(found) == 1 else ()

    @property
    def chunk_size(self) -> int:
        return min(part.chunk_size for part in self.parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> Sample:
        part, own = self.place(index)
        sample = self.parts[part].read(own)
        names = self._names[part]
        return replace(sample, tiles={names[name]: tile for name, tile in sample.tiles.items()})

    @property
    def is_remote(self) -> bool:
        return any(isinstance(part, Prefetches) and part.is_remote for part in self.parts)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Hand each part what is its own, if it fetches."""
        own: dict[int, list[int]] = {}
        for part, index in map(self.place, indices):
            own.setdefault(part, []).append(index)
        for part, found in own.items():
            source = self.parts[part]
            if isinstance(source, Prefetches):
                source.prefetch(found)

    def locate(self, index: int) -> tuple[str | None, str | None]:
        """Key and file of a sample, as far as its part knows them."""
        part, own = self.place(index)
        source = self.parts[part]
        return source.locate(own) if isinstance(source, Locates) else (None, None)

    def fingerprint(self) -> str:
        return blake2b(" ".join(p.fingerprint() for p in self.parts).encode(), digest_size=16).hexdigest()

    def place(self, index: int) -> tuple[int, int]:
        """Which of the parts holds a sample, and its position there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]
