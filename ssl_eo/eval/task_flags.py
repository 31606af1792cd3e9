"""What a reader must know of a task before its scores are believed: known defects, and those that its results show.

K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ssl_eo.eval.bootstrap import FEW_GROUPS, FEWEST_GROUPS
from ssl_eo.eval.entrants import Entrant
from ssl_eo.eval.experiments import Score, split_digest
from ssl_eo.eval.leaks import LEAK, MAX_LEAKED_RATIO
from ssl_eo.eval.metrics import has_intervals
from ssl_eo.eval.partitions import parse_partition
from ssl_eo.eval.records import Record

__all__ = ["flags_of_records", "flags_of_scores", "why_left_out"]

_LEAKS = {"n_leaked": "training", "n_leaked_val": "validation"}  # keys of records, and what they count copies of
_FEWEST = 2  # classes, or test samples, of which a score can tell anything
_OF_ONE_CLASS = ("classification", "segmentation")  # kinds in which a constant answer is right where there is one class


def why_left_out(records: Sequence[Record]) -> str:
    """Why the task of these records is left out of what is said of all tasks; empty where it is not."""
    admitted = dict.fromkeys(flag for r in records for flag in r["flags"] if flag.startswith(LEAK))
    ratio, text = _leaked(records, "n_leaked")
    why = [*admitted] or ([f"{LEAK}: {text}"] if ratio > MAX_LEAKED_RATIO else [])
    return "; ".join([*why, *_meaningless(records)])


def flags_of_records(records: Sequence[Record]) -> list[str]:
    """Flags that do not depend on what is compared with what."""
    found = [flag for r in records for flag in r["flags"]]
    found += [text for key in _LEAKS if (text := _leaked(records, key)[1])]
    return [*found, *_meaningless(records), *_equal_parts(records)]


def flags_of_scores(scores: Sequence[tuple[Entrant, str, Score]], metric: str, part: str) -> list[str]:
    """Flags of the scores that are compared with each other, all of the `part` of the training set."""
    found = []
    n_fitted_on = len({split_digest(score.records[0], "train") for _, _, score in scores})
    if n_fitted_on > 1:
        found.append(f"the probes were fitted on {n_fitted_on} different sets of training samples")
    origins = dict.fromkeys(str(score.records[0]["partition_of"]) for _, _, score in scores)
    if len(origins) > 1:
        found.append(f"the part {part} of the training set is {' for some, and for others '.join(origins)}")
    n_groups = min((score.n_groups for _, _, score in scores), default=FEW_GROUPS)
    if not has_intervals(metric):
        found.append(f"no intervals: those of {metric} by a bootstrap are biased")
    elif n_groups < FEWEST_GROUPS:
        found.append(f"no intervals: test samples are of {n_groups} places, fewer than {FEWEST_GROUPS}")
    elif n_groups < FEW_GROUPS:
        found.append(f"intervals are too narrow: test samples are of {n_groups} places, fewer than {FEW_GROUPS}")
    return [*found, *_unequal_seeds(scores), *_experiments(scores)]


def _leaked(records: Sequence[Record], key: str) -> tuple[float, str]:
    """The greatest share of test samples that are in another split too, and what to say of it; `key` counts them."""
    ratio, n, n_test = max((int(r.get(key) or 0) / r["n_test"], int(r.get(key) or 0), r["n_test"]) for r in records)
    text = f"{n} of {n_test:,} test samples ({_percent(ratio)} %) have the content of a {_LEAKS[key]} sample"
    return ratio, text if n else ""


def _percent(ratio: float) -> str:
    """With two digits; 100 of all alone."""
    return f"{100 * ratio:.2g}" if ratio < 0.99 else f"{math.floor(100 * ratio)}"


def _meaningless(records: Sequence[Record]) -> list[str]:
    """Why a score of the task tells nothing, whoever has it."""
    return list(dict.fromkeys(why for r in records if (why := _tells_nothing(r))))


def _tells_nothing(record: Record) -> str:
    if record["n_test"] < _FEWEST:
        return "its scores tell nothing: they are of one test sample"
    names, ignore = [str(name) for name in record["classes"]], record.get("ignore")
    if record.get("kind_of_task") not in _OF_ONE_CLASS:
        return ""
    left = [name for k, name in enumerate(names) if k != ignore]
    support = record.get("per_class", {}).get("support") or []
    present = [name for name, n in zip(names, support, strict=True) if n] if support else left
    what = "pixels" if record["kind_of_task"] == "segmentation" else "samples"
    if len(left) < _FEWEST:
        return f"its scores tell nothing: beside what is ignored there is one class ({', '.join(left)})"
    if len(present) < _FEWEST:
        return f"its scores tell nothing: all test {what} are of one class ({', '.join(present)})"
    return ""


def _equal_parts(records: Sequence[Record]) -> list[str]:
    """Parts of the training set that are as large as another one, though their names differ in size."""
    sizes = {str(r["partition"]): int(r["n_train"]) for r in records}
    found: dict[int, dict[float, str]] = {}
    for part, n in sorted(sizes.items(), key=lambda item: parse_partition(item[0]).ratio):
        found.setdefault(n, {}).setdefault(parse_partition(part).ratio, part)
    return [
        f"the parts {' and '.join(of.values())} of the training set have equally many samples ({n:,}): it is too small"
        " for both"
        for n, of in found.items()
        if len(of) > 1
    ]


def _unequal_seeds(scores: Sequence[tuple[Entrant, str, Score]]) -> list[str]:
    """By which probes some scores are means over more seeds than others."""
    of_probes: dict[str, dict[int, list[str]]] = {}
    for entrant, probe, score in scores:
        of_probes.setdefault(probe, {}).setdefault(len(score.records), []).append(entrant.title)
    probes: dict[str, list[str]] = {}
    for probe, titles in of_probes.items():
        if len(titles) > 1:
            counts = ", ".join(f"{n} ({', '.join(titles[n])})" for n in sorted(titles, reverse=True))
            probes.setdefault(counts, []).append(probe)
    return [f"scores by {', '.join(of)} are over unequal numbers of seeds: {counts}" for counts, of in probes.items()]


def _experiments(scores: Sequence[tuple[Entrant, str, Score]]) -> list[str]:
    """Of which entrants there are results that were not all got in the same way."""
    probes: dict[tuple[str, str, str], list[str]] = {}
    for entrant, probe, score in scores:
        if score.others:
            day = max(str(r["date"]) for r in score.records)[:10]
            probes.setdefault((entrant.title, ", ".join(score.others), day), []).append(probe)
    return [
        f"{title} has results of several experiments by {', '.join(of)}, which differ in {keys}: shown is the newest"
        f" whole one, of {day}"
        for (title, keys, day), of in probes.items()
    ]
