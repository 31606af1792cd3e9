"""Results of several models on several tasks side by side: what is compared with what.

Part of the training set, bands and size are conditions: one for all on a task. Where features are read, and how tokens
are pooled, is how a model is used: each has its own. Nothing is left out in silence: `absence`, `flags` and `left_out`
say what a table lacks and why.

What of a model is compared (`reading_rank`, `probe_shown`) is fixed before any score of the test samples is looked at;
what of a rival is, is what is best of it. So no choice flatters the model. A training run is shown by the same rules
(`ssl_eo.eval.summary`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ssl_eo.eval.bootstrap import Interval
from ssl_eo.eval.entrants import Entrant, EntrantKind, entrants_of, identity_of, is_encoder, shape_of
from ssl_eo.eval.experiments import AXES, CONDITIONS, Score, Setting, newest_whole, paired_interval, split_digest
from ssl_eo.eval.features import ALL_TAPS
from ssl_eo.eval.metrics import HIGHER_IS_BETTER, best_of, is_ratio, number_text
from ssl_eo.eval.partitions import parse_partition
from ssl_eo.eval.records import RESULTS, Record, has_results, merged, read_results
from ssl_eo.eval.task_flags import flags_of_records, flags_of_scores, why_left_out
from ssl_eo.eval.wording import condition_text, reading_text

__all__ = ["Comparison", "Margin", "PairedMargin", "probe_shown", "reading_rank"]

_PROBE_SHOWN = "ridge"  # where one has to stand for all: it takes every kind of labels, and chooses on train alone
_ORDERS = {  # of values that do not stand before these in the order of their letters
    "subset": ("all", "rgb", "no-rgb", "random"),
    "size": ("native",),
    "tap": ("last", ALL_TAPS),
}
_Place = tuple[str, str, str]  # identity of the entrant, task, probe
_Conditions = tuple[str, str, str]  # values of `CONDITIONS`


@dataclass(frozen=True)
class Margin:
    """A model against one rival, by one probe; of one that needs no training, the best of it."""

    probe: str
    metric: str
    score: float
    rival: str  # title
    rival_kind: EntrantKind
    rival_score: float

    @property
    def gain(self) -> float:
        """How much better the model is: above 0 where it is, whether much or little of the metric is good."""
        gain = self.score - self.rival_score
        return gain if HIGHER_IS_BETTER[self.metric] else -gain

    @property
    def text(self) -> str:
        """`+12.3 points`, or of what is no ratio `+0.123`."""
        return number_text(self.metric, self.gain, sign="+") + (" points" if is_ratio(self.metric) else "")


def reading_rank(tap: str) -> tuple[bool, bool, str]:
    """The greatest is where an encoder is read for comparisons: all taps together, else the last, else the deepest."""
    return (tap == ALL_TAPS, tap == "last", tap)


def probe_shown(probes: Sequence[str]) -> str:
    """Of the probes that were run, the one that stands for all where only one can: chosen by name, by no score."""
    return _PROBE_SHOWN if _PROBE_SHOWN in probes else probes[0]


@dataclass(frozen=True)
class PairedMargin:
    """How much better a model is than a rival, in the metric's own unit; above 0 is better."""

    model: Entrant
    rival: Entrant
    margin: Margin
    interval: Interval | None  # of the gain over the test samples, the same resamples for both
    reading: str  # of the rival, or of both if that is a model, where they are not read alike


