"""What cannot be measured is a record, and everything else goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

__all__ = ["failure", "failures"]

_TELLING = (ValueError, OSError)  # their messages say what to do; of any other error one needs to know where


def failure(logger: logging.Logger, error: Exception, text: str, *args: object) -> dict[str, Any]:
    """Warn of `error` with `text` about what has failed; returns what a record says of it."""
    logger.warning(f"{text}: %s", *args, error, exc_info=None if isinstance(error, _TELLING) else error)
    return {"kind": "error", "error": _text(error)}


def failures(logger: logging.Logger, errors: Mapping[str, Exception], n_all: int, what: str) -> dict[str, str]:
    """Warn, once, of the things named in `errors`, of `n_all`; returns what records say of each.

    Of several the first error is told. One that only says where it was raised is told in full.
    """
    if errors:
        names, first = ", ".join(errors), next(iter(errors.values()))
        untold = next((error for error in errors.values() if not isinstance(error, _TELLING)), None)
        said = f"{len(errors)} of {n_all} {what}: {names}. {'The first: ' if len(errors) > 1 else ''}{first}"
        logger.warning("%s", said, exc_info=untold)
    return {name: _text(error) for name, error in errors.items()}


def _text(error: Exception) -> str:
    """Names of files that are not UTF-8 are written as no file could hold them otherwise."""
    return f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
