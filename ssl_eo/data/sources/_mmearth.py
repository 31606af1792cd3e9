"""What MMEarth keeps beside its pixels: a table of all tiles, and statistics.

`<stem>_tile_info.json` is one object of a gigabyte. It is read once, a few megabytes at a time, into a NumPy table with
one entry a row of the HDF5 file, which every process maps from then on.

N rows of the HDF5 file.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.sources._columns import Columns, cached_columns
from ssl_eo.data.sources._hdf5_rows import HDF5Rows
from ssl_eo.data.sources._side_files import read_json_object
from ssl_eo.sensors import ORBITS, POLARIZATIONS

__all__ = ["Table", "find_archive", "published_statistics", "read_records", "tile_columns"]

logger = logging.getLogger(__name__)

Table = NDArray[np.void]

_FORMAT = 1  # of the table; with another number it is made anew
_MAX_RECORD_CHARACTERS = 1 << 20  # a record has about 1000
_BLOCK_CHARACTERS = 4 << 20
_MAX_ROWS = 20_000_000  # the release has 1.2 million
_MAX_STATISTICS_BYTES = 4 << 20  # the file has about 10 thousand
_DECODER, _SEPARATOR, _COLON = json.JSONDecoder(), re.compile(r"[\s,]*"), re.compile(r"\s*:\s*")
_ERA5_PARTS = ("month1", "month2", "year")  # of the previous month, of this one, of the year
_S2_ORDER = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12")
_ALL_POLARIZATIONS = (1 << len(POLARIZATIONS)) - 1


def find_archive(root: str) -> Path:
    """The HDF5 file of the folder `root`, or `root` itself. Raises `ValueError` that says what is there instead."""
    path = Path(root)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"root: no such file or folder: {root}")
    own, found = path / f"{path.name}.h5", sorted(path.glob("*.h5"))
    if own.is_file():
        return own
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(f"root: {root} must hold one .h5 file, such as data_1M_v001_64.h5, found {names}")
    return found[0]


def _side_file(archive: Path, what: str) -> Path:
    """`<stem>_<what>.json` beside the archive."""
    return archive.with_name(f"{archive.stem}_{what}.json")


def tile_columns(file: HDF5Rows) -> Columns:
    """The table of the archive, made now unless it is there."""
    info = _side_file(file.path, "tile_info")
    if not info.is_file():
        raise ValueError(f"root: {info} is missing: download it with the .h5 file, and leave both in one folder")
    states = [path.stat() for path in (file.path, info)]
    facts = [f"{_FORMAT}", *(f"{state.st_size} {state.st_mtime_ns}" for state in states)]
    return cached_columns(file.path.parent, file.path.stem, facts, lambda: _make_table(file, info))


def published_statistics(archive: Path, key: str, n_bands: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the `n_bands` planes of an array, from the archive's own file.

    Planes that hold nothing have NaN there, and get 0 and 1.
    """
    path = _side_file(archive, "band_stats")
    hint = "download it again, or set statistics: measured"
    try:
        entry = read_json_object(path, _MAX_STATISTICS_BYTES, "statistics of every array")[key]
        mean, std = ([float(v) for v in entry[name]] for name in ("mean", "std"))
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"statistics: {path} must hold lists `mean` and `std` under {key}: {error!r}; {hint}"
        ) from None
    except ValueError as error:
        raise ValueError(f"statistics: {error}; {hint}") from None
    if len(mean) != n_bands or len(std) != n_bands:
        raise ValueError(
            f"statistics: {path} holds {len(mean)} means and {len(std)} standard deviations under {key}, expected"
            f" {n_bands}; {hint}"
        )
    return [m if math.isfinite(m) else 0.0 for m in mean], [s if 0 < s < math.inf else 1.0 for s in std]


def read_records(path: Path, block: int = _BLOCK_CHARACTERS) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a JSON object of objects, one at a time: neither the file nor its tree is ever held as a whole.

    The file is read `block` characters at a time.
    Raises `ValueError` that names the file for what is no such object, or for an entry of more than a megabyte.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            text, n_before = stream.read(block), 0  # text starts at this character of the file
            at = len(text) - len(text.lstrip())
            is_object = text[at : at + 1] == "{"
            at += 1
            while is_object:
                try:
                    entry = _entry(text, at)
                except (ValueError, RecursionError) as error:  # perhaps the block ends inside the entry
                    more = stream.read(block) if len(text) - at <= _MAX_RECORD_CHARACTERS else ""
                    if not more:
                        raise ValueError(f"after character {n_before + at}: {error}") from None
                    text, n_before, at = text[at:] + more, n_before + at, 0
                    continue
                if entry is None:
                    return
                key, record, at = entry
                yield key, record
            raise ValueError("it does not start with {")
    except ValueError as error:  # wrong UTF-8 is one too
        raise ValueError(f"{path} is not an object of records in JSON ({error}): download it again") from None


def _entry(text: str, at: int) -> tuple[str, dict[str, Any], int] | None:
    """Key and record that start at a place of the text, and where they end; None at the end of the object."""
    gap = _SEPARATOR.match(text, at)
    start = at if gap is None else gap.end()
    if text[start : start + 1] == "}":
        return None
    key, end = _DECODER.raw_decode(text, start)
    colon = _COLON.match(text, end)
    if not isinstance(key, str) or colon is None:
        raise ValueError("expected a name and a colon")
    record, end = _DECODER.raw_decode(text, colon.end())
    if not isinstance(record, dict):
        raise ValueError(f"expected an object for {key[:20]!r}")
    return key, record, end


