from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives.ssl4eo_s12 import BANDS, DAYS, make, scene_name, write_band, write_scene
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.plans import whole
from ssl_eo.data.sources._splits import cell_split
from ssl_eo.data.sources.ssl4eo_s12 import Config, Source, _seasons_of
from ssl_eo.data.stacking import check_sample, cut_to_views, loaded

pytest.importorskip("rasterio")
pytestmark = pytest.mark.usefixtures("own_cache")

SIZES = {"sentinel1_grd": 264, "10m": 264, "20m": 132, "60m": 44}
SENSORS = {"s1": "sentinel1_grd", "s2c": "sentinel2_l1c", "s2a": "sentinel2_l2a"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ssl4eo"))


@pytest.fixture
def root(archive: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(archive, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))


def open_all(root: Path, **options: Any) -> Source:
    return Source(Config(str(root), **{"split": "all", **options}))


def check_values(name: str, tile: Any, place: int, season: int) -> None:
    """Every pixel is what the generator writes there, and has the size of its resolution."""
    sensor, _, rest = name.partition("@")
    product = next(p for p, s in SENSORS.items() if s == sensor)
    size = SIZES[rest.partition("_")[0]] if product != "s1" else SIZES[sensor]
    assert tile.pixels.shape[1:] == (size, size)
    assert tile.date.startswith(
        f"{DAYS[product][season][:4]}-{DAYS[product][season][4:6]}-{DAYS[product][season][6:]}T"
    )
    for band, pixels in zip(tile.bands, tile.pixels, strict=True):
        file = band if product == "s1" else band.replace("B0", "B")
        value = 1000 * place + 100 * season + BANDS[product].index(file) + 1
        assert (pixels == (np.float32(-value / 100) if product == "s1" else value)).all()


def test_a_place_is_a_sample_of_four_seasons(archive: Path) -> None:
    source = open_all(archive)
    assert len(source) == 2
    assert len(source.schema) == 4 * 7
    assert not any(schema.optional for schema in source.schema.values())
    for place in range(2):
        sample = loaded(source.read(place))
        check_sample(sample, source.schema)
        assert sample.key == source.locate(place)[0] == f"000000{place}"
        for name, tile in sample.tiles.items():
            check_values(name, tile, place, int(name[-1]))
        assert sample.meta["latitude"] == pytest.approx(30.4584)
        assert sample.meta["longitude"] == pytest.approx(73.3 + place + 0.01335)
    assert source.schema["sentinel2_l1c@60m_2"].bands == ("B01", "B09", "B10")
    assert source.schema["sentinel2_l2a@60m_2"].bands == ("B01", "B09")
    assert source.schema["sentinel2_l2a@20m_2"].gsd_m == 20.0


def test_a_place_in_one_season_may_be_a_sample(archive: Path) -> None:
    source = open_all(archive, seasons="samples")
    assert len(source) == 8
    assert len(source.schema) == 7
    for index in range(8):
        sample = loaded(source.read(index))
        check_sample(sample, source.schema)
        place, season = int(sample.key[:7]), int(sample.key[8:])
        assert (place, season) == divmod(index, 4)
        for name, tile in sample.tiles.items():
            check_values(name, tile, place, season)


def test_both_levels_have_statistics_of_their_own(archive: Path) -> None:
    schema = open_all(archive, seasons="samples").schema
    assert schema["sentinel2_l1c@60m"].mean == pytest.approx((1605.575, 830.066, 22.104), abs=1e-3)
    assert schema["sentinel2_l2a@60m"].mean == pytest.approx((752.401, 2645.519), abs=1e-3)
    assert schema["sentinel1_grd"].mean == pytest.approx((-12.548, -20.192), abs=1e-3)


def test_a_missing_season_does_not_shift_the_others(root: Path) -> None:
    shutil.rmtree(root / "s2a" / "0000000" / scene_name("s2a", 1))
    source = open_all(root)
    sample = loaded(source.read(0))
    assert "sentinel2_l2a@10m_1" not in sample.tiles
    for name, tile in sample.tiles.items():
        check_values(name, tile, 0, int(name[-1]))
    optional = {name for name, schema in source.schema.items() if schema.optional}
    assert optional == {f"sentinel2_l2a@{r}m_1" for r in (10, 20, 60)}
    check_sample(sample, source.schema)
    by_season = open_all(root, seasons="samples")
    assert "sentinel2_l2a@10m" not in by_season.read(1).tiles
    assert len(by_season) == 8
    assert len(open_all(root, seasons="samples", tiles=["sentinel2_l2a@10m"])) == 7


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 3)), st.lists(st.integers(0, 27), min_size=4, max_size=4))
def test_seasons_are_matched_by_date(kept: set[int], days: list[int]) -> None:
    full = [f"2020{month:02d}15T000000_x" for month in (2, 5, 8, 11)]
    other = [f"2020{month:02d}{day + 1:02d}T000000_y" for month, day in zip((2, 5, 8, 11), days, strict=True)]
    found = _seasons_of({"s2c": full, "s1": [other[k] for k in sorted(kept)]})
    assert found["s2c"] == full
    assert found["s1"] == [name if k in kept else "" for k, name in enumerate(other)]
    assert all(a < b for a, b in pairwise(name for name in found["s1"] if name))


