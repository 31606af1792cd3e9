"""Procedural scenes: pure, aligned in metres, the same ground for every sensor, and physically sensible."""

import pickle
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.sources._landscape import SCENES, build_scene
from ssl_eo.data.sources._painters import LAND_COVER
from ssl_eo.data.sources._spectra import Material, spectra, wavelengths_um
from ssl_eo.data.sources._terrain import area_average, interpolate, overlap_matrix
from ssl_eo.data.sources.synthetic import Config, Source
from ssl_eo.data.types import TileSchema
from ssl_eo.resources import resource_dir
from ssl_eo.seeding import numpy_generator
from ssl_eo.sensors import load_sensor

NOT_MODELLED = ("canopy_height", "sentinel2_cloud_mask", "sentinel2_scl")  # the procedural world has no such thing
SENSOR_NAMES = sorted(
    p.stem for p in (resource_dir("datasets_meta") / "sensors").glob("*.yaml") if p.stem not in NOT_MODELLED
)
COVER = {name: i for i, name in enumerate(LAND_COVER)}


def digest(source, index):
    sample = source.read(index)
    parts = [sample.key, repr(sample.meta), repr(sample.label)]
    parts += [sha256(tile.pixels.tobytes()).hexdigest() for tile in sample.tiles.values()]
    return sha256("".join(parts).encode()).hexdigest()


def band(sample, sensor, name):
    tile = sample.tiles[sensor]
    return tile.pixels[tile.bands.index(name)].astype(np.float64)


def reflectance_at(material, um):
    return float(spectra()[material][np.abs(wavelengths_um() - um).argmin()])


@pytest.fixture(scope="module")
def paired():
    """Samples that several sensors saw at once."""
    sensors = ["sentinel2_l1c", "sentinel1_grd:vv_vh", "landsat8_9:no_pan", "dem", "synthetic_landcover", "worldcover"]
    source = Source(Config(sensors=sensors, extent_m=960.0, seed=3))
    return [source.read(i) for i in range(40)]


# ---------------------------------------------------------------- purity


def test_sample_is_a_pure_function_of_its_index():
    source = Source(Config(sensors=["sentinel2_l2a", "sentinel1_grd"]))
    first = [digest(source, i) for i in (5, 0, 5, 17)]
    again = pickle.loads(pickle.dumps(source))
    _ = again.schema, again.read(3)
    assert first == [digest(again, i) for i in (5, 0, 5, 17)]
    assert first[0] == first[2]
    assert len(set(first)) == 3


