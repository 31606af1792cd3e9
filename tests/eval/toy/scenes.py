"""A source for the tests: 8 x 8 tiles whose colour tells the label, written as a user of the package would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.types import Sample, Tile, TileSchema
from ssl_eo.sensors import load_sensor

UNLABELLED = 255  # the first row of every class map
_SIDE, _CELL = 8, 4  # pixels of a tile, and of a cell that has a class of its own


@dataclass
class Config:
    """`share` is the part of each class, `broken` the samples that cannot be read, `fine` those of 0.3 m a pixel.

    With `n_places` samples are of so many places in turn. `copied_from` is a seed: the first `n_copied` samples have
    the pixels of those of that seed.
    """

    n: int = 60
    seed: int = 0
    kind: Literal["classification", "multilabel", "segmentation", "regression"] = "classification"
    share: list[float] = field(default_factory=lambda: [1 / 3, 1 / 3, 1 / 3])
    broken: list[int] = field(default_factory=list)
    fine: list[int] = field(default_factory=list)
    n_places: int | None = None
    copied_from: int = 0
    n_copied: int = 0


class Source:
    """See `ssl_eo.data.types.Source`."""

    chunk_size = 4

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        sensor = load_sensor("rgb")
        self.schema: Mapping[str, TileSchema] = {
            "rgb": TileSchema(sensor, sensor.band_names, "uint8", (_SIDE, _SIDE), 10.0, (100.0,) * 3, (40.0,) * 3)
        }
        self.label_names = () if cfg.kind == "regression" else ("water", "forest", "town")

    def __len__(self) -> int:
        return self.cfg.n

    def read(self, index: int) -> Sample:
        cfg = self.cfg
        if index in cfg.broken:
            raise OSError(f"sample {index} is broken")
        rng = np.random.default_rng([cfg.copied_from if index < cfg.n_copied else cfg.seed, index])
        label, colour = self._draw(rng)
        pixels = (colour + rng.normal(0, 25, (3, _SIDE, _SIDE))).clip(0, 255).astype(np.uint8)
        tile = Tile(pixels, self.schema["rgb"].bands, 0.3 if index in cfg.fine else 10.0)
        meta = {} if cfg.n_places is None else {"group": f"place {index % cfg.n_places}"}
        return Sample(f"toy-{cfg.seed}-{index:03d}", {"rgb": tile}, meta, label)

    def fingerprint(self) -> str:
        return repr(self.cfg)

    def _draw(self, rng: np.random.Generator) -> tuple[Any, NDArray[np.float64]]:
        """A label, and what its pixels are before noise, `[3, H, W]` or what broadcasts to it."""
        colours = 80 + 40 * np.eye(3)  # [K, 3]
        if self.cfg.kind == "multilabel":
            has = rng.random(3) < 0.5
            return has.astype(np.uint8), (80 + 40 * has)[:, None, None]
        if self.cfg.kind == "regression":
            value = float(rng.random())
            return value, np.array([80 + 40 * value, 80, 80])[:, None, None]
        if self.cfg.kind == "segmentation":
            cells = rng.choice(3, (_SIDE // _CELL,) * 2, p=self.cfg.share)
            classes = np.kron(cells, np.ones((_CELL, _CELL), np.int64))  # [H, W]
            label = np.where(np.arange(_SIDE)[:, None] == 0, UNLABELLED, classes)
            return label, np.moveaxis(colours[classes], 2, 0)
        drawn = int(rng.choice(3, p=self.cfg.share))
        return drawn, colours[drawn][:, None, None]
