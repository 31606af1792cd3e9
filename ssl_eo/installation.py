"""What is installed: the commit of this package, and the packages that it needs, by extra."""

from __future__ import annotations

import json
import operator
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["ALWAYS", "Requirement", "commit", "import_faults", "requirements"]

ALWAYS = ""  # the extra of what is needed in any case

_OURS = "ssl_eo"
_WANTED = re.compile(r"(?P<name>[\w.-]+)\s*(?:\[(?P<extras>[^\]]*)\])?\s*(?P<bounds>[^;]*)(?:;(?P<marker>.*))?")
_BOUND = re.compile(r"(>=|<=|==|!=|<|>)\s*(\d+(?:\.\d+)*)")
_MODULES = {"pyyaml": "yaml", "pillow": "PIL"}  # of packages that are imported by another name
# Imports what it is given, and says on its own line of each what went wrong; what packages print goes elsewhere.
_TRY = """
import importlib, json, os, sys
out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
sys.path, names = json.loads(sys.argv[1])
for name in names:
    fault = None
    try:
        importlib.import_module(name)
    except Exception as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())
    print(json.dumps(fault), file=out)
"""
_HOLDS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Requirement:
    """A package, and which releases of it will do."""

    name: str
    bounds: str  # as pip writes them: >=2.10,<2.14

    def installed(self) -> str | None:
        """The version that is there; None without one."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None

    def allows(self, version: str) -> bool:
        """Whether the release `version` will do; what follows its numbers (rc1, +cpu) is not looked at."""
        found = re.match(r"\d+(?:\.\d+)*", version)
        bounds = _BOUND.findall(self.bounds)
        assert len(bounds) == len([bound for bound in self.bounds.split(",") if bound.strip()]), self.bounds
        return found is not None and all(_holds(found[0], sign, bound) for sign, bound in bounds)

    @property
    def module(self) -> str:
        """What is imported of it."""
        return _MODULES.get(self.name.lower(), self.name.replace("-", "_"))

    def __str__(self) -> str:
        return f"{self.name}{self.bounds}"


def import_faults(modules: Sequence[str], limit_s: float) -> dict[str, str]:
    """What goes wrong where `modules` are imported, one after the other, in a process of their own; {} if nothing.

    One that ends this process, or takes until `limit_s` is over, is the last to be looked at.
    """
    command = [sys.executable, "-c", _TRY, json.dumps([sys.path, list(modules)])]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s)
        said, end = done.stdout, f"it ends the process that imports it, with status {done.returncode}"
    except subprocess.TimeoutExpired as late:
        said, end = late.stdout or b"", f"it takes longer than {limit_s:g} s"
    faults = [json.loads(line) for line in said.splitlines()]
    found = dict(zip(modules, [*faults, end], strict=False))
    return {module: fault for module, fault in found.items() if fault is not None}


def commit() -> str | None:
    """The commit of the checkout this package runs from, with `+` when files differ from it; None outside one.

    What is installed inside the checkout of something else is outside: that commit is not ours.
    """
    package = Path(__file__).resolve().parent
    try:
        top, head = _git(package, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != package.parent:
            return None
        return head + ("+" if _git(package, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def requirements() -> dict[str, list[Requirement]]:
    """By extra, with those of the extras that it is made of: of the checkout, else of the installed package.

    Raises `ValueError` where neither says it.
    """
    declared = _of_checkout(Path(__file__).parent.parent / "pyproject.toml") or _of_installation()
    return {extra: list(_expand(extra, declared)) for extra in declared}


def _of_checkout(path: Path) -> dict[str, list[str]] | None:
    """None for what is no checkout: anything may stand beside an installed package."""
    if not path.is_file():
        return None
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != _OURS:
        return None
    return {ALWAYS: project["dependencies"], **project["optional-dependencies"]}


def _of_installation() -> dict[str, list[str]]:
    try:
        about = metadata.metadata(_OURS)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"{_OURS} is not installed as a package: pip install it, so that pip knows its needs"
        ) from None
    declared: dict[str, list[str]] = {ALWAYS: [], **{extra: [] for extra in about.get_all("Provides-Extra") or ()}}
    for text in about.get_all("Requires-Dist") or ():
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", text)
        declared[extra[1] if extra else ALWAYS].append(text)
    return declared


def _expand(extra: str, declared: Mapping[str, Sequence[str]]) -> Iterator[Requirement]:
    for text in declared[extra]:
        wanted = _WANTED.match(text)
        assert wanted is not None, text
        if wanted["name"].replace("-", "_") == _OURS:
            for inner in wanted["extras"].split(","):
                yield from _expand(inner.strip(), declared)
        else:
            yield Requirement(wanted["name"], wanted["bounds"].strip().strip("()"))


def _holds(version: str, sign: str, bound: str) -> bool:
    numbers = [[int(number) for number in text.split(".")] for text in (version, bound)]
    longest = max(map(len, numbers))
    have, want = ([*parts, *[0] * (longest - len(parts))] for parts in numbers)
    return bool(_HOLDS[sign](have, want))
