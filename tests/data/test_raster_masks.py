"""Folders of rasters with masks: pairing, windows, classes, splits."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("rasterio")

from archives.tiffs import write_raster

from ssl_eo.config import build
from ssl_eo.data.opening import SourceConfig
from ssl_eo.data.sources import geotiff, raster_masks
from ssl_eo.eval.tasks import Task, TaskConfig

pytestmark = pytest.mark.usefixtures("own_cache")

SIDE = 32
OPTIONS = {"sensor": "naip", "classes": ["dry", "wet", "built"], "ignore": 255, "split": "all"}


def image_of(n: int) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(20, 230, (4, SIDE, SIDE), np.uint8)


def mask_of(n: int) -> NDArray[np.uint8]:
    mask = np.random.default_rng(1000 + n).integers(0, 3, (SIDE, SIDE), np.uint8)
    mask[0] = 255  # nobody labelled the first row
    return mask


def write_pairs(root: Path, n: int = 8, image: str = "images/{}.tif", mask: str = "masks/{}.tif", **place: Any) -> Path:
    for i in range(n):
        where = place or {"corner": (600_000.0, 4_000_000.0 + 111_200.0 * i)}  # a degree apart
        write_raster(root / image.format(f"s{i}"), image_of(i), **where)
        write_raster(root / mask.format(f"s{i}"), mask_of(i)[None], **where)
    return root


def config(root: Path, **options: Any) -> raster_masks.Config:
    return build(raster_masks.Config, {"root": str(root), **OPTIONS, **options}, "")


def open_masks(root: Path, **options: Any) -> raster_masks.Source:
    return raster_masks.Source(config(root, **options))


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{}.tif", "masks/{}.tif"),
        ("images/{}.tif", "images/{}.mask.tif"),  # of which the pattern of the images fits the masks, too
        ("training/chip_{}_merged.tif", "training/chip_{}.mask.tif"),
    ],
)
def test_images_and_masks_are_paired_by_key(image: str, mask: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, image=image, mask=mask)
    source = open_masks(tmp_path, images=image.format("{key}"), masks=mask.format("{key}"))
    assert len(source) == 8
    assert source.label_names == ("dry", "wet", "built")
    for i in range(8):
        sample = source.read(i)
        n = int(sample.key.removeprefix("s"))
        assert np.array_equal(sample.tiles["naip"].array, image_of(n))
        assert np.array_equal(sample.label, mask_of(n))
        assert source.locate(i) == (sample.key, image.format(sample.key))
        assert {"latitude", "longitude"} <= sample.meta.keys()


def test_windows_of_image_and_mask_show_the_same_ground(tmp_path: Path) -> None:
    source = open_masks(write_pairs(tmp_path), window_px=16)
    assert len(source) == 8 * 4
    assert source.schema["naip"].shape == (16, 16)
    for i in range(len(source)):
        sample = source.read(i)
        key, top, left = sample.key.rsplit("_", 2)
        n, rows, columns = int(key[1:]), slice(int(top), int(top) + 16), slice(int(left), int(left) + 16)
        assert np.array_equal(sample.tiles["naip"].array, image_of(n)[:, rows, columns])
        assert np.array_equal(sample.label, mask_of(n)[rows, columns])


def test_it_is_the_folder_of_geotiffs_with_names(tmp_path: Path) -> None:
    cfg = config(write_pairs(tmp_path))
    ours, plain = raster_masks.Source(cfg), geotiff.Source(cfg.rasters())
    assert ours.schema == plain.schema
    assert ours.chunk_size == plain.chunk_size
    other = open_masks(tmp_path, classes=["a", "b", "c"])
    assert len({ours.fingerprint(), plain.fingerprint(), other.fingerprint()}) == 3
    assert pickle.loads(pickle.dumps(ours)).fingerprint() == ours.fingerprint()


def test_splits_by_place_and_by_name(tmp_path: Path) -> None:
    write_pairs(tmp_path, n=30)
    found: dict[str, dict[str, set[str]]] = {}
    for split_by in ("geography", "name"):
        sources = {s: open_masks(tmp_path, split=s, split_by=split_by) for s in ("train", "val", "test")}
        found[split_by] = {s: {src.locate(i)[0] for i in range(len(src))} for s, src in sources.items()}
        assert set().union(*found[split_by].values()) == {f"s{i}" for i in range(30)}
        assert sum(map(len, found[split_by].values())) == 30
    assert found["geography"] != found["name"]


def test_windows_share_their_raster_and_rasters_their_cell(tmp_path: Path) -> None:
    write_pairs(tmp_path, n=30)
    windows = open_masks(tmp_path, window_px=16)
    assert [windows.read(i).meta["group"] for i in range(8)] == ["s0"] * 4 + ["s1"] * 4
    assert "group" not in open_masks(tmp_path).read(0).meta
    groups: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        source = open_masks(tmp_path, split=split, window_px=16, cell_deg=3.0)
        for i in range(len(source)):
            meta = source.read(i).meta
            latitude, longitude, side = meta["group"].split()
            assert float(latitude) <= meta["latitude"] < float(latitude) + 3
            assert float(longitude) <= meta["longitude"] < float(longitude) + 3
            assert side == "+3"
            groups.setdefault(meta["group"], set()).add(split)
    assert len(groups) >= 10
    assert all(len(splits) == 1 for splits in groups.values())


def test_another_mask_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    before = open_masks(write_pairs(tmp_path)).fingerprint()
    path = tmp_path / "masks" / "s7.tif"
    size = path.stat().st_size
    mask = mask_of(7)
    mask[5, 5] = (mask[5, 5] + 1) % 3
    write_raster(path, mask[None], corner=(600_000.0, 4_000_000.0 + 111_200.0 * 7))
    assert path.stat().st_size == size
    assert open_masks(tmp_path).fingerprint() != before


def test_other_pixels_are_noticed_where_statistics_are_given(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "rasters")
    given = tmp_path / "statistics.json"
    given.write_text(json.dumps({"bands": ["R", "G", "B", "N"], "mean": [1.0] * 4, "std": [1.0] * 4}))
    before = open_masks(root, statistics=str(given)).fingerprint()
    assert open_masks(root, statistics=str(given)).fingerprint() == before
    write_raster(root / "images" / "s3.tif", image_of(99), corner=(600_000.0, 4_000_000.0 + 111_200.0 * 3))
    assert open_masks(root, statistics=str(given)).fingerprint() != before


def test_rasters_without_a_place_are_split_by_name(tmp_path: Path) -> None:
    write_pairs(tmp_path, n=20, crs=None)
    with pytest.raises(ValueError, match=r"split: no place of .* is in 'train' \(cells of 0\.5 degrees\)"):
        open_masks(tmp_path, split="train")
    assert 8 <= len(open_masks(tmp_path, split="train", split_by="name")) < 20


def test_a_task_takes_it(tmp_path: Path) -> None:
    write_pairs(tmp_path / "training", n=6)
    write_pairs(tmp_path / "validation", n=4)
    source = {"name": "raster_masks", **OPTIONS, "window_px": SIDE}
    splits = {
        split: {**source, "root": str(tmp_path / folder)}
        for split, folder in (("train", "training"), ("test", "validation"))
    }
    shared = {"name": "t", "kind": "segmentation", "ignore": 255, "probes": ["ridge"]}
    task = Task(build(TaskConfig, {**shared, **splits}, ""))
    assert (len(task.train), len(task.test)) == (6, 4)
    assert task.train.labels.shape == (6, SIDE, SIDE)
    assert task.class_names == ("dry", "wet", "built")
    whole = {split: {**options, "window_px": None} for split, options in splits.items()}
    with pytest.raises(ValueError, match=r"task t: tiles of 'naip' may differ in size; .* window_px cuts rasters"):
        Task(build(TaskConfig, {**shared, **whole}, ""))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["one"]}, "classes must name two classes at least, and each once"),
        ({"ignore": 1}, "ignore is 1, the number of class 'wet'"),
        ({"images": "a/{key}.tif", "masks": "a/{key}.tif"}, "is the pattern of the images too"),
        ({"stride_px": 8}, "stride_px and rows_ratio need window_px"),
        ({"gsd_m": 0.0}, "gsd_m must be positive metres"),
        ({"images": "images/*.tif"}, r"images: 'images/\*\.tif' has no \{key\}"),
        ({"masks": "nowhere/{key}.tif"}, r"root: of 8 samples of .* only 0 can be used; the last problem: s\d has no"),
        (
            {"ignore": None},
            r"root: none of the samples looked at can be used: the mask of s0 holds 255, expected classes 0 to 2",
        ),
        ({"sensor": "naip", "bands": ["R", "G", "B"]}, r"images: none of 8 rasters can be used; .* holds 4 bands"),
    ],
)
def test_wrong_options_are_refused_in_our_words(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        open_masks(tmp_path, **options)
    assert "tiles[0]" not in str(refusal.value)
    assert "label_pattern" not in str(refusal.value)


def test_it_is_built_from_a_config(tmp_path: Path) -> None:
    raw = {"name": "raster_masks", "root": str(tmp_path), "sensor": "naip", "classes": ["a", "b"]}
    assert build(SourceConfig, raw, "").options.masks == "masks/{key}.tif"


def test_windows_of_a_part_of_an_image(tmp_path: Path) -> None:
    """Those that lie wholly in it, and no row of an image is in two parts that do not overlap."""
    root = write_pairs(tmp_path, 2)
    options = {"window_px": 8, "stride_px": 4}
    rows = {}
    for part in ((0.0, 0.5), (0.5, 0.75), (0.75, 1.0), (0.3, 0.7)):
        source = open_masks(root, **options, rows_ratio=list(part))
        tops = {int(source.locate(i)[0].split("_")[1]) for i in range(len(source))}
        rows[part] = sorted(tops)
        for i in range(len(source)):
            sample = source.read(i)
            n, top, left = (int(text) for text in sample.key.removeprefix("s").split("_"))
            (tile,) = sample.tiles.values()
            assert np.array_equal(tile.array, image_of(n)[:, top : top + 8, left : left + 8])
            assert np.array_equal(sample.label, mask_of(n)[top : top + 8, left : left + 8])
    assert rows == {(0.0, 0.5): [0, 4, 8], (0.5, 0.75): [16], (0.75, 1.0): [24], (0.3, 0.7): [12]}
    whole, upper, lower = (open_masks(root, **options, **o).fingerprint() for o in (
        {}, {"rows_ratio": [0.0, 0.25]}, {"rows_ratio": [0.25, 0.5]}
    ))  # fmt: skip
    assert len({whole, upper, lower}) == 3


def test_a_part_without_a_window_is_refused(tmp_path: Path) -> None:
    root = write_pairs(tmp_path, 1)
    with pytest.raises(ValueError, match=r"no window of 16 pixels lies in \[0.4, 0.6\]"):
        open_masks(root, window_px=16, rows_ratio=[0.4, 0.6])
    with pytest.raises(ValueError, match=r"must rise from 0 at least to 1 at most, got \[0.5, 0.5\]"):
        config(root, window_px=16, rows_ratio=[0.5, 0.5])
