from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssl_eo.data.plans import CropConfig, SourceCrop, aligned, band_subset, multi_crop, resized_crop, whole
from ssl_eo.data.types import Sample, Tile, TileSchema, ViewLimits, ViewPlan
from ssl_eo.sensors import Band, Sensor

many = settings(max_examples=50, deadline=None)


def make_schema(dtype="uint16", shape=(8, 8), gsd_m=10.0, no_data=()):
    bands = tuple(Band(n, "optical", gsd_m, 0.5 + 0.1 * i) for i, n in enumerate(("red", "green")))
    sensor = Sensor("demo", "demo", bands, dtype, "dn", "demo", no_data=no_data)
    return TileSchema(sensor, sensor.band_names, dtype, shape, gsd_m, (0.0, 0.0), (1.0, 1.0))


def sample_of(shape, gsd_m=10.0, limits=None):
    tile = Tile(np.broadcast_to(np.uint16(1), (2, *shape)), ("red", "green"), gsd_m)
    return Sample("demo", {"demo": tile}, limits=limits or ViewLimits())


@many
@example((1, 2), (1.0, 1.0), (1.0, 1.0), 0)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    st.integers(0, 2**32 - 1),
)
def test_crops_lie_inside_with_the_area_and_aspect_asked_for(shape, scale, aspect, seed):
    cfg = CropConfig(32, scale=tuple(sorted(scale)), aspect=tuple(sorted(aspect)))
    plan = resized_crop(sample_of(shape), "demo", cfg, np.random.default_rng(seed))
    top, left, height, width = plan.box
    assert top >= 0
    assert left >= 0
    assert height > 0
    assert width > 0
    assert top + height <= shape[0] * (1 + 1e-9)
    assert left + width <= shape[1] * (1 + 1e-9)
    if cfg.scale[0] == 1:  # one box has that area, whatever its aspect
        assert plan.box == (0.0, 0.0, *shape)
        return
    assert cfg.aspect[0] * (1 - 1e-9) <= width / height <= cfg.aspect[1] * (1 + 1e-9)
    share = height * width / (shape[0] * shape[1])
    touches = height == pytest.approx(shape[0]) or width == pytest.approx(shape[1])
    assert touches or cfg.scale[0] * (1 - 1e-9) <= share <= cfg.scale[1] * (1 + 1e-9)
    assert plan.size == (32, 32)


def test_draws_follow_the_stated_distributions():
    cfg = CropConfig(8, scale=(0.2, 0.6), brightness=0.3, contrast=0.2, jitter_prob=0.25)
    rng, sample = np.random.default_rng(0), sample_of((100, 100))
    plans = [resized_crop(sample, "demo", cfg, rng) for _ in range(4000)]
    area = np.array([p.box[2] * p.box[3] / 1e4 for p in plans])
    assert area.mean() == pytest.approx(0.4, abs=0.01)
    assert np.mean([np.log(p.box[3] / p.box[2]) for p in plans]) == pytest.approx(0, abs=0.01)
    assert np.mean([p.flip for p in plans]) == pytest.approx(0.5, abs=0.03)
    assert np.bincount([p.rot90 for p in plans]) / 4000 == pytest.approx([0.25] * 4, abs=0.03)
    jittered = [p for p in plans if (p.gain, p.bias) != (1.0, 0.0)]
    assert len(jittered) / 4000 == pytest.approx(0.25, abs=0.03)
    assert max(abs(p.gain - 1) for p in jittered) == pytest.approx(0.2, abs=0.01)
    assert max(abs(p.bias) for p in jittered) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("shape", [(64, 64), (30, 90)])
def test_full_scale_is_the_whole_tile_exactly(shape):
    cfg = CropConfig(16, scale=(1.0, 1.0), flip=False, rot90=False)
    assert resized_crop(sample_of(shape), "demo", cfg, np.random.default_rng(0)) == whole("demo", shape, 16)


def test_the_same_generator_draws_the_same_views():
    crops = {"global": (CropConfig(16), 2), "local": (CropConfig(8, scale=(0.05, 0.2)), 5)}
    first, second = (multi_crop(sample_of((64, 64)), "demo", crops, np.random.default_rng(3)) for _ in range(2))
    assert first == second
    assert {role: len(plans) for role, plans in first.items()} == {"global": 2, "local": 5}
    assert len({p.box for plans in first.values() for p in plans}) == 7


@many
@given(
    st.tuples(st.integers(4, 300), st.integers(4, 300)),
    st.floats(0.3, 60),
    st.tuples(st.floats(5, 5000), st.floats(5, 5000)),
    st.tuples(st.floats(0.1, 200), st.floats(0.1, 200)),
    st.integers(0, 2**32 - 1),
)
def test_views_keep_to_the_window_and_the_ground_sampling_of_their_source(shape, tile_gsd_m, extent_m, gsd_m, seed):
    crop = SourceCrop(tuple(sorted(extent_m)), tuple(sorted(gsd_m)))
    rng = np.random.default_rng(seed)
    sample = sample_of(shape, tile_gsd_m)
    sample.limits = crop.draw(sample, rng)
    cfg = CropConfig(16, scale=(0.05, 0.8), aspect=(1.0, 1.0))
    plans = [resized_crop(sample, "demo", cfg, rng) for _ in range(5)]
    tops, lefts = [p.box[0] for p in plans], [p.box[1] for p in plans]
    bottoms, rights = [p.box[0] + p.box[2] for p in plans], [p.box[1] + p.box[3] for p in plans]
    assert min(tops) >= -1e-9
    assert min(lefts) >= -1e-9
    assert max(bottoms) <= shape[0] * (1 + 1e-9)
    assert max(rights) <= shape[1] * (1 + 1e-9)
    window = max(extent_m) * (1 + 1e-9) / tile_gsd_m  # pixels
    assert max(bottoms) - min(tops) <= window + 1e-6
    assert max(rights) - min(lefts) <= window + 1e-6
    side = min(sample.limits.window_m[2:]) / tile_gsd_m  # of the largest square box
    for plan in plans:
        found = np.sqrt(plan.box[2] * plan.box[3]) * tile_gsd_m / cfg.size_px
        assert found <= crop.gsd_m[1] * (1 + 1e-6)
        assert found >= min(crop.gsd_m[0], side * tile_gsd_m / cfg.size_px) * (1 - 1e-6)


