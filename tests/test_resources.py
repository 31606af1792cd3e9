"""The shipped YAML files are found in a checkout and in what is installed from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_eo.resources import find_resource

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the package as a wheel holds it."""
    out = tmp_path_factory.mktemp("built")
    build = ("egg_info", "--egg-base", str(out), "build_py", "--build-lib", str(out / "lib"))
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True, capture_output=True)
    return out / "lib"


def _names(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for folder in ("configs", "datasets_meta") for p in (root / folder).rglob("*.*")}


def test_a_wheel_holds_every_module_and_every_yaml_file(built: Path) -> None:
    assert _names(built / "ssl_eo") == _names(ROOT)
    package = ROOT / "ssl_eo"
    shipped = {str(p.relative_to(package)) for p in package.rglob("*") if p.suffix in (".py", ".j2")}
    assert shipped <= {str(p.relative_to(built / "ssl_eo")) for p in (built / "ssl_eo").rglob("*")}


def test_an_installed_package_finds_its_own_files(built: Path, tmp_path: Path) -> None:
    """Also where another package left a folder `configs` in site-packages."""
    (built / "configs").mkdir()
    probe = (
        "import ssl_eo; from ssl_eo.cli import main; from ssl_eo.sensors import load_sensor;"
        "print(ssl_eo.__file__, load_sensor('sentinel2_l2a').name);"
        "raise SystemExit(main(['config', '--config', 'demo']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(built)}
    run = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{built / 'ssl_eo' / '__init__.py'} sentinel2_l2a\n")
    assert "total_steps:" in run.stdout


def test_a_wrong_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"datasets_meta/sensors has no 'sentinel2_l2b'; did you mean 'sentinel2_l2a'"):
        find_resource("datasets_meta/sensors", "sentinel2_l2b")
