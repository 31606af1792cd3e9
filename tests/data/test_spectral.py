"""Virtual bands: where they lie, what they are mixed from, and that rendering mixes what it should."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.render import Renderer
from ssl_eo.data.spectral import covered_bands, synthesise
from ssl_eo.data.stacking import cut_to_views, shown_plans, stack, stack_views
from ssl_eo.data.types import Batch, Sample, Tile, TileSchema, ViewPlan, move_to
from ssl_eo.sensors import KINDS, Band, Sensor, load_sensor

FWHM_RANGE_UM = (0.0118, 0.0942)
SIGMAS = 3 / 2.3548  # three standard deviations, in widths
several = settings(max_examples=50, deadline=None)


def schema_of(bands, shape=(16, 16), dtype="uint16", no_data=(), mean=None, std=None, gsd_m=30.0):
    sensor = Sensor("demo", "demo", tuple(bands), dtype, "dn", "demo", no_data=no_data)
    n = len(bands)
    return TileSchema(sensor, sensor.band_names, dtype, shape, gsd_m, mean or (0.0,) * n, std or (1.0,) * n)


def comb(start_um, stop_um, step_um, fwhm_um, name="b"):
    """Bands of one width at one spacing."""
    centres = np.arange(start_um, stop_um, step_um)
    return [Band(f"{name}{i}", "optical", 30.0, float(c), fwhm_um) for i, c in enumerate(centres)]


def render(schema, views, pixels):
    """One role of one tile or sensor, one sample a row of `pixels`, as in training."""
    samples = [Sample(str(i), {"demo": Tile(p, schema.bands, schema.gsd_m)}) for i, p in enumerate(pixels)]
    cut = [cut_to_views(s, shown_plans(view), {"demo": schema}) for s, view in zip(samples, views, strict=True)]
    tiles, stacked = stack(cut, {"image": [views]}, {"demo": schema})
    return Renderer([{"demo": schema}]).render(
        Batch(0, 0, [s.key for s in samples], tiles, {"image": stacked["image"]})
    )["image"]


def mixed_one_by_one(pixels, schema, weights):
    """`[n, H, W]` float64: standardised bands, then their weighted sum. NaN where one that takes part is NaN."""
    out = np.zeros((len(weights), *pixels.shape[1:]))
    for virtual, row in enumerate(weights):
        for band, weight in enumerate(row):
            if weight > 0:
                standardised = (pixels[band].astype(np.float64) - schema.mean[band]) / schema.std[band]
                out[virtual] += float(weight) * standardised
    return out


# --- where they lie ---------------------------------------------------------------------------------------------------


@st.composite
def sensors(draw):
    """Runs of bands with wide gaps between them, shuffled, among bands that cannot be mixed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bands, runs, edge = [], [], 0.4
    for _ in range(draw(st.integers(1, 4))):
        fwhm = rng.uniform(0.004, 0.03)
        centres = edge + np.cumsum(fwhm * rng.uniform(0.3, 2.5, draw(st.integers(1, 30))))
        runs.append((centres[0] - fwhm / 2, centres[-1] + fwhm / 2))
        bands += [("optical", c, fwhm) for c in centres]
        edge = centres[-1] + 0.15
    bands += [("optical", 0.7, 0.0), ("thermal", 4.0, 0.5), ("sar", 5.5e4, 0.0)]
    order = rng.permutation(len(bands))
    made = [
        Band(str(i), kind, 30.0, float(c), float(w), "VV" if kind == "sar" else None)
        for i, (kind, c, w) in enumerate(bands[k] for k in order)
    ]
    return schema_of(made), runs


def run_of(wavelength_um, runs):
    """The run that holds a wavelength; sums of float64 may fall a rounding outside."""
    return next(i for i, (low, high) in enumerate(runs) if low - 1e-9 <= wavelength_um <= high + 1e-9)


