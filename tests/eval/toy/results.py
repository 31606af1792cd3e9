"""Results as an evaluation writes them, of predictions that are known."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_eo.eval.bootstrap import FEWEST_GROUPS, resampled_scores
from ssl_eo.eval.metrics import Classified, Regressed
from ssl_eo.eval.records import RESULTS, packed

N_TEST, N_CLASSES, N_RESAMPLES = 60, 3, 100
LABELS = torch.from_numpy(np.random.default_rng(0).integers(N_CLASSES, size=N_TEST))
DATE = "2026-01-01T00:00:00+00:00"
WEIGHTS = {"a": "11aa", "b": "22bb"}


def outcome(n_right: int) -> Classified:
    """The first `n_right` of all test samples are right."""
    wrong = (LABELS + 1) % N_CLASSES
    return Classified(torch.where(torch.arange(N_TEST) < n_right, LABELS, wrong), LABELS, N_CLASSES)


def record(features: str, found_by: Classified | Regressed, model: str = "a", **changes: Any) -> dict[str, Any]:
    """What an evaluation writes of one result, as far as reports read it."""
    of_encoder = features in ("encoder", "random_encoder")
    metric = "accuracy" if isinstance(found_by, Classified) else "rmse"
    is_resampled = changes.get("n_groups", N_TEST) >= FEWEST_GROUPS
    found = {
        "kind": "result",
        "task": "scenes",
        "features": features,
        "model": model if of_encoder else None,
        "step": 30 if features == "encoder" else None,
        "weights": WEIGHTS.get(model, model) if features == "encoder" else None,
        "encoder": {"size": "tiny", "patch_size": 8} if of_encoder else None,
        "kind_of_task": "classification" if metric == "accuracy" else "regression",
        "metric": metric,
        "classes": ["sea", "wood", "town"] if metric == "accuracy" else [],
        "data": {"train": "x", "test": "y"},
        "content": {"train": "x", "test": "y"},
        "partition": "1.00x",
        "partition_of": _origin(changes.get("partition", "1.00x")),
        "subset": "all",
        "size": "native",
        "tap": "last" if of_encoder else "pixels",
        "pool": "mean" if of_encoder else None,
        "size_px": 8,
        "interpolation": "bicubic",
        "normalization": "task",
        "version": "0.1.0",
        "torch": "2.10",
        "flags": [],
        "n_leaked": 0,
        "gflop": 0.5 if of_encoder else None,
        "probe": "ridge",
        "seed": 0,
        "n_train": 90,
        "n_val": 0,
        "n_test": N_TEST,
        "n_groups": N_TEST,
        "scores": found_by.scores(),
        "intervals": {},
        "n_resamples": N_RESAMPLES,
        "resampled": packed(resampled_scores(found_by, None, N_RESAMPLES)[metric]) if is_resampled else None,
        "chosen": {},
        "n_features": 8,
        "date": DATE,
        "per_class": {k: [None if v != v else v for v in c.tolist()] for k, c in found_by.per_class().items()},
        **changes,
    }
    if isinstance(found_by, Classified):
        found["confusion"] = found_by.confusion.tolist()
    place = ("task", "features", "model", "weights", "partition", "subset", "size", "tap", "pool", "probe", "seed")
    key = json.dumps([*(found[name] for name in (*place, "date", "version")), sorted(changes.items())])
    return {"key": key, "job": json.dumps([found["task"], features, model]), **found}


def _origin(partition: str) -> str:
    """Where a part of the training set comes from, of a dataset that has all but `nested_...` published."""
    return "nested" if partition.startswith("nested_") else "all" if partition == "1.00x" else "published"


def problem(kind: str, error: str, **changes: Any) -> dict[str, Any]:
    """What it writes of a job that failed (`error`) or had nothing to do (`skipped`)."""
    head = {"task": "scenes", "features": "encoder", "model": "a", "step": 30, "subset": "rgb", "size": "native"}
    return {"key": f"job {kind}", "job": kind, "kind": kind, **head, "error": error, "date": DATE, **changes}


def written(folder: Path, records: Iterable[dict[str, Any]]) -> Path:
    """The folder of an evaluation with these results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder
