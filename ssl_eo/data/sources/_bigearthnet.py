"""What BigEarthNet's side files say: patches, their pairs, labels, splits and places, as columns; its nomenclatures.

v1 has a `*_labels_metadata.json` in each patch folder, that of Sentinel-1 naming its Sentinel-2 patch, and lists of
names for splits and for patches under snow or cloud. v2 has all of it in one Parquet file, and a second one for patches
under snow, cloud or shadow.

N patches, K classes, H W pixels.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ssl_eo.components import import_extra, one_line
from ssl_eo.data.sources._columns import Columns, cached_columns
from ssl_eo.data.sources._rasters import to_degrees
from ssl_eo.data.sources._side_files import read_json_object

__all__ = ["IGNORED", "SPLITS", "Nomenclature", "columns_v1", "columns_v2", "labels_of"]

IGNORED = 255  # in class maps: pixels of no class
SPLITS = ("train", "val", "test")
LABELS_JSON = "_labels_metadata.json"

_T = TypeVar("_T")
# The time of day may lack its leading zero.
_PATCH_V1 = re.compile(r"S2[A-D]_MSIL2A_\d{8}T\d{4,6}_\d{1,3}_\d{1,3}", re.ASCII)
_PATCH_V2 = re.compile(r"S2[A-D]_MSIL2A_\d{8}T\d{6}_N\d{4}_R\d{3}_T[0-9A-Z]{5}_\d{1,3}_\d{1,3}", re.ASCII)
_RADAR = re.compile(r"S1[A-D]_IW_GRDH_1SDV_\d{8}T\d{6}_[0-9A-Z]{5}_\d{1,3}_\d{1,3}", re.ASCII)
_SNOW_OR_CLOUD_V1 = ("patches_with_seasonal_snow.csv", "patches_with_cloud_and_shadow.csv")
_TABLES_V2 = ("metadata.parquet", "metadata_for_patches_with_snow_cloud_or_shadow.parquet")
_COLUMNS_V2 = ["patch_id", "labels", "split", "country", "s1_name"]
_SPLIT_NAMES_V2 = ("train", "validation", "test")
_HALF_PATCH_M = 600.0
_UTM_NORTH = range(32601, 32661)  # EPSG codes
_MAX_EASTING_M, _MAX_NORTHING_M = 1e6, 1e7  # of a zone of UTM
_MAX_JSON_BYTES = 1 << 20  # they have one or two thousand
_MAX_ROWS = 5_000_000  # v2 has half a million patches
_FORMAT = "1"  # of the index file: another number makes it anew

_ROW = np.dtype(
    [
        ("patch", "S64"),
        ("radar", "S64"),  # empty where there is none
        ("labels", "u8"),  # bit k: class k, of 43 in v1 and of 19 in v2
        ("split", "i1"),  # position in SPLITS, -1 for none
        ("snow_or_cloud", "?"),
        ("damaged", "?"),  # the JSON could not be used
        ("latitude", "f8"),  # NaN where unknown
        ("longitude", "f8"),
        ("country", "S32"),
    ]
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nomenclature:
    """The 43 classes of CORINE Land Cover in BigEarthNet, and the 19 they are grouped into."""

    codes: tuple[int, ...]  # [43] CORINE codes
    names_43: tuple[str, ...]
    names_19: tuple[str, ...]
    groups: tuple[int | None, ...]  # [43] position among the 19, None: in none

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Nomenclature:
        codes, names, groups = zip(*info["classes"], strict=True)
        names_19 = tuple(info["classes_19"])
        return cls(codes, names, names_19, tuple(None if g is None else names_19.index(g) for g in groups))

    def names(self, n_classes: int) -> tuple[str, ...]:
        return self.names_43 if n_classes == 43 else self.names_19

    def bits(self, names: Iterable[str], n_classes: int) -> int:
        """The set of classes `names` as bits. Raises `ValueError` that names an unknown one."""
        known = {_plain(name): k for k, name in enumerate(self.names(n_classes))}
        if unknown := [name for name in names if _plain(name) not in known]:
            raise ValueError(f"labels {unknown} are not among the {n_classes} classes of BigEarthNet")
        return sum(1 << k for k in {known[_plain(name)] for name in names})

    def multi_hot(self, bits: int, n_stored: int, n_classes: int) -> NDArray[np.uint8]:
        """`[n_classes]` from bits over the `n_stored` classes; classes without a group are dropped."""
        present: list[int | None] = [k for k in range(n_stored) if bits >> k & 1]
        if n_stored != n_classes:
            present = [self.groups[k] for k in present if k is not None]
        vector = np.zeros(n_classes, np.uint8)
        vector[[k for k in present if k is not None]] = 1
        return vector  # [K]

    def of_codes(self, codes: NDArray[Any], n_classes: int) -> NDArray[np.uint8]:
        """The class map of a map of CORINE codes, `[H, W]` both; `IGNORED` where a code has no class."""
        table = np.full(1000, IGNORED, np.uint8)
        for k, (code, group) in enumerate(zip(self.codes, self.groups, strict=True)):
            table[code] = k if n_classes == 43 else IGNORED if group is None else group
        return table[np.where((codes >= 0) & (codes < len(table)), codes, 0)]  # [H, W]; code 0 has no class


def labels_of(path: Path, nomenclature: Nomenclature) -> tuple[int, int, float, float]:
    """Bits of the 43 labels, EPSG code, easting and northing (m) of the centre, from a v1 JSON of Sentinel-2.

    Raises `ValueError` that names the file and what is wrong.
    """
    found = _read_side_file(path)
    try:
        bits = nomenclature.bits(found["labels"], 43)
        epsg = int(re.findall(r'"EPSG","(\d+)"', found["projection"])[-1])
        left, top = (float(found["coordinates"][edge]) for edge in ("ulx", "uly"))
        if epsg not in _UTM_NORTH or not (0 < left < _MAX_EASTING_M and 0 < top < _MAX_NORTHING_M):
            raise ValueError(f"corner {left}, {top} of EPSG:{epsg} lies in no zone of UTM")
        return bits, epsg, left + _HALF_PATCH_M, top - _HALF_PATCH_M
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = one_line(error)[:200]
        raise ValueError(f"{path} is no label file of BigEarthNet v1: {type(error).__name__}: {reason}") from None


def columns_v1(root: Path, sentinel2: Path, sentinel1: Path | None, nomenclature: Nomenclature) -> Columns:
    """The index of a v1 archive: made by reading every JSON once, then kept."""
    patches = _folders(sentinel2, _PATCH_V1)
    radars = [] if sentinel1 is None else _folders(sentinel1, _RADAR)
    lists = [root / name for name in (*(f"{split}.csv" for split in SPLITS), *_SNOW_OR_CLOUD_V1)]
    facts = ["v1", _FORMAT, *patches, *radars, *map(_state, lists)]

    def build() -> NDArray[Any]:
        rows = _rows(patches)
        position = {patch: n for n, patch in enumerate(patches)}
        _read_labels(rows, [sentinel2 / p / f"{p}{LABELS_JSON}" for p in patches], nomenclature)
        if sentinel1 is not None:
            _pair(rows, position, radars, [sentinel1 / r / f"{r}{LABELS_JSON}" for r in radars])
        for n, split in enumerate(SPLITS):
            rows["split"][_listed(root / f"{split}.csv", position)] = n
        for name in _SNOW_OR_CLOUD_V1:
            rows["snow_or_cloud"][_listed(root / name, position)] = True
        return rows

    return cached_columns(root, "bigearthnet", facts, build)


def columns_v2(root: Path, nomenclature: Nomenclature) -> Columns:
    """The index of a v2 archive, from its Parquet files. Needs the extra `parquet` the first time."""
    tables = [root / name for name in _TABLES_V2]

    def build() -> NDArray[Any]:
        parts = [_table_v2(path, n > 0, nomenclature) for n, path in enumerate(tables) if path.is_file()]
        rows = np.concatenate(parts)
        return rows[np.unique(rows["patch"], return_index=True)[1]]  # in order of their folders

    return cached_columns(root, "bigearthnet", ["v2", _FORMAT, *map(_state, tables)], build)


def _table_v2(path: Path, snow_or_cloud: bool, nomenclature: Nomenclature) -> NDArray[Any]:
    parquet = import_extra("parquet", "pyarrow.parquet", "reading the metadata of BigEarthNet v2")
    try:
        n_rows, known = parquet.read_metadata(path).num_rows, parquet.read_schema(path).names
        if n_rows > _MAX_ROWS:
            raise ValueError(f"it has {n_rows:,} rows, expected at most {_MAX_ROWS:,}")
        if missing := [name for name in _COLUMNS_V2 if name not in known]:
            raise ValueError(f"it has no column {', '.join(missing)} (columns: {', '.join(known)})")
        columns = parquet.read_table(path, columns=_COLUMNS_V2).to_pydict()
        rows = _rows(_checked(columns["patch_id"], _PATCH_V2))
        rows["radar"] = _checked(columns["s1_name"], _RADAR)
        rows["labels"] = [nomenclature.bits(names, 19) for names in columns["labels"]]
        rows["split"] = [_SPLIT_NAMES_V2.index(name) for name in columns["split"]]
        rows["country"] = [name.encode() for name in columns["country"]]
    except (ValueError, OSError, TypeError, AttributeError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"root: {path} is no metadata of BigEarthNet v2: {' '.join(str(error).split())}") from None
    rows["snow_or_cloud"] = snow_or_cloud
    return rows


def _checked(names: Sequence[str], pattern: re.Pattern[str]) -> Sequence[str]:
    """`names`, which become parts of paths, so that they may be nothing but names."""
    if bad := next((name for name in names if not pattern.fullmatch(name)), None):
        raise ValueError(f"{bad!a} is no name of a patch")
    return names


def _rows(patches: Sequence[str]) -> NDArray[Any]:
    rows = np.zeros(len(patches), _ROW)
    rows["patch"] = patches
    rows["split"] = -1
    rows["latitude"] = rows["longitude"] = np.nan
    return rows


def _folders(root: Path, pattern: re.Pattern[str]) -> list[str]:
    """Sorted names of the folders in `root` that are patches; whatever else lies there is passed over."""
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir())
    if not names:
        found = [ascii(path.name) for path in sorted(root.iterdir())[:5]]
        raise ValueError(
            f"root: no patch folder in {root}, expected names like {pattern.pattern}"
            f" (found: {', '.join(found) or 'nothing'})"
        )
    return names


def _read_labels(rows: NDArray[Any], paths: Sequence[Path], nomenclature: Nomenclature) -> None:
    found = _each(lambda path: labels_of(path, nomenclature), paths)
    rows["damaged"] = [isinstance(item, ValueError) for item in found]
    centres: dict[int, list[tuple[int, float, float]]] = {}  # by EPSG code: row, easting, northing
    for n, item in enumerate(found):
        if not isinstance(item, ValueError):
            rows["labels"][n], epsg, easting, northing = item
            centres.setdefault(epsg, []).append((n, easting, northing))
    for epsg, placed in centres.items():
        at = [n for n, _, _ in placed]
        latitude, longitude = to_degrees(f"EPSG:{epsg}", [x for _, x, _ in placed], [y for _, _, y in placed])
        rows["latitude"][at], rows["longitude"][at] = latitude, longitude


def _pair(rows: NDArray[Any], position: Mapping[str, int], radars: Sequence[str], paths: Sequence[Path]) -> None:
    """Gives each patch the name of its Sentinel-1 patch. One that cannot be matched is left out, with a warning."""
    found = _each(lambda path: str(_read_side_file(path).get("corresponding_s2_patch")), paths)
    lost = []
    for radar, partner in zip(radars, found, strict=True):
        if isinstance(partner, str) and partner in position:
            rows["radar"][position[partner]] = radar
        else:
            lost.append((radar, partner))
    if lost:
        logger.warning(
            "%d of %d Sentinel-1 patches have no Sentinel-2 patch here and are left out; the first is %s: %s",
            len(lost),
            len(radars),
            *lost[0],
        )


def _read_side_file(path: Path) -> dict[str, Any]:
    return read_json_object(path, _MAX_JSON_BYTES, "labels and metadata of a patch")


def _each(read: Callable[[Path], _T], paths: Sequence[Path]) -> list[_T | ValueError]:
    """The result of `read` for each path, or the error it raised; small files wait on the disk, so in threads."""

    def attempt(path: Path) -> _T | ValueError:
        try:
            return read(path)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(attempt, paths))


def _listed(path: Path, position: Mapping[str, int]) -> list[int]:
    """Rows of the patches in the first column of a list; of no file: none."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [position[line[0]] for line in csv.reader(file) if line and line[0] in position]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"root: {path} cannot be read as a list of patches: {error}") from None


def _state(path: Path) -> str:
    """What tells one version of a file from another."""
    if not path.is_file():
        return f"{path.name} -"
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _plain(name: str) -> str:
    return name.replace("/", ", ")  # "Transitional woodland/shrub" is spelt both ways
