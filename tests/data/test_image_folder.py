"""Folders of images, one a class: order of classes, splits, sizes, pictures and GeoTIFFs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("rasterio")

from archives.tiffs import write_raster
from PIL import Image

from ssl_eo.config import build
from ssl_eo.data.pack import pack
from ssl_eo.data.sources import image_folder, shards
from ssl_eo.data.sources._splits import cell_split, name_split

pytestmark = pytest.mark.usefixtures("own_cache")

CLASSES = ("Forest", "lake", "Town")  # as a file manager sorts them, and not as Python does


def pixels_of(seed: int, shape: tuple[int, ...] = (16, 16, 3)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(20, 230, shape, np.uint8)


def write_pictures(root: Path, n: int = 5, suffix: str = "png", classes: tuple[str, ...] = CLASSES) -> Path:
    for k, label in enumerate(classes):
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(pixels_of(100 * k + i)).save(root / label / f"{label} {i}.{suffix}")
    return root


def write_rasters(root: Path, n: int = 12) -> dict[str, tuple[float, float]]:
    """Corners by key: one place in two of each class, a degree apart."""
    corners = {}
    for i in range(n):
        label = ("dry", "wet")[i % 2]
        corner = 600_000.0, 4_000_000.0 + 111_200.0 * (i // 2)
        write_raster(root / label / f"{i}.tif", pixels_of(i, (4, 16, 16)), corner=corner)
        corners[f"{label}/{i}"] = corner
    return corners


def open_folder(root: Path, **options: Any) -> image_folder.Source:
    return image_folder.Source(build(image_folder.Config, {"root": str(root), **options}, ""))


def keys_of(source: image_folder.Source) -> list[str]:
    return [source.locate(i)[0] for i in range(len(source))]


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG"])
def test_pictures_come_back_with_their_class(suffix: str, tmp_path: Path) -> None:
    source = open_folder(write_pictures(tmp_path, suffix=suffix), split="all")
    assert source.label_names == ("Forest", "Town", "lake")  # capitals come first
    assert len(source) == 15
    for i in range(len(source)):
        sample = source.read(i)
        label, name = sample.key.split("/")
        assert sample.label == source.label_names.index(label)
        assert source.locate(i) == (sample.key, f"{sample.key}.{suffix}")
        if suffix == "png":  # JPEG loses some
            expected = pixels_of(100 * CLASSES.index(label) + int(name.split()[1]))
            assert np.array_equal(sample.tiles["rgb"].array, expected.transpose(2, 0, 1))
    schema = source.schema["rgb"]
    assert (schema.bands, schema.dtype, schema.shape, schema.gsd_m) == (("R", "G", "B"), "uint8", (16, 16), 1.0)


def test_statistics_are_those_of_all_pixels_of_the_split(tmp_path: Path) -> None:
    source = open_folder(write_pictures(tmp_path), split="all")
    stack = np.stack([source.read(i).tiles["rgb"].array for i in range(len(source))]).astype(np.float64)  # [N, C, H, W]
    np.testing.assert_allclose(source.schema["rgb"].mean, stack.mean((0, 2, 3)))
    np.testing.assert_allclose(source.schema["rgb"].std, stack.std((0, 2, 3)))


def test_a_split_by_name_depends_on_names_alone(tmp_path: Path) -> None:
    root = write_pictures(tmp_path, n=40)
    whole = set(keys_of(open_folder(root, split="all")))
    parts = {split: set(keys_of(open_folder(root, split=split))) for split in ("train", "val", "test")}
    assert set().union(*parts.values()) == whole
    assert sum(map(len, parts.values())) == len(whole) == 120
    assert 0.6 < len(parts["train"]) / 120 < 0.8
    for split, keys in parts.items():
        assert {name_split(key, 0) for key in keys} == {split}
    (root / "Town" / "Town 3.png").unlink()
    assert set(keys_of(open_folder(root, split="train"))) == parts["train"] - {"Town/Town 3"}
    assert set(keys_of(open_folder(root, split="train", split_seed=1))) != parts["train"]


def test_folders_of_splits_share_their_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", classes=("Forest", "Town"))
    write_pictures(tmp_path / "valid", n=2, classes=("Town",))
    write_pictures(tmp_path / "test", n=3, classes=("lake",))
    sources = {s: open_folder(tmp_path, split=s, split_by="folder") for s in ("train", "val", "test", "all")}
    assert [len(source) for source in sources.values()] == [10, 2, 3, 15]
    assert {source.label_names for source in sources.values()} == {("Forest", "Town", "lake")}
    assert {key.split("/")[0] for key in keys_of(sources["val"])} == {"valid"}
    assert sources["test"].read(0).label == 2
    with pytest.raises(ValueError, match=r"root: .* holds no <class>/<name> .*; take split_by: folder"):
        open_folder(tmp_path)


def test_rasters_are_split_by_place(tmp_path: Path) -> None:
    corners = write_rasters(tmp_path, n=60)
    whole = open_folder(tmp_path, sensor="naip", split="all")
    places = {}
    for i in range(len(whole)):
        sample = whole.read(i)
        n = int(sample.key.split("/")[1])
        assert np.array_equal(sample.tiles["naip"].array, pixels_of(n, (4, 16, 16)))
        assert sample.tiles["naip"].gsd_m == 10.0
        places[sample.key] = sample.meta["latitude"], sample.meta["longitude"]
    assert places.keys() == corners.keys()
    found = {}
    for split in ("train", "val", "test"):
        for key in keys_of(open_folder(tmp_path, sensor="naip", split=split, split_by="geography")):
            assert cell_split(*places[key], 0.5, 0) == split
            found[key] = split
    assert found.keys() == places.keys()
    assert set(found.values()) == {"train", "val", "test"}
    for n in range(0, 60, 2):  # those of one place are in one split
        assert found[f"dry/{n}"] == found[f"wet/{n + 1}"]


def test_rasters_of_one_cell_are_of_one_group(tmp_path: Path) -> None:
    write_rasters(tmp_path, n=60)
    groups: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        source = open_folder(tmp_path, sensor="naip", split=split, split_by="geography")
        for i in range(len(source)):
            sample = source.read(i)
            south = np.floor(2 * sample.meta["latitude"]) / 2
            assert sample.meta["group"].startswith(f"{south:g} ")
            groups.setdefault(sample.meta["group"], set()).add(split)
    assert len(groups) == 30
    assert all(len(splits) == 1 for splits in groups.values())
    assert "group" not in open_folder(tmp_path, sensor="naip", split="train").read(0).meta


def test_other_pixels_are_noticed_where_statistics_are_given(tmp_path: Path) -> None:
    write_rasters(tmp_path / "naip")
    (tmp_path / "naip.json").write_text('{"bands": ["R", "G", "B", "N"], "mean": [1, 1, 1, 1], "std": [1, 1, 1, 1]}')
    options = {"sensor": "naip", "split": "all", "statistics": str(tmp_path / "naip.json")}
    before = open_folder(tmp_path / "naip", **options).fingerprint()
    path = tmp_path / "naip" / "dry" / "4.tif"
    size = path.stat().st_size
    write_raster(path, pixels_of(99, (4, 16, 16)), corner=(600_000.0, 4_000_000.0 + 111_200.0 * 2))
    assert path.stat().st_size == size
    assert open_folder(tmp_path / "naip", **options).fingerprint() != before


def test_images_of_another_size_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_pictures(tmp_path)
    Image.fromarray(pixels_of(7, (16, 15, 3))).save(root / "lake" / "odd.png")
    source = open_folder(root, split="all")
    assert len(source) == 15
    assert "1 of 16 images are not 16 x 16 pixels and are left out; same_size: false takes all" in caplog.text
    every = open_folder(root, split="all", same_size=False)
    assert len(every) == 16
    assert every.schema["rgb"].shape is None


def test_the_index_of_a_folder_notices_changes(tmp_path: Path) -> None:
    root = write_pictures(tmp_path, classes=("a", "b"))
    first = open_folder(root, split="all")
    assert open_folder(root, split="all").fingerprint() == first.fingerprint()
    Image.fromarray(pixels_of(7, (15, 16, 3))).save(root / "a" / "a 0.png")
    assert len(open_folder(root, split="all")) == 9
    Image.fromarray(pixels_of(8)).save(root / "a" / "a 0.png")
    again = open_folder(root, split="all")
    assert len(again) == 10
    assert again.fingerprint() != first.fingerprint()


def test_named_classes_keep_their_numbers(tmp_path: Path) -> None:
    root = write_pictures(tmp_path, classes=("b", "c"))
    source = open_folder(root, split="all", classes=["c", "a", "b"])
    assert source.label_names == ("c", "a", "b")
    assert {source.read(i).label for i in range(5)} == {2}
    with pytest.raises(ValueError, match=r"classes: .* has a folder 'c' \(classes: a, b\)"):
        open_folder(root, split="all", classes=["a", "b"])


def test_no_data_that_nobody_declared_is_named(tmp_path: Path) -> None:
    for i in range(4):
        pixels = pixels_of(i, (2, 16, 16)).astype(np.float32) / -10
        pixels[1, 3, 3] = -1e30 if i == 2 else pixels[1, 3, 3]
        write_raster(tmp_path / ("dry", "wet")[i % 2] / f"{i}.tif", pixels, descriptions=("VH", "VV"))
    with pytest.raises(
        ValueError, match=r"^sensor: band VV of tile sentinel1_grd holds -1\.0\d+e\+30, .* declare it in no_data"
    ):
        open_folder(tmp_path, sensor="sentinel1_grd", split="all")


@pytest.mark.timeout(30)  # without a look at what it is, the pipe is waited for
def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "Forest" / "Forest 0.png").unlink()
    os.mkfifo(tmp_path / "Forest" / "Forest 0.png")
    statistics = tmp_path / "statistics.json"
    statistics.write_text('{"bands": ["R", "G", "B"], "mean": [0, 0, 0], "std": [1, 1, 1]}')
    source = open_folder(tmp_path, split="all", statistics=str(statistics))
    with pytest.raises(OSError, match=r"Forest 0\.png is not a readable JPEG or PNG: .*it is no regular file"):
        source.read(0)
    assert source.read(1).key == "Forest/Forest 1"
    assert source.fingerprint()  # looks into some of the files


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    root = write_pictures(tmp_path, classes=("a", "b"))
    (root / "README.txt").write_text("read me")
    (root / "a" / "Thumbs.db").write_bytes(b"")
    (root / "a" / "._a 0.png").write_bytes(b"")
    (root / "empty").mkdir()
    source = open_folder(root, split="all")
    assert (len(source), source.label_names) == (10, ("a", "b"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "a" / "a 0.jpg").write_bytes(b""), r"a/a 0\.jpg and a/a 0\.png, which have one key"),
        (lambda root: (root / "a" / "z.tif").write_bytes(b""), r"a/a 0\.png and a/z\.tif; put GeoTIFFs and pictures"),
    ],
)
def test_folders_that_mean_two_things_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    root = write_pictures(tmp_path, classes=("a", "b"))
    spoil(root)
    with pytest.raises(ValueError, match=message):
        open_folder(root, split="all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_by": "geography"}, "split_by: JPEGs and PNGs do not say where they lie; take split_by: name"),
        ({"drop_bands": ["R"]}, "drop_bands: bands of JPEGs and PNGs cannot be left out"),
        ({"cell_deg": 0}, "cell_deg must be above 0"),
        ({"gsd_m": -1.0}, "gsd_m must be positive metres"),
        ({"n_statistics_samples": 0}, "n_statistics_samples must be at least 1"),
        ({"classes": []}, "classes must name at least one class"),
        ({"bands": ["R", "X", "B"]}, "rgb has no band 'X'"),
        ({"bands": []}, r"bands must name at least one, and each once, got \[\]"),
        ({"bands": ["R", "R", "B"]}, "bands must name at least one, and each once"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = write_pictures(tmp_path, classes=("a", "b"))
    with pytest.raises(ValueError, match=message):
        open_folder(root, **options)


def test_grey_pictures_have_one_band(tmp_path: Path) -> None:
    for n in range(4):
        path = tmp_path / ("a", "b")[n % 2] / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels_of(n, (8, 8))).save(path)
    source = open_folder(tmp_path, split="all", bands=["G"])
    assert np.array_equal(source.read(0).tiles["rgb"].array, pixels_of(0, (1, 8, 8)).reshape(1, 8, 8))


@pytest.mark.parametrize("kind", ["pictures", "rasters"])
def test_it_travels_to_workers_and_into_shards(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    if kind == "pictures":
        source = open_folder(write_pictures(root), split="all")
    else:
        write_rasters(root)
        source = open_folder(root, sensor="naip", split="all")
    (name,) = source.schema
    copy = pickle.loads(pickle.dumps(source))
    report = pack(source, tmp_path / "packed", split=None)
    packed = shards.Source(shards.Config(str(report.folder)))
    assert packed.label_names == source.label_names
    for i in (0, len(source) - 1):
        sample = source.read(i)
        for other in (copy.read(i), packed.read(i)):
            assert (other.key, other.label) == (sample.key, sample.label)
            assert np.array_equal(other.tiles[name].array, sample.tiles[name].array)
