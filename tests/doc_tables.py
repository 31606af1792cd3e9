"""The generated tables of the docs; `python tests/doc_tables.py` writes them anew from the code and the sensor files.

A table stands between `<!-- <what> -->` and `<!-- end -->`, where <what> is one of

- `keys of <section>`: a section of the config (`train`, `model`, ...), with the sections inside it
- `keys of <section>.<key>`: an entry of a list (`data.sources`, `eval.tasks`) or of a mapping
- `keys of objective <name>`, `keys of source <name>`, `keys of decoder <name>`, likewise with `.<key>`
- `keys of study`, likewise
- `keys that may change`: those that do not bind a run
- `sensors`: the shipped sensors
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import tokenize
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ssl_eo.adapt.study import StudyConfig
from ssl_eo.components import available, resolve
from ssl_eo.config import Config
from ssl_eo.resources import resource_dir
from ssl_eo.sensors import load_sensor

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

_COMPONENTS = {
    "objective": ("ssl_eo.objectives", "objective"),
    "source": ("ssl_eo.data.sources", "data.sources[]"),
    "decoder": ("ssl_eo.eval.decoders", "decoders.*"),
}
# Keys that stand in another table, or that a page describes in words.
_ELSEWHERE = (
    *("eval.tasks.val", "study.tasks", "study.tasks.val"),
    *("objective dinov2.ibot_head", "objective dofa.teacher"),
)
_TABLE = re.compile(r"(<!-- ((?:keys|sensors)[^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config: full name, default as in YAML, allowed values, what the source says about it."""

    name: str
    default: str
    values: str
    meaning: str


def write_tables(text: str) -> str:
    """`text` of a page with every table as it should be."""
    return _TABLE.sub(lambda m: f"{m[1]}{make_table(m[2])}\n{m[3]}", text)


def make_table(what: str) -> str:
    """The Markdown of the table `what`."""
    if what == "sensors":
        return _sensors()
    if what == "keys that may change":
        return "\n".join(f"- `{name}`" for name in free_keys())
    rows = [
        f"| `{key.name}` | {f'`{key.default}`' if key.default else 'required'} | {key.values} | {key.meaning} |"
        for key in keys_of(what.removeprefix("keys of "))
    ]
    return "\n".join(["| key | default | values | meaning |", "|---|---|---|---|", *rows])


def keys_of(section: str) -> list[Key]:
    """The keys of a section of the config (`train`, `eval.tasks`), of `objective mae` or of `source geotiff.tiles`."""
    return list(_keys(*_config_of(section)))


def sections() -> list[str]:
    """What the docs must have a table of: `keys_of` knows it."""
    found = [f.name for f in dataclasses.fields(Config) if f.name != "objective"]
    found += [f"{kind} {name}" for kind, (package, _) in _COMPONENTS.items() for name in available(package)]
    found += ["study"]
    for section in found:  # which grows: entries of lists and mappings have tables of their own
        hints = typing.get_type_hints(_config_of(section)[0])
        found += [f"{section}.{field}" for field, hint in hints.items() if _entry(hint) is not None]
    return [section for section in found if section not in _ELSEWHERE]


def _config_of(section: str) -> tuple[type, str]:
    """The config class of a section, and what its keys begin with."""
    kind, _, path = section.rpartition(" ")
    name, *inner = path.split(".")
    if kind:
        package, prefix = _COMPONENTS[kind]
        cls = resolve(package, name).Config
    elif name == "study":
        cls, prefix = StudyConfig, ""
    else:
        cls, prefix = typing.get_type_hints(Config)[name], name
        if (entry := _entry(cls)) is not None:
            cls, prefix = entry, f"{name}[]"
    for field in inner:
        hint = typing.get_type_hints(cls)[field]
        inside = {list: "[]", dict: ".*"}.get(typing.get_origin(hint), "")
        cls, prefix = _entry(hint), f"{prefix}.{field}{inside}".lstrip(".")
    return cls, prefix