def test_another_process_sees_the_same_pixels():
    code = (
        "from hashlib import sha256; from ssl_eo.data.sources.synthetic import Config, Source;"
        "print(sha256(Source(Config()).read(7).tiles['sentinel2_l2a'].pixels.tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == sha256(Source(Config()).read(7).tiles["sentinel2_l2a"].pixels.tobytes()).hexdigest()


def test_splits_and_seeds_show_other_places():
    configs = [Config(split="train"), Config(split="val"), Config(split="test"), Config(seed=1)]
    assert len({tuple(Source(c).read(i).meta["latitude"] for i in range(5)) for c in configs}) == 4
    assert Source(Config(split="val")).read(12).key == "val-000012"


def test_tile_does_not_depend_on_the_other_sensors():
    alone = Source(Config(sensors=["sentinel1_grd"])).read(4).tiles["sentinel1_grd"]
    beside = Source(Config(sensors=["sentinel2_l2a", "dynamic_world", "sentinel1_grd"])).read(4).tiles["sentinel1_grd"]
    np.testing.assert_array_equal(alone.pixels, beside.pixels)


def test_fingerprint_follows_the_content():
    assert Source(Config()).fingerprint() == Source(Config()).fingerprint()
    others = [Config(seed=1), Config(split="val"), Config(extent_m=320.0), Config(sensors=["sentinel2_l1c"])]
    assert len({Source(c).fingerprint() for c in [Config(), *others]}) == 5


# ---------------------------------------------------------------- schema, labels, errors


@pytest.mark.parametrize("name", SENSOR_NAMES)
def test_every_sensor_file_can_look(name):
    sensor = load_sensor(name)
    extent_m = 32 * min(b.gsd_m for b in sensor.bands)
    source = Source(Config(sensors=[name], extent_m=extent_m))
    tile = source.read(1).tiles[name]
    assert tile.pixels.shape == (len(sensor.bands), 32, 32)
    assert tile.pixels.dtype == np.dtype(sensor.dtype)
    assert tile.bands == sensor.band_names
    assert np.isfinite(tile.pixels).all()
    assert not np.isin(tile.pixels, sensor.no_data).any()
    schema = source.schema[name]
    assert isinstance(schema, TileSchema)
    assert (schema.shape, schema.gsd_m, schema.dtype) == ((32, 32), tile.gsd_m, sensor.dtype)
    if sensor.is_categorical:
        assert tile.pixels.max() < sensor.bands[0].n_classes


def test_statistics_describe_the_samples_and_are_shared_by_the_splits():
    source = Source(Config(n_samples=150))
    schema = source.schema["sentinel2_l2a"]
    assert schema == Source(Config(split="val", seed=9)).schema["sentinel2_l2a"]
    pixels = np.stack([source.read(i).tiles["sentinel2_l2a"].pixels for i in range(150)]).astype(np.float64)
    ratio = pixels.mean((0, 2, 3)) / np.array(schema.mean)
    assert np.abs(np.log(ratio)).max() < 0.35
    assert np.abs(np.log(pixels.std((0, 2, 3)) / np.array(schema.std))).max() < 0.35


def test_labels():
    scenes = Source(Config(labels="scene"))
    seen = {scenes.read(i).label for i in range(150)}
    assert seen == set(range(len(SCENES)))
    assert scenes.label_names == SCENES
    maps = Source(Config(labels="landcover", sensors=["sentinel2_l2a", "synthetic_landcover"]))
    sample = maps.read(2)
    np.testing.assert_array_equal(sample.label, sample.tiles["synthetic_landcover"].pixels[0])
    assert maps.label_names == LAND_COVER
    present = Source(Config(labels="presence")).read(2).label
    counts = np.bincount(sample.label.ravel(), minlength=len(LAND_COVER)) / sample.label.size
    assert present.shape == (len(LAND_COVER),)
    assert present[counts > 0.08].all()
    assert not present[counts == 0].any()


def test_place_and_date_are_real():
    source = Source(Config())
    for i in range(20):
        meta = source.read(i).meta
        assert -60 <= meta["latitude"] <= 60
        assert -180 <= meta["longitude"] <= 180
        assert 2020 <= int(meta["date"][:4]) <= 2023
        assert 11 < meta["sun_elevation_deg"] < 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extent_m": 1000.0, "sensors": ["sentinel2_l2a", "enmap"]}, "of enmap .*multiples of 30 m.*990 or 1020"),
        ({"extent_m": 645.0}, "of sentinel2_l2a"),
        ({"extent_m": 640.0, "sensors": ["superdove"]}, "multiples of 3.7 m"),
        ({"extent_m": 600.0, "sensors": ["sentinel2_l2a", "worldview2_3"]}, "multiples of 310 m.*310 or 620"),
        ({"sensors": ["sentinel2"]}, "did you mean"),
        ({"sensors": ["enmap:spectral_erth"]}, "did you mean 'spectral_earth'"),
        ({"sensors": ["dem", "dem"], "extent_m": 960.0}, "dem is named twice"),
    ],
)
def test_sources_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Source(Config(**options))


