"""Samples are checked and stacked: one tile or several a role or view, of one size or many, absent bands and tiles."""

import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.plans import whole
from ssl_eo.data.render import Renderer
from ssl_eo.data.spectral import synthesise
from ssl_eo.data.stacking import (
    check_sample,
    cut_to_views,
    loaded,
    shown_plans,
    stack,
    stack_meta,
    stack_tiles,
    stack_views,
)
from ssl_eo.data.types import Batch, Sample, Tile, TileSchema, ViewPlan
from ssl_eo.sensors import Band, Sensor

many = settings(max_examples=50, deadline=None)


def make_schema(dtype="uint16", shape=(8, 8), gsd_m=10.0, no_data=()):
    bands = tuple(Band(n, "optical", gsd_m, 0.5 + 0.1 * i) for i, n in enumerate(("red", "green")))
    sensor = Sensor("demo", "demo", bands, dtype, "dn", "demo", no_data=no_data)
    return TileSchema(sensor, sensor.band_names, dtype, shape, gsd_m, (0.0, 0.0), (1.0, 1.0))


def make_sample(pixels, key="k7", bands=("red", "green"), gsd_m=10.0):
    return Sample(key, {"demo": Tile(pixels, bands, gsd_m)})


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            Sample("k7", {"other": Tile(np.zeros((2, 8, 8), np.uint16), ("red", "green"), 10.0)}),
            "no tile 'demo'.*other",
        ),
        (make_sample(np.zeros((2, 8, 9), np.uint16)), r"shape \(2, 8, 9\), expected \(2, 8, 8\)"),
        (make_sample(np.zeros((2, 8, 8), np.int16)), "dtype int16, expected uint16"),
        (make_sample(np.zeros((2, 8, 8), np.uint16), bands=("green", "red")), r"bands \('green', 'red'\), expected"),
        (make_sample(np.zeros((2, 8, 8), np.uint16), bands=()), r"bands \(\), expected"),
        (make_sample(np.zeros((2, 8, 8), np.uint16), gsd_m=0.0), r"gsd_m 0\.0, expected metres above 0"),
        (make_sample(np.zeros((2, 8, 8), np.uint16), gsd_m=np.nan), "gsd_m nan, expected metres above 0"),
    ],
)
def test_mismatched_samples_are_refused_by_name(sample, message):
    schema = {"demo": make_schema()}
    for refuse in (lambda: check_sample(sample, schema), lambda: stack_tiles([sample], ["demo"], schema)):
        with pytest.raises(ValueError, match=message) as caught:
            refuse()
        assert "'k7'" in str(caught.value)


@pytest.mark.parametrize(("shape", "box"), [((8, 8), (0.0, 0.0, 8.0, 8.0)), (None, (2.0, 2.0, 6.0, 6.0))])
def test_pixels_that_are_read_are_what_they_said_they_would_be(shape, box):
    class Shifted:
        """Says that it has two bands, and gives one."""

        shape, dtype = (2, 8, 8), np.dtype("uint16")

        def __getitem__(self, part):
            return np.ones((2, 8, 8), np.uint16)[part][:1]

    sample, schema = make_sample(Shifted()), {"demo": make_schema(shape=shape)}
    check_sample(sample, schema)
    with pytest.raises(ValueError, match=r"tile 'demo' of sample 'k7' has shape \(1, .*expected \(2, "):
        cut_to_views(sample, [ViewPlan("demo", box, (4, 4))], schema)


