"""Which channels of an image stand for the bands of an encoder that was trained on others.

By what channels measure, where both sides say it; or by the rules that EoS-FM was published with, which know how many
channels there are and nothing else.

C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ssl_eo.sensors import KINDS, ORBITS, POLARIZATIONS, Band, ChannelMeta

__all__ = ["COUNT_RULES", "TOLERANCE", "AmbiguousBandError", "BandMismatchError", "match_bands", "picks_by_count"]

TOLERANCE = 0.05  # of the wavelength: the near infrared of any sensor fits, red edge does not stand for red

Picks = tuple[int, ...]  # for each band of an encoder, the channel of the image


class BandMismatchError(ValueError):
    """The channels of an image cannot stand for the bands of an encoder; the message says which and why."""


class AmbiguousBandError(BandMismatchError):
    """Several channels of an image stand for one band equally well: which is meant is not known."""


def _cyclic(required: int, available: int) -> Picks:
    return tuple(i % available for i in range(required))


# (channels of the encoder, channels of the image) -> what it is shown; where there are two, it is run on both.
# Source: band_adaptation.py of EoS-FM (arXiv 2511.21523), whose order of Sentinel-1 and -2 is VV, VH, B01, B02, ...
COUNT_RULES: Mapping[tuple[int, int], tuple[Picks, ...]] = {
    (3, 2): ((0, 1, 1),),  # VV, VH, VH
    (3, 4): ((3, 0, 1), (0, 1, 2)),  # of red, green, blue, near infrared
    (3, 5): ((0, 1, 2), (3, 4, 4)),  # of red, green, blue, VV, VH
    (3, 12): ((3, 2, 1),),  # B04, B03, B02
    (3, 13): ((3, 2, 1), (7, 3, 2)),  # and B08, B04, B03
    (3, 14): ((5, 4, 3),),
    (2, 14): ((0, 1),),
    (12, 14): (tuple(range(2, 14)),),
    **{(required, available): (_cyclic(required, available),) for required in (12, 13, 14) for available in (2, 3, 4)},
}


def picks_by_count(required: int, available: int) -> tuple[Picks, ...]:
    """What an encoder of `required` channels is shown of an image of `available`, by the rules of EoS-FM.

    They are blind: whether the third channel is blue or VH, nobody looks. Raises `BandMismatchError` where there is no
    rule.
    """
    if required == available:
        return (tuple(range(required)),)
    if (required, available) not in COUNT_RULES:
        known = sorted(a for r, a in COUNT_RULES if r == required)
        raise BandMismatchError(
            f"takes {required} channels, and there is no rule for an image of {available}; for one of"
            f" {', '.join(map(str, sorted([*known, required])))} there is"
        )
    return COUNT_RULES[required, available]


def match_bands(bands: Sequence[Band], channels: ChannelMeta, tolerance: float = TOLERANCE) -> Picks:
    """The channel of an image (`channels [C]`) for each of `bands`: the nearest in wavelength, of the same kind.

    A SAR channel needs the polarisation of the band too; of several, that of its orbit is taken. Raises
    `BandMismatchError` where the nearest is further than `tolerance` (a fraction of the band's wavelength) and neither
    of the two is so wide that it covers the centre of the other, where two fit equally, and where one would have to
    stand for two bands.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a fraction of the wavelength from 0, got {tolerance}")
    picks = tuple(_nearest(band, channels, tolerance) for band in bands)
    for i, pick in enumerate(picks):
        if pick in picks[:i]:
            first, second = bands[picks.index(pick)].name, bands[i].name
            raise BandMismatchError(f"channel {pick} is the nearest to both {first} and {second}, which are two bands")
    return picks


def _nearest(band: Band, channels: ChannelMeta, tolerance: float) -> int:
    orbit = -1 if band.orbit is None else ORBITS.index(band.orbit)
    wavelength_um = torch.tensor(band.wavelength_um, dtype=torch.float32).item()  # as precise as those of channels
    # Rank by distance, and of equally near ones those of the band's orbit first.
    ranked = sorted(
        (abs(wavelength - wavelength_um), orbit >= 0 and other_orbit != orbit, i)
        for i, (wavelength, other_orbit) in enumerate(
            zip(channels.wavelength_um.tolist(), channels.orbit.tolist(), strict=True)
        )
        if _is_alike(band, channels, i)
    )
    what = f"{band.kind} {band.polarization}" if band.polarization else band.kind
    if not ranked:
        raise BandMismatchError(f"band {band.name}: the image has no channel of {what}")
    distance, is_other_orbit, best = ranked[0]
    allowed = max(tolerance * wavelength_um, band.fwhm_um / 2, float(channels.fwhm_um[best]) / 2)
    if distance > allowed:
        raise BandMismatchError(
            f"band {band.name} at {wavelength_um:g} um: the nearest channel of {what}, {best}, is {distance:.3g} um"
            f" away, allowed are {allowed:.3g}"
        )
    equal = [i for d, other, i in ranked if (d, other) == (distance, is_other_orbit)]
    if len(equal) > 1:
        raise AmbiguousBandError(f"band {band.name}: channels {equal[0]} and {equal[1]} fit equally well")
    return best


def _is_alike(band: Band, channels: ChannelMeta, i: int) -> bool:
    if int(channels.kind[i]) != KINDS.index(band.kind) or band.kind == "categorical":
        return False
    return band.polarization is None or int(channels.polarization[i]) == POLARIZATIONS.index(band.polarization)
