"""Bundles: the same bits back, readable by the safetensors library, and one clear line for anything hostile."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import resource
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_eo import json_page, tensor_files
from ssl_eo.bundles import BundlePair
from ssl_eo.data.render import Renderer
from ssl_eo.data.stacking import stack_tiles, stack_views
from ssl_eo.data.types import Batch, Sample, Tile, TileSchema, ViewPlan
from ssl_eo.hub import (
    _UPGRADES,
    FORMAT,
    UNSAID,
    BundleEncoder,
    SensorInput,
    check_free,
    load_bundle,
    write_bundle,
)
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.models.vit import Encoder, EncoderConfig
from ssl_eo.sensors import load_sensor
from ssl_eo.tensor_files import read_tensors, write_tensors

ROOT = Path(__file__).parent.parent
BANDS = ("B02", "B03", "B04")
SMALL = EncoderConfig(embed_dim=16, depth=2, n_heads=2, patch_size=4, n_registers=2, mlp_ratio=2.0)
FACTS = {"objective": "mae", "step": 7, "licence": "CC0-1.0"}
OLD = Path(__file__).parent / "bundles"  # written by earlier versions, as they were


def _inputs() -> dict[str, SensorInput]:
    sensor = load_sensor("sentinel2_l2a")
    return {"sentinel2_l2a": SensorInput(sensor, BANDS, (900.0, 1000.0, 1100.0), (300.0, 400.0, 0.1), 10.0)}


def _encoder(patch_embed: str) -> Encoder:
    torch.manual_seed(0)
    cfg = replace(SMALL, patch_embed=patch_embed)  # type: ignore[arg-type]
    encoder = Encoder(cfg, n_channels=3 if patch_embed == "conv" else None)
    encoder.init_weights()
    return encoder.eval()


def _write(folder: Path, patch_embed: str = "conv") -> Encoder:
    encoder = _encoder(patch_embed)
    write_bundle(folder, encoder, _inputs(), FACTS)
    return encoder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    _write(folder)
    return folder


def _images(n_bands: int = 3) -> torch.Tensor:
    return torch.randint(0, 3000, (2, n_bands, 8, 12), generator=torch.Generator().manual_seed(1), dtype=torch.int16)


@pytest.mark.parametrize("patch_embed", ["conv", "channel_attention", "dynamic"])
def test_round_trip_is_exact(tmp_path: Path, patch_embed: str) -> None:
    written = _write(tmp_path, patch_embed)
    read = load_bundle(tmp_path)
    assert not read.training
    assert read.encoder.cfg == written.cfg
    assert read.encoder.n_channels == written.n_channels
    assert read.inputs == _inputs()
    assert read.facts == FACTS
    expected, found = written.state_dict(), read.encoder.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """One number among many; large ones are no reason, though their sum is none."""
    encoder = _encoder("conv")
    with torch.no_grad():
        encoder.norm.weight.fill_(6e4 if dtype == torch.float16 else 3e38)
        write_bundle(tmp_path / "large", encoder.to(dtype), _inputs(), FACTS)
        encoder.blocks[1].mlp.fc1.weight.view(-1)[5] = value
        write_bundle(tmp_path / "wrong", encoder, _inputs(), FACTS)
    load_bundle(tmp_path / "large")
    message = f"{tmp_path}/wrong: 1 tensors have values that are NaN or infinite, the first is blocks.1.mlp.fc1.weight:"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_bundle(tmp_path / "wrong")


@pytest.mark.parametrize("name", ["format", "inputs", "sha256", "encoders"])
def test_facts_do_not_take_the_place_of_what_a_bundle_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"facts must have other names than {name}, which say what a bundle holds"):
        write_bundle(tmp_path / "new", _encoder("conv"), _inputs(), {**FACTS, name: 7})
    assert not (tmp_path / "new").exists()


def test_a_page_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path)
    monkeypatch.setattr(json_page, "_MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"not an encoder bundle \(encoder\.json: .* bytes, expected at most 100"):
        load_bundle(tmp_path)


def test_a_file_of_more_than_its_header_states_is_not_read(tmp_path: Path) -> None:
    """A terabyte that takes no place on the disk would take all memory."""
    _write(tmp_path)
    os.truncate(tmp_path / "encoder.safetensors", 1 << 40)
    with pytest.raises(ValueError, match=r"the tensors have \d+ bytes, the body of the file 10995"):
        load_bundle(tmp_path)


def test_what_is_no_folder_holds_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "in" / "it"):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=rf"^{path}: file is no folder, and a bundle is one; give another"):
                check_free(path, overwrite)
    check_free(tmp_path / "new" / "bundle", overwrite=False)


def test_a_file_of_tensors_is_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one of them is in memory as bytes; and what fails on the way leaves the old file."""
    (tmp_path / "file").write_text("old")
    written, raw_bytes = [], tensor_files._raw_bytes

    def raw(tensor: torch.Tensor) -> bytes:
        (partial,) = tmp_path.glob("*.partial")
        with partial.open("rb") as file:
            written.append(len(file.read()))
        if len(written) == 3:
            raise RuntimeError("gone")
        return raw_bytes(tensor)

    monkeypatch.setattr(tensor_files, "_raw_bytes", raw)
    with pytest.raises(RuntimeError, match="gone"):
        write_tensors(tmp_path / "file", {name: torch.zeros(1 << 18) for name in "abc"})  # larger than any buffer
    assert written[2] - written[1] == 1 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_call_with_stored_values_normalises_them(bundle: Path) -> None:
    model = load_bundle(bundle)
    known = model.inputs["sentinel2_l2a"]
    pixels = (_images().float() - torch.tensor(known.mean)[:, None, None]) / torch.tensor(known.std)[:, None, None]
    by_name = model(_images(), sensor="sentinel2_l2a")
    assert by_name.shape == (2, 16)
    assert torch.equal(by_name, model(_images()))  # there is only one sensor to mean
    assert torch.equal(by_name, model(pixels, channels=known.sensor.channel_meta(BANDS)))
    tokens = model.forward_features(_images())
    assert torch.equal(tokens.cls, by_name)
    assert (tokens.patches.shape, tokens.registers.shape, tokens.grid) == ((2, 6, 16), (2, 2, 16), (2, 3))


