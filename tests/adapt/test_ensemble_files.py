"""Ensembles on disk: the same bits back, one clear line for anything hostile, and nothing in a file is run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_specialists import PYRAMID, VIT, images, known, pyramid, vit

from ssl_eo.adapt.ensemble import Ensemble
from ssl_eo.adapt.eos_fm import import_published, read_published
from ssl_eo.adapt.specialists import Specialist, export_ensemble, load_ensemble, specialist_of, write_ensemble
from ssl_eo.hub import write_bundle, write_pair_bundle
from ssl_eo.models.convnext import ConvNeXt, ConvNeXtConfig
from ssl_eo.models.cross_encoder import OpticalRadar
from ssl_eo.sensors import load_sensor
from ssl_eo.tensor_files import write_tensors

RGB = known("sentinel2_l2a", ("B04", "B03", "B02"))
RADAR = known("sentinel1_grd", ("VV", "VH"))
CHANNELS = load_sensor("sentinel2_l2a").channel_meta()


def specialists() -> list[Specialist]:
    return [
        pyramid("Burn_scars-1", 3, RGB),
        vit("any", "channel_attention"),
        vit("conv", "conv", 3, RGB),
        pyramid("two", 2),
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    write_ensemble(folder, specialists())
    return folder


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    written = specialists()
    write_ensemble(tmp_path, written)
    read = load_ensemble(tmp_path)
    for one, other in zip(written, read, strict=True):
        assert (one.name, one.kind, one.n_channels) == (other.name, other.kind, other.n_channels)
        assert one.inputs == other.inputs
        assert one.facts == other.facts
        assert one.encoder.cfg == other.encoder.cfg
        assert not other.backbone.training
        expected, found = one.encoder.state_dict(), other.encoder.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert load_file(tmp_path / f"{one.name}.safetensors").keys() == expected.keys()
    with torch.no_grad():
        before, after = (Ensemble(found, CHANNELS)(images(CHANNELS)) for found in (written, read))
    assert all(torch.equal(a, b) for a, b in zip(before.maps, after.maps, strict=True))


def test_an_ensemble_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write_ensemble(tmp_path, [pyramid("one", 3)])
    with pytest.raises(ValueError, match="holds an ensemble already"):
        write_ensemble(tmp_path, [pyramid("two", 3)])
    write_ensemble(tmp_path, [pyramid("two", 3)], overwrite=True)
    assert [specialist.name for specialist in load_ensemble(tmp_path)] == ["two"]


@pytest.mark.parametrize("names", [[], ["a", "A"], ["a", "a"]])
def test_names_that_would_share_a_file_are_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"one specialist at least|two specialists are called [aA]"):
        write_ensemble(tmp_path, [pyramid(name, 3) for name in names])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-x", "a.b", "a" * 101, "a\n"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a specialist is named by up to 100 letters"):
        pyramid(name, 3)


Change = Callable[[dict[str, Any]], Any]


def setting(key: str, value: Any, i: int = 0) -> Change:
    return lambda page: page["specialists"][i].__setitem__(key, value)


def of_encoder(key: str, value: Any, i: int = 0) -> Change:
    return lambda page: page["specialists"][i]["encoder"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda page: page.__setitem__("format", 2), "ensemble format 2, this version reads 1"),
        (lambda page: page.__setitem__("format", True), "ensemble format True, this version reads 1"),
        (lambda page: page.__setitem__("specialists", {}), "no list of specialists"),
        (lambda page: page.__setitem__("specialists", []), "needs one specialist at least"),
        (lambda page: page.__setitem__("specialists", [3]), "not subscriptable"),
        (lambda page: page["specialists"][0].pop("name"), "key 'name' is missing"),
        (setting("name", "../two"), r"'\.\./two' is no name of a specialist"),
        (setting("name", ["two"]), r"\['two'\] is no name of a specialist"),
        (setting("name", "two"), "two specialists are called two"),
        (setting("name", "else"), r"else\.safetensors: No such file"),
        (setting("kind", "resnet"), "kind 'resnet', this version knows vit, convnextv2"),
        (setting("kind", ["vit"]), "unhashable"),
        (setting("kind", "vit"), "key 'size' is missing"),
        (lambda page: page["specialists"][0].pop("sha256"), "key 'sha256' is missing"),
        (setting("sha256", "0" * 64), "its SHA-256 is not that of the JSON file beside it"),
        (setting("facts", [1]), "ensemble.json: cannot convert"),
        (setting("n_channels", 4), r"stem\.0\.weight: expected \[4, 4, 4, 4\], found \[4, 3, 4, 4\]"),
        (setting("n_channels", 0), "n_channels must be a whole number from 1 or null, got 0"),
        (setting("n_channels", None), "n_channels must be at least 1, got 0"),
        (setting("inputs", 3), "ensemble.json: 'int' object has no attribute"),
        (lambda page: page["specialists"][0]["inputs"]["sentinel2_l2a"]["std"].pop(), "3 means and 2 standard dev"),
        (lambda page: page["specialists"][0]["inputs"]["sentinel2_l2a"]["bands"].reverse(), None),
        (of_encoder("width", -4), "width must be at least 1, got -4"),
        (of_encoder("width", 4.5), "width is 4.5, which this version does not know"),
        (of_encoder("width", 8), "do not fit the encoder"),
        (of_encoder("width", 1 << 50), "ensemble.json: "),
        (of_encoder("depth", 1 << 40), "blocks, too many for a file of"),
        (of_encoder("colour", 1), "unknown key 'colour'"),
        (of_encoder("depth", 3, 2), "taps .* name a block of this encoder of 3 twice"),
    ],
)
def test_a_changed_page_is_one_clear_line(tmp_path: Path, written: Path, change: Change, message: str | None) -> None:
    for path in written.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    page = json.loads((written / "ensemble.json").read_text())
    change(page)
    (tmp_path / "ensemble.json").write_text(json.dumps(page))
    if message is None:  # another order of bands is another ensemble, and no damage
        load_ensemble(tmp_path)
        return
    with pytest.raises(ValueError, match=message) as error:
        load_ensemble(tmp_path)
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize("content", [b"", b"[1", b"[]", b"\xff\xfe", b"[" * 100_000, b'"format"'])
def test_what_is_no_page_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ensemble.json").write_bytes(content)
    with pytest.raises(ValueError, match="not an ensemble") as error:
        load_ensemble(tmp_path)
    one_line(error)
    with pytest.raises(ValueError, match="not an ensemble"):
        load_ensemble(tmp_path / "nowhere")


class Evil:
    """Copies a file to `path` where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return shutil.copyfile, (__file__, str(self.path))


