from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.plans import CropConfig, aligned, resized_crop, whole
from ssl_eo.data.render import Renderer
from ssl_eo.data.stacking import stack_tiles, stack_views
from ssl_eo.data.types import Batch, PixelBatch, Sample, Tile, TileBatch, TileSchema, ViewPlan, move_to
from ssl_eo.sensors import Band, Sensor

DTYPES = ("uint8", "int8", "int16", "uint16", "float32")
several = settings(max_examples=50, deadline=None)


def make_schema(
    n_bands=3, dtype="uint8", shape=(16, 16), gsd_m=10.0, mean=None, std=None, no_data=(), n_classes=None, name="demo"
):
    kind = {"kind": "optical"} if n_classes is None else {"kind": "categorical", "n_classes": n_classes}
    wavelengths = [0.0 if n_classes else 0.4 + 0.01 * i for i in range(n_bands)]
    bands = tuple(Band(name=f"b{i}", gsd_m=gsd_m, wavelength_um=w, **kind) for i, w in enumerate(wavelengths))
    sensor = Sensor(name, "demo", bands, dtype, "dn", "demo", no_data=no_data)
    mean = tuple(mean) if mean is not None else (0.0,) * n_bands
    std = tuple(std) if std is not None else (1.0,) * n_bands
    return TileSchema(sensor, sensor.band_names, dtype, shape, gsd_m, mean, std)


def random_pixels(rng, n, schema):
    shape = (n, len(schema.bands), *schema.shape)
    if schema.dtype == "float32":
        return rng.normal(size=shape).astype(np.float32)
    info = np.iinfo(schema.dtype)
    return rng.integers(info.min, info.max, shape, dtype=schema.dtype, endpoint=True)


def sample_of(tile, shape=(16, 16)):
    return Sample("a", {tile: Tile(np.zeros((2, *shape), np.uint16), ("b0", "b1"), 10.0)})


def tile_batch(pixels, gsd_m=10.0, has_no_data=False):
    return TileBatch(torch.from_numpy(pixels), torch.full((len(pixels),), gsd_m), has_no_data)


def render(pixels, schema, plans, interpolation="bicubic") -> PixelBatch:
    """Through samples, stacking and the renderer, as in training; one view of each of the samples."""
    samples = [Sample(str(i), {"demo": Tile(p, schema.bands, schema.gsd_m)}) for i, p in enumerate(pixels)]
    tiles = stack_tiles(samples, ["demo"], {"demo": schema})
    batch = Batch(0, 0, [s.key for s in samples], tiles, {"image": stack_views([plans])})
    return Renderer([{"demo": schema}], interpolation).render(batch)["image"]


def reference(pixels, plan, interpolation):
    """One view by cropping and `F.interpolate`, for integer boxes."""
    top, left, height, width = (int(edge) for edge in plan.box)
    crop = torch.from_numpy(pixels.astype(np.float32))[None, :, top : top + height, left : left + width]
    size = plan.size if plan.rot90 % 2 == 0 else plan.size[::-1]
    view = F.interpolate(crop, size, mode=interpolation, antialias=True, align_corners=False)
    if plan.flip:
        view = view.flip(3)
    return torch.rot90(view, plan.rot90, (2, 3))[0]


@st.composite
def integer_plans(draw, n=3, max_tile=24, max_view=24):
    shape = draw(st.tuples(st.integers(1, max_tile), st.integers(1, max_tile)))
    # torch's own antialiased resize is wrong on the CPU for views one pixel wide, so there is nothing to compare with.
    size = draw(st.tuples(st.integers(2, max_view), st.integers(2, max_view)))
    plans = []
    for _ in range(n):
        top, left = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
        height, width = draw(st.integers(1, shape[0] - top)), draw(st.integers(1, shape[1] - left))
        box = (float(top), float(left), float(height), float(width))
        plans.append(ViewPlan("demo", box, size, draw(st.booleans()), draw(st.integers(0, 3))))
    return shape, plans


