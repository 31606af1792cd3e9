"""GeoBench version 1 (Lacoste et al. 2023): twelve datasets with published splits, for comparing encoders.

One HDF5 file a sample, one array a band; of each sensor and resolution a tile of its own. The package `geobench` is not
needed, and no pickle is loaded: labels come from the lists beside the samples, else from a description that is read
without running it (`_geobench_pickle`). What the datasets hold is told by `datasets_meta/datasets/geobench.yaml`.

In two datasets bands are stored under names of other bands; `bands: corrected` gives the true ones. Whether they are,
and in which unit the values are, is told by the dataset's own statistics, and checked on some samples.

C bands, H W pixels, K classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import FREE, one_line, suggest
from ssl_eo.data.sources._content import content_of_some
from ssl_eo.data.sources._geobench_card import Bands, DatasetCard, TileCard, card_of
from ssl_eo.data.sources._geobench_files import SampleFile, open_sample
from ssl_eo.data.sources._geobench_folder import (
    STATISTICS_NAME,
    SUFFIX,
    find_folder,
    listed_labels,
    read_partition,
)
from ssl_eo.data.sources._geobench_units import (
    BandStatistics,
    Unit,
    has_slipped,
    pixel_problem,
    read_band_statistics,
    sensor_in,
    shows_slip,
    unit_of,
)
from ssl_eo.data.sources._side_files import evenly_spaced
from ssl_eo.data.types import Sample, Tile, TileSchema

__all__ = ["Config", "Source"]

logger = logging.getLogger(__name__)

_N_LOOKED_AT = 8  # samples of a split, evenly spaced: the first that can be read says what the dtype is

Partition = Literal["default", "0.01x", "0.02x", "0.05x", "0.10x", "0.20x", "0.50x", "1.00x"]


@dataclass
class Config:
    """Which dataset, which part of it, and which names its bands go by."""

    root: str = field(metadata=FREE)  # folder of classification_v1.0 and segmentation_v1.0, of one, or of a dataset
    dataset: str  # m-eurosat, m-brick-kiln, ..., or an older name of one
    split: Literal["train", "val", "test"] = "train"  # as published
    partition: Partition = "default"  # 0.01x: a hundredth of the training samples; val and test are the same in all
    bands: Bands = "corrected"  # corrected: what was measured; as_published: what the names on disk say
    tiles: list[str] | None = None  # names of the tiles to offer; None: all
    check_units: bool = True  # refuse data that are in another unit than is known of the dataset

    def __post_init__(self) -> None:
        if self.tiles is not None and not self.tiles:
            raise ValueError("tiles is an empty list; name at least one tile, or leave it out for all")


@dataclass(frozen=True)
class _Look:
    """What a sample holds, by tile, and in the array that tells whether bands have slipped, `[H, W]`."""

    path: Path
    dtypes: dict[str, np.dtype[Any]]
    pixels: dict[str, NDArray[Any]]
    telling: NDArray[Any] | None


class Source:
    """A `Source` (see `ssl_eo.data.types`) of one dataset.

    Labels are a class, `[K]` uint8 of 0 and 1, or a class for each pixel, `[H, W]` integers. `card` is what is known
    of the dataset. `units` has the unit of each tile, as its statistics say. `meta["group"]` of a sample names the
    place that it shares with others, where names of samples tell.
    """

    def __init__(self, cfg: Config) -> None:
        self.card: DatasetCard = card_of(cfg.dataset)
        self._cfg = cfg
        self._tiles = _chosen(cfg, self.card)
        self._folder = find_folder(Path(cfg.root), self.card)
        self._keys = read_partition(self._folder, cfg.partition, cfg.split)
        self._statistics = read_band_statistics(self._folder / STATISTICS_NAME)
        self._check_arrays()
        self._check_slip()
        self.units: dict[str, Unit] = {}
        for name, tile in self._tiles.items():
            self.units[name] = unit_of(name, tile, self._of_arrays(tile), cfg.check_units)
            if tile.nominal_bands:
                logger.warning("%s: nobody recorded which bands %s holds; theirs are nominal", self.card.name, name)
        is_map = self.card.kind == "segmentation"
        self._labels = None if is_map else listed_labels(self._folder, self.card, self._keys)
        self._dtypes = self._look_at_samples()
        self._schema = {name: self._tile_schema(name, tile) for name, tile in self._tiles.items()}

    @property
    def schema(self) -> Mapping[str, TileSchema]:
        return self._schema

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.card.classes

    @property
    def chunk_size(self) -> int:
        return 1  # a sample is a file of its own

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> Sample:
        key = self._keys[index]
        tiles = {}
        with open_sample(self._path(key)) as file:
            for name, tile in self._tiles.items():
                pixels, date = file.pixels(tile, self._dtypes[name])
                tiles[name] = Tile(pixels, tile.bands, tile.gsd_m, date)
            label = self._label(key, file)
        group = self.card.group_of(key)
        return Sample(key, tiles, {} if group is None else {"group": group}, label)

    def locate(self, index: int) -> tuple[str, str]:
        """(key, file) of a sample."""
        key = self._keys[index]
        return key, f"{key}{SUFFIX}"

    def fingerprint(self) -> str:
        # Arrays are not compressed, so a file has the same size whatever its pixels and its label are.
        digest = blake2b(f"{self.card.name} {self._schema!r}".encode(), digest_size=16)
        for key in self._keys:
            label = None if self._labels is None else np.asarray(self._labels[key]).tobytes()
            digest.update(os.fsencode(f"{key} {self._path(key).stat().st_size} {label!r}"))
        digest.update(content_of_some(len(self), lambda i: self._path(self._keys[i])))
        return digest.hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"

    def _label(self, key: str, file: SampleFile) -> Any:
        if self.card.kind == "segmentation":
            finest = min(self.card.tiles[self._cfg.bands].values(), key=lambda tile: tile.gsd_m)
            return file.label_map(self.card, finest.shape)  # [H, W]
        return file.described_label(self.card) if self._labels is None else self._labels[key]

    def _of_arrays(self, tile: TileCard) -> list[BandStatistics]:
        return [self._statistics[key] for key in tile.keys]

    def _check_arrays(self) -> None:
        wanted = [key for tile in self._tiles.values() for key in tile.keys]
        wanted += [] if self.card.slip is None else [self.card.slip.key]
        if missing := [key for key in dict.fromkeys(wanted) if key not in self._statistics]:
            raise ValueError(
                f"{self._folder / STATISTICS_NAME} has no statistics of {', '.join(missing)[:200]} (it has"
                f" {', '.join(self._statistics)[:400]}); unpack the archive of {self.card.name} again"
            )

    def _check_slip(self) -> None:
        """Whether the bands lie as `bands` takes it. Raises `ValueError` where correcting would break them."""
        slip, bands = self.card.slip, self._cfg.bands
        if slip is None:
            return
        found = getattr(self._statistics[slip.key], slip.statistic)
        fact = f"{self.card.name}: the {slip.statistic} of {slip.key!r} in {STATISTICS_NAME} is {found:.6g}"
        if bands == "corrected" and not has_slipped(slip, self._statistics):
            raise ValueError(
                f"bands: {fact}, above {slip.at_most:g}: these files have been mended, or are of another source; take"
                " bands: as_published"
            )
        if bands == "as_published" and has_slipped(slip, self._statistics):
            wrong = ", ".join(f"{key!r} is {true} and not {said}" for key, said, true in _mismatches(self.card))
            logger.warning(
                "%s: that is %s. Bands are stored under names of others: %s; take bands: corrected",
                fact,
                slip.holds,
                wrong,
            )

    def _look_at_samples(self) -> dict[str, np.dtype[Any]]:
        """Dtypes of the tiles, by the first sample that can be read. All that are looked at must fit the statistics."""
        problem = ""
        looks: list[_Look] = []
        for i in evenly_spaced(len(self._keys), _N_LOOKED_AT):
            try:
                looks.append(self._look(self._path(self._keys[i]), looks[0].dtypes if looks else None))
            except ValueError as error:  # it is reported again when its turn comes
                problem = problem or one_line(error)
        if not looks:
            raise ValueError(f"root: none of the samples looked at can be used: {problem}")
        self._check_slip_of_samples(looks)  # first: a band that is another may be in another unit, too
        if self._cfg.check_units:
            self._check_units(looks)
        return looks[0].dtypes

    def _look(self, path: Path, dtypes: dict[str, np.dtype[Any]] | None) -> _Look:
        slip, tiles = self.card.slip, self._tiles
        with open_sample(path) as file:
            dtypes = dtypes or {name: file.dtype(tile) for name, tile in tiles.items()}
            pixels = {name: file.pixels(tile, dtypes[name])[0] for name, tile in tiles.items()}
            if slip is None:
                return _Look(path, dtypes, pixels, None)
            shape = next(t.shape for t in self.card.tiles["corrected"].values() if slip.key in t.keys)
            return _Look(path, dtypes, pixels, file.band(slip.key, shape))

    def _check_units(self, looks: Sequence[_Look]) -> None:
        """Raise `ValueError` where the pixels of a sample are not in the unit of their tile."""
        for name, unit in self.units.items():
            problems = [(look.path, why) for look in looks if (why := pixel_problem(look.pixels[name], unit))]
            if problems:
                path, why = problems[0]
                raise ValueError(
                    f"{path}, {name}: {why}; so it is in {len(problems)} of {len(looks)} samples looked at: get the"
                    " published files, or set check_units: false if the numbers are known to be right"
                )

    def _check_slip_of_samples(self, looks: Sequence[_Look]) -> None:
        """Raise `ValueError` where most samples hold other bands than the statistics say; warn where some seem to."""
        slip = self.card.slip
        if slip is None:
            return
        has = has_slipped(slip, self._statistics)
        others = [look.path for look in looks if look.telling is not None and shows_slip(slip, look.telling) != has]
        if not others:
            return
        fact = (
            f"{self.card.name}: {STATISTICS_NAME} says that {slip.key!r} is {'' if has else 'not '}{slip.holds},"
            f" {len(others)} of {len(looks)} samples looked at say otherwise, the first is {others[0]}"
        )
        if 2 * len(others) > len(looks):
            raise ValueError(
                f"bands: {fact}; statistics and samples are of different downloads: unpack one of them whole"
            )
        logger.warning("%s; single ones may, in haze or over water", fact)

    def _tile_schema(self, name: str, tile: TileCard) -> TileSchema:
        dtype = str(self._dtypes[name])
        found = [s for s in self._of_arrays(tile) for _ in range(tile.bands_per_key)]
        try:
            return TileSchema(
                sensor=sensor_in(tile.sensor, self.units[name], dtype),
                bands=tile.bands,
                dtype=dtype,
                shape=tile.shape,
                gsd_m=tile.gsd_m,
                mean=tuple(s.mean for s in found),
                std=tuple(s.std for s in found),
            )
        except ValueError as error:
            raise ValueError(f"{self._folder / STATISTICS_NAME}: {error}") from None


def _chosen(cfg: Config, card: DatasetCard) -> dict[str, TileCard]:
    tiles = card.tiles[cfg.bands]
    for name in cfg.tiles or ():
        if name not in tiles:
            known = list(tiles)
            raise ValueError(f"tiles: {card.name} has no tile {name!r}{suggest(name, known)} ({', '.join(known)})")
    return {name: tile for name, tile in tiles.items() if cfg.tiles is None or name in cfg.tiles}


def _mismatches(card: DatasetCard) -> list[tuple[str, str, str]]:
    """(array, band that its name says, band that it holds) of the bands of a dataset that are stored under others."""
    (published,) = card.tiles["as_published"].values()
    said = dict(zip(published.keys, published.bands, strict=True))
    return [
        (key, said[key], f"{band} of {name}")
        for n, (name, tile) in enumerate(card.tiles["corrected"].items())
        for key, band in zip(tile.keys, tile.bands, strict=True)
        if n or band != said[key]  # tiles after the first are of other products
    ]
