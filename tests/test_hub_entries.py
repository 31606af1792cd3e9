"""torch.hub: every entry with torch alone, from files and addresses, and one clear line for what is no such file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.message import Message
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from make_sensor_tables import TABLES, tables

from ssl_eo.bundles import BundleEncoder, BundlePair
from ssl_eo.hub import load_bundle, write_bundle
from ssl_eo.models.patch_embed import ChannelAttentionConfig
from ssl_eo.weights import _downloads, croma, dinov2
from ssl_eo.weights.base import export_released, find_released
from ssl_eo.weights.croma import pair_inputs

ROOT = Path(__file__).parent.parent
PARAMETERS = {  # of the encoders, whole
    "panopticon_vitb14": 98_976_000,
    "dofa_vitb16": 111_312_128,
    "dofa_vitl16": 337_105_408,
    "croma_base": 194_365_440,
    "croma_large": 672_557_056,
    "prithvi_eo_v1_100m": 86_237_184,
    "prithvi_eo_v2_300m": 303_886_336,
    "mae_vitb16": 85_798_656,
    "multimae_eo_vitb8": 85_203_456,
    "dinov2_vits14": 22_056_576,
    "dinov2_vitb14": 86_580_480,
    "dinov2_vitl14": 304_368_640,
    "dinov2_vits14_reg": 22_058_112,
    "dinov2_vitb14_reg": 86_583_552,
    "dinov2_vitl14_reg": 304_372_736,
}
RECIPES = {  # likewise, of our own
    "byol_vits16_s2": 22_969_344,
    "croma_vitb8_ssl4eo": 194_365_440,
    "dino_vits16_s2": 23_044_992,
    "dinov2_vitmicro4_eurosat": 845_440,
    "dinov2_vits14_rgb": 22_058_112,
    "dofa_vitb16_recipe": 111_313_664,
    "mae_specialist": 212_480,
    "mae_temporal_vitl16_ssl4eo": 303_362_050,
    "mae_vitmicro4_eurosat": 799_744,
    "mae_vitt8_eurosat": 5_376_000,
    "mae_vitt8_s2l2a": 1_903_872,
    "moco_v3_vits16_s2": 22_969_344,
    "multimae_vitb8_mmearth64": 85_203_456,
    "panopticon_vitb14_stage1": 98_976_000,
    "panopticon_vitb14_stage2": 98_976_000,
    "simclr_vits16_s2": 22_969_344,
}

# The packages that torch requires, and the standard library, are all that can be imported.
BARE = """
import importlib.metadata as metadata, re, sys

def required(name, found):
    if name not in found:
        found.add(name)
        for line in metadata.requires(name) or []:
            other = re.match(r"[\\w.-]+", line)[0].lower()
            try:
                "extra ==" in line or required(other, found)
            except metadata.PackageNotFoundError:
                pass  # of another platform
    return found

distributions = {name.lower().replace("_", "-") for name in required("torch", set())}
allowed = {"hubconf", "ssl_eo"} | set(sys.stdlib_module_names)
for module, owners in metadata.packages_distributions().items():
    if any(owner.lower().replace("_", "-") in distributions for owner in owners):
        allowed.add(module)

class Bare:
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed and not name.startswith("_sysconfigdata"):
            return None
        return next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)

