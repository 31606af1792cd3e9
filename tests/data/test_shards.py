"""Members, tar, index, reader: bit-exact round trips, the same samples for `webdataset`, and every kind of damage."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ssl_eo.data.manifest import Manifest
from ssl_eo.data.members import (
    CODECS,
    check_tile_names,
    decode_meta,
    drop_constant_bands,
    encode_array,
    encode_meta,
    escape_key,
    restore_constant_bands,
    tile_member,
    unescape_key,
)
from ssl_eo.data.shard_reader import LocalShard, ShardReader
from ssl_eo.data.shards import ShardError, ShardIndex, ShardWriter, index_path
from ssl_eo.data.tar import tar_end, tar_header

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", ">u2", "int32", "int64", "float16", "float32", "float64", "c16"]
PROPERTY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
)


def write_shard(path: Path, n_samples: int = 5, codec: str = "raw") -> dict[str, dict[str, np.ndarray]]:
    """A small shard; returns what was written, by key and suffix."""
    rng = np.random.default_rng(7)
    written: dict[str, dict[str, np.ndarray]] = {}
    with ShardWriter.create(path) as shard:
        for i in range(n_samples):
            tiles = {
                tile_member("optical@10m", codec): rng.integers(0, 4000, (4, 8, 8), np.uint16),
                tile_member("radar", codec): rng.normal(size=(2, 8, 8)).astype(np.float32),
            }
            members = {suffix: encode_array(array, codec) for suffix, array in tiles.items()}
            shard.add(escape_key(f"tile.{i}/x"), {**members, "json": encode_meta(i, {"latitude": i / 3}, {})})
            written[f"tile.{i}/x"] = tiles
    return written


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


# --- round trips ------------------------------------------------------------------------------------------------------


@PROPERTY
@given(
    array=arrays,
    codec=st.sampled_from(sorted(CODECS)),
    fortran=st.booleans(),
    access=st.sampled_from(["mmap", "pread"]),
)
def test_every_array_comes_back_bit_for_bit(tmp_path, array, codec, fortran, access):
    path = tmp_path / "s.tar"
    suffix = tile_member("t", codec)
    with ShardWriter.create(path) as shard:
        shard.add("k", {suffix: encode_array(np.asarray(array, order="F" if fortran else "C"), codec)})
    back = ShardReader(LocalShard(path, access=access), verify=True).array(0, suffix)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert not back.flags.writeable


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(["bool", "uint8", "int16", ">u2", "float16", "float32", "float64"]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    constant=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 2**32 - 1),
)
def test_constant_bands_come_back_bit_for_bit(dtype, shape, constant, seed):
    rng = np.random.default_rng(seed)
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = rng.integers(0, 2 if dtype == "bool" else 256, n_bytes, np.uint8).tobytes()
    pixels = np.frombuffer(raw, dtype).reshape(shape).copy()  # NaNs with any payload among them
    bits = pixels.view(f"u{pixels.itemsize}")
    for i in constant:
        if i < len(bits):
            bits[i] = bits[i].flat[0]
    stored, constants = drop_constant_bands(pixels)
    assert constants.keys() == {i for i, band in enumerate(bits) if (band == band.flat[0]).all()}
    assert len(stored) + len(constants) == len(pixels)
    meta = decode_meta(encode_meta(None, {}, {}, constant={"t": constants} if constants else None))
    back = restore_constant_bands(stored, meta["constant"]["t"], shape[0], shape[1:]) if constants else stored
    assert back.dtype == pixels.dtype
    assert back.tobytes() == pixels.tobytes()


def test_minus_zero_and_zero_are_no_constant_band():
    pixels = np.zeros((1, 2, 2), np.float32)
    pixels[0, 1, 1] = -0.0
    assert drop_constant_bands(pixels) == (pixels, {})


@pytest.mark.parametrize(
    "constant", [[], {"t": {}}, {"t": {"-1": "00"}}, {"t": {"x": "00"}}, {"t": {"0": 3}}, {"t": {"0": "0"}}]
)
def test_damaged_constants_are_refused(constant):
    content = json.dumps({"label": None, "meta": {}, "constant": constant}).encode()
    with pytest.raises(ValueError, match="constant in a sample's JSON is an object"):
        decode_meta(content)


@pytest.mark.parametrize(
    ("constants", "shape", "message"),
    [
        ({2: "0000"}, (1, 2, 2), "do not fit 1 stored bands of uint16"),
        ({0: "00"}, (1, 2, 2), "do not fit 1 stored bands of uint16"),
        ({0: "0000"}, (2, 2, 2), r"1 constant bands beside an array of shape \(2, 2, 2\), expected 2 in all"),
        ({0: "0000"}, (), r"array of shape \(\), expected \(2, 2\) pixels a band"),
        ({0: "0000", 1: "0000"}, (0, 8192, 8192), r"array of shape \(0, 8192, 8192\), expected \(2, 2\) pixels a band"),
    ],
)
def test_constants_that_do_not_fit_are_refused(constants, shape, message):
    with pytest.raises(ValueError, match=message):
        restore_constant_bands(np.zeros(shape, np.uint16), constants, 2, (2, 2))


def test_constants_of_a_tile_of_any_size_are_bounded():
    with pytest.raises(ValueError, match=r"2 bands of .* pixels are more than"):
        restore_constant_bands(np.zeros((0, 1 << 20, 1 << 20), np.uint8), {0: "00", 1: "00"}, 2, None)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1))
def test_any_key_can_be_escaped(key):
    escaped = escape_key(key)
    assert unescape_key(escaped) == key
    assert escaped.isascii()
    assert not set(escaped) & set("./ \\")


@given(
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()),
    st.none() | st.integers() | st.lists(st.integers(0, 1)),
)
@settings(max_examples=50, deadline=None)
def test_label_and_meta_come_back(meta, label):
    assert decode_meta(encode_meta(label, meta, {})) == {"label": label, "meta": meta}


def test_numpy_values_in_meta_become_plain_ones():
    meta = {"a": np.float32(0.5), "b": np.arange(3), "c": (1, 2), "d": float("nan")}
    back = decode_meta(encode_meta(np.int64(3), meta, {"t": 30.0}))
    assert back["label"] == 3
    assert back["gsd_m"] == {"t": 30.0}
    assert (back["meta"]["a"], back["meta"]["b"], back["meta"]["c"]) == (0.5, [0, 1, 2], [1, 2])
    assert np.isnan(back["meta"]["d"])
    with pytest.raises(ValueError, match="Path is none of number"):
        encode_meta(None, {"p": type("Path", (), {})()}, {})


@pytest.mark.parametrize("name", ["a.b", "a/b", "", "label", "Label", "höhe"])
def test_tile_names_that_webdataset_would_break_are_refused(name):
    with pytest.raises(ValueError, match="tile name"):
        check_tile_names([name])


def test_tile_names_must_differ_in_more_than_case():
    check_tile_names(["s2@10m", "S1"])
    with pytest.raises(ValueError, match="differs from 's1' in case alone"):
        check_tile_names(["s1", "S1"])


# --- the file ---------------------------------------------------------------------------------------------------------


def test_layout_is_plain_ustar_and_the_same_every_time(tmp_path):
    first, second = tmp_path / "a.tar", tmp_path / "b.tar"
    write_shard(first)
    write_shard(second)
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()
    assert first.stat().st_size % 10240 == 0
    index = ShardIndex.load(index_path(first))
    with tarfile.open(first) as tar:
        members = {m.name: m for m in tar}
    for row in range(len(index)):
        for column in range(len(index.suffixes)):
            member = members.pop(index.member_name(row, column))
            assert member.offset_data == index.offset[row, column]
            assert member.offset_data % 512 == 0
            assert (member.size, member.mtime, member.uid) == (index.size[row, column], 0, 0)
    assert not members


@pytest.mark.timeout(30)  # without a look at what they are, pipes are waited for
def test_a_pipe_is_no_shard_no_index_and_no_manifest(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path)
    index = ShardIndex.load(index_path(path))
    for name in (path, index_path(path), tmp_path / "manifest.json"):
        name.unlink(missing_ok=True)
        os.mkfifo(name)
    with pytest.raises(OSError, match=r"it is no regular file: '.*a\.tar'"):
        ShardIndex.build(path)
    with pytest.raises(OSError, match=r"it is no regular file: '.*a\.tar'"):
        LocalShard(path, index).open()
    with pytest.raises(ValueError, match=r"a\.index\.npz: not a shard index \(.*it is no regular file"):
        ShardIndex.load(index_path(path))
    with pytest.raises(ValueError, match=r"manifest\.json: it is no regular file"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_scanning_a_shard_gives_the_index_that_was_written(tmp_path, codec):
    path = tmp_path / "a.tar"
    write_shard(path, codec=codec)
    built, saved = ShardIndex.build(path), ShardIndex.load(index_path(path))
    for name in ("tar_size", "keys", "suffixes", "offset", "size", "crc32"):
        assert np.array_equal(getattr(built, name), getattr(saved, name)), name
    row, column = 2, 1
    start, size = saved.offset[row, column], saved.size[row, column]
    assert saved.crc32[row, column] == zlib.crc32(path.read_bytes()[start : start + size])


def test_webdataset_reads_the_same_samples(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    written = write_shard(path)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    reader = ShardReader(path)
    assert len(samples) == len(reader) == len(written)
    for row, (sample, (key, tiles)) in enumerate(zip(samples, written.items(), strict=True)):
        assert unescape_key(sample["__key__"]) == unescape_key(reader.key(row)) == key
        assert sample["json"] == decode_meta(reader.read(row, "json")) == {"label": row, "meta": {"latitude": row / 3}}
        for suffix, array in tiles.items():
            assert np.array_equal(sample[suffix], array)
            assert np.array_equal(reader.array(row, suffix), array)


def test_compressed_member_is_an_npy_file_for_any_blosc_reader(tmp_path):
    numcodecs = pytest.importorskip("numcodecs")
    path = tmp_path / "a.tar"
    ((_, tiles), *_) = write_shard(path, codec="blosc").items()
    with tarfile.open(path) as tar:
        data = tar.extractfile(f"{escape_key('tile.0/x')}.radar.npy.blosc").read()
    assert np.array_equal(np.load(io.BytesIO(numcodecs.Blosc().decode(data))), tiles["radar.npy.blosc"])


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_tars_with_folders_long_names_and_optional_members(tmp_path, tar_format):
    path = tmp_path / "foreign.tar"
    folder = "d" * (90 if tar_format == tarfile.USTAR_FORMAT else 150)
    expected = {
        f"{folder}/a.jpg": b"one",
        f"{folder}/a.cls": b"3",
        f"{folder}/b.jpg": b"",
        f"{folder}/b.x.txt": b"t" * 600,
    }
    with tarfile.open(path, "w", format=tar_format) as tar:
        info = tarfile.TarInfo(folder)
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        for name, data in [*expected.items(), ("README", b"no suffix"), ("__meta__", b"x")]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # a fraction: pax needs an extended header for it
            tar.addfile(info, io.BytesIO(data))
    reader = ShardReader(LocalShard(path, ShardIndex.build(path)))
    found = {
        f"{reader.key(row)}.{suffix}": reader.read(row, suffix)
        for row in range(len(reader))
        for suffix in ("jpg", "cls", "x.txt")
        if reader.has(row, suffix)
    }
    assert found == expected
    with pytest.raises(ValueError, match="has no member 'cls'"):
        reader.read(1, "cls")
    with pytest.raises(ValueError, match="no member ends in 'jgp'; did you mean 'jpg'"):
        reader.read(1, "jgp")


def test_real_jpeg_shards(real_samples):
    path = real_samples("eurosat_rgb/val-000000.tar")
    reader = ShardReader(LocalShard(path, ShardIndex.build(path)))
    assert len(reader) == 654
    for row in range(len(reader)):
        assert reader.read(row, "jpg").startswith(b"\xff\xd8")
        assert 0 <= int(reader.read(row, "cls")) < 10


# --- reader -----------------------------------------------------------------------------------------------------------


def _sum_of(reader: ShardReader, row: int) -> int:
    return int(reader.array(row, "optical@10m.npy").astype(np.int64).sum())


@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_reader_survives_fork_and_pickle(tmp_path, access, method):
    path = tmp_path / "a.tar"
    written = write_shard(path)
    reader = ShardReader(LocalShard(path, access=access))
    expected = [int(tiles["optical@10m.npy"].astype(np.int64).sum()) for tiles in written.values()]
    assert _sum_of(reader, 0) == expected[0]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.starmap(_sum_of, [(reader, row) for row in range(5)]) == expected
    assert _sum_of(pickle.loads(pickle.dumps(reader)), 4) == expected[4]


def test_views_stay_valid_after_the_reader_is_closed(tmp_path):
    path = tmp_path / "a.tar"
    ((_, tiles), *_) = write_shard(path).items()
    reader = ShardReader(path)
    view = reader.array(0, "radar.npy")
    reader.close()
    del reader
    path.unlink()
    assert np.array_equal(view, tiles["radar.npy"])
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


def test_members_of_one_suffix_may_have_different_shapes(tmp_path):
    path = tmp_path / "a.tar"
    shapes = [(1, 2, 2), (1, 3, 5), (1, 2, 2), (2, 2, 2)]
    with ShardWriter.create(path) as shard:
        for i, shape in enumerate(shapes):
            shard.add(f"k{i}", {"t.npy": encode_array(np.full(shape, i))})
    reader = ShardReader(path)
    assert [reader.array(i, "t.npy").shape for i in range(4)] == shapes
    assert [int(reader.array(i, "t.npy").flat[0]) for i in range(4)] == [0, 1, 2, 3]


# --- writer -----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_shard_that_failed(tmp_path):
    def write_half() -> None:
        with ShardWriter.create(tmp_path / "a.tar") as shard:
            shard.add("k", {"json": b"{}"})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_bad_names_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "a.tar"
    with ShardWriter.create(path) as shard:
        for key in ("a.b", "a/b", ""):
            with pytest.raises(ValueError, match="dot or slash"):
                shard.add(key, {"json": b""})
        with pytest.raises(ValueError, match="allowed are 100"):
            shard.add("k" * 200, {"json": b""})
        shard.add("ok", {"json": b"1"})
        with pytest.raises(ValueError, match="comes twice"):
            shard.add("ok", {"json": b"2"})
    assert len(ShardIndex.build(path)) == 1


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_with_verify(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path)
    index = ShardIndex.load(index_path(path))
    offset = int(index.offset[3, 1])
    flip_bit(path, offset + 200)
    assert ShardReader(path).array(3, "radar.npy").shape == (2, 8, 8)
    reader = ShardReader(path, verify=True)
    assert reader.array(2, "radar.npy").shape == (2, 8, 8)
    with pytest.raises(ShardError, match=r"a\.tar, member 'tile%2E3%2Fx\.radar\.npy', byte \d+: the CRC-32") as caught:
        reader.array(3, "radar.npy")
    assert caught.value.offset == offset
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 5000, "members"])
def test_a_truncated_tar_is_an_error(tmp_path, keep):
    path = tmp_path / "a.tar"
    write_shard(path)
    index = ShardIndex.load(index_path(path))
    last_member = int((index.offset + index.size).max())
    path.write_bytes(path.read_bytes()[: -(-last_member // 512) * 512 if keep == "members" else keep])
    with pytest.raises(ShardError, match=r"truncated|empty"):
        ShardIndex.build(path)
    with pytest.raises(ValueError, match="truncated or replaced"):
        ShardReader(path).read(0, "json")


def keeps_its_sum(header):
    """A tar header is protected by the sum of its bytes alone; damage that keeps it is for the manifest's SHA-256."""
    try:
        return tarfile.nti(header[148:156]) in tarfile.calc_chksums(header)
    except tarfile.HeaderError:
        return False


