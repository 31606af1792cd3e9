from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

rasterio = pytest.importorskip("rasterio")

from archives.geotiff import tile_pixels, write_raster, write_sparse  # noqa: E402

from ssl_eo.config import build  # noqa: E402
from ssl_eo.data.plans import whole  # noqa: E402
from ssl_eo.data.sources._patterns import list_files, match_files, parse_date  # noqa: E402
from ssl_eo.data.sources._rasters import matching_box  # noqa: E402
from ssl_eo.data.sources._splits import cell_split  # noqa: E402
from ssl_eo.data.sources.geotiff import Config, Source  # noqa: E402
from ssl_eo.data.stacking import check_sample, cut_to_views  # noqa: E402
from ssl_eo.data.types import ViewPlan  # noqa: E402
from ssl_eo.sensors import load_sensor  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")

NAIP = load_sensor("naip").band_names
S2 = ["B02", "B03", "B04", "B08"]


def make(root: Path, *tiles: dict[str, Any], **options: Any) -> Source:
    cfg: Config = build(Config, {"root": str(root), "tiles": list(tiles), **options}, "source")
    return Source(cfg)


def naip_folder(root: Path, n: int = 3, size: int = 40, **options: Any) -> Path:
    for i in range(n):
        write_raster(root / f"scene{i}.tif", tile_pixels(i, (4, size, size), "uint16").astype("uint8"), **options)
    return root


