"""The folder of a GeoBench dataset: where it is, which samples its partitions list, and the labels listed beside them.

    <root>/classification_v1.0 | segmentation_v1.0/<dataset>/
        band_stats.json  default_partition.json  0.01x_train_partition.json ... 1.00x_train_partition.json
        label_map.json, label_stats.json (not everywhere)  task_specs.pkl (not read)  <sample>.hdf5

What these files say is not trusted: sizes are looked at first, and no name leads out of the folder.

K classes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_eo.data.sources._geobench_card import DatasetCard, folded
from ssl_eo.data.sources._side_files import read_json_object

__all__ = ["STATISTICS_NAME", "SUFFIX", "Label", "find_folder", "listed_labels", "multi_hot", "read_partition"]

Label = int | NDArray[np.uint8]

SUFFIX = ".hdf5"
STATISTICS_NAME = "band_stats.json"
_PARTITION_SUFFIX = "_partition.json"
_SPLITS = ("train", "valid", "test")  # as the files name them
_MAX_BYTES = 64 << 20  # of 20,000 samples a partition has half a megabyte, label vectors have six


def find_folder(root: Path, card: DatasetCard) -> Path:
    """The folder of a dataset: in the folder of its benchmark below `root`, in `root`, or `root` itself.

    Raises `ValueError` where there is none, or `root` is that of another dataset.
    """
    if not root.is_dir():
        raise ValueError(f"root: no such folder: {root}")
    if (root / STATISTICS_NAME).is_file() or next(root.glob(f"*{_PARTITION_SUFFIX}"), None) is not None:
        if folded(root.resolve().name) in card.folder_names():
            return root
        raise ValueError(f"root: {root} holds a dataset by its name other than {card.name}; give the folder above it")
    looked_in = [folder for folder in (root / card.folder, root) if folder.is_dir()]
    found = [p for folder in looked_in for p in sorted(folder.iterdir()) if folded(p.name) in card.folder_names()]
    if folders := [p for p in found if p.is_dir()]:
        return folders[0]
    held = sorted(p.name for p in looked_in[0].iterdir())[:10]
    raise ValueError(
        f"root: there is no folder {card.name} in {looked_in[0]} (found: {', '.join(map(ascii, held)) or 'nothing'});"
        f" unpack the archive of {card.name} there"
    )


def read_partition(folder: Path, partition: str, split: str) -> list[str]:
    """Names of the samples of `split` (train, val, test) of a partition, all of them with a file in `folder`.

    Raises `ValueError` where the partition is not there, its splits share a sample, a name is no file name, or files
    are missing.
    """
    path = folder / f"{partition}{'' if partition == 'default' else '_train'}{_PARTITION_SUFFIX}"
    if not path.is_file():
        there = sorted(p.name.removesuffix(_PARTITION_SUFFIX) for p in folder.glob(f"*{_PARTITION_SUFFIX}"))
        raise ValueError(f"partition: {path} is not there (there are: {', '.join(there) or 'none'})")
    expected = f"lists of sample names: {', '.join(_SPLITS)}"
    raw = read_json_object(path, _MAX_BYTES, expected)
    lists: dict[str, Any] = {name: raw.get(name) for name in _SPLITS}
    for name, found in lists.items():
        if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
            raise ValueError(f"partition: {path} has no list {name!r} of names, expected {expected}")
    _check_names(path, lists)
    chosen: list[str] = lists["valid" if split == "val" else split]
    if not chosen:
        raise ValueError(f"split: {path} lists no sample of split {split!r}")
    _check_files(folder, path, chosen)
    return chosen


def listed_labels(folder: Path, card: DatasetCard, keys: Collection[str]) -> dict[str, Label] | None:
    """Labels of the samples `keys`, from the file that lists them; None where there is none.

    Raises `ValueError` for a file that does not give each of them one label of the dataset's classes.
    """
    if card.kind == "classification":
        path, read = folder / "label_map.json", _from_map
    else:
        path, read = folder / "label_stats.json", _from_stats
    if not path.is_file():
        return None
    labels = read(path, card, frozenset(keys))
    if missing := [key for key in keys if key not in labels]:
        raise ValueError(
            f"{path} has no label for {len(missing)} of {len(keys)} samples, such as {missing[0]!r}: complete it, or"
            " remove it, and labels are read from the samples"
        )
    return labels


def multi_hot(values: NDArray[Any], n_classes: int) -> NDArray[np.uint8]:
    """`[K]` of 0 and 1. Raises `ValueError` for any other shape or value."""
    if values.shape != (n_classes,) or values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise ValueError(f"its label has shape {values.shape}, expected 0 or 1 for each of {n_classes} classes")
    return values.astype(np.uint8)


def _check_names(path: Path, lists: Mapping[str, list[str]]) -> None:
    owner: dict[str, str] = {}
    for split, keys in lists.items():
        for key in keys:
            if not key or key.startswith(".") or "/" in key or "\\" in key or not key.isprintable():
                raise ValueError(f"partition: {path} lists {key[:80]!r}, expected the name of a file in its folder")
            if (other := owner.setdefault(key, split)) != split:
                raise ValueError(
                    f"partition: {path} lists {key!r} in {other} and in {split}, so training would see what is scored;"
                    " get the published partition"
                )
        if len(set(keys)) != len(keys):
            raise ValueError(f"partition: {path} lists samples of {split} twice; get the published partition")


def _check_files(folder: Path, path: Path, keys: list[str]) -> None:
    there = {entry.name for entry in os.scandir(folder)}  # one look, whatever the number of samples
    if missing := [key for key in keys if f"{key}{SUFFIX}" not in there]:
        raise ValueError(
            f"partition: {path} names {len(keys)} samples, {len(missing)} have no file, such as {missing[0]}{SUFFIX};"
            " unpack the whole archive"
        )


def _from_map(path: Path, card: DatasetCard, keys: frozenset[str]) -> dict[str, Label]:
    expected = f"lists of sample names by class, '0' to '{len(card.classes) - 1}'"
    numbers = {str(n): n for n in range(len(card.classes))}
    labels: dict[str, Label] = {}
    for text, names in read_json_object(path, _MAX_BYTES, expected).items():
        if text not in numbers or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} has an entry {text[:20]!r}, expected {expected}")
        for name in names:
            if name in keys and labels.setdefault(name, numbers[text]) != numbers[text]:
                raise ValueError(f"{path} lists {name!r} in classes {labels[name]} and {text}, expected one")
    return labels


def _from_stats(path: Path, card: DatasetCard, keys: frozenset[str]) -> dict[str, Label]:
    raw = read_json_object(path, _MAX_BYTES, "vectors of 0 and 1 by sample name")
    labels: dict[str, Label] = {}
    for key in keys & raw.keys():
        vector = raw[key] if isinstance(raw[key], list) else []
        if len(vector) != len(card.classes) or any(v not in (0, 1) for v in vector):
            raise ValueError(f"{path}: {key!r} holds {vector!r:.80}, expected 0 or 1 for each of {len(card.classes)}")
        labels[key] = np.array(vector, np.uint8)  # [K]
    return labels
