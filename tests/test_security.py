"""What `SECURITY.md` says of reading: everything that could run code of a file, or fetch one, is on a list here.

The right column is why it does not; the tests that hold it to that stand beside the modules.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "ssl_eo").rglob("*.py"), *(ROOT / "launch").glob("*.py"), ROOT / "hubconf.py"])

SAFE = {"yaml.safe_load", "yaml.safe_dump", "yaml.dump"}  # plain types: these loaders build nothing else
BUILTINS = {"eval", "exec", "compile", "__import__"}
# By the last parts of what is called: `torch.load`, `np.load`. A star stands for any name.
RISKY = (
    *("pickle.*", "marshal.*", "shelve.*", "joblib.*", "dill.*", "cloudpickle.*", "ctypes.*", "*.read_pickle"),
    *("torch.load", "hub.load", "hub.load_state_dict_from_url", "jit.load", "export.load", "package.PackageImporter"),
    *("np.load", "format.read_array", "np.fromfile", "np.memmap", "np.genfromtxt"),
    *("yaml.*", "OmegaConf.load", "OmegaConf.create", "tomllib.load", "tomllib.loads"),
    *("importlib.import_module", "import_module", "runpy.*", "os.system", "os.popen"),
    *("subprocess.*", "urlopen", "urlretrieve", "requests.*", "fsspec.*", "*.extractall", "*.extract"),
    *("rasterio.open", "Image.open", "h5py.File", "ElementTree.*", "etree.*"),
)

NAMED = "a name that a user wrote, or one of ours: a config is code, and SECURITY.md says so"
OUR_COMMAND = "a program with words of our own, through no shell"
ALLOWED = {
    ("ssl_eo/__init__.py", "import_module"): "names of our own",
    ("ssl_eo/adapt/scene_maps.py", "np.load"): "allow_pickle=False",
    ("ssl_eo/adapt/scene_outputs.py", "rasterio.open"): "writes; what is read has the driver GTiff",
    ("ssl_eo/cluster.py", "subprocess.run"): OUR_COMMAND,
    ("ssl_eo/components.py", "importlib.import_module"): NAMED,
    ("ssl_eo/config.py", "OmegaConf.create"): "an empty mapping",
    ("ssl_eo/config.py", "OmegaConf.load"): "plain types, by its safe loader",
    ("ssl_eo/data/shards.py", "np.load"): "allow_pickle=False",
    ("ssl_eo/data/sources/_columns.py", "np.load"): "allow_pickle=False",
    ("ssl_eo/data/sources/_hdf5_rows.py", "importlib.import_module"): "one name of our own",
    (
        "ssl_eo/data/sources/_geobench_files.py",
        "h5py.File",
    ): "HDF5 holds no code; filters that would be loaded are refused",
    ("ssl_eo/data/sources/_hdf5_rows.py", "h5py.File"): "HDF5 holds no code; links to other files are refused",
    ("ssl_eo/data/sources/_pictures.py", "Image.open"): "formats that are named",
    ("ssl_eo/data/sources/_rasters.py", "rasterio.open"): "driver GTiff: a VRT may name any file or address",
    ("ssl_eo/data/sources/eurosat.py", "Image.open"): "JPEG alone",
    ("ssl_eo/installation.py", "subprocess.run"): OUR_COMMAND,
    ("ssl_eo/installation.py", "tomllib.loads"): "plain types",
    ("ssl_eo/tensor_files.py", "ctypes.string_at"): "the bytes of a tensor of ours, to be written",
    ("ssl_eo/train/metadata_reader.py", "pickle.UnpicklingError"): "an error",
    ("ssl_eo/train/metadata_reader.py", "torch.load"): "weights_only=True",
    ("ssl_eo/two_ranks.py", "subprocess.Popen"): OUR_COMMAND,
    ("ssl_eo/weights/_downloads.py", "urlopen"): "an address that a user gave, https:// or file://",
    ("ssl_eo/weights/_reading.py", "torch.load"): "weights_only=True",
    ("ssl_eo/weights/base.py", "importlib.import_module"): "names of our own",
}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "()"


def _is_risky(name: str) -> bool:
    if name in BUILTINS or _short(name) in SAFE:
        return name in BUILTINS
    parts = name.split(".")
    for pattern in RISKY:
        wanted = pattern.split(".")
        tail = parts[-len(wanted) :]
        if len(tail) == len(wanted) and all(w in ("*", t) for w, t in zip(wanted, tail, strict=True)):
            return True
    return False


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in _nodes(path):
        if isinstance(node, ast.Call):
            yield _dotted(node.func), node


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def test_nothing_that_could_run_code_is_called_but_what_is_listed() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), _short(name))
        for path in FILES
        for name, _ in _calls(path)
        if _is_risky(name)
    }
    assert found - ALLOWED.keys() == set(), "say in ALLOWED why this is safe, and in SECURITY.md what it reads"
    assert ALLOWED.keys() - found == set(), "these are gone"


def test_no_loader_hides_behind_another_name() -> None:
    """`from pickle import loads` and `import pickle as p` would."""
    modules = {pattern.split(".")[0] for pattern in RISKY} - {"*", "np"}
    fine = {"importlib.import_module", "yaml.YAMLError"}
    for path in FILES:
        for node in _nodes(path):
            if isinstance(node, ast.Import):
                assert all(alias.asname is None or alias.name not in modules for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                risky = {name for name in named if _is_risky(name) and "." in name and not name.startswith("ssl_eo.")}
                assert risky - {"urllib.request.urlopen"} <= fine, f"{path}:{node.lineno}"


def _keyword(call: ast.Call, name: str) -> object:
    found = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return ast.literal_eval(found[0]) if found and isinstance(found[0], (ast.Constant, ast.List)) else found or None


@pytest.mark.parametrize(
    ("call", "keyword", "value"),
    [("torch.load", "weights_only", True), ("np.load", "allow_pickle", False), ("np.save", "allow_pickle", False)],
)
def test_every_call_says_so(call: str, keyword: str, value: bool) -> None:
    calls = [(path, found) for path in FILES for name, found in _calls(path) if _short(name) == call]
    assert calls
    for path, found in calls:
        assert _keyword(found, keyword) is value, f"{path}:{found.lineno}"


def test_images_and_rasters_are_of_formats_that_are_named() -> None:
    for path in FILES:
        for name, call in _calls(path):
            if _short(name) == "Image.open":
                assert _keyword(call, "formats"), f"{path}:{call.lineno}"
            if _short(name) == "rasterio.open" and not any(
                isinstance(a, ast.Constant) and a.value == "w" for a in call.args
            ):
                assert _keyword(call, "driver") == "GTiff", f"{path}:{call.lineno}"


def test_nothing_goes_through_a_shell() -> None:
    for path in FILES:
        assert not any(_keyword(call, "shell") for _, call in _calls(path)), path


def test_the_only_unpickler_knows_its_classes() -> None:
    for path in FILES:
        for node in _nodes(path):
            if isinstance(node, ast.ClassDef) and any("Unpickler" in _dotted(base) for base in node.bases):
                assert {"find_class"} <= {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
                assert path.name == "metadata_reader.py"
