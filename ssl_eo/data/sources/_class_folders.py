"""Folders of images, one a class, perhaps one of these for each split: which images there are, and of which class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_eo.components import suggest
from ssl_eo.data.sources._pictures import PICTURE_SUFFIXES
from ssl_eo.data.sources._side_files import printable

__all__ = ["ImageFile", "class_names", "list_images"]

_RASTER_SUFFIXES = (".tif", ".tiff")
_SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class ImageFile:
    """One image: its path below the root, the folder of its class, its split (empty where no folder says it)."""

    name: str
    label: str
    split: str

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def is_raster(self) -> bool:
        return self.name.lower().endswith(_RASTER_SUFFIXES)


def list_images(root: Path, by_split: bool) -> list[ImageFile]:
    """All images `<class>/<name>`, or `<split>/<class>/<name>` if `by_split`, sorted.

    Other files are passed over. Raises `ValueError` where there is no image, or two have one key or differ in kind.
    """
    if not root.is_dir():
        raise ValueError(f"root: no such folder: {root}")
    splits = {name: _SPLIT_FOLDERS[name] for name in _entries(root) if name in _SPLIT_FOLDERS}
    files = []
    for folder, split in splits.items() if by_split else [("", "")]:
        for label in _entries(root / folder):
            inner = f"{folder}/{label}" if folder else label
            files += [ImageFile(f"{inner}/{name}", label, split) for name in _entries(root / inner) if _is_image(name)]
    if not files:
        expected = "<split>/<class>/<name>" if by_split else "<class>/<name>"
        found = ", ".join(printable(os.fsencode(name)) for name in _entries(root)[:8])
        raise ValueError(
            f"root: {root} holds no {expected} with one of {', '.join((*PICTURE_SUFFIXES, *_RASTER_SUFFIXES))} (found:"
            f" {found or 'nothing'}){'; take split_by: folder' if splits and not by_split else ''}"
        )
    _check_keys(root, files)
    return files


def class_names(root: Path, files: Sequence[ImageFile], known: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes in the order of labels: `known`, else all there are, sorted.

    Raises `ValueError` for a folder that is not among `known`, or whose name cannot be written.
    """
    there = sorted({file.label for file in files})
    for name in there:
        if (shown := printable(os.fsencode(name))) != name:
            raise ValueError(f"root: {root} has a class folder {shown}, whose name is not UTF-8; rename it")
        if known is not None and name not in known:
            raise ValueError(
                f"classes: {root} has a folder {name!r}{suggest(name, list(known))} (classes: {', '.join(known)})"
            )
    return tuple(there if known is None else known)


def _check_keys(root: Path, files: Sequence[ImageFile]) -> None:
    owner: dict[str, ImageFile] = {}
    for file in files:
        if (other := owner.setdefault(file.key, file)) is not file:
            raise ValueError(f"root: {root} holds {_shown(other)} and {_shown(file)}, which have one key; keep one")
        if file.is_raster != files[0].is_raster:
            raise ValueError(
                f"root: {root} holds {_shown(files[0])} and {_shown(file)}; put GeoTIFFs and pictures in folders of"
                " their own"
            )


def _shown(file: ImageFile) -> str:
    return printable(os.fsencode(file.name))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith((*PICTURE_SUFFIXES, *_RASTER_SUFFIXES))


def _entries(folder: Path) -> list[str]:
    """Names in a folder, sorted; none of a file."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
