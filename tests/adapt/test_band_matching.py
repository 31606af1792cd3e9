"""Channels stand for bands by what both measure, or by the published rules; what does not fit is said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_specialists import channels_of

from ssl_eo.adapt.band_matching import COUNT_RULES, TOLERANCE, BandMismatchError, match_bands, picks_by_count
from ssl_eo.sensors import Band, ChannelMeta, load_sensor

# The complete list of the publication: channels of the encoder <- channels of the image.
DOCUMENTED = {
    (3, 12): [[3, 2, 1]],
    (3, 13): [[3, 2, 1], [7, 3, 2]],
    (3, 2): [[0, 1, 1]],
    (3, 14): [[5, 4, 3]],
    (12, 14): [[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]],
    (2, 14): [[0, 1]],
    (3, 4): [[3, 0, 1], [0, 1, 2]],
    (3, 5): [[0, 1, 2], [3, 4, 4]],
    (12, 2): [[0, 1] * 6],
    (12, 3): [[0, 1, 2] * 4],
    (12, 4): [[0, 1, 2, 3] * 3],
    (13, 2): [[*[0, 1] * 6, 0]],
    (13, 3): [[*[0, 1, 2] * 4, 0]],
    (13, 4): [[*[0, 1, 2, 3] * 3, 0]],
    (14, 2): [[0, 1] * 7],
    (14, 3): [[*[0, 1, 2] * 4, 0, 1]],
    (14, 4): [[*[0, 1, 2, 3] * 3, 0, 1]],
}
S2 = load_sensor("sentinel2_l2a")

wavelengths = st.integers(300, 3000).map(lambda nanometres: nanometres / 1000)
optical = st.builds(lambda wavelength: Band("b", "optical", 10.0, wavelength_um=wavelength), wavelengths)


def sar(polarization: str, orbit: str | None = None, wavelength_um: float = 55466.0) -> Band:
    name = f"{polarization} {orbit}"
    return Band(name, "sar", 10.0, wavelength_um=wavelength_um, polarization=polarization, orbit=orbit)


def image(bands: list[Band]) -> ChannelMeta:
    return channels_of(*(Band(**{**vars(band), "name": str(i)}) for i, band in enumerate(bands)))


def test_the_rules_are_those_of_the_publication() -> None:
    assert {counts: [list(picks) for picks in rules] for counts, rules in COUNT_RULES.items()} == DOCUMENTED


@pytest.mark.parametrize("n", [2, 3, 6, 12, 13, 15])
def test_the_same_number_of_channels_is_shown_as_it_is(n: int) -> None:
    assert picks_by_count(n, n) == (tuple(range(n)),)


@pytest.mark.parametrize(
    ("required", "available"),
    [(2, 3), (2, 4), (2, 12), (2, 13), (13, 12), (12, 13), *((n, a) for n in (6, 15) for a in (2, 3, 4, 12, 13, 14))],
)
def test_what_the_publication_has_no_rule_for_is_refused(required: int, available: int) -> None:
    with pytest.raises(BandMismatchError, match=f"takes {required} channels, and there is no rule for .* {available}"):
        picks_by_count(required, available)


@pytest.mark.parametrize("name", ["sentinel2_l2a", "sentinel2_l1c", "sentinel1_grd", "landsat8_9", "rgb"])
def test_a_sensor_matches_itself(name: str) -> None:
    sensor = load_sensor(name)
    assert match_bands(sensor.bands, sensor.channel_meta(), tolerance=0.0) == tuple(range(len(sensor.bands)))


@given(st.lists(wavelengths, min_size=1, max_size=12, unique=True), st.data())
def test_matching_follows_the_order_of_channels(found: list[float], data: st.DataObject) -> None:
    bands = [Band("b", "optical", 10.0, wavelength_um=wavelength) for wavelength in found]
    order = data.draw(st.permutations(range(len(bands))))
    shuffled = image([bands[i] for i in order])
    assert [order[pick] for pick in match_bands(bands, shuffled, tolerance=0.0)] == list(range(len(bands)))


@given(st.lists(optical, min_size=1, max_size=6), st.lists(optical, min_size=1, max_size=8), st.floats(0.0, 0.3))
def test_a_match_is_the_nearest_within_tolerance_and_used_once(
    bands: list[Band], seen: list[Band], tolerance: float
) -> None:
    def off(band: Band, i: int) -> float:
        return abs(torch.tensor(band.wavelength_um).sub(seen[i].wavelength_um).item())

    assume(len({band.wavelength_um for band in seen}) == len(seen))
    try:
        picks = match_bands(bands, image(seen), tolerance)
    except BandMismatchError:
        nearest = [min((off(band, i), i) for i in range(len(seen)))[1] for band in bands]
        offs = [sorted(off(band, i) for i in range(len(seen))) for band in bands]
        tied = any(len(found) > 1 and found[1] - found[0] < 1e-6 for found in offs)
        far = any(found[0] > tolerance * band.wavelength_um - 1e-6 for band, found in zip(bands, offs, strict=True))
        assert tied or far or len(set(nearest)) < len(nearest)
        return
    assert len(set(picks)) == len(picks) == len(bands)
    for band, pick in zip(bands, picks, strict=True):
        assert off(band, pick) <= tolerance * band.wavelength_um + 1e-6
        assert off(band, pick) <= min(off(band, i) for i in range(len(seen))) + 1e-6


def test_sensors_that_are_alike_match_across() -> None:
    landsat = load_sensor("landsat8_9")
    picks = match_bands(
        [S2.bands[i] for i in S2.index(("B04", "B03", "B02", "B8A", "B11", "B12"))], landsat.channel_meta()
    )
    assert [landsat.band_names[i] for i in picks] == ["B04", "B03", "B02", "B05", "B06", "B07"]
    camera = load_sensor("rgb")
    assert match_bands([S2.bands[i] for i in S2.index(("B02", "B03", "B04"))], camera.channel_meta()) == (2, 1, 0)


def test_radar_is_matched_by_polarisation_and_then_by_orbit() -> None:
    seen = image([sar("VH", "ascending"), sar("VV", "descending"), sar("VV", "ascending"), *S2.bands])
    assert match_bands([sar("VV", "ascending"), sar("VH")], seen) == (2, 0)
    assert match_bands([sar("VV", "descending"), sar("VH", "descending")], seen) == (1, 0)
    with pytest.raises(BandMismatchError, match=r"band VV None: channels 1 and 2 fit equally well"):
        match_bands([sar("VV")], seen)
    with pytest.raises(BandMismatchError, match=r"band HH None: the image has no channel of sar HH"):
        match_bands([sar("HH")], seen)
    with pytest.raises(BandMismatchError, match=r"the nearest channel of sar VV, 1, is 1.85e\+05 um away"):
        match_bands([sar("VV", wavelength_um=240_000.0)], seen)  # an L band is no C band


def test_what_does_not_fit_is_said() -> None:
    rgb = load_sensor("rgb").channel_meta()
    with pytest.raises(BandMismatchError, match=r"band B08 at 0.827539 um: the nearest channel of optical, 0, is"):
        match_bands([S2.bands[i] for i in S2.index(("B04", "B08"))], rgb)
    near = image([Band("n", "optical", 10.0, wavelength_um=0.845)])
    with pytest.raises(BandMismatchError, match="channel 0 is the nearest to both B08 and B8A"):
        match_bands([S2.bands[i] for i in S2.index(("B08", "B8A"))], near)
    thermal = Band("t", "thermal", 100.0, wavelength_um=3.5)
    with pytest.raises(BandMismatchError, match="band t: the image has no channel of thermal"):
        match_bands([thermal], image([Band("o", "optical", 10.0, wavelength_um=3.5)]))
    classes = Band("c", "categorical", 10.0, n_classes=3)
    with pytest.raises(BandMismatchError, match="no channel of categorical"):
        match_bands([classes], image([classes]))
    heights = Band("h", "elevation", 30.0)
    assert match_bands([heights], image([*S2.bands, heights])) == (len(S2.bands),)
    with pytest.raises(ValueError, match="tolerance must be a fraction"):
        match_bands([heights], rgb, float("nan"))


def test_a_wide_band_fits_what_it_covers() -> None:
    narrow = Band("narrow", "optical", 10.0, wavelength_um=0.5, fwhm_um=0.01)
    wide = Band("wide", "optical", 10.0, wavelength_um=0.54, fwhm_um=0.09)
    assert match_bands([narrow], image([wide])) == match_bands([wide], image([narrow])) == (0,)
    less_wide = Band("less", "optical", 10.0, wavelength_um=0.54, fwhm_um=0.07)
    with pytest.raises(BandMismatchError, match=r"is 0.04 um away, allowed are 0.035"):
        match_bands([narrow], image([less_wide]))


def test_no_band_of_sentinel2_is_within_tolerance_of_another_colour() -> None:
    """The tolerance keeps red from red edge and blue from coastal aerosol."""
    for one, other in (("B04", "B05"), ("B02", "B01"), ("B02", "B03"), ("B11", "B12"), ("B08", "B07")):
        i, j = S2.index((one, other))
        distance = abs(S2.bands[i].wavelength_um - S2.bands[j].wavelength_um)
        assert distance > TOLERANCE * S2.bands[i].wavelength_um