sys.meta_path[:] = [Bare()]
for name in ("numpy", "yaml"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
"""

# Whole ones take no memory on the meta device; what they compute is held against the reference after the first block;
# those that are filled, written and read have one narrow block, or two.
EVERY_ENTRY = """
import hashlib, json, warnings
from dataclasses import replace
from pathlib import Path

import torch

root, folder, recipes, *entries = sys.argv[1:]
warnings.simplefilter("ignore")  # torch says that there is no NumPy

def load(name, *args, **kwargs):
    return torch.hub.load(root, name, *args, source="local", **kwargs)

found = {"recipes": {}}
with torch.device("meta"):
    for name in entries:
        found[name] = [sum(p.numel() for p in load(name, pretrained=False).parameters())]
    for name in recipes.split(","):
        found["recipes"][name] = sum(p.numel() for p in load(name, pretrained=False).parameters())

from ssl_eo.cli import main
from ssl_eo.weights import base, croma
from ssl_eo.weights._reference import compare

def published(name):
    name = name.removesuffix("m") if name.startswith("prithvi") else name
    return f"{name}_rgb" if name.startswith("multimae") else name

for name in entries:
    found[name].append(compare(published(name), depth=2 if name in croma.PAIRS else 1).is_same)
found["doctor"] = main(["doctor", "--models", "dinov2_vits14"])

for family in base._families():
    family.MODELS = tuple(replace(one, config=replace(one.config, depth=1, embed_dim=192)) for one in family.MODELS)
for name, pair in croma.PAIRS.items():
    croma.PAIRS[name] = replace(pair, config=replace(pair.config, depth=2, embed_dim=192))

for name in entries:
    model = load(name, pretrained=False)
    assert not model.training
    path = Path(folder, f"{name}.pth")
    if name in croma.PAIRS:
        croma.export_pair(model.model, name, croma.pair_inputs(), path)
    else:
        base.export_released(model.encoder, published(name), path)
    expected = model.state_dict()
    read = load(name, path.as_uri(), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    same = [torch.equal(value, expected[key]) for key, value in read.state_dict().items()]
    found[name] += [len(same) == len(expected) and all(same), not read.training, read.facts["step"]]
    path.unlink()

panopticon = load("panopticon_vitb14", pretrained=False)
images = torch.randn(1, 2, 28, 28)
with torch.no_grad():
    found["shape"] = list(panopticon(images, sensor="sentinel2_l2a", bands=["B02", "B08"]).shape)
Path(folder, "found.json").write_text(json.dumps(found))
"""


def load(name: str, *args: Any, **kwargs: Any) -> Any:
    return torch.hub.load(str(ROOT), name, *args, source="local", **kwargs)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_entry_works_with_torch_alone(tmp_path: Path) -> None:
    """Built whole; right after one block; and, small, written in the published layout and read from an address."""
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "kept"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", BARE + EVERY_ENTRY, str(ROOT), str(tmp_path), ",".join(RECIPES), *PARAMETERS]
    run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("shape") == [1, 192]
    assert found.pop("doctor") == 0
    assert found.pop("recipes") == RECIPES
    assert "dinov2_vits14: ok, rgb " in run.stdout
    assert {name: values[0] for name, values in found.items()} == PARAMETERS
    assert all(values[1:] == [True, True, True, 1] for values in found.values())


def test_every_entry_is_listed_and_says_what_it_is() -> None:
    """`torch.hub.list` shows what can be called and begins with no underscore."""
    spec = spec_from_file_location("hubconf", ROOT / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    listed = {name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")}
    assert listed == {*PARAMETERS, *RECIPES, "encoder"}
    assert module.dependencies == ["torch"]
    assert all(getattr(module, name).__doc__ for name in listed)


# --- without PyYAML ---------------------------------------------------------------------------------------------------


def test_the_copy_of_the_sensors_is_that_of_their_files() -> None:
    assert TABLES.read_text() == tables(), "run python tests/make_sensor_tables.py"


def test_an_unknown_sensor_without_yaml(tmp_path: Path) -> None:
    probe = (
        BARE + "from ssl_eo.sensors import load_sensor\n"
        "assert load_sensor('hls').no_data == (-9999.0,)\n"
        "for name in ('sentinel2_l2b', 'mine.yaml'):\n"
        "    try: load_sensor(name)\n"
        "    except ValueError as error: print(error)\n"
    )
    words = [sys.executable, "-c", probe]
    lines = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].startswith("no sensor 'sentinel2_l2b'; did you mean 'sentinel2_l2a'? (known: aviris, ")
    assert lines[1].startswith("no sensor 'mine.yaml'")
    assert lines[1].endswith("a file needs PyYAML")


def test_statistics_of_croma_are_those_of_its_dataset() -> None:
    card = yaml.safe_load((ROOT / "datasets_meta" / "datasets" / "ssl4eo_s12.yaml").read_text())
    products = {product["sensor"]: product["bands"] for product in card["products"].values()}
    for group, names in {"optical": ["sentinel2_l2a", "sentinel2_l1c"], "radar": ["sentinel1_grd"]}.items():
        assert list(pair_inputs()[group]) == names
        for name, known in pair_inputs()[group].items():
            pairs = [products[name][band]["statistics"] for band in known.bands]
            assert [list(pair) for pair in zip(known.mean, known.std, strict=True)] == pairs


# --- files, addresses and what is kept --------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _small_models() -> Iterator[None]:
    """All of DINOv2 with one narrow block, so that files are small."""
    small = {"embed_dim": 16, "depth": 1, "n_heads": 2, "image_size": 56}
    models = tuple(replace(one, config=replace(one.config, **small)) for one in dinov2.MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2, "MODELS", models)
        yield


@pytest.fixture(autouse=True)
def kept(tmp_path: Path) -> Iterator[Path]:
    """Where torch.hub keeps files."""
    before = torch.hub._hub_dir
    torch.hub.set_dir(tmp_path / "kept")
    yield tmp_path / "kept" / "ssl_eo"
    torch.hub._hub_dir = before


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    export_released(load("dinov2_vits14", pretrained=False).encoder, "dinov2_vits14", tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    model = load("dinov2_vits14", pretrained=False)
    write_bundle(tmp_path / "bundle", model.encoder, model.inputs, {"step": 3})
    return tmp_path / "bundle"


@pytest.fixture
def packed(bundle: Path) -> Path:
    return Path(shutil.make_archive(str(bundle), "zip", bundle))


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_entry_gives_what_the_imported_bundle_does(file: Path, tmp_path: Path) -> None:
    from ssl_eo.weights.base import import_released

    model = load("dinov2_vits14", pretrained=str(file))
    import_released(file, "dinov2_vits14", tmp_path / "imported")
    imported = load("encoder", str(tmp_path / "imported"))
    assert_same(model, imported)
    assert (model.facts, model.inputs) == (imported.facts, imported.inputs)
    images = torch.randint(0, 256, (2, 3, 28, 28))
    assert torch.equal(model(images), imported(images))
    assert torch.equal(model(images), model(images, sensor="rgb", bands=["R", "G", "B"]))


def test_random_weights_are_said_to_be_random() -> None:
    model = load("dinov2_vits14", pretrained=False)
    assert isinstance(model, BundleEncoder)
    assert model.facts == {"features": {"pool": "cls", "taps": [1.0]}, "step": 0}
    assert not torch.equal(model.encoder.pos_embed, load("dinov2_vits14", pretrained=False).encoder.pos_embed)


def test_a_group_of_bands_is_chosen() -> None:
    with torch.device("meta"):
        model = load("multimae_eo_vitb8", pretrained=False, group="sired")
    assert model.inputs["sentinel2_l2a"].bands == ("B11", "B12")
    with pytest.raises(ValueError, match="no published encoder 'multimae_eo_vitb8_green'"):
        load("multimae_eo_vitb8", pretrained=False, group="green")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """`https://a.org/PATH` is the file at `/PATH` of this machine."""

    def respond(request: Any, timeout: float) -> _Response:
        content = Path(request.full_url.removeprefix("https://a.org")).read_bytes()
        return _Response(request.full_url, len(content), content)

    monkeypatch.setattr(_downloads, "urlopen", respond)


def test_an_address_is_fetched_once(file: Path, kept: Path, served: None, capfd: pytest.CaptureFixture[str]) -> None:
    url, right = f"https://a.org{file}", sha256(file)
    first = load("dinov2_vits14", url, sha256=right)
    assert "fetching https://a.org/" in capfd.readouterr().err
    file.unlink()
    assert_same(first, load("dinov2_vits14", url, sha256=right[:8]))
    assert_same(first, load("dinov2_vits14", url))
    assert capfd.readouterr().err == ""
    (path,) = kept.rglob("*.pth")
    assert path.name == file.name


def test_addresses_that_end_alike_are_told_apart(file: Path, tmp_path: Path, kept: Path, served: None) -> None:
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    export_released(load("dinov2_vits14", pretrained=False).encoder, "dinov2_vits14", other)
    a, b = (load("dinov2_vits14", f"https://a.org{path}") for path in (file, other))
    assert not torch.equal(a.encoder.pos_embed, b.encoder.pos_embed)
    assert len(list(kept.rglob(file.name))) == 2


def test_a_kept_file_that_was_changed_is_fetched_again(file: Path, kept: Path, served: None) -> None:
    url = f"https://a.org{file}"
    expected = load("dinov2_vits14", url, sha256=sha256(file))
    (path,) = kept.rglob("*.pth")
    path.write_bytes(path.read_bytes()[:-100])
    assert_same(expected, load("dinov2_vits14", url, sha256=sha256(file)))


def test_another_checksum_is_refused(file: Path) -> None:
    for where in (str(file), file.as_uri()):
        with pytest.raises(ValueError, match=rf"^{where}: its SHA-256 is {sha256(file)}, expected {'0' * 64}: another"):
            load("dinov2_vits14", where, sha256="0" * 64)


class _Response(io.BytesIO):
    """What a server sends, maybe less than it announced, or from another address."""

    def __init__(self, url: str, announced: int, content: bytes = b"x" * 100) -> None:
        super().__init__(content)
        self.url = url
        self.headers = Message()
        self.headers["Content-Length"] = str(announced)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (_Response("https://a.org/w.pth", 300), "100 bytes came, 300 were announced"),
        (_Response("http://a.org/w.pth", 100), "it leads to http://a.org/w.pth, which is not safe"),
    ],
)
def test_half_a_download_is_none(
    monkeypatch: pytest.MonkeyPatch, kept: Path, response: _Response, message: str
) -> None:
    monkeypatch.setattr(_downloads, "urlopen", lambda *args, **kwargs: response)
    with pytest.raises(ValueError, match=rf"^https://a.org/w.pth: could not be fetched \({message}\); try again, or"):
        load("dinov2_vits14", "https://a.org/w.pth")
    assert not [path for path in kept.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("pretrained", "options", "message"),
    [
        (True, {}, "dinov2_vits14: pretrained is True: give the path or address of the authors' file .*, or False for"),
        (None, {}, "pretrained is None"),
        (False, {"sha256": "0" * 64}, "sha256 is that of a file, and pretrained=False reads none"),
        ("http://a.org/w.pth", {}, "^http://a.org/w.pth: an address begins with https:// or file://"),
        ("ftp://a.org/w.pth", {}, "an address begins with https:// or file://"),
        ("{tmp}/none.pth", {}, "none.pth: no such file"),
        ("{tmp}", {}, ": a folder, expected a file"),
        ("file://{tmp}/none.pth", {}, "^file://.*/none.pth: no such file"),
        ("{tmp}/none.pth", {"sha256": "abc"}, "sha256 must be the first 8 to 64 hexadecimal digits"),
    ],
)
def test_what_names_no_file_is_refused(tmp_path: Path, pretrained: Any, options: dict[str, Any], message: str) -> None:
    where = pretrained.format(tmp=tmp_path) if isinstance(pretrained, str) else pretrained
    with pytest.raises(ValueError, match=message) as caught:
        load("dinov2_vits14", where, **options)
    assert "\n" not in str(caught.value)


# --- hostile files ----------------------------------------------------------------------------------------------------


class _Code:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def _truncated(file: Path, tmp_path: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _renamed(file: Path, tmp_path: Path) -> None:
    tensors = torch.load(file, weights_only=True)
    tensors["blocks.0.attn.QKV.weight"] = tensors.pop("blocks.0.attn.qkv.weight")
    torch.save(tensors, file)


def _misshapen(file: Path, tmp_path: Path) -> None:
    torch.save({**torch.load(file, weights_only=True), "norm.bias": torch.zeros(7)}, file)


def _with_code(file: Path, tmp_path: Path) -> None:
    torch.save({**torch.load(file, weights_only=True), "extra": _Code(tmp_path / "ran")}, file)


def _bare_pickle(file: Path, tmp_path: Path) -> None:
    file.write_bytes(pickle.dumps(_Code(tmp_path / "ran"), protocol=2))


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "truncated": (_truncated, "neither a safetensors file nor one of torch.save"),
    "renamed": (_renamed, r"1 missing \(blocks.0.attn.qkv.weight\); 1 not expected \(blocks.0.attn.QKV.weight\)"),
    "wrong shape": (_misshapen, r"1 of another shape \(norm.bias \[7\], expected \[16\]\)"),
    "code": (_with_code, "holds Python objects .* which could run code when they are read"),
    "code alone": (_bare_pickle, "holds Python objects|neither a safetensors file nor one of torch.save"),
}


@pytest.mark.parametrize("is_address", [False, True], ids=["path", "address"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_weights_are_one_clear_line(file: Path, tmp_path: Path, case: str, is_address: bool) -> None:
    change, message = HOSTILE[case]
    change(file, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load("dinov2_vits14", file.as_uri() if is_address else str(file))
    assert file.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


FAMILIES = {  # a module, its first entry, and what makes its models small; blocks of the radar encoder are half as many
    "panopticon": ("panopticon_vitb14", {"image_size": 56, "channel_attention": ChannelAttentionConfig(64, 2)}),
    "dofa": ("dofa_vitb16", {"image_size": 32}),
    "croma": ("croma_base", {"depth": 2, "n_heads": 16}),
    "prithvi": ("prithvi_eo_v1_100m", {}),
    "mae": ("mae_vitb16", {"image_size": 32}),
    "multimae_eo": ("multimae_eo_vitb8", {}),
}


def _small_file(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """An entry of `family` whose models are small, and a file that it reads."""
    entry, changes = FAMILIES[family]
    small, path = {"embed_dim": 64, "depth": 1, "n_heads": 2, **changes}, folder / "weights.pth"
    module = import_module(f"ssl_eo.weights.{family}")
    if family == "croma":
        pair = croma.PAIRS[entry]
        monkeypatch.setitem(croma.PAIRS, entry, replace(pair, config=replace(pair.config, **small)))
        croma.export_pair(load(entry, pretrained=False).model, entry, pair_inputs(), path)
    else:
        one = replace(module.MODELS[0], config=replace(module.MODELS[0].config, **small))
        monkeypatch.setattr(module, "MODELS", (one,))
        export_released(load(entry, pretrained=False).encoder, one.name, path)
    return entry, path


def _change_one(path: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    """A file in which `change` was applied to one tensor, in a dictionary in the dictionary where there are such."""
    content = torch.load(path, weights_only=True)
    part = next(iter(content.values())) if isinstance(next(iter(content.values())), dict) else content
    change(part, next(name for name in part if name.endswith(("norm1.weight", "input_norm.weight"))))
    torch.save(content, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_weights_of_every_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, path = _small_file(family, tmp_path, monkeypatch)
    load(entry, str(path))
    whole = path.read_bytes()
    changes: dict[str, Callable[[], object]] = {
        "renamed": lambda: _change_one(path, lambda part, name: part.update({f"{name}s": part.pop(name)})),
        "another shape": lambda: _change_one(path, lambda part, name: part.update({name: torch.zeros(7)})),
        "truncated": lambda: path.write_bytes(whole[:-1000]),
        "code": lambda: torch.save({"model": {}, "extra": _Code(tmp_path / "ran")}, path),
    }
    for what, change in changes.items():
        path.write_bytes(whole)
        change()
        with pytest.raises(ValueError) as caught:
            load(entry, str(path))
        assert str(caught.value).startswith(f"{path}: "), what
        assert "\n" not in str(caught.value), what
    assert not (tmp_path / "ran").exists()


# --- bundles ----------------------------------------------------------------------------------------------------------


def test_a_bundle_from_a_folder_a_zip_file_and_an_address(bundle: Path, packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:  # as a folder is zipped from outside
        for name in ("encoder.json", "encoder.safetensors"):
            archive.write(bundle / name, f"bundle/{name}")
        archive.writestr("../outside", "more")
    expected = load_bundle(bundle)
    digest = sha256(packed)
    for where, known in (
        (bundle, None),
        (packed, digest),
        (packed.as_uri(), digest),
        (tmp_path / "inner.zip", None),
    ):
        model = load("encoder", str(where), sha256=known)
        assert_same(model, expected)
        assert (model.facts, model.inputs) == (expected.facts, expected.inputs)
    assert not list(tmp_path.parent.rglob("outside"))


def test_a_pair_of_encoders_comes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_eo.hub import write_pair_bundle

    pair = croma.PAIRS["croma_base"]
    small = replace(pair, config=replace(pair.config, embed_dim=64, depth=2))
    monkeypatch.setitem(croma.PAIRS, "croma_base", small)
    model = load("croma_base", pretrained=False)
    assert isinstance(model, BundlePair)
    write_pair_bundle(tmp_path / "pair", model.model, pair_inputs(), model.facts)
    assert_same(model, load("encoder", str(tmp_path / "pair")))
    assert model(torch.rand(1, 12, 16, 16), torch.rand(1, 2, 16, 16), "sentinel2_l2a").shape == (1, 64)


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_what_is_no_bundle_is_one_clear_line(bundle: Path, packed: Path, tmp_path: Path) -> None:
    page, weights = ((bundle / name).read_bytes() for name in ("encoder.json", "encoder.safetensors"))
    broken = bytearray(packed.read_bytes())
    broken[len(broken) // 2] ^= 0xFF
    (tmp_path / "broken.zip").write_bytes(broken)
    (tmp_path / "cut.zip").write_bytes(packed.read_bytes()[:-100])
    (tmp_path / "text.zip").write_text("text")
    both = {"encoder.json": page, "encoder.safetensors": weights}
    _zip(tmp_path / "two.zip", {**both, **{f"b/{name}": content for name, content in both.items()}})
    _zip(tmp_path / "bomb.zip", {**both, "encoder.json": bytes(101 << 20)})
    _zip(tmp_path / "other.zip", {**both, "encoder.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])})
    cases = {
        "broken.zip": "Bad CRC-32|Error -3",
        "cut.zip": "neither a bundle folder nor a zip file of one",
        "text.zip": "neither a bundle folder nor a zip file of one",
        "two.zip": "2 files in it are named encoder.json, expected one",
        "bomb.zip": "encoder.json would become 105,906,176 bytes",
        "other.zip": "other.zip/encoder.safetensors: its SHA-256 is not that of the JSON file beside it",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load("encoder", str(tmp_path / name))
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("{tmp}/none", {}, "none: no such file"),
        ("{bundle}", {"sha256": "0" * 64}, "sha256 is that of a file, and this is a folder"),
        ("{tmp}", {}, "not an encoder bundle"),
        ("{tmp}/run", {}, "run: a run, .* bundle; make one of it: ssl-eo export --checkpoint {tmp}/run --out FOLDER"),
        ("{tmp}/run/checkpoints/step_1", {}, "make one of it: ssl-eo export --checkpoint {tmp}/run/checkpoints/step_1"),
        ("{bundle}/encoder.safetensors", {}, r"encoder\.safetensors: weights alone, expected a bundle"),
        ("http://a.org/b.zip", {}, "an address begins with https:// or file://"),
    ],
)
def test_a_bundle_that_is_not_there(
    bundle: Path, tmp_path: Path, where: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "run" / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_1" / "complete.json").write_text("{}")
    with pytest.raises(ValueError, match=message.replace("{tmp}", str(tmp_path))):
        load("encoder", where.format(tmp=tmp_path, bundle=bundle), **options)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    """All of its tensors fit but the registers, by which it is known."""
    export_released(load("dinov2_vits14_reg", pretrained=False).encoder, "dinov2_vits14_reg", tmp_path / "reg.pth")
    with pytest.raises(ValueError, match=r"reg\.pth: not the weights of dinov2_vits14: 1 not expected \(register_tok"):
        load("dinov2_vits14", str(tmp_path / "reg.pth"))
    assert find_released("dinov2_vits14").config.embed_dim == 16