@several
@given(sensors(), st.integers(1, 13), st.integers(0, 2**32 - 1))
def test_virtual_bands_of_any_sensor(drawn, n, seed):
    schema, runs = drawn
    found = synthesise(np.random.default_rng(seed), schema, n)
    assert found == synthesise(np.random.default_rng(seed), schema, n)
    assert found.weights.shape == (n, len(schema.bands))
    assert found.weights.dtype == np.float32
    assert len(found.wavelength_um) == len(found.fwhm_um) == n
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-5)
    positive = found.weights[found.weights != 0]
    assert (positive > 0).all()
    assert (found.weights.max(1, keepdims=True) * 0.99e-4 <= np.where(found.weights > 0, found.weights, 1)).all()
    mixable = covered_bands(schema)
    for weights, wavelength, fwhm in zip(found.weights, found.wavelength_um, found.fwhm_um, strict=True):
        assert FWHM_RANGE_UM[0] <= fwhm <= FWHM_RANGE_UM[1]
        taken = np.flatnonzero(weights).tolist()
        assert set(taken) <= set(mixable)
        # All sources are of the run that holds the virtual band.
        run = run_of(wavelength, runs)
        assert {run_of(schema.sensor.bands[i].wavelength_um, runs) for i in taken} == {run}
        # Three standard deviations to either side are covered, if any run is long enough.
        if max(high - low for low, high in runs) > 2 * SIGMAS * fwhm:
            low, high = runs[run]
            assert low - 1e-9 <= wavelength - SIGMAS * fwhm
            assert wavelength + SIGMAS * fwhm <= high + 1e-9


def test_weights_are_the_overlap_of_gaussians():
    schema = schema_of(comb(0.4, 0.9, 0.01, 0.012))
    found = synthesise(np.random.default_rng(0), schema, 5)
    for weights, wavelength, fwhm in zip(found.weights, found.wavelength_um, found.fwhm_um, strict=True):
        overlap = []
        grid = np.linspace(0.0, 1.4, 20_001)
        for band in schema.sensor.bands:
            one, other = (
                np.exp(-0.5 * ((grid - centre) * 2.3548 / width) ** 2)
                for centre, width in ((band.wavelength_um, band.fwhm_um), (wavelength, fwhm))
            )
            overlap.append((one * other).sum())
        expected = np.array(overlap) / np.sum(overlap)
        np.testing.assert_allclose(weights, expected, atol=2e-4)
        # So the mix is centred on what it stands for.
        centre = sum(w * band.wavelength_um for w, band in zip(weights, schema.sensor.bands, strict=True))
        assert centre == pytest.approx(wavelength, abs=2e-4)


def test_centres_are_uniform_over_what_is_covered():
    schema = schema_of([*comb(0.4, 0.6, 0.01, 0.01, "a"), *comb(1.0, 1.6, 0.01, 0.01, "b")])
    found = synthesise(np.random.default_rng(0), schema, 4000, (0.02, 0.02))
    centres = np.array(found.wavelength_um)
    short, long = (0.395 + 0.02 * SIGMAS, 0.595 - 0.02 * SIGMAS), (0.995 + 0.02 * SIGMAS, 1.595 - 0.02 * SIGMAS)
    share = (short[1] - short[0]) / (short[1] - short[0] + long[1] - long[0])
    assert np.mean(centres < 0.8) == pytest.approx(share, abs=0.02)
    for low, high in (short, long):
        inside = centres[(centres > low - 1e-9) & (centres < high + 1e-9)]
        assert np.quantile(inside, [0.25, 0.5, 0.75]) == pytest.approx(
            low + (high - low) * np.arange(1, 4) / 4, abs=0.02
        )


@pytest.mark.parametrize("name", ["enmap", "aviris", "neon", "sentinel2_l2a"])
def test_known_sensors(name):
    """Water vapour at 1.4 and 1.9 um, which EnMAP leaves out, is not looked through."""
    sensor = load_sensor(name)
    n = len(sensor.bands)
    schema = TileSchema(sensor, sensor.band_names, "uint16", (8, 8), 10.0, (0.0,) * n, (1.0,) * n)
    found = synthesise(np.random.default_rng(0), schema, 300)
    assert covered_bands(schema) == tuple(range(n))
    if name == "enmap":
        centres = np.array(found.wavelength_um)
        assert not ((centres > 1.40) & (centres < 1.46)).any()
        assert not ((centres > 1.77) & (centres < 1.93)).any()
        assert ((centres < 1.4).any(), ((centres > 1.46) & (centres < 1.77)).any(), (centres > 1.93).any()) == (
            True,
        ) * 3
    # Many neighbours are mixed where there are many.
    assert ((found.weights > 0).sum(1).max() > 20) == (n > 100)


