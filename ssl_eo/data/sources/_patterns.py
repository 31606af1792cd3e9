"""Which files of a folder belong together: patterns such as `**/{key}_{date}_S2.tif`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

from ssl_eo.components import suggest
from ssl_eo.data.sources._side_files import name_inside, printable, read_lines

__all__ = ["FileMatch", "list_files", "match_files", "parse_date"]

_TOKEN = re.compile(r"(\*\*/|\*|\?|\{[^{}]*\})")
_WILDCARDS = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
_MAX_LIST_BYTES = 256 << 20
_GROUPS = {
    "key": "[^/]+",
    "date": r"\d{4}-?\d\d-?\d\d(?:T\d\d:?\d\d:?\d\d)?Z?",
    "label": "[^/]+",
}


@dataclass(frozen=True)
class FileMatch:
    """A file that fits a pattern, and what the pattern's groups say about it ("" where it has no such group)."""

    name: str  # relative to the root, with slashes
    key: str
    date: str
    label: str


def list_files(root: Path) -> list[str]:
    """Names of all files below a folder, or in a text file with one name a line, relative to that; sorted.

    A name that is not UTF-8 holds surrogates, as everywhere in Python. Raises `ValueError` for a root that is neither,
    and for names in a list that lead out of its folder.
    """
    if root.is_dir():
        names = []
        for folder, folders, files in os.walk(root):
            folders.sort()
            inner = PurePosixPath(os.path.relpath(folder, root))
            names += [str(inner / name) for name in files]
        return sorted(names)
    if root.suffix != ".txt" or not root.is_file():
        raise ValueError(f"root: {root} is neither a folder nor a .txt file with a list of files")
    try:
        lines = read_lines(root, _MAX_LIST_BYTES, "one path a line")
        return sorted({name_inside(root.parent, line.encode()) for line in lines})
    except ValueError as error:
        raise ValueError(f"root: {error}") from None


def match_files(key: str, pattern: str, names: Iterable[str]) -> dict[str, FileMatch]:
    """The files of `names` that fit `pattern`, by key.

    `*` and `?` match within a part of a path, `**/` any folders; `{key}`, `{date}` and `{label}` match within a part
    and say what it means. Raises `ValueError`, which begins with the config's `key`, for a pattern that means
    nothing, and for two files of one key.
    """
    expression = _compiled(key, pattern)
    found: dict[str, FileMatch] = {}
    for name in names:
        if (match := expression.fullmatch(name)) is None:
            continue
        groups = match.groupdict()
        file = FileMatch(name, groups["key"], groups.get("date", ""), groups.get("label", ""))
        if (other := found.setdefault(file.key, file)) is not file:
            raise ValueError(
                f"{key}: {pattern!r} gives {_shown(other.name)} and {_shown(name)} the same key {_shown(file.key)};"
                " put {key} where their paths differ"
            )
    return found


def parse_date(text: str) -> str:
    """ISO 8601 of a date such as 20200604, 2020-06-04T05:46:39 or (as in TIFF tags) 2020:06:04 05:46:39."""
    iso = re.sub(r"^(\d{4}):(\d\d):(\d\d)\b", r"\1-\2-\3", text.strip())
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        raise ValueError(f"{text!r} is no date (expected one such as 2020-06-04 or 20200604T054639)") from None
    return when.isoformat() if re.search(r"\d[T ]\d", iso) else when.date().isoformat()


def _shown(name: str) -> str:
    return repr(printable(os.fsencode(name)))


def _compiled(key: str, pattern: str) -> re.Pattern[str]:
    if pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
        raise ValueError(f"{key}: {pattern!r} leads out of root: patterns are relative to it")
    parts, seen = [], set()
    for token in _TOKEN.split(pattern):
        if token.startswith("{"):
            group = token[1:-1]
            if group not in _GROUPS:
                known = ", ".join(f"{{{g}}}" for g in _GROUPS)
                raise ValueError(f"{key}: {pattern!r} holds {token}{suggest(group, list(_GROUPS))} (known: {known})")
            parts.append(f"(?P={group})" if group in seen else f"(?P<{group}>{_GROUPS[group]})")
            seen.add(group)
        else:
            parts.append(_WILDCARDS.get(token) or re.escape(token))
    if "key" not in seen:
        raise ValueError(f"{key}: {pattern!r} has no {{key}}, the part of a path that names the place")
    return re.compile("".join(parts), re.DOTALL)
