"""Sensors and their bands: what a channel measures, in micrometres and metres, read from one YAML file a sensor.

`ChannelMeta` is what a model sees of it: a few small tensors that say what each channel is. Conventions of released
models (ids for SAR, placeholder wavelengths, floored nanometres) have no place here: they live in the patch embedding
or importer that needs them.

C channels, B batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_eo.components import suggest
from ssl_eo.resources import find_resource

__all__ = ["KINDS", "ORBITS", "POLARIZATIONS", "Band", "ChannelMeta", "Sensor", "load_sensor"]

KINDS = ("optical", "thermal", "sar", "elevation", "categorical")
POLARIZATIONS = ("VV", "VH", "HH", "HV")
ORBITS = ("ascending", "descending")
_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")
_TABLES = Path(__file__).with_name("sensor_tables.json")  # of tests/make_sensor_tables.py

# Plausible centre wavelengths in micrometres. Outside them a number is almost surely in another unit.
_WAVELENGTH_RANGE_UM = {"optical": (0.2, 5.0), "thermal": (3.0, 20.0), "sar": (5e3, 1.5e6)}


@dataclass(frozen=True)
class ChannelMeta:
    """What each channel of a batch measures. Tensors are `[C]`, or `[B, C]` where samples of one batch differ.

    `kind`, `polarization` and `orbit` are indices into `KINDS`, `POLARIZATIONS` and `ORBITS`; -1 means unknown or not
    applicable. `wavelength_um` and `fwhm_um` are 0 for elevation and categorical channels. `valid` (`[B, C]`, True =
    real) marks padded channels where samples have different band counts; None means that all are real.
    """

    wavelength_um: Tensor
    fwhm_um: Tensor
    kind: Tensor
    polarization: Tensor
    orbit: Tensor
    gsd_m: Tensor
    valid: Tensor | None = None

    @property
    def n_channels(self) -> int:
        return int(self.wavelength_um.shape[-1])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ChannelMeta:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def expand(self, n_samples: int) -> ChannelMeta:
        """`[C]` -> `[B, C]`, the same for all samples; what differs between samples already stays."""
        return self._each(lambda value: value.expand(n_samples, -1) if value.ndim == 1 else value)

    @staticmethod
    def cat(parts: Sequence[ChannelMeta]) -> ChannelMeta:
        """`[B, C]` of all `parts`, one after the other. A part without `valid` is taken to be all real."""
        has_valid = any(part.valid is not None for part in parts)
        valid = [torch.ones_like(p.kind, dtype=torch.bool) if p.valid is None else p.valid for p in parts]
        columns = (f.name for f in fields(ChannelMeta) if f.name != "valid")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in columns}
        return ChannelMeta(**joined, valid=torch.cat(valid) if has_valid else None)

    def _each(self, change: Callable[[Tensor], Tensor]) -> ChannelMeta:
        changed: dict[str, Any] = {}
        for f in fields(self):
            value: Tensor | None = getattr(self, f.name)
            changed[f.name] = None if value is None else change(value)
        return ChannelMeta(**changed)

    def select(self, index: Sequence[int] | Tensor) -> ChannelMeta:
        """The channels `index`: `[K]` the same for all samples, or `[B, K]` one row a sample."""
        rows = torch.as_tensor(index, device=self.wavelength_um.device)
        picked: dict[str, Any] = {}
        for f in fields(self):
            value: Tensor | None = getattr(self, f.name)
            if value is None:
                picked[f.name] = None
            elif rows.ndim == 1 or value.ndim == 1:
                picked[f.name] = value[..., rows]
            else:
                picked[f.name] = value.gather(1, rows)
        return ChannelMeta(**picked)


@dataclass(frozen=True)
class Band:
    """One band of a sensor. Wavelength and full width at half maximum in micrometres, ground sampling in metres."""

    name: str
    kind: str
    gsd_m: float
    wavelength_um: float = 0.0
    fwhm_um: float = 0.0
    polarization: str | None = None
    orbit: str | None = None
    n_classes: int | None = None

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        if self.polarization is not None:
            _one_of("polarization", self.polarization, POLARIZATIONS)
        if self.orbit is not None:
            _one_of("orbit", self.orbit, ORBITS)
        if not self.gsd_m > 0:
            raise ValueError(f"gsd_m must be positive metres, got {self.gsd_m}")
        if self.kind == "categorical" and (self.n_classes is None or self.n_classes < 2):
            raise ValueError(f"a categorical band needs n_classes >= 2, got {self.n_classes}")
        if self.kind == "sar" and self.polarization is None:
            raise ValueError(f"a sar band needs a polarization, one of {', '.join(POLARIZATIONS)}")
        if self.kind in _WAVELENGTH_RANGE_UM:
            _check_wavelength(self.kind, self.wavelength_um, self.fwhm_um)
        elif self.wavelength_um or self.fwhm_um:
            raise ValueError(f"a band of kind {self.kind} has no wavelength, got {self.wavelength_um}")


@dataclass(frozen=True)
class Sensor:
    """A sensor: its bands in file order, how values are stored, and named subsets of bands.

    A stored value `v` of a scaled sensor means `v * scale + offset` in `unit`. `no_data` lists the stored values that
    mean "nothing measured here" (NaN is always no-data and need not be listed).
    """

    name: str
    title: str
    bands: tuple[Band, ...]
    dtype: str
    unit: str
    source: str
    scale: float = 1.0
    offset: float = 0.0
    no_data: tuple[float, ...] = ()
    subsets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    true_color: tuple[str, str, str] | None = None  # bands shown as red, green, blue

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or "/" in self.name:
            raise ValueError(f"name must be a printable word without /, got {self.name!r:.80}")
        _one_of(f"sensor {self.name}: dtype", self.dtype, _DTYPES)
        for key in ("scale", "offset"):
            if type(value := getattr(self, key)) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"sensor {self.name}: {key} must be a finite number, got {value!r:.80}")
        if self.scale == 0:
            raise ValueError(f"sensor {self.name}: scale must not be 0: all values would mean the same")
        names = self.band_names
        if not names:
            raise ValueError(f"sensor {self.name}: bands is empty")
        if duplicates := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"sensor {self.name}: bands named twice: {', '.join(duplicates)}")
        for subset in self.subsets.values():
            self.index(subset)
        if self.true_color is not None:
            self.index(self.true_color)

    @property
    def band_names(self) -> tuple[str, ...]:
        return tuple(b.name for b in self.bands)

    @property
    def is_categorical(self) -> bool:
        return self.bands[0].kind == "categorical"

    def index(self, names: Iterable[str]) -> tuple[int, ...]:
        """Positions of the bands `names` in this sensor; raises `ValueError` that names the missing one."""
        known = self.band_names
        found = []
        for name in names:
            if name not in known:
                raise ValueError(
                    f"sensor {self.name} has no band {name!r}{self._suggest_band(name)} (bands: {_shorten(known)})"
                )
            found.append(known.index(name))
        return tuple(found)

    def _suggest_band(self, name: str) -> str:
        of_color = dict(zip(("red", "green", "blue"), self.true_color or (), strict=False))
        band = of_color.get(str(name).lower())
        return suggest(name, list(self.band_names)) if band is None else f"; did you mean {band!r}?"

    def is_measured(self, values: Tensor) -> Tensor:
        """True where stored `values`, of any shape and on any device, are finite and none of `no_data`."""
        measured = values.isfinite()
        for value in self.no_data:
            measured &= values != value
        return measured

    def resolve_bands(self, bands: str | Iterable[str] | None) -> tuple[str, ...]:
        """Band names from a subset name (`"rgb"`), a list of names, or None for all bands."""
        if bands is None:
            return self.band_names
        if isinstance(bands, str):
            if bands not in self.subsets:
                known = list(self.subsets)
                raise ValueError(
                    f"sensor {self.name} has no band subset {bands!r}{suggest(bands, known)}"
                    f" (subsets: {', '.join(known) or 'none'}; or give a list of band names)"
                )
            return self.subsets[bands]
        if not isinstance(bands, Iterable):
            raise ValueError(f"bands of {self.name}: expected names or the name of a subset, got {bands!r:.80}")
        names = tuple(bands)
        self.index(names)
        return names

    def channel_meta(self, names: Iterable[str] | None = None) -> ChannelMeta:
        """`ChannelMeta` of the bands `names` (default: all), tensors `[C]`."""
        bands = self.bands if names is None else tuple(self.bands[i] for i in self.index(names))
        return ChannelMeta(
            wavelength_um=torch.tensor([b.wavelength_um for b in bands], dtype=torch.float32),
            fwhm_um=torch.tensor([b.fwhm_um for b in bands], dtype=torch.float32),
            kind=torch.tensor([KINDS.index(b.kind) for b in bands]),
            polarization=torch.tensor([_index_or_unknown(POLARIZATIONS, b.polarization) for b in bands]),
            orbit=torch.tensor([_index_or_unknown(ORBITS, b.orbit) for b in bands]),
            gsd_m=torch.tensor([b.gsd_m for b in bands], dtype=torch.float32),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/YAML types; `from_dict` reverses it."""
        out: dict[str, Any] = {k: v for k, v in asdict(self).items() if v is not None}
        out["bands"] = [{k: v for k, v in asdict(b).items() if v not in (None, 0.0)} for b in self.bands]
        out["no_data"] = list(self.no_data)
        out["subsets"] = {k: list(v) for k, v in self.subsets.items()}
        if self.true_color is not None:
            out["true_color"] = list(self.true_color)
        return out

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "sensor") -> Sensor:
        """Build from plain types. Band entries may leave out what the top-level `band_defaults` gives for all.

        Raises `ValueError` that starts with `where` and the key for anything unknown, missing or in the wrong unit.
        """
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where}: a sensor is one mapping, got a {type(raw).__name__}")
        data = dict(raw)
        defaults = dict(data.pop("band_defaults", {}))
        _check_keys(where, data, cls)
        bands = []
        entries = data.pop("bands", [])
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, Mapping) for entry in entries):
            raise ValueError(f"{where}: bands must be a list of mappings, one a band, got {entries!r:.80}")
        for i, entry in enumerate(entries):
            label = f"{where}: bands[{i}] ({entry.get('name', '?')})"
            merged = {**defaults, **entry}
            _check_keys(label, merged, Band)
            try:
                bands.append(Band(**merged))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{label}: {error}") from None
        data["bands"] = tuple(bands)
        data["no_data"] = _numbers(where, "no_data", data.get("no_data", ()))
        data["subsets"] = {k: tuple(v) for k, v in data.get("subsets", {}).items()}
        if data.get("true_color") is not None:
            data["true_color"] = tuple(data["true_color"])
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


