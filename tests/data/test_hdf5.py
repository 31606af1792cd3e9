from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ssl_eo.data.plans import whole
from ssl_eo.data.sources.hdf5 import Config, Source
from ssl_eo.data.stacking import check_sample, cut_to_views
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


@pytest.mark.parametrize("values", [np.arange(N) + 0.5, np.arange(N) * 1.0, np.array([b"a"] * N)])
def test_labels_that_are_no_integers_are_refused(path: Path, values: Any) -> None:
    with h5py.File(path, "a") as file:
        file["wrong"] = values
    with pytest.raises(ValueError, match=r"label_dataset: wrong in .* must hold integers or booleans .* dtype is"):
        Source(config(path, label_dataset="wrong"))


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