def test_an_archive_may_hold_one_product(root: Path) -> None:
    for product in ("s1", "s2c"):
        shutil.rmtree(root / product)
    source = open_all(root, seasons="samples")
    assert list(source.schema) == ["sentinel2_l2a@10m", "sentinel2_l2a@20m", "sentinel2_l2a@60m"]
    check_sample(loaded(source.read(5)), source.schema)
    assert source.read(5).meta["longitude"] == pytest.approx(74.3, abs=0.1)
    with pytest.raises(ValueError, match="tiles: they need the folder s1, which is not in"):
        open_all(root, tiles=["sentinel1_grd"])


def test_only_the_tiles_that_are_shown_are_read(root: Path) -> None:
    for path in root.glob("*/*/*/B1*.tif"):
        path.unlink()
    source = open_all(root)
    name = "sentinel2_l2a@10m_3"
    cut = cut_to_views(source.read(0), [whole(name, source.schema[name].shape or (0, 0), 32)], source.schema)
    assert list(cut.tiles) == [name]
    with pytest.raises(OSError, match="B1"):
        loaded(source.read(0))


def test_metadata_of_the_scenes_goes_into_samples(archive: Path) -> None:
    keys = ["CLOUDY_PIXEL_PERCENTAGE", "orbitProperties_pass"]
    meta = open_all(archive, metadata=keys).read(0).meta
    assert meta["s2c_3_CLOUDY_PIXEL_PERCENTAGE"] == 1.5
    assert meta["s1_0_orbitProperties_pass"] == "DESCENDING"
    meta = open_all(archive, metadata=keys, seasons="samples", tiles=["sentinel2_l1c@10m"]).read(2).meta
    assert set(meta) == {"latitude", "longitude", "s2c_CLOUDY_PIXEL_PERCENTAGE"}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "cannot be read"),
        (b"{", "not valid JSON"),
        (b" " * (5 << 20), "has 5,242,880 bytes"),
        (b"7", "holds int, expected the properties"),
    ],
)
def test_damaged_metadata_is_a_bad_sample_where_it_is_asked_for(root: Path, content: Any, match: str) -> None:
    path = root / "s1" / "0000001" / scene_name("s1", 2) / "metadata.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    source = open_all(root, metadata=["orbitProperties_pass"])
    source.read(0)
    with pytest.raises(ValueError, match=match):
        source.read(1)
    open_all(root).read(1)