def _make_table(file: HDF5Rows, info: Path) -> Table:
    """One entry a row; what the records leave out is taken from the arrays."""
    ids, levels = _ids_and_levels(file)
    rows = {tile_id: row for row, tile_id in enumerate(ids)}
    if len(rows) != len(ids):
        raise ValueError(f"root: {file.path} holds tile ids twice: {len(rows)} different ones in {len(ids)} rows")
    encoded = [tile_id.encode() for tile_id in ids]
    logger.info("reading %s once, which takes a minute for a million tiles", info)
    table = np.zeros(len(ids), _dtype(max(map(len, encoded))))
    table["id"] = encoded
    is_known = np.zeros(len(ids), bool)
    for tile_id, record in read_records(info):
        row = rows.get(tile_id)
        if row is not None:
            try:
                table[row] = (encoded[row], *_values(record, levels[row]))
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"{info}: record {tile_id!r}: {reason}") from None
            is_known[row] = True
    if not is_known.all():
        missing = ids[int(np.argmin(is_known))]
        raise ValueError(
            f"root: {info} has no record of {int((~is_known).sum())} of the {len(ids)} tiles of {file.path.name}, the"
            f" first is {missing!r}: the files are of different releases"
        )
    _fill_from_arrays(table, file)
    return table


def _dtype(id_length: int) -> list[tuple[Any, ...]]:
    return [
        ("id", f"S{id_length}"),
        ("latitude", "f8"),  # degrees, of the centre
        ("longitude", "f8"),
        ("date", "M8[D]"),  # of the Sentinel-2 scene
        ("is_l2a", "?"),
        *((orbit, "u1") for orbit in ORBITS),  # bit p: polarization p was taken
        ("biome", "i2"),  # -1: not known
        ("eco_region", "i2"),
        ("era5", "f4", (12,)),  # NaN: not known, as over oceans
    ]


def _ids_and_levels(file: HDF5Rows) -> tuple[list[str], list[str | None]]:
    """Tile ids and "l1c" or "l2a" of all rows, from the first and second field whatever their names are."""
    metadata = file.dataset("metadata")
    names = metadata.dtype.names
    if metadata.ndim != 1 or not len(metadata) or not names or any(metadata.dtype[name].kind != "S" for name in names):
        raise ValueError(
            f"root: metadata in {file.path} must be a list of (tile id, S2 type) in bytes, it has shape"
            f" {metadata.shape} and dtype {metadata.dtype}"
        )
    if metadata.size > _MAX_ROWS:
        raise ValueError(f"root: metadata in {file.path} has {metadata.size:,} rows, expected at most {_MAX_ROWS:,}")
    try:
        columns = metadata[:]
        ids = [tile_id.decode() for tile_id in columns[names[0]].tolist()]
        levels = [level.decode() for level in columns[names[1]].tolist()] if len(names) > 1 else [None] * len(ids)
    except UnicodeDecodeError as error:
        raise ValueError(f"root: metadata in {file.path} holds {error.object!r}, which is no UTF-8") from None
    except OSError as error:
        raise ValueError(f"root: metadata in {file.path} is damaged ({error}): download the file again") from None
    return ids, levels


def _values(record: Mapping[str, Any], level: str | None) -> tuple[Any, ...]:
    """What the table holds of a record, in its order and without the id."""
    latitude, longitude = float(record["lat"]), float(record["lon"])
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise ValueError(f"lat {latitude}, lon {longitude} are no degrees")
    level = (record["S2_type"] if level is None else level).lower()
    if level not in ("l1c", "l2a"):
        raise ValueError(f"S2 type {level!r}, must be 'l1c' or 'l2a'")
    bands = record.get("BANDS")
    if bands is not None:
        _check_order(bands.get("sentinel2") or ())
    taken = [_ALL_POLARIZATIONS if bands is None else _bits(bands.get(f"sentinel1_{o}")) for o in ("asc", "desc")]
    era5 = record.get("era5")
    monthly = [math.nan] * 12 if era5 is None else [v for part in _ERA5_PARTS for v in era5[part]]
    return (
        *(latitude, longitude, np.datetime64(date.fromisoformat(record["S2_DATE"])), level == "l2a", *taken),
        *(-1 if (found := record.get(name)) is None else int(found) for name in ("biome", "eco_region")),
        tuple(math.nan if v is None else float(v) for v in monthly),
    )


def _check_order(names: Sequence[str]) -> None:
    """Raises `ValueError` for bands in another order than the array's, which would swap wavelengths unseen."""
    places = [_S2_ORDER.index(name) for name in names if name in _S2_ORDER]
    if places != sorted(places):
        raise ValueError(f"Sentinel-2 bands {', '.join(names)}; expected the order {', '.join(_S2_ORDER)}")


def _bits(names: list[str] | None) -> int:
    return sum(1 << POLARIZATIONS.index(name) for name in set(names or ()) if name in POLARIZATIONS)


def _fill_from_arrays(table: Table, file: HDF5Rows) -> None:
    """What a damaged chunk held stays unknown: it is no reason to do without the pixels."""
    for name in ("biome", "eco_region"):
        if name in file.open():
            for row in np.flatnonzero(table[name] < 0).tolist():
                with suppress(OSError):
                    one_hot = file.read(name, row)
                    table[name][row] = int(one_hot.argmax()) if np.count_nonzero(one_hot) == 1 else -1
    if "era5" in file.open():
        for row in np.flatnonzero(np.isnan(table["era5"]).all(axis=1)).tolist():
            with suppress(OSError):
                table["era5"][row] = file.read("era5", row)
    table["era5"][~np.isfinite(table["era5"])] = math.nan