def _entry(hint: Any) -> type | None:
    """The config class of the entries of a list or of a mapping, or of what may be absent; None for other types."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        found = [cls for cls in typing.get_args(hint) if dataclasses.is_dataclass(cls)]
    else:
        found = [cls for cls in typing.get_args(hint)[-1:] if typing.get_origin(hint) in (list, dict)]
    return found[0] if found and dataclasses.is_dataclass(found[0]) else None


def free_keys() -> list[str]:
    """The keys by which a resumed run may differ from its beginning; `section.*` where these are all of a section."""
    sources = [resolve("ssl_eo.data.sources", name).Config for name in available("ssl_eo.data.sources")]
    return list(dict.fromkeys([*_free(Config), *(key for cls in sources for key in _free(cls, "data.sources[]."))]))


def _free(cls: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint, name = hints[f.name], prefix + f.name
        is_section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        if f.metadata.get("free"):
            yield f"{name}.*" if is_section else name
        elif is_section:
            yield from _free(hint, f"{name}.")


def _keys(cls: type, prefix: str, defaults: Any = None) -> Iterator[Key]:
    """The keys of a config class. `defaults` is an instance whose values are the defaults, if not the class's own."""
    hints, comments = typing.get_type_hints(cls), {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        comments |= _comments(base)
    for f in dataclasses.fields(cls):
        if "package" in f.metadata:
            continue  # the options of a component have a table of their own
        hint, name = hints[f.name], f"{prefix}.{f.name}".lstrip(".")
        default = getattr(defaults, f.name) if defaults is not None else _default(f)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and default is not dataclasses.MISSING:
            yield from _keys(hint, name, default)
        else:
            shown = "" if default is dataclasses.MISSING else _yaml(default)
            yield Key(name, shown, _values(hint), re.sub(r"([|<])", r"\\\1", comments.get(f.name, "")))


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    if dataclasses.is_dataclass(value):
        return "{}"  # its own defaults
    if isinstance(value, dict) and value:
        return f"{{{', '.join(f'{key}: {_yaml(inner)}' for key, inner in value.items())}}}"
    items = [_yaml(v) for v in value] if isinstance(value, (list, tuple)) else None
    return json.dumps(value) if items is None else f"[{', '.join(items)}]"


def _values(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _values(a) for a in arguments)
    if origin is list:
        return f"list of {_values(arguments[0])}"
    if origin is dict:
        return f"dict of {_values(arguments[1])}"
    if origin is tuple:
        return f"{len(arguments)} x {_values(arguments[0])}"
    return str(hint.__name__)


def _comments(cls: type) -> dict[str, str]:
    """By field: the comment on its lines, or the block of comment right above it."""
    source = inspect.getsource(cls)
    found: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# ")
    lines = source.splitlines()
    comments = {}
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own = [found[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in found]
            n = node.lineno - 1
            while not own and lines[n - 1].lstrip().startswith("#"):
                n -= 1
            comments[node.target.id] = " ".join(own or [found[i] for i in range(n + 1, node.lineno)])
    return comments


def _sensors() -> str:
    rows = ["| name | what | bands | kind | ground sampling | stored as | subsets |", "|---|---|---|---|---|---|---|"]
    for path in sorted((resource_dir("datasets_meta") / "sensors").glob("*.yaml")):
        sensor = load_sensor(path.stem)
        kinds = ", ".join(dict.fromkeys(band.kind for band in sensor.bands))
        gsd_m = sorted({band.gsd_m for band in sensor.bands})
        sampling = ", ".join(f"{g:g}" for g in gsd_m) + " m"
        subsets = ", ".join(f"`{name}`" for name in sensor.subsets)
        stored = f"{sensor.dtype}, {sensor.unit}"
        rows.append(
            f"| `{sensor.name}` | {sensor.title} | {len(sensor.bands)} | {kinds} | {sampling} | {stored} | {subsets} |"
        )
    return "\n".join(rows)


def _rewrite(page: Path, change: Callable[[str], str]) -> None:
    text = page.read_text(encoding="utf-8")
    page.write_text(change(text), encoding="utf-8")


if __name__ == "__main__":
    for page in PAGES:
        _rewrite(page, write_tables)