def test_pixels_that_were_not_measured_are_shown_as_in_training(tmp_path: Path) -> None:
    """No-data, NaN and infinity become 0 after normalising, exactly where `Renderer` makes them 0."""
    known = _inputs()["sentinel2_l2a"]
    assert known.sensor.no_data == (0.0,)
    schema = TileSchema(known.sensor, known.bands, "float32", (8, 12), known.gsd_m, known.mean, known.std)
    images = _images().float()
    images[0, 0, :2], images[0, 1, 3, 3], images[1, 2, 5], images[1, 0, 7, 7] = 0.0, torch.nan, torch.inf, -torch.inf
    samples = [
        Sample(str(i), {"tile": Tile(image.numpy(), known.bands, known.gsd_m)}) for i, image in enumerate(images)
    ]
    views = {"image": stack_views([[ViewPlan("tile", (0.0, 0.0, 8.0, 12.0), (8, 12))] * 2])}
    batch = Batch(0, 0, ["0", "1"], stack_tiles(samples, ["tile"], {"tile": schema}), views)
    expected = Renderer([{"tile": schema}]).render(batch)["image"]
    _write(tmp_path)
    model = load_bundle(tmp_path)
    prepared = model.prepare(images)
    torch.testing.assert_close(prepared.pixels, expected.pixels, atol=1e-3, rtol=1e-5)
    assert expected.valid is not None
    assert (prepared.pixels[~expected.valid] == 0).all()
    assert int((~expected.valid).sum()) == 2 * 12 + 1 + 12 + 1
    assert model(images).isfinite().all()


