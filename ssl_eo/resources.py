"""Where the shipped YAML files are: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

__all__ = ["find_resource", "resource_dir"]

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """The folder `name` (`"configs"` or `"datasets_meta"`) of this installation."""
    # Inside first: what stands beside an installed package belongs to anyone, and `configs` is a common name.
    for parent in (_PACKAGE, _PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(f"the folder {name!r} is neither beside nor inside {_PACKAGE}: the installation is broken")


def find_resource(folder: str, name: str) -> Path:
    """The YAML file for `name`: a path ending in `.yaml` as given, else `<folder>/<name>.yaml` of this installation.

    Raises `ValueError` that lists the known names when there is none.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"no such file: {name}")
        return path
    root = resource_dir(folder.split("/")[0]) / Path(*folder.split("/")[1:])
    path = root / f"{name}.yaml"
    if not path.is_file():
        from ssl_eo.components import suggest

        known = sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))
        raise ValueError(
            f"{folder} has no {name!r}{suggest(name, known)}"
            f" (known: {', '.join(known)}; or give the path of a .yaml file)"
        )
    return path
