"""What is built and installed: a source distribution, the wheel of it, a bare environment that runs the demo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

import pytest

import ssl_eo

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("ssl_eo", "configs", "datasets_meta", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SHORT = ("train.total_steps=2", "optim.warmup_steps=1", "train.global_batch_size=8", "data.n_workers=0")
QUICK = ("eval.every_n_steps=0", "log.every_n_steps=1", "log.pictures_every_n_steps=0")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(command: Sequence[str], folder: Path, **variables: str) -> str:
    """What a command prints, away from this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Deprecat" not in done.stderr, done.stderr
    return done.stdout


def build(what: str, source: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    return out / run([sys.executable, "-c", BUILD, what, str(out)], source).splitlines()[-1]


def copy_checkout(copy: Path) -> Path:
    """What is built from: building leaves things in the folder."""
    unwanted = shutil.ignore_patterns("__pycache__", ".*")
    copy.mkdir()
    for name in BUILT_FROM:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=unwanted)
        else:
            shutil.copy(path, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copy_checkout(tmp_path_factory.mktemp("checkout") / "copy")
    return build("build_sdist", copy, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Of the source distribution, and of nothing else."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return build("build_wheel", sdist.parent / sdist.name.removesuffix(".tar.gz"), sdist.parent)


def shipped() -> dict[str, bytes]:
    """The content of each file of the package, by where it is to be."""
    found = [path for path in (ROOT / "ssl_eo").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in found}
    for folder in ("configs", "datasets_meta"):
        for path in (ROOT / folder).rglob("*.*"):
            files[f"ssl_eo/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    return files


def test_the_wheel_holds_the_package_and_its_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        found = {name: archive.read(name) for name in names}
        about = Parser().parsestr(archive.read(f"ssl_eo-{ssl_eo.__version__}.dist-info/METADATA").decode())
        assert f"ssl_eo-{ssl_eo.__version__}.dist-info/licenses/LICENSE" in archive.namelist()
    assert found == shipped()
    kinds = ("ssl_eo/py.typed", "ssl_eo/sensor_tables.json", "ssl_eo/configs/demo.yaml", "ssl_eo/hub.py")
    assert set(kinds) <= found.keys()
    assert any(name.endswith(".j2") for name in found)
    assert any(name.startswith("ssl_eo/datasets_meta/sensors/") for name in found)
    assert (about["Name"], about["Version"]) == ("ssl_eo", ssl_eo.__version__)
    assert about["License-Expression"] == "Apache-2.0"


def test_the_source_holds_what_the_wheel_is_built_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in BUILT_FROM if (ROOT / name).is_file()} <= names
    moved = ("ssl_eo/configs/", "ssl_eo/datasets_meta/")
    assert {name.removeprefix("ssl_eo/") if name.startswith(moved) else name for name in shipped()} <= names


def test_an_editable_install_is_found_from_the_folder_around_the_checkout(tmp_path: Path) -> None:
    """As `git clone` calls it, the checkout has the name of the package, and looks like one without content."""
    checkout = copy_checkout(tmp_path / "ssl_eo")
    site = tmp_path / "site"
    with zipfile.ZipFile(build("build_editable", checkout, tmp_path / "dist")) as wheel:
        wheel.extractall(site)
    assert not list(site.glob("*.py"))
    script = (
        f"import site; site.addsitedir({str(site)!r}); import ssl_eo; from ssl_eo.resources import resource_dir;"
        "print(ssl_eo.__file__, resource_dir('configs'), resource_dir('datasets_meta'))"
    )
    inside = [checkout / "ssl_eo" / "__init__.py", checkout / "configs", checkout / "datasets_meta"]
    for folder in (tmp_path, site, checkout):
        found = run([sys.executable, "-S", "-c", script], folder).split()  # without what else is installed
        assert [(folder / path).resolve() for path in found] == inside


def test_a_package_without_its_configs_is_not_built(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "configs").mkdir()
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "setup.py: there is no datasets_meta beside it, which the package needs\n"


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment that has the wheel, and finds what it needs where these tests do."""
    folder = tmp_path_factory.mktemp("bare")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", "--quiet"]
    run([*pip, "--disable-pip-version-check", str(wheel)], folder)
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # .pth files in there are not read
    return folder / "bin"


def test_an_installed_package_runs_the_demo_elsewhere(bare: Path, tmp_path: Path) -> None:
    """Also where another package left a folder `configs` in site-packages."""
    (next(bare.parent.glob("lib/python*/site-packages")) / "configs").mkdir()
    python = str(bare / "python")
    assert run([str(bare / "ssl-eo"), "--version"], tmp_path) == f"ssl_eo {ssl_eo.__version__}\n"
    script = (
        "import ssl_eo, sys; assert sys.prefix in ssl_eo.__file__, ssl_eo.__file__;"
        f"trained = ssl_eo.train('demo', *{[*SHORT, *QUICK]!r});"
        "encoder = ssl_eo.load(trained.folder); print(trained.step, *encoder.inputs)"
    )
    assert run([python, "-c", script], tmp_path, OMP_NUM_THREADS="1").splitlines()[-1] == "2 sentinel2_l2a"
    for name in ("report.html", "checkpoints/step_00000002/complete.json", "config.yaml"):
        assert (tmp_path / "runs" / "demo" / name).is_file()
