from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ssl_eo.config import build
from ssl_eo.data.loader import Loader
from ssl_eo.data.opening import DataConfig, open_sources
from ssl_eo.data.pack import pack
from ssl_eo.data.plans import whole
from ssl_eo.data.sources import hdf5, shards
from ssl_eo.data.sources.hdf5 import Config, Source
from ssl_eo.data.stacking import check_sample, cut_to_views, stack
from ssl_eo.data.types import Batch, Sample
from ssl_eo.sensors import load_sensor

L2A = load_sensor("sentinel2_l2a").band_names
N, C = 10, len(L2A)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Ten samples of twelve bands: row n, band c is around 100 n + c + 1."""
    pixels = 100 * np.arange(N)[:, None, None, None] + np.arange(C)[None, :, None, None] + 1
    pixels = pixels + np.arange(16).reshape(4, 4) * 1000
    with h5py.File(tmp_path / "tiles.h5", "w") as file:
        file.create_dataset("sentinel2", data=pixels.astype(np.uint16), chunks=(3, C, 4, 4), compression="gzip")
        file["split"] = np.array([b"train"] * 6 + [b"test"] * 4)
        file["label"] = np.arange(N, dtype=np.int8) % 2
        file["label"].attrs["classes"] = ["field", "water"]
        file["maps/cover"] = np.arange(N * 16, dtype=np.uint8).reshape(N, 4, 4)
        file["latitude"] = np.linspace(50, 51, N)
        file["name"] = np.array([f"tile {n}".encode() for n in range(N)])
    return tmp_path / "tiles.h5"


def config(path: Path, **options: Any) -> Config:
    return Config(**{"root": str(path), "sensor": "sentinel2_l2a", **options})


def pixels_of(source: Source, index: int) -> Any:
    (tile,) = source.read(index).tiles.values()
    return tile.pixels


def test_a_sample_holds_pixels_label_and_meta(path: Path) -> None:
    source = Source(config(path, label_dataset="label", meta_datasets=["latitude", "name"], split="test"))
    assert len(source) == 4
    assert source.label_names == ("field", "water")
    sample = source.read(1)
    check_sample(sample, source.schema)
    assert sample.key == source.locate(1)[0] == "tiles_7"
    assert sample.label == 1
    assert sample.meta == {"latitude": pytest.approx(50 + 7 / 9), "name": "tile 7"}
    tile = sample.tiles["sentinel2_l2a"]
    assert tile.bands == L2A
    assert tile.gsd_m == 10.0
    assert tile.pixels.dtype == np.uint16
    assert tile.pixels[:, 0, 0].tolist() == [700 + c + 1 for c in range(C)]


def test_class_maps_and_samples_without_label(path: Path) -> None:
    label = Source(config(path, label_dataset="maps/cover")).read(3).label
    assert label.tolist() == np.arange(48, 64).reshape(4, 4).tolist()
    assert Source(config(path)).read(0).label is None


def test_several_groups_make_a_split_and_names_of_classes_may_be_given(path: Path) -> None:
    both = Source(config(path, split=["train", "test"]))
    assert [both.locate(i)[0] for i in range(len(both))] == [f"tiles_{n}" for n in range(N)]
    tiles = Source(config(path, split_dataset="name", split=["tile 7", "tile 2"]))
    assert [tiles.locate(i)[0] for i in range(len(tiles))] == ["tiles_2", "tiles_7"]
    assert tiles.fingerprint() != Source(config(path, split_dataset="name", split="tile 7")).fingerprint()
    with pytest.raises(ValueError, match=r"split: no sample is in 'tile 99', .* has \['tile 0', 'tile 1'"):
        Source(config(path, split_dataset="name", split=["tile 7", "tile 99"]))
    named = Source(config(path, label_dataset="label", label_names=["dry", "wet"]))
    assert (named.label_names, named.read(3).label) == (("dry", "wet"), 1)
    with pytest.raises(ValueError, match="split is an empty list"):
        config(path, split=[])
    with pytest.raises(ValueError, match="label_names needs label_dataset"):
        config(path, label_names=["dry", "wet"])


def test_statistics_are_measured_over_the_split_or_given(path: Path, tmp_path: Path) -> None:
    source = Source(config(path, split="train"))
    pixels = np.stack([pixels_of(source, i) for i in range(6)]).astype(np.float64)
    np.testing.assert_allclose(source.schema["sentinel2_l2a"].mean, pixels.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(source.schema["sentinel2_l2a"].std, pixels.std(axis=(0, 2, 3)))
    given = tmp_path / "statistics.json"
    given.write_text(json.dumps({"bands": L2A[::-1], "mean": list(range(C)), "std": [2] * C}))
    schema = Source(config(path, statistics=str(given), drop_bands=["B01"])).schema["sentinel2_l2a"]
    assert schema.mean == tuple(range(C - 2, -1, -1))
    given.write_text(json.dumps({"bands": L2A[1:], "mean": [0] * (C - 1), "std": [2] * (C - 1)}))
    with pytest.raises(ValueError, match=r"statistics: .*statistics\.json must hold lists.*'B01'"):
        Source(config(path, statistics=str(given)))
    with pytest.raises(ValueError, match=r"statistics: nowhere\.json cannot be read"):
        Source(config(path, statistics="nowhere.json"))


def test_bands_come_from_the_config_the_file_or_the_sensor(path: Path) -> None:
    names = (*L2A[1:], L2A[0])
    source = Source(config(path, bands=list(names), drop_bands=["B03"]))
    assert source.schema["sentinel2_l2a"].bands == tuple(b for b in names if b != "B03")
    assert pixels_of(source, 0)[:, 0, 0].tolist() == [c + 1 for c, b in enumerate(names) if b != "B03"]
    del source  # HDF5 refuses to write to a file that is open for reading
    with h5py.File(path, "a") as file:
        file["sentinel2"].attrs["bands"] = names
    assert Source(config(path)).schema["sentinel2_l2a"].bands == names
    assert Source(config(path, bands=list(L2A))).schema["sentinel2_l2a"].bands == L2A


def test_wrong_band_counts_and_names_are_refused(path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"sentinel2 in .*tiles\.h5 holds 12 bands, expected the 13 of sensor sentinel2_l1c"
    ):
        Source(config(path, sensor="sentinel2_l1c"))
    with pytest.raises(ValueError, match="12 bands, expected the 2 of the config's bands"):
        Source(config(path, bands=["B02", "B03"]))
    with pytest.raises(ValueError, match="sentinel2_l2a has no band 'B10'"):
        Source(config(path, bands=[*L2A[:-1], "B10"]))
    with pytest.raises(ValueError, match=r"drop_bands: .* has no band B99"):
        Source(config(path, drop_bands=["B99"]))
    with pytest.raises(ValueError, match="drop_bands: nothing is left"):
        Source(config(path, drop_bands=list(L2A)))


def test_missing_datasets_splits_and_rows_are_named(path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset: .* no array 'sentinel'; did you mean 'sentinel2'"):
        Source(config(path, dataset="sentinel"))
    with pytest.raises(ValueError, match=r"split: no sample is in 'val', .* has \['test', 'train'\]"):
        Source(config(path, split="val"))
    with pytest.raises(ValueError, match=r"split_dataset: .* no array 'fold'"):
        Source(config(path, split="val", split_dataset="fold"))
    with pytest.raises(ValueError, match=r"dataset: latitude in .* must be \[N, C, H, W\], its shape is \(10,\)"):
        Source(config(path, dataset="latitude"))
    with h5py.File(path, "a") as file:
        file["short"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"meta_datasets: short in .* has 3 rows, the tiles have 10"):
        Source(config(path, meta_datasets=["short"]))


def test_files_that_are_missing_truncated_or_no_hdf5_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root: no such file"):
        Source(config(tmp_path / "nowhere.h5"))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"root: .*tiles\.h5 is not a readable HDF5 file: .*truncated"):
        Source(config(path))
    path.write_text("not HDF5")
    with pytest.raises(ValueError, match=r"root: .*tiles\.h5 is not a readable HDF5 file"):
        Source(config(path))


def test_a_damaged_chunk_spoils_its_samples_only(path: Path) -> None:
    with h5py.File(path) as file:
        chunk = file["sentinel2"].id.get_chunk_info(1)  # rows 3, 4 and 5
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size // 2)
        raw.write(bytes(range(40)))
    source = Source(config(path))
    for row in range(N):
        if row in (3, 4, 5):
            with pytest.raises(OSError):
                source.read(row)
        else:
            check_sample(source.read(row), source.schema)


def test_nan_pixels_are_kept_and_left_out_of_statistics(path: Path) -> None:
    with h5py.File(path, "a") as file:
        pixels = file["sentinel2"][:].astype(np.float32)
        pixels[0] = np.nan
        pixels[1, :, :2] = np.nan
        file["float"] = pixels
    source = Source(config(path, dataset="float"))
    np.testing.assert_allclose(source.schema["sentinel2_l2a"].mean, np.nanmean(pixels, axis=(0, 2, 3)), rtol=1e-6)
    assert np.isnan(pixels_of(source, 1)).sum() == C * 8
    plans = [whole("sentinel2_l2a", source.schema["sentinel2_l2a"].shape or (0, 0), 4)]
    cut_to_views(source.read(1), plans, source.schema)
    with pytest.raises(ValueError, match="all no-data"):
        cut_to_views(source.read(0), plans, source.schema)


@pytest.mark.parametrize(
    "values", [np.zeros((N, 3)), np.zeros((N, 4, 4), "f4"), np.array([b"a"] * N), np.zeros(N, "c8")]
)
def test_labels_that_are_no_integers_and_no_numbers_are_refused(path: Path, values: Any) -> None:
    with h5py.File(path, "a") as file:
        file["wrong"] = values
    with pytest.raises(ValueError, match=r"label_dataset: wrong in .* must hold integers or booleans .* dtype is"):
        Source(config(path, label_dataset="wrong"))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_numbers_are_labels_to_predict(path: Path, dtype: str, tmp_path: Path) -> None:
    heights = np.arange(N, dtype=dtype) + 0.5
    heights[[2, 5]] = np.nan, np.inf
    with h5py.File(path, "a") as file:
        file["height"] = heights
    source = Source(config(path, label_dataset="height"))
    check_sample(source.read(3), source.schema)
    assert (source.label_names, source.read(3).label, type(source.read(3).label)) == ((), 3.5, float)
    for row, found in ((2, "nan"), (5, "inf")):
        with pytest.raises(
            ValueError, match=rf"tiles\.h5: row {row} of height holds {found}, expected a finite number"
        ):
            source.read(row)
    pack(source, tmp_path / "packed", max_bad_ratio=0.2)
    left_out = [json.loads(line) for line in (tmp_path / "packed" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["index"] for entry in left_out] == [2, 5]
    packed = shards.Source(shards.Config(str(tmp_path / "packed")))
    assert [packed.read(i).label for i in range(len(packed))] == [n + 0.5 for n in range(N) if n not in (2, 5)]


def test_numbers_have_no_names(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["height"] = np.arange(N) / 4
        file["cover"] = np.arange(N) % 2 * 1.0
        file["cover"].attrs["classes"] = ["field", "water"]
    for options in ({"label_dataset": "height", "label_names": ["a", "b"]}, {"label_dataset": "cover"}):
        with pytest.raises(ValueError, match=r"label_names: .* holds numbers \(float64\), .* store classes as int"):
            Source(config(path, **options))


@pytest.mark.parametrize("dtype", ["complex64", ">u2", "S4"])
def test_pixels_that_no_image_has_are_refused(path: Path, dtype: str) -> None:
    with h5py.File(path, "a") as file:
        file["odd"] = file["sentinel2"][:].astype(dtype)
    with pytest.raises(ValueError, match=r"dataset: odd in .*tiles\.h5: dtype of sentinel2_l2a must be one of bool, "):
        Source(config(path, dataset="odd"))


def test_bands_named_twice_are_refused(path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"dataset: sentinel2 in .*: bands of sentinel2_l2a are .* named twice: B02, B02"
    ):
        Source(config(path, bands=["B02", "B02", *L2A[2:]]))


def test_bands_without_data_are_named(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["sentinel2"][:, 2:4] = 0
    with pytest.raises(ValueError, match=r"no data, or one value only.*: B03, B04; list them in drop_bands"):
        Source(config(path))
    assert len(Source(config(path, drop_bands=["B03", "B04"])).schema["sentinel2_l2a"].bands) == C - 2


@pytest.mark.parametrize("value", [-3.4028235e38, -1e30, 1e20])
def test_no_data_that_nobody_declared_is_named(path: Path, value: float, tmp_path: Path) -> None:
    with h5py.File(path, "a") as file:
        pixels = file["sentinel2"][:].astype(np.float32)
        pixels[3, 2, :, 0] = value
        file["measured"] = pixels
    with pytest.raises(ValueError, match=r"^sensor: band B03 of measured in .*declare it in no_data") as refusal:
        Source(config(path, dataset="measured"))
    named = next(word for word in str(refusal.value).replace(",", "").split() if "e+" in word)
    sensor = load_sensor("sentinel2_l2a").to_dict()
    declared = tmp_path / "declared.yaml"
    declared.write_text(json.dumps({**sensor, "no_data": [*sensor["no_data"], float(named)]}))
    (schema,) = Source(config(path, dataset="measured", sensor=str(declared))).schema.values()
    assert schema.mean == pytest.approx(np.mean(pixels, (0, 2, 3), where=np.abs(pixels) < 1e15), rel=1e-6)


def test_rows_that_were_never_written_are_refused(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file.create_dataset("endless", (200_000_000, 3, 8, 8), "u1", chunks=(1, 3, 8, 8))
        file.create_dataset("vectors", (N, 100_000_000), "u1", chunks=(1, 1000))
        file.create_dataset("few", (N, C, 4, 4), "u1", chunks=(1, C, 4, 4))[0] = 7
    with pytest.raises(ValueError, match=r"^dataset: .*endless says that it has 200,000,000 rows, 38,400,000,000 by"):
        Source(config(path, dataset="endless"))
    with pytest.raises(ValueError, match=r"^label_dataset: .*vectors says that it has 10 rows, 1,000,000,000 bytes"):
        Source(config(path, label_dataset="vectors"))
    with pytest.raises(ValueError, match=r"drop_bands: .* no data"):  # so few of them are nobody's mistake
        Source(config(path, dataset="few"))


def test_a_file_that_is_large_hides_no_column_that_was_never_written(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["ballast"] = np.zeros(1 << 20, np.uint8)
        file.create_dataset("groups", (N, 200), "S500000", chunks=(1, 200))
        file.create_dataset("vectors", (N, 100_000_000), "u1", chunks=(1, 1000))
    for key, name in (("label_dataset", "vectors"), ("group_dataset", "groups")):
        with pytest.raises(ValueError, match=rf"^{key}: .*{name} says that it has 10 rows, 1,000,000,000 bytes"):
            Source(config(path, **{key: name}))


@pytest.mark.timeout(30)  # without a look at what it is, the pipe is waited for
def test_a_pipe_is_no_file_of_arrays(path: Path) -> None:
    source = Source(config(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"it is no regular file: '.*tiles\.h5'"):
        source.read(0)
    with pytest.raises(ValueError, match="root: no such file"):
        Source(config(path))


def test_the_fingerprint_is_the_same_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> set[str]:
        return {Source(config(path, label_dataset="label", split=s)).fingerprint() for s in ("train", "test", None)}

    whole = found()
    monkeypatch.setattr(hdf5, "_BLOCK_ROWS", 3)
    monkeypatch.setattr(hdf5, "_BLOCK_BYTES", 4)
    assert len(whole) == 3
    assert found() == whole


def test_the_digest_of_a_column_is_read_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(config(path, label_dataset="label"))
    read, asked = h5py.Dataset.__getitem__, []

    def watched(self: Any, part: Any) -> Any:
        asked.append(part)
        return read(self, part)

    monkeypatch.setattr(hdf5, "_BLOCK_BYTES", 4)
    monkeypatch.setattr(h5py.Dataset, "__getitem__", watched)
    source.fingerprint()
    assert asked == [slice(0, 4), slice(4, 8), slice(8, 12)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["field", "field"], r"label in .* has 2 classes 'field'; name each class once"),
        ([b"field", b"\xff"], r"'\\udcff' is no name of a class"),
        ([1, 2], r"1 is no name of a class, expected text"),
    ],
    ids=["twice", "surrogate", "number"],
)
def test_names_of_classes_are_texts_that_differ(path: Path, names: Any, message: str) -> None:
    with h5py.File(path, "a") as file:
        is_text = isinstance(names[0], bytes)
        file["label"].attrs.create("classes", names, dtype=h5py.string_dtype() if is_text else None)
    with pytest.raises(ValueError, match=f"^label_names: .*{message}"):
        Source(config(path, label_dataset="label"))
    assert Source(config(path, label_dataset="label", label_names=["a", "b"])).label_names == ("a", "b")
    with pytest.raises(ValueError, match=r"^label_names: .* has 2 classes 'a'"):
        Source(config(path, label_dataset="label", label_names=["a", "a"]))


def test_runs_are_whole_chunks_of_the_file(path: Path) -> None:
    assert Source(config(path)).chunk_size == 18


def test_an_open_source_can_be_pickled_and_forked(path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    source = Source(config(path))
    expected = [pixels_of(source, i) for i in range(N)]  # the handle is open now
    np.testing.assert_array_equal(pixels_of(pickle.loads(pickle.dumps(source)), 6), expected[6])
    for found in on_ranks(2, pixels_of, source, 4):
        np.testing.assert_array_equal(found, expected[4])
    np.testing.assert_array_equal(pixels_of(source, 5), expected[5])


def test_fingerprint_follows_the_content_not_the_place(path: Path) -> None:
    before = Source(config(path)).fingerprint()
    path = path.rename(path.with_name("moved.h5"))
    assert Source(config(path)).fingerprint() == before
    assert pickle.loads(pickle.dumps(Source(config(path)))).fingerprint() == before
    assert Source(config(path, split="train")).fingerprint() != before
    with h5py.File(path, "a") as file:
        file["sentinel2"][3, 0, 0, 0] += 1
    assert Source(config(path)).fingerprint() != before


@pytest.mark.parametrize("dataset", ["label", "maps/cover"])
def test_other_labels_are_another_content(path: Path, dataset: str) -> None:
    before = Source(config(path, label_dataset=dataset)).fingerprint()
    assert before != Source(config(path)).fingerprint()
    assert Source(config(path, label_dataset=dataset)).fingerprint() == before
    size = path.stat().st_size
    with h5py.File(path, "a") as file:
        file[dataset][N - 1] = 1 - file[dataset][N - 1]
    assert path.stat().st_size == size
    assert Source(config(path, label_dataset=dataset)).fingerprint() != before


def test_other_pixels_are_noticed_where_statistics_are_given(path: Path, tmp_path: Path) -> None:
    given = tmp_path / "statistics.json"
    given.write_text(json.dumps({"bands": list(L2A), "mean": [1.0] * C, "std": [1.0] * C}))
    with h5py.File(path, "a") as file:
        file["plain"] = file["sentinel2"][:]  # without compression: its size says nothing
    options = {"dataset": "plain", "statistics": str(given)}
    before, size = Source(config(path, **options)).fingerprint(), path.stat().st_size
    with h5py.File(path, "a") as file:
        file["plain"][3, 0, 0, 0] += 1
    assert path.stat().st_size == size
    assert Source(config(path, **options)).fingerprint() != before


def test_reading_goes_on_after_a_fingerprint(path: Path) -> None:
    source = Source(config(path, label_dataset="label"))
    before = pixels_of(source, 4).copy()
    source.fingerprint()
    np.testing.assert_array_equal(pixels_of(source, 4), before)


def test_a_column_names_the_places_that_samples_share(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["place"] = np.array([f"scene_{n // 4}_{n % 4}".encode() for n in range(N)])
    whole = Source(config(path, group_dataset="place", split="test"))
    assert [whole.read(i).meta for i in range(2)] == [{"group": "scene_1_2"}, {"group": "scene_1_3"}]
    scenes = Source(config(path, group_dataset="place", group_pattern=r"scene_(\d+)_\d+", split="test"))
    assert [scenes.read(i).meta["group"] for i in range(4)] == ["1", "1", "2", "2"]
    with pytest.raises(ValueError, match=r"group_pattern: 'scene_0_0' of place in .* does not fit 'tile_"):
        Source(config(path, group_dataset="place", group_pattern=r"tile_(\d+)"))
    with pytest.raises(ValueError, match=r"group_dataset: maps/cover in .* has shape \(10, 4, 4\), expected \[N\]"):
        Source(config(path, group_dataset="maps/cover"))
    with pytest.raises(ValueError, match=r"group_dataset: .* has no array 'places'; did you mean 'place'"):
        Source(config(path, group_dataset="places"))
    for pattern, problem in (("(", "is no regular expression"), ("scene", "has 0 groups, expected one")):
        with pytest.raises(ValueError, match=f"group_pattern: .* {problem}"):
            config(path, group_dataset="place", group_pattern=pattern)
    with pytest.raises(ValueError, match="group_pattern needs group_dataset"):
        config(path, group_pattern="(.*)")


def test_wrong_values_are_refused() -> None:
    for gsd_m in (0.0, -10.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="gsd_m must be positive metres"):
            Config("x", "y", gsd_m=gsd_m)
    with pytest.raises(ValueError, match="n_statistics_samples"):
        Config("x", "y", n_statistics_samples=0)


def test_real_sentinel2_patches(real_samples: Callable[[str], Path]) -> None:
    folder = real_samples("s2_l2a_12band")
    source = Source(config(folder / "s2_l2a_64px.h5", split="train", n_statistics_samples=547))
    assert len(source) == 547
    published = json.loads((folder / "band_stats.json").read_text())
    schema = source.schema["sentinel2_l2a"]
    assert list(schema.bands) == published["bands"]
    np.testing.assert_allclose(schema.mean, published["train_mean"], rtol=1e-3)
    np.testing.assert_allclose(schema.std, published["train_std"], rtol=1e-3)
    check_sample(source.read(100), source.schema)


def test_real_enmap_tiles_without_their_empty_bands(real_samples: Callable[[str], Path]) -> None:
    path = real_samples("enmap_potsdam/enmap_potsdam_32px.h5")
    options = {"sensor": "enmap", "dataset": "enmap", "label_dataset": "landcover", "meta_datasets": ["tile"]}
    empty = [f"B{i}" for i in range(130, 136)]
    with pytest.raises(ValueError, match=", ".join(empty)):
        Source(config(path, **options))
    source = Source(config(path, drop_bands=empty, **options))
    assert len(source) == 14
    assert source.label_names[4] == "tree"
    sample = source.read(0)
    check_sample(sample, source.schema)
    assert sample.tiles["enmap"].pixels.shape == (218, 32, 32)
    assert sample.label.shape == (32, 32)
    assert sample.tiles["enmap"].gsd_m == 30.0


# --- several arrays ---------------------------------------------------------------------------------------------------

COVER = """
title: Cover
source: made up
dtype: uint8
unit: class
no_data: [255]
bands:
  - {name: class, kind: categorical, gsd_m: 10.0, n_classes: 5}
