"""What is known of each metric beside its formula: direction, unit, how it is written, whether it has intervals.

An error is better when it is less; a ratio is from 0 to 1 (kappa: at most 1) and is shown in percent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.rounding import fixed

__all__ = [
    "HEADLINE",
    "HIGHER_IS_BETTER",
    "METRICS",
    "best_of",
    "has_intervals",
    "in_unit",
    "is_possible",
    "is_ratio",
    "metric_text",
    "number_text",
    "score_text",
]

T = TypeVar("T")

_ROUNDING = 1e-6


@dataclass(frozen=True)
class _Facts:
    text: str
    is_error: bool = False
    is_ratio: bool = True
    least: float = 0.0
    most: float = 1.0
    # Whether the percentiles of a bootstrap are an interval of it. Those of a minimum over classes and of a sum of
    # absolute values are not: resampling adds noise that such a score takes for less recall, or for more error, so
    # that most resamples lie on one side of the score.
    has_intervals: bool = True


# What a task is ranked by unless it says otherwise. Of several labels a sample, the one that needs no threshold.
HEADLINE: Mapping[Kind, str] = {
    "classification": "accuracy",
    "multilabel": "map_micro",
    "segmentation": "miou_present",
    "regression": "rmse",
}

_OF_CLASSES = {  # of samples or of pixels
    "accuracy": _Facts("accuracy"),
    "macro_accuracy": _Facts("macro accuracy"),
    "macro_f1": _Facts("macro F1"),
}
_FACTS: Mapping[Kind, Mapping[str, _Facts]] = {
    "classification": {
        **_OF_CLASSES,
        "weighted_f1": _Facts("weighted F1"),
        "kappa": _Facts("kappa", least=-1.0),
        "worst_class_recall": _Facts("worst class recall", has_intervals=False),
        "ece": _Facts("ECE", is_error=True, has_intervals=False),
    },
    "multilabel": {
        "f1_micro": _Facts("F1 micro"),
        "map_micro": _Facts("mAP micro"),
        "f1_macro": _Facts("F1 macro"),
        "f1_macro_all": _Facts("F1 macro all"),
        "map_macro": _Facts("mAP macro"),
        "map_macro_all": _Facts("mAP macro all"),
        "subset_accuracy": _Facts("subset accuracy"),
    },
    "segmentation": {
        **_OF_CLASSES,
        "miou_present": _Facts("mIoU present"),
        "miou_all": _Facts("mIoU all"),
        "miou_valid": _Facts("mIoU valid"),
        "fwiou": _Facts("fwIoU"),
    },
    "regression": {
        "rmse": _Facts("RMSE", is_error=True, is_ratio=False, most=math.inf),
        "mae": _Facts("MAE", is_error=True, is_ratio=False, most=math.inf),
        "r2": _Facts("R2", is_ratio=False, least=-math.inf),
    },
}
_OF = {metric: facts for of_kind in _FACTS.values() for metric, facts in of_kind.items()}

# What a task may be ranked by: the keys of `scores` of its outcomes.
METRICS: Mapping[Kind, tuple[str, ...]] = {kind: tuple(of_kind) for kind, of_kind in _FACTS.items()}
HIGHER_IS_BETTER: Mapping[str, bool] = {metric: not facts.is_error for metric, facts in _OF.items()}


def is_ratio(metric: str) -> bool:
    """Whether a score of it is from 0 to 1 (kappa: at most 1), and is shown in percent."""
    return _OF[metric].is_ratio


def is_possible(metric: str, value: float) -> bool:
    """Whether a score of it can be `value`, but for rounding; of a metric that is not known, whatever it is."""
    facts = _OF.get(metric)
    return facts is None or facts.least - _ROUNDING <= value <= facts.most + _ROUNDING


def has_intervals(metric: str) -> bool:
    """Whether percentiles of a bootstrap are an interval of it."""
    return _OF[metric].has_intervals


def best_of(metric: str, items: Iterable[T], score: Callable[[T], float]) -> T:
    """The one of `items` with the best `score`; of equal ones the first."""
    return max(items, key=score) if HIGHER_IS_BETTER[metric] else min(items, key=score)


def in_unit(metric: str, value: float) -> float:
    """A score as it is shown: ratios in percent."""
    return 100 * value if is_ratio(metric) else value


def metric_text(metric: str) -> str:
    """What is shown, with its unit, and a remark where less is better."""
    unit = " %" if is_ratio(metric) else ""
    return f"{_OF[metric].text}{unit}{'' if HIGHER_IS_BETTER[metric] else ', less is better'}"


def number_text(metric: str, value: float, sign: str = "") -> str:
    """`71.8` of 0.718, or of what is no ratio `0.718`; with `sign` "+" also that of a gain."""
    shown = in_unit(metric, value)
    return fixed(shown, 1, sign) if is_ratio(metric) else f"{shown:{sign}.3g}"


def score_text(metric: str, score: float) -> str:
    """`71.8 %`, or of what is no ratio `0.718`."""
    return number_text(metric, score) + (" %" if is_ratio(metric) else "")
