from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from archives.satlas import SCENES, TILES, value_of, write_archive, write_images, write_metadata, write_png
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo.data.plans import whole
from ssl_eo.data.sources._mercator import pixel_size_m, places_of_tiles
from ssl_eo.data.sources._png import PngBands
from ssl_eo.data.sources.satlas import Config, Source
from ssl_eo.data.stacking import check_sample, cut_to_views, stack_tiles

S2 = ("B05", "B06", "B07", "B08", "B11", "B12")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("satlas")
    write_archive(root)
    return root


@pytest.fixture
def root(archive: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(archive, tmp_path / "satlas"))


def source(root: Path, **options: Any) -> Source:
    return Source(Config(str(root), **{"split": "all", **options}))


def folder(root: Path, sensor: str, scene: int) -> Path:
    return root / sensor / SCENES[sensor][scene]


def test_a_sample_is_a_tile_with_its_scenes_in_the_order_of_time(archive: Path) -> None:
    tiles = source(archive)
    assert [tiles.locate(i)[0] for i in range(len(tiles))] == ["1867_3287", "1867_3288", "4095_4095"]
    sample = tiles.read(0)
    check_sample(sample, tiles.schema)
    assert sample.key == "1867_3287"
    assert sample.meta["latitude"] == pytest.approx(33.450, abs=2e-3)  # of its centre
    assert sample.meta["longitude"] == pytest.approx(-97.932, abs=2e-3)
    assert {name: (t.date, t.pixels.shape) for name, t in sample.tiles.items()} == {
        "sentinel2_tci@0": ("2014-01-01", (3, 512, 512)),
        "sentinel2_tci@1": ("2016-08-08T18:14:52Z", (3, 512, 512)),
        "sentinel2_tci@2": ("2022-12-30T18:07:49Z", (3, 512, 512)),
        "satlas_sentinel2@0": ("2014-01-01", (6, 512, 512)),
        "satlas_sentinel2@1": ("2016-08-08T18:14:52Z", (6, 512, 512)),
        "satlas_sentinel2@2": ("2022-12-30T18:07:49Z", (6, 512, 512)),
        "satlas_sentinel1@0": ("2022-01-01", (2, 512, 512)),
        "satlas_sentinel1@1": ("2022-03-01", (2, 512, 512)),
        "satlas_landsat@0": ("2022-06-15", (8, 256, 256)),
        "satlas_landsat@pan-0": ("2022-06-15", (1, 512, 512)),
        "satlas_landsat@thermal-0": ("2022-06-15", (2, 64, 64)),
    }


def test_bands_are_in_the_order_of_the_schema(archive: Path) -> None:
    tiles = source(archive).read(0).tiles
    tci = value_of("sentinel2", 0, "tci")
    assert tiles["sentinel2_tci@1"].array[:, 7, 1].tolist() == [tci, tci + 1, tci + 2]
    assert tiles["sentinel2_tci@1"].bands == ("B04", "B03", "B02")
    assert tiles["satlas_sentinel2@1"].bands == S2
    for name, sensor, scene in [
        ("satlas_sentinel2@1", "sentinel2", 0),
        ("satlas_sentinel1@0", "sentinel1", 1),
        ("satlas_landsat@0", "landsat", 0),
        ("satlas_landsat@thermal-0", "landsat", 0),
    ]:
        tile = tiles[name]
        files = [b.lower() for b in tile.bands]
        if sensor == "landsat":
            files = [f"b{int(b[1:])}" for b in tile.bands]
        assert tile.array[:, 0, 0].tolist() == [value_of(sensor, scene, b) + 1 for b in files]
        assert tile.pixels[1:2, 3:5, 1:4].tolist() == [[[value_of(sensor, scene, files[1])] * 3] * 2]


