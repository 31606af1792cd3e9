"""What an encoder of a bundle was trained on, and how images become its input.

B samples, C channels, T dates, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssl_eo.models.vit import EncoderConfig, EncoderInput
from ssl_eo.sensors import KINDS, ChannelMeta, Sensor

__all__ = [
    "SensorInput",
    "StoredValuesWarning",
    "check_when_and_where",
    "doubt_of",
    "normalised",
    "of_wavelengths",
    "with_bands",
]

_WAVELENGTHS_UM = (0.2, 20.0)  # of optical and thermal bands
_LARGEST = 3e38  # float32 ends beyond it
_SMALLEST_STD = 1e-30
_LARGEST_CLIP = 1e6  # standard deviations
_MOST_REFLECTANCE = 2.0  # of bright clouds and snow
_THERMAL_UM = 5.0  # where thermal ones begin


@dataclass(frozen=True)
class SensorInput:
    """What an encoder was trained on: a sensor, which of its bands in which order, and their statistics as stored.

    With `clip_std` standardised values are cut at plus and minus so many standard deviations and mapped to [0, 1], with
    the mean at 0.5.
    """

    sensor: Sensor
    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gsd_m: float
    clip_std: float | None = None

    def __post_init__(self) -> None:
        self.sensor.index(self.bands)
        n = len(self.bands)
        if len(set(self.bands)) != n:
            raise ValueError(f"bands of {self.sensor.name} are named twice: {', '.join(self.bands)}")
        if len(self.mean) != n or len(self.std) != n:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations for {n} bands")
        are_means = all(_is_within(v, -_LARGEST, _LARGEST) for v in self.mean)
        if not are_means or not all(_is_within(v, _SMALLEST_STD, _LARGEST) for v in (*self.std, self.gsd_m)):
            raise ValueError(
                f"mean must be finite, std and gsd_m positive and finite as float32: numbers of at most {_LARGEST:g},"
                f" std and gsd_m from {_SMALLEST_STD:g}"
            )
        if self.clip_std is not None and not _is_within(self.clip_std, _SMALLEST_STD, _LARGEST_CLIP):
            raise ValueError(
                f"clip_std must be positive, at most {_LARGEST_CLIP:g}, or null, got {self.clip_std!r:.80}"
            )


def _is_within(value: object, low: float, high: float) -> bool:
    """Whether `value` is a number from `low` to `high`; no truth value, which torch does not count as one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


class StoredValuesWarning(UserWarning):
    """Images can hardly be the values that their sensor stores."""


def doubt_of(images: Tensor, sensor: Sensor) -> str:
    """What speaks against `images` being stored values of `sensor`: fractions, as of reflectances, where it has whole
    numbers. Empty where nothing does.
    """
    if not images.is_floating_point() or sensor.dtype.startswith("float"):
        return ""
    found = images.detach().nan_to_num(0.0, 0.0, 0.0)
    is_small = (found >= 0).all() & (found <= _MOST_REFLECTANCE).all()
    if not bool(is_small & (found != found.round()).any()):
        return ""
    return (
        f"images of {sensor.name} are fractions up to {found.max().item():.3g}, as reflectances are: this sensor is"
        f" stored as {sensor.dtype} (unit {sensor.unit}, scale {sensor.scale:g}), and the encoder takes stored values."
        " What it makes of others means little"
    )


def with_bands(known: SensorInput, bands: str | Sequence[str] | None, is_fixed: bool) -> SensorInput:
    """`known` for images of `bands`, in this order; None means those it has.

    Raises `ValueError` for bands that it has no statistics of, and, where `is_fixed`, unless they are those it has in
    the same order: a convolution knows a band by its place.
    """
    if bands is None:
        return known
    names, sensor = known.sensor.resolve_bands(bands), known.sensor.name
    if is_fixed and names != known.bands:
        raise ValueError(
            f"bands of {sensor}: got {', '.join(names)}, this encoder (patch_embed: conv) takes"
            f" {', '.join(known.bands)}, in this order"
        )
    if lacking := [name for name in names if name not in known.bands]:
        raise ValueError(
            f"bands of {sensor}: this encoder has no statistics of {', '.join(lacking)}, but of"
            f" {', '.join(known.bands)}"
        )
    at = [known.bands.index(name) for name in names]
    mean, std = (tuple(values[i] for i in at) for values in (known.mean, known.std))
    return replace(known, bands=names, mean=mean, std=std)