class Comparison:
    """All results of some evaluations."""

    def __init__(self, records: Iterable[Record]) -> None:
        """Raises `ValueError` where a task is ranked by several metrics."""
        every = merged(records)
        self.results = [r for r in every if r["kind"] == "result"]
        self.every_problem = [r for r in every if r["kind"] != "result"]  # of all jobs, also where several fail alike
        self.problems = _distinct(self.every_problem)
        self._of: dict[str, list[Record]] = {}
        for r in self.results:
            self._of.setdefault(str(r["task"]), []).append(r)
        self.tasks = list(self._of)
        self.probes = list(dict.fromkeys(str(r["probe"]) for r in self.results))
        self.metrics = {task: _metric_of(task, of) for task, of in self._of.items()}
        self.entrants = entrants_of(self.results)
        self.datasets = {task: _dataset_of(task, of) for task, of in self._of.items()}
        self._shapes = {identity_of(r): shape_of(r) for r in self.results if r["features"] == "encoder"}
        self._steps = {(task, axis): _steps(of, axis) for task, of in self._of.items() for axis in AXES}
        self._conditions = {task: _commonest_conditions(of) for task, of in self._of.items()}
        self._scores = _scores(self.results)
        # What an older experiment found is no more, where a newer one is shown: a leak that was mended, for one.
        self._shown_of = {
            task: [r for place, of in self._scores.items() if place[1] == task for s in of.values() for r in s.records]
            for task in self.tasks
        }
        self.left_out = {task: why for task, of in self._shown_of.items() if (why := why_left_out(of))}
        self._readings = {place: self._reading_of(place[1], of) for place, of in self._scores.items()}
        self._examples = {task: self._find_example(task) for task in self.tasks}

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Comparison:
        """Of the results in all `folders`. Raises `ValueError` where one has none."""
        for folder in folders:
            if not has_results(folder):
                raise ValueError(f"{folder} has no {RESULTS}: it is not a folder that ssl-eo eval wrote to")
        return cls([r for folder in folders for r in read_results(folder)])

    @property
    def models(self) -> list[Entrant]:
        return [e for e in self.entrants if e.kind == "model"]

    def steps(self, task: str, axis: str) -> list[str]:
        """Values that an axis has in the results of a task; parts of the training set by size."""
        return self._steps[task, axis]

    def parts(self, task: str) -> dict[str, list[str]]:
        """Parts of the training set of a task by where they come from: `all` of it, `published`, `nested` (ours).

        Parts of one origin lie on one curve, with the whole; those of another are of another draw.
        """
        origins = {str(r["partition"]): str(r["partition_of"]) for r in self._of[task]}
        return {
            origin: [part for part in self.steps(task, "partition") if origins[part] == origin]
            for origin in ("all", "published", "nested")
        }

    def condition(self, task: str, axis: str) -> str:
        """Where entrants are compared: what most of them have; of equals most labels, all bands, own size."""
        return self._conditions[task][CONDITIONS.index(axis)]

    def score(self, entrant: Entrant, task: str, probe: str, **fixed: str) -> Score | None:
        """Under the conditions of the task, read as the entrant is, but for the axes that are `fixed`.

        None where that was not measured, see `absence`.
        """
        place = (entrant.identity, task, probe)
        if place not in self._scores:
            return None
        usual = Setting(*self._conditions[task], *self._readings[place])
        return self._scores[place].get(usual._replace(**fixed))

    def reading(self, entrant: Entrant, tasks: Sequence[str], probes: Sequence[str]) -> str:
        """How an entrant is read on `tasks` by `probes`; empty where encoders are read alike, controls in one way.

        Where it is not read at the same depths on all of them, it says where how.
        """
        if entrant.kind == "control":
            differs = any(self._n_readings(entrant, task, probe) > 1 for task in tasks for probe in probes)
        else:
            differs = self.readings_differ(tasks, probes)
        if not differs:
            return ""
        places: dict[tuple[str, str], list[str]] = {}
        for task, probe in ((task, probe) for task in tasks for probe in probes):
            if (reads := self._reads(entrant, task, probe)) is not None:
                places.setdefault(reads, []).append(f"{task} by {probe}" if len(probes) > 1 else task)
        # Patches are not pooled: at one depth that is no other way to read.
        pooled = {tap for tap, pool in places if pool != "None"}
        of = {reads: where for reads, where in places.items() if reads[1] != "None" or reads[0] not in pooled}
        if not any(self.is_mixed(entrant, tasks, probe) for probe in probes):
            return "; ".join(reading_text(*reads) for reads in of)
        usual, *others = sorted(of, key=lambda reads: -len(of[reads]))
        return "; ".join([reading_text(*usual), *(f"{reading_text(*r)} on {', '.join(of[r])}" for r in others)])

    def is_mixed(self, entrant: Entrant, tasks: Sequence[str], probe: str) -> bool:
        """Whether an encoder is read at other depths on some of `tasks` than on others: it has no row of one kind."""
        reads = [self._reads(entrant, task, probe) for task in tasks] if entrant.kind != "control" else []
        return len({tap for tap, _ in filter(None, reads)}) > 1

    def readings_differ(self, tasks: Sequence[str], probes: Sequence[str]) -> bool:
        """Whether encoders are read in different ways on one of `tasks` by one of `probes`, or one at mixed depths."""
        encoders = [e for e in self.entrants if e.kind != "control"]
        return any(self.is_mixed(e, tasks, probe) for e in encoders for probe in probes) or any(
            len({self._reads(e, task, probe) for e in encoders} - {None}) > 1 for task in tasks for probe in probes
        )

    def absence(self, entrant: Entrant, task: str, probe: str) -> str:
        """What there is instead of a score under the conditions of the task."""
        settings = self._scores.get((entrant.identity, task, probe))
        if settings is None:
            return "not measured"
        usual = Setting(*self._conditions[task], "", "")
        differing = [axis for axis in CONDITIONS if all(getattr(s, axis) != getattr(usual, axis) for s in settings)]
        own = {axis: dict.fromkeys(getattr(s, axis) for s in settings) for axis in differing or CONDITIONS}
        said = (" or ".join(condition_text(axis, value) for value in of) for axis, of in own.items())
        return f"only with {', '.join(said)}"

    def example(self, task: str) -> Score:
        """A score of the test samples that most scores of the task are of."""
        return self._examples[task]

    def is_compared(self, task: str, score: Score) -> bool:
        """Whether it is of the test samples that most scores of the task are of."""
        return score.is_on_the_samples_of(self.example(task))

    def shown(self, task: str) -> list[tuple[Entrant, str, Score]]:
        """Entrants, probes and scores under the conditions of a task."""
        found = ((e, p, self.score(e, task, p)) for p in self.probes for e in self.entrants)
        return [(entrant, probe, score) for entrant, probe, score in found if score is not None]

    def margins(self, task: str, probe: str) -> list[PairedMargin]:
        """Each model against the random encoder of its shape and against the best control, on the same test samples."""
        found = []
        for model in self.models:
            own = self.score(model, task, probe)
            if own is not None:
                for rival, score in self._rivals(model, own, task, probe):
                    margin = Margin(probe, self.metrics[task], own.value, rival.title, rival.kind, score.value)
                    if rival.kind == "control":
                        is_plain = self._n_readings(rival, task, probe) == 1
                    else:
                        is_plain = score.setting[3:] == own.setting[3:]
                    reading = "" if is_plain else reading_text(*score.setting[3:])
                    found.append(PairedMargin(model, rival, margin, paired_interval(own, score), reading))
        return found

    def duels(self, task: str, probe: str) -> list[PairedMargin]:
        """Each model against each that comes after it, on the same test samples, each read in its own way."""
        found = []
        for model, rival in combinations(self.models, 2):
            own, other = self.score(model, task, probe), self.score(rival, task, probe)
            if own is not None and other is not None and own.is_on_the_samples_of(other):
                margin = Margin(probe, self.metrics[task], own.value, rival.title, rival.kind, other.value)
                reads = [reading_text(*score.setting[3:]) for score in (own, other)]
                reading = "" if len(set(reads)) == 1 else " against ".join(reads)
                found.append(PairedMargin(model, rival, margin, paired_interval(own, other), reading))
        return found

    def flags(self, task: str) -> list[str]:
        """Known defects of a task, and those that were found in its results."""
        found, scores = flags_of_records(self._shown_of[task]), self.shown(task)
        if apart := dict.fromkeys(e.title for e, _, score in scores if not self.is_compared(task, score)):
            found.append(f"scored on other test samples than the rest, and not compared with it: {', '.join(apart)}")
        found += flags_of_scores(scores, self.metrics[task], self.condition(task, "partition"))
        return list(dict.fromkeys(found))

    def _n_readings(self, entrant: Entrant, task: str, probe: str) -> int:
        return len({setting[3:] for setting in self._scores.get((entrant.identity, task, probe), {})})

    def _reads(self, entrant: Entrant, task: str, probe: str) -> tuple[str, str] | None:
        return None if (score := self.score(entrant, task, probe)) is None else score.setting[3:]

    def _reading_of(self, task: str, settings: Collection[Setting]) -> tuple[str, str]:
        """Tap and pool of an entrant: all taps, else the last, else the deepest; of several pools the task's first."""
        pools = self.steps(task, "pool")
        at_conditions = [s for s in settings if s[:3] == self._conditions[task]]
        chosen = max(
            at_conditions or settings,
            key=lambda s: (reading_rank(s.tap), -pools.index(s.pool) if s.pool in pools else 0),
        )
        return chosen.tap, chosen.pool

    def _find_example(self, task: str) -> Score:
        every = [s for place, of in self._scores.items() if place[1] == task for s in of.values()]
        candidates = [score for _, _, score in self.shown(task)] or every
        return max(
            candidates,
            key=lambda a: (sum(a.is_on_the_samples_of(b) for b in candidates), split_digest(a.records[0], "test")),
        )

    def _rivals(self, model: Entrant, own: Score, task: str, probe: str) -> list[tuple[Entrant, Score]]:
        """The random encoder as it is read best, and the best control."""
        found: dict[str, list[tuple[Entrant, Score]]] = {"random": [], "control": []}
        for e in self.entrants:
            if e.kind == "control" or e.identity == self._shapes[model.identity]:
                of = self._scores.get((e.identity, task, probe), {})
                scores = [score for setting, score in of.items() if setting[:3] == self._conditions[task]]
                found[e.kind] += [(e, score) for score in scores if score.is_on_the_samples_of(own)]
        named = [sorted(of, key=lambda pair: (pair[0].title, pair[1].setting)) for of in found.values() if of]
        return [best_of(self.metrics[task], of, lambda pair: pair[1].value) for of in named]


