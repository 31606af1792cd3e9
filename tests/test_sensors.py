"""Sensor files: all load, in the right units, with the numbers of their source; mistakes are refused with a hint."""

from pathlib import Path

import pytest
import torch

from ssl_eo.resources import resource_dir
from ssl_eo.sensors import KINDS, POLARIZATIONS, Sensor, load_sensor

SENSOR_NAMES = sorted(p.stem for p in (resource_dir("datasets_meta") / "sensors").glob("*.yaml"))
FWHM_PER_SIGMA = 2.354820045  # 2 sqrt(2 ln 2)


def optical(**band):
    entry = {"name": "B02", "kind": "optical", "gsd_m": 10.0, "wavelength_um": 0.490, "fwhm_um": 0.060, **band}
    return {
        "name": "camera",
        "title": "a camera",
        "dtype": "uint16",
        "unit": "reflectance",
        "source": "x",
        "bands": [entry],
    }


@pytest.mark.parametrize("name", SENSOR_NAMES)
def test_every_file_loads_and_survives_a_round_trip(name):
    sensor = load_sensor(name)
    assert sensor.name == name
    assert Sensor.from_dict(sensor.to_dict()) == sensor
    meta = sensor.channel_meta()
    assert meta.n_channels == len(sensor.bands)
    assert len(sensor.source) > 20
    for subset in sensor.subsets:
        assert len(sensor.resolve_bands(subset)) == len(set(sensor.subsets[subset]))
    if sensor.true_color is not None:
        red, green, blue = sensor.channel_meta(sensor.true_color).wavelength_um
        assert red > green > blue


@pytest.mark.parametrize("name", SENSOR_NAMES)
def test_values_are_in_the_range_of_their_unit(name):
    for band in load_sensor(name).bands:
        if band.kind == "optical":
            assert 0.35 < band.wavelength_um < 2.6
            assert 0.003 < band.fwhm_um < 0.35
        elif band.kind == "thermal":
            assert 8 < band.wavelength_um < 14
            assert 0.3 < band.fwhm_um < 1.5
        elif band.kind == "sar":
            assert band.wavelength_um == pytest.approx(299_792.458 / 5.405, rel=1e-4)
        assert 0.1 <= band.gsd_m <= 1000


@pytest.mark.parametrize(
    ("name", "n_bands"),
    [
        ("sentinel2_l1c", 13), ("sentinel2_l2a", 12), ("sentinel2_tci", 3), ("landsat8_9", 11), ("worldview2_3", 8),
        ("quickbird_geoeye", 4), ("superdove", 8), ("naip", 4), ("enmap", 224), ("aviris", 224), ("neon", 426),
        ("sentinel1_grd", 4), ("dem", 2),
    ],
)  # fmt: skip
def test_band_counts(name, n_bands):
    assert len(load_sensor(name).bands) == n_bands


def test_subsets_have_the_published_counts():
    assert len(load_sensor("enmap").resolve_bands("spectral_earth")) == 202
    assert load_sensor("sentinel2_l1c").resolve_bands("l2a") == load_sensor("sentinel2_l2a").band_names
    assert load_sensor("sentinel2_l1c").band_names[7:9] == ("B08", "B8A")
    assert load_sensor("sentinel1_grd").resolve_bands("vv_vh") == ("VV", "VH")