def test_statistics_and_scale_are_those_of_eight_bits(archive: Path) -> None:
    schema = source(archive).schema
    assert schema["satlas_sentinel2@3"].mean[3] == pytest.approx(0.4157 * 255, abs=1e-3)  # B08
    assert schema["satlas_landsat@thermal-1"].std[0] == pytest.approx(0.1482 * 255, abs=1e-3)
    sensor = schema["satlas_sentinel2@0"].sensor
    assert 255 * sensor.scale == pytest.approx(8160 / 10_000)
    landsat = schema["satlas_landsat@0"].sensor
    assert (landsat.offset, 255 * landsat.scale) == (4000, 16_320)
    assert {s.dtype for s in schema.values()} == {"uint8"}


def test_ground_sampling_follows_the_latitude_and_the_size(archive: Path) -> None:
    tiles = source(archive).read(0).tiles
    at_equator = source(archive).read(2).tiles
    shrink = math.cos(math.radians(source(archive).read(0).meta["latitude"]))
    assert at_equator["satlas_landsat@pan-0"].gsd_m == pytest.approx(9.5546, rel=1e-4)
    assert tiles["sentinel2_tci@0"].gsd_m == pytest.approx(9.5546 * shrink, rel=1e-4)
    sides = {tile.gsd_m * tile.pixels.shape[1] for tile in tiles.values()}
    np.testing.assert_allclose(sorted(sides), 40_075_016.7 / 8192 * shrink, rtol=1e-6)  # all tiles show the same ground


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 8191), st.integers(0, 8191))
def test_tiles_lie_where_the_projection_says(column: int, row: int) -> None:
    latitude, longitude = (float(v[0]) for v in places_of_tiles(np.array([[column, row]]), 13))
    assert math.floor((longitude + 180) / 360 * 8192) == column
    y = (1 - math.asinh(math.tan(math.radians(latitude))) / math.pi) / 2
    assert math.floor(y * 8192) == row
    assert 0 < pixel_size_m(latitude, 512, 13) <= 9.5547


def test_a_missing_band_is_absent_and_a_missing_scene_too(root: Path) -> None:
    (folder(root, "sentinel2", 0) / "b11" / "1867_3287.png").unlink()
    (folder(root, "sentinel2", 0) / "b05" / "1867_3287.png").unlink()
    for path in folder(root, "sentinel2", 1).glob("*/1867_3287.png"):
        path.unlink()
    (folder(root, "sentinel2", 2) / "tci" / "1867_3287.png").unlink()
    tiles = source(root)
    sample = tiles.read(0)
    check_sample(sample, tiles.schema)
    assert [name for name in sample.tiles if "sentinel2" in name] == [
        *("sentinel2_tci@1", "satlas_sentinel2@0", "satlas_sentinel2@1")
    ]
    cut = cut_to_views(sample, [whole("satlas_sentinel2@1", (512, 512), 64)], tiles.schema)
    present = stack_tiles([cut], ["satlas_sentinel2@1"], tiles.schema)["satlas_sentinel2@1"].present
    assert present is not None
    assert present.tolist() == [[False, True, True, True, False, True]]
    shutil.rmtree(folder(root, "landsat", 0) / "b1")
    assert "satlas_landsat@0" in source(root).read(0).tiles


def test_a_tile_without_any_image_is_quarantined(root: Path) -> None:
    for path in (root / "sentinel2").glob("*/*/1867_3288.png"):
        path.unlink()
    tiles = source(root)
    with pytest.raises(ValueError, match=r"no image of tile 1867_3288 is there, 1 are listed"):
        tiles.read(1)
    assert tiles.read(2).key == "4095_4095"


def test_pixels_are_decoded_only_when_shown(root: Path) -> None:
    path = folder(root, "sentinel2", 0) / "b08" / "1867_3287.png"
    path.write_bytes(path.read_bytes()[:-200])
    tiles = source(root)
    sample = tiles.read(0)
    check_sample(sample, tiles.schema)
    cut_to_views(sample, [whole("satlas_sentinel2@0", (512, 512), 64)], tiles.schema)
    with pytest.raises((ValueError, OSError), match=r"b08/1867_3287\.png"):
        cut_to_views(sample, [whole("satlas_sentinel2@1", (512, 512), 64)], tiles.schema)