@several
@given(integer_plans(), st.sampled_from(["bilinear", "bicubic"]), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_equals_interpolate_on_the_crop(drawn, interpolation, dtype, seed):
    shape, plans = drawn
    spread = {"uint8": 64.0, "int8": 64.0, "int16": 2e4, "uint16": 2e4, "float32": 1.0}[dtype]
    schema = make_schema(dtype=dtype, shape=shape, std=(spread,) * 3)
    pixels = random_pixels(np.random.default_rng(seed), len(plans), schema)
    view = render(pixels, schema, plans, interpolation)
    expected = torch.stack([reference(p, plan, interpolation) for p, plan in zip(pixels, plans, strict=True)]) / spread
    torch.testing.assert_close(view.pixels, expected, atol=1e-4, rtol=0)
    assert view.valid is None


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_strong_reduction_of_a_large_tile(interpolation):
    schema = make_schema(n_bands=1, dtype="uint16", shape=(300, 200), std=(2e4,))
    pixels = random_pixels(np.random.default_rng(0), 2, schema)
    plans = [ViewPlan("demo", (0.0, 0.0, 300.0, 200.0), (7, 5), False, turns) for turns in (0, 1)]
    expected = torch.stack([reference(p, plan, interpolation) for p, plan in zip(pixels, plans, strict=True)]) / 2e4
    torch.testing.assert_close(render(pixels, schema, plans, interpolation).pixels, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(70, 61), (64, 128)])
