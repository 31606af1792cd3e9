from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives.fmow import FOOTPRINTS, LIST, columns_of, image, path_of, pixels_of, write_archive, write_list
from archives.tiffs import write_raster
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.plans import whole
from ssl_eo.data.sources._side_files import evenly_spaced
from ssl_eo.data.sources.fmow import Config, Source
from ssl_eo.data.stacking import check_sample, cut_to_views

pytest.importorskip("pyarrow")
pytest.importorskip("rasterio")

L1C = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_archive(tmp_path)
    return tmp_path


def source(root: Path, **options: Any) -> Source:
    return Source(Config(str(root), **options))


def test_a_sample_is_a_footprint_with_its_images_in_the_order_of_time(root: Path) -> None:
    archive = source(root)
    assert len(archive) == 4
    sample = archive.read(0)
    check_sample(sample, archive.schema)
    assert sample.key == archive.locate(0)[0] == "fmow_iwm_onid_train_0"
    assert sample.meta == {"row": 0}
    assert list(sample.tiles) == ["worldview2_3@0", "worldview2_3@1", "rgb@0", "sentinel2_l1c@0"]
    first, last = sample.tiles["worldview2_3@0"], sample.tiles["worldview2_3@1"]
    assert (first.date, last.date) == ("2014-03-04T10:11:12Z", "2016-03-04T10:11:12Z")
    assert (first.gsd_m, last.gsd_m) == (pytest.approx(1.9), 1.5)
    assert (first.pixels.shape, last.pixels.shape) == ((8, 64, 30), (8, 40, 50))
    assert sample.tiles["sentinel2_l1c@0"].bands == L1C
    for name, i in [("worldview2_3@0", 3), ("worldview2_3@1", 0), ("rgb@0", 2), ("sentinel2_l1c@0", 1)]:
        np.testing.assert_array_equal(sample.tiles[name].array, pixels_of(0, i, FOOTPRINTS[0][i]))


def test_of_many_images_evenly_spaced_dates_are_taken(root: Path) -> None:
    dates = [t.date for t in source(root, max_images_per_sensor=3).read(2).tiles.values()]
    assert dates == ["2010-03-04T10:11:12Z", "2013-03-04T10:11:12Z", "2016-03-04T10:11:12Z"]
    assert len(source(root, max_images_per_sensor=9).read(2).tiles) == 7


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400), st.integers(1, 20))
def test_evenly_spaced_choices_are_different_and_in_order(n: int, limit: int) -> None:
    chosen = evenly_spaced(n, limit)
    assert len(chosen) == min(n, limit)
    assert chosen == sorted(set(chosen))
    assert n == 0 or (chosen[0] == 0 and chosen[-1] < n)


def test_unknown_dates_and_ground_sampling_and_other_sensors(root: Path) -> None:
    sample = source(root).read(3)  # its QuickBird image is of no sensor that is known
    assert {name: t.date for name, t in sample.tiles.items()} == {
        "worldview2_3@0": None,
        "worldview2_3@1": "2017-03-04T10:11:12Z",
    }
    assert source(root).read(1).tiles["sentinel2_l1c@0"].gsd_m == 10.0


def test_images_and_footprints_are_left_out_as_asked_for(root: Path) -> None:
    large = source(root, min_size=30, sensors=["worldview2_3", "sentinel2_l1c"])
    assert [large.read(i).meta["row"] for i in range(len(large))] == [0, 3]
    assert list(large.read(1).tiles) == ["worldview2_3@0"]
    assert len(source(root, min_images=2)) == 3
    with pytest.raises(
        ValueError, match=r"min_images: no footprint of .*train\.parquet has 1 images of rgb .* 999 pixels"
    ):
        source(root, min_size=999, sensors=["rgb"])


