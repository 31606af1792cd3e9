"""The models that a study saves: a folder for each cell, which says of which record it is.

A cell of the same name that was trained in another way (other steps, other weights of its encoder) has another key: its
folder is not taken for that of the record that is asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.saved import save_model
from ssl_eo.adapt.saved_page import read_facts
from ssl_eo.adapt.study import Cell
from ssl_eo.eval.tasks import Task

__all__ = ["StudyModels"]

_PLAIN = re.compile(r"[\w-][\w.-]{0,119}", re.ASCII)  # names that are those of their folders


class StudyModels:
    """The folders of `cells` in `folder`: called as the cell, and by a hash too where that is no name for a folder."""

    def __init__(self, folder: Path, cells: Iterable[Cell]) -> None:
        cells = list(cells)
        # As disks without cases see them. A hyphen in a name may make those of two cells one.
        taken = Counter(cell.name.lower() for cell in cells)
        self._paths = {cell: folder / _folder_name(cell, taken[cell.name.lower()] > 1) for cell in cells}

    def path(self, cell: Cell) -> Path:
        """The folder of a cell's model."""
        return self._paths[cell]

    def has(self, cell: Cell, key: str) -> bool:
        """Whether the model of the record `key` is there, whole."""
        try:
            return bool(read_facts(self._paths[cell]).get("key") == key)
        except ValueError:
            return False

    def save(self, cell: Cell, key: str, model: TaskModel, task: Task, facts: Mapping[str, Any]) -> None:
        """Write that of the record `key`. Raises as `save_model` does."""
        save_model(self._paths[cell], model, task, {**facts, "cell": asdict(cell), "key": key})


def _folder_name(cell: Cell, is_shared: bool) -> str:
    name = cell.name
    if _PLAIN.fullmatch(name) and not is_shared and not any("/" in str(part) for part in asdict(cell).values()):
        return name
    digest = blake2b(repr(cell).encode(errors="surrogatepass"), digest_size=6).hexdigest()
    return re.sub(r"[^\w-]", "_", name[:80], flags=re.ASCII) + f"-{digest}"