def pairs_folder(root: Path, n: int = 3, size: int = 60) -> Path:
    """Optical at 10 m and 20 m and radar at 10 m of the same ground."""
    for i in range(n):
        corner = (600_000.0 + 50_000 * i, 5_000_000.0)
        date = f"2020060{i + 1}"
        fine, coarse = tile_pixels(i, (4, size, size)), tile_pixels(i, (6, size // 2, size // 2))
        write_raster(root / f"p{i}_{date}_10m.tif", fine, corner=corner)
        write_raster(root / f"p{i}_20m.tif", coarse, corner=corner, pixel=20.0)
        radar = tile_pixels(i, (2, size, size)).astype("float32") / -100
        write_raster(root / "radar" / f"p{i}.tif", radar, corner=corner, descriptions=("VH", "VV"), no_data=np.nan)
    return root


PAIR = (
    {"sensor": "sentinel2_l2a", "what": "10m", "pattern": "{key}_{date}_10m.tif", "bands": S2},
    {
        "sensor": "sentinel2_l2a",
        "what": "20m",
        "pattern": "{key}_20m.tif",
        "bands": ["B05", "B06", "B07", "B8A", "B11", "B12"],
    },
    {"sensor": "sentinel1_grd", "pattern": "radar/{key}.tif"},
)


def test_one_raster_a_place_is_read_whole(tmp_path: Path) -> None:
    source = make(naip_folder(tmp_path), {"sensor": "naip"})
    assert len(source) == 3
    assert source.schema["naip"].shape is None
    sample = source.read(1)
    check_sample(sample, source.schema)
    assert (sample.key, sample.label) == ("scene1", None)
    assert source.locate(1) == ("scene1", "scene1.tif")
    tile = sample.tiles["naip"]
    assert (tile.bands, tile.gsd_m, tile.date) == (NAIP, 10.0, None)
    np.testing.assert_array_equal(tile.array, tile_pixels(1, (4, 40, 40)).astype("uint8"))
    np.testing.assert_array_equal(tile.pixels[1:3, 5:9, 30:99], tile.array[1:3, 5:9, 30:])
    assert tile.pixels[:, 7:7, :].shape == (4, 0, 40)


def test_rasters_of_a_key_are_one_sample(tmp_path: Path) -> None:
    source = make(pairs_folder(tmp_path), *PAIR)
    assert list(source.schema) == ["sentinel2_l2a@10m", "sentinel2_l2a@20m", "sentinel1_grd"]
    assert source.schema["sentinel1_grd"].bands == ("VH", "VV")
    for i in range(3):
        sample = source.read(i)
        check_sample(sample, source.schema)
        assert {n: (t.gsd_m, t.array.shape) for n, t in sample.tiles.items()} == {
            "sentinel2_l2a@10m": (10.0, (4, 60, 60)),
            "sentinel2_l2a@20m": (20.0, (6, 30, 30)),
            "sentinel1_grd": (10.0, (2, 60, 60)),
        }
        assert sample.meta["date"] == sample.tiles["sentinel2_l2a@10m"].date == f"2020-06-0{i + 1}"
        with rasterio.open(tmp_path / f"p{i}_20m.tif") as file:
            longitude, latitude = file.lnglat()
        assert sample.meta["latitude"] == pytest.approx(latitude, abs=1e-9)
        assert sample.meta["longitude"] == pytest.approx(longitude, abs=1e-9)


def test_windows_lie_on_a_grid_and_on_the_same_ground(tmp_path: Path) -> None:
    source = make(pairs_folder(tmp_path), *PAIR, window_px=32, stride_px=14)
    assert len(source) == 3 * 9  # tops 0, 14, 28
    assert {n: s.shape for n, s in source.schema.items()} == {
        "sentinel2_l2a@10m": (32, 32),
        "sentinel2_l2a@20m": (16, 16),
        "sentinel1_grd": (32, 32),
    }
    sample = source.read(9 + 5)  # place 1, row 1, column 2
    check_sample(sample, source.schema)
    assert sample.key == source.locate(14)[0] == "p1_14_28"
    fine, coarse = (source.read(14).tiles[f"sentinel2_l2a@{w}"].array for w in ("10m", "20m"))
    np.testing.assert_array_equal(fine, tile_pixels(1, (4, 60, 60))[:, 14:46, 28:60])
    np.testing.assert_array_equal(coarse, tile_pixels(1, (6, 30, 30))[:, 7:23, 14:30])
    assert len({source.locate(i) for i in range(27)}) == 27
    with pytest.raises(IndexError):
        source.read(27)


def test_windows_between_the_pixels_of_a_coarser_tile_are_refused(tmp_path: Path) -> None:
    root = pairs_folder(tmp_path)
    for i in range(3):
        corner = (600_000.0 + 50_000 * i, 5_000_000.0)
        write_raster(root / f"p{i}_60m.tif", tile_pixels(i, (1, 10, 10)), corner=corner, pixel=60.0)
    coarse = {"sensor": "sentinel2_l2a", "what": "60m", "pattern": "{key}_60m.tif", "bands": ["B01"]}
    assert len(make(root, PAIR[0], coarse, window_px=30)) == 12
    with pytest.raises(ValueError, match=r"root: of 27 samples .* rows 4\.67:.*begin at whole pixels"):
        make(root, PAIR[0], coarse, window_px=32, stride_px=14)


def test_a_raster_smaller_than_the_window_is_kept_whole(tmp_path: Path) -> None:
    naip_folder(tmp_path, size=50)
    write_raster(tmp_path / "small.tif", tile_pixels(9, (4, 20, 50)).astype("uint8"))
    source = make(tmp_path, {"sensor": "naip"}, window_px=24)
    assert source.schema["naip"].shape is None
    samples = [source.read(i) for i in range(len(source))]
    assert [s.tiles["naip"].pixels.shape[1:] for s in samples] == [(24, 24)] * 12 + [(20, 24)] * 2
    cut = cut_to_views(samples[-1], [whole("naip", (20, 24), 32)], source.schema)
    np.testing.assert_array_equal(cut.tiles["naip"].pixels, tile_pixels(9, (4, 20, 50)).astype("uint8")[:, :, 24:48])


def test_a_huge_raster_is_never_read_whole(tmp_path: Path) -> None:
    block = tile_pixels(0, (13, 256, 256))
    write_sparse(tmp_path / "huge.tif", 20_000, (9984, 9984), block)
    given = tmp_path / "statistics.json"
    bands = load_sensor("sentinel2_l1c").band_names
    given.write_text(json.dumps({"bands": bands, "mean": [0] * 13, "std": [1] * 13}))
    tile = {"sensor": "sentinel2_l1c", "statistics": str(given)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = make(tmp_path, tile, window_px=256)
    assert len(source) == 78 * 78
    np.testing.assert_array_equal(source.read(39 * 78 + 39).tiles["sentinel2_l1c"].array, block)
    source = make(tmp_path, tile)
    sample = source.read(0)
    assert sample.tiles["sentinel2_l1c"].pixels.shape == (13, 20_000, 20_000)
    plan = ViewPlan("sentinel2_l1c", (9990.5, 9990.0, 64.0, 64.0), (32, 32))
    cut = cut_to_views(sample, [plan], source.schema).tiles["sentinel2_l1c"]
    np.testing.assert_array_equal(cut.pixels, block[:, 6:71, 6:70])
    assert cut.origin == (9990, 9990)
    with pytest.raises(ValueError, match=r"huge\.tif: 13 bands of 20000 x 20000 pixels are too many .* set window_px"):
        cut_to_views(sample, [whole("sentinel2_l1c", (20_000, 20_000), 32)], source.schema)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB; all of it is 10 GB


@pytest.mark.parametrize(
    ("crs", "corner", "pixel", "gsd_m"),
    [
        ("EPSG:32632", (600_000.0, 5_000_000.0), 10.0, 10.0),
        ("EPSG:4326", (10.0, 0.0), 1e-4, 11.094),  # on the equator: 11.132 by 11.057 m
        ("EPSG:4326", (10.0, 60.0), 1e-4, 7.885),  # 5.580 by 11.141 m
        ("EPSG:2263", (1_000_000.0, 200_000.0), 10.0, 3.048006),  # US survey feet
        ("EPSG:3857", (1_113_195.0, 8_399_738.0), 10.0, 5.009),  # Mercator at 60 degrees north
        ("EPSG:3035", (4_321_000.0, 3_210_000.0), 25.0, 25.0),
        (None, (0.0, 0.0), 1.0, 1.0),  # NAIP's
    ],
)
def test_ground_sampling_follows_the_crs(tmp_path: Path, crs: str, corner: Any, pixel: float, gsd_m: float) -> None:
    source = make(naip_folder(tmp_path, n=1, crs=crs, corner=corner, pixel=pixel), {"sensor": "naip"})
    sample = source.read(0)
    assert sample.tiles["naip"].gsd_m == pytest.approx(gsd_m, rel=2e-4)
    assert source.schema["naip"].gsd_m == sample.tiles["naip"].gsd_m
    assert ("latitude" in sample.meta) == (crs is not None)
    given = make(tmp_path, {"sensor": "naip", "gsd_m": 0.6})
    assert given.read(0).tiles["naip"].gsd_m == given.schema["naip"].gsd_m == 0.6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(1, 30), st.sampled_from([1, 2, 3, 6]), st.booleans())
def test_matching_boxes_cover_the_same_ground(start: int, n: int, ratio: int, is_coarser: bool) -> None:
    class Raster:
        """What `matching_box` asks of a rasterio dataset."""

        def __init__(self, pixel: float, size: int) -> None:
            self.transform = rasterio.transform.from_origin(500_000.0, 4e6, pixel, pixel)
            self.crs, self.height, self.width, self.name = "EPSG:32632", size, size, f"{pixel} m"

    fine, coarse = Raster(10.0, 100 * ratio), Raster(10.0 * ratio, 100)
    if is_coarser:
        box = (start * ratio, 0, n * ratio, ratio)
        assert matching_box(fine, box, coarse) == (start, 0, n, 1)
    else:
        assert matching_box(coarse, (start, 0, n, 1), fine) == (start * ratio, 0, n * ratio, ratio)


def test_bands_come_from_the_config_the_file_or_the_sensor(tmp_path: Path) -> None:
    order = ("B08", "B04", "B03", "B02")
    write_raster(tmp_path / "a.tif", tile_pixels(0, (4, 8, 8)), descriptions=order)
    tile = {"sensor": "sentinel2_l2a"}
    assert make(tmp_path, tile).schema["sentinel2_l2a"].bands == order
    source = make(tmp_path, {**tile, "bands": S2, "drop_bands": ["B03"]})
    assert source.schema["sentinel2_l2a"].bands == ("B02", "B04", "B08")
    np.testing.assert_array_equal(source.read(0).tiles["sentinel2_l2a"].array, tile_pixels(0, (4, 8, 8))[[0, 2, 3]])
    for bad, match in [
        ({"bands": S2[:3]}, r"tiles\[0\]: .* bands: .*a\.tif holds 4 bands, expected the 3 of the config's"),
        ({"bands": [*S2[:3], "B09x"]}, r"no band 'B09x'"),
        ({"bands": [*S2[:3], "B02"]}, "names a band twice"),
        ({"drop_bands": ["B01"]}, r"tiles\[0\]: .* drop_bands: .*no band B01"),
        ({"drop_bands": list(order)}, "nothing is left"),
    ]:
        with pytest.raises(ValueError, match=match):
            make(tmp_path, {**tile, **bad})
    write_raster(tmp_path / "a.tif", tile_pixels(0, (4, 8, 8)), descriptions=("blue", "green", "red", "nir"))
    with pytest.raises(ValueError, match=r"calls its bands blue, green, red, nir, and sensor sentinel2_l2a has no"):
        make(tmp_path, tile)
    write_raster(tmp_path / "a.tif", tile_pixels(0, (4, 8, 8)))
    with pytest.raises(ValueError, match=r"holds 4 bands, expected the 12 of sensor sentinel2_l2a; name the file's"):
        make(tmp_path, tile)


def test_no_data_is_that_of_the_file_and_of_the_sensor(tmp_path: Path) -> None:
    pixels = tile_pixels(0, (4, 8, 8)).astype("int16")
    pixels[:, 0, :] = -9999
    pixels[1] = 0
    pixels[1, 7, 7] = 4242
    for name in ("a", "b"):
        write_raster(tmp_path / f"{name}.tif", pixels, no_data=-9999)
    tile = {"sensor": "sentinel2_l2a", "bands": S2, "drop_bands": ["B03"]}
    source = make(tmp_path, tile)
    schema = source.schema["sentinel2_l2a"]
    assert schema.sensor.no_data == (0.0, -9999.0)
    kept = pixels[[0, 2, 3], 1:].astype(float)
    np.testing.assert_allclose(schema.mean, kept.mean((1, 2)))
    np.testing.assert_allclose(schema.std, kept.std((1, 2)))
    with pytest.raises(ValueError, match=r"tiles\[0\]\.drop_bands: these bands .* in the 2 windows looked at: B03;"):
        make(tmp_path, {**tile, "drop_bands": []})
    write_raster(tmp_path / "c.tif", pixels, no_data=-1)
    with pytest.raises(ValueError, match=r"c\.tif has the no-data value \{-1\.0\}.*list those of all files in no_data"):
        make(tmp_path, tile).read(2)
    assert make(tmp_path, {**tile, "no_data": [0, -1, -9999]}).read(2).tiles


def test_no_data_that_nobody_declared_is_named(tmp_path: Path) -> None:
    pixels = tile_pixels(0, (2, 8, 8)).astype("float32") / -100
    pixels[1, 3, 3] = -3.4028235e38
    write_raster(tmp_path / "a.tif", pixels, descriptions=("VH", "VV"))
    tile = {"sensor": "sentinel1_grd"}
    with pytest.raises(
        ValueError,
        match=r"^tiles\[0\]\.sensor: band VV of tile sentinel1_grd holds -3\.40\d+e\+38, .* declare it in no_data",
    ):
        make(tmp_path, tile)
    schema = make(tmp_path, {**tile, "no_data": [-3.4028234663852886e38]}).schema["sentinel1_grd"]
    assert schema.mean[1] == pytest.approx(np.delete(pixels[1], 3 * 8 + 3).mean(), rel=1e-4)


@pytest.mark.timeout(30)  # without a look at what it is, the pipe is waited for
def test_a_pipe_is_no_raster(tmp_path: Path) -> None:
    naip_folder(tmp_path)
    (tmp_path / "scene0.tif").unlink()
    os.mkfifo(tmp_path / "scene0.tif")
    source = make(tmp_path, {"sensor": "naip"})
    with pytest.raises(OSError, match=r"it is no regular file: '.*scene0\.tif'"):
        source.read(0)
    assert source.read(1).key == "scene1"


def test_statistics_are_measured_on_a_fixed_draw_or_given(tmp_path: Path) -> None:
    naip_folder(tmp_path, n=6)
    everything = np.stack([tile_pixels(i, (4, 40, 40)).astype("uint8") for i in range(6)]).astype(float)
    schema = make(tmp_path, {"sensor": "naip"}).schema["naip"]
    np.testing.assert_allclose(schema.mean, everything.mean((0, 2, 3)))
    np.testing.assert_allclose(schema.std, everything.std((0, 2, 3)))
    some = [
        make(tmp_path, {"sensor": "naip"}, window_px=10, n_statistics_windows=20, statistics_seed=s) for s in (0, 0, 1)
    ]
    assert some[0].schema == some[1].schema != some[2].schema
    assert some[0].fingerprint() == some[1].fingerprint() != some[2].fingerprint()
    given = tmp_path / "statistics.json"
    given.write_text(json.dumps({"bands": NAIP[::-1], "mean": [1, 2, 3, 4], "std": [5] * 4}))
    tile = {"sensor": "naip", "statistics": str(given)}
    assert make(tmp_path, tile).schema["naip"].mean == (4, 3, 2, 1)
    for text, match in [
        (
            json.dumps({"bands": NAIP, "mean": [1], "std": [1]}),
            r"^tiles\[0\]\.statistics: .*must hold lists `bands`, `mean` and `std`",
        ),
        (json.dumps({"bands": NAIP, "mean": [10**400] * 4, "std": [1] * 4}), "must hold lists.*too large"),
        ("[" * 100_000, "statistics: .*(nested too deeply|not valid JSON)"),
        (" " * (5 << 20), "statistics: .*5,242,880 bytes, expected"),
    ]:
        given.write_text(text)
        with pytest.raises(ValueError, match=match):
            make(tmp_path, tile)


def test_labels_from_folders_a_table_or_maps(tmp_path: Path) -> None:
    for name, label in (("a", "water"), ("b", "field"), ("c", "water")):
        pixels = tile_pixels(ord(name), (4, 8, 8)).astype("uint8")
        write_raster(tmp_path / label / f"{name}.tif", pixels)
        write_raster(tmp_path / "maps" / f"{name}_map.tif", pixels[:1].astype("int16") - 1)
    with pytest.raises(ValueError, match="none of the 6 files"):
        make(tmp_path, {"sensor": "naip", "pattern": "[wf]*/{key}.tif"})  # brackets mean themselves
    tile = {"sensor": "naip", "pattern": "?????/{key}.tif"}
    maps = make(tmp_path, tile, label_pattern="maps/{key}_map.tif", window_px=4)
    np.testing.assert_array_equal(maps.read(3).label, maps.read(3).tiles["naip"].array[0].astype("int16") - 1)
    shutil.rmtree(tmp_path / "maps")
    folders = make(tmp_path, {"sensor": "naip", "pattern": "{label}/{key}.tif"})
    assert folders.label_names == ("field", "water")
    assert [(s.key, s.label) for s in map(folders.read, range(3))] == [("a", 1), ("b", 0), ("c", 1)]
    (tmp_path / "labels.csv").write_text("\ufeffkey,cover\na,7\nb,3\n", encoding="utf-8")
    table = make(tmp_path, {"sensor": "naip"}, label_csv="labels.csv", label_column="cover")
    assert (table.label_names, table.read(0).label, table.read(1).label) == ((), 7, 3)
    with pytest.raises(ValueError, match=r"c has no label in labels\.csv"):
        table.read(2)
    for options, match in [
        ({"label_csv": "labels.csv"}, r"has no column 'label' \(has \['key', 'cover'\]\)"),
        ({"label_csv": "none.csv"}, r"label_csv: .*none\.csv cannot be read"),
        ({"label_csv": "labels.csv", "label_pattern": "{key}"}, "labels come from one place"),
    ]:
        with pytest.raises(ValueError, match=match):
            make(tmp_path, {"sensor": "naip"}, **options)
    (tmp_path / "labels.csv").write_text("key,cover\na,7\nb,3\na,7\nb,4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"labels\.csv, line 5: 'b' has two labels, '3' and '4'"):
        make(tmp_path, {"sensor": "naip"}, label_csv="labels.csv", label_column="cover")


def test_dates_from_the_name_or_a_tag(tmp_path: Path) -> None:
    naip_folder(tmp_path, n=1, tags={"TIFFTAG_DATETIME": "2019:07:03 10:20:30"})
    assert make(tmp_path, {"sensor": "naip"}).read(0).tiles["naip"].date is None  # often the time of processing
    tagged = make(tmp_path, {"sensor": "naip", "date_tag": "TIFFTAG_DATETIME"}).read(0)
    assert tagged.tiles["naip"].date == tagged.meta["date"] == "2019-07-03T10:20:30"
    (tmp_path / "scene0.tif").rename(tmp_path / "x_2019-13-41.tif")
    with pytest.raises(ValueError, match=r"x_2019-13-41\.tif: '2019-13-41' is no date"):
        make(tmp_path, {"sensor": "naip", "pattern": "{key}_{date}.tif"})


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("20200604", "2020-06-04"),
        ("2020-06-04", "2020-06-04"),
        ("20200604T054639", "2020-06-04T05:46:39"),
        ("2020:06:04 05:46:39", "2020-06-04T05:46:39"),
    ],
)
def test_dates_become_iso(text: str, date: str) -> None:
    assert parse_date(text) == date


def test_patterns() -> None:
    names = ["a/x_20200101_S2.tif", "b/y_20200102_S2.tif", "b/y_S1.tif", "S2.tif", "c.d/z/z_20200103_S2.tif"]
    found = match_files("pattern", "**/{key}_{date}_S2.tif", names)
    assert {k: (m.name, m.date) for k, m in found.items()} == {
        "x": (names[0], "20200101"),
        "y": (names[1], "20200102"),
        "z": (names[4], "20200103"),
    }
    assert list(match_files("pattern", "**/{key}/{key}_*.tif", names)) == ["z"]
    assert list(match_files("pattern", "{key}.tif", names)) == ["S2"]
    assert match_files("pattern", "{label}/{key}_S1.tif", names)["y"].label == "b"
    for pattern, match in [
        ("*.tif", r"tiles\[0\]\.pattern: '\*\.tif' has no \{key\}"),
        ("{kye}.tif", "did you mean 'key'"),
        ("../{key}.tif", "leads out of root"),
        ("/data/{key}.tif", "leads out of root"),
        ("**/{key}_*", "'a/x_20200101_S2.tif' and"),
    ]:
        with pytest.raises(ValueError, match=match):
            match_files("tiles[0].pattern", pattern, [*names, "b/x_20200101_S2.tif"])


def test_a_list_of_files(tmp_path: Path) -> None:
    naip_folder(tmp_path / "scenes")
    files = tmp_path / "train.txt"
    files.write_text("scenes/scene2.tif\n\nscenes/scene0.tif\n")
    source = make(files, {"sensor": "naip"})
    assert [source.locate(i) for i in range(2)] == [("scene0", "scenes/scene0.tif"), ("scene2", "scenes/scene2.tif")]
    for line in ("../secret.tif", "/etc/secret.tif", "scenes/../../secret.tif"):
        files.write_text(f"scenes/scene0.tif\n{line}\n")
        with pytest.raises(ValueError, match=r"root: .* leads out of this folder"):
            list_files(files)


def test_splits_part_the_places(tmp_path: Path) -> None:
    for i in range(24):
        corner = (10.0 + 1.5 * i, 50.0)
        write_raster(tmp_path / f"s{i:02}.tif", tile_pixels(i, (3, 8, 8), "uint16").astype("uint8"),
                     crs="EPSG:4326", corner=corner, pixel=1e-4)  # fmt: skip
    write_raster(tmp_path / "nowhere.tif", tile_pixels(0, (3, 8, 8)).astype("uint8"), crs=None)
    parts = {}
    for split in ("train", "val", "test"):
        source = make(tmp_path, {"sensor": "rgb"}, split=split, window_px=4)
        parts[split] = sorted({source.read(i).key.split("_")[0] for i in range(len(source))})
    expected = {
        s: [f"s{i:02}" for i in range(24) if cell_split(49.9996, 10.0004 + 1.5 * i, 0.5, 0) == s] for s in parts
    }
    assert parts == expected
    assert sum(map(len, parts.values())) == 24
    with pytest.raises(ValueError, match=r"split: no place of .* is in 'val' \(cells of 90"):
        make(tmp_path, {"sensor": "rgb"}, split="val", cell_deg=90.0)


def test_bad_files_are_bad_samples(tmp_path: Path) -> None:
    naip_folder(tmp_path, n=20)
    good = (tmp_path / "scene0.tif").read_bytes()
    write_raster(tmp_path / "scene0.tif", tile_pixels(0, (5, 40, 40)).astype("uint8"))  # the first in order, too
    (tmp_path / "scene1.tif").write_bytes(good[: len(good) // 2])  # its last rows are missing
    (tmp_path / "scene2.tif").write_bytes(good[:20])
    (tmp_path / "scene3.tif").write_bytes(b"")
    (tmp_path / "scene4.tif").write_text("<VRTDataset rasterXSize='1' rasterYSize='1'></VRTDataset>")
    write_raster(tmp_path / "scene5.tif", tile_pixels(0, (3, 40, 40)).astype("uint8"))
    write_raster(tmp_path / "scene6.tif", tile_pixels(0, (4, 40, 40)))
    source = make(tmp_path, {"sensor": "naip"}, window_px=40)
    assert source.schema["naip"].shape == (40, 40)
    for name, match in [
        ("scene0", r"scene0\.tif holds 5 bands"),
        ("scene1", r"scene1\.tif is truncated or damaged: "),
        ("scene2", r"scene2\.tif is not a readable GeoTIFF"),
        ("scene3", r"scene3\.tif is not a readable GeoTIFF"),
        ("scene4", r"scene4\.tif is not a readable GeoTIFF"),
        ("scene5", r"scene5\.tif holds 3 bands, expected the 4 of sensor naip"),
        ("scene6", r"scene6\.tif has dtype \['uint16'\], expected uint8"),
    ]:
        index = next(i for i in range(len(source)) if source.locate(i)[0] == f"{name}_0_0")
        with pytest.raises((ValueError, OSError), match=match) as caught:
            cut_to_views(source.read(index), [whole("naip", (40, 40), 40)], source.schema)
        assert "\n" not in str(caught.value)
    check_sample(source.read(2), source.schema)  # scene 10


def test_a_missing_partner_is_a_bad_sample_unless_optional(tmp_path: Path) -> None:
    pairs_folder(tmp_path, n=5)
    (tmp_path / "radar" / "p1.tif").unlink()
    next(tmp_path.glob("p2_*_10m.tif")).unlink()
    source = make(tmp_path, *PAIR)
    assert len(source) == 5
    with pytest.raises(
        ValueError, match=r"p1 has no raster of tile sentinel1_grd \(radar/\{key\}\.tif\): set tiles\[2\]"
    ):
        source.read(1)
    with pytest.raises(ValueError, match="p2 has no raster of tile sentinel2_l2a@10m"):
        source.read(2)
    relaxed = make(tmp_path, *PAIR[:2], {**PAIR[2], "optional": True})
    assert list(relaxed.read(1).tiles) == ["sentinel2_l2a@10m", "sentinel2_l2a@20m"]
    check_sample(relaxed.read(1), relaxed.schema)
    first = {"sensor": "sentinel1_grd", "pattern": "radar/{key}.tif"}
    assert len(make(tmp_path, first, window_px=30)) == 4 * 4
    assert len(make(tmp_path, first, PAIR[1], window_px=30)) == 4 * 4 + 1  # p1 counts, and is bad
    with pytest.raises(ValueError, match=r"tiles: no key has a raster of each of"):
        make(tmp_path, PAIR[0], {**PAIR[2], "pattern": "{key}/p0.tif"})


def test_rasters_of_a_place_must_show_the_same_ground(tmp_path: Path) -> None:
    pairs_folder(tmp_path, n=5)
    radar = tile_pixels(1, (2, 60, 60)).astype("float32")
    for i, options in enumerate(
        [{"corner": (600_011.0, 5e6)}, {"crs": "EPSG:32633", "corner": (650_000.0, 5e6)}, {"corner": (700_004.0, 5e6)}]
    ):
        write_raster(tmp_path / "radar" / f"p{i}.tif", radar, no_data=np.nan, descriptions=("VH", "VV"), **options)
    source = make(tmp_path, *PAIR)
    with pytest.raises(ValueError, match=r"p0\.tif has no box .* columns -1\.10:"):
        source.read(0)
    with pytest.raises(ValueError, match=r"p1\.tif is in EPSG:32633, .* in EPSG:32632: warp one"):
        source.read(1)
    check_sample(source.read(2), source.schema)  # off by less than half a pixel


def test_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    naip_folder(tmp_path, n=5)
    (tmp_path / "scene1.tif").rename(tmp_path / os.fsdecode(b"scene1\xff.tif"))
    source = make(tmp_path, {"sensor": "naip"})
    assert source.locate(1) == ("scene1\\xff", "scene1\\xff.tif")
    with pytest.raises(ValueError, match=r"scene1\\xff\.tif: the path is not UTF-8"):
        source.read(1)
    assert source.fingerprint()


def test_a_class_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    for label in ("dry", "wet"):
        write_raster(tmp_path / label / f"{label}.tif", tile_pixels(0, (4, 8, 8)).astype("uint8"))
    (tmp_path / "wet").rename(tmp_path / os.fsdecode(b"wet\xff"))
    with pytest.raises(ValueError, match=r"^tiles\[0\]\.pattern: the class wet\\udcff has a name that is not UTF-8"):
        make(tmp_path, {"sensor": "naip", "pattern": "{label}/{key}.tif"})


def test_a_root_without_rasters_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 0 files of .* fits '\*\*/\{key\}\.tif' \(found: nothing\)"):
        make(tmp_path, {"sensor": "naip"})
    (tmp_path / "scene.TIF").touch()
    with pytest.raises(ValueError, match=r"none of the 1 files .* \(found: scene\.TIF\)"):
        make(tmp_path, {"sensor": "naip"})
    with pytest.raises(
        ValueError, match=r"tiles\[0\]: none of 1 rasters can be used; the last: .*scene\.TIF is not a readable GeoTIFF"
    ):
        make(tmp_path, {"sensor": "naip", "pattern": "{key}.TIF"})
    with pytest.raises(ValueError, match=r"neither a folder nor a \.txt file"):
        make(tmp_path / "none", {"sensor": "naip"})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tiles": []}, "tiles is empty"),
        ({"tiles": [{"sensor": "naip", "optional": True}]}, r"tiles\[0\] cannot be optional"),
        ({"window_px": 0}, "window_px must be at least 1"),
        ({"stride_px": 4}, "stride_px and rows_ratio need window_px"),
        ({"cell_deg": 0.0}, "cell_deg must be"),
        ({"tiles": [{"sensor": "naip", "gsd_m": -1.0}]}, "gsd_m must be positive"),
        ({"tiles": [{"sensor": "naip", "what": ""}]}, "what is empty"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(Config, {"root": "x", "tiles": [{"sensor": "naip"}], **options}, "source")


def test_tiles_of_one_sensor_need_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="naip is named twice; tell them apart by what"):
        make(tmp_path, {"sensor": "naip"}, {"sensor": "naip"})


def test_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    source = make(naip_folder(tmp_path / "here"), {"sensor": "naip"}, window_px=20)
    before = source.fingerprint()
    (tmp_path / "here").rename(tmp_path / "there")
    moved = make(tmp_path / "there", {"sensor": "naip"}, window_px=20)
    assert moved.fingerprint() == before
    assert make(tmp_path / "there", {"sensor": "naip"}, window_px=10).fingerprint() != moved.fingerprint()
    naip_folder(tmp_path / "there", n=4)
    assert make(tmp_path / "there", {"sensor": "naip"}, window_px=20).fingerprint() != moved.fingerprint()


def _read_all(source: Source) -> list[int]:
    return [int(source.read(i).tiles["naip"].array.sum()) for i in range(len(source))]


def test_concurrent_workers_read_the_same_and_hold_few_handles(tmp_path: Path) -> None:
    source = make(naip_folder(tmp_path, n=50, size=8), {"sensor": "naip"})
    expected = _read_all(source)  # handles are open now: they must not reach the workers
    n_open = sum(str(tmp_path) in str(path.resolve()) for path in Path("/proc/self/fd").iterdir())
    assert n_open <= 33
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(3).tiles["naip"].array,
                                  source.read(3).tiles["naip"].array)  # fmt: skip
    # Processes first: a thread that was joined may still be leaving PROJ's database, and a fork would copy its lock.
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(_read_all, [source] * 4)) == [expected] * 4
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(_read_all, [source] * 8)) == [expected] * 8