class Blocked(Evil):
    """Makes a folder; by a module that torch refuses by another message."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("stem.0.weight", "stem.9.weight"): value for name, value in tensors.items()}


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed,
            r"2 tensors do not fit the encoder, the first is stem\.0\.weight: expected \[4, 3, 4, 4\], found none",
        ),
        (lambda t: {**t, "stem.0.bias": t["stem.0.bias"].reshape(2, 2)}, r"expected \[4\], found \[2, 2\]"),
        (lambda t: {**t, "stem.0.bias": t["stem.0.bias"].int()}, r"expected \[4\], found torch.int32"),
        (lambda t: {name: t[name] for name in list(t)[1:]}, "1 tensors do not fit"),
        (-8, "truncated"),
        (4, "4 bytes are too few for a safetensors file"),
        (None, "not a safetensors file"),
    ],
)
def test_changed_weights_are_one_clear_line(tmp_path: Path, change: Any, message: str, is_known: bool) -> None:
    """Whether or not the page was changed with them. They are renamed, cut off, or a pickle."""
    write_ensemble(tmp_path, [pyramid("one", 3)])
    weights, ran = tmp_path / "one.safetensors", tmp_path / "ran"
    if callable(change):
        write_tensors(weights, change(load_file(weights)))
    elif change is None:
        torch.save([Evil(ran)], weights)
    else:
        weights.write_bytes(weights.read_bytes()[:change])
    if is_known:
        page = json.loads((tmp_path / "ensemble.json").read_text())
        page["specialists"][0]["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        (tmp_path / "ensemble.json").write_text(json.dumps(page))
    is_whole = callable(change)  # what is none is not read to its end, for a digest
    with pytest.raises(ValueError, match="its SHA-256 is not that" if is_whole and not is_known else message) as error:
        load_ensemble(tmp_path)
    assert str(weights) in one_line(error)
    assert not ran.exists()


def bundles(folder: Path) -> dict[str, Specialist]:
    """Bundles of `any` and `conv`, a folder that is none, and a file."""
    found = {specialist.name: specialist for specialist in specialists() if specialist.kind == "vit"}
    for name, specialist in found.items():
        encoder: Any = specialist.encoder
        write_bundle(folder / name, encoder, specialist.inputs, {"step": 5, "objective": "mae"})
    (folder / "logs").mkdir()
    (folder / "notes.txt").write_text("no bundle")
    return found


def test_bundles_of_a_folder_become_an_ensemble(tmp_path: Path) -> None:
    written = bundles(tmp_path / "in")
    assert export_ensemble(tmp_path / "in", tmp_path / "out") == ["any", "conv"]
    for specialist in load_ensemble(tmp_path / "out"):
        before = written[specialist.name].encoder.state_dict()
        assert all(torch.equal(before[name], value) for name, value in specialist.encoder.state_dict().items())
        assert specialist.facts == {"step": 5, "objective": "mae"}
        assert specialist.inputs == written[specialist.name].inputs
    with pytest.raises(ValueError, match="holds an ensemble already"):
        export_ensemble(tmp_path / "in", tmp_path / "out")


def test_runs_are_exported_on_the_way(tmp_path: Path) -> None:
    run = tmp_path / "in" / "my_run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("objective: {name: mae}")
    encoder: Any = vit("it", "conv", 3, RGB).encoder

    def export_run(path: Path, out: Path) -> int:
        assert path == run
        write_bundle(out, encoder, RGB, {"step": 9})
        return 9

    with pytest.raises(ValueError, match="my_run: a run; export its encoder as a bundle first"):
        export_ensemble(tmp_path / "in", tmp_path / "out")
    assert export_ensemble(tmp_path / "in", tmp_path / "out", export_run) == ["my_run"]
    assert load_ensemble(tmp_path / "out")[0].facts == {"step": 9}
    assert list((tmp_path / "in" / "my_run").iterdir()) == [run / "config.yaml"]


def test_a_bundle_of_two_encoders_becomes_two_specialists(tmp_path: Path) -> None:
    pair = OpticalRadar.of_sizes(VIT, VIT, (3, 2), 1)
    for part in (pair.optical, pair.radar):
        part.init_weights()
    with torch.no_grad():
        for parameter in [*pair.cross.parameters(), *pair.optical_head.parameters(), *pair.radar_head.parameters()]:
            parameter.zero_()
    write_pair_bundle(tmp_path / "in" / "croma", pair, {"optical": RGB, "radar": RADAR}, {"step": 1})
    assert export_ensemble(tmp_path / "in", tmp_path / "out") == ["croma-optical", "croma-radar"]
    assert [specialist.inputs for specialist in load_ensemble(tmp_path / "out")] == [RGB, RADAR]


def test_a_folder_of_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither runs"):
        export_ensemble(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere: No such file"):
        export_ensemble(tmp_path / "nowhere", tmp_path / "out")


# The published list.


def timm_tensors(n_channels: int, seed: int, cfg: ConvNeXtConfig | None = None) -> dict[str, torch.Tensor]:
    """What timm calls the tensors of an encoder, and how it shapes them."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in ConvNeXt(cfg or ConvNeXtConfig(), n_channels).state_dict().items()
        }
    found = OrderedDict()
    for name, shape in shapes.items():
        first, second, rest = name.split(".", 2)
        is_pointwise = ".mlp.fc" in name and len(shape) == 2
        found[f"{first}_{second}.{rest}"] = torch.rand(*shape, *((1, 1) if is_pointwise else ())) * 0.1
    return found


