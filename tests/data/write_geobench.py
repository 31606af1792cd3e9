"""Datasets of GeoBench version 1, small but in the format of the archive: all twelve layouts.

What is written here follows the archive and not the reader: names, sizes, dtypes and orders stand here once more. Files
are written as GeoBench's own writer does it: a plain array a band, and the text of a pickle of what describes them.

C bands, H W pixels, K classes.
"""

from __future__ import annotations

import datetime
import json
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

__all__ = ["LAYOUTS", "Layout", "Written", "edit_json", "pickle_of", "set_description", "write_dataset"]

FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50, 1.00)
PERCENTILES = {"0_1": 0.1, "1": 1, "5": 5, "95": 95, "99": 99, "99_9": 99.9}

S2 = (
    "01 - Coastal aerosol", "02 - Blue", "03 - Green", "04 - Red", "05 - Vegetation Red Edge",
    "06 - Vegetation Red Edge", "07 - Vegetation Red Edge", "08 - NIR", "08A - Vegetation Red Edge",
    "09 - Water vapour", "10 - SWIR - Cirrus", "11 - SWIR", "12 - SWIR",
)  # fmt: skip
S2_12 = tuple(key for key in S2 if not key.startswith("10"))
S1 = (
    "01 - VH.Real", "02 - VH.Imaginary", "03 - VV.Real", "04 - VV.Imaginary", "05 - VH.LEE Filtered",
    "06 - VV.LEE Filtered", "07 - VH.LEE Filtered.Real", "08 - VV.LEE Filtered.Imaginary",
)  # fmt: skip
RGB = ("Red", "Green", "Blue")
LANDSAT = ("04 - Red", "03 - Green", "02 - Blue", "05 - NIR", "06 - SWIR1", "07 - SWIR2")