def test_real_hyperspectral_patch(real_samples: Callable[[str], Path]) -> None:
    folder = {"sensor": "enmap", "pattern": "*_{date}_*/{key}-SPECTRAL_IMAGE.TIF"}
    with pytest.raises(ValueError, match=r"have no data, .* B127.*list them in drop_bands"):
        make(real_samples("hyspecnet11k"), folder)
    dropped = [f"B{i:03}" for i in (*range(127, 142), *range(161, 168))]
    source = make(real_samples("hyspecnet11k"), {**folder, "drop_bands": dropped}, window_px=64)
    assert len(source) == 4
    sample = source.read(0)
    check_sample(sample, source.schema)
    assert source.schema["enmap"].shape == (64, 64)
    assert sample.tiles["enmap"].pixels.shape == (202, 64, 64)
    assert (sample.tiles["enmap"].gsd_m, sample.meta["date"]) == (30.0, "2022-11-03T16:24:38+00:00")
    assert (sample.tiles["enmap"].array != -32768).all()
    assert sample.meta["latitude"] == pytest.approx(41.17, abs=0.02)
    assert 200 < max(source.schema["enmap"].mean) < 1000  # mostly water


def test_real_flood_chip(real_samples: Callable[[str], Path]) -> None:
    root = real_samples("s1_s2_pairs/sen1floods11")
    radar = {"sensor": "sentinel1_grd", "pattern": "S1/{key}_S1Hand.tif"}
    optical = {"sensor": "sentinel2_l1c", "pattern": "S2/{key}_S2Hand.tif"}
    with pytest.raises(ValueError, match=r"tiles\[1\]: .* bands: .*calls its bands B1, B2, B3"):
        make(root, radar, optical)
    optical["bands"] = list(load_sensor("sentinel2_l1c").band_names)
    source = make(root, radar, optical, label_pattern="Labels/{key}_LabelHand.tif", window_px=128)
    assert len(source) == 16
    for i in range(16):
        sample = source.read(i)
        check_sample(sample, source.schema)
        assert sample.label.shape == (128, 128)
        assert set(np.unique(sample.label)) <= {-1, 0, 1}
        assert sample.tiles["sentinel2_l1c"].gsd_m == pytest.approx(8.87, abs=0.01)  # 9.97 by 7.88 m
    assert source.schema["sentinel1_grd"].bands == ("VV", "VH")
    assert source.schema["sentinel1_grd"].mean[0] > source.schema["sentinel1_grd"].mean[1]
    assert source.schema["sentinel2_l1c"].dtype == "int16"


def test_real_scenes_with_b8a_last(real_samples: Callable[[str], Path]) -> None:
    bands = [b for b in load_sensor("sentinel2_l1c").band_names if b != "B8A"] + ["B8A"]
    tile = {"sensor": "sentinel2_l1c", "pattern": "{label}/{key}.tif", "bands": bands}
    source = make(real_samples("eurosat_ms"), tile)
    assert source.label_names == ("AnnualCrop", "Pasture", "SeaLake")
    for i in range(3):
        sample = source.read(i)
        check_sample(sample, source.schema)
        values = dict(zip(bands, sample.tiles["sentinel2_l1c"].array, strict=True))
        assert values["B10"].mean() < 20
        assert values["B8A"].mean() == pytest.approx(values["B08"].mean(), rel=0.25)
        assert sample.tiles["sentinel2_l1c"].gsd_m == pytest.approx(10.0, abs=0.03)
