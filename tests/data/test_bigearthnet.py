from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives.bigearthnet import (
    BANDS,
    MAP_CODES,
    make_v1,
    make_v2,
    names_v1,
    names_v2,
    write_band,
    write_table,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.plans import whole
from ssl_eo.data.sources._bigearthnet import IGNORED, Nomenclature
from ssl_eo.data.sources._side_files import dataset_card
from ssl_eo.data.sources.bigearthnet import Config, Source
from ssl_eo.data.sources.hdf5 import Config as Hdf5Config
from ssl_eo.data.sources.hdf5 import Source as Hdf5Source
from ssl_eo.data.stacking import check_sample, cut_to_views, loaded

pytest.importorskip("rasterio")
pytestmark = pytest.mark.usefixtures("own_cache")

TILES = {"sentinel2_l2a@10m": 120, "sentinel2_l2a@20m": 60, "sentinel2_l2a@60m": 20, "sentinel1_grd": 120}
NOMENCLATURE = Nomenclature.from_info(dataset_card("bigearthnet"))


@pytest.fixture(scope="module")
def archive_v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_v1(tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module")
def archive_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pyarrow")
    return make_v2(tmp_path_factory.mktemp("v2"))


@pytest.fixture
def v1(archive_v1: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(archive_v1, tmp_path / "v1", ignore=shutil.ignore_patterns(".*"))


@pytest.fixture
def v2(archive_v2: Path, tmp_path: Path) -> Path:
    return shutil.copytree(archive_v2, tmp_path / "v2", ignore=shutil.ignore_patterns(".*"))


def open_all(root: Path, **options: Any) -> Source:
    return Source(Config(str(root), **{"split": "all", **options}))


def keys(source: Source) -> list[str]:
    return [source.locate(i)[0] for i in range(len(source))]


def named(vector: Any, source: Source) -> set[str]:
    return {name for name, hot in zip(source.label_names, vector, strict=True) if hot}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_sample_holds_native_tiles_dates_and_place(version: str, request: pytest.FixtureRequest) -> None:
    source = open_all(request.getfixturevalue(f"archive_{version}"))
    assert len(source) == 4
    names = names_v1 if version == "v1" else names_v2
    for n in range(4):
        sample = loaded(source.read(n))
        check_sample(sample, source.schema)
        assert sample.key == source.locate(n)[0] == names(n)[0]
        assert {name: tile.pixels.shape[1] for name, tile in sample.tiles.items()} == TILES
        for name, tile in sample.tiles.items():
            for band, pixels in zip(tile.bands, tile.pixels, strict=True):
                if name == "sentinel1_grd":
                    assert (pixels == np.float32(-(100 * n + ("VV", "VH").index(band) + 1) / 10)).all()
                else:
                    assert (pixels == 100 * n + BANDS.index(band) + 1).all()
    assert sample.tiles["sentinel2_l2a@60m"].gsd_m == 60.0
    day, time = ("2017-09-24", "2017-09-25T04:32:56") if version == "v1" else ("2017-06-13", "2017-06-13T16:50:43")
    assert sample.tiles["sentinel2_l2a@10m"].date == day  # the name says T93020, which is no time
    assert sample.tiles["sentinel1_grd"].date == time
    assert sample.meta["month"] == int(day[5:7])
    assert 44 < sample.meta["latitude"] < 49
    assert 12 < sample.meta["longitude"] < 16


def test_patches_of_one_scene_or_one_cell_are_of_one_group(archive_v1: Path, archive_v2: Path, v1: Path) -> None:
    for root in (archive_v1, archive_v2):
        source = open_all(root)
        for i in range(len(source)):
            sample = source.read(i)
            scene, row, column = sample.key.rsplit("_", 2)
            assert sample.meta["group"] == scene
            assert row.isdecimal()
            assert column.isdecimal()
    for path in v1.glob("*.csv"):
        path.unlink()  # no official split
    for split in ("train", "val", "test"):
        try:
            source = Source(Config(str(v1), split=split, split_by="geography", cell_deg=2.0))
        except ValueError:  # no patch lies in cells of this split
            continue
        meta = source.read(0).meta
        south, west = (2 * np.floor(meta[key] / 2) for key in ("latitude", "longitude"))
        assert meta["group"] == f"{south:g} {west:g} +2"


def test_radar_statistics_are_those_of_their_polarisation(archive_v1: Path, archive_v2: Path) -> None:
    for root, vv, vh in [(archive_v1, -12.62, -19.29), (archive_v2, -12.6439, -19.3526)]:
        schema = open_all(root).schema["sentinel1_grd"]
        assert schema.bands == ("VV", "VH")  # although the files sort the other way round
        assert schema.mean == pytest.approx((vv, vh), abs=1e-3)
        assert schema.std[0] < schema.std[1]


def test_labels_of_43_classes_fold_into_19(archive_v1: Path) -> None:
    of_43, of_19 = open_all(archive_v1, n_classes=43), open_all(archive_v1)
    assert named(of_43.read(0).label, of_43) == {"Continuous urban fabric", "Discontinuous urban fabric"}
    assert named(of_19.read(0).label, of_19) == {"Urban fabric"}
    assert named(of_43.read(1).label, of_43) == {"Transitional woodland/shrub", "Airports"}
    assert named(of_19.read(1).label, of_19) == {"Transitional woodland, shrub"}
    assert named(of_43.read(2).label, of_43) == {"Bare rock"}
    assert not of_19.read(2).label.any()
    assert of_19.read(0).label.shape == (19,)
    assert of_19.read(0).label.dtype == np.uint8


def test_the_nomenclature_is_whole() -> None:
    assert len(NOMENCLATURE.names_43) == len(set(NOMENCLATURE.codes)) == 43
    assert set(NOMENCLATURE.groups) == {None, *range(19)}
    assert sum(group is None for group in NOMENCLATURE.groups) == 11
    same = [k for k, name in enumerate(NOMENCLATURE.names_43) if name in NOMENCLATURE.names_19]
    assert all(NOMENCLATURE.names_19[NOMENCLATURE.groups[k] or 0] == NOMENCLATURE.names_43[k] for k in same)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 42)))