@pytest.mark.parametrize(
    ("dtype", "no_data", "empty"),
    [
        ("uint16", (0.0, 65535.0), 65535),
        ("float32", (-9999.0,), -9999),
        ("float32", (), np.nan),
        ("float32", (), -np.inf),
    ],
)
def test_no_data_is_found(dtype, no_data, empty):
    schema, plans = {"demo": make_schema(dtype, no_data=no_data)}, [whole("demo", (8, 8), 8)]
    clean, holed, blank = (make_sample(np.ones((2, 8, 8), dtype)) for _ in range(3))
    holed.tiles["demo"].pixels[1, 3, 3] = empty
    blank.tiles["demo"].pixels[:] = empty
    for _ in range(2):  # before anybody has looked, and after
        assert not stack_tiles([clean, clean], ["demo"], schema)["demo"].has_no_data
        assert stack_tiles([clean, holed], ["demo"], schema)["demo"].has_no_data
        clean, holed = (cut_to_views(sample, plans, schema) for sample in (clean, holed))
    with pytest.raises(ValueError, match="tile 'demo' of sample 'k7' is all no-data"):
        cut_to_views(blank, plans, schema)


def test_pixels_are_compared_with_no_data_once():
    schema = {"demo": make_schema(no_data=(0.0,))}
    sample = make_sample(np.ones((2, 8, 8), np.uint16))
    sample = cut_to_views(sample, [whole("demo", (8, 8), 8)], schema)
    assert sample.tiles["demo"].measured is not None
    sample.tiles["demo"].pixels[:] = 0  # would be seen by a second look
    assert not stack_tiles([sample], ["demo"], schema)["demo"].has_no_data


def test_shown_plans_are_all_that_lie_inside():
    @dataclass
    class Planned:
        views: dict[str, list[ViewPlan]]
        mask: object

    one, other = whole("one", (8, 8), 8), whole("other", (8, 8), 8)
    assert shown_plans(one) == [one]
    assert shown_plans((one, np.ones(3, bool), "third")) == [one]
    assert shown_plans({"global": [(one, other), one]}) == [one, other, one]
    assert shown_plans(Planned({"global": [one, one], "local": [other]}, None)) == [one, one, other]
    assert shown_plans([np.zeros(3), 4]) == []


def test_a_schema_names_the_first_difference():
    schema = make_schema()
    schema.check(np.zeros((2, 8, 8), np.uint16))
    with pytest.raises(ValueError, match=r"^shape \(1, 8, 8\), expected \(2, 8, 8\)$"):
        schema.check(np.zeros((1, 8, 8), np.uint16))
    with pytest.raises(ValueError, match=r"^dtype int16, expected uint16$"):
        schema.check(np.zeros((2, 8, 8), np.int16), schema.bands)
    with pytest.raises(ValueError, match=r"^bands \('red',\), expected"):
        schema.check(np.zeros((2, 8, 8), np.uint16), ("red",))


def test_a_number_that_the_dtype_cannot_hold_is_never_found():
    schema = {"demo": make_schema("uint16", no_data=(-9999.0, 0.5, np.nan))}
    assert not stack_tiles([make_sample(np.zeros((2, 8, 8), np.uint16))], ["demo"], schema)["demo"].has_no_data


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "float32"])
def test_tiles_stack_in_their_dtype(dtype):
    samples = [make_sample(np.full((2, 8, 8), i, dtype)) for i in range(3)]
    tiles = stack_tiles(samples, ["demo"], {"demo": make_schema(dtype)})["demo"]
    assert tiles.pixels.dtype == getattr(torch, dtype)
    assert tiles.pixels[:, 0, 0, 0].float().tolist() == [0, 1, 2]