@PROPERTY
@given(data=st.data())
def test_no_damage_to_a_header_goes_unseen(tmp_path, data):
    path = tmp_path / "a.tar"
    write_shard(path, n_samples=2)
    index = ShardIndex.load(index_path(path))
    header = int(data.draw(st.sampled_from(sorted(index.offset.ravel().tolist())))) - 512
    content = bytearray(path.read_bytes())
    start = header + data.draw(st.integers(0, 511))
    junk = data.draw(st.binary(min_size=1, max_size=header + 512 - start))
    unchanged = content[start : start + len(junk)] == junk
    content[start : start + len(junk)] = junk
    path.write_bytes(content)
    if unchanged or keeps_its_sum(bytes(content[header : header + 512])):
        return
    with pytest.raises(ShardError) as caught:
        ShardIndex.build(path)
    assert caught.value.offset in (header, header + 512)


@PROPERTY
@given(where=st.integers(0, 2000), junk=st.binary(min_size=1, max_size=300), codec=st.sampled_from(sorted(CODECS)))
def test_a_damaged_member_is_a_shard_error_or_an_array(tmp_path, where, junk, codec):
    path = tmp_path / "a.tar"
    write_shard(path, n_samples=1, codec=codec)
    index = ShardIndex.load(index_path(path))
    start, size = int(index.offset[0, 1]), int(index.size[0, 1])
    content = bytearray(path.read_bytes())
    before = bytes(content)
    at = start + where % size
    content[at : min(at + len(junk), start + size)] = junk[: start + size - at]
    path.write_bytes(content)
    with contextlib.suppress(ShardError):  # nothing but this may come out
        assert ShardReader(path).array(0, tile_member("radar", codec)).nbytes < 4096
    if content[at] != before[at]:
        with pytest.raises(ShardError, match="CRC-32"):
            ShardReader(path, verify=True).array(0, tile_member("radar", codec))