def test_what_cannot_be_mixed_is_refused():
    rng, schema = np.random.default_rng(0), schema_of(comb(0.4, 0.6, 0.01, 0.01))
    for n, widths in ((0, FWHM_RANGE_UM), (1, (0.0, 0.1)), (1, (0.2, 0.1))):
        with pytest.raises(ValueError, match="n >= 1 and a range of widths in um"):
            synthesise(rng, schema, n, widths)
    with pytest.raises(ValueError, match="a tile of demo has no optical band of known width"):
        synthesise(rng, schema_of([Band("a", "optical", 10.0, 0.5), Band("b", "elevation", 10.0)]), 1)
    assert covered_bands(schema_of([Band("a", "optical", 10.0, 0.5), *comb(0.6, 0.615, 0.01, 0.01)])) == (1, 2)


def test_plans_travel_and_compare():
    schema = schema_of(comb(0.4, 0.9, 0.01, 0.012))
    plan, same, other = (
        ViewPlan("demo", (0.0, 0.0, 8.0, 8.0), (8, 8), synthesis=synthesise(np.random.default_rng(seed), schema, 3))
        for seed in (0, 0, 1)
    )
    assert pickle.loads(pickle.dumps(plan)) == plan == same != other
    assert len({plan, same, other}) == 2
    assert plan != replace(plan, synthesis=None)


# --- what is rendered -------------------------------------------------------------------------------------------------


def hyperspectral(rng, dtype="uint16", shape=(20, 17), no_data=()):
    bands = [
        *comb(0.45, 0.9, 0.01, 0.012, "v"),
        Band("t", "thermal", 60.0, 10.0, 0.5),
        *comb(1.5, 1.7, 0.01, 0.012, "s"),
    ]
    mean, std = rng.uniform(500, 5000, len(bands)), rng.uniform(1000, 3000, len(bands))
    return schema_of(bands, shape, dtype, no_data, tuple(mean.tolist()), tuple(std.tolist()))


@pytest.mark.parametrize("size", [(9, 12), (70, 61)])  # batched, and row by row
@pytest.mark.parametrize("turns", range(4))
def test_rendering_equals_mixing_standardised_values_then_resizing(size, turns):
    rng = np.random.default_rng(turns)
    schema = hyperspectral(rng)
    pixels = rng.integers(0, 10_000, (3, len(schema.bands), *schema.shape), dtype=np.uint16)
    top, left, height, width = box = (2, 3, 15, 11)
    plans = [
        ViewPlan("demo", tuple(map(float, box)), size, turns > 1, turns, None, 1.3, -0.4, synthesise(rng, schema, 5))
        for _ in pixels
    ]
    found = render(schema, plans, pixels)
    assert found.valid is None
    assert found.channels.valid is None
    for row, plan in enumerate(plans):
        mixed = mixed_one_by_one(pixels[row], schema, plan.synthesis.weights) * plan.gain + plan.bias
        crop = torch.from_numpy(mixed)[None, :, top : top + height, left : left + width]
        view = F.interpolate(crop, size[:: -1 if turns % 2 else 1], mode="bicubic", antialias=True)
        expected = torch.rot90(view.flip(3) if plan.flip else view, turns, (2, 3))[0]
        torch.testing.assert_close(found.pixels[row].double(), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.channels.wavelength_um[row], torch.tensor(plan.synthesis.wavelength_um))
        torch.testing.assert_close(found.channels.fwhm_um[row], torch.tensor(plan.synthesis.fwhm_um))
    assert (found.channels.kind == KINDS.index("optical")).all()
    assert (found.channels.polarization == -1).all()
    assert (found.channels.orbit == -1).all()
    assert (found.channels.gsd_m == 30.0).all()


