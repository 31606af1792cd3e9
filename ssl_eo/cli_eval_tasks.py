"""What `--tasks` of `ssl-eo eval` names, and `--list-tasks`. Everything heavy is imported inside."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ssl_eo.components import MissingExtraError, one_line, told_of

if TYPE_CHECKING:
    from ssl_eo.eval.tasks import TaskConfig

__all__ = ["known_tasks", "print_tasks", "read_task"]

_VARIABLE = re.compile(r"\$\{oc\.env:(\w+)\}")
_SUFFIXES = (".yaml", ".yml")


def known_tasks(names: Sequence[str]) -> list[str]:
    """`names` with patterns replaced by the shipped tasks that they match, each once."""
    known = _shipped()
    found: list[str] = []
    for name in names:
        if name.endswith(_SUFFIXES) or not set(name) & set("*?["):
            found.append(name)
            continue
        matched = [task for task in known if fnmatchcase(task, name)]
        if not matched:
            raise ValueError(f"--tasks: {name!r} matches none of {', '.join(known)}")
        found += matched
    return list(dict.fromkeys(found))


def read_task(name: str) -> TaskConfig:
    """The shipped task `name`, or that of a YAML file. Raises `ValueError` that begins with `--tasks`."""
    from ssl_eo.config import build
    from ssl_eo.eval.tasks import TaskConfig

    files = [f"{name}{suffix}" for suffix in _SUFFIXES if Path(f"{name}{suffix}").is_file()]
    if files and name not in _shipped():
        path = files[0] if Path(files[0]).is_absolute() else f"./{files[0]}"
        raise ValueError(f"--tasks {name}: no shipped task; did you mean {path}?")
    with told_of(f"--tasks {name}"):
        return build(TaskConfig, name, "")


def print_tasks(stream: TextIO) -> None:
    """Print the shipped tasks: kind, classes, metric, where their data are looked for, and whether all are found."""
    rows = [("task", "kind", "classes", "metric", "data"), *((name, *_facts(name)) for name in _shipped())]
    *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for *cells, last in rows:
        print(*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), last, sep="  ", file=stream)


def _shipped() -> list[str]:
    from ssl_eo.resources import resource_dir

    root = resource_dir("datasets_meta") / "benchmarks"
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def _facts(name: str) -> tuple[str, str, str, str]:
    """Kind, number of classes (? where only the data say), metric, and data."""
    import yaml

    from ssl_eo.eval.metrics import HEADLINE
    from ssl_eo.eval.tasks import TaskConfig
    from ssl_eo.resources import find_resource

    page: dict[str, Any] = yaml.safe_load(find_resource("datasets_meta/benchmarks", name).read_text(encoding="utf-8"))
    kind = page.get("kind", TaskConfig.kind)
    train = page["train"]
    root = train.get("root")
    where = "needs no file" if root is None else _VARIABLE.sub(r"$\1", root)
    unset = [variable for variable in _VARIABLE.findall(root or "") if variable not in os.environ]
    classes = train.get("label_names") or train.get("classes") or ()
    if unset:
        where = f"{where} ({unset[0]} is not set)"
    else:
        classes, state = _opened(name)
        where += "" if root is None else f" ({state})"
    return kind, str(len(classes) or "?"), page.get("metric") or HEADLINE[kind], where


def _opened(name: str) -> tuple[Sequence[str], str]:
    """The classes of a task as far as its data tell them, and whether all of its splits are found, or what is wrong."""
    from ssl_eo.data.opening import open_source

    cfg = read_task(name)
    classes: Sequence[str] = ()
    for split in ("train", "val", "test"):
        if getattr(cfg, split) is None:
            continue
        try:
            classes = open_source(getattr(cfg, split)).label_names
        except (ValueError, OSError, MissingExtraError) as error:
            return classes, f"{split} cannot be read: {one_line(error)}"
    return classes, "found"