def test_bits_and_names_agree(classes: set[int]) -> None:
    bits = NOMENCLATURE.bits([NOMENCLATURE.names_43[k] for k in sorted(classes)], 43)
    assert set(np.flatnonzero(NOMENCLATURE.multi_hot(bits, 43, 43)).tolist()) == classes
    folded = {NOMENCLATURE.groups[k] for k in classes} - {None}
    assert set(np.flatnonzero(NOMENCLATURE.multi_hot(bits, 43, 19)).tolist()) == folded


def test_reference_maps_become_class_maps(archive_v2: Path) -> None:
    for n_classes, expected in [
        (19, ["Urban fabric", "Transitional woodland, shrub", None, None]),
        (43, ["Discontinuous urban fabric", "Transitional woodland/shrub", "Airports", None]),
    ]:
        source = open_all(archive_v2, label="map", n_classes=n_classes)
        label = source.read(0).label
        assert label.shape == (120, 120)
        assert label.dtype == np.uint8
        quadrants = label[::60, ::60].reshape(-1).tolist()
        assert [None if k == IGNORED else source.label_names[k] for k in quadrants] == expected
    assert len(MAP_CODES) == 4


def test_labels_of_v2_have_the_order_of_v1(archive_v1: Path, archive_v2: Path) -> None:
    source = open_all(archive_v2)
    assert source.label_names == open_all(archive_v1).label_names
    assert named(source.read(3).label, source) == {"Marine waters", "Inland waters"}
    assert source.read(0).meta["country"] == "Austria"


def test_official_splits_of_v2_leave_clouds_out(archive_v2: Path) -> None:
    parts = {split: keys(Source(Config(str(archive_v2), split=split))) for split in ("train", "val", "test")}
    assert parts == {"train": [names_v2(0)[0], names_v2(3)[0]], "val": [names_v2(1)[0]], "test": [names_v2(2)[0]]}
    assert len(open_all(archive_v2, snow_and_clouds=True)) == 5


