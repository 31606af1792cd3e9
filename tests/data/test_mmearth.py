from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
from archives.mmearth import ODD, Storage, write_mmearth
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.plans import whole
from ssl_eo.data.sources import _hdf5_rows
from ssl_eo.data.sources._hdf5_rows import HDF5Rows
from ssl_eo.data.sources._mmearth import read_records
from ssl_eo.data.sources._splits import cell_split
from ssl_eo.data.sources.mmearth import Config, Source
from ssl_eo.data.stacking import check_sample, cut_to_views

ALL_TILES = [
    *("sentinel2_l1c", "sentinel2_l2a", "sentinel1_grd_ascending", "sentinel1_grd_descending", "dem"),
    *("canopy_height", "dynamic_world", "worldcover", "sentinel2_scl", "sentinel2_cloud_mask"),
]
N = 12
STORED = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B8A", "B08", "B09", "B10", "B11", "B12")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("published") / "data_1M_v001_64"
    return root, write_mmearth(root)


@pytest.fixture
def root(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written[0], tmp_path / written[0].name, ignore=shutil.ignore_patterns(".*")))


def config(root: Path, **options: Any) -> Config:
    return Config(**{"root": str(root), "split": "all", **options})


def samples_of(source: Source) -> list[Any]:
    samples = [source.read(i) for i in range(len(source))]
    for sample in samples:
        check_sample(sample, source.schema)
    return samples


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def info_of(root: Path) -> Path:
    return root / f"{root.name}_tile_info.json"


def replace_array(root: Path, name: str, values: Any) -> None:
    with h5py.File(root / f"{root.name}.h5", "a") as file:
        del file[name]
        file[name] = values


def test_every_tile_holds_the_planes_of_its_bands(written: tuple[Path, dict[str, Any]]) -> None:
    root, arrays = written
    samples = samples_of(Source(config(root, tiles=ALL_TILES, polarizations=["VH", "VV"])))
    assert [s.key for s in samples] == [tile_id.decode() for tile_id in arrays["metadata"]["tile_id"].tolist()]
    for row, sample in enumerate(samples):
        level = "sentinel2_l2a" if row % 2 else "sentinel2_l1c"
        assert ("sentinel2_l2a" in sample.tiles, "sentinel2_l1c" in sample.tiles) == (bool(row % 2), not row % 2)
        tile = sample.tiles[level]
        for band, plane in zip(tile.bands, tile.pixels, strict=True):
            np.testing.assert_array_equal(plane, arrays["sentinel2"][row, STORED.index(band)])
        assert tile.bands == tuple(b for b in STORED if b != "B10" or not row % 2)
        for name, first in (("sentinel1_grd_ascending", 0), ("sentinel1_grd_descending", 4)):
            assert (name in sample.tiles) == bool(np.isfinite(arrays["sentinel1"][row, first]).all())
            if name in sample.tiles:
                assert sample.tiles[name].bands == ("VH", "VV")
                np.testing.assert_array_equal(sample.tiles[name].pixels, arrays["sentinel1"][row, [first + 1, first]])
        for name, array in (("dem", "aster"), ("canopy_height", "canopy_height_eth")):
            assert (name in sample.tiles) == (row != ODD[name])
            if name in sample.tiles:
                np.testing.assert_array_equal(sample.tiles[name].pixels, arrays[array][row])


def test_class_maps_hold_class_numbers_of_their_sensor(written: tuple[Path, dict[str, Any]]) -> None:
    root, arrays = written
    tiles = ["worldcover", "dynamic_world", "sentinel2_scl", "sentinel2_cloud_mask"]
    source = Source(config(root, tiles=tiles))
    legend = [10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100]
    to_class = {
        "worldcover": ("esa_worldcover", {code: i for i, code in enumerate(legend)}),
        "dynamic_world": ("dynamic_world", {code: code - 1 for code in range(1, 10)}),
        "sentinel2_scl": ("sentinel2_scl", {code: code for code in range(12)}),
        "sentinel2_cloud_mask": ("sentinel2_cloudmask", {0: 0, 1024: 1, 2048: 2, 3072: 3}),
    }
    for row, sample in enumerate(samples_of(source)):
        for name, (array, classes) in to_class.items():
            is_empty = row == ODD.get(name) or (name == "sentinel2_scl" and row % 2 == 0)
            assert (name in sample.tiles) == (not is_empty)
            if not is_empty:
                expected = np.vectorize(lambda code, c=classes: c.get(code, 255))(arrays[array][row])
                np.testing.assert_array_equal(sample.tiles[name].pixels, expected)
    for schema in source.schema.values():
        assert (schema.dtype, schema.mean, schema.std) == ("uint8", (0.0,), (1.0,))