@pytest.mark.parametrize(
    ("sensor", "band", "mu_nm", "sigma_nm"),
    [
        ("sentinel2_l2a", "B02", 492.9971, 23.8103),
        ("sentinel2_l2a", "B8A", 864.7801, 8.0721),
        ("sentinel2_l1c", "B12", 2203.6182, 64.6065),
        ("landsat8_9", "B10", 10847.4670, 289.6384),
        ("worldview2_3", "B04", 604.6892, 15.1669),
        ("quickbird_geoeye", "B04", 840.7732, 83.7007),
        ("superdove", "B07", 706.918, 6.928),
        ("enmap", "B001", 418.416, 2.972),
        ("enmap", "B127", 1294.91, 4.848),
        ("enmap", "B224", 2445.3, 3.04),
        ("aviris", "B224", 404.6875 + 9.375 * 223, 4.6875),
        ("neon", "B425", 382.67 + 5.009 * 425, 4.0),
    ],
)
def test_wavelengths_are_those_of_the_fitted_gaussians(sensor, band, mu_nm, sigma_nm):
    meta = load_sensor(sensor).channel_meta([band])
    torch.testing.assert_close(meta.wavelength_um, torch.tensor([mu_nm / 1000]), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(meta.fwhm_um, torch.tensor([FWHM_PER_SIGMA * sigma_nm / 1000]), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["enmap", "aviris", "neon"])
def test_bands_of_spectrometers_are_in_order_of_wavelength(name):
    assert (load_sensor(name).channel_meta().wavelength_um.diff() > 0).all()


@pytest.mark.parametrize("name", [n for n in SENSOR_NAMES if {"B08", "B8A"} <= set(load_sensor(n).band_names)])
def test_the_near_infrared_bands_of_sentinel_2_are_not_swapped(name):
    """B08 is the wide one. A file may hold them in either order: what counts is which name has which wavelength."""
    sensor = load_sensor(name)
    wide, narrow = (sensor.bands[i] for i in sensor.index(["B08", "B8A"]))
    assert wide.wavelength_um == pytest.approx(0.83, abs=0.01)
    assert narrow.wavelength_um == pytest.approx(0.865, abs=0.002)
    assert wide.fwhm_um > 3 * narrow.fwhm_um
    assert (wide.gsd_m, narrow.gsd_m) == (10.0, 20.0)


def test_bands_of_one_name_are_the_same_in_every_product_of_sentinel_2():
    products = [load_sensor(n) for n in SENSOR_NAMES if n.startswith(("sentinel2_l", "satlas_sentinel2"))]
    assert len(products) == 3
    reference = {band.name: band for band in load_sensor("sentinel2_l1c").bands}
    for band in (band for product in products for band in product.bands if band.name in reference):
        assert band.wavelength_um == pytest.approx(reference[band.name].wavelength_um, rel=1e-4), band.name


@pytest.mark.parametrize("name", [n for n in SENSOR_NAMES if load_sensor(n).bands[0].kind == "sar"])
def test_radar_bands_are_named_by_their_polarisation(name):
    if name == "so2sat_sentinel1":
        pytest.skip("its bands are parts of complex amplitudes and of a covariance: several have one polarisation")
    bands = load_sensor(name).bands
    assert all(band.polarization == band.name[:2].upper() for band in bands)
    assert len({(band.polarization, band.orbit) for band in bands}) == len(bands)


def test_channel_meta_says_what_each_channel_is():
    radar = load_sensor("sentinel1_grd_descending").channel_meta(["VH"])
    assert KINDS[radar.kind] == "sar"
    assert POLARIZATIONS[radar.polarization] == "VH"
    assert radar.orbit.tolist() == [1]
    assert load_sensor("sentinel1_grd").channel_meta().orbit.tolist() == [-1] * 4
    assert load_sensor("dem").channel_meta().wavelength_um.tolist() == [0.0, 0.0]
    assert load_sensor("worldcover").is_categorical


def test_select_picks_one_row_a_sample():
    meta = load_sensor("sentinel2_l2a").channel_meta()
    batched = meta.select(torch.tensor([[3, 2], [1, 0]]))
    assert batched.wavelength_um.shape == (2, 2)
    picked = batched.select(torch.tensor([[1], [0]]))
    assert torch.equal(picked.wavelength_um[:, 0], meta.wavelength_um[[2, 1]])


@pytest.mark.parametrize(
    ("band", "hint"),
    [
        ({"wavelength_um": 490}, "490 looks like nanometres; write 0.490"),
        ({"fwhm_um": 60}, "60 looks like nanometres; write 0.060"),
        ({"kind": "thermal", "wavelength_um": 10_850}, "looks like nanometres; write 10.850"),
        ({"kind": "sar", "polarization": "VV", "wavelength_um": 0.055}, "looks like metres; write 55000"),
        ({"kind": "sar", "polarization": "VV", "wavelength_um": 5.405}, "looks like a frequency in GHz; write 55466"),
        ({"kind": "sar"}, "needs a polarization"),
        ({"kind": "elevation"}, "has no wavelength"),
        ({"kind": "categorical", "wavelength_um": 0.0, "fwhm_um": 0.0}, "needs n_classes"),
        ({"kind": "optic"}, "kind must be one of optical, thermal"),
        ({"gsd_m": 0}, "gsd_m must be positive metres, got 0"),
        ({"wavelength": 0.49}, "unknown key 'wavelength'; did you mean 'wavelength_um'?"),
    ],
)
def test_wrong_bands_are_refused_with_a_hint(band, hint):
    with pytest.raises(ValueError, match=r"file\.yaml: bands\[0\] \(B02\)") as error:
        Sensor.from_dict(optical(**band), where="file.yaml")
    assert hint in str(error.value)


def test_missing_band_is_named_with_a_suggestion():
    with pytest.raises(ValueError, match="sentinel2_l2a has no band 'B8a'; did you mean 'B8A'"):
        load_sensor("sentinel2_l2a").index(["B02", "B8a"])
    with pytest.raises(ValueError, match="no band subset 'rbg'; did you mean 'rgb"):
        load_sensor("sentinel2_l2a").resolve_bands("rbg")
    for name, meant in (("B2", "B02"), ("b04", "B04"), ("B11x", "B11"), ("Blue", "B02"), ("red", "B04")):
        with pytest.raises(ValueError, match=rf"sentinel2_l2a has no band '{name}'; did you mean '{meant}'\?"):
            load_sensor("sentinel2_l2a").index([name])
    raw = optical()
    with pytest.raises(ValueError, match="has no band 'B03'"):
        Sensor.from_dict({**raw, "subsets": {"rgb": ["B03"]}})


def test_missing_duplicated_and_unknown_entries_are_refused():
    raw = optical()
    with pytest.raises(ValueError, match="bands named twice: B02"):
        Sensor.from_dict({**raw, "bands": raw["bands"] * 2})
    with pytest.raises(ValueError, match="bands is empty"):
        Sensor.from_dict({**raw, "bands": []})
    with pytest.raises(ValueError, match=r"unknown key 'nodata'; did you mean 'no_data'\?"):
        Sensor.from_dict({**raw, "nodata": [0]})
    for key in ("title", "unit", "bands"):
        with pytest.raises(ValueError, match=f"^sensor: key {key} is missing$"):
            Sensor.from_dict({k: v for k, v in raw.items() if k != key})
    (band,) = raw["bands"]
    with pytest.raises(ValueError, match=r"^s\.yaml: bands\[0\] \(B02\): key gsd_m is missing$"):
        Sensor.from_dict({**raw, "bands": [{k: v for k, v in band.items() if k != "gsd_m"}]}, where="s.yaml")


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"scale": "a"}, "scale must be a finite number, got 'a'"),
        ({"scale": 0}, "scale must not be 0"),
        ({"offset": float("inf")}, "offset must be a finite number"),
        ({"dtype": "uint7"}, "dtype must be one of uint8, .*, got 'uint7'"),
        ({"dtype": ["uint8"]}, "dtype must be one of"),
        ({"name": "a/../b"}, "name must be a printable word without /"),
        ({"name": 5}, "name must be a printable word without /"),
        ({"bands": {"B02": {}}}, "bands must be a list of mappings, one a band"),
        ({"bands": ["red"]}, "bands must be a list of mappings, one a band"),
    ],
)
def test_values_that_no_sensor_has_are_refused(changes, hint):
    raw = load_sensor("naip").to_dict()
    with pytest.raises(ValueError, match=rf"^mine: .*{hint}"):
        Sensor.from_dict({**raw, **changes}, "mine")