def test_lists_of_v1_give_splits_and_what_to_leave_out(v1: Path) -> None:
    (v1 / "train.csv").write_text(f"{names_v1(0)[0]},{names_v1(0)[1]}\n{names_v1(1)[0]},{names_v1(1)[1]}\n")
    (v1 / "test.csv").write_text(f"{names_v1(2)[0]}\nS2A_MSIL2A_of_another_download\n")
    (v1 / "patches_with_seasonal_snow.csv").write_text(f"{names_v1(1)[0]}\n")
    assert keys(Source(Config(str(v1)))) == [names_v1(0)[0]]
    assert keys(Source(Config(str(v1), snow_and_clouds=True))) == [names_v1(0)[0], names_v1(1)[0]]
    assert keys(Source(Config(str(v1), split="test"))) == [names_v1(2)[0]]
    with pytest.raises(ValueError, match=r"split: no patch of .* is in 'val'"):
        Source(Config(str(v1), split="val"))


def test_v1_without_lists_is_split_by_place(tmp_path: Path) -> None:
    root = make_v1(tmp_path / "a", 12)
    parts = [keys(Source(Config(str(root), split=split))) for split in ("train", "test")]
    assert not set(parts[0]) & set(parts[1])
    assert keys(Source(Config(str(root), split_seed=3))) != parts[0]
    with pytest.raises(ValueError, match=r"split_by: .* has no official lists \(train\.csv, val\.csv, test\.csv"):
        Source(Config(str(root), split_by="official"))


def test_only_the_tiles_that_are_shown_are_read(v1: Path) -> None:
    for path in v1.glob("*/*/*_B0[19].tif"):
        path.unlink()
    source = open_all(v1)
    name = "sentinel2_l2a@20m"
    cut = cut_to_views(source.read(0), [whole(name, source.schema[name].shape or (0, 0), 30)], source.schema)
    assert list(cut.tiles) == [name]
    with pytest.raises(OSError, match="B01"):
        loaded(source.read(0))
    assert len(loaded(open_all(v1, tiles=["sentinel1_grd", name]).read(0)).tiles) == 2


def test_parts_of_a_tile_are_parts_of_its_files(v1: Path) -> None:
    patch = names_v1(0)[0]
    ramp = np.arange(120 * 120, dtype=np.uint16).reshape(120, 120)
    write_band(v1 / "BigEarthNet-v1.0" / patch / f"{patch}_B03.tif", ramp)
    pixels = open_all(v1).read(0).tiles["sentinel2_l2a@10m"].pixels
    np.testing.assert_array_equal(pixels[1:3, 7:90, 110:], pixels[:, :, :][1:3, 7:90, 110:])
    np.testing.assert_array_equal(pixels[1:2, ::2, 5:50:3][0], ramp[::2, 5:50:3])


def test_an_archive_without_radar_has_no_radar_tile(v1: Path) -> None:
    shutil.rmtree(v1 / "BigEarthNet-S1-v1.0")
    source = open_all(v1)
    assert "sentinel1_grd" not in source.schema
    check_sample(loaded(source.read(0)), source.schema)
    with pytest.raises(ValueError, match="tiles: sentinel1_grd needs the archive of Sentinel-1"):
        open_all(v1, tiles=["sentinel1_grd"])


def test_patches_without_a_partner_make_the_tile_optional(v1: Path, caplog: pytest.LogCaptureFixture) -> None:
    side_file = next((v1 / "BigEarthNet-S1-v1.0" / names_v1(1)[1]).glob("*.json"))
    side_file.write_text(json.dumps({"corresponding_s2_patch": "../../etc"}))
    source = open_all(v1)
    assert "1 of 4 Sentinel-1 patches have no Sentinel-2 patch" in caplog.text
    assert source.schema["sentinel1_grd"].optional
    assert not source.schema["sentinel2_l2a@10m"].optional
    assert "sentinel1_grd" not in source.read(1).tiles
    check_sample(source.read(1), source.schema)


