"""Which scenes of SatlasPretrain show which tiles of its grid, from its metadata and its folders.

N images, T tiles of a list. A tile is one integer, column * 2^zoom + row.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.sources._side_files import name_inside, read_json_list, read_json_object

__all__ = ["PRODUCTS", "Product", "folder_facts", "read_scenes", "read_tiles"]

Product = Literal["sentinel2", "sentinel1", "landsat"]
PRODUCTS: tuple[Product, ...] = ("sentinel2", "sentinel1", "landsat")  # folders of images
_GOOD, _TIMES = "good_images_lowres_all.json", "image_times.json"
_MAX_GOOD, _MAX_LIST = 4 << 30, 256 << 20  # bytes
_NOT_A_TIME = np.iinfo(np.int64).min
_DATE = re.compile(r"(\d{4})-?(\d\d)(?:-?(\d\d))?(?:T(\d\d):?(\d\d):?(\d\d))?")
_FILE_NAME = re.compile(r"(\d{1,6})_(\d{1,6})\.png")


def folder_facts(root: Path, bands: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The state of what `read_scenes` reads."""
    for name in (_GOOD, _TIMES):
        path = root / "metadata" / name
        if path.is_file():
            yield f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}"
    for product in bands:
        for scene in _scene_names(root / product):
            yield f"{product}/{os.fsdecode(scene)}"
            if product != "sentinel2":
                yield from (f"{f.name} {f.stat().st_mtime_ns}" for f in _band_folders(root, product, scene, bands))


def read_scenes(root: Path, bands: Mapping[str, Sequence[str]], zoom: int) -> NDArray[Any]:
    """`[N]` records ordered by tile, sensor and time: `cell`, `product` (position in `PRODUCTS`), `time` (seconds of
    1970, NaT unknown), `scene` (a folder name).

    Sentinel-2 images are those of the list of good ones whose scene is there; others are looked for in the folders.
    """
    times = _read_times(root / "metadata" / _TIMES)
    parts = []
    for product in bands:
        if product == "sentinel2":
            found = _good_images(root, zoom)
        else:
            found = _listed_images(root, product, bands, zoom)
        for scene, cells in found.items():
            part = np.zeros(len(cells), _record(len(scene)))
            part["cell"], part["product"], part["scene"] = cells, PRODUCTS.index(product), scene
            part["time"] = _time_of(scene, times)
            parts.append(part)
    if not sum(map(len, parts)):
        raise ValueError(f"root: no image of {', '.join(bands)} in {root}")
    images = np.concatenate([p.astype(_record(max(part.dtype["scene"].itemsize for part in parts))) for p in parts])
    known = images["time"] != _NOT_A_TIME
    return images[np.lexsort((images["scene"], images["time"], ~known, images["product"], images["cell"]))]


def read_tiles(root: Path, split: str, zoom: int) -> NDArray[np.int64]:
    """`[T]` tiles of a published split."""
    path = root / "metadata" / f"{split}_lowres.json"
    what = "a list of [column, row]"
    return _cells(path, read_json_list(path, _MAX_LIST, what), 2, what, zoom)


def _record(width: int) -> Any:
    return np.dtype([("cell", "i8"), ("time", "i8"), ("product", "u1"), ("scene", f"S{width}")])


def _good_images(root: Path, zoom: int) -> dict[bytes, NDArray[np.int64]]:
    path = root / "metadata" / _GOOD
    what = "a list of [column, row, scene]"
    rows = read_json_list(path, _MAX_GOOD, what)
    cells = _cells(path, rows, 3, what, zoom)
    if wrong := next((row[2] for row in rows if not isinstance(row[2], str)), None):
        raise ValueError(f"{path}: scene {wrong!r}, expected {what}")
    names = sorted({row[2] for row in rows})
    for name in names:
        if "/" in name_inside(root, name.encode(errors="surrogatepass")):
            raise ValueError(f"{path}: scene {name!r} leads into another folder; unpack the metadata again")
    number = {name: i for i, name in enumerate(names)}
    scene = np.array([number[row[2]] for row in rows], np.int64)
    order = np.argsort(scene, kind="stable")
    start = np.searchsorted(scene[order], np.arange(len(names) + 1))
    there = set(_scene_names(root / "sentinel2"))
    return {
        name.encode(): np.unique(cells[order[start[i] : start[i + 1]]])
        for i, name in enumerate(names)
        if name.encode() in there
    }


def _listed_images(
    root: Path, product: str, bands: Mapping[str, Sequence[str]], zoom: int
) -> dict[bytes, NDArray[np.int64]]:
    found = {}
    for scene in _scene_names(root / product):
        cells = set()
        for folder in _band_folders(root, product, scene, bands):
            for path in folder.iterdir():
                if (match := _FILE_NAME.fullmatch(path.name)) and max(
                    place := tuple(map(int, match.groups()))
                ) < 1 << zoom:
                    cells.add((place[0] << zoom) + place[1])
        found[scene] = np.array(sorted(cells), np.int64)
    return found


def _scene_names(folder: Path) -> list[bytes]:
    """Folders of scenes, by name. Raises `ValueError` for a name that is not UTF-8."""
    with os.scandir(os.fsencode(folder)) as entries:
        return sorted(name_inside(folder, e.name).encode() for e in entries if e.is_dir())


def _band_folders(root: Path, product: str, scene: bytes, bands: Mapping[str, Sequence[str]]) -> Iterator[Path]:
    folders = (root / product / os.fsdecode(scene) / band for band in bands[product])
    return (folder for folder in folders if folder.is_dir())


def _cells(path: Path, rows: Sequence[Any], length: int, what: str, zoom: int) -> NDArray[np.int64]:
    for row in rows:
        is_row = isinstance(row, list) and len(row) == length and type(row[0]) is type(row[1]) is int
        if not (is_row and 0 <= row[0] < 1 << zoom and 0 <= row[1] < 1 << zoom):
            raise ValueError(f"{path} holds {json.dumps(row)[:80]}, expected {what} of zoom {zoom}")
    return np.array([(row[0] << zoom) + row[1] for row in rows], np.int64)


def _read_times(path: Path) -> Mapping[str, Any]:
    return read_json_object(path, _MAX_LIST, "an object with the time of each scene")


def _time_of(scene: bytes, times: Mapping[str, Any]) -> int:
    """Seconds of 1970, from the table of times, else from a date in the name of the scene, if there is one."""
    name = scene.decode()
    try:
        if name in times:
            when = datetime.fromisoformat(times[name])
        elif match := _DATE.search(name):
            year, month, day, hour, minute, second = (int(g) if g else None for g in match.groups())
            when = datetime(year or 0, month or 0, day or 1, hour or 0, minute or 0, second or 0)
        else:
            return _NOT_A_TIME
    except (ValueError, TypeError):
        return _NOT_A_TIME
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp())
