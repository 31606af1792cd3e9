"""The page of a saved model, `task.json`: what it says, and what to give instead of a folder without one.

It may be of somebody else, so each value is checked before anything is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.value_checks import Check, is_count, is_number, is_text, list_of, or_none
from ssl_eo.json_page import read_page

__all__ = ["DECODER", "ENCODER", "FORMAT", "PAGE", "read_facts"]

FORMAT = 2
PAGE, ENCODER, DECODER = "task.json", "encoder.json", "decoder.safetensors"

_MAX_SHOWN = 20  # folders in a message
_MAX_TAPS = 100
_SHA256 = re.compile("[0-9a-f]{64}")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_size(value: Any) -> bool:
    return is_count(value) and value > 0


def _are_digests(value: Any) -> bool:
    return (
        _is_object(value)
        and value.keys() == {ENCODER, DECODER}
        and all(isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in value.values())
    )


_KEYS: Mapping[str, tuple[Check, str]] = {
    "task": (is_text, "a name"),
    "kind": (lambda value: value in get_args(Kind), f"one of {', '.join(get_args(Kind))}"),
    "classes": (list_of(is_text), "a list of names"),
    "bands": (list_of(is_text), "a list of names"),
    "size_px": (_is_size, "a whole number and at least 1"),
    "n_outputs": (_is_size, "a whole number and at least 1"),
    "decoder": (is_text, "a name"),
    "options": (_is_object, "an object"),
    "taps": (lambda value: list_of(is_number)(value) and len(value) <= _MAX_TAPS, f"at most {_MAX_TAPS} numbers"),
    "fixed_bands": (or_none(_is_object), "an object or null"),
    "clip_std": (or_none(is_number), "a number or null"),
    "sha256": (_are_digests, f"an object with those of {ENCODER} and {DECODER}"),
}


def read_facts(folder: Path) -> dict[str, Any]:
    """What `task.json` of a saved model says. Raises `ValueError` for a folder that is none."""
    path = folder / PAGE
    try:
        page = read_page(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: not a trained model: {_what_is_there(folder)}") from None
    except ValueError as error:
        raise ValueError(f"{folder}: not a trained model ({PAGE}: {error})") from None
    if page.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {page.get('format', 'none')!r:.40}, this version reads {FORMAT}: train it again (ssl-eo"
            " study), or take the version of ssl_eo that wrote it"
        )
    for key, (check, expected) in _KEYS.items():
        if key not in page:
            raise ValueError(f"{path}: key {key!r} is missing")
        if not check(page[key]):
            raise ValueError(f"{path}: {key} must be {expected}, got {page[key]!r:.80}")
    n_outputs = 1 if page["kind"] == "regression" else len(page["classes"])
    if page["n_outputs"] != n_outputs:
        raise ValueError(
            f"{path}: n_outputs must be {n_outputs} for its kind and classes, got {page['n_outputs']!r:.40}"
        )
    return page


def _what_is_there(folder: Path) -> str:
    """What to give instead of a folder without `task.json`."""
    how = "one is what ssl-eo study leaves with save_models=true, in STUDY/models"
    inside = sorted(path.parent for at in ("", "models") for path in (folder / at).glob(f"*/{PAGE}"))
    if inside:
        more = f" and {len(inside) - _MAX_SHOWN} more" if len(inside) > _MAX_SHOWN else ""
        return f"in it are {', '.join(map(str, inside[:_MAX_SHOWN]))}{more}; give one of them"
    if not folder.exists():
        return f"there is no such folder; {how}"
    if (folder / "config.yaml").exists() or (folder / ENCODER).exists():
        return f"it is an encoder alone, with no decoder that was trained on labels; {how}"
    return f"it holds no {PAGE}; {how}"