def test_files_that_are_not_as_expected_are_refused(root: Path) -> None:
    scene = folder(root, "sentinel2", 1)
    path, first = scene / "b06" / "1867_3288.png", scene / "tci" / "1867_3288.png"
    for side, n_bands, match in [
        (512, 3, r"b06/1867_3288\.png has mode, height, width \('RGB', 512, 512\), expected \('L', 512, 512\)"),
        (256, 1, r"\('L', 256, 256\), expected \('L', 512, 512\)"),
    ]:
        write_png(path, 3, side, n_bands)
        with pytest.raises(ValueError, match=match):
            _ = source(root).read(1).tiles["satlas_sentinel2@0"].array
    path.write_bytes(b"no PNG")
    with pytest.raises(OSError, match=r"b06/1867_3288\.png"):
        _ = source(root).read(1).tiles["satlas_sentinel2@0"].array
    for content, match in [(b"", "cannot identify"), (b"\x89PNG\r\n\x1a\n" + bytes(40), r"tci/1867_3288\.png")]:
        first.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=match):
            source(root).read(1)
    write_png(first, 3, 20_000 // 20, 3)
    with pytest.raises(ValueError, match="has 1000 x 1000 pixels, expected a square of at most 512"):
        source(root).read(1)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(side: int, depth: int = 8, colour: int = 0, pixels: bytes = b"", extra: bytes = b"") -> bytes:
    """`colour` is 0 of grey, 2 of RGB, 3 of a palette, 6 of RGBA."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(pixels, 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + extra + body


_ROWS = 512 * (1 + 512)  # bytes of 512 rows, each with the number of its filter
HOSTILE = {
    "a gigapixel": (_png(32_000, pixels=bytes(10_000_000)), r"b06/1867_3288\.png"),
    "10 gigapixels": (_png(100_000), r"b06/1867_3288\.png is not a readable PNG: .*decompression bomb"),
    "more than it says": (_png(512, pixels=bytes(50_000_000)), None),  # what does not belong to it is left
    "less than it says": (_png(512, pixels=bytes(_ROWS - 600)), r"b06/1867_3288\.png is not a readable PNG"),
    "a text that swells": (
        _png(512, pixels=bytes(_ROWS), extra=_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(500_000_000), 1))),
        r"b06/1867_3288\.png is not a readable PNG",
    ),
    "palette": (
        _png(512, 8, 3, bytes(_ROWS), _chunk(b"PLTE", bytes(range(6)))),
        r"has mode, height, width \('P', 512, 512\), expected \('L', 512, 512\)",
    ),
    "16 bits": (_png(512, 16, 0, bytes(512 * 1025)), r"has mode, height, width \('I;16', 512, 512\), expected \('L'"),
    "alpha": (_png(512, 8, 6, bytes(512 * 2049)), r"has mode, height, width \('RGBA', 512, 512\), expected \('L'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_png_is_one_bad_sample_that_takes_no_memory(name: str, root: Path) -> None:
    content, match = HOSTILE[name]
    (folder(root, "sentinel2", 1) / "b06" / "1867_3288.png").write_bytes(content)
    tiles = source(root)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if match is None:
        assert tiles.read(1).tiles["satlas_sentinel2@0"].array[1].max() == 0
    else:
        with pytest.raises((ValueError, OSError), match=match):
            _ = tiles.read(1).tiles["satlas_sentinel2@0"].array
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KB
    assert tiles.read(0).tiles["satlas_sentinel2@0"].array.any()


def test_a_file_that_no_png_of_this_size_has_is_not_read(root: Path) -> None:
    path = folder(root, "sentinel2", 1) / "b06" / "1867_3288.png"
    head = _png(512)[:33] + struct.pack(">I", (1 << 31) - 1) + b"prIv"  # all that follows belongs to one chunk
    path.write_bytes(head)
    os.truncate(path, 2 << 30)  # zeros that take no room
    with pytest.raises(OSError, match=r"it has 2,147,483,648 bytes, expected at most 4,194,304"):
        _ = source(root).read(1).tiles["satlas_sentinel2@0"].array


@pytest.mark.timeout(30)  # without a look at what it is, the pipe is waited for
@pytest.mark.parametrize("band", ["tci", "b06"])
def test_a_pipe_is_no_png(band: str, root: Path) -> None:
    path = folder(root, "sentinel2", 1) / band / "1867_3288.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match=rf"{band}/1867_3288\.png is not a readable PNG: .*it is no regular file"):
        _ = source(root).read(1).tiles["satlas_sentinel2@0"].array


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(8, 400), st.integers(0, 255)), min_size=1, max_size=4), st.integers(20, 5000))
def test_a_damaged_png_is_named_or_read(changes: list[tuple[int, int]], n_bytes: int) -> None:
    content = bytearray(_png(64, pixels=bytes(64 * 65)))
    for at, byte in changes:
        content[at % len(content)] = byte
    with TemporaryDirectory() as made:
        path = Path(made) / "damaged.png"
        path.write_bytes(bytes(content[:n_bytes]))
        with suppress_named("damaged.png"):
            bands = PngBands.open({path: 1})
            assert bands is not None
            assert bands[:, :, :].shape == bands.shape


@contextmanager
def suppress_named(name: str) -> Iterator[None]:
    """What a source may say of a bad sample, as far as it names the file."""
    try:
        yield
    except (ValueError, OSError) as error:
        if name not in str(error):
            raise


def test_sensors_and_scenes_are_chosen(archive: Path) -> None:
    landsat = source(archive, sensors=["landsat"])
    assert len(landsat) == 2
    assert set(landsat.schema) == {f"satlas_landsat@{what}{i}" for what in ("", "pan-", "thermal-") for i in range(4)}
    two = source(archive, sensors=["sentinel2"], max_images_per_sensor=2).read(0).tiles
    assert [t.date for t in two.values()] == ["2014-01-01", "2022-12-30T18:07:49Z"] * 2


def test_splits_are_published_lists_or_cells(archive: Path, tmp_path: Path) -> None:
    assert [source(archive, split=s, split_by="file").read(0).key for s in ("train", "test")] == [
        "1867_3287",
        "4095_4095",
    ]
    with pytest.raises(ValueError, match="lists of train and test only"):
        source(archive, split="val", split_by="file")
    many = [(100 + 40 * i, 3000) for i in range(40)]
    for tile in many:
        write_images(tmp_path, tile, "sentinel1", [0], side=8)
    write_metadata(tmp_path, [], [list(t) for t in many[:30]], [list(t) for t in many[30:]])
    parts = [source(tmp_path, split=s, split_by="geography", sensors=["sentinel1"]) for s in ("train", "val", "test")]
    keys = [part.locate(i)[0] for part in parts for i in range(len(part))]
    assert sorted(keys) == sorted(f"{c}_{r}" for c, r in many)
    assert 20 <= len(parts[0]) <= 36
    assert min(map(len, parts)) > 0
    with pytest.raises(ValueError, match=r"split: no tile .* is in 'val' \(split_by: geography\)"):
        source(archive, split="val", cell_deg=90.0)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("train_lowres", None, r"train_lowres\.json cannot be read \(No such file.*expected a list of \[column, row\]"),
        ("train_lowres", "[[1, 2", r"train_lowres\.json is not valid JSON"),
        ("train_lowres", "[" * 100_000, r"train_lowres\.json is (nested too deeply|not valid JSON)"),
        ("train_lowres", "{}", r"train_lowres\.json holds dict"),
        ("train_lowres", "[[1, 9000]]", r"holds \[1, 9000\], expected a list of \[column, row\] of zoom 13"),
        ("train_lowres", "[[1, true]]", r"holds \[1, true\]"),
        ("good_images_lowres_all", None, r"good_images_lowres_all\.json cannot be read"),
        ("good_images_lowres_all", "[[1, 2]]", r"holds \[1, 2\], expected a list of \[column, row, scene\]"),
        ("good_images_lowres_all", "[[1, 2, 3]]", r"scene 3, expected"),
        ("good_images_lowres_all", '[[1, 2, "../../etc"]]', "leads out of this folder"),
        ("good_images_lowres_all", '[[1, 2, "a/b"]]', "leads into another folder"),
        ("image_times", None, r"image_times\.json cannot be read"),
        ("image_times", "[]", r"image_times\.json holds list"),
    ],
)
def test_metadata_that_is_missing_or_damaged_is_named(root: Path, name: str, content: str | None, match: str) -> None:
    path = root / "metadata" / f"{name}.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=match):
        source(root)


def test_metadata_that_is_no_text_or_too_large_is_named(root: Path) -> None:
    path = root / "metadata" / "train_lowres.json"
    path.write_bytes(b"[[1, 2\xff]]")
    with pytest.raises(ValueError, match=r"train_lowres\.json is not UTF-8"):
        source(root)
    with path.open("wb") as file:
        file.truncate(300 << 20)  # sparse: nothing is written
    with pytest.raises(ValueError, match=r"has 314,572,800 bytes, expected a list of .* of at most 268,435,456"):
        source(root)


def test_folders_that_are_missing_empty_or_misnamed_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root: no folder metadata in"):
        source(tmp_path / "nowhere")
    shutil.rmtree(root / "sentinel1")
    with pytest.raises(ValueError, match=r"no folder sentinel1 .* leave it out of sensors"):
        source(root)
    (root / "sentinel1").mkdir()
    with pytest.raises(ValueError, match=r"root: no image of sentinel1 in"):
        source(root, sensors=["sentinel1"])
    os.mkdir(os.fsencode(root / "landsat") + b"/\xff\xfe")  # noqa: PTH102
    with pytest.raises(ValueError, match=r"is not UTF-8; rename the file"):
        source(root)


def test_times_that_are_none_come_last(root: Path) -> None:
    times = {SCENES["sentinel2"][0]: "yesterday", SCENES["sentinel2"][1]: 7}
    (root / "metadata" / "image_times.json").write_text(json.dumps(times))
    tiles = source(root, sensors=["sentinel2"]).read(0).tiles
    assert [tiles[f"sentinel2_tci@{i}"].date for i in range(3)] == ["2014-01-01", None, None]


def test_fingerprint_follows_the_content_not_the_place(root: Path) -> None:
    before = source(root).fingerprint()
    moved = root.rename(root.with_name("moved"))
    assert source(moved).fingerprint() == before
    assert source(moved, max_images_per_sensor=2).fingerprint() != before
    assert source(moved, split="train", split_by="file").fingerprint() != before
    write_images(moved, (7, 7), "sentinel1", [0])
    (moved / "metadata" / "test_lowres.json").write_text(json.dumps([list(TILES[2]), [7, 7]]))
    assert source(moved).fingerprint() != before


def test_a_source_can_be_pickled(archive: Path) -> None:
    tiles = source(archive)
    expected = tiles.read(0).tiles["satlas_sentinel1@0"].array
    again = pickle.loads(pickle.dumps(tiles))
    np.testing.assert_array_equal(again.read(0).tiles["satlas_sentinel1@0"].array, expected)


def test_wrong_values_are_refused() -> None:
    for options, match in [
        ({"cell_deg": 0.0}, "cell_deg must be above 0"),
        ({"max_images_per_sensor": 0}, "max_images_per_sensor must be at least 1"),
        ({"sensors": []}, "sensors must name"),
        ({"sensors": ["landsat", "landsat"]}, "each once"),
    ]:
        with pytest.raises(ValueError, match=match):
            Config("x", **options)
