"""HLS Burn Scars: scenes of six bands with the scars of wildfires, in the files of its authors (GeoTIFF).

    <root>/training/<stem>_merged.tif  <root>/training/<stem>.mask.tif      <root>/validation/... likewise

Their folder `validation` is the test set of PANGAEA and TerraTorch, and so here; a tenth of `training` is val, the same
scenes as there. Masks hold 0, 1 (burn scar) and -1, of pixels without a label. An image and its mask are found by their
names, not by their places in two lists. Scenes of one tile of Sentinel-2 are one group: they may show one place.

N scenes of a folder, H W pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE
from ssl_eo.data.sources import raster_masks
from ssl_eo.data.sources._side_files import card_schema, dataset_card
from ssl_eo.data.types import Sample, TileSchema

__all__ = ["Config", "Source", "val_rows"]

_FOLDERS = {"train": "training", "val": "training", "test": "validation"}
_VAL_RATIO, _SEED = 0.1, 23  # of PANGAEA
_TILE = re.compile(r"\.(T\d{2}[A-Z]{3})\.")  # of the grid of Sentinel-2, in the name of a scene


@dataclass
class Config:
    """Which scenes."""

    root: str = field(metadata=FREE)  # folder that holds `training` and `validation`
    split: Literal["train", "val", "test"] = "train"  # of PANGAEA: its validation folder is the test set

    def __post_init__(self) -> None:
        if self.split not in _FOLDERS:
            raise ValueError(f"split must be one of {', '.join(_FOLDERS)}, got {self.split!r}")


class Source:
    """A `Source` (see `ssl_eo.data.types`) whose labels are maps `[H, W]` of 0, 1 (burn scar) and -1 (no label)."""

    def __init__(self, cfg: Config) -> None:
        card = dataset_card("hls_burn_scars")
        folder = Path(cfg.root) / _FOLDERS[cfg.split]
        if not folder.is_dir():
            raise ValueError(f"root: {cfg.root} has no folder {folder.name}; it is to hold `training` and `validation`")
        array = card["arrays"]["scenes"]
        height, width = array["shape"]
        known = replace(card_schema(array, array["dtype"]), shape=(height, width), optional=False)
        self._classes = tuple(card["labels"])
        rasters = raster_masks.Config(
            str(folder),
            known.sensor.name,
            list(self._classes),
            images="{key}_merged.tif",
            masks="{key}.mask.tif",
            ignore=-1,
            bands=list(known.bands),
            gsd_m=known.gsd_m,
            no_data=list(known.sensor.no_data),
            window_px=height,
            split="all",
            n_statistics_windows=1,  # the card has them
        )
        self._rasters = raster_masks.Source(rasters)
        self._schema = {known.sensor.name: known}
        n = len(self._rasters)
        in_val = np.isin(np.arange(n), val_rows(n)) if cfg.split != "test" else np.zeros(n, bool)
        self._rows = np.flatnonzero(in_val if cfg.split == "val" else ~in_val)

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return self._schema

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._classes

    @property
    def chunk_size(self) -> int:
        return 4

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        """Raises `ValueError` or `OSError` for a scene that cannot be read, or whose mask holds other classes."""
        sample = self._rasters.read(int(self._rows[index]))
        tile = _TILE.search(sample.key)
        group = sample.key if tile is None else tile[1]
        return replace(sample, meta={**sample.meta, "group": group})

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample."""
        return self._rasters.locate(int(self._rows[index]))

    def fingerprint(self) -> str:
        text = f"{self._rasters.fingerprint()} {self._rows.tolist()} {self._schema}"
        return blake2b(text.encode(), digest_size=16).hexdigest()


def val_rows(n: int) -> NDArray[np.int64]:
    """Which of `n` training scenes, in the order of their names, are val: those of scikit-learn's `train_test_split`
    with a `test_size` of 0.1 and `random_state` 23.
    """
    drawn = np.random.RandomState(_SEED).permutation(n)
    return np.sort(drawn[: math.ceil(_VAL_RATIO * n)])
