"""Training. Called, this package is `ssl_eo.api.train`: `ssl_eo.train(config)` and `ssl_eo.train.trainer` are one name.

Python sets the attribute `train` of `ssl_eo` to this package whenever a part of it is imported, so a function of that
name would be there at one time and not at another.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ssl_eo.api import TrainedRun


class _Callable(ModuleType):
    def __call__(self, config: str | Path | Mapping[str, Any], *overrides: str) -> TrainedRun:
        """`ssl_eo.api.train`, which says what it takes."""
        from ssl_eo.api import train

        return train(config, *overrides)


sys.modules[__name__].__class__ = _Callable
