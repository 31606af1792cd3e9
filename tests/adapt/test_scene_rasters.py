from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

rasterio = pytest.importorskip("rasterio")

from rasterio.transform import Affine, from_origin  # noqa: E402

from ssl_eo.adapt.scene_maps import SceneRun, Windowed, embed_scene, map_scene, predict_scene  # noqa: E402
from ssl_eo.adapt.scene_outputs import class_map, value_map  # noqa: E402
from ssl_eo.adapt.scenes import Scene  # noqa: E402
from ssl_eo.adapt.tiling import Tiling, blend, panel_bytes, panel_side, panels  # noqa: E402
from ssl_eo.bundles import BundleEncoder, SensorInput  # noqa: E402
from ssl_eo.files import locked_folder  # noqa: E402
from ssl_eo.models.vit import Encoder, EncoderConfig  # noqa: E402
from ssl_eo.sensors import load_sensor  # noqa: E402

PLACE = from_origin(600_000.0, 5_000_000.0, 10.0, 10.0)
RUN = SceneRun({"sha256": "ab"})
TILING = Tiling(16, 0.5, batch_size=5)
PATCHES = Tiling(16, 0.5, patch_px=4, cell_px=4, batch_size=5)
sides = st.integers(1, 90)


def values_of(shape: tuple[int, int, int], dtype: str = "uint16", seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(1, 250, shape).astype(dtype)


def write_scene(path: Path, values: NDArray[Any], **options: Any) -> Path:
    """A GeoTIFF of `values [C, H, W]` as most are: tiled, compressed, in metres."""
    names = options.pop("descriptions", None)
    layout = {"tiled": True, "blockxsize": 32, "blockysize": 16, "compress": "deflate"}
    profile = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    place = {"crs": "EPSG:32632", "transform": PLACE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", **{**profile, **layout, **place, **options}) as file:
            file.write(values)
            if names is not None:
                file.descriptions = names
    return path


def read(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as file:
        pixels: NDArray[Any] = file.read()
    return pixels


def scaled(transform: Affine, n: int) -> Affine:
    a, b, c, d, e, f = transform[:6]
    return Affine(n * a, n * b, c, n * d, n * e, f)


def small_panels(scene: Scene, tiling: Tiling, n_values: int, **options: Any) -> SceneRun:
    """As little memory as will do, so that there are many panels."""
    least = max(16, -(-2 * tiling.size_px // tiling.cell_px))
    memory = panel_bytes(least, scene.shape, tiling, scene.n_bands, n_values)
    side = panel_side(scene.shape, tiling, scene.n_bands, n_values, memory)
    assert len(panels(scene.grid.coarser(tiling.cell_px).shape, side)) > 3
    return SceneRun({"sha256": "ab"}, memory_bytes=memory, **options)


def three_classes(pixels: Tensor) -> Tensor:
    """Logits that depend on the place in the window, so that blending matters."""
    known = pixels.nan_to_num(100.0) / 50
    ramp = torch.arange(pixels.shape[2])[:, None] / 8 - torch.arange(pixels.shape[3]) / 16
    return torch.cat([known[:, :1], known[:, 1:2] + ramp, 4 - known.mean(1, keepdim=True)], 1)


def patch_means(pixels: Tensor) -> Tensor:
    known = pixels.nan_to_num(0.0)
    return functional.avg_pool2d(torch.cat([known, known.roll(1, 3), known * known], 1), 4)


def as_tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype("float32"))


NAMES = ("dry", "wet", "snow")


def test_every_class_has_a_colour_of_its_own(tmp_path: Path) -> None:
    """As far as a table of 256 reaches: maps of more classes have none."""
    many = class_map(tmp_path / "o.tif", [str(i) for i in range(255)], {})
    assert sorted(many.colours) == list(range(256))
    assert len(set(many.colours.values())) == 256
    assert [c for c, colour in many.colours.items() if colour[3] == 0] == [255]
    few = class_map(tmp_path / "o.tif", ["a", "b"], {})
    assert few.colours == {c: many.colours[c] for c in (0, 1, 255)}  # of a class whatever others there are
    assert class_map(tmp_path / "o.tif", ["c"] * 256, {}).colours == {}


@pytest.mark.parametrize("shape", [(2, 37, 91), (2, 129, 43), (2, 5, 7), (2, 16, 16), (2, 1, 70)])
def test_a_scene_becomes_a_map_on_its_grid(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    values = values_of(shape)
    path = write_scene(tmp_path / "scene.tif", values)
    with Scene(path) as scene:
        assert (scene.shape, scene.n_bands, scene.bands) == (shape[1:], 2, ("1", "2"))
        tags = {"MODEL": "of the test"}
        counts = predict_scene(scene, three_classes, NAMES, tmp_path / "o.tif", TILING, RUN, tmp_path / "p.tif", tags)
    expected = blend(as_tensor(values), three_classes, TILING, softmax=True)
    np.testing.assert_array_equal(read(tmp_path / "p.tif"), expected)  # the very bits of the whole image in memory
    np.testing.assert_array_equal(read(tmp_path / "o.tif")[0], expected.argmax(0))
    assert counts == [*expected.argmax(0).flatten().bincount(minlength=3).tolist(), 0]
    with rasterio.open(tmp_path / "o.tif") as file:
        assert (file.crs.to_epsg(), file.transform, file.shape) == (32632, PLACE, shape[1:])
        assert (file.dtypes, file.nodata, file.descriptions) == (("uint8",), 255, ("class",))
        colours = file.colormap(1)
        assert len({colours[i] for i in range(3)}) == 3
        assert colours[255][3] == 0
        assert file.colorinterp[0].name == "palette"
        assert file.tags()["MODEL"] == "of the test"
        assert [file.tags()[f"CLASS_{i}"] for i in range(3)] == list(NAMES)
        assert file.profile["tiled"]
        assert file.profile["compress"] == "deflate"
    with rasterio.open(tmp_path / "p.tif") as file:
        assert (file.crs.to_epsg(), file.transform, file.dtypes) == (32632, PLACE, ("float32",) * 3)
        assert np.isnan(file.nodata)
        assert file.descriptions == NAMES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.tif", "p.tif", "scene.tif"]


@settings(max_examples=12, deadline=None)
@given(sides, sides, st.sampled_from([(8, 1, 1), (8, 4, 4), (12, 4, 1)]), st.integers(1, 7))
def test_panels_are_seamless(height: int, width: int, cut: tuple[int, int, int], batch: int) -> None:
    """With as little memory as will do, and any batch: what the whole image gives in memory."""
    size, patch, cell = cut
    tiling = Tiling(size, 0.5, "gaussian", patch, cell, batch)
    values = values_of((2, height, width), "int16")

    def model(pixels: Tensor) -> Tensor:
        return functional.avg_pool2d(three_classes(pixels), cell)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Scene(write_scene(folder / "scene.tif", values)) as scene:
            side = -(-max(16, 2 * size // cell) // 16) * 16
            run = SceneRun({}, memory_bytes=panel_bytes(side, scene.shape, tiling, 2, 3))
            output = value_map(folder / "o.tif", 3, "float32", (), {})
            map_scene(scene, Windowed(model, 3, tiling), [output], run)
        np.testing.assert_array_equal(read(folder / "o.tif"), blend(as_tensor(values), model, tiling))


def test_features_of_patches(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    values = values_of((2, 150, 203))
    values[:, :10, :18] = 0
    path = write_scene(tmp_path / "scene.tif", values, nodata=0)
    with Scene(path) as scene:
        run = small_panels(scene, PATCHES, 6)
        for name, dtype in (("o.tif", "float32"), ("half.tif", "float16"), ("o.parquet", "float32")):
            embed_scene(scene, patch_means, 6, tmp_path / name, PATCHES, run, dtype, {"MODEL": "m"})  # type: ignore[arg-type]
        embed_scene(scene, patch_means, 6, tmp_path / "half.parquet", PATCHES, run, "float16")
    known = as_tensor(values)
    expected = blend(torch.where(known == 0, torch.nan, known), patch_means, PATCHES).numpy()
    found = read(tmp_path / "o.tif")
    assert found.shape == (6, 38, 51)
    np.testing.assert_array_equal(found, expected)
    hole = np.isnan(found).any(0)
    assert np.argwhere(hole).tolist() == [[row, column] for row in range(2) for column in range(4)]
    with rasterio.open(tmp_path / "o.tif") as file:
        assert (file.crs.to_epsg(), file.transform) == (32632, from_origin(600_000.0, 5_000_000.0, 40.0, 40.0))
        assert np.isnan(file.nodata)
        assert file.tags()["MODEL"] == "m"
    np.testing.assert_array_equal(read(tmp_path / "half.tif"), expected.astype("float16").astype("float32"))
    assert (tmp_path / "half.tif").stat().st_size < 0.6 * (tmp_path / "o.tif").stat().st_size

    table = parquet.read_table(tmp_path / "o.parquet")
    rows, columns = (table[name].to_numpy() for name in ("row", "column"))
    assert len(table) == (~hole).sum() == len(set(zip(rows.tolist(), columns.tolist(), strict=True)))
    embedding = np.stack(table["embedding"].to_numpy())
    np.testing.assert_array_equal(embedding, expected[:, rows, columns].T)
    np.testing.assert_array_equal(table["x"], 600_000 + 40 * (columns + 0.5))
    np.testing.assert_array_equal(table["y"], 5_000_000 - 40 * (rows + 0.5))
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert rasterio.crs.CRS.from_wkt(metadata["crs"]).to_epsg() == 32632
    assert json.loads(metadata["transform"]) == [40.0, 0.0, 600_000.0, 0.0, -40.0, 5_000_000.0]
    assert (json.loads(metadata["shape"]), metadata["MODEL"]) == ([38, 51], "m")
    half = parquet.read_table(tmp_path / "half.parquet")
    assert str(half.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[6]"
    np.testing.assert_array_equal(np.stack(half["embedding"].to_numpy()), embedding.astype("float16"))


def test_what_was_not_measured(tmp_path: Path) -> None:
    """No-data of the file, of the sensor, NaN and infinity reach the model as NaN, and the output as no-data."""
    values = values_of((2, 40, 50), "float32")
    values[:, :3] = -9999  # the file's
    values[:, 3:6] = np.nan
    values[0, 6:9], values[1, 6:9] = np.inf, -np.inf
    values[0, 20] = -9999  # one band alone
    path = write_scene(tmp_path / "scene.tif", values, nodata=-9999, descriptions=("VV", "VH"))
    seen = []

    def model(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return three_classes(pixels)

    with Scene(path) as scene:
        counts = predict_scene(scene, model, NAMES, tmp_path / "o.tif", TILING, RUN, tmp_path / "p.tif")
        assert scene.no_data == (-9999.0,)
    assert (sum(counts), counts[-1]) == (40 * 50, 9 * 50)
    assert not any((pixels == -9999).any() or pixels.isinf().any() for pixels in seen)
    assert all(pixels.dtype == torch.float32 for pixels in seen)
    missing = np.zeros((40, 50), bool)
    missing[:9] = True
    np.testing.assert_array_equal(read(tmp_path / "o.tif")[0] == 255, missing)
    np.testing.assert_array_equal(np.isnan(read(tmp_path / "p.tif")), np.broadcast_to(missing, (3, 40, 50)))
    sensor = load_sensor("sentinel1_grd")
    with Scene(path, ("VH",), sensor, no_data=[7.0]) as scene:
        assert scene.no_data == (7.0,)
        read_back = scene.read((0, 0, 40, 50)).numpy()
    expected = np.where(np.isfinite(values[1:]) & (values[1:] != 7), values[1:], np.nan)
    np.testing.assert_array_equal(read_back, expected)
    naip = load_sensor("naip")
    optical = write_scene(tmp_path / "optical.tif", values_of((4, 9, 9)), nodata=3)
    with Scene(optical, None, naip) as scene:
        assert scene.bands == naip.band_names
        assert scene.no_data == (3.0, *naip.no_data)


def test_pixels_that_a_mask_hides_were_not_measured(tmp_path: Path) -> None:
    """Of a mask in the file; a band that is called alpha may be the near infrared, and hides nothing."""
    hidden = np.zeros((40, 50), bool)
    hidden[5:20, 7:33] = True
    values = values_of((4, 40, 50), "uint8")
    values[3] = np.where(hidden, 0, 255)
    path = write_scene(tmp_path / "scene.tif", values[:3])
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(~hidden)
    with Scene(path, [2, 1]) as scene:
        np.testing.assert_array_equal(scene.read((0, 0, 40, 50)).isnan(), np.broadcast_to(hidden, (2, 40, 50)))
        part = scene.read((4, 6, 10, 20)).numpy()
        predict_scene(scene, three_classes, NAMES, tmp_path / "o.tif", TILING, RUN)
    np.testing.assert_array_equal(part[0], np.where(hidden, np.nan, values[1])[4:14, 6:26])
    np.testing.assert_array_equal(read(tmp_path / "o.tif")[0] == 255, hidden)

    path = write_scene(tmp_path / "rgba.tif", values, photometric="RGB", alpha="YES")
    with rasterio.open(path) as file:
        assert rasterio.enums.MaskFlags.alpha in file.mask_flag_enums[0]
    with Scene(path, [1, 2, 3]) as scene:
        np.testing.assert_array_equal(scene.read((0, 0, 40, 50)), values[:3])


def test_a_mask_of_each_band_hides_its_own_pixels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Beside the file, as GDAL writes it; one that cannot be read is refused, where GDAL would go on without."""
    path, beside = write_scene(tmp_path / "scene.tif", values_of((3, 40, 50), "uint8")), tmp_path / "scene.tif.msk"
    shown = np.full((3, 40, 50), 255, "uint8")
    shown[0, :5] = shown[2, :, :7] = 0
    with Scene(path) as scene:
        before = scene.digest()
    write_scene(beside, shown)
    with rasterio.open(beside, "r+") as file:
        file.update_tags(**{f"INTERNAL_MASK_FLAGS_{i}": "0" for i in (1, 2, 3)})
    for bands in ([1, 2, 3], [3, 2], [2]):
        with Scene(path, bands) as scene:
            hidden = scene.read((0, 0, 40, 50)).isnan().numpy()
            assert scene.digest() != before
        np.testing.assert_array_equal(hidden, shown[[band - 1 for band in bands]] == 0)
    capfd.readouterr()
    for junk in (b"junk" * 100, b"II*\0junkjunkjunk"):
        beside.write_bytes(junk)
        with pytest.raises(
            OSError, match=r"scene\.tif\.msk cannot be read as the mask of scene\.tif: mend it, or move"
        ):
            Scene(path)
    assert capfd.readouterr().err == ""


def test_what_speaks_against_the_values(tmp_path: Path) -> None:
    sensor = load_sensor("sentinel2_l2a")
    values = values_of((2, 9, 9))

    def doubts(values: NDArray[Any], scale: float = 1.0, offset: float = 0.0) -> list[str]:
        path = write_scene(tmp_path / "scene.tif", values)
        with rasterio.open(path, "r+") as file:
            file.scales, file.offsets = (1.0, scale), (0.0, offset)
        with Scene(path) as scene:
            return scene.doubts(sensor, 10.0)

    assert doubts(values) == doubts(values.astype("int16")) == []
    assert doubts(values, sensor.scale, sensor.offset) == []
    (narrow,) = doubts(values.astype("uint8"))
    assert "scene.tif holds uint8, and sentinel2_l2a is stored as uint16" in narrow
    (wide,) = doubts(values.astype("int32"))
    assert "scene.tif holds int32, and sentinel2_l2a is stored as uint16" in wide
    with Scene(write_scene(tmp_path / "scene.tif", values)) as scene:
        (pictures,) = scene.doubts(load_sensor("rgb"), 10.0)
    assert "scene.tif holds uint16, and rgb is stored as uint8" in pictures
    (tagged,) = doubts(values, 0.5, -1000.0)
    assert "scaled by 0.5, with an offset of -1000; sentinel2_l2a has 0.0001 and" in tagged
    assert len(doubts(values.astype("float32"), 0.5)) == 2


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({}, []),
        ({"transform": from_origin(600_000.0, 5_000_000.0, 14.0, 14.0)}, []),
        ({"transform": from_origin(600_000.0, 5_000_000.0, 30.0, 30.0)}, ["pixels of 30 m, and the model was trained"]),
        ({"transform": from_origin(600_000.0, 5_000_000.0, 2.0, 2.0)}, ["pixels of 2 m, .* on ones of 10 m"]),
        ({"crs": "EPSG:4326", "transform": from_origin(9.0, 60.0, 1e-4, 1e-4)}, []),  # 8 m, the root of an area
        ({"crs": "EPSG:4326", "transform": from_origin(9.0, 60.0, 1e-3, 1e-3)}, ["pixels of 78.* m"]),
        ({"crs": "EPSG:4326", "transform": from_origin(9.0, 200.0, 1e-4, 1e-4)}, ["is no place on Earth"]),
    ],
)
def test_pixels_of_another_size_are_doubted(tmp_path: Path, place: dict[str, Any], expected: list[str]) -> None:
    path = write_scene(tmp_path / "scene.tif", values_of((2, 9, 9)), **place)
    with Scene(path) as scene:
        found = scene.doubts(load_sensor("sentinel2_l2a"), 10.0)
    assert len(found) == len(expected)
    for text, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, text), text


def test_a_scene_without_a_place_has_no_size(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "scene.tif", values_of((2, 9, 9)), crs=None, transform=None)
    with pytest.warns(UserWarning, match="no coordinate reference system"), Scene(path) as scene:
        assert scene.doubts(load_sensor("sentinel2_l2a"), 10.0) == []


def test_a_scene_of_nothing(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "scene.tif", np.zeros((2, 20, 30), "uint8"), nodata=0)

    def never(pixels: Tensor) -> Tensor:
        raise AssertionError

    nothing = r"scene\.tif: nothing of it was measured"
    with Scene(path) as scene:
        with pytest.warns(UserWarning, match=nothing):
            predict_scene(scene, never, NAMES, tmp_path / "o.tif", TILING, RUN)
        with pytest.warns(UserWarning, match=nothing):
            embed_scene(scene, never, 6, tmp_path / "o.tiff", PATCHES, RUN)
        pytest.importorskip("pyarrow")
        with pytest.warns(UserWarning, match=nothing):
            embed_scene(scene, never, 6, tmp_path / "o.parquet", PATCHES, RUN)
    assert (read(tmp_path / "o.tif") == 255).all()
    assert len(pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "o.parquet")) == 0


def test_bands_may_be_read_some_after_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = values_of((7, 20, 30), "float64")
    values[2, 3, 4], values[3, 4, 5], values[6, 0, 0] = -9999, 1e300, np.nan
    with Scene(write_scene(tmp_path / "scene.tif", values, nodata=-9999)) as scene:
        whole = scene.read((2, 3, 10, 20))
        for n_values in (1, 400, 700, 100_000):
            monkeypatch.setattr("ssl_eo.adapt.scenes._MAX_VALUES", n_values)
            assert torch.equal(scene.read((2, 3, 10, 20)).nan_to_num(-1.0), whole.nan_to_num(-1.0))
    expected = np.where((values == -9999) | (values > 1e38) | np.isnan(values), np.nan, values)[:, 2:12, 3:23]
    np.testing.assert_array_equal(whole, expected.astype("float32"))


def test_many_classes(tmp_path: Path) -> None:
    values = values_of((1, 9, 9))
    names = [f"the class with the number {i}" for i in range(256)]
    with Scene(write_scene(tmp_path / "scene.tif", values)) as scene:
        tiling = Tiling(8, batch_size=4)
        counts = predict_scene(
            scene,
            lambda x: functional.one_hot(x[:, 0].long(), 256).movedim(3, 1).float(),
            names,
            tmp_path / "o.tif",
            tiling,
            RUN,
        )
    with rasterio.open(tmp_path / "o.tif") as file:
        assert (file.dtypes, file.nodata) == (("uint16",), 65535)
        np.testing.assert_array_equal(file.read(), values)
        assert file.tags()["CLASS_255"] == names[255]
    assert counts == [*np.bincount(values.reshape(-1), minlength=256).tolist(), 0]
    with pytest.raises(ValueError, match="1 to 65535 classes, got 70000"):
        class_map(tmp_path / "o.tif", ["a"] * 70_000, {})


def test_a_rotated_scene_stays_so(tmp_path: Path) -> None:
    turned = Affine(8.7, -4.2, 600_000.0, 5.1, 8.9, 5_000_000.0)
    values = values_of((2, 33, 21))
    with Scene(write_scene(tmp_path / "scene.tif", values, transform=turned)) as scene:
        predict_scene(scene, three_classes, NAMES, tmp_path / "o.tif", TILING, RUN)
        embed_scene(scene, patch_means, 6, tmp_path / "e.tif", PATCHES, RUN)
        rows, columns = np.array([0, 5]), np.array([2, 3])
        x, y = scene.grid.coarser(4).centres(rows, columns)
    with rasterio.open(tmp_path / "o.tif") as file:
        assert file.transform.almost_equals(turned, 1e-9)
    with rasterio.open(tmp_path / "e.tif") as file:
        assert file.transform.almost_equals(scaled(turned, 4), 1e-9)
        np.testing.assert_allclose((x, y), file.xy(rows, columns))


def test_a_scene_without_a_reference_system(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "scene.tif", values_of((2, 20, 20)), crs=None, transform=None)
    with pytest.warns(UserWarning, match=r"scene\.tif has no coordinate reference system") as warned:
        scene = Scene(path)
    assert len(warned) == 1
    with scene, warnings.catch_warnings():
        warnings.simplefilter("error")
        predict_scene(scene, three_classes, NAMES, tmp_path / "o.tif", TILING, RUN)
        embed_scene(scene, patch_means, 6, tmp_path / "o.parquet", PATCHES, RUN)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        file = rasterio.open(tmp_path / "o.tif")
    with file:
        assert (file.crs, file.transform) == (None, Affine.identity())


@pytest.mark.parametrize("transform", [None, Affine(math.nan, 0, math.nan, 0, -10, 1), Affine(math.inf, 0, 0, 0, 1, 0)])
def test_pixels_without_a_place_in_the_reference_system(transform: Affine | None, tmp_path: Path) -> None:
    """Nothing is written of a place that is no number, nor of a system in which nothing has a place."""
    path = write_scene(tmp_path / "scene.tif", values_of((2, 20, 20)), transform=transform)
    with pytest.warns(UserWarning, match="does not say where in its coordinate reference system its pixels lie"):
        scene = Scene(path)
    with scene, warnings.catch_warnings():
        warnings.simplefilter("error")  # it was told once
        predict_scene(scene, three_classes, NAMES, tmp_path / "o.tif", TILING, RUN)
        assert scene.doubts(load_sensor("sentinel2_l2a"), 10.0) == []
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "o.tif") as file:
            assert file.crs is None
            assert file.transform.is_identity


def test_bands_are_chosen_by_name_or_number(tmp_path: Path) -> None:
    values = values_of((4, 9, 11))
    box = (2, 3, 4, 5)

    def seen(*args: Any, **options: Any) -> list[int]:
        """Which bands of the file are read."""
        with Scene(*args, **options) as scene:
            found = scene.read(box).numpy()
        cut = values[:, 2:6, 3:8]
        return [next(i for i in range(4) if (cut[i] == band).all()) for band in found]

    path = write_scene(tmp_path / "plain.tif", values)
    named = write_scene(tmp_path / "named.tif", values, descriptions=("B08", "B04", "B03", "B02"))
    twice = write_scene(tmp_path / "twice.tif", values, descriptions=("x", "x", "y", "z"))
    naip = load_sensor("naip")
    assert seen(path) == [0, 1, 2, 3]
    assert seen(path, [4, 1]) == [3, 0]
    assert seen(path, ["c", "a"], file_bands=("a", "b", "c", "d")) == [2, 0]
    assert seen(path, [naip.band_names[2]], naip) == [2]
    assert seen(named, ["B02", "B03"], naip) == [3, 2]  # what the file says comes first
    assert seen(named, ["b", 1], file_bands=("a", "b", "c", "d")) == [1, 0]
    assert seen(twice, ["y", 1]) == [2, 0]
    for args, options, match in (
        ((path, ["B02"]), {}, r"plain\.tif holds 4 bands and does not name them, so none is 'B02': give .*--bands"),
        ((path, ["B02"], load_sensor("sentinel2_l2a")), {}, "holds 4 bands and does not name them"),
        ((path, ["a"]), {"file_bands": ("a", "b")}, "holds 4 bands, file_bands names 2: name all, in file order"),
        ((named, ["B03", "B8"]), {}, r"no band 'B8'; did you mean 'B08'\? \(it holds B08, B04, B03, B02\)"),
        ((path, [5]), {}, "has no band 5: it holds bands 1 to 4"),
        ((path, [0]), {}, "has no band 0"),
        ((path, []), {}, "none of .* is named"),
        ((twice, ["x"]), {}, r"several bands 'x': give their numbers in bands \(--bands\)"),
        ((path, [1, 2, 1]), {}, r"--bands.*: band 1 of .*plain\.tif is named more than once"),
        ((named, ["B03", 3]), {}, r"band 3 of .*named\.tif is named more than once"),
    ):
        with pytest.raises(ValueError, match=match):
            Scene(*args, **options)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in (tmp_path / "none.tif", "http://127.0.0.1:9/none.tif", "/vsicurl/http://127.0.0.1:9/none.tif"):
        with pytest.raises(ValueError, match=r"none\.tif: there is no such file \(a scene is read from a disk"):
            Scene(Path(name))
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(OSError, match=r"text\.tif is not a readable GeoTIFF"):
        Scene(tmp_path / "text.tif")
    path = write_scene(tmp_path / "scene.tif", values_of((2, 80, 80)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 3000])

    def predict() -> None:
        with Scene(path) as scene:
            predict_scene(scene, three_classes, NAMES, tmp_path / "o.tif", TILING, RUN)

    with pytest.raises(OSError, match=r"scene\.tif is (truncated or damaged|not a readable GeoTIFF)") as caught:
        predict()
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.tif", "text.tif"]


def test_paths_that_are_taken(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "scene.tif", values_of((2, 20, 20)))
    content = path.read_bytes()
    os.link(path, tmp_path / "link.tif")
    (tmp_path / "folder.tif").mkdir()
    with Scene(path) as scene:

        def predict(out: Path, probabilities: Path | None = None, run: SceneRun = RUN) -> None:
            predict_scene(scene, three_classes, NAMES, out, TILING, run, probabilities)

        anyhow = SceneRun({}, overwrite=True)
        for out in (path, tmp_path / "folder.tif" / ".." / "scene.tif", tmp_path / "link.tif"):
            with pytest.raises(ValueError, match=r"\.tif is the scene itself: give another path"):
                predict(out, run=anyhow)
        with pytest.raises(ValueError, match="is the scene itself"):
            predict(tmp_path / "o.tif", path, anyhow)
        with pytest.raises(ValueError, match="outputs must differ"):
            predict(tmp_path / "o.tif", tmp_path / "o.tif")
        with pytest.raises(ValueError, match=r"folder\.tif is a folder"):
            predict(tmp_path / "folder.tif")
        (tmp_path / "o.tif").write_text("mine")
        with pytest.raises(ValueError, match=r"o\.tif exists already; give another path, or overwrite it"):
            predict(tmp_path / "o.tif")
        assert (tmp_path / "o.tif").read_text() == "mine"
        (tmp_path / "o.tif.partial").write_text("mine too")
        predict(tmp_path / "o.tif", run=anyhow)
        assert [p.read_text() for p in tmp_path.glob("*.partial")] == ["mine too"]
        (tmp_path / "dangling.tif").symlink_to(tmp_path / "gone.tif")
        with pytest.raises(ValueError, match=r"dangling\.tif exists already; .*--overwrite"):
            predict(tmp_path / "dangling.tif")
        os.mkfifo(tmp_path / "pipe.tif")
        with pytest.raises(ValueError, match=r"pipe\.tif is no regular file"):
            predict(tmp_path / "pipe.tif", run=anyhow)
        assert read(tmp_path / "o.tif").shape == (1, 20, 20)
        predict(tmp_path / "new" / "o.tif", tmp_path / "other" / "p.tif")
        assert read(tmp_path / "other" / "p.tif").shape == (3, 20, 20)
        with pytest.raises(ValueError, match=r"o\.png: features are written to a \.tif or a \.parquet file"):
            embed_scene(scene, patch_means, 6, tmp_path / "o.png", PATCHES, RUN)
    assert path.read_bytes() == content


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    with Scene(write_scene(tmp_path / "scene.tif", values_of((2, 20, 20)))) as scene:
        out = tmp_path / "o.tif"
        with pytest.raises(ValueError, match="the model gives 3 values of a cell, expected 2"):
            predict_scene(scene, three_classes, ("a", "b"), out, TILING, RUN)
        with pytest.raises(ValueError, match=r"the model gave \[4, 6, 4, 4\] for 4 windows, expected \[4, K, 16, 16\]"):
            embed_scene(scene, patch_means, 6, out, Tiling(16, batch_size=5), RUN)
        with pytest.raises(ValueError, match="allowed are 0: allow more"):
            embed_scene(scene, patch_means, 6, out, PATCHES, SceneRun({}, memory_bytes=1000))
        with pytest.raises(ValueError, match=r"o\.tif: values above 65504 do not fit float16; write float32"):
            embed_scene(scene, lambda x: 1e6 * patch_means(x), 6, out, PATCHES, RUN, "float16")
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]  # nothing was finished, nothing is kept


class Killed(Exception):
    pass


def counting(model: Callable[[Tensor], Tensor], stop_after: int, stop: Callable[[], None]) -> tuple[Any, list[int]]:
    """`model`, which counts windows, and stops before more than so many of them."""
    seen = [0]

    def counted(pixels: Tensor) -> Tensor:
        if seen[0] + len(pixels) > stop_after:
            stop()
        seen[0] += len(pixels)
        return model(pixels)

    return counted, seen


def raise_killed() -> None:
    raise Killed


@pytest.mark.parametrize("name", ["o.tif", "o.parquet"])
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, name: str) -> None:
    if name == "o.parquet":
        pytest.importorskip("pyarrow")
    path = write_scene(tmp_path / "scene.tif", values_of((2, 150, 203)))
    told: list[tuple[int, int]] = []
    with Scene(path) as scene:
        run = small_panels(scene, PATCHES, 6, progress=lambda done, total: told.append((done, total)))
        model, all_seen = counting(patch_means, 10**9, raise_killed)
        embed_scene(scene, model, 6, tmp_path / f"whole_{name}", PATCHES, run)
        total = all_seen[0]
        assert told[-1] == (total, total)
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        told.clear()

        out = tmp_path / name
        model, first = counting(patch_means, total // 2, raise_killed)
        with pytest.raises(Killed) as killed:
            embed_scene(scene, model, 6, out, PATCHES, run)
        assert not out.exists()
        n_kept = len(list((tmp_path / f"{name}.panels").glob("*.npy")))
        assert n_kept >= 2
        (note,) = killed.value.__notes__
        assert re.fullmatch(rf"{n_kept} of \d+ panels are kept in {out}\.panels; the same command goes on", note)
        told.clear()
        model, second = counting(patch_means, 10**9, raise_killed)
        embed_scene(scene, model, 6, out, PATCHES, run)
        assert 0 < second[0] < total
        assert first[0] + second[0] < total + total // 4  # what is done twice is less than one panel
        assert told[0][0] > 0  # what the first had done counts from the beginning
        assert told[-1] == (total, total)
    assert out.read_bytes() == (tmp_path / f"whole_{name}").read_bytes()
    assert not (tmp_path / f"{name}.panels").exists()


@pytest.mark.parametrize("changed", ["scene.tif", "scene.tif.msk"])
def test_a_scene_that_is_changed_meanwhile_gives_no_map(tmp_path: Path, changed: str) -> None:
    path = write_scene(tmp_path / "scene.tif", values_of((2, 150, 203)))

    def write_more() -> None:
        with (tmp_path / changed).open("ab") as file:
            file.write(b"more")

    with Scene(path) as scene:
        run = small_panels(scene, PATCHES, 6)
        model, _ = counting(patch_means, 3, write_more)
        message = r"scene\.tif was changed while it was read, so .* of two: run again"
        with pytest.raises(ValueError, match=message) as caught:
            embed_scene(scene, model, 6, tmp_path / "o.tif", PATCHES, run)
    assert not hasattr(caught.value, "__notes__")  # that nothing was finished would be wrong
    assert {entry.name for entry in tmp_path.iterdir()} == {"scene.tif", changed}


def predict_and_die(path: Path, out: Path, stop_after: int) -> None:
    model, _ = counting(three_classes, stop_after, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with Scene(path) as scene:
        predict_scene(scene, model, NAMES, out, TILING, small_panels(scene, TILING, 3), out.with_name("p.tif"))


def test_a_killed_process_leaves_no_half_file(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "scene.tif", values_of((2, 70, 110)))
    out = tmp_path / "o.tif"
    process = mp.get_context("fork").Process(target=predict_and_die, args=(path, out, 60))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.tif.panels", "scene.tif"]
    model, seen = counting(three_classes, 10**9, raise_killed)
    with Scene(path) as scene:
        run = small_panels(scene, TILING, 3)
        counts = predict_scene(scene, model, NAMES, out, TILING, run, tmp_path / "p.tif")
        again, all_seen = counting(three_classes, 10**9, raise_killed)
        whole = predict_scene(scene, again, NAMES, tmp_path / "whole.tif", TILING, run, tmp_path / "whole_p.tif")
    assert counts == whole  # panels of the first run count
    assert 0 < seen[0] < all_seen[0]
    assert out.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert (tmp_path / "p.tif").read_bytes() == (tmp_path / "whole_p.tif").read_bytes()
    assert not list(tmp_path.glob("*.panels"))


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, Path, SceneRun]:
    """A scene, the output of a run that was stopped, and how it was run."""
    path, out = write_scene(tmp_path / "scene.tif", values_of((2, 150, 203))), tmp_path / "o.tif"
    model, _ = counting(patch_means, 400, raise_killed)
    with Scene(path) as scene:
        run = small_panels(scene, PATCHES, 6)
        with pytest.raises(Killed):
            embed_scene(scene, model, 6, out, PATCHES, run)
    return path, out, run


def test_panels_of_something_else_are_refused(stopped: tuple[Path, Path, SceneRun], tmp_path: Path) -> None:
    path, out, run = stopped

    def embed(**options: Any) -> None:
        with Scene(options.pop("path", path), options.pop("bands", None)) as scene:
            args = {"tiling": PATCHES, "run": run, **options}
            embed_scene(scene, patch_means, 6, out, **args)

    other = write_scene(tmp_path / "other.tif", values_of((2, 150, 203), seed=1))
    for key, options in (
        ("scene", {"path": other}),
        ("bands", {"bands": [2, 1]}),
        ("model", {"run": SceneRun({"sha256": "cd"}, memory_bytes=run.memory_bytes)}),
        ("tiling", {"tiling": Tiling(16, 0.25, patch_px=4, cell_px=4, batch_size=5)}),
        ("outputs", {"dtype": "float16"}),
        ("panel_side", {"run": SceneRun(run.facts)}),
    ):
        with pytest.raises(ValueError, match=rf"o\.tif\.panels holds panels of a run with another {key} \(.*, now"):
            embed(**options)
    kept = sorted((tmp_path / "o.tif.panels").glob("*.npy"))
    content = kept[0].read_bytes()
    kept[0].write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"0_000000\.npy is damaged \(.*\): remove it, and run again"):
        embed()
    np.save(kept[0], np.load(kept[1])[..., 1:])
    with pytest.raises(ValueError, match=r"0_000000\.npy is damaged \(its shape is .*\): remove it, and run again"):
        embed()
    kept[0].unlink()
    (tmp_path / "o.tif.panels" / "inputs.json").write_text("{")
    with pytest.raises(ValueError, match=r"inputs\.json cannot be read .*, or remove .*o\.tif\.panels"):
        embed()
    assert not out.exists()
    shutil.rmtree(tmp_path / "o.tif.panels")
    embed()
    np.testing.assert_array_equal(read(out), blend(as_tensor(read(path)), patch_means, PATCHES))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("notes.txt", "precious", r"o\.tif\.panels holds 'notes\.txt', which no run of this command has made"),
        ("0_000000.npy/notes.txt", "precious", "holds '0_000000.npy', which no run"),
        ("inputs.json", '{"mine": 1}', r"inputs\.json was not written by a run of this command"),
        ("inputs.json", "[1]", "was not written by a run"),
        ("inputs.json", '{"format": "panels 2", "token": "/../../mine"}', r"inputs\.json is damaged \(token"),
        ("0_000000.npy", "precious", r"o\.tif\.panels holds panels, and no inputs\.json that says of which run"),
    ],
)
def test_a_folder_that_is_not_of_a_run_stays_as_it_is(tmp_path: Path, name: str, content: str, match: str) -> None:
    file = tmp_path / "o.tif.panels" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with Scene(write_scene(tmp_path / "scene.tif", values_of((2, 20, 20)))) as scene:
        with pytest.raises(ValueError, match=match):
            predict_scene(scene, three_classes, NAMES, tmp_path / "o.tif", TILING, SceneRun({}, overwrite=True))
        assert file.read_text() == content
        assert len(list((tmp_path / "o.tif.panels").iterdir())) == 1  # nothing was added, not even a lock
        (tmp_path / "link.tif.panels").symlink_to(tmp_path / "o.tif.panels")
        with pytest.raises(ValueError, match=r"link\.tif\.panels is a link"):
            predict_scene(scene, three_classes, NAMES, tmp_path / "link.tif", TILING, RUN)
    assert len(list((tmp_path / "o.tif.panels").iterdir())) == 1


def test_what_is_put_there_meanwhile_stays(tmp_path: Path) -> None:
    """A file in the folder of panels, and one in the place of the output."""
    out, notes = tmp_path / "o.tif", tmp_path / "o.tif.panels" / "notes.txt"

    def with_notes(pixels: Tensor) -> Tensor:
        notes.write_text("precious")
        return three_classes(pixels)

    def with_output(pixels: Tensor) -> Tensor:
        (tmp_path / "p.tif").write_text("mine")
        return three_classes(pixels)

    with Scene(write_scene(tmp_path / "scene.tif", values_of((2, 20, 20)))) as scene:
        with pytest.warns(UserWarning, match=r"o\.tif\.panels stays"):
            predict_scene(scene, with_notes, NAMES, out, TILING, RUN)
        assert read(out).shape == (1, 20, 20)
        assert [p.name for p in notes.parent.iterdir()] == ["notes.txt"]
        with pytest.raises(ValueError, match=r"p\.tif exists already"):
            predict_scene(scene, with_output, NAMES, tmp_path / "p.tif", TILING, RUN)
    assert (tmp_path / "p.tif").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_kill_leaves_of_an_output_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that goes on writes to the same unfinished file, so none stays."""
    out = tmp_path / "o.tif"
    with Scene(write_scene(tmp_path / "scene.tif", values_of((2, 20, 20)))) as scene:
        with monkeypatch.context() as patched:
            patched.setattr("ssl_eo.adapt.scene_maps.sync", lambda path: raise_killed())
            patched.setattr("pathlib.Path.unlink", lambda path, missing_ok=False: None)  # a killed process removes none
            with pytest.raises(Killed):
                predict_scene(scene, three_classes, NAMES, out, TILING, RUN)
        (left,) = tmp_path.glob("o.tif.????????.partial")
        left.write_bytes(left.read_bytes()[:50])
        never, _ = counting(three_classes, 0, raise_killed)
        predict_scene(scene, never, NAMES, out, TILING, RUN)
    assert read(out).shape == (1, 20, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.tif", "scene.tif"]


def test_a_batch_of_another_size_may_go_on(stopped: tuple[Path, Path, SceneRun]) -> None:
    path, out, run = stopped
    with Scene(path) as scene:
        fewer = Tiling(16, 0.5, patch_px=4, cell_px=4, batch_size=4)
        embed_scene(scene, patch_means, 6, out, fewer, run)
    np.testing.assert_array_equal(read(out), blend(as_tensor(read(path)), patch_means, PATCHES))


def test_two_processes_do_not_write_one_file(stopped: tuple[Path, Path, SceneRun]) -> None:
    path, out, run = stopped
    in_use = pytest.raises(ValueError, match=r"o\.tif\.panels is in use by another process")
    with locked_folder(out.with_name("o.tif.panels"), "none"), Scene(path) as scene, in_use:
        embed_scene(scene, patch_means, 6, out, PATCHES, run)


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """A disk that is full, as far as a process can tell."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [150, 10_000, 240_000])
def test_no_room_for_a_panel(tmp_path: Path, limit: int) -> None:
    path = write_scene(tmp_path / "scene.tif", values_of((2, 400, 410)))  # its only panel has 247 kB
    with Scene(path) as scene:
        with (
            files_of_at_most(limit),
            pytest.raises(OSError, match=r"o\.tif\.panels.* could not be written: File") as caught,
        ):
            embed_scene(scene, patch_means, 6, tmp_path / "o.tif", PATCHES, RUN)
        assert "\n" not in str(caught.value)
        nothing = "no panel of 1 is finished, so the same command begins with the first"
        is_begun = limit > 150  # else not even that could be written down
        assert getattr(caught.value, "__notes__", []) == ([nothing] if is_begun else [])
        assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]


@pytest.mark.parametrize("name", ["o.tif", "o.parquet"])
def test_no_room_for_the_output(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many bytes of it fit: there is no output, one line says so, and the panels are kept."""
    if name == "o.parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / name
    with Scene(write_scene(tmp_path / "scene.tif", values_of((2, 150, 203)))) as scene:
        embed_scene(scene, patch_means, 6, tmp_path / f"whole_{name}", PATCHES, RUN)
        whole = (tmp_path / f"whole_{name}").read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr("ssl_eo.adapt.scene_maps._write_outputs", lambda *args: raise_killed())
            with pytest.raises(Killed):
                embed_scene(scene, patch_means, 6, out, PATCHES, RUN)
        never, _ = counting(patch_means, 0, raise_killed)
        for limit in (len(whole) - 1, len(whole) - 300, len(whole) // 2, 300):
            with files_of_at_most(limit), pytest.raises(OSError, match=rf"{name} could not be written: ") as caught:
                embed_scene(scene, never, 6, out, PATCHES, RUN)
            assert not re.search(r"\n|Errno None", str(caught.value))
            assert not out.exists()
            assert not list(tmp_path.glob("*.partial"))
        embed_scene(scene, never, 6, out, PATCHES, RUN)
    assert out.read_bytes() == whole


def peak_bytes(path: Path, out: Path, n_classes: int, memory: int, results: Any) -> None:
    """How much more memory the process held at the worst moment of a prediction than before it."""

    def model(pixels: Tensor) -> Tensor:
        return pixels[:, :1].expand(-1, n_classes, -1, -1)

    def predict(name: str, scene: Scene) -> None:
        run = SceneRun({}, memory_bytes=memory)
        predict_scene(scene, model, ["c"] * n_classes, out.with_name(name), Tiling(32, batch_size=16), run)

    small = write_scene(out.with_name("small.tif"), values_of((1, 90, 90), "uint8"))
    with Scene(small) as scene:
        predict("warm.tif", scene)  # modules and pools of memory are there
    with Scene(path) as scene:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
        before = status_bytes("VmRSS")
        predict(out.name, scene)
        results.put(status_bytes("VmHWM") - before)


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("shape", [(40, 20_000), (20_000, 40), (900, 900)])
def test_memory_is_bounded_by_the_window(tmp_path: Path, shape: tuple[int, int]) -> None:
    """A wide, a long and a square scene of 800,000 pixels and 24 classes, which together take 77 MB."""
    n_classes, memory = 24, 16 << 20
    path = write_scene(tmp_path / "scene.tif", np.full((1, *shape), 7, "uint8"))
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    args = (path, tmp_path / "o.tif", n_classes, memory, results)
    process = context.Process(target=peak_bytes, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    side = panel_side(shape, Tiling(32, batch_size=16), 1, n_classes, memory)
    bound = panel_bytes(side, shape, Tiling(32, batch_size=16), 1, n_classes)
    whole = 4 * n_classes * shape[0] * shape[1]
    assert bound <= memory < whole / 4
    assert results.get() <= bound + (8 << 20)  # blocks of GDAL, those of a map of 0.8 MB among them
    assert read(tmp_path / "o.tif").shape == (1, *shape)


def tiny_bundle(sensor_name: str, bands: Sequence[str], mean: float, std: float) -> BundleEncoder:
    sensor = load_sensor(sensor_name)
    cfg = EncoderConfig(size="tiny", depth=2, patch_size=8, image_size=32, patch_embed="conv")
    encoder = Encoder(cfg, len(bands))
    torch.manual_seed(0)
    encoder.init_weights()
    n = len(bands)
    given = SensorInput(sensor, tuple(bands), (mean,) * n, (std,) * n, sensor.bands[0].gsd_m)
    return BundleEncoder(encoder, {sensor_name: given}, {}).eval()


def patch_features(bundle: BundleEncoder) -> Callable[[Tensor], Tensor]:
    def features(values: Tensor) -> Tensor:
        tokens = bundle.forward_features(values)
        patches = tokens.patches.movedim(1, 2)  # [B, D, N]
        return patches.reshape(*patches.shape[:2], *tokens.grid)

    return features


REAL = (
    ("s1_s2_pairs/sen1floods11/S2/Spain_7370579_S2Hand.tif", "sentinel2_l1c", (13, 512, 512)),
    ("s1_s2_pairs/sen1floods11/S1/Spain_7370579_S1Hand.tif", "sentinel1_grd", (2, 512, 512)),
    ("treesatai_ts/aerial", "naip", (4, 304, 304)),
    ("hyspecnet11k", None, (224, 128, 128)),
)


@pytest.mark.parametrize(("name", "sensor", "shape"), REAL, ids=[name.split("/")[-1] for name, *_ in REAL])
def test_real_rasters_come_back(
    real_samples: Callable[[str], Path], tmp_path: Path, name: str, sensor: str | None, shape: tuple[int, int, int]
) -> None:
    """Identity on every pixel, mean of every patch; the grid is the scene's."""
    path = real_samples(name)
    path = path if path.is_file() else next(p for p in sorted(path.rglob("*.[tT][iI][fF]")) if "QL_" not in p.name)
    tiling = Tiling(96, 0.25, "gaussian")
    known = None if sensor is None else load_sensor(sensor)
    with Scene(path, sensor=known) as scene, rasterio.open(path) as file:
        assert (scene.n_bands, *scene.shape) == shape
        run = SceneRun({}, memory_bytes=200 << 20)
        out = value_map(tmp_path / "o.tif", shape[0], "float32", (), {})
        if shape[0] < 20:
            map_scene(scene, Windowed(lambda x: x.nan_to_num(0.0), shape[0], tiling), [out], run)
            np.testing.assert_allclose(np.nan_to_num(read(tmp_path / "o.tif")), scene_values(scene), rtol=1e-6)
        cells = Tiling(64, 0.5, patch_px=8, cell_px=8)
        embed_scene(
            scene, lambda x: functional.avg_pool2d(x.nan_to_num(0.0), 8), shape[0], tmp_path / "e.tif", cells, run
        )
        means = functional.avg_pool2d(torch.from_numpy(scene_values(scene)), 8)
        np.testing.assert_allclose(np.nan_to_num(read(tmp_path / "e.tif")), means, rtol=1e-4, atol=1e-4)
        with rasterio.open(tmp_path / "e.tif") as embedded:
            assert embedded.crs == file.crs
            assert embedded.transform.almost_equals(scaled(file.transform, 8), 1e-12)
            np.testing.assert_allclose(embedded.bounds, file.bounds)


def scene_values(scene: Scene) -> NDArray[Any]:
    """All stored values, 0 where nothing was measured, by rasterio alone."""
    values = read(scene.path).astype("float32")
    missing = ~np.isfinite(values) | np.isin(values, scene.no_data)
    return np.where(missing, 0.0, values).astype("float32")


def test_real_scene_through_an_encoder(real_samples: Callable[[str], Path], tmp_path: Path) -> None:
    """An encoder takes what it is given as stored, holes included, and its features lie on the ground."""
    path = real_samples("s1_s2_pairs/sen1floods11/S2/Spain_7370579_S2Hand.tif")
    bands = ("B04", "B03", "B02", "B08")
    with rasterio.open(path) as file:
        profile, values = file.profile, file.read()
    values[:, :40, :60] = 0  # what the sensor lists as no-data
    with rasterio.open(tmp_path / "scene.tif", "w", **{**profile, "nodata": None}) as file:
        file.write(values)
    sensor = load_sensor("sentinel2_l1c")
    bundle = tiny_bundle("sentinel2_l1c", bands, 1500.0, 800.0)
    tiling = Tiling(128, 0.25, patch_px=8, cell_px=8)
    with Scene(tmp_path / "scene.tif", bands, sensor) as scene:
        embed_scene(scene, patch_features(bundle), 192, tmp_path / "o.tif", tiling, RUN, "float16")
    found = read(tmp_path / "o.tif")
    assert found.shape == (192, 64, 64)
    hole = np.zeros((64, 64), bool)
    hole[:5, :7] = True
    np.testing.assert_array_equal(np.isnan(found).any(0), hole)
    corner = as_tensor(values[list(sensor.index(bands)), 384:, 384:])[None]
    with torch.no_grad():
        alone = patch_features(bundle)(corner)[0]  # the last window: no other reaches its last patches
    np.testing.assert_allclose(found[:, 60:, 60:], alone[:, 12:, 12:], atol=5e-3)