"""
POLARIZATIONS = ("VV", "VH")


@pytest.fixture
def cover(tmp_path: Path) -> str:
    (tmp_path / "cover.yaml").write_text(COVER)
    return str(tmp_path / "cover.yaml")


@pytest.fixture
def places(path: Path) -> Path:
    """The ten samples, and of the same places radar of twice the pixel size, and maps of five classes with gaps."""
    radar = np.random.default_rng(0).normal(-12.0, 4.0, (N, 2, 2, 2)).astype(np.float32)
    classes = (np.arange(N * 16).reshape(N, 4, 4) % 5).astype(np.uint8)
    classes[:, 0, 0] = 255
    with h5py.File(path, "a") as file:
        file.create_dataset("radar", data=radar, chunks=(1, 2, 2, 2), compression="gzip")
        file["radar"].attrs["bands"] = POLARIZATIONS
        file.create_dataset("cover", data=classes, chunks=(1, 4, 4))
        file["rescaled"] = file["sentinel2"][:, 1:4] // 2
    return path


def entries(cover: str, **of_radar: Any) -> list[dict[str, Any]]:
    radar = {"dataset": "radar", "sensor": "sentinel1_grd", "gsd_m": 20.0, **of_radar}
    return [radar, {"dataset": "cover", "sensor": cover}]


def several(path: Path, others: list[dict[str, Any]], **options: Any) -> Source:
    """As a config file names it."""
    raw = {"root": str(path), "sensor": "sentinel2_l2a", "others": others, **options}
    return Source(build(Config, raw, ""))


def stored(path: Path, dataset: str) -> Any:
    with h5py.File(path) as file:
        return file[dataset][:]


def pixels_by_tile(source: Source, index: int) -> dict[str, Any]:
    return {name: tile.array for name, tile in source.read(index).tiles.items()}


def assert_same_pixels(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, pixels in expected.items():
        np.testing.assert_array_equal(found[name], pixels)


def test_arrays_of_the_same_places_are_tiles_of_one_sample(places: Path, cover: str) -> None:
    source = several(places, entries(cover), split="test", label_dataset="label", meta_datasets=["name"])
    radar, classes = stored(places, "radar"), stored(places, "cover")
    assert list(source.schema) == ["sentinel2_l2a", "sentinel1_grd", "cover"]
    assert len(source) == 4
    for i in range(4):
        sample = source.read(i)
        check_sample(sample, source.schema)
        assert sample.key == source.locate(i)[0] == f"tiles_{6 + i}"
        assert (sample.label, sample.meta) == (i % 2, {"name": f"tile {6 + i}"})
        tiles = sample.tiles
        assert tiles["sentinel2_l2a"].array[:, 0, 0].tolist() == [100 * (6 + i) + c + 1 for c in range(C)]
        np.testing.assert_array_equal(tiles["sentinel1_grd"].array, radar[6 + i])
        np.testing.assert_array_equal(tiles["cover"].array, classes[6 + i][None])
        assert [tile.gsd_m for tile in tiles.values()] == [10.0, 20.0, 10.0]
    assert source.schema["sentinel1_grd"].bands == POLARIZATIONS  # as the file says
    assert source.schema["cover"].shape == (4, 4)


def test_statistics_of_each_array_are_measured_or_given_and_class_maps_have_none(
    places: Path, cover: str, tmp_path: Path
) -> None:
    schema = several(places, entries(cover), split="train").schema
    alone = Source(config(places, split="train")).schema["sentinel2_l2a"]
    assert schema["sentinel2_l2a"] == alone
    radar = stored(places, "radar")[:6].astype(np.float64)
    np.testing.assert_allclose(schema["sentinel1_grd"].mean, radar.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(schema["sentinel1_grd"].std, radar.std(axis=(0, 2, 3)))
    assert (schema["cover"].mean, schema["cover"].std) == ((0.0,), (1.0,))
    given = tmp_path / "statistics.json"
    given.write_text(json.dumps({"bands": ["VH", "VV"], "mean": [-18, -11], "std": [5, 4]}))
    of_radar = several(places, entries(cover, statistics=str(given))).schema["sentinel1_grd"]
    assert (of_radar.mean, of_radar.std) == ((-11.0, -18.0), (4.0, 5.0))


def test_maps_of_one_class_and_a_file_of_class_maps_alone_are_fine(places: Path, cover: str) -> None:
    with h5py.File(places, "a") as file:
        file["water"] = np.full((N, 1, 4, 4), 3, np.uint8)
    source = several(places, [{"dataset": "water", "sensor": cover}])
    np.testing.assert_array_equal(source.read(5).tiles["cover"].array, np.full((1, 4, 4), 3))
    alone = Source(config(places, dataset="cover", sensor=cover))
    np.testing.assert_array_equal(pixels_of(alone, 7), stored(places, "cover")[7][None])


def test_bands_of_each_array_are_named_and_left_out(places: Path) -> None:
    rescaled = {"dataset": "rescaled", "sensor": "sentinel2_l2a", "tile": "half", "bands": ["B02", "B03", "B04"]}
    source = several(places, [{**rescaled, "drop_bands": ["B03"]}], drop_bands=["B01"])
    assert {name: schema.bands for name, schema in source.schema.items()} == {
        "sentinel2_l2a": L2A[1:],
        "half": ("B02", "B04"),
    }
    np.testing.assert_array_equal(source.read(2).tiles["half"].array, stored(places, "rescaled")[2, [0, 2]])


def test_chunk_size_is_that_of_the_largest_chunks(places: Path, cover: str) -> None:
    with h5py.File(places, "a") as file:
        file.create_dataset("long", data=file["radar"][:], chunks=(5, 2, 2, 2))
    others = [{"dataset": "long", "sensor": "sentinel1_grd", "bands": ["VV", "VH"]}]
    assert several(places, entries(cover)).chunk_size == 18  # chunks of 3, 1 and 1
    assert several(places, others).chunk_size == 20


def test_tiles_of_one_name_are_refused(places: Path, cover: str) -> None:
    again = {"dataset": "rescaled", "sensor": "sentinel2_l2a", "bands": ["B02", "B03", "B04"]}
    with pytest.raises(ValueError, match=r"^others\[0\]\.tile: another array is 'sentinel2_l2a' already"):
        several(places, [again])
    with pytest.raises(ValueError, match=r"^others\[2\]\.tile: another array is 'cover' already"):
        several(places, [*entries(cover), {**again, "tile": "cover"}])
    for name in ("", "a.b", "../a", "label"):
        with pytest.raises(ValueError, match=rf"others\[0\]: tile name '{name}'.*(allowed in shards|reserved)"):
            several(places, [{**again, "tile": name}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "raddar"}, r"dataset: .*tiles\.h5 has no array 'raddar'; did you mean 'radar'"),
        ({"dataset": "latitude"}, r"dataset: latitude in .* must be \[N, C, H, W\], its shape is \(10,\)"),
        ({"dataset": "cover"}, r"dataset: cover in .* must be \[N, C, H, W\], its shape is \(10, 4, 4\)"),
        ({"dataset": "rescaled"}, r"bands: rescaled in .* holds 3 bands, expected the 4 of sensor sentinel1_grd"),
        ({"sensor": "sentinel_1"}, r"sensor: datasets_meta/sensors has no 'sentinel_1'"),
        ({"bands": ["VV"]}, "bands: radar in .* holds 2 bands, expected the 1 of the config's bands"),
        ({"bands": ["VV", "B02"]}, "bands: sensor sentinel1_grd has no band 'B02'"),
        ({"bands": ["VV", "VV"]}, "dataset: radar in .*: bands of sentinel1_grd are .* named twice: VV, VV"),
        ({"drop_bands": ["HH"]}, r"drop_bands: radar in .* has no band HH"),
        ({"drop_bands": ["VV", "VH"]}, "drop_bands: nothing is left of the bands of radar"),
        ({"statistics": "nowhere.json"}, r"statistics: nowhere\.json cannot be read"),
    ],
)
def test_what_is_wrong_with_an_array_is_told_with_its_entry(
    places: Path, cover: str, change: dict[str, Any], message: str
) -> None:
    wrong, first = {**entries(cover)[0], **change}, entries(cover)[1]
    with pytest.raises(ValueError, match=rf"^others\[1\]\.{message}"):
        several(places, [first, wrong])
    data = {"sources": [{"name": "hdf5", "root": str(places), "sensor": "sentinel2_l2a", "others": [first, wrong]}]}
    with pytest.raises(ValueError, match=rf"^data\.sources\[0\] \(hdf5\): others\[1\]\.{message}"):
        open_sources(build(DataConfig, data, "data"))


def test_wrong_values_of_an_entry_are_refused(places: Path, cover: str) -> None:
    with pytest.raises(ValueError, match=r"others\[0\]: gsd_m must be positive metres, got -1\.0"):
        several(places, entries(cover, gsd_m=-1.0))
    with pytest.raises(ValueError, match=r"others\[0\]\.band: unknown key; did you mean 'bands'"):
        several(places, entries(cover, band=["VV"]))
    with pytest.raises(ValueError, match=r"others\[0\]\.sensor: missing"):
        several(places, [{"dataset": "radar"}])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 2, 4, 4)), r"radar in .* has 3 rows, sentinel2 has 10; row n of all arrays must be"),
        (np.zeros((0, 2, 4, 4)), r"radar in .* has 0 rows, sentinel2 has 10"),
        (np.float32(1.0), r".*tiles\.h5: radar holds one value"),
        (np.zeros((N, 2, 4, 0)), r"radar in .*: shape of sentinel1_grd must be \(height, width\)"),
        (np.zeros((N, 2, 4, 4), "complex64"), "radar in .*: dtype of sentinel1_grd must be one of bool"),
        (np.zeros((N, 2, 4, 4), ">f4"), "radar in .*: dtype of sentinel1_grd must be one of bool"),
        (h5py.ExternalLink("other.h5", "radar"), ".*tiles.h5 has no array 'radar'"),
    ],
    ids=["fewer", "none", "one value", "no pixels", "complex", "swapped", "no file"],
)
def test_odd_arrays_are_refused(places: Path, cover: str, values: Any, message: str) -> None:
    with h5py.File(places, "a") as file:
        del file["radar"]
        file["radar"] = values
    with pytest.raises(ValueError, match=rf"^others\[0\]\.dataset: {message}"):
        several(places, entries(cover, bands=["VV", "VH"]))


def test_arrays_of_other_files_and_rows_that_are_too_large_are_refused(places: Path, cover: str) -> None:
    with h5py.File(places, "a") as file, h5py.File(places.with_name("secret.h5"), "w") as secret:
        file.copy("radar", secret)
        file["linked"] = h5py.ExternalLink("secret.h5", "radar")
        file.create_dataset("large", (N, 1, 40_000, 40_000), "u1", chunks=(1, 1, 512, 512))
    with pytest.raises(ValueError, match=r"^others\[0\]\.dataset: .* has linked in another file, .* not followed"):
        several(places, entries(cover, dataset="linked"))
    with pytest.raises(ValueError, match=r"^others\[0\]\.dataset: .* rows of large have shape .* 1,600,000,000 bytes"):
        several(places, entries(cover, dataset="large"))


def test_constant_bands_are_told_with_their_entry(places: Path, cover: str) -> None:
    with h5py.File(places, "a") as file:
        file["radar"][:, 1] = -np.inf
    with pytest.raises(ValueError, match=r"^others\[0\]\.drop_bands: in radar .* no data, or one value only.*: VH"):
        several(places, entries(cover))
    assert several(places, entries(cover, drop_bands=["VH"])).schema["sentinel1_grd"].bands == ("VV",)


def test_class_maps_hold_classes_of_their_sensor(places: Path, cover: str) -> None:
    with h5py.File(places, "a") as file:
        file["cover"][2, 1, 1] = 5
        file["negative"] = -np.ones((N, 4, 4), np.int16)
        file["fractions"] = np.zeros((N, 4, 4), np.float32)
        file["yes"] = np.ones((N, 4, 4), bool)
    source = several(places, entries(cover))
    for i in range(N):
        if i == 2:
            with pytest.raises(
                ValueError, match=r"tiles\.h5: row 2 of cover holds \[5\], expected classes of sensor cov"
            ):
                source.read(i)
        else:
            check_sample(source.read(i), source.schema)
    for dataset, message in (
        ("negative", r"negative in .*: no sample of the 10 looked at can be used \(.*row 9 of negative holds \[-1\]"),
        ("fractions", "fractions in .* must hold integers, the classes of cover, its dtype is float32"),
        ("latitude", r"latitude in .* must be \[N, H, W\] or \[N, C, H, W\], its shape is \(10,\)"),
    ):
        with pytest.raises(ValueError, match=rf"^others\[0\]\.dataset: {message}"):
            several(places, [{"dataset": dataset, "sensor": cover}])
    assert several(places, [{"dataset": "yes", "sensor": cover}]).read(0).tiles["cover"].array.all()


def damage(path: Path, dataset: str, row: int) -> None:
    with h5py.File(path) as file:
        chunk = file[dataset].id.get_chunk_info_by_coord((row, *[0] * (file[dataset].ndim - 1)))
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xaa" * chunk.size)


class Whole:
    """Views of everything that a sample holds."""

    def __init__(self, source: Source) -> None:
        self.schema = source.schema

    def plan(self, sample: Sample, rng: np.random.Generator) -> Any:
        return {name: whole(name, tile.shape or (0, 0), 2) for name, tile in self.schema.items()}

    def collate(self, planned: list[tuple[Sample, Any]], step: int, source: int, rng: np.random.Generator) -> Batch:
        samples = [sample for sample, _ in planned]
        tiles, views = stack(samples, {n: [[p[n] for _, p in planned]] for n in self.schema}, self.schema)
        return Batch(step, source, [sample.key for sample in samples], tiles, views)


def test_a_damaged_chunk_of_any_array_is_quarantined_with_its_name(places: Path, cover: str, tmp_path: Path) -> None:
    damage(places, "radar", 4)
    source = several(places, entries(cover))  # measured on what can be read
    with pytest.raises(OSError, match=r"tiles\.h5: row 4 of radar cannot be read"):
        source.read(4)
    data = build(
        DataConfig,
        {"sources": [{"name": "hdf5", "root": "", "sensor": ""}], "n_workers": 0, "n_lanes": 1, "max_bad_ratio": 0.5},
        "data",
    )
    size = {"global_batch_size": 5, "total_steps": 2, "quarantine_path": tmp_path / "quarantine.jsonl"}
    with Loader(data, [source], Whole(source), seed=0, **size) as loader:
        keys = {key for batch in loader for key in batch.keys}
    assert keys == {f"tiles_{n}" for n in range(N) if n != 4}
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {(line["key"], line["shard"]) for line in lines} == {("tiles_4", "tiles.h5")}
    assert "row 4 of radar" in lines[0]["reason"]


def test_several_arrays_can_be_pickled_and_forked(places: Path, cover: str, on_ranks: Callable[..., list[Any]]) -> None:
    source = several(places, entries(cover))
    expected = [pixels_by_tile(source, i) for i in range(N)]  # the handle is open now
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    assert_same_pixels(pixels_by_tile(copy, 6), expected[6])
    for found in on_ranks(2, pixels_by_tile, source, 4):
        assert_same_pixels(found, expected[4])
    assert_same_pixels(pixels_by_tile(source, 5), expected[5])


def test_several_arrays_are_packed_as_they_are(places: Path, cover: str, tmp_path: Path) -> None:
    source = several(places, entries(cover))
    assert pack(source, tmp_path / "packed").n_samples == N
    packed: Any = shards.Source(shards.Config(str(tmp_path / "packed")))
    assert packed.schema == source.schema
    for i in range(N):
        assert_same_pixels(pixels_by_tile(packed, i), pixels_by_tile(source, i))


def test_the_fingerprint_covers_every_array_and_where_there_is_one_is_what_it_was(places: Path, cover: str) -> None:
    alone = Source(config(places))
    content = f"{alone.schema['sentinel2_l2a']!r} {places.stat().st_size} {list(range(N))}"
    assert alone.fingerprint() == blake2b(content.encode(), digest_size=16).hexdigest()
    radar, classes = entries(cover)
    variants = [[], [radar], [classes], [radar, classes], [classes, radar], [{**radar, "gsd_m": 10.0}, classes]]
    variants.append([{**radar, "tile": "radar"}, classes])
    assert len({several(places, others).fingerprint() for others in variants}) == len(variants)
    for dataset, change in (("radar", 1.0), ("cover", 1)):
        before = several(places, [radar, classes]).fingerprint()
        with h5py.File(places, "a") as file:
            file[dataset][3, ..., 1, 1] -= change
        assert several(places, [radar, classes]).fingerprint() != before


def test_real_pairs_with_land_cover(real_samples: Callable[[str], Path], tmp_path: Path) -> None:
    path = real_samples("bigearthnet_v2_s1s2/ben_v2_s1s2_120px.h5")
    (tmp_path / "landcover19.yaml").write_text(COVER.replace("n_classes: 5", "n_classes: 19"))
    classes = {"dataset": "landcover19", "sensor": str(tmp_path / "landcover19.yaml")}
    radar = {"dataset": "sentinel1", "sensor": "sentinel1_grd"}
    source = several(path, [radar, classes], split="train", label_dataset="landcover19", n_statistics_samples=79)
    assert {name: (s.bands, s.dtype) for name, s in source.schema.items()} == {
        "sentinel2_l2a": (("B02", "B03", "B04", "B08"), "uint16"),
        "sentinel1_grd": (("VV", "VH"), "float32"),
        "landcover19": (("class",), "uint8"),
    }
    rows = np.flatnonzero(stored(path, "split") == b"train")
    assert len(source) == len(rows) == 79
    arrays = {name: stored(path, name) for name in ("sentinel2", "sentinel1", "landcover19")}
    for i, row in enumerate(rows):
        sample = source.read(i)
        check_sample(sample, source.schema)
        for tile, (name, array) in zip(sample.tiles.values(), arrays.items(), strict=True):
            np.testing.assert_array_equal(tile.array, array[row].reshape(tile.array.shape), err_msg=name)
        np.testing.assert_array_equal(sample.label, sample.tiles["landcover19"].array[0])
