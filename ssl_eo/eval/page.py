"""Pages of HTML that need nothing beside themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["render"]


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
