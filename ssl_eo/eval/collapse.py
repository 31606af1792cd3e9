"""When the health of an encoder means that it has collapsed: said once, until it recovers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

__all__ = ["CollapseWatch"]

logger = logging.getLogger(__name__)

# Both have to hold: before training features of some sensors and encoders hardly differ either. Once they train, the
# debug runs of all objectives keep spread_ratio above 0.16 and about half of its best, and first_ratio below 0.92
# (before, 0.05 and 0.96). BYOL with nothing that keeps it from collapse falls to 0.03, a twelfth of its best.
_LEAST_SPREAD, _MOST_ALONG_ONE = 0.1, 0.99
_LEAST_OF_BEST = 0.2
_LEAST_RMS, _MOST_RMS = 1e-3, 1e3  # of one value; in the same runs from 0.6 to 1.1


class _Best(NamedTuple):
    """The largest spread_ratio so far, and the largest share of the variance that is not along one direction."""

    spread: float = 0.0
    off_line: float = 0.0


class CollapseWatch:
    """Looks at one record of health after the other and warns of what is new.

    `known` are records of the run so far: a run that goes on neither repeats what was said nor forgets how features
    were at their best.
    """

    def __init__(self, known: Iterable[Mapping[str, Any]]) -> None:
        self._best: dict[tuple[str, str], _Best] = {}
        self._said: dict[tuple[str, str], list[str]] = {}
        for record in known:
            if "collapsed" in record:
                self._remember(record, record["collapsed"])

    def look(self, record: Mapping[str, Any]) -> list[str]:
        """What has collapsed, in words; logged is what was not so when this source and tap were last looked at."""
        place = _place(record)
        causes = _causes(record, self._best.get(place, _Best()))
        for cause, detail in causes.items():
            if cause not in self._said.get(place, []):
                logger.warning("step %d: features of %s at %s %s (%s)", record["step"], *place, cause, detail)
        self._remember(record, list(causes))
        return list(causes)

    def _remember(self, record: Mapping[str, Any], causes: list[str]) -> None:
        place = _place(record)
        best = self._best.get(place, _Best())
        off_line = 1.0 - record.get("first_ratio", 1.0)
        self._best[place] = _Best(max(best.spread, record.get("spread_ratio", 0.0)), max(best.off_line, off_line))
        self._said[place] = causes


def _place(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["source"], record["tap"]


def _causes(record: Mapping[str, Any], best: _Best) -> dict[str, str]:
    """Each cause with the figure that tells it."""
    if n_bad := record.get("n_not_finite", 0):
        return {"are not finite": f"{n_bad} of {record['n_samples']} samples"}
    found = {}
    rms = record["mean_norm"] / math.sqrt(record["n_features"])
    if rms < _LEAST_RMS:
        found["have vanished"] = f"root mean square {rms:.2g}"
    if rms > _MOST_RMS:
        found["have exploded"] = f"root mean square {rms:.2g}"
    spread, along_one = record["spread_ratio"], record.get("first_ratio", 1.0)
    if spread < _LEAST_SPREAD and spread < _LEAST_OF_BEST * best.spread:
        found["are nearly one point"] = f"spread_ratio {spread:.2g}, was {best.spread:.2g}"
    elif along_one > _MOST_ALONG_ONE and 1.0 - along_one < _LEAST_OF_BEST * best.off_line:
        found["are nearly on one line"] = f"first_ratio {along_one:.4g}, was {1.0 - best.off_line:.2g}"
    return found