def test_an_untouched_tile_is_only_mixed():
    rng = np.random.default_rng(0)
    schema = hyperspectral(rng)
    pixels = rng.integers(0, 10_000, (1, len(schema.bands), *schema.shape), dtype=np.uint16)
    plan = ViewPlan("demo", (0.0, 0.0, 12.0, 13.0), (12, 13), synthesis=synthesise(rng, schema, 4))
    expected = mixed_one_by_one(pixels[0], schema, plan.synthesis.weights)[:, :12, :13]
    found = render(schema, [plan], pixels).pixels[0].double()
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_a_narrow_virtual_band_is_its_source():
    """Where sources lie apart, no other takes part; where they touch, the nearest dominates."""
    rng = np.random.default_rng(0)
    schema = schema_of(comb(0.4, 0.9, 0.1, 0.01), mean=(9.0, 8.0, 7.0, 6.0, 5.0), std=(1.0, 2.0, 3.0, 4.0, 5.0))
    pixels = rng.integers(0, 100, (1, 5, 16, 16), dtype=np.uint16)
    plan = ViewPlan("demo", (1.0, 2.0, 13.0, 12.0), (9, 9), True, 1)
    synthesis = synthesise(rng, schema, 8, (0.001, 0.002))
    source = synthesis.weights.argmax(1)
    assert (np.sort(synthesis.weights, 1) == [0, 0, 0, 0, 1]).all()
    assert len(set(source.tolist())) > 2
    found = render(schema, [replace(plan, synthesis=synthesis)], pixels)
    plain = render(schema, [replace(plan, bands=tuple(source.tolist()))], pixels)
    torch.testing.assert_close(found.pixels, plain.pixels, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.channels.wavelength_um, plain.channels.wavelength_um, atol=0.005, rtol=0)
    close = schema_of(comb(0.4, 0.9, 0.012, 0.006))
    narrow = synthesise(rng, close, 200, (0.0005, 0.001))
    nearest = [min(abs(w - band.wavelength_um) for band in close.sensor.bands) for w in narrow.wavelength_um]
    assert (narrow.weights.max(1)[np.array(nearest) < 0.003] > 0.9).all()


def test_alike_bands_keep_their_spread():
    """Bands of one signal, each in units of its own, make virtual bands of spread 1 whatever their width."""
    rng = np.random.default_rng(0)
    bands = comb(0.4, 0.9, 0.01, 0.012)
    mean, std = (tuple(rng.uniform(1000, 2000, len(bands)).tolist()) for _ in range(2))
    schema = schema_of(bands, (32, 32), "float32", mean=mean, std=std)
    signal = rng.normal(size=(32, 32))
    pixels = (np.array(mean)[:, None, None] + np.array(std)[:, None, None] * signal).astype(np.float32)[None]
    plan = ViewPlan("demo", (0.0, 0.0, 32.0, 32.0), (32, 32), synthesis=synthesise(rng, schema, 13))
    expected = torch.from_numpy(signal).float().expand(13, -1, -1)
    torch.testing.assert_close(render(schema, [plan], pixels).pixels[0], expected, atol=1e-4, rtol=0)


@several
@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 7), (70, 61)]), st.sampled_from(["uint16", "float32"]))
def test_a_virtual_pixel_holds_data_where_all_its_sources_do(seed, size, dtype):
    """As when a tile of mixed values is rendered, in which NaN says that a source lacks."""
    rng = np.random.default_rng(seed)
    schema = hyperspectral(rng, dtype, no_data=(0.0,))
    n = len(schema.bands)
    pixels = rng.integers(1, 10_000, (2, n, *schema.shape)).astype(dtype)
    hole = rng.random(pixels.shape) < 0.01
    hole[:, rng.integers(n)] |= rng.random() < 0.5  # a band that holds nothing
    pixels[hole] = 0
    if dtype == "float32":
        pixels[hole & (rng.random(hole.shape) < 0.5)] = np.nan
    box = (rng.uniform(0, 5), rng.uniform(0, 5), rng.uniform(5, 14), rng.uniform(5, 11))
    plans = [
        ViewPlan("demo", box, size, bool(rng.integers(2)), int(rng.integers(4)), synthesis=synthesise(rng, schema, 3))
        for _ in pixels
    ]
    found = render(schema, plans, pixels)
    assert found.pixels.isfinite().all()
    masked = np.where(hole, np.nan, pixels)
    mixed = [mixed_one_by_one(p, schema, v.synthesis.weights) for p, v in zip(masked, plans, strict=True)]
    plain = schema_of([Band(str(i), "optical", 30.0, 0.5) for i in range(3)], schema.shape, "float32")
    # A row none of whose virtual bands holds data could not be a tile: it is compared without being rendered.
    for row, values in enumerate(mixed):
        lacks = np.isnan(values).all((1, 2))
        real = torch.ones(3, dtype=torch.bool) if found.channels.valid is None else found.channels.valid[row]
        empty = [hole[row][weights > 0].all((1, 2)).any() for weights in plans[row].synthesis.weights]
        assert (~real).tolist() == empty
        assert found.valid is not None
        assert not found.valid[row][torch.from_numpy(lacks)].any()
        if lacks.all():
            continue
        alone = render(plain, [replace(plans[row], synthesis=None)], values[None].astype(np.float32))
        valid = torch.ones_like(alone.pixels, dtype=torch.bool) if alone.valid is None else alone.valid
        assert torch.equal(found.valid[row], valid[0])
        torch.testing.assert_close(found.pixels[row], alone.pixels[0], atol=1e-4, rtol=0)