def test_intermediate_layers(bundle: Path) -> None:
    model = load_bundle(bundle)
    final = model.forward_features(_images()).x
    first, last = model.get_intermediate_layers(_images(), n=2)
    assert torch.equal(last.x, final)
    assert not torch.equal(first.x, last.x)
    assert torch.equal(model.get_intermediate_layers(_images(), n=[0])[0].x, first.x)
    (raw,) = model.get_intermediate_layers(_images(), n=1, norm=False)
    assert torch.equal(model.encoder.norm(raw.x), final)


def test_intermediate_layers_become_maps(bundle: Path) -> None:
    """Rows stay rows: moving what is seen in one row of patches moves the map there most."""
    model = load_bundle(bundle)
    images = _images()
    changed = images.clone()
    changed[:, :, 4:8, 8:12] += 1000  # the last patch of the second row
    maps = [
        torch.stack([t.patches.unflatten(1, t.grid).permute(0, 3, 1, 2) for t in model.get_intermediate_layers(x, n=2)])
        for x in (images, changed)
    ]
    assert maps[0].shape == (2, 2, 16, 2, 3)  # layers, samples, channels, height, width
    moved = (maps[1] - maps[0]).norm(dim=2)  # [2, 2, 2, 3]
    assert (moved.flatten(2).argmax(2) == 5).all()


@pytest.mark.parametrize(
    ("n_bands", "sensor", "message"),
    [
        (4, "sentinel2_l2a", "got 4 channels, expected 3 in this order: B02, B03, B04"),
        (3, "landsat", "sensor 'landsat': this encoder has statistics for sentinel2_l2a"),
    ],
)
def test_images_that_do_not_fit_are_refused(bundle: Path, n_bands: int, sensor: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_bundle(bundle)(_images(n_bands), sensor=sensor)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(3, 64, 64), r"shape \[3, 64, 64\]"),
        (torch.zeros(1, 1, 3, 8, 8), r"shape \[1, 1, 3, 8, 8\]"),
        (_images().numpy(), "a ndarray"),
        (_images().tolist(), "a list"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(bundle: Path, images: Any, found: str) -> None:
    model = load_bundle(bundle)
    meta = model.inputs["sentinel2_l2a"].sensor.channel_meta(BANDS)
    for given_as in ({}, {"sensor": "sentinel2_l2a"}, {"channels": meta}):
        with pytest.raises(ValueError, match=rf"images must be a tensor \[B, C, H, W\], got {found}$"):
            model(images, **given_as)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 0, 0)])