def test_damaged_bands_raise_what_the_loader_quarantines(root: Path) -> None:
    folder = root / "s2c" / "0000000"
    source = open_all(root, seasons="samples", tiles=["sentinel2_l1c@10m"])
    truncated = folder / scene_name("s2c", 0) / "B3.tif"
    truncated.write_bytes(truncated.read_bytes()[:3000])
    write_band(folder / scene_name("s2c", 1) / "B4.tif", np.zeros((256, 264), np.uint16))
    write_band(folder / scene_name("s2c", 2) / "B8.tif", np.zeros((264, 264), np.float32))
    (folder / scene_name("s2c", 3) / "B2.tif").write_bytes(b"not a picture")
    for index, match in enumerate(
        [r"B3\.tif is truncated or damaged", r"B4\.tif has .* 256, 264", r"B8\.tif has .*float32.*'uint16'", "B2"]
    ):
        with pytest.raises((ValueError, OSError), match=match):
            loaded(source.read(index))
    loaded(source.read(4))


def test_more_scenes_than_seasons_are_a_bad_sample(root: Path) -> None:
    extra = root / "s2a" / "0000001" / "20210601T054639_20210601T054831_T43RCP"
    extra.mkdir()
    source = open_all(root)
    loaded(source.read(0))
    with pytest.raises(ValueError, match=r"s2a/0000001 holds 5 scenes, expected at most 4"):
        source.read(1)
    extra.rmdir()
    with pytest.raises(ValueError, match=r"was mended: remove .*\.npy, the old index"):
        source.read(1)


def test_a_scene_of_no_date_spoils_its_place_only(root: Path) -> None:
    scene = root / "s2c" / "0000001" / scene_name("s2c", 2)
    scene.rename(scene.with_name("20209904T054639_20209904T054831_T43RCP"))
    source = open_all(root)
    loaded(source.read(0))
    with pytest.raises(ValueError, match=r"0000001/20209904T.*: no time in its name \(month must be in 1\.\.12\)"):
        source.read(1)


def test_a_wrong_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root: .* holds none of the folders s2c, s2a, s1 \(found: no such folder\)"):
        open_all(tmp_path / "nowhere")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")  # noqa: PTH102
    with pytest.raises(ValueError, match=r"holds none of the folders .*\(found: '\\udcff'\)"):
        open_all(tmp_path)
    (tmp_path / "s1" / "not a place").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"root: .* holds no place, expected folders such as"):
        open_all(tmp_path)
    (tmp_path / "s1" / "0000001").mkdir()
    with pytest.raises(ValueError, match=r"split: no place of .* is in 'all'"):
        open_all(tmp_path)


def test_wrong_values_are_refused(archive: Path) -> None:
    with pytest.raises(ValueError, match="cell_deg must be above 0"):
        Config("x", cell_deg=91.0)
    with pytest.raises(ValueError, match=r"tiles: no tile 'sentinel2_l1c@30m'; did you mean 'sentinel2_l1c@"):
        open_all(archive, tiles=["sentinel2_l1c@30m"])
    with pytest.raises(ValueError, match="tiles: none is named"):
        open_all(archive, tiles=[])


def test_splits_hold_out_places(tmp_path: Path) -> None:
    root = tmp_path / "many"
    for place in range(24):
        write_scene(root, "s2c", place, 0, ("B2",))
    parts = [
        {s.locate(i)[0] for i in range(len(s))} for s in (open_all(root, split=n) for n in ("train", "val", "test"))
    ]
    assert sum(map(len, parts)) == 24
    assert len(set.union(*parts)) == 24
    assert len(parts[0]) > len(parts[1])
    moved = open_all(root, split="train", split_seed=1)
    assert {moved.locate(i)[0] for i in range(len(moved))} != parts[0]


def test_a_place_that_is_not_known_is_in_no_split(root: Path) -> None:
    for path in root.glob("*/0000000/*/*.tif"):
        path.write_bytes(b"")
    assert len(open_all(root)) == 2
    here = cell_split(30.4584, 74.31335, 0.5, 0)
    source = open_all(root, split=here)
    assert [source.locate(i)[0] for i in range(len(source))] == ["0000001"]
    for split in {"train", "val", "test"} - {here}:
        with pytest.raises(ValueError, match=f"split: no place of .* is in '{split}'"):
            open_all(root, split=split)