def test_rows_with_and_without_virtual_bands_and_with_more_or_fewer_of_them():
    rng = np.random.default_rng(0)
    schema = hyperspectral(rng)
    pixels = rng.integers(0, 10_000, (5, len(schema.bands), *schema.shape), dtype=np.uint16)
    plan = ViewPlan("demo", (2.0, 1.0, 14.0, 15.0), (10, 10))
    chosen = [
        {"synthesis": synthesise(rng, schema, 2)},
        {"bands": (5, 3, 1)},
        {"synthesis": synthesise(rng, schema, 4)},
        {"bands": (7,)},
        {"synthesis": synthesise(rng, schema, 1)},
    ]
    plans = [replace(plan, **change) for change in chosen]
    for rows in ([0, 1, 2, 3, 4], [0, 2, 4]):  # two kinds of rows, and one
        found = render(schema, [plans[r] for r in rows], pixels[rows])
        assert found.pixels.shape == (len(rows), 4, 10, 10)
        for i, row in enumerate(rows):
            alone = render(schema, [plans[row]], pixels[row : row + 1])
            n = alone.pixels.shape[1]
            torch.testing.assert_close(found.pixels[i, :n], alone.pixels[0], atol=1e-5, rtol=1e-5)
            assert torch.equal(found.channels.wavelength_um[i, :n], alone.channels.wavelength_um.view(-1))
            assert found.channels.valid[i].tolist() == [True] * n + [False] * (4 - n)
            assert not found.valid[i, n:].any()
            assert not found.pixels[i, n:].any()
            assert (found.channels.wavelength_um[i, n:] == found.channels.wavelength_um[i, 0]).all()


def test_views_of_one_tile_may_be_virtual():
    schema = schema_of(comb(0.4, 0.9, 0.01, 0.012))
    plan = ViewPlan("demo", (0.0, 0.0, 8.0, 8.0), (8, 8), synthesis=synthesise(np.random.default_rng(0), schema, 3))
    (batch,) = stack_views([[plan, plan]])
    assert batch.weights.shape == (2, 3, len(schema.bands))
    assert batch.bands is None
    assert batch.place is None
    assert not batch.has_padding
    with pytest.raises(ValueError, match="must share tile, size and number of bands"):
        stack_views([[plan, replace(plan, synthesis=None, bands=(0, 1, 2))]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [(9, 12), (70, 61)])
def test_device_equals_cpu(size):
    """Virtual bands and joint views, with no-data, without waiting for the device."""
    rng = np.random.default_rng(0)
    schema = hyperspectral(rng, no_data=(0.0,))
    pixels = rng.integers(1, 10_000, (6, len(schema.bands), *schema.shape), dtype=np.uint16)
    pixels[:, :, 4:8, 5] = 0
    pixels[0, 3] = 0
    samples = [Sample(str(i), {"demo": Tile(p, schema.bands, 30.0)}) for i, p in enumerate(pixels)]
    plan = ViewPlan("demo", (2.0, 1.0, 14.0, 15.0), size, True, 1)
    views = [
        (replace(plan, synthesis=synthesise(rng, schema, 1 + i % 3)), replace(plan, bands=(3, i)))
        for i in range(len(samples))
    ]
    cut = [cut_to_views(s, shown_plans(view), {"demo": schema}) for s, view in zip(samples, views, strict=True)]
    tiles, stacked = stack(cut, {"image": [views]}, {"demo": schema})
    batch, renderer = Batch(0, 0, [s.key for s in samples], tiles, stacked), Renderer([{"demo": schema}])
    expected = renderer.render(batch)["image"]
    batch, renderer = move_to(batch, "cuda"), renderer.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = renderer.render(batch)["image"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual.valid.cpu(), expected.valid)
    assert torch.equal(actual.channels.valid.cpu(), expected.channels.valid)
    torch.testing.assert_close(actual.channels.wavelength_um.cpu(), expected.channels.wavelength_um)
    torch.testing.assert_close(actual.pixels.cpu(), expected.pixels, atol=1e-4, rtol=1e-5)