def test_meta_is_that_of_the_row(written: tuple[Path, dict[str, Any]]) -> None:
    root, arrays = written
    records = json.loads(info_of(root).read_text())
    for row, sample in enumerate(samples_of(Source(config(root)))):
        record, meta = records[sample.key], sample.meta
        assert (meta["latitude"], meta["longitude"]) == (record["lat"], record["lon"])
        assert meta["date"] == record["S2_DATE"] == next(iter(sample.tiles.values())).date
        assert meta["month"] == int(record["S2_DATE"][5:7])
        assert meta["biome"] == arrays["biome"][row].argmax()
        assert meta["eco_region"] == arrays["eco_region"][row].argmax()
        if row == ODD["era5"]:
            assert "era5" not in meta
        else:
            np.testing.assert_allclose(meta["era5"], arrays["era5"][row], rtol=1e-6)
        json.dumps(meta)


def test_statistics_are_those_of_the_level_and_nan_is_replaced(written: tuple[Path, dict[str, Any]]) -> None:
    root, _ = written
    published = json.loads((root / f"{root.name}_band_stats.json").read_text())
    assert np.isnan(published["sentinel2_l2a"]["mean"][10])
    schema = Source(config(root, tiles=ALL_TILES, polarizations=["VV", "HH"])).schema
    for level in ("sentinel2_l1c", "sentinel2_l2a"):
        for band, mean, std in zip(schema[level].bands, schema[level].mean, schema[level].std, strict=True):
            i = STORED.index(band)
            assert (mean, std) == (published[level]["mean"][i], published[level]["std"][i])
    radar = published["sentinel1"]
    assert schema["sentinel1_grd_descending"].mean == (radar["mean"][4], 0.0)
    assert schema["sentinel1_grd_descending"].std == (radar["std"][4], 1.0)


def test_measured_statistics_leave_out_what_saturated(written: tuple[Path, dict[str, Any]]) -> None:
    root, arrays = written
    schema = Source(config(root, tiles=["dem", "canopy_height", "sentinel2_l2a"], statistics="measured")).schema
    terrain = arrays["aster"].astype(float)
    terrain[terrain == -32768] = np.nan
    np.testing.assert_allclose(schema["dem"].mean, np.nanmean(terrain, axis=(0, 2, 3)))
    canopy = arrays["canopy_height_eth"].astype(float)
    canopy[(canopy == 127) | (canopy == -128)] = np.nan
    np.testing.assert_allclose(schema["canopy_height"].std, np.nanstd(canopy, axis=(0, 2, 3)))
    leaky = Source(config(root, tiles=["dem"])).schema["dem"]
    assert leaky.std[0] > 3 * schema["dem"].std[0]  # the archive's own hold the sentinel


def test_without_the_cirrus_band_both_levels_have_twelve(written: tuple[Path, dict[str, Any]]) -> None:
    source = Source(config(written[0], cirrus_band=False))
    assert source.schema["sentinel2_l1c"].bands == source.schema["sentinel2_l2a"].bands
    assert len(source.schema["sentinel2_l1c"].bands) == 12
    assert source.schema["sentinel2_l1c"].mean != source.schema["sentinel2_l2a"].mean
    np.testing.assert_array_equal(
        source.read(0).tiles["sentinel2_l1c"].pixels, np.delete(written[1]["sentinel2"][0], 10, axis=0)
    )