def load_sensor(name: str) -> Sensor:
    """The sensor `name` of `datasets_meta/sensors`, or the one in a `.yaml` file given by its path.

    Without PyYAML the former are read from a copy as JSON, for torch.hub needs torch alone.
    """
    if not isinstance(name, str):
        raise ValueError(f"a sensor is named, or given by the path of its file, as text, got {name!r:.80}")
    try:
        import yaml
    except ModuleNotFoundError:
        return _load_from_tables(name)
    path = find_resource("datasets_meta/sensors", name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a sensor file holds one mapping, found {type(raw).__name__}")
    return Sensor.from_dict({"name": path.stem, **raw}, where=str(path))


def _load_from_tables(name: str) -> Sensor:
    tables = json.loads(_TABLES.read_text(encoding="utf-8"))
    if name not in tables:
        raise ValueError(
            f"no sensor {name!r}{suggest(name, list(tables))} (known: {', '.join(tables)}); a file needs PyYAML"
        )
    return Sensor.from_dict(tables[name], where=name)


def _check_wavelength(kind: str, wavelength_um: float, fwhm_um: float) -> None:
    low, high = _WAVELENGTH_RANGE_UM[kind]
    for key, value, in_range in (
        ("wavelength_um", wavelength_um, low <= wavelength_um <= high),
        ("fwhm_um", fwhm_um, 0 <= fwhm_um <= high),
    ):
        if in_range:
            continue
        hint = ""
        if low <= value / 1000 <= high or (key == "fwhm_um" and 0 < value / 1000 <= high):
            hint = f": {value:g} looks like nanometres; write {value / 1000:.3f}"
        elif kind == "sar" and low <= value * 1e6 <= high:
            hint = f": {value:g} looks like metres; write {value * 1e6:g}"
        elif kind == "sar" and 0.3 <= value <= 40:
            hint = f": {value:g} looks like a frequency in GHz; write {299_792.458 / value:.0f}"
        raise ValueError(f"{key} of a band of kind {kind} is in micrometres, {low:g} to {high:g}, got {value:g}{hint}")


def _check_keys(where: str, data: Mapping[str, Any], cls: type[Sensor] | type[Band]) -> None:
    """Raise `ValueError` for a key that `cls` has no field for, and for a field without a default that has no key."""
    names = sorted(f.name for f in fields(cls))
    for key in data:
        if key not in names:
            raise ValueError(f"{where}: unknown key {key!r}{suggest(key, names)} (allowed: {', '.join(names)})")
    for f in fields(cls):
        if f.name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}: key {f.name} is missing")


def _numbers(where: str, key: str, values: Any) -> tuple[float, ...]:
    are_numbers = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
    if not are_numbers:
        raise ValueError(f"{where}: {key} must be a list of numbers, got {values!r:.80}")
    return tuple(map(float, values))


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")


def _index_or_unknown(names: Sequence[str], value: str | None) -> int:
    return -1 if value is None else names.index(value)


def _shorten(names: Sequence[str], limit: int = 16) -> str:
    return ", ".join(names) if len(names) <= limit else f"{', '.join(names[:limit])}, ... {len(names)} in all"