def entry(n_channels: int, name: str | None, seed: int = 0) -> tuple[int, Any, dict[str, Any]]:
    config = {"backbone": "timm_convnextv2_atto", **({} if name is None else {"encoder_name": name})}
    return n_channels, timm_tensors(n_channels, seed), config


def test_the_published_list_becomes_an_ensemble(tmp_path: Path) -> None:
    torch.save([entry(3, "eurosat rgb"), entry(2, None, 1), entry(3, "eurosat rgb", 2)], tmp_path / "eosfm.pth")
    names = import_published(tmp_path / "eosfm.pth", tmp_path / "out", {"eurosat_rgb": next(iter(RGB.values()))})
    assert names == ["eurosat_rgb", "encoder_2", "eurosat_rgb_2"]
    read = load_ensemble(tmp_path / "out")
    assert [specialist.n_channels for specialist in read] == [3, 2, 3]
    assert [dict(specialist.inputs) for specialist in read] == [RGB, {}, {}]
    assert read[0].facts["published"] == {"backbone": "timm_convnextv2_atto", "encoder_name": "eurosat rgb"}
    for seed, specialist in enumerate(read):
        tensors = timm_tensors(specialist.n_channels or 0, seed)
        assert len(specialist.encoder.state_dict()) == len(tensors)
        weight = specialist.encoder.state_dict()["stages.2.blocks.5.mlp.fc1.weight"]
        assert torch.equal(weight, tensors["stages_2.blocks.5.mlp.fc1.weight"].flatten(1))
    ensemble = Ensemble(read, CHANNELS)
    assert ensemble.names == ("eurosat_rgb",)
    assert ensemble.shape.widths == (40, 80, 160, 320)
    by_count = Ensemble(read, CHANNELS, adaptation="count")
    assert by_count.names == ("eurosat_rgb", "eurosat_rgb_2")