def test_only_rows_that_may_have_what_is_required_are_samples(written: tuple[Path, dict[str, Any]]) -> None:
    root, arrays = written
    assert len(Source(config(root, tiles=["sentinel2_l2a"]))) == N // 2
    assert len(Source(config(root, tiles=["sentinel2_l2a", "dem"]))) == N
    source = Source(config(root, tiles=["dem", "sentinel1_grd_ascending"], required=["sentinel1_grd_ascending"]))
    has = np.isfinite(arrays["sentinel1"][:, 0]).all(axis=(1, 2))
    assert len(source) == has.sum()
    assert not source.schema["sentinel1_grd_ascending"].optional
    assert source.schema["dem"].optional
    assert {s.key for s in samples_of(source)} == {i.decode() for i in arrays["metadata"]["tile_id"][has].tolist()}
    with pytest.raises(ValueError, match=r"split: no sample of .* is in 'all' and has sentinel1_grd_ascending"):
        Source(config(root, tiles=["sentinel1_grd_ascending"], polarizations=["HH"]))
    strict = Source(config(root, tiles=["sentinel2_l1c", "dem", "sentinel2_l2a"], required=["dem"]))
    assert not strict.schema["dem"].optional
    with pytest.raises(ValueError, match=rf"row {ODD['dem']} of .*data_1M_v001_64\.h5.* holds no data of dem"):
        strict.read(ODD["dem"])


def test_views_of_partly_empty_tiles_know_what_was_measured(written: tuple[Path, dict[str, Any]]) -> None:
    source = Source(config(written[0], tiles=["canopy_height", "dem", "worldcover"]))
    plans = [whole(name, (16, 16), 16) for name in source.schema]
    for tile in cut_to_views(source.read(0), plans, source.schema).tiles.values():
        assert tile.measured is not None
        assert not tile.measured[:, :2].any()  # where the sentinels are
        assert tile.measured[:, 4:].all()


@pytest.mark.parametrize("storage", get_args(Storage))
def test_every_way_of_storing_gives_the_same_samples(
    written: tuple[Path, dict[str, Any]], tmp_path: Path, storage: Storage
) -> None:
    write_mmearth(tmp_path / "again", storage=storage)
    expected = samples_of(Source(config(written[0], tiles=ALL_TILES)))
    found = samples_of(Source(config(tmp_path / "again", tiles=ALL_TILES)))
    for one, other in zip(expected, found, strict=True):
        assert (one.key, one.meta, list(one.tiles)) == (other.key, other.meta, list(other.tiles))
        for name, tile in one.tiles.items():
            np.testing.assert_array_equal(tile.pixels, other.tiles[name].pixels)
    rows = HDF5Rows(tmp_path / "again" / "again.h5")
    assert rows.is_direct("sentinel2") == (storage in ("published", "plain chunks"))
    assert Source(config(tmp_path / "again")).chunk_size == (18 if storage == "chunks of 3" else 16)
    rows.close()


def test_reading_past_the_filters_equals_reading_through_them(written: tuple[Path, dict[str, Any]]) -> None:
    root, arrays = written
    path = root / f"{root.name}.h5"
    for rows in (HDF5Rows(path), HDF5Rows(path, allow_direct=False)):
        for name in ("sentinel2", "sentinel1", "aster", "eco_region"):
            for row in (0, 7, N - 1):
                np.testing.assert_array_equal(rows.read(name, row), arrays[name][row])
        rows.close()


def test_a_chunk_whose_filter_was_skipped_is_plain(root: Path, written: tuple[Path, dict[str, Any]]) -> None:
    stored = written[1]["sentinel2"][5]
    with h5py.File(root / f"{root.name}.h5", "a") as file:
        file["sentinel2"].id.write_direct_chunk((5, 0, 0, 0), stored.tobytes(), filter_mask=1)
    rows = HDF5Rows(root / f"{root.name}.h5")
    np.testing.assert_array_equal(rows.read("sentinel2", 5), stored)