def test_the_index_is_made_once_and_kept(root: Path, own_cache: Path) -> None:
    expected = open_all(root).fingerprint()
    (index,) = root.glob(".ssl_eo-ssl4eo_s12-*.npy")
    assert open_all(root).fingerprint() == expected
    index.write_bytes(b"")
    assert open_all(root).fingerprint() == expected
    index.unlink()
    root.chmod(0o555)
    try:
        assert open_all(root).fingerprint() == expected
        assert len(list((own_cache / "ssl_eo").glob("*.npy"))) == 1
        assert not list(root.glob(".ssl_eo*"))
    finally:
        root.chmod(0o755)


def test_a_source_pickles_small_and_reads_the_same(archive: Path) -> None:
    source = open_all(archive, seasons="samples")
    sample = loaded(source.read(3))
    data = pickle.dumps(source)
    assert b"S1A_IW" not in data
    again = loaded(pickle.loads(data).read(3))
    for name, tile in sample.tiles.items():
        np.testing.assert_array_equal(again.tiles[name].pixels, tile.pixels)


def test_fingerprint_follows_the_content_not_the_place(root: Path, tmp_path: Path) -> None:
    before = open_all(root).fingerprint()
    moved = root.rename(tmp_path / "moved")
    assert open_all(moved).fingerprint() == before
    assert open_all(moved, seasons="samples").fingerprint() != before
    assert open_all(moved, tiles=["sentinel1_grd"]).fingerprint() != before
    for path in moved.glob("*/0000001"):
        shutil.rmtree(path)
    assert open_all(moved).fingerprint() != before


def test_the_real_place_in_two_seasons(real_samples: Callable[[str], Path]) -> None:
    root = real_samples("s1_s2_pairs/ssl4eo_s12")
    source = open_all(root, metadata=["orbitProperties_pass", "CLOUDY_PIXEL_PERCENTAGE"])
    assert len(source) == 1
    assert len(source.schema) == 2 * 7
    sample = loaded(source.read(0))
    check_sample(sample, source.schema)
    assert sample.key == "0000200"
    assert {n: t.date for n, t in sample.tiles.items() if "@10m" in n or "grd" in n} == {
        "sentinel1_grd@0": "2020-06-07T01:08:00",
        "sentinel1_grd@1": "2020-09-03T13:12:12",
        "sentinel2_l1c@10m_0": "2020-06-04T05:46:39",
        "sentinel2_l1c@10m_1": "2020-08-23T05:46:39",
        "sentinel2_l2a@10m_0": "2020-06-04T05:46:39",
        "sentinel2_l2a@10m_1": "2020-08-13T05:46:39",
    }
    assert sample.meta["s1_0_orbitProperties_pass"] == "DESCENDING"
    assert (sample.meta["latitude"], sample.meta["longitude"]) == pytest.approx((30.464, 73.306), abs=1e-3)
    bands = {n: dict(zip(t.bands, t.pixels, strict=True)) for n, t in sample.tiles.items()}
    assert bands["sentinel2_l1c@60m_0"]["B10"].mean() < 20  # cirrus: almost nothing reaches the ground
    assert bands["sentinel2_l1c@10m_0"]["B02"].mean() > bands["sentinel2_l2a@10m_0"]["B02"].mean()  # haze is gone
    assert bands["sentinel1_grd@0"]["VV"].mean() > bands["sentinel1_grd@0"]["VH"].mean()
    published = json.loads(next(root.glob("s2c/*/20200604*/metadata.json")).read_text())["CLOUDY_PIXEL_PERCENTAGE"]
    assert sample.meta["s2c_0_CLOUDY_PIXEL_PERCENTAGE"] == published