@pytest.mark.parametrize(
    ("options", "key"),
    [({"n_samples": 0}, "n_samples"), ({"sensors": []}, "sensors"), ({"extent_m": -1.0}, "extent_m"),
     ({"split": "dev"}, "split"), ({"labels": "class"}, "labels")],
)  # fmt: skip
def test_config_names_the_wrong_key(options, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        Config(**options)


def test_index_outside_the_source():
    with pytest.raises(IndexError, match="sample 3 of 3"):
        Source(Config(n_samples=3)).read(3)


# ---------------------------------------------------------------- alignment


def test_class_map_lies_on_the_pixels(paired):
    """Within a scene, green cover is greener than water at the same row and column; not so when one map is mirrored."""
    aligned, mirrored = [], []
    for sample in paired:
        nir, red = band(sample, "sentinel2_l1c", "B08"), band(sample, "sentinel2_l1c", "B04")
        ndvi, cover = (nir - red) / (nir + red), sample.tiles["synthetic_landcover"].pixels[0]
        water, forest = cover == COVER["water"], cover == COVER["forest"]
        if min(water.sum(), forest.sum()) > 200:
            aligned.append(ndvi[forest].mean() - ndvi[water].mean())
            mirrored.append(ndvi[:, ::-1][forest].mean() - ndvi[:, ::-1][water].mean())
    assert len(aligned) >= 3
    assert min(aligned) > 0.1
    assert np.mean(mirrored) < np.mean(aligned) / 2


def test_two_optical_sensors_agree_in_metres(paired):
    for sample in paired:
        for ours, theirs in (("B04", "B04"), ("B11", "B06"), ("B8A", "B05")):
            cell = band(sample, "sentinel2_l1c", ours).reshape(32, 3, 32, 3).mean((1, 3)) / 10_000
            other = band(sample, "landsat8_9", theirs)
            assert np.abs(cell - other).mean() < 0.01 + 0.1 * cell.std()
            assert abs(cell.mean() - other.mean()) < 0.01
            if cell.std() > 0.05:
                assert np.corrcoef(cell.ravel(), other.ravel())[0, 1] > 0.95


def test_legends_agree(paired):
    for sample in paired:
        own, world = sample.tiles["synthetic_landcover"].pixels, sample.tiles["worldcover"].pixels
        np.testing.assert_array_equal(own == COVER["water"], world == 7)
        np.testing.assert_array_equal(np.isin(own, [COVER["buildings"], COVER["pavement"]]), world == 4)


def test_coarse_bands_are_blurred_to_their_ground_sampling():
    source = Source(Config(extent_m=960.0))
    fine, coarse = [], []
    for i in range(12):
        sample = source.read(i)
        for name, out in (("B02", fine), ("B01", coarse)):
            x = band(sample, "sentinel2_l2a", name)
            out.append(np.abs(np.diff(x)).mean() / x.std())
    assert np.mean(coarse) < np.mean(fine) / 2


def test_detail_below_the_base_grid_averages_out(tmp_path):
    """A 1 m camera, averaged, sees what the same camera sees at 10 m, though neighbours within 10 m differ."""
    camera = {**load_sensor("naip").to_dict(), "dtype": "float32", "unit": "reflectance"}
    entries = []
    for name, gsd_m in (("fine", 1.0), ("coarse", 10.0)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump({**camera, "name": name, "bands": [{**b, "gsd_m": gsd_m} for b in camera["bands"]]})
        )
        entries.append(str(path))
    sample = Source(Config(sensors=entries, extent_m=200.0)).read(0)
    fine, coarse = sample.tiles["fine"].pixels, sample.tiles["coarse"].pixels
    np.testing.assert_allclose(fine.reshape(4, 20, 10, 20, 10).mean((2, 4)), coarse, atol=0.013)
    assert np.abs(fine[3] / np.repeat(np.repeat(coarse[3], 10, 0), 10, 1) - 1).mean() > 0.03


# ---------------------------------------------------------------- physics


def test_spectra_are_reflectances_with_the_textbook_features():
    assert spectra().min() >= 0
    assert spectra().max() <= 1
    assert reflectance_at(Material.LEAF, 0.85) > 6 * reflectance_at(Material.LEAF, 0.67)
    assert reflectance_at(Material.LEAF, 0.55) > reflectance_at(Material.LEAF, 0.48)
    assert reflectance_at(Material.LEAF, 1.45) < reflectance_at(Material.LEAF, 1.65)
    assert reflectance_at(Material.SNOW, 1.6) < 0.2 < 0.9 < reflectance_at(Material.SNOW, 0.55)
    assert reflectance_at(Material.CLEAR_WATER, 1.6) < 0.01
    assert reflectance_at(Material.BRIGHT_SOIL, 0.45) < reflectance_at(Material.BRIGHT_SOIL, 0.85)


def pixels_of(samples, cover_name, sensor, name):
    cover = [s.tiles["synthetic_landcover"].pixels[0] == COVER[cover_name] for s in samples]
    return np.concatenate([band(s, sensor, name)[c] for s, c in zip(samples, cover, strict=True)])


def test_land_covers_look_like_themselves(paired):
    def mean(cover, name, sensor="sentinel2_l1c"):
        return pixels_of(paired, cover, sensor, name).mean()

    assert mean("water", "B11") < mean("forest", "B11") < mean("sand", "B11")
    assert mean("forest", "B08") > mean("forest", "B04")
    assert mean("snow", "B03") > 2 * mean("snow", "B11")
    assert mean("sand", "B10") < 300  # water vapour hides the ground
    assert mean("water", "VV", "sentinel1_grd") < mean("grass", "VV", "sentinel1_grd") - 3
    assert mean("buildings", "VV", "sentinel1_grd") > mean("forest", "VV", "sentinel1_grd") > -12
    assert mean("forest", "VH", "sentinel1_grd") < mean("forest", "VV", "sentinel1_grd") - 3


def test_thermal_bands_are_temperatures_and_cool_with_height(paired):
    for sample in paired:
        kelvin = band(sample, "landsat8_9", "B10")
        assert kelvin.min() > 230
        assert kelvin.max() < 335
    mountains = [s for s in paired if s.tiles["dem"].pixels[0].mean() > 800]
    plains = [s for s in paired if s.tiles["dem"].pixels[0].mean() < 300]
    kelvin_of = [np.mean([band(s, "landsat8_9", "B10").mean() for s in group]) for group in (mountains, plains)]
    assert kelvin_of[0] < kelvin_of[1]


def test_slopes_towards_the_sun_are_brighter():
    """In one steep scene, light falls off with the angle between the slope and the sun."""
    scenes = [build_scene(numpy_generator("light", i), 640.0) for i in range(60)]
    steep = [s for s in scenes if SCENES[s.label] == "alpine"]
    assert len(steep) >= 2
    for scene in steep:
        north, east = scene.slope
        azimuth = scene.climate.sun_azimuth
        facing = -(np.cos(azimuth) * north + np.sin(azimuth) * east)
        assert scene.light[facing > 0.15].mean() > 1.1 * scene.light[facing < -0.15].mean()


# ---------------------------------------------------------------- resampling


@settings(max_examples=40, deadline=None)
@given(n_in=st.integers(1, 40), n_out=st.integers(1, 40), extent_m=st.floats(1.0, 1e4))
def test_area_average_keeps_the_mean_and_constants(n_in, n_out, extent_m):
    field = np.random.default_rng(n_in).random((2, n_in, n_in), np.float32)
    average = area_average(field, n_out, extent_m, extent_m / n_out)
    assert average.shape == (2, n_out, n_out)
    np.testing.assert_allclose(average.mean((1, 2)), field.mean((1, 2)), rtol=1e-4)
    weights = overlap_matrix(n_in, n_out, extent_m)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights @ field @ weights.T, average, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(n_cells=st.integers(2, 12), n_out=st.integers(2, 60))
def test_interpolation_keeps_planes_between_the_outer_centres(n_cells, n_out):
    extent_m = 10.0 * n_cells
    centres = 10.0 * (np.arange(n_cells, dtype=np.float32) + 0.5)
    plane = np.add.outer(2 * centres, centres)
    at = ((np.arange(n_out) + 0.5) * extent_m / n_out).clip(5.0, extent_m - 5.0)
    np.testing.assert_allclose(interpolate(plane, n_out, extent_m, 10.0), np.add.outer(2 * at, at), rtol=1e-4)


@pytest.mark.parametrize("name", NOT_MODELLED)
def test_what_the_world_does_not_have_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        Source(Config(sensors=[name]))