@dataclass(frozen=True)
class Array:
    """One array of a sample: its name, and values between `low` and `high`."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> NDArray[Any]:
        if np.dtype(self.dtype).kind == "f":
            return rng.uniform(self.low, self.high, self.shape).astype(self.dtype)
        return rng.integers(int(self.low), int(self.high), self.shape).astype(self.dtype)


@dataclass(frozen=True)
class Layout:
    folder: str
    n_classes: int
    arrays: tuple[Array, ...]
    kind: str = "classification"
    is_dated: bool = False
    is_label_dated: bool = False
    name: Callable[[int], str] = "id_{:04d}".format
    band_class: str = "Sentinel2"
    map_side: int = 0  # of a segmentation


@dataclass
class Written:
    """What was written: by sample its arrays, its label (a class, a vector or a map) and its date."""

    root: Path
    folder: Path
    arrays: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    dates: dict[str, str | None] = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=dict)


def _arrays(keys: Sequence[str], side: int, dtype: str, low: float, high: float) -> tuple[Array, ...]:
    return tuple(Array(key, (side, side), dtype, low, high) for key in keys)


def _eurosat() -> tuple[Array, ...]:
    bright = {array.key: array for array in _arrays(S2, 64, "int16", 300, 4000)}
    bright["09 - Water vapour"] = Array("09 - Water vapour", (64, 64), "int16", 4, 20)  # the cirrus band is here
    return tuple(bright.values())


def _brick_kiln() -> tuple[Array, ...]:
    return _arrays(S2[:10], 64, "float64", 300, 4000) + _arrays(S2[10:], 64, "float64", 20, 200)


def _neon_tree() -> tuple[Array, ...]:
    lidar = Array("Canopy Height Model", (40, 40, 1), "float32", 0, 30)
    return (*_arrays(RGB, 400, "uint8", 10, 250), lidar, Array("Neon", (40, 40, 369), "int16", 100, 6000))


def _so2sat() -> tuple[Array, ...]:
    complex_and_lee = _arrays(S1[:4], 32, "float32", -1, 1) + _arrays(S1[4:], 32, "float32", 0, 1)
    return complex_and_lee + _arrays((*S2[1:9], *S2[11:]), 32, "float32", 0.05, 0.5)


def _crops() -> tuple[Array, ...]:
    return (*_arrays(S2_12, 256, "int16", 5, 200), Array("Cloud Probability", (256, 256), "int16", 0, 2))


def _cashew() -> tuple[Array, ...]:
    bands = _arrays(S2_12, 256, "float32", 300, 4000)
    return (*bands, Array("Cloud Probability", (256, 256), "float32", 0, 100))


def _map(folder: str = "segmentation_v1.0", **options: Any) -> dict[str, Any]:
    return {"folder": folder, "kind": "segmentation", **options}


CLASSES = "classification_v1.0"
LAYOUTS = {
    "m-bigearthnet": Layout(CLASSES, 43, _arrays(S2_12, 120, "float32", 300, 4000), kind="multilabel"),
    "m-brick-kiln": Layout(CLASSES, 2, _brick_kiln(), name="examples_7_{}".format),
    "m-eurosat": Layout(CLASSES, 10, _eurosat(), name="id_{}".format),
    "m-forestnet": Layout(
        CLASSES,
        12,
        _arrays(LANDSAT, 332, "uint8", 20, 250),
        is_dated=True,
        name=lambda n: f"-4.4{n // 2}_102.9_{2013 + n % 2}_01_01",
        band_class="Landsat8",
    ),
    "m-pv4ger": Layout(CLASSES, 2, _arrays(RGB, 320, "uint8", 10, 250), name="50.9{0},6.9{0}".format),
    "m-so2sat": Layout(CLASSES, 17, _so2sat()),
    "m-pv4ger-seg": Layout(
        **_map(n_classes=2, map_side=320, arrays=_arrays(RGB, 320, "uint8", 10, 250), name="50.9{0},6.9{0}".format)
    ),
    "m-chesapeake": Layout(
        **_map(n_classes=7, map_side=256, arrays=_arrays((*RGB, "NearInfrared"), 256, "float32", 0.05, 0.95))
    ),
    "m-cashew-plant": Layout(
        **_map(n_classes=7, map_side=256, arrays=_cashew(), is_dated=True, name=lambda n: f"sample_{n + 23}")
    ),
    "m-SA-crop-type": Layout(
        **_map(n_classes=10, map_side=256, arrays=_crops(), name=lambda n: f"crops_train_labels_{n // 2:04d}_{n % 2}")
    ),
    "m-nz-cattle": Layout(
        **_map(
            n_classes=2,
            map_side=500,
            arrays=_arrays(RGB, 500, "uint8", 10, 250),
            is_dated=True,
            is_label_dated=True,
            name=lambda n: f"{n}_Waikato_[2016-2017]_175.{n},-37.8",
        )
    ),
    "m-NeonTree": Layout(
        **_map(
            n_classes=2,
            map_side=400,
            arrays=_neon_tree(),
            name=lambda n: f"2018_TEAK_3_image_crop_{n // 2:02d}_0{n % 2}" if n < 4 else f"MLBS_06{n}",
        )
    ),
}


def write_dataset(
    root: Path, dataset: str, n_train: int = 4, n_val: int = 2, n_test: int = 2, label_list: bool = False, seed: int = 0
) -> Written:
    """A dataset below `root`, with the lists of labels (`label_map.json`, `label_stats.json`) if `label_list`."""
    layout = LAYOUTS[dataset]
    folder = root / layout.folder / dataset
    folder.mkdir(parents=True)
    written = Written(root, folder)
    rng = np.random.default_rng([seed, list(LAYOUTS).index(dataset)])
    names = [layout.name(n) for n in range(n_train + n_val + n_test)]
    for n, name in enumerate(names):
        day = datetime.date(2019 + n % 3, 1 + n % 12, 5) if layout.is_dated else None
        arrays = {array.key: array.draw(rng) for array in layout.arrays}
        label = _draw_label(layout, n, rng)
        write_sample(folder / f"{name}.hdf5", layout, arrays, label, day)
        written.arrays[name], written.labels[name] = arrays, label
        written.dates[name] = None if day is None else day.isoformat()
    bounds = {"train": (0, n_train), "valid": (n_train, n_train + n_val), "test": (n_train + n_val, len(names))}
    written.splits = {split: names[start:stop] for split, (start, stop) in bounds.items()}
    _write_side_files(written, layout, label_list, rng)
    return written


def write_sample(
    path: Path, layout: Layout, arrays: dict[str, NDArray[Any]], label: Any, day: datetime.date | None
) -> None:
    """One file: arrays under the names of their bands, perhaps with a date, and the description."""
    suffix = "" if day is None else f"_{day.isoformat()}"
    stored = {f"{key}{suffix}": values for key, values in arrays.items()}
    if layout.kind == "segmentation":
        stored[f"label{suffix if layout.is_label_dated else ''}"] = label
    with h5py.File(path, "w") as file:
        for key, values in stored.items():
            file.create_dataset(key, data=values)
    with _geobench() as classes:
        description: dict[str, Any] = {} if layout.kind == "segmentation" else {"label": label}
        for key, values in stored.items():
            description[key] = _described(key, values, classes, layout.band_class, day)
        description["bands_order"] = list(stored)
        set_description(path, pickle.dumps(description, protocol=4))


def set_description(path: Path, description: bytes | str) -> None:
    """Puts a pickle, or any other text, into the attribute of a sample."""
    with h5py.File(path, "r+") as file:
        file.attrs["pickle"] = str(description) if isinstance(description, bytes) else description


def pickle_of(label: Any) -> bytes:
    """A description that has a label and nothing else."""
    return pickle.dumps({"label": label, "bands_order": []}, protocol=4)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _draw_label(layout: Layout, n: int, rng: np.random.Generator) -> Any:
    if layout.kind == "classification":
        return n % layout.n_classes
    if layout.kind == "multilabel":
        return rng.integers(0, 2, layout.n_classes)  # [K] int64
    return rng.integers(0, layout.n_classes, (layout.map_side, layout.map_side)).astype(np.uint8)  # [H, W]


def _described(
    key: str, values: NDArray[Any], classes: dict[str, type], band_class: str, day: datetime.date | None
) -> dict[str, Any]:
    band = classes["SegmentationClasses" if key.startswith("label") else band_class]()
    vars(band).update(name=key, alt_names=(key[:2], key.lower()), spatial_resolution=10, wavelength=0.49)
    transform = classes["Affine"]((10.0, 0.0, 624_600.0, 0.0, -10.0, 4_877_286.0))
    return {
        "date": day,
        "date_id": day,
        "spatial_resolution": np.int64(10),
        "band_info": band,
        "meta_info": {"n_cloud_pixels": None, "is_composite": values.ndim > 2},
        "transform": transform,
        "crs": "EPSG:4326",
    }


@contextmanager
def _geobench() -> Iterator[dict[str, type]]:
    """Classes that pickle as those of the packages geobench and affine, which need not be there."""

    def affine(numbers: tuple[float, ...]) -> Any:
        return tuple.__new__(classes["Affine"], numbers)

    names = {"geobench.dataset": ("Sentinel2", "Landsat8", "SegmentationClasses"), "affine": ("Affine",)}
    modules = {name: types.ModuleType(name) for name in ("geobench", *names)}
    classes: dict[str, Any] = {}
    for module, inside in names.items():
        for name in inside:
            body: dict[str, Any] = {"__module__": module}
            if name == "Affine":
                body["__getnewargs__"] = lambda self: tuple(self)
            classes[name] = type(name, (tuple,) if name == "Affine" else (), body)
            setattr(modules[module], name, classes[name])
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield {**classes, "Affine": affine}  # type: ignore[dict-item]
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _write_side_files(written: Written, layout: Layout, label_list: bool, rng: np.random.Generator) -> None:
    train = written.splits["train"]
    statistics = {a.key: _statistics([written.arrays[name][a.key] for name in train]) for a in layout.arrays}
    statistics["label"] = _statistics([np.asarray(written.labels[name]) for name in train])
    (written.folder / "band_stats.json").write_text(json.dumps(statistics))
    (written.folder / "task_specs.pkl").write_bytes(b"cposix\nsystem\n")  # nobody opens it
    _write_partition(written, "default", train)
    for fraction in FRACTIONS:
        chosen = rng.choice(train, max(1, int(len(train) * fraction)), replace=False).tolist()
        _write_partition(written, f"{fraction:.2f}x_train", chosen)
    if not label_list:
        return
    if layout.kind == "multilabel":
        vectors = {name: label.tolist() for name, label in written.labels.items()}
        (written.folder / "label_stats.json").write_text(json.dumps(vectors))
    else:
        by_class: dict[int, list[str]] = {}
        for name, label in written.labels.items():
            by_class.setdefault(label, []).append(name)
        (written.folder / "label_map.json").write_text(json.dumps(by_class))


def _write_partition(written: Written, name: str, train: list[str]) -> None:
    lists = {"train": train, "valid": written.splits["valid"], "test": written.splits["test"]}
    (written.folder / f"{name}_partition.json").write_text(json.dumps(lists))


def _statistics(arrays: list[NDArray[Any]]) -> dict[str, float]:
    values = np.concatenate([a.ravel() for a in arrays]).astype(np.float64)
    measures = {"min": values.min(), "max": values.max(), "mean": values.mean(), "std": values.std()}
    percentiles = {f"percentile_{name}": np.percentile(values, p) for name, p in PERCENTILES.items()}
    return {k: float(v) for k, v in {**measures, "median": np.median(values), **percentiles}.items()}
