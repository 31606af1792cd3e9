"""All probes on the features of one forward pass, with what records say of each."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ssl_eo.eval.bootstrap import FEWEST_GROUPS, interval_of, resampled_scores
from ssl_eo.eval.failures import failure
from ssl_eo.eval.features import FeatureSet
from ssl_eo.eval.metrics import Classified, Segmented
from ssl_eo.eval.partitions import parse_partition, partition_rows
from ssl_eo.eval.probes import takes_seed
from ssl_eo.eval.probing import Part, Probed, Probing
from ssl_eo.eval.records import packed
from ssl_eo.eval.tasks import Task
from ssl_eo.seeding import derive_seed

__all__ = ["scored"]

logger = logging.getLogger(__name__)

_MAX_CLASSES_OF_TABLE = 64  # of which the confusion matrix is kept


def scored(
    task: Task,
    sets: Mapping[str, FeatureSet],
    missing: Mapping[str, Mapping[str, Any]],
    features: str,
    n_resamples: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """For all `missing` questions (`Evaluation.questions`), by key: what was asked, and what came out or went wrong.

    `sets` are the features of each split, `features` what they are called.
    """
    probing = Probing(task.shown, sets["train"], sets.get("val"), sets["test"], tuple(task.cfg.no_data))
    parts = _Parts(task, sets["train"])
    known: dict[tuple[Any, ...], dict[str, Any]] = {}  # what was found, by all that it depends on
    # Features are copied for one tap and one part at a time.
    for key, question in sorted(missing.items(), key=lambda item: _place_of(item[1])):
        try:
            part, of_part = parts.of(question["partition"], question["seed"])
            seed = {"seed": question["seed"]} if takes_seed(question["probe"]) else {}
            is_drawn = bool(seed) or of_part["partition_of"] == "nested"
            address = (
                question["tap"],
                question["probe"],
                question["partition"],
                question["seed"] if is_drawn else None,
            )
            if address not in known:  # what draws nothing is the same for all seeds
                probed = probing.run(question["probe"], question["tap"], {**question["options"], **seed}, part)
                known[address] = {"kind": "result", **of_part, **_result(task, probed, sets, n_resamples)}
            found = known[address]
        except Exception as error:
            what = f"{question['probe']} of {features}"
            found = failure(logger, error, "%s: %s could not be measured", task.name, what)
        yield key, {**question, **found}


def _result(task: Task, probed: Probed, sets: Mapping[str, FeatureSet], n_resamples: int) -> dict[str, Any]:
    """Scores with their intervals, by classes, and what the probe chose."""
    outcome, groups = probed.outcome, sets["test"].groups
    scores = outcome.scores()
    headline = task.cfg.headline
    if not math.isfinite(scores.get(headline, math.nan)):
        raise ValueError(f"{headline} is undefined for the samples of {task.name}")
    # The same draws for all features of a dataset, so that differences are of pairs; other datasets have others.
    seed = derive_seed(0, "bootstrap", task.cfg.counts_as)
    n_groups = len(set(groups))
    is_resampled = n_resamples > 0 and n_groups >= FEWEST_GROUPS
    resampled = resampled_scores(outcome, groups, n_resamples, seed) if is_resampled else {}
    bounds = {name: interval_of(values) for name, values in resampled.items()}
    record: dict[str, Any] = {
        "scores": {name: value for name, value in scores.items() if math.isfinite(value)},
        "intervals": {k: [b.low, b.high] for k, b in bounds.items() if math.isfinite(b.low + b.high)},
        "resampled": packed(resampled[headline]) if resampled else None,  # of the headline
        "n_undefined": bounds[headline].n_undefined if resampled else 0,  # of these resamples
        "chosen": probed.chosen,
        "n_features": probed.n_features,
        "n_fitted": probed.n_fitted,
        "n_val": len(sets["val"]) if "val" in sets else 0,
        "n_test": len(sets["test"]),
        "n_groups": n_groups,
        "seconds_probe": round(probed.seconds, 3),
        "per_class": {name: _plain(column) for name, column in outcome.per_class().items()},
    }
    if isinstance(outcome, (Classified, Segmented)) and task.n_classes <= _MAX_CLASSES_OF_TABLE:
        record["confusion"] = outcome.confusion.tolist()
    return record


class _Parts:
    """Parts of the training set, each made once."""

    def __init__(self, task: Task, train: FeatureSet) -> None:
        self._cfg, self._train = task.cfg, train
        self._known: dict[tuple[str, int | None], tuple[Part, dict[str, Any]]] = {}

    def of(self, partition: str, seed: int) -> tuple[Part, dict[str, Any]]:
        """The samples of a partition, and what is said of them."""
        for address in ((partition, None), (partition, seed)):
            if address in self._known:
                return self._known[address]
        cfg, train = self._cfg, self._train
        parsed = parse_partition(partition)
        rows, origin = partition_rows(parsed, cfg.train, cfg.kind, train.keys, train.labels, seed)
        found = Part(rows), {"partition_of": origin, "n_train": len(rows)}
        self._known[partition, seed if origin == "nested" else None] = found
        return found


def _place_of(question: Mapping[str, Any]) -> tuple[str, str, int]:
    """What results have in common that are read off the same rows."""
    return question["tap"], question["partition"], question["seed"]


def _plain(column: Tensor) -> list[float | None]:
    """Numbers as JSON knows them: null where undefined."""
    return [value if math.isfinite(value) else None for value in column.tolist()]
