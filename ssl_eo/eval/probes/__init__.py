"""Probes: how much of the labels can a simple model read off features that were computed once?

One module a probe, whose name is that of the probe: `knn`, `ridge`, `logistic`, `linear`. They disagree in a telling
way: kNN needs classes to form clusters as they lie, the others only need them to be linearly separable.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

from ssl_eo.components import resolve, suggest
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.probes.base import Fitted, Labelled, Prediction, is_at_optimum

__all__ = [
    "Fitted",
    "Labelled",
    "Prediction",
    "build_config",
    "check_probe",
    "find_probe",
    "is_at_optimum",
    "kinds_of",
    "takes_seed",
]


def find_probe(name: str) -> ModuleType:
    """The module of the probe `name`; raises `ValueError` that suggests another where there is none."""
    return resolve("ssl_eo.eval.probes", name)


def kinds_of(name: str) -> tuple[Kind, ...]:
    """The kinds of targets that the probe `name` takes."""
    kinds: tuple[Kind, ...] = find_probe(name).KINDS
    return kinds


def check_probe(name: str, kind: Kind) -> None:
    """Raise `ValueError` unless there is a probe `name` that takes `kind`."""
    if kind not in kinds_of(name):
        raise ValueError(f"probes: {name} does not take {kind}; it takes {', '.join(kinds_of(name))}")


def takes_seed(name: str) -> bool:
    """Whether the probe `name` draws anything."""
    return "seed" in _options(name)


def build_config(name: str, options: Mapping[str, Any]) -> Any:
    """The `Config` of the probe `name`; raises `ValueError` for an option that it has not."""
    known = _options(name)
    for key in options:
        if key not in known:
            raise ValueError(f"probe {name} has no option {key!r}{suggest(key, known)} ({', '.join(known)})")
    return find_probe(name).Config(**options)


def _options(name: str) -> list[str]:
    return [f.name for f in fields(find_probe(name).Config)]
