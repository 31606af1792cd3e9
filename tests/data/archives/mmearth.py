"""Small files in the layout of MMEarth, with what is odd about the real ones.

N tiles, C planes of an array, H = W = S pixels.
"""

from __future__ import annotations

import json
import math
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

ERA5 = ("temperature_2m", "temperature_2m_min", "temperature_2m_max", "total_precipitation_sum")
S2 = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12"]
ODD = {"dem": 3, "canopy_height": 4, "worldcover": 5, "dynamic_world": 6, "era5": 7}  # rows without any of it
_LEGENDS = {"esa_worldcover": (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100), "dynamic_world": tuple(range(1, 10))}

Storage = Literal["published", "contiguous", "chunks of 3", "shuffled", "plain chunks"]


def write_mmearth(
    root: Path, n: int = 12, size_px: int = 16, storage: Storage = "published", seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Write the folder `root` of n tiles, at least 8; returns the arrays `[N, ...]` as they are stored.

    Odd rows are Level-2A, even ones Level-1C. Rows of `ODD` lack something. Ids and records are in other orders.
    """
    assert n > max(ODD.values())
    rng = np.random.default_rng(seed)
    arrays = _pixels(rng, n, size_px) | _vectors(rng, n)
    ids = rng.permutation(10 * n)[:n]
    metadata = [(str(tile_id).encode(), level) for tile_id, level in zip(ids, _levels(n), strict=True)]
    arrays["metadata"] = np.array(metadata, [("tile_id", "S100"), ("S2_type", "S10")])
    root.mkdir(parents=True)
    with h5py.File(root / f"{root.name}.h5", "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, **_storage_options(storage, values))
    records = {str(tile_id): _record(arrays, row, n) for row, tile_id in enumerate(ids)}
    ordered = {key: records[key] for key in sorted(records)}  # not the order of the rows
    _write_json(root / f"{root.name}_tile_info.json", ordered)
    _write_json(root / f"{root.name}_splits.json", {"train": rng.permutation(n).tolist(), "val": [], "test": []})
    _write_json(root / f"{root.name}_band_stats.json", _statistics(arrays))
    return arrays


def _levels(n: int) -> list[bytes]:
    return [b"l2a" if row % 2 else b"l1c" for row in range(n)]


def _storage_options(storage: Storage, values: NDArray[Any]) -> dict[str, Any]:
    one = (1, *values.shape[1:])
    options: dict[Storage, dict[str, Any]] = {
        "published": {"chunks": one, "compression": "gzip"},
        "contiguous": {},
        "chunks of 3": {"chunks": (3, *values.shape[1:]), "compression": "gzip"},
        "shuffled": {"chunks": one, "compression": "gzip", "shuffle": True},
        "plain chunks": {"chunks": one},
    }
    return options[storage]


def _field(rng: np.random.Generator, n: int, n_planes: int, size_px: int) -> NDArray[np.float64]:
    """`[N, C, S, S]`, zero mean and unit spread, spectrum 1 / f^1.1 as that of land, and a little noise."""
    frequency = np.hypot(np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((n, n_planes, size_px, size_px)))
    spectrum /= np.maximum(frequency, 1 / size_px) ** 1.1
    smooth = np.fft.irfft2(spectrum, s=(size_px, size_px))  # [N, C, S, S]
    smooth /= smooth.std()
    noisy: NDArray[np.float64] = smooth + 0.02 * rng.standard_normal(smooth.shape)
    return noisy


def _pixels(rng: np.random.Generator, n: int, size_px: int) -> dict[str, NDArray[Any]]:
    l2a = np.arange(n) % 2 == 1
    # Plane c is around 500 (c + 1), so that planes which are mixed up show.
    optical = (500 * np.arange(1, 14)[:, None, None] + 80 * _field(rng, n, 13, size_px)).clip(1, 28000)
    optical = optical.astype(np.uint16)
    optical[:, 10] = np.where(l2a[:, None, None], 0, 15 + optical[:, 10] % 40)
    radar = (-12 + 3 * _field(rng, n, 8, size_px)).astype(np.float32)
    radar[:, [1, 5]] -= 7
    radar[:, [2, 3, 6, 7]] = -np.inf  # HH and HV
    radar[0::3, :4] = -np.inf  # no ascending pass
    radar[1::6, 4:] = -np.inf  # no descending pass
    terrain = (400 * _field(rng, n, 2, size_px)).astype(np.int16)
    terrain[:, 1] = np.abs(terrain[:, 1]) % 50
    terrain[0, :, :2], terrain[ODD["dem"]] = -32768, -32768
    canopy = (10 + 5 * _field(rng, n, 2, size_px)).clip(0, 60).astype(np.int8)
    canopy[0, :, :2], canopy[0, :, 2:4], canopy[ODD["canopy_height"]] = 127, -128, 127
    maps = {}
    for name, legend in _LEGENDS.items():
        classes = (2 * _field(rng, n, 1, size_px) + len(legend) / 2).clip(0, len(legend) - 1).astype(int)
        maps[name] = np.array(legend, np.uint8)[classes]
        maps[name][0, :, :2] = 0
    maps["esa_worldcover"][0, :, 2:4] = 255
    maps["esa_worldcover"][ODD["worldcover"]], maps["dynamic_world"][ODD["dynamic_world"]] = 0, 0
    scl = rng.integers(0, 12, (n, 1, size_px, size_px)).astype(np.uint8)
    probability = rng.integers(0, 101, scl.shape).astype(np.uint16)
    scl[~l2a], probability[~l2a] = 255, 65535
    cloud_mask = rng.choice(np.array([0, 1024, 2048, 3072, 65535], np.uint16), scl.shape)
    return {
        "sentinel2": optical,
        "sentinel2_cloudmask": cloud_mask,
        "sentinel2_cloudprod": probability,
        "sentinel2_scl": scl,
        "sentinel1": radar,
        "aster": terrain,
        "canopy_height_eth": canopy,
        **maps,
    }


def _vectors(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    latitude, longitude = rng.uniform(-60, 75, n), rng.uniform(-180, 180, n)
    era5 = rng.uniform(250, 310, (n, 12)).astype(np.float32)
    era5[:, 3::4] = rng.uniform(0, 1, (n, 3))
    era5[ODD["era5"]] = np.nan
    month = 2 * math.pi * np.array([_day(row).month for row in range(n)]) / 12
    biome, region = np.zeros((n, 14), np.uint8), np.zeros((n, 846), np.uint16)
    biome[np.arange(n), rng.integers(0, 14, n)] = 1
    region[np.arange(n), rng.integers(0, 846, n)] = 1
    return {
        "era5": era5,
        "lat": np.stack([np.sin(np.radians(latitude)), np.cos(np.radians(latitude))], 1).astype(np.float32),
        "lon": np.stack([np.sin(np.radians(longitude)), np.cos(np.radians(longitude))], 1).astype(np.float32),
        "month": np.stack([np.sin(month), np.cos(month)], 1).astype(np.float32),
        "biome": biome,
        "eco_region": region,
    }


def _day(row: int) -> date:
    return date(2018, 1, 5) + timedelta(days=29 * row % 330)


def _record(arrays: dict[str, NDArray[Any]], row: int, n: int) -> dict[str, Any]:
    """What tile_info.json says of a row."""
    level, day = _levels(n)[row].decode(), _day(row)
    optical = [b for b in S2 if b != "B10"] + ["MSK_CLDPRB", "SCL", "QA60"] if level == "l2a" else [*S2, "QA60"]
    has_orbit = [bool(np.isfinite(arrays["sentinel1"][row, first]).any()) for first in (0, 4)]
    months = [f"{day.year if m else day.year - 1}{m or 12:02d}" for m in (day.month - 1, day.month)]
    bands: dict[str, Any] = {
        "sentinel2": optical,
        **{f"sentinel1_{o}": ["VV", "VH"] if has else None for o, has in zip(("asc", "desc"), has_orbit, strict=True)},
        "aster": ["b1", "slope"],
        "era5": [f"{m}_{name}" for m in months for name in ERA5] + [f"{i}_{name}" for i, name in enumerate(ERA5)],
        "dynamic_world": ["label"],
        "canopy_height_eth": ["height", "std"],
        "esa_worldcover": ["Map"],
    }
    if row == ODD["dynamic_world"]:
        del bands["dynamic_world"]
    angle = {name: math.degrees(math.atan2(*arrays[name][row].astype(float))) for name in ("lat", "lon")}
    record: dict[str, Any] = {"S2_DATE": day.isoformat(), "S2_type": level, "CRS": "EPSG:32721", **angle}
    record |= {name: int(arrays[name][row].argmax()) for name in ("biome", "eco_region")}
    record |= {"NO_DATA": False, "BANDS": bands}
    if row % 3:  # some records leave it out; the array has it
        values = [None if math.isnan(v) else v for v in arrays["era5"][row].tolist()]
        record["era5"] = {part: values[4 * i : 4 * i + 4] for i, part in enumerate(("month1", "month2", "year"))}
    return record


def _statistics(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """As published: JSON with NaN and Infinity for planes without data."""
    optical, is_l2a = arrays["sentinel2"], arrays["metadata"]["S2_type"] == b"l2a"
    planes = {
        "sentinel2_l1c": (optical[~is_l2a], 0),
        "sentinel2_l2a": (optical[is_l2a], 0),
        "sentinel2_cloudmask_l1c": (arrays["sentinel2_cloudmask"][~is_l2a], 65535),
        "sentinel2_cloudmask_l2a": (arrays["sentinel2_cloudmask"][is_l2a], 65535),
        "sentinel2_cloudprod_l1c": (arrays["sentinel2_cloudprod"][~is_l2a], 65535),
        "sentinel2_cloudprod_l2a": (arrays["sentinel2_cloudprod"][is_l2a], 65535),
        "sentinel1": (arrays["sentinel1"], -np.inf),
        "aster": (arrays["aster"], -np.inf),  # which int16 cannot hold: no-data is part of these numbers
        "canopy_height_eth": (arrays["canopy_height_eth"], 255),
        **{name: (arrays[name][..., None, None], np.nan) for name in ("lat", "lon", "month", "era5")},
    }
    return {name: _moments(values, no_data) for name, (values, no_data) in planes.items()}


def _moments(values: NDArray[Any], no_data: float) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"mean": [], "std": [], "min": [], "max": []}
    for plane in np.moveaxis(values, 1, 0).astype(np.float64):
        kept = plane[np.isfinite(plane) & (plane != no_data)]
        empty = not kept.size
        found["mean"].append(math.nan if empty else float(kept.mean()))
        found["std"].append(math.nan if empty else float(kept.std()))
        found["min"].append(math.inf if empty else float(kept.min()))
        found["max"].append(-math.inf if empty else float(kept.max()))
    return found


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")
