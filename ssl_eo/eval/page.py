"""Pages of HTML that need nothing beside themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_eo.eval.records import PLAN, RESULTS, TABLE

__all__ = ["check_written", "render"]

_PAGES = (".html", ".htm")
_MEASURED = (RESULTS, PLAN, "eval.jsonl", "metrics.jsonl", "study.jsonl")  # runs, evaluations, studies go on from it


def check_written(paths: Sequence[Path], inputs: Sequence[Path] = ()) -> None:
    """Raise `ValueError` where files that are to be written would spoil what is there; the page comes first.

    The first must be a page, no two may be one file, none may hold what was measured, nor be the table that an
    evaluation keeps in one of the folders `inputs`.
    """
    if paths[0].suffix.lower() not in _PAGES:
        raise ValueError(f"{paths[0]} is to be a page, so its name ends in {' or '.join(_PAGES)}")
    for path in paths:
        if path.name in _MEASURED:
            raise ValueError(f"{path} holds what was measured, and is not replaced; give another name")
        if path.resolve() in [(folder / TABLE).resolve() for folder in inputs]:
            raise ValueError(f"{path} is the table of ssl-eo eval in its folder, and is not replaced; name another")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"{', '.join(map(str, paths))}: each is to be a file of its own; give other names")


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
