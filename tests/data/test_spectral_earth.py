from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives.spectral_earth import name_of, pixels_of, write_patch, write_split
from archives.tiffs import write_raster

from ssl_eo.data.sources.spectral_earth import Config, Source
from ssl_eo.data.stacking import check_sample
from ssl_eo.sensors import load_sensor

pytest.importorskip("rasterio")

N = 4


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spectral_earth")
    for n in range(N):
        write_patch(root, n)
    write_split(root, "train", (2, 0, 1))
    write_split(root, "val", (3,))
    return root


@pytest.fixture
def root(archive: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(archive, tmp_path / "copy"))


def source(root: Path, **options: Any) -> Source:
    return Source(Config(str(root), **options))


def test_a_sample_holds_202_bands_as_stored(archive: Path) -> None:
    patches = source(archive)
    assert len(patches) == 3
    sample = patches.read(0)
    check_sample(sample, patches.schema)
    assert sample.key == patches.locate(0)[0] == f"scene_1/{name_of(2)}"
    tile = sample.tiles["enmap"]
    assert (tile.gsd_m, tile.date) == (30.0, "2022-11-03T16:24:38Z")
    np.testing.assert_array_equal(tile.pixels, pixels_of(2))
    assert sample.meta["latitude"] == pytest.approx(46.1, abs=0.2)
    assert sample.meta["longitude"] == pytest.approx(7.7, abs=0.1)


def test_bands_in_water_vapour_are_left_out(archive: Path) -> None:
    bands = source(archive).schema["enmap"].bands
    left_out = [i for i, b in enumerate(load_sensor("enmap").band_names, 1) if b not in bands]
    assert left_out == [*range(127, 142), *range(161, 168)]
    assert len(bands) == 202