def test_images_of_nothing_and_complex_ones_are_refused(bundle: Path, shape: tuple[int, ...]) -> None:
    model = load_bundle(bundle)
    for images in (torch.zeros(shape), torch.zeros(1, 3, 8, 8, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="images must be real numbers, at least one of each dimension"):
            model(images, "sentinel2_l2a")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sensor": [0.664, 0.56]}, "sensor must be a name, got a list; wavelengths .* are given by wavelengths_um="),
        ({"bands": 5}, "expected names"),
    ],
)
def test_what_names_no_sensor_and_no_bands(bundle: Path, said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_bundle(bundle)(_images(), **{"sensor": "sentinel2_l2a", **said})


def test_channels_must_describe_the_images(tmp_path: Path) -> None:
    _write(tmp_path, "channel_attention")
    model = load_bundle(tmp_path)
    meta = model.inputs["sentinel2_l2a"].sensor.channel_meta(BANDS)
    with pytest.raises(ValueError, match="images have 4 channels, channels= describes 3"):
        model(_images(4), channels=meta)


def test_torch_hub_loads_a_bundle(bundle: Path) -> None:
    model = torch.hub.load(str(ROOT), "encoder", str(bundle), source="local")
    assert torch.equal(model(_images()), load_bundle(bundle)(_images()))


# --- older formats ----------------------------------------------------------------------------------------------------


def _unpacked(name: str, folder: Path, **changes: Any) -> list[list[float]]:
    """The bundle of an earlier version, in `folder`, and the features that it gave there."""
    old = json.loads((OLD / f"{name}.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**old["encoder.json"], **changes}))
    (folder / "encoder.safetensors").write_bytes(base64.b64decode(old["encoder.safetensors"]))
    features: list[list[float]] = old["features"]
    return features


def _assert_near(found: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_bundle_of_the_first_format_gives_the_features_it_gave(tmp_path: Path) -> None:
    expected = _unpacked("format_1", tmp_path)
    model = load_bundle(tmp_path)
    _assert_near(model(torch.arange(128.0).reshape(2, 2, 8, 4) * 17.0), expected)
    said = {"objective": "mae", "step": 7, "run": "old", "features": {"pool": "mean", "taps": [1.0]}}
    assert model.facts == {**UNSAID, **said, "commit": "0123abc"}


@torch.no_grad()
def test_a_pair_of_the_first_format_gives_the_features_it_gave(tmp_path: Path) -> None:
    expected = _unpacked("format_1_pair", tmp_path)
    model = load_bundle(tmp_path)
    assert isinstance(model, BundlePair)
    counted = torch.arange(128.0).reshape(2, 2, 8, 4)
    _assert_near(model(counted * 17.0, counted / -5.0), expected)
    assert model.facts["licence"] == "MIT"  # of the published weights


def test_every_older_format_has_an_upgrade_and_a_fixture() -> None:
    assert list(_UPGRADES) == list(range(1, FORMAT))
    assert {path.stem.partition("_")[0] for path in OLD.iterdir()} == {"format"}
    assert {int(path.stem.split("_")[1]) for path in OLD.iterdir()} == set(_UPGRADES)


@pytest.mark.parametrize("released", [None, 7, {}, {"licence": ["MIT"]}])
def test_a_first_format_of_strange_facts_is_read(tmp_path: Path, released: Any) -> None:
    _unpacked("format_1", tmp_path, released=released)
    assert load_bundle(tmp_path).facts["released"] == released


# --- the file format --------------------------------------------------------------------------------------------------

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -2.25, 3.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(-7),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
    "turned": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,  # not contiguous
}


def _assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (value.dtype, value.shape) == (b[name].dtype, b[name].shape)
        assert torch.equal(value, b[name]), name


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    write_tensors(tmp_path / "ours", TENSORS)
    _assert_same(TENSORS, library.load_file(tmp_path / "ours"))
    plain = {name: value.contiguous() for name, value in TENSORS.items()}
    library.save_file(plain, tmp_path / "theirs", metadata={"format": "pt"})
    _assert_same(plain, read_tensors(tmp_path / "theirs"))
    _assert_same(TENSORS, read_tensors(tmp_path / "ours"))


def test_read_tensors_can_be_written_to(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS)
    read_tensors(tmp_path / "file")["weight"].add_(1)


def _safetensors(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> bytes:
    return _safetensors({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(8))


def _two(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    entries = {"a": first, "b": second}
    header = {k: {"dtype": "U8", "shape": [v[1] - v[0]], "data_offsets": v} for k, v in entries.items()}
    return _safetensors(header, bytes(8))


HOSTILE = {
    "empty": (b"", "0 bytes are too few"),
    "seven bytes": (bytes(7), "7 bytes are too few"),
    "header length beyond the file": (struct.pack("<Q", 9) + b"{}", "header length 9 exceeds the file"),
    "huge header length": (struct.pack("<Q", 2**64 - 1) + b"{}", "exceeds the file"),
    "not JSON": (_safetensors(b"\x80\x04}q."), "not a JSON object"),
    "not UTF-8": (_safetensors(b'{"\xff": 1}'), "not a JSON object"),
    "a list": (_safetensors([1, 2]), "not a JSON object"),
    "JSON bomb": (_safetensors(b'{"a":' + b"[" * 200_000), "not a JSON object"),
    "deep entry": (_safetensors(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "entry 'a'"),
    "entry without keys": (_safetensors({"a": {}}), "entry 'a'"),
    "entry is a number": (_safetensors({"a": 1}), "entry 'a'"),
    "unknown dtype": (_one(dtype="F8"), "entry 'a'"),
    "dtype is a list": (_one(dtype=["F32"]), "entry 'a'"),
    "shape is a word": (_one(shape="two"), "entry 'a'"),
    "shape is a fraction": (_one(shape=[2.0]), "entry 'a'"),
    "shape is a truth": (_one(shape=[True, 2]), "entry 'a'"),
    "negative sizes": (_one(shape=[-2, -1]), "entry 'a'"),
    "huge sizes": (_one(shape=[0, 1 << 47, 1 << 47], offsets=[0, 0]), "has 0 bytes"),
    "a shape of long numbers": (_one(shape=[int("9" * 4000)] * 400), "a size or an offset of 281,474,976,710,656"),
    "many dimensions": (_one(shape=[1] * 65, offsets=[0, 4]), "has more than 64 dimensions"),
    "a long name": (
        _safetensors({"a" * 5000: {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        "has 8 b",
    ),
    "one offset": (_one(offsets=[0]), "entry 'a'"),
    "offset is not a number": (_one(offsets=[float("nan"), 8]), "entry 'a'"),
    "negative offsets": (_one(offsets=[-8, 0]), "entry 'a'"),
    "offsets turned round": (_one(offsets=[8, 0]), "has -8 bytes"),
    "offsets beyond the file": (_one(shape=[4], offsets=[0, 16]), "have 16 bytes, the body of the file 8"),
    "shape does not fit": (_one(shape=[3]), "has 8 bytes"),
    "overlap": (_two((0, 5), (3, 8)), "'b' starts at byte 3 of the body, expected 5"),
    "gap": (_two((0, 3), (5, 8)), "'b' starts at byte 5 of the body, expected 3"),
    "more at the end": (_two((0, 3), (3, 6)), "have 6 bytes, the body of the file 8"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensor_files_are_one_clear_line(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, TENSORS)
    content = path.read_bytes()
    for n_bytes in range(len(content)):
        path.write_bytes(content[:n_bytes])
        with pytest.raises(ValueError, match=str(path)):
            read_tensors(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: No such file"):
        read_tensors(tmp_path / "nowhere")


json_values = st.one_of(
    *(st.none(), st.booleans(), st.integers(-4, 40), st.floats(), st.text(max_size=4)),
    *(st.lists(st.integers(-4, 40), max_size=3), st.just({}), st.just({"a": 1})),
)
edits = st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4)


def _edit(content: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
    """`content` with some bytes put in place of others, at positions counted round."""
    for place, new, n_removed in changes:
        at = place % (len(content) + 1)
        content = content[:at] + new + content[at + n_removed :]
    return content


@settings(max_examples=200, deadline=None)
@given(edits)
def test_any_bytes_are_tensors_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(_edit(path.read_bytes(), changes))
    _succeeds_or_value_error(lambda: read_tensors(path))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_header_is_tensors_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed_header.safetensors"
    write_tensors(path, TENSORS)
    content = path.read_bytes()
    n_header = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + n_header])
    _replace_one_value(header, data)
    path.write_bytes(_safetensors(header, content[8 + n_header :]))
    _succeeds_or_value_error(lambda: read_tensors(path))


def _replace_one_value(tree: Any, data: st.DataObject) -> None:
    """Put any JSON value at a random place of `tree`."""
    keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = data.draw(st.sampled_from(keys))
    if isinstance(tree[key], (dict, list)) and tree[key] and data.draw(st.booleans()):
        _replace_one_value(tree[key], data)
    else:
        tree[key] = data.draw(json_values)


def _succeeds_or_value_error(call: Callable[[], Any]) -> None:
    try:
        call()
    except ValueError as error:
        assert str(error)  # noqa: PT017


# --- the description --------------------------------------------------------------------------------------------------


def _copy(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], Any] = lambda page: None) -> Path:
    """A bundle at `folder` like `bundle`, `change` applied to its `encoder.json`."""
    folder.mkdir(exist_ok=True)
    (folder / "encoder.safetensors").write_bytes((bundle / "encoder.safetensors").read_bytes())
    page = json.loads((bundle / "encoder.json").read_text())
    change(page)
    (folder / "encoder.json").write_text(json.dumps(page))
    return folder


def _put_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Weights that `encoder.json` describes, checksum and all."""
    path, page = folder / "encoder.json", json.loads((folder / "encoder.json").read_text())
    page["sha256"] = write_tensors(folder / "encoder.safetensors", tensors)
    path.write_text(json.dumps(page))


def _put(value: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    def change(page: dict[str, Any]) -> None:
        for key in keys[:-1]:
            page = page[key]
        page[keys[-1]] = value

    return change


S2 = ("inputs", "sentinel2_l2a")
WRONG_PAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer format": (_put(3, "format"), "bundle format 3, this version reads formats up to 2; update ssl_eo"),
    "no format": (lambda page: page.pop("format"), "bundle format None, expected a number from 1 to 2"),
    "format of a word": (_put("pair 2", "format"), "bundle format 'pair 2', expected a number from 1 to 2"),
    "format of a list": (_put([1], "format"), r"bundle format \[1\], expected a number from 1 to 2"),
    "format of a truth": (_put(True, "format"), "bundle format True, expected a number from 1 to 2"),
    "format below the first": (_put(0, "format"), "bundle format 0, expected a number from 1 to 2"),
    "unknown kind": (_put("trio", "kind"), "encoder.json: kind must be encoder or pair, got 'trio'"),
    "another kind": (_put("pair", "kind"), "encoder.json: key 'encoders' is missing"),
    "no encoder": (lambda page: page.pop("encoder"), "encoder.json: key 'encoder' is missing"),
    "no inputs": (lambda page: page.pop("inputs"), "encoder.json: key 'inputs' is missing"),
    "no bands": (lambda page: page["inputs"]["sentinel2_l2a"].pop("bands"), "key 'bands' is missing"),
    "encoder is a list": (_put([1], "encoder"), "encoder.json: "),
    "inputs is a number": (_put(3, "inputs"), "encoder.json: "),
    "sensor is a word": (_put("s2", *S2, "sensor"), "encoder.json: "),
    "no position": (lambda page: page["encoder"].pop("position"), "encoder.json: key 'position' is missing"),
    "no heads": (lambda page: page["encoder"]["dynamic"].pop("n_heads"), "encoder.json: key 'n_heads' is missing"),
    "unknown key": (_put(1, "encoder", "width"), "unknown key 'width'"),
    "unknown choice": (_put("moved", "encoder", "position"), "position is 'moved', which this version"),
    "a word for a number": (_put("four", "encoder", "patch_size"), "encoder.json: "),
    "conv without channels": (_put(None, "n_channels"), "needs the number of channels"),
    "a number of channels below zero": (_put(-3, "n_channels"), "encoder.json: "),
    "infinite width": (_put(float("inf"), "encoder", "mlp_ratio"), "encoder.json: "),
    "other patch size": (_put(8, "encoder", "patch_size"), r"1 tensors do not fit the encoder, the first is patch_emb"),
    "huge": (_put(1 << 20, "encoder", "embed_dim"), "tensors do not fit the encoder, the first is cls_token"),
    "other depth": (_put(3, "encoder", "depth"), r"first is blocks\.2\.\S+: expected \[\d+\], found none"),
    "deeper than the file": (_put(10**6, "encoder", "depth"), "encoder.json: the encoder has 1000000 blocks, too many"),
    "a word for a fraction": (_put("x", "encoder", "norm_eps"), "norm_eps is 'x', which this version .*float"),
    "a truth for a number": (_put(True, "encoder", "n_registers"), "n_registers is True, which this version"),
    "a fraction for a number": (_put(2.5, "encoder", "depth"), "depth is 2.5, which this version .*int | None"),
    "a word for channels": (_put("3", "n_channels"), "n_channels must be a whole number from 1 or null, got '3'"),
    "inner config is a list": (_put([1], "encoder", "conv"), "encoder.json: "),
    "band twice": (_put(["B02", "B02", "B04"], *S2, "bands"), "bands of sentinel2_l2a are named twice: B02, B02, B04"),
    "no checksum": (lambda page: page.pop("sha256"), "encoder.json: key 'sha256' is missing"),
    "other checksum": (
        _put("0" * 64, "sha256"),
        "its SHA-256 is not that of the JSON file beside it",
    ),
    "checksum is null": (
        _put(None, "sha256"),
        "its SHA-256 is not that of the JSON file beside it",
    ),
    "means": (_put([1.0], *S2, "mean"), "1 means and 3 standard deviations for 3 bands"),
    "words for means": (_put(["a", "b", "c"], *S2, "mean"), "encoder.json: "),
    "zero std": (_put([1.0, 0.0, 1.0], *S2, "std"), "std and gsd_m positive"),
    "no size of pixels": (_put(float("nan"), *S2, "gsd_m"), "std and gsd_m positive"),
    "means beyond float32": (_put([1e39] * 3, *S2, "mean"), "mean must be finite"),
    "truths for means": (_put([True] * 3, *S2, "mean"), "mean must be finite"),
    "std below float32": (_put([1e-44] * 3, *S2, "std"), "std and gsd_m positive"),
    "a truth for metres": (_put(True, *S2, "gsd_m"), "std and gsd_m positive"),
    "clip beyond float32": (_put(1e300, *S2, "clip_std"), "clip_std must be positive, at most 1e.06"),
    "a word for no_data": (_put("123", *S2, "sensor", "no_data"), "no_data must be a list of numbers, got '123'"),
    "a long word": (_put("x" * 100_000, "encoder", "patch_size"), "patch_size is 'xxx"),
    "a long count": (_put([1] * 100_000, "n_channels"), "n_channels must be a whole number"),
    "unknown band": (_put(["B02", "B03", "B44"], *S2, "bands"), "has no band 'B44'"),
    "wrong wavelength": (
        lambda page: page["inputs"]["sentinel2_l2a"]["sensor"]["bands"][0].update(wavelength_um=443.0),
        "looks like nanometres",
    ),
}


@pytest.mark.parametrize("case", WRONG_PAGES)
def test_malformed_description_is_one_clear_line(bundle: Path, tmp_path: Path, case: str) -> None:
    change, message = WRONG_PAGES[case]
    with pytest.raises(ValueError, match=message) as caught:
        load_bundle(_copy(bundle, tmp_path, change))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("position", ["sincos_resized", "sincos_3d"])
def test_no_page_asks_for_a_table_without_bounds(bundle: Path, tmp_path: Path, position: str) -> None:
    def change(page: dict[str, Any]) -> None:
        page["encoder"].update(position=position, image_size=1028)

    with pytest.raises(ValueError, match=r"image_size must be at most 256 patches, .* got 1028"):
        load_bundle(_copy(bundle, tmp_path, change))
    assert replace(SMALL, position="sincos_resized", image_size=1024).image_size == 1024


@pytest.mark.parametrize("name", ["encoder.json", "encoder.safetensors"])
def test_a_pipe_is_no_part_of_a_bundle(bundle: Path, tmp_path: Path, name: str) -> None:
    """Opening it would wait for ever."""
    folder = _copy(bundle, tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="it is no regular file"):
        load_bundle(folder)


def test_a_pair_names_the_argument_that_is_missing() -> None:
    torch.manual_seed(0)
    cfg = replace(SMALL, position="alibi", patch_embed="conv")
    model = OpticalRadar.of_sizes(cfg, cfg, (3, 3), 1)
    one = _inputs()
    two = {**one, "other": one["sentinel2_l2a"]}
    for inputs, argument in (({"optical": two, "radar": one}, "optical"), ({"optical": one, "radar": two}, "radar")):
        with pytest.raises(ValueError, match=f"say which by {argument}_sensor=: sentinel2_l2a, other"):
            BundlePair(model, inputs, {})(_images(), _images())


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '{"format":' + "[" * 200_000])
def test_description_that_is_no_object(bundle: Path, tmp_path: Path, text: str) -> None:
    folder = _copy(bundle, tmp_path)
    (folder / "encoder.json").write_text(text)
    with pytest.raises(ValueError, match="not an encoder bundle"):
        load_bundle(folder)


def test_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: not an encoder bundle"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("name", ["cls_token", "unknown"])
def test_tensors_of_another_encoder(bundle: Path, tmp_path: Path, name: str) -> None:
    folder = _copy(bundle, tmp_path)
    tensors = read_tensors(folder / "encoder.safetensors")
    tensors[name] = torch.zeros(1, 1, 17)
    _put_tensors(folder, tensors)
    with pytest.raises(ValueError, match=rf"1 tensors do not fit .* is {name}: expected .*, found \[1, 1, 17\]"):
        load_bundle(folder)


def test_half_precision_weights_become_a_float32_encoder(bundle: Path, tmp_path: Path) -> None:
    folder = _copy(bundle, tmp_path)
    tensors = {k: v.bfloat16() for k, v in read_tensors(folder / "encoder.safetensors").items()}
    _put_tensors(folder, tensors)
    model: BundleEncoder = load_bundle(folder)
    assert all(torch.equal(v, tensors[k].float()) for k, v in model.encoder.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_weights_that_are_no_fractions(bundle: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = _copy(bundle, tmp_path)
    tensors = read_tensors(folder / "encoder.safetensors")
    bits = tensors["norm.weight"]
    tensors["norm.weight"] = bits.view(dtype) if dtype == torch.int32 else bits.to(dtype)
    _put_tensors(folder, tensors)
    with pytest.raises(ValueError, match=rf"the first is norm.weight: expected \[16\], found {dtype}"):
        load_bundle(folder)


def test_weights_and_description_of_two_exports_are_refused(bundle: Path, tmp_path: Path) -> None:
    """As a kill between the two files would leave them."""
    folder = _copy(bundle, tmp_path)
    encoder = _encoder("conv")
    torch.nn.init.ones_(encoder.cls_token)
    write_tensors(folder / "encoder.safetensors", encoder.state_dict())
    with pytest.raises(ValueError, match=r"encoder\.safetensors: its SHA-256 is not that of the JSON file"):
        load_bundle(folder)


def test_the_checksum_is_that_of_the_file(bundle: Path) -> None:
    page = json.loads((bundle / "encoder.json").read_text())
    assert page["sha256"] == hashlib.sha256((bundle / "encoder.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["encoder.safetensors", "encoder.json"])
def test_a_full_disk_names_the_file_and_leaves_nothing(bundle: Path, tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands for the full disk; it is set in a child, for it cannot be raised again."""
    folder = _copy(bundle, tmp_path / "bundle")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    child = os.fork()
    if child == 0:
        facts = {"note": "x" * 200_000} if name == "encoder.json" else {}
        limit = 100_000 if name == "encoder.json" else 1000
        message = "nothing was raised"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            write_bundle(folder, _encoder("conv"), _inputs(), facts)
        except OSError as error:
            message = str(error)
        finally:
            (tmp_path / "message").write_text(message)
            os._exit(0)
    os.waitpid(child, 0)
    assert f"{folder / name} could not be written: File too large" in (tmp_path / "message").read_text()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    load_bundle(folder)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_description_is_a_bundle_or_a_value_error(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = _copy(bundle, tmp_path_factory.getbasetemp() / "fuzzed", lambda page: _replace_one_value(page, data))
    _succeeds_or_value_error(lambda: load_bundle(folder))