def test_zlib_inflates_where_isal_is_not_installed(
    written: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    rows = HDF5Rows(written[0] / f"{written[0].name}.h5")
    np.testing.assert_array_equal(rows.read("sentinel2", 3), written[1]["sentinel2"][3])
    rows.close()


def test_zlib_and_isal_give_the_same_bytes() -> None:
    isal_zlib = pytest.importorskip("isal.isal_zlib", reason="needs the package isal")
    assert _hdf5_rows._fastest_codec()[0] is isal_zlib.decompressobj
    data = np.random.default_rng(0).integers(0, 60, 50_000).astype(np.uint16).tobytes()
    assert isal_zlib.decompressobj().decompress(zlib.compress(data, 4), len(data) + 1) == data


def test_damaged_and_missing_chunks_spoil_their_samples_only(root: Path) -> None:
    with h5py.File(root / f"{root.name}.h5", "a") as file:
        array = file["sentinel2"]
        where = array.id.get_chunk_info_by_coord((5, 0, 0, 0))
        array.id.write_direct_chunk((6, 0, 0, 0), zlib.compress(b"short"))
        dem = file["aster"][:]
        del file["aster"]
        sparse = file.create_dataset("aster", dem.shape, dem.dtype, chunks=(1, *dem.shape[1:]), compression="gzip")
        for row in range(N - 1):
            sparse[row] = dem[row]
    with (root / f"{root.name}.h5").open("r+b") as raw:
        raw.seek(where.byte_offset + where.size // 2)
        raw.write(bytes(range(40)))
    source = Source(config(root, tiles=["sentinel2_l1c", "sentinel2_l2a"]))
    for row in range(N):
        if row in (5, 6):
            with pytest.raises(OSError, match=rf"data_1M_v001_64\.h5: row {row} of sentinel2 cannot be read: "):
                source.read(row)
        else:
            check_sample(source.read(row), source.schema)
    with pytest.raises(OSError, match=rf"row {N - 1} of aster cannot be read"):
        Source(config(root, tiles=["dem"])).read(N - 1)


def test_an_array_that_was_never_written_is_named(root: Path) -> None:
    with h5py.File(root / f"{root.name}.h5", "a") as file:
        shape, dtype = file["sentinel2"].shape, file["sentinel2"].dtype
        del file["sentinel2"]
        file.create_dataset("sentinel2", shape, dtype, chunks=(1, *shape[1:]), compression="gzip")
    with pytest.raises(OSError, match=r"row 0 of sentinel2 cannot be read"):
        Source(config(root)).read(0)


def test_more_rows_than_can_be_are_refused(root: Path) -> None:
    with h5py.File(root / f"{root.name}.h5", "a") as file:
        dtype = file["metadata"].dtype
        del file["metadata"]
        file.create_dataset("metadata", (10**10,), dtype, chunks=(1000,))
    with pytest.raises(ValueError, match=r"\.h5: metadata says that it has 10,000,000,000 rows, .* cannot hold"):
        Source(config(root))


def test_damaged_metadata_is_refused_and_a_damaged_vector_unknown(root: Path) -> None:
    edit(info_of(root), lambda records: [record.pop("biome") for record in records.values()])
    with h5py.File(root / f"{root.name}.h5", "a") as file:
        file["biome"].id.write_direct_chunk((2, 0), b"no deflated data")
    metas = [sample.meta for sample in samples_of(Source(config(root)))]
    assert [row for row, meta in enumerate(metas) if "biome" not in meta] == [2]
    with h5py.File(root / f"{root.name}.h5", "a") as file:
        file["metadata"].id.write_direct_chunk((2,), b"no deflated data")
    with pytest.raises(ValueError, match=r"root: metadata in .*data_1M_v001_64\.h5 is damaged \(.*download the file"):
        Source(config(root))


def test_codes_of_no_legend_are_refused(root: Path, written: tuple[Path, dict[str, Any]]) -> None:
    codes = written[1]["esa_worldcover"].copy()
    codes[2, 0, 3, 3], codes[2, 0, 4, 4] = 17, 200
    replace_array(root, "esa_worldcover", codes)
    source = Source(config(root, tiles=["worldcover"]))
    with pytest.raises(ValueError, match=r"esa_worldcover holds codes that its legend does not have: \[17, 200\]"):
        source.read(2)
    source.read(1)


def test_only_the_arrays_of_the_tiles_are_read(root: Path) -> None:
    with h5py.File(root / f"{root.name}.h5", "a") as file:
        for name in ("sentinel1", "aster", "esa_worldcover", "sentinel2_cloudprod", "biome"):
            del file[name]
    assert len(samples_of(Source(config(root)))) == N
    with pytest.raises(ValueError, match=r"no array 'esa_worldcover' \(it has .*sentinel2, "):
        Source(config(root, tiles=["worldcover"]))


def test_merged_files_name_the_level_in_the_records_only(root: Path, written: tuple[Path, dict[str, Any]]) -> None:
    expected = samples_of(Source(config(root)))
    replace_array(root, "metadata", written[1]["metadata"][["tile_id"]].astype([("meta_id", "S10")]))
    for one, other in zip(expected, samples_of(Source(config(root))), strict=True):
        assert (one.key, list(one.tiles)) == (other.key, list(other.tiles))


def test_what_records_leave_out_comes_from_the_arrays(root: Path) -> None:
    expected = [s.meta for s in samples_of(Source(config(root)))]

    def strip(records: dict[str, Any]) -> None:
        for record in records.values():
            record["biome"] = None
            for name in ("eco_region", "era5", "BANDS"):
                record.pop(name, None)

    edit(info_of(root), strip)
    source = Source(config(root, tiles=["sentinel2_l1c", "sentinel2_l2a", "sentinel1_grd_ascending"]))
    samples = samples_of(source)
    for sample, meta in zip(samples, expected, strict=True):
        assert {k: v for k, v in sample.meta.items() if k != "era5"} == {k: v for k, v in meta.items() if k != "era5"}
        assert sample.meta.get("era5") == pytest.approx(meta.get("era5"))
    assert "sentinel1_grd_ascending" not in samples[0].tiles  # all minus infinity
    assert "sentinel1_grd_ascending" in samples[1].tiles


def test_the_table_is_made_once_and_shared(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = Source(config(root))
    (table,) = root.glob(".*.npy")
    assert isinstance(first._entries, np.memmap)
    assert b"eco_region" not in pickle.dumps(first)  # a column: the table does not travel
    before = table.stat().st_mtime_ns
    assert Source(config(root)).fingerprint() == first.fingerprint()
    assert table.stat().st_mtime_ns == before
    edit(info_of(root), lambda records: [record.update(biome=1, lat=1.5) for record in records.values()])
    again = Source(config(root))
    assert again.read(0).meta["biome"] == 1
    assert again.fingerprint() != first.fingerprint()


def test_a_table_goes_to_the_cache_where_the_archive_is_read_only(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root.chmod(0o555)
    source = Source(config(root))
    root.chmod(0o755)
    assert len(list((tmp_path / "cache" / "ssl_eo").glob("*.npy"))) == 1
    assert not list(root.glob(".*"))
    assert len(samples_of(source)) == N


def test_geographic_splits_part_the_tiles(tmp_path: Path) -> None:
    write_mmearth(tmp_path / "many", n=60, size_px=2)
    parts = {s: samples_of(Source(config(tmp_path / "many", split=s))) for s in ("train", "val", "test")}
    everything = [s.key for s in samples_of(Source(config(tmp_path / "many")))]
    assert sorted(s.key for part in parts.values() for s in part) == sorted(everything)
    assert 30 <= len(parts["train"]) <= 52
    for split, part in parts.items():
        for sample in part:
            assert cell_split(sample.meta["latitude"], sample.meta["longitude"], 0.5, 0) == split
    other = Source(config(tmp_path / "many", split="train", split_seed=1))
    assert {other.locate(i)[0] for i in range(len(other))} != {s.key for s in parts["train"]}


def read_sentinel2(source: Source, index: int) -> Any:
    return source.read(index).tiles["sentinel2_l1c"].pixels


def test_an_open_source_can_be_pickled_and_forked(
    written: tuple[Path, dict[str, Any]], on_ranks: Callable[..., list[Any]]
) -> None:
    source = Source(config(written[0], tiles=["sentinel2_l1c", "dem"]))
    expected = read_sentinel2(source, 4)  # the handle is open now
    np.testing.assert_array_equal(read_sentinel2(pickle.loads(pickle.dumps(source)), 4), expected)
    for found in on_ranks(2, read_sentinel2, source, 4):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read_sentinel2(source, 4), expected)


def test_fingerprint_follows_the_content_not_the_place(root: Path, tmp_path: Path) -> None:
    before = Source(config(root)).fingerprint()
    moved = shutil.copytree(root, tmp_path / "moved")
    assert Source(config(moved)).fingerprint() == before
    assert pickle.loads(pickle.dumps(Source(config(root)))).fingerprint() == before
    for options in ({"cirrus_band": False}, {"tiles": ["sentinel2_l1c"]}, {"statistics": "measured"}):
        assert Source(config(root, **options)).fingerprint() != before


def test_the_root_may_be_the_file_or_any_folder_with_one(root: Path, tmp_path: Path) -> None:
    assert len(Source(config(root / f"{root.name}.h5"))) == N
    other = root.rename(tmp_path / "elsewhere")
    assert len(Source(config(other))) == N
    shutil.copy(other / "data_1M_v001_64.h5", other / "second.h5")
    with pytest.raises(ValueError, match=r"must hold one \.h5 file.*found data_1M_v001_64\.h5, second\.h5"):
        Source(config(other))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold one \.h5 file.*found none"):
        Source(config(tmp_path / "empty"))
    with pytest.raises(ValueError, match="root: no such file or folder"):
        Source(config(tmp_path / "nowhere"))


def test_a_path_that_is_no_utf8_is_read(root: Path, tmp_path: Path) -> None:
    odd = root.rename(tmp_path / os.fsdecode(b"data_\xff"))
    assert len(samples_of(Source(config(odd)))) == N


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_files_are_refused(root: Path, keep: int) -> None:
    path = root / f"{root.name}.h5"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"root: .*data_1M_v001_64\.h5 is not a readable HDF5 file"):
        Source(config(root))


def test_missing_side_files_are_named(root: Path) -> None:
    (root / f"{root.name}_band_stats.json").unlink()
    with pytest.raises(ValueError, match=r"statistics: .*band_stats\.json.*or set statistics: measured"):
        Source(config(root))
    assert len(Source(config(root, statistics="measured"))) == N
    info_of(root).unlink()
    with pytest.raises(ValueError, match=r"_tile_info\.json is missing: download it"):
        Source(config(root, statistics="measured"))


def drop_first(records: dict[str, Any]) -> None:
    del records[next(iter(records))]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop_first, "has no record of 1 of the 12 tiles .*different releases"),
        (lambda r: r["13"].pop("lat"), "record '13': no 'lat'"),
        (lambda r: r["13"].update(lat=None), "record '13': "),
        (lambda r: r["13"].update(lon=[1]), "record '13': "),
        (lambda r: r["13"].update(lat=float("nan")), "record '13': lat nan, lon .* are no degrees"),
        (lambda r: r["13"].update(S2_DATE="yesterday"), "record '13': Invalid isoformat"),
        (lambda r: r["13"].update(biome=10**9), "record '13': "),
        (lambda r: r["13"].update(era5={"month1": [1, 2]}), "record '13': no 'month2'"),
        (lambda r: r["13"].update(BANDS=["sentinel2"]), "record '13': "),
        (lambda r: r["13"]["BANDS"]["sentinel2"].sort(), r"record '13': Sentinel-2 bands .*expected the order B1, B2"),
    ],
)
def test_records_that_make_no_sense_are_named(root: Path, change: Any, match: str) -> None:
    def apply(records: dict[str, Any]) -> None:
        first = next(iter(records))
        with h5py.File(root / f"{root.name}.h5", "a") as file:
            metadata = file["metadata"][:]
            metadata["tile_id"] = np.where(metadata["tile_id"] == first.encode(), b"13", metadata["tile_id"])
            file["metadata"][:] = metadata
        records["13"] = records.pop(first)
        change(records)

    edit(info_of(root), apply)
    with pytest.raises(ValueError, match=match):
        Source(config(root))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[1, 2]", "it does not start with {"),
        (b"", "it does not start with {"),
        (b'{"x": {"lat": 1}', "is not an object of records"),
        (b'{"1": 3}', "expected an object for '1'"),
        (b'{"x": ' + b'{"a":' * 200_000, "is not an object of records"),
        (b'{"x": {"a": "' + b"x" * 3_000_000 + b'"', "is not an object of records"),
        (b'{"\xff": {}}', "utf-8"),
    ],
)
def test_side_files_that_are_no_records_are_refused(root: Path, content: bytes, match: str) -> None:
    info_of(root).write_bytes(content)
    with pytest.raises(ValueError, match=r"_tile_info\.json is not an object of records in JSON") as caught:
        Source(config(root))
    assert match in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"sentinel2_l1c": {"mean": [1], "std": [1]}}', "1 means and 1 standard deviations under sentinel2_l1c"),
        (b"{}", "must hold lists `mean` and `std` under sentinel2_l1c"),
        (b'{"sentinel2_l1c": 3}', "must hold lists"),
        (b" " * 20_000_000, "has 20,000,000 bytes, expected"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"sentinel2_l1c": {"mean": [1%s], "std": [1]}}' % (b"0" * 400), "must hold lists .* too large"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(root: Path, content: bytes, match: str) -> None:
    (root / f"{root.name}_band_stats.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"statistics: .*{match}"):
        Source(config(root))


def test_arrays_that_do_not_fit_are_named(root: Path, written: tuple[Path, dict[str, Any]]) -> None:
    arrays = written[1]
    for name, values, tiles, match in [
        ("sentinel2", arrays["sentinel2"][:, :12], ["sentinel2_l1c"], r"shape \(12, 12, 16, 16\), expected \(12, 13, "),
        ("aster", arrays["aster"][:5], ["dem"], r"shape \(5, 2, 16, 16\), expected \(12, 2, "),
        ("sentinel1", np.zeros((N, 8)), ["sentinel1_grd_ascending"], r"shape \(12, 8\), expected"),
        ("esa_worldcover", arrays["esa_worldcover"] + 0.5, ["worldcover"], "expected unsigned integers"),
        ("canopy_height_eth", arrays["canopy_height_eth"].astype(">i2"), ["canopy_height"], "dtype of canopy_height"),
    ]:
        replace_array(root, name, values)
        with pytest.raises(ValueError, match=rf"tiles: {name} in .*{match}"):
            Source(config(root, tiles=tiles))
    replace_array(root, "metadata", np.zeros(0, [("tile_id", "S4")]))
    with pytest.raises(ValueError, match=r"metadata in .* must be a list"):
        Source(config(root))
    replace_array(root, "metadata", np.array([(b"1",)] * N, [("tile_id", "S4")]))
    with pytest.raises(ValueError, match="holds tile ids twice: 1 different ones in 12 rows"):
        Source(config(root))
    replace_array(root, "metadata", np.array([(b"\xff%d" % i,) for i in range(N)], [("tile_id", "S4")]))
    with pytest.raises(ValueError, match="which is no UTF-8"):
        Source(config(root))


def test_wrong_values_are_refused(written: tuple[Path, dict[str, Any]]) -> None:
    for options, match in [
        ({"tiles": []}, "tiles must name"),
        ({"tiles": ["dem", "dem"]}, "tiles must name"),
        ({"required": ["dem"]}, "required: dem must be in tiles too"),
        ({"polarizations": ["VV", "XX"]}, "polarizations must be some of"),
        ({"polarizations": []}, "polarizations must name at least one"),
        ({"cell_deg": 0.0}, "cell_deg must be above 0"),
        ({"n_statistics_samples": 0}, "n_statistics_samples must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            config(written[0], **options)
    with pytest.raises(ValueError, match="tiles: there is no 'sentinel2'; did you mean"):
        Source(config(written[0], tiles=["sentinel2"]))


@settings(max_examples=40, deadline=None)
@given(
    records=st.dictionaries(
        st.text(max_size=8), st.dictionaries(st.text(max_size=5), st.floats() | st.text() | st.none(), max_size=3)
    ),
    indent=st.sampled_from([None, 0, 3]),
    block=st.integers(1, 40),
    is_ascii=st.booleans(),
)
def test_records_read_in_blocks_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, records: dict[str, Any], indent: int | None, block: int, is_ascii: bool
) -> None:
    path = tmp_path_factory.mktemp("records") / "tile_info.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
    assert repr(dict(read_records(path, block))) == repr(records)


def test_the_sample_of_the_format(tmp_path: Path, real_samples: Callable[[str], Path]) -> None:
    root = Path(shutil.copytree(real_samples("synthetic_mmearth_format/data_1M_v001_64"), tmp_path / "data_1M_v001_64"))
    root.chmod(0o755)
    source = Source(config(root, tiles=ALL_TILES[:-1]))
    samples = samples_of(source)
    assert [s.key for s in samples] == [str(i) for i in range(10)]
    levels = ["l1c" if row in (3, 4) else "l2a" for row in range(10)]
    with h5py.File(root / "data_1M_v001_64.h5") as file:
        for row, sample in enumerate(samples):
            assert (f"sentinel2_{levels[row]}" in sample.tiles) or not file["sentinel2"][row].any()
            assert sample.meta["date"] == "2018-07-16"
            assert sample.meta["latitude"] == -14.499441524746077
            codes = file["esa_worldcover"][row]
            classes = sample.tiles["worldcover"].pixels
            assert ((classes == 255) == np.isin(codes, (0, 255))).all()
            assert (classes[codes == 95] == 9).all()
    with pytest.raises(ValueError, match=r"sentinel2_cloudmask holds codes .*: \[1\]"):  # random values
        Source(config(root, tiles=["sentinel2_cloud_mask"])).read(0)