def test_only_the_window_is_read(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    columns = columns_of([(image("rgb", 2015, (20_000, 20_000)),)])
    write_list(tmp_path / LIST.format(split="train"), columns)
    path = tmp_path / path_of(0, 0, "rgb")
    path.parent.mkdir(parents=True)
    profile = {"height": 20_000, "width": 20_000, "count": 3, "dtype": "uint8", "tiled": True, "sparse_ok": True}
    with (
        pytest.warns(rasterio.errors.NotGeoreferencedWarning),
        rasterio.open(path, "w", driver="GTiff", **profile) as file,
    ):
        file.write(np.full((3, 64, 64), 9, np.uint8), window=((19_000, 19_064), (18_000, 18_064)))
    archive = source(tmp_path)
    sample = archive.read(0)
    check_sample(sample, archive.schema)
    pixels = sample.tiles["rgb@0"].pixels[:, 18_990:19_010, 18_000:18_008]
    assert pixels.shape == (3, 20, 8)
    assert pixels[:, :10].max() == 0
    assert pixels[:, 10:].min() == 9
    plan = whole("rgb@0", (64, 64), 32)
    assert cut_to_views(sample, [plan], archive.schema).tiles["rgb@0"].pixels.shape == (3, 64, 64)


def test_images_that_are_not_as_listed_raise_what_the_loader_quarantines(root: Path) -> None:
    archive = source(root)
    worldview = root / path_of(0, 0, "wv23")
    shape = (40, 50)
    good = worldview.read_bytes()
    for pixels, match in [
        (
            np.ones((4, *shape), np.uint16),
            r"_0_ms\.tif has bands, height, width \(4, 40, 50\) .* expected \(8, 40, 50\)",
        ),
        (np.ones((8, 41, 50), np.uint16), r"\(8, 41, 50\) of uint16; expected \(8, 40, 50\)"),
        (np.ones((8, *shape), np.float32), "of float32; expected .* of uint16"),
    ]:
        write_raster(worldview, pixels, crs=None)
        tiles = source(root).read(0).tiles  # the other images of the footprint can be used
        with pytest.raises(ValueError, match=match):
            _ = tiles["worldview2_3@1"].array
        assert tiles["worldview2_3@0"].array.shape == (8, 64, 30)
    for content in (good[: len(good) // 2], b"", b"no TIFF"):
        worldview.write_bytes(content)
        with pytest.raises(OSError, match=r"airport_0_0_ms\.tif"):
            _ = source(root).read(0).tiles["worldview2_3@1"].array
    worldview.unlink()
    with pytest.raises(OSError, match=r"airport_0_0_ms\.tif"):
        _ = archive.read(0).tiles["worldview2_3@1"].array


def test_float_files_of_sentinel2_are_taken_as_they_are(root: Path) -> None:
    for footprint, i in ((0, 1), (1, 0)):
        pixels = pixels_of(footprint, i, FOOTPRINTS[footprint][i]).astype(np.float32)
        write_raster(root / path_of(footprint, i, "s2"), pixels, crs=None)
    archive = source(root)
    check_sample(archive.read(0), archive.schema)
    assert archive.schema["sentinel2_l1c@0"].dtype == archive.read(0).tiles["sentinel2_l1c@0"].array.dtype == "float32"


@pytest.mark.parametrize(
    ("path", "match"), [("../../secret.tif", "leads out of this folder"), ("/etc/passwd", "leads out")]
)
def test_paths_that_lead_out_of_the_archive_are_refused(root: Path, path: str, match: str) -> None:
    columns = columns_of(FOOTPRINTS)
    columns["path"][1][0] = path
    write_list(root / LIST.format(split="train"), columns)
    archive = source(root)
    with pytest.raises(ValueError, match=match):
        archive.read(1)
    assert archive.locate(1)[0] == "fmow_iwm_onid_train_1"
    check_sample(archive.read(2), archive.schema)


def test_paths_that_are_not_utf8_are_refused(root: Path) -> None:
    import pyarrow

    columns = columns_of(FOOTPRINTS)
    paths = [[p.encode() for p in row] for row in columns["path"]]
    paths[1][0] = b"fmow/\xff\xfe.tif"
    columns["path"] = pyarrow.array(paths, pyarrow.list_(pyarrow.binary()))
    write_list(root / LIST.format(split="train"), columns)
    with pytest.raises(ValueError, match=r"is not UTF-8; rename the file"):
        source(root).read(1)


def test_splits_are_published_lists_or_cells(root: Path) -> None:
    write_archive(root, "val", FOOTPRINTS[:1])
    assert len(source(root, split="val")) == 1
    with pytest.raises(ValueError, match=r"root: no such file: .*fmow_iwm_onid_train_val\.parquet"):
        source(root, split="all")
    many = [(image("rgb", 2015),)] * 40
    places = {"latitude": [50.25 + 0.5 * i for i in range(40)], "longitude": [10.25] * 40}
    write_archive(root, "train_val", many, **places)
    parts = [source(root, split_by="geography", split=s) for s in ("train", "val", "test")]
    rows = [[part.read(i).meta["row"] for i in range(len(part))] for part in parts]
    assert sorted(row for part in rows for row in part) == list(range(40))
    assert parts[1].read(0).meta["latitude"] == 50.25 + 0.5 * rows[1][0]
    write_list(root / LIST.format(split="train_val"), columns_of(FOOTPRINTS))
    with pytest.raises(ValueError, match=r"split_by: .* has no columns latitude and longitude"):
        source(root, split_by="geography")


def test_lists_of_another_form_are_refused(root: Path) -> None:
    path = root / LIST.format(split="train")
    columns = columns_of(FOOTPRINTS)
    for broken, match in [
        ({k: v for k, v in columns.items() if k not in ("gsd", "path")}, r"has no column path, gsd \(it has img_id"),
        ({**columns, "sensor": ["rgb"] * 4}, "column sensor is string, expected a list"),
        ({**columns, "gsd": [[1.0]] * 4}, "row 0 has 4 paths but 1 entries of gsd"),
        ({**columns, "sensor": [["qb"] * len(f) for f in FOOTPRINTS]}, "lists no image of wv23, rgb, s2"),
        (
            {**columns, "path": [["x" * 2000] * len(f) for f in FOOTPRINTS]},
            "a path of 2000 bytes, expected at most 1024",
        ),
    ]:
        write_list(path, broken)
        with pytest.raises(ValueError, match=match):
            source(root)
    write_list(path, columns)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train\.parquet is no readable Parquet file"):
        source(root)


def test_roots_and_keys_that_are_wrong_are_named(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="root: no such file"):
        source(empty)
    with pytest.raises(ValueError, match="metadata: no such file"):
        source(root, metadata="nowhere.parquet")
    with pytest.raises(ValueError, match=r"sensors: fMoW has no 'rgbs'; did you mean 'rgb'"):
        source(root, sensors=["rgbs"])
    write_list(empty / LIST.format(split="train"), columns_of(FOOTPRINTS))
    with pytest.raises(ValueError, match=r"root: none of 4 images of worldview2_3 can be read .*leave sensors without"):
        source(empty)
    for options, match in [
        ({"min_size": 0}, "min_size must be at least 1"),
        ({"max_images_per_sensor": 0}, "max_images_per_sensor"),
        ({"sensors": []}, "sensors must name"),
        ({"cell_deg": 0.0}, "cell_deg"),
        ({"split": "test"}, "split: the lists have train and val only"),
    ]:
        with pytest.raises(ValueError, match=match):
            Config("x", **options)


def test_fingerprint_follows_the_content_not_the_place(root: Path) -> None:
    before = source(root).fingerprint()
    moved = root.rename(root.with_name("moved"))
    assert source(moved).fingerprint() == before
    assert source(moved, max_images_per_sensor=2).fingerprint() != before
    assert source(moved, min_size=30).fingerprint() != before
    write_archive(moved, footprints=[*FOOTPRINTS[:3], (image("wv23", 2017),)])
    assert source(moved).fingerprint() != before


def test_a_source_can_be_pickled_while_open(root: Path) -> None:
    archive = source(root)
    expected = archive.read(0).tiles["rgb@0"].array
    data = pickle.dumps(archive)
    assert len(data) < 20_000  # columns are mapped, not sent
    np.testing.assert_array_equal(pickle.loads(data).read(0).tiles["rgb@0"].array, expected)
