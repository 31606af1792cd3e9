"""Pages of HTML that need nothing beside themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["check_written", "render"]

_MEASURED = ("results.jsonl", "eval.jsonl", "metrics.jsonl", "study.jsonl")


def check_written(paths: Sequence[Path]) -> None:
    """Make the folders of a page and of what is written beside it; the page comes first.

    Raises `ValueError` where the first is no page, two are one file, or one holds what was measured.
    """
    if paths[0].suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out: {paths[0]} is to be a page, so its name ends in .html")
    for path in paths:
        if path.name in _MEASURED:
            raise ValueError(f"{path} holds what was measured, and is not replaced; give another name")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"{', '.join(map(str, paths))}: each is to be a file of its own; give other names")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)


def render(template: str, **values: Any) -> str:
    """The page of a template beside this module; a value that it asks for and is not given is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(values)