def test_views_stack_outermost():
    plans = [
        [ViewPlan("demo", (v, s, 4.0, 5.0), (8, 6), s == 1, v, (s, 2), 1 + v, s) for s in range(3)] for v in range(2)
    ]
    (batch,) = stack_views(plans)
    assert (batch.tile, batch.size, batch.resample) == ("demo", (8, 6), True)
    assert batch.row.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.box[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.box[:, 1].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.flip.tolist() == [False, True, False] * 2
    assert batch.rot90.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.bands is not None
    assert batch.bands.tolist() == [[0, 2], [1, 2], [2, 2]] * 2
    assert batch.gain.tolist() == [1, 1, 1, 2, 2, 2]
    assert batch.bias.tolist() == [0, 1, 2] * 2


def test_only_untouched_tiles_skip_resampling():
    plain = whole("demo", (8, 8), 8)
    assert not stack_views([[plain, replace(plain, gain=1.2, rot90=4)]])[0].resample
    for changed in (replace(plain, flip=True), replace(plain, rot90=2), replace(plain, box=(0.0, 0.5, 8.0, 8.0))):
        assert stack_views([[plain, changed]])[0].resample
    assert stack_views([[whole("demo", (9, 9), 8)]])[0].resample


def test_plans_of_one_role_must_agree():
    plan = whole("demo", (8, 8), 8)
    for other in (replace(plan, tile="x"), replace(plan, size=(4, 4)), replace(plan, bands=(0,))):
        with pytest.raises(ValueError, match="must share tile, size and number of bands"):
            stack_views([[plan, other]])
    with pytest.raises(ValueError, match=r"as many plans each, got \[2, 1\]"):
        stack_views([[plan, plan], [plan]])
    schema = {"demo": make_schema()}
    samples = [make_sample(np.ones((2, 8, 8), np.uint16)) for _ in range(2)]
    with pytest.raises(ValueError, match="plans of one role must share a size"):
        stack(samples, {"image": [[plan, replace(plan, size=(4, 4))]]}, schema)


# --- several tiles in one role ----------------------------------------------------------------------------------------

SIZE = (6, 6)


def any_schema(name, n_bands, shape, dtype="float32", gsd_m=10.0):
    bands = tuple(Band(f"{name}{i}", "optical", gsd_m, 0.4 + 0.1 * i + 0.01 * n_bands, 0.05) for i in range(n_bands))
    sensor = Sensor(name, name, bands, dtype, "dn", "demo")
    mean, std = tuple(0.5 * i for i in range(n_bands)), tuple(1.0 + i for i in range(n_bands))
    return TileSchema(sensor, sensor.band_names, dtype, shape, gsd_m, mean, std, optional=True)


SCHEMA = {
    "two": any_schema("two", 2, (8, 10)),
    "five": any_schema("five", 5, None, gsd_m=3.0),
    "one": any_schema("one", 1, (8, 8)),
}


def random_tile(name, rng):
    shape = SCHEMA[name].shape or tuple(rng.integers(7, 30, 2))
    pixels = rng.normal(size=(len(SCHEMA[name].bands), *shape)).astype(np.float32)
    return Tile(pixels, SCHEMA[name].bands, SCHEMA[name].gsd_m)


def random_plan(name, tile, rng):
    height, width = tile.pixels.shape[1:]
    h, w = rng.uniform(2, height), rng.uniform(2, width)
    box = (rng.uniform(0, height - h), rng.uniform(0, width - w), h, w)
    n = tile.pixels.shape[0]
    bands = tuple(rng.permutation(n)[: rng.integers(1, n + 1)].tolist()) if rng.random() < 0.5 else None
    return ViewPlan(name, box, SIZE, bool(rng.integers(2)), int(rng.integers(4)), bands, rng.uniform(0.5, 2))


class CountedReads:
    """Pixels that lie elsewhere until they are sliced."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.dtype, self.n_read = pixels, pixels.shape, pixels.dtype, 0

    def __getitem__(self, part):
        found = self.pixels[part]
        self.n_read += found.size
        return found


def render(samples, roles):
    return stacked_and_rendered(samples, roles)[1]


def stacked_and_rendered(samples, roles):
    """As in training: cut to what is shown, stacked, rendered."""
    shown = [[view[i] for views in roles.values() for view in views] for i in range(len(samples))]
    cut = [cut_to_views(sample, shown_plans(plans), SCHEMA) for sample, plans in zip(samples, shown, strict=True)]
    tiles, views = stack(cut, roles, SCHEMA)
    return views, Renderer([SCHEMA]).render(Batch(0, 0, [s.key for s in samples], tiles, views))


@many
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
def test_rows_of_any_tiles_are_what_each_is_alone(seed, n_samples, n_views):
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n_samples):
        names = rng.permutation(list(SCHEMA))[: rng.integers(1, 4)].tolist()
        samples.append(Sample(str(i), {name: random_tile(name, rng) for name in names}))
    for sample in samples:
        check_sample(sample, SCHEMA)
    plans = []
    for _ in range(n_views):
        shown = [str(rng.choice(list(s.tiles))) for s in samples]
        plans.append([random_plan(name, s.tiles[name], rng) for name, s in zip(shown, samples, strict=True)])
    found = render(samples, {"image": plans})["image"]
    n_channels = found.pixels.shape[1]
    for row, (plan, sample) in enumerate((p, samples[i]) for view in plans for i, p in enumerate(view)):
        alone = render([sample], {"image": [[plan]]})["image"]
        n = alone.pixels.shape[1]
        torch.testing.assert_close(found.pixels[row, :n], alone.pixels[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.gsd_m[row], alone.gsd_m[0])
        channels = found.channels.expand(len(found.pixels))
        assert torch.equal(channels.wavelength_um[row, :n], alone.channels.expand(1).wavelength_um[0])
        if n < n_channels:
            assert found.valid is not None
            assert channels.valid is not None
            assert channels.valid[row].tolist() == [True] * n + [False] * (n_channels - n)
            assert not found.valid[row, n:].any()
            assert not found.pixels[row, n:].any()


def test_a_band_without_data_is_absent_and_the_others_are_not():
    rng = np.random.default_rng(0)
    whole_one, holed = (Sample(key, {"five": random_tile("five", rng)}) for key in "ab")
    holed.tiles["five"].pixels[2] = -np.inf
    holed.tiles["five"].pixels[3, 0, 0] = np.nan
    plans = [[whole("five", s.tiles["five"].pixels.shape[1:], 6) for s in (whole_one, holed)]]
    found = render([whole_one, holed], {"image": plans})["image"]
    assert found.channels.valid is not None
    assert found.channels.valid.tolist() == [[True] * 5, [True, True, False, True, True]]
    assert found.pixels.isfinite().all()
    assert not found.pixels[1, 2].any()
    clean = render([whole_one], {"image": [plans[0][:1]]})["image"]
    assert clean.channels.valid is None
    assert clean.valid is None
    torch.testing.assert_close(found.pixels[:1], clean.pixels)


def test_only_what_is_shown_of_tiles_that_differ_in_size_is_read():
    pixels = np.arange(400 * 500, dtype=np.float32).reshape(1, 400, 500)
    schema = {"one": replace(any_schema("one", 1, None), mean=(0.0,))}
    lazy = [CountedReads(pixels[:, : 400 - i]) for i in range(2)]
    samples = [Sample(str(i), {"one": Tile(p, ("one0",), 10.0)}) for i, p in enumerate(lazy)]
    plans = [ViewPlan("one", (200.5, 300.25, 4.0, 5.0), (4, 5)), ViewPlan("one", (20.0, 30.0, 4.0, 5.0), (4, 5))]
    cut = [cut_to_views(sample, [plan], schema) for sample, plan in zip(samples, plans, strict=True)]
    assert [p.n_read for p in lazy] == [5 * 6, 4 * 5]
    tiles, views = stack(cut, {"image": [plans]}, schema)
    assert tiles["one"].pixels.shape == (2, 1, 5, 6)
    found = Renderer([schema]).render(Batch(0, 0, ["0", "1"], tiles, views))["image"]
    torch.testing.assert_close(found.pixels[1, 0], torch.from_numpy(pixels[0, 20:24, 30:35].copy()))
    assert np.array_equal(loaded(samples[0]).tiles["one"].pixels, pixels)


def test_a_sample_may_lack_optional_tiles_but_not_all():
    tile = random_tile("two", np.random.default_rng(0))
    check_sample(Sample("k", {"two": tile}), SCHEMA)
    needed = {"two": replace(SCHEMA["two"], optional=False)}
    with pytest.raises(ValueError, match="sample 'k' has no tile 'two'"):
        check_sample(Sample("k", {"five": random_tile("five", np.random.default_rng(0))}), needed)
    with pytest.raises(ValueError, match=r"sample 'k' has no tile \(it may have two, five, one\)"):
        check_sample(Sample("k", {}), SCHEMA)
    with pytest.raises(ValueError, match="sample 'k' has no tile 'five'"):
        cut_to_views(Sample("k", {"two": tile}), [whole("five", (8, 8), 6)], SCHEMA)


# --- joint views ------------------------------------------------------------------------------------------------------


def random_joint_view(sample, rng):
    """One to four plans of one size, flip and turn: of different tiles or of one, some with virtual bands."""
    flip, turns = bool(rng.integers(2)), int(rng.integers(4))
    parts = []
    for name in rng.choice(list(sample.tiles), rng.integers(1, 5)).tolist():
        part = replace(random_plan(name, sample.tiles[name], rng), flip=flip, rot90=turns)
        if rng.random() < 0.3:
            part = replace(part, bands=None, synthesis=synthesise(rng, SCHEMA[name], int(rng.integers(1, 4))))
        parts.append(part)
    return parts[0] if len(parts) == 1 and rng.random() < 0.5 else tuple(parts)


def make_holes(sample, rng):
    """Single pixels that hold no data, or a whole band, but never the whole tile."""
    for tile in sample.tiles.values():
        if rng.random() < 0.5:
            tile.pixels[:, rng.integers(2, 7), rng.integers(2, 7)] = np.nan
        if len(tile.pixels) > 1 and rng.random() < 0.3:
            tile.pixels[rng.integers(len(tile.pixels))] = np.nan


def flags(value, like):
    return torch.ones_like(like, dtype=torch.bool) if value is None else value


@many
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_a_joint_view_is_its_parts_one_after_another(seed, n_samples, n_views, has_holes):
    rng = np.random.default_rng(seed)
    samples = [Sample(str(i), {name: random_tile(name, rng) for name in SCHEMA}) for i in range(n_samples)]
    if has_holes:
        for sample in samples:
            make_holes(sample, rng)
    roles = {"image": [[random_joint_view(sample, rng) for sample in samples] for _ in range(n_views)]}
    views, pixels_of = stacked_and_rendered(samples, pickle.loads(pickle.dumps(roles)))
    found = pixels_of["image"]
    meta, valid = found.channels.expand(len(found.pixels)), flags(found.valid, found.pixels)
    most = 0
    for row, (view, sample) in enumerate(
        (view, samples[i]) for views in roles["image"] for i, view in enumerate(views)
    ):
        alone = [render([sample], {"image": [[plan]]})["image"] for plan in shown_plans(view)]
        pixels = torch.cat([part.pixels[0] for part in alone])
        n, most = len(pixels), max(most, len(pixels))
        torch.testing.assert_close(found.pixels[row, :n], pixels, rtol=1e-5, atol=1e-5)
        assert torch.equal(valid[row, :n], torch.cat([flags(part.valid, part.pixels)[0] for part in alone]))
        torch.testing.assert_close(found.gsd_m[row], alone[0].gsd_m[0])
        channels = [part.channels.expand(1) for part in alone]
        for name in ("wavelength_um", "fwhm_um", "kind", "polarization", "orbit", "gsd_m"):
            assert torch.equal(getattr(meta, name)[row, :n], torch.cat([getattr(c, name)[0] for c in channels])), name
        is_real = flags(meta.valid, meta.kind)[row]
        assert torch.equal(is_real[:n], torch.cat([flags(c.valid, c.kind)[0] for c in channels]))
        assert not is_real[n:].any()
        assert not valid[row, n:].any()
        assert not found.pixels[row, n:].any()
        assert (meta.wavelength_um[row, n:] > 0).all()
    assert found.pixels.shape == (n_samples * n_views, most, *SIZE)
    # Each tile finds again what is its own.
    for batch in views["image"]:
        own = batch.of_role(found.channels.expand(len(found.pixels)).wavelength_um)
        wavelengths = torch.tensor([band.wavelength_um for band in SCHEMA[batch.tile].sensor.bands])
        every = wavelengths.expand(len(own), -1) if batch.bands is None else wavelengths[batch.bands]
        named = torch.ones_like(own, dtype=torch.bool) if batch.bands is None else batch.bands >= 0
        if batch.weights is not None:
            every, named = batch.wavelength_um, batch.weights.any(2)
        assert torch.equal(own[named], every[named])


def test_nothing_is_marked_where_joint_views_are_alike_and_hold_data():
    rng = np.random.default_rng(0)
    samples = [Sample(str(i), {name: random_tile(name, rng) for name in SCHEMA}) for i in range(3)]
    for sample in samples:
        sample.tiles["five"].pixels[4, 0, 0] = np.nan
    box = (0.0, 0.0, 7.0, 7.0)
    view = (ViewPlan("two", box, SIZE), ViewPlan("one", box, SIZE), ViewPlan("two", box, SIZE, bands=(1, 0)))
    clean = render(samples, {"image": [[view] * 3]})["image"]
    assert clean.pixels.shape == (3, 5, *SIZE)
    assert clean.channels.valid is None
    assert clean.valid is None
    torch.testing.assert_close(clean.pixels[:, [1, 0]], clean.pixels[:, 3:], rtol=1e-6, atol=1e-6)
    # One band of one tile with a hole marks pixels of its own channel alone.
    holed = render(samples, {"image": [[(*view, ViewPlan("five", box, SIZE))] * 3]})["image"]
    assert holed.channels.valid is None
    assert holed.valid is not None
    assert holed.valid[:, :9].all()
    assert not holed.valid[:, 9].all()
    # A view of one plan is that plan.
    single = render(samples, {"image": [[view[:1]] * 3]})["image"]
    assert torch.equal(single.pixels, render(samples, {"image": [[view[0]] * 3]})["image"].pixels)


def test_of_joint_views_only_what_is_shown_is_read():
    """A tile of no fixed size is cut to the boxes of all views, and each keeps its place on the ground."""
    fine, coarse = (np.arange(n * n, dtype=np.float32).reshape(1, n, n) for n in (400, 100))
    schema = {"fine": any_schema("fine", 1, None, gsd_m=10.0), "coarse": any_schema("coarse", 1, None, gsd_m=40.0)}
    lazy = {"fine": CountedReads(fine), "coarse": CountedReads(coarse)}
    gsds_m = {name: schema[name].gsd_m for name in schema}
    sample = Sample("k", {name: Tile(pixels, schema[name].bands, gsds_m[name]) for name, pixels in lazy.items()})
    views = [
        (ViewPlan("fine", (200.0, 300.0, 4.0, 4.0), (4, 4)), ViewPlan("coarse", (50.0, 75.0, 1.0, 1.0), (4, 4))),
        (ViewPlan("fine", (208.0, 304.0, 4.0, 4.0), (4, 4)), ViewPlan("coarse", (52.0, 76.0, 1.0, 1.0), (4, 4))),
    ]
    cut = cut_to_views(sample, shown_plans(views), schema)
    assert {name: tile.origin for name, tile in cut.tiles.items()} == {"fine": (200, 300), "coarse": (50, 75)}
    assert {name: pixels.n_read for name, pixels in lazy.items()} == {"fine": 12 * 8, "coarse": 3 * 2}
    tiles, stacked = stack([cut], {"image": [[view] for view in views]}, schema)
    found = Renderer([schema]).render(Batch(0, 0, ["k"], tiles, stacked))["image"].pixels
    for row, (top, left) in enumerate([(200, 300), (208, 304)]):
        expected = torch.from_numpy(fine[0, top : top + 4, left : left + 4].copy())
        torch.testing.assert_close(found[row, 0], expected)
        assert torch.equal(found[row, 1], torch.full((4, 4), float(coarse[0, top // 4, left // 4])))


def test_the_parts_of_a_joint_view_must_agree():
    rng = np.random.default_rng(0)
    samples = [Sample("k", {name: random_tile(name, rng) for name in SCHEMA})]
    plan = ViewPlan("two", (0.0, 0.0, 6.0, 6.0), SIZE)
    assert stack(samples, {"image": [[(plan, replace(plan, tile="one", rot90=4))]]}, SCHEMA)
    for other in (replace(plan, size=(4, 4)), replace(plan, flip=True), replace(plan, rot90=1)):
        with pytest.raises(ValueError, match="plans of a joint view must share size, flip and rot90"):
            stack(samples, {"image": [[(plan, other)]]}, SCHEMA)
    mixed = replace(plan, bands=(0,), synthesis=synthesise(rng, SCHEMA["two"], 1))
    with pytest.raises(ValueError, match="tile 'two' has both bands and a synthesis"):
        stack(samples, {"image": [[mixed]]}, SCHEMA)


def test_a_sample_that_has_nothing_to_show_is_a_row_that_is_not_valid():
    rng = np.random.default_rng(0)
    samples = [Sample(str(i), {name: random_tile(name, rng) for name in SCHEMA}) for i in range(3)]
    plan = ViewPlan("two", (0.0, 0.0, 6.0, 6.0), SIZE)
    tiles, views = stack(samples, {"some": [[(), plan, ()]], "all": [[plan] * 3], "none": [[()] * 3]}, SCHEMA)
    assert views.keys() == {"some", "all"}
    found = Renderer([SCHEMA]).render(Batch(0, 0, ["k"] * 3, tiles, views))
    some, every = found["some"], found["all"]
    assert some.valid is not None
    assert some.valid.flatten(1).any(1).tolist() == [False, True, False]
    torch.testing.assert_close(some.pixels[1], every.pixels[1])
    assert not some.pixels[::2].any()


def test_metadata_is_stacked_and_what_is_absent_is_nan():
    metas = ({"era5": [1.0, 2.0], "biome": 3, "date": "2020-07-01"}, {"month": 2, "biome": None})
    found = stack_meta([Sample("k", {}, meta) for meta in metas], {"era5": 2, "biome": 1, "month": 1, "other": 1})
    expected = {"era5": [[1, 2], [np.nan] * 2], "biome": [3, np.nan], "month": [7, 2], "other": [np.nan] * 2}
    for key, values in expected.items():
        torch.testing.assert_close(found[key], torch.tensor(values, dtype=torch.float32), equal_nan=True)
    with pytest.raises(ValueError, match="era5 of sample 'k' has 2 values, expected 12"):
        stack_meta([Sample("k", {}, metas[0])], {"era5": 12})


def test_a_view_of_nothing_but_no_data_is_refused_in_tiles_of_any_size():
    """Data elsewhere in the tile do not help: the view would be all zeros."""
    pixels = np.zeros((2, 8, 8), np.uint16)
    pixels[1, :2, :2] = 7
    for shape in ((8, 8), None):
        schema = {"demo": make_schema(shape=shape, no_data=(0.0,))}
        seen = ViewPlan("demo", (1.5, 1.0, 4.0, 4.0), (4, 4))
        assert cut_to_views(make_sample(pixels), [seen], schema).tiles["demo"].measured.any()
        for plans in ([ViewPlan("demo", (2.0, 0.0, 4.0, 4.0), (4, 4))], [seen, ViewPlan("demo", (4.0,) * 4, (4, 4))]):
            with pytest.raises(ValueError, match="'demo' of sample 'k7' is all no-data where a view looks"):
                cut_to_views(make_sample(pixels), plans, schema)