def test_damaged_patches_raise_what_the_loader_quarantines(v1: Path) -> None:
    folders = [v1 / "BigEarthNet-v1.0" / names_v1(n)[0] for n in range(4)]
    label_file = folders[0] / f"{folders[0].name}_labels_metadata.json"
    good = label_file.read_text()
    label_file.write_text(good[:60])
    (folders[1] / f"{folders[1].name}_labels_metadata.json").write_text(good.replace("urban fabric", "villages"))
    (folders[2] / f"{folders[2].name}_labels_metadata.json").unlink()
    band = folders[3] / f"{folders[3].name}_B08.tif"
    band.write_bytes(band.read_bytes()[:5000])
    source = open_all(v1)
    for index, match in [
        (0, "B_MSIL2A_20170924T93020_0_24_labels_metadata.json is not valid JSON"),
        (1, r"no label file.*labels \['Continuous villages', 'Discontinuous villages'\] are not among the 43"),
        (2, r"cannot be read \(No such file"),
        (3, r"_B08\.tif is truncated or damaged"),
    ]:
        with pytest.raises((ValueError, OSError), match=match):
            loaded(source.read(index))
    label_file.write_text(good)
    with pytest.raises(ValueError, match=r"were mended: remove .*\.npy, the old index"):
        source.read(0)


@pytest.mark.parametrize(
    "pixels", [np.zeros((60, 60), np.uint16), np.zeros((120, 120), np.int16)], ids=["another size", "another dtype"]
)
def test_files_of_another_shape_are_named(v1: Path, pixels: Any) -> None:
    patch = names_v1(2)[0]
    write_band(v1 / "BigEarthNet-v1.0" / patch / f"{patch}_B04.tif", pixels)
    with pytest.raises(ValueError, match=rf"{patch}_B04\.tif has .* expected \(1, 120, 120, 'uint16'\)"):
        loaded(open_all(v1).read(2))


def test_a_huge_or_deep_side_file_is_refused(v1: Path) -> None:
    folder = v1 / "BigEarthNet-v1.0"
    for n, content in enumerate([b" " * (5 << 20), b"[" * 200_000, b"\xff\xfe{}", b"[1]"]):
        (folder / names_v1(n)[0] / f"{names_v1(n)[0]}_labels_metadata.json").write_bytes(content)
    source = open_all(v1)
    for index, match in enumerate(["has 5,242,880 bytes", "too deeply", "not UTF-8", "holds list, expected labels"]):
        with pytest.raises(ValueError, match=match):
            source.read(index)


def test_a_wrong_root_is_named(tmp_path: Path, v1: Path) -> None:
    with pytest.raises(ValueError, match="root: no such folder"):
        open_all(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no folder BigEarthNet-v1.0 or .* \(found: nothing\); unpack"):
        open_all(tmp_path / "empty")
    (tmp_path / "other" / "BigEarthNet-S2" / "notes").mkdir(parents=True)
    os.mkdir(os.fsencode(tmp_path / "other" / "BigEarthNet-S2") + b"/\xff\xfe")  # noqa: PTH102
    with pytest.raises(ValueError, match=r"root: no patch folder in .*\(found: 'notes', '\\udcff\\udcfe'\)"):
        open_all(tmp_path / "other")
    with pytest.raises(ValueError, match=r"version: v2 needs .*metadata\.parquet"):
        open_all(v1, version="v2")


def test_other_things_beside_patches_are_passed_over(v1: Path) -> None:
    (v1 / "BigEarthNet-v1.0" / ".DS_Store").touch()
    os.mkdir(os.fsencode(v1 / "BigEarthNet-v1.0") + b"/S2B_MSIL2A_20170924T93020_9_\xff")  # noqa: PTH102
    assert len(open_all(v1)) == 4


def test_a_wrong_table_is_named(v2: Path) -> None:
    good = (v2 / "metadata.parquet").read_bytes()
    (v2 / "metadata.parquet").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"root: .*metadata\.parquet is no metadata of BigEarthNet v2"):
        open_all(v2)
    row = {"patch_id": names_v2(0)[0], "labels": ["Pastures"], "split": "train", "country": "?", "s1_name": ""}
    for change, match in [
        ({"patch_id": "../../../etc/passwd"}, r"'\.\./\.\./\.\./etc/passwd' is no name of a patch"),
        ({"s1_name": "S1A"}, "'S1A' is no name of a patch"),
        ({"s1_name": names_v2(0)[1], "labels": ["Vineyards"]}, r"labels \['Vineyards'\] are not among the 19"),
        ({"s1_name": names_v2(0)[1], "split": "dev"}, "not in tuple"),
    ]:
        write_table(v2 / "metadata.parquet", [{**row, **change}])
        with pytest.raises(ValueError, match=match):
            open_all(v2)
    write_table(v2 / "metadata.parquet", [{"patch_id": names_v2(0)[0]}])
    with pytest.raises(ValueError, match="it has no column labels, split, country, s1_name"):
        open_all(v2)


