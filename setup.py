"""What `pyproject.toml` cannot say: a wheel holds the YAML files that stand beside the package in a checkout."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "datasets_meta")
if missing := [folder for folder in FOLDERS if not Path(folder).is_dir()]:
    raise SystemExit(f"setup.py: there is no {' and no '.join(missing)} beside it, which the package needs")
RESOURCES = [str(path) for folder in FOLDERS for path in sorted(Path(folder).rglob("*.yaml"))]


class BuildWithResources(build_py):
    """Copies the YAML files into the package that is built; an editable install finds them where they are."""

    def run(self) -> None:
        super().run()
        for path in () if self.editable_mode else RESOURCES:
            target = Path(self.build_lib, "ssl_eo", path)
            self.mkpath(str(target.parent))
            self.copy_file(path, str(target))

    def get_source_files(self) -> list[str]:
        """With the YAML files, so that a source distribution holds them too."""
        return [*super().get_source_files(), *RESOURCES]


setup(cmdclass={"build_py": BuildWithResources})