def _metric_of(task: str, records: Sequence[Record]) -> str:
    found = list(dict.fromkeys(str(r["metric"]) for r in records))
    if len(found) > 1:
        raise ValueError(f"task {task} is ranked by {' and '.join(found)} in these results: report them apart")
    return found[0]


def _dataset_of(task: str, records: Sequence[Record]) -> str:
    """What the newest record of the task that says it says; without one the task is a dataset of its own."""
    said = [r for r in records if r.get("dataset")]
    return max((str(r["date"]), str(r["dataset"])) for r in said)[1] if said else task


def _steps(records: Sequence[Record], axis: str) -> list[str]:
    """Taps and pools are of encoders, pools not of their patches."""
    of_encoders = [r for r in records if axis in CONDITIONS or (is_encoder(r) and r[axis])]
    return sorted({str(r[axis]) for r in of_encoders}, key=lambda value: _place(axis, value))


def _place(axis: str, value: str) -> tuple[float, str]:
    """Where a value stands among those of its axis, whatever the order in which they were measured."""
    if axis == "partition":
        return parse_partition(value).ratio, value
    order = _ORDERS.get(axis, ())
    if value.isdecimal():
        return len(order) + float(value), value
    return order.index(value) if value in order else -1, value


def _commonest_conditions(records: Sequence[Record]) -> _Conditions:
    found: dict[_Conditions, set[str]] = {}
    for r in records:
        condition = (str(r["partition"]), str(r["subset"]), str(r["size"]))
        found.setdefault(condition, set()).add(identity_of(r))

    def rank(condition: _Conditions) -> tuple[float, float, bool, float, float, _Conditions]:
        name, subset, size = condition
        part = parse_partition(name)
        places = (-_place("subset", subset)[0], -_place("size", size)[0])
        return len(found[condition]), part.ratio, not part.is_nested, *places, condition

    return max(found, key=rank)


def _scores(results: Sequence[Record]) -> dict[_Place, dict[Setting, Score]]:
    records: dict[_Place, dict[Setting, list[Record]]] = {}
    for r in results:
        settings = records.setdefault((identity_of(r), str(r["task"]), str(r["probe"])), {})
        settings.setdefault(Setting.of(r), []).append(r)
    return {place: {s: newest_whole(s, of) for s, of in settings.items()} for place, settings in records.items()}


def _distinct(problems: Sequence[Record]) -> list[Record]:
    """Controls are measured anew for each model, and fail alike."""
    keys = ("kind", "task", "features", "model", "subset", "size", "tap", "probe", "partition", "seed", "error")
    return list({tuple(str(r.get(k)) for k in keys): r for r in problems}.values())