def test_statistics_are_measured_as_stored(archive: Path) -> None:
    schema = source(archive).schema["enmap"]
    pixels = np.stack([pixels_of(n) for n in (0, 1, 2)]).astype(np.float64)
    np.testing.assert_allclose(schema.mean, pixels.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(schema.std, pixels.std(axis=(0, 2, 3)))


def test_values_outside_the_usual_range_stay_and_no_data_is_left_out_of_statistics(root: Path) -> None:
    pixels = pixels_of(3)
    pixels[:, :5], pixels[:, 5:9], pixels[:, 9:20] = -300, 15_000, -32_768
    write_raster(root / "enmap" / "scene_1" / f"{name_of(3)}.tif", pixels, crs=None)
    patches = source(root, split="val")
    np.testing.assert_array_equal(patches.read(0).tiles["enmap"].pixels, pixels)
    measured = np.delete(pixels, range(9, 20), axis=1).astype(np.float64)
    np.testing.assert_allclose(patches.schema["enmap"].mean, measured.mean(axis=(1, 2)))


def test_float_copies_and_files_of_all_bands_are_read(tmp_path: Path) -> None:
    for n in range(2):
        write_patch(tmp_path, n, dtype="float32")
    write_patch(tmp_path, 2, dtype="float32", n_bands=224)
    patches = source(tmp_path, split="all")
    assert patches.schema["enmap"].dtype == "float32"
    for i in range(3):
        check_sample(patches.read(i), patches.schema)
    values = patches.read(2).tiles["enmap"].pixels[:, 0, 0]
    assert (values[125], values[126], values[144], values[145]) == (
        1450.0,
        1610.0,
        1790.0,
        1870.0,
    )  # B126 B142 B160 B168


def test_keys_of_long_names_are_short_and_different(root: Path) -> None:
    long = f"{name_of(0)}_001_V010110_20221118T145147Z-Y01460273_X03110438"
    for folder in ("scene_0", "scene_1"):
        shutil.copy(root / "enmap" / "scene_0" / f"{name_of(0)}.tif", root / "enmap" / folder / f"{long}.tif")
    patches = source(root, split="all")
    keys = [key for key, name in map(patches.locate, range(len(patches))) if long in name]
    assert len(set(keys)) == 2
    assert {len(key) for key in keys} == {80}
    assert {key[:60] for key in keys} == {long[:60]}


@pytest.mark.parametrize("pattern", ["scene_{}/{}.tif", "scene_{}/{}", "enmap/scene_{}/{}.tif", "enmap/scene_{}/{}"])
def test_lists_name_files_in_any_usual_way(root: Path, pattern: str) -> None:
    write_split(root, "train", (1, 3), pattern)
    patches = source(root)
    assert [patches.read(i).key for i in range(2)] == [f"scene_{n // 2}/{name_of(n)}" for n in (1, 3)]


def test_splits_are_published_lists_or_cells(archive: Path, tmp_path: Path) -> None:
    assert [len(source(archive, split=s)) for s in ("train", "val", "all")] == [3, 1, 4]
    with pytest.raises(ValueError, match=r"test\.txt cannot be read .*or take split_by: geography"):
        source(archive, split="test")
    for n in range(12):
        write_patch(tmp_path, n)
    parts = {s: source(tmp_path, split=s, split_by="geography", n_statistics_samples=1) for s in ("train", "test")}
    keys = {s: {p.locate(i)[0] for i in range(len(p))} for s, p in parts.items()}
    assert keys["train"] & keys["test"] == set()
    assert len(keys["train"] | keys["test"]) >= 9
    before = [parts["test"].read(i).meta["latitude"] for i in range(len(parts["test"]))]
    again = source(tmp_path, split="test", split_by="geography", n_statistics_samples=1)  # from the columns on disk
    assert [again.read(i).meta["latitude"] for i in range(len(again))] == before


def test_a_file_that_cannot_be_opened_belongs_to_train(root: Path) -> None:
    (root / "enmap" / "scene_0" / f"{name_of(0)}.tif").write_bytes(b"no TIFF")
    patches = source(root, split_by="geography")
    assert f"scene_0/{name_of(0)}" in [patches.locate(i)[0] for i in range(len(patches))]


def test_damaged_patches_raise_what_the_loader_quarantines(root: Path) -> None:
    for n in range(4, 9):
        write_patch(root, n)
    paths = [root / "enmap" / f"scene_{n // 2}" / f"{name_of(n)}.tif" for n in range(9)]
    data = paths[4].read_bytes()
    paths[4].write_bytes(data[: len(data) // 2])
    write_raster(paths[5], pixels_of(5, n_bands=198), crs=None)
    write_raster(paths[6], pixels_of(6, side=64), crs=None)
    write_raster(paths[7], pixels_of(7, dtype="float32"), crs=None)
    paths[8].unlink()
    write_split(root, "train", range(9))
    patches = source(root)
    for index, match in [
        (4, rf"{name_of(4)}\.tif"),
        (5, r"\(198, 128, 128, 'int16'\); expected \(202, 128, 128, 'int16'\), or 224 bands"),
        (6, r"\(202, 64, 64, 'int16'\)"),
        (7, r"\(202, 128, 128, 'float32'\)"),
        (8, rf"{name_of(8)}\.tif"),
    ]:
        with pytest.raises((ValueError, OSError), match=match):
            patches.read(index)
        check_sample(patches.read(index % 4), patches.schema)


def test_names_that_lead_out_of_the_archive_or_are_not_utf8_are_refused(root: Path) -> None:
    path = write_split(root, "train", (0, 1))
    path.write_text(path.read_text() + "../../secret.tif\n")
    with pytest.raises(ValueError, match="leads out of this folder"):
        source(root).read(2)
    path.write_bytes(path.read_bytes() + b"\xff.tif\n")
    with pytest.raises(ValueError, match=r"train\.txt is not UTF-8"):
        source(root)
    os.link(root / "enmap" / "scene_0" / f"{name_of(0)}.tif", os.fsencode(root / "enmap") + b"/\xff.tif")
    patches = source(root, split="all")
    names = [patches.locate(i) for i in range(len(patches))]
    assert names[-1] == ("\\xff", "enmap/\\xff.tif")
    with pytest.raises(ValueError, match=r"is not UTF-8; rename the file"):
        patches.read(len(patches) - 1)


def test_a_wrong_root_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root: no folder enmap in"):
        source(tmp_path / "nowhere")
    (tmp_path / "empty" / "enmap").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"root: no \.tif in"):
        source(tmp_path / "empty", split="all")
    path = write_split(root, "train", (0,), "{}_{}_elsewhere")
    with pytest.raises(ValueError, match=r"root: none of 1 names in .*train\.txt is a file in"):
        source(root)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"train\.txt is empty"):
        source(root)


def test_other_dtypes_and_constant_bands_are_refused(tmp_path: Path) -> None:
    write_patch(tmp_path, 0, dtype="uint8")
    with pytest.raises(ValueError, match=r"holds uint8, expected int16 or float32"):
        source(tmp_path, split="all")
    pixels = pixels_of(0)
    pixels[5:7] = 3
    write_raster(tmp_path / "enmap" / "scene_0" / f"{name_of(0)}.tif", pixels, crs=None)
    with pytest.raises(ValueError, match=r"2 bands have no data, or one value only: B006, B007"):
        source(tmp_path, split="all")


def test_fingerprint_follows_the_content_not_the_place(root: Path) -> None:
    before = source(root).fingerprint()
    moved = root.rename(root.with_name("moved"))
    assert source(moved).fingerprint() == before
    assert source(moved, split="all").fingerprint() != before
    write_raster(moved / "enmap" / "scene_0" / f"{name_of(0)}.tif", pixels_of(9), crs=None)
    assert source(moved).fingerprint() != before


def test_a_source_can_be_pickled_while_open(archive: Path) -> None:
    patches = source(archive)
    expected = patches.read(1).tiles["enmap"].pixels
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(patches)).read(1).tiles["enmap"].pixels, expected)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="cell_deg must be above 0"):
        Config("x", cell_deg=91.0)
    with pytest.raises(ValueError, match="n_statistics_samples must be at least 1"):
        Config("x", n_statistics_samples=0)


def test_a_real_enmap_patch_of_all_bands(tmp_path: Path, real_samples: Callable[[str], Path]) -> None:
    (real,) = real_samples("hyspecnet11k").glob("*/*SPECTRAL_IMAGE.TIF")
    (tmp_path / "enmap").mkdir()
    (tmp_path / "enmap" / real.name).symlink_to(real)
    patches = source(tmp_path, split="all")
    sample = patches.read(0)
    check_sample(sample, patches.schema)
    pixels = sample.tiles["enmap"].pixels
    assert pixels.shape == (202, 128, 128)
    assert sample.tiles["enmap"].date == "2022-11-03T16:24:38Z"
    assert (pixels != -32_768).all()  # no-data is in the bands that are left out
    assert sample.meta["longitude"] == pytest.approx(-75, abs=12)  # UTM zone 18