def test_what_is_no_sensor_at_all_is_refused():
    with pytest.raises(ValueError, match=r"^sensor: a sensor is one mapping, got a NoneType$"):
        Sensor.from_dict(None)
    with pytest.raises(ValueError, match=r"as text, got 3$"):
        load_sensor(3)


def test_defaults_of_all_bands_are_overridden_by_a_band():
    raw = optical(gsd_m=20.0)
    del raw["bands"][0]["kind"]
    sensor = Sensor.from_dict({**raw, "band_defaults": {"kind": "optical", "gsd_m": 10.0}})
    assert (sensor.bands[0].kind, sensor.bands[0].gsd_m) == ("optical", 20.0)


def test_unknown_sensor_and_broken_files(tmp_path: Path):
    with pytest.raises(ValueError, match="has no 'sentinel2_l2'; did you mean 'sentinel2_l2a'"):
        load_sensor("sentinel2_l2")
    with pytest.raises(ValueError, match="has no 'sentinel2'; did you mean 'sentinel2_l1c', 'sentinel2_l2a' or 'sent"):
        load_sensor("sentinel2")
    with pytest.raises(ValueError, match="no such file"):
        load_sensor(str(tmp_path / "mine.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("bands: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_sensor(str(broken))
    broken.write_text("- 1")
    with pytest.raises(ValueError, match="holds one mapping, found list"):
        load_sensor(str(broken))


def test_a_sensor_of_ones_own_is_a_file(tmp_path: Path):
    path = tmp_path / "drone.yaml"
    path.write_text(
        "title: drone\nsource: its data sheet\ndtype: uint8\nunit: digital number\n"
        "bands: [{name: G, kind: optical, gsd_m: 0.2, wavelength_um: 0.56, fwhm_um: 0.04}]\n"
    )
    assert load_sensor(str(path)).name == "drone"
