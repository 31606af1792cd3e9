"""A source for the tests: 8 x 8 tiles whose band means tell the class, written as a user of the package would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import load_sensor


@dataclass
class Config:
    """`share` is the part of each class, `broken` the samples that cannot be read, `fine` those of 0.3 m a pixel."""

    n: int = 60
    seed: int = 0
    share: list[float] = field(default_factory=lambda: [1 / 3, 1 / 3, 1 / 3])
    broken: list[int] = field(default_factory=list)
    fine: list[int] = field(default_factory=list)


class Source:
    """See `ssl_eo.data.types.Source`."""

    label_names = ("water", "forest", "town")
    chunk_size = 4

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        sensor = load_sensor("rgb")
        self.schema: Mapping[str, TileSchema] = {
            "rgb": TileSchema(sensor, sensor.band_names, "uint8", (8, 8), 10.0, (100.0,) * 3, (40.0,) * 3)
        }

    def __len__(self) -> int:
        return self.cfg.n

    def read(self, index: int) -> Sample:
        if index in self.cfg.broken:
            raise OSError(f"sample {index} is broken")
        rng = np.random.default_rng([self.cfg.seed, index])
        label = int(rng.choice(3, p=self.cfg.share))
        colour = 80 + 40 * np.eye(3)[label]
        pixels = (colour[:, None, None] + rng.normal(0, 25, (3, 8, 8))).clip(0, 255).astype(np.uint8)
        tile = Tile(pixels, self.schema["rgb"].bands, 0.3 if index in self.cfg.fine else 10.0)
        return Sample(f"toy-{index:03d}", {"rgb": tile}, label=label)

    def fingerprint(self) -> str:
        return repr(self.cfg)
