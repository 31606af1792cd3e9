"""The file name is the registry: `objective.name: mae` is the module `ssl_eo.objectives.mae`, a dotted name is yours.

A pluggable module holds its class and, beside it, a dataclass `Config` with every knob and its default.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

__all__ = [
    "FREE",
    "MissingExtraError",
    "available",
    "check_names",
    "check_patterns",
    "free",
    "import_extra",
    "one_line",
    "resolve",
    "suggest",
    "told_of",
]

T = TypeVar("T")

_FEWEST_LETTERS = 3  # with which the beginning of a name says enough
_MOST_NAMED = 3

FREE = {"free": True}  # metadata of such a field, where it needs more than a default


def free(default: T) -> T:
    """A field of a `Config` that may differ when a run is resumed: it leaves every training bit as it is."""
    declared: T = dataclasses.field(default=default, metadata=FREE)
    return declared


class MissingExtraError(ImportError):
    """A package of an extra is not there, or cannot be imported; the message says what needs it and what helps."""


def available(package: str) -> list[str]:
    """Names of the modules of `package` that define a `Config`, by looking at the file names alone."""
    paths = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(paths) if m.name != "base" and not m.name.startswith("_"))


def check_names(key: str, names: Sequence[str]) -> None:
    """Raise `ValueError` unless `names`, the value of `key` in a config, are one at least and none comes twice."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{key} must name at least one, and each once, got {list(names)}")


def check_patterns(key: str, patterns: Iterable[str]) -> None:
    """Raise `ValueError` unless all `patterns`, of the value of `key` in a config, are regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{key}: {pattern!r} is not a regular expression: {error}") from None


def suggest(word: str, allowed: list[str]) -> str:
    """`"; did you mean 'x'?"` when one of `allowed` is close to `word`, else an empty string.

    Closest is what has other zeros before its numbers, or other capitals (`B2` is `B02`), then what `word` begins, of
    which the shortest are named, then what has most letters in common.
    """
    close = [name for name in allowed if _plain(name) == _plain(word)][:1]
    if not close and len(word) >= _FEWEST_LETTERS:
        close = sorted((name for name in allowed if name.startswith(word)), key=lambda n: (len(n), n))[:_MOST_NAMED]
    close = close or difflib.get_close_matches(word, allowed, n=1)
    *others, last = map(repr, close or [""])
    return f"; did you mean {' or '.join(filter(None, [', '.join(others), last]))}?" if close else ""


def _plain(name: str) -> str:
    """Without what tells no two names apart."""
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", name.lower())


def one_line(error: Exception) -> str:
    """The text of an error, for a message of one line, without the frames of C++ that torch may put behind it."""
    return " ".join(str(error).partition("\nException raised from ")[0].split())


@contextmanager
def told_of(where: str) -> Iterator[None]:
    """A `ValueError` inside begins with `where`: the option, the key or the file that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def import_extra(extra: str, module: str, what: str) -> Any:
    """The optional module `module`, which `what` needs and the extra `extra` installs.

    Raises `MissingExtraError` when its package is absent, or raises whatever it may as it is imported.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise _broken(package, what, error) from error
        raise MissingExtraError(f"{what} needs the package {package}: pip install 'ssl_eo[{extra}]'") from None
    except Exception as error:  # a library that is missing, another version of NumPy, ...
        raise _broken(package, what, error) from error


def _broken(package: str, what: str, error: Exception) -> MissingExtraError:
    said = one_line(error) or type(error).__name__
    return MissingExtraError(
        f"{what} needs the package {package}, which is installed and cannot be imported ({said}): pip install"
        f" --force-reinstall {package}"
    )


def resolve(package: str, name: str) -> ModuleType:
    """Import the component module `name` of `package` (a dotted `name` is imported as it stands).

    Raises `ValueError` when there is no such module, naming what exists; an import error inside the module itself
    is raised unchanged, since hiding it would send the user looking in the wrong place.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is not the name of a module")
    qualified = name if "." in name else f"{package}.{name}"
    try:
        module = importlib.import_module(qualified)
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
    if not dataclasses.is_dataclass(getattr(module, "Config", None)):
        raise ValueError(f"{qualified} has no dataclass Config: it is no component")
    return module
