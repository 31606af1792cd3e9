"""What the side files of an archive say, as one structured NumPy array on disk: made once, mapped by every process.

Archives describe their samples in hundreds of thousands of JSON files and folder names. Read once, they become one row
of fixed width for each sample, in a `.npy` beside the archive, or in the user's cache folder where that cannot be
written. Workers map the file, so that they share its pages.

N rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from errno import EACCES
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.regular import check_regular
from ssl_eo.data.sources._splits import cell_split
from ssl_eo.files import atomic_file

__all__ = ["Columns", "cached_columns", "rows_in_cells"]


class Columns:
    """The rows of a `.npy` file, mapped. Pickles as its path: the array never travels to workers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: NDArray[Any] | None = None

    @property
    def rows(self) -> NDArray[Any]:
        """`[N]` records, read-only."""
        if self._rows is None:
            check_regular(self.path)
            self._rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_rows": None}


def cached_columns(root: Path, name: str, facts: Iterable[str], build: Callable[[], NDArray[Any]]) -> Columns:
    """The array that `build` makes of the archive at `root`, from the file that an earlier run left if there is one.

    `facts` are texts that change when the side files do: names, sizes, times. Several processes may do this at once.
    """
    digest = blake2b(digest_size=8)
    for fact in facts:
        digest.update(os.fsencode(fact) + b"\0")
    file_name = f".ssl_eo-{name}-{digest.hexdigest()}.npy"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_eo"
    folders = (root, cache)
    for folder in folders:
        with suppress(OSError, ValueError, EOFError):  # not there, not to be read, or damaged: made anew
            columns = Columns(folder / file_name)
            if len(columns.rows):
                return columns
    rows = build()
    for folder in folders:
        with suppress(OSError):
            return _save(folder / file_name, rows)
    raise ValueError(f"root: neither {root} nor {cache} can be written, where the index of the archive ({name}) goes")


def _save(path: Path, rows: NDArray[Any]) -> Columns:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.stat().st_mode & 0o222:  # root may write anywhere, and an archive may be read-only on purpose
        raise PermissionError(EACCES, "read-only", str(path.parent))
    with atomic_file(path) as file:
        np.save(file, rows, allow_pickle=False)
    return Columns(path)


def rows_in_cells(
    latitude: NDArray[np.float64], longitude: NDArray[np.float64], split: str, cell_deg: float, seed: int
) -> NDArray[np.int64]:
    """Which of the places `[N]` (degrees) lie in cells of `split`, ascending. A place that is NaN is in no split."""
    known = np.flatnonzero(np.isfinite(latitude) & np.isfinite(longitude))
    places = np.stack([latitude[known], longitude[known]], axis=1)  # [K, 2]
    _, first, cell = np.unique(np.floor(places / cell_deg), axis=0, return_index=True, return_inverse=True)
    in_split = [cell_split(float(places[i, 0]), float(places[i, 1]), cell_deg, seed) == split for i in first]
    chosen = np.array(in_split, dtype=np.bool_)
    return known[chosen[cell.reshape(-1)]] if len(known) else known