def normalised(images: Tensor, known: SensorInput, dates: Tensor | None, location: Tensor | None) -> EncoderInput:
    """The input of an encoder from stored values `[B, C, (T,) H, W]` of the bands of `known`."""
    if images.shape[1] != len(known.bands):
        raise ValueError(
            f"{known.sensor.name}: got {images.shape[1]} channels, expected {len(known.bands)} in this order:"
            f" {', '.join(known.bands)}"
        )
    per_band = (-1, *[1] * (images.ndim - 2))
    mean = torch.tensor(known.mean, device=images.device).view(per_band)
    std = torch.tensor(known.std, device=images.device).view(per_band)
    meta = known.sensor.channel_meta(known.bands).to(images.device)
    values = images.float()
    pixels = torch.where(known.sensor.is_measured(values), (values - mean) / std, 0.0)  # [B, C, (T,) H, W]
    if (most := known.clip_std) is not None:
        pixels = pixels.clamp(-most, most) / (2 * most) + 0.5
    return EncoderInput(pixels, meta, gsd_m=known.gsd_m, dates=dates, location=location)


def of_wavelengths(wavelengths_um: Sequence[float]) -> ChannelMeta:
    """Channels `[C]` of optical and thermal bands by their centres, in micrometres. `ValueError` for other numbers."""
    centres = [float(value) for value in wavelengths_um]
    low, high = _WAVELENGTHS_UM
    for value in centres:
        if not low <= value <= high:
            hint = f": write {value / 1000:g}, if {value:g} is nanometres" if low <= value / 1000 <= high else ""
            raise ValueError(f"wavelengths_um are micrometres, {low:g} to {high:g}, got {value:g}{hint}")
    n = len(centres)
    return ChannelMeta(
        wavelength_um=torch.tensor(centres, dtype=torch.float32),
        fwhm_um=torch.zeros(n),
        kind=torch.tensor([KINDS.index("thermal" if value > _THERMAL_UM else "optical") for value in centres]),
        polarization=torch.full((n,), -1),
        orbit=torch.full((n,), -1),
        gsd_m=torch.full((n,), torch.nan),  # not known
    )


def check_when_and_where(cfg: EncoderConfig, images: Tensor, dates: Tensor | None, location: Tensor | None) -> None:
    """Raise `ValueError` for what does not fit the images, or would not be looked at."""
    n_samples, n_dates = images.shape[0], images.shape[2] if images.ndim == 5 else 1
    when, where = [[1900.0, 0.0], [2200.0, 366.0]], [[-90.0, -180.0], [90.0, 360.0]]
    given = {
        "dates": (dates, (n_samples, n_dates, 2), cfg.time_encoding, "year and day of the year", when),
        "location": (location, (n_samples, 2), cfg.location_encoding, "latitude and longitude", where),
    }
    for name, (values, shape, is_used, meaning, bounds) in given.items():
        if values is None:
            continue
        if not is_used:
            raise ValueError(f"{name}: this encoder was trained without it; leave it out")
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(f"{name} must be a tensor {list(shape)}, {meaning}, got {found}")
        low, high = torch.tensor(bounds, device=values.device)
        # Looking at values would stall a device.
        if values.device.type == "cpu" and bool(((values < low) | (values > high)).any()):
            raise ValueError(f"{name} are {meaning}, in this order, within {bounds[0]} and {bounds[1]}; NaN if unknown")
