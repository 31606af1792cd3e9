from __future__ import annotations

import csv
import io
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives.geotiff import write_sparse
from archives.tiffs import write_raster
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.shards import ShardWriter
from ssl_eo.data.sources.eurosat import Config, Source, cell_split
from ssl_eo.data.stacking import check_sample


def jpeg(value: int, mode: str = "RGB") -> bytes:
    from PIL import Image

    pixels = np.full((64, 64, 3), (value, 100, 200), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty scenes in two training shards and one test shard, each in a cell of its own."""
    (tmp_path / "classes.json").write_text(json.dumps(["Forest", "River"]))
    rows = []
    for n, (shard, split) in enumerate([("train-000000", "train"), ("train-000001", "train"), ("test-000000", "test")]):
        with ShardWriter.create(tmp_path / f"{shard}.tar") as writer:
            for i in range(n, 40, 3):
                writer.add(f"Forest_{i}", {"jpg": jpeg(5 * i), "cls": str(i % 2).encode()})
                rows.append([f"Forest_{i}", split, i % 2, 40.25 + 0.5 * i, 10.25, i / 10])
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "split", "cls", "latitude", "longitude", "ndvi"], *rows])
    return tmp_path


def keys(source: Source) -> list[str]:
    return [source.locate(i)[0] for i in range(len(source))]


def test_a_sample_holds_pixels_label_and_meta(root: Path) -> None:
    source = Source(Config(str(root), split="all"))
    assert len(source) == 40
    assert source.label_names == ("Forest", "River")
    for index in range(40):
        sample = source.read(index)
        check_sample(sample, source.schema)
        i = int(sample.key.split("_")[1])
        assert sample.key == source.locate(index)[0]
        assert sample.label == i % 2
        assert sample.meta == {"latitude": 40.25 + 0.5 * i, "longitude": 10.25, "ndvi": i / 10}
        means = sample.tiles["sentinel2_tci"].pixels.mean(axis=(1, 2))
        np.testing.assert_allclose(means, [5 * i, 100, 200], atol=3)  # red is the first band, B04
    assert source.schema["sentinel2_tci"].bands == ("B04", "B03", "B02")


def test_a_split_by_file_is_that_of_the_shards(root: Path) -> None:
    train, test = (Source(Config(str(root), split=s, split_by="file")) for s in ("train", "test"))
    assert (len(train), len(test)) == (27, 13)
    assert {train.locate(i)[1] for i in range(27)} == {"train-000000.tar", "train-000001.tar"}
    with pytest.raises(ValueError, match=r"no 'val-\*\.tar' in .*'train-000000\.tar'"):
        Source(Config(str(root), split="val", split_by="file"))


def test_geographic_splits_part_the_data(root: Path) -> None:
    parts = [keys(Source(Config(str(root), split=s))) for s in ("train", "val", "test")]
    assert sorted(key for part in parts for key in part) == sorted(keys(Source(Config(str(root), split="all"))))
    assert 20 <= len(parts[0]) <= 36
    assert keys(Source(Config(str(root), split_seed=1))) != parts[0]
    with pytest.raises(ValueError, match=r"no sample .* is in 'val'"):
        Source(Config(str(root), split="val", cell_deg=90.0))


@settings(max_examples=50, deadline=None)
@given(st.integers(-180, 179), st.integers(-360, 359), st.tuples(*[st.floats(0.01, 0.99)] * 4), st.integers(0, 99))
def test_a_cell_is_in_one_split(i: int, j: int, inside: tuple[float, ...], seed: int) -> None:
    a, b, c, d = inside
    assert cell_split((i + a) / 2, (j + b) / 2, 0.5, seed) == cell_split((i + c) / 2, (j + d) / 2, 0.5, seed)


def test_cells_fall_into_splits_as_promised() -> None:
    counts = Counter(cell_split(i / 2, j / 2, 0.5, 0) for i in range(100) for j in range(100))
    assert counts["train"] == pytest.approx(7000, abs=200)
    assert counts["val"] == pytest.approx(1000, abs=120)
    assert counts["test"] == pytest.approx(2000, abs=160)


def test_damaged_samples_raise_what_the_loader_quarantines(root: Path) -> None:
    with ShardWriter.create(root / "test-000000.tar") as writer:
        good = jpeg(50)
        for i, data in enumerate([good, good[: len(good) // 2], b"not a picture", jpeg(50, "L")]):
            writer.add(f"bad_{i}", {"jpg": data, "cls": b"1"})
        writer.add("bad_4", {"jpg": good, "cls": b"one"})
        writer.add("bad_5", {"cls": b"1"})
    source = Source(Config(str(root), split="test", split_by="file"))
    assert source.read(0).label == 1
    for index, match in [
        (1, "(?i)truncated"),
        (2, "identify"),
        (3, "mode L, 64 x 64 pixels; expected RGB"),
        (4, "one"),
        (5, "jpg"),
    ]:
        with pytest.raises((ValueError, OSError), match=match):
            source.read(index)


def test_a_geographic_split_needs_places(root: Path) -> None:
    (root / "metadata.csv").unlink()
    with pytest.raises(ValueError, match=r"split_by: metadata\.csv .* no latitude for sample 'Forest_2'"):
        Source(Config(str(root)))
    assert Source(Config(str(root), split="all")).read(0).meta == {}


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        ("auto", r"neither EuroSAT shards.*\['notes'\]"),
        ("webdataset", r"no '\*\.tar'"),
        ("geotiff", r"no 'CLASS/KEY\.tif'"),
    ],
)
def test_a_wrong_root_is_named(tmp_path: Path, layout: Any, match: str) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match=match):
        Source(Config(str(tmp_path), layout=layout, split="all"))
    with pytest.raises(ValueError, match=r"no such folder|no 'CLASS"):
        Source(Config(str(tmp_path / "nowhere"), layout=layout))


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="cell_deg must be above 0"):
        Config("x", cell_deg=0.0)


def test_scenes_of_one_cell_are_of_one_group(root: Path) -> None:
    cells: Counter[str] = Counter()
    for split in ("train", "test"):
        source = Source(Config(str(root), split=split, cell_deg=1.0))
        for i in range(len(source)):
            meta = source.read(i).meta
            assert meta["group"] == f"{np.floor(meta['latitude']):g} 10 +1"
            cells[meta["group"]] += 1
    assert set(cells.values()) == {2}
    assert "group" not in Source(Config(str(root), split="train", split_by="file")).read(0).meta
    with (root / "metadata.csv").open(newline="") as file:
        head, *rows = list(csv.reader(file))
    with (root / "metadata.csv").open("w", newline="") as file:  # who knows better says so
        csv.writer(file).writerows([[*head, "group"], *([*row, "here"] for row in rows)])
    assert Source(Config(str(root), split="train")).read(0).meta["group"] == "here"


def test_fingerprint_follows_the_content_not_the_place(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = Source(Config(str(root)))
    copy = tmp_path_factory.mktemp("moved") / "copy"
    root.rename(copy)
    assert Source(Config(str(copy))).fingerprint() == source.fingerprint()
    assert Source(Config(str(copy), split="test")).fingerprint() != source.fingerprint()
    before = Source(Config(str(copy), split="test", split_by="file")).fingerprint()
    with ShardWriter.create(copy / "test-000000.tar") as writer:
        writer.add("Forest_2", {"jpg": jpeg(11), "cls": b"0"})
    assert Source(Config(str(copy), split="test", split_by="file")).fingerprint() != before


def test_a_source_can_be_pickled_while_open(root: Path) -> None:
    source = Source(Config(str(root), split="all"))
    sample = source.read(3)
    again = pickle.loads(pickle.dumps(source)).read(3)
    np.testing.assert_array_equal(again.tiles["sentinel2_tci"].pixels, sample.tiles["sentinel2_tci"].pixels)


def write_geotiff(path: Path, longitude: float) -> None:
    pytest.importorskip("rasterio")
    pixels = np.arange(1, 14, dtype=np.uint16)[:, None, None] * np.ones((13, 64, 64), np.uint16)
    write_raster(path, pixels, crs="EPSG:4326", corner=(longitude, 50.0), pixel=1e-4)


def test_geotiffs_have_b8a_last_and_know_their_place(tmp_path: Path) -> None:
    for i in range(30):
        write_geotiff(tmp_path / "River" / f"River_{i}.tif", 10.2 + 0.5 * i)
    source = Source(Config(str(tmp_path), split="all"))
    assert source.label_names[source.read(0).label] == "River"
    assert source.schema["sentinel2_l1c"].bands[7:] == ("B08", "B09", "B10", "B11", "B12", "B8A")
    check_sample(source.read(0), source.schema)
    assert source.read(0).tiles["sentinel2_l1c"].pixels[:, 0, 0].tolist() == list(range(1, 14))
    expected = [f"River_{i}" for i in range(30) if cell_split(49.99, 10.21 + 0.5 * i, 0.5, 0) == "train"]
    assert sorted(keys(Source(Config(str(tmp_path))))) == sorted(expected)
    write_geotiff(tmp_path / "Rivers" / "River_1.tif", 10.0)
    with pytest.raises(ValueError, match=r"no EuroSAT class: \['Rivers'\]"):
        Source(Config(str(tmp_path)))


def test_geotiffs_that_lead_out_or_are_huge_are_bad_samples(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    write_geotiff(tmp_path / "River" / "River_0.tif", 10.2)
    (tmp_path / "River" / "River_1.tif").write_text("<VRTDataset rasterXSize='64' rasterYSize='64'></VRTDataset>")
    write_sparse(tmp_path / "River" / "River_2.tif", 20_000, (0, 0), np.ones((13, 64, 64), np.uint16))
    source = Source(Config(str(tmp_path), split="all"))
    check_sample(source.read(0), source.schema)
    with pytest.raises(OSError, match=r"River_1\.tif is not a readable GeoTIFF"):
        source.read(1)
    with pytest.raises(ValueError, match=r"River_2\.tif has bands, .* \(13, 20000, 20000, .*; expected \(13, 64, 64"):
        source.read(2)


def test_the_fingerprint_of_geotiffs_follows_their_pixels(tmp_path: Path) -> None:
    """They have one size whatever they hold."""
    paths = [tmp_path / "River" / f"River_{i}.tif" for i in range(3)]
    for path in paths:
        write_geotiff(path, 10.2)
    before, size = Source(Config(str(tmp_path), split="all")).fingerprint(), paths[2].stat().st_size
    place: dict[str, Any] = {"crs": "EPSG:4326", "corner": (10.2, 50.0), "pixel": 1e-4}
    write_raster(paths[2], np.zeros((13, 64, 64), np.uint16), **place)
    assert paths[2].stat().st_size == size
    assert Source(Config(str(tmp_path), split="all")).fingerprint() != before


def test_geotiffs_of_which_none_says_where_it_lies_have_no_geographic_split(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    for i in range(2):
        write_raster(tmp_path / "River" / f"River_{i}.tif", np.ones((13, 64, 64), np.uint16), crs=None)
    with pytest.raises(ValueError, match=r"split_by: no file in .* says where it lies; take split: all"):
        Source(Config(str(tmp_path)))
    (tmp_path / "metadata.csv").write_text("key,latitude,longitude\nRiver_0,44.25,10.25\nRiver_9,north,0\n")
    assert cell_split(44.25, 10.25, 0.5, 0) == "test"
    assert keys(Source(Config(str(tmp_path), split="test"))) == ["River_0"]


def test_geographic_split_of_the_real_scenes(real_samples: Callable[[str], Path]) -> None:
    parts = {s: Source(Config(str(real_samples("eurosat_rgb")), split=s)) for s in ("train", "val", "test")}
    assert {s: len(p) for s, p in parts.items()} == {"train": 4969, "val": 598, "test": 1433}
    cells = {
        s: {
            (np.floor(m["latitude"] * 2), np.floor(m["longitude"] * 2)) for m in (p.read(i).meta for i in range(len(p)))
        }
        for s, p in parts.items()
        if s != "train"
    }
    assert not cells["val"] & cells["test"]
    labels = Counter(parts["val"].read(i).label for i in range(598))
    assert min(labels.values()) >= 25


def test_statistics_in_the_yaml_are_those_of_the_train_split(real_samples: Callable[[str], Path]) -> None:
    source = Source(Config(str(real_samples("eurosat_rgb"))))
    schema = source.schema["sentinel2_tci"]
    pixels = np.stack([source.read(i).tiles["sentinel2_tci"].pixels for i in range(0, len(source), 5)])
    np.testing.assert_allclose(pixels.mean(axis=(0, 2, 3)), schema.mean, rtol=0.03)
    np.testing.assert_allclose(pixels.std(axis=(0, 2, 3)), schema.std, rtol=0.03)


def test_real_geotiffs(real_samples: Callable[[str], Path]) -> None:
    pytest.importorskip("rasterio")
    source = Source(Config(str(real_samples("eurosat_ms")), split="all"))
    samples = [source.read(i) for i in range(len(source))]
    assert {source.label_names[s.label] for s in samples} == {"AnnualCrop", "Pasture", "SeaLake"}
    for sample in samples:
        check_sample(sample, source.schema)
        bands = dict(zip(sample.tiles["sentinel2_l1c"].bands, sample.tiles["sentinel2_l1c"].pixels, strict=True))
        assert bands["B10"].mean() < 20  # cirrus: almost nothing reaches the ground
        assert bands["B8A"].mean() == pytest.approx(bands["B08"].mean(), rel=0.25)