def one_entry_tar(path: Path, name: str, kind: bytes = tarfile.REGTYPE, size: int = 3) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, "elsewhere"
    data = info.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(512, b"\0")
    path.write_bytes(data + tar_end(len(data)))


@pytest.mark.parametrize(
    ("name", "kind", "size", "reason"),
    [
        ("../../etc/x.npy", tarfile.REGTYPE, 3, "'..' are refused"),
        ("a/../x.npy", tarfile.REGTYPE, 3, "'..' are refused"),
        ("/etc/x.npy", tarfile.REGTYPE, 3, "absolute names"),
        ("x.npy", tarfile.SYMTYPE, 3, "no links"),
        ("x.npy", tarfile.LNKTYPE, 3, "no links"),
        ("x.npy", tarfile.CHRTYPE, 3, "no devices"),
        ("x.npy", tarfile.REGTYPE, 1 << 32, "truncated"),
        ("x\nfake.npy", tarfile.REGTYPE, 3, "not printable"),
    ],
)
def test_hostile_entries_are_refused(tmp_path, name, kind, size, reason):
    path = tmp_path / "a.tar"
    one_entry_tar(path, name, kind, size)
    with pytest.raises(ShardError, match=reason) as caught:
        ShardIndex.build(path)
    assert caught.value.shard == str(path)
    assert caught.value.member == name