def changed(key: str, value: Any) -> tuple[int, Any, dict[str, Any]]:
    n_channels, tensors, config = entry(3, "it")
    return n_channels, {**tensors, key: value}, config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a list of 1 to 1000 encoders, found a dict"),
        ([], "found one of 0"),
        ([0] * 1001, "found one of 1001"),
        ([{}], r"encoder 0 is no \(in_chans, state_dict, config\), but a dict"),
        ([(3, {})], r"but \(int, dict\)"),
        ([(3.0, {}, {})], r"but \(float, dict, dict\)"),
        ([(True, {}, {})], r"but \(bool, dict, dict\)"),
        ([(3, [], {})], r"but \(int, list, dict\)"),
        ([(3, {}, {})], "encoder 0 is a None; convnextv2_atto and timm_convnextv2_atto can be read"),
        ([(3, {}, {"backbone": "timm_resnet50"})], "encoder 0 is a 'timm_resnet50'"),
        ([(0, {}, {"backbone": "timm_convnextv2_atto"})], "encoder encoder_1: n_channels must be at least 1, got 0"),
        ([(3, {}, {"backbone": "timm_convnextv2_atto"})], r"encoder encoder_1: \d+ tensors do not fit"),
        ([(3, {"a": 1}, {"backbone": "timm_convnextv2_atto"})], "a of encoder encoder_1 is no plain tensor, but int"),
        ([(1 << 60, {}, {"backbone": "timm_convnextv2_atto"})], "encoder encoder_1"),
    ],
)
def test_a_list_that_is_not_the_published_is_one_clear_line(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "eosfm.pth")
    with pytest.raises(ValueError, match=message) as error:
        read_published(tmp_path / "eosfm.pth")
    assert str(tmp_path) in one_line(error)


def test_weights_that_are_not_the_published_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "eosfm.pth"
    for key, value, message in (
        ("stem_0.weight", torch.zeros(40, 4, 4, 4), r"encoder it: 1 tensors do not fit .* stem.0.weight: expected"),
        ("stem_0.wait", torch.zeros(1), r"stem.0.wait: expected none, found \[1\]"),
        ("stem_1.bias", torch.zeros(1).expand(40), "stem_1.bias of encoder it is no plain tensor"),
        ("stem_1.bias", torch.zeros(40, dtype=torch.int8), "stem.1.bias: expected .40., found torch.int8"),
    ):
        torch.save([changed(key, value)], path)
        with pytest.raises(ValueError, match=message) as error:
            read_published(path)
        one_line(error)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    path, ran = tmp_path / "eosfm.pth", tmp_path / "ran"
    for content in ([Evil(ran)], [(3, {"a": Evil(ran)}, {})], [(3, {}, {"backbone": Evil(ran)})]):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"eosfm\.pth: holds Python objects \(shutil\.copyfile\)") as error:
            read_published(path)
        one_line(error)
    torch.save([Blocked(ran)], path)
    with pytest.raises(ValueError, match=r"eosfm\.pth: ") as error:
        read_published(path)
    one_line(error)
    assert not ran.exists()


def test_files_that_are_damaged_or_too_large_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "eosfm.pth"
    torch.save([(3, {"a": torch.zeros(1000)}, {"backbone": "timm_convnextv2_atto"})], path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"\x80\x02]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"eosfm\.pth: neither a safetensors file nor one of torch.save") as error:
            read_published(path)
        one_line(error)
    os.truncate(path, 5 << 30)  # a hole: nothing is written
    with pytest.raises(ValueError, match="5368709120 bytes, of an ensemble at most 4294967296 are read"):
        read_published(path)
    with pytest.raises(ValueError, match="nowhere: No such file"):
        read_published(tmp_path / "nowhere")


def test_what_is_said_of_channels_must_fit(tmp_path: Path) -> None:
    torch.save([entry(3, "it")], tmp_path / "eosfm.pth")
    (rgb,), (radar,) = RGB.values(), RADAR.values()
    with pytest.raises(ValueError, match=r"holds no encoder 'its'; did you mean 'it'"):
        read_published(tmp_path / "eosfm.pth", {"its": rgb})
    with pytest.raises(ValueError, match="encoder it takes 3 channels, its inputs are 2 bands"):
        read_published(tmp_path / "eosfm.pth", {"it": radar})


def test_a_safetensors_file_is_no_published_list(tmp_path: Path) -> None:
    write_tensors(tmp_path / "eosfm.pth", {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"neither a safetensors file nor one of torch.save|expected a list"):
        read_published(tmp_path / "eosfm.pth")


def test_an_encoder_needs_channels_and_a_size() -> None:
    with pytest.raises(ValueError, match="n_channels must be at least 1"):
        ConvNeXt(PYRAMID, 0)
    with pytest.raises(ValueError, match="third_depth must be at least 1, got 0"):
        ConvNeXtConfig(third_depth=0)
    encoder = specialist_of("it", ConvNeXt(PYRAMID, 3), {}, {}).encoder
    assert isinstance(encoder, ConvNeXt)
    with pytest.raises(ValueError, match="multiples of 32 pixels, got 40 x 32"):
        encoder(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match="built for 3 channels and got 2"):
        encoder(torch.zeros(1, 2, 32, 32))
