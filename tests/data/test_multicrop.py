"""Which images, boxes and bands the views of a sample show, and that steps share bands wherever they are drawn."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.multicrop import MultiCrop, MultiCropConfig, MultiCropViews, SpectralCropConfig
from ssl_eo.data.plans import CropConfig
from ssl_eo.data.stacking import cut_to_views, shown_plans, stack_views
from ssl_eo.data.types import Sample, Tile, TileSchema, ViewLimits, ViewPlan
from ssl_eo.seeding import numpy_generator
from ssl_eo.sensors import load_sensor

many = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)

S2 = load_sensor("sentinel2_l2a")
EXTENT_M = 960.0
SMALL = {
    "global_crop": CropConfig(size_px=16, scale=(0.3, 1.0), jitter_prob=0.5, brightness=0.2, contrast=0.2),
    "local_crop": CropConfig(size_px=8, scale=(0.05, 0.3)),
}


def schema_of(sensor: str, gsd_m: float, bands: tuple[str, ...] | None = None) -> TileSchema:
    found = load_sensor(sensor)
    bands = bands or found.band_names
    side = round(EXTENT_M / gsd_m)
    zeros, ones = (0.0,) * len(bands), (1.0,) * len(bands)
    return TileSchema(found, bands, found.dtype, (side, side), gsd_m, zeros, ones, optional=True)


def of_gsd(gsd_m: float) -> tuple[str, ...]:
    return tuple(band.name for band in S2.bands if band.gsd_m == gsd_m)


# One Sentinel-2 image of three resolutions, at two dates; Landsat, radar, a spectrometer, and what is no picture.
SCHEMAS: dict[str, TileSchema] = {
    **{f"sentinel2_l2a@{g}m_{i}": schema_of("sentinel2_l2a", g, of_gsd(g)) for i in (0, 1) for g in (10, 20, 60)},
    "landsat8_9": schema_of("landsat8_9", 30),
    "sentinel1_grd": schema_of("sentinel1_grd", 10),
    "enmap": schema_of("enmap", 30),
    "dem": schema_of("dem", 30),
    "worldcover": schema_of("worldcover", 10),
}
IMAGE = tuple(f"sentinel2_l2a@{g}m_0" for g in (10, 20, 60))
LATER = tuple(f"sentinel2_l2a@{g}m_1" for g in (10, 20, 60))


def sample_of(*names: str, dates: dict[str, str] | None = None) -> Sample:
    tiles = {}
    for name in names:
        schema = SCHEMAS[name]
        pixels = np.broadcast_to(np.ones((), schema.dtype), (len(schema.bands), *schema.shape))
        tiles[name] = Tile(pixels, schema.bands, schema.gsd_m, (dates or {}).get(name))
    return Sample("k", tiles)


def multi_crop(**changes) -> MultiCrop:
    return MultiCrop(MultiCropConfig(**{**SMALL, **changes}), [SCHEMAS])


def parts_of(view) -> tuple[ViewPlan, ...]:
    return view if isinstance(view, tuple) else (view,)


def image_of(view) -> str:
    """The image that a view shows: its sensor, and which of the two dates."""
    (found,) = {p.tile.partition("@")[0] + p.tile[-2:] * ("@" in p.tile) for p in parts_of(view)}
    return found


def n_bands_of(view) -> int:
    return sum(len(SCHEMAS[p.tile].bands) if p.bands is None else len(p.bands) for p in parts_of(view))


# Images


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (0, 3, 1, 4, 2, 5), (2, 1, 0, 5, 4, 3)])
def test_resolutions_are_one_image_and_dates_are_not(order):
    names = [(*IMAGE, *LATER)[i] for i in order]
    dates = {name: f"2021-0{name[-1]}-01".replace("-00-", "-02-") for name in names}
    for sample in (sample_of(*names, dates=dates), sample_of(*names)):  # dates may be unknown
        assert {frozenset(image) for image in multi_crop().images(sample)} == {frozenset(IMAGE), frozenset(LATER)}


def test_a_date_parts_tiles_that_bands_alone_would_join():
    sample = sample_of(IMAGE[0], LATER[1], dates={IMAGE[0]: "2021-03-01", LATER[1]: "2021-06-01"})
    assert multi_crop().images(sample) == [(IMAGE[0],), (LATER[1],)]
    assert multi_crop().images(sample_of(IMAGE[0], LATER[1])) == [(IMAGE[0], LATER[1])]


def test_products_of_a_sensor_are_images_of_their_own():
    """Two tiles with the same bands of one day: top of atmosphere and surface, or two passes."""
    schema = SCHEMAS[IMAGE[0]]
    names = ("sentinel2_l2a@a", "sentinel2_l2a@b")
    tiles = {name: Tile(np.ones((4, *schema.shape), schema.dtype), schema.bands, 10.0, "2021-03-01") for name in names}
    found = MultiCrop(MultiCropConfig(**SMALL), [dict.fromkeys(names, schema)]).images(Sample("k", tiles))
    assert found == [(names[0],), (names[1],)]


def test_sensors_are_images_and_elevation_and_class_maps_are_none():
    sample = sample_of("worldcover", "sentinel1_grd", "dem", "landsat8_9")
    assert multi_crop().images(sample) == [("sentinel1_grd",), ("landsat8_9",)]
    assert multi_crop(tiles=["dem", "landsat8_9"]).images(sample) == [("dem",), ("landsat8_9",)]


# Which image a view shows


@many
@given(seeds, st.integers(2, 4), st.integers(0, 5))
def test_global_views_show_different_images(seed, n_global, n_local):
    sample = sample_of(*IMAGE, "landsat8_9", "sentinel1_grd")
    views = multi_crop(n_global=n_global, n_local=n_local).draw(sample, np.random.default_rng(seed))
    assert list(views) == ["global", "local"]
    assert [len(views[role]) for role in views] == [n_global, n_local]
    assert len({image_of(view) for view in views["global"]}) == min(3, n_global)
    for role, size in (("global", 16), ("local", 8)):
        assert all(part.size == (size, size) for view in views[role] for part in parts_of(view))


def test_every_image_is_shown_equally_often():
    sample, rng, drawer = sample_of("enmap", "landsat8_9", "sentinel1_grd"), np.random.default_rng(0), multi_crop()
    draws = [drawer.draw(sample, rng) for _ in range(600)]
    for number in (0, 1):
        counts = Counter(image_of(d["global"][number]) for d in draws)
        assert len(counts) == 3
        assert min(counts.values()) > 600 / 3 * 0.8
    local = Counter(image_of(view) for d in draws for view in d["local"])
    assert min(local.values()) > 8 * 600 / 3 * 0.9
    # Small crops do not keep to the images of the large ones.
    assert any({image_of(v) for v in d["local"]} - {image_of(v) for v in d["global"]} for d in draws)


def test_the_only_image_is_shown_by_all_views_each_in_its_own_box():
    views = multi_crop().draw(sample_of("landsat8_9"), np.random.default_rng(0))
    every = [view for role in views.values() for view in role]
    assert {image_of(view) for view in every} == {"landsat8_9"}
    assert len({view.box for view in every}) == len(every) == 10


@many
@given(seeds)
def test_within_all_views_show_one_image(seed):
    sample = sample_of(*IMAGE, *LATER, "landsat8_9")
    views = multi_crop(pairing="within").draw(sample, np.random.default_rng(seed))
    assert len({image_of(view) for role in views.values() for view in role}) == 1


def test_within_every_image_is_shown_equally_often():
    sample, rng = sample_of("enmap", "landsat8_9", "sentinel1_grd"), np.random.default_rng(0)
    drawer = multi_crop(pairing="within")
    counts = Counter(image_of(drawer.draw(sample, rng)["global"][0]) for _ in range(600))
    assert len(counts) == 3
    assert min(counts.values()) > 600 / 3 * 0.8


# Boxes


@many
@given(seeds, st.booleans())
def test_parts_of_a_joint_view_cover_the_same_ground(seed, is_windowed):
    sample = sample_of(*IMAGE)
    if is_windowed:
        sample = replace(sample, limits=ViewLimits(window_m=(130.0, 70.0, 500.0, 700.0)))
    views = multi_crop().draw(sample, np.random.default_rng(seed))
    for view in (view for role in views.values() for view in role):
        assert tuple(part.tile for part in view) == IMAGE
        ground = [np.multiply(part.box, SCHEMAS[part.tile].gsd_m) for part in view]
        for other in ground[1:]:
            np.testing.assert_allclose(other, ground[0], rtol=1e-9, atol=1e-6)
        assert len({(part.size, part.flip, part.rot90, part.gain, part.bias) for part in view}) == 1
        top, left, height, width = ground[0]
        low_y, low_x, room_y, room_x = sample.limits.window_m or (0.0, 0.0, EXTENT_M, EXTENT_M)
        assert low_y - 1e-6 <= top <= top + height <= low_y + room_y + 1e-6
        assert low_x - 1e-6 <= left <= left + width <= low_x + room_x + 1e-6


def test_a_tile_that_does_not_cover_the_view_is_refused_by_name():
    sample = sample_of(*IMAGE)
    sample.tiles[IMAGE[2]] = replace(sample.tiles[IMAGE[2]], pixels=np.ones((2, 3, 3), "uint16"))
    drawer = multi_crop(global_crop=CropConfig(size_px=16, scale=(1.0, 1.0)))
    with pytest.raises(ValueError, match=rf"tile '{IMAGE[2]}' .*does not cover the view of '{IMAGE[0]}'"):
        drawer.draw(sample, np.random.default_rng(0))


# Bands


@many
@given(seeds, st.integers(1, 13), st.integers(0, 6))
def test_band_counts_are_in_range_without_duplicates(seed, low, extra):
    bands = SpectralCropConfig(n_bands=(low, low + extra))
    sample = sample_of(*IMAGE, "landsat8_9", "sentinel1_grd")
    views = multi_crop(global_bands=bands, local_bands=bands).draw(sample, np.random.default_rng(seed))
    for view in (view for role in views.values() for view in role):
        parts = parts_of(view)
        n_all = {"sentinel2_l2a_0": 12, "landsat8_9": 11, "sentinel1_grd": 4}[image_of(view)]
        assert min(low, n_all) <= n_bands_of(view) <= min(low + extra, n_all)
        assert len({part.tile for part in parts}) == len(parts)
        for part in parts:
            assert part.bands == tuple(sorted(set(part.bands)))
            assert len(part.bands) >= 1
            assert 0 <= part.bands[0] <= part.bands[-1] < len(SCHEMAS[part.tile].bands)


def test_band_counts_are_uniform_and_bands_equally_frequent():
    """4 to 13 of the 12 bands of three resolutions, as Panopticon draws them: 4 to 12 are equally frequent."""
    drawer = multi_crop(global_bands=SpectralCropConfig(n_bands=(4, 13)), n_local=0)
    rng, sample = np.random.default_rng(0), sample_of(*IMAGE)
    views = [view for _ in range(1000) for view in drawer.draw(sample, rng)["global"]]
    counts = Counter(map(n_bands_of, views))
    assert set(counts) == set(range(4, 13))
    assert min(counts.values()) > 2000 / 9 * 0.8
    assert max(counts.values()) < 2000 / 9 * 1.2
    shown = Counter((p.tile, band) for view in views for p in parts_of(view) for band in p.bands)
    assert len(shown) == 12
    assert np.ptp(list(shown.values())) < 0.1 * 2000
    alone = [view for view in views if not isinstance(view, tuple)]
    assert all(view.bands for view in alone)  # a tile of which no band is left is no part of the view


def test_all_bands_are_shown_unless_asked_otherwise():
    views = multi_crop().draw(sample_of(*IMAGE, "landsat8_9"), np.random.default_rng(0))
    assert all(part.bands is None for role in views.values() for view in role for part in parts_of(view))


def test_virtual_bands_are_mixed_from_a_spectrometer_alone():
    bands = SpectralCropConfig(n_bands=(2, 5), synthesis_prob=1.0)
    drawer = multi_crop(global_bands=bands, local_bands=bands, hyperspectral_min_bands=100)
    views = drawer.draw(sample_of("enmap", "landsat8_9"), np.random.default_rng(0))
    plans = [view for role in views.values() for view in role]
    assert {plan.tile for plan in plans} == {"enmap", "landsat8_9"}
    for plan in plans:
        if plan.tile == "landsat8_9":
            assert plan.synthesis is None
            assert plan.bands is not None
        else:
            assert plan.bands is None
            assert plan.synthesis is not None
            assert plan.synthesis.weights.shape[0] in range(2, 6)
            assert plan.synthesis.weights.shape[1] == len(SCHEMAS["enmap"].bands)
    half = replace(bands, synthesis_prob=0.5)
    rng, drawer = np.random.default_rng(0), multi_crop(global_bands=half, n_local=0)
    mixed = [v.synthesis is not None for _ in range(100) for v in drawer.draw(sample_of("enmap"), rng)["global"]]
    assert 0.35 < np.mean(mixed) < 0.65


# Bands of a step


PER_STEP = {
    "bands_per": "step",
    "global_bands": SpectralCropConfig(n_bands=(4, 13), synthesis_prob=0.5),
    "local_bands": SpectralCropConfig(n_bands=(1, 4), synthesis_prob=0.5),
    "n_local": 3,
}


def drawn_views(drawer: MultiCrop, n: int = 24):
    """The views of n samples, of which each holds some of four images: role -> number -> samples."""
    images = (IMAGE, ("landsat8_9",), ("sentinel1_grd",), ("enmap",))
    plans = []
    for i in range(n):
        rng = np.random.default_rng(i)
        held = [name for j in sorted(rng.permutation(4)[: 1 + i % 4]) for name in images[j]]
        plans.append(drawer.draw(sample_of(*held), rng))
    return {role: [list(row) for row in zip(*(p[role] for p in plans), strict=True)] for role in ("global", "local")}


def bands_of(view):
    return tuple((part.tile, part.bands, part.synthesis) for part in parts_of(view))


def shared(drawer, views, step):
    return drawer.share_bands(views, 0, np.random.default_rng([7, step]))


def test_views_of_a_number_and_image_share_their_bands_in_a_step():
    drawer = multi_crop(**PER_STEP)
    views = drawn_views(drawer)
    found = shared(drawer, views, 0)
    drawn = {}
    for role, rows in found.items():
        for number, row in enumerate(rows):
            for before, after in zip(views[role][number], row, strict=True):
                assert image_of(before) == image_of(after)
                boxes = {part.tile: part.box for part in parts_of(before)}
                assert all(part.box == boxes[part.tile] for part in parts_of(after))
                drawn.setdefault((role, number, image_of(after)), set()).add(bands_of(after))
    assert {len(bands) for bands in drawn.values()} == {1}
    assert len(drawn) == 5 * 4
    low, high = {"global": 4, "local": 1}, {"global": 13, "local": 4}
    for (role, _, _), bands in drawn.items():
        (parts,) = bands
        count = sum(len(mix.weights) if mix else len(named) for _, named, mix in parts)
        assert low[role] <= count <= high[role]
    # Views of another number do not show the same bands, nor does another step.
    assert len({next(iter(drawn["local", n, "enmap"])) for n in range(3)}) == 3
    again, other = shared(drawer, views, 0), shared(drawer, views, 1)
    assert again == found
    assert [bands_of(v) for v in other["global"][0]] != [bands_of(v) for v in found["global"][0]]


def test_bands_of_a_step_do_not_depend_on_the_part_of_the_batch_nor_on_its_order():
    """Ranks and micro-batches see other samples, which meet the images in another order."""
    drawer = multi_crop(**PER_STEP)
    views = drawn_views(drawer)
    whole = shared(drawer, views, 0)
    for pick in (slice(0, 12), slice(12, 24), slice(None, None, -1)):
        part = shared(drawer, {role: [row[pick] for row in rows] for role, rows in views.items()}, 0)
        assert part == {role: [row[pick] for row in rows] for role, rows in whole.items()}


def test_bands_of_a_sample_are_left_alone():
    drawer = multi_crop(**{**PER_STEP, "bands_per": "sample"})
    views = drawn_views(drawer)
    assert len({bands_of(view) for view in views["global"][0] if image_of(view) == "landsat8_9"}) > 1
    assert shared(drawer, views, 0) == views


def test_views_of_one_sensor_are_never_padded_in_a_step():
    """Also the two global views, which show other bands: there are equally many."""
    drawer = multi_crop(**PER_STEP)
    for step in range(8):
        plans = [drawer.draw(sample_of("landsat8_9"), np.random.default_rng(i)) for i in range(3)]
        rows = {r: [list(row) for row in zip(*(p[r] for p in plans), strict=True)] for r in ("global", "local")}
        for role, views in shared(drawer, rows, step).items():
            (batch,) = stack_views(views)
            assert not batch.has_padding, role


# The rest


@pytest.mark.parametrize("bands_per", ["sample", "step"])
def test_no_view_is_of_bands_without_data_alone(bands_per):
    """Of a sample that has one band, every view shows it, however few bands were drawn."""
    schema = schema_of("sentinel2_l2a", 10.0)
    pixels = np.zeros((len(schema.bands), *schema.shape), np.uint16)
    pixels[3] = 100
    one, sound = (
        Sample(key, {"sentinel2_l2a": Tile(values, schema.bands, 10.0)})
        for key, values in (("a", pixels), ("b", pixels + 1))
    )
    few = SpectralCropConfig((1, 3))
    config = MultiCropConfig(**SMALL, global_bands=few, local_bands=few, bands_per=bands_per)
    drawer = MultiCrop(config, [{"sentinel2_l2a": schema}])
    views = MultiCropViews(drawer)
    n_moved = 0
    for seed in range(20):
        planned = []
        for sample in (one, sound):
            plan = views.plan(sample, numpy_generator("test", seed, sample.key))
            planned.append((cut_to_views(sample, shown_plans(plan), drawer.schemas[0]), plan))
        batch = views.collate(planned, 0, 0, numpy_generator("test", seed))
        for role in batch.views.values():
            for view in role:
                shown = view.bands.view(-1, 2, view.bands.shape[-1])  # [V, B, c]
                assert (shown[:, 0] == 3).any(1).all()
                assert ((shown[:, 1] >= 0).sum(1) >= 1).all()
                n_moved += int((shown[:, 0] != shown[:, 1]).any(1).sum())
    assert n_moved > 20


def test_a_draw_is_a_function_of_the_generator_and_survives_pickling():
    drawer = multi_crop(**{**PER_STEP, "bands_per": "sample"})
    assert drawer.tiles  # what has been worked out travels along, or is worked out again
    sample = sample_of(*IMAGE, "landsat8_9", "enmap")
    first, second, other = (
        d.draw(sample, np.random.default_rng(seed))
        for d, seed in ((drawer, 3), (pickle.loads(pickle.dumps(drawer)), 3), (drawer, 4))
    )
    assert first == second
    assert first != other


def test_unknown_tiles_are_refused():
    """Also beside known ones: a slip of the pen would else be a sensor that is never shown."""
    with pytest.raises(ValueError, match=r"objective\.crops\.tiles: no source has landsat8_8; did you mean"):
        assert multi_crop(tiles=["landsat8_8", "sentinel1_grd"]).tiles
    sources = [{name: SCHEMAS[name]} for name in ("landsat8_9", "enmap")]
    with pytest.raises(ValueError, match=r"tiles: enmap is not among the tiles of a source: landsat8_9"):
        assert MultiCrop(MultiCropConfig(tiles=["enmap"]), sources).tiles
    only_maps = {name: SCHEMAS[name] for name in ("dem", "worldcover")}
    with pytest.raises(ValueError, match=r"one with optical, thermal or radar bands is not among .*: dem, worldcover"):
        assert MultiCrop(MultiCropConfig(), [SCHEMAS, only_maps]).tiles


def test_a_tile_may_be_in_one_source_alone():
    sources = [{"landsat8_9": SCHEMAS["landsat8_9"]}, {"enmap": SCHEMAS["enmap"]}]
    drawer = MultiCrop(MultiCropConfig(tiles=["landsat8_9", "enmap"]), sources)
    assert [list(tiles) for tiles in drawer.tiles] == [["landsat8_9"], ["enmap"]]


def test_class_maps_are_refused():
    with pytest.raises(ValueError, match=r"objective\.crops\.tiles: worldcover is a class map"):
        assert multi_crop(tiles=["landsat8_9", "worldcover"]).tiles


def test_a_sample_without_any_usable_tile_is_refused():
    with pytest.raises(ValueError, match=r"none of the tiles of objective\.crops\.tiles, but dem"):
        multi_crop().draw(sample_of("dem"), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_global": 1}, "n_global must be at least 2"),
        ({"n_local": -1}, "n_local at least 0"),
        ({"hyperspectral_min_bands": 1}, "hyperspectral_min_bands must be at least 2"),
    ],
)
def test_config_ranges(changes, message):
    with pytest.raises(ValueError, match=message):
        MultiCropConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_bands": (0, 3)}, "n_bands must be"),
        ({"n_bands": (4, 3)}, "n_bands must be"),
        ({"n_bands": (1, 3), "synthesis_prob": 1.5}, "synthesis_prob must be in"),
        ({"synthesis_prob": 0.5}, "synthesis_prob needs n_bands"),
        ({"synthesis_fwhm_um": (0.0, 0.1)}, "synthesis_fwhm_um must be"),
    ],
)
def test_spectral_config_ranges(changes, message):
    with pytest.raises(ValueError, match=message):
        SpectralCropConfig(**changes)