def test_large_views(size, interpolation):
    schema = make_schema(dtype="uint16", shape=(90, 131), std=(2e4,) * 3)
    pixels = random_pixels(np.random.default_rng(0), 8, schema)
    boxes = [(0.0, 0.0, 90.0, 131.0), (3.0, 40.0, 81.0, 77.0)]
    plans = [ViewPlan("demo", boxes[i % 2], size, i > 3, i % 4) for i in range(8)]
    expected = torch.stack([reference(p, plan, interpolation) for p, plan in zip(pixels, plans, strict=True)]) / 2e4
    torch.testing.assert_close(render(pixels, schema, plans, interpolation).pixels, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_tile_at_its_own_size_is_exact(dtype):
    schema = make_schema(dtype=dtype)
    pixels = random_pixels(np.random.default_rng(0), 2, schema)
    exact = torch.from_numpy(pixels.astype(np.float32))
    plan = whole("demo", (16, 16), 16)
    assert torch.equal(render(pixels, schema, [plan, plan]).pixels, exact)
    # The second row is not whole, so that both go through the resampling matrices.
    turned = replace(plan, rot90=1)
    assert torch.equal(
        render(pixels, schema, [plan, turned]).pixels, torch.stack([exact[0], exact[1].rot90(1, (1, 2))])
    )


def test_rows_of_a_batch_do_not_depend_on_each_other():
    schema = make_schema(no_data=(0.0,))
    pixels = random_pixels(np.random.default_rng(0), 4, schema)
    pixels[:3] |= 1
    pixels[3, :, 4:9, 4:9] = 0
    rng = np.random.default_rng(1)
    plans = [resized_crop(sample_of("demo"), "demo", CropConfig(12), rng) for _ in pixels]
    clean, mixed = render(pixels[:3], schema, plans[:3]), render(pixels, schema, plans)
    assert clean.valid is None
    assert mixed.valid is not None
    assert mixed.valid[:3].all()
    torch.testing.assert_close(mixed.pixels[:3], clean.pixels, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_fractional_boxes_show_where_they_lie(interpolation):
    """Enlarging keeps a linear ramp, except beside the box's edges where the kernel sees one side only."""
    schema = make_schema(n_bands=2, dtype="float32", shape=(64, 64))
    y, x = np.mgrid[0:64, 0:64].astype(np.float32) + 0.5
    box = (8.25, 10.6, 21.3, 13.7)
    view = render(np.stack([y, x])[None], schema, [ViewPlan("demo", box, (40, 48))], interpolation).pixels[0]
    rows = box[0] + box[2] * (torch.arange(40) + 0.5) / 40
    columns = box[1] + box[3] * (torch.arange(48) + 0.5) / 48
    inner = slice(10, -10)
    torch.testing.assert_close(view[0, inner], rows[inner, None].expand(-1, 48), atol=1e-4, rtol=0)
    torch.testing.assert_close(view[1, :, inner], columns[None, inner].expand(40, -1), atol=1e-4, rtol=0)


def test_a_cut_pixel_counts_with_its_share():
    """Reduced to one output as wide as the kernel's flat top allows: weights are overlap x triangle."""
    schema = make_schema(n_bands=1, dtype="float32", shape=(1, 3))
    pixels = np.array([[[[1.0, 10.0, 100.0]]]], dtype=np.float32)
    view = render(pixels, schema, [ViewPlan("demo", (0.0, 0.5, 1.0, 2.0), (1, 1))], "bilinear")
    # Centre 1.5, stretch 2: pixel centres at distance 1, 0, 1 weigh 1/2, 1, 1/2, and the outer two are cut in half.
    assert view.pixels.item() == pytest.approx((0.25 * 1 + 10 + 0.25 * 100) / 1.5)


def test_normalisation_and_jitter():
    schema = make_schema(dtype="uint16", mean=(10.0, 200.0, 3000.0), std=(2.0, 30.0, 400.0))
    pixels = random_pixels(np.random.default_rng(0), 1, schema)
    plan = ViewPlan("demo", (0.0, 0.0, 16.0, 16.0), (16, 16), gain=1.1, bias=-0.2)
    mean, std = (torch.tensor(v)[:, None, None] for v in (schema.mean, schema.std))
    expected = (torch.from_numpy(pixels[0].astype(np.float32)) - mean) / std * 1.1 - 0.2
    torch.testing.assert_close(render(pixels, schema, [plan]).pixels[0], expected, atol=1e-4, rtol=1e-5)


def test_band_subsets_differ_between_rows():
    schema = make_schema(n_bands=5, mean=range(5), std=range(1, 6))
    pixels = random_pixels(np.random.default_rng(0), 2, schema)
    plan = ViewPlan("demo", (2.0, 3.0, 9.0, 8.0), (6, 6), True, 1)
    full = render(pixels, schema, [plan, plan])
    chosen = [(0, 3), (4, 1)]
    part = render(pixels, schema, [replace(plan, bands=bands) for bands in chosen])
    for row, bands in enumerate(chosen):
        torch.testing.assert_close(part.pixels[row], full.pixels[row, list(bands)])
        torch.testing.assert_close(part.channels.wavelength_um[row], full.channels.wavelength_um[list(bands)])
    assert full.channels.wavelength_um.shape == (5,)


def test_ground_size_of_a_view_pixel():
    schema = make_schema(gsd_m=10.0)
    pixels = random_pixels(np.random.default_rng(0), 2, schema)
    plans = [whole("demo", (16, 16), 8), ViewPlan("demo", (0.0, 0.0, 4.0, 16.0), (8, 8))]
    torch.testing.assert_close(render(pixels, schema, plans).gsd_m, torch.tensor([20.0, 10.0]))


def test_ground_size_is_that_of_each_sample():
    """Samples of one source may differ in ground sampling; views of a sample share its own."""
    schema = make_schema(gsd_m=10.0)
    pixels = random_pixels(np.random.default_rng(0), 2, schema)
    gsds_m = (0.3, 10.0)
    samples = [Sample(str(g), {"demo": Tile(p, schema.bands, g)}) for p, g in zip(pixels, gsds_m, strict=True)]
    plans = [[whole("demo", (16, 16), 8)] * 2, [ViewPlan("demo", (0.0, 0.0, 4.0, 4.0), (8, 8))] * 2]
    tiles = stack_tiles(samples, ["demo"], {"demo": schema})
    out = Renderer([{"demo": schema}]).render(Batch(0, 0, ["0", "1"], tiles, {"image": stack_views(plans)}))["image"]
    torch.testing.assert_close(out.gsd_m, torch.tensor([0.6, 20.0, 0.15, 5.0]))


def test_several_views_of_several_sources_on_one_renderer():
    schemas = [{"a": make_schema(std=(2.0,) * 3)}, {"a": make_schema(std=(4.0,) * 3), "b@1.5m": make_schema(1)}]
    rng = np.random.default_rng(0)
    tiles = {name: tile_batch(random_pixels(rng, 2, s)) for name, s in schemas[1].items()}
    plans = [[resized_crop(sample_of("a"), "a", CropConfig(8), rng) for _ in range(2)] for _ in range(3)]
    views = {"crop": stack_views(plans), "other": stack_views([[whole("b@1.5m", (16, 16), 4)] * 2])}
    renderer = Renderer(schemas, "bilinear")
    assert not renderer.state_dict()
    out = renderer.render(Batch(0, 1, ["0", "1"], tiles, views))
    assert out["crop"].pixels.shape == (6, 3, 8, 8)
    assert out["other"].pixels.shape == (2, 1, 4, 4)
    expected = reference(tiles["b@1.5m"].pixels[1].numpy(), whole("b@1.5m", (16, 16), 4), "bilinear")
    torch.testing.assert_close(out["other"].pixels[1], expected)
    halved = renderer.render(Batch(0, 0, ["0", "1"], tiles, {"crop": views["crop"]}))["crop"]
    torch.testing.assert_close(halved.pixels, 2 * out["crop"].pixels)
    # The third view of the second sample is its last row.
    alone = renderer.render(
        Batch(0, 1, ["1"], {"a": tile_batch(tiles["a"].pixels[1:].numpy())}, {"crop": stack_views([[plans[2][1]]])})
    )
    torch.testing.assert_close(alone["crop"].pixels[0], out["crop"].pixels[5])


def test_autocast_does_not_reach_the_weights():
    schema = make_schema(dtype="uint16", std=(2e4,) * 3)
    pixels = random_pixels(np.random.default_rng(0), 2, schema)
    plans = [ViewPlan("demo", (1.0, 2.0, 11.0, 9.0), (16, 16))] * 2
    expected = render(pixels, schema, plans).pixels
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(render(pixels, schema, plans).pixels, expected)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_precision_of_the_models_is_left_as_it_was(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        schema = make_schema()
        render(
            random_pixels(np.random.default_rng(0), 1, schema), schema, [ViewPlan("demo", (1.0, 2.0, 5.0, 6.0), (4, 4))]
        )
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def corrupted(pixels, hole, no_data, rng):
    """`pixels` float32 with each no-data pixel set to any of the ways of saying so."""
    out = pixels.copy()
    out[hole] = rng.choice(np.array([*no_data, np.nan, np.inf, -np.inf], dtype=np.float32), int(hole.sum()))
    return out


@several
@given(integer_plans(n=2), st.sampled_from(["bilinear", "bicubic"]), st.floats(0.02, 0.9), st.integers(0, 2**32 - 1))
def test_no_data_never_leaks(drawn, interpolation, share, seed):
    shape, plans = drawn
    rng = np.random.default_rng(seed)
    no_data = (-9999.0, 1e30)
    schema = make_schema(n_bands=2, dtype="float32", shape=shape, no_data=no_data)
    pixels = random_pixels(rng, 2, schema)
    hole = rng.random(pixels.shape) < share
    hole[0, 0, 0, 0] = True
    first = render(corrupted(pixels, hole, no_data, rng), schema, plans, interpolation)
    second = render(corrupted(pixels, hole, no_data, rng), schema, plans, interpolation)
    assert first.valid is not None
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.valid, second.valid)
    assert first.pixels.isfinite().all()
    assert (first.pixels[~first.valid] == 0).all()

    for row, plan in enumerate(plans):
        values, share_valid = by_the_rule(pixels[row], hole[row], plan, interpolation)
        # Rounding may fall either way on the two thresholds themselves.
        decided = ((share_valid - 0.5).abs() > 1e-5) & ((share_valid - (1 - 1e-5)).abs() > 2e-6)
        valid = share_valid >= 0.5
        assert torch.equal(first.valid[row][decided], valid[decided])
        shown = decided & valid
        torch.testing.assert_close(first.pixels[row][shown].double(), values[shown], atol=1e-4, rtol=0)


def by_the_rule(pixels, hole, plan, interpolation):
    """Values and share of valid weight of one view `[C, h, w]` in float64, with the kernel that torch uses."""
    top, left, height, width = (int(edge) for edge in plan.box)
    window = (slice(None), slice(top, top + height), slice(left, left + width))
    x, ok = torch.from_numpy(pixels[window]).double(), torch.from_numpy(~hole[window]).double()
    size = plan.size if plan.rot90 % 2 == 0 else plan.size[::-1]

    def kernel(n_in, n_out):  # rows of the resampled identity are the weights: [n_out, n_in]
        impulses = torch.eye(n_in, dtype=torch.float64)[None, :, :, None].expand(-1, -1, -1, 2).contiguous()
        return F.interpolate(impulses, (n_out, 2), mode=interpolation, antialias=True)[0, :, :, 0].T

    def apply(y, x, values):
        return torch.einsum("hH,cHW,wW->chw", y, values, x)

    ky, kx = kernel(height, size[0]), kernel(width, size[1])
    weight = apply(ky.abs(), kx.abs(), ok)
    total = apply(ky.abs(), kx.abs(), torch.ones_like(ok))
    mean = apply(ky.abs(), kx.abs(), x * ok) / weight
    values = torch.where(weight > (1 - 1e-5) * total, apply(ky, kx, x * ok), mean)
    both = torch.cat([values, weight / total])
    return torch.rot90(both.flip(2) if plan.flip else both, plan.rot90, (1, 2)).chunk(2)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_rule_in_large_views(interpolation):
    schema = make_schema(n_bands=2, dtype="float32", shape=(70, 90), no_data=(-9999.0,))
    rng = np.random.default_rng(0)
    pixels = random_pixels(rng, 4, schema)
    hole = rng.random(pixels.shape) < 0.4
    pixels[hole] = -9999.0
    plans = [ViewPlan("demo", (2.0, 5.0, 61.0, 80.0), (66, 58), turns > 1, turns) for turns in range(4)]
    view = render(pixels, schema, plans, interpolation)
    for row, plan in enumerate(plans):
        values, share = by_the_rule(pixels[row], hole[row], plan, interpolation)
        decided, shown = (share - 0.5).abs() > 1e-4, share > 0.5 + 1e-4
        assert torch.equal(view.valid[row][decided], shown[decided])
        torch.testing.assert_close(view.pixels[row][shown].double(), values[shown], atol=1e-4, rtol=0)


def test_the_rule_beside_no_data():
    """A half empty tile, enlarged twice: plain far from the edge, convex near it, valid up to the edge."""
    schema = make_schema(n_bands=1, dtype="float32", shape=(8, 8), no_data=(0.0,))
    values = np.random.default_rng(0).uniform(1, 2, (1, 1, 8, 8)).astype(np.float32)
    holed = values.copy()
    holed[..., 4:] = 0
    plan = whole("demo", (8, 8), 16)
    view, plain = render(holed, schema, [plan]), render(values, schema, [plan])
    assert view.valid is not None
    assert view.valid[..., :8].all()
    assert not view.valid[..., 8:].any()
    torch.testing.assert_close(view.pixels[..., :5], plain.pixels[..., :5], atol=1e-6, rtol=0)
    near = view.pixels[..., 5:8]
    assert ((near >= values[..., :4].min()) & (near <= values[..., :4].max())).all()
    # A tile without the enlargement keeps exactly its own validity, whichever way it is rendered.
    for plans in ([whole("demo", (8, 8), 8)], [replace(whole("demo", (8, 8), 8), rot90=2)]):
        same = render(holed, schema, plans)
        turned = torch.from_numpy(holed).rot90(plans[0].rot90, (2, 3))
        assert same.valid is not None
        assert torch.equal(same.valid, turned != 0)
        assert torch.equal(same.pixels, turned)


@several
@given(integer_plans(n=2), st.integers(0, 2**32 - 1), st.booleans())
def test_class_maps_only_show_classes_of_the_box(drawn, seed, has_no_data):
    shape, plans = drawn
    rng = np.random.default_rng(seed)
    schema = make_schema(n_bands=1, shape=shape, n_classes=256, mean=(7.0,), std=(3.0,), no_data=(255.0,))
    pixels = rng.integers(0, 256 if has_no_data else 255, (2, 1, *shape), dtype=np.uint8)
    # A fractional part moves sample positions, not which pixels the box touches.
    plans = [replace(p, box=(p.box[0] + 0.2, p.box[1] + 0.1, p.box[2] - 0.3, p.box[3] - 0.4)) for p in plans]
    view = render(pixels, schema, plans)
    for row, plan in enumerate(plans):
        top, left = int(plan.box[0]), int(plan.box[1])
        height, width = round(plan.box[2] + 0.3), round(plan.box[3] + 0.4)
        inside = set(pixels[row, 0, top : top + height, left : left + width].ravel().tolist())
        shown = view.pixels[row] if view.valid is None else view.pixels[row][view.valid[row]]
        assert set(shown.flatten().tolist()) <= inside - {255}
    if view.valid is not None:
        assert (view.pixels[~view.valid] == 0).all()


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip", [False, True])
def test_class_maps_turn_with_the_pixels(flip, turns):
    schema = make_schema(n_bands=1, shape=(6, 4), n_classes=24)
    pixels = np.arange(24, dtype=np.uint8).reshape(1, 1, 6, 4)
    size = (12, 8) if turns % 2 == 0 else (8, 12)
    view = render(pixels, schema, [ViewPlan("demo", (0.0, 0.0, 6.0, 4.0), size, flip, turns)]).pixels[0]
    expected = torch.from_numpy(pixels[0]).float().repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(view, torch.rot90(expected.flip(2) if flip else expected, turns, (1, 2)))


@several
@given(st.sampled_from([(10.0, 30.0), (10.0, 20.0), (60.0, 10.0), (10.0, 15.0)]), st.integers(0, 2**32 - 1))
def test_aligned_sensors_agree_in_metres(gsds_m, seed):
    """Both tiles hold the distance from the corner in metres, so aligned views must show the same metres."""
    rng = np.random.default_rng(seed)
    schemas, tiles = {}, {}
    for name, gsd_m in zip(("one", "other"), gsds_m, strict=True):
        n = int(960 / gsd_m)
        schemas[name] = make_schema(2, "float32", (n, n), gsd_m, name=name)
        y, x = (np.mgrid[0:n, 0:n].astype(np.float32) + 0.5) * gsd_m
        tiles[name] = tile_batch(np.stack([y, x])[None], gsd_m)
    plan = resized_crop(sample_of("one", schemas["one"].shape), "one", CropConfig(96, scale=(0.3, 1.0)), rng)
    views = {p.tile: stack_views([[p]]) for p in (plan, aligned(plan, schemas["one"], "other", schemas["other"]))}
    out = Renderer([schemas], "bilinear").render(Batch(0, 0, ["0"], tiles, views))
    # Both are enlarged, which keeps a ramp, except beside the box's edges where the kernel sees one side only.
    margin = int(1.5 * max(gsds_m) / (min(plan.box[2:]) * gsds_m[0] / 96)) + 1
    inner = slice(margin, -margin)
    one, other = (out[name].pixels[0][:, inner, inner] for name in ("one", "other"))
    assert one.numel() > 0
    torch.testing.assert_close(one, other, atol=0.01, rtol=0)
    torch.testing.assert_close(out["one"].gsd_m, out["other"].gsd_m)


def test_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match="bilinear, bicubic"):
        Renderer([], "nearest")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_equals_cpu(dtype):
    schema = make_schema(dtype=dtype, std=(1.0 if dtype == "float32" else 50.0,) * 3, no_data=(0.0,))
    rng = np.random.default_rng(0)
    pixels = random_pixels(rng, 8, schema)
    pixels[0, :, 3:7, 2:9] = 0
    tiles = {"demo": tile_batch(pixels, has_no_data=True)}
    plans = [resized_crop(sample_of("demo"), "demo", CropConfig(12), rng, bands=(2, 0)) for _ in pixels]
    batch, renderer = Batch(0, 0, [], tiles, {"image": stack_views([plans])}), Renderer([{"demo": schema}])
    expected = renderer.render(batch)["image"]
    batch, renderer = move_to(batch, "cuda"), renderer.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = renderer.render(batch)["image"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual.valid.cpu(), expected.valid)
    torch.testing.assert_close(actual.pixels.cpu(), expected.pixels, atol=1e-4, rtol=1e-5)