@pytest.mark.parametrize("record", [b"99 path=x.npy\n", b"no number\n", b"0 path=x\n", b"-3 path=x\n", b"9 path=\n"])
def test_damaged_extended_headers_are_refused(tmp_path, record):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + tar_header("y.npy", 0)
    path.write_bytes(data + tar_end(len(data)))
    with pytest.raises(ShardError, match="extended header"):
        ShardIndex.build(path)


def test_samples_in_pieces_and_duplicates_are_refused(tmp_path):
    for names, reason in ((("a.x", "b.x", "a.y"), "must follow each other"), (("a.x", "a.x"), "comes twice")):
        path = tmp_path / "a.tar"
        data = b"".join(tar_header(name, 0) for name in names)
        path.write_bytes(data + tar_end(len(data)))
        with pytest.raises(ShardError, match=reason):
            ShardIndex.build(path)


def test_data_after_the_end_is_an_error(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path)
    path.write_bytes(path.read_bytes() + path.read_bytes())
    with pytest.raises(ShardError, match="no tar header follows"):
        ShardIndex.build(path)


def test_an_index_that_points_outside_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path)
    good = ShardIndex.load(index_path(path))
    for row, value in ((0, good.tar_size), (1, -512), (2, 513), (3, 2**63 - 512)):
        offset = good.offset.copy()
        offset[row, 0] = value
        ShardIndex(good.tar_size, good.keys, good.suffixes, offset, good.size, good.crc32).save(index_path(path))
        with pytest.raises(ShardError, match="the index gives"):
            ShardReader(path).read(4, "json")


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"PK\x03\x04broken"])
def test_a_missing_or_broken_index_says_what_to_run(tmp_path, content):
    path = tmp_path / "a.tar"
    write_shard(path)
    index_path(path).unlink()
    if content is not None:
        index_path(path).write_bytes(content)
    with pytest.raises(ValueError, match="ssl-eo data index"):
        ShardReader(path).read(0, "json")


def test_pickled_objects_are_never_loaded(tmp_path):
    path = tmp_path / "a.tar"
    stream = io.BytesIO()
    np.save(stream, np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    with ShardWriter.create(path) as shard:
        shard.add("k", {"t.npy": stream.getvalue()})
    with pytest.raises(ShardError, match="Python objects"):
        ShardReader(path).array(0, "t.npy")
    with pytest.raises(ValueError, match="Python objects"):
        encode_array(np.array([None]))


def test_an_index_that_would_swell_is_refused(tmp_path):
    path = tmp_path / "s.tar"
    with ShardWriter.create(path) as shard:
        shard.add("k", {"json": encode_meta(0, {}, {})})
    arrays = dict(np.load(index_path(path)))
    arrays["keys"] = np.zeros(1 << 26, "S1")
    np.savez_compressed(index_path(path), **arrays)
    tracemalloc.start()
    with pytest.raises(ValueError, match="its arrays are compressed"):
        ShardIndex.load(index_path(path))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