def test_a_part_of_v2_is_not_taken_for_the_whole(v2: Path) -> None:
    shutil.rmtree(next((v2 / "BigEarthNet-S1").iterdir()))
    with pytest.raises(ValueError, match=r"names 2 scenes of split 'all', 1 of them are not there, such as .*S1A_"):
        open_all(v2)
    assert len(open_all(v2, tiles=["sentinel2_l2a@10m"])) == 4


def test_a_missing_map_is_a_bad_sample(v2: Path) -> None:
    next(v2.glob("Reference_Maps/*/*/*.tif")).unlink()
    source = open_all(v2, label="map", snow_and_clouds=True)
    for index, patch in enumerate(keys(source)):
        if list(v2.glob(f"Reference_Maps/*/{patch}/*.tif")):
            source.read(index)
        else:
            with pytest.raises(OSError, match=f"{patch}_reference_map"):
                source.read(index)
    shutil.rmtree(v2 / "Reference_Maps")
    with pytest.raises(ValueError, match="label: map needs the folder Reference_Maps"):
        open_all(v2, label="map")


def test_wrong_values_are_refused(archive_v1: Path, archive_v2: Path) -> None:
    with pytest.raises(ValueError, match="n_classes must be 19 or 43"):
        Config("x", n_classes=10)
    with pytest.raises(ValueError, match="cell_deg must be above 0"):
        Config("x", cell_deg=-1.0)
    with pytest.raises(ValueError, match=r"tiles: no tile 'sentinel2_l2a@10'; did you mean 'sentinel2_l2a@10m'"):
        open_all(archive_v1, tiles=["sentinel2_l2a@10"])
    with pytest.raises(ValueError, match="tiles: none is named"):
        open_all(archive_v1, tiles=[])
    with pytest.raises(ValueError, match="label: v1 has no class maps"):
        open_all(archive_v1, label="map")
    with pytest.raises(ValueError, match="n_classes: v2 names 19 classes"):
        open_all(archive_v2, n_classes=43)
    with pytest.raises(ValueError, match="split_by: v2 has official splits"):
        open_all(archive_v2, split_by="geography")


def test_the_index_is_made_once_and_kept(v1: Path, own_cache: Path) -> None:
    expected = open_all(v1).fingerprint()
    (index,) = v1.glob(".ssl_eo-bigearthnet-*.npy")
    for path in v1.glob("*/*/*.json"):
        path.unlink()  # no longer needed
    assert open_all(v1).fingerprint() == expected
    index.unlink()
    v1.chmod(0o555)  # an archive that others look after
    try:
        open_all(v1)
        assert not list(v1.glob(".ssl_eo*"))
        assert len(list((own_cache / "ssl_eo").glob(".ssl_eo-bigearthnet-*.npy"))) == 1
    finally:
        v1.chmod(0o755)


def test_a_damaged_index_is_made_anew(v1: Path) -> None:
    expected = open_all(v1).fingerprint()
    (index,) = v1.glob(".ssl_eo-bigearthnet-*.npy")
    index.write_bytes(index.read_bytes()[:200])
    assert open_all(v1).fingerprint() == expected


def test_a_source_pickles_small_and_reads_the_same(archive_v1: Path) -> None:
    source = open_all(archive_v1)
    sample = loaded(source.read(3))
    data = pickle.dumps(source)
    again = loaded(pickle.loads(data).read(3))
    assert b"MSIL2A" not in data  # the table of names stays on disk
    for name, tile in sample.tiles.items():
        np.testing.assert_array_equal(again.tiles[name].pixels, tile.pixels)


