"""The file name is the registry: `objective.name: mae` is the module `ssl_eo.objectives.mae`, a dotted name is yours.

A pluggable module holds its class and, beside it, a dataclass `Config` with every knob and its default.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["Component", "available", "resolve", "suggest"]


@dataclass
class Component:
    """A choice made by name in a config: the module's name, and its `Config` with the values of this run."""

    name: str
    options: Any


def available(package: str) -> list[str]:
    """Names of the modules of `package` that define a `Config`, by looking at the file names alone."""
    paths = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(paths) if m.name != "base" and not m.name.startswith("_"))


def suggest(word: str, allowed: list[str]) -> str:
    """`"; did you mean 'x'?"` when one of `allowed` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def resolve(package: str, name: str) -> ModuleType:
    """Import the component module `name` of `package` (a dotted `name` is imported as it stands).

    Raises `ValueError` when there is no such module, naming what exists; an import error inside the module itself
    is raised unchanged, since hiding it would send the user looking in the wrong place.
    """
    qualified = name if "." in name else f"{package}.{name}"
    try:
        return importlib.import_module(qualified)
    except ModuleNotFoundError as error:
        if error.name is None or not (qualified + ".").startswith(error.name + "."):
            raise
        if "." in name:
            raise ValueError(
                f"there is no module {name!r}: install it, or put its folder on PYTHONPATH"
                " ('python -m ssl_eo' looks in the current folder too)"
            ) from None
        allowed = available(package)
        raise ValueError(
            f"there is no component {name!r}: {package} has {', '.join(allowed)}{suggest(name, allowed)}"
            " (a dotted name such as 'my_package.my_module' is imported as it stands)"
        ) from None