def test_limits_leave_draws_alone_where_they_do_not_bind():
    cfg = CropConfig(16)
    for limits in (ViewLimits(gsd_m=(1e-3, 1e6)), ViewLimits(window_m=(0.0, 0.0, 1e6, 1e6))):
        free, bound = (
            resized_crop(s, "demo", cfg, np.random.default_rng(4))
            for s in (sample_of((64, 80)), sample_of((64, 80), 10.0, limits))
        )
        assert bound == free


def test_a_window_covers_the_same_ground_of_all_tiles():
    tiles = {  # footprints of 640, 660 and 704 m: sensors rarely agree to the metre
        name: Tile(np.broadcast_to(np.uint16(1), (1, side, side)), ("b",), gsd_m)
        for name, side, gsd_m in (("a", 64, 10.0), ("b", 22, 30.0), ("c", 352, 2.0))
    }
    sample, cfg = Sample("s", tiles), CropConfig(8, scale=(1.0, 1.0))
    for seed in range(20):
        sample.limits = SourceCrop(extent_m=(200.0, 800.0)).draw(sample, np.random.default_rng(seed))
        top, left, height, width = sample.limits.window_m
        assert 200 <= height == width <= 640
        assert min(top, left) >= 0
        assert max(top + height, left + width) <= 640 + 1e-9
        for name, tile in tiles.items():
            box = np.array(resized_crop(sample, name, cfg, np.random.default_rng(0)).box) * tile.gsd_m
            np.testing.assert_allclose(box, sample.limits.window_m, rtol=1e-12)


def test_a_box_of_next_to_nothing_is_enlarged():
    sample = sample_of((64, 64), 1e6, ViewLimits(window_m=(37e6, 63.9999999e6, 5.0, 5.0)))
    top, left, height, width = resized_crop(sample, "demo", CropConfig(8), np.random.default_rng(0)).box
    assert min(height, width) == 0.01
    assert top == pytest.approx(37, abs=1e-5)
    assert left + width <= 64


@pytest.mark.parametrize("key", ["extent_m", "gsd_m"])
@pytest.mark.parametrize("value", [(0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))])
def test_wrong_limits_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"{key} must be \[low, high\] in metres"):
        SourceCrop(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size_px", 0),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.2)),
        ("aspect", (2.0, 1.0)),
        ("brightness", -0.1),
        ("contrast", 1.0),
        ("jitter_prob", 1.5),
    ],
)
def test_config_ranges(key, value):
    with pytest.raises(ValueError, match=key):
        CropConfig(**{"size_px": 8, key: value})


def test_aligned_carries_the_box_in_metres():
    fine, coarse = make_schema(shape=(120, 60), gsd_m=10.0), make_schema(shape=(20, 10), gsd_m=60.0)
    plan = ViewPlan("fine", (30.0, 12.0, 48.0, 24.0), (96, 48), True, 3, (0,), 1.1, 0.2)
    expected = ViewPlan("coarse", (5.0, 2.0, 8.0, 4.0), (16, 8), True, 3)
    assert aligned(plan, fine, "coarse", coarse, size=(16, 8)) == expected
    assert aligned(plan, fine, "coarse", coarse, size_ratio=1 / 6) == expected
    assert aligned(plan, fine, "coarse", coarse).size == plan.size
    back = aligned(expected, coarse, "fine", fine, size_ratio=6)
    assert back == replace(plan, bands=None, gain=1.0, bias=0.0)


def test_aligned_cuts_a_pixel_of_overhang_and_refuses_more():
    fine, plan = make_schema(shape=(64, 64), gsd_m=10.0), whole("fine", (64, 64), 32)
    cut = aligned(plan, fine, "coarse", make_schema(shape=(21, 22), gsd_m=30.0))
    assert cut.box == pytest.approx((0.0, 0.0, 21.0, 64 / 3))
    with pytest.raises(ValueError, match=r"'coarse' of 20 x 22 .* does not cover"):
        aligned(plan, fine, "coarse", make_schema(shape=(20, 22), gsd_m=30.0))


@many
@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_band_subsets(n_bands, low, extra, seed):
    bands = band_subset(np.random.default_rng(seed), n_bands, low, low + extra)
    assert list(bands) == sorted(set(bands))
    assert set(bands) <= set(range(n_bands))
    assert min(low, n_bands) <= len(bands) <= min(low + extra, n_bands)


def test_band_subset_ranges():
    with pytest.raises(ValueError, match="low 3 and high 2"):
        band_subset(np.random.default_rng(0), 5, 3, 2)
    rng = np.random.default_rng(0)
    assert {len(band_subset(rng, 9, 2, 4)) for _ in range(100)} == {2, 3, 4}