def test_fingerprint_follows_the_content_not_the_place(v1: Path, v2: Path, tmp_path: Path) -> None:
    for root in (v1, v2):
        before = open_all(root).fingerprint()
        moved = root.rename(tmp_path / f"moved_{root.name}")
        assert open_all(moved).fingerprint() == before
        assert open_all(moved, tiles=["sentinel1_grd"]).fingerprint() != before
    of_maps = open_all(tmp_path / "moved_v2", label="map").fingerprint()
    assert of_maps != before
    assert Source(Config(str(tmp_path / "moved_v2"))).fingerprint() != before
    (path, *_) = sorted((tmp_path / "moved_v2").glob("Reference_Maps/*/*/*.tif"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last pixel
    path.write_bytes(data)
    assert open_all(tmp_path / "moved_v2", label="map").fingerprint() != of_maps


def test_the_real_pairs_of_v1(real_samples: Callable[[str], Path]) -> None:
    root = real_samples("s1_s2_pairs/bigearthnet_v1")
    source = open_all(root)
    assert len(source) == 6
    samples = [loaded(source.read(i)) for i in range(6)]
    for sample in samples:
        check_sample(sample, source.schema)
        fine, radar = (sample.tiles[n].pixels for n in ("sentinel2_l2a@10m", "sentinel1_grd"))
        assert 0 < fine.mean() < 6000
        assert radar[0].mean() > radar[1].mean()  # VV is stronger than VH
        assert sample.label.any()
    assert not source.schema["sentinel1_grd"].optional
    first = samples[0]
    assert first.tiles["sentinel1_grd"].date == "2017-06-13T16:50:43"
    assert (first.meta["latitude"], first.meta["longitude"]) == pytest.approx((48.222, 13.721), abs=1e-3)
    assert named(first.label, source) == {
        "Arable land",
        "Land principally occupied by agriculture, with significant areas of natural vegetation",
    }
    of_43 = open_all(root, n_classes=43)
    assert named(of_43.read(4).label, of_43) == {
        "Coniferous forest",
        "Mixed forest",
        "Transitional woodland/shrub",
        "Peatbogs",
        "Water bodies",
    }


@pytest.mark.parametrize(("dataset", "sensor"), [("sentinel2", "sentinel2_l2a"), ("sentinel1", "sentinel1_grd")])
def test_the_real_patches_of_v2_in_one_hdf5_file(
    dataset: str, sensor: str, real_samples: Callable[[str], Path]
) -> None:
    path = real_samples("bigearthnet_v2_s1s2/ben_v2_s1s2_120px.h5")
    options = {"dataset": dataset, "sensor": sensor, "split": "train", "meta_datasets": ["patch_id"]}
    source = Hdf5Source(Hdf5Config(str(path), label_dataset="landcover19", n_statistics_samples=79, **options))
    assert len(source) == 79
    assert source.label_names == NOMENCLATURE.names_19
    sample = source.read(0)
    check_sample(sample, source.schema)
    assert sample.label.shape == (120, 120)
    schema = source.schema[sensor]
    assert schema.bands == (("B02", "B03", "B04", "B08") if dataset == "sentinel2" else ("VV", "VH"))
    classes = Hdf5Source(Hdf5Config(str(path), label_dataset="multilabel19", n_statistics_samples=2, **options))
    present = sorted(set(np.unique(sample.label).tolist()) - {IGNORED})
    assert np.flatnonzero(classes.read(0).label).tolist() == present


def test_corine_codes_of_the_real_maps_become_the_19_classes(real_samples: Callable[[str], Path]) -> None:
    import h5py

    with h5py.File(real_samples("bigearthnet_v2_s1s2/ben_v2_s1s2_120px.h5")) as file:
        codes, expected = file["clc"][:], file["landcover19"][:]
    np.testing.assert_array_equal(np.stack([NOMENCLATURE.of_codes(c, 19) for c in codes]), expected)
    assert Counter(expected.reshape(-1).tolist()).most_common(1)[0][1] > 1000
