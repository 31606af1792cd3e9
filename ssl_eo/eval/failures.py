"""What cannot be measured is a record, and everything else goes on."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["failure"]

_TELLING = (ValueError, OSError)  # their messages say what to do; of any other error one needs to know where


def failure(logger: logging.Logger, error: Exception, text: str, *args: object) -> dict[str, Any]:
    """Warn of `error` with `text` about what has failed; returns what a record says of it."""
    logger.warning(f"{text}: %s", *args, error, exc_info=None if isinstance(error, _TELLING) else error)
    return {"kind": "error", "error": f"{type(error).__name__}: {error}"}
